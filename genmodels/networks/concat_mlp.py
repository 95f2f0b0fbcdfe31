"""Vector fields of continuous-depth models: layers that each see the time, fully connected and convolutional."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape, expand_like
from .embeddings import ConditionEmbedding
from .network import Network, check_images, check_timed
from .tangents import ACTIVATIONS, PushThrough

Time = Literal["concat", "squash", "none"]
Activation = Literal["tanh", "softplus", "gelu", "silu", "relu"]
Clocked = tuple[Tensor | None, Tensor | None]  # gate and shift, [n] at a time that rows share, else [B, n]


class Clock(nn.Module):
    """How time enters the outputs of layers: added (concat), or as a gate and a shift (squash).

    concat: y + w t. squash: y · sigmoid(u t + c) + w t. none: y.

    Args:
        sizes: numbers of outputs of the layers.
        fans: numbers of inputs of the layers, which set the start of w as those of a linear layer with t as an input.
    """

    def __init__(self, sizes: Sequence[int], fans: Sequence[int], time: Time) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        ends = [1.0 if time == "squash" else fan**-0.5 for fan in fans]
        bounds = torch.tensor(ends).repeat_interleave(torch.tensor(self.sizes))
        draw = lambda: nn.Parameter(bounds * (2 * torch.rand(len(bounds)) - 1))  # noqa: E731
        self.shift = None if time == "none" else draw()
        self.weight, self.bias = (draw(), draw()) if time == "squash" else (None, None)

    def forward(self, t: Tensor | None) -> list[Clocked]:
        """Gate and shift of each layer, for t of shape [] or [B]; None for what is absent."""
        if t is None or self.shift is None:
            return [(None, None)] * len(self.sizes)
        t = t.to(self.shift.dtype)[..., None]
        shifts = (t * self.shift).split(self.sizes, -1)
        if self.weight is None:
            return [(None, shift) for shift in shifts]
        gates = torch.sigmoid(torch.addcmul(self.bias, t, self.weight)).split(self.sizes, -1)
        return list(zip(gates, shifts, strict=True))


class _Timed(Network):
    """Layers with one activation between them, and a condition that is added before the first.

    Attributes:
        pushes: whether `push` works as the network stands: without norms, autocast and recomputation.
    """

    layers: nn.ModuleList
    norms: nn.ModuleList | None
    head: nn.Module
    clock: Clock

    def __init__(
        self,
        sizes: tuple[int, ...],
        activation: Activation,
        time: Time,
        final: bool,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        if min(sizes) < 1:
            raise ConfigError(
                f"{self.registered_name}: layers need at least one unit, found hidden={list(sizes[1:-1])}."
            )
        self.in_shape, self.out_shape, self.timed = tuple(in_shape), tuple(out_shape), timed
        self.time, self.norms = time if timed else "none", None
        self.derivatives, self.final = ACTIVATIONS[activation], final
        self.activation = self.derivatives.module()
        self.condition = ConditionEmbedding(sizes[1], num_classes=num_classes, condition_shape=condition_shape)
        self.conditional = num_classes is not None or condition_shape is not None

    def _conditioned(self, h: Tensor, x: Tensor, condition: Condition | None) -> Tensor:
        if condition is None and not self.conditional:
            return h
        return h + expand_like(self.condition(condition, len(x), x), h)

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        check_timed(self.timed, t)
        self.check_items(x)
        h = self._enter(x)
        for k, (layer, clocked) in enumerate(zip((*self.layers, self.head), self.clock(t), strict=True)):
            h = self._layer(layer, t, h, clocked)
            h = self._conditioned(h, x, condition) if k == 0 else h
            h = h if self.norms is None or layer is self.head else self.norms[k](h)
            h = self.activation(h) if layer is not self.head or self.final else h
        return h.reshape(len(x), *self.out_shape)

    @property
    def pushes(self) -> bool:
        return self.norms is None and self.autocast is None and not self.checkpointing

    def push(
        self, t: Tensor | None, x: Tensor, tangents: Tensor, condition: Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        """out(t, x), and its derivatives along tangents, carried forward layer by layer in one pass.

        A backward pass through both has no second derivative of the network inside, as one through a vector-Jacobian
        product would.

        Args:
            x: [B, *in_shape].
            tangents: [P, B, *in_shape], or [P, 1, *in_shape] for the same in every row; constants.
        Returns:
            [B, *out_shape] and [P, B, *out_shape].
        """
        check_timed(self.timed, t)
        self.check_items(x)
        self.passed(len(x))
        h, moved = self._push(t, x, tangents, condition)
        return h.reshape(len(x), *self.out_shape), moved.reshape(len(moved), len(x), *self.out_shape)

    def _push(
        self, t: Tensor | None, x: Tensor, tangents: Tensor, condition: Condition | None
    ) -> tuple[Tensor, Tensor]:
        h, moved = self._enter(x), self._enter(tangents)
        for k, (layer, clocked) in enumerate(zip((*self.layers, self.head), self.clock(t), strict=True)):
            h, moved = self._layer(layer, t, h, clocked), self._derivative(layer, moved, clocked)
            h = self._conditioned(h, x, condition) if k == 0 else h
            if layer is not self.head or self.final:
                a, h = h, self.activation(h)
                moved = self.derivatives.slope(a, h) * moved
        return h, moved.expand(-1, len(x), *moved.shape[2:])

    @abstractmethod
    def _enter(self, x: Tensor) -> Tensor:
        """Items [*, *in_shape] as the first layer takes them."""

    @abstractmethod
    def _layer(self, layer: nn.Module, t: Tensor | None, h: Tensor, clocked: Clocked) -> Tensor:
        """A layer at h [B, *]."""

    @abstractmethod
    def _derivative(self, layer: nn.Module, moved: Tensor, clocked: Clocked) -> Tensor:
        """The derivative of a layer along tangents [P, B or 1, *]."""


@register(Network, "concat_mlp")
class ConcatMLP(_Timed):
    """Linear layers that each see the time; items are flattened on the way in and shaped on the way out.

    h ← act(W_k h + b_k + w_k t) (concat: time is one more input of every layer), or with time "squash"
    h ← act((W_k h + b_k) sigmoid(u_k t + c_k) + w_k t); the last layer has no activation unless `final`. A condition is
    embedded and added before the first activation.

    The field of Opening the Blackbox for MNIST is concat_mlp with hidden [100] and final: true.

    Args:
        hidden: width of each hidden layer; [] is a linear field.
        activation: between layers; fields of ODEs want smooth ones.
        time: how t enters; with "none" the field is autonomous.
        final: the activation also acts on the output.
    Raises:
        ConfigError: if a layer has no units.
    Source: Grathwohl et al. 2019 (FFJORD), appendix B.1 (concatsquash); Pal et al. 2021 (Opening the Blackbox).
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (64, 64),
        activation: Activation = "tanh",
        time: Time = "concat",
        final: bool = False,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        sizes = (math.prod(in_shape), *hidden, math.prod(out_shape))
        super().__init__(sizes, activation, time, final, in_shape, out_shape, timed, num_classes, condition_shape)
        self.clock = Clock(sizes[1:], [n + 1 for n in sizes[:-1]], self.time)
        *inner, last = (nn.Linear(a, b) for a, b in pairwise(sizes))
        self.layers, self.head = nn.ModuleList(inner), last

    def _enter(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.ndim - len(self.in_shape)], math.prod(self.in_shape))

    def _layer(self, layer: nn.Module, t: Tensor | None, h: Tensor, clocked: Clocked) -> Tensor:
        weight, bias, gate = _folded(layer, clocked)
        if gate is None:
            return nn.functional.linear(h, weight, bias) if bias.ndim == 1 else nn.functional.linear(h, weight) + bias
        return nn.functional.linear(h, weight) * gate + bias

    def _derivative(self, layer: nn.Module, moved: Tensor, clocked: Clocked) -> Tensor:
        weight, _, gate = _folded(layer, clocked)
        moved = nn.functional.linear(moved, weight)
        return moved if gate is None else moved * gate

    def _push(
        self, t: Tensor | None, x: Tensor, tangents: Tensor, condition: Condition | None
    ) -> tuple[Tensor, Tensor]:
        folded = [_folded(*each) for each in zip((*self.layers, self.head), self.clock(t), strict=True)]
        if any(gate is not None for _, _, gate in folded):  # rows with gates of their own share no weights
            return super()._push(t, x, tangents, condition)
        (weight, bias, _), *rest = folded
        layers = [weight, self._conditioned(bias, x, condition)] + [v for w, b, _ in rest for v in (w, b)]
        return PushThrough.apply(self.derivatives, self.final, self._enter(x), self._enter(tangents), *layers)


def _folded(layer: nn.Module, clocked: Clocked) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, bias and gate of a layer (weight h) · gate + bias; gates that rows share are in weight and bias."""
    gate, shift = clocked
    if shift is None:
        return layer.weight, layer.bias, None
    if gate is None or gate.ndim == 2:
        return layer.weight, shift + (layer.bias if gate is None else layer.bias * gate), gate
    return layer.weight * gate[:, None], torch.addcmul(shift, layer.bias, gate), None


@register(Network, "concat_conv")
class ConcatConv(_Timed):
    """Convolutions that each see the time, on images that keep their size.

    As `concat_mlp`, with convolutions in place of linear layers, time as one more channel of images, padded with zeros
    like the others, and, with `norm`, a batch norm before each activation. Running averages of the norms are of all
    states that a solver has evaluated in training; there a row's field depends on its batch.

    The standard CNN field for CIFAR-10 is concat_conv with hidden [64, 64], activation gelu and norm: true.

    Args:
        hidden: channels of each hidden layer.
        kernel: side of the convolutions, odd.
        activation, time, final: as for `concat_mlp`.
        norm: batch norms after the hidden layers.
    Raises:
        ConfigError: unless items are images of one size, kernels odd, and layers not empty.
    Source: Grathwohl et al. 2019 (FFJORD), appendix B.1; Pal et al. 2023 (Locally Regularized Neural Differential
        Equations).
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (64, 64),
        kernel: int = 3,
        activation: Activation = "softplus",
        time: Time = "concat",
        final: bool = False,
        norm: bool = False,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        check_images(self.registered_name, in_shape, out_shape)
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError(f"concat_conv: an odd kernel is needed to keep the size of images, found {kernel}.")
        sizes = (in_shape[0], *hidden, out_shape[0])
        super().__init__(sizes, activation, time, final, in_shape, out_shape, timed, num_classes, condition_shape)
        channel = int(self.time == "concat")
        self.clock = Clock(sizes[1:], sizes[:-1], "none" if channel else self.time)
        *inner, last = (nn.Conv2d(a + channel, b, kernel, padding=kernel // 2) for a, b in pairwise(sizes))
        self.layers, self.head = nn.ModuleList(inner), last
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in hidden) if norm else None

    def _enter(self, x: Tensor) -> Tensor:
        return x

    def _layer(self, layer: nn.Module, t: Tensor | None, h: Tensor, clocked: Clocked) -> Tensor:
        if t is not None and self.time == "concat":
            time = expand_like(t.to(layer.weight.dtype).expand(len(h)), h).expand(len(h), 1, *h.shape[2:])
            return layer(torch.cat((h, time), 1))
        gate, shift = (None if c is None else c.reshape(-1, c.shape[-1], 1, 1) for c in clocked)
        out = layer(h)
        return out if gate is None or shift is None else out * gate + shift

    def _derivative(self, layer: nn.Module, moved: Tensor, clocked: Clocked) -> Tensor:
        weight, gate = layer.weight[:, : moved.shape[2]], clocked[0]  # time, the last channel, stands still
        out = nn.functional.conv2d(moved.flatten(0, 1), weight, padding=layer.padding).unflatten(0, moved.shape[:2])
        return out if gate is None else out * gate.reshape(-1, gate.shape[-1], 1, 1)
