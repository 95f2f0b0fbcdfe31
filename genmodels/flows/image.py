"""Bijections for images: space to depth, and levels after each of which a part of the image is done."""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape
from .bijection import Bijection, chain
from .linear import Unconditional


@register(Bijection, "squeeze")
class Squeeze(Unconditional):
    """z_{4c + 2a + b, i, j} = x_{c, 2i + a, 2j + b}: each 2x2 square of pixels becomes four channels; log_det = 0.

    Raises:
        ConfigError: unless items are images [C, H, W] of even height and width.
    Source: Dinh et al. 2017 (Real NVP), section 3.6; order of channels of Durkan et al. 2019 (Neural Spline Flows).
    """

    def __init__(self, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__(shape, num_classes, condition_shape)
        if len(self.shape) != 3:
            raise ConfigError(f"squeeze: images [C, H, W] are needed, found items of shape {list(self.shape)}.")
        if self.shape[1] % 2 or self.shape[2] % 2:
            raise ConfigError(
                f"squeeze: an even height and width are needed, found {self.shape[1]}x{self.shape[2]}. Squeeze fewer "
                "times, or pad the images."
            )

    @property
    def out_shape(self) -> Shape:
        channels, height, width = self.shape
        return (4 * channels, height // 2, width // 2)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return rearrange(x, "n c (i a) (j b) -> n (c a b) i j", a=2, b=2), self.no_change(x)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return rearrange(z, "n (c a b) i j -> n c (i a) (j b)", a=2, b=2), self.no_change(z)


@register(Bijection, "multiscale")
class Multiscale(Bijection):
    """Levels of layers; after each level but the last, the first half of its channels is done and the rest goes on.

    (h_k, x_{k+1}) = f_k(x_k) and z = (h_1, …, h_L), flattened and put one after another; log_det = Σ log|det ∂f_k|.
    Of an odd number of channels the larger part is done.

    Args:
        levels: the layers of each level, each built for the shape that the one before it leaves.
    Raises:
        ConfigError: if there is no level, one without layers, or one that leaves a single channel to split.
    Source: Dinh et al. 2017 (Real NVP), section 3.6; Durkan et al. 2019 (Neural Spline Flows), section 5.3.
    """

    def __init__(
        self,
        levels: tuple[tuple[Callable[..., Bijection], ...], ...],
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        if not levels or not all(levels):
            raise ConfigError(f"multiscale: levels of at least one layer are needed, found {list(map(len, levels))}.")
        self.shape = tuple(shape)
        self.levels, self.done = nn.ModuleList(), []
        for k, layers in enumerate(levels):
            self.levels.append(chain(layers, shape, num_classes=num_classes, condition_shape=condition_shape))
            channels, *rest = self.levels[k].out_shape
            if k == len(levels) - 1:
                self.done.append((channels, *rest))
            elif channels < 2:
                raise ConfigError(
                    f"multiscale.levels[{k}]: it leaves items of shape {[channels, *rest]}, of which no half can go "
                    "on. Put `squeeze` into it, or use fewer levels."
                )
            else:
                self.done.append(((channels + 1) // 2, *rest))
                shape = (channels // 2, *rest)

    @property
    def out_shape(self) -> Shape:
        return (math.prod(self.shape),)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        total, parts = x.new_zeros(len(x), dtype=torch.float64), []
        for level, done in zip(self.levels, self.done, strict=True):
            x, log_det = level(x, condition)
            part, x = x.tensor_split([done[0]], 1)  # nothing goes on from the last level
            parts.append(part.flatten(1))
            total = total + log_det
        return torch.cat(parts, 1), total

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z), dtype=torch.float64)
        parts = z.split([math.prod(done) for done in self.done], 1)
        x = None
        for level, done, part in reversed(list(zip(self.levels, self.done, parts, strict=True))):
            part = part.unflatten(1, done)
            x, log_det = level.inverse(part if x is None else torch.cat((part, x), 1), condition)
            total = total + log_det
        return x, total

    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        for level, done in zip(self.levels, self.done, strict=True):
            level.initialize(x, condition)
            x = level(x, condition)[0][:, done[0] :]
