"""Vector fields of continuous-depth models: layers that each see the time, fully connected and convolutional."""

import math
from collections.abc import Callable
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
# the derivative at a, where h is the activation there
SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda a, h: 1 - h.square(),
    "softplus": lambda a, h: torch.sigmoid(a),
    "gelu": lambda a, h: 0.5 * torch.erfc(-a * 0.5**0.5) + a * (-0.5 * a.square()).exp() * (2 * math.pi) ** -0.5,
    "silu": lambda a, h: torch.sigmoid(a) * (1 + a - h),
    "relu": lambda a, h: (a > 0).to(a.dtype),
}


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

    def parts(self, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, bias ([n] or [B, n]) and gate at t: the layer is (weight x) · gate + bias."""
        gate, shift = self.clock(t)
        if shift is None:
            return self.weight, self.bias, None
        if gate is None or t.ndim:
            return self.weight, shift + (self.bias if gate is None else self.bias * gate), gate
        return self.weight * gate[:, None], torch.addcmul(shift, self.bias, gate), None

    def forward(self, t: Tensor | None, x: Tensor) -> Tensor:
        weight, bias, gate = self.parts(t)
        if bias.ndim == 1 and gate is None:
            return nn.functional.linear(x, weight, bias)
        out = nn.functional.linear(x, weight)
        return (out if gate is None else out * gate) + bias

    def push(self, t: Tensor | None, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """The layer at x [B, n], and its derivative along tangents [P, B or 1, n]."""
        weight, bias, gate = self.parts(t)
        out, moved = nn.functional.linear(x, weight), nn.functional.linear(tangents, weight)
        return (out + bias, moved) if gate is None else (out * gate + bias, moved * gate)


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
        gate, shift = (None if c is None else c.reshape(-1, len(self.weight), 1, 1) for c in self.clock(t))
        out = super().forward(x)
        return out if gate is None or shift is None else out * gate + shift

    def push(self, t: Tensor | None, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """The layer at x [B, C, H, W], and its derivative along tangents [P, B or 1, C, H, W]."""
        weight = self.weight[:, : tangents.shape[2]]  # time, the last channel, stands still
        moved = nn.functional.conv2d(tangents.flatten(0, 1), weight, padding=self.padding)
        moved = moved.unflatten(0, tangents.shape[:2])
        gate = self.clock(t)[0]
        return self(t, x), moved if gate is None else moved * gate.reshape(-1, len(self.weight), 1, 1)


class _Timed(Network):
    """Layers with one activation between them, and a condition that is added before the first.

    Attributes:
        pushes: whether `push` works as the network stands: without norms, autocast and recomputation.
    """

    layers: nn.ModuleList
    head: nn.Module
    norms: nn.ModuleList | None

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
        self.activation, self.slope, self.final = ACTIVATIONS[activation](), SLOPES[activation], final
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
        for k, layer in enumerate((*self.layers, self.head)):
            h = layer(t, h)
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

        Differentiating what comes out takes one backward pass; it has no second derivative of the network inside.

        Args:
            x: [B, *in_shape].
            tangents: [P, B, *in_shape], or [P, 1, *in_shape] for the same in every row.
        Returns:
            [B, *out_shape] and [P, B, *out_shape].
        """
        check_timed(self.timed, t)
        self.check_items(x)
        self.passed(len(x))
        h, moved = self._enter(x), self._enter(tangents)
        for k, layer in enumerate((*self.layers, self.head)):
            h, moved = layer.push(t, h, moved)
            h = self._conditioned(h, x, condition) if k == 0 else h
            if layer is not self.head or self.final:
                a, h = h, self.activation(h)
                moved = self.slope(a, h) * moved
        moved = moved.expand(-1, len(x), *moved.shape[2:])
        return h.reshape(len(x), *self.out_shape), moved.reshape(len(moved), len(x), *self.out_shape)

    def _enter(self, x: Tensor) -> Tensor:
        """Items [*, *in_shape] as the first layer takes them."""
        return x


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

    def _enter(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.ndim - len(self.in_shape)], math.prod(self.in_shape))


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
        *inner, (n_in, n_out) = pairwise(sizes)
        self.layers = nn.ModuleList(TimedConv(a, b, kernel, self.time) for a, b in inner)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in inner) if norm else None
        self.head = TimedConv(n_in, n_out, kernel, self.time)
