"""Rows that stop before the last time: events with closed-form times and their gradients, and rest."""

import math

import pytest
import torch
from torch import Tensor

from genmodels.registry import ConfigError, build
from genmodels.solvers.base import Fixed, Termination, integrate
from genmodels.solvers.fields import RowField
from genmodels.solvers.runge_kutta import RK4, Dopri5, Euler, Tsit5
from genmodels.solvers.solution import Result
from genmodels.solvers.step_size import PI
from genmodels.solvers.termination import Event, SteadyState

HEIGHT = torch.tensor([[5.0, 0.0], [20.0, 3.0], [1.0, -2.0]], dtype=torch.float64)  # of balls, with their speeds
GRAVITY = 9.81
CONTROLS = {"row": PI(1e-9, 1e-9), "fixed": Fixed(200)}


def fall(t: Tensor, x: Tensor) -> Tensor:
    return torch.stack((x[:, 1], torch.full_like(x[:, 1], -GRAVITY)), 1)


def ground(t: Tensor, x: Tensor) -> Tensor:
    return x[:, 0]


def impact(x: Tensor) -> Tensor:
    height, speed = x.unbind(1)
    return (speed + (speed.square() + 2 * GRAVITY * height).sqrt()) / GRAVITY


@pytest.mark.parametrize("controller", CONTROLS)
def test_balls_stop_where_they_meet_the_ground(controller):
    times = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    settings = {"solver": Dopri5(), "controller": CONTROLS[controller], "save": "all"}
    out = integrate(fall, HEIGHT, times, stop=Event(ground), **settings)
    torch.testing.assert_close(out.time, impact(HEIGHT), rtol=1e-8, atol=0)
    speed = HEIGHT[:, 1] - GRAVITY * out.time
    torch.testing.assert_close(out.x, torch.stack((torch.zeros_like(speed), speed), 1), rtol=1e-7, atol=1e-7)
    assert out.stopped.all() and out.status.tolist() == [0, 0, 0] and out.result is Result.success
    reached = out.time > 1
    assert out.path[1].isfinite().all(1).tolist() == reached.tolist() and out.path[2].isnan().all()
    up = integrate(fall, HEIGHT, times[:2], stop=Event(ground, "up"), **settings)
    assert not up.stopped.any() and up.time.tolist() == [1.0] * 3, "they cross the ground from above alone"


@pytest.mark.parametrize("controller", [PI(1e-6, 1e-6), Fixed(5)])
def test_the_curve_ends_where_a_row_stopped(controller):
    """Balls rest on the ground, though the step in which they met it went on below."""
    start, end = 0.0, 4.0
    given = {"solver": Dopri5(), "controller": controller, "stop": Event(ground), "save": "dense"}
    out = integrate(fall, HEIGHT, torch.tensor([start, end], dtype=torch.float64), **given)
    assert (out.time < end - 0.3).all()
    share = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)[:, None]
    times = share * out.time
    height = HEIGHT[:, 0] + HEIGHT[:, 1] * times - GRAVITY * times.square() / 2
    torch.testing.assert_close(out.dense(times)[..., 0], height, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.dense(out.time + share), out.x.expand(11, 3, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.dense.t[-1], out.time, rtol=1e-12, atol=0)


@pytest.mark.parametrize("controller", CONTROLS)
def test_the_state_at_an_event_knows_that_its_time_moves(controller):
    x = HEIGHT.clone().requires_grad_()
    times = torch.tensor([0.0, 4.0], dtype=torch.float64)

    def end(x: Tensor) -> Tensor:
        return integrate(fall, x, times, solver=Dopri5(), controller=CONTROLS[controller], stop=Event(ground)).x

    speed = end(x)[:, 1]  # -√(v² + 2 g h)
    (found,) = torch.autograd.grad(speed.sum(), x)
    (exact,) = torch.autograd.grad(-(x[:, 1].square() + 2 * GRAVITY * x[:, 0]).sqrt().sum(), x)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)
    (height,) = torch.autograd.grad(end(x)[:, 0].sum(), x)
    torch.testing.assert_close(height, torch.zeros_like(height), rtol=0, atol=1e-5)


@pytest.mark.parametrize("controller", ["row", "fixed"])
def test_rest_is_noticed_row_by_row(controller):
    rate = torch.tensor([1.0, 4.0, 0.01], dtype=torch.float64)
    field = RowField(lambda t, x, rate: rate[:, None] * (1 - x), rate)
    x = torch.zeros(3, 2, dtype=torch.float64)
    control = {"row": PI(1e-6, 1e-6), "fixed": Fixed(500)}[controller]
    out = integrate(
        field,
        x,
        torch.tensor([0.0, 20.0], dtype=torch.float64),
        solver=Tsit5(),
        controller=control,
        stop=SteadyState(rtol=0.0, atol=1e-3),
    )
    assert out.stopped.tolist() == [True, True, False]
    # rate e^{-rate t} <= 1e-3 first holds at t = ln(1000 rate)/rate; the end of the step is soon after
    first = (1000 * rate[:2]).log() / rate[:2]
    assert ((out.time[:2] >= first) & (out.time[:2] < 1.6 * first)).all() and out.time[2] == 20.0
    assert ((rate[:2, None] * (1 - out.x[:2])).abs() <= 1e-3).all()
    relative = integrate(
        RowField(lambda t, x, rate: rate[:, None] * x, rate),
        torch.full((3, 2), 100.0, dtype=torch.float64),
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        solver=RK4(),
        controller=Fixed(4),
        stop=SteadyState(rtol=0.5, atol=1e-12),
    )
    assert relative.stopped.tolist() == [False, False, True] and relative.steps.tolist() == [4, 4, 1]


def test_rest_is_relative_to_the_state_at_the_end_of_a_step():
    """dx/dt = 0.45 x is 0.45 of x there, and more than half of what x was before the step."""
    out = integrate(
        lambda t, x: 0.45 * x,
        torch.ones(1, 2, dtype=torch.float64),
        torch.tensor([0.0, 2.0], dtype=torch.float64),
        solver=RK4(),
        controller=Fixed(4),
        stop=SteadyState(rtol=0.5, atol=0.0),
    )
    assert out.stopped.all() and out.steps.tolist() == [1]
    moving = integrate(
        lambda t, x: torch.ones_like(x),
        torch.ones(1, 2, dtype=torch.float64),
        torch.tensor([0.0, 2.0], dtype=torch.float64),
        solver=Tsit5(),
        controller=Fixed(4),
        stop=SteadyState(rtol=0.0, atol=0.5),
    )
    assert not moving.stopped.any() and moving.nfe.tolist() == [
        6 * 4 + 1
    ]  # the slope at an end is the next one's first


def test_a_crossing_that_ends_or_begins_a_step_is_seen_once():
    """x = t - 1/2 over steps of 1/4 is 0 at the end of the second; one that starts at 0 has not crossed it."""
    settings = {"solver": Euler(), "controller": Fixed(4)}
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = torch.tensor([[-0.5], [0.0], [0.5]], dtype=torch.float64)
    for sign, direction in ((1.0, "up"), (-1.0, "down"), (1.0, "both")):
        field = lambda t, x, sign=sign: sign * torch.ones_like(x)  # noqa: E731
        out = integrate(field, sign * x, times, stop=Event(lambda t, x: x[:, 0], direction), **settings)
        assert out.stopped.tolist() == [True, False, False]
        torch.testing.assert_close(out.time, torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64), rtol=1e-12, atol=0)
        # the root lies on the far side: an integration from there does not meet it again
        assert sign * out.x[0].item() >= 0


def test_configuration_and_refusals():
    built = build(Termination, {"name": "steady_state", "rtol": 0.0})
    assert (built.rtol, built.atol) == (0.0, 1e-4)
    with pytest.raises(ValueError, match=r"not both 0, are needed, found rtol=0.0, atol=0.0"):
        SteadyState(0.0, 0.0)
    with pytest.raises(ConfigError, match=r'rows may be stopped.*norm="row"'):
        integrate(
            fall,
            HEIGHT,
            torch.tensor([0.0, 1.0]),
            solver=Dopri5(),
            controller=PI(norm="batch"),
            stop=Event(ground),
        )
    assert math.isfinite(float(impact(HEIGHT).sum()))
