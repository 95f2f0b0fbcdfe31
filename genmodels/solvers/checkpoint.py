"""Gradients of the steps taken from a few states along the way, between which steps are taken again."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..registry import ConfigError, register
from ..types import expand_like
from .base import Controller, Fixed, Gradient, Problem, Solver, State, Step, title
from .fields import Counted
from .gradients import Isolated, Refused
from .norms import reached
from .recording import Recorder
from .solution import Solution


@register(Gradient, "checkpoint")
class Checkpoint(Gradient):
    """Backpropagation through the steps taken, of which only some are kept: the gradients of `backprop`, to rounding.

    The forward solve keeps no graph, but states from which it can be resumed; the backward pass takes the accepted
    steps between two of them again, and backpropagates through these. As the number N of steps is not known before, it
    keeps every step, then every second, every fourth …: two to three √N states, as a state is small beside what a step
    keeps for its graph. Memory is O(√N), for about one solve more (rejected steps are not repeated). Two times for each
    step are kept as well.

    Args:
        segments: how many states to keep at most, None for O(√N).
    Raises:
        ValueError: if it is not at least one.
        ConfigError: in `integrate`, if the field does not tell what it depends on, or would answer otherwise again.
    Source: Griewank 1992 (Achieving logarithmic growth of temporal and spatial complexity), with one level; Chen et al.
        2016 (Training deep nets with sublinear memory cost).
    """

    def __init__(self, segments: int | None = None) -> None:
        if segments is not None and segments < 1:
            raise ValueError(f"checkpoint: segments must be at least 1, or null, found {segments}.")
        self.segments = segments

    def solve(self, problem: Problem, controller: Controller) -> Solution:
        self.calls = 0
        if not torch.is_grad_enabled():
            return problem.solver.solve(problem, controller)
        if problem.solver.whole:
            raise ConfigError(
                f"gradient 'checkpoint' takes steps of a solver again, but '{title(problem.solver)}' integrates as a "
                "whole. Use gradient: backprop."
            )
        isolated = Isolated(problem.field, "checkpoint")
        wanted = (problem.x, problem.times, *isolated.tensors)
        if not any(v.requires_grad for v in wanted):
            return problem.solver.solve(problem, controller)
        run = _Run(self, problem, controller, isolated)
        x, path, error, stiffness = _Replayed.apply(run, *wanted)
        solution = replace(run.solution, x=x, path=path)
        if solution.trace is not None:
            solution = replace(solution, trace=solution.trace._replace(error=error, stiffness=stiffness))
        if solution.dense is not None:
            refusal = "gradient 'checkpoint' has no gradients of dense output. Use gradient: backprop, or save='all'."
            parts = Refused.apply(refusal, x, solution.dense.coefficients)
            solution = replace(solution, dense=replace(solution.dense, coefficients=parts))
        return solution


class _Start(NamedTuple):
    """Where some rows can be resumed: how many steps they have taken, their states, and the solver's memory."""

    index: Tensor
    number: Tensor
    x: Tensor
    memory: State


class _Watch(Solver):
    """A solver that notes the times of its steps, and now and then what they start from.

    What it must know of rows (which they are, how many steps they have taken) travels in the solver's memory, so that
    any controller carries it along: dropped with rows, and not advanced by rejected steps.

    Args:
        solver: what steps.
        limit: most states to keep, None for two to three times the square root of the number of steps.
    Attributes:
        shared: whether all rows have one time.
        starts: every `stride`-th attempt.
        log: (rows, their number of steps before, t, s) of every attempt; of the first row alone where time is shared.
    """

    order = math.nan
    stages = 0

    def __init__(self, solver: Solver, limit: int | None) -> None:
        self.solver, self.limit = solver, limit
        for each in ("order", "stages", "needs", "counts", "adaptive", "stability"):
            setattr(self, each, getattr(solver, each))
        self.shared, self.stride, self.attempts = False, 1, 0
        self.starts: list[_Start] = []
        self.log: list[tuple[Tensor, ...]] = []

    @property
    def error_order(self) -> float:
        return self.solver.error_order

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["solver"], name)

    def start(self, field: Any, t: Tensor, x: Tensor) -> State:
        self.shared = t.ndim == 0
        index = torch.arange(len(x), device=x.device)
        return (index, torch.zeros_like(index), *self.solver.start(field, t, x))

    def step(self, field: Any, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        index, number, *memory = state
        if self.attempts % self.stride == 0:
            self.starts.append(_Start(index, number, x, tuple(memory)))
            if len(self.starts) > (self.limit or 8 * self.stride):
                self.starts, self.stride = self.starts[::2], 2 * self.stride
        self.attempts += 1
        self.log.append((index[:1] * 0, number[:1].clone(), t[None], s[None]) if self.shared else (index, number, t, s))
        step = self.solver.step(field, t, s, x, tuple(memory), noise)
        return step._replace(state=(index, number + 1, *step.state))

    def velocity(self, field: Any, t: Tensor, x: Tensor) -> Tensor:
        return self.solver.velocity(field, t, x)

    def slope(self, field: Any, t: Tensor, x: Tensor, state: State) -> Tensor:
        return self.solver.slope(field, t, x, state[2:])

    def stiffness(self, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor | None:
        return self.solver.stiffness(t, s, x, step._replace(state=step.state[2:]))

    def interpolant(self, field: Any, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor:
        return self.solver.interpolant(field, t, s, x, step._replace(state=step.state[2:]))

    def within(self, rtol: float, atol: float) -> "_Watch":
        self.solver = self.solver.within(rtol, atol)
        return self

    def times(self) -> tuple[Tensor, Tensor]:
        """[N, B] the starts and the ends of accepted steps; [N, 1] where time is shared."""
        rows = 1 if self.shared else len(self.starts[0].index)
        index, number, t, s = (torch.cat([entry[k].detach() for entry in self.log]) for k in range(4))
        count = int(number.max()) + 1
        place, order = (number * rows + index).flip(0), torch.arange(len(number), device=number.device)
        # attempts come in order, and the last one with its number is the one that was accepted
        last = torch.zeros(count * rows, dtype=torch.int64, device=number.device)
        last = last.scatter_reduce(0, place, order.flip(0), "amax")
        return t[last].reshape(count, rows), s[last].reshape(count, rows)


class _Run:
    """One forward solve, and what its backward pass needs besides tensors.

    Attributes:
        shared: whether all rows have one time.
        widths: how many tensors each start has.
    """

    def __init__(self, gradient: Checkpoint, problem: Problem, controller: Controller, isolated: Isolated) -> None:
        self.gradient, self.problem, self.controller, self.isolated = gradient, problem, controller, isolated
        self.solution: Any = None
        self.shared, self.widths = False, []

    def forward(self, x: Tensor, times: Tensor) -> tuple[Tensor, ...]:
        """What must be kept: starts and ends of steps [N, B], or [N, 1] if shared; how many a row took [B]; and states.

        An interval of length 0 of a fixed grid is a step here too.
        """
        watch = _Watch(self.problem.solver, self.gradient.segments)
        plain = self.problem._replace(x=x.detach(), times=times.detach(), solver=watch)
        self.solution = self.controller.solve(plain)
        self.shared = watch.shared
        self.problem = self.problem._replace(solver=watch.solver)  # as step control told it to solve its equations
        if not watch.log:
            return ()
        starts, ends = watch.times()
        taken = self.solution.steps
        if isinstance(self.controller, Fixed):
            sign, whole = self.problem.direction, self.solution.time == times[-1]
            taken = (sign * torch.cat((starts[:1], ends)) < sign * self.solution.time).sum(0)
            taken = torch.where(whole, len(ends), taken)
        flat = [(start.index, start.number, start.x, *start.memory) for start in watch.starts[1:]]
        self.widths = [len(each) for each in flat]
        return (starts, ends, taken, *(v for each in flat for v in each))


class _Replayed(torch.autograd.Function):
    """x, path and the trace's error and stiffness of a run, as functions of x, times and the field's tensors."""

    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, times: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        kept = run.forward(x, times)
        path, trace = run.solution.path, run.solution.trace
        there = None if path is None else reached(path)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, times, there, *kept)
        return (run.solution.x.clone(), path, trace and trace.error, trace and trace.stiffness)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, times, there, *kept = ctx.saved_tensors
        if kept:
            return (None, *_Replay(ctx.run, x, times, there, kept).gradients(ctx.needs_input_grad[2], *cotangents))
        total = torch.zeros_like(x) if cotangents[0] is None else cotangents[0]
        total = total if cotangents[1] is None else total + cotangents[1].sum(0)
        return (None, total, *(None for _ in ctx.needs_input_grad[2:]))


class _Replay:
    """The steps of a run taken again, segment by segment from the last, with graph."""

    def __init__(self, run: _Run, x: Tensor, times: Tensor, reached: Tensor | None, kept: list[Tensor]) -> None:
        self.run, self.x, self.times, self.reached = run, x, times, reached
        self.starts, self.ends, self.taken, *flat = kept
        index = torch.arange(len(x), device=x.device)
        parts = iter(flat)
        rest = [[next(parts) for _ in range(width)] for width in run.widths]
        self.segments = [_Start(index, index * 0, x, ()), *(_Start(*part[:3], tuple(part[3:])) for part in rest)]
        self.order = ((self.ends != self.starts).cumsum(0) - 1).clamp(min=0)  # a step's place in the trace
        control, problem = run.controller, run.problem
        tolerances = (control.rtol, control.atol) if hasattr(control, "rtol") else None
        self.recorder = Recorder(problem, tolerances, getattr(control, "norm", "row") == "batch")

    def gradients(
        self,
        timed: bool,
        end: Tensor | None,
        path: Tensor | None,
        error: Tensor | None,
        stiffness: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Those of x, times and the field's tensors, from those of the results."""
        self.path, self.error, self.stiffness = path, error, stiffness
        self.timed = timed and isinstance(self.run.controller, Fixed)
        places = None if path is None else self._places()
        total = torch.zeros_like(self.x) if end is None else end.clone()
        memory: list[Tensor] | None = None
        edges = [torch.zeros_like(self.starts), torch.zeros_like(self.ends)]
        sums: list[Tensor | None] = [None] * len(self.run.isolated.leaves)
        limit = self.taken
        for segment in reversed(self.segments):
            grads, of_memory = self._segment(segment, limit[segment.index], total, memory, places)
            total = total.index_copy(0, segment.index, grads[0])
            if memory is None:
                memory = [g.new_zeros(len(self.x), *g.shape[1:]) for g in of_memory]
            memory = [m.index_copy(0, segment.index, g) for m, g in zip(memory, of_memory, strict=False)]
            edges = [e if g is None else e + g for e, g in zip(edges, grads[1:3], strict=True)]
            sums = [_plus(old, new) for old, new in zip(sums, grads[3:], strict=True)]
            limit = limit.index_copy(0, segment.index, torch.minimum(segment.number, self.taken[segment.index]))
        if path is not None:
            total = total + torch.where(expand_like(places == 0, path), path, 0.0).sum(0)
        return (total, self._of_times(edges) if self.timed else None, *sums)

    def _places(self) -> Tensor:
        """[L, B] after how many steps a row reached each time, -1 where it did not."""
        sign, control = self.run.problem.direction, self.run.controller
        if isinstance(control, Fixed):
            place = control.steps * torch.arange(len(self.times), device=self.x.device)[:, None]
            return torch.where(self.reached, torch.minimum(place, self.taken), -1)
        knots = sign * torch.cat((self.starts[:1], self.ends))
        number = torch.arange(len(knots), device=self.x.device)[:, None]
        knots = torch.where(number > self.taken, torch.inf, knots).T.contiguous()
        times = self.times if self.times.ndim == 2 else self.times[:, None]
        wanted = (sign * times).T.expand(len(self.x), -1).contiguous()
        place = torch.searchsorted(knots, wanted).T
        return torch.where(self.reached, torch.minimum(place, self.taken), -1)

    def _segment(
        self, segment: _Start, limit: Tensor, total: Tensor, memory: list[Tensor] | None, places: Tensor | None
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """Gradients of (x, starts, ends, *tensors) and of the memory at the start of a segment."""
        problem, leaves = self.run.problem, self.run.isolated.leaves
        index = segment.index
        with torch.enable_grad():
            self.field, self.noise, self.outputs = *self._narrowed(index), []
            x = segment.x.detach().requires_grad_()
            state = tuple(_leaf(v) for v in segment.memory)
            inputs = [x, *(v for v in state if v.requires_grad)]
            edges = [e.detach().requires_grad_(self.timed) for e in (self.starts, self.ends)]
            if segment is self.segments[0]:
                t = edges[0][0, 0] if self.run.shared else edges[0][0].expand(len(self.x))
                state = problem.solver.start(self.field, t, x)
            end, state = self._steps(segment, limit, edges, x, state, places)
            self._output(end, total[index])
            after = [v for v in state if v.is_floating_point()]
            for value, cotangent in zip(after, memory or [None] * len(after), strict=True):
                self._output(value, None if cotangent is None else cotangent[index])
        self.run.gradient.calls += self.field.calls
        timed = edges if self.timed else []
        values, cotangents = zip(*self.outputs, strict=True)
        found = list(torch.autograd.grad(values, [*inputs, *timed, *leaves], cotangents, allow_unused=True))
        found[: len(inputs)] = [torch.zeros_like(v) if g is None else g for g, v in zip(found, inputs, strict=False)]
        self.outputs = []
        of_times = found[len(inputs) : len(inputs) + 2] if timed else [None, None]
        return [found[0], *of_times, *found[len(found) - len(leaves) :]], found[1 : len(inputs)]

    def _narrowed(self, index: Tensor) -> tuple[Counted, Any]:
        """The field and the noise of some rows."""
        problem, field, noise = self.run.problem, self.run.isolated.field, self.run.problem.noise
        if len(index) < len(self.x):
            field, noise = field.select(index), noise and noise.select(index)
        return Counted(field, problem.solver.counts), noise

    def _steps(
        self,
        segment: _Start,
        limit: Tensor,
        edges: list[Tensor],
        x: Tensor,
        state: State,
        places: Tensor | None,
    ) -> tuple[Tensor, State]:
        """The state and memory after the steps of a segment."""
        problem, index = self.run.problem, segment.index
        before, column = (int(segment.number[0]), index * 0) if self.run.shared else (0, index)
        for k in range(int((limit - segment.number).clamp(min=0).max())):
            n = segment.number + k
            active = n < limit
            # where a row's steps are over, it takes its last one again, in vain
            m = torch.minimum(n, limit - 1).clamp(min=0)
            whole = bool(active.all())
            if self.run.shared and whole:
                t, s = (e[before + k, 0] for e in edges)
            else:
                t, s = (e[m, column] for e in edges)
                s = torch.where(limit > 0, s, t)
            step = problem.solver.step(self.field, t, s, x, state, self.noise)
            new = self._stopped(index, active & (n + 1 == self.taken[index]), t, s, x, step)
            self._heuristics(index, active, m, t, s, x, step)
            x = new if whole else torch.where(expand_like(active, x), new, x)
            state = (
                step.state
                if whole
                else tuple(torch.where(expand_like(active, a), a, b) for a, b in zip(step.state, state, strict=True))
            )
            if places is not None:
                hit = (places[:, index] == n + 1) & active
                landed = hit.any(1).nonzero()[:, 0]
                if len(landed):
                    parts = self.path[landed][:, index]
                    self._output(x, torch.where(expand_like(hit[landed], parts), parts, 0.0).sum(0))
        return x, state

    def _stopped(self, index: Tensor, last: Tensor, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor:
        """The state after a step, for rows that `Problem.stop` ended within it where it did."""
        problem, stopped = self.run.problem, self.run.solution.stopped
        if stopped is None or not bool((last & stopped[index]).any()):
            return step.x
        there = problem.stop.locate(problem, self.field, t, s, x, step)[1]
        return torch.where(expand_like(last & stopped[index], x), there, step.x)

    def _heuristics(
        self, index: Tensor, active: Tensor, m: Tensor, t: Tensor, s: Tensor, x: Tensor, step: Step
    ) -> None:
        if self.error is None and self.stiffness is None:
            return
        column = index * 0 if self.run.shared else index
        place, moves = self.order[m, column], (self.ends != self.starts)[m, column]
        if self.error is not None:
            wanted = torch.where(active & moves, self.error[place, index], 0.0)
            self._output(self.recorder.norm(step.error, x, step.x), wanted)
        if self.stiffness is not None:
            wanted = torch.where(active & moves, self.stiffness[place, index], 0.0)
            self._output(self.run.problem.solver.stiffness(t, s, x, step), wanted)

    def _output(self, value: Tensor, cotangent: Tensor | None) -> None:
        if cotangent is not None and value.requires_grad:
            self.outputs.append((value, cotangent))

    def _of_times(self, edges: list[Tensor]) -> Tensor:
        """Of the times, from those of the starts and ends of the steps that a fixed grid makes of them."""
        with torch.enable_grad():
            times = self.times.detach().requires_grad_()
            grid = self.run.controller.grid(times)
        starts, ends = (e[:, 0] if times.ndim == 1 else e for e in edges)
        total = torch.zeros_like(grid)
        total[: len(starts)] += starts
        total[1 : len(ends) + 1] += ends
        return torch.autograd.grad(grid, times, total)[0]


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value


def _plus(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return old if new is None else new if old is None else old + new
