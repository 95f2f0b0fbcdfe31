"""Local kernels of nonlinear diffusions against exact moments, and the minimisers that they lead to on a grid."""

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from genmodels.processes.clocks import Constant, Linear
from genmodels.processes.local_kernels import (
    dense_kernel,
    elementwise_kernel,
    local_kernel,
    phi1,
    phi2,
    phis,
    simulate,
)
from genmodels.processes.priors import Gaussian, GivenPrior, Logistic, Mixture, Prior, StudentT
from genmodels.processes.process import GivenProcess, Langevin, checked
from genmodels.registry import ConfigError
from genmodels.rng import BatchNoise, SeedNoise
from tests.contracts.test_denoiser import randn

ZERO = torch.zeros((), dtype=torch.float64)
ORDERS = (0, 1, "ito")


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def double_well(structure: str = "elementwise", shape=(1,)) -> GivenProcess:
    return GivenProcess(lambda u, y: y - y**3, shape=shape, structure=structure)


def swimmer() -> GivenProcess:
    """dx = (v - x³) du, dv = -γ v du + √(2γ) dW, γ = 0.1."""
    force = lambda u, y: torch.stack((y[:, 1] - y[:, 0] ** 3, -0.1 * y[:, 1]), 1)  # noqa: E731
    return GivenProcess(force, torch.tensor([[0.0], [math.sqrt(0.2)]], dtype=torch.float64), shape=(2,))


# ---- one increment ---------------------------------------------------------------------------------------------------


def test_functions_of_exponentials_keep_their_digits():
    z = torch.cat((-torch.logspace(-12, 1.5, 60).double(), torch.logspace(-12, 1.5, 60).double(), ZERO[None]))
    exact = []
    for value in z.tolist():  # e^z = Σ: an exponential of a 3 x 3 matrix holds φ₁ and φ₂ without a division
        e = scipy.linalg.expm([[value, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        exact.append((e[0, 1], e[0, 2]))
    exact = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(torch.stack((phi1(z), phi2(z)), 1), exact, rtol=1e-12, atol=0)
    narrow = torch.stack((phi1(z.float()), phi2(z.float())), 1)
    torch.testing.assert_close(narrow, exact.float(), rtol=1e-5, atol=0)
    near = z[z.abs() < 20]
    for dtype, digits in ((torch.float64, 1e-12), (torch.float32, 3e-7)):  # a few roundings
        given = near.to(dtype).double()
        wanted = torch.stack((phi1(given), phi2(given), phi1(2 * given)))
        torch.testing.assert_close(torch.stack(phis(near.to(dtype))).double(), wanted, rtol=digits, atol=0)


@pytest.mark.parametrize(
    ("y", "expected", "variance"),
    [
        (0.8, (0.8288, 0.82751491, 0.81587460), 0.09133924),
        (-0.2, (-0.2192, -0.22007014, -0.21698017), 0.10933981),
    ],
)
@pytest.mark.parametrize("structure", ["elementwise", "dense"])
def test_kernels_of_the_double_well(y, expected, variance, structure):
    """f = y - y³ over D = 0.1: order 1 by hand, m = y + f φ₁(JD) D with J = 1 - 3y², and the Itô term -3y."""
    found = [local_kernel(double_well(structure), ZERO, number(0.1), number(y)[None, None], order) for order in ORDERS]
    assert [k.mean.item() for k in found] == pytest.approx(expected, abs=1e-8)
    spreads = [float(k.variance if structure == "elementwise" else k.covariance) for k in found]
    assert spreads == pytest.approx([0.1, variance, variance], abs=1e-8)


def test_order_ito_is_nearest_to_the_exact_moments():
    """At y = 0.8, D = 0.1 the exact mean and variance are .816566 and .089625, here on a fine grid."""
    process = double_well()
    y = torch.linspace(-2.5, 3.5, 1201, dtype=torch.float64)
    h = float(y[1] - y[0])
    law = local_kernel(process, ZERO, number(0.005), number(0.8)[None, None], "ito")
    p = torch.exp(-0.5 * (y - law.mean[0]).square() / law.variance[0])
    move = transition(process, y, 0.005, "ito")
    p = p / (p.sum() * h)
    for _ in range(19):
        p = move @ p * h
    mean = float((y * p).sum() * h)
    variance = float((y.square() * p).sum() * h) - mean**2
    assert (mean, variance) == pytest.approx((0.816566, 0.089625), abs=2e-5)


def test_kernels_of_langevin_processes():
    process = Langevin(Logistic(1.0), Constant(), shape=(1,))
    y = number(0.7)[None, None]
    found = [local_kernel(process, ZERO, number(0.2), y, order) for order in (1, "ito")]
    assert [k.mean.item() for k in found] == pytest.approx([0.66709733, 0.66783222], abs=1e-8)
    assert found[0].variance.item() == pytest.approx(0.19138794, abs=1e-8)
    prior = process.prior
    assert (prior.score(y).item(), prior.slope(y).item()) == pytest.approx((-0.33637554, -0.44342575), abs=1e-8)
    mixture = Mixture((-2.0, 2.0))
    assert (mixture.score(y).item(), mixture.slope(y).item()) == pytest.approx((1.07070330, -0.13539016), abs=1e-8)


def test_noise_spreads_through_the_drift_of_a_swimmer():
    kernel = local_kernel(swimmer(), ZERO, number(0.1), torch.tensor([[0.5, 1.0]], dtype=torch.float64), 1)
    assert kernel.mean[0].tolist() == pytest.approx([0.58381317, 0.99004983], abs=1e-8)
    covariance = [[6.25709e-5, 9.65764e-4], [9.65764e-4, 1.980133e-2]]
    torch.testing.assert_close(kernel.covariance[0], torch.tensor(covariance).double(), rtol=1e-5, atol=0)
    y, z = kernel.mean + 0.01 * randn(1, 2), randn(1, 2, seed=1)
    normal = torch.distributions.MultivariateNormal(kernel.mean, kernel.covariance)
    torch.testing.assert_close(kernel.log_prob(y), normal.log_prob(y), rtol=1e-9, atol=1e-9)
    leaf = y.clone().requires_grad_()
    torch.testing.assert_close(kernel.score(y), torch.autograd.grad(normal.log_prob(leaf).sum(), leaf)[0])
    torch.testing.assert_close(kernel.score(kernel.sample(z)), -kernel.solve_transposed(z), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((kernel.root_transposed(y) * z).sum(), (y * kernel.root(z)).sum())
    with pytest.raises(ValueError, match="does not reach every coordinate"):
        local_kernel(swimmer(), ZERO, number(0.1), y, 0)


def test_dense_and_elementwise_kernels_agree_and_solve_their_moment_equations():
    """Against the moment equations m' = F + J (m - y) + c r, P' = J P + P Jᵀ + Q by quadrature of their solutions."""
    n, span = 3, 0.7
    j, y, f, c = randn(n, n, seed=1), randn(1, n, seed=2), randn(1, n, seed=3), randn(1, n, seed=4)
    root = randn(n, n, seed=5)
    q = root @ root.T
    kernel = dense_kernel(y, f, j[None], c, q, number(span)[None])
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(12)
    r, w = torch.tensor((nodes + 1) * span / 2), torch.tensor(weights * span / 2)
    e = torch.linalg.matrix_exp(j * (span - r)[:, None, None])
    mean = y[0] + torch.einsum("k,kij,kj->i", w, e, f + c * r[:, None])
    covariance = torch.einsum("k,kij,jl,kml->im", w, e, q, e)
    torch.testing.assert_close(kernel.mean[0], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel.covariance[0], covariance, rtol=1e-12, atol=1e-12)
    slope = torch.tensor([[-1.3, 1e-9, 0.8]]).double()
    thin = elementwise_kernel(y, f, slope, c, number(0.4), number(span))
    full = dense_kernel(y, f, torch.diag_embed(slope), c, 0.4 * torch.eye(3).double(), number(span)[None])
    torch.testing.assert_close(thin.mean, full.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.diag_embed(thin.variance), full.covariance, rtol=1e-10, atol=1e-12)


def test_derivatives_of_a_users_force():
    """Jacobian, rate and Itô term of a coupled force in u and y, against derivatives of order two taken one by one."""
    g = torch.tensor([[0.5, 0.1], [0.0, 0.7], [0.3, 0.0]], dtype=torch.float64)

    def force(u, y):
        a, b, c = y.unbind(1)
        return torch.stack((a * b * u, torch.sin(c) * b**2 + u**2, a**2 * c), 1)

    process = GivenProcess(force, g, shape=(3,), autonomous=False)
    y, u = randn(4, 3), torch.linspace(0.2, 0.8, 4).double()
    for row in range(4):
        single = lambda v: force(u[row], v[None])[0]  # noqa: B023, E731
        j = torch.autograd.functional.jacobian(single, y[row])
        torch.testing.assert_close(process.jacobian(u, y)[row], j)
        hessians = [torch.autograd.functional.hessian(lambda v, i=i: single(v)[i], y[row]) for i in range(3)]  # noqa: B023
        bent = torch.stack([0.5 * (g @ g.T * h).sum() for h in hessians])
        torch.testing.assert_close(process.ito(u, y)[row], bent)
        a, b, _ = y[row]
        torch.testing.assert_close(process.force_rate(u, y)[row], torch.stack((a * b, 2 * u[row], 0 * a)))
    assert process.divergence(u, y)[0].item() == pytest.approx(process.jacobian(u, y)[0].trace().item())
    thin = GivenProcess(
        lambda u, y: torch.tanh(y) * u[:, None], 0.8, shape=(3,), structure="elementwise", autonomous=False
    )
    full = GivenProcess(lambda u, y: torch.tanh(y) * u[:, None], 0.8, shape=(3,), autonomous=False)
    torch.testing.assert_close(torch.diag_embed(thin.jacobian(u, y)), full.jacobian(u, y))
    torch.testing.assert_close(thin.ito(u, y), full.ito(u, y))
    start, end = u, u + 0.1
    one, two = (local_kernel(p, start, end, y, "ito") for p in (thin, full))
    torch.testing.assert_close(one.mean, two.mean)
    torch.testing.assert_close(torch.diag_embed(one.variance), two.covariance)


# ---- what training converges to --------------------------------------------------------------------------------------


def transition(process: GivenProcess, y: Tensor, span: float, order) -> Tensor:
    """[to, from] densities of a kernel between the points of a grid."""
    kernel = local_kernel(process, ZERO, number(span), y[:, None], order)
    mean, variance = kernel.mean[:, 0], kernel.variance[:, 0]
    return torch.exp(-0.5 * (y[:, None] - mean).square() / variance) / (2 * math.pi * variance).sqrt()


def test_bias_of_the_minimiser_is_that_of_its_order():
    """The regression of -z/√P on y_t where y_s is exact and y_t drawn from the kernel, in a double well.

    Root-mean-square errors at t = 0.5 from N(0.5, 0.3²), of the score of ∫ q̃(y_t | y_s) q(y_s), which the minimiser is.
    Laws are densities on a grid; the exact ones take 400 steps of order ito, whose own error is 1e-3 of these.
    """
    process = double_well()
    y = torch.linspace(-4.0, 4.0, 801, dtype=torch.float64)
    h = float(y[1] - y[0])
    start = torch.exp(-0.5 * ((y - 0.5) / 0.3).square())
    start = start / (start.sum() * h)
    # 0.0025 is a fortieth of the shortest decay: the reference errs like (0.0025/0.05)² of the values below
    fine = transition(process, y, 0.0025, "ito") * h
    laws = {}
    p = start
    for k in range(1, 201):
        p = fine @ p
        laws[k] = p

    def score(density: Tensor) -> Tensor:
        return torch.gradient(density.clamp(min=1e-300).log(), spacing=h)[0]

    exact = score(laws[200])
    assert float((laws[200] * exact.square()).sum() * h) == pytest.approx(3.2052, abs=2e-2)
    expected = {0.05: (0.1435, 0.0296, 0.0109), 0.1: (0.358, 0.111, 0.060), 0.2: (0.686, 0.355, 0.263)}
    for increment, values in expected.items():
        for order, value in zip(ORDERS, values, strict=True):
            reached = transition(process, y, increment, order) @ laws[200 - round(increment / 0.0025)] * h
            error = score(reached) - exact
            assert float((laws[200] * error.square()).sum() * h) ** 0.5 == pytest.approx(value, rel=0.05)


def test_targets_of_an_ornstein_uhlenbeck_process_regress_to_its_score():
    """E[-(y_t - e^{-θD} y_s)/v | y_t] = -y_t/V_t whatever D, by Gaussian moments of the kernel drawn here."""
    process = Langevin(Gaussian(0.8), Constant(4.0), shape=(1,))
    start, variance_start = 0.9, 0.8**2 * -math.expm1(-0.9 / 0.64)
    for increment in (1e-3, 0.1, 1.5):
        kernel = local_kernel(process, number(start), number(start + increment), number(1.0)[None, None])
        decay, added = kernel.mean.item(), kernel.variance.item()
        variance = decay**2 * variance_start + added
        covariance = -(variance - decay * decay * variance_start) / added  # of the target with y_t
        assert covariance / variance == pytest.approx(-1 / (0.64 * -math.expm1(-(start + increment) / 0.64)), rel=1e-9)


def test_simulated_laws_are_those_of_the_process():
    """The double well at t = .5 from N(.5, .3²): mean .49485 and variance .47689, to 4 standard errors."""
    n = 40_000
    y = 0.5 + 0.3 * randn(n, 1)
    noise = BatchNoise(n, generator=torch.Generator().manual_seed(0))
    end = simulate(double_well(), y, ZERO, number(0.5), 10, noise, "ito")
    assert end.mean().item() == pytest.approx(0.49485, abs=4 * (0.477 / n) ** 0.5)
    assert end.var().item() == pytest.approx(0.47689, abs=4 * 0.477 * (2 / n) ** 0.5 + 1e-3)
    still = simulate(double_well(), y[:3], ZERO, torch.tensor([0.0, 0.5, 0.0]).double(), 3, SeedNoise(3), "ito")
    assert torch.equal(still[::2], y[:3:2]) and still[1] != y[1]


@pytest.mark.parametrize("order", ORDERS)
def test_a_simulation_is_its_local_kernels_one_after_the_other(order):
    """What steps share is worked out before them; rows that go nowhere are left as they are, bit for bit."""
    process = Langevin(Logistic(0.6), Linear(), shape=(2, 3))
    y, end = randn(4, 2, 3), torch.tensor([0.3, 0.0, 1.1, 0.2], dtype=torch.float64)
    start = torch.tensor([0.0, 0.0, 0.1, 0.2], dtype=torch.float64)
    found = simulate(process, y, start, end, 4, SeedNoise(4), order)
    noise, by_hand, span = SeedNoise(4), y[::2], (end - start)[::2] / 4
    for k in range(4):
        u = start[::2] + k * span
        z = noise.normal(2, 3, dtype=torch.float64)[::2]
        by_hand = local_kernel(process, u, u + span, by_hand, order).sample(z)
    torch.testing.assert_close(found[::2], by_hand, rtol=1e-13, atol=1e-13)
    assert torch.equal(found[1::2], y[1::2])


# ---- priors and clocks -----------------------------------------------------------------------------------------------

PRIORS = (Gaussian(0.7), Logistic(0.6), StudentT(3.5, 0.8), Mixture((-1.0, 0.5, 2.0), (0.5, 1.0, 0.7), (1.0, 2.0, 3.0)))


@pytest.mark.parametrize("prior", PRIORS, ids=lambda p: type(p).__name__)
def test_priors_agree_with_their_densities(prior):
    """Derivatives against automatic ones, mass 1, and draws against the distribution function."""
    y = torch.linspace(-3.1, 3.3, 33, dtype=torch.float64)[:, None]
    for name in ("score", "slope", "curvature"):
        torch.testing.assert_close(getattr(prior, name)(y), getattr(Prior, name)(prior, y), rtol=1e-9, atol=1e-9)
    low, high = -60.0, 60.0
    grid = torch.linspace(low, high, 240_001, dtype=torch.float64)
    cdf = torch.cumulative_trapezoid(prior.log_density(grid).exp(), grid)
    assert float(cdf[-1]) == pytest.approx(1.0, abs=1e-5)  # beyond 60 scales t with 3.5 degrees has 2e-6
    draws = prior.sample(SeedNoise(2000), (3,), dtype=torch.float64)
    assert torch.equal(draws[5:6], prior.sample(SeedNoise([5]), (3,), dtype=torch.float64))
    ordered = draws.flatten().sort().values
    places = ((ordered - low) / (high - low) * 240_000).long().clamp(0, 239_999)
    steps = torch.arange(1, 6001).double() / 6000
    assert (cdf[places] - steps).abs().max() < 1.95 * 6000**-0.5  # Kolmogorov's law: exceeded once in 1000 seeds
    torch.testing.assert_close(prior.log_prob(draws), prior.log_density(draws).sum(1))


@pytest.mark.parametrize("prior", PRIORS, ids=lambda p: type(p).__name__)
def test_derivatives_at_once_are_those_one_by_one(prior):
    y = torch.linspace(-6, 6, 41, dtype=torch.float64)[:, None]
    wanted = prior.score(y), prior.slope(y), prior.curvature(y)
    for a, b in zip(prior.derivatives(y), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    far = torch.tensor([-201.37, -5.03, 0.3, 40.71])[:, None]  # in float32, where powers of far scores cancel
    for a, b in zip(prior.derivatives(far), prior.derivatives(far.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    process = Langevin(prior, Linear(), shape=(1,))
    for a, b in zip(process.taylor(ZERO, y), (process.force, process.jacobian, process.ito), strict=True):
        torch.testing.assert_close(a, b(ZERO, y), rtol=1e-12, atol=1e-13)


def test_a_given_prior_is_differentiated():
    given = GivenPrior(Logistic(0.6).log_density, lambda noise, shape: Logistic(0.6).sample(noise, shape))
    y = randn(5, 2)
    one, two = (Langevin(p, Constant(), shape=(2,)) for p in (given, Logistic(0.6)))
    kernels = [local_kernel(p, ZERO, number(0.1), y, "ito") for p in (one, two)]
    torch.testing.assert_close(kernels[0].mean, kernels[1].mean)
    torch.testing.assert_close(kernels[0].variance, kernels[1].variance)


def test_clocks_invert_and_their_rates_are_derivatives():
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    for clock in (Constant(3.0), Linear(0.1, 20.0)):
        torch.testing.assert_close(clock.inverse(clock(t)), t, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close((clock(t + 1e-6) - clock(t - 1e-6)) / 2e-6, clock.rate(t), rtol=1e-7, atol=0)
        assert float(clock(number(1.0))) == pytest.approx(clock.total)
        with pytest.raises(ValueError, match="0 <= t <= 1"):
            clock(number(1.1))
        with pytest.raises(ValueError, match="0 <= u <="):
            clock.inverse(number(-0.1))
    process = Langevin(Logistic(), Linear(), shape=(1,))
    y, t = randn(3, 1), number(0.3)
    torch.testing.assert_close(process.drift(t, y), 0.5 * (0.1 + 19.9 * 0.3) * process.prior.score(y))
    assert float(process.noise(t)) == pytest.approx((0.1 + 19.9 * 0.3) ** 0.5)


def test_bad_processes_are_told_what_is_wrong():
    y = randn(2, 3)
    flat = GivenProcess(lambda u, y: y[:, :2], shape=(3,))
    with pytest.raises(ValueError, match=r"state of shape \[2, 3\] into \[2, 2\]"):
        checked(flat, ZERO, y, flat.force(ZERO, y))
    broken = GivenProcess(lambda u, y: (y - 10).log(), shape=(3,), structure="elementwise")
    with pytest.raises(ValueError, match=r"not finite at u = 0\.2"):
        local_kernel(broken, number(0.2), number(0.3), y)
    with pytest.raises(ValueError, match="number > 0"):
        GivenProcess(lambda u, y: y, -1.0, shape=(3,))
    with pytest.raises(ValueError, match="matrix of 3 rows"):
        GivenProcess(lambda u, y: y, torch.eye(2), shape=(3,))
    with pytest.raises(ConfigError, match="no sampler"):
        Langevin(GivenPrior(Logistic().log_density), shape=(3,))
    for make in (
        lambda: Gaussian(0.0),
        lambda: Logistic(-1.0),
        lambda: StudentT(0.0),
        lambda: Mixture((1.0,), (1.0, 2.0)),
        lambda: Mixture((1.0,), (0.0,)),
        lambda: Constant(0.0),
        lambda: Linear(1.0, 0.5),
    ):
        with pytest.raises(ConfigError):
            make()
