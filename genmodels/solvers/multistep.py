"""Methods of one evaluation a step, which use the velocities of the step before again.

None has an error estimate, so they run on fixed grids alone. Of a step of length 0 (padding) they remember nothing.
"""

from typing import Any

import torch
from torch import Tensor

from ..registry import register
from ..types import expand_like
from .base import Solver, State, Step
from .fields import VectorField


@register(Solver, "ab2")
class AB2(Solver):
    """Adams-Bashforth, x⁺ = x + h [(1 + w/2) v - (w/2) v₋], w = h/h₋, with v₋ and h₋ of the step before; order 2.

    One evaluation per step; the first one is Euler's. In state: v₋ and h₋, infinite where there is none.

    Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section III.5 (variable steps).
    """

    order, stages = 2, 1

    def start(self, field: VectorField, t: Tensor, x: Tensor) -> State:
        # after a step of infinite length w = 0, and the method is Euler's
        return torch.zeros_like(x), torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)

    def step(self, field: VectorField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any = None) -> Step:
        (before, length), h = state, (s - t).to(x.device)
        v, half = field(t, x), 0.5 * h / length
        new = x + _wide(h * (1 + half), x) * v - _wide(h * half, x) * before
        return Step(new, None, (_remembered(h, v, before), _remembered(h, h.expand(len(x)), length)))


@register(Solver, "fireflow")
class FireFlow(Solver):
    """FireFlow, x⁺ = x + h v̂ with v̂ = f(t + h/2, x + h/2 v̂₋), v̂₋ that of the step before; order 2, one evaluation.

    The midpoint rule with a probe along an old midpoint velocity, which is off by O(h) and thus changes the step by
    O(h³). At the start v̂₋ = f(t, x), one evaluation more. In state: v̂.

    Source: Deng et al. 2024 (FireFlow), algorithm 1.
    """

    order, stages = 2, 1

    def start(self, field: VectorField, t: Tensor, x: Tensor) -> State:
        return (field(t, x),)

    def step(self, field: VectorField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any = None) -> Step:
        (before,), h = state, (s - t).to(x.device)
        wide = _wide(h, x)
        v = field(torch.add(t, s - t, alpha=0.5), x + 0.5 * wide * before)
        return Step(x + wide * v, None, (_remembered(h, v, before),))


@register(Solver, "uni_inv")
class UniInv(Solver):
    """Uni-Inv, x⁺ = x + h v with v = f(s, x + h v₋), v₋ that of the step before; order 1, one evaluation.

    Implicit Euler's step, its end predicted. Euler's method back from x⁺ takes nearly the same velocity: their round
    trip errs by O(h²). In state: v.

    Args:
        zero_start: begin with v₋ = 0 rather than with f(t, x), an evaluation less.
    Source: Jiao et al. 2025 (UniEdit-Flow), section 4 (Uni-Inv).
    """

    order, stages = 1, 1

    def __init__(self, zero_start: bool = False) -> None:
        self.zero_start = zero_start

    def start(self, field: VectorField, t: Tensor, x: Tensor) -> State:
        return (torch.zeros_like(x) if self.zero_start else field(t, x),)

    def step(self, field: VectorField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any = None) -> Step:
        (before,), h = state, (s - t).to(x.device)
        wide = _wide(h, x)
        v = field(s, x + wide * before)
        return Step(x + wide * v, None, (_remembered(h, v, before),))


def _wide(c: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient ([] or [B]) in the dtype of the state x, to be multiplied with it."""
    return expand_like(c, x).to(x.dtype)


def _remembered(h: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """What a step of the length h ([] or [B]) leaves in memory: a row that did not move keeps what it had."""
    return torch.where(expand_like(h != 0, old), new, old)
