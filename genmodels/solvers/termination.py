"""Ending an integration before its last time: at rest, or where a function of the state crosses zero."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..registry import register
from ..types import expand_like
from .base import Problem, Step, Termination
from .norms import rms


@register(Termination, "steady_state")
class SteadyState(Termination):
    """A row stops at the first end of a step where rms(dx/dt) <= atol + rtol rms(x), norms over the row.

    Methods that have the slope at the end of a step (FSAL) ask for no evaluation more.

    Raises:
        ValueError: if a tolerance is negative, or both are 0.
    """

    def __init__(self, rtol: float = 1e-4, atol: float = 1e-4) -> None:
        if rtol < 0 or atol < 0 or rtol + atol <= 0:
            raise ValueError(
                f"steady_state: rtol >= 0 and atol >= 0, not both 0, are needed, found rtol={rtol}, atol={atol}."
            )
        self.rtol, self.atol = rtol, atol

    def reached(self, problem: Problem, field: Any, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor:
        with torch.no_grad():
            slope = problem.solver.slope(field, s, step.x, step.state)
            return rms(slope) <= self.atol + self.rtol * rms(step.x)


class Event(Termination):
    """A row stops where g(t, x) crosses zero: x there is the dense output's, the time is found by bisection.

    Gradients know that the time moves with the state: with g = 0 held, dt = -dg / (dg/dt along the solution). Crossings
    that begin and end within one step are not seen.

    Args:
        function: g(t, x) -> [B], for t [B] and x [B, *shape].
        direction: which crossings count: "up" from below 0, "down" from above, or "both".
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], direction: Literal["up", "down", "both"] = "both"
    ) -> None:
        self.function, self.direction = function, direction

    def reached(self, problem: Problem, field: Any, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor:
        with torch.no_grad():
            n = len(x)
            before, after = self.function(t.expand(n), x), self.function(s.expand(n), step.x)
        up, down = (before < 0) & (after >= 0), (before > 0) & (after <= 0)
        return {"up": up, "down": down, "both": up | down}[self.direction]

    def locate(
        self, problem: Problem, field: Any, t: Tensor, s: Tensor, x: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        n = len(x)
        t, s = t.expand(n), s.expand(n)
        parts = problem.solver.interpolant(field, t, s, x, step)
        with torch.no_grad():
            theta = self._root(t, s, x, parts.detach())
            after, before = (theta + e for e in (1e-6, -1e-6))
            g = [self.function(t + v * (s - t), _at(parts.detach(), v)) for v in (before, after)]
            rate = (g[1] - g[0]) / (after - before)
        if not parts.requires_grad:
            return t + theta * (s - t), _at(parts, theta)
        value = self.function(t + theta * (s - t), _at(parts, theta))
        # one Newton step from the root: its value is the root's, its gradient that of the implicit function
        moved = theta - (value - value.detach()) / torch.where(rate == 0, torch.inf, rate)
        return t + moved * (s - t), _at(parts, moved)

    def _root(self, t: Tensor, s: Tensor, x: Tensor, parts: Tensor) -> Tensor:
        """[B] θ of the crossing within the step; bisection to the last bit of float64."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        sign = self.function(t, x).sign()
        for _ in range(53):
            middle = (low + high) / 2
            same = self.function(t + middle * (s - t), _at(parts, middle)).sign() == sign
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        return high


def _at(parts: Tensor, theta: Tensor) -> Tensor:
    """[B, *shape] the polynomial with coefficients [K, B, *shape] at θ [B]."""
    wide = expand_like(theta, parts[0]).to(parts.dtype)
    total = parts[-1]
    for part in parts[:-1].flip(0):
        total = total * wide + part
    return total
