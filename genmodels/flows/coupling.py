"""Couplings: one part of an item passes unchanged and tells a network how to transform the other part."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..networks.network import Network, zero_head
from ..registry import ConfigError, register
from ..types import Condition, Shape
from .bijection import Bijection
from .elementwise import Elementwise, transform_items
from .monotone import Monotone, RationalQuadratic


@register(Bijection, "coupling")
class Coupling(Bijection):
    """z_t = g(x_t; θ(x_k)) with an increasing map g of each number; z_k = x_k, or g(x_k) with free parameters.

    log_det = Σ log|dz_t/dx_t| (+ Σ log|dz_k/dx_k|). The first axis of an item (components, or channels of an image) is
    split into the kept part k and the transformed part t. The network maps x_k [B, C_k, …] to [B, P·C_t, …], P
    parameters for each number of x_t, parameter-major; it sees x_k before the free map, and is called once per
    evaluation, in either direction.

    Args:
        network: builder of the conditioner. Where its output has the batch innermost in memory (as that of `mlp` and of
            `residual_mlp` has), no copy is made.
        map: g. Layers start with the network's `head`, where it has one, at zero if the map's `identity` asks for it.
        split: "half" keeps the first half of the components or channels, "alternating" the even ones.
        mask: places of the transformed part along the first axis, instead of `split`. After `squeeze`, the places 1 and
            2 of every four are the checkerboard of the image before it.
        swap: keep and transform the other way round.
        unconditional: give the kept part maps of its own.
        scale_logits: divide what the map calls logits by the root of the network's `width`, where it has one.
    Raises:
        ConfigError: if a part is empty, or a mask names places that there are not, or one twice.
    Source: Dinh et al. 2017 (Real NVP), section 3; Durkan et al. 2019 (Neural Spline Flows), section 3.2, appendix B.
    """

    hands_on = True

    def __init__(
        self,
        network: Callable[..., Network],
        map: Monotone = RationalQuadratic(),
        split: Literal["half", "alternating"] = "half",
        mask: tuple[int, ...] | None = None,
        swap: bool = False,
        unconditional: bool = False,
        scale_logits: bool = True,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        self.shape, self.map = tuple(shape), map
        second, rest = _transformed(self.shape, split, mask, swap), self.shape[1:]
        first = [place for place in range(self.shape[0]) if place not in second]
        self.register_buffer("kept", torch.tensor(first), persistent=False)
        self.register_buffer("transformed", torch.tensor(second), persistent=False)
        self.register_buffer("order", torch.cat((self.kept, self.transformed)).argsort(), persistent=False)
        self.network = network(
            in_shape=(len(self.kept), *rest),
            out_shape=(map.parameters * len(self.transformed), *rest),
            timed=False,
            num_classes=num_classes,
            condition_shape=condition_shape,
        )
        if map.identity:
            zero_head(self.network)
        width = getattr(self.network, "width", None) if scale_logits else None
        self.scale = 1.0 if width is None else width**-0.5
        kept = (len(self.kept), *rest)
        self.own = Elementwise(map, shape=kept, num_classes=None, condition_shape=None) if unconditional else None

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept and the transformed part of x."""
        return x.index_select(1, self.kept), x.index_select(1, self.transformed)

    def join(self, kept: Tensor, transformed: Tensor) -> Tensor:
        return torch.cat((kept, transformed), 1).index_select(1, self.order)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        kept, x = self.part(x)
        z, log_det = transform_items(self.map, x, self.network(None, kept, condition), scale=self.scale)
        if self.own is not None:
            kept, more = self.own(kept)
            log_det = log_det + more
        return self.join(kept, z), log_det

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        kept, z = self.part(z)
        log_det = 0.0
        if self.own is not None:
            kept, log_det = self.own.inverse(kept)
        out = self.network(None, kept, condition)
        x, more = transform_items(self.map, z, out, inverse=True, scale=self.scale)
        return self.join(kept, x), log_det + more

    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        self.network.initialize(self.part(x)[0], condition)


def _transformed(shape: Shape, split: str, mask: tuple[int, ...] | None, swap: bool) -> list[int]:
    """Which places of the first axis are transformed, in order."""
    count = shape[0] if shape else 0
    if mask is None:
        second = [place for place in range(count) if (place >= count // 2 if split == "half" else place % 2 == 1)]
    elif len(set(mask)) < len(mask) or not all(0 <= place < count for place in mask):
        raise ConfigError(
            f"coupling: mask must name different places of 0 … {count - 1} along the first axis of items of shape "
            f"{list(shape)}, found {list(mask)}."
        )
    else:
        second = sorted(mask)
    second = [place for place in range(count) if place not in second] if swap else second
    if not 0 < len(second) < count:
        chosen = f"split={split}" if mask is None else f"mask={list(mask)}"
        raise ConfigError(
            f"coupling: {chosen} leaves a part empty: of items of shape {list(shape)} it keeps "
            f"{count - len(second)} and transforms {len(second)} places of the first axis. Put `flatten` before it, or "
            "use `elementwise` for single numbers."
        )
    return second
