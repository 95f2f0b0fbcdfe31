"""What a solver is, and `integrate`, the one way to run them: step rules, step control, gradients, outcomes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError, kind, member, names, register
from ..types import expand_like
from .fields import SDE, VectorField
from .march import March, divide
from .solution import Record, Result, Solution, SolverError

State = tuple[Tensor, ...]  # a solver's memory between steps; each tensor has the batch axis first
RUNNING = -1  # the status of a row that has not ended


class Step(NamedTuple):
    """One step of a solver.

    Args:
        x: [B, *shape] state at the new time.
        error: [B, *shape] local error estimate, with graph; None if the method has none.
        state: memory for the next step.
        slopes: what the method evaluated on the way, from which it makes stiffness and interpolation.
    """

    x: Tensor
    error: Tensor | None
    state: State
    slopes: tuple[Tensor, ...] = ()


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
        adaptive: True if steps carry an error estimate of size O(h^error_order), as step control needs.
        whole: True for a back-end that integrates by loops of its own (`solve`) and has no single steps.
        implicit: True if a step solves equations, and is stable on decaying modes whatever its length.
        stability: largest h |λ| on the negative real axis for which y' = λ y does not grow; None if there is no bound,
            or if it is not known.
    """

    order: ClassVar[float]
    stages: ClassVar[int]
    needs: ClassVar[type] = VectorField
    counts: ClassVar[str] = "__call__"
    adaptive: ClassVar[bool] = False
    implicit: ClassVar[bool] = False
    stability: ClassVar[float | None] = None
    whole: ClassVar[bool] = False

    @property
    def error_order(self) -> float:
        """The power of h that the error estimate goes with."""
        return self.order

    @property
    def draws(self) -> bool:
        """Whether its steps draw noise."""
        return self.needs is SDE

    @classmethod
    def serves(cls, field: Any) -> bool:
        """Whether it can step a field."""
        return isinstance(field, cls.needs)

    @classmethod
    def wanted(cls) -> str:
        """What fields it can step, in words."""
        purpose = (cls.needs.__doc__ or "").split("\n")[0].rstrip(".")
        return f"a {cls.needs.__name__} ({purpose})"

    def start(self, field: Any, t: Tensor, x: Tensor) -> State:
        """The memory before the first step; t is [] or [B]."""
        return ()

    @abstractmethod
    def step(self, field: Any, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        """One step from time t to time s, both [] or both [B] float64; all randomness comes from `noise`."""

    def velocity(self, field: Any, t: Tensor, x: Tensor) -> Tensor:
        """[B, *shape] dx/dt at (t, x): one evaluation."""
        return field(t, x)

    def slope(self, field: Any, t: Tensor, x: Tensor, state: State) -> Tensor:
        """[B, *shape] dx/dt at (t, x); from `state` where it is known already."""
        return self.velocity(field, t, x)

    def stiffness(self, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor | None:
        """[B] float64 estimate of the largest |eigenvalue| of ∂f/∂x in a step, with graph; None without one."""
        return None

    def interpolant(self, field: Any, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor:
        """[K, B, *shape] coefficients of θ⁰ … θ^{K-1} of the solution within a step, θ = (t' - t)/(s - t).

        By default the cubic that has both states and both slopes (order 3), for an evaluation more than the step's.
        """
        h = expand_like(s - t, x).to(x.dtype)
        a, b = h * self.velocity(field, t, x), h * self.slope(field, s, step.x, step.state)
        return hermite(x, step.x, a, b)

    def within(self, rtol: float, atol: float) -> "Solver":
        """This solver under step control at these tolerances, which tell it how well to solve its equations, if any."""
        return self

    def along(self, steps: int) -> "Solver":
        """This solver on a fixed grid of so many steps; raises ValueError if they are too few for it."""
        return self

    def solve(self, problem: "Problem", controller: "Controller") -> Solution:
        """A whole integration; a back-end that has loops of its own replaces it."""
        return controller.solve(problem)


class Problem(NamedTuple):
    """What is to be solved: the checked arguments of `integrate`, with times on the state's device.

    Args:
        times: [L], or [L, B] where each row has its own.
        direction: 1 forwards, -1 backwards.
        span: length of the (longest) interval.
    """

    field: Any
    x: Tensor
    times: Tensor
    direction: int
    span: float
    solver: Solver
    noise: Any
    keep_path: bool
    keep_dense: bool
    stop: "Termination | None"
    record: Record | None
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

    def by_row(self) -> "Controller":
        """The same with steps of each row's own, as answers about single items need: they depend on no batch."""
        return self


@kind
class Gradient(ABC):
    """How gradients get from the result of an integration to what it depends on.

    Attributes:
        calls: evaluations of the field in backward passes since the last solve.
        differentiates_trace: True if the recorded error and stiffness of steps carry gradients.
    """

    calls: int = 0
    differentiates_trace: ClassVar[bool] = True

    @abstractmethod
    def solve(self, problem: Problem, controller: Controller) -> Solution:
        """The solution of a problem, with gradients."""


@register(Gradient, "backprop")
class Backprop(Gradient):
    """Backpropagation through every accepted step (discretise, then optimise): exact for the steps taken.

    Memory grows with the number of steps. The lengths of adaptive steps count as constants.
    """

    def solve(self, problem: Problem, controller: Controller) -> Solution:
        return problem.solver.solve(problem, controller)


@kind
class Termination(ABC):
    """Ends the integration of a row before its last time.

    It stops where `reached` first holds at the end of a step; `locate` then says where within the step.
    """

    @abstractmethod
    def reached(self, problem: Problem, field: Any, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor:
        """[B] bool: whether a row is to stop within the step from (t, x) to (s, step.x)."""

    def locate(
        self, problem: Problem, field: Any, t: Tensor, s: Tensor, x: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """[B] times and [B, *shape] states where rows that are to stop do so; by default the end of the step."""
        return s.expand(len(x)), step.x


@register(Controller, "fixed")
class Fixed(Controller):
    """The steps are the given grid, the same for every row, or each row's own.

    Args:
        steps: equal steps that every interval of the grid is divided into.
    Raises:
        ValueError: if there is not at least one.
    """

    def __init__(self, steps: int = 1) -> None:
        if steps < 1:
            raise ValueError(f"fixed: steps must be at least 1, found {steps}.")
        self.steps = steps

    def solve(self, problem: Problem) -> Solution:
        solver = problem.solver.along(self.steps * (len(problem.times) - 1))
        return March(problem._replace(solver=solver), self.steps).solve()

    def grid(self, times: Tensor) -> Tensor:
        """[steps (L - 1) + 1, …] the times with the ends of the steps between them."""
        return divide(times, self.steps)


def integrate(
    field: Any,
    x: Tensor,
    times: Tensor,
    *,
    solver: Solver,
    controller: Controller = Fixed(),
    gradient: Gradient = Backprop(),
    noise: Any = None,
    save: Literal["last", "all", "dense"] = "last",
    stop: Termination | None = None,
    record: Record | None = None,
    max_steps: int = 10_000,
    on_failure: Literal["raise", "return"] = "raise",
    seminorm: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Solve dx/dt = field(t, x) (or what else the solver steps) from times[0] to times[-1].

    Row i of the result depends on row i of x alone, unless the controller's norm is over the batch.

    Args:
        field: what `solver.needs`; a `RowField` lets step control stop evaluating rows that are done.
        x: [B, *shape] state at times[0]; its dtype is kept.
        times: [L] real, strictly increasing, or strictly decreasing to run backwards; or [L, B], where every row has
            times of its own, which may repeat (padding: such an interval is passed over). Under `Fixed` each interval
            is divided into steps, and the field gets t of the shape [] of shared times, or [B]; under step control
            steps land on the times, and t has shape [B].
        gradient: how gradients are taken.
        noise: a `Brownian` path, for SDEs.
        save: "all" keeps the states at every time, "dense" lets `Solution.dense` be asked for any time.
        stop: ends rows before their last time.
        record: what to keep of the accepted steps.
        max_steps: most steps of a row, rejected ones included.
        on_failure: raise a SolverError, or return the last finite state.
        seminorm: the part [B, *] of a state-like [B, *shape] that error norms see, None for all of it; accumulated
            integrals, on which nothing else depends, may be left out.
    Raises:
        ValueError: if times or x cannot be integrated over, max_steps is below 1, or picks do not fit the rows.
        ConfigError: if the solver needs another field, or step control an error estimate that it does not have.
        SolverError: if a row does not reach the last time.
    """
    _check_arguments(x, times, save, on_failure)
    _check_limits(max_steps, record, len(x))
    _check_field(solver, field)
    controller.check(solver)
    direction, span = _check_times(times, len(x))
    problem = Problem(
        field,
        x,
        times.to(x.device, torch.float64),
        direction,
        span,
        solver,
        noise,
        save == "all",
        save == "dense",
        stop,
        record,
        max_steps,
        on_failure == "raise",
        seminorm or _whole,
    )
    solution = gradient.solve(problem, controller)
    if problem.stop_at_failure and solution.result != Result.success:
        raise SolverError(solution, lambda row: _strain(solution, solver, row))
    return solution


def _strain(solution: Solution, solver: Solver, row: int) -> str:
    """What the stiffness estimate of a row that failed for want of steps says, and what to try without one."""
    stable = [name for name in names(Solver) if (m := member(Solver, name, "solver")).implicit and m.adaptive]
    if solution.strain is None or solver.stability is None:
        unknown = solution.result == Result.step_underflow and solver.needs is VectorField and not solver.implicit
        return (
            f"If the field is stiff, an implicit solver ({', '.join(stable)}) takes longer steps. " if unknown else ""
        )
    h, s = (float(each[row]) for each in solution.strain)
    return (
        f"Its last attempt had h = {h:.3g} and a stiffness estimate S = {s:.3g}, so h S = {h * s:.3g} against the "
        f"{solver.stability:.3g} up to which '{title(solver)}' is stable; where they are near, the field is stiff, and "
        f"an implicit solver ({', '.join(stable)}) takes longer steps. "
    )


def hermite(x: Tensor, new: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[4, B, *shape] coefficients of the cubic from x to new with the derivatives a and b in θ at its ends."""
    rise = new - x
    return torch.stack((x, a, 3 * rise - 2 * a - b, a + b - 2 * rise))


def title(component: Solver | Controller) -> str:
    """The registered name of a component, or that of its class."""
    return getattr(component, "registered_name", type(component).__name__)


def _whole(y: Tensor) -> Tensor:
    return y


def _check_arguments(x: Tensor, times: Tensor, save: str, on_failure: str) -> None:
    for name, value in (("x", x), ("times", times)):
        if not isinstance(value, Tensor):
            raise ValueError(f"integrate: {name} must be a tensor, found {type(value).__name__}. Use torch.tensor.")
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"integrate: x must be [B, *shape] of floating point, found {x.dtype} {list(x.shape)}.")
    if save not in ("last", "all", "dense") or on_failure not in ("raise", "return"):
        raise ValueError(
            "integrate: save is 'last', 'all' or 'dense' and on_failure 'raise' or 'return', found "
            f"{save!r} and {on_failure!r}."
        )


def _check_limits(max_steps: int, record: Record | None, rows: int) -> None:
    if max_steps < 1:
        raise ValueError(f"integrate: max_steps must be at least 1, found {max_steps}.")
    picks = None if record is None else record.picks
    if picks is not None and (picks.ndim != 2 or picks.shape[1] != rows):
        raise ValueError(f"integrate: record.picks must be [P, {rows}] for {rows} rows, found {list(picks.shape)}.")


def _check_field(solver: Solver, field: Any) -> None:
    if solver.serves(field):
        return
    usable = [name for name in names(Solver) if member(Solver, name, "solver").serves(field)]
    kind = f" with {field.noise_type} noise and {field.calculus} calculus" if isinstance(field, SDE) else ""
    raise ConfigError(
        f"integrate: solver '{title(solver)}' needs {solver.wanted()}, which {type(field).__name__}{kind} is not. "
        f"Use one of: {', '.join(usable) or 'none is registered for this field'}."
    )


def _check_times(times: Tensor, rows: int) -> tuple[int, float]:
    """The direction of a grid and the length of its longest row."""
    values = times.detach().to("cpu", torch.float64)
    shaped = values.ndim == 1 or (values.ndim == 2 and values.shape[1] == rows)
    if not shaped or len(values) < 2 or times.is_complex() or not values.isfinite().all():
        found = values.tolist() if values.numel() <= 20 else f"shape {list(values.shape)}"
        raise ValueError(
            f"integrate: times must be [L] or [L, {rows}] finite numbers, L at least 2, for {rows} rows; found {found}."
        )
    table = values[:, None] if values.ndim == 1 else values
    ways = table[-1] - table[0]
    direction = -1 if bool((ways < 0).any()) else 1
    gaps = direction * table.diff(dim=0)
    wrong = ((gaps <= 0) if values.ndim == 1 else (gaps < 0)).nonzero()
    if len(wrong):
        i, row = wrong[0].tolist()
        place = f"{i}" if values.ndim == 1 else f"{i}, {row}"
        after = f"{i + 1}" if values.ndim == 1 else f"{i + 1}, {row}"
        how = "strictly increase, or strictly decrease" if values.ndim == 1 else "increase in every row, or decrease"
        raise ValueError(
            f"integrate: times must {how} to run backwards, found "
            f"times[{place}] = {float(table[i, row])!r} and times[{after}] = {float(table[i + 1, row])!r} on the way "
            f"from {float(table[0, row])!r} to {float(table[-1, row])!r}."
        )
    return direction, float(ways.abs().max()) if table.numel() else 0.0
