"""Step control: every row of the batch has its own time, step and verdict on each attempt."""

import warnings
from copy import copy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError, member, names, register
from ..types import expand_like
from .base import RUNNING, Controller, Problem, Solver, State, Step, title
from .batch import solve_batch
from .fields import Counted, Selectable, narrow
from .norms import finite_rows, rms
from .recording import Recorder
from .solution import Result, Solution, worst


class Rows(NamedTuple):
    """The rows that still run: [n] each, but for x [n, *shape] and the solver's memory."""

    index: Tensor  # which row of the batch
    t: Tensor
    h: Tensor  # the length of the step that the controller wants
    goal: Tensor  # the next requested time
    previous: Tensor  # error norm of the last accepted step
    status: Tensor
    nfe: Tensor
    steps: Tensor
    rejected: Tensor
    x: Tensor
    state: State


class Attempt(NamedTuple):
    """A step that was tried: its end s, its length, its error norm, and where it is not finite."""

    step: Step
    s: Tensor
    h: Tensor
    lands: Tensor
    error: Tensor
    bad: Tensor
    stops: Tensor | None


class Verdict(NamedTuple):
    """What becomes of an attempt, [n] each."""

    counted: Tensor
    accept: Tensor
    h: Tensor
    previous: Tensor
    status: Tensor


class Log(NamedTuple):
    """What left the loop: rows that ended, (time, row, state) of the requested times that were reached, and rows that
    were stopped."""

    ended: list[Rows]
    landed: list[tuple[Tensor, Tensor, Tensor]]
    stopped: list[Tensor]


class Grid(NamedTuple):
    """The requested times [L, B or 1], and the last place of the run of equal times that each place is in."""

    times: Tensor
    ends: Tensor | None

    @classmethod
    def of(cls, times: Tensor) -> "Grid":
        if times.ndim == 1:
            return cls(times[:, None], None)
        places = torch.arange(len(times), device=times.device)[:, None].expand_as(times)
        last = torch.cat((times[1:] != times[:-1], torch.ones_like(times[:1], dtype=torch.bool)))
        marked = torch.where(last, places, len(times))
        return cls(times, marked.flip(0).cummin(0).values.flip(0))

    def time(self, place: Tensor, index: Tensor) -> Tensor:
        """[n] the times of rows at places, the last one beyond the end."""
        place = place.clamp(max=len(self.times) - 1)
        return self.times[place, 0] if self.ends is None else self.times[place, index]

    def run(self, place: Tensor, index: Tensor) -> Tensor:
        """[n] the last place with the same time."""
        return place if self.ends is None else self.ends[place.clamp(max=len(self.times) - 1), index]


@register(Controller, "pi")
class PI(Controller):
    """Proportional-integral control of each row's own steps by its own error.

    E = rms(error / (atol + rtol max(|x|, |x⁺|))) over the row; a step with E <= 1 is accepted. With k the order of the
    solver and (p, q) the exponents, h⁺ = h clip(safety E^{-p/k} E₋^{q/k}, min_factor, max_factor), where E₋ (at least
    1e-4) belongs to the row's last accepted step; after a rejection h⁺ = h clip(safety E^{-p/k}, min_factor, 1). The
    first step is Hairer's automatic choice, for one evaluation more. Step lengths are constants to autograd.

    With the norm "batch" there is one clock for the batch and E is taken over all of it: faster, and what is found for
    an item depends on its batch. Answers about single items are to be had with "row".

    Steps are shortened to land on the requested times, rather than interpolated between: every method keeps its order
    there, in values and in gradients, and the field is never evaluated beyond the last time. A grid finer than the
    steps costs at least a step for each interval.

    Args:
        rtol: relative tolerance; in float32 below about 1e-6 it buys evaluations, not accuracy.
        atol: absolute tolerance, in units of the state.
        safety: factor below 1 on the predicted step.
        min_factor: least factor between steps.
        max_factor: greatest factor between steps.
        exponents: (p, q): (0.85, 0.2) is Hairer's DOPRI5 control, (0.7, 0.4) the smoother one of SciML for Tsit5,
            (1, 0) the elementary integral control.
        first_step: length of the first step, None for the automatic choice.
        max_step: longest step; set it where the error estimate is blind (a narrow event, a fast forcing).
        norm: whether every row has steps of its own ("row"), or the batch has one clock ("batch").
    Raises:
        ValueError: if an argument is out of its range; in `integrate`, if rtol is below the resolution of the state.
    Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section II.4; Gustafsson 1991.
    """

    def __init__(
        self,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        safety: float = 0.9,
        min_factor: float = 0.2,
        max_factor: float = 10.0,
        exponents: tuple[float, float] = (0.85, 0.2),
        first_step: float | None = None,
        max_step: float | None = None,
        norm: Literal["row", "batch"] = "row",
    ) -> None:
        rules = (
            (rtol > 0 and atol > 0, "rtol > 0 and atol > 0", (rtol, atol)),
            (0 < safety <= 1, "0 < safety <= 1", safety),
            (0 < min_factor < 1 < max_factor, "0 < min_factor < 1 < max_factor", (min_factor, max_factor)),
            (exponents[0] > 0 and exponents[1] >= 0, "exponents (p, q) with p > 0 and q >= 0", exponents),
            (first_step is None or first_step > 0, "first_step > 0", first_step),
            (max_step is None or max_step > 0, "max_step > 0", max_step),
        )
        for holds, rule, found in rules:
            if not holds:
                raise ValueError(f"pi: {rule} is needed, found {found}.")
        self.rtol, self.atol, self.safety = rtol, atol, safety
        self.min_factor, self.max_factor, self.exponents = min_factor, max_factor, tuple(exponents)
        self.first_step, self.max_step, self.norm = first_step, max_step, norm

    def by_row(self) -> "PI":
        if self.norm == "row":
            return self
        own = copy(self)
        own.norm = "row"
        return own

    def check(self, solver: Solver) -> None:
        if not solver.adaptive:
            usable = [name for name in names(Solver) if member(Solver, name, "solver").adaptive]
            raise ConfigError(
                f"integrate: controller '{title(self)}' needs an error estimate, which solver '{title(solver)}' does "
                f"not have. Use one of: {', '.join(usable)}; or controller 'fixed'."
            )

    def solve(self, problem: Problem) -> Solution:
        self.check_resolution(problem.x.dtype)
        problem = problem._replace(solver=problem.solver.within(self.rtol, self.atol))
        if self.norm == "batch":
            return solve_batch(self, problem)
        grid, noise = Grid.of(problem.times.detach()), problem.noise
        field, recorder = Counted(problem.field, problem.solver.counts), Recorder(problem, (self.rtol, self.atol))
        rows = self._begin(problem, field, grid)
        log = Log([], [(torch.zeros_like(rows.index), rows.index, problem.x)], [])
        if rows.index.numel() and grid.ends is not None:
            rows, noise = _drop(problem, field, rows, log, noise, (rows.status != RUNNING).cpu(), False)
        while len(rows.index):
            calls = field.calls
            attempt = self._attempt(problem, field, rows, grid, noise)
            verdict = self._judge(problem, rows, attempt, grid)
            whole = attempt
            if attempt.stops is not None:
                log.stopped.append(rows.index[verdict.accept & attempt.stops])
                attempt = self._stopped(problem, field, rows, attempt, verdict)
            # the only wait for the device in a step
            flags = torch.stack(
                (verdict.accept, verdict.accept & attempt.lands, verdict.status != RUNNING, verdict.status > 0)
            ).cpu()
            if recorder.active and flags[0].any():
                _record(recorder, rows, whole, verdict, field)
            rows = _move(rows, attempt, verdict, grid, flags[0], field.calls - calls)
            if problem.keep_path and flags[1].any():
                where = flags[1].nonzero()[:, 0].to(rows.t.device)
                log.landed.append((rows.goal[where] - 1, rows.index[where], rows.x[where]))
            rows, noise = _drop(problem, field, rows, log, noise, flags[2], bool(flags[3].any()))
        return _collect(problem, log, recorder, grid)

    def check_resolution(self, dtype: torch.dtype) -> None:
        """Raises ValueError if rtol asks for more digits than a state has; warns where rounding sets the steps."""
        resolution = torch.finfo(dtype).eps
        if self.rtol < resolution:
            raise ValueError(
                f"pi: rtol = {self.rtol:g} is below the resolution {resolution:.2g} of {dtype}. Compute in float64 "
                "(precision: float64), or raise rtol."
            )
        if dtype == torch.float32 and self.rtol < 1e-6:
            warnings.warn(
                f"pi: with rtol = {self.rtol:g} in float32 rounding, not the field, sets many of the steps: numbers of "
                "evaluations say little then. Compute in float64 (precision: float64), or take rtol >= 1e-6.",
                stacklevel=4,
            )

    def _begin(self, problem: Problem, field: Counted, grid: Grid) -> Rows:
        x, n = problem.x, len(problem.x)
        index = torch.arange(n, device=x.device)
        zero = torch.zeros_like(index)
        t = grid.time(zero, index)
        state, h = (), t
        if n:
            state = problem.solver.start(field, t, x)
            h = self._first_step(problem, field, t, x, state)
        goal = grid.run(zero, index) + 1
        return Rows(
            index=index,
            t=t,
            h=h,
            goal=goal,
            previous=torch.full_like(t, 1e-4),
            status=torch.where(goal < len(grid.times), RUNNING, Result.success),
            nfe=zero + field.calls,
            steps=zero,
            rejected=zero,
            x=x,
            state=state,
        )

    def _norm(self, problem: Problem, error: Tensor, x: Tensor, new: Tensor) -> Tensor:
        scale = self.atol + self.rtol * torch.maximum(x.abs(), new.abs())
        return rms(problem.seminorm(error / scale))

    @torch.no_grad()
    def _first_step(self, problem: Problem, field: Counted, t: Tensor, x: Tensor, state: State) -> Tensor:
        """[n] length of the first step: Hairer, Nørsett & Wanner, section II.4, 'starting step size'."""
        longest = min(problem.span, self.max_step or problem.span)
        if self.first_step is not None:
            return torch.full_like(t, min(self.first_step, longest))
        slope = problem.solver.slope(field, t, x, state)
        d0, d1 = self._norm(problem, x, x, x), self._norm(problem, slope, x, x)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=longest)
        wide = problem.direction * expand_like(h0, x).to(x.dtype)
        probe = problem.solver.velocity(field, t + problem.direction * h0, x + wide * slope)
        steepest = torch.maximum(d1, self._norm(problem, probe - slope, x, x) / h0)
        h1 = (0.01 / steepest) ** (1 / problem.solver.error_order)
        h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), h1)
        h = torch.minimum(100 * h0, h1).clamp(max=longest)
        return torch.where(h.isfinite() & (h > 0), h, 1e-3 * longest)  # an infinite slope: the attempts will tell

    def _attempt(self, problem: Problem, field: Counted, rows: Rows, grid: Grid, noise: Any) -> Attempt:
        goal = grid.time(rows.goal, rows.index)
        lands = rows.h * (1 + 1e-9) >= (goal - rows.t).abs()  # no sliver is left over by rounding
        s = torch.where(lands, goal, rows.t + problem.direction * rows.h)
        step = problem.solver.step(field, rows.t, s, rows.x, rows.state, noise)
        error = self._norm(problem, step.error, rows.x, step.x)
        bad = ~(error.detach().isfinite() & finite_rows(step.x))
        stops = problem.stop and problem.stop.reached(problem, field, rows.t, s, rows.x, step)
        return Attempt(step, s, (s - rows.t).abs(), lands, error, bad, stops)

    @staticmethod
    def _stopped(problem: Problem, field: Counted, rows: Rows, attempt: Attempt, verdict: Verdict) -> Attempt:
        """The attempt with its rows that are to stop moved back to where they do."""
        if not bool((verdict.accept & attempt.stops).any()):
            return attempt
        s, x = problem.stop.locate(problem, field, rows.t, attempt.s, rows.x, attempt.step)
        new = torch.where(expand_like(attempt.stops, x), x, attempt.step.x)
        step = attempt.step._replace(x=new)
        s = torch.where(attempt.stops, s.detach(), attempt.s)
        return attempt._replace(step=step, s=s, lands=attempt.lands & (s == attempt.s))

    def _judge(self, problem: Problem, rows: Rows, attempt: Attempt, grid: Grid) -> Verdict:
        running, bad = rows.status == RUNNING, attempt.bad
        # A row that is not finite makes gradients of shared parameters nan even where it is masked. In a graph such an
        # attempt is thrown away whole and made again with that row's shorter step; for other rows it does not count.
        spoilt = (running & bad).any() & torch.is_grad_enabled()
        counted = running & (bad | ~spoilt)
        error = torch.where(bad, 1.0, attempt.error.detach()).clamp(min=1e-30)
        accept = counted & ~bad & (error <= 1)
        p, q = (exponent / problem.solver.error_order for exponent in self.exponents)
        grown = attempt.h * (self.safety * error**-p * rows.previous**q).clamp(self.min_factor, self.max_factor)
        # what a step that was cut very short to land has to say drowns in rounding: the step wanted before it stands
        cut = self.max_factor * attempt.h < rows.h
        grown = torch.where(cut, rows.h, grown)
        previous = torch.where(accept & ~cut, error.clamp(min=1e-4), rows.previous)
        shrunk = attempt.h * (self.safety * error**-p).clamp(self.min_factor, 1.0)
        shrunk = torch.where(bad, self.min_factor * attempt.h, shrunk)
        h = torch.where(accept, grown, shrunk).clamp(max=self.max_step or problem.span)
        ends = attempt.lands & (grid.run(rows.goal, rows.index) >= len(grid.times) - 1)
        ends = ends if attempt.stops is None else ends | attempt.stops
        status = torch.where(accept & ends, Result.success, rows.status)
        shortest = 10 * torch.finfo(torch.float64).eps * rows.t.abs().clamp(min=problem.span)
        stuck = counted & ~accept & (h < shortest)
        status = torch.where(stuck, torch.where(bad, Result.non_finite, Result.step_underflow), status)
        spent = (rows.steps + rows.rejected + counted >= problem.max_steps) & (status == RUNNING)
        status = torch.where(spent, Result.max_steps_reached, status)
        return Verdict(counted, accept, torch.where(counted, h, rows.h), previous, status)


def _record(recorder: Recorder, rows: Rows, attempt: Attempt, verdict: Verdict, field: Counted) -> None:
    last = verdict.status == Result.success
    given = (rows.index, rows.steps, last, rows.t, attempt.s, rows.x, attempt.step, attempt.error)
    if not bool(verdict.accept.all()):
        given = narrow(given, verdict.accept.nonzero()[:, 0])
    recorder.add(*given, field)


def _move(rows: Rows, attempt: Attempt, verdict: Verdict, grid: Grid, accepted: Tensor, calls: int) -> Rows:
    """The rows after an attempt; `accepted` is the verdict's on the CPU."""
    step, accept = attempt.step, verdict.accept
    x, state = rows.x, rows.state
    if accepted.all():
        x, state = step.x, step.state
    elif accepted.any():
        x = torch.where(expand_like(accept, x), step.x, x)
        state = tuple(
            torch.where(expand_like(accept, new), new, old) for new, old in zip(step.state, state, strict=True)
        )
    return rows._replace(
        t=torch.where(accept, attempt.s, rows.t),
        h=verdict.h,
        goal=torch.where(accept & attempt.lands, grid.run(rows.goal, rows.index) + 1, rows.goal),
        previous=verdict.previous,
        status=verdict.status,
        nfe=rows.nfe + calls * verdict.counted,
        steps=rows.steps + accept,
        rejected=rows.rejected + (verdict.counted & ~accept),
        x=x,
        state=state,
    )


def _drop(
    problem: Problem, field: Counted, rows: Rows, log: Log, noise: Any, ended: Tensor, failed: bool
) -> tuple[Rows, Any]:
    """Take rows that have ended out of the batch, if the field can be narrowed; `ended` is on the CPU."""
    if ended.all() or (failed and problem.stop_at_failure):
        log.ended.append(rows._replace(state=()))
        return narrow(rows, rows.index[:0]), noise
    if not ended.any() or not isinstance(problem.field, Selectable):
        return rows, noise
    out, stay = (mask.nonzero()[:, 0].to(rows.t.device) for mask in (ended, ~ended))
    log.ended.append(narrow(rows._replace(state=()), out))
    rows = narrow(rows, stay)
    field.field = problem.field.select(rows.index)
    return rows, None if problem.noise is None else problem.noise.select(rows.index)


def _join(parts: list[Any], order: Tensor) -> Any:
    """Rows that ended at different times, in the order of the batch."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[order]
    if isinstance(parts[0], tuple) and hasattr(parts[0], "_fields"):
        return type(parts[0])(*(_join(list(each), order) for each in zip(*parts, strict=True)))
    return parts[0]


def _collect(problem: Problem, log: Log, recorder: Recorder, grid: Grid) -> Solution:
    x, n = problem.x, len(problem.x)
    if not log.ended:  # an empty batch
        empty = torch.zeros(0, dtype=torch.int64, device=x.device)
        time = empty.double()
        rows = Rows(empty, time, time, empty, time, empty, empty, empty, empty, x, ())
    else:
        order = torch.cat([part.index for part in log.ended]).argsort()
        rows = _join(log.ended, order)
    stopped = None
    if problem.stop is not None:
        stopped = torch.zeros(n, dtype=torch.bool, device=x.device)
        stopped[torch.cat([rows.index[:0], *log.stopped])] = True
    return Solution(
        x=rows.x,
        path=_path(problem, log, grid) if problem.keep_path else None,
        nfe=rows.nfe,
        steps=rows.steps,
        rejected=rows.rejected,
        result=worst(rows.status),
        time=rows.t,
        status=rows.status,
        trace=recorder.trace(),
        picked=recorder.picked(),
        dense=recorder.interpolation(),
        stopped=stopped,
    )


def _path(problem: Problem, log: Log, grid: Grid) -> Tensor:
    x, n, length = problem.x, len(problem.x), len(problem.times)
    goals, index, states = (torch.cat(each) for each in zip(*log.landed, strict=True))
    goals = torch.where(goals > 0, goals, grid.run(goals, index))
    path = x.new_full((length * n, *x.shape[1:]), torch.nan)
    path = path.index_copy(0, goals * n + index, states).reshape(length, *x.shape)
    if grid.ends is None:
        return path
    return path[grid.ends, torch.arange(n, device=x.device)]  # equal times have one state
