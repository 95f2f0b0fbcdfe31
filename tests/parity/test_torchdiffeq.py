"""Our Runge-Kutta methods against torchdiffeq, an independent implementation."""

import math

import pytest
import torch
from torch import Tensor

from genmodels.registry import build
from genmodels.rng import generator
from genmodels.solvers.base import Solver, integrate
from genmodels.solvers.runge_kutta import Dopri5
from genmodels.solvers.step_size import PI
from genmodels.solvers.tableaux import DOPRI5
from tests.oracles import LINEAR

torchdiffeq = pytest.importorskip("torchdiffeq")
PLANE = torch.randn(5, 2, generator=generator("plane"), dtype=torch.float64)
TIMES = torch.tensor([0.0, 0.1, 0.3, 0.35, 0.8, 1.0], dtype=torch.float64)


def field(t: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(LINEAR.field(t, x)) * (3 * t).cos() + 0.3 * x


# torchdiffeq's "rk4" is Kutta's 3/8 rule, not the classical method
@pytest.mark.parametrize(
    ("ours", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2"), ("rk38", "rk4")]
)
@pytest.mark.parametrize("flip", [False, True])
def test_fixed_grids_agree_to_rounding(ours, theirs, flip):
    times = TIMES.flip(0) if flip else TIMES
    path = integrate(field, PLANE, times, solver=build(Solver, ours), save="all").path
    torch.testing.assert_close(path, torchdiffeq.odeint(field, PLANE, times, method=theirs), rtol=1e-14, atol=1e-14)


def test_the_classical_method_is_another_one():
    classical = integrate(field, PLANE, TIMES, solver=build(Solver, "rk4")).x
    gap = (classical - torchdiffeq.odeint(field, PLANE, TIMES, method="rk4")[-1]).abs().max()
    assert 1e-7 < gap < 1e-2


def test_dopri5_has_their_tableau_and_one_and_a_half_times_their_error():
    from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU as THEIRS

    for mine, row in zip(DOPRI5.matrix[1:], THEIRS.beta, strict=True):
        torch.testing.assert_close(torch.tensor(mine, dtype=torch.float64), row.double(), rtol=1e-15, atol=0)
    weights = torch.tensor(DOPRI5.weights, dtype=torch.float64)
    torch.testing.assert_close(weights, THEIRS.c_sol.double(), rtol=1e-15, atol=0)
    torch.testing.assert_close(torch.tensor(DOPRI5.nodes[1:], dtype=torch.float64), THEIRS.alpha.double())
    error = torch.tensor(DOPRI5.error_weights, dtype=torch.float64)
    torch.testing.assert_close(error, 1.5 * THEIRS.c_error.double(), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("step", [0.05, 0.4])
def test_one_dopri5_step_and_its_error_agree(step):
    from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU as THEIRS
    from torchdiffeq._impl.rk_common import _runge_kutta_step

    t, s = torch.tensor([0.2, 0.2 + step], dtype=torch.float64)
    state = Dopri5().start(field, t, PLANE)
    mine = Dopri5().step(field, t, s, PLANE, state, None)
    perturbed = lambda t, x, perturb: field(t, x)  # noqa: E731
    x, slope, error, _ = _runge_kutta_step(perturbed, PLANE, state[0], t, s - t, s, tableau=THEIRS)
    torch.testing.assert_close(mine.x, x, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(mine.state[0], slope, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(mine.error, 1.5 * error, rtol=1e-8, atol=1e-17)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_adaptive_solutions_agree_with_theirs_and_the_truth(tolerance):
    control = PI(tolerance, tolerance)
    mine = integrate(LINEAR.field, PLANE, TIMES, solver=Dopri5(), controller=control, save="all").path
    theirs = torchdiffeq.odeint(LINEAR.field, PLANE, TIMES, method="dopri5", rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=20 * tolerance)
    exact = torch.stack([LINEAR.solution(float(t), PLANE) for t in TIMES])
    torch.testing.assert_close(mine, exact, rtol=0, atol=5 * tolerance)


def test_a_fast_row_in_a_slow_batch_is_not_overlooked():
    """Oscillators x'' = -w² x: a norm over the batch hides the one with w = 20; control by rows does not."""
    w = torch.full((256, 1), 0.1, dtype=torch.float64)
    w[0] = 20.0
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(256, 2).contiguous()
    ends = torch.tensor([0.0, 5.0], dtype=torch.float64)
    oscillators = lambda t, x: torch.cat((x[:, 1:], -w.square() * x[:, :1]), 1)  # noqa: E731
    exact = torch.tensor([math.cos(100.0), -20 * math.sin(100.0)], dtype=torch.float64)
    mine = integrate(oscillators, x, ends, solver=Dopri5(), controller=PI(1e-4, 1e-4))
    theirs = torchdiffeq.odeint(oscillators, x, ends, method="dopri5", rtol=1e-4, atol=1e-4)[-1]
    assert (mine.x[0] - exact).norm() < 0.1 < 1.0 < (theirs[0] - exact).norm()
    assert mine.steps[0] > 20 * mine.steps[1:].max()
