"""Bijections for images: space to depth, and levels after each of which a part of the image is done."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ..networks.network import Network, zero_head
from ..registry import ConfigError, register
from ..types import Condition, Shape, sum_items
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
    """Levels of layers; after each level but the last, half of its channels is done and the rest goes on.

    (h_k, x_{k+1}) = f_k(x_k) and z = (h_1, …, h_L), flattened and put one after another; log_det = Σ log|det ∂f_k|.
    Of an odd number of channels the larger part is done. With a prior, the done half is told apart from what goes on:
    h_k = (h - m)/exp(s) with (m, s) = network(x_{k+1}), which subtracts Σ s from log_det.

    Args:
        levels: the layers of each level, each built for the shape that the one before it leaves.
        done: which half is done. Real NVP and Neural Spline Flows: the first, Glow: the second.
        prior: builder of the network that gives m | s, one per level but the last; its `head`, where it has one, starts
            at zero.
    Raises:
        ConfigError: if there is no level, one without layers, or one that leaves a single channel to split.
    Source: Dinh et al. 2017 (Real NVP), section 3.6; Durkan et al. 2019 (Neural Spline Flows), section 5.3; Kingma &
        Dhariwal 2018 (Glow), section 3.3.
    """

    hands_on = True

    def __init__(
        self,
        levels: tuple[tuple[Callable[..., Bijection], ...], ...],
        done: Literal["first", "second"] = "first",
        prior: Callable[..., Network] | None = None,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        if not levels or not all(levels):
            raise ConfigError(f"multiscale: levels of at least one layer are needed, found {list(map(len, levels))}.")
        context = {"num_classes": num_classes, "condition_shape": condition_shape}
        self.shape, self.first = tuple(shape), done == "first"
        self.levels, self.priors, self.done = nn.ModuleList(), nn.ModuleList(), []
        for k, layers in enumerate(levels):
            self.levels.append(chain(layers, shape, **context))
            channels, *rest = self.levels[k].out_shape
            if k == len(levels) - 1:
                self.done.append((channels, *rest))
                break
            if channels < 2:
                raise ConfigError(
                    f"multiscale.levels[{k}]: it leaves items of shape {[channels, *rest]}, of which no half can go "
                    "on. Put `squeeze` into it, or use fewer levels."
                )
            shape, half = (channels // 2, *rest), (channels + 1) // 2
            self.done.append((half, *rest))
            if prior is not None:
                self.priors.append(prior(in_shape=shape, out_shape=(2 * half, *rest), timed=False, **context))
                zero_head(self.priors[k])

    @property
    def out_shape(self) -> Shape:
        return (math.prod(self.shape),)

    def _split(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """What is done after level k, and what goes on."""
        half = self.done[k][0]
        if self.first:
            return x[:, :half], x[:, half:]
        return x[:, x.shape[1] - half :], x[:, : x.shape[1] - half]

    def _join(self, part: Tensor, rest: Tensor) -> Tensor:
        return torch.cat((part, rest) if self.first else (rest, part), 1)

    def _by_prior(
        self, k: int, part: Tensor, rest: Tensor, condition: Condition | None, inverse: bool = False
    ) -> tuple[Tensor, Tensor | float]:
        """The done half in units of its prior given what goes on (or back from these), and the log_det of that."""
        if not len(self.priors):
            return part, 0.0
        out = self.priors[k](None, rest, condition)
        mean, log_std = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2, 1)
        if inverse:
            return (part * log_std.exp() + mean).to(part.dtype), sum_items(log_std)
        return ((part - mean) * (-log_std).exp()).to(part.dtype), -sum_items(log_std)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        total, parts = x.new_zeros(len(x), dtype=torch.float64), []
        for k in range(len(self.levels) - 1):
            x, log_det = self.levels[k](x, condition)
            part, x = self._split(x, k)
            part, more = self._by_prior(k, part, x, condition)
            parts.append(part.flatten(1))
            total = total + log_det + more
        x, log_det = self.levels[-1](x, condition)
        return torch.cat((*parts, x.flatten(1)), 1), total + log_det

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        parts = z.split([math.prod(done) for done in self.done], 1)
        x, total = self.levels[-1].inverse(parts[-1].unflatten(1, self.done[-1]), condition)
        for k in reversed(range(len(self.levels) - 1)):
            part, more = self._by_prior(k, parts[k].unflatten(1, self.done[k]), x, condition, inverse=True)
            x, log_det = self.levels[k].inverse(self._join(part, x), condition)
            total = total + log_det + more
        return x, total

    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        for k, level in enumerate(self.levels):
            level.initialize(x, condition)
            if k < len(self.levels) - 1:
                x = self._split(level(x, condition)[0], k)[1]
                if len(self.priors):
                    self.priors[k].initialize(x, condition)
