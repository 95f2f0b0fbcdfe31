"""What solvers integrate: vector fields, fields with data of their own for each row, and the count of evaluations."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..types import Condition


@runtime_checkable
class VectorField(Protocol):
    """The right-hand side of dx/dt = f(t, x), row by row."""

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """[B, *shape] velocity at time t ([] or [B], float64) in state x [B, *shape]."""


@runtime_checkable
class Selectable(Protocol):
    """A field that can be narrowed to some of its rows, so that step control stops evaluating those that are done."""

    def select(self, rows: Tensor) -> VectorField:
        """The field of the given rows [n], int64."""


class RowField:
    """f(t, x, *arguments), where each argument has a row for every item (labels, prompts) or is None.

    A plain function may hold data of rows unseen, so under step control it is evaluated on the whole batch until the
    last row is done. A RowField, whose data of rows are known, is narrowed to those that still run.
    """

    def __init__(self, f: Callable[..., Tensor], *arguments: Condition | None) -> None:
        self.f, self.arguments = f, arguments

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.f(t, x, *self.arguments)

    def select(self, rows: Tensor) -> "RowField":
        return RowField(self.f, *narrow(self.arguments, rows))


class Counted:
    """A field that counts its evaluations, and insists that they have the state's shape and dtype."""

    def __init__(self, field: Any, method: str) -> None:
        self.field, self.method, self.calls = field, method, 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += self.method == "__call__"
        v = self.field(t, x)
        if v.shape != x.shape:
            raise ValueError(
                f"integrate: the field turned a state of shape {list(x.shape)} into a velocity of shape "
                f"{list(v.shape)}; both must have the same shape."
            )
        return v.to(x.dtype)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.field, name)
        return self._counting(value) if name == self.method else value

    def _counting(self, value: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            self.calls += 1
            return value(*arguments)

        return call


def narrow(value: Any, rows: Tensor) -> Any:
    """The given rows of every tensor in a tuple or mapping; None stays None."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, Mapping):
        return {key: narrow(item, rows) for key, item in value.items()}
    if isinstance(value, tuple):
        parts = [narrow(item, rows) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
