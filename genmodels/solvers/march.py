"""Steps along a given grid, of all rows together."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..types import expand_like
from .fields import Counted, narrow
from .norms import finite_rows
from .recording import Recorder
from .solution import Result, Solution, worst


class March:
    """The integration of a problem (see `integrate`) along its times, each interval divided into equal steps.

    Rows that fail, or are to stop, are frozen where they are.
    """

    def __init__(self, problem: Any, divided: int) -> None:
        self.problem, self.divided, self.x = problem, divided, problem.x
        self.grid = divide(problem.times, divided)
        self.field, self.recorder = Counted(problem.field, problem.solver.counts), Recorder(problem, None)
        self.index = torch.arange(len(self.x), device=self.x.device)
        self.steps = self.passed = torch.zeros_like(self.index)  # of length above 0; all of them
        self.alive = torch.ones_like(self.index, dtype=torch.bool)
        self.failed = self.stopped = self.within = ~self.alive
        self.whole = self.x.device.type == "cpu"  # no row has failed or stopped, as far as was asked
        self.time = self.grid[0].detach().expand(len(self.x))

    def solve(self) -> Solution:
        problem, x = self.problem, self.x
        allowed = self.grid[: problem.max_steps + 1] if len(x) else self.grid[:1]  # an empty batch costs nothing
        state = problem.solver.start(self.field, allowed[0], x) if len(x) else ()
        path, calls = [x], [self.field.calls]
        for number, (t, s) in enumerate(pairwise(allowed.unbind())):
            state = self.advance(t, s, state)
            calls.append(self.field.calls)
            path += [self.x] if problem.keep_path and (number + 1) % self.divided == 0 else []
        complete = len(allowed) == len(self.grid) or not len(x)
        status = torch.where(self.alive & (not complete), Result.max_steps_reached, Result.success)
        status = torch.where(self.failed, Result.non_finite, status)
        reached = (self.passed - self.within.long()) // self.divided
        return Solution(
            x=self.x,
            path=_masked(path, reached, len(problem.times)) if problem.keep_path else None,
            nfe=torch.tensor(calls, device=x.device)[self.passed + self.failed],  # a step that failed was evaluated too
            steps=self.steps,
            rejected=torch.zeros_like(self.steps),
            result=worst(status),
            time=self.time,
            status=status,
            trace=self.recorder.trace(),
            picked=self.recorder.picked(),
            dense=self.recorder.interpolation(None if problem.stop is None else self.time),
            stopped=None if problem.stop is None else self.stopped,
        )

    def advance(self, t: Tensor, s: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step of all rows that are alive; the solver's memory after it."""
        problem, x = self.problem, self.x
        taken = problem.solver.step(self.field, t, s, x, state, problem.noise)
        if self._uneventful(taken.x):
            self.x, self.time = taken.x, s.detach().expand(len(x))
            self.passed, self.steps = self.passed + 1, self.steps + (s != t)
            return taken.state
        alive = self.alive & finite_rows(taken.x)
        self.failed, moves = self.failed | (self.alive & ~alive), alive & (s != t)  # length 0 is padding
        new, end = taken.x, s.detach().expand(len(x))
        if problem.stop is not None:
            new, end = self._halt(t, s, taken, moves, end)
        if self.recorder.active:
            self._record(t, s, taken, moves)
        # where asking costs no wait for a device, rows are frozen only if there is one
        intact = x.device.type == "cpu" and bool(alive.all())
        self.x = new if intact else torch.where(expand_like(alive, x), new, x)
        self.time = torch.where(alive, end, self.time)
        self.passed, self.steps = self.passed + alive, self.steps + moves
        self.alive, self.whole = alive & ~self.stopped, self.whole and intact and problem.stop is None
        return taken.state

    def _uneventful(self, new: Tensor) -> bool:
        """Whether every row just goes on, where asking costs no wait for a device."""
        if not self.whole or self.problem.stop is not None or self.recorder.active:
            return False
        return math.isfinite(float(new.detach().sum(dtype=torch.float64)))

    def _halt(self, t: Tensor, s: Tensor, taken: Any, moves: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """States and times at the end of the step, or where rows stop within it."""
        problem, x = self.problem, self.x
        ends = moves & problem.stop.reached(problem, self.field, t, s, x, taken)
        if not bool(ends.any()):
            return taken.x, end
        where, there = problem.stop.locate(problem, self.field, t, s, x, taken)
        self.stopped, self.within = self.stopped | ends, self.within | (ends & (where != s))
        return torch.where(expand_like(ends, x), there, taken.x), torch.where(ends, where.detach(), end)

    def _record(self, t: Tensor, s: Tensor, taken: Any, rows: Tensor) -> None:
        n = len(self.x)
        final = (s == self.grid[-1]).expand(n) | self.stopped
        given = (self.index, self.steps, final, t.expand(n), s.expand(n), self.x, taken)
        if not bool(rows.all()):
            given = narrow(given, rows.nonzero()[:, 0])
        self.recorder.add(*given, None, self.field)


def divide(times: Tensor, steps: int) -> Tensor:
    """[steps (L - 1) + 1, …] the times [L, …] with the ends of the steps between them."""
    if steps == 1:
        return times
    parts = [torch.lerp(times[:-1], times[1:], k / steps) for k in range(steps)]
    return torch.cat((torch.stack(parts, 1).flatten(0, 1), times[-1:]))


def _masked(path: list[Tensor], reached: Tensor, length: int) -> Tensor:
    """The states [*, B, *shape] as [length, B, *shape], nan after the last time that a row reached."""
    states = torch.stack(path)
    missing = states.new_full((length - len(states), *states.shape[1:]), torch.nan)
    there = torch.arange(length, device=states.device)[:, None] <= reached
    return torch.where(expand_like(there, states), torch.cat((states, missing)), torch.nan)
