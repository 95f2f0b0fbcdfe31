"""Local denoising score matching: objectives, bounds, samplers and mixing against closed forms for Gaussian data."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn

from genmodels.model import Model
from genmodels.processes.clocks import Constant, Linear
from genmodels.processes.increments import TimesOfClock, choose_increment, defects
from genmodels.processes.local_bound import Bound
from genmodels.processes.local_dsm import LocalDSM
from genmodels.processes.local_objective import Objective
from genmodels.processes.local_score import LocalScore
from genmodels.processes.mixing import largest_distance, measure, needed, spectral_gap, warn_unmixed
from genmodels.processes.prior_sampling import ReverseSDE
from genmodels.processes.priors import Gaussian, GivenPrior, Logistic, Mixture, StudentT
from genmodels.processes.process import GivenProcess, Langevin
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import BatchNoise
from genmodels.solvers.base import Fixed
from genmodels.solvers.runge_kutta import RK4
from genmodels.solvers.stochastic import EulerMaruyama
from genmodels.transforms import Identity
from genmodels.types import Batch, NotApplicable
from tests.contracts.test_denoiser import randn

NETWORK = {"name": "residual_mlp", "hidden": 16, "blocks": 1}
GAUSSIAN = {"name": "langevin", "prior": "gaussian"}


class Exact(LocalScore):
    """The score of N(1.5, 0.5²) under the process with a standard normal prior, times a factor."""

    def __init__(self, process, factor: float = 1.0) -> None:
        super().__init__(None, process)
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def moments(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return 1.5 * torch.exp(-u / 2), 1 - 0.75 * torch.exp(-u)

    def forward(self, u, y, condition=None):
        mean, variance = (v.reshape(-1, 1).to(y.dtype) for v in self.moments(u))
        return -self.factor * (y - mean) / variance


def made(*, shape: tuple[int, ...] = (1,), **node) -> LocalDSM:
    node = {"name": "local_dsm", "network": NETWORK, **node}
    sizes = {"shape": shape, "num_classes": None, "condition_shape": None, "bin_width": None}
    return build(Model, resolve(Model, node, "test"), **sizes, transform=Identity()).double().eval()


def exact_model(**node) -> LocalDSM:
    model = made(process=GAUSSIAN, **node)
    model.score_network = Exact(model.process)
    model.score_network.network = nn.Linear(1, 1).double()  # from which the model knows its dtype
    return model


def normal(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of an expectation over N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


# ---- objectives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["plain", "control", "antithetic"])
@pytest.mark.parametrize("weight", ["whitened", "likelihood"])
def test_the_score_is_where_training_stops(variance, weight):
    """The gradient of the expected loss over y_s and z, by quadrature, is 0 at the exact score and not beside it."""
    process = Langevin(Gaussian(), Constant(4.0), shape=(1,))
    score, times = Exact(process), TimesOfClock("importance", process.clock, 1e-3)
    objective = Objective(score, times, 1, "ito", False, variance, weight, "exact")
    z, w = normal(6)
    pairs, weights = torch.cartesian_prod(z, z), torch.outer(w, w).flatten()

    def gradient(start: float, end: float) -> float:
        u = torch.full((36,), start, dtype=torch.float64)
        mean, variance_there = score.moments(u)
        y = mean + variance_there.sqrt() * pairs[:, 0]
        values = objective.denoising(u, u + (end - start), y[:, None], pairs[:, 1:])
        return float(torch.autograd.grad((values * weights).sum(), score.factor)[0])

    for start, end in ((0.0, 1e-3), (0.5, 0.55), (1.0, 3.0)):
        score.factor.data.fill_(1.0)
        assert abs(gradient(start, end)) < 1e-9
        score.factor.data.fill_(1.1)
        assert gradient(start, end) > 1e-6


@pytest.mark.parametrize("structure", ["elementwise", "dense"])
def test_the_score_is_where_training_stops_under_any_noise(structure):
    """Q = 2, and matrices as Q and drift: in a Gaussian law s = -V⁻¹ y, where the gradient is 0 for every option.

    By quadrature over y_s ~ N(0, V_s) and z. The drift is given as any function; being linear, it has exact kernels.
    """
    a = torch.tensor([[-0.7, 0.0], [0.0, -0.7]] if structure == "elementwise" else [[-0.7, 0.4], [-0.2, -1.1]]).double()
    g = 2**0.5 if structure == "elementwise" else torch.tensor([[1.2, 0.3], [0.0, 0.8]], dtype=torch.float64)
    process = GivenProcess(lambda u, y: y @ a.mT.to(y.dtype), g, shape=(2,), structure=structure, clock=Constant(2.0))
    q = process.covariance_rate(torch.zeros(())).expand(2, 2) * (torch.eye(2) if structure == "elementwise" else 1.0)
    start, end, z = 0.5, 0.7, normal(3)
    moved = torch.linalg.matrix_exp(a * (end - start))
    loan = torch.linalg.matrix_exp(torch.cat((torch.cat((-a, q), 1), torch.cat((0 * a, a.mT), 1))) * (end - start))
    before = torch.tensor([[0.6, 0.2], [0.2, 0.9]], dtype=torch.float64)
    after = moved @ before @ moved.mT + loan[2:, 2:].mT @ loan[:2, 2:]

    class Linear2(LocalScore):
        def __init__(self) -> None:
            super().__init__(None, process)
            self.matrix = nn.Parameter(-torch.linalg.inv(after))

        def forward(self, u, y, condition=None):
            return y @ self.matrix.mT

    nodes = torch.cartesian_prod(*[z[0]] * 4)
    weights = torch.cartesian_prod(*[z[1]] * 4).prod(1)
    y = nodes[:, :2] @ torch.linalg.cholesky(before).mT
    u = torch.full((len(y),), start, dtype=torch.float64)
    score, times = Linear2(), TimesOfClock("clock", process.clock, 0.1)
    for variance in ("plain", "control", "antithetic"):
        for weight in ("whitened", "likelihood"):
            objective = Objective(score, times, 1, "ito", False, variance, weight, "exact")
            slopes = []
            for factor in (1.0, 1.1):
                score.matrix.data.copy_(-factor * torch.linalg.inv(after))
                values = objective.denoising(u, u + (end - start), y, nodes[:, 2:])
                slopes.append(torch.autograd.grad((values * weights).sum(), score.matrix)[0].abs().max())
            assert slopes[0] < 1e-9 and slopes[1] > 1e-3


def test_implicit_matching_stops_there_too_and_weighs_alike():
    """Against the mean of |s - s*|² that both objectives are up to a constant, at many states and times."""
    process = Langevin(Gaussian(), Constant(4.0), shape=(1,))
    score, times = Exact(process), TimesOfClock("clock", process.clock, 0.01)
    x = 1.5 + 0.5 * randn(100_000, 1)
    values = {}
    for factor in (1.0, 1.3):
        score.factor.data.fill_(factor)
        for weight in ("whitened", "likelihood"):
            noise = BatchNoise(100_000, generator=torch.Generator().manual_seed(0))
            objective = Objective(score, times, 1, "ito", True, "plain", weight, "exact")
            u = times.sample(noise)
            values[weight, factor] = objective.implicit(x, u, None, noise).mean().item()
    # E|s - s*|² = 0.09/V(u): ½ of it over q = 1/3.96, or s̄² of it
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u = torch.tensor(0.04 + (nodes + 1) * 1.98)
    share, excess = torch.tensor(weights / 2), 0.09 / (1 - 0.75 * torch.exp(-u))
    likely = 0.5 * 3.96 * float((share * excess).sum())
    whitened = float((share * excess * -torch.expm1(-u)).sum())
    assert values["likelihood", 1.3] - values["likelihood", 1.0] == pytest.approx(likely, rel=0.15)
    assert values["whitened", 1.3] - values["whitened", 1.0] == pytest.approx(whitened, rel=0.15)


def test_variances_of_losses_are_those_of_the_theory():
    """Stationary Ornstein-Uhlenbeck process, s = -y: ½ s² + s z/√P is 1/D plain, 5/2 controlled, ½ implicit.

    By quadrature over y_s and z, both N(0, 1); the loss less its constant |z|²/(2P).
    """
    process = Langevin(Gaussian(), Constant(8.0), shape=(1,))

    class Stationary(LocalScore):
        def forward(self, u, y, condition=None):
            return -y

    z, w = normal(12)
    pairs, weights = torch.cartesian_prod(z, z), torch.outer(w, w).flatten()
    times = TimesOfClock("clock", process.clock, 1e-3)
    for increment, plain, controlled in ((0.1, 10.0, 2.31), (0.01, 100.0, 2.48), (0.001, 1000.0, 2.50)):
        found = []
        for variance in ("plain", "control"):
            objective = Objective(Stationary(None, process), times, 1, "ito", False, variance, "likelihood", "exact")
            u = torch.ones(144, dtype=torch.float64)
            values = objective.denoising(u, u + increment, pairs[:, :1], pairs[:, 1:]) * times.density(u)
            values = values - 0.5 * pairs[:, 1].square() / -math.expm1(-increment)
            found.append(float((weights * values.square()).sum() - (weights * values).sum() ** 2))
        assert found == pytest.approx((plain, controlled), rel=5e-3)


def test_times_of_importance():
    """Normaliser and median of β/(1 - e^{-B}) for β from 0.1 to 20; densities are those of the quantiles."""
    for t_min, normalizer, median in ((1e-3, 19.1653867, 0.3046314), (1e-5, 23.8644724, 0.1144214)):
        times = TimesOfClock("importance", Linear(), t_min)
        assert times.normalizer == pytest.approx(normalizer, abs=1e-6)
        middle = times.quantile(torch.tensor(0.5, dtype=torch.float64))
        assert float(times.clock.inverse(middle)) == pytest.approx(median, abs=1e-6)
    share = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for law in ("importance", "clock", "uniform"):
        times = TimesOfClock(law, Linear(), 1e-3)
        slope = (times.quantile(share + 1e-6) - times.quantile(share - 1e-6)) / 2e-6
        torch.testing.assert_close(times.density(times.quantile(share)), 1 / slope, rtol=1e-6, atol=0)


# ---- likelihood and samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["implicit", "local"])
def test_the_bound_is_tight_at_the_exact_score(method):
    """E log π(y_U) + ∫ r du = log p, by quadrature over u, y and z; log p(2) = log p(1) = -0.72579135.

    π is q_U here: the bound then loses nothing. From u₀ = 1e-6 on, and with the decoder at u₀, both sides agree.
    """
    process = Langevin(Gaussian(), Linear(), shape=(1,))
    score, times = Exact(process), TimesOfClock("importance", process.clock, 1e-3)
    bound = Bound(process, score, times, 1, "ito", True)
    z, w = normal(20)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    share, measure_ = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)
    u = times.quantile(share).repeat_interleave(20)
    total = torch.tensor(process.clock.total, dtype=torch.float64)
    mean, variance = score.moments(total)
    for x in (2.0, 1.0):
        start, item = torch.zeros_like(u), torch.full((1200, 1), x, dtype=torch.float64)
        if method == "local":
            rate = bound.local(start, u, item, z.repeat(60)[:, None], None).detach()
        else:
            y = item[:, 0] * torch.exp(-u / 2) + torch.sqrt(-torch.expm1(-u)) * z.repeat(60)
            rate = bound.implicit(u, y[:, None], None).detach()
        rate = (rate / times.density(u)).reshape(60, 20) @ w @ measure_
        last = x * torch.exp(-total / 2) + torch.sqrt(-torch.expm1(-total)) * z
        prior = (torch.distributions.Normal(mean, variance.sqrt()).log_prob(last) * w).sum()
        decoder = (bound.decoder(item[:20], z[:, None], None).detach() * w).sum()
        # one draw of p(x | y₀) with the score held over u₀ = 1e-4: exact to its square root
        assert float(prior + rate + decoder) == pytest.approx(-0.72579135, abs=2e-4)


def test_likelihood_is_that_of_the_law():
    """The flow from N(0, 1), which is not q_U, is off by .0099 at 2; bounds agree within their errors."""
    model, x = exact_model(t_min=1e-5), torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    value = model.log_prob(x, solver=RK4(), num_steps=200, controller=Fixed())
    assert value[0].item() == pytest.approx(-0.73569866, abs=1e-5)
    z = model.encode(x)
    torch.testing.assert_close(model.decode(z), x, rtol=0, atol=1e-3)
    items = x.repeat_interleave(4000, 0)
    for method in ("local", "implicit"):
        found = exact_model().likelihood(items, method=method, batch_size=8000)
        assert found.kind == "bound" and found.stderr is None
        for value in found.value.detach().split(4000):
            assert abs(value.mean() + 0.72579135) < 4 * value.std() / 4000**0.5 and value.std() < 20
    assert (exact_model().likelihood(x, method="local", draws=3).stderr > 0).all()


@pytest.mark.parametrize("solver", [None, EulerMaruyama(), RK4()])
def test_samples_have_the_law_of_the_data(solver):
    """4000 draws, mean 1.5 and deviation 0.5 to 4 standard errors and the 2 % that steps of this length leave."""
    model = exact_model()
    model.process = Langevin(Gaussian(), Linear(), shape=(1,))
    steps = 30 if isinstance(solver, RK4) else 60
    x = model.sample(3000, solver=solver, num_steps=steps, batch_size=3000)
    assert x.mean().item() == pytest.approx(1.5, abs=4 * 0.5 / 3000**0.5 + 0.01)
    assert x.std().item() == pytest.approx(0.5, abs=4 * 0.5 / 6000**0.5 + 0.01)
    torch.testing.assert_close(model.sample([7], solver=solver, num_steps=steps), x[7:8], rtol=1e-6, atol=1e-6)


def test_velocity_is_that_of_the_flow():
    """Against d/dt of the quantile curve y = m(t) + √V(t) c, along which every point of a Gaussian path moves."""
    model, c = exact_model(), torch.tensor([[-1.2], [0.3]], dtype=torch.float64)

    def curve(t: float) -> Tensor:
        mean, variance = model.score_network.moments(model.process.clock(torch.tensor(t, dtype=torch.float64)))
        return mean + variance.sqrt() * c

    expected = (curve(0.3 + 1e-5) - curve(0.3 - 1e-5)) / 2e-5
    torch.testing.assert_close(model.velocity(torch.tensor(0.3), curve(0.3)).detach(), expected, rtol=1e-6, atol=1e-6)
    score = model.score(torch.tensor(0.3), curve(0.3))
    mean, variance = model.score_network.moments(model.process.clock(torch.tensor(0.3)))
    torch.testing.assert_close(score.detach(), -(curve(0.3) - mean) / variance)


# ---- preparation -----------------------------------------------------------------------------------------------------


def test_spectral_gaps():
    """Finite-volume gaps of mixtures, and of a Gaussian and a logistic law that are not told theirs."""
    for m, gap in ((1.0, 0.2425), (1.5, 0.1286), (2.0, 0.0595), (3.0, 0.0072)):
        assert spectral_gap(Mixture((-m, m))) == pytest.approx(gap, abs=6e-5)
    assert spectral_gap(Logistic()) == pytest.approx(math.pi**2 / 24) and spectral_gap(Logistic(1.0)) == 0.125
    assert spectral_gap(GivenPrior(Gaussian(0.5).log_density, interval=(-4, 4))) == pytest.approx(2.0, rel=1e-5)
    assert spectral_gap(Gaussian(0.5)) == 2.0 and spectral_gap(StudentT()) == 0.0
    assert needed(0.5, 1e-2) == pytest.approx(9.2, abs=0.02) and needed(0.0595, 1e-2) == pytest.approx(77.4, abs=0.1)


def test_a_prior_that_is_not_reached_is_told():
    """From a point at 2 with modes at ±2, P(y < 0) is .2224 at U = 10.05, where it should be ½."""
    process, g = Langevin(Mixture((-2.0, 2.0)), shape=(1,)), torch.Generator().manual_seed(0)
    x = torch.full((4000, 1), 2.0, dtype=torch.float64)
    found = measure(process, x, generator=g)
    assert found.distance == pytest.approx(0.5 - 0.2224, abs=4 * (0.25 / 4000) ** 0.5 * 2**0.5)
    assert found.left == pytest.approx(0.55, abs=1e-3)
    with pytest.warns(UserWarning, match=r"does not reach its prior 'mixture'.*0\.0595.*beta_max: 155"):
        warn_unmixed(process, found)
    settled = Langevin(Logistic(), shape=(1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unmixed(settled, measure(settled, randn(2000, 1), generator=g))
    same, apart = randn(3000, 1).expand(-1, 2), randn(3000, 2)  # of one law in each component, and not together
    assert largest_distance(same, apart, g) > 0.1 > 2 * largest_distance(same[:, :1], apart[:, :1])
    chance = measure(Langevin(Gaussian(), shape=(2,)), randn(100, 2), generator=g).chance
    assert (2 + 32) * 2 * math.exp(-100 * chance**2) == pytest.approx(0.01)  # two components and 32 directions
    a, b = randn(300, 1).round(decimals=1), randn(200, 1, seed=1).round(decimals=1) + 0.2  # with ties
    assert largest_distance(a, b) == pytest.approx(ks_2samp(a[:, 0], b[:, 0]).statistic)


def test_increments_follow_the_curvature():
    """For F = -κ y the defect is |√(P₀/P₁) - 1| ≈ |κ| D/2, P₁ = (1 - e^{-2κD})/2κ, so that 2 % allows D ≈ 0.04/|κ|."""
    for kappa in (1.0, 5.0, -1.0):
        process = GivenProcess(lambda u, y, k=kappa: -k * y, shape=(2,), structure="elementwise", clock=Constant(4.0))
        u, y = torch.ones(50, dtype=torch.float64), randn(50, 2)
        found = choose_increment(process, u, y)
        assert found == pytest.approx(0.04 / abs(kappa), rel=0.03)
        z = 2 * kappa * 0.1
        expected = abs((z / -math.expm1(-z)) ** 0.5 - 1)
        torch.testing.assert_close(defects(process, u, y, 0.1), torch.full((50,), expected).double())


def test_the_reverse_equation_is_that_of_the_process_and_its_clock():
    """β (F - G Gᵀ s) dt + √β G dW, for a number and a matrix G, times of rows, and β = 1 + 2 t."""
    x, t = randn(3, 2), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    beta, matrix = (1 + 2 * t)[:, None], torch.tensor([[1.0, 0.5, 0.0], [-0.3, 0.2, 0.7]], dtype=torch.float64)
    for g, structure in ((0.6, "elementwise"), (matrix, "dense")):
        given = {"shape": (2,), "structure": structure, "clock": Linear(1.0, 3.0)}
        sde = ReverseSDE(GivenProcess(lambda u, y: y.sin(), g, **given), lambda u, y, condition: 2 - y, None)
        q = g @ g.T if structure == "dense" else g**2 * torch.eye(2).double()
        torch.testing.assert_close(sde.drift(t, x), beta * (x.sin() - (2 - x) @ q), rtol=1e-12, atol=1e-12)
        wanted = beta.sqrt() * 0.6 * torch.ones(3, 2).double() if g is not matrix else beta.sqrt()[..., None] * matrix
        torch.testing.assert_close(sde.diffusion(t, x), wanted, rtol=1e-12, atol=1e-12)


def test_prepare_chooses_the_increment_and_warns_of_a_long_one():
    x, g = Batch(randn(400, 1)), torch.Generator().manual_seed(0)
    chosen = made(objective="local")
    logs = chosen.prepare([x], generator=g)
    assert 0.03 < logs["increment"] < 0.1 and logs["defect"] <= 0.0201 and chosen.state_dict()["increment"] > 0.03
    long = made(increment=2.0, objective="local")
    with pytest.warns(UserWarning, match=r"over 2 the linearised force is wrong by .* An increment of 0\.0") as told:
        long.prepare([x], generator=g)
    assert "genmodels" in told[0].filename  # commands print the place of other packages' warnings
    assert float(long.increment) == 2.0


def test_bad_settings_are_told():
    for node, message in (
        ({"increment": 20.0}, "increment"),
        ({"simulation_steps": 0}, "simulation_steps"),
        ({"t_min": 0.0}, "t_min"),
        ({"condition_dropout": 1.0}, "condition_dropout"),
        ({"objective": "global"}, "exact from the data on"),
        ({"objective": "ism", "variance": "control"}, "variance"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**node)
    with pytest.raises(ValueError, match="empty"):
        made().prepare([], generator=torch.Generator())
    model = made()
    model.process = GivenProcess(lambda u, y: y - y**3, shape=(1,), structure="elementwise")
    for ask in (lambda: model.sample(2), lambda: model.likelihood(randn(2, 1))):
        with pytest.raises(NotApplicable, match="no prior"):
            ask()
    with pytest.raises(ValueError, match="0 <= t <= 1"):
        made().score(torch.tensor(1.5), randn(2, 1))
    with pytest.raises(ValueError, match="method is one of ode, local, path, implicit, found 'bound'"):
        made().likelihood(randn(2, 1), method="bound")
    with pytest.raises(ValueError, match="spacing is one of clock, time, quadratic, found 'log'"):
        made().sample(1, spacing="log")


def test_networks_see_states_in_units_of_their_detail_and_answer_beside_the_prior():
    """s = ∇ log π - e^{-λu} ε(t, y/ℓ)/√(1 - e^{-u} + ℓ²), λ = π²/24 of the logistic law of unit variance."""

    class Answer(nn.Module):
        def forward(self, t, y, condition=None):
            return 2.0 + torch.sin(y) * t.reshape(-1, 1)

    process, u, y = Langevin(Logistic(), shape=(2,)), torch.tensor([1e-6, 0.5, 6.0], dtype=torch.float64), randn(3, 2)
    found = LocalScore(Answer(), process, residual=True, length=0.15)(u, y)
    t, wide = process.clock.inverse(u)[:, None], u[:, None]
    size = torch.exp(-(math.pi**2) / 24 * wide) / (torch.expm1(-wide).neg().clamp(min=1e-5) + 0.15**2).sqrt()
    torch.testing.assert_close(found, process.prior.score(y) - size * (2 + torch.sin(y / 0.15) * t))
    bare = LocalScore(Answer(), process)(u, y)
    torch.testing.assert_close(bare, -(2 + torch.sin(y) * t) / torch.expm1(-wide).neg().clamp(min=1e-5).sqrt())
    for length in (0.0, -1.0):
        with pytest.raises(ConfigError, match=r"model.length: a number > 0, or null, is needed"):
            made(length=length)
