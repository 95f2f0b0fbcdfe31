"""Grids of each row's own: padding, order, both controllers; and grids divided into steps."""

import math

import pytest
import torch
from torch import Tensor

from genmodels.solvers.base import Fixed, integrate
from genmodels.solvers.fields import RowField
from genmodels.solvers.runge_kutta import RK4, Dopri5, Tsit5
from genmodels.solvers.solution import Record
from genmodels.solvers.step_size import PI

RATE = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)
START = torch.tensor([[1.0, -2.0], [0.5, 1.0], [3.0, 0.1], [1.0, 1.0]], dtype=torch.float64)
# rows: plain, padded in front and behind, padded within, nothing but padding
TIMES = torch.tensor(
    [[0.0, 1.0, 0.0, 2.0], [0.5, 1.0, 0.4, 2.0], [0.7, 1.5, 0.4, 2.0], [1.5, 1.5, 0.4, 2.0], [2.0, 1.5, 0.9, 2.0]],
    dtype=torch.float64,
)


def field(t: Tensor, x: Tensor, rate: Tensor) -> Tensor:
    """x' = rate (1 + cos t) x: the time itself matters."""
    return (rate * (1 + t.cos()))[:, None] * x


def exact(times: Tensor) -> Tensor:
    """[L, B, 2] at times [L, B]."""
    grown = (RATE * (times + times.sin() - times[0] - times[0].sin())).exp()
    return grown[..., None] * START


@pytest.mark.parametrize("controller", [PI(1e-9, 1e-9), Fixed(40)])
@pytest.mark.parametrize("backwards", [False, True])
def test_each_row_keeps_its_own_clock(controller, backwards):
    times = TIMES.flip(0) if backwards else TIMES
    out = integrate(
        RowField(field, RATE), START, times, solver=Dopri5(), controller=controller, save="all", record=Record()
    )
    torch.testing.assert_close(out.path, exact(times), rtol=1e-7, atol=0)
    torch.testing.assert_close(out.x, out.path[-1], rtol=0, atol=0)
    assert out.time.tolist() == times[-1].tolist()
    assert out.steps[3] == 0 and out.trace.taken.sum(0).tolist() == out.steps.tolist()
    torch.testing.assert_close(out.trace.h.sum(0), (times[-1] - times[0]).abs())


def test_a_row_alone_and_with_shared_times_takes_the_same_steps():
    control = PI(1e-6, 1e-6)
    whole = integrate(RowField(field, RATE), START, TIMES, solver=Tsit5(), controller=control, save="all")
    for row in range(3):
        own = TIMES[:, row].unique()
        part = RowField(field, RATE[row : row + 1])
        alone = integrate(part, START[row : row + 1], own, solver=Tsit5(), controller=control, save="all")
        assert alone.steps.item() == whole.steps[row].item() and alone.nfe.item() == whole.nfe[row].item()
        torch.testing.assert_close(alone.path[-1, 0], whole.x[row], rtol=1e-13, atol=0)


def test_gradients_reach_rows_through_repeated_times():
    start = START.clone().requires_grad_()
    for controller in (PI(1e-9, 1e-9), Fixed(8)):

        def solve(x: Tensor, controller=controller) -> Tensor:
            return integrate(RowField(field, RATE), x, TIMES, solver=Dopri5(), controller=controller, save="all").path

        assert torch.autograd.gradcheck(solve, (start,), eps=1e-4, atol=1e-5, fast_mode=True)


def test_a_divided_grid_is_the_finer_grid():
    coarse = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    fine = torch.cat((torch.linspace(0, 0.3, 5)[:-1].double(), torch.linspace(0.3, 1.0, 5, dtype=torch.float64)))
    fine[:4] = torch.linspace(0, 0.3, 5, dtype=torch.float64)[:4]
    decay = lambda t, x: -(1 + t) * x  # noqa: E731
    divided = integrate(decay, START, coarse, solver=RK4(), controller=Fixed(4), save="all")
    plain = integrate(decay, START, fine, solver=RK4(), save="all")
    torch.testing.assert_close(divided.path, plain.path[::4], rtol=1e-14, atol=0)
    assert divided.steps.tolist() == [8] * 4 and divided.nfe.tolist() == [32] * 4
    cut = integrate(
        decay, START, coarse, solver=RK4(), controller=Fixed(4), save="all", max_steps=5, on_failure="return"
    )
    assert cut.path[2].isnan().all() and not cut.path[1].isnan().any() and cut.steps.tolist() == [5] * 4
    with pytest.raises(ValueError, match="fixed: steps must be at least 1, found 0"):
        Fixed(0)


@pytest.mark.parametrize(
    ("times", "found"),
    [
        (torch.zeros(3, 2), r"\[L\] or \[L, 4\].*found \[\["),
        (torch.tensor([[0.0] * 4, [1.0, 1.0, -1.0, 1.0]]), r"times\[0, 0\] = 0.0 and times\[1, 0\] = 1.0"),
        (torch.tensor([[0.0] * 4, [1.0, 1.0, math.nan, 1.0]]), "finite"),
    ],
)
def test_times_of_rows_are_checked(times, found):
    with pytest.raises(ValueError, match=found):
        integrate(RowField(field, RATE), START, times.double(), solver=RK4())
