"""Autoregressive layers: each component is transformed as the components before it tell."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..networks.made import MADE
from ..networks.network import Network, zero_head
from ..registry import ConfigError, register
from ..types import Condition, Shape
from .bijection import Bijection
from .elementwise import transform_items
from .monotone import Monotone, RationalQuadratic


@register(Bijection, "autoregressive")
class Autoregressive(Bijection):
    """z_i = g(x_i; θ_i(x_before i)) with an increasing map g of each component; log_det = Σ log|dz_i/dx_i|.

    One pass of the network gives z from x; x comes from z one component after another, in a `sweep` through the network
    that computes each of its units once. Inside `inverse` it is an inverse autoregressive flow: fast samples, and
    likelihoods of given items by the sweep.

    Args:
        network: builder of the conditioner, which must offer `sweep`: `made`, or `shared` of one. It maps [B, D] to
            [B, P·D], P parameters for each component, parameter-major.
        map: g. Layers start with the network's `head` at zero if the map's `identity` asks for it.
        scale_logits: divide what the map calls logits by the root of the network's `width`; the published
            autoregressive layers do not.
    Raises:
        ConfigError: if the items are no vectors, or the network has no sweep.
    Source: Papamakarios et al. 2017 (Masked Autoregressive Flow), section 3.1; Kingma et al. 2016 (Inverse
        autoregressive flow), section 3; Durkan et al. 2019 (Neural Spline Flows), section 3.2.
    """

    hands_on = True

    def __init__(
        self,
        network: Callable[..., Network] = MADE,
        map: Monotone = RationalQuadratic(),
        scale_logits: bool = False,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        self.shape, self.map = tuple(shape), map
        if len(self.shape) != 1:
            raise ConfigError(
                f"autoregressive: vectors are needed, found items of shape {list(self.shape)}. Put `flatten` before it."
            )
        self.network = network(
            in_shape=self.shape,
            out_shape=(map.parameters * self.shape[0],),
            timed=False,
            num_classes=num_classes,
            condition_shape=condition_shape,
        )
        if not callable(getattr(self.network, "sweep", None)):
            raise ConfigError(
                f"autoregressive: the network '{self.network.registered_name}' does not order the components of its "
                "input. Use `made`, or `shared` of `made`."
            )
        if map.identity:
            zero_head(self.network)
        width = getattr(self.network, "width", None) if scale_logits else None
        self.scale = 1.0 if width is None else width**-0.5

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return transform_items(self.map, x, self.network(None, x, condition), scale=self.scale)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        sweep = self.network.sweep(condition, z)
        found, slopes = [], []
        for part in z.mT.index_select(0, sweep.places).split(sweep.sizes):
            x, log_slope = self.map(part, sweep.parameters(), inverse=True, scale=self.scale)
            sweep.feed(x)
            found.append(x)
            slopes.append(log_slope)
        self.network.passed(len(z))
        x = torch.cat(found).index_select(0, sweep.places.argsort()).mT
        return x, torch.cat(slopes).sum(0, dtype=torch.float64)

    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        self.network.initialize(x, condition)
