"""Errors and stiffness of steps against closed forms of linear fields, given steps, and every place of a local step."""

import math

import pytest
import torch

from genmodels.dynamics.regularization import evolve
from genmodels.dynamics.solver_heuristics import ErrorEstimate, Local, Stiffness
from genmodels.dynamics.trajectories import KineticJacobian, Taylor
from genmodels.registry import ConfigError
from genmodels.rng import BatchNoise
from genmodels.solvers.base import Fixed
from genmodels.solvers.runge_kutta import Dopri5, Tsit5
from genmodels.solvers.step_size import PI
from genmodels.solvers.stochastic import SOSRI
from tests.linear_fields import SPIRAL, START, Given, Linear, line, penalty

# err/y of one step of y' = λ y as a polynomial in z = λ h, from z⁵, and the z⁶/720 coefficient of the step itself
POLYNOMIALS = {
    "tsit5": ((-4.264763677523e-4, 1.5595331976680e-4, -2.17001715880e-5), 1.0311921538613),
    "dopri5": ((-97 / 120000, 13 / 40000, -1 / 24000), 1.2),
}


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize(("per_step", "how"), [("error", "mean"), ("squared", "sum"), ("steps", "max")])
def test_error_estimate_of_a_linear_field_in_closed_form(name, per_step, how):
    """Value and gradient with respect to λ, through the states and the scales alike."""
    weights, sixth = POLYNOMIALS[name]
    rtol, atol, grid = 1e-3, 1e-2, line(0, 0.3, 0.9, 1.1)
    rate = torch.tensor(-1.7, dtype=torch.float64, requires_grad=True)
    y, values = torch.tensor(2.0, dtype=torch.float64), []
    for h in grid.diff():
        z = rate * h
        new = y * (sum(z**k / math.factorial(k) for k in range(6)) + sixth * z**6 / 720)
        error = (y * sum(w * z ** (5 + k) for k, w in enumerate(weights))).abs()
        e = error / (atol + rtol * torch.maximum(y, new))
        values.append({"error": e * h, "squared": e**2, "steps": e**0.2}[per_step])
        y = new
    values = torch.stack(values)
    expected = {"mean": values.mean(), "sum": values.sum(), "max": values.max()}[how]
    field = Linear(rate.detach().reshape(1, 1))
    solver = {"tsit5": Tsit5, "dopri5": Dopri5}[name]()
    regularizer = ErrorEstimate(per_step=per_step, aggregation=how, rtol=rtol, atol=atol)
    found = penalty(regularizer, field, line(2.0)[:, None], grid, solver=solver, controller=Fixed())
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=0)  # the coefficients have 13 digits
    (slope,) = torch.autograd.grad(expected, rate)
    (own,) = torch.autograd.grad(found[0], field.matrix)
    torch.testing.assert_close(own[0, 0], slope, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("times_step", "expected"), [(False, 50.0), (True, 50.0 * 0.5)])
def test_stiffness_of_a_linear_field_is_its_rate_over_the_stability_size(times_step, expected):
    field = Linear(torch.tensor([[-50.0]], dtype=torch.float64))
    regularizer = Stiffness(times_step=times_step)
    found = penalty(regularizer, field, line(1.0)[:, None], line(0, 0.2, 0.7, 1), controller=Fixed())
    torch.testing.assert_close(found[0], line(expected / 3.5068)[0], rtol=1e-4, atol=0)  # that size has five digits


def test_gradient_over_the_steps_that_torchdiffeq_takes():
    """R = Σ E h of dopri5 at 1e-6, by replaying its steps; its error weights are 2/3 of Dormand and Prince's own."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    field, taken = Linear(SPIRAL, squashed=True), []
    field.callback_accept_step = lambda t, y, dt: taken.append((float(t), float(dt)))
    with torch.no_grad():
        torchdiffeq.odeint(field, START[0], line(0, 3), rtol=1e-6, atol=1e-6, method="dopri5")
    grid = line(*(t for t, _ in taken), sum(taken[-1]))
    assert len(taken) == 9
    regularizer = ErrorEstimate(aggregation="sum", rtol=1e-6, atol=1e-6)
    found = 2 / 3 * penalty(regularizer, field, times=grid, solver=Dopri5(), controller=Fixed())
    found[0].backward()
    torch.testing.assert_close(found[0].detach(), line(1.0667869085)[0], rtol=1e-9, atol=0)
    expected = line(1.113709, 0.285264, -2.076434, -0.254303)
    torch.testing.assert_close(field.matrix.grad.flatten(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["row", "batch"])
@pytest.mark.parametrize(
    "regularizer",
    [
        *(ErrorEstimate(per_step=p, aggregation=a) for p in ("error", "squared", "steps") for a in ("mean", "max")),
        Stiffness(),
        Stiffness(aggregation="mean", times_step=True),
        *(Local(quantity=q) for q in ("error", "squared", "steps", "stiffness")),
        Local(form="reference"),
        Local(pick="step", mean="time"),
        Local(mean="steps"),
        KineticJacobian(),
        Taylor(),
    ],
    ids=lambda r: f"{r.registered_name}",
)
def test_nothing_is_undefined_where_nothing_moves(regularizer, norm):
    """E = 0 and S = 0/0 in a field at rest: no nan in values or gradients."""
    field = Linear(torch.zeros(2, 2, dtype=torch.float64))
    found = penalty(regularizer, field, torch.zeros(3, 2, dtype=torch.float64), controller=PI(norm=norm))
    found.sum().backward()
    assert torch.equal(found, torch.zeros_like(found))
    assert field.matrix.grad.isfinite().all()


def test_steps_are_as_many_as_the_solution_is_worth():
    """Σ E^{1/5} is near the number of steps of elementary control with safety 1, whatever grid it is measured on."""
    field, controller = Linear(SPIRAL), PI(rtol=1e-7, atol=1e-7, safety=1.0, exponents=(1.0, 0.0))
    needed = int(evolve(field, START, line(0, 5), solver=Tsit5(), controller=controller).solution.steps)
    regularizer = ErrorEstimate(per_step="steps", aggregation="sum", rtol=1e-7, atol=1e-7)
    grids = [torch.linspace(0, 5, n + 1, dtype=torch.float64) for n in (60, 120)]
    for grid in grids:
        assert abs(float(penalty(regularizer, field, times=grid, controller=Fixed()).detach()) / needed - 1) < 0.05


# ---- local -----------------------------------------------------------------------------------------------------------


def test_reference_form_gives_the_value_of_the_automatic_first_step():
    """At (2, 0) of the spiral, tolerance 1e-6: h = 0.020402291074, E h = 1.2653318276e-06; of Tsit5 whatever solves."""
    for solver in (Tsit5(), Dopri5()):
        found = penalty(Local(form="reference"), Linear(SPIRAL), noise=Given(torch.zeros(1)), solver=solver)
        # an error of 1e-10 made of slopes of size 4: rounding leaves 1e-7 of it
        torch.testing.assert_close(found[0].detach(), line(1.2653318276e-06)[0], rtol=1e-6, atol=0)


def test_a_first_step_moves_a_state_by_no_more_than_its_size():
    """y' = -10 y from 1 at atol = 1: |y|/|y'| = 0.1 is below (0.01/100)^(1/5) = 0.158; so E h is that of z = -1."""
    field = Linear(torch.tensor([[-10.0]], dtype=torch.float64))
    local = Local(form="reference", rtol=0.0, atol=1.0)
    found = penalty(local, field, line(1.0)[:, None], noise=Given(torch.zeros(1)), controller=Fixed())
    expected = 0.1 * sum(abs(w) for w in POLYNOMIALS["tsit5"][0])
    torch.testing.assert_close(found[0].detach(), line(expected)[0], rtol=1e-7, atol=0)


def test_reference_form_starts_anywhere_within_a_step():
    """Half of the way through one step of length 0.2, from where the solution is there."""
    local = lambda: Local(form="reference", rtol=1e-6, atol=1e-6)  # noqa: E731
    options = {"times": line(0, 0.2), "controller": Fixed()}
    found = penalty(local(), Linear(SPIRAL), noise=Given(torch.full((1,), 0.5)), **options)
    state = START @ torch.linalg.matrix_exp(0.1 * SPIRAL).T
    there = penalty(local(), Linear(SPIRAL), state, noise=Given(torch.zeros(1)), **options)
    torch.testing.assert_close(found, there, rtol=1e-5, atol=0)  # the solution is good to 1e-8
    at_start = penalty(local(), Linear(SPIRAL), noise=Given(torch.zeros(1)), **options)
    assert abs(float((found / at_start).detach()) - 1) > 1e-3


def test_reference_form_holds_state_slope_and_length_constant():
    """Its gradient is that of one step whose first slope does not depend on the weights."""
    field = Linear(SPIRAL, squashed=True)
    found = penalty(Local(form="reference"), field, noise=Given(torch.zeros(1)))
    (own,) = torch.autograd.grad(found[0], field.matrix)
    slope = field(None, START).detach()
    other = Linear(SPIRAL, squashed=True)
    length = _automatic(other)
    step = Tsit5().step(other, line(0), line(0) + length, START, (slope,), None)
    scale = 1e-6 + 1e-6 * torch.maximum(START.abs(), step.x.abs())
    value = (step.error / scale).square().mean().sqrt() * length
    torch.testing.assert_close(found[0].detach(), value.detach(), rtol=1e-6, atol=0)
    (expected,) = torch.autograd.grad(value, other.matrix)
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=0)


def _automatic(field: Linear) -> float:
    """Hairer's first step at START from t = 0, tolerance 1e-6, by hand."""
    with torch.no_grad():
        scale, rms = 1e-6 + 1e-6 * START.abs(), lambda y: float(y.square().mean().sqrt())
        slope = field(None, START)
        d0, d1 = rms(START / scale), rms(slope / scale)
        h0 = 0.01 * d0 / d1
        d2 = rms((field(None, START + h0 * slope) - slope) / scale) / h0
        return min(100 * h0, (0.01 / max(d1, d2)) ** 0.2)


def steps_of(field, controller):
    """[N] E and h of the steps from START over [0, 3]."""
    evolved = evolve(
        field,
        START,
        line(0, 3),
        solver=Tsit5(),
        controller=controller,
        regularizers=(ErrorEstimate(),),
        noise=BatchNoise(1),
    )
    trace = evolved.solution.trace
    return trace.error[:, 0], trace.h[:, 0]


@pytest.mark.parametrize("norm", ["row", "batch"])
@pytest.mark.parametrize(("pick", "mean"), [("time", None), ("time", "steps"), ("step", None), ("step", "time")])
@pytest.mark.parametrize("samples", [1, 2])
def test_local_form_estimates_the_mean_over_steps_without_bias(pick, mean, samples, norm):
    """Averaged over every place that can be picked, with its chance: as many rows as places, all alike."""
    field, controller = Linear(SPIRAL, squashed=True), PI(rtol=1e-4, atol=1e-4, norm=norm)
    error, h = (v.detach() for v in steps_of(field, controller))
    n = len(h)
    rows = 840 * 3  # a multiple of 1 … 8: reservoir sampling of up to 8 steps is even, to the row
    assert 5 <= n <= 9
    u = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    noise = Given(u[:, None].expand(rows, samples).contiguous())
    found = penalty(
        Local(pick=pick, mean=mean, samples=samples),
        field,
        START.expand(rows, 2),
        line(0, 3),
        noise,
        controller=controller,
    )
    value = error * h
    if pick == "step":
        value, h, n = value[:-1], h[:-1], n - 1
        expected = value.mean() if mean is None else (value * h * (n + 1) / 3).mean()
        tolerance = 1e-7  # one norm over so many rows is rounded otherwise than over one
    else:
        expected = value.mean() if mean else (value * h / 3).sum()
        tolerance = n / rows  # places of equal shares fall on the ends of steps up to one row
    torch.testing.assert_close(found.detach().mean(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("quantity", ["error", "squared", "steps", "stiffness"])
def test_local_gradient_is_that_of_the_global_penalty_at_fixed_states(quantity):
    """On a fixed grid, where each step starts from a given state: one row for each step."""
    grid, field = line(0, 0.4, 1.0, 1.3), Linear(SPIRAL, squashed=True)
    states = evolve(field, START, grid, solver=Tsit5(), controller=Fixed(), save="all").solution.path[:, 0].detach()
    places = (grid[:-1] + 1e-3) / grid[-1]
    found = penalty(
        Local(quantity=quantity, rtol=1e-3, atol=1e-3),
        field,
        START.expand(3, 2),
        grid,
        Given(places[:, None]),
        controller=Fixed(),
    )
    (own,) = torch.autograd.grad(found.sum(), field.matrix)
    alone = ErrorEstimate(per_step=quantity, rtol=1e-3, atol=1e-3) if quantity != "stiffness" else Stiffness()
    total = torch.zeros_like(SPIRAL)
    for i, state in enumerate(states[:-1]):
        value = penalty(alone, field, state[None], grid[i : i + 2], controller=Fixed())
        total += torch.autograd.grad(value[0], field.matrix)[0]
        torch.testing.assert_close(found[i], value[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(own, total, rtol=1e-9, atol=1e-12)


def test_a_place_that_a_row_did_not_reach_costs_nothing():
    """The first row's place lies in its one step, the second's after where it failed."""
    noise = Given(torch.tensor([[0.0], [0.99]]))
    options = {"max_steps": 1, "on_failure": "return"}
    found = penalty(Local(), Linear(SPIRAL), START.expand(2, 2), noise=noise, **options)
    assert found[0] > 0 and found[1] == 0


def test_the_reference_form_is_of_odes():
    with pytest.raises(ConfigError, match=r"form 'reference' takes a step of Tsit5 along an ODE, and solver 'sosri'"):
        Local(form="reference").check(SOSRI())
