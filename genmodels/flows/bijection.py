"""Invertible maps with tractable volume change, and their composition."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..networks.network import Network
from ..networks.shared import Scope
from ..registry import kind, register
from ..types import Condition, Shape


@kind
class Bijection(nn.Module, ABC):
    """An invertible map, forward = data x -> latent z.

    Constructors take configuration arguments first; the parent supplies `shape`, `num_classes` and `condition_shape`.

    Attributes:
        shape: shape of one item of x.
        out_shape: shape of one item of z (a permutation of the same numbers).
        numerical: whether it is known up to the tolerance of a solver alone.
        hands_on: whether its `initialize`, if it has one, only hands the batch on to its parts.
    """

    shape: Shape
    numerical: ClassVar[bool] = False
    hands_on: ClassVar[bool] = False

    @property
    def out_shape(self) -> Shape:
        return self.shape

    @abstractmethod
    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """z [B, *out_shape] and log|det ∂z/∂x| [B] in float64."""

    @abstractmethod
    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """x [B, *shape] and log|det ∂x/∂z| [B] in float64."""

    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        """Set what depends on data from one batch, in model space (ActNorm); called once, in `prepare`."""


def starts_from_data(module: nn.Module) -> bool:
    """Whether anything in a bijection is set from the data in `initialize`."""
    return any(
        getattr(type(part), "initialize", None) not in (None, Bijection.initialize, Network.initialize)
        and not getattr(part, "hands_on", False)
        for part in module.modules()
    )


class Chain(Bijection):
    """Bijections applied one after another; log-determinants add."""

    hands_on = True

    def __init__(self, bijections: list[Bijection]) -> None:
        super().__init__()
        self.bijections = nn.ModuleList(bijections)
        self.shape = bijections[0].shape

    @property
    def out_shape(self) -> Shape:
        return self.bijections[-1].out_shape

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x), dtype=torch.float64)
        for bijection in self.bijections:
            x, log_det = bijection(x, condition)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z), dtype=torch.float64)
        for bijection in reversed(self.bijections):
            z, log_det = bijection.inverse(z, condition)
            total = total + log_det
        return z, total

    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        for bijection in self.bijections:
            bijection.initialize(x, condition)
            x, _ = bijection(x, condition)


def chain(layers: tuple[Callable[..., Bijection], ...], shape: Shape, **context: Any) -> Chain:
    """Build layers one after another, each for the shape that the one before it leaves."""
    built: list[Bijection] = []
    for layer in layers:
        built.append(layer(shape=shape, **context))
        shape = built[-1].out_shape
    return Chain(built)


@register(Bijection, "repeat")
class Repeat(Chain):
    """The same layers `count` times, each copy with parameters of its own, except for what `shared` networks share."""

    def __init__(
        self,
        layers: tuple[Callable[..., Bijection], ...],
        count: int,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        if count < 1 or not layers:
            raise ValueError(
                f"repeat: at least one layer and a count of at least 1 are needed, found {len(layers)} and {count}."
            )
        context = {"num_classes": num_classes, "condition_shape": condition_shape, "scope": Scope()}
        super().__init__(list(chain(layers * count, shape, **context).bijections))


@register(Bijection, "inverse")
class Inverse(Bijection):
    """A bijection run backwards (an autoregressive one becomes inverse-autoregressive: fast samples, slow density)."""

    def __init__(
        self, of: Callable[..., Bijection], *, shape: Shape, num_classes: int | None, condition_shape: Shape | None
    ) -> None:
        super().__init__()
        self.of = of(shape=shape, num_classes=num_classes, condition_shape=condition_shape)
        self.shape = shape
        if self.of.out_shape != shape:
            raise ValueError(
                f"inverse: a layer that keeps the shape {shape} is needed, this one gives {self.of.out_shape}."
            )

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.of.inverse(x, condition)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.of(z, condition)
