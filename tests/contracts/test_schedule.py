"""The contract of every Schedule and every TimeLaw: ends, order, derivatives, inverses, densities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels.diffusion.schedules import Schedule, from_flow_matching_time
from genmodels.diffusion.times import LogitNormal, LogNormal, TimeLaw, Uniform
from genmodels.registry import ConfigError, build, names
from genmodels.rng import BatchNoise, Noise, SeedNoise
from tests.oracles import SCHEDULES as PATHS

SCHEDULES, LAWS = names(Schedule), names(TimeLaw)
every = pytest.mark.parametrize("name", SCHEDULES)


def schedule(name: str) -> Schedule:
    return build(Schedule, PATHS.get(name, name))


def inside(s: Schedule, n: int = 2001) -> torch.Tensor:
    """Times strictly between the ends, packed towards both."""
    u = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    return s.t_min + (s.t_max - s.t_min) * torch.sin(math.pi / 2 * u).square()


# ---- schedules -------------------------------------------------------------------------------------------------------


@every
def test_goes_from_data_to_noise(name):
    s = schedule(name)
    first, last = s(torch.tensor(s.t_min)), s(torch.tensor(s.t_max))
    assert 0 <= s.t_min < s.t_max <= 1
    # the published ends of ve are 0.01 and 50
    assert first.sigma / first.alpha < (0.0101 if name == "ve" else 3e-3), "items are hidden at the start"
    assert last.sigma / last.alpha > (49 if name == "ve" else 75), "items are seen at the end"
    assert all(torch.isfinite(c).all() for c in (*first, *last))
    assert abs(first.alpha - 1) < 1e-5


@every
def test_signal_to_noise_falls_strictly(name):
    s = schedule(name)
    t = inside(s)
    assert (s.log_snr(t).diff() < 0).all()
    scales = s(t)
    # α σ' - σ α' = -α σ λ'/2 > 0: the velocity always determines item and noise
    assert (scales.alpha * scales.dsigma - scales.sigma * scales.dalpha > 0).all()


@every
def test_stated_derivatives_are_those_of_the_scales(name):
    s = schedule(name)
    t = inside(s)
    for stated, derived in zip(s(t), Schedule.__call__(s, t), strict=True):
        torch.testing.assert_close(stated, derived, rtol=1e-11, atol=1e-11)
    h = 1e-6 * (s.t_max - s.t_min)
    middle = t[200:-200]
    for ahead, behind, slope in zip(s.scales(middle + h), s.scales(middle - h), s(middle)[2:], strict=True):
        torch.testing.assert_close((ahead - behind) / (2 * h), slope, rtol=1e-6, atol=1e-6)


@every
def test_log_snr_is_that_of_the_scales(name):
    s = schedule(name)
    t = inside(s)
    torch.testing.assert_close(s.log_snr(t), Schedule.log_snr(s, t), rtol=1e-9, atol=1e-9)


@every
def test_time_inverts_log_snr(name):
    s = schedule(name)
    t = inside(s)
    torch.testing.assert_close(s.time(s.log_snr(t)), t, rtol=1e-10, atol=1e-13)
    # the closed forms agree with bisection
    few = s.log_snr(t[100:-100:50])
    torch.testing.assert_close(s.time(few), Schedule._time(s, few), rtol=1e-9, atol=1e-12)
    beyond = torch.tensor([math.inf, 1e3, -1e3, -math.inf])
    torch.testing.assert_close(
        s.time(beyond), torch.tensor([s.t_min, s.t_min, s.t_max, s.t_max]).double(), rtol=1e-12, atol=1e-12
    )


@every
def test_precision_and_shape_of_the_argument_do_not_matter(name):
    s = schedule(name)
    t = inside(s, 64).float()
    single, double = s(t), s(t.double())
    for a, b in zip(single, double, strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b)
    assert torch.equal(s.log_snr(t), s.log_snr(t.double()))
    for a, b in zip(s(t.reshape(8, 2, 4)), double, strict=True):
        assert torch.equal(a.flatten(), b)
    assert all(c.shape == () for c in s(t[3]))


@pytest.mark.parametrize("name", ["vp", "trigonometric", "cosine"])
@pytest.mark.parametrize("t", [1e-5, 1e-4, 0.3, 0.99])
def test_variance_is_preserved_without_cancellation(name, t):
    alpha, sigma = schedule(name).scales(torch.tensor(t, dtype=torch.float64))
    assert abs(alpha**2 + sigma**2 - 1) < 4e-16
    # near t = 0 σ² is far below the rounding of α²: compare with the expansion -expm1(2 log α)
    torch.testing.assert_close(sigma**2, -torch.expm1(2 * torch.log(alpha)), rtol=1e-9 / t**0.5, atol=0)


VALUES = {  # α, σ, α', σ' at t = 0.3, from the defining formulas in 50-digit arithmetic
    "linear": (0.7, 0.3, -1.0, 1.0),
    "vp": (0.62955, 0.77695997, -1.91068425, 1.54817663),
    "trigonometric": (0.8910065242, 0.4539904997, -0.7131266, 1.3995898),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    found = schedule(name)(torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(torch.stack(found), torch.tensor(VALUES[name]).double(), rtol=0, atol=1e-6)


def test_log_snr_of_vp_and_levels_of_equal_noise():
    """At r = σ/α = 80, 1, 1/2, 0.002 on two paths."""
    log_snr = -2 * torch.tensor([80.0, 1.0, 0.5, 0.002], dtype=torch.float64).log()
    vp, linear = schedule("vp"), schedule("linear")
    assert abs(vp.log_snr(torch.tensor(0.3, dtype=torch.float64)) + 0.42076711) < 1e-8
    # the fourth is where σ/α of vp is 0.002
    expected = torch.tensor([0.93351114, 0.25896026, 0.14481392, 3.98420e-5], dtype=torch.float64)
    torch.testing.assert_close(vp.time(log_snr), expected, rtol=1e-6, atol=1e-8)
    expected = torch.tensor([0.98765432, 0.5, 0.33333333, 0.00199601], dtype=torch.float64)
    torch.testing.assert_close(linear.time(log_snr), expected, rtol=0, atol=1e-8)


def test_edm_times_are_the_steps_of_its_sampler():
    sigma = schedule("edm").scales(torch.linspace(1, 0, 18, dtype=torch.float64))[1]
    expected = torch.tensor([80.0, 57.58598472, 1.92333984, 0.00752802, 0.002], dtype=torch.float64)
    torch.testing.assert_close(sigma[[0, 1, 9, 16, 17]], expected, rtol=0, atol=1e-8)


def test_cosine_is_that_of_the_paper():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)

    def f(t: torch.Tensor) -> torch.Tensor:
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha, sigma = schedule("cosine").scales(t)
    bar = f(t) / f(torch.zeros_like(t))
    torch.testing.assert_close(alpha**2, bar, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sigma**2, 1 - bar, rtol=1e-11, atol=1e-14)


def test_flow_matching_time_runs_the_other_way():
    """x_τ = τ x + (1 - τ) ε has dx/dτ = x - ε; the linear schedule's velocity is ε - x at the mirrored time."""
    tau, x, eps = torch.tensor([0.2, 1.5, -0.3], dtype=torch.float64)
    t, v = from_flow_matching_time(tau, x - eps)
    s = schedule("linear")(t)
    torch.testing.assert_close(s.alpha * x + s.sigma * eps, tau * x + (1 - tau) * eps)
    torch.testing.assert_close(s.dalpha * x + s.dsigma * eps, v)
    again = from_flow_matching_time(t, v)
    torch.testing.assert_close(torch.stack(again), torch.stack((tau, x - eps)))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "vp", "beta_min": 0.0}, "beta_min"),
        ({"name": "cosine", "offset": 0.0}, "offset"),
        ({"name": "edm", "sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min"),
    ],
)
def test_impossible_arguments_are_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        build(Schedule, node)


# ---- laws of the times -----------------------------------------------------------------------------------------------


class Fixed(Noise):
    """Given uniform draws."""

    def __init__(self, u: torch.Tensor) -> None:
        super().__init__(len(u), "cpu")
        self.u = u

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        raise AssertionError("times are made from uniform draws")

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.u.to(dtype)


pairs = pytest.mark.parametrize(("law", "name"), [(law, name) for law in LAWS for name in SCHEDULES])


@pairs
def test_density_is_that_of_the_samples(law, name):
    """The CDF of the density, integrated numerically, at the quantiles of an even grid of draws is that grid."""
    law, s = build(TimeLaw, law), schedule(name)
    u = (torch.arange(2**10, dtype=torch.float64) + 0.5) / 2**10
    t = law.sample(Fixed(u), s)
    assert (t.diff() > 0).all() and s.t_min <= t[0] and t[-1] <= s.t_max
    # F(t_j) - F(t_i) by Gauss-Legendre quadrature between neighbouring quantiles
    nodes = torch.tensor([-0.9061798459, -0.5384693101, 0.0, 0.5384693101, 0.9061798459], dtype=torch.float64)
    weights = torch.tensor([0.2369268851, 0.4786286705, 0.5688888889, 0.4786286705, 0.2369268851], dtype=torch.float64)
    half = t.diff() / 2
    points = (t[1:] + t[:-1]) / 2 + half * nodes[:, None]
    mass = (weights[:, None] * law.density(points, s)).sum(0) * half
    torch.testing.assert_close(mass, torch.full_like(mass, 2.0**-10), rtol=2e-4, atol=0)


@pairs
def test_the_extreme_draws_stay_inside(law, name):
    law, s = build(TimeLaw, law), schedule(name)
    t = law.sample(Fixed(torch.tensor([0.0, 1 - 2.0**-24])), s)
    assert (t >= s.t_min).all() and (t <= s.t_max).all() and t.dtype == torch.float64
    scales = s(t)
    assert all(c.isfinite().all() for c in scales) and (scales.sigma > 0).all() and (scales.alpha > 0).all()
    assert (law.density(t, s) > 0).all() and law.density(t, s).isfinite().all()


@pairs
def test_a_span_restricts_the_law(law, name):
    law, s = build(TimeLaw, law), schedule(name)
    span = (float(s.time(torch.tensor(2.0))), float(s.time(torch.tensor(-1.0))))
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    t = law.sample(Fixed(u), s, span)
    assert t.min() > span[0] and t.max() < span[1]
    ratio = law.density(t, s, span) / law.density(t, s)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert ratio[0] > 1
    width = (t.max() - t.min()) * 200 / 199
    assert abs((1 / law.density(t, s, span)).mean() / width - 1) < 0.02  # E[1/q] is the length of the span


@pytest.mark.parametrize("law", LAWS)
@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), seed=st.integers(0, 10))
def test_stratified_draws_fall_one_into_each_part(law, n, seed):
    law, s = build(TimeLaw, {"name": law, "stratified": True}), schedule("trigonometric")
    t = law.sample(BatchNoise(n, generator=torch.Generator().manual_seed(seed)), s)
    low, high = law.cdf(torch.tensor([s.t_min, s.t_max]).double(), s)
    u = (law.cdf(t, s) - low) / (high - low)
    assert torch.equal((u * n).floor().clamp(max=n - 1).long(), torch.arange(n))
    torch.testing.assert_close(u.diff(), torch.full_like(u[1:], 1 / n), rtol=0, atol=1e-7)  # one u for all


def test_item_draws_depend_on_their_seed_alone():
    s, law = schedule("vp"), LogitNormal()
    whole = law.sample(SeedNoise([3, 8, 5]), s)
    assert torch.equal(law.sample(SeedNoise([8]), s), whole[1:2])


def test_densities_are_the_closed_forms():
    t = torch.tensor([0.1, 0.5, 0.7], dtype=torch.float64)
    linear = schedule("linear")
    normal = torch.distributions.Normal(0.3, 0.8)
    torch.testing.assert_close(
        LogitNormal(0.3, 0.8).density(t, linear), normal.log_prob(t.logit()).exp().double() / (t * (1 - t))
    )
    # on the linear path log(σ/α) is the logit of t
    torch.testing.assert_close(LogNormal(0.3, 0.8).density(t, linear), LogitNormal(0.3, 0.8).density(t, linear))
    torch.testing.assert_close(Uniform().density(t, schedule("vp")), torch.full((3,), 1 / (1 - 1e-5)).double())
    with pytest.raises(ConfigError, match="scale"):
        LogNormal(scale=0.0)
