"""One clock for a batch: the same steps as row by row for equal rows, its own for others; outcomes and gradients."""

import math

import pytest
import torch
from torch import Tensor

from genmodels.registry import ConfigError, build, names
from genmodels.rng import generator
from genmodels.solvers.base import Controller, Solver, integrate
from genmodels.solvers.fields import VectorField
from genmodels.solvers.runge_kutta import Dopri5, Heun, Tsit5
from genmodels.solvers.solution import Record, Result, SolverError
from genmodels.solvers.step_size import PI
from tests.oracles import LINEAR

ADAPTIVE = [
    name
    for name in names(Solver)
    if build(Solver, name).adaptive and build(Solver, name).needs is VectorField and name != "torchdiffeq"
]
PLANE = torch.randn(5, 2, generator=generator("plane"), dtype=torch.float64)
UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
TIMES = torch.tensor([0.0, 1e-4, 0.3, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.slow_for("True-ralston", "True-heun", "False-ralston", "False-kvaerno3")
def test_a_single_row_takes_the_steps_of_row_control(name, backwards):
    solver, times = build(Solver, name), 0.4 * (TIMES.flip(0) if backwards else TIMES)
    settings = {"solver": solver, "save": "all", "record": Record()}
    field = lambda t, x: torch.tanh(3 * x) * t.cos() - 20 * x  # noqa: E731
    single = PLANE[:1]
    row, batch = (
        integrate(field, single, times, controller=PI(1e-4, 1e-6, norm=n), **settings) for n in ("row", "batch")
    )
    assert (row.steps.item(), row.rejected.item(), row.nfe.item()) == (
        batch.steps.item(),
        batch.rejected.item(),
        batch.nfe.item(),
    )
    torch.testing.assert_close(row.path, batch.path, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(row.trace, batch.trace, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_a_step_cut_very_short_leaves_no_mark_under_either_control():
    """Its error, small for want of length, is not what the next step is compared with."""
    field = lambda t, x: torch.stack((x[:, 1], -(1 + 20 * (5 * t).sin() ** 2) * x[:, 0]), 1)  # noqa: E731
    x, cut = torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([0.0, 0.3, 0.3 + 1e-5, 2.0]).double()
    row, batch = (
        integrate(field, x, cut, solver=Tsit5(), controller=PI(1e-5, 1e-7, exponents=(0.7, 0.4), norm=n))
        for n in ("row", "batch")
    )
    straight = integrate(field, x, cut[[0, 1, 3]], solver=Tsit5(), controller=PI(1e-5, 1e-7, exponents=(0.7, 0.4)))
    assert row.steps.item() == batch.steps.item() == straight.steps.item() + 1


def test_the_norm_is_over_the_batch_and_hides_a_hard_row():
    """x'' = -w² x with one fast oscillator among 256: a norm over the batch does not see it, its own does."""
    w = torch.full((256,), 0.1, dtype=torch.float64)
    w[0] = 20.0
    field = lambda t, x: torch.stack((x[:, 1], -w.square() * x[:, 0]), 1)  # noqa: E731
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(256, 1)
    exact = torch.tensor([math.cos(100.0), -20 * math.sin(100.0)], dtype=torch.float64)
    ends = 5 * UNIT
    errors = {
        norm: float(
            (integrate(field, x, ends, solver=Dopri5(), controller=PI(1e-4, 1e-4, norm=norm)).x[0] - exact).norm()
        )
        for norm in ("row", "batch")
    }
    assert errors["batch"] > 10 * errors["row"] and errors["row"] < 0.1


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.slow_for("ralston", "kvaerno3", "esdirk54")
def test_gradients_are_those_of_the_steps(name):
    solver, matrix = build(Solver, name), LINEAR.matrix.clone().requires_grad_()

    def solve(x: Tensor, matrix: Tensor) -> Tensor:
        field = lambda t, y: y @ matrix.T + 0.1 * y.tanh()  # noqa: E731
        tolerance = 1e-7 if solver.order > 3 else 1e-5  # steps react to the inputs, and the result by as much
        return integrate(field, x, UNIT, solver=solver, controller=PI(tolerance, tolerance, norm="batch")).x

    x = PLANE[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(solve, (x, matrix), eps=1e-3, atol=2e-3, fast_mode=True)


def test_outcomes():
    pole = lambda t, x: x.square()  # noqa: E731
    x = torch.tensor([[2.0], [0.5]], dtype=torch.float64)
    control = PI(1e-3, 1e-3, norm="batch")
    with pytest.raises(SolverError, match=r"row 0 of 2 .*on_failure=\"return\""):
        integrate(pole, x, UNIT, solver=Dopri5(), controller=control)
    out = integrate(pole, x, TIMES, solver=Dopri5(), controller=control, on_failure="return", save="all")
    assert out.result in (Result.step_underflow, Result.non_finite) and out.status.tolist() == [int(out.result)] * 2
    assert out.x.isfinite().all() and 0.4 < out.time[0] < 0.6 and out.path[-1].isnan().all()
    torch.testing.assert_close(out.path[2, 1], torch.tensor([1 / (2 - 0.3)]).double(), rtol=1e-3, atol=0)
    few = integrate(pole, x, 0.4 * UNIT, solver=Heun(), controller=control, max_steps=3, on_failure="return")
    assert few.result is Result.max_steps_reached and (few.steps + few.rejected).tolist() == [3, 3]
    undefined = lambda t, x: x / torch.zeros_like(x)  # noqa: E731
    nowhere = integrate(undefined, x, UNIT, solver=Tsit5(), controller=control, on_failure="return")
    assert nowhere.result is Result.non_finite and nowhere.steps.tolist() == [0, 0] and nowhere.x.tolist() == x.tolist()
    empty = integrate(pole, x[:0], TIMES, solver=Tsit5(), controller=control, save="all")
    assert empty.path.shape == (4, 0, 1) and empty.result is Result.success


def test_an_undefined_attempt_leaves_gradients_finite():
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0], [9.0]], dtype=torch.float64)
    control = PI(1e-3, 1e-3, first_step=3.0, norm="batch")
    out = integrate(lambda t, y: -theta * y.sqrt(), x, 1.8 * UNIT, solver=Dopri5(), controller=control)
    assert out.rejected[0] > 0
    (gradient,) = torch.autograd.grad(out.x.sum(), theta)
    torch.testing.assert_close(gradient, (-1.8 * (x.sqrt() - 0.9)).sum(), rtol=5e-2, atol=0)


def test_configuration_and_refusals():
    assert build(Controller, {"name": "pi", "norm": "batch"}).norm == "batch"
    with pytest.raises(ConfigError, match=r'times of their own.*norm="row"'):
        integrate(LINEAR.field, PLANE, UNIT[:, None].expand(2, 5), solver=Dopri5(), controller=PI(norm="batch"))
    for norm in ("row", "batch"):
        with pytest.raises(ValueError, match=r"rtol = 1e-08 is below the resolution 1.2e-07 of torch.float32.*float64"):
            integrate(LINEAR.field, PLANE.float(), UNIT, solver=Dopri5(), controller=PI(1e-8, 1e-8, norm=norm))
        with pytest.warns(UserWarning, match=r"rtol = 5e-07 in float32 rounding, not the field"):
            integrate(LINEAR.field, PLANE.float(), UNIT, solver=Dopri5(), controller=PI(5e-7, 1e-3, norm=norm))


@pytest.mark.parametrize("norm", ["row", "batch"])
def test_an_infinite_state_is_seen_where_the_norm_does_not_look(norm):
    grows = lambda t, x: torch.stack((-x[:, 0], torch.full_like(x[:, 1], 1e308)), 1)  # noqa: E731
    times = torch.tensor([0.0, 100.0], dtype=torch.float64)
    with pytest.raises(SolverError, match="met an infinite or undefined state"):
        control = PI(1e-6, 1e-6, norm=norm)
        integrate(
            grows, torch.ones(1, 2).double(), times, solver=Dopri5(), controller=control, seminorm=lambda e: e[:, :1]
        )


def test_the_row_that_is_undefined_is_the_one_that_is_named():
    x = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    field = lambda t, x: torch.where((x > 3) & (t > 0.3), torch.nan, 1.0)  # noqa: E731
    out = integrate(field, x, UNIT, solver=Tsit5(), controller=PI(norm="batch"), on_failure="return")
    assert out.status.tolist() == [Result.halted, Result.halted, Result.non_finite] and out.result == Result.non_finite
    with pytest.raises(SolverError, match="row 2 of 3 met an infinite or undefined state: non_finite"):
        integrate(field, x, UNIT, solver=Tsit5(), controller=PI(norm="batch"))


@pytest.mark.parametrize("norm", ["row", "batch"])
def test_rows_without_components_are_there_at_once(norm):
    x = torch.zeros(3, 0, dtype=torch.float64)
    out = integrate(lambda t, x: x, x, UNIT, solver=Tsit5(), controller=PI(norm=norm), save="all")
    assert out.path.shape == (2, 3, 0) and out.result == Result.success
