"""Gradients through integrations: of the steps (backprop, checkpoint) and of the solution (adjoint, interpolated)."""

import gc
import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from genmodels.registry import ConfigError, build, names
from genmodels.rng import generator
from genmodels.solvers.adjoint import Adjoint, Interpolated
from genmodels.solvers.base import Backprop, Controller, Fixed, Gradient, Solver, Step, integrate
from genmodels.solvers.checkpoint import Checkpoint
from genmodels.solvers.divergence import exact_divergence, hutchinson
from genmodels.solvers.fields import SDE, RowField, tensors_of
from genmodels.solvers.runge_kutta import Dopri5, Heun, Tsit5
from genmodels.solvers.solution import Record, Result, SolverError
from genmodels.solvers.step_size import PI
from genmodels.solvers.termination import Event, SteadyState
from genmodels.types import expand_like
from tests.oracles import LINEAR

NAMES = names(Gradient)
CONTINUOUS = ["adjoint", "interpolated"]
PLANE = torch.randn(4, 2, generator=generator("plane"), dtype=torch.float64)
UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
SHARED = torch.tensor([0.0, 0.3, 1.0, 1.7], dtype=torch.float64)
# rows of their own; in the last one an interval is padding
OWN = torch.stack([SHARED * scale + 0.1 for scale in (1.0, 0.4, 1.6, 0.8)], 1)
OWN[2, 3] = OWN[1, 3]
CONTROLS: dict[str, Controller] = {
    "fixed": Fixed(4),
    "row": PI(1e-5, 1e-5),
    "batch": PI(1e-5, 1e-5, norm="batch"),
}
TIGHT = PI(1e-10, 1e-10)


class Net(nn.Module):
    """A tanh network; `condition` [B, D] is added to its velocity."""

    def __init__(self, dimension: int = 2, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(dimension, width, dtype=torch.float64)
        self.second = nn.Linear(width, dimension, dtype=torch.float64)
        for k, p in enumerate(self.parameters()):
            p.data = torch.randn(p.shape, generator=generator("net", k), dtype=torch.float64) / 2

    def forward(self, t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
        v = self.second(torch.tanh(self.first(x))) + expand_like((3 * t).sin(), x)
        return v if condition is None else v + condition * x


class Linear(nn.Module):
    """A x + b of the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.offset = nn.Parameter(LINEAR.matrix.clone()), nn.Parameter(LINEAR.offset.clone())

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.matrix.T + self.offset

    def solution(self, t: Tensor, x: Tensor) -> Tensor:
        block = torch.cat((torch.cat((self.matrix, self.offset[:, None]), 1), torch.zeros(1, 3, dtype=x.dtype)))
        flow = torch.linalg.matrix_exp(t * block)
        return x @ flow[:2, :2].T + flow[:2, 2]


class Riccati(nn.Module):
    """x' = rate cos(t) x², x(t) = 1 / (1/x(0) - rate sin t)."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.rate * expand_like(t.cos(), x) * x.square()

    def solution(self, t: Tensor, x: Tensor) -> Tensor:
        return 1 / (1 / x - self.rate * t.sin())


def weighted(x: Tensor) -> Tensor:
    """A loss that no symmetry helps."""
    return (x.sin() * torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)).sum()


def results(gradient: Gradient, control: Controller, times: Tensor, save: str, **options: Any) -> list[Tensor | None]:
    """The solution and every gradient, of a field whose row argument shares a weight with it."""
    net, x = Net(), PLANE.clone().requires_grad_()
    times, before = times.clone().requires_grad_(), PLANE.cos().requires_grad_()
    field = RowField(net, before.tanh() * net.second.bias)
    solver = options.pop("solver", Tsit5())
    out = integrate(field, x, times, solver=solver, controller=control, gradient=gradient, save=save, **options)
    loss = weighted(out.x)
    if out.path is not None:
        loss = loss + weighted(out.path.nan_to_num().cos())
    if out.trace is not None and gradient.differentiates_trace:
        loss = loss + 0.1 * (out.trace.error * out.trace.h).sum() + out.trace.error.square().sum()
        loss = loss if out.trace.stiffness is None else loss + (out.trace.stiffness**2).sum()
    loss.backward()
    return [out.x.detach(), x.grad, times.grad, before.grad, *(p.grad for p in net.parameters())]


def agree(found: list[Tensor | None], wanted: list[Tensor | None], tolerance: float) -> None:
    """Each tensor to a tolerance relative to its largest element."""
    for k, (mine, other) in enumerate(zip(found, wanted, strict=True)):
        if mine is not None and other is not None:
            size = float(other.abs().max())
            torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * size, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("save", ["last", "all"])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", names(Gradient))
def test_states_without_axes_beside_the_batch(name, control, save):
    """x' = -a x: at the times 0, 1/2, 1 of rows that start from 1, 2, 3."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).requires_grad_()
    rate = torch.tensor(0.7, dtype=torch.float64).requires_grad_()
    field = RowField(Bound(lambda t, x, a: -a * x), rate.expand(3))
    given = {"solver": Tsit5(), "controller": CONTROLS[control], "gradient": build(Gradient, name), "save": save}
    out = integrate(field, x, UNIT[1] * torch.tensor([0.0, 0.5, 1.0]), **given)
    (out.x if save == "last" else out.path[1:]).sum().backward()
    times = [1.0] if save == "last" else [0.5, 1.0]
    assert x.grad.tolist() == pytest.approx([sum(math.exp(-0.7 * t) for t in times)] * 3, rel=1e-5)
    assert rate.grad.item() == pytest.approx(sum(-6 * t * math.exp(-0.7 * t) for t in times), rel=1e-5)


# ---- checkpoint: the gradients of the steps --------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [None, 3])
@pytest.mark.parametrize("grid", ["shared", "backwards", "own"])
@pytest.mark.parametrize("control", CONTROLS)
def test_checkpoint_is_backprop(control, grid, segments):
    if (control, grid) == ("batch", "own"):
        pytest.skip("one clock has no rows of their own")
    times = {"shared": SHARED, "backwards": SHARED.flip(0), "own": OWN}[grid]
    wanted = results(Backprop(), CONTROLS[control], times, "all")
    found = results(Checkpoint(segments), CONTROLS[control], times, "all")
    assert [g is None for g in found] == [g is None for g in wanted]
    agree(found, wanted, 1e-13)


@pytest.mark.parametrize("reference", [{}, {"rtol": 1e-3, "atol": 1e-2}])
@pytest.mark.parametrize("grid", ["shared", "own"])
@pytest.mark.parametrize("control", CONTROLS)
def test_checkpoint_differentiates_the_trace_as_backprop_does(control, grid, reference):
    if (control, grid) == ("batch", "own"):
        pytest.skip("one clock has no rows of their own")
    times, record = OWN if grid == "own" else SHARED, Record(**reference)
    wanted = results(Backprop(), CONTROLS[control], times, "last", record=record)
    plain = results(Backprop(), CONTROLS[control], times, "last")
    assert (wanted[1] - plain[1]).abs().max() > 1e-3, "the trace must matter"
    # the error is a difference of slopes: rounding is magnified
    agree(results(Checkpoint(), CONTROLS[control], times, "last", record=record), wanted, 1e-9)


@pytest.mark.parametrize("name", ["heun", "bosh3", "dopri5", "rk4", "kvaerno3", "esdirk54"])
@pytest.mark.slow_for("esdirk54", "heun")
def test_checkpoint_knows_the_memory_of_every_solver(name):
    for control in (Fixed(9),) if name == "rk4" else (Fixed(9), PI(1e-4, 1e-4)):
        wanted = results(Backprop(), control, SHARED, "all", solver=build(Solver, name))
        agree(results(Checkpoint(), control, SHARED, "all", solver=build(Solver, name)), wanted, 1e-13)


@pytest.mark.parametrize("control", ["fixed", "row"])
@pytest.mark.parametrize("stop", [SteadyState(0.0, 0.05), Event(lambda t, x: x[:, 0] - 0.35)], ids=["rest", "event"])
def test_checkpoint_of_rows_that_stop(control, stop):
    found = []
    for gradient in (Backprop(), Checkpoint()):
        rate = torch.tensor([[0.0], [0.4], [0.8], [-2.0]], dtype=torch.float64).requires_grad_()
        x = torch.ones(4, 1, dtype=torch.float64).requires_grad_()
        field = RowField(Bound(lambda t, x, rate: -rate * x), rate.exp())
        given = {"solver": Tsit5(), "controller": CONTROLS[control], "stop": stop, "gradient": gradient}
        out = integrate(field, x, 4 * UNIT, save="all", **given)
        (weighted(out.x) + out.path.nan_to_num().square().sum()).backward()
        found.append([out.x.detach(), x.grad, rate.grad])
        assert out.stopped[:3].all() and not out.stopped.all()
    agree(found[1], found[0], 1e-13)


def test_a_row_that_failed_has_the_gradients_of_the_way_it_went():
    class Pole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            late = expand_like(t > 0.55, x) & (x > 2)
            return torch.where(late, torch.inf, -self.rate * x)

    x = torch.tensor([[1.0], [9.0]], dtype=torch.float64)
    for gradient in (Checkpoint(), Adjoint(), Interpolated()):
        field, start = Pole(), x.clone().requires_grad_()
        times = torch.linspace(0, 1, 21, dtype=torch.float64)
        out = integrate(field, start, times, solver=Heun(), controller=Fixed(4), gradient=gradient, on_failure="return")
        assert out.status.tolist() == [0, 3] and float(out.time[1]) == pytest.approx(0.55)
        out.x.sum().backward()
        # x(t) = x(0) exp(-rate t): the row that failed goes back from where it stopped; Heun's own error is 1e-5
        torch.testing.assert_close(start.grad, (-field.rate.detach() * out.time).exp()[:, None], rtol=1e-4, atol=0)
        wanted = -(out.time * x[:, 0] * (-field.rate.detach() * out.time).exp()).sum()
        torch.testing.assert_close(field.rate.grad, wanted, rtol=1e-4, atol=0)


class Wiggle:
    """A 'noise' that is a smooth function of time and row."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def increment(self, t: Tensor, s: Tensor) -> SimpleNamespace:
        path = lambda v: (20 * v + self.rows).sin()  # noqa: E731
        return SimpleNamespace(w=(path(s) - path(t))[:, None].expand(-1, 2))

    def select(self, rows: Tensor) -> "Wiggle":
        return Wiggle(self.rows[rows])


class EulerMaruyama(Solver):
    """x + f h + g dW, with a made-up error estimate that makes rows of unlike sizes take unlike steps."""

    order, stages, adaptive = 1, 1, True
    needs: ClassVar[type] = SDE
    counts: ClassVar[str] = "drift"

    def step(self, field: Any, t: Tensor, s: Tensor, x: Tensor, state: tuple, noise: Any) -> Step:
        h = expand_like(s - t, x)
        return Step(x + field.drift(t, x) * h + field.diffusion(t, x) * noise.increment(t, s).w, h**2 * x, ())

    def velocity(self, field: Any, t: Tensor, x: Tensor) -> Tensor:
        return field.drift(t, x)


class Stochastic(nn.Module):
    noise_type, calculus = "diagonal", "ito"

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = Net(), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(t, x)

    def diffusion(self, t: Tensor, x: Tensor) -> Tensor:
        return self.scale * x.cos()

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.parameters())

    def select(self, rows: Tensor) -> "Stochastic":
        return self


@pytest.mark.parametrize("control", [Fixed(11), PI(1e-3, 1e-3)], ids=["fixed", "row"])
def test_checkpoint_of_stochastic_equations_sees_the_same_noise(control):
    found = []
    for gradient in (Backprop(), Checkpoint()):
        sde, x = Stochastic(), (PLANE * torch.tensor([[1.0], [9.0], [0.1], [3.0]])).requires_grad_()
        given = {"solver": EulerMaruyama(), "controller": control, "noise": Wiggle(torch.arange(4.0).double())}
        weighted(integrate(sde, x, UNIT, gradient=gradient, **given).x).backward()
        found.append([x.grad, *(p.grad for p in sde.parameters())])
    agree(found[1], found[0], 1e-13)
    for name in CONTINUOUS:
        with pytest.raises(ConfigError, match=f"'{name}' solves an ordinary.*Use gradient: checkpoint"):
            integrate(sde, x, UNIT, gradient=build(Gradient, name), **given)


# ---- every gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["shared", "backwards", "own"])
@pytest.mark.parametrize("problem", [Linear, Riccati])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_closed_forms(name, problem, grid):
    """Adaptive at 1e-8: values and gradients of x, of all parameters, and of the times where these have them."""
    times = {"shared": SHARED, "backwards": SHARED.flip(0), "own": OWN}[grid].clone().requires_grad_()
    field, exact = problem(), problem()
    x, y = ((0.4 * PLANE.tanh()).requires_grad_() for _ in range(2))
    out = integrate(
        field, x, times, solver=Dopri5(), controller=PI(1e-8, 1e-8), gradient=build(Gradient, name), save="all"
    )
    weighted(out.path).backward()
    if problem is Linear:
        rows = times.detach().clone().requires_grad_()
        wide = rows[:, None].expand(-1, 4) if rows.ndim == 1 else rows
        path = [[exact.solution(wide[i, b] - wide[0, b], y[b : b + 1])[0] for b in range(4)] for i in range(4)]
        path = torch.stack([torch.stack(each) for each in path])
    else:
        rows = times.detach().clone().requires_grad_()
        gap = lambda v: v.sin() - rows[0].sin()  # noqa: E731
        path = torch.stack([1 / (1 / y - exact.rate * expand_like(gap(v), y)) for v in rows])
    weighted(path).backward()
    torch.testing.assert_close(out.path, path, rtol=0, atol=1e-7)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)
    for mine, other in zip(field.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-6)
    assert (times.grad is None) == (name in ("backprop", "checkpoint")), "steps under control are constants"
    if times.grad is not None and grid != "own":
        torch.testing.assert_close(times.grad, rows.grad, rtol=1e-6, atol=1e-6)
    if times.grad is not None and grid == "own":  # where two times are equal, which of them moved is a convention
        torch.testing.assert_close(times.grad[:, :3], rows.grad[:, :3], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(times.grad[:, 3].sum(), rows.grad[:, 3].sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("grid", "save"), [("shared", "all"), ("backwards", "last"), ("own", "last"), ("own", "all")])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.slow_for("row-own-last", "fixed-own-*", "row-shared-all", "*-backwards-last")
def test_continuous_gradients_agree_with_backprop(control, grid, save):
    """Of a network: both are exact up to the errors of the solves, which at 1e-8 (or 36 steps) are below 1e-6."""
    if (control, grid) == ("batch", "own"):
        pytest.skip("one clock has no rows of their own")
    times = {"shared": SHARED, "backwards": SHARED.flip(0), "own": OWN}[grid]
    control = {"fixed": Fixed(12), "row": PI(1e-8, 1e-8), "batch": PI(1e-8, 1e-8, norm="batch")}[control]
    wanted = results(Backprop(), control, times, save)
    if isinstance(control, Fixed) and grid == "own":
        wanted[2] = None  # which of two equal times moved is a convention
    for name in CONTINUOUS:
        agree(results(build(Gradient, name), control, times, save), wanted, 1e-6)


@pytest.mark.parametrize("name", ["checkpoint", *CONTINUOUS])
def test_gradcheck(name):
    net = Net(2, 3)

    def end(x: Tensor, times: Tensor, condition: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        out = integrate(
            RowField(Given(net, parameters), condition),
            x,
            times,
            solver=Tsit5(),
            controller=Fixed(8),
            gradient=gradient,
            save="all",
        )
        return out.x, out.path

    gradient = build(Gradient, name)
    given = [PLANE[:2], torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64), PLANE[2:4], *net.parameters()]
    given = [v.detach().clone().requires_grad_() for v in given]
    assert torch.autograd.gradcheck(end, given, atol=1e-7, rtol=1e-5, fast_mode=True)


class Given:
    """A network with other parameters, which may have a history."""

    def __init__(self, net: nn.Module, parameters: tuple[Tensor, ...]) -> None:
        self.net, self.parameters = net, parameters

    def __call__(self, t: Tensor, x: Tensor, condition: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in self.net.named_parameters()), self.parameters, strict=True))
        return torch.func.functional_call(self.net, named, (t, x, condition))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.parameters


class Joint:
    """State and log-determinant of a flow: a field that differentiates inside."""

    def __init__(self, net: nn.Module, probes: Tensor | None) -> None:
        self.net, self.probes = net, probes

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if self.probes is None:
            v, rate = exact_divergence(self.net, t, y[:, :2])
        else:
            v, rate = hutchinson(self.net, t, y[:, :2], self.probes)
        return torch.cat((v, rate.reshape(-1, 1)), 1)

    def tensors(self) -> tuple[Tensor, ...]:
        return tensors_of(self.net)

    def select(self, rows: Tensor) -> "Joint":
        return Joint(self.net, None if self.probes is None else self.probes[:, rows])


@cache
def trained(name: str, kind: str, control: str) -> list[Tensor]:
    """What a density gives for the points of a plane, and its gradients."""
    probes = None if kind == "exact" else PLANE.sign()[None]
    control = {"fixed": Fixed(12), "row": PI(1e-8, 1e-8), "batch": PI(1e-8, 1e-8, norm="batch")}[control]
    net, x = Net(), PLANE.clone().requires_grad_()
    start = torch.cat((x, x.new_zeros(4, 1)), 1)
    given = {
        "solver": Tsit5(),
        "controller": control,
        "seminorm": lambda y: y[:, :2],
        "gradient": build(Gradient, name),
    }
    y = integrate(Joint(net, probes), start, UNIT, **given).x
    (0.5 * y[:, :2].square().sum(1) - y[:, 2]).mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("control", ["fixed", "row", "batch"])
@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", ["checkpoint", *CONTINUOUS])
@pytest.mark.slow_for(
    "interpolated-exact-row",
    "checkpoint-exact-row",
    "checkpoint-hutchinson-batch",
    "interpolated-*-batch",
    "adjoint-exact-[rf]*",
    "adjoint-hutchinson-batch",
    "checkpoint-*-fixed",
    "interpolated-exact-fixed",
)
def test_densities_are_trained_with_every_gradient(name, kind, control):
    agree(trained(name, kind, control), trained("backprop", kind, control), 1e-13 if name == "checkpoint" else 1e-6)


# ---- cost ------------------------------------------------------------------------------------------------------------


class Held:
    """A tensor that a graph keeps; `alive` and `peak` count the numbers of all of them."""

    alive = peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Held.alive += tensor.numel()
        Held.peak = max(Held.peak, Held.alive)

    def __del__(self) -> None:
        Held.alive -= self.tensor.numel()


def kept(gradient: Gradient, steps: int) -> tuple[int, int]:
    """Numbers that wait for the backward pass, and the most that any graph holds before or in it."""
    net, x = Net(16, 4), torch.ones(8, 16, dtype=torch.float64, requires_grad=True)
    gc.collect()
    Held.alive = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        out = integrate(net, x, UNIT, solver=Heun(), controller=Fixed(steps), gradient=gradient).x
        waiting = Held.alive
        out.sum().backward()
    return waiting, Held.peak


@pytest.mark.parametrize(
    ("gradient", "waiting", "peak"),
    [
        (Backprop(), (14, 17), (14, 17)),
        (Checkpoint(), (3, 6), (3, 6)),  # √16, and two times for each step
        # a fixed number of states: segments grow instead
        pytest.param(Checkpoint(4), (1, 3), (8, 17), marks=pytest.mark.slow),
        (Adjoint(), (1, 1), (1, 1)),
        pytest.param(Interpolated(), (14, 17), (10, 17), marks=pytest.mark.slow),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Gradient) else "",
)
def test_what_is_kept_grows_as_promised(gradient, waiting, peak):
    """From 16 to 256 steps; what does not grow at all need not be looked at for so long."""
    few, many = kept(gradient, 16), kept(gradient, 64 if isinstance(gradient, Adjoint) else 256)
    for a, b, (low, high) in zip(few, many, (waiting, peak), strict=True):
        assert low <= b / a <= high
    if isinstance(gradient, Checkpoint) and gradient.segments:
        # the start (128 numbers) and at most three states more, each with two integers for its 8 rows; two times a step
        assert many[0] <= 128 + 3 * (128 + 16) + 2 * 256 + 20
    if isinstance(gradient, Checkpoint) and gradient.segments is None:
        assert many[1] < kept(Backprop(), 256)[1] / 7


def test_evaluations_in_the_backward_pass_are_counted():
    for gradient in (build(Gradient, name) for name in NAMES):
        net, seen = Net(), []
        net.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        out = integrate(net, PLANE, UNIT, solver=Tsit5(), controller=PI(1e-6, 1e-6), gradient=gradient)
        assert gradient.calls == 0
        forward = len(seen)
        out.x.sum().backward()
        assert gradient.calls == len(seen) - forward
        assert (gradient.calls > 0) == (not isinstance(gradient, Backprop))
        if isinstance(gradient, Checkpoint):  # the first slope, and the accepted steps (of rows that are not abreast)
            assert 1 + 6 * int(out.steps.max()) <= gradient.calls <= int(out.nfe.max()) + 12
        integrate(net, PLANE, UNIT, solver=Tsit5(), gradient=gradient)
        assert gradient.calls == 0


def test_the_seminorm_spares_steps_and_the_options_are_used():
    def calls(gradient: Gradient) -> int:
        net = Net(2, 32)
        with torch.no_grad():
            net.second.weight.mul_(3)
        integrate(net, PLANE, UNIT, solver=Dopri5(), controller=PI(1e-6, 1e-6), gradient=gradient).x.sum().backward()
        return gradient.calls

    assert calls(Adjoint()) < calls(Adjoint(seminorm=False))
    assert calls(Adjoint(controller=PI(1e-3, 1e-3))) < calls(Adjoint()) < calls(Adjoint(controller=TIGHT))
    assert calls(Adjoint(controller=Fixed(10), solver=Heun())) == 20
    assert calls(Interpolated(controller=Fixed(10), solver=Heun())) == 20


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_loss_in_other_units_has_the_same_gradient(name):
    """Tolerances are absolute too; without scaling, a small loss would be solved badly, and in few steps."""
    found = []
    for scale in (1.0, 1e-12):
        net, x, gradient = Net(), PLANE.clone().requires_grad_(), build(Gradient, name)
        out = integrate(net, x, UNIT, solver=Tsit5(), controller=PI(1e-6, 1e-6), gradient=gradient)
        (scale * weighted(out.x)).backward()
        found.append([gradient.calls, x.grad / scale, *(p.grad / scale for p in net.parameters())])
    assert found[0][0] == found[1][0]
    agree(found[1][1:], found[0][1:], 1e-12)


def test_a_hard_row_sets_the_steps_of_the_backward_solve():
    """One fast row of 64: a norm over the batch would hide its error eightfold."""
    rate = torch.full((64, 1), 0.1, dtype=torch.float64)
    rate[5] = 8.0
    errors = []
    for count in (1, 64):
        rows = rate[5:6] if count == 1 else rate
        free, x = rows.clone().requires_grad_(), torch.ones(count, 1, dtype=torch.float64)
        field = RowField(Bound(lambda t, y, w: expand_like((w[:, 0] * t).cos(), y) * w * y), free)
        given = {"solver": Dopri5(), "controller": PI(1e-9, 1e-9), "gradient": Adjoint(controller=PI(1e-4, 1e-4))}
        integrate(field, x, UNIT, **given).x.sum().backward()
        # x(1) = exp(sin w), and its derivative
        errors.append(float((free.grad - rows.cos() * rows.sin().exp()).abs().max()))
    assert errors[1] < 3 * errors[0] + 1e-5


class Bound:
    """A function that depends on nothing."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f = f

    def __call__(self, *arguments: Any) -> Tensor:
        return self.f(*arguments)

    def tensors(self) -> tuple[Tensor, ...]:
        return ()


def test_dense_output_serves_where_the_way_back_is_lost():
    """x' = -30 x + sin(w x): backwards errors grow by e³⁰, while a decays."""
    found = {}
    for name in ("backprop", *CONTINUOUS):
        w = torch.full((4, 1), 2.0, dtype=torch.float64).requires_grad_()
        field = RowField(Bound(lambda t, x, w: -30 * (x - (w * t[..., None] if t.ndim else w * t).sin())), w)
        given = {"solver": Tsit5(), "controller": PI(1e-6, 1e-6, norm="batch"), "gradient": build(Gradient, name)}
        out = integrate(field, PLANE[:, :1].clone(), UNIT, **given).x
        out.pow(3).sum().backward()
        found[name] = (w.grad, out.detach())
    agree([found["interpolated"][0]], [found["backprop"][0]], 1e-4)


# ---- what else a solution holds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTINUOUS)
def test_traces_are_for_logs_alone(name):
    gradient, x = build(Gradient, name), PLANE.clone().requires_grad_()
    record = Record(picks=torch.tensor([[0.2], [0.9]], dtype=torch.float64).expand(2, 4))
    out = integrate(Net(), x, SHARED, solver=Tsit5(), controller=PI(), gradient=gradient, record=record, save="all")
    plain = integrate(Net(), PLANE, SHARED, solver=Tsit5(), controller=PI(), record=record)
    torch.testing.assert_close(out.trace.error.detach(), plain.trace.error.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.picked.x, plain.picked.x)
    assert not out.picked.x.requires_grad
    for part in (out.trace.error, out.trace.stiffness):
        with pytest.raises(ConfigError, match=f"'{name}' does not differentiate the trace.*backprop or checkpoint"):
            (out.x.sum() + part.sum()).backward()
    dense = integrate(Net(), x, SHARED, solver=Tsit5(), controller=PI(), gradient=gradient, save="dense")
    torch.testing.assert_close(dense.dense(SHARED)[-1].detach(), dense.x.detach())
    with pytest.raises(ConfigError, match="dense output"):
        dense.dense(SHARED).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_nothing_is_different(name):
    given = {"solver": Tsit5(), "controller": PI(), "gradient": build(Gradient, name), "record": Record()}
    plain = integrate(Net().requires_grad_(False), PLANE, SHARED, solver=Tsit5(), controller=PI())
    with torch.no_grad():
        quiet = integrate(Net(), PLANE, SHARED, **given)
        function = integrate(lambda t, x: Net()(t, x), PLANE, SHARED, **given)
    frozen = integrate(Net().requires_grad_(False), PLANE, SHARED, **given)
    for out in (quiet, function, frozen):
        assert torch.equal(out.x, plain.x) and not out.x.requires_grad and out.trace.error is not None
        assert out.nfe.tolist() == plain.nfe.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_batches_without_rows_float32_and_unused_parameters(name):
    gradient = build(Gradient, name)
    x = PLANE[:0].clone().requires_grad_()
    for control in (Fixed(), PI()):
        out = integrate(
            Net(), x, SHARED, solver=Tsit5(), controller=control, gradient=gradient, save="all", record=Record()
        )
        (out.x.sum() + out.path.sum()).backward()
        assert x.grad.shape == (0, 2) and out.path.shape == (4, 0, 2)
    found = []
    for dtype in (torch.float32, torch.float64):
        net, x = Net().to(dtype), PLANE.clone().to(dtype).requires_grad_()
        net.extra = nn.Parameter(torch.zeros(3))
        control = PI(1e-5, 1e-5)
        path = integrate(net, x, SHARED, solver=Tsit5(), controller=control, gradient=gradient, save="all").path
        weighted(path).backward()
        assert path.dtype == x.grad.dtype == dtype
        assert net.extra.grad is None or not net.extra.grad.any()
        found.append([x.grad.double(), *(p.grad.double() for p in net.parameters() if p is not net.extra)])
    agree(found[0], found[1], 1e-4)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoint", *CONTINUOUS])
def test_what_cannot_be_evaluated_again_is_refused(name):
    given = {"solver": Tsit5(), "controller": PI(), "gradient": build(Gradient, name)}
    with pytest.raises(ConfigError, match="does not tell"):
        integrate(lambda t, x: -x, PLANE, UNIT, **given)

    class Inside(Net):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Identity(), layer)

        def forward(self, t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
            return super().forward(t, self.inner(x), condition)

        def other(self, t: Tensor, x: Tensor) -> Tensor:
            return self(t, x)

    norm = Inside(nn.BatchNorm1d(2, dtype=torch.float64))
    for field in (norm, norm.other, RowField(norm, PLANE), Joint(norm, None)):
        with pytest.raises(ConfigError, match=rf"'{name}'.*BatchNorm1d \((net\.)?inner\.1\).*running statistics"):
            integrate(field, PLANE, UNIT, **given)
    with pytest.raises(ConfigError, match=r"Dropout \(inner\.1\) would drop other units.*probability 0\.1 to 0"):
        integrate(Inside(nn.Dropout(0.1)), PLANE, UNIT, **given)
    for fine in (Inside(nn.Dropout(0.1)).eval(), Inside(nn.Dropout(0.0)), norm.eval()):
        integrate(fine, PLANE, UNIT, **given).x.sum().backward()

    class Hiding:
        def __init__(self, tensor: Tensor) -> None:
            self.give = lambda: tensor

        def __call__(self, t: Tensor, x: Tensor) -> Tensor:
            return -x * self.give()

        def tensors(self) -> tuple[Tensor, ...]:
            return (self.give(),)

    leaf = torch.ones(2, dtype=torch.float64, requires_grad=True)
    integrate(Hiding(leaf), PLANE, UNIT, **given).x.sum().backward()
    assert leaf.grad.abs().min() > 0.01
    with pytest.raises(ConfigError, match=r"does not hold it where it can be replaced.*RowField"):
        integrate(Hiding(2 * leaf), PLANE, UNIT, **given)


@pytest.mark.parametrize("name", ["checkpoint", *CONTINUOUS])
def test_gradients_of_gradients_are_refused(name):
    x = PLANE.clone().requires_grad_()
    out = integrate(Net(), x, UNIT, solver=Tsit5(), gradient=build(Gradient, name))
    (slope,) = torch.autograd.grad(out.x.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="segments must be at least 1"):
        Checkpoint(0)
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    for name in CONTINUOUS:
        with pytest.raises(ConfigError, match=r"Event ends a row moves with the state.*checkpoint"):
            stop = Event(lambda t, x: x[:, 0] - 0.5)
            integrate(Bound(lambda t, x: -x), x, UNIT, solver=Tsit5(), gradient=build(Gradient, name), stop=stop)
    with pytest.raises(ConfigError, match="integrates as a whole"):
        integrate(Net(), PLANE, UNIT, solver=build(Solver, "torchdiffeq"), controller=PI(), gradient=Checkpoint())
    growing, gradient = Bound(lambda t, x: 3 * x), Adjoint(controller=PI(1e-12, 1e-12))
    out = integrate(growing, x, UNIT, solver=Tsit5(), controller=PI(1e-3, 1e-3), gradient=gradient, max_steps=20)
    with pytest.raises(SolverError, match="max_steps") as error:
        out.x.sum().backward()
    assert error.value.result is Result.max_steps_reached
    assert "backward solve of gradient 'adjoint'" in error.value.__notes__[0]


def test_tensors_with_a_history_are_counted_once():
    """A parameter both of the field and of what made its argument: dL/dp = the field's share + the argument's."""
    for name in ("checkpoint", *CONTINUOUS):

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.p = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

            def forward(self, t: Tensor, x: Tensor, c: Tensor) -> Tensor:
                return -self.p * c * x

        net, x = Scaled(), torch.ones(1, 1, dtype=torch.float64)
        field = RowField(net, net.p.square().reshape(1, 1) * torch.ones(1, 1, dtype=torch.float64))
        control, gradient = PI(1e-9, 1e-9), build(Gradient, name)
        integrate(field, x, UNIT, solver=Tsit5(), controller=control, gradient=gradient).x.sum().backward()
        # x(1) = exp(-p³)
        assert net.p.grad.item() == pytest.approx(-3 * 0.49 * math.exp(-0.343), rel=1e-7)
