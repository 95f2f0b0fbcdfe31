"""Divergences against traces and Jacobians; transported densities against closed forms and published set-ups."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodels.distributions import GaussianMixture
from genmodels.rng import BatchNoise, SeedNoise, generator
from genmodels.solvers.base import integrate
from genmodels.solvers.divergence import draw_probes, exact_divergence, hutchinson, transport
from genmodels.solvers.fields import RowField
from genmodels.solvers.runge_kutta import RK4, Dopri5, Heun
from genmodels.solvers.solution import Result
from genmodels.solvers.step_size import PI
from genmodels.types import expand_like
from tests.oracles import GAUSSIAN, LINEAR, jacobian_log_det, probability_flow, probability_flow_log_det

UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
PLANE = torch.randn(4, 2, generator=generator("plane"), dtype=torch.float64)
T = torch.tensor(0.3, dtype=torch.float64)
SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)


class Attention(nn.Module):
    """A velocity of [B, 4, 6] items by one layer of fused attention with time as a token's offset."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 6)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator("attention", i)) / 2)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x + expand_like(t, x).to(x.dtype)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).tanh()


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator("convolution", i)) / 4)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.last(F.silu(self.first(x) + expand_like(t, x).to(x.dtype)))


def items(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator("items"), dtype=torch.float64)


FIELDS = {
    "attention": (Attention, (3, 4, 6)),
    "convolution": (Convolution, (2, 3, 8, 12)),
    "linear": (lambda: LINEAR.field, (4, 2)),
}


def jacobians(field, x: Tensor) -> Tensor:
    """[B, D, D] by reverse-mode differentiation, one item at a time."""
    size = x[0].numel()
    rows = [torch.autograd.functional.jacobian(lambda y: field(T, y[None])[0], item) for item in x]
    return torch.stack([row.reshape(size, size) for row in rows])


# ---- divergences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("name", FIELDS)
def test_exact_divergence_is_the_trace_of_the_jacobian(name, chunk):
    make, shape = FIELDS[name]
    field, x = make(), items(*shape)
    field = field.double() if isinstance(field, nn.Module) else field
    trace = torch.einsum("bii->b", jacobians(field, x))
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            v, divergence = exact_divergence(field, T, x, chunk=chunk)
        torch.testing.assert_close(divergence, trace, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(v, field(T, x))
    per_row = exact_divergence(field, T.expand(len(x)), x)[1]
    torch.testing.assert_close(per_row, trace, rtol=1e-12, atol=1e-12)
    if isinstance(field, nn.Module):
        v, divergence = exact_divergence(field.float(), T, x.float())
        assert v.dtype == torch.float32 and divergence.dtype == torch.float64
        torch.testing.assert_close(divergence, trace, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FIELDS)
def test_hutchinson_is_the_quadratic_form_of_its_probes(name):
    make, shape = FIELDS[name]
    field, x = make(), items(*shape)
    field = field.double() if isinstance(field, nn.Module) else field
    probes = draw_probes(BatchNoise(len(x), generator=generator("probes")), 3, shape[1:], dtype=torch.float64)
    with torch.no_grad():
        v, divergence = hutchinson(field, T, x, probes)
    e = probes.flatten(2)
    torch.testing.assert_close(divergence, torch.einsum("pbi,bij,pbj->pb", e, jacobians(field, x), e))
    assert divergence.shape == (3, len(x)) and v.shape == x.shape
    with pytest.raises(ValueError, match="probes must be"):
        hutchinson(field, T, x, probes[0])


def test_rademacher_probes_are_exact_for_a_diagonal_jacobian():
    x = items(5, 3, 4)
    probes = draw_probes(SeedNoise(5), 2, (3, 4), dtype=torch.float64)
    estimate = hutchinson(lambda t, x: x.sin() * t, T, x, probes)[1]
    torch.testing.assert_close(estimate, (x.cos() * T).flatten(1).sum(1).expand(2, 5), rtol=1e-13, atol=1e-13)
    gaussian = draw_probes(SeedNoise(5), 2, (3, 4), law="gaussian", dtype=torch.float64)
    assert (hutchinson(lambda t, x: x.sin() * t, T, x, gaussian)[1] - estimate).abs().min() > 1e-3


def test_mean_and_variance_over_all_sign_vectors():
    matrix = items(4, 4)  # not symmetric
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    estimates = hutchinson(lambda t, x: x @ matrix.T, T, items(1, 4), signs[:, None])[1][:, 0]
    assert estimates.mean().item() == pytest.approx(matrix.trace().item(), rel=1e-12)
    pairs = (matrix + matrix.T).triu(1).square().sum()
    assert estimates.var(correction=0).item() == pytest.approx(pairs.item(), rel=1e-12)


def test_gaussian_probes_have_their_variance():
    matrix, n = items(4, 4), 200_000
    probes = draw_probes(BatchNoise(1, generator=generator("many")), n, (4,), law="gaussian", dtype=torch.float64)
    with torch.no_grad():
        estimates = hutchinson(lambda t, x: x @ matrix.T, T, items(1, 4), probes)[1][:, 0]
    exact = 0.5 * (matrix + matrix.T).square().sum()
    # four standard errors; the kurtosis of a quadratic form is at most 15
    assert abs(estimates.mean() - matrix.trace()) < 4 * (exact / n).sqrt()
    assert abs(estimates.var() / exact - 1) < 4 * math.sqrt(14 / n)


def test_probes_belong_to_seeds():
    wide, narrow = (draw_probes(SeedNoise(seeds), 3, (2, 5)) for seeds in ([4, 9, 2], [9]))
    torch.testing.assert_close(wide[:, 1:2], narrow, rtol=0, atol=0)
    assert set(wide.unique().tolist()) == {-1.0, 1.0}
    many = draw_probes(SeedNoise(200), 2, (50,))
    assert abs(many.mean()) < 4 / many.numel() ** 0.5
    torch.testing.assert_close(draw_probes(SeedNoise([9]), 1, (2, 5)), narrow[:1], rtol=0, atol=0)


@pytest.mark.parametrize("estimate", ["exact", "hutchinson"])
def test_divergence_can_be_differentiated(estimate):
    """Through fused attention, whose own kernel has no second derivative, to the state and every parameter."""
    field, x = Attention().double(), items(1, 4, 6)
    probes = draw_probes(SeedNoise([1]), 2, (4, 6), dtype=torch.float64)
    parameters = dict(field.named_parameters())

    def value(x: Tensor, *flat: Tensor) -> Tensor:
        called = lambda t, y: torch.func.functional_call(field, dict(zip(parameters, flat, strict=True)), (t, y))  # noqa: E731
        v, div = exact_divergence(called, T, x) if estimate == "exact" else hutchinson(called, T, x, probes)
        return v.square().sum() + div.square().sum()

    assert torch.autograd.gradcheck(value, (x.requires_grad_(), *parameters.values()), fast_mode=True)
    divergence = exact_divergence(field, T, x)[1] if estimate == "exact" else hutchinson(field, T, x, probes)[1]
    divergence.sum().backward()
    assert field.qkv.weight.grad.abs().sum() > 0
    with torch.no_grad():
        quiet = (*exact_divergence(field, T, x), *hutchinson(field, T, x, probes))
    assert not any(value.requires_grad for value in quiet)


def test_constant_and_partly_constant_fields():
    for field in (lambda t, x: torch.ones_like(x), lambda t, x: x * 0 + torch.ones_like(x)):
        assert exact_divergence(field, T, PLANE)[1].tolist() == [0.0] * 4
        assert hutchinson(field, T, PLANE, SIGNS[:, None].expand(4, 4, 2))[1].abs().max() == 0
    with pytest.raises(ValueError, match="same shape"):
        exact_divergence(lambda t, x: x[:, :1], T, PLANE)


# ---- transport --------------------------------------------------------------------------------------------


def path_velocity(t: Tensor, x: Tensor) -> Tensor:
    return GAUSSIAN.velocity(x, 1 - t, t, -torch.ones_like(t), torch.ones_like(t)).to(x.dtype)


def test_log_det_of_linear_and_gaussian_flows():
    times = torch.linspace(0, 1, 33, dtype=torch.float64)
    z, log_det, solution = transport(LINEAR.field, PLANE, times, solver=RK4())
    torch.testing.assert_close(z, LINEAR.solution(1.0, PLANE), rtol=0, atol=1e-6)
    assert log_det.tolist() == pytest.approx([LINEAR.log_det(1.0)] * 4, abs=1e-12)
    assert solution.nfe.tolist() == [128] * 4 and solution.result is Result.success
    torch.testing.assert_close(solution.x, z)
    z, log_det, _ = transport(path_velocity, PLANE, UNIT, solver=Dopri5(), controller=PI(1e-8, 1e-8))
    torch.testing.assert_close(z, probability_flow(GAUSSIAN, PLANE, (1.0, 0.0), (0.0, 1.0)), rtol=0, atol=1e-6)
    exact = probability_flow_log_det(GAUSSIAN, (1.0, 0.0), (0.0, 1.0))
    assert log_det.tolist() == pytest.approx([exact] * 4, abs=1e-6)
    _, back, _ = transport(path_velocity, z, UNIT.flip(0), solver=Dopri5(), controller=PI(1e-8, 1e-8))
    torch.testing.assert_close(back, -log_det, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "convolution"])
def test_log_det_is_that_of_the_flow_map(name):
    make, shape = FIELDS[name]
    field, x = make().double(), items(2, *shape[1:]) / 2
    if name == "convolution":
        x = x[:, :, :2, :3]
    times = torch.linspace(0, 1, 9, dtype=torch.float64)
    with torch.no_grad():
        z, log_det, _ = transport(field, x, times, solver=RK4())
    flow = lambda y: integrate(field, y, times, solver=RK4()).x  # noqa: E731
    torch.testing.assert_close(z, flow(x))
    # the divergence along the discrete path is not that of the discrete map: they differ by the solver's own error
    torch.testing.assert_close(log_det, jacobian_log_det(flow, x), rtol=0, atol=1e-4)


def test_dtype_rows_and_conditions():
    shift = torch.tensor([0.0, 1.0, -1.0, 2.0])
    field = RowField(lambda t, x, c: (x + expand_like(c, x).to(x.dtype)).tanh() * 2, shift)
    x, control, evaluated = items(4, 3, 2).float(), PI(1e-5, 1e-5), []
    counting = RowField(lambda t, x, c: evaluated.append(len(x)) or field.f(t, x, c), shift)
    whole = transport(counting, x, UNIT, solver=Dopri5(), controller=control)
    assert sum(evaluated) == whole.solution.nfe.sum() < 4 * whole.solution.nfe.max(), "rows that are done are dropped"
    whole = transport(field, x, UNIT, solver=Dopri5(), controller=control)
    assert whole.z.dtype == torch.float32 and whole.log_det.dtype == torch.float64 and whole.log_det.shape == (4,)
    for rows in ([2], [3, 1]):
        index = torch.tensor(rows)
        part = transport(field.select(index), x[index], UNIT, solver=Dopri5(), controller=control)
        torch.testing.assert_close(part.z, whole.z[index])
        torch.testing.assert_close(part.log_det, whole.log_det[index], rtol=1e-5, atol=1e-6)
        assert part.solution.nfe.tolist() == whole.solution.nfe[index].tolist()
    double = transport(field, x.double(), UNIT, solver=Dopri5(), controller=control)
    torch.testing.assert_close(whole.log_det, double.log_det, rtol=0, atol=1e-5)
    probed = transport(
        field, x, UNIT, solver=Dopri5(), controller=control, divergence="hutchinson", probes=2, noise=SeedNoise(4)
    )
    assert probed.log_det.shape == (2, 4)
    torch.testing.assert_close(probed.log_det[0], whole.log_det, rtol=0, atol=1e-4)  # a diagonal Jacobian
    seeded = transport(
        field.select(torch.tensor([3])),
        x[3:],
        UNIT,
        solver=Dopri5(),
        controller=control,
        divergence="hutchinson",
        probes=1,
        noise=SeedNoise([3]),
    )
    torch.testing.assert_close(seeded.log_det[0], probed.log_det[0, 3:], rtol=1e-5, atol=1e-6)
    empty = transport(field.select(torch.tensor([], dtype=torch.int64)), x[:0], UNIT, solver=Heun())
    assert empty.z.shape == (0, 3, 2) and empty.log_det.shape == (0,)


def test_errors_are_controlled_on_the_state():
    """A steep but state-free divergence cannot change the steps; the state's own ones are those of `integrate`."""
    control = PI(1e-6, 1e-6)
    joint = transport(LINEAR.field, PLANE, UNIT, solver=Dopri5(), controller=control)
    alone = integrate(LINEAR.field, PLANE, UNIT, solver=Dopri5(), controller=control)
    assert joint.solution.nfe.tolist() == alone.nfe.tolist()


def test_likelihood_training_has_exact_gradients():
    theta = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)

    def nll(theta: Tensor, x: Tensor) -> Tensor:
        field = lambda t, y: (y @ torch.stack((theta, theta.flip(0)))).tanh() * (1 + t)  # noqa: E731
        z, log_det, _ = transport(field, x, torch.linspace(0, 1, 4, dtype=torch.float64), solver=Dopri5())
        return 0.5 * z.square().sum(1) - log_det

    assert torch.autograd.gradcheck(nll, (theta, PLANE.clone().requires_grad_()))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="noise: none"):
        transport(LINEAR.field, PLANE, UNIT, solver=RK4(), divergence="hutchinson")
    with pytest.raises(ValueError, match="that of 3 items"):
        transport(LINEAR.field, PLANE, UNIT, solver=RK4(), divergence="hutchinson", noise=SeedNoise(3))
    with pytest.raises(ValueError, match="'exact' or 'hutchinson'"):
        transport(LINEAR.field, PLANE, UNIT, solver=RK4(), divergence="trace")


# ---- densities --------------------------------------------------------------------------------------------


def standard(z: Tensor) -> Tensor:
    return -0.5 * (z.double().square() + math.log(2 * math.pi)).flatten(1).sum(1)


def vp_scales(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """α², σ² and β of the variance-preserving path β(t) = 0.1 + 19.9 t."""
    integral = 0.1 * t + 9.95 * t**2
    return (-integral).exp(), -torch.expm1(-integral), 0.1 + 19.9 * t


COVARIANCE = 0.25 * torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
POINT = torch.tensor([[0.3, -0.2]], dtype=torch.float64)


def vp_velocity(t: Tensor, x: Tensor) -> Tensor:
    """-β/2 (x + score) for data N(0, COVARIANCE)."""
    alpha2, sigma2, beta = (expand_like(v, x) for v in vp_scales(t))
    marginal = alpha2[..., None] * COVARIANCE + sigma2[..., None] * torch.eye(2, dtype=torch.float64)
    return 0.5 * beta * (torch.linalg.solve(marginal.expand(len(x), 2, 2), x) - x)


TRUNCATED = torch.tensor([1e-5, 1.0], dtype=torch.float64)


def test_vp_probability_flow_likelihood():
    z, log_det, _ = transport(vp_velocity, POINT, TRUNCATED, solver=Dopri5(), controller=PI(1e-9, 1e-9))
    assert (standard(z) + log_det).item() == pytest.approx(-1.71125836, abs=2e-8)
    # against the exact marginal as prior only the solver's error remains, and it falls with the tolerance
    alpha2, sigma2, _ = vp_scales(torch.tensor(1.0, dtype=torch.float64))
    prior = torch.distributions.MultivariateNormal(torch.zeros(2).double(), alpha2 * COVARIANCE + sigma2 * torch.eye(2))
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        out = transport(vp_velocity, POINT, TRUNCATED, solver=Dopri5(), controller=PI(tolerance, tolerance))
        errors.append(abs((prior.log_prob(out.z) + out.log_det).item() + 1.71131733))
    assert errors[0] < 5e-3 and errors[1] < 2e-4 and errors[2] < 5e-6 and errors[0] > 30 * errors[2]


def test_vp_probability_flow_estimates_of_each_sign_vector():
    out = transport(
        vp_velocity,
        POINT,
        TRUNCATED,
        solver=Dopri5(),
        controller=PI(1e-9, 1e-9),
        divergence="hutchinson",
        probes=SIGNS[:, None],
    )
    values = (standard(out.z) + out.log_det).flatten()
    assert sorted(values.tolist()) == pytest.approx([-2.929261, -2.929261, -0.493255, -0.493255], abs=1e-6)
    assert values.mean().item() == pytest.approx(-1.71125836, abs=2e-8)


def test_likelihoods_of_a_one_dimensional_gaussian():
    """x = 2 under N(1.5, 0.5²), whose log-density is -0.72579135: linear path, and VP path with its N(0, 1) prior."""
    law, x = (
        GaussianMixture.from_tensors(torch.ones(1), torch.tensor([[1.5]]), torch.tensor([[0.25]])),
        torch.tensor([[2.0]], dtype=torch.float64),
    )

    def linear(t: Tensor, x: Tensor) -> Tensor:
        return law.velocity(x, 1 - t, t, -torch.ones_like(t), torch.ones_like(t))

    def vp(t: Tensor, x: Tensor) -> Tensor:
        alpha2, sigma2, beta = vp_scales(t)
        return -0.5 * expand_like(beta, x) * (x + law.score(x, alpha2.sqrt(), sigma2.sqrt()))

    z, log_det, _ = transport(linear, x, UNIT, solver=Dopri5(), controller=PI(1e-9, 1e-9))
    assert z.item() == pytest.approx(1.0, abs=1e-7)
    assert (standard(z) + log_det).item() == pytest.approx(-0.72579135, abs=1e-7)
    z, log_det, _ = transport(vp, x, TRUNCATED, solver=Dopri5(), controller=PI(1e-9, 1e-9))
    assert z.item() == pytest.approx(1.00984118, abs=1e-6)
    assert (standard(z) + log_det).item() == pytest.approx(-0.73569866, abs=1e-6)


def test_latents_of_a_mixture_are_its_normal_scores():
    """In one dimension every Gaussian path takes x to Φ⁻¹(F(x)); the log-density follows."""
    law = GaussianMixture.from_tensors(
        torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.09], [0.25]])
    )
    x = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)

    def field(t: Tensor, x: Tensor) -> Tensor:
        return law.velocity(x, 1 - t, t, -torch.ones_like(t), torch.ones_like(t))

    z, log_det, _ = transport(field, x, UNIT, solver=Dopri5(), controller=PI(1e-8, 1e-8))
    assert z.flatten().tolist() == pytest.approx([-0.36775635, -1.43424240], abs=1e-6)
    assert (standard(z) + log_det).tolist() == pytest.approx([-1.56230711, -1.14105145], abs=1e-6)
