"""Fully connected networks: plain and residual. Items are flattened on the way in and shaped on the way out."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..registry import register
from ..types import Condition, Shape
from .embeddings import ConditionEmbedding, TimeEmbedding
from .network import Modulation, Network, Shareable, Site, check_timed

Activation = Literal["silu", "relu", "gelu", "tanh"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class Head(nn.Linear):
    """A linear layer whose output [B, out_features] lies in memory with the batch innermost.

    Its transpose is contiguous, at no cost: the product is formed as W hᵀ + b. Spline couplings work along that axis.
    """

    def forward(self, h: Tensor) -> Tensor:
        return torch.addmm(self.bias[:, None], self.weight, h.mT).mT


class Embeddings(nn.Module):
    """Time and condition as one vector [B, width]; absent if a network has neither."""

    def __init__(self, width: int, *, timed: bool, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__()
        self.time = TimeEmbedding(width) if timed else None
        self.condition = ConditionEmbedding(width, num_classes=num_classes, condition_shape=condition_shape)
        self.active = timed or num_classes is not None or condition_shape is not None

    def forward(self, t: Tensor | None, like: Tensor, condition: Condition | None) -> Tensor:
        """[B, width] for the rows of `like`.

        Raises:
            ValueError: if t is missing from a timed network or given to one without time, or a condition to an
                unconditional network.
        """
        check_timed(self.time is not None, t)
        out = self.condition(condition, len(like), like)
        return out if self.time is None else out + self.time(t, len(like))

    def distinct(self, t: Tensor | None, like: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor | None]:
        """The vectors [R, width] that occur, and which of them [B] each row has; one for all (R = 1), or its own: None.

        At one time for all rows there are as many as classes, or one: what a network makes of the vectors alone, it
        makes of fewer. Raises as `forward`.
        """
        classes, few = self.condition.num_classes, t is None or t.ndim == 0
        if few and classes is None and self.condition.condition_shape is None and condition is None:
            return self(t, like[:1], None), None
        if not few or classes is None or condition is None or classes + 1 >= len(like):
            return self(t, like, condition), None
        self.condition.check(condition, len(like))
        every = torch.arange(classes + 1, device=like.device)
        return self(t, like[:1].expand(classes + 1, *like.shape[1:]), every), condition


def pick(values: Tensor, rows: Tensor | None) -> Tensor:
    """[B, *] the values [R, *] that rows have, see `Embeddings.distinct`."""
    return values if rows is None else values[rows]


class _Dense(Shareable):
    """What both networks share: flattening, embeddings, and the head.

    Attributes:
        width: number of features that the head reads.
        head: the last linear layer.
    """

    def __init__(self, width: int, in_shape: Shape, out_shape: Shape, zero_init: bool) -> None:
        super().__init__()
        self.width, self.in_shape, self.out_shape = width, tuple(in_shape), tuple(out_shape)
        self.zero_init = zero_init
        self.head = self.new_head()

    def new_head(self) -> nn.Module:
        head = Head(self.width, math.prod(self.out_shape))
        if self.zero_init:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        return head

    def finish(self, head: nn.Module, features: Tensor) -> Tensor:
        return head(features).reshape(len(features), *self.out_shape)

    def flat(self, x: Tensor) -> Tensor:
        """[B, prod(in_shape)] the items x [B, *in_shape] as rows."""
        self.check_items(x)
        return x.reshape(len(x), math.prod(self.in_shape))


@register(Network, "mlp")
class MLP(_Dense):
    """Linear layers with an activation between them.

    h = act(W_0 x + b_0 + e(t) + e(condition)), then h = act(W_k h + b_k) per further layer, and out = W h + b.

    The output lies in memory with the batch innermost (see `Head`).

    Args:
        hidden: width of each hidden layer.
        dropout: share of the features dropped after each activation in training.
        zero_init: start the last layer at zero.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (128, 128),
        activation: Activation = "silu",
        dropout: float = 0.0,
        zero_init: bool = False,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        if not hidden or min(hidden) < 1:
            raise ValueError(f"mlp: at least one hidden layer of at least one unit is needed, found hidden={hidden}.")
        super().__init__(hidden[-1], in_shape, out_shape, zero_init)
        self.embeddings = Embeddings(hidden[0], timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        self.sites = tuple(Site(size, size) for size in hidden)
        sizes = (math.prod(in_shape), *hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)

    def features(
        self,
        t: Tensor | None,
        x: Tensor,
        condition: Condition | None = None,
        modulation: Sequence[Modulation] | None = None,
    ) -> Tensor:
        h = self.flat(x)
        embedding = self.embeddings(t, x, condition)
        for i, layer in enumerate(self.layers):
            bias, gate = (None, None) if modulation is None else modulation[i]
            h = layer(h)
            h = h + embedding if i == 0 and self.embeddings.active else h
            h = self.activation(h if bias is None else h + bias)
            h = self.dropout(h if gate is None else h * (1 + gate))
        return h


class _Block(nn.Module):
    """h + gate ⊙ W_2 drop(act(W_1 act(h))), gate = sigmoid(W_e e) where there is an embedding e, else 1.

    Modulation adds its bias to W_1 act(h) and multiplies what is added to h.
    """

    def __init__(self, hidden: int, activation: Activation, dropout: float, gated: bool) -> None:
        super().__init__()
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, hidden) if gated else None
        nn.init.uniform_(self.second.weight, -1e-3, 1e-3)
        nn.init.uniform_(self.second.bias, -1e-3, 1e-3)

    def forward(
        self,
        h: Tensor,
        embedding: Tensor,
        bias: Tensor | None = None,
        gate: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        change = self.first(self.activation(h))
        change = self.second(self.dropout(self.activation(change if bias is None else change + bias)))
        change = change if self.gate is None else change * pick(torch.sigmoid(self.gate(embedding)), rows)
        return h + (change if gate is None else change * (1 + gate))


@register(Network, "residual_mlp")
class ResidualMLP(_Dense):
    """Pre-activation residual blocks between two linear layers, gated by time and condition.

    h = W_0 x + b_0 + e; per block h = h + sigmoid(W_e e) ⊙ W_2 drop(act(W_1 act(h))); out = W h + b, with
    e = e(t) + e(condition) (no gate where there is neither). The second layer of each block starts within 1e-3 of zero.

    The output lies in memory with the batch innermost (see `Head`).

    Args:
        hidden: width of every layer.
        blocks: number of residual blocks, two layers each.
        dropout: share of the features dropped inside each block in training.
        zero_init: start the last layer at zero.
    Source: Durkan et al. 2019 (Neural Spline Flows), appendix B.1; He et al. 2016 (Identity mappings in deep residual
        networks), section 3.
    """

    blockwise = True

    def __init__(
        self,
        hidden: int = 128,
        blocks: int = 2,
        activation: Activation = "silu",
        dropout: float = 0.0,
        zero_init: bool = False,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        if hidden < 1 or blocks < 0:
            raise ValueError(f"residual_mlp: hidden >= 1 and blocks >= 0 are needed, found {hidden} and {blocks}.")
        super().__init__(hidden, in_shape, out_shape, zero_init)
        self.embeddings = Embeddings(hidden, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        self.sites = (Site(hidden, hidden),) * blocks
        self.first = nn.Linear(math.prod(in_shape), hidden)
        gated = self.embeddings.active
        self.blocks = nn.ModuleList(_Block(hidden, activation, dropout, gated) for _ in range(blocks))

    def features(
        self,
        t: Tensor | None,
        x: Tensor,
        condition: Condition | None = None,
        modulation: Sequence[Modulation] | None = None,
    ) -> Tensor:
        h = self.first(self.flat(x))
        embedding, rows = self.embeddings.distinct(t, x, condition)
        h = h + pick(embedding, rows) if self.embeddings.active else h
        for i, block in enumerate(self.blocks):
            h = self.recompute(block, h, embedding, *((None, None) if modulation is None else modulation[i]), rows)
        return h
