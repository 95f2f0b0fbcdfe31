"""Step control with a clock for every row. Times, steps and verdicts live on the host, states on their device."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..types import expand_like
from .base import RUNNING, Problem, State, Step
from .fields import Counted, Selectable, narrow
from .recording import Recorder
from .solution import Result, Solution, Strain, worst

Array = np.ndarray
SUCCESS, EXHAUSTED, UNDERFLOW, NON_FINITE = (
    int(Result[name]) for name in ("success", "max_steps_reached", "step_underflow", "non_finite")
)


class Rows(NamedTuple):
    """The rows that still run: [n] each, but for x [n, *shape] and the solver's memory, which are on the device."""

    index: Array  # which row of the batch
    t: Array
    h: Array  # the length of the step that the controller wants
    goal: Array  # the next requested time
    previous: Array  # error norm of the last accepted step
    status: Array
    nfe: Array
    steps: Array
    rejected: Array
    x: Tensor
    state: State

    def take(self, places: Array) -> "Rows":
        """Some of the rows."""
        where = torch.from_numpy(places).to(self.x.device)
        return Rows(*(each[places] for each in self[:9]), self.x[where], narrow(self.state, where))


class Attempt(NamedTuple):
    """A step that was tried: its ends on the device, its length and whether it lands on a requested time, its error
    norm with graph and without, where it is not finite, and which rows are to stop within it."""

    t: Tensor
    s: Tensor
    step: Step
    end: Array
    h: Array
    lands: Array
    error: Tensor
    value: Array
    bad: Array
    stops: Array | None


class Verdict(NamedTuple):
    """What becomes of an attempt, [n] each."""

    counted: Array
    accept: Array
    h: Array
    previous: Array
    status: Array


class Grid(NamedTuple):
    """The requested times [L, B or 1], and the last place of the run of equal times that each place is in."""

    times: Array
    ends: Array | None

    @classmethod
    def of(cls, times: Tensor) -> "Grid":
        values = times.cpu().numpy()
        if values.ndim == 1:
            return cls(values[:, None], None)
        places = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
        last = np.concatenate((values[1:] != values[:-1], np.ones_like(values[:1], dtype=bool)))
        marked = np.where(last, places, len(values))
        return cls(values, np.minimum.accumulate(marked[::-1])[::-1])

    def time(self, place: Array, index: Array) -> Array:
        """[n] the times of rows at places, the last one beyond the end."""
        if self.ends is None and len(self.times) == 2:
            return self.times[1]
        place = np.minimum(place, len(self.times) - 1)
        return self.times[place, 0] if self.ends is None else self.times[place, index]

    def run(self, place: Array, index: Array) -> Array:
        """[n] the last place with the same time."""
        return place if self.ends is None else self.ends[np.minimum(place, len(self.times) - 1), index]


def solve_rows(control: Any, problem: Problem) -> Solution:
    """The loop of a `PI` with norm="row"."""
    loop = _Loop(control, problem)
    rows, noise = loop.begin(), problem.noise
    if loop.grid.ends is not None:
        rows, noise = loop.drop(rows, noise)
    while len(rows.index):
        calls = loop.field.calls
        attempt = loop.attempt(rows, noise)
        verdict = loop.judge(rows, attempt)
        if loop.recorder.active and verdict.accept.any():
            loop.record(rows, attempt, verdict)
        if (verdict.status > 0).any():
            loop.note_strain(rows, attempt, verdict)
        rows = loop.move(rows, attempt, verdict, loop.field.calls - calls)
        rows, noise = loop.drop(rows, noise)
    return loop.collect()


class _Loop:
    """What an integration consists of besides the rows that still run.

    Attributes:
        ended: rows that have left the loop.
        landed: (time, row, state) of the requested times that were reached.
        stopped: rows that were stopped before their last time.
        strains: (row, h, S) of the last attempts of rows that failed.
    """

    def __init__(self, control: Any, problem: Problem) -> None:
        self.control, self.problem, self.grid = control, problem, Grid.of(problem.times.detach())
        self.field = Counted(problem.field, problem.solver.counts)
        self.recorder = Recorder(problem, (control.rtol, control.atol))
        self.power = tuple(e / problem.solver.error_order for e in control.exponents)
        self.longest = control.max_step or problem.span
        self.attempts, self.device = 0, problem.x.device
        self.nothing = torch.zeros((), dtype=torch.float64, device=self.device)
        self.ended: list[Rows] = []
        self.landed: list[tuple[Array, Array, Tensor]] = []
        self.stopped: list[Array] = []
        self.strains: list[tuple[Array, Array, Array]] = []

    def begin(self) -> Rows:
        problem, grid = self.problem, self.grid
        n = len(problem.x)
        index, zero = np.arange(n), np.zeros(n, dtype=np.int64)
        t = grid.times[0] + np.zeros(n)
        state, h = (), t
        if n:
            times = self.to_device(t)
            state = problem.solver.start(self.field, times, problem.x)
            h = self.control.first_steps(problem, self.field, times, problem.x, state).cpu().numpy()
        goal = grid.run(zero, index) + 1
        status = np.where(goal < len(grid.times), RUNNING, SUCCESS)
        self.landed.append((zero, index, problem.x))
        return Rows(index, t, h, goal, np.full(n, 1e-4), status, zero + self.field.calls, zero, zero, problem.x, state)

    def to_device(self, values: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def attempt(self, rows: Rows, noise: Any) -> Attempt:
        problem, goal = self.problem, self.grid.time(rows.goal, rows.index)
        lands = rows.h * (1 + 1e-9) >= abs(goal - rows.t)  # no sliver is left over by rounding
        end = np.where(lands, goal, rows.t + problem.direction * rows.h)
        times = np.empty((2, len(end)))
        times[0], times[1] = rows.t, end
        t, s = self.to_device(times)
        step = problem.solver.step(self.field, t, s, rows.x, rows.state, noise)
        error = self.control.row_norm(problem, step.error, rows.x, step.x)
        value = self.measured(error.detach(), step.x)
        bad = ~np.isfinite(value)
        stops = None
        if problem.stop is not None:
            stops = problem.stop.reached(problem, self.field, t, s, rows.x, step).cpu().numpy()
        return Attempt(t, s, step, end, abs(end - rows.t), lands, error, value, bad, stops)

    def measured(self, error: Tensor, x: Tensor) -> Array:
        """[n] E on the host, not finite where the state is not: the only wait for the device in a step."""
        x = x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None]
        # 0 times what is not finite is nan
        return torch.addcmul(error, x.sum(1, dtype=torch.float64), self.nothing).cpu().numpy()

    def judge(self, rows: Rows, attempt: Attempt) -> Verdict:
        control, (p, q) = self.control, self.power
        running, bad, h = rows.status == RUNNING, attempt.bad, attempt.h
        spoilt = running & bad
        # A row that is not finite makes gradients of shared parameters nan even where it is masked. In a graph such an
        # attempt is thrown away whole and made again with that row's shorter step; for other rows it does not count.
        counted = spoilt if torch.is_grad_enabled() and spoilt.any() else running
        error = np.maximum(np.where(bad, 1.0, attempt.value), 1e-30)
        accept = counted & ~bad & (error <= 1)
        pull = control.safety * error**-p
        factor = np.minimum(np.maximum(pull * rows.previous**q, control.min_factor), control.max_factor)
        # what a step that was cut very short to land has to say drowns in rounding: the step wanted before it stands
        cut = control.max_factor * h < rows.h
        wanted = np.minimum(np.where(cut, rows.h, h * factor), self.longest)
        previous = np.where(accept & ~cut, np.maximum(error, 1e-4), rows.previous)
        status = self._landed(rows, attempt, accept)
        if not accept.all():
            shrunk = h * np.where(bad, control.min_factor, np.minimum(np.maximum(pull, control.min_factor), 1.0))
            wanted = np.where(accept, wanted, np.where(counted, np.minimum(shrunk, self.longest), rows.h))
            shortest = 10 * np.finfo(np.float64).eps * np.maximum(abs(rows.t), self.problem.span)
            stuck = counted & ~accept & (wanted < shortest)
            status = np.where(stuck, np.where(bad, NON_FINITE, UNDERFLOW), status)
        self.attempts += 1  # at least as many as any row has made
        if self.attempts >= self.problem.max_steps:
            made = rows.steps + rows.rejected + counted
            status = np.where((made >= self.problem.max_steps) & (status == RUNNING), EXHAUSTED, status)
        return Verdict(counted, accept, wanted, previous, status)

    def _landed(self, rows: Rows, attempt: Attempt, accept: Array) -> Array:
        """[n] the status, success where an accepted step is the last one."""
        ends = attempt.lands if attempt.stops is None else attempt.lands | attempt.stops
        if not ends.any():
            return rows.status
        last = self.grid.run(rows.goal, rows.index) >= len(self.grid.times) - 1
        ends = attempt.lands & last if attempt.stops is None else (attempt.lands & last) | attempt.stops
        return np.where(accept & ends, SUCCESS, rows.status)

    def record(self, rows: Rows, attempt: Attempt, verdict: Verdict) -> None:
        last = verdict.status == SUCCESS
        index, steps, final = (self.to_device(each) for each in (rows.index, rows.steps, last))
        given = (index, steps, final, attempt.t, attempt.s, rows.x, attempt.step, attempt.error)
        if not verdict.accept.all():
            given = narrow(given, self.to_device(np.flatnonzero(verdict.accept)))
        self.recorder.add(*given, self.field)

    def note_strain(self, rows: Rows, attempt: Attempt, verdict: Verdict) -> None:
        """Keep the step and the stiffness estimate of rows that fail for want of steps."""
        failed = (verdict.status == UNDERFLOW) | (verdict.status == EXHAUSTED)
        with torch.no_grad():
            stiffness = self.problem.solver.stiffness(attempt.t, attempt.s, rows.x, attempt.step)
        if stiffness is not None and failed.any():
            self.strains.append((rows.index[failed], attempt.h[failed], stiffness.cpu().numpy()[failed]))

    def move(self, rows: Rows, attempt: Attempt, verdict: Verdict, calls: int) -> Rows:
        """The rows after an attempt."""
        accept, end, new = verdict.accept, attempt.end, attempt.step.x
        if attempt.stops is not None and (accept & attempt.stops).any():
            problem, stops = self.problem, self.to_device(attempt.stops)
            where, there = problem.stop.locate(problem, self.field, attempt.t, attempt.s, rows.x, attempt.step)
            new = torch.where(expand_like(stops, new), there, new)
            end = np.where(attempt.stops, where.detach().cpu().numpy(), end)
            self.stopped.append(rows.index[accept & attempt.stops])
        x, state = rows.x, rows.state
        if accept.all():
            x, state = new, attempt.step.state
        elif accept.any():
            taken = self.to_device(accept)
            pairs = zip((new, *attempt.step.state), (x, *state), strict=True)
            x, *memory = (torch.where(expand_like(taken, a), a, b) for a, b in pairs)
            state = tuple(memory)
        there = accept & attempt.lands & (end == attempt.end)  # a row may have stopped short of it
        rows = Rows(
            index=rows.index,
            t=np.where(accept, end, rows.t),
            h=verdict.h,
            goal=np.where(there, self.grid.run(rows.goal, rows.index) + 1, rows.goal),
            previous=verdict.previous,
            status=verdict.status,
            nfe=rows.nfe + calls * verdict.counted,
            steps=rows.steps + accept,
            rejected=rows.rejected + (verdict.counted & ~accept),
            x=x,
            state=state,
        )
        if self.problem.keep_path and there.any():
            where = np.flatnonzero(there)
            self.landed.append((rows.goal[where] - 1, rows.index[where], x[self.to_device(where)]))
        return rows

    def drop(self, rows: Rows, noise: Any) -> tuple[Rows, Any]:
        """Take rows that have ended out of the batch, if the field can be narrowed, or if that is the end of all."""
        problem, ended = self.problem, rows.status != RUNNING
        if not ended.any():
            return rows, noise
        if ended.all() or (problem.stop_at_failure and (rows.status > 0).any()):
            self.ended.append(rows._replace(state=()))
            return rows.take(np.arange(0)), noise
        if not isinstance(problem.field, Selectable):
            return rows, noise
        self.ended.append(rows._replace(state=()).take(np.flatnonzero(ended)))
        rows = rows.take(np.flatnonzero(~ended))
        index = self.to_device(rows.index)
        self.field.field = problem.field.select(index)
        return rows, None if problem.noise is None else problem.noise.select(index)

    def collect(self) -> Solution:
        problem, x = self.problem, self.problem.x
        if self.ended:
            order = np.argsort(np.concatenate([part.index for part in self.ended]))
            host = zip(*(part[:9] for part in self.ended), strict=True)
            columns = [self.to_device(np.concatenate(each)[order]) for each in host]
            x = torch.cat([part.x for part in self.ended])[self.to_device(order)]
        else:  # an empty batch
            columns = [torch.zeros(0, dtype=torch.int64, device=x.device)] * 9
        _, t, _, _, _, status, nfe, steps, rejected = columns
        return Solution(
            x=x,
            path=self._path() if problem.keep_path else None,
            nfe=nfe,
            steps=steps,
            rejected=rejected,
            result=worst(status),
            time=t.double(),
            status=status,
            trace=self.recorder.trace(),
            picked=self.recorder.picked(),
            dense=self.recorder.interpolation(None if problem.stop is None else t.double()),
            stopped=None if problem.stop is None else self._marked(self.stopped),
            strain=self._strain(),
        )

    def _marked(self, parts: list[Array]) -> Tensor:
        mask = np.zeros(len(self.problem.x), dtype=bool)
        for part in parts:
            mask[part] = True
        return self.to_device(mask)

    def _strain(self) -> Strain | None:
        if not self.strains:
            return None
        table = np.full((2, len(self.problem.x)), np.nan)
        for index, h, stiffness in self.strains:
            table[:, index] = h, stiffness
        return Strain(*self.to_device(table))

    def _path(self) -> Tensor:
        x, n, length, grid = self.problem.x, len(self.problem.x), len(self.problem.times), self.grid
        goals, index = (np.concatenate(each) for each in list(zip(*self.landed, strict=True))[:2])
        goals = np.where(goals > 0, goals, grid.run(goals, index))
        path = x.new_full((length * n, *x.shape[1:]), torch.nan)
        states = torch.cat([part for *_, part in self.landed])
        path = path.index_copy(0, self.to_device(goals * n + index), states).reshape(length, *x.shape)
        if grid.ends is None:
            return path
        return path[self.to_device(grid.ends), torch.arange(n, device=x.device)]  # equal times have one state
