"""Integrals along a solution, as more components of its state."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solvers.divergence import differentiable
from ..solvers.fields import Selectable, narrow, tensors_of
from ..solvers.solution import Dense, Solution


class Rate(NamedTuple):
    """r(field, t, x, v, *arguments) [B], to be integrated over |dt|; v = field(t, x) has a graph from x.

    Args:
        f: the function; it may evaluate the field again.
        arguments: [B, *] with a row for every item.
    """

    f: Callable[..., Tensor]
    arguments: tuple[Tensor, ...] = ()


class _Joint:
    """Velocity and rates as one field on [B, D + R]; the rates turn with the direction of time."""

    def __init__(self, field: Any, shape: tuple[int, ...], rates: Sequence[Rate], sign: Tensor) -> None:
        self.field, self.shape, self.rates, self.sign = field, shape, rates, sign

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        graph, size = torch.is_grad_enabled(), math.prod(self.shape)
        x = y[:, :size].reshape(len(y), *self.shape)
        with differentiable():
            x = x if graph and x.requires_grad else x.detach().requires_grad_()
            v = self.field(t, x)
            columns = [rate.f(self.field, t, x, v, *rate.arguments) for rate in self.rates]
            out = torch.cat((v.reshape(len(y), size), self.sign * torch.stack(columns, 1).to(v.dtype)), 1)
        return out if graph else out.detach()

    def tensors(self) -> tuple[Tensor, ...]:
        own = [a for rate in self.rates for a in rate.arguments if a.requires_grad]
        return (*tensors_of(self.field), *own)


class _SelectableJoint(_Joint):
    """The same of a field that can be narrowed to some of its rows."""

    def select(self, rows: Tensor) -> "_SelectableJoint":
        rates = [Rate(rate.f, narrow(rate.arguments, rows)) for rate in self.rates]
        return _SelectableJoint(self.field.select(rows), self.shape, rates, self.sign)


@dataclass(frozen=True)
class Augmented:
    """A field and a start with a further component for each integral, which error norms do not see.

    Args:
        field, x, seminorm: as `integrate` takes them.
        shape: of the state alone, without the batch axis.
        count: how many integrals.
    """

    field: Any
    x: Tensor
    seminorm: Callable[[Tensor], Tensor] | None
    shape: tuple[int, ...]
    count: int

    @classmethod
    def over(
        cls,
        field: Any,
        x: Tensor,
        times: Tensor,
        rates: Sequence[Rate],
        seminorm: Callable[[Tensor], Tensor] | None,
    ) -> "Augmented":
        """The problem with these rates integrated over |dt|; without any, the problem itself."""
        shape = tuple(x.shape[1:])
        if not rates:
            return cls(field, x, seminorm, shape, 0)
        size = math.prod(shape)
        kind = _SelectableJoint if isinstance(field, Selectable) else _Joint
        start = torch.cat((x.reshape(len(x), size), x.new_zeros(len(x), len(rates))), 1)
        own = (lambda y: y) if seminorm is None else seminorm

        def part(y: Tensor) -> Tensor:
            return own(y[:, :size].reshape(len(y), *shape))

        sign = (times[-1] - times[0]).sum().sign().to(x)
        return cls(kind(field, shape, rates, sign), start, part, shape, len(rates))

    def separate(self, solution: Solution) -> tuple[Solution, list[Tensor]]:
        """The solution of the state alone, and the integrals, [B] each, at its end."""
        if not self.count:
            return solution, []
        size = math.prod(self.shape)
        state: Callable[[Tensor], Tensor] = lambda y: y[..., :size].reshape(*y.shape[:-1], *self.shape)  # noqa: E731
        picked, dense, path = solution.picked, solution.dense, solution.path
        alone = replace(
            solution,
            x=state(solution.x),
            path=None if path is None else state(path),
            picked=None if picked is None else picked._replace(x=state(picked.x)),
            dense=None if dense is None else Dense(dense.t, state(dense.coefficients)),
        )
        return alone, list(solution.x[:, size:].unbind(1))
