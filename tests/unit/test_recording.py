"""What a solution keeps of its steps: trace, chosen steps, and the curve between them."""

import math

import pytest
import torch
from torch import Tensor

from genmodels.registry import build, names
from genmodels.rng import generator
from genmodels.solvers.base import Fixed, Solver, integrate
from genmodels.solvers.fields import RowField, VectorField
from genmodels.solvers.runge_kutta import Dopri5, Heun, Tsit5
from genmodels.solvers.solution import Record, SolverError
from genmodels.solvers.step_size import PI
from genmodels.solvers.termination import SteadyState
from tests.oracles import LINEAR

SOLVERS = [name for name in names(Solver) if build(Solver, name).needs is VectorField and name != "torchdiffeq"]
PLANE = torch.randn(4, 2, generator=generator("recording"), dtype=torch.float64)
RATE = torch.tensor([40.0, 1.0, 5.0, 0.1], dtype=torch.float64)
UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
CONTROLS = {"row": PI(1e-5, 1e-5), "batch": PI(1e-5, 1e-5, norm="batch"), "fixed": Fixed(25)}


def decay(t: Tensor, x: Tensor, rate: Tensor) -> Tensor:
    return -rate[:, None] * x


def solve(controller: str, record: Record | None = None, **settings: object):
    return integrate(
        RowField(decay, RATE), PLANE, UNIT, solver=Tsit5(), controller=CONTROLS[controller], record=record, **settings
    )


@pytest.mark.parametrize("controller", CONTROLS)
def test_the_trace_says_what_the_steps_were(controller):
    trace, out = solve(controller, Record()).trace, solve(controller)
    assert out.trace is None and out.picked is None and out.dense is None
    assert trace.taken.sum(0).tolist() == out.steps.tolist()
    torch.testing.assert_close(trace.h.sum(0), torch.ones(4, dtype=torch.float64))
    after = torch.where(trace.taken, trace.t + trace.h, 1.0)
    torch.testing.assert_close(trace.t[1:][trace.taken[1:]], after[:-1][trace.taken[1:]])
    big = trace.taken & (trace.h * RATE > 0.1)
    torch.testing.assert_close(trace.stiffness[big], RATE.expand_as(trace.h)[big], rtol=1e-6, atol=0)
    assert (trace.error <= 1).all() and trace.error[~trace.taken].eq(0).all() and (trace.error[0] > 0).all()


@pytest.mark.parametrize("controller", ["row", "batch"])
def test_reference_tolerances_measure_the_same_error_at_another_scale(controller):
    own, other = (solve(controller, record).trace for record in (Record(), Record(rtol=1e-3, atol=1e-3)))
    torch.testing.assert_close(own.error, 100 * other.error, rtol=1e-12, atol=0)
    bare = solve("fixed", Record()).trace.error  # |h⁵ polynomial| of y' = -λ y, scaled by nothing
    scaled = solve("fixed", Record(rtol=0.0, atol=0.5)).trace.error
    torch.testing.assert_close(scaled, 2 * bare, rtol=1e-12, atol=0)
    z = -RATE / 25
    factor = (-4.264763677523e-4 * z**5 + 1.5595331976680e-4 * z**6 - 2.17001715880e-5 * z**7).abs()
    norm = PLANE.square().mean(1).sqrt()
    torch.testing.assert_close(bare[0], factor * norm, rtol=1e-6, atol=1e-15)  # h⁵ at the smallest rate is 1e-12


@pytest.mark.parametrize("controller", CONTROLS)
def test_a_time_picks_the_step_around_it(controller):
    u = torch.rand(50, 4, generator=generator("picks"), dtype=torch.float64)
    u[0] = 0.0
    out = solve(controller, Record(picks=u), save="dense")
    t, s, x = out.picked
    assert ((t <= u) & (u < s)).all() and t.shape == (50, 4) and x.shape == (50, 4, 2)
    torch.testing.assert_close(x, out.dense(t), rtol=1e-9, atol=1e-9)
    assert not x.requires_grad
    starts = [set(column[mask].tolist()) for column, mask in zip(out.trace.t.T, out.trace.taken.T, strict=True)]
    assert all(set(t[:, row].tolist()) <= starts[row] for row in range(4))


@pytest.mark.parametrize("controller", CONTROLS)
def test_a_step_is_picked_with_the_same_chance_but_for_the_last(controller):
    draws = 4000
    u = torch.rand(draws, 4, generator=generator("reservoir"), dtype=torch.float64)
    out = solve(controller, Record(picks=u, pick="step"))
    for row in range(4):
        count = int(out.steps[row])
        starts = out.trace.t[: max(count - 1, 1), row]
        places = torch.searchsorted(starts.contiguous(), out.picked.t[:, row].contiguous())
        torch.testing.assert_close(starts[places], out.picked.t[:, row], rtol=0, atol=0)
        found = places.bincount(minlength=len(starts)).double() / draws
        p = 1 / len(starts)
        # five standard errors of a binomial share
        assert (found - p).abs().max() < 5 * math.sqrt(p * (1 - p) / draws) + 1e-12


@pytest.mark.parametrize("controller", ["row", "batch"])
def test_a_lone_step_is_picked_though_it_is_the_last(controller):
    control = PI(1e-1, 1e-1, first_step=1.0, norm=controller)
    record = Record(picks=torch.tensor([[0.7, 0.2]]), pick="step")
    out = integrate(lambda t, x: -0.1 * x, PLANE[:2], UNIT, solver=Tsit5(), controller=control, record=record)
    assert out.steps.tolist() == [1, 1] and out.picked.t.tolist() == [[0.0, 0.0]] and out.picked.s.tolist() == [[1, 1]]
    torch.testing.assert_close(out.picked.x[0], PLANE[:2])


@pytest.mark.parametrize("save", ["last", "dense"])
@pytest.mark.parametrize("controller", CONTROLS)
def test_rows_that_all_ended_early_leave_what_they_have(controller, save):
    """Also the first step may be the one that fails, and there may be no step at all."""
    record, undefined = Record(picks=torch.rand(3, 4)), lambda t, x: x * torch.nan
    settings = {"solver": Tsit5(), "controller": CONTROLS[controller], "record": record, "save": save}
    out = integrate(undefined, PLANE, UNIT, on_failure="return", **settings)
    assert out.result.name == "non_finite" and out.trace.taken.shape == (0, 4) and out.picked.t.eq(0).all()
    torch.testing.assert_close(out.x, PLANE)
    with pytest.raises(SolverError, match="non_finite in step 1 from t = 0"):
        integrate(undefined, PLANE, UNIT, **settings)
    if controller == "batch":
        return
    out = integrate(RowField(decay, RATE), PLANE, UNIT, stop=SteadyState(0.0, 50.0), **settings)
    assert out.stopped.all() and (out.steps == 1).all() and (out.trace.h > 0).all()
    torch.testing.assert_close(out.picked.s, out.time.expand(3, 4))
    still = integrate(RowField(decay, RATE), PLANE, UNIT[:, None] * torch.zeros(4), **settings)
    assert still.result == 0 and still.steps.eq(0).all() and still.trace.t.shape == (0, 4)
    if save == "dense":
        torch.testing.assert_close(still.dense(UNIT), PLANE.expand(2, 4, 2))


def test_a_time_beyond_the_stop_of_a_row_picks_its_last_step():
    u = torch.full((1, 4), 0.95)
    for controller in ("row", "fixed"):
        out = solve(controller, Record(picks=u), stop=SteadyState(0.0, 0.5))
        assert out.stopped.any() and out.steps.max() > 1
        last = out.trace.t.gather(0, out.steps[None] - 1)
        torch.testing.assert_close(out.picked.t[:, out.stopped], last[:, out.stopped], rtol=0, atol=0)


def test_an_interval_of_length_0_does_not_stop_a_row():
    times = torch.tensor([[0.0, 0.0], [0.0, 0.5], [1.0, 1.0]], dtype=torch.float64)
    out = integrate(
        lambda t, x: 0 * x, PLANE[:2], times, solver=Tsit5(), controller=Fixed(), stop=SteadyState(), record=Record()
    )
    assert out.time.tolist() == [1.0, 0.5] and out.steps.tolist() == [1, 1] and out.stopped.all()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"record": Record(picks=torch.rand(3))}, r"record.picks must be \[P, 4\] for 4 rows, found \[3\]"),
        ({"record": Record(picks=torch.rand(3, 5))}, r"record.picks must be \[P, 4\] for 4 rows, found \[3, 5\]"),
        ({"max_steps": 0}, "max_steps must be at least 1, found 0"),
        ({"times": [0.0, 1.0]}, "times must be a tensor, found list"),
        ({"x": [1.0]}, "x must be a tensor, found list"),
    ],
)
def test_mistakes_are_named(arguments, found):
    given = {"x": PLANE, "times": UNIT, "solver": Tsit5(), **arguments}
    with pytest.raises(ValueError, match=found):
        integrate(lambda t, x: -x, **given)


@pytest.mark.parametrize("tolerances", [{"rtol": -1e-3}, {"atol": 0.0}, {"rtol": 0.0, "atol": 0.0}])
def test_tolerances_of_a_record_are_checked(tolerances):
    with pytest.raises(ValueError, match="Record: rtol >= 0 and atol >= 0"):
        Record(**tolerances)


def orders(name: str, start: float, end: float) -> float:
    """The order that the error between the steps goes with."""
    errors = []
    inside = torch.linspace(start, end, 41, dtype=torch.float64)
    for n in (8, 16):
        grid = torch.linspace(start, end, n + 1, dtype=torch.float64)
        out = integrate(LINEAR.field, PLANE, grid, solver=build(Solver, name), save="dense")
        exact = torch.stack([LINEAR.solution(float(t) - start, PLANE) for t in inside])
        errors.append(float((out.dense(inside) - exact).abs().max()))
        torch.testing.assert_close(out.dense(grid[-1:])[0], out.x, rtol=1e-13, atol=1e-13)
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("name", SOLVERS)
def test_between_the_steps_the_solution_is_as_accurate_as_can_be(name):
    solver = build(Solver, name)
    assert orders(name, 0.0, 1.0) > min(solver.order, 4) - 0.3  # a cubic or quartic through values of the method's own
    assert orders(name, 1.0, 0.0) > min(solver.order, 4) - 0.3


@pytest.mark.parametrize("solver", [Tsit5(), Dopri5(), Heun()])
@pytest.mark.parametrize("norm", ["row", "batch"])
def test_the_curve_of_adaptive_steps(solver, norm):
    control = PI(1e-6, 1e-6, norm=norm)
    out = integrate(RowField(decay, RATE), PLANE, UNIT, solver=solver, controller=control, save="dense")
    times = torch.linspace(0, 1, 33, dtype=torch.float64)
    exact = (-RATE * times[:, None]).exp()[..., None] * PLANE
    torch.testing.assert_close(out.dense(times), exact, rtol=0, atol=2e-4)
    own = torch.rand(7, 4, generator=generator("own"), dtype=torch.float64)
    torch.testing.assert_close(out.dense(own), (-RATE * own).exp()[..., None] * PLANE, rtol=0, atol=2e-4)
    torch.testing.assert_close(out.dense(torch.tensor([-1.0, 2.0]))[0], PLANE)
    torch.testing.assert_close(out.dense(torch.tensor([-1.0, 2.0]))[1], out.x)
    mirrored = integrate(
        RowField(lambda t, x, r: r[:, None] * x, RATE), out.x, UNIT.flip(0), solver=solver, controller=control
    )
    assert mirrored.x.shape == PLANE.shape


def test_gradients_of_the_curve():
    x, rate = PLANE[:2].clone().requires_grad_(), RATE[:2].clone().requires_grad_()

    def curve(x: Tensor, rate: Tensor, times: Tensor) -> Tensor:
        field = RowField(decay, rate)
        return integrate(field, x, UNIT, solver=Tsit5(), controller=PI(1e-8, 1e-8), save="dense").dense(times)

    times = torch.tensor([0.15, 0.72], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(curve, (x, rate, times), eps=1e-4, atol=1e-4, fast_mode=True)
