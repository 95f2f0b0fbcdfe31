"""Gradients from the adjoint equation (optimise, then discretise): nothing of the steps is kept."""

import copy
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..registry import ConfigError, register
from ..types import expand_like
from .base import Controller, Gradient, Problem, Solver, Termination, integrate, title
from .fields import SDE, Counted
from .gradients import Isolated, Refused
from .norms import reached, rms
from .solution import Dense, Solution, SolverError

TRACELESS = (
    "gradient '{}' does not differentiate {}: it knows the solution, not the steps. Regularisers of the solver's own "
    "error and stiffness over a whole solve need gradient backprop or checkpoint; local ones work with any."
)


class Continuous(Gradient):
    """Solves da/dt = -aᵀ ∂f/∂x from the last time to the first, where a = ∂L/∂x(t); dL/dθ = ∫ aᵀ ∂f/∂θ dt.

    a jumps by the gradient of each state of the path as its time is passed. The batch shares one clock in the backward
    solve, on which a step is as long as its hardest row allows: E is the largest root mean square of a row's x and a.
    Hence ∂L/∂θ, a sum over rows, is one more component of the solve and has the solver's order. As the equation is
    linear in a, it is solved for a of size 1: tolerances mean the same for a loss of any scale.

    Agrees with backpropagation up to the errors of both solves; lengths of steps do not matter to it, so the times have
    gradients under step control too. A row that was stopped, or failed, starts back from where it ended.
    """

    differentiates_trace: ClassVar[bool] = False
    registered_name: str

    def __init__(
        self, seminorm: bool = True, controller: Controller | None = None, solver: Solver | None = None
    ) -> None:
        self.seminorm, self.controller, self.solver = seminorm, controller, solver

    def solve(self, problem: Problem, controller: Controller) -> Solution:
        self.calls = 0
        if not torch.is_grad_enabled():
            return problem.solver.solve(problem, controller)
        self._check(problem)
        isolated = Isolated(problem.field, self.registered_name)
        wanted = (problem.x, problem.times, *isolated.tensors)
        if not any(v.requires_grad for v in wanted):
            return problem.solver.solve(problem, controller)
        run = Run(self, problem, controller, isolated)
        x, path = _Solved.apply(run, *wanted)
        return replace(run.solution, x=x, path=path, **self._without_gradient(run.solution, x))

    def _check(self, problem: Problem) -> None:
        name = self.registered_name
        if problem.solver.needs is SDE or problem.noise is not None:
            raise ConfigError(
                f"gradient '{name}' solves an ordinary differential equation backwards, but solver "
                f"'{title(problem.solver)}' steps a stochastic one. Use gradient: checkpoint, or backprop."
            )
        stop = problem.stop
        if stop is not None and type(stop).locate is not Termination.locate:
            raise ConfigError(
                f"gradient '{name}': the time at which {type(stop).__name__} ends a row moves with the state, which "
                "the adjoint equation does not know. Use gradient: checkpoint, or backprop."
            )

    def _without_gradient(self, solution: Solution, x: Tensor) -> dict[str, Any]:
        """What is known of the steps, with a message for whoever wants its gradients."""
        out: dict[str, Any] = {}
        refuse = lambda what, v: v if v is None else Refused.apply(TRACELESS.format(self.registered_name, what), x, v)  # noqa: E731
        trace, dense = solution.trace, solution.dense
        if trace is not None:
            steps = "the trace of the steps"
            out["trace"] = trace._replace(error=refuse(steps, trace.error), stiffness=refuse(steps, trace.stiffness))
        if dense is not None:
            out["dense"] = Dense(dense.t, refuse("dense output", dense.coefficients))
        return out

    def forward(self, problem: Problem, controller: Controller) -> tuple[Solution, Dense | None]:
        """The solution, and where the backward solve finds the states; None if it solves for them."""
        return problem.solver.solve(problem, controller), None


@register(Gradient, "adjoint")
class Adjoint(Continuous):
    """The adjoint equation, with x solved backwards beside it: memory does not grow with the number of steps.

    Args:
        seminorm: whether step control looks at x and a alone, not at integrals for parameters, on which nothing else
            depends; without it backward solves take many more steps.
        controller: of the backward solve, None for that of the forward one.
        solver: of the backward solve, None for that of the forward one.
    Raises:
        ConfigError: in `integrate`, if the field does not tell what it depends on, or would answer otherwise again; for
            stochastic equations and events.
    Source: Chen et al. 2018 (Neural ODE), section 2; Kidger et al. 2021 (Hey, that's not an ODE), section 3.
    """


@register(Gradient, "interpolated")
class Interpolated(Continuous):
    """The adjoint equation along the dense output of the forward solve, so that nothing is solved backwards but a.

    It is right where x cannot be found again backwards (strong contraction). Memory grows with the number of steps,
    by a polynomial for each, but not with the size of the field's graph.

    Args:
        seminorm: as in `adjoint`.
        controller: of the backward solve, None for that of the forward one.
        solver: of the backward solve, None for that of the forward one.
    Raises:
        ConfigError: as in `adjoint`.
    Source: Ma et al. 2021 (A Comparison of Automatic Differentiation and Continuous Sensitivity Analysis), section II;
        Kidger et al. 2021 (Hey, that's not an ODE), section 3.
    """

    def forward(self, problem: Problem, controller: Controller) -> tuple[Solution, Dense | None]:
        solution = problem.solver.solve(problem._replace(keep_dense=True), controller)
        if solution.dense is None:
            raise ConfigError(
                f"gradient 'interpolated' needs dense output, which solver '{title(problem.solver)}' does not give. "
                "Use gradient: adjoint, or backprop."
            )
        kept = solution.dense
        return (solution if problem.keep_dense else replace(solution, dense=None)), kept


class Run:
    """One forward solve, and what its backward pass needs besides tensors."""

    def __init__(self, gradient: Continuous, problem: Problem, controller: Controller, isolated: Isolated) -> None:
        self.gradient, self.problem, self.isolated = gradient, problem, isolated
        self.controller, self.solution = controller, None

    def forward(self, x: Tensor, times: Tensor) -> tuple[Tensor, ...]:
        plain = self.problem._replace(x=x.detach(), times=times.detach())
        self.solution, dense = self.gradient.forward(plain, self.controller)
        return () if dense is None else (dense.t, dense.coefficients)


class _Solved(torch.autograd.Function):
    """x and path of a run, as functions of x, times and the field's tensors."""

    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor, times: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        dense = run.forward(x, times)
        end, path = run.solution.x.clone(), run.solution.path
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(end, path, times, run.solution.time, *dense)
        return end, path

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, end: Tensor | None, path: Tensor | None) -> tuple[Tensor | None, ...]:
        x, states, times, time, *dense = ctx.saved_tensors
        sweep = Sweep(ctx.run, x, states, times, time, Dense(*dense) if dense else None, ctx.needs_input_grad[2])
        return (None, *sweep.gradients(end, path))


class Track:
    """Where dense output says that the rows were."""

    def __init__(self, dense: Dense, direction: int) -> None:
        self.dense, self.sign = dense, direction
        # with one clock for all rows a step is looked up once
        shared = len(dense.t) > 1 and dense.t.shape[1] > 0 and bool((dense.t == dense.t[:, :1]).all())
        self.knots = (direction * dense.t[:, 0]).tolist() if shared else None

    def __call__(self, t: Tensor) -> Tensor:
        """[B, *shape] at t, [] or [B]."""
        if self.knots is None or t.ndim:
            return self.dense(t[None])[0]
        now = self.sign * float(t)
        place = min(max(bisect_right(self.knots, now) - 1, 0), len(self.knots) - 2)
        start, end = self.knots[place : place + 2]
        theta = min(max((now - start) / (end - start), 0.0), 1.0) if end > start else 0.0
        parts = self.dense.coefficients[place]
        total = parts[-1]
        for k in range(len(parts) - 2, -1, -1):
            total = torch.add(parts[k], total, alpha=theta)
        return total


class Sweep:
    """The adjoint equation solved from the last time to the first."""

    def __init__(
        self, run: Run, x: Tensor, states: Tensor | None, times: Tensor, time: Tensor, dense: Dense | None, timed: bool
    ) -> None:
        gradient, problem = run.gradient, run.problem
        self.run, self.x, self.states, self.timed = run, x, states, timed
        sign = problem.direction
        self.leaves, self.track = run.isolated.leaves, dense and Track(dense, sign)
        wide = times if times.ndim == 2 else times[:, None]
        self.whole = sign * time >= sign * wide[-1]  # [B] rows that got to their last time
        self.shared = times.ndim == 1 and bool(self.whole.all())
        # a row that ended early stays where it ended
        self.times = times if self.shared else sign * torch.minimum(sign * wide, sign * time)
        self.field = Counted(run.isolated.field, problem.solver.counts)
        self.solver = gradient.solver or problem.solver
        self.controller = copy.copy(gradient.controller or run.controller)
        if getattr(self.controller, "norm", None) == "row":
            self.controller.norm = "batch"  # there is one clock, and the fast loop has it

    def gradients(self, end: Tensor | None, path: Tensor | None) -> tuple[Tensor | None, ...]:
        """Those of x, times and the field's tensors, from those of the last state and the path."""
        of_times = torch.zeros_like(self.run.problem.times)
        x, last = self.x, len(self.times) - 1
        a = torch.zeros_like(x) if end is None else end
        there = None if self.states is None else reached(self.states)
        sums: list[Tensor] = [torch.zeros_like(v) for v in self.leaves]
        while last > 0 and len(x):
            jump = None if path is None else torch.where(expand_like(there[last], x), path[last], 0.0)
            moved = jump if last < len(self.times) - 1 or end is None else a if jump is None else a + jump
            a = a if jump is None else a + jump
            if self.timed and moved is not None:
                self._add_time(of_times, last, x, moved)
            stop = 0 if self.shared and path is None else last - 1
            x, a, more = self._solve(x, a, last, stop)
            sums = [old + new for old, new in zip(sums, more, strict=True)]
            last = stop
            if self.states is not None:  # the forward solve's own states stand in the way of drift
                x = torch.where(expand_like(there[last], x), self.states[last], x)
        if self.timed and len(x):
            self._add_time(of_times, 0, x, -a)
        if path is not None:
            a = a + path[0]
        self.run.gradient.calls += self.field.calls
        return (a, of_times if self.timed else None, *sums)

    def _add_time(self, of_times: Tensor, place: int, x: Tensor, a: Tensor) -> None:
        """dL/dt = aᵀ f(t, x), for rows that got to their last time."""
        with torch.no_grad():
            v = self.field(self.times[place], x)
        rows = torch.where(self.whole, (a * v).flatten(1).sum(1, dtype=torch.float64), 0.0)
        of_times[place] += rows if of_times.ndim == 2 else rows.sum()

    def _solve(self, x: Tensor, a: Tensor, last: int, stop: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """x and a at times[stop] from those at times[last], and the integrals for the leaves."""
        start, goal = self.times[last], self.times[stop]
        size = float(rms(a).max())
        longest = float((goal - start).abs().max())
        if not longest or not size:
            return x, a, [torch.zeros_like(v) for v in self.leaves]
        solved = [a / size, *(torch.zeros_like(v) for v in self.leaves)]
        packed = Packed(solved if self.track else [x, *solved])
        equation = _Equation(self, packed, start, goal, longest)
        grid = self.times[stop : last + 1].flip(0) if self.shared else start.new_tensor([0.0, longest])
        problem, kind = self.run.problem, self.run.gradient
        try:
            y = integrate(
                equation,
                packed.join([*([] if self.track else [x]), *solved]),
                grid,
                solver=self.solver,
                controller=self.controller,
                max_steps=problem.max_steps,
                seminorm=packed.measured(problem.seminorm, 1 if self.track else 2, kind.seminorm),
            ).x
        except SolverError as error:
            error.add_note(f"This was the backward solve of gradient '{kind.registered_name}'.")
            raise
        parts = packed.split(y)
        x = self.track(self.times[stop]) if self.track else parts.pop(0)
        return x, parts[0] * size, [part * size for part in parts[1:]]


class Packed:
    """Tensors of any shapes as one row [1, n], which has one clock."""

    def __init__(self, parts: list[Tensor]) -> None:
        self.shapes = [part.shape for part in parts]
        self.sizes = [part.numel() for part in parts]
        self.dtypes = [part.dtype for part in parts]
        self.dtype = max(self.dtypes, key=lambda d: torch.finfo(d).bits)

    def join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1).to(self.dtype) for part in parts])[None]

    def split(self, y: Tensor) -> list[Tensor]:
        parts = zip(y[0].split(self.sizes), self.shapes, self.dtypes, strict=True)
        return [part.reshape(shape).to(dtype) for part, shape, dtype in parts]

    def measured(self, seminorm: Callable[[Tensor], Tensor], states: int, partial: bool) -> Callable[[Tensor], Tensor]:
        """The part of a scaled error that E is the size of: the largest root mean square of a row of the states.

        Args:
            seminorm: what of a state counts.
            states: how many of the tensors have the state's shape; the others are integrals.
            partial: whether the integrals do not count.
        """

        def measure(error: Tensor) -> Tensor:
            parts = [part.reshape(shape) for part, shape in zip(error[0].split(self.sizes), self.shapes, strict=True)]
            sizes = [rms(seminorm(part)).max() for part in parts[:states]]
            if not partial:
                sizes += [rms(part.reshape(1, -1))[0] for part in parts[states:] if part.numel()]
            return torch.stack(sizes).max().reshape(1, 1)

        return measure


class _Equation:
    """d(x, a, integrals)/dτ on one clock τ: the time itself where it is shared, or else how far back a row is.

    A row of its own times goes from start to goal while τ goes from 0 to the longest such way.
    """

    def __init__(self, sweep: Sweep, packed: Packed, start: Tensor, goal: Tensor, longest: float) -> None:
        self.sweep, self.packed, self.start = sweep, packed, start
        self.rate = None if sweep.shared else (goal - start) / longest

    def __call__(self, clock: Tensor, y: Tensor) -> Tensor:
        sweep, parts = self.sweep, self.packed.split(y)
        clock = clock.reshape(())
        t = clock if self.rate is None else self.start + self.rate * clock
        x = sweep.track(t) if sweep.track else parts.pop(0)
        a = parts[0] if self.rate is None else parts[0] * expand_like(self.rate, x).to(x.dtype)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = sweep.field(t, x)
            inputs = (x, *sweep.leaves)
            if v.requires_grad:
                products = torch.autograd.grad(v, inputs, a.to(v.dtype), allow_unused=True, materialize_grads=True)
            else:
                products = tuple(torch.zeros_like(each) for each in inputs)
        v = v.detach() if self.rate is None else v.detach() * expand_like(self.rate, x).to(x.dtype)
        return self.packed.join([*([] if sweep.track else [v]), *(-product for product in products)])
