"""What gradients that evaluate a field again in their backward pass have in common; `Gradient` itself is in `base`."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..registry import ConfigError
from .fields import RowField, tensors_of


class Isolated:
    """A field whose tensors are leaves of a graph of its own, so that a backward pass ends at them.

    A parameter may have made a row argument as well (an encoder that shares weights with the field). Its gradient by
    that way is outer autograd's, and must not be counted here too: tensors that have a history are replaced.

    Args:
        field: what is integrated.
        name: of the gradient, for errors.
    Attributes:
        field: the same field on its own leaves.
        tensors: what it depends on, with history.
        leaves: what stands for these in `field`; a parameter stands for itself.
    Raises:
        ConfigError: if a tensor cannot be replaced, or if a module would answer otherwise the second time.
    """

    def __init__(self, field: Any, name: str) -> None:
        _check_repeatable(field, name)
        self.tensors = tensors_of(field)
        swap = {id(v): v.detach().requires_grad_() for v in self.tensors if v.grad_fn is not None}
        self.field = _with(field, swap) if swap else field
        self.leaves = tuple(swap.get(id(v), v) for v in self.tensors)
        found = tensors_of(self.field) if swap else self.leaves
        if len(found) != len(self.leaves) or any(a is not b for a, b in zip(found, self.leaves, strict=True)):
            raise ConfigError(
                f"gradient '{name}': {type(field).__name__} depends on a tensor that was computed from others, and "
                "does not hold it where it can be replaced. Hand such tensors over as arguments of a RowField, keep "
                "them as plain attributes, or use gradient: backprop."
            )


def _with(value: Any, swap: Mapping[int, Tensor]) -> Any:
    """A copy in which tensors are replaced, as far down as fields, tuples and mappings reach."""
    if isinstance(value, Tensor):
        return swap.get(id(value), value)
    if isinstance(value, Mapping):
        return {key: _with(item, swap) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_with(item, swap) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, partial):
        return partial(_with(value.func, swap), *_with(value.args, swap), **_with(value.keywords, swap))
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _with(value.__self__, swap))
    if isinstance(value, nn.Module) or not (isinstance(value, RowField) or hasattr(value, "tensors")):
        return value
    out = copy.copy(value)
    for key, item in getattr(value, "__dict__", {}).items():
        object.__setattr__(out, key, _with(item, swap))
    return out


def _modules(value: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside a field, by name, as far as they can be seen."""
    if isinstance(value, nn.Module):
        yield from value.named_modules()
    elif isinstance(value, MethodType):
        yield from _modules(value.__self__)
    elif isinstance(value, partial):
        yield from _modules(value.func)
    elif not isinstance(value, (Tensor, type)) and (isinstance(value, RowField) or hasattr(value, "tensors")):
        for item in getattr(value, "__dict__", {}).values():
            yield from _modules(item)


def _check_repeatable(field: Any, name: str) -> None:
    for path, module in _modules(field):
        title = f"{type(module).__name__}{f' ({path})' if path else ''}"
        if not module.training:
            continue
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise ConfigError(
                f"gradient '{name}' evaluates the field again in the backward pass, where {title} would update its "
                "running statistics a second time. Use another normalisation (layer or group norm), or gradient: "
                "backprop."
            )
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise ConfigError(
                f"gradient '{name}' evaluates the field again in the backward pass, where {title} would drop other "
                f"units. Set its probability {module.p} to 0, or use gradient: backprop."
            )


class Refused(torch.autograd.Function):
    """The identity, but for a message to whoever asks for its gradient."""

    @staticmethod
    def forward(ctx: Any, message: str, anchor: Tensor, value: Tensor) -> Tensor:
        ctx.message = message
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ConfigError(ctx.message)
