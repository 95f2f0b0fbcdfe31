"""What sampling works out once for a grid, against the denoiser and the network that it stands for."""

import pytest
import torch

from genmodels.diffusion.denoiser import Guided, denoiser_of
from genmodels.diffusion.grids import Even
from genmodels.diffusion.guidance import WithinInterval
from genmodels.diffusion.remembered import Remembered
from genmodels.diffusion.reverse import DenoiserRows
from genmodels.diffusion.samplers import Guidance, Sampler
from genmodels.diffusion.schedules import Cosine, Linear, VariancePreserving
from genmodels.networks.network import Network
from genmodels.registry import build
from genmodels.rng import SeedNoise
from genmodels.solvers.base import Fixed
from genmodels.solvers.exponential import DDIM
from tests.contracts.test_denoiser import PREDICTIONS, TWO, Oracle, number, path, randn
from tests.contracts.test_network import SMALL

TIMES = torch.linspace(0.9, 0.1, 9, dtype=torch.float64)


class Counting(VariancePreserving):
    """A path that counts how often it is worked out."""

    calls = 0

    def scales(self, t):
        self.calls += 1
        return super().scales(t)


@pytest.mark.parametrize("name", ["linear", "vp", "cosine", "edm", "trigonometric"])
def test_remembered_denoisers_answer_as_they_do_when_asked_anew(name):
    """At times of the grid and between, under every prediction: sums are formed in another order, no more."""
    schedule, x, labels = path(name), randn(5, 1), torch.tensor([0, 1, 2, 3, 1])
    for prediction in PREDICTIONS:
        denoiser = denoiser_of(Oracle(TWO, schedule, prediction, 0.8, 0.3), schedule, prediction, 0.8)
        known = Remembered(denoiser, TIMES)
        asked, rows = DenoiserRows(denoiser, labels), DenoiserRows(denoiser, labels, known)
        for t in (TIMES[0], TIMES[4], number(0.4321), torch.full((5,), 0.3, dtype=torch.float64)):
            found = (*rows.predict(t, x), rows(t, x), *rows.schedule(t), rows.schedule.log_snr(t))
            wanted = (*asked.predict(t, x), asked(t, x), *schedule(t), schedule.log_snr(t))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        for a, b in zip(rows.schedule.scales(TIMES[2]), schedule.scales(TIMES[2]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_a_path_is_worked_out_once_for_a_grid():
    schedule = Counting()
    denoiser = denoiser_of(Oracle(TWO, VariancePreserving(), "eps"), schedule, "eps", 1.0)
    rows = DenoiserRows(denoiser, None, Remembered(denoiser, TIMES))
    before = schedule.calls
    for t in TIMES:
        rows.predict(t, randn(3, 1))
        rows.schedule.scales(t)
    assert schedule.calls == before
    rows.predict(number(0.77), randn(3, 1))
    once = schedule.calls
    rows.predict(number(0.77), randn(3, 1))
    assert before < once == schedule.calls


def test_what_a_prediction_does_not_determine_is_still_refused():
    """eps says nothing of x where α = 0; a grid may hold that time, since no step asks there."""
    denoiser = denoiser_of(Oracle(TWO, Linear(), "eps"), Linear(), "eps", 1.0)
    rows = DenoiserRows(denoiser, None, Remembered(denoiser, torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)))
    for ask in (rows, rows.predict):
        with pytest.raises(ValueError, match="does not determine"):
            ask(number(1.0), randn(2, 1))
    with pytest.raises(ValueError, match="times run from 0"):
        rows.predict(number(1.5), randn(2, 1))


def test_denoisers_with_a_way_of_their_own_are_asked():
    """Guidance within an interval acts there and nowhere else; formulas of the network's answer would miss it."""
    schedule, x, labels = Cosine(), randn(4, 1), torch.tensor([0, 1, 2, 1])
    plain = denoiser_of(Oracle(TWO, schedule, "v", shift=0.5), schedule, "v", 1.0)
    guided = Guided(plain, 2.0, torch.tensor(3))
    within = WithinInterval(guided, plain, (0.5, 1.5))
    known = Remembered(within, TIMES)
    assert known.shares(TIMES[0]) is None and Remembered(guided, TIMES).shares(TIMES[0]) is not None
    for t, other in ((TIMES[4], guided), (TIMES[0], plain), (TIMES[8], plain)):
        found = DenoiserRows(within, labels, known).predict(t, x)
        torch.testing.assert_close(found.x, other.predict(t, x, labels).x, rtol=1e-12, atol=1e-12)


def test_only_solvers_that_draw_have_a_path_of_noise():
    model = type("Model", (), {"check_independent": lambda self, what: None})()
    model.denoiser = denoiser_of(Oracle(TWO, VariancePreserving(), "eps"), VariancePreserving(), "eps", 1.0)
    paths = [
        Sampler(model, 5, DDIM(eta), Fixed(), Even(), Guidance()).path(SeedNoise(3), (1,), torch.float64)
        for eta in (0.0, 1.0)
    ]
    assert paths[0] is None and paths[1].increment(number(0.5), number(0.4)).w.shape == (3, 1)


@pytest.mark.parametrize("name", ["residual_mlp", "dit"])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_one_time_for_all_rows_is_embedded_for_as_many_vectors_as_there_are(name, num_classes):
    """Outputs and gradients are those of a time for every row, for batches larger than the classes and smaller."""
    shape = (1, 4, 4)
    sizes = {"in_shape": shape, "out_shape": shape, "timed": True, "condition_shape": None}
    torch.manual_seed(0)
    node = {"name": name, **SMALL.get(name, {})}
    network = build(Network, node, **sizes, num_classes=num_classes).double()
    for p in network.parameters():  # nothing is to stay at its start of 0
        torch.nn.init.normal_(p, std=0.3)
    for rows in (2, 9):
        x, t = randn(rows, *shape), number(0.37)
        labels = None if num_classes is None else torch.arange(rows) % 4
        found, grads = [], []
        for time in (t, t.expand(rows)):
            network.zero_grad()
            out = network(time, x, labels)
            out.square().sum().backward()
            found.append(out.detach())
            grads.append([p.grad.clone() for p in network.parameters()])
        torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if num_classes is not None:
        with pytest.raises(ValueError, match="class labels"):
            network(t, x, labels.double())
