"""MADE: a masked network whose outputs for a variable depend on the variables before it alone."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape
from . import dependencies
from .mlp import ACTIVATIONS, Activation, Embeddings, Head
from .network import Modulation, Network, Shareable, Site, zero_head
from .sweep import Staircase, Sweep


@register(Network, "made")
class MADE(Shareable):
    """Masked network on vectors: the P outputs of variable i depend on the variables before i, and on the condition.

    Each hidden unit sees one of the sets on which variables may depend, in turn (of the natural order: unit j sees the
    first 1 + j mod (D - 1) variables); a weight is masked out unless the set it reads from is part of the one it writes
    to. Given a time or a condition, some units see no variable at all, so that the first variable hears of it as well.

    Residual: h = W_0 x + b_0 + e; per block h = h + sigmoid(W_e e) ⊙ W_2 drop(act(W_1 act(h))); out = W h + b, with
    e = e(t) + e(condition) (no gate where there is neither); the second layer of each block starts within 1e-3 of zero.
    Plain: h = drop(act(W_0 x + b_0 + e)), and per block h = drop(act(W_k h + b_k)).

    Outputs are parameter-major: row p·D + i is parameter p of variable i. They lie in memory with the batch innermost.
    `sweep` gives the outputs of one variable after another, at the cost of one pass in all.

    Args:
        hidden: width of every hidden layer.
        blocks: number of residual blocks of two layers each, or of plain layers after the first.
        residual: residual blocks, or plain layers.
        dropout: share of the features dropped in training.
        order: in which order the variables come; a list names the first variable first. "random" draws one, as
            parameters are drawn.
        adjacency: instead of an order, which variables may steer which: row i marks those on which the outputs of
            variable i may depend. It may have no cycle; its diagonal is ignored.
        zero_init: start the last layer (`head`) at zero.
    Raises:
        ConfigError: if the items in or out are no vectors, or the outputs no multiple of the inputs; if the order or
            the adjacency cannot be; if there are fewer hidden units than sets to see.
    Source: Germain et al. 2015 (MADE), section 3; Durkan et al. 2019 (Neural Spline Flows), appendix B.1.
    """

    blockwise = True

    def __init__(
        self,
        hidden: int = 128,
        blocks: int = 2,
        residual: bool = True,
        activation: Activation = "relu",
        dropout: float = 0.0,
        order: Literal["natural", "reverse", "random"] | tuple[int, ...] = "natural",
        adjacency: tuple[tuple[int, ...], ...] | None = None,
        zero_init: bool = False,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        if hidden < 1 or blocks < 0 or not 0 <= dropout < 1:
            raise ConfigError(
                "made: hidden >= 1, blocks >= 0 and 0 <= dropout < 1 are needed, found "
                f"hidden={hidden}, blocks={blocks}, dropout={dropout}."
            )
        self.width, self.in_shape, self.out_shape = hidden, tuple(in_shape), tuple(out_shape)
        self.residual = residual
        self._check_shapes()
        self.embeddings = Embeddings(hidden, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        self._structure(self._depends(order, adjacency))
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.first = nn.Linear(*self.in_shape, hidden)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks * (2 if residual else 1)))
        gated = residual and self.embeddings.active
        self.gates = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks if gated else 0))
        for layer in self.layers[1::2] if residual else ():
            nn.init.uniform_(layer.weight, -1e-3, 1e-3)
            nn.init.uniform_(layer.bias, -1e-3, 1e-3)
        self.sites = (Site(hidden, hidden),) * (blocks if residual else blocks + 1)
        self.head = self.new_head()
        if zero_init:
            zero_head(self)

    def _check_shapes(self) -> None:
        if len(self.in_shape) != 1 or len(self.out_shape) != 1:
            raise ConfigError(
                f"made: vectors are needed, found items of shape {list(self.in_shape)} in and {list(self.out_shape)} "
                "out. Put `flatten` before the layer."
            )
        if self.in_shape[0] < 1 or self.out_shape[0] % self.in_shape[0]:
            raise ConfigError(
                f"made: every variable has as many outputs as the others, but {self.out_shape[0]} is no multiple of "
                f"{self.in_shape[0]} variables. Use mlp or residual_mlp, or put `flatten` before the layer."
            )

    def _depends(self, order: str | tuple[int, ...], adjacency: tuple[tuple[int, ...], ...] | None) -> Tensor:
        """[D, D] bool: which variables steer which."""
        count = self.in_shape[0]
        if adjacency is not None:
            if order != "natural":
                raise ConfigError(f"made: give an order or an adjacency, found both (order={order}). Leave out one.")
            return dependencies.from_adjacency(adjacency, count, "made")
        given = order
        if order == "random":
            given = torch.randperm(count, device="cpu").tolist()
        elif isinstance(order, str):
            given = range(count) if order == "natural" else range(count)[::-1]
        elif len(order) != count:
            raise ConfigError(f"made: the order must name {count} variables, found {len(order)}: {list(order)}.")
        depends = dependencies.from_order(given, "made")
        # what is drawn belongs to a checkpoint, what the configuration says does not
        self.register_buffer("order", torch.tensor(list(given), dtype=torch.long), persistent=order == "random")
        return depends

    def _structure(self, depends: Tensor) -> None:
        """Masks and the steps of `sweep` for a matrix of dependencies."""
        rank = dependencies.ranks(depends)
        sets = dependencies.distinct(depends, self.embeddings.active)
        if len(sets) > self.width:
            raise ConfigError(
                f"made: the variables depend on {len(sets)} different sets of variables, which takes as many hidden "
                f"units, found hidden={self.width}. Raise it to {len(sets)} or more."
            )
        each = self.out_shape[0] // len(depends)
        unit = torch.arange(self.width, device="cpu") % len(sets)
        time, steps = dependencies.times(sets, rank)[unit], int(rank.max()) + 1
        places, self.sizes = rank.argsort(stable=True), rank.bincount().tolist()
        self.unit_sizes = time.bincount(minlength=steps).tolist()
        rows = [torch.arange(each, device="cpu")[:, None] * len(rank) + part for part in places.split(self.sizes)]
        new = {
            "input_mask": sets[unit].float(),
            "hidden_mask": dependencies.contains(sets, sets)[unit][:, unit].float(),
            "output_mask": dependencies.contains(depends, sets)[:, unit].float().repeat(each, 1),
            "places": places,
            "units": time.argsort(stable=True),
            "head_rows": torch.cat([part.flatten() for part in rows]),
        }
        for name, value in new.items():
            old = getattr(self, name, None)
            value = value.to(torch.empty(0) if old is None else old) if value.is_floating_point() else value
            self.register_buffer(name, value if old is None else value.to(old.device), persistent=False)

    def new_head(self) -> nn.Module:
        return Head(self.width, *self.out_shape)

    def finish(self, head: nn.Module, features: Tensor) -> Tensor:
        weight = self._masked(head.weight, "output_mask")
        return torch.addmm(head.bias[:, None], weight, features.mT).mT

    def features(
        self,
        t: Tensor | None,
        x: Tensor,
        condition: Condition | None = None,
        modulation: Sequence[Modulation] | None = None,
    ) -> Tensor:
        self.check_items(x)
        embedding = self.embeddings(t, x, condition)
        biases, gates = self._modulated(embedding, modulation)
        h = F.linear(x, self._masked(self.first.weight, "input_mask"), biases[0])
        h = h + embedding if self.embeddings.active else h
        layers = [partial(self._linear, layer, bias) for layer, bias in zip(self.layers, biases[1:], strict=True)]
        return self._combine(self.recompute, h, layers, gates)

    def _linear(self, layer: nn.Linear, bias: Tensor, h: Tensor) -> Tensor:
        return F.linear(h, self._masked(layer.weight, "hidden_mask"), bias)

    def _combine(
        self,
        run: Callable[..., Tensor],
        h: Tensor,
        layers: Sequence[Callable[[Tensor], Tensor]],
        gates: Sequence[Tensor | None],
    ) -> Tensor:
        """What the head reads, from the pre-activations h of the first layer; `run` calls a block with its inputs."""
        if self.residual:
            for first, second, gate in zip(layers[::2], layers[1::2], gates, strict=True):
                h = run(self._block, h, first, second, gate)
            return h
        h = self._activate(h, gates[0])
        for layer, gate in zip(layers, gates[1:], strict=True):
            h = run(self._layer, h, layer, gate)
        return h

    def _block(self, h: Tensor, first: Callable, second: Callable, gate: Tensor | None) -> Tensor:
        change = second(self.dropout(self.activation(first(self.activation(h)))))
        return h + (change if gate is None else change * gate)

    def _layer(self, h: Tensor, layer: Callable, gate: Tensor | None) -> Tensor:
        return self._activate(layer(h), gate)

    def _activate(self, h: Tensor, gate: Tensor | None) -> Tensor:
        h = self.activation(h)
        return self.dropout(h if gate is None else h * gate)

    def _modulated(
        self, embedding: Tensor, modulation: Sequence[Modulation] | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The biases of all hidden layers, and the factors [H] or [B, H] on each site's branch (None for 1)."""
        biases = [layer.bias for layer in (self.first, *self.layers)]
        gates = [gate(embedding).sigmoid() for gate in self.gates] or [None] * len(self.sites)
        for i, (bias, gate) in enumerate(modulation or ()):
            place = 2 * i + 1 if self.residual else i  # a block's first layer
            biases[place] = biases[place] if bias is None else biases[place] + bias
            if gate is not None:
                gates[i] = 1 + gate if gates[i] is None else gates[i] * (1 + gate)
        return biases, gates

    def sweep(
        self,
        condition: Condition | None,
        like: Tensor,
        modulation: Sequence[Modulation] | None = None,
        head: nn.Module | None = None,
    ) -> Sweep:
        """The outputs of one variable after another, in the parameters' precision and with gradients.

        In training dropout acts, once on each unit: as in `forward`, what comes out is the map of one draw.

        Args:
            like: [B, D] what has the dtype and the batch of the variables.
            head: what is used instead of `head`.
        """
        self.check_items(like)
        embedding = self.embeddings(None, like, condition)
        biases, gates = self._modulated(embedding, modulation)
        columns = [bias[self.units, None] for bias in biases]
        if self.embeddings.active:
            columns[0] = columns[0] + embedding.mT[self.units]
        head = self.head if head is None else head
        each = self.out_shape[0] // self.in_shape[0]
        units, group = self.unit_sizes, max(1, round(math.sqrt(len(self.sizes))))
        inputs, outputs = [0, *self.sizes[:-1]], [each * size for size in self.sizes]
        first = self._sorted(self.first.weight, "input_mask", self.units, self.places)
        last = self._sorted(head.weight, "output_mask", self.head_rows, self.units)
        stairs = [Staircase(first, columns[0], units, inputs, group)]
        for layer, bias in zip(self.layers, columns[1:], strict=True):
            weight = self._sorted(layer.weight, "hidden_mask", self.units, self.units)
            stairs.append(Staircase(weight, bias, units, units, group))
        stairs.append(Staircase(last, head.bias[self.head_rows, None], outputs, units, group))
        factors = [g if g is None else torch.atleast_2d(g).mT[self.units].split(units) for g in gates]
        # a staircase goes on with every call, so nothing here can be computed twice
        combine = partial(self._combine, lambda block, *inputs: block(*inputs))
        return Sweep(self.places, self.sizes, stairs, factors, combine, like)

    def _masked(self, weight: Tensor, mask: str) -> Tensor:
        # not kept between calls: fused optimizers change weights without a trace in their version counters
        return weight * getattr(self, mask)

    def _sorted(self, weight: Tensor, mask: str, rows: Tensor, columns: Tensor) -> Tensor:
        return self._masked(weight, mask).index_select(0, rows).index_select(1, columns)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}order" in state_dict:
            self._structure(dependencies.from_order(self.order.tolist(), "made"))
