"""MADE as a model of data: one pass of a masked network gives the law of every number given those before it."""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from ..model import Model
from ..networks.made import MADE
from ..networks.network import Network
from ..registry import register
from ..rng import Noise
from ..transforms import Transform
from ..types import Shape
from .nade import OrderedModel
from .observations import GaussianMixture, Observation


@register(Model, "made")
class MaskedAutoencoder(OrderedModel):
    """Π_i p(x_i | x_before i), each law steered by the outputs of a masked network for its number.

    Scoring takes one pass of the network, sampling one sweep through it. With the order "any" each batch has a random
    order, that is, masks of its own on the same weights, so that the loss is unbiased for the mean over all orders; the
    weights belong to the numbers of an item, wherever they come in the order.

    Data of two levels are modelled as they are, by Bernoulli laws; all other data in model space, by mixtures.

    Args:
        network: the masked network `made`, on flattened items.
        observation: law of one number; bernoulli for data of two levels if not given, gaussian_mixture for others.
        order: "network" for that of the network, or "any", which needs a network of the natural order.
        conditional: whether the network sees the condition of the data (labels, embeddings).
    Raises:
        ValueError: if the network is not masked or has another order where any is asked for, if the law does not fit
            the data, or if a conditional model meets data without conditions.
    Source: Germain et al. 2015 (MADE), sections 3 and 4.
    """

    def __init__(
        self,
        network: Callable[..., Network] = MADE,
        observation: Observation | None = None,
        order: Literal["network", "any"] = "network",
        conditional: bool = False,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        levels: int | None,
        bin_width: float | None,
    ) -> None:
        sizes = {"shape": shape, "num_classes": num_classes, "condition_shape": condition_shape}
        facts = {"transform": transform, "levels": levels, "bin_width": bin_width}
        super().__init__(observation, GaussianMixture(), conditional, **sizes, **facts)
        self.each = self.observation.parameters
        outputs = (self.each * self.dims,)
        self.network = network(in_shape=(self.dims,), out_shape=outputs, timed=False, **self.conditions)
        self.any_order = order == "any"
        if not isinstance(self.network, MADE):
            raise ValueError(f"made: the masked network `made` is needed, found '{self.network.registered_name}'.")
        order_of = getattr(self.network, "order", torch.empty(0)).tolist()  # none where it is an adjacency
        if self.any_order and order_of != list(range(self.dims)):
            raise ValueError(
                "made: order: any needs a network of the natural order. Leave out the network's own order."
            )

    def raw(self, x: Tensor, condition: Tensor | None, order: Tensor | None) -> Tensor:
        if order is None:
            out = self.network(None, x, condition)
        else:
            out = functional_call(self.network, self._in_order(order), (None, x[:, order], condition))
        out = out.unflatten(1, (self.each, self.dims)).movedim(1, 0)
        return out if order is None else out[..., order.argsort()]

    def _in_order(self, order: Tensor) -> dict[str, Tensor]:
        """What makes the network of the natural order one for x[:, order]: its weights, by place in that order."""
        rows = (torch.arange(self.each, device=order.device)[:, None] * self.dims + order).flatten()
        first, head = self.network.first, self.network.head
        return {"first.weight": first.weight[:, order], "head.weight": head.weight[rows], "head.bias": head.bias[rows]}

    def draw(self, u: Tensor, condition: Tensor | None, order: Tensor | None) -> Tensor:
        network, places = self.network, self.network.places
        if order is not None:
            network, places = copy.deepcopy(network), order
            network.load_state_dict(self._in_order(order), strict=False)
        x = u.new_zeros(u.shape[1:], dtype=self.dtype)
        sweep = network.sweep(condition, x)
        for part in places.split(sweep.sizes):
            found = self.observation.sample(sweep.parameters(), u[:, :, part].mT)
            sweep.feed(found)
            x[:, part] = found.mT
        return x

    def training_order(self, noise: Noise) -> Tensor:
        return noise.uniform(self.dims)[0].argsort()
