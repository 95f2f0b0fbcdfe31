"""What solvers integrate: fields, fields with data of their own for each row, what they depend on, what they cost."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from ..registry import ConfigError
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


@runtime_checkable
class SDE(Protocol):
    """A stochastic differential equation dx = f(t, x) dt + g(t, x) dW, row by row.

    Attributes:
        noise_type: "additive" (g does not depend on x) and "diagonal" have a Wiener process for every component and g
            of the state's shape; "general" has M for an item, and a matrix g.
        calculus: in whose sense the equation is written.
    """

    noise_type: Literal["additive", "diagonal", "general"]
    calculus: Literal["ito", "stratonovich"]

    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        """[B, *shape] f at time t ([] or [B], float64) in state x [B, *shape]."""

    def diffusion(self, t: Tensor, x: Tensor) -> Tensor:
        """[B, *shape] g, or [B, *shape, M] for general noise."""


@runtime_checkable
class DenoisingField(Protocol):
    """A denoiser along a Gaussian path x_t = α(t) x + σ(t) ε, row by row.

    It may have a `t_max`, the last time at which it can be asked, where that is not the end of its path.

    Attributes:
        schedule: the path: `scales(t)`, `log_snr(t)`, its inverse `time`, and called, scales with derivatives.
    """

    schedule: Any

    def predict(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, *shape] x̂ and ε̂ with x = α x̂ + σ ε̂, at time t ([] or [B], float64) in state x [B, *shape]."""


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

    def tensors(self) -> tuple[Tensor, ...]:
        """What f and its arguments depend on."""
        return (*tensors_of(self.f), *(v for v in _leaves(self.arguments) if v.requires_grad))


def tensors_of(field: Any) -> tuple[Tensor, ...]:
    """The tensors that require gradients and that a field depends on, each once.

    Raises:
        ConfigError: if the field is a plain function, which does not tell.
    """
    owner = getattr(field, "__self__", field)
    if isinstance(owner, nn.Module):
        found = tuple(p for p in owner.parameters() if p.requires_grad)
    elif hasattr(owner, "tensors"):
        found = tuple(owner.tensors())
    else:
        raise ConfigError(
            f"integrate: this way of taking gradients must know the tensors that the field depends on, and "
            f"{getattr(field, '__name__', type(field).__name__)} does not tell. Give a module, a method of one, a "
            "RowField of these, or an object with a method tensors(); or use gradient: backprop."
        )
    return tuple({id(v): v for v in found}.values())


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)


class Counted:
    """A field that counts its evaluations, and insists that they have the state's shape and dtype."""

    def __init__(self, field: Any, method: str) -> None:
        self.field, self.method, self.calls = field, method, 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += self.method == "__call__"
        v = self.field(t, x)
        if not isinstance(v, Tensor) or v.shape != x.shape or not v.is_floating_point():
            self._refuse(t, x, v)
        return v if v.dtype == x.dtype else v.to(x.dtype)

    def _refuse(self, t: Tensor, x: Tensor, v: Any) -> None:
        found = f"{v.dtype} of shape {list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
        times = t.detach().flatten()
        when = f"t = {float(times[0]):.9g}" if times.numel() else "no time"
        raise ValueError(
            f"integrate: the field turned a state of shape {list(x.shape)} into a velocity of shape "
            f"{found.split(' of shape ')[-1]} ({found}) at {when}, in evaluation {self.calls}; state and velocity must "
            "have one shape, and be of floating point."
        )

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
