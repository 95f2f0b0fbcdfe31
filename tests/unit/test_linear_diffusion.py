"""Moments of linear diffusions: against closed forms, quadrature and the schedule that they contain."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from scipy.linalg import expm
from scipy.special import gammainc

from genmodels.diffusion.schedules import VariancePreserving
from genmodels.processes.clocks import Constant, Linear
from genmodels.processes.linear import CriticallyDamped, LinearDiffusion, LinearSDE, Multivariate, moments
from genmodels.registry import ConfigError, build, resolve

CHAIN = {"skew": ((0, -1, 0), (1, 0, -2), (0, 2, 0)), "diffusion": ((0, 0, 0), (0, 0, 0), (0, 0, 3))}


def zeros(t):
    return torch.zeros_like(t)


def test_critically_damped_moments_are_the_closed_form_to_eleven_digits():
    """A = [[0, 1], [-1, -2]]: e^{AB} = e^{-B} (1 + B (A + 1)), and P of incomplete gamma functions of 2B.

    Down to B = 1e-4, where P_xx is of the order B³: a difference from the covariance at rest would leave four digits.
    """
    b = torch.tensor([1e-4, 1e-2, 0.5, 3.0, 8.0], dtype=torch.float64)
    found = moments(*(getattr(CriticallyDamped(), name) for name in ("matrix", "rate")), b)
    decay = torch.exp(-b)
    rows = [decay * (1 + b), decay * b, -decay * b, decay * (1 - b)]
    torch.testing.assert_close(found.mean, torch.stack(rows, 1).reshape(-1, 2, 2), rtol=1e-11, atol=1e-14)
    p1, p2, p3 = (torch.tensor(gammainc(k, 2 * b.numpy())) for k in (1, 2, 3))
    exact = torch.stack((p3, p2 - p3, p2 - p3, 2 * p1 - 2 * p2 + p3), 1).reshape(-1, 2, 2)
    torch.testing.assert_close(found.covariance, exact, rtol=1e-11, atol=1e-15)


def test_the_figures_of_the_notes():
    one = CriticallyDamped(clock=Constant(1.0))
    half = one.transition(torch.tensor(0.0), torch.tensor(0.5))
    mean = torch.tensor([[0.90979599, 0.30326533], [-0.30326533, 0.30326533]], dtype=torch.float64)
    covariance = torch.tensor([[0.08030140, 0.18393972], [0.18393972, 0.81606028]], dtype=torch.float64)
    torch.testing.assert_close(half.mean, mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(half.covariance, covariance, rtol=0, atol=1e-8)


def test_every_skew_and_semidefinite_pair_rests_at_the_masses_and_moments_are_quadratures():
    """Random matrices of four sizes; ∫ e^{As} Q e^{Aᵀs} ds by adaptive quadrature of scipy's exponentials."""
    for n in (1, 2, 3, 4):
        draw = torch.Generator().manual_seed(n)
        s, d = (torch.randn(n, n, generator=draw, dtype=torch.float64) for _ in range(2))
        mass = tuple((torch.rand(n, generator=draw) + 0.3).tolist())
        skew, psd = (s - s.mT), d[:, : max(1, n - 1)] @ d[:, : max(1, n - 1)].mT
        made = Multivariate(tuple(map(tuple, skew.tolist())), tuple(map(tuple, psd.tolist())), mass)
        torch.testing.assert_close(made.stationary, torch.tensor(mass).double().diag(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(made.factor @ made.factor.mT, made.rate, rtol=0, atol=1e-9)
        assert made.noises == max(1, n - 1)
        a, q = made.matrix.numpy(), made.rate.numpy()
        exact = quad_vec(lambda r, a=a, q=q: expm(a * r) @ q @ expm(a.T * r), 0, 1.3, epsabs=1e-12)[0]
        found = moments(made.matrix, made.rate, torch.tensor(1.3, dtype=torch.float64))
        np.testing.assert_allclose(found.covariance, exact, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found.mean, expm(1.3 * a), rtol=0, atol=1e-11)


def test_transitions_follow_each_other_and_moments_grow_with_unstable_matrices():
    """Chapman and Kolmogorov, under a clock that is not even; dx = x dB + dW up to B = 20, by its closed form."""
    made = Multivariate(**CHAIN, clock=Linear(0.5, 6.0))
    s, r, t = (torch.tensor(v).double() for v in (0.1, 0.35, 0.9))
    first, second, both = made.transition(s, r), made.transition(r, t), made.transition(s, t)
    torch.testing.assert_close(second.mean @ first.mean, both.mean)
    torch.testing.assert_close(second.mean @ first.covariance @ second.mean.mT + second.covariance, both.covariance)
    growing = LinearSDE(((1.0,),), ((1.0,),), clock=Constant(20.0))
    found = growing.transition(torch.tensor(0.0), torch.tensor(1.0))
    torch.testing.assert_close(found.covariance[0, 0], torch.tensor(np.expm1(40.0) / 2), rtol=1e-11, atol=0)
    assert growing.stationary is None


def test_one_variable_is_the_variance_preserving_schedule():
    schedule, t = VariancePreserving(), torch.linspace(1e-4, 1, 9, dtype=torch.float64)
    alpha, sigma = schedule.scales(t)
    for made in (LinearSDE(clock=Linear(0.1, 20.0)), Multivariate(((0,),), ((0.5,),), clock=Linear(0.1, 20.0))):
        found = made.transition(zeros(t), t)
        torch.testing.assert_close(found.mean[:, 0, 0], alpha, rtol=1e-11, atol=0)
        torch.testing.assert_close(found.covariance[:, 0, 0], sigma**2, rtol=1e-10, atol=0)


def test_what_the_marginal_integrates_out():
    """N(0, s²) beside N(0, spread): by a sum over the two sources."""
    made, t = CriticallyDamped(spread=0.04), torch.tensor([0.01, 0.3]).double()
    passed = made.transition(zeros(t), t)
    x, v = passed.mean[..., :1], passed.mean[..., 1:]
    exact = 0.49 * x @ x.mT + 0.04 * v @ v.mT + passed.covariance
    torch.testing.assert_close(made.marginal(t, 0.49), exact)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "mdm", "skew": [[0, -1], [1, 0.5]]}, r"mdm.skew: a matrix with S \+ Sᵀ = 0"),
        ({"name": "mdm", "skew": [[0, 1], [1, 0]]}, r"S \+ Sᵀ = 0"),
        ({"name": "mdm", "diffusion": [[0, 0], [0, -1]]}, "mdm.diffusion must be symmetric, positive semidefinite"),
        ({"name": "mdm", "diffusion": [[1, 0.5], [0, 1]]}, "must be symmetric"),
        ({"name": "mdm", "diffusion": [[0, 0], [0, 0]]}, "not 0"),
        ({"name": "mdm", "diffusion": [[1]]}, "must be of one size, found 2, 1 and 2"),
        ({"name": "mdm", "mass": [1, 0]}, "mdm.mass: variances > 0"),
        ({"name": "mdm", "skew": [[0, 0], [0, 0]]}, "the noise reaches 1 of 2 directions"),
        ({"name": "mdm", **CHAIN, "skew": [[0, -1, 0], [1, 0, 0], [0, 0, 0]]}, "reaches 1 of 3 directions"),
        ({"name": "linear_sde", "matrix": [[0, 1]], "rate": [[1]]}, "a square matrix of finite numbers"),
        ({"name": "linear_sde", "matrix": [[0, 1], [0, 0]], "rate": [[1]]}, "must be of one size, found 2 and 1"),
        ({"name": "linear_sde", "matrix": [[0, 0], [1, 0]], "rate": [[0, 0], [0, 1]]}, "the noise reaches 1 of 2"),
        ({"name": "cld", "mass": 0}, "mass > 0"),
        ({"name": "cld", "friction": -1.0}, "friction > 0"),
        ({"name": "cld", "spread": 0}, "spread must be > 0"),
    ],
)
def test_matrices_that_make_no_diffusion_are_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        build(LinearDiffusion, resolve(LinearDiffusion, node, "test"))


def test_times_out_of_range_and_out_of_order_are_refused():
    made = CriticallyDamped()
    with pytest.raises(ValueError, match=r"0 <= t <= 1 is needed, found t = 1\.5"):
        made.transition(torch.tensor(0.0), torch.tensor(1.5))
    with pytest.raises(ValueError, match="from s to t ≥ s"):
        made.transition(torch.tensor(0.5), torch.tensor(0.2))
