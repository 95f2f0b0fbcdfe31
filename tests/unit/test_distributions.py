"""The Gaussian mixture as the oracle of diffusion; the closed forms of tests/oracles.py against independent ones."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, Uniform

from genmodels.distributions import Box, DiagonalNormal, GaussianMixture, StandardNormal
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import BatchNoise, Noise, SeedNoise, generator
from tests.oracles import (
    GAUSSIAN,
    LINEAR,
    MIXTURE,
    MIXTURE_3D,
    GeometricBrownianMotion,
    OrnsteinUhlenbeck,
    gaussian,
    grid,
    jacobian_log_det,
    probability_flow,
    probability_flow_log_det,
)

X = torch.tensor([[0.4, -0.3], [1.2, 0.9], [-1.5, 0.2], [0.0, -2.0], [3.0, 3.0]], dtype=torch.float64)
ALPHA = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.05], dtype=torch.float64)
SIGMA = torch.tensor([0.1, 0.4, 0.8, 0.9, 1.0], dtype=torch.float64)


def test_simple_laws_agree_with_torch_distributions():
    x = torch.randn(7, 3, 2, generator=generator("x"), dtype=torch.float64)
    normal = Independent(Normal(torch.zeros(3, 2).double(), torch.ones(3, 2).double()), 2)
    torch.testing.assert_close(StandardNormal(shape=(3, 2)).log_prob(x), normal.log_prob(x))
    law = DiagonalNormal(shape=(3, 2)).double()
    law.loc.data.uniform_(-1, 1, generator=generator("loc"))
    law.log_scale.data.uniform_(-1, 1, generator=generator("scale"))
    other = Independent(Normal(law.loc.detach(), law.log_scale.detach().exp()), 2)
    torch.testing.assert_close(law.log_prob(x).detach(), other.log_prob(x))
    box = Independent(Uniform(torch.full((3, 2), -1.0), torch.full((3, 2), 3.0)), 2)
    inside = torch.rand(7, 3, 2, generator=generator("u")) * 4 - 1
    torch.testing.assert_close(Box(-1.0, 3.0, shape=(3, 2)).log_prob(inside), box.log_prob(inside).double())


def test_box_ends_where_it_says():
    law = Box(0.0, 2.0, shape=(2,))
    values = law.log_prob(torch.tensor([[0.0, 2.0], [1.0, 1.0], [-1e-6, 1.0], [1.0, 2.000001]]))
    assert values.tolist() == [-2 * math.log(2), -2 * math.log(2), -math.inf, -math.inf]
    with pytest.raises(ValueError, match=r"low=1\.0 and high=1\.0"):
        Box(1.0, 1.0, shape=(2,))


def test_mixture_density_agrees_with_torch_distributions():
    law, x = MIXTURE_3D, torch.randn(9, 3, generator=generator("x"), dtype=torch.float64)
    covariances = law.axes @ torch.diag_embed(law.variances) @ law.axes.mT
    assert float(covariances[1, 1, 2]) == pytest.approx(-0.3)  # as it was given
    parts = MultivariateNormal(law.means, covariances).log_prob(x[:, None]) + law.weights.log()
    torch.testing.assert_close(law.log_prob(x), parts.logsumexp(1), rtol=1e-12, atol=1e-12)


def test_diagonal_and_full_covariances_are_the_same_law():
    variances = torch.tensor([[0.5, 0.2], [0.1, 0.9]], dtype=torch.float64)
    diagonal = GaussianMixture.from_tensors(torch.ones(2), MIXTURE.means[:2], variances)
    full = GaussianMixture.from_tensors(torch.ones(2), MIXTURE.means[:2], torch.diag_embed(variances))
    assert diagonal.axes is None and full.axes is not None
    for method in ("denoiser", "eps", "score", "noised_log_prob"):
        a, b = (getattr(law, method)(X, ALPHA, SIGMA) for law in (diagonal, full))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(diagonal.covariance(), full.covariance())


def test_noised_law_is_the_convolution():
    # p_t(x) = ∫ p_0(x_0) N(x; α x_0, σ² I) dx_0 on a grid over 7 standard deviations: midpoints converge spectrally
    points, area = grid(-6.0, 6.0, 300)
    alpha, sigma = 0.7, 0.4
    kernel = -((X[:, None] - alpha * points) ** 2).sum(-1) / (2 * sigma**2) - math.log(2 * math.pi * sigma**2)
    direct = (kernel + MIXTURE.log_prob(points)).logsumexp(1) + math.log(area)
    noised = MIXTURE.noised(alpha, sigma)
    torch.testing.assert_close(noised.log_prob(X), direct, rtol=0, atol=1e-9)
    torch.testing.assert_close(MIXTURE.noised_log_prob(X, alpha, sigma), direct, rtol=0, atol=1e-9)
    # the denoiser is the mean of the same integrand
    weights = (kernel + MIXTURE.log_prob(points)).softmax(1)
    torch.testing.assert_close(MIXTURE.denoiser(X, alpha, sigma), weights @ points, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "law", [MIXTURE_3D, GAUSSIAN, GaussianMixture.from_tensors(torch.ones(2), MIXTURE_3D.means, MIXTURE_3D.variances)]
)
def test_score_is_the_gradient_and_the_predictions_are_consistent(law):
    items = torch.randn(5, *law.shape, generator=generator("items"), dtype=torch.float64)
    x = items.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(law.noised_log_prob(x, ALPHA, SIGMA).sum(), x)
    score, denoised, eps = (getattr(law, f)(items, ALPHA, SIGMA) for f in ("score", "denoiser", "eps"))
    torch.testing.assert_close(score, gradient, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(eps, -SIGMA[:, None] * score, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ALPHA[:, None] * denoised + SIGMA[:, None] * eps, items, rtol=1e-11, atol=1e-11)
    dalpha, dsigma = -torch.ones(5), torch.linspace(0.5, 2.0, 5).double()
    velocity = law.velocity(items, ALPHA, SIGMA, dalpha, dsigma)
    torch.testing.assert_close(velocity, dsigma[:, None] * eps - denoised, rtol=1e-11, atol=1e-11)


def test_times_may_be_numbers_or_one_per_item():
    rows = torch.full((5,), 0.6, dtype=torch.float64)
    for alpha, sigma in ((0.6, 0.8), (torch.tensor(0.6).double(), torch.tensor(0.8).double())):
        torch.testing.assert_close(MIXTURE.denoiser(X, alpha, sigma), MIXTURE.denoiser(X, rows, rows / 0.75))
        a = MIXTURE.velocity(X, alpha, sigma, -1.0, 0.5)
        torch.testing.assert_close(a, MIXTURE.velocity(X, rows, rows / 0.75, rows * 0 - 1, rows * 0 + 0.5))
    torch.testing.assert_close(MIXTURE.score(X), MIXTURE.score(X, 1.0, 0.0))


def test_velocity_moves_the_density():
    """Continuity equation d/dt log p = -div v - v·∇ log p for α = cos, σ = sin, the time derivative by differences."""
    t, h = 0.6, 1e-4
    scales = [(math.cos(s), math.sin(s)) for s in (t - h, t, t + h)]
    before, after = (MIXTURE.noised_log_prob(X, *scales[i]) for i in (0, 2))
    alpha, sigma = scales[1]

    def velocity(x):
        return MIXTURE.velocity(x, alpha, sigma, -sigma, alpha)

    divergence = torch.stack([torch.autograd.functional.jacobian(lambda v: velocity(v[None])[0], x).trace() for x in X])
    transport = -divergence - (velocity(X) * MIXTURE.score(X, alpha, sigma)).sum(1)
    # central differences: error h² times a third derivative of order 10
    torch.testing.assert_close((after - before) / (2 * h), transport, rtol=0, atol=1e-6)


def test_mean_and_covariance_are_those_of_the_grid():
    points, area = grid(-6.0, 6.0, 300)
    p = MIXTURE.log_prob(points).exp() * area
    torch.testing.assert_close(MIXTURE.mean(), p @ points, rtol=0, atol=1e-9)
    centred = points - p @ points
    torch.testing.assert_close(MIXTURE.covariance(), (p[:, None] * centred).T @ centred, rtol=0, atol=1e-9)


class Fixed(Noise):
    """Uniforms that are given, normals that are zero."""

    def __init__(self, u: torch.Tensor) -> None:
        super().__init__(len(u), "cpu")
        self.u = u

    def normal(self, *shape, dtype=torch.float32):
        return torch.zeros(self.n, *shape, dtype=dtype)

    def uniform(self, *shape, dtype=torch.float32):
        return self.u.to(dtype)


def test_components_are_chosen_by_the_inverse_cdf():
    weights = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0])
    law = GaussianMixture.from_tensors(weights, torch.arange(5.0)[:, None], torch.ones(5, 1))
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24])
    assert law.sample(Fixed(u))[:, 0].tolist() == [0, 0, 2, 2, 3, 3]


def test_log_prob_survives_a_zero_weight_and_its_gradient():
    law = GaussianMixture.from_tensors(torch.tensor([1.0, 0.0]), torch.zeros(2, 2), torch.ones(2, 2))
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    torch.testing.assert_close(gradient, -X)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": [[0.0, 1.0, 2.0]]}, "rows of 2 numbers"),
        ({"covariances": [[1.0, 1.0, 1.0]]}, "rows of 2 or 4 numbers"),
        ({"covariances": [[1.0, 0.5, 0.4, 1.0]]}, "not symmetric"),
        ({"covariances": [[1.0, 2.0, 2.0, 1.0]]}, "positive definite"),
        ({"covariances": [[1.0, 0.0]]}, "positive definite"),
        ({"weights": [-1.0]}, "weights must be >= 0"),
        ({"weights": [1.0, 1.0]}, "are needed, found"),
    ],
)
def test_impossible_mixtures_are_refused(change, message):
    node = {"name": "gaussian_mixture", "means": [[0.0, 0.0]], "covariances": [[1.0, 1.0]], **change}
    with pytest.raises(ValueError, match=message):
        build(GaussianMixture.__mro__[1], resolve(GaussianMixture.__mro__[1], node, "base"), shape=(2,))


def test_configuration_errors_name_the_key():
    with pytest.raises(ConfigError, match="means"):
        resolve(GaussianMixture.__mro__[1], {"name": "gaussian_mixture", "means": "x", "covariances": [[1]]}, "base")


# ---- the oracles themselves ----


def test_samples_have_the_mean_and_covariance_of_the_mixture():
    n = 40_000
    x = MIXTURE_3D.sample(BatchNoise(n, generator=generator("moments")), dtype=torch.float64)
    mean, covariance = MIXTURE_3D.mean(), MIXTURE_3D.covariance()
    # 4.5 standard errors; those of products of centred components from the sample itself
    assert ((x.mean(0) - mean).abs() < 4.5 * (covariance.diagonal() / n).sqrt()).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert ((products.mean(0) - covariance).abs() < 4.5 * products.std(0) / n**0.5).all()


def test_probability_flow_agrees_with_an_accurate_solver():
    from scipy.integrate import solve_ivp

    covariance = MIXTURE_3D.axes[1] @ MIXTURE_3D.variances[1].diag() @ MIXTURE_3D.axes[1].T
    law, x = gaussian(MIXTURE_3D.means[1], covariance), torch.tensor([[0.4, -1.3, 0.7], [2.0, 0.1, -0.6]]).double()

    def field(t, y):
        a, s = math.cos(t), math.sin(t)
        return law.velocity(torch.tensor(y).reshape(-1, 3), a, s, -s, a).flatten().numpy()

    solution = solve_ivp(field, (0.1, 1.4), x.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    start, end = (math.cos(0.1), math.sin(0.1)), (math.cos(1.4), math.sin(1.4))
    flow = probability_flow(law, x, start, end)
    np.testing.assert_allclose(solution.y[:, -1], flow.flatten().numpy(), rtol=0, atol=1e-10)
    torch.testing.assert_close(probability_flow(law, flow, end, start), x)
    log_det = probability_flow_log_det(law, start, end)
    measured = jacobian_log_det(lambda x: probability_flow(law, x, start, end), x)
    torch.testing.assert_close(measured, torch.full((2,), log_det, dtype=torch.float64))
    density = law.noised_log_prob(flow, *end) + log_det
    torch.testing.assert_close(density, law.noised_log_prob(x, *start))


def test_linear_ode_agrees_with_an_accurate_solver():
    from scipy.integrate import solve_ivp

    solution = solve_ivp(
        lambda t, y: LINEAR.field(t, torch.tensor(y).reshape(-1, 2)).flatten().numpy(),
        (0, 1.7), X.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(solution.y[:, -1], LINEAR.solution(1.7, X).flatten().numpy(), rtol=0, atol=1e-10)
    measured = jacobian_log_det(lambda y: LINEAR.solution(1.7, y), X)
    torch.testing.assert_close(measured, torch.full((5,), LINEAR.log_det(1.7), dtype=torch.float64))


def test_ornstein_uhlenbeck_obeys_its_fokker_planck_equation():
    ou, x = OrnsteinUhlenbeck(), torch.full((5, 1), 1.4, dtype=torch.float64)
    y = torch.linspace(-1, 2, 5).double()[:, None].requires_grad_()
    t, h = 0.7, 1e-4
    p = ou.log_transition(t, x, y).exp()
    (slope,) = torch.autograd.grad(p.sum(), y, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), y)
    flux = ou.rate * (p[:, None] + (y - ou.mean) * slope) + ou.diffusion**2 / 2 * curvature
    change = (ou.log_transition(t + h, x, y).exp() - ou.log_transition(t - h, x, y).exp()) / (2 * h)
    torch.testing.assert_close(change, flux[:, 0], rtol=0, atol=1e-6)
    assert ou.moments(50.0, x)[1] == pytest.approx(ou.stationary_variance())


def test_pathwise_solutions_are_limits_of_milstein_steps():
    n, items = 4096, 64
    increments = torch.randn(n, items, 1, generator=generator("path"), dtype=torch.float64) / n**0.5
    ou, gbm = OrnsteinUhlenbeck(), GeometricBrownianMotion()
    x = y = torch.full((items, 1), 1.2, dtype=torch.float64)
    for dw in increments:
        x = x + ou.drift(0.0, x) / n + ou.diffusion * dw
        y = y * (1 + gbm.drift / n + gbm.volatility * dw + gbm.volatility**2 / 2 * (dw**2 - 1 / n))
    exact = ou.pathwise(torch.tensor([[1.2]]).double(), torch.linspace(0, 1, n + 1).double(), increments)
    # both schemes have strong order 1, with constants of order 1 for these coefficients
    assert (x - exact).abs().max() < 2 / n
    assert (y / gbm.pathwise(1.0, torch.tensor([[1.2]]).double(), increments.sum(0)) - 1).abs().max() < 2 / n
    assert float(gbm.mean(1.0, torch.tensor(1.2))) == pytest.approx(1.2 * math.exp(0.4))


def test_a_batch_source_and_a_seed_source_draw_the_same_law():
    law = gaussian(torch.tensor([1.0]), torch.tensor([4.0]))
    for noise in (SeedNoise(4000), BatchNoise(4000, generator=generator("batch"))):
        x = law.sample(noise, dtype=torch.float64)
        assert abs(x.mean() - 1) < 4.5 * 2 / 4000**0.5 and abs(x.var() / 4 - 1) < 4.5 * (2 / 4000) ** 0.5
