"""Diffusion of items with auxiliary variables: against Gaussian data, for which it is exact, and an exact mixture."""

import math

import pytest
import torch
from torch import Tensor

from genmodels.diffusion.schedules import VariancePreserving
from genmodels.model import Model
from genmodels.processes.joint_sampling import reverse
from genmodels.processes.joint_score import apply
from genmodels.processes.multivariate import MultivariateDiffusion
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import BatchNoise, Noise, generator
from genmodels.solvers.base import Fixed, integrate
from genmodels.solvers.fields import RowField
from genmodels.solvers.runge_kutta import Dopri5
from genmodels.solvers.step_size import PI
from genmodels.transforms import Identity
from genmodels.types import Batch

CHAIN = {"name": "mdm", "skew": [[0, -1, 0], [1, 0, -2], [0, 2, 0]], "diffusion": [[0, 0, 0], [0, 0, 0], [0, 0, 3]]}
FULL = {"name": "mdm", "diffusion": [[0.5, 0.2], [0.2, 1.0]]}  # noise in both variables
DIFFUSIONS = ["cld", CHAIN, "linear_sde"]
TIGHT = PI(1e-6, 1e-6)
WIDTH = 0.6  # of Gaussian data


def make(shape=(2,), **node) -> MultivariateDiffusion:
    """A model in float64 whose network answers 0: with the prediction "mixed" it is exact for N(0, sigma_data²)."""
    network = {"name": "mlp", "hidden": [8], "zero_init": True}
    node = {"name": "multivariate_diffusion", "network": network, "sigma_data": WIDTH, **node}
    facts = {"num_classes": None, "condition_shape": None, "transform": Identity(), "bin_width": None}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return build(Model, resolve(Model, node, "test"), shape=shape, **facts).double().eval()


def gaussian(n: int, width: float = WIDTH, size: int = 2, seed: int = 1) -> Tensor:
    return width * torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=str)
@pytest.mark.slow_for("*skew*")
def test_the_bound_and_the_law_of_samples_are_exact_for_gaussian_data(diffusion):
    """The law at t_min has the variance e² of `marginal` for x, and auxiliary variables of the law that q has.

    The ODE is linear: rows of the Jacobian of decoding are decoded unit vectors, which turn the prior into N(0, e²).
    """
    model = make(diffusion=diffusion)
    spread = float(model.diffusion.marginal(torch.tensor(model.t_min).double(), WIDTH**2)[0, 0])
    x = gaussian(3)
    with torch.no_grad():
        found = model.likelihood(x, controller=TIGHT)
        units = torch.eye(model.diffusion.size).double()[..., None].expand(-1, -1, 2)
        jacobian = model.decode(units, controller=TIGHT)[:, 0]
    exact = torch.distributions.Normal(0, spread**0.5).log_prob(x).sum(1)
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-4)
    assert found.kind == ("numerical" if diffusion == "linear_sde" else "bound")
    assert float(jacobian @ model.prior_covariance() @ jacobian) == pytest.approx(spread, rel=1e-4)


def test_without_auxiliary_variables_it_is_variance_preserving_diffusion():
    """Kernel scales and the probability-flow velocity of N(0, s²): V'/(2V) x."""
    model, schedule = make(diffusion={"name": "linear_sde", "clock": "linear"}), VariancePreserving()
    t, x = torch.tensor([0.1, 0.4, 0.8]).double(), gaussian(3)
    s = schedule(t)
    variance = s.alpha**2 * WIDTH**2 + s.sigma**2
    rate = (s.alpha * s.dalpha * WIDTH**2 + s.sigma * s.dsigma) / variance
    torch.testing.assert_close(model.velocity(t, x[:, None])[:, 0], rate[:, None] * x)
    torch.testing.assert_close(model.joint.score(t, x[:, None])[:, 0], -x / variance[:, None])


@pytest.mark.parametrize("diffusion", ["cld", CHAIN, FULL], ids=str)
def test_training_draws_regress_to_the_score(diffusion):
    """For Gaussian data E[n | u] = C⁻¹ Gᵀ ∇ log p is skip u, which least squares over draws must find; "hybrid" targets
    have unit variance and "full" ones more. 4 standard errors of 20 000 draws."""
    count, diffusion = 20_000, {**({"name": diffusion} if isinstance(diffusion, str) else diffusion), "spread": 0.5}
    t = torch.full((count,), 0.05, dtype=torch.float64)
    sizes = {}
    for kernel in ("hybrid", "full"):
        model = make((1,), diffusion=diffusion, kernel=kernel)
        c = model.joint.coefficients(t)
        u, n = model._noised(gaussian(count, size=1), t, c, BatchNoise(count, generator=generator("draws")))
        u, n = u[..., 0], n[..., 0]
        covariance = model.diffusion.marginal(t[0], WIDTH**2)
        found = torch.linalg.lstsq(u, n).solution.mT
        sizes[kernel] = n.square().mean(0)
        if kernel == "hybrid":  # what is left to the network: of the covariance out outᵀ, singular if all is noised
            rest, left = n - u @ c.skip[0].mT, c.out[0] @ c.out[0].mT
            torch.testing.assert_close(rest.mT @ rest / count, left, rtol=0, atol=0.05 * float(left.max()))
        error = (sizes[kernel][:, None] / covariance.diagonal() / count).sqrt()
        error = error * (covariance.diagonal() * torch.linalg.inv(covariance).diagonal()).sqrt()
        assert ((found - c.skip[0]).abs() < 4 * error).all()
        torch.testing.assert_close(u.mT @ u / count, covariance, rtol=0, atol=4 * float(covariance.max()) / count**0.5)
    assert (sizes["hybrid"] - 1).abs().max() < 0.04
    assert sizes["full"].sum() > 1.1 * len(sizes["full"])


class Mixture:
    """The exact answer of a network for data .3 N(-1, .3²) + .7 N(1, .5²): a joint mixture at every time."""

    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    scales = torch.tensor([0.3, 0.5], dtype=torch.float64)

    def __init__(self, model: MultivariateDiffusion) -> None:
        self.diffusion = model.diffusion

    def log_prob(self, t: Tensor, u: Tensor) -> Tensor:
        """[B] of u [B, n, 1]."""
        t = t.expand(len(u))
        mean = self.diffusion.transition(torch.zeros_like(t), t).mean[..., 0]
        parts = []
        for w, m, s in zip(self.weights, self.means, self.scales, strict=True):
            law = torch.distributions.MultivariateNormal(mean * m, self.diffusion.marginal(t, s**2))
            parts.append(w.log() + law.log_prob(u[..., 0]))
        return torch.stack(parts).logsumexp(0)

    def __call__(self, t: Tensor, u: Tensor, condition, c) -> Tensor:
        with torch.enable_grad():
            v = u if u.requires_grad else u.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(t, v).sum(), v, create_graph=True)
        pulled = apply(self.diffusion.factor.mT, score)
        return torch.linalg.solve_triangular(c.scale, pulled.flatten(2), upper=False).reshape(pulled.shape)


@pytest.mark.parametrize("diffusion", ["cld", FULL], ids=str)
@pytest.mark.slow_for("cld")
def test_the_bound_of_an_exact_mixture_is_near_its_density(diffusion, monkeypatch):
    """log p(.3) = -1.56230711 and log p(-1.2) = -1.14105145, less the divergence of q from the true law of v given x.

    The mean over draws of v is below it, by less than 0.03; of one state the ODE must give the joint density at t_min.
    """
    model = make((1,), diffusion=diffusion, sigma_data=1.0, t_min=1e-3)
    oracle = Mixture(model)
    monkeypatch.setattr(model.joint, "answer", oracle)
    x = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    with torch.no_grad():
        found = model.likelihood(x.repeat_interleave(40, 0), controller=PI(1e-4, 1e-4), batch_size=80)
    c = model.joint.coefficients(torch.tensor(model.t_min))
    m, v = c.mean[0, 0], c.covariance[0, 0] + (c.mean[0, 0] * oracle.scales) ** 2
    exact = (oracle.weights.log() + torch.distributions.Normal(m * oracle.means, v.sqrt()).log_prob(x)).logsumexp(1)
    if diffusion == "cld":  # whose noise has not reached x yet
        torch.testing.assert_close(exact, torch.tensor([-1.56230711, -1.14105145]).double(), rtol=0, atol=1e-3)
    each = found.value.reshape(2, 40)
    gap, error = exact - each.mean(1), each.std(1) / 40**0.5
    assert found.kind == "bound" and (gap > -3 * error - 5e-3).all() and (gap < 0.03).all() and (error < 0.02).all()
    # and of one state, against the joint density itself
    t, u = torch.tensor(model.t_min).double(), torch.tensor([[[0.3], [0.1]]], dtype=torch.float64)
    monkeypatch.setattr(model, "_beside", lambda y, noise: (u, torch.zeros(1).double()))
    with torch.no_grad():
        alone = model.likelihood(x[:1], controller=PI(1e-4, 1e-4)).value
    torch.testing.assert_close(alone, oracle.log_prob(t, u), rtol=0, atol=4e-3)  # the mixture is not N(0, Σ) at t = 1


class Units(Noise):
    """Row k of the batch gets 1 for the k-th number that is drawn and 0 for all others."""

    def __init__(self, n: int) -> None:
        super().__init__(n, "cpu")
        self.drawn = 0

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = math.prod(shape)
        rows = torch.zeros(self.n, count, dtype=dtype)
        rows[self.drawn : self.drawn + count] = torch.eye(count, dtype=dtype)
        self.drawn += count
        return rows.reshape(self.n, *shape)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        raise AssertionError("no uniform number is needed")


def test_reverse_equations_come_to_the_law_of_the_data():
    """Variances of x at t_min for Gaussian data, without sampling: the result is linear in what is drawn, so that its
    variance is the sum of squares over unit draws. Errors fall with the order 1; splitting's are the smaller."""
    model = make((1,), diffusion="cld")
    exact = float(model.diffusion.marginal(torch.tensor(model.t_min).double(), WIDTH**2)[0, 0])

    def error(rule: str, steps: int) -> float:
        noise = Units(2 + steps * {"euler_maruyama": 1, "splitting": 4}[rule])
        u = apply(torch.linalg.cholesky(model.prior_covariance()), noise.normal(2, 1, dtype=torch.float64))
        with torch.no_grad():
            found = reverse(model.joint, u, model._grid(steps, Fixed()).flip(0), rule, noise)
        assert noise.drawn == noise.n
        return float(found[:, 0].square().sum()) / exact - 1

    errors = {rule: [error(rule, n) for n in (40, 80)] for rule in ("euler_maruyama", "splitting")}
    for coarse, fine in errors.values():
        assert 1.7 < coarse / fine < 2.5
    assert abs(errors["splitting"][1]) < abs(errors["euler_maruyama"][1])


def test_the_turning_frame_changes_nothing_and_stands_still_at_rest():
    model = make(diffusion={"name": "cld", "mass": 0.25})
    z = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    times = torch.tensor([1.0, model.t_min], dtype=torch.float64)
    with torch.no_grad():
        plain = integrate(RowField(model.joint.velocity, None), z, times, solver=Dopri5(), controller=TIGHT)
        turned = model.decode(z, controller=TIGHT)
        torch.testing.assert_close(turned, plain.x[:, 0], rtol=0, atol=5e-5)
        rest = make(diffusion={"name": "cld", "mass": 0.25}, sigma_data=1.0)
        still = rest.joint.turned_velocity(times[0].log(), z).abs().max()
        moving = rest.joint.velocity(times[0], z).abs().max()
    assert float(still) < 1e-3 and float(moving) > 1


def test_laws_of_times_have_one_expectation_of_the_likelihood_loss():
    """And importance sampling the smaller variance; its density is a density. 4 standard errors of 20 000 draws.

    The expectation of the loss at a wrong answer (0 noise) is an integral over time, done by a fine midpoint rule.
    """
    given = {"weighting": "likelihood", "prediction": "noise", "t_min": 0.01}
    means, spreads = [], []
    for times in ("uniform", "quadratic", "importance"):
        model = make((1,), times=times, **given)
        batch = Batch(gaussian(20_000, size=1))
        with torch.no_grad():
            value = model.loss(batch, generator=generator("times")).value
        means.append(float(value.mean()))
        spreads.append(float(value.std()))
        t = torch.linspace(0.01, 1, 20_001, dtype=torch.float64)
        t = (t[1:] + t[:-1]) / 2
        # E|n|² = 1 for a hybrid target: the integral of ½ β tr C Cᵀ
        c = model.joint.coefficients(t).scale.square().sum((-2, -1))
        exact = float((0.5 * model.diffusion.clock.rate(t) * c).mean() * 0.99)
        assert abs(means[-1] - exact) < 4 * spreads[-1] / 20_000**0.5
    assert spreads[2] < 0.7 * spreads[0]
    width = model.edges.diff()
    drawn, density = model._draw_times(BatchNoise(50_000, generator=generator("law")))
    assert float((model.mass / width * width).sum()) == pytest.approx(1, abs=1e-12)
    assert float((1 / density).mean()) == pytest.approx(0.99, rel=0.02)  # E 1/p = length
    assert float(drawn.min()) >= 0.01 and float(drawn.max()) <= 1


def test_latents_and_samples_go_both_ways_and_follow_seeds():
    model = make(diffusion="cld")
    x = gaussian(4)
    with torch.no_grad():
        z = model.encode(x, controller=TIGHT)
        assert z.shape == (4, 2, 2)
        torch.testing.assert_close(model.decode(z, controller=TIGHT), x, rtol=0, atol=1e-4)
    for method in ("ode", "euler_maruyama", "splitting"):
        both, one = model.sample(3, method=method, num_steps=5), model.sample([2], method=method, num_steps=5)
        torch.testing.assert_close(both[2:], one)
        assert float((both[0] - both[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"t_min": 0.0}, "model.t_min: 0 < t_min < 0.1"),
        ({"sigma_data": -1.0}, "model.sigma_data"),
        ({"t_min": 1e-7, "diffusion": CHAIN}, "Raise t_min"),
    ],
)
def test_settings_out_of_range_are_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        make(**node)


def test_questions_that_cannot_be_answered_are_refused():
    growing = {"name": "linear_sde", "matrix": [[0.0]], "rate": [[1.0]]}
    with pytest.raises(ValueError, match="'splitting' needs a diffusion that comes to rest"):
        make(diffusion=growing).sample(1, method="splitting", num_steps=2)
    model = make()
    for t, message in ((1, r"found torch\.int64"), (1.5, r"found t = 1\.5"), (-0.1, "0 <= t <= 1"), (0.0, "times > 0")):
        with pytest.raises(ValueError, match=message):
            model.velocity(torch.tensor(t), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="built for"):
        model.decode(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="method is one of ode, euler_maruyama, splitting, found 'sde'"):
        model.sample(1, method="sde")
    with pytest.raises(ValueError, match="unconditional model"):
        model.sample(1, condition=torch.tensor([1]))
    with pytest.raises(ValueError, match="empty, or 0 everywhere"):
        make(sigma_data=None).prepare([Batch(torch.zeros(4, 2))], generator=generator("prepare"))
    labelled = {"num_classes": 3, "condition_shape": None, "transform": Identity(), "bin_width": None}
    node = resolve(Model, {"name": "multivariate_diffusion", "network": "mlp", "condition_dropout": 0.0}, "test")
    conditional = build(Model, node, shape=(2,), **labelled)
    with pytest.raises(ValueError, match="a tensor of 2 conditions is needed"):
        conditional.sample(2)
    with pytest.raises(ValueError, match="class 7, but there are only 3"):
        conditional.sample(1, condition=torch.tensor([7]))
    assert math.isfinite(float(conditional.sample(1, condition=torch.tensor([2]), num_steps=2).sum()))
