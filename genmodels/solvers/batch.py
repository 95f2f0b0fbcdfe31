"""Step control with one clock for the whole batch: times and steps are numbers, and cost little beside the field."""

import math
from typing import Any

import torch
from torch import Tensor

from ..registry import ConfigError
from .base import Problem
from .fields import Counted
from .recording import Recorder
from .solution import Result, Solution, Strain


class Clock:
    """Where a batch is in time, and what its steps have come to.

    Attributes:
        t: the time.
        h: the length of the step that is wanted next.
        previous: error norm of the last accepted step.
    """

    def __init__(self, t: float, h: float) -> None:
        self.t, self.h, self.previous = t, h, 1e-4
        self.steps = self.rejected = 0


def solve_batch(control: Any, problem: Problem) -> Solution:
    """The loop of a `PI` with norm="batch".

    Raises:
        ConfigError: if rows have times of their own, or may be stopped: these need a clock each.
    """
    if problem.times.ndim != 1 or problem.stop is not None:
        what = "rows have times of their own" if problem.stop is None else "rows may be stopped before the last time"
        raise ConfigError(f'pi: norm="batch" has one clock for all rows, but {what}. Use norm="row".')
    x, solver = problem.x, problem.solver
    times = problem.times.detach().tolist()
    field = Counted(problem.field, solver.counts)
    recorder = Recorder(problem, (control.rtol, control.atol), batch=True)
    loop = _Loop(control, problem, field, recorder)
    path, result = [x], Result.success
    if x.numel():
        state = solver.start(field, _tensor(times[0], x), x)
        clock = Clock(times[0], loop.first_step(times[0], state))
        for goal, last in zip(times[1:], (False,) * (len(times) - 2) + (True,), strict=True):
            x, state, result = loop.run(clock, goal, last, x, state)
            if result != Result.success:
                break
            path.append(x)
    else:
        clock = Clock(times[0], 0.0)
        path = [x] * len(times)
    rows = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return Solution(
        x=x,
        path=_stack(path, len(times)) if problem.keep_path else None,
        nfe=rows + field.calls,
        steps=rows + clock.steps,
        rejected=rows + clock.rejected,
        result=result,
        time=rows + torch.tensor(clock.t, dtype=torch.float64, device=x.device),
        status=loop.statuses(rows, result),
        trace=recorder.trace(),
        picked=recorder.picked(),
        dense=recorder.interpolation(),
        strain=loop.strain,
    )


class _Loop:
    """The steps from one requested time to the next."""

    def __init__(self, control: Any, problem: Problem, field: Counted, recorder: Recorder) -> None:
        self.control, self.problem, self.field, self.recorder = control, problem, field, recorder
        self.power = tuple(e / problem.solver.error_order for e in control.exponents)
        self.longest = min(problem.span, control.max_step or problem.span)
        self.index = torch.arange(len(problem.x), device=problem.x.device)
        self.latest: tuple[Any, ...] | None = None  # t, s, x and the step of the last attempt
        self.strain: Strain | None = None

    def norm(self, error: Tensor, x: Tensor, new: Tensor) -> Tensor:
        """[] float64 E over the batch."""
        scale = torch.maximum(x.abs(), new.abs()).mul_(self.control.rtol).add_(self.control.atol)
        part = self.problem.seminorm(error / scale)
        return torch.linalg.vector_norm(part, dtype=torch.float64) / max(part.numel(), 1) ** 0.5

    @torch.no_grad()
    def first_step(self, t: float, state: tuple[Tensor, ...]) -> float:
        """Hairer's automatic choice (see `PI`), with norms over the batch."""
        problem, x, longest = self.problem, self.problem.x, self.longest
        if self.control.first_step is not None:
            return min(self.control.first_step, longest)
        slope = problem.solver.slope(self.field, _tensor(t, x), x, state)
        d0, d1 = float(self.norm(x, x, x)), float(self.norm(slope, x, x))
        h0 = min(1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, longest)
        if not h0 > 0:
            return 1e-3 * longest  # an infinite slope: the attempts will tell
        ahead = _tensor(t + problem.direction * h0, x)
        probe = problem.solver.velocity(self.field, ahead, x + problem.direction * h0 * slope)
        steepest = max(d1, float(self.norm(probe - slope, x, x)) / h0)
        if steepest <= 1e-15:
            h1 = max(1e-6, 1e-3 * h0)
        else:
            h1 = (0.01 / steepest) ** (1 / problem.solver.error_order)
        h = min(100 * h0, h1, longest)
        return h if 0 < h < float("inf") else 1e-3 * longest

    def run(
        self, clock: Clock, goal: float, last: bool, x: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...], Result]:
        """Step until the goal is reached, or no further."""
        problem, control, direction = self.problem, self.control, self.problem.direction
        while True:
            if clock.steps + clock.rejected >= problem.max_steps:
                return x, state, self._strained(Result.max_steps_reached)
            lands = clock.h * (1 + 1e-9) >= abs(goal - clock.t)  # no sliver is left over by rounding
            s = goal if lands else clock.t + direction * clock.h
            ends = _tensor(clock.t, x), _tensor(s, x)
            step = problem.solver.step(self.field, *ends, x, state, problem.noise)
            error = self.norm(step.error, x, step.x)
            value = float(error.detach())  # the only wait for the device in a step
            # a finite norm of the error does not see states under a seminorm, or infinite ones
            bad = not (value < math.inf and float(torch.linalg.vector_norm(step.x.detach(), math.inf)) < math.inf)
            h, self.latest = abs(s - clock.t), (*ends, x, step)
            if not bad and value <= 1:
                if self.recorder.active:
                    self._record(clock, last and lands, ends, x, step, error)
                self._grow(clock, h, value)
                clock.t, clock.steps = s, clock.steps + 1
                x, state = step.x, step.state
                if lands:
                    return x, state, Result.success
                continue
            clock.rejected += 1
            factor = control.min_factor if bad else control.safety * value ** -self.power[0]
            clock.h = h * min(max(factor, control.min_factor), 1.0)
            shortest = 10 * torch.finfo(torch.float64).eps * max(abs(clock.t), problem.span)
            if clock.h < shortest:
                return x, state, self._strained(Result.non_finite if bad else Result.step_underflow)

    def statuses(self, rows: Tensor, result: Result) -> Tensor:
        """[B] the outcome of each row: of an undefined attempt, that of the rows that are undefined in it."""
        status = rows + int(result)
        if result != Result.non_finite or self.latest is None:
            return status
        step = self.latest[-1]
        sound = torch.stack([v.detach().flatten(1).isfinite().all(1) for v in (step.x, step.error)]).all(0)
        return status if sound.all() else torch.where(sound, int(Result.halted), status)

    def _strained(self, result: Result) -> Result:
        """The result, with what the last attempt says of the stiffness if it failed for want of steps."""
        if result == Result.non_finite or self.latest is None:
            return result
        with torch.no_grad():
            stiffness = self.problem.solver.stiffness(*self.latest)
        if stiffness is not None:
            t, s, *_ = self.latest
            self.strain = Strain((s - t).abs().expand(len(stiffness)), stiffness)
        return result

    def _grow(self, clock: Clock, h: float, value: float) -> None:
        """The next step after an accepted one of length h, see `PI`."""
        control, (p, q) = self.control, self.power
        if control.max_factor * h < clock.h:  # a step cut very short to land: the step wanted before it stands
            return
        value = max(value, 1e-30)
        factor = control.safety * value**-p * clock.previous**q
        clock.h = min(h * min(max(factor, control.min_factor), control.max_factor), self.longest)
        clock.previous = max(value, 1e-4)

    def _record(
        self, clock: Clock, last: bool, ends: tuple[Tensor, Tensor], x: Tensor, step: Any, error: Tensor
    ) -> None:
        n, index = len(x), self.index
        number, final = torch.full_like(index, clock.steps), torch.full_like(index, last, dtype=torch.bool)
        t, s = (end.expand(n) for end in ends)
        self.recorder.add(index, number, final, t, s, x, step, error.expand(n), self.field)


def _tensor(t: float, x: Tensor) -> Tensor:
    return torch.tensor(t, dtype=torch.float64, device=x.device)


def _stack(path: list[Tensor], length: int) -> Tensor:
    states = torch.stack(path)
    return torch.cat((states, states.new_full((length - len(states), *states.shape[1:]), torch.nan)))
