"""Transforms of the package zuko as bijections of ours. It is optional, and imported where it is used."""

import inspect
import math
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..schema import near
from ..types import Condition, Shape
from .bijection import Bijection
from .context import context_vectors


@register(Bijection, "zuko")
class ZukoBijection(Bijection):
    """Any transform of the package zuko: what its flows call `transform`, from data to latent as ours.

    A flow's own base law is left out: the base of the flow around this layer is used. Items are flattened on the way in
    and shaped on the way out. Conditions arrive as its context, one vector an item: labels one-hot (the label
    `num_classes`, which means "none", and no condition at all as zeros), vectors flattened. From Python,
    `ZukoBijection.of(transform, shape)` holds a transform that is built already.

    zuko inverts some flows (NAF, UNAF, BPF, GF, SOSPF) by bisection and CNF by an adaptive solver, each to a tolerance
    of its own; the step sizes of CNF depend on the whole batch. NCSF acts on [-π, π], for which `base` should be
    `{name: box, low: -3.14159, high: 3.14159}`.

    Args:
        flow: the name of a flow or of a lazy transform in zuko.flows (NSF, MAF, NICE, RealNVP, NCSF, NAF, GF, …).
        arguments: for its constructor. `features` and `context` are filled in; lists become tensors for `order`, `mask`
            and `adjacency`; names become those of zuko.transforms for `univariate`, of torch.nn for `activation`.
    Raises:
        ConfigError: if zuko is not installed, if it has no such flow, or if the arguments do not fit.
        ValueError: if the transform does not take items of this shape; if values are outside its domain.
    Source: Rozet et al. 2022 (Zuko: normalizing flows in PyTorch).
    """

    def __init__(
        self,
        flow: str,
        arguments: dict[str, Any] | None = None,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        width = num_classes or (0 if condition_shape is None else math.prod(condition_shape))
        made = _make(flow, dict(arguments or {}), math.prod(shape), width)
        self._hold(made, shape, num_classes, condition_shape)

    @classmethod
    def of(
        cls,
        transform: nn.Module,
        shape: Shape,
        *,
        num_classes: int | None = None,
        condition_shape: Shape | None = None,
    ) -> "ZukoBijection":
        """A flow or lazy transform that is built already, given a context if classes or vectors are given.

        Example: `ZukoBijection.of(zuko.flows.NSF(2, transforms=4).transform, (2,))`
        """
        held = cls.__new__(cls)
        Bijection.__init__(held)
        held._hold(transform, shape, num_classes, condition_shape)
        return held

    def _hold(self, made: nn.Module, shape: Shape, classes: int | None, vectors: Shape | None) -> None:
        zuko = _library()
        made = made.transform if isinstance(made, zuko.lazy.Flow) else made
        if not isinstance(made, zuko.lazy.LazyTransform):
            raise ConfigError(f"zuko: a flow or a LazyTransform is needed, found {type(made).__name__}.")
        self.transform, self.shape = made, tuple(shape)
        self.num_classes, self.condition_shape = classes, vectors
        self.bound = _period(made, zuko)
        if any(getattr(layer, "exact", True) is False for layer in made.modules()):
            raise ConfigError("zuko: exact=False estimates the volume with noise of its own; leave it true.")
        self._check_shape()

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self._call(x, condition, inverse=False)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self._call(z, condition, inverse=True)

    def _call(self, x: Tensor, condition: Condition | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if len(x) == 0:  # zuko cannot tell the size of an axis then
            return x, x.new_zeros(0, dtype=torch.float64)
        if self.bound is not None and (x.abs() > self.bound).any():
            raise ValueError(
                f"zuko: this transform is circular on [-{self.bound:.6g}, {self.bound:.6g}], found values from "
                f"{x.min():.6g} to {x.max():.6g}. Rescale the data; as a base, use a box of that interval."
            )
        transform = self.transform(context_vectors(condition, x, self.num_classes, self.condition_shape))
        y, log_det = (transform.inv if inverse else transform).call_and_ladj(x.flatten(1))
        return y.reshape(x.shape), log_det.double()

    @torch.no_grad()
    def _check_shape(self) -> None:
        like = next((v for v in self.state_dict().values() if v.is_floating_point()), torch.zeros(()))
        try:
            _, log_det = self._call(like.new_full((2, *self.shape), 0.5), None, inverse=False)
        except (RuntimeError, TypeError, IndexError, AttributeError, ValueError) as error:
            width = self.num_classes or (math.prod(self.condition_shape) if self.condition_shape else 0)
            raise ValueError(
                f"zuko: {type(self.transform).__name__} does not take {math.prod(self.shape)} features (items of shape "
                f"{self.shape}) with a context of {width}: {str(error).splitlines()[0]}. Build it with these numbers."
            ) from error
        if log_det.shape != (2,):
            raise ValueError(
                f"zuko: {type(self.transform).__name__} gives log-determinants of shape {tuple(log_det.shape)} for a "
                "batch of 2; one an item is needed."
            )


def _library() -> ModuleType:
    try:
        import zuko
    except ImportError as error:
        raise ConfigError(f"zuko: the package zuko is not installed ({error}): pip install zuko.") from error
    return zuko


def _make(name: str, arguments: dict[str, Any], features: int, context: int) -> nn.Module:
    zuko = _library()
    kinds = (zuko.lazy.Flow, zuko.lazy.LazyTransform)
    found = {
        key: value
        for key, value in vars(zuko.flows).items()
        if isinstance(value, type) and issubclass(value, kinds) and "features" in inspect.signature(value).parameters
    }
    if name not in found:
        known = ", ".join(sorted(found))
        raise ConfigError(f"zuko: zuko.flows has no flow {name!r}.{near(name, found)} Known: {known}.")
    given = {"features": features, "context": context, **{k: _value(k, v, zuko) for k, v in arguments.items()}}
    try:
        return found[name](**given)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = error or "no reason given"
        raise ConfigError(f"zuko: {name}({shown}) for {features} features is refused by zuko: {reason}.") from error


def _value(key: str, value: Any, zuko: ModuleType) -> Any:
    if key in ("order", "mask", "adjacency") and isinstance(value, (list, tuple)):
        return torch.tensor(value)
    if key in ("univariate", "activation"):
        place = zuko.transforms if key == "univariate" else nn
        if not isinstance(value, str) or not callable(getattr(place, value, None)):
            raise ConfigError(f"zuko: {key} must be a name in {place.__name__}, found {value!r}.")
        return getattr(place, value)
    return [tuple(part) for part in value] if key == "shapes" else value


def _period(transform: nn.Module, zuko: ModuleType) -> float | None:
    """Half the period of circular splines, None where there are none."""
    for layer in transform.modules():
        maps = getattr(layer, "univariate", None)
        if (maps.func if isinstance(maps, partial) else maps) is zuko.flows.spline.CircularRQSTransform:
            return math.pi
    return None
