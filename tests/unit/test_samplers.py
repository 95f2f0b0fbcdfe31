"""Solvers for denoisers against exact flows, exact laws and published numbers; per row, at the ends, both ways."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from genmodels.diffusion.grids import Even, Karras, LogSNR
from genmodels.diffusion.reverse import DenoiserRows, Diffusivity, OfPath, PathSDE
from genmodels.diffusion.samplers import Sampler
from genmodels.diffusion.schedules import EDM, Linear, Schedule, Trigonometric, VariancePreserving
from genmodels.registry import ConfigError, build, member, names
from genmodels.rng import SeedNoise
from genmodels.solvers.base import Fixed, Solver, integrate
from genmodels.solvers.brownian import Brownian, BrownianTree, Increment
from genmodels.solvers.edm import EDMEuler, EDMHeun, PredictorCorrector
from genmodels.solvers.exponential import DDIM, DDPM, DPMpp, DPMpp2S, ExponentialAdams, moments
from genmodels.solvers.fields import DenoisingField
from genmodels.solvers.runge_kutta import RK4, Euler
from genmodels.solvers.step_size import PI
from genmodels.solvers.stochastic import EulerMaruyama
from genmodels.types import expand_like
from tests.contracts.test_denoiser import LINE, TWO, exact, number, randn
from tests.oracles import gaussian, probability_flow

VP = VariancePreserving()
SPAN = (1e-3, 1.0)
NAMES = [name for name in names(Solver) if member(Solver, name, "test").needs is DenoisingField]
DETERMINISTIC = {
    "ddim": DDIM(),
    "2m": DPMpp(),
    "3m": DPMpp(3),
    "exact 2m": DPMpp(coefficients="exact"),
    "2s": DPMpp2S(),
    "2s at .7": DPMpp2S(0.7),
    "adams eps": ExponentialAdams(2, "eps"),
    "adams 4": ExponentialAdams(4),
    "euler": EDMEuler(),
    "heun": EDMHeun(),
}
RANDOM = {
    "ddim": DDIM(0.6),
    "ancestral": DDIM(1.0),
    "ddpm": DDPM(),
    "large": DDPM("large"),
    "2m sde": DPMpp(eta=1.0),
    "3m sde": DPMpp(3, eta=0.5),
    "churned": EDMHeun(s_churn=4.0, s_min=0.05, s_max=20.0, s_noise=1.01),
    "churned euler": EDMEuler(s_churn=4.0),
    "corrected": PredictorCorrector(2),
}
every = pytest.mark.parametrize("name", DETERMINISTIC)


def rows(law=LINE, schedule: Schedule = VP, prediction="eps") -> DenoiserRows:
    return DenoiserRows(exact(law, schedule, prediction))


def there(schedule: Schedule, grid, steps: int, span=SPAN) -> Tensor:
    """Falling times."""
    return grid.times(steps, schedule, span).flip(0)


def level(schedule: Schedule, t: float | Tensor) -> tuple[float, float]:
    return tuple(c.item() for c in schedule.scales(torch.as_tensor(t, dtype=torch.float64)))


class Given(Brownian):
    """Standard normals that a test chooses: [steps, B, *shape] of increments; of areas, one step's."""

    def __init__(self, w: Tensor, h: Tensor | None = None) -> None:
        self.w, self.h, self.calls = w, h, 0

    def increment(self, t: Tensor, s: Tensor) -> Increment:
        length, none, call = expand_like((s - t).abs(), self.w[0]), torch.zeros_like(self.w[0]), self.calls
        self.calls += 1
        if self.h is None or call == 0:
            return Increment(self.w[call] * length.sqrt(), none)
        return Increment(none, self.h[call - 1] * (length / 12).sqrt())

    def select(self, rows: Tensor) -> Brownian:
        return Given(self.w[:, rows], None if self.h is None else self.h[:, rows])

    def another(self, noise) -> Brownian:
        raise NotImplementedError


# ---- published numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "grid", "steps", "error"),
    [
        (DDIM(), LogSNR(), 10, 0.07555991),
        (DDIM(), LogSNR(), 40, 0.02062804),
        (DPMpp(), LogSNR(), 10, -0.01161838),
        (DPMpp(), LogSNR(), 40, -0.00124488),
        (DPMpp(), LogSNR(), 80, -0.00031600),
        (DPMpp(), Even(), 40, -0.02810211),
        (DDIM(), Even(), 40, 0.02420679),
    ],
)
def test_known_errors_on_vp(solver, grid, steps, error):
    """N(1.5, .5²) from -.7 at t = 1 to t = 1e-3, where the exact flow is at 1.14492457."""
    x = torch.tensor([[-0.7]], dtype=torch.float64)
    assert probability_flow(LINE, x, level(VP, 1.0), level(VP, 1e-3)).item() == pytest.approx(1.14492457, abs=6e-9)
    found = integrate(rows(), x, there(VP, grid, steps), solver=solver)
    assert found.x.item() - 1.14492457 == pytest.approx(error, abs=2e-8) and found.nfe.item() == steps


# ---- orders ----------------------------------------------------------------------------------------------------------


def flow(law, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """Where the ODE of a mixture on the line takes x [B, 1]: F_end⁻¹(F_start(x)), by bisection."""

    def cdf(x: Tensor, level: tuple[float, float]) -> Tensor:
        (alpha, sigma), mean, variance = level, law.means[:, 0], law.variances[:, 0]
        return (law.weights * torch.special.ndtr((x - alpha * mean) / (alpha**2 * variance + sigma**2).sqrt())).sum(1)

    wanted, low, high = cdf(x, start), torch.full((len(x),), -9.0).double(), torch.full((len(x),), 9.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(middle[:, None], end) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle[:, None]


@every
def test_orders_on_a_mixture(name):
    solver, x = DETERMINISTIC[name], torch.tensor([[-1.2], [-0.7], [0.3], [1.4]], dtype=torch.float64)
    span = (0.02, 1.0)
    wanted = flow(TWO, x, level(VP, 1.0), level(VP, span[0]))
    errors = [
        (integrate(rows(TWO), x, there(VP, LogSNR(), n, span), solver=solver).x - wanted).abs().max() for n in (40, 80)
    ]
    found = [math.log2(a / b) for a, b in pairwise(errors)]
    assert found[-1] > solver.order - 0.2, found
    if name in ("ddim", "2m", "3m", "2s", "heun", "euler"):
        assert found[-1] < solver.order + 0.6, found


@pytest.mark.parametrize("target", ["x", "eps"])
def test_a_step_with_exact_history_has_the_local_order_of_its_polynomial(target):
    """On the exact trajectory of a Gaussian, by one step from exact estimates: the error goes with h^{n + 1}."""
    field, x, starts = rows(), torch.tensor([[0.2]], dtype=torch.float64), torch.tensor([-0.6, -0.2, 0.2, 0.6]).double()
    for order in (1, 2, 3, 4):
        solver, errors = ExponentialAdams(order, target), []
        for h in (0.1, 0.05):
            times = VP.time(2 * (starts + h * torch.arange(-order + 1, 2, dtype=torch.float64)[:, None]))  # [n + 1, 4]
            track = [torch.cat([probability_flow(LINE, x, level(VP, 0.5), level(VP, t)) for t in row]) for row in times]
            estimates = [field.predict(t, y)[target == "eps"] for t, y in zip(times, track, strict=True)]
            back = range(order - 2, -1, -1)
            state = (*(estimates[i] for i in back), *(VP.log_snr(times[i]) / 2 for i in back))
            errors.append((solver.step(field, times[-2], times[-1], track[-2], state, None).x - track[-1]).abs().max())
        assert abs(math.log2(errors[0] / errors[1]) - order - 1) < 0.25, (order, errors)


def test_moments_are_their_integrals():
    """Against scipy's quadrature, on both sides of the switch from series to recursion."""
    from scipy.integrate import quad

    for h in (-7.0, -1.0, -0.3, 1e-9, 0.4, 0.999, 1.001, 3.0, 12.0):
        for k, found in enumerate(moments(number(h), 4)):
            wanted = h * quad(lambda u, h=h, k=k: math.exp(-h * (1 - u)) * u**k, 0, 1, epsabs=0, epsrel=1e-12)[0]
            assert found.item() == pytest.approx(wanted, rel=1e-11)


def test_ddim_is_eulers_method_where_the_path_is_straight_and_only_there():
    x = torch.tensor([[-0.7]], dtype=torch.float64)
    for schedule, same in ((Linear(), True), (VP, False), (Trigonometric(), False)):
        field, times = rows(LINE, schedule, "velocity"), there(schedule, Even(), 7, (0.1, 0.9))
        gap = (integrate(field, x, times, solver=DDIM()).x - integrate(field, x, times, solver=Euler()).x).abs().item()
        assert gap < 1e-14 if same else gap > 1e-2


def test_published_coefficients_differ_from_the_integrals_by_the_third_order():
    """2M (1 - e^{-h})/2 for m_1, 3M m_2/2 for m_2: apart by h³-terms of a step, as the values differ by h and h²."""
    nan = number(torch.nan)
    for h, bound in ((0.1, 0.1), (0.05, 0.05)):
        m, c = moments(number(h), 3), [number(-1.0), number(-2.0)]
        second = [
            (p - e).item()
            for p, e in zip(
                DPMpp().integrals(c[:1], m[:2]), DPMpp(coefficients="exact").integrals(c[:1], m[:2]), strict=True
            )
        ]
        third = [
            (p - e).item()
            for p, e in zip(DPMpp(3).integrals(c, m), DPMpp(3, coefficients="exact").integrals(c, m), strict=True)
        ]
        assert second[0] == pytest.approx(-(h**2) / 12, rel=bound)
        assert third[0] == 0 and third[1] == pytest.approx(-h / 6, rel=bound)
    assert DPMpp(3).integrals([number(-1.0), nan], m)[0] == DPMpp().integrals([number(-1.0)], m[:2])[0]


# ---- ends, rows, inversion -------------------------------------------------------------------------------------------


@every
def test_steps_are_exact_where_signal_or_noise_is_zero(name):
    """Linear path from pure noise (α = 0) to data (σ = 0) and back: the Gaussian's flow, nothing divided by 0."""
    solver, field, z = DETERMINISTIC[name], rows(LINE, Linear(), "velocity"), torch.tensor([[-1.0], [0.4]]).double()
    errors = []
    for n in (16, 32):
        times = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        out = integrate(field, z, times, solver=solver).x
        back = integrate(field, 1.5 + 0.5 * z, times.flip(0), solver=solver).x
        errors.append(torch.stack(((out - 1.5 - 0.5 * z).abs().max(), (back - z).abs().max())))
    assert (errors[0] < 0.2).all() and (errors[1] < 0.7 * errors[0]).all(), errors
    whole = solver.along(9).step(field, number(1.0), number(0.0), z, solver.start(field, number(1.0), z), None).x
    if solver.stages == 1 or name == "heun":  # the estimate from noise alone is the mean
        torch.testing.assert_close(whole, torch.full_like(z, 1.5), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["ddim", "2m", "3m", "2s", "heun"])
@pytest.mark.slow_for("3m", "heun", "ddim")
def test_a_flipped_grid_inverts(name):
    solver, x, errors = DETERMINISTIC[name], torch.tensor([[-0.7], [1.2]], dtype=torch.float64), []
    for n in (60, 120):
        times = there(VP, LogSNR(), n, (0.02, 1.0))
        y = integrate(rows(), x, times, solver=solver).x
        errors.append((integrate(rows(), y, times.flip(0), solver=solver).x - x).abs().max())
    assert math.log2(errors[0] / errors[1]) > solver.order - 0.3, errors


@pytest.mark.parametrize("name", [*DETERMINISTIC, *RANDOM])
def test_rows_with_times_of_their_own_are_as_alone(name):
    """Three grids of other lengths in one batch, the shorter padded within and at their ends: equal to row by row."""
    solver = (RANDOM | DETERMINISTIC)[name]
    x, parts = (
        randn(3, 2),
        [there(VP, LogSNR(), 8), there(VP, Even(), 6, (0.1, 0.9)), there(VP, Karras(), 7, (0.05, 1.0))],
    )
    law = gaussian(torch.tensor([0.7, -0.4]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
    padded = [parts[0], torch.cat((parts[1][:3], parts[1][2:], parts[1][-1:])), torch.cat((parts[2], parts[2][-1:]))]
    times = torch.stack(padded, 1)
    path = BrownianTree([4, 1, 7], (2,), start=1e-3, end=1.0, dtype=torch.float64, tolerance=2.0**-20)
    together = integrate(rows(law), x, times, solver=solver.along(8), noise=path).x
    for i, part in enumerate(parts):
        mine, row = path.select(torch.tensor([i])), x[i : i + 1]
        alone = integrate(rows(law), row, part, solver=solver.along(8), noise=mine).x
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_narrow_precision_keeps_its_dtype_and_its_digits():
    field, x = rows(), torch.tensor([[-0.7], [0.4]])
    for solver in DETERMINISTIC.values():
        times = there(VP, LogSNR(), 12)
        low, high = (integrate(field, y, times, solver=solver).x for y in (x, x.double()))
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), high, rtol=0, atol=1e-4)


# ---- step control ----------------------------------------------------------------------------------------------------


def test_step_control_keeps_its_tolerance():
    """2S under PI on a mixture, rows with steps of their own, from pure noise to items: the error follows rtol."""
    z = torch.tensor([[-0.36775635], [-1.43424240]]).double()  # the latents of .3 and -1.2
    wanted, field, errors = torch.tensor([[0.3], [-1.2]]).double(), rows(TWO, Linear(), "velocity"), []
    for tolerance in (1e-3, 1e-5):
        out = integrate(field, z, torch.tensor([1.0, 0.0]), solver=DPMpp2S(), controller=PI(tolerance, tolerance))
        errors.append((out.x - wanted).abs().max().item())
        assert (out.nfe >= 2 * (out.steps + out.rejected)).all() and out.steps[0] != out.steps[1]
    assert errors[0] < 2e-2 and errors[1] < 2e-4, errors
    with pytest.raises(ConfigError, match=r"needs an error estimate, which solver 'ddim'.*dpmpp_2s"):
        integrate(field, z, torch.tensor([1.0, 0.0]), solver=DDIM(), controller=PI())


# ---- stochastic samplers: their exact laws ---------------------------------------------------------------------------


def law_of(solver: Solver, field, times: Tensor, start: tuple[float, float]) -> tuple[float, float]:
    """Mean and variance at the end for Gaussian data, exactly: every step is affine in the state and its noise.

    Row 0 has no noise, row k noise 1 in step k alone, the last row another start; start is their mean and variance.
    """
    n = len(times) - 1
    w = torch.cat((torch.zeros(n, 1), torch.eye(n), torch.zeros(n, 1)), 1).double()[..., None]
    x = torch.full((n + 2, 1), start[0]).double()
    x[-1] += 1
    end = integrate(field, x, times, solver=solver, noise=Given(w)).x[:, 0]
    moved = end - end[0]
    return end[0].item(), (moved[-1] ** 2 * start[1] + moved[1:-1].square().sum()).item()


def affine(form, times: Tensor) -> tuple[float, float]:
    """The same from coefficients (A, v): x⁺ - α_s m = A (x - α_t m) + √v z, started from the law of x_t."""
    variance, mean = 0.0, 1.5
    (alpha, sigma) = level(VP, times[0])
    variance, centre = alpha**2 * 0.25 + sigma**2, 0.0
    for t, s in pairwise(times):
        a, v = form(*level(VP, t), *level(VP, s))
        variance, centre = a**2 * variance + v, a * centre
    return level(VP, times[-1])[0] * mean + centre, variance


def ancestral(eta: float, large: bool = False):
    """A and v of DDIM with η and of DDPM, by the published formulas for ᾱ."""

    def form(alpha, sigma, alpha_s, sigma_s):
        beta = 1 - (alpha / alpha_s) ** 2
        v = eta**2 * (sigma_s**2 / sigma**2) * beta
        gain_x, gain_eps = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2), sigma / (alpha**2 * 0.25 + sigma**2)
        return alpha_s * gain_x + math.sqrt(sigma_s**2 - v) * gain_eps, beta if large else v

    return form


@pytest.mark.parametrize(
    ("solver", "form"),
    [
        (DDIM(0.6), ancestral(0.6)),
        (DDIM(1.0), ancestral(1.0)),
        (DDPM(), ancestral(1.0)),
        (DDPM("large"), ancestral(1.0, large=True)),
        (DPMpp(1, eta=1.0), ancestral(1.0)),
    ],
)
def test_mean_and_variance_follow_the_published_recursions(solver, form):
    times = there(VP, Even(), 25)
    alpha, sigma = level(VP, 1.0)
    found = law_of(solver, rows(), times, (1.5 * alpha, 0.25 * alpha**2 + sigma**2))
    assert found == pytest.approx(affine(form, times), abs=1e-10)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (DDIM(0.6), 1),
        (DDPM(), 1),
        (DDPM("large"), 1),
        (DPMpp(2, eta=1.0), 2),
        (DPMpp(2, eta=0.5, coefficients="exact"), 2),
        (DPMpp(3, eta=1.0), 2),
        (EulerMaruyama(), 1),
    ],
)
def test_the_law_of_samples_converges_to_that_of_the_path(solver, order):
    """Mean and variance at t = .02, in closed form on both sides: errors fall by 2^order as steps halve."""
    span, errors = (0.02, 1.0), []
    (alpha, sigma), (last, least) = level(VP, 1.0), level(VP, 0.02)
    field = PathSDE(exact(LINE, VP, "eps"), OfPath()) if isinstance(solver, EulerMaruyama) else rows()
    for n in (60, 120):
        mean, variance = law_of(solver, field, there(VP, LogSNR(), n, span), (1.5 * alpha, 0.25 * alpha**2 + sigma**2))
        errors.append((abs(mean - 1.5 * last), abs(variance - 0.25 * last**2 - least**2)))
    assert errors[1][1] < 0.03 and max(errors[1]) > 1e-9
    assert math.log2(errors[0][1] / errors[1][1]) > order - 0.25, errors


def test_samples_of_a_mixture_have_its_moments():
    """40 000 rows of 2M SDE and of the churned Heun: mean and second moment within 4 standard errors and the bias.

    The bias, below .01 at 60 steps, is that of the method; standard errors are .005 and .008.
    """
    n, linear = 8000, rows(TWO, Linear(), "velocity")
    mean, second = 0.3 * -1 + 0.7, 0.3 * 1.09 + 0.7 * 1.25
    z = torch.randn(n, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for solver in (DPMpp(eta=1.0), EDMHeun(s_churn=10.0)):
        times = there(Linear(), LogSNR(), 40, (0.0, 1.0))
        w = torch.randn(40, n, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        x = integrate(linear, z, times, solver=solver, noise=Given(w)).x
        assert abs(x.mean() - mean) < 4 * x.std() / n**0.5 + 0.01
        assert abs(x.square().mean() - second) < 4 * x.square().std() / n**0.5 + 0.01


def test_churn_is_the_published_algorithm():
    """Karras et al. 2022, algorithm 2, transcribed: levels 80 … .002 and 0, with the same normals."""
    law, n, churn, low, high, scale = gaussian(torch.zeros(1), torch.tensor([0.25])), 9, 6.0, 0.05, 50.0, 1.007
    path = EDM()
    sigmas = [path.scales(t)[1].item() for t in torch.linspace(1, 0, n, dtype=torch.float64)]
    normals = torch.randn(n - 1, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = 70.0
    for i, (sigma, then) in enumerate(pairwise(sigmas)):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= sigma <= high else 0.0
        raised = sigma * (1 + gamma)
        x = x + math.sqrt(raised**2 - sigma**2) * scale * normals[i].item()
        d = x / raised - 0.25 * x / (0.25 + raised**2) / raised  # (x - D(x))/σ
        ahead = x + (then - raised) * d
        x = x + (then - raised) * 0.5 * (d + ahead * then / (0.25 + then**2))
    solver = EDMHeun(s_churn=churn, s_min=low, s_max=high, s_noise=scale).along(n)
    found = integrate(
        rows(law, path),
        torch.tensor([[70.0]]).double(),
        path_times(path, n),
        solver=solver,
        noise=Given(normals),
    )
    assert found.x.item() == pytest.approx(x, abs=1e-9)
    with pytest.raises(ValueError, match="call along"):
        EDMHeun(s_churn=1.0).step(rows(), number(0.5), number(0.4), torch.ones(1, 1), (), Given(normals))


def path_times(path: Schedule, n: int) -> Tensor:
    return Even().times(n, path, (0.0, 1.0), denoised=True).flip(0)


def test_a_correction_is_langevins_step_at_the_given_signal_to_noise():
    """Song et al. 2021, algorithm 4, for a Gaussian score and |ε̂| = |z|, where its step is 2 r² σ² for every item."""
    t, s, x, ratio = number(0.5), number(0.45), randn(3, 4), 0.2
    w, z = randn(1, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    law = gaussian(torch.full((4,), 1.5), torch.full((4,), 0.25))
    y = DDPM().step(rows(law), t, s, x, (), Given(w)).x
    alpha, sigma = level(VP, s)
    for k in range(2):
        score = -(y - alpha * 1.5) / (0.25 * alpha**2 + sigma**2)
        length = 2 * (ratio * sigma) ** 2
        y = y + length * score + (2 * length) ** 0.5 * z[k]
    found = PredictorCorrector(2, ratio).step(rows(law), t, s, x, (), Given(w, z)).x
    torch.testing.assert_close(found, y, rtol=0, atol=1e-12)


def test_corrections_keep_the_law_also_on_the_line():
    """On N(m, V) the step ε leaves the variance V/(1 - ε/2V), in one dimension as in many."""
    n, law, t = 20_000, gaussian(torch.full((1,), 1.5), torch.full((1,), 0.25)), number(0.2)
    alpha, sigma = level(VP, t)
    v, length = 0.25 * alpha**2 + sigma**2, 2 * (0.3 * sigma) ** 2
    x = alpha * 1.5 + v**0.5 * randn(n, 1)
    solver = PredictorCorrector(30, 0.3)
    x = solver.step(rows(law), t, t - 1e-9, x, (), Given(randn(1, n, 1, seed=1), randn(30, n, 1, seed=2))).x
    assert x.mean().item() == pytest.approx(alpha * 1.5, abs=5 * (v / n) ** 0.5)
    assert x.var().item() == pytest.approx(v / (1 - length / (2 * v)), rel=5 * (2 / n) ** 0.5)


def test_parts_of_a_path_give_independent_normals():
    """The corrector's normals, from areas over parts of a step, against the predictor's, over 20 000 rows."""
    n, path = 20_000, BrownianTree(20_000, (1,), start=0.0, end=1.0, dtype=torch.float64)
    t, s, x = number(0.75), number(0.25), torch.zeros(20_000, 1, dtype=torch.float64)
    solver = PredictorCorrector(2)
    drawn = torch.cat((path.increment(t, s).w / 0.5**0.5, *(solver._normal(path, t, s, k, x) for k in (0, 1))), 1)
    assert (drawn.T.cov() - torch.eye(3)).abs().max() < 5 * (2 / n) ** 0.5


def test_paths_are_drawn_finer_than_the_shortest_step():
    """A thousandth of it is 1e-6 here, where the coarsest path has 2⁻¹⁴ = 6e-5 of the whole."""
    times = torch.tensor([0.2, 0.2008, 1.0], dtype=torch.float64)
    given = SimpleNamespace(times=times, controller=Fixed(), solver=DDPM())
    path = Sampler.path(given, SeedNoise(2), (2,), torch.float64)
    assert 1e-8 < path.tolerance < 1e-6


def test_finer_grids_see_the_same_path():
    """Ancestral samples of one seed converge pathwise: doubling the steps halves their distance."""
    path = BrownianTree(32, (1,), start=0.02, end=1.0, dtype=torch.float64, tolerance=2.0**-20)
    x = randn(32, 1)
    found = [
        integrate(rows(), x, there(VP, Even(), n, (0.02, 1.0)), solver=DDIM(1.0), noise=path).x for n in (24, 48, 96)
    ]
    gaps = [(a - b).square().mean().sqrt().item() for a, b in pairwise(found)]
    assert gaps[0] < 0.2 and all(b < 0.7 * a for a, b in pairwise(gaps)), gaps


# ---- the SDEs of a path ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "vp", "edm", "trigonometric"])
@pytest.mark.parametrize("name", names(Diffusivity))
def test_every_diffusivity_keeps_the_law_of_the_path(name, schedule):
    """For Gaussian data the drift is a (x - α m) + α' m, and V' = 2 a V ∓ e² with V = α² v + σ², in both directions."""
    path, e = build(Schedule, schedule), build(Diffusivity, {"name": name, "scale": 0.8})
    t = torch.tensor([0.05, 0.4, 0.8], dtype=torch.float64)
    s = path(t)
    variance = 0.25 * s.alpha**2 + s.sigma**2
    slope = 0.5 * s.alpha * s.dalpha + 2 * s.sigma * s.dsigma
    x = randn(3, 1)
    for to_data, sign in ((True, -1), (False, 1)):
        field = PathSDE(exact(LINE, path, "velocity"), e, to_data=to_data)
        a = (field.drift(t, x + 1) - field.drift(t, x))[:, 0]
        rest = field.drift(t, 1.5 * s.alpha[:, None])[:, 0]
        squared = field.diffusion(t, x)[:, 0].square()
        torch.testing.assert_close(2 * a * variance + sign * squared, slope, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rest, 1.5 * s.dalpha, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(squared, e(path, t).square())


def test_diffusivities_are_their_formulas():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(OfPath()(VP, t).square(), 0.1 + 19.9 * t)  # β(t)
    torch.testing.assert_close(OfPath(0.5)(Linear(), t).square(), t / (1 - t))
    scaled = {name: build(Diffusivity, {"name": name, "scale": 2.0})(Linear(), t) for name in names(Diffusivity)}
    torch.testing.assert_close(scaled["constant"], torch.full_like(t, 2.0))
    torch.testing.assert_close(scaled["proportional"], 2 * t)
    for name in names(Diffusivity):
        with pytest.raises(ConfigError, match="scale >= 0"):
            build(Diffusivity, {"name": name, "scale": -1.0})
    with pytest.raises(ValueError, match="singular"):
        PathSDE(exact(LINE, Linear(), "velocity"), OfPath()).drift(number(1.0), randn(1, 1))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_denoiser_is_refused(name):
    with pytest.raises(ConfigError, match=rf"'{name}' needs a denoiser \(.*Use one of: .*euler"):
        integrate(lambda t, x: -x, randn(2, 2), torch.tensor([1.0, 0.5]), solver=build(Solver, name))


@pytest.mark.parametrize("name", RANDOM)
def test_noise_needs_a_path_and_runs_to_the_data(name):
    solver, times = RANDOM[name].along(4), torch.tensor([0.8, 0.6], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"needs a Brownian path.*found NoneType"):
        integrate(rows(), randn(2, 1), there(VP, Even(), 4), solver=solver)
    path = BrownianTree(2, (1,), start=0.0, end=1.0)
    with pytest.raises(ValueError, match="from noise to data only"):
        integrate(rows(), randn(2, 1), there(VP, Even(), 4).flip(0), solver=solver, noise=path)
    assert integrate(rows(), randn(2, 1), times, solver=DDIM(1.0), noise=path).x.isfinite().all()


def test_settings_are_checked():
    for make in (
        lambda: DDIM(1.5),
        lambda: DPMpp(4),
        lambda: DPMpp(eta=-1.0),
        lambda: ExponentialAdams(5),
        lambda: DPMpp2S(1.0),
        lambda: EDMHeun(s_min=2.0, s_max=1.0),
        lambda: EDMEuler(s_churn=-1.0),
        lambda: PredictorCorrector(0),
        lambda: PredictorCorrector(snr=1.0),
    ):
        with pytest.raises(ConfigError, match="needed, found"):
            make()
    with pytest.raises(ValueError, match=r"'dpmpp' of order 3 needs at least that many steps, found 2"):
        integrate(rows(), randn(1, 1), there(VP, LogSNR(), 2), solver=DPMpp(3))


def test_evaluations_are_those_of_the_denoiser():
    times = there(VP, LogSNR(), 6, (0.02, 1.0))
    for solver in DETERMINISTIC.values():
        assert integrate(rows(), randn(2, 1), times, solver=solver).nfe.tolist() == [6 * solver.stages] * 2
    adjusted = integrate(rows(), randn(2, 1), times, solver=RK4())  # its field is also that of the ODE
    assert adjusted.nfe.tolist() == [24, 24]
