"""RF-Solver and its neighbours: published and closed-form figures on an exact field, orders, guidance, refusals."""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from genmodels.distributions import GaussianMixture
from genmodels.editing.editor import Prompt, Walk
from genmodels.editing.exact import MixtureEditor
from genmodels.registry import ConfigError, build
from genmodels.solvers.base import Solver, State, Step, integrate
from genmodels.solvers.inverse import Inverse
from genmodels.solvers.multistep import AB2, FireFlow, UniInv
from genmodels.solvers.rf_solver import RFSolver
from genmodels.solvers.runge_kutta import Euler, Heun, Midpoint, Ralston
from genmodels.solvers.solution import Solution, SolverError

ANGLES = 2 * math.pi / 8 * torch.arange(8, dtype=torch.float64)
MODES = 2 * torch.stack((ANGLES.cos(), ANGLES.sin()), 1)
QUANTILES = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(8, dtype=torch.float64) + 0.5) / 8)
NOISE = torch.cartesian_prod(QUANTILES, QUANTILES)
EVEN, SHIFTED = 1.0, math.exp(1.15)
SIZES = (4, 8, 16, 32, 64, 128, 256)


def ring(t: Tensor, x: Tensor) -> Tensor:
    """The velocity of eight Gaussians of deviation 0.3 on a circle of radius 2, weights equal."""
    t = float(t)
    a, spread = 1 - t, (1 - t) ** 2 * 0.09 + t * t
    mean = torch.softmax(x @ MODES.T * (a / spread), 1) @ MODES
    return torch.add(torch.add(x, mean, alpha=-a) * ((t - a * 0.09) / spread), mean, alpha=-1)


def mixture(means: Tensor) -> GaussianMixture:
    return GaussianMixture.from_tensors(
        torch.ones(len(means)), means, torch.full((len(means), 2), 0.09, dtype=torch.float64)
    )


def grid(steps: int, shift: float = EVEN) -> Tensor:
    """From noise to data."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)


def error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).square().sum(1).mean().sqrt())


@cache
def images(start: float = 1.0) -> Tensor:
    """Where the exact flow takes the noise, from t = 1 by way of `start` to 0 (or to `start`, if that is not 1)."""
    end = 0.0 if start == 1.0 else start
    times = torch.linspace(1, end, 41, dtype=torch.float64)
    return integrate(ring, NOISE, times, solver=build(Solver, "dopri8")).x


class Given(Solver):
    """A step rule of a test."""

    def __init__(self, rule: Callable[[Callable, Tensor, Tensor, Tensor], Tensor]) -> None:
        self.rule = rule

    def step(self, field: Callable, t: Tensor, s: Tensor, x: Tensor, state: State, noise: None = None) -> Step:
        return Step(self.rule(field, t, s, x), None, ())


def quotients(field: Callable, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """Two difference quotients, called a third order where it circulates."""
    h = s - t
    v = field(t, x)
    middle = field(t + h / 2, x + h / 2 * v)
    first = (middle - v) / (h / 2)
    quarter = field(t + h / 4, x + h / 4 * v + (h / 4) ** 2 / 2 * first)
    second = (middle - 2 * quarter + v) / (h / 4) ** 2
    return x + h * v + h**2 / 2 * first + h**3 / 6 * second


def fixed_probe(field: Callable, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """A probe 0.01 ahead, whatever the step."""
    h, ahead = s - t, 0.01 * (s - t).sign()
    v = field(t, x)
    return x + h * v + h**2 / 2 * (field(t + ahead, x + ahead * v) - v) / ahead


def test_the_field_is_the_mixture_s_and_its_images_are_exact():
    points = [([0.5, -0.25], 0.9), ([1.0, 1.0], 0.5), ([1.9, 0.1], 0.05)]
    known = [[0.4128438852, -0.2064219426], [-0.6747732583, -0.6747732583], [-1.9999940663, -0.0424139298]]
    editor, prompt = MixtureEditor(), Prompt(mixture(MODES))
    for (x, t), v in zip(points, known, strict=True):
        x, t, v = (torch.tensor(each, dtype=torch.float64) for each in ([x], t, [v]))
        torch.testing.assert_close(ring(t, x), v, rtol=0, atol=6e-11)  # the figures have ten places
        torch.testing.assert_close(editor.velocity(t, x, prompt), v, rtol=0, atol=6e-11)
    coarse = integrate(ring, NOISE, grid(24), solver=build(Solver, "dopri8")).x
    # so 40 steps, (5/3)⁸ = 60 times closer, are far below any figure here
    assert error(coarse, images()) < 5e-12


EULER, RF, FIREFLOW = "euler", "rf_solver", "fireflow"
CONVERGENCE = {
    (EVEN, EULER): (2.495e-1, 1.263e-1, 6.422e-2, 3.247e-2, 1.634e-2, 8.198e-3, 4.106e-3),
    (EVEN, RF): (2.150e-2, 4.283e-3, 1.181e-3, 3.149e-4, 8.183e-5, 2.089e-5, 5.278e-6),
    (EVEN, "heun"): (2.682e-2, 8.053e-3, 2.434e-3, 6.757e-4, 1.776e-4, 4.550e-5, 1.151e-5),
    (EVEN, FIREFLOW): (4.858e-2, 1.142e-2, 3.332e-3, 9.286e-4, 2.445e-4, 6.266e-5, 1.585e-5),
    (EVEN, "ab2"): (9.059e-2, 1.925e-2, 4.180e-3, 9.167e-4, 2.119e-4, 5.083e-5, 1.244e-5),
    (EVEN, "probe 0.1"): (7.658e-2, 7.666e-3, 1.460e-3, 3.260e-4, 7.750e-5, 1.894e-5, 4.684e-6),
    (EVEN, "fixed probe"): (8.783e-2, 8.056e-3, 1.274e-3, 2.511e-4, 1.058e-4, 6.056e-5, 3.307e-5),
    (EVEN, "quotients"): (1.269e-1, 2.100e-2, 5.246e-3, 1.316e-3, 3.316e-4, 8.337e-5, 2.091e-5),
    (EVEN, "order 3"): (1.278e-2, 8.401e-4, 1.125e-4, 1.434e-5, 1.797e-6, 2.244e-7, 2.803e-8),
    (EVEN, "rk4"): (2.953e-3, 1.928e-4, 1.815e-5, 1.229e-6, 7.908e-8, 4.998e-9, 3.139e-10),
    (SHIFTED, EULER): (5.234e-1, None, None, None, None, None, 5.593e-3),
    (SHIFTED, RF): (1.963e-1, 3.267e-2, 4.355e-3, 8.206e-4, 1.942e-4, 4.775e-5, 1.187e-5),
    (SHIFTED, FIREFLOW): (3.011e-1, 3.596e-2, 8.118e-3, 1.997e-3, 5.610e-4, 1.485e-4, 3.808e-5),
}
ORDERS = {EULER: 1, RF: 2, "heun": 2, FIREFLOW: 2, "ab2": 2, "probe 0.1": 2, "quotients": 2, "order 3": 3, "rk4": 4}


def method(name: str) -> Solver:
    made = {"probe 0.1": RFSolver(probe=0.1), "order 3": RFSolver(3)}
    rules = {"fixed probe": fixed_probe, "quotients": quotients}
    return Given(rules[name]) if name in rules else made.get(name) or build(Solver, name)


@pytest.mark.parametrize(("shift", "name"), CONVERGENCE)
def test_errors_from_noise_to_data(shift, name):
    known = CONVERGENCE[shift, name]
    found = [
        None if e is None else error(integrate(ring, NOISE, grid(n, shift), solver=method(name)).x, images())
        for n, e in zip(SIZES, known, strict=True)
    ]
    assert found == [e if e is None else pytest.approx(e, rel=5e-4) for e in known]  # of four digits
    if shift == EVEN and name in ORDERS:
        assert math.log2(found[-2] / found[-1]) == pytest.approx(ORDERS[name], abs=0.05)


def test_local_errors():
    """One step down from t = 0.5; of three digits."""
    half = torch.tensor(0.5, dtype=torch.float64)
    known = {
        Euler(): (2.63e-2, 6.97e-3, 1.78e-3, 4.48e-4),
        RFSolver(): (1.98e-3, 2.97e-4, 3.95e-5, 5.01e-6),
        Heun(): (2.15e-3, 2.80e-4, 3.45e-5, 4.26e-6),
    }
    for k, h in enumerate((0.1, 0.05, 0.025, 0.0125)):
        for solver, errors in known.items():
            x = solver.step(ring, half, half - h, images(0.5), (), None).x
            assert error(x, images(0.5 - h)) == pytest.approx(errors[k], rel=4e-3)


def test_probes_are_known_methods():
    for solver, known in ((RFSolver(), Midpoint()), (RFSolver(probe=1.0), Heun()), (RFSolver(probe=2 / 3), Ralston())):
        for steps in (5, 25):
            times = grid(steps, SHIFTED)
            found, expected = (integrate(ring, NOISE, times, solver=each).x for each in (solver, known))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert RFSolver().tableau.weights == (0.0, 1.0)
    assert (RFSolver(3).order, RFSolver(3).stages, RFSolver(probe=0.1).stages) == (3, 3, 2)


def test_closed_forms():
    one, grow = torch.ones(1, 1, dtype=torch.float64), lambda t, x: 2 * x
    down, up = {}, {}
    for name in (EULER, RF, FIREFLOW, "rk4"):
        solver = build(Solver, name)
        down[name] = integrate(grow, one, grid(10), solver=solver).x.item()
        z = integrate(grow, one, grid(10).flip(0), solver=solver).x
        up[name] = integrate(grow, z, grid(10), solver=solver).x.item()
    assert down == pytest.approx({EULER: 0.1073741824, RF: 0.1374480313, FIREFLOW: 0.1400699635, "rk4": 0.1353395484})
    assert down["rk4"] == pytest.approx(math.exp(-2), rel=4e-5)
    assert up[RF] == pytest.approx((1 + 0.2**4 / 4) ** 10, rel=1e-13) == pytest.approx(1.0040072077, rel=1e-10)
    assert up[EULER] == pytest.approx((1 - 0.2**2) ** 10, rel=1e-13) == pytest.approx(0.6648326360, rel=1e-10)
    assert up[FIREFLOW] == pytest.approx(1.0074752389, rel=1e-10)
    clock = lambda t, x: 3 * t**2 + 0 * x  # noqa: E731
    for n in (5, 8):
        climb = lambda solver, n=n: integrate(clock, 0 * one, grid(n).flip(0), solver=solver).x.item()  # noqa: E731
        assert climb(RFSolver()) == pytest.approx(1 - 1 / (4 * n**2), rel=1e-13)
        assert climb(RFSolver(probe=1.0)) == pytest.approx(1 + 1 / (2 * n**2), rel=1e-13)
        assert climb(Euler()) == pytest.approx(1 - 3 / (2 * n) + 1 / (2 * n**2), rel=1e-13)
        assert climb(RFSolver(3)) == pytest.approx(1, rel=1e-13)
    line = lambda t, x: 5 * t - 1 + 0 * x  # noqa: E731
    for steps, shift in ((1, EVEN), (3, SHIFTED)):
        for solver in (RFSolver(), RFSolver(probe=0.3), RFSolver(3), FireFlow()):
            assert integrate(line, one, grid(steps, shift), solver=solver).x.item() == pytest.approx(-0.5, rel=1e-13)


def test_variable_steps_of_adams_bashforth():
    """x' = t from 0 by steps of 1, 2 and 1/2: Euler's first one errs by -1/2, the others are exact for lines in t."""
    times = torch.tensor([0.0, 1.0, 3.0, 3.5], dtype=torch.float64)
    out = integrate(lambda t, x: t + 0 * x, torch.zeros(1, 1).double(), times, solver=AB2(), save="all")
    torch.testing.assert_close(out.path.flatten(), times**2 / 2 - 0.5 * (times > 0), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("solver", [AB2(), FireFlow(), UniInv(), UniInv(zero_start=True)])
def test_padding_leaves_no_trace_in_memory(solver):
    """A row whose grid repeats a time within goes on as one whose grid does not."""
    own = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    padded = torch.tensor([0.0, 0.3, 0.3, 0.5, 0.5, 0.9, 1.0], dtype=torch.float64)
    other = torch.linspace(0, 1, 7, dtype=torch.float64)
    out = integrate(lambda t, x: -x * t[:, None].cos(), NOISE[:2], torch.stack((padded, other), 1), solver=solver).x
    for row, times in enumerate((own, other)):
        alone = integrate(lambda t, x: -x * t.cos(), NOISE[row : row + 1], times, solver=solver)
        torch.testing.assert_close(out[row], alone.x[0], rtol=1e-14, atol=0)


def test_evaluations():
    """2N, 3N, N + 1, N; and of an inverse, those of every iteration with a first guess."""
    inverse = Inverse(RFSolver(), iterations=3)
    counts = {RFSolver(): 20, RFSolver(3): 30, FireFlow(): 11, UniInv(): 11, UniInv(True): 10, AB2(): 10, inverse: 80}
    for solver, calls in counts.items():
        assert integrate(ring, NOISE, grid(10), solver=solver).nfe.unique().tolist() == [calls]


def test_inverses_stop_at_their_tolerance():
    """Row by row; fewer evaluations, the same states to the tolerance, and far rows do not move near ones."""
    field = lambda t, x: x * x.square().sum(1, keepdim=True)  # noqa: E731
    x, times = torch.tensor([[0.01, 0.0], [0.3, 0.1]], dtype=torch.float64), grid(8).flip(0)
    full = integrate(field, x, times, solver=Inverse())
    brief = integrate(field, x, times, solver=Inverse(tolerance=1e-6))
    assert (brief.nfe < full.nfe / 1.4).all()
    torch.testing.assert_close(brief.x, full.x, rtol=2e-5, atol=0)
    alone = integrate(field, x[:1], times, solver=Inverse(tolerance=1e-6))
    assert torch.equal(alone.x[0], brief.x[0]) and alone.nfe.item() < brief.nfe[0]


def test_inverses_that_diverge_say_so():
    """For x' = λ x the factor is h λ: 1.5 diverges, 0.95 nearly, and 0.8 misses a tolerance in 20 iterations."""
    x = torch.ones(2, 1, dtype=torch.float64)
    field = lambda t, x: torch.tensor([[3.0], [0.1]], dtype=torch.float64) * x  # noqa: E731
    out = integrate(field, x, grid(2).flip(0), solver=Inverse(), on_failure="return")
    assert out.status.tolist() == [3, 0] and out.x[1].item() == pytest.approx(0.95**-2, rel=1e-14)
    with pytest.raises(SolverError, match="row 0 of 2 met an infinite or undefined state"):
        integrate(field, x, grid(2).flip(0), solver=Inverse())
    slow = lambda t, x: torch.tensor([[0.8], [0.1]], dtype=torch.float64) * x  # noqa: E731
    out = integrate(slow, x, grid(1).flip(0), solver=Inverse(tolerance=1e-3), on_failure="return")
    assert out.status.tolist() == [3, 0]
    # without one: y = 1 + … + 0.8ⁿ after n iterations from 1 + 0.8
    found = integrate(slow, x, grid(1).flip(0), solver=Inverse()).x.flatten()
    rates = torch.tensor([0.8, 0.1], dtype=torch.float64)
    torch.testing.assert_close(found, (1 - rates**22) / (1 - rates))
    stuck = lambda t, x: 0.95 * x  # noqa: E731
    assert integrate(stuck, x, grid(1).flip(0), solver=Inverse(), on_failure="return").status.tolist() == [3, 3]


def test_inverses_fail_where_they_say():
    """For x' = λ x from 1: y = 1 + λ + … + λⁿ⁺¹; its last update λⁿ⁺¹ is told from λ² 0.9ⁿ⁻¹, λ/64."""
    x, times = torch.ones(1, 1, dtype=torch.float64), grid(1).flip(0)

    def ended(rate: float, **given: float) -> Solution:
        return integrate(lambda t, x: rate * x, x, times, solver=Inverse(**given), on_failure="return")

    assert [ended(rate).status.item() for rate in (0.89, 0.92)] == [0, 3]
    assert [ended(rate, iterations=30).status.item() for rate in (0.87, 0.93)] == [0, 3]
    tight = ended(0.3, iterations=40, tolerance=1e-15)  # rounding ends it, and nothing far above that
    assert tight.nfe.item() < 41 and tight.x.item() == pytest.approx(1 / 0.7, rel=2e-14)


def test_inverses_bear_the_rounding_of_a_field():
    """Updates end at the rounding of a bf16 field, h 2⁻⁸ |v|, or at the state's own below a tolerance out of reach."""
    coarse = lambda t, x: ring(t, x).bfloat16().double()  # noqa: E731
    z = integrate(coarse, images(), grid(25).flip(0), solver=Inverse(RFSolver())).x
    assert error(integrate(coarse, z, grid(25), solver=RFSolver()).x, images()) < 25 * 0.04 * 2**-8
    field = lambda t, x: ring(t, x.double()).float()  # noqa: E731
    x = images().float()
    z = integrate(field, x, grid(25).flip(0), solver=Inverse(RFSolver(), tolerance=1e-12)).x
    assert error(integrate(field, z, grid(25), solver=RFSolver()).x, x) < 25 * 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": RF, "order": 4}, r"one of 2 \| 3 is needed, found 4"),
        ({"name": RF, "probe": 0.0}, "0 < probe <= 1 is needed, in units of the step, found 0.0"),
        ({"name": RF, "probe": 1.5}, "found 1.5"),
        ({"name": RF, "order": 3, "probe": 1.0}, "order 3 has probes of its own"),
        ({"name": "inverse", "solver": FIREFLOW}, "'fireflow' cannot be inverted"),
        ({"name": "inverse", "solver": "dopri5"}, "'dopri5' cannot be inverted"),
        ({"name": "inverse", "solver": "implicit_midpoint"}, "'implicit_midpoint' cannot be inverted"),
        ({"name": "inverse", "solver": "ddim"}, "'ddim' cannot be inverted"),
        ({"name": "inverse", "iterations": 0}, "iterations must be at least 1, found 0"),
        ({"name": "inverse", "tolerance": 0.0}, "tolerance must be above 0, or null, found 0.0"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ConfigError, match=message):
        build(Solver, config)
    if config.get("order") == 4:
        with pytest.raises(ConfigError, match=r"found 4\. For order 4 take rk4"):
            RFSolver(4)


# ---- guidance: three neighbours of the ring are the prompted mixture, the whole ring the free one --------------------


class Forgetful(Walk):
    """Guidance at the first evaluation of a step alone."""

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        guided = self.prompt
        if self.calls % 2:
            self.prompt = guided._replace(guidance=1.0)
        found = super().__call__(t, x)
        self.prompt = guided
        return found


def guided(w: float, times: Tensor, kind: type[Walk] = Walk) -> Walk:
    return kind(MixtureEditor(mixture(MODES)), Prompt(mixture(MODES[:3]), w), times)


def test_guidance_belongs_to_both_evaluations():
    times = grid(64).flip(0)
    for w, right, wrong in ((2.0, 2.0e-4, 0.47), (3.5, 3.3e-4, 0.86)):
        exact = guided(w, grid(20).flip(0)).solve(build(Solver, "dopri8"), NOISE, True)
        # of two digits
        assert error(guided(w, times).solve(RFSolver(), NOISE, True), exact) == pytest.approx(right, rel=0.03)
        assert error(guided(w, times, Forgetful).solve(RFSolver(), NOISE, True), exact) == pytest.approx(
            wrong, rel=0.02
        )


def test_guidance_that_differs_on_the_two_ways_outweighs_the_solver():
    times = grid(25).flip(0)
    x = guided(1.0, grid(20).flip(0)).solve(build(Solver, "dopri8"), NOISE, True)
    z = guided(1.0, times).solve(RFSolver(), x, False)
    for w, apart in {1.0: 1.9e-4, 1.25: 0.139, 1.5: 0.268, 2.0: 0.468, 3.5: 0.849}.items():
        digits = 0.03 if w == 1 else 4e-3
        assert error(guided(w, times).solve(RFSolver(), z, True), x) == pytest.approx(apart, rel=digits)
    for w, apart in {2.0: 8.4e-4, 3.5: 7.4e-3}.items():
        z = guided(w, times).solve(RFSolver(), x, False)
        assert error(guided(w, times).solve(RFSolver(), z, True), x) == pytest.approx(apart, rel=0.01)
