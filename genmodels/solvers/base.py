"""What a solver is, and `integrate`, the one loop that runs them: step rules, step control, outcomes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError, kind, member, names, register
from ..rng import Noise
from ..types import expand_like
from .fields import Counted, VectorField

State = tuple[Tensor, ...]  # a solver's memory between steps; each tensor has the batch axis first
RUNNING = -1  # the status of a row that has not ended


class Step(NamedTuple):
    """One step of a solver.

    Args:
        x: [B, *shape] state at the new time.
        error: [B, *shape] local error estimate, with graph; None if the method has none.
        stiffness: [B] float64 estimate of the largest |eigenvalue| of ∂f/∂x, with graph; None if the method has none.
        state: memory for the next step.
    """

    x: Tensor
    error: Tensor | None
    stiffness: Tensor | None
    state: State


@kind
class Solver(ABC):
    """A rule for one step from time t to time s, forwards (s > t) or backwards (s < t) alike.

    Solvers are stateless: what a step must remember (FSAL evaluations, the history of multistep methods) travels in
    `state`. A deterministic solver is inverted by flipping the grid.

    Attributes:
        order: the error after a fixed interval is O(h^order); of an SDE solver, the strong order.
        stages: evaluations of the field per step, besides those of `start`.
        needs: protocol of the field.
        counts: method of the field whose calls are its evaluations.
        adaptive: True if steps carry an error estimate of size O(h^order), as step control needs.
    """

    order: ClassVar[float]
    stages: ClassVar[int]
    needs: ClassVar[type] = VectorField
    counts: ClassVar[str] = "__call__"
    adaptive: ClassVar[bool] = False

    def start(self, field: Any, t: Tensor, x: Tensor) -> State:
        """The memory before the first step; t is [] or [B]."""
        return ()

    @abstractmethod
    def step(self, field: Any, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Noise | None) -> Step:
        """One step from time t to time s, both [] or both [B] float64; all randomness comes from `noise`."""

    def slope(self, field: Any, t: Tensor, x: Tensor, state: State) -> Tensor:
        """[B, *shape] dx/dt at (t, x), for the choice of a first step; from `state` where it is known already."""
        return field(t, x)


class Result(IntEnum):
    """How an integration ended; `message` says it in words."""

    def __new__(cls, value: int, message: str, advice: str) -> "Result":
        member = int.__new__(cls, value)
        member._value_, member.message, member.advice = value, message, advice
        return member

    success = 0, "reached the last time", ""
    max_steps_reached = (
        1,
        "used up max_steps before the last time",
        "Raise max_steps, or loosen rtol and atol (in float32 an rtol below 1e-6 is lost in rounding noise).",
    )
    step_underflow = (
        2,
        "needed steps too short for floating-point time",
        "The solution is singular or very stiff there: look at the field near this time, smooth or regularise it, "
        "loosen rtol and atol, compute in float64, or use a fixed grid.",
    )
    non_finite = (
        3,
        "met an infinite or undefined state",
        "Look at the field near this time (divisions, logarithms, exponentials), compute in float64, or shorten "
        "the steps, or let step control choose them (controller: pi).",
    )


@dataclass(frozen=True, slots=True)
class Solution:
    """Where an integration ended and what it cost; with graph, except for counts and times.

    Sums run over a row's accepted steps. E is the root mean square over the row of the local error estimate, divided by
    atol + rtol max(|x|, |x⁺|) under step control and bare on a fixed grid; S is the stiffness estimate, h a step.

    Args:
        x: [B, *shape] state at the last time (where a row failed: its last finite state).
        path: [L, B, *shape] states at `times`, nan where a row did not get; None unless save="all".
        nfe: [B] int64 evaluations of the field on the row's path; those of rejected steps count.
        steps: [B] int64 accepted steps.
        rejected: [B] int64 rejected steps.
        error: [B] float64 Σ E |h|; None without an error estimate.
        stiffness: [B] float64 Σ S |h|; None without a stiffness estimate.
        result: how it ended: that of the first row that failed.
        error_squared: [B] float64 Σ E².
        stiffness_max: [B] float64 max S.
        time: [B] float64 where each row ended.
        status: [B] int64 `Result` of each row.
    Source: error, error_squared, stiffness: Pal et al. 2021 (Opening the Blackbox), section 3; its code averages E |h|
        over steps (here error / steps) and takes the maximum of S.
    """

    x: Tensor
    path: Tensor | None
    nfe: Tensor
    steps: Tensor
    rejected: Tensor
    error: Tensor | None
    stiffness: Tensor | None
    result: Result
    error_squared: Tensor | None
    stiffness_max: Tensor | None
    time: Tensor
    status: Tensor


class SolverError(RuntimeError):
    """An integration that did not reach its last time.

    Attributes:
        result: why.
        row: the first row that failed.
        time: the last time that it reached.
        steps: its accepted steps.
        rejected: its rejected steps.
    """

    def __init__(self, solution: Solution) -> None:
        self.result = solution.result
        self.row = int(solution.status.cpu().gt(0).nonzero()[0])
        self.time, self.steps = float(solution.time[self.row]), int(solution.steps[self.row])
        self.rejected = int(solution.rejected[self.row])
        super().__init__(
            f"integrate: row {self.row} of {len(solution.x)} {self.result.message}: {self.result.name} in step "
            f"{self.steps + 1} from t = {self.time:.9g}, after {self.rejected} rejected steps. {self.result.advice} "
            'on_failure="return" gives the last finite state instead of this error.'
        )


class Heuristics(NamedTuple):
    """The running sums of `Solution`: [B] float64 each, or None."""

    error: Tensor | None
    error_squared: Tensor | None
    stiffness: Tensor | None
    stiffness_max: Tensor | None

    @classmethod
    def zeros(cls, x: Tensor) -> "Heuristics":
        return cls(*[x.new_zeros(len(x), dtype=torch.float64)] * 4)

    def add(self, error: Tensor | None, stiffness: Tensor | None, h: Tensor, rows: Tensor) -> "Heuristics":
        """With a step of length h: its error norm and stiffness, [B] each, where `rows` [B] is True."""
        e = None if error is None else torch.where(rows, error, 0.0)
        s = None if stiffness is None else torch.where(rows, stiffness, 0.0)
        return Heuristics(
            _merged(torch.add, self.error, None if e is None else e * h),
            _merged(torch.add, self.error_squared, None if e is None else e.square()),
            _merged(torch.add, self.stiffness, None if s is None else s * h),
            _merged(torch.maximum, self.stiffness_max, s),
        )


def _merged(f: Callable[[Tensor, Tensor], Tensor], total: Tensor | None, value: Tensor | None) -> Tensor | None:
    return value if total is None or value is None else f(total, value)


class Problem(NamedTuple):
    """What a controller must solve: the checked arguments of `integrate`, with times on the state's device."""

    field: Any
    x: Tensor
    times: Tensor
    direction: int
    span: float
    solver: Solver
    noise: Noise | None
    keep_path: bool
    max_steps: int
    stop_at_failure: bool
    seminorm: Callable[[Tensor], Tensor]


@kind
class Controller(ABC):
    """Chooses the steps of a solver."""

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Take the state of a problem to its last time."""

    def check(self, solver: Solver) -> None:
        """Raises ConfigError if this controller cannot steer the solver."""


@register(Controller, "fixed")
class Fixed(Controller):
    """The steps are the given grid: one step for each interval, the same for every row."""

    def solve(self, problem: Problem) -> Solution:
        x, times, solver = problem.x, problem.times[: problem.max_steps + 1], problem.solver
        field = Counted(problem.field, solver.counts)
        grid = times.unbind() if len(x) else times[:1].unbind()  # nothing is evaluated for an empty batch
        state = solver.start(field, grid[0], x) if len(x) else ()
        alive = x.new_ones(len(x), dtype=torch.bool)
        steps, sums = alive.to(torch.int64) * 0, Heuristics(None, None, None, None)
        path, calls = [x], [field.calls]
        for t, s in pairwise(grid):
            taken = solver.step(field, t, s, x, state, problem.noise)
            alive = alive & finite_rows(taken.x)
            # a row that fails is frozen; where asking costs no wait for a device, only if there is one
            intact = x.device.type == "cpu" and bool(alive.all())
            x, state = taken.x if intact else torch.where(expand_like(alive, x), taken.x, x), taken.state
            if taken.error is not None or taken.stiffness is not None:
                error = None if taken.error is None else rms(problem.seminorm(taken.error))
                sums = sums.add(error, taken.stiffness, (s - t).abs(), alive)
            steps = steps + alive
            calls.append(field.calls)
            path += [x] if problem.keep_path else []
        last = len(problem.times) - 1 if len(x) else 0
        status = torch.where(alive, Result.success if len(grid) > last else Result.max_steps_reached, Result.non_finite)
        ended = steps + (status == Result.non_finite)  # the step that failed was evaluated too
        return Solution(
            x=x,
            path=_masked(torch.stack(path), steps, len(problem.times)) if problem.keep_path else None,
            nfe=torch.tensor(calls, device=x.device)[ended],
            steps=steps,
            rejected=torch.zeros_like(steps),
            result=worst(status),
            time=times.detach()[steps],
            status=status,
            **sums._asdict(),
        )


def integrate(
    field: Any,
    x: Tensor,
    times: Tensor,
    *,
    solver: Solver,
    controller: Controller = Fixed(),
    noise: Noise | None = None,
    save: Literal["last", "all"] = "last",
    max_steps: int = 10_000,
    on_failure: Literal["raise", "return"] = "raise",
    seminorm: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Solve dx/dt = field(t, x) (or what else the solver steps) from times[0] to times[-1].

    Row i of the result depends on row i of x alone. Gradients flow through the steps taken (discretise, then optimise);
    the lengths of adaptive steps count as constants.

    Args:
        field: what `solver.needs`; a `RowField` lets step control stop evaluating rows that are done.
        x: [B, *shape] state at times[0]; its dtype is kept.
        times: [L] real, strictly increasing, or strictly decreasing to run backwards. Under `Fixed` each interval is
            one step and the field gets t of shape []; under step control steps land on the times and t has shape [B].
        save: "all" keeps the states at every time.
        max_steps: most steps of a row, rejected ones included.
        on_failure: raise a SolverError, or return the last finite state.
        seminorm: the part [B, *] of a state-like [B, *shape] that error norms see, None for all of it; accumulated
            integrals, on which nothing else depends, may be left out.
    Raises:
        ValueError: if times or x cannot be integrated over.
        ConfigError: if the solver needs another field, or step control an error estimate that it does not have.
        SolverError: if a row does not reach the last time.
    """
    _check_arguments(x, save, on_failure)
    _check_field(solver, field)
    controller.check(solver)
    start, end = _check_times(times)
    grid, direction = times.to(x.device, torch.float64), 1 if end > start else -1
    keep, stop, part = save == "all", on_failure == "raise", seminorm or _whole
    solution = controller.solve(
        Problem(field, x, grid, direction, abs(end - start), solver, noise, keep, max_steps, stop, part)
    )
    if stop and solution.result != Result.success:
        raise SolverError(solution)
    return solution


def title(component: Solver | Controller) -> str:
    """The registered name of a component, or that of its class."""
    return getattr(component, "registered_name", type(component).__name__)


def _whole(y: Tensor) -> Tensor:
    return y


def _check_arguments(x: Tensor, save: str, on_failure: str) -> None:
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"integrate: x must be [B, *shape] of floating point, found {x.dtype} {list(x.shape)}.")
    if save not in ("last", "all") or on_failure not in ("raise", "return"):
        raise ValueError(
            f"integrate: save is 'last' or 'all' and on_failure 'raise' or 'return', found {save!r} and {on_failure!r}."
        )


def _check_field(solver: Solver, field: Any) -> None:
    if isinstance(field, solver.needs):
        return
    usable = [name for name in names(Solver) if isinstance(field, member(Solver, name, "solver").needs)]
    purpose = (solver.needs.__doc__ or "").split("\n")[0].rstrip(".")
    raise ConfigError(
        f"integrate: solver '{title(solver)}' needs a {solver.needs.__name__} ({purpose}), which "
        f"{type(field).__name__} is not. Use one of: {', '.join(usable) or 'none is registered for this field'}."
    )


def _check_times(times: Tensor) -> tuple[float, float]:
    """The two ends of a grid."""
    values = times.detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) < 2 or times.is_complex() or not values.isfinite().all():
        raise ValueError(f"integrate: times must be [L] finite numbers, L at least 2, found {values.tolist()}.")
    gaps = values.diff()
    wrong = (gaps * (values[-1] - values[0]).sign() <= 0).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            "integrate: times must strictly increase, or strictly decrease to run backwards, found "
            f"times[{i}] = {float(values[i])!r} and times[{i + 1}] = {float(values[i + 1])!r} on the way from "
            f"{float(values[0])!r} to {float(values[-1])!r}."
        )
    return float(values[0]), float(values[-1])


def _masked(path: Tensor, steps: Tensor, length: int) -> Tensor:
    """The path [*, B, *shape] with [length, B, *shape], nan after the last step of each row."""
    missing = path.new_full((length - len(path), *path.shape[1:]), torch.nan)
    reached = torch.arange(length, device=path.device)[:, None] <= steps
    return torch.where(expand_like(reached, path), torch.cat((path, missing)), torch.nan)


def worst(status: Tensor) -> Result:
    """The outcome of a batch: that of its first row that failed."""
    failed = [code for code in status.tolist() if code > 0]
    return Result(failed[0]) if failed else Result.success


def finite_rows(x: Tensor) -> Tensor:
    """[B] bool: whether every component of a row is finite."""
    flat = x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None]
    return torch.linalg.vector_norm(flat, ord=torch.inf, dim=1).isfinite() if flat.shape[1] else flat.isfinite().all(1)


def rms(x: Tensor) -> Tensor:
    """[B] float64 root mean square of each row; its gradient at 0 is 0."""
    flat = x.flatten(1) if x.ndim > 1 else x[:, None]
    return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64) / max(flat.shape[1], 1) ** 0.5
