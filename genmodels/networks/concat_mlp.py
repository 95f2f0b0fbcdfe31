"""Vector fields of continuous-depth models: layers that each see the time, fully connected and convolutional."""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape, expand_like
from .embeddings import ConditionEmbedding
from .network import Network, check_images, check_timed

Time = Literal["concat", "squash", "none"]
Activation = Literal["tanh", "softplus", "gelu", "silu", "relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh, "softplus": nn.Softplus, "gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU,
}  # fmt: skip


class Clock(nn.Module):
    """How time enters the n outputs of a layer: added (concat), or as a gate and a shift (squash).

    concat: y + w t. squash: y · sigmoid(w_g t + b_g) + w t. none: y.
    """

    def __init__(self, n: int, time: Time, fan_in: int) -> None:
        super().__init__()
        bound = 1.0 if time == "squash" else fan_in**-0.5  # what torch's linear layers with such inputs start from
        draw = lambda: nn.Parameter(torch.empty(n).uniform_(-bound, bound))  # noqa: E731
        self.shift = draw() if time != "none" else None
        self.gate_weight, self.gate_bias = (draw(), draw()) if time == "squash" else (None, None)

    def forward(self, t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gate and shift, [n] for t of shape [] and [B, n] for [B]; None for what is absent."""
        if t is None or self.shift is None:
            return None, None
        t = t.to(self.shift.dtype)[..., None]
        gate = None if self.gate_weight is None else torch.sigmoid(t * self.gate_weight + self.gate_bias)
        return gate, t * self.shift


class TimedLinear(nn.Linear):
    """W x + b with a clock on its outputs; at a time that all rows share, gate and shift go into W and b."""

    def __init__(self, n_in: int, n_out: int, time: Time) -> None:
        super().__init__(n_in, n_out)
        self.clock = Clock(n_out, time, n_in + 1)

    def forward(self, t: Tensor | None, x: Tensor) -> Tensor:
        gate, shift = self.clock(t)
        if shift is None:
            return super().forward(x)
        if t.ndim == 0:
            weight, bias = (self.weight, self.bias) if gate is None else (self.weight * gate[:, None], self.bias * gate)
            return nn.functional.linear(x, weight, bias + shift)
        out = super().forward(x)
        return (out if gate is None else out * gate) + shift


class TimedConv(nn.Conv2d):
    """A convolution that keeps the size of images, with time as one more channel (concat) or a clock per channel.

    The channel of time is padded with zeros at the border like the others, so that a pixel knows a border by the time.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, time: Time) -> None:
        super().__init__(n_in + (time == "concat"), n_out, kernel, padding=kernel // 2)
        self.channel = time == "concat"
        self.clock = Clock(n_out, "none" if self.channel else time, 1)

    def forward(self, t: Tensor | None, x: Tensor) -> Tensor:
        if self.channel:
            time = expand_like(t.to(self.weight.dtype).expand(len(x)), x).expand(len(x), 1, *x.shape[2:])
            return super().forward(torch.cat((x, time), 1))
        gate, shift = self.clock(t)
        out = super().forward(x)
        if gate is None or shift is None:
            return out
        return out * gate.reshape(-1, len(self.weight), 1, 1) + shift.reshape(-1, len(self.weight), 1, 1)


class _Timed(Network):
    """Layers with one activation between them, a condition that is added before the first, and the check of t."""

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
        self.time: Time = time if timed else "none"
        self.activation, self.final = ACTIVATIONS[activation](), final
        self.condition = ConditionEmbedding(sizes[1], num_classes=num_classes, condition_shape=condition_shape)
        self.conditional = num_classes is not None or condition_shape is not None

    def _conditioned(self, h: Tensor, x: Tensor, condition: Condition | None) -> Tensor:
        if condition is None and not self.conditional:
            return h
        return h + expand_like(self.condition(condition, len(x), x), h)


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
        *inner, (n_in, n_out) = pairwise(sizes)
        self.layers = nn.ModuleList(TimedLinear(a, b, self.time) for a, b in inner)
        self.head = TimedLinear(n_in, n_out, self.time)

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        check_timed(self.timed, t)
        self.check_items(x)
        h = x.reshape(len(x), math.prod(self.in_shape))
        for k, layer in enumerate((*self.layers, self.head)):
            h = layer(t, h)
            h = self._conditioned(h, x, condition) if k == 0 else h
            h = self.activation(h) if k < len(self.layers) or self.final else h
        return h.reshape(len(x), *self.out_shape)


@register(Network, "concat_conv")
class ConcatConv(_Timed):
    """Convolutions that each see the time, on images that keep their size.

    As `concat_mlp`, with convolutions in place of linear layers and, with `norm`, a batch norm before each activation.
    Running averages of the norms are of all states that a solver has evaluated in training; there a row's field depends
    on its batch, as the solvers of training with one clock for the batch do.

    The standard CNN field for CIFAR-10 is concat_conv with hidden [64, 64], activation gelu and norm: true.

    Args:
        hidden: channels of each hidden layer.
        kernel: side of the convolutions, odd.
        activation, time, final: as for `concat_mlp`.
        norm: batch norms after the hidden layers.
    Raises:
        ConfigError: unless items are images of one size, kernels odd, and layers not empty.
    Source: Grathwohl et al. 2019 (FFJORD), appendix B.2; Pal et al. 2023 (Locally Regularized Neural Differential Equations).
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
        *inner, (n_in, n_out) = pairwise(sizes)
        self.layers = nn.ModuleList(TimedConv(a, b, kernel, self.time) for a, b in inner)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) if norm else nn.Identity() for _, b in inner)
        self.head = TimedConv(n_in, n_out, kernel, self.time)

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        check_timed(self.timed, t)
        self.check_items(x)
        h = x
        for k, layer in enumerate((*self.layers, self.head)):
            h = layer(t, h)
            h = self._conditioned(h, x, condition) if k == 0 else h
            h = self.norms[k](h) if k < len(self.layers) else h
            h = self.activation(h) if k < len(self.layers) or self.final else h
        return h
