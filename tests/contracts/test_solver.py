"""The contract of every registered Solver: order, both directions, cost, gradients; and the outcomes of `integrate`."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from genmodels.registry import ConfigError, build, member, names
from genmodels.rng import generator
from genmodels.solvers.base import Fixed, Solver, integrate
from genmodels.solvers.fields import RowField, VectorField
from genmodels.solvers.implicit import DiagonallyImplicit
from genmodels.solvers.inverse import Inverse
from genmodels.solvers.runge_kutta import Dopri5, Euler, Heun, RungeKutta
from genmodels.solvers.solution import Record, Result, SolverError
from genmodels.solvers.step_size import PI
from genmodels.types import SupportsScore, expand_like
from tests.oracles import GAUSSIAN, LINEAR, probability_flow

STEPPERS = [name for name in names(Solver) if not member(Solver, name, "solver").whole]
SOLVERS = [name for name in STEPPERS if build(Solver, name).needs is VectorField]
PLANE = torch.randn(5, 2, generator=generator("plane"), dtype=torch.float64)
BOTH_SIGNS = 0.9 * PLANE.tanh()


def grid(steps: int, start: float = 0.0, end: float = 1.0) -> Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def riccati(t: Tensor, x: Tensor) -> Tensor:
    """Neither linear nor autonomous: x' = cos(t) x², x(t) = 1 / (1/x(0) - sin t)."""
    return expand_like(t.cos(), x) * x.square()


def gaussian_flow(t: Tensor, x: Tensor) -> Tensor:
    return GAUSSIAN.velocity(x, 1 - t, t, -torch.ones_like(t), torch.ones_like(t))


# field, start, the two times, exact end
PROBLEMS: dict[str, tuple[Callable, Tensor, tuple[float, float], Tensor]] = {
    "linear": (LINEAR.field, PLANE, (0.0, 1.0), LINEAR.solution(1.0, PLANE)),
    "riccati": (riccati, BOTH_SIGNS, (0.0, 1.0), 1 / (1 / BOTH_SIGNS - math.sin(1.0))),
    "gaussian": (gaussian_flow, PLANE, (1.0, 0.0), probability_flow(GAUSSIAN, PLANE, (0.0, 1.0), (1.0, 0.0))),
}


def rates(solve: Callable[[int], Tensor], exact: Tensor, solver: Solver) -> float:
    """Measured order at the smallest steps that rounding does not touch (longer ones if each is dear)."""
    n = {1: 128, 2: 64, 3: 48, 4: 32, 8: 4}.get(int(solver.order), 64)
    n = 16 if isinstance(solver, DiagonallyImplicit | Inverse) else n
    coarse, fine = ((solve(k) - exact).abs().max() for k in (n, 2 * n))
    assert fine > 1e-14, "rounding spoils the measurement"
    return float(torch.log2(coarse / fine))


# ---- every solver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.slow_for("esdirk54-gaussian", "kvaerno3-gaussian")
def test_reaches_its_order(name, problem):
    solver, (field, x, ends, exact) = build(Solver, name), PROBLEMS[problem]
    rate = rates(lambda n: integrate(field, x, grid(n, *ends), solver=solver).x, exact, solver)
    assert rate > solver.order - 0.3  # on the curved problem the fifth-order methods come down to 5 from below
    # methods of order 8 meet rounding before the last term of their error stands alone
    most = solver.order + (1.0 if solver.order == 8 else 0.4)
    assert problem != "linear" or rate < most, "step control relies on the order being no higher either"


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.slow_for("esdirk54")
def test_flipping_the_grid_inverts_to_the_declared_order(name):
    solver, (field, x, ends, _) = build(Solver, name), PROBLEMS["riccati"]

    def there_and_back(n: int) -> Tensor:
        times = grid(n, *ends)
        z = integrate(field, x, times, solver=solver).x
        assert (z - x).abs().max() > 0.1
        return integrate(field, z, times.flip(0), solver=solver).x

    if name in ("implicit_midpoint", "trapezoid"):  # symmetric: inverted by what is left of Newton's iteration
        assert (there_and_back(16) - x).abs().max() < 1e-13
        return
    assert rates(there_and_back, x, solver) > solver.order - 0.2


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_counted_and_as_many_as_stated(name):
    solver, seen = build(Solver, name), []

    def field(t: Tensor, x: Tensor) -> Tensor:
        assert t.dtype == torch.float64 and t.shape == ()
        seen.append(float(t))
        return LINEAR.field(t, x)

    counts = []
    for steps in (3, 7):
        seen.clear()
        out = integrate(field, PLANE, grid(steps, 0.2, 0.9), solver=solver)
        products = 2 * steps if isinstance(solver, DiagonallyImplicit) else 0  # a Jacobian of two components a step
        assert out.nfe.tolist() == [len(seen) + products] * 5 and out.steps.tolist() == [steps] * 5
        assert out.rejected.tolist() == [0] * 5 and out.time.tolist() == [0.9] * 5
        assert min(seen) == 0.2 and max(seen) <= 0.9, "fields may end at the ends of the grid"
        counts.append(len(seen))
    least = 4 * solver.stages
    assert (
        counts[1] - counts[0] > 2 * least if isinstance(solver, DiagonallyImplicit) else counts[1] - counts[0] == least
    )


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.slow_for("esdirk54")
def test_stages_at_the_end_of_a_step_are_at_its_very_end(name):
    """t + (s - t) may differ from s by rounding; a schedule that ends at s must not be asked beyond it."""
    solver = build(Solver, name)
    for ends in torch.rand(60, 2, generator=generator("ends"), dtype=torch.float64) ** 3:  # draws alone differ exactly
        inside = lambda t, x, ends=ends: ((ends[1] - t) * (ends[1] - ends[0]).sign()).sqrt() * x  # noqa: E731
        out = integrate(inside, PLANE, ends, solver=solver, record=Record())
        assert out.x.isfinite().all() and (out.trace.error is None or out.trace.error.isfinite().all())


@pytest.mark.parametrize("name", SOLVERS)
def test_error_and_stiffness_do_not_know_the_direction(name):
    solver = build(Solver, name)
    ahead = integrate(LINEAR.field, PLANE, grid(6), solver=solver, record=Record()).trace
    mirrored = integrate(lambda t, x: -LINEAR.field(-t, x), PLANE, -grid(6), solver=solver, record=Record()).trace
    torch.testing.assert_close(ahead.t, -mirrored.t)
    torch.testing.assert_close(ahead.h, torch.full((6, 5), 1 / 6, dtype=torch.float64))
    assert ahead.taken.shape == (6, 5) and ahead.taken.all()
    for each in ("error", "stiffness"):
        a, b = getattr(ahead, each), getattr(mirrored, each)
        paired = isinstance(solver, RungeKutta) and solver.tableau.paired and name != "dopri8"
        known = solver.adaptive if each == "error" else paired
        assert (a is not None) == (b is not None) == known
        if a is not None:
            assert (a > 0).all()
            torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.slow_for("esdirk54")
def test_rows_do_not_see_each_other_and_dtypes_are_kept(name):
    solver = build(Solver, name)
    whole = integrate(riccati, -1 - PLANE.abs(), grid(9), solver=solver, save="all")
    for i in range(5):
        alone = integrate(riccati, -1 - PLANE[i : i + 1].abs(), grid(9), solver=solver, save="all")
        torch.testing.assert_close(alone.path[:, 0], whole.path[:, i], rtol=1e-14, atol=0)
    torch.testing.assert_close(whole.path[-1], whole.x, rtol=0, atol=0)
    wide = integrate(lambda t, x: -x.double(), PLANE.float(), grid(3), solver=solver)
    assert wide.x.dtype == torch.float32, "a field of another precision does not change the state's"
    half = integrate(riccati, (-1 - PLANE.abs()).float(), grid(9), solver=solver)
    assert half.x.dtype == torch.float32
    torch.testing.assert_close(half.x.double(), whole.x, rtol=1e-5, atol=1e-6)
    shaped = integrate(riccati, (-1 - PLANE.abs()).reshape(1, 5, 2, 1), grid(9), solver=solver).x
    torch.testing.assert_close(shaped.reshape(5, 2), whole.x)
    flat = integrate(riccati, -1 - PLANE[:, 0].abs(), grid(9), solver=solver).x
    torch.testing.assert_close(flat, whole.x[:, 0])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.slow_for("esdirk54")
def test_gradients_are_those_of_the_steps(name):
    solver, matrix = build(Solver, name), LINEAR.matrix.clone().requires_grad_()

    def end(x: Tensor, matrix: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        times = torch.stack((torch.zeros_like(last), last / 3, last))
        field = lambda t, y: torch.tanh(y @ matrix.T) + t * y  # noqa: E731
        out = integrate(field, x, times, solver=solver, save="all", record=Record())
        return tuple(v for v in (out.x, out.trace.error, out.trace.stiffness) if v is not None)

    last = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (PLANE[:2].clone().requires_grad_(), matrix, last), atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_empty_batches(name):
    for controller in (Fixed(), PI()) if build(Solver, name).adaptive else (Fixed(),):
        out = integrate(LINEAR.field, PLANE[:0], grid(4), solver=build(Solver, name), controller=controller, save="all")
        assert out.x.shape == (0, 2) and out.path.shape == (5, 0, 2) and out.nfe.shape == (0,)
        assert out.result is Result.success


# ---- Runge-Kutta -----------------------------------------------------------------------------------------------------

RUNGE_KUTTA = [name for name in SOLVERS if isinstance(build(Solver, name), RungeKutta)]


@cache
def trees(order: int) -> list[tuple]:
    """Rooted trees with `order` nodes, each the sorted tuple of its subtrees."""

    def forests(nodes: int, largest: int) -> list[tuple]:
        if nodes == 0:
            return [()]
        return [
            tuple(sorted((*group, *rest)))
            for size in range(1, min(nodes, largest) + 1)
            for count in range(1, nodes // size + 1)
            for group in combinations_with_replacement(trees(size), count)
            for rest in forests(nodes - size * count, size - 1)
        ]

    return forests(order - 1, order - 1)


def nodes(tree: tuple) -> int:
    return 1 + sum(map(nodes, tree))


def density(tree: tuple) -> int:
    return nodes(tree) * math.prod(map(density, tree))


@cache
def elementary(tree: tuple, name: str) -> list[Fraction]:
    """The elementary weight of a tree at each stage of a solver."""
    inner, a = [elementary(child, name) for child in tree], build(Solver, name).tableau.rows
    sums = [[sum((w * v for w, v in zip(row, each, strict=False)), Fraction(0)) for row in a] for each in inner]
    return [math.prod((each[i] for each in sums), start=Fraction(1)) for i in range(len(a))]


def order_defect(name: str, weights: tuple, order: int) -> float:
    """The largest violation of the order conditions Σ b_i Φ_i(tree) = 1/γ(tree) of exactly this order."""
    return max(
        abs(float(sum(b * phi for b, phi in zip(weights, elementary(tree, name), strict=True)) - Fraction(1, g)))
        for tree in trees(order)
        for g in [density(tree)]
    )


def test_the_rooted_trees_are_complete():
    assert [len(set(trees(n))) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]


@pytest.mark.parametrize("name", RUNGE_KUTTA)
def test_stability_ends_where_a_decaying_mode_stops_decaying(name):
    solver, one = build(Solver, name), torch.ones(1, 1, dtype=torch.float64)
    t, s = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def size(rate: float) -> float:
        field = lambda t, x: -rate * x  # noqa: E731
        return abs(solver.step(field, t, s, one, solver.start(field, t, one), None).x.item())

    if solver.stability is None:  # an A-stable method damps decay of any rate
        assert solver.implicit and size(1e4) < 1
    else:
        assert size((1 - 1e-5) * solver.stability) < 1 < size((1 + 1e-5) * solver.stability)


@pytest.mark.parametrize("name", RUNGE_KUTTA)
@pytest.mark.slow_for("dopri8")
def test_tableaux_meet_every_order_condition_and_no_more(name):
    tableau = build(Solver, name).tableau
    # Tsitouras' coefficients are published to 16 digits and reach 13 in size, two others as near fractions
    tolerance = {"tsit5": 1e-13, "dopri8": 2e-17, "esdirk54": 1e-25}.get(name, 0.0)
    assert all(abs(float(sum(row) - c)) <= tolerance for row, c in zip(tableau.rows, tableau.c, strict=True))
    for weights, order in ((tableau.b, tableau.order), (tableau.b_hat, tableau.order - 1)):
        if weights:
            assert all(order_defect(name, weights, n) <= tolerance for n in range(1, order + 1))
            assert order_defect(name, weights, order + 1) > 1e-6


# y' = -y, h = 0.5 and y' = y cos t, h = 0.5, both from 1, computed independently in exact arithmetic
@pytest.mark.parametrize(
    ("name", "decay", "decay_error", "cosine", "cosine_error"),
    [
        ("dopri5", 0.606536458333333, 3.0664062500e-05, 1.615150906365754, -1.5500064002e-05),
        ("tsit5", 0.606532794968617, 1.5933689704e-05, 1.615147604775615, -6.1372586856e-06),
    ],
)
def test_single_steps_with_their_errors_and_stiffness(name, decay, decay_error, cosine, cosine_error):
    solver, one = build(Solver, name), torch.ones(1, 1, dtype=torch.float64)
    t, s = torch.tensor([0.0, 0.5], dtype=torch.float64)
    for field, value, error, stiffness in (
        (lambda t, x: -x, decay, decay_error, 1.0),
        (lambda t, x: t.cos() * x, cosine, cosine_error, math.cos(0.5)),
    ):
        step = solver.step(field, t, s, one, solver.start(field, t, one), None)
        found = solver.stiffness(t, s, one, step)
        assert step.x.item() == pytest.approx(value, abs=1e-14)
        assert step.error.item() == pytest.approx(error, rel=1e-9)
        assert found.item() == pytest.approx(stiffness, rel=1e-10)


def test_stiffness_is_the_eigenvalue_and_0_at_rest():
    rate = torch.tensor([[1.0], [50.0], [1000.0], [0.0]], dtype=torch.float64)
    decay = lambda t, x: -rate * x  # noqa: E731
    out = integrate(decay, torch.ones_like(rate), grid(5, 0.0, 0.01), solver=Dopri5(), record=Record())
    torch.testing.assert_close(out.trace.stiffness, rate.T.expand(5, -1), rtol=1e-4, atol=0)  # k₇ - k₆ cancels
    spiral = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
    out = integrate(lambda t, x: x @ spiral.T, PLANE, grid(10), solver=Dopri5(), record=Record())
    modulus = torch.full((10, 5), abs(complex(-0.1, 2)), dtype=torch.float64)
    torch.testing.assert_close(out.trace.stiffness, modulus, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("solver", "exact"), [(Heun(), 0.52762464), (Euler(), 0.42303144)])
def test_edm_sampler_on_a_gaussian(solver, exact):
    """Karras' grid of 18 steps from σ = 80 for N(0, 0.5²); the last step, to σ = 0, is Euler's."""
    ramp = torch.linspace(0, 1, 18, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    x = torch.tensor([[80.0]], dtype=torch.float64)
    x = integrate(lambda s, x: x * s / (s**2 + 0.25), x, sigmas, solver=solver).x
    last = torch.stack((sigmas[-1], torch.zeros_like(sigmas[-1])))
    x = integrate(lambda s, x: x * s / (s**2 + 0.25), x, last, solver=Euler()).x
    assert x.item() == pytest.approx(exact, abs=1e-8)


# ---- integrate -------------------------------------------------------------------------------------------------------


def test_a_row_that_fails_stops_alone():
    x = torch.tensor([[1.0], [3.0], [0.5]], dtype=torch.float64)
    poles = lambda t, x: torch.where(t > 0.55, torch.where(x > 2, torch.inf, -x), -0.0 * x)  # noqa: E731
    with pytest.raises(
        SolverError, match=r"row 1 of 3 met an infinite.*step 7 from t = 0\.6.*on_failure=\"return\""
    ) as e:
        integrate(poles, x, grid(10), solver=Euler())
    assert (e.value.row, e.value.time, e.value.steps, e.value.result) == (1, 0.6, 6, Result.non_finite)
    out = integrate(poles, x, grid(10), solver=Euler(), on_failure="return", save="all")
    assert out.result is Result.non_finite and out.status.tolist() == [0, 3, 0]
    assert out.x[1].item() == 3.0 and out.steps.tolist() == [10, 6, 10] and out.nfe.tolist() == [10, 7, 10]
    assert out.path[6, 1].item() == 3.0 and out.path[7:, 1].isnan().all() and out.path[:, [0, 2]].isfinite().all()


def test_max_steps_bounds_a_grid_too():
    with pytest.raises(SolverError, match="max_steps_reached"):
        integrate(LINEAR.field, PLANE, grid(10), solver=Euler(), max_steps=4)
    out = integrate(LINEAR.field, PLANE, grid(10), solver=Euler(), max_steps=4, on_failure="return", save="all")
    torch.testing.assert_close(out.x, integrate(LINEAR.field, PLANE, grid(10)[:5], solver=Euler()).x)
    assert out.time.tolist() == [grid(10)[4]] * 5 and out.path.shape == (11, 5, 2) and out.path[5:].isnan().all()


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ([0.0, 0.5, 0.5, 1.0], r"times\[1\] = 0.5 and times\[2\] = 0.5"),
        ([1.0, 0.5, 0.75, 0.0], r"times\[1\] = 0.5 and times\[2\] = 0.75"),
        ([0.0, 1.0, 0.0], "strictly"),
        ([0.0], "L at least 2"),
        ([0.0, math.nan], "finite"),
    ],
)
def test_times_are_checked(times, found):
    with pytest.raises(ValueError, match=found):
        integrate(LINEAR.field, PLANE, torch.tensor(times), solver=Euler())


class NeedsScore(Euler):
    needs: ClassVar[type] = SupportsScore


def test_mismatches_are_named_early():
    with pytest.raises(ConfigError, match=r"'euler' needs a SupportsScore.*Use one of: .*dopri5.*rk4"):
        integrate(LINEAR.field, PLANE, grid(1), solver=NeedsScore())
    with pytest.raises(
        ConfigError, match=r"'pi' needs an error estimate, which solver 'rk4'.*bosh3, dopri5, dopri8, esdirk54, heun"
    ):
        integrate(LINEAR.field, PLANE, grid(1), solver=build(Solver, "rk4"), controller=PI())
    with pytest.raises(ValueError, match=r"\[5, 2\] into a velocity of shape \[5, 1\]"):
        integrate(lambda t, x: x[:, :1], PLANE, grid(1), solver=Euler())
    with pytest.raises(ValueError, match="floating point"):
        integrate(LINEAR.field, torch.ones(3, 2, dtype=torch.int64), grid(1), solver=Euler())
    with pytest.raises(ValueError, match="'last', 'all' or 'dense'"):
        integrate(LINEAR.field, PLANE, grid(1), solver=Euler(), save="every")


def test_evaluations_of_another_method_can_be_counted():
    class Drift:
        def __call__(self, t: Tensor, x: Tensor) -> Tensor:
            return x

        def drift(self, t: Tensor, x: Tensor) -> Tensor:
            return -x

    class DriftEuler(Euler):
        needs, counts = Drift, "drift"

        def slope(self, field, t, x, state):
            return field.drift(t, x) + 0 * field(t, x)

    out = integrate(Drift(), PLANE, grid(6), solver=DriftEuler())
    assert out.nfe.tolist() == [6] * 5
    torch.testing.assert_close(out.x, PLANE * (5 / 6) ** 6)


def test_row_fields_narrow_every_argument():
    label, extra = torch.arange(4), {"a": torch.arange(8.0).reshape(4, 2), "b": None}
    field = RowField(lambda t, x, label, extra, none: x * label[:, None] + extra["a"], label, extra, None)
    rows, x = torch.tensor([3, 1]), torch.ones(4, 2)
    torch.testing.assert_close(field.select(rows)(None, x[rows]), field(None, x)[rows])
