"""Our Runge-Kutta methods against torchdiffeq, an independent implementation, and torchdiffeq as a back-end."""

import math

import pytest
import torch
from torch import Tensor, nn

from genmodels.registry import ConfigError, build
from genmodels.rng import generator
from genmodels.solvers.base import Fixed, Gradient, Solver, integrate
from genmodels.solvers.fields import RowField
from genmodels.solvers.runge_kutta import Dopri5
from genmodels.solvers.solution import Record, Result, SolverError
from genmodels.solvers.step_size import PI
from genmodels.solvers.tableaux import DOPRI5
from genmodels.solvers.termination import SteadyState
from genmodels.solvers.torchdiffeq import METHODS, TorchDiffEq
from genmodels.types import expand_like
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


# ---- as a back-end ---------------------------------------------------------------------------------------------------

GRIDS = [name for name, (_, adaptive) in METHODS.items() if not adaptive]
ADAPTIVE = [name for name, (_, adaptive) in METHODS.items() if adaptive]


class Tanh(nn.Module):
    """tanh(A x) cos 3t + 0.3 x, which knows its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(LINEAR.matrix.clone())

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix.T) * expand_like((3 * t).cos(), x) + 0.3 * x


def pulled_back(path: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weight = torch.linspace(1, 2, path.numel(), dtype=torch.float64).reshape(path.shape)
    return torch.autograd.grad((path.sin() * weight).sum(), inputs, retain_graph=True)


def close(a: tuple[Tensor, ...], b: tuple[Tensor, ...], tolerance: float) -> None:
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")  # on these long steps, on both sides
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("method", GRIDS)
def test_the_back_end_on_a_grid_is_theirs(method, adjoint, flip):
    net, x = Tanh(), PLANE.clone().requires_grad_()
    times = (TIMES.flip(0) if flip else TIMES).clone().requires_grad_()
    solver = TorchDiffEq(method, adjoint=adjoint)
    mine = integrate(net, x, times, solver=solver, save="all")
    theirs = (torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint)(net, x, times, method=method)
    close((mine.path, mine.x), (theirs, theirs[-1]), 1e-14)
    inputs = (x, times, net.matrix)
    close(pulled_back(mine.path, *inputs), pulled_back(theirs, *inputs), 1e-14)
    assert mine.result is Result.success and mine.time.tolist() == [float(times[-1].detach())] * 5
    assert mine.steps.tolist() == [5] * 5 and mine.rejected.tolist() == [0] * 5
    last = integrate(net, x, times, solver=solver).x
    close(pulled_back(last, x, net.matrix), pulled_back(theirs[-1], x, net.matrix), 1e-14)


@pytest.mark.parametrize(("ours", "theirs"), [("euler", "euler"), ("heun", "heun2"), ("rk38", "rk4")])
def test_the_back_end_takes_our_steps_on_a_divided_grid(ours, theirs):
    net, x = Tanh(), PLANE.clone().requires_grad_()
    times = TIMES.clone().requires_grad_()
    runs = [
        integrate(net, x, times, solver=solver, controller=Fixed(3), save="all")
        for solver in (build(Solver, ours), TorchDiffEq(theirs))
    ]
    close((runs[0].path, runs[0].x), (runs[1].path, runs[1].x), 1e-14)
    inputs = (x, times, net.matrix)
    close(pulled_back(runs[0].path, *inputs), pulled_back(runs[1].path, *inputs), 1e-13)
    assert runs[1].nfe.tolist() == runs[0].nfe.tolist() and runs[1].steps.tolist() == [15] * 5


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_adaptive_back_end_is_theirs_and_right(method):
    tolerance = 1e-4 if METHODS[method][0] < 4 else 1e-7
    net, x = Tanh(), PLANE.clone().requires_grad_()
    control = PI(tolerance, tolerance)
    mine = integrate(net, x, TIMES, solver=TorchDiffEq(method), controller=control, save="all")
    theirs = torchdiffeq.odeint(net, x, TIMES, method=method, rtol=tolerance, atol=tolerance)
    close((mine.path,), (theirs,), 1e-14)
    close(pulled_back(mine.path, x, net.matrix), pulled_back(theirs, x, net.matrix), 1e-12)
    exact = integrate(net, x, TIMES, solver=Dopri5(), controller=PI(1e-11, 1e-11), save="all").path
    # values are interpolated, and that error is not controlled: the long steps of dopri8 go through a quartic
    slack = (2000 if method == "dopri8" else 200) * tolerance
    torch.testing.assert_close(mine.path, exact, rtol=0, atol=slack)
    adjoint = integrate(net, x, TIMES, solver=TorchDiffEq(method, adjoint=True), controller=control, save="all").path
    for a, b in zip(pulled_back(adjoint, x, net.matrix), pulled_back(exact, x, net.matrix), strict=True):
        torch.testing.assert_close(a, b, rtol=slack, atol=slack)


def test_the_back_end_counts_and_obeys_the_options():
    calls = []
    counting = lambda t, x: (calls.append(float(t)), field(t, x))[1]  # noqa: E731
    out = integrate(counting, PLANE, TIMES, solver=TorchDiffEq(), controller=PI(1e-6, 1e-6))
    assert out.nfe.tolist() == [len(calls)] * 5 == [2 + 6 * int(out.steps[0] + out.rejected[0])] * 5
    short = integrate(field, PLANE, TIMES, solver=TorchDiffEq(), controller=PI(1e-6, 1e-6, max_step=0.01))
    assert short.steps[0] >= 100 > 20 > out.steps[0]
    part = integrate(
        lambda t, x: torch.cat((x[:, :1], 1e3 * (50 * t).cos() + 0 * x[:, :1]), 1),
        PLANE,
        TIMES,
        solver=TorchDiffEq(),
        controller=PI(1e-3, 1e-3),
        seminorm=lambda y: y[:, :1],
    )
    assert part.steps[0] < 12, "the fast integral is not to be looked at"
    half = integrate(lambda t, x: -x.double(), PLANE.float(), TIMES, solver=TorchDiffEq(), controller=PI(1e-4, 1e-4))
    assert half.x.dtype == torch.float32
    empty = integrate(field, PLANE[:0], TIMES, solver=TorchDiffEq(), controller=PI(), save="all")
    assert empty.x.shape == (0, 2) and empty.path.shape == (6, 0, 2) and empty.result is Result.success


@pytest.mark.parametrize("name", ["adjoint", "interpolated", "checkpoint"])
def test_the_back_end_under_other_gradients(name):
    net, control = Tanh(), PI(1e-7, 1e-7)
    x = PLANE.clone().requires_grad_()
    run = lambda g: integrate(net, x, TIMES, solver=TorchDiffEq(), controller=control, gradient=g).x  # noqa: E731
    gradient = build(Gradient, name)
    if name != "adjoint":
        with pytest.raises(ConfigError, match="torchdiffeq"):
            run(gradient)
        return
    exact = pulled_back(integrate(net, x, TIMES, solver=Dopri5(), controller=PI(1e-11, 1e-11)).x, x, net.matrix)
    close(pulled_back(run(gradient), x, net.matrix), exact, 2e-6)


def test_failures_of_the_back_end_are_ours():
    unit = torch.tensor([0.0, 2.0], dtype=torch.float64)
    blow = lambda t, x: x.square()  # noqa: E731
    one = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(SolverError, match=r"step_underflow in step \d+ from t = 1.0000") as error:
        integrate(blow, one, unit, solver=TorchDiffEq(), controller=PI(1e-6, 1e-6))
    assert error.value.result is Result.step_underflow
    with pytest.raises(SolverError, match="max_steps_reached"):
        integrate(blow, one, unit, solver=TorchDiffEq(), controller=PI(1e-6, 1e-6), max_steps=7)
    given = {"solver": TorchDiffEq(), "controller": PI(1e-6, 1e-6), "on_failure": "return", "save": "all"}
    out = integrate(blow, one, unit, max_steps=7, **given)
    assert out.result is Result.max_steps_reached and out.steps[0] + out.rejected[0] == 7
    torch.testing.assert_close(out.x[:, 0], 1 / (1 - out.time), rtol=1e-5, atol=0)
    assert out.path[0].isfinite().all() and out.path[1].isnan().all()
    poles = lambda t, x: torch.where(t > 0.55, torch.where(x > 2, torch.inf, -x), -0.0 * x)  # noqa: E731
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    out = integrate(poles, x, times, solver=TorchDiffEq("euler"), on_failure="return", save="all")
    assert out.status.tolist() == [0, 3] and out.x[1].item() == 3.0 and float(out.time[1]) == pytest.approx(0.6)
    assert out.path[6, 1].item() == 3.0 and out.path[7:, 1].isnan().all() and out.path[:, 0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"record": Record()}, "no trace"),
        ({"save": "dense"}, "no dense output"),
        ({"stop": SteadyState()}, "before the last time"),
        ({"times": TIMES[:, None].expand(-1, 5)}, "one clock"),
        ({"controller": Fixed()}, "method dopri5 needs controller 'pi', found 'fixed'"),
        ({"solver": TorchDiffEq("rk4")}, "error estimate|needs controller 'fixed'"),
    ],
)
def test_what_the_back_end_lacks_is_refused(options, found):
    given = {"field": field, "times": TIMES, "solver": TorchDiffEq(), "controller": PI(), **options}
    with pytest.raises(ConfigError, match=found):
        integrate(given.pop("field"), PLANE, given.pop("times"), **given)
    with pytest.raises(ConfigError, match="no single steps"):
        TorchDiffEq().step(field, TIMES[0], TIMES[1], PLANE, (), None)


def test_their_adjoint_is_refused_where_it_would_count_twice():
    class Conditioned(Tanh):
        def forward(self, t: Tensor, x: Tensor, condition: Tensor) -> Tensor:
            return super().forward(t, x) + condition

    net = Conditioned()
    given = {"solver": TorchDiffEq(adjoint=True), "controller": PI()}
    with pytest.raises(ConfigError, match="count twice"):
        integrate(RowField(net, PLANE @ net.matrix), PLANE, TIMES, **given)
    with pytest.raises(ConfigError, match="does not tell"):
        integrate(field, PLANE, TIMES, **given)


def test_the_gradient_of_the_summed_error_with_frozen_steps():
    """Σ E h along torchdiffeq's own steps (the last one kept whole), and its gradient, computed independently."""
    spiral = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
    turning = lambda t, x: torch.tanh(x @ spiral.T)  # noqa: E731
    steps = []
    turning.callback_accept_step = lambda t, x, h: steps.append((float(t), float(h)))
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    ends = torch.tensor([0.0, 3.0], dtype=torch.float64)
    torchdiffeq.odeint(turning, x, ends, rtol=1e-6, atol=1e-6, method="dopri5")
    times = torch.tensor([t for t, _ in steps] + [sum(steps[-1])], dtype=torch.float64)
    assert len(steps) == 9 and times[-1] > 3

    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(spiral.clone())

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.matrix.T)

    for name in ("backprop", "checkpoint"):
        net, record = Turning(), Record(rtol=1e-6, atol=1e-6)
        trace = integrate(net, x, times, solver=Dopri5(), gradient=build(Gradient, name), record=record).trace
        total = 2 / 3 * (trace.error * trace.h).sum()
        assert total.item() == pytest.approx(1.0667869085, abs=1e-8)
        (slope,) = torch.autograd.grad(total, net.matrix)
        assert slope.flatten().tolist() == pytest.approx([1.113709, 0.285264, -2.076434, -0.254303], abs=2e-6)
