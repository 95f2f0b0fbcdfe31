"""What an integration gives back: states, costs, outcomes, and what each accepted step had to say of itself."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..types import expand_like


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
    halted = 4, "was halted with the row that failed, as they have one clock", ""


@dataclass(frozen=True, slots=True)
class Record:
    """What to keep of the accepted steps.

    Args:
        rtol, atol: tolerances that E is measured by, so that it means the same whatever the solve's own ones are; None
            for the controller's (on a fixed grid the bare error).
        picks: [P, B] numbers in [0, 1) by which P steps of each row are chosen, None for none. Their starts are kept.
        stiffness: whether to estimate it, which costs two norms a step.
        pick: "time" chooses the step around t₀ + u (t₁ - t₀), so with a uniform u a step with chance |h|; "step" any
            accepted step with the same chance, but for the last one if there are others.
    Raises:
        ValueError: if tolerances are negative, or those that are given are 0.
    """

    rtol: float | None = None
    atol: float | None = None
    picks: Tensor | None = None
    pick: Literal["time", "step"] = "time"
    stiffness: bool = True

    def __post_init__(self) -> None:
        given = [v for v in (self.rtol, self.atol) if v is not None]
        if given and not (min(given) >= 0 and max(given) > 0):
            raise ValueError(
                f"Record: rtol >= 0 and atol >= 0, not both 0, are needed, found rtol={self.rtol}, atol={self.atol}."
            )


class Trace(NamedTuple):
    """What the accepted steps say of themselves, [N, B] float64 each, with graph but for times; 0 beyond a row's last.

    Args:
        t: where the step starts.
        h: its length |s - t|.
        error: E, the root mean square over the row of the local error estimate divided by atol + rtol max(|x|, |x⁺|)
            (bare without tolerances); None without an error estimate. Under a norm over the batch, the same for all.
        stiffness: estimate of the largest |eigenvalue| of ∂f/∂x; None without one, or if it was not asked for.
        taken: bool, whether the row took that step.
    Source: Pal et al. 2021 (Opening the Blackbox), section 3.
    """

    t: Tensor
    h: Tensor
    error: Tensor | None
    stiffness: Tensor | None
    taken: Tensor


class Picked(NamedTuple):
    """The steps that `Record.picks` chose, without graph: their starts t and ends s, [P, B] float64, and the states
    [P, B, *shape] at t."""

    t: Tensor
    s: Tensor
    x: Tensor


@dataclass(frozen=True, slots=True)
class Dense:
    """The solution between its steps: a polynomial in θ = (t - t_n)/(t_{n+1} - t_n) on each.

    Args:
        t: [N + 1, B] float64 ends of the steps of each row; the last one is repeated where a row took fewer.
        coefficients: [N, K, B, *shape] of θ⁰ … θ^{K-1}.
    """

    t: Tensor
    coefficients: Tensor

    def __call__(self, times: Tensor) -> Tensor:
        """[M, B, *shape] states at times [M], or [M, B] of each row's own; beyond the ends, those at the ends."""
        rows = self.t.shape[1]
        wanted = (times[:, None] if times.ndim == 1 else times).to(self.t).expand(-1, rows)
        sign = 1.0 if rows == 0 or bool((self.t[-1] >= self.t[0]).all()) else -1.0
        knots = (sign * self.t[1:-1]).T.contiguous()
        place = torch.searchsorted(knots, (sign * wanted).detach().T.contiguous(), right=True).T
        row = torch.arange(rows, device=place.device).expand_as(place)
        start, end = self.t[place, row], self.t[place + 1, row]
        length = end - start
        theta = torch.where(length == 0, 0.0, (wanted - start) / torch.where(length == 0, 1.0, length)).clamp(0, 1)
        parts = self.coefficients[place, :, row]  # [M, B, K, *shape]
        theta = expand_like(theta, parts[:, :, 0]).to(parts.dtype)
        total = parts[:, :, -1]
        for k in range(parts.shape[2] - 2, -1, -1):
            total = total * theta + parts[:, :, k]
        return total


class Strain(NamedTuple):
    """The last attempts of rows that ran out of steps, or needed too short ones, [B] float64 each; nan for the others.

    Args:
        h: length of the step.
        stiffness: estimate of the largest |eigenvalue| of ∂f/∂x; h times it near the method's stability says that the
            field is stiff, and stability, not accuracy, sets the steps.
    """

    h: Tensor
    stiffness: Tensor


@dataclass(frozen=True, slots=True)
class Solution:
    """Where an integration ended and what it cost; states and trace with graph, counts and times without.

    Args:
        x: [B, *shape] state at the last time (where a row failed: its last finite state; where it was stopped: there).
        path: [L, B, *shape] states at `times`, nan where a row did not get; None unless save="all".
        nfe: [B] int64 evaluations of the field on the row's path; those of rejected steps count.
        steps: [B] int64 accepted steps.
        rejected: [B] int64 rejected steps.
        result: how it ended: that of the first row that failed of itself.
        time: [B] float64 where each row ended.
        status: [B] int64 `Result` of each row.
        trace: of the accepted steps; None unless asked for by `record`.
        picked: the steps that were chosen; None unless asked for by `record`.
        dense: the solution between the steps; None unless save="dense".
        stopped: [B] bool, whether `stop` ended the row before its last time; None without one.
        strain: of rows that failed for want of steps; None where none did, or without a stiffness estimate.
    """

    x: Tensor
    path: Tensor | None
    nfe: Tensor
    steps: Tensor
    rejected: Tensor
    result: Result
    time: Tensor
    status: Tensor
    trace: Trace | None = None
    picked: Picked | None = None
    dense: Dense | None = None
    stopped: Tensor | None = None
    strain: Strain | None = None


class SolverError(RuntimeError):
    """An integration that did not reach its last time.

    Attributes:
        result: why.
        row: the first row that failed of itself.
        time: the last time that it reached.
        steps: its accepted steps.
        rejected: its rejected steps.

    Args:
        diagnosis: what else is known, as `diagnosis(row)` says it.
    """

    def __init__(self, solution: Solution, diagnosis: Callable[[int], str] = lambda row: "") -> None:
        self.result = solution.result
        self.row = int(solution.status.cpu().eq(int(self.result)).nonzero()[0])
        self.time, self.steps = float(solution.time[self.row]), int(solution.steps[self.row])
        self.rejected = int(solution.rejected[self.row])
        super().__init__(
            f"integrate: row {self.row} of {len(solution.x)} {self.result.message}: {self.result.name} in step "
            f"{self.steps + 1} from t = {self.time:.9g}, after {self.rejected} rejected steps. "
            f"{diagnosis(self.row)}{self.result.advice} "
            'on_failure="return" gives the last finite state instead of this error.'
        )


def worst(status: Tensor) -> Result:
    """The outcome of a batch: that of its first row that failed of itself."""
    failed = [code for code in status.tolist() if code not in (Result.success, Result.halted)]
    return Result(failed[0]) if failed else Result.success
