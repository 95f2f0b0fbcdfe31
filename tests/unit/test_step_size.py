"""Step control row by row: accuracy, cost, landing, outcomes, gradients; numbers of an independent implementation."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from genmodels.registry import build, member, names
from genmodels.rng import generator
from genmodels.solvers.base import Controller, Solver, integrate
from genmodels.solvers.fields import RowField, VectorField
from genmodels.solvers.implicit import DiagonallyImplicit
from genmodels.solvers.runge_kutta import Dopri5, Heun
from genmodels.solvers.solution import Record, Result, SolverError
from genmodels.solvers.step_size import PI
from genmodels.types import expand_like
from tests.oracles import GAUSSIAN, LINEAR, probability_flow

FIELDS = [name for name in names(Solver) if member(Solver, name, "solver").needs is VectorField]
ADAPTIVE = [name for name in FIELDS if not member(Solver, name, "solver").whole and build(Solver, name).adaptive]
PLANE = torch.randn(5, 2, generator=generator("plane"), dtype=torch.float64)
SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)


def bump(t: Tensor, x: Tensor) -> Tensor:
    """A pulse of width 0.01 at t = 0.5: x(1) - x(0) = its integral, 0.01 √(2π)."""
    return expand_like((-((t - 0.5) ** 2) / (2 * 0.01**2)).exp(), x) * torch.ones_like(x)


class Rates:
    """x' = -rate x (row by row), which counts the rows that it evaluates."""

    def __init__(self, rate: Tensor, counts: list[int]) -> None:
        self.rate, self.counts = rate, counts

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        assert t.shape == x.shape[:1] and t.dtype == torch.float64
        self.counts.append(len(x))
        return -self.rate[:, None] * x

    def select(self, rows: Tensor) -> "Rates":
        return Rates(self.rate[rows], self.counts)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.slow_for("ralston")
def test_error_follows_the_tolerance(name):
    solver, exact = build(Solver, name), LINEAR.solution(1.0, PLANE)
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-4, 1e-5, 1e-6):
        out = integrate(LINEAR.field, PLANE, UNIT, solver=solver, controller=PI(tolerance, tolerance))
        errors.append(float((out.x - exact).abs().max()))
        evaluations.append(float(out.nfe.double().mean()))
        assert errors[-1] < 10 * tolerance
    # over three decades of tolerance the error must fall by well more than one, at a cost of tolerance^(-1/order)
    assert errors[0] / errors[-1] > 40
    assert evaluations[-1] / evaluations[0] < 1.5 * 1000 ** (1 / solver.order)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.slow_for("heun", "ralston")
def test_runs_backwards_and_along_a_probability_flow(name):
    solver, control = build(Solver, name), PI(1e-5, 1e-5)

    def field(t: Tensor, x: Tensor) -> Tensor:
        return GAUSSIAN.velocity(x, 1 - t, t, -torch.ones_like(t), torch.ones_like(t))

    out = integrate(field, PLANE, UNIT.flip(0), solver=solver, controller=control)
    exact = probability_flow(GAUSSIAN, PLANE, (0.0, 1.0), (1.0, 0.0))
    torch.testing.assert_close(out.x, exact, rtol=0, atol=1e-4)
    back = integrate(field, out.x, UNIT, solver=solver, controller=control)
    torch.testing.assert_close(back.x, PLANE, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("exponents", "evaluations", "accepted", "error", "squared"),
    [((0.7, 0.4), 332, 55, 0.72990366, 1.206471), ((0.85, 0.2), 266, 44, None, None)],
)
def test_same_steps_as_an_independent_implementation(exponents, evaluations, accepted, error, squared):
    start = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    firsts = []

    def field(t: Tensor, x: Tensor) -> Tensor:
        firsts.append(float(t))
        return x @ SPIRAL.T

    control = PI(1e-6, 1e-6, exponents=exponents)
    out = integrate(field, start, 5 * UNIT, solver=Dopri5(), controller=control, record=Record())
    assert (out.nfe.item(), out.steps.item(), out.rejected.item()) == (evaluations, accepted, 0)
    first = firsts[7]  # after the start, Hairer's probe and five stages inside, the first step's end
    assert first == pytest.approx(0.0204022911, abs=1e-10)
    if error:
        assert (out.trace.error * out.trace.h).sum().item() == pytest.approx(error, rel=1e-7)
        assert out.trace.error.square().sum().item() == pytest.approx(squared, rel=1e-6)
    torch.testing.assert_close(out.trace.stiffness, torch.full_like(out.trace.h, 2.0024984), rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("rate", "end", "exponents", "evaluations", "accepted", "rejected"),
    [
        (1.0, 10.0, (0.7, 0.4), 206, 34, 0),
        (1.0, 10.0, (0.85, 0.2), 152, 25, 0),
        (1000.0, 1.0, (0.7, 0.4), 2006, 332, 2),
        (1.0, 10.0, (1.0, 0.0), 134, 22, 0),
    ],
)
def test_same_cost_as_an_independent_implementation(rate, end, exponents, evaluations, accepted, rejected):
    one = torch.ones(1, 1, dtype=torch.float64)
    out = integrate(
        lambda t, x: -rate * x, one, end * UNIT, solver=Dopri5(), controller=PI(1e-6, 1e-6, exponents=exponents)
    )
    assert (out.nfe.item(), out.steps.item(), out.rejected.item()) == (evaluations, accepted, rejected)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_step_is_accepted_if_and_only_if_its_error_norm_is_at_most_1(name):
    solver, attempts, tolerance = build(Solver, name), [], 1e-4

    class Recording(type(solver)):
        def step(self, field, t, s, x, state, noise=None):
            out = super().step(field, t, s, x, state, noise)
            scale = tolerance + tolerance * torch.maximum(x.abs(), out.x.abs())
            attempts.append((float(t), float(s), float((out.error / scale).square().mean().sqrt())))
            return out

    x, rate = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), torch.tensor([300.0, 1.0, 20.0]).double()
    control = PI(tolerance, tolerance, safety=1.0, exponents=(1.0, 0.0))  # so bold that half of the steps fail
    out = integrate(lambda t, x: rate * (t.cos() - x), x, UNIT, solver=Recording(), controller=control)
    accepted = [s == after for (_, s, _), (after, _, _) in itertools.pairwise((*attempts, (1.0, 1.0, 0.0)))]
    assert accepted == [error <= 1 for _, _, error in attempts]
    assert sum(accepted) == out.steps.item() and len(accepted) - sum(accepted) == out.rejected.item() > 3


@pytest.mark.parametrize("name", ADAPTIVE)
def test_rejected_steps_happen_on_a_pulse_and_are_counted(name):
    calls = []

    def field(t: Tensor, x: Tensor) -> Tensor:
        calls.append(float(t))
        return bump(t, x)

    solver, x = build(Solver, name), torch.zeros(1, 3, dtype=torch.float64)
    control = PI(1e-6, 1e-6, max_step=0.05)  # longer steps would pass over the pulse unseen
    out = integrate(field, x, UNIT, solver=solver, controller=control)
    assert out.rejected.item() > 0 and out.steps.item() >= 20
    attempts = out.steps.item() + out.rejected.item()
    if isinstance(solver, DiagonallyImplicit):  # at least a Jacobian of three components for every attempt
        assert out.nfe.item() - len(calls) >= 3 * attempts and (out.nfe.item() - len(calls)) % 3 == 0
    else:
        start = len(calls) - solver.stages * attempts
        assert out.nfe.item() == len(calls) and start in (1, 2)  # what FSAL starts with, and Hairer's choice
    assert max(calls) <= 1.0
    torch.testing.assert_close(out.x, torch.full_like(x, 0.01 * math.sqrt(2 * math.pi)), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.slow_for("ralston")
def test_rows_are_independent_and_evaluations_honest(name):
    solver, control = build(Solver, name), PI(1e-4, 1e-4)
    rate, x = torch.tensor([300.0, 0.5, 20.0, 0.0], dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    times = torch.tensor([0.0, 0.3, 0.4], dtype=torch.float64)

    def solve(rows: list[int], counts: list[int], narrowed: bool):
        field = Rates(rate[rows], counts)
        plain = lambda t, x: field(t, x)  # noqa: E731
        settings = {"solver": solver, "controller": control, "save": "all", "record": Record()}
        return integrate(field if narrowed else plain, x[rows], times, **settings)

    implicit = isinstance(solver, DiagonallyImplicit)  # its rows wait for each other within a step, and count that
    wholes = []
    for selectable in (True, False):
        counts: list[int] = []
        wholes.append(whole := solve([0, 1, 2, 3], counts, selectable))
        assert implicit or sum(counts) == (int(whole.nfe.sum()) if selectable else 4 * int(whole.nfe.max()))
        assert whole.nfe[0] > 2 * whole.nfe[1], "the stiff row alone pays for its stiffness"
    for rows in ([0], [1], [3, 2], [2, 0, 1]):
        part = solve(rows, [], True)
        steps = len(part.trace.t)
        for whole in wholes:
            for name_ in ("steps", "rejected", "status") if implicit else ("nfe", "steps", "rejected", "status"):
                assert getattr(part, name_).tolist() == getattr(whole, name_)[rows].tolist()
            torch.testing.assert_close(part.path, whole.path[:, rows], rtol=1e-12, atol=1e-14)
            for mine, all_ in zip(part.trace, whole.trace, strict=True):
                if mine is not None:
                    torch.testing.assert_close(mine, all_[:steps, rows], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_lands_on_every_requested_time(name):
    solver, control = build(Solver, name), PI(1e-4, 1e-4)
    times = torch.tensor([0.0, 1e-4, 0.05, 0.9, 1.0, 1.0 + 1e-9], dtype=torch.float64)
    out = integrate(LINEAR.field, PLANE, times, solver=solver, controller=control, save="all")
    for t, x in zip(times, out.path, strict=True):
        torch.testing.assert_close(x, LINEAR.solution(float(t), PLANE), rtol=0, atol=1e-3)
    torch.testing.assert_close(out.path[-1], out.x, rtol=0, atol=0)
    torch.testing.assert_close(out.path[0], PLANE, rtol=0, atol=0)
    assert (out.time == times[-1]).all()
    # a step cut short to land is followed by one as long as was wanted before, not by a slow recovery
    direct = integrate(LINEAR.field, PLANE, UNIT, solver=solver, controller=control)
    halting = torch.tensor([0.0, 0.5, 0.5 + 1e-12, 1.0], dtype=torch.float64)
    out = integrate(LINEAR.field, PLANE, halting, solver=solver, controller=control)
    assert (out.steps + out.rejected <= direct.steps + direct.rejected + 6).all()


@pytest.mark.parametrize("name", ADAPTIVE)
def test_control_does_not_know_the_unit_of_time(name):
    tolerance = 1e-9 if name == "dopri8" else 1e-4  # so that the first step is too long
    control = {unit: PI(tolerance, tolerance, first_step=unit) for unit in (1.0, 1e-12)}
    slow, fast = (
        integrate(
            lambda t, x, unit=unit: LINEAR.field(t, x) / unit,
            PLANE,
            unit * UNIT,
            solver=build(Solver, name),
            controller=control[unit],
        )
        for unit in control
    )
    assert slow.nfe.tolist() == fast.nfe.tolist() and (slow.rejected > 0).any()
    torch.testing.assert_close(slow.x, fast.x, rtol=1e-9, atol=1e-12)


def test_float32_keeps_its_dtype_and_agrees():
    control = PI(1e-4, 1e-4)
    settings = {"solver": Dopri5(), "controller": control, "record": Record()}
    single = integrate(LINEAR.field, PLANE.float(), UNIT, **settings)
    double = integrate(LINEAR.field, PLANE, UNIT, solver=Dopri5(), controller=control)
    assert single.x.dtype == torch.float32 and single.trace.error.dtype == torch.float64
    torch.testing.assert_close(single.x.double(), double.x, rtol=1e-4, atol=1e-4)
    assert single.nfe.tolist() == double.nfe.tolist()


def test_seminorm_leaves_components_out_of_the_control():
    rate = torch.tensor([1.0, 50.0], dtype=torch.float64)
    x = torch.ones(1, 2, dtype=torch.float64)
    control = PI(1e-6, 1e-6)
    full = integrate(lambda t, y: -rate * y, x, UNIT, solver=Dopri5(), controller=control)
    part = integrate(lambda t, y: -rate * y, x, UNIT, solver=Dopri5(), controller=control, seminorm=lambda y: y[:, :1])
    alone = integrate(lambda t, y: -y, x[:, :1], UNIT, solver=Dopri5(), controller=control)
    assert part.steps.item() == alone.steps.item() < full.steps.item() / 2
    torch.testing.assert_close(part.x[:, :1], alone.x, rtol=1e-13, atol=0)


@pytest.mark.parametrize("norm", ["row", "batch"])
def test_the_first_step_is_hairers_and_looks_ahead_in_time(norm):
    """x' = cos(40 t + 1): the probe at t + h₀ sees that the field turns."""
    field = lambda t, x: expand_like((40 * t + 1).cos(), x) * torch.ones_like(x)  # noqa: E731
    control, x = PI(1e-6, 1e-6, norm=norm), torch.full((1, 1), 0.5, dtype=torch.float64)
    first = integrate(field, x, UNIT, solver=Dopri5(), controller=control, record=Record()).trace.h[0, 0].item()
    scale, slope = 1e-6 + 1e-6 * 0.5, math.cos(1.0)
    h0 = 0.01 * 0.5 / slope
    turn = abs(math.cos(40 * h0 + 1) - slope) / scale / h0
    steepest = max(turn, slope / scale)
    assert steepest == turn
    assert first == pytest.approx(min(100 * h0, (0.01 / steepest) ** (1 / 5)), rel=1e-9)


@pytest.mark.parametrize("norm", ["row", "batch"])
def test_no_sliver_is_left_before_a_requested_time(norm):
    control = PI(1e-3, 1e-3, first_step=1 - 1e-11, norm=norm)
    out = integrate(lambda t, x: torch.ones_like(x), PLANE, UNIT, solver=Dopri5(), controller=control)
    assert out.steps.tolist() == [1] * 5 and out.time.tolist() == [1.0] * 5


# ---- outcomes --------------------------------------------------------------------------------------------------------


def explode(t: Tensor, x: Tensor) -> Tensor:
    """x' = x²: x(t) = 1 / (1/x(0) - t)."""
    return x.square()


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.slow_for("esdirk54")
def test_a_pole_is_reported_with_row_and_time(name):
    x = torch.tensor([[0.5], [2.0], [-1.0]], dtype=torch.float64)  # the second has its pole at t = 0.5
    control = PI(1e-3, 1e-3)
    with pytest.raises(SolverError, match=r"row 1 of 3 .*on_failure=\"return\"") as e:
        integrate(explode, x, UNIT, solver=build(Solver, name), controller=control, max_steps=250)
    assert e.value.result in (Result.step_underflow, Result.non_finite, Result.max_steps_reached)
    assert e.value.row == 1 and e.value.time == pytest.approx(0.5, abs=3e-2)
    settings = {"max_steps": 250, "on_failure": "return", "save": "all"}
    out = integrate(explode, x, UNIT, solver=build(Solver, name), controller=control, **settings)
    assert out.x.isfinite().all() and out.x[1] > 30 and out.status.tolist()[::2] == [0, 0]
    torch.testing.assert_close(out.x[[0, 2]], 1 / (1 / x[[0, 2]] - 1), rtol=1e-2, atol=0)
    assert out.path[1, 1].isnan().all() and out.path[1, [0, 2]].isfinite().all()


def test_steps_below_the_resolution_of_a_late_time_underflow():
    """At t = 1e6 time has a resolution of 1e-10: shorter steps would not advance it."""
    x = torch.tensor([[2.0]], dtype=torch.float64)
    out = integrate(explode, x, 1e6 + UNIT, solver=Dopri5(), controller=PI(1e-6, 1e-6), on_failure="return")
    assert out.result is Result.step_underflow and out.time.item() == pytest.approx(1e6 + 0.5, abs=1e-6)


def test_the_three_failures():
    x = torch.ones(2, 1, dtype=torch.float64)
    stiff = integrate(
        lambda t, x: -1000 * x, x, UNIT, solver=Dopri5(), controller=PI(), max_steps=20, on_failure="return"
    )
    assert stiff.result is Result.max_steps_reached and (stiff.steps + stiff.rejected).tolist() == [20, 20]
    assert stiff.time.lt(0.2).all() and "max_steps" in stiff.result.advice
    nowhere = integrate(
        lambda t, x: x / torch.zeros_like(x), x, UNIT, solver=Dopri5(), controller=PI(), on_failure="return"
    )
    assert nowhere.result is Result.non_finite and nowhere.steps.tolist() == [0, 0]
    assert nowhere.x.tolist() == x.tolist() and nowhere.time.tolist() == [0.0, 0.0]
    noisy = generator("noisy")
    rough = lambda t, x: 1e9 * torch.randn(x.shape, generator=noisy, dtype=x.dtype)  # noqa: E731
    assert (
        integrate(rough, x, UNIT, solver=Heun(), controller=PI(1e-12, 1e-12), on_failure="return").result
        is Result.step_underflow
    )


# ---- gradients -------------------------------------------------------------------------------------------------------


def pendulum(t: Tensor, x: Tensor, theta: Tensor) -> Tensor:
    return torch.stack((x[:, 1], -theta[0] * x[:, 0].sin() - theta[1] * t * x[:, 1]), 1)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_gradients_are_those_of_the_accepted_steps(name):
    """Value, error sums and gradients equal those of a fixed run on the grid that the control chose."""
    theta = torch.tensor([4.0, 0.3], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, -0.5]], dtype=torch.float64, requires_grad=True)
    solver, seen = build(Solver, name), []

    class Recording(type(solver)):
        def step(self, field, t, s, x, state, noise=None):
            out = super().step(field, t, s, x, state, noise)
            seen.append((float(t), float(s)))
            return out

    control = PI(1e-4, 1e-4)
    field = lambda t, x: pendulum(t, x, theta)  # noqa: E731
    out = integrate(field, x, 1.5 * UNIT, solver=Recording(), controller=control, record=Record())
    starts = {t: s for t, s in seen}  # the last attempt from a time is the accepted one
    times = [0.0]
    while times[-1] < 1.5:
        times.append(starts[times[-1]])
    assert len(times) == out.steps.item() + 1
    again = integrate(field, x, torch.tensor(times, dtype=torch.float64), solver=solver)
    # implicit methods solve their equations to 2 % of the tolerance under step control, and to rounding on a grid
    rough = isinstance(solver, DiagonallyImplicit)
    torch.testing.assert_close(out.x, again.x, rtol=1e-5 if rough else 1e-13, atol=0)
    assert torch.is_grad_enabled() and out.trace.error.requires_grad
    for a, b in zip(
        torch.autograd.grad(out.x.square().sum(), (x, theta)),
        torch.autograd.grad(again.x.square().sum(), (x, theta)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4 if rough else 1e-11, atol=0)


def test_gradcheck_at_a_tight_tolerance():
    x = PLANE[:2].clone().requires_grad_()
    theta = torch.tensor([1.0, 0.3], dtype=torch.float64, requires_grad=True)
    control, times = PI(1e-11, 1e-11), torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)

    def solve(x: Tensor, theta: Tensor) -> Tensor:
        field = lambda t, y: pendulum(t, y, theta)  # noqa: E731
        return integrate(field, x, times, solver=Dopri5(), controller=control, save="all").path

    # the steps react to the inputs, but with them the result changes by less than the tolerance
    assert torch.autograd.gradcheck(solve, (x, theta), eps=1e-4, atol=1e-5)


def test_the_error_sum_is_differentiable_with_steps_held():
    """Σ E h of one step: its gradient equals finite differences with h fixed by first_step."""
    theta = torch.tensor([4.0, 0.3], dtype=torch.float64, requires_grad=True)
    control = PI(0.1, 0.1, first_step=0.5)

    def heuristics(theta: Tensor) -> tuple[Tensor, ...]:
        field = lambda t, y: pendulum(t, y, theta)  # noqa: E731
        out = integrate(field, PLANE[:2], 0.5 * UNIT, solver=Dopri5(), controller=control, record=Record())
        assert out.steps.tolist() == [1, 1] and out.rejected.tolist() == [0, 0]
        return out.trace.error, out.trace.stiffness

    assert torch.autograd.gradcheck(heuristics, (theta,))
    still = lambda t, x: theta[0] * 0 * x  # noqa: E731
    rest = integrate(still, PLANE[:2], UNIT, solver=Dopri5(), controller=control, record=Record()).trace
    (gradient,) = torch.autograd.grad((rest.error + rest.stiffness).sum(), theta)
    assert gradient.tolist() == [0.0, 0.0], "finite where error and stiffness vanish"


def test_an_overflowing_attempt_leaves_gradients_finite():
    """Row 0's first step leaves the domain of √; the others' gradients, and its own, must not become nan."""
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0], [9.0]], dtype=torch.float64)

    def solve(rows: list[int]):
        field = lambda t, y: -theta * y.sqrt()  # noqa: E731
        return integrate(field, x[rows], 1.8 * UNIT, solver=Dopri5(), controller=PI(1e-3, 1e-3, first_step=3.0))

    both, alone = solve([0, 1]), solve([1])
    assert alone.steps.item() == 1, "row 1 is accepted in the attempt that is undefined for row 0"
    exact = (x.sqrt() - 0.9) ** 2  # x(t) = (√x₀ - θ t / 2)²
    torch.testing.assert_close(both.x, exact, rtol=1e-2, atol=1e-3)
    assert both.rejected[0] > 0 and both.nfe[1] == alone.nfe[0] and both.rejected[1] == 0
    (gradient,) = torch.autograd.grad(both.x.sum(), theta)
    torch.testing.assert_close(gradient, (-1.8 * (x.sqrt() - 0.9)).sum(), rtol=1e-2, atol=0)


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_builds_from_configuration():
    control = build(Controller, {"name": "pi", "rtol": 1e-3, "exponents": [1.0, 0.0]})
    assert (control.rtol, control.atol, control.exponents) == (1e-3, 1e-5, (1.0, 0.0))
    assert type(build(Controller, "fixed")).__name__ == "Fixed"


@pytest.mark.parametrize(
    "arguments",
    [
        {"rtol": -1.0},
        {"rtol": 0.0},
        {"atol": 0.0},
        {"safety": 1.5},
        {"min_factor": 1.0},
        {"exponents": (0.0, 0.1)},
        {"max_step": 0.0},
    ],
)
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match=rf"pi: .*{next(iter(arguments))}.* is needed, found"):
        PI(**arguments)


def test_conditions_follow_their_rows():
    label = torch.tensor([200.0, 1.0, 5.0], dtype=torch.float64)
    field = RowField(lambda t, x, label: -label[:, None] * x, label)
    out = integrate(field, torch.ones(3, 2, dtype=torch.float64), UNIT, solver=Dopri5(), controller=PI(1e-6, 1e-6))
    torch.testing.assert_close(out.x, (-label).exp()[:, None].expand(3, 2), rtol=0, atol=1e-5)
    assert len(set(out.nfe.tolist())) == 3
