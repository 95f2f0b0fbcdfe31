"""Linear layers with activations, and tangents carried through them, as one operation with a backward pass by hand."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Activated(NamedTuple):
    """An activation φ with derivatives at a, given h = φ(a) and, for the second one, d = φ'(a)."""

    module: type[nn.Module]
    slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor, Tensor], Tensor]


def _bell(a: Tensor) -> Tensor:
    return (-0.5 * a.square()).exp() * (2 * math.pi) ** -0.5


def _bend(a: Tensor) -> Tensor:
    """The second derivative of a sigmoid(a)."""
    s = torch.sigmoid(a)
    return s * (1 - s) * (2 + a * (1 - 2 * s))


ACTIVATIONS: dict[str, Activated] = {
    "tanh": Activated(nn.Tanh, lambda a, h: 1 - h.square(), lambda a, h, d: -2 * h * d),
    "softplus": Activated(nn.Softplus, lambda a, h: torch.sigmoid(a), lambda a, h, d: d * (1 - d)),
    "gelu": Activated(
        nn.GELU, lambda a, h: 0.5 * torch.erfc(-a * 0.5**0.5) + a * _bell(a), lambda a, h, d: _bell(a) * (2 - a * a)
    ),
    "silu": Activated(nn.SiLU, lambda a, h: torch.sigmoid(a) * (1 + a - h), lambda a, h, d: _bend(a)),
    "relu": Activated(nn.ReLU, lambda a, h: (a > 0).to(a.dtype), lambda a, h, d: torch.zeros_like(a)),
}


class PushThrough(torch.autograd.Function):
    """a = W h + b and ȧ = W ḣ layer by layer, with h ← φ(a) and ḣ ← φ'(a) ȧ between them.

    Value and tangents share each matrix product, and each layer's part of the backward pass: with g and ġ the gradients
    of h and ḣ, those of a and ȧ are g φ'(a) + Σ ġ ȧ φ''(a) and ġ φ'(a). Many small operations of autograd become few
    larger ones without. A second derivative is refused.

    Inputs: the activation, whether it acts on the last layer too, values [B, n₀], tangents [P, B or 1, n₀] (constants),
    and the layers' weights [m, n] and biases ([m] or [B, m]) in turn. Outputs: [B, m] and [P, B, m].
    """

    @staticmethod
    def forward(
        ctx: Any, activation: Activated, final: bool, x: Tensor, tangents: Tensor, *layers: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, biases = layers[0::2], layers[1::2]
        act, kept = activation.module(), []
        h = torch.cat((x[None], tangents.expand(-1, *x.shape)))
        for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            a = h @ weight.T
            a[0] += bias
            kept.append(h)
            if final or k + 1 < len(weights):
                value = act(a[0])
                slope = activation.slope(a[0], value)
                kept += [a, value, slope]
                h = torch.empty_like(a)
                h[0] = value
                torch.mul(a[1:], slope, out=h[1:])
            else:
                h = a
        ctx.activation, ctx.final, ctx.shared = activation, final, [bias.ndim == 1 for bias in biases]
        ctx.save_for_backward(*weights, *kept)
        return h[0], h[1:]

    @staticmethod
    def backward(ctx: Any, out: Tensor, moved: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tangents that a network carries forward have one derivative and no second one. Differentiate the "
                "network's own output twice instead, without `push`."
            )
        n = len(ctx.shared)
        weights, kept = ctx.saved_tensors[:n], list(ctx.saved_tensors[n:])
        g, gradients = torch.cat((out[None], moved)), []
        for k in reversed(range(n)):
            if ctx.final or k + 1 < n:
                slope, value, a = kept.pop(), kept.pop(), kept.pop()
                bent = (g[1:] * a[1:]).sum(0) * ctx.activation.curvature(a[0], value, slope)
                g = g * slope
                g[0] += bent
            h = kept.pop()
            gradients += [g[0].sum(0) if ctx.shared[k] else g[0], g.flatten(0, 1).T @ h.flatten(0, 1)]
            if k or ctx.needs_input_grad[2]:
                g = g @ weights[k]
        return (None, None, g[0] if ctx.needs_input_grad[2] else None, None, *reversed(gradients))
