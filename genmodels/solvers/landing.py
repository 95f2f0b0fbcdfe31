"""A solver of fields that jump at whole times: it starts anew there, and sees each interval from inside."""

from typing import Any

import torch
from torch import Tensor

from ..registry import ConfigError
from ..types import expand_like
from .base import Solver, State, Step, title


class Inside:
    """A field whose times are kept inside the open interval between t and s, by one unit in the last place.

    A field that jumps at either end is then asked for its limit from within the step.
    """

    def __init__(self, field: Any, t: Tensor, s: Tensor) -> None:
        self.field = field
        first, last = torch.nextafter(t, s), torch.nextafter(s, t)
        self.low, self.high = torch.minimum(first, last), torch.maximum(first, last)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.field(torch.minimum(torch.maximum(t, self.low), self.high), x)


class Landing(Solver):
    """A solver for fields that jump at whole times 0, 1, 2, …, on which its steps land.

    A step evaluates the field inside its interval alone, and what a solver remembers (a slope at the end of a step) is
    not carried over a jump: each whole time costs an evaluation more, and the solver keeps its order.

    Raises:
        ConfigError: if the solver has loops of its own, which cannot be stopped at jumps.
    """

    def __init__(self, inner: Solver) -> None:
        if type(inner).solve is not Solver.solve:
            raise ConfigError(
                f"solver '{title(inner)}' has a loop of its own, which cannot be restarted where a field jumps. Take "
                "another one, or a smooth control (hermite) under step control."
            )
        self.inner, self.registered_name = inner, title(inner)
        self.order, self.stages, self.needs, self.counts = inner.order, inner.stages, inner.needs, inner.counts
        self.adaptive, self.stability = inner.adaptive, inner.stability

    @property
    def error_order(self) -> float:
        return self.inner.error_order

    def start(self, field: Any, t: Tensor, x: Tensor) -> State:
        return self.inner.start(field, t, x)

    def step(self, field: Any, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        inside, jumped = Inside(field, t, s), t == t.round()
        if bool(jumped.any()):
            fresh = self.inner.start(inside, t, x)
            state = tuple(
                torch.where(expand_like(jumped, new), new, old) for new, old in zip(fresh, state, strict=True)
            )
        return self.inner.step(inside, t, s, x, state, noise)

    def velocity(self, field: Any, t: Tensor, x: Tensor) -> Tensor:
        return self.inner.velocity(field, t, x)

    def slope(self, field: Any, t: Tensor, x: Tensor, state: State) -> Tensor:
        return self.inner.slope(field, t, x, state)

    def stiffness(self, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor | None:
        return self.inner.stiffness(t, s, x, step)

    def interpolant(self, field: Any, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor:
        return self.inner.interpolant(Inside(field, t, s), t, s, x, step)

    def within(self, rtol: float, atol: float) -> "Landing":
        return Landing(self.inner.within(rtol, atol))
