"""Bijections that act on each component by itself: channel-wise normalisation and increasing maps."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ..registry import register
from ..types import Condition, Shape
from .bijection import Bijection
from .monotone import Monotone, RationalQuadratic


def per_channel(shape: Shape, where: str) -> Shape:
    """(C, 1, …, 1): what broadcasts against items of `shape` with one number per component or channel."""
    if not shape:
        raise ValueError(f"{where}: items need at least one axis, found shape=().")
    return (shape[0], *(1,) * (len(shape) - 1))


@register(Bijection, "act_norm")
class ActNorm(Bijection):
    """z = exp(log_scale) x + shift per component, or per channel of an image; log_det = pixels · Σ log_scale.

    `initialize` makes its batch zero-mean with (unbiased) unit variance per channel, once; later calls change nothing,
    and until then the map is the identity. Channels that do not vary in that batch keep their scale.

    Source: Kingma & Dhariwal 2018 (Glow), section 3.1.
    """

    def __init__(self, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.log_scale = nn.Parameter(torch.zeros(per_channel(self.shape, "act_norm")))
        self.shift = nn.Parameter(torch.zeros(per_channel(self.shape, "act_norm")))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        """Set scale and shift from x [B, *shape].

        Raises:
            ValueError: if there are fewer than two items.
        """
        if self.initialized:
            return
        if len(x) < 2:
            raise ValueError(f"act_norm: at least two items are needed to measure a scale, found {len(x)}.")
        values = x.double()
        axes = [0, *range(2, x.ndim)]
        mean, std = values.mean(axes, keepdim=True)[0], values.std(axes, keepdim=True)[0]
        # the mean is rounded, so even a constant channel shows a spread of the size of rounding
        std = torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)
        self.initialized.fill_(True)

    def _log_det(self, x: Tensor) -> Tensor:
        total = self.log_scale.sum(dtype=torch.float64) * math.prod(self.shape[1:])
        return total.expand(len(x))

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + self.shift, self._log_det(x)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return (z - self.shift) * (-self.log_scale).exp(), -self._log_det(z)


def transform_items(
    map: Monotone, x: Tensor, raw: Tensor, *, inverse: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x [B, C, …] through `map` with the raw parameters [B, P·C, …] of a network, parameter-major.

    Returns:
        y [B, C, …] and log_det [B] in float64.
    """
    raw = rearrange(raw, "b (p c) ... -> p c ... b", p=map.parameters).contiguous()
    inner = rearrange(x, "b c ... -> c ... b").contiguous()
    y, log_slope = map(inner, raw, inverse=inverse, scale=scale)
    return rearrange(y, "c ... b -> b c ..."), log_slope.flatten(0, -2).sum(0, dtype=torch.float64)


@register(Bijection, "elementwise")
class Elementwise(Bijection):
    """z_i = g(x_i) with an increasing map g for each component, or each channel of an image, and free parameters.

    Parameters start at zero, where the map is the identity or near it.
    """

    def __init__(
        self,
        map: Monotone = RationalQuadratic(),
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        self.shape, self.map = tuple(shape), map
        self.raw = nn.Parameter(torch.zeros(map.parameters, *per_channel(self.shape, "elementwise"), 1))

    def _map(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        inner = rearrange(x, "b c ... -> c ... b").contiguous()
        y, log_slope = self.map(inner, self.raw, inverse=inverse)
        return rearrange(y, "c ... b -> b c ..."), log_slope.flatten(0, -2).sum(0, dtype=torch.float64)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, False)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self._map(z, True)
