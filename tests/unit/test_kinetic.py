"""Paths of least kinetic energy, and the energies of all paths, against closed forms and exact velocities."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from genmodels.config import load
from genmodels.diffusion.kinetic import energy, gamma, kinetic_path
from genmodels.diffusion.kinetic_schedule import KineticOptimal
from genmodels.diffusion.model import DiffusionModel
from genmodels.diffusion.parametrization import domain
from genmodels.diffusion.schedules import Cosine, Linear, Schedule, Trigonometric, VariancePreserving
from genmodels.diffusion.separation import Separation, Spectrum, of_mixture
from genmodels.diffusion.tabulated import Table, Tabulated
from genmodels.metrics.kinetic import KineticEnergy
from genmodels.metrics.metric import Subject
from genmodels.networks.mlp import MLP
from genmodels.networks.network import Network
from genmodels.registry import ConfigError, build
from genmodels.rng import SeedNoise
from genmodels.training.loop import train
from genmodels.transforms import Affine, Identity
from genmodels.types import Batch, Likelihood, NotApplicable, Samples
from tests.evaluation_fakes import Points, UniformLevels
from tests.oracles import MIXTURE
from tests.unit.test_separation import TwoPoints, randn, seeded

TINY = 1e-14  # a floor that is none, even for two points, whose γ begins like s⁶
FACTS = {"num_classes": None, "condition_shape": None, "bin_width": None}


class Apart(Separation):
    """λ = 1: told apart under any noise."""

    mean_square, variance, span = 1.0, 1.0, (0.05, 1000.0)

    def residual(self, s: Tensor) -> Tensor:
        return torch.zeros_like(s, dtype=torch.float64)


def pair(delta: float, scale: float = 1.0, mean_square: float | None = None) -> Spectrum:
    """Two axes of variance scale² (1 ± delta)."""
    return Spectrum(scale**2 * torch.tensor([1 - delta, 1 + delta], dtype=torch.float64), mean_square)


def at(path: Table, *taus: float) -> Tensor:
    """[T, 2] (α, σ) at times from noise (0) to data (1)."""
    return torch.stack(path.scales(1 - torch.tensor(taus, dtype=torch.float64)), 1)


# ---- the path of least energy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "angle", "least", "taus", "points"),
    [
        (pair(0.5), math.pi / 12, 0.06814835, (0.25, 0.5), [[0.50657110, 0.85475605], [0.71331553, 0.68858105]]),
        (pair(0.9), 0.55988476, 0.30536736, (0.5,), [[0.73827447, 0.61531211]]),
        (TwoPoints(), 0.69126439, 0.45911887, (0.5,), [[0.8848, 0.3199]]),
    ],
    ids=["delta .5", "delta .9", "two points"],
)
def test_exact_examples(data, angle, least, taus, points):
    found = kinetic_path(data, TINY, 513)
    assert found.angle == pytest.approx(angle, abs=1e-7) and found.least == pytest.approx(least, abs=1e-7)
    tolerance = 5e-5 if isinstance(data, TwoPoints) else 1e-6  # its point is known to four digits
    torch.testing.assert_close(at(Table(found.knots), *taus), torch.tensor(points).double(), rtol=0, atol=tolerance)
    assert energy(Table(found.knots), data).marginal == pytest.approx(least, rel=2e-3)  # beside an infinite speed


def test_gaussian_pairs_follow_their_closed_form_everywhere():
    """φ(θ) = asin(δ sin² θ)/2, so that sin² θ_t = sin(2 φ_t)/δ on the chord from (1, 0) to (1, Φ)."""
    for delta in (0.2, 0.5, 0.9):
        path, whole = Table(kinetic_path(pair(delta), TINY, 513).knots), math.asin(delta) / 2
        tau = torch.linspace(0.02, 0.98, 60, dtype=torch.float64)
        x, y = 1 - tau + tau * math.cos(whole), tau * math.sin(whole)
        r, sine = torch.hypot(x, y), (torch.sin(2 * torch.atan2(y, x)) / delta).sqrt()
        expected = torch.stack((r * sine, r * (1 - sine**2).sqrt()), 1)
        torch.testing.assert_close(at(path, *tau.tolist()), expected, rtol=0, atol=3e-6)


def test_data_told_apart_under_any_noise_have_the_linear_path():
    found, t = kinetic_path(Apart()), torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert found.angle == pytest.approx(math.pi / 2, abs=1e-12) and found.least == pytest.approx(2, abs=1e-12)
    torch.testing.assert_close(
        torch.stack(Table(found.knots).scales(t)), torch.stack(Linear().scales(t)), rtol=0, atol=1e-6
    )
    slopes = torch.stack(Table(found.knots)(t)[2:])
    torch.testing.assert_close(slopes, torch.stack(Linear()(t)[2:]), rtol=0, atol=1e-4)
    assert found.floored == 0


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_for_gaussian_data_of_any_scale_it_is_optimal_transport(scale):
    """E = mean (√λ - 1)² = W2²/D, which no path of any kind is below."""
    data = pair(0.6, scale)
    found = kinetic_path(data, TINY, 513)
    assert found.least == pytest.approx(data.distance(), rel=1e-8)
    assert energy(Table(found.knots), data).marginal == pytest.approx(data.distance(), rel=2e-3)
    ends = torch.stack(Table(found.knots).scales(torch.tensor([0.0, 1.0])))
    assert ends.tolist() == [[pytest.approx(1, abs=1e-14), 0.0], [0.0, 1.0]]


SETS = {"pair": pair(0.9), "points": TwoPoints(), "small": pair(0.5, 0.4), "moved": pair(0.7, 0.8, mean_square=1.5)}


@pytest.mark.parametrize("name", SETS)
def test_no_other_path_has_less_energy(name):
    """Neither the standard ones nor small changes of it that keep its ends; W2² between Gaussians bounds them all."""
    data = SETS[name]
    found, best = kinetic_path(data, 1e-4), kinetic_path(data, TINY).least
    own = energy(Table(found.knots), data).marginal
    assert best <= own * (1 + 1e-9) and own <= found.least and own < 1.01 * best
    for other in (Linear(), Trigonometric(), VariancePreserving(), Cosine()):
        assert energy(other, data, (1e-3, 1.0)).marginal > own
    for k in range(6):
        t, angle, turn, radius, rate = found.knots.clone()
        bump, slope = (
            torch.sin(math.pi * (1 + k // 2) * t),
            math.pi * (1 + k // 2) * torch.cos(math.pi * (1 + k // 2) * t),
        )
        if k % 2:
            radius, rate = radius + 0.05 * bump, rate + 0.05 * slope
        else:  # of the time in which the angle is gone through
            angle, turn = angle + 0.04 * bump, turn + 0.04 * slope
        assert energy(Table(torch.stack((t, angle, turn, radius, rate))), data).marginal > own
    spectrum = data if isinstance(data, Spectrum) else Spectrum(torch.ones(1))
    assert own > spectrum.distance()
    if name == "points":
        assert own > 2 - 2 * math.sqrt(2 / math.pi), "W2² of N(0, 1) and ±1 is E(|z| - 1)²"


def test_the_floor_trades_energy_for_speed():
    """With a floor f of γ the conditional energy falls with f, and E rises above that of the chord, both always."""
    paths = [kinetic_path(TwoPoints(), floor) for floor in (1e-4, 0.01, 0.1, 1.0)]
    found = [energy(Table(path.knots), TwoPoints()) for path in paths]
    assert sorted(e.marginal for e in found) == [e.marginal for e in found]
    assert sorted((e.conditional for e in found), reverse=True) == [e.conditional for e in found]
    assert [path.floored for path in paths] == sorted(path.floored for path in paths)
    linear = Table(paths[-1].knots).scales(torch.tensor(0.3))
    assert float(linear[0]) == pytest.approx(0.7, abs=1e-6), "a floor of 1 is λ = 1"


def test_least_separated_data_take_the_floor_throughout():
    """N(0, I): γ = 0, every circle costs nothing but its radius, and E = 0 at a constant radius."""
    normal = Spectrum(torch.ones(2))
    assert gamma(normal, torch.linspace(0, 1.5, 9, dtype=torch.float64)).abs().max() < 1e-12
    found = kinetic_path(normal, 0.05)
    assert found.floored == pytest.approx(1, abs=1e-9) and found.angle == pytest.approx(math.sqrt(0.05) * math.pi / 2)
    assert energy(Table(found.knots), normal).marginal < 2e-3, "what the chord costs, whose radius dips"


@pytest.mark.parametrize(("floor", "count"), [(0.0, 257), (-1.0, 257), (1.5, 257), (0.05, 3)])
def test_impossible_floors_and_tables_are_refused(floor, count):
    with pytest.raises(ConfigError, match=r"floor <= 1 is needed|at least 9 knots"):
        KineticOptimal(floor=floor, count=count)


# ---- energies --------------------------------------------------------------------------------------------------------


def test_energies_of_standard_paths():
    normal, points, vp = Spectrum(torch.ones(3)), TwoPoints(), VariancePreserving()
    line, trig = Linear(), Trigonometric()
    expected = [
        (energy(line, normal).marginal, 2 - math.pi / 2),
        (energy(line, Apart()).marginal, 2.0),
        (energy(trig, Apart()).marginal, math.pi**2 / 4),
        (energy(line, pair(0.5)).marginal, 0.48272726),
        (energy(line, pair(0.9)).marginal, 0.66903864),
        (energy(line, points).marginal, 0.98240),
        (energy(trig, points).marginal, 0.86896),
        (energy(vp, points, (1e-3, 1.0)).marginal, 1.68351),
        (energy(vp, points, (1e-5, 1.0)).marginal, 1.80614),
        (energy(vp, points, (1e-3, 1.0)).conditional, 3.651),
        (energy(vp, points, (1e-5, 1.0)).conditional, 3.773),
        (energy(line, pair(0.3, 0.5, 0.7)).conditional, 1.7),
    ]
    for k, (found, wanted) in enumerate(expected):
        digits = len(f"{wanted}".partition(".")[2])
        assert found == pytest.approx(wanted, abs=max(0.6 * 10.0**-digits, 1e-9)), k


@pytest.mark.parametrize("path", [Linear(), Trigonometric(), VariancePreserving()], ids=["linear", "trig", "vp"])
def test_energy_is_that_of_the_exact_velocity(path):
    """Of a mixture that is neither centred nor of unit size, by its exact velocity at noised items: no use of λ.

    Quadrature in time with 24 Gauss-Legendre nodes and the same 2000 items and noise at each of them.
    """
    span = (max(path.t_min, 1e-2), path.t_max)
    data = of_mixture(MIXTURE, ratios=torch.logspace(-1.5, 3, 60).double(), seeds=1000)
    nodes, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(24))
    noise = SeedNoise(2000)
    x, eps = MIXTURE.sample(noise, dtype=torch.float64), noise.normal(2, dtype=torch.float64)
    items = torch.zeros(2000, dtype=torch.float64)
    for node, weight in zip(nodes, weights, strict=True):
        s = path(span[0] + (span[1] - span[0]) * (node + 1) / 2)
        v = MIXTURE.velocity(s.alpha * x + s.sigma * eps, *s)
        items += weight * (span[1] - span[0]) / 2 * v.square().mean(1)
    stderr = float(items.std()) / math.sqrt(2000)
    assert stderr < 0.05
    assert energy(path, data, span).marginal == pytest.approx(float(items.mean()), abs=4 * stderr + 0.01)


# ---- the schedule in a model -----------------------------------------------------------------------------------------


def batches(x: Tensor, size: int = 50) -> list[Batch]:
    return [Batch(part) for part in x.split(size)]


def model(schedule: Schedule, network=partial(MLP, hidden=(8,)), transform=None, **node) -> DiffusionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiffusionModel(network, schedule, shape=(2,), transform=transform or Identity(), **FACTS, **node)


@pytest.mark.parametrize("estimator", ["in_sample", "leave_one_out", "gaussian"])
def test_prepare_finds_the_path_in_model_space_and_the_state_carries_it(estimator):
    x = randn(300, 2, seed=1) * torch.tensor([1.0, 0.2]) + torch.tensor([0.0, 3.0])
    schedule = KineticOptimal(estimator, floor=0.02, queries=200, count=65)
    made = model(schedule, transform=Affine(loc=1.0, scale=2.0), prediction="eps")
    before, t = torch.stack(schedule.scales(torch.linspace(0, 1, 9))), torch.linspace(0, 1, 9)
    torch.testing.assert_close(before, torch.stack(Linear().scales(t)), rtol=0, atol=1e-6)
    logs = made.prepare(batches(x), generator=seeded())
    y = (x - 1) / 2
    curve = schedule.curve()
    assert curve.mean_square == pytest.approx(float(y.square().mean()), rel=1e-9)
    assert curve.variance == pytest.approx(float((y - y.mean(0)).square().mean()), rel=1e-9)
    energies = schedule.energies()
    assert float(logs["kinetic_energy_kinetic_optimal"]) == pytest.approx(energies["kinetic_optimal"].marginal)
    assert energies["kinetic_optimal"].marginal < min(e.marginal for n, e in energies.items() if n != "kinetic_optimal")
    again = model(KineticOptimal(estimator, floor=0.02, queries=200, count=65), prediction="eps")
    again.load_state_dict({k: v for k, v in made.state_dict().items()})
    found = torch.stack(schedule(t))
    assert torch.equal(torch.stack(again.schedule(t)), found) and (found[:2] - before).abs().max() > 1e-3
    limits = domain("eps", schedule)
    assert (made.denoiser.t_min, made.denoiser.t_max) == (again.denoiser.t_min, again.denoiser.t_max) == limits
    assert limits[1] != domain("eps", Linear())[1]


def test_estimators_tell_memory_from_the_law():
    """Of N(0, diag) the items remembered are told apart at every noise, the law is not."""
    x = randn(400, 2, seed=2) * torch.tensor([1.3, 0.5])
    curves = {}
    for name in ("in_sample", "leave_one_out", "gaussian"):
        schedule = KineticOptimal(name, queries=400)
        schedule.fit([x], generator=seeded())
        curves[name] = schedule.curve().mended()
    law = Spectrum(torch.tensor([1.69, 0.25]))
    s = schedule.curve().ratios
    middle = (s > 0.3) & (s < 1e3)
    assert (curves["gaussian"] - law(s)).abs().max() < 0.02
    assert (curves["leave_one_out"] - law(s))[middle].abs().max() < 0.05
    assert ((curves["in_sample"] - law(s))[s > 30] > 0.4 * (1 - law(s))[s > 30]).all() and curves["in_sample"][
        -1
    ] > 1 - 1e-6


def test_left_out_items_are_missed_by_no_more_than_a_linear_denoiser_misses_them():
    """Of 60 items in 20 dimensions the neighbours tell nothing, and mean and covariance do."""
    x = randn(60, 20) * torch.linspace(0.1, 2, 20)
    found = {}
    for name in ("leave_one_out", "gaussian"):
        schedule = KineticOptimal(name, queries=60)
        schedule.fit([x], generator=seeded())
        found[name] = schedule.curve().values
    assert (found["leave_one_out"] >= found["gaussian"] - 1e-12).all()


def test_data_without_a_path_are_refused():
    for x, message in ((torch.ones(30, 2), "nothing to tell apart"), (torch.ones(1, 2), "at least 2 items")):
        with pytest.raises(ConfigError, match=message):
            KineticOptimal().fit([x], generator=seeded())
    with pytest.raises(ConfigError, match="queries"):
        KineticOptimal(queries=1)
    with pytest.raises(ValueError, match="not known before"):
        KineticOptimal().curve()


CONFIG = [
    *("data.size=200", "model.schedule.queries=40", "model.network.hidden=8", "sample.num_steps=3"),
    *("train.batch_size=32", "train.eval_every=0", "train.sample_every=0", "train.save_every=3"),
]


def test_a_run_has_one_path_from_the_first_step_to_the_last(tmp_path, monkeypatch):
    """Interrupted is uninterrupted, averages and best weights have the same path, and its pictures are there."""
    file = "configs/toy2d/kinetic_optimal.yaml"
    straight = train(load([file], [*CONFIG, "train.steps=6"]), root=tmp_path / "a", quiet=True)
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: None)  # one picture is painted
    stopped = iter([None, None, "enough"])
    config = load([file], [*CONFIG, "train.steps=6"])
    half = train(config, root=tmp_path / "b", quiet=True, stop=lambda: next(stopped, None))
    assert half.step == 3
    resumed = train(config, root=tmp_path / "b", quiet=True)
    for name, value in straight.tensors("model").items():
        assert torch.equal(value, resumed.tensors("model")[name]), name
    paths = [run.load(weights).schedule for run in (straight, resumed) for weights in ("model", None)]
    assert all(torch.equal(path.knots, paths[0].knots) for path in paths) and paths[0].fitted
    assert not torch.allclose(paths[0].knots, KineticOptimal().knots, atol=1e-2)
    told = json.loads((straight.path / "prepare" / "kinetic_path.json").read_text())
    own = told["energies"].pop("kinetic_optimal")["marginal"]
    assert own == pytest.approx(paths[0].energies()["kinetic_optimal"].marginal, rel=1e-12)
    assert {"linear", "trigonometric", "vp"} == set(told["energies"])
    for name, each in told["energies"].items():
        expected = energy(build(Schedule, name), paths[0].curve(), (1e-3, 1.0))
        assert each == pytest.approx(expected._asdict(), rel=1e-12), name
    assert own < min(e["marginal"] for e in told["energies"].values())
    assert told["separation"]["lambda"][-1] == pytest.approx(1, abs=1e-6)
    assert (straight.path / "prepare" / "kinetic_path.png").read_bytes()[:4] == b"\x89PNG"
    assert straight.metrics()[0]["prepare/kinetic_energy_kinetic_optimal"] == pytest.approx(own)
    table = Tabulated(file=str(straight.path / "prepare" / "kinetic_path.csv"))  # the path for other models
    assert torch.equal(table.knots[0], paths[0].knots[0])
    t = torch.linspace(0, 1, 500, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(table(t)), torch.stack(paths[0](t)), rtol=0, atol=1e-10)  # derivatives too
    own, other = (straight.load().sample(4, num_steps=20, schedule=s) for s in (None, table))
    torch.testing.assert_close(other, own, rtol=0, atol=1e-4)


# ---- the metric ------------------------------------------------------------------------------------------------------


class Velocity(Network):
    """The exact velocity of N(0, diag(.4, 1.6)) on a path."""

    def __init__(self, path: Schedule) -> None:
        super().__init__()
        self.path, self.weight = path, torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, t, x, condition=None):
        a, s, da, ds = (part[:, None] for part in self.path(t))
        variances = torch.tensor([0.4, 1.6], dtype=torch.float64)
        return (a * da * variances + s * ds) / (a**2 * variances + s**2) * x


class Drawn(Points):
    """Points of N(0, diag(.4, 1.6))."""

    def __init__(self) -> None:
        super().__init__((400, 2, 1500))
        for split in ("train", "test"):
            self.hold(split, Batch(self.all(split).x.double() * torch.tensor([0.4, 1.6]).sqrt()))


@pytest.mark.parametrize("name", ["linear", "vp", "kinetic"])
def test_metric_of_the_exact_velocity_is_its_energy(name):
    law, data = Spectrum(torch.tensor([0.4, 1.6])), Drawn()
    path = {"linear": Linear(), "vp": VariancePreserving(), "kinetic": Table(kinetic_path(law).knots)}[name]
    made = model(path).double()
    made.denoiser.network = Velocity(path)
    metric = KineticEnergy(points=8)
    metric.start(Subject(made, data, torch.device("cpu"), 500))
    for rows in torch.arange(1500).split(500):
        scores = Likelihood(torch.zeros(len(rows)), "numerical")
        metric.update(Samples(rows, likelihood=scores), data.take("test", rows))
    found = metric.compute()["kinetic_energy"]
    exact = energy(path, law)
    assert found.n == 1500 and found.stderr < 0.06
    assert found.value == pytest.approx(exact.marginal, abs=4 * found.stderr)
    assert found.value < found.references["conditional velocities"] + 4 * found.stderr
    assert found.references["conditional velocities"] == pytest.approx(exact.conditional, rel=0.15)  # of 400 items
    assert found.references["least for Gaussian data"] == pytest.approx(law.distance(), abs=0.03)
    assert found.references["remembered items"] > exact.marginal, "what is remembered is told apart sooner"


def test_metric_needs_a_velocity_and_two_times():
    with pytest.raises(NotApplicable, match="velocity"):
        KineticEnergy().start(Subject(UniformLevels((2,)), Points(), torch.device("cpu"), 64))
    with pytest.raises(ConfigError, match="at least 2 points"):
        KineticEnergy(points=1)
