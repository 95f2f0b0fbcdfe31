"""Lipschitz constants in time: exact values of known laws, and the metric on models with exact answers."""

import math

import pytest
import torch
from scipy.stats import foldnorm
from torch import Tensor

from genmodels.diffusion.schedules import VariancePreserving
from genmodels.diffusion.time_condition import Shared
from genmodels.metrics.lipschitz import Grid, Lipschitz, difference_quotient, grid, perturbed_error
from genmodels.metrics.metric import Metric, Subject
from genmodels.networks.network import Network
from genmodels.registry import ConfigError, build
from genmodels.types import NotApplicable, Samples, SupportsDenoise
from tests.contracts.test_denoiser import randn
from tests.evaluation_fakes import Classes, Points, Threshold, UniformLevels
from tests.unit.test_time_condition import ddpm, make

VP = VariancePreserving()
MEAN = math.sqrt(2 / math.pi)  # E|Z|
ONE = torch.ones(1, 1, dtype=torch.float64)


def test_discrete_constants_of_known_laws():
    """DDPM's steps, t' = t - 1: ε̂, x̂ and v for N(0, .5²), where they are c(t) x and E|x_t| is known, and ε̂ for the
    point mass at 1, where ε̂(x_t, t') - ε is Gaussian."""
    alpha, sigma = ddpm()
    v = 0.25 * alpha**2 + sigma**2
    answers = {"eps": sigma / v, "x": 0.25 * alpha / v, "v": 0.75 * alpha * sigma / v}
    expected = {
        "eps": (0.00770, 0.00659, 0.00519, 0.00213, 0.00016),
        "x": (0.000167, 0.000195, 0.000413, 0.00176, 0.00033),
        "v": (0.00577, 0.00494, 0.00388, 0.00118, 0.00087),
        "point": (0.385, 0.223, 0.0606, 0.00765, 0.00147),
    }
    half = {"eps": 5e-6, "x": 5e-6, "v": 5e-6, "point": 5e-4}  # of the last digit, at the most
    for j, step in enumerate((1, 2, 10, 100, 500)):
        t, before = torch.tensor(float(step)), torch.tensor(float(step - 1))
        for name, c in answers.items():
            found = difference_quotient(lambda t, x, c=c: c[int(t)] * x, t, before, ONE) * MEAN * v[step].sqrt()
            assert abs(found.item() - expected[name][j]) < half[name]
        # ε̂(x, t) = (x - α)/σ along x_t = α + σ ε: an affine function of ε, of which the mean modulus is known
        point = lambda t, x: (x - alpha[int(t)]) / sigma[int(t)]  # noqa: E731
        low, high = (difference(point, t, before, alpha[step] + sigma[step] * e) for e in (0.0, 1.0))
        spread = abs(high - low)
        assert abs(foldnorm(abs(low) / spread, scale=spread).mean() - expected["point"][j]) < half["point"]


def difference(answer, t: Tensor, before: Tensor, x: Tensor) -> float:
    """p(t, x) - p(t', x) at one number x, whose modulus `difference_quotient` must give."""
    x = x.reshape(1, 1)
    signed = (answer(t, x) - answer(before, x)).item()
    assert math.isclose(difference_quotient(answer, t, before, x).item(), abs(signed), rel_tol=1e-12)
    return signed


def gaussian_eps(t: Tensor, x: Tensor) -> Tensor:
    """ε̂ for data N(0, .5²) on the path "vp"."""
    alpha, sigma = VP.scales(t)
    return (sigma / (0.25 * alpha**2 + sigma**2)).reshape(-1, 1) * x


def test_continuous_constants_grow_like_the_inverse_root():
    """E|∂ε̂/∂t|, data N(0, .5²) on "vp": quotients at times a millionth apart; the slope between 1e-5 and 1e-4."""
    t = torch.tensor([1e-5, 1e-4, 1e-3, 1e-2, 1e-1], dtype=torch.float64)
    alpha, sigma = VP.scales(t)
    scale = (0.25 * alpha**2 + sigma**2).sqrt()
    found = difference_quotient(gaussian_eps, t * (1 + 5e-7), t * (1 - 5e-7), torch.ones(5, 1).double()) * MEAN * scale
    expected = torch.tensor([79.907, 25.604, 9.115, 5.254, 2.129], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-4)
    assert abs((found[1] / found[0]).log10().item() + 0.494) < 6e-4
    asymptote = 0.5 * math.sqrt(0.1 / 1e-5) * MEAN / 0.5
    assert abs(found[0] / asymptote - 1) < 2e-3
    # as a function of the log-SNR nothing grows: |∂ε̂/∂λ| = |∂ε̂/∂t|/|dλ/dt| falls towards the data
    s = VP(t)
    rate = 2 * (s.dsigma / s.sigma - s.dalpha / s.alpha)
    assert ((found / rate).diff() > 0).all() and (found / rate)[0] < 1e-3


def test_the_norm_is_that_of_the_item_and_of_the_interval():
    x = randn(4, 3, 2)
    answer = lambda t, x: t.reshape(-1, 1, 1) ** 2 * x if t.ndim else t**2 * x  # noqa: E731
    t, before = torch.tensor([0.5, 0.4, 0.3, 0.9]).double(), torch.tensor([0.1, 0.6, 0.2, 0.8]).double()
    torch.testing.assert_close(difference_quotient(answer, t, before, x), (t + before) * x.flatten(1).norm(dim=1))
    torch.testing.assert_close(difference_quotient(answer, t[0], before[0], x), 0.6 * x.flatten(1).norm(dim=1))


def test_perturbed_errors_of_a_gaussian():
    """ε̂ = c x is off by ε̂(x_t) - ε + c δ: its mean square is 1 - σ c + c² s², δ of standard deviation s."""
    n, t, s = 200_000, torch.tensor(0.05, dtype=torch.float64), 0.3
    alpha, sigma = VP.scales(t)
    y, eps, delta = 0.5 * randn(n, 1, seed=1), randn(n, 1, seed=2), s * randn(n, 1, seed=3)
    c = sigma / (0.25 * alpha**2 + sigma**2)
    for off, more in ((0 * delta, 0.0), (delta, float(c * s) ** 2)):
        found = perturbed_error(gaussian_eps, t, alpha * y + sigma * eps, eps, off)
        expected = float(1 - sigma * c) + more
        assert abs(found.mean() - expected) < 5 * found.std() / n**0.5  # 5 standard errors, about 2 %


# ---- the metric ------------------------------------------------------------------------------------------------------


class Exact(Network):
    """ε̂ for data N(0, .5²) on the path "vp", at the time that it is told."""

    def forward(self, t: Tensor | None, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return gaussian_eps(t, x)


class Narrow(Points):
    """Points of the plane, N(0, .5²) in each coordinate."""

    def __init__(self) -> None:
        super().__init__((300, 20, 1000))
        for split in ("train", "val", "test"):
            self.hold(split, self.all(split).replace(x=0.5 * self.all(split).x))


def measured(time_condition, n=1000, **options):
    metric = build(Metric, {"name": "lipschitz", **options})
    metric.start(Subject(make(time_condition, Exact()), Narrow(), torch.device("cpu"), 500))
    metric.update(Samples(torch.arange(n), x=torch.zeros(n, 2)), None)
    return metric, metric.compute()


def test_the_grid_knows_intervals_and_edges():
    found = grid(make("shared"), 1000)
    assert torch.equal(found.index, torch.arange(1, 1001))
    torch.testing.assert_close(found.t, found.index.double() / 1000)  # the span ends a rounding before 1
    assert found.index[found.edge].tolist() == [20, 40, 60, 80, 100]
    assert torch.equal(found.inside, (found.index < 100) & ~found.edge)
    plain = grid(make(), 1000, (1, 7))
    assert plain.index.tolist() == [1, 7] and not plain.inside.any() and not plain.edge.any()
    assert plain.before.tolist() == [1e-5, 0.006]  # cut off where the path begins
    few = grid(make({"name": "shared", "intervals": 2}), 1000, (7,))
    assert few.index.tolist() == [7, 50, 100] and few.edge.tolist() == [False, True, True]
    # with one interval a step long nothing is shared on this grid
    assert not grid(make({"name": "shared", "intervals": 100}), 1000).inside.any()
    # steps that a span cuts to nothing are left out: log-SNRs of the linear path begin and end at 1/1001
    assert grid(make("log_snr", prediction="velocity", schedule="linear"), 2000).index.tolist() == [*range(2, 2000)]


def test_the_metric_finds_the_exact_constants():
    """In two dimensions E‖x_t‖ = √(π/2) √V; K = |c(t) - c(t')| E‖x_t‖ of whatever times the network is told."""
    for label in (None, "shared"):
        metric, found = measured(label)
        k = torch.tensor(metric.at)
        t, before = k.double() / 1000, ((k - 1).double() / 1000).clamp(min=1e-5)
        alpha, sigma = VP.scales(t)
        size = (0.25 * alpha**2 + sigma**2).sqrt() * math.sqrt(math.pi / 2)
        told = (lambda u: u) if label is None else (lambda u: Shared()(u, VP))
        one = torch.ones(len(k), 1, dtype=torch.float64)
        change = (gaussian_eps(told(t), one) - gaussian_eps(told(before), one)).abs()[:, 0]
        for step, expected in zip(metric.at, change * size / (t - before) / 1000, strict=True):
            estimate = found[f"lipschitz_at_{step}"]
            assert abs(estimate.value - expected) <= 5 * estimate.stderr and estimate.stderr <= 0.02 * expected
            assert estimate.n == 1000 and estimate.unit == "per 1/1000"
        if label is None:
            assert found.keys() == {"lipschitz", *(f"lipschitz_at_{step}" for step in metric.at)}
            assert found["lipschitz"].detail == "t = 1/1000"
        else:
            assert found["lipschitz_inside"].value == 0 == found["lipschitz_at_10"].value
            assert found["lipschitz"] == found["lipschitz_edge"] and found["lipschitz_edge"].detail == "t = 20/1000"
    assert found["lipschitz"].value > 10 * measured(None, at=(20,))[1]["lipschitz"].value  # what the jump costs


def test_items_are_those_of_the_split_and_noise_is_that_of_the_seed():
    metric, whole = measured(None, 50, at=(3,))
    metric.restart()
    for part in (torch.arange(30, 50), torch.arange(30)):
        metric.update(Samples(part), None)
    assert metric.compute() == whole
    metric.restart()
    metric.update(Samples(torch.arange(50) + 1000), None)  # the same items again, with other noise
    again = metric.compute()["lipschitz"].value
    assert again != whole["lipschitz"].value and math.isclose(again, whole["lipschitz"].value, rel_tol=0.3)


def test_models_without_a_denoiser_and_steps_beyond_the_grid_are_refused():
    metric = build(Metric, "lipschitz")
    assert isinstance(make(), SupportsDenoise) and not isinstance(Threshold(), SupportsDenoise)
    with pytest.raises(NotApplicable, match="no denoiser"):
        metric.start(Subject(Threshold(), Classes(), torch.device("cpu"), 64))
    empty = Points((300, 20, 0))
    with pytest.raises(NotApplicable, match=r"split 'test'.*empty"):
        metric.start(Subject(UniformLevels((2,)), empty, torch.device("cpu"), 64))
    for given in ({"at": (0, 1)}, {"at": (1001,)}, {"at": ()}, {"steps": 0}):
        with pytest.raises(ConfigError, match="1 <= k <= "):
            Lipschitz(**given)
    assert isinstance(grid(UniformLevels((2,)), 10), Grid)
