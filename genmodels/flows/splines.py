"""Monotonic rational-quadratic splines of a scalar: values, inverses, log-slopes, and gradients in closed form.

Bins lie on axis 0 of every parameter and everything else follows ([K, …, N] beside inputs [..., N]): with the batch
innermost, sums, softmaxes and look-ups run over contiguous memory. Nothing branches on values, so the same code runs
compiled, under vmap, and without waiting for a GPU.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-3  # least width and height (as a fraction of the interval) and least derivative of `durkan`
SLOPE = 1e-3  # limit of the derivatives of `bounded`, and of the ratio of two of its widths


class Knots(NamedTuple):
    """A spline from (-bound, -bound) to (bound, bound) with slope 1 at both ends.

    Args:
        widths: [K, ...] > 0, summing to 2 bound over axis 0.
        heights: [K, ...] > 0, summing to 2 bound over axis 0.
        derivatives: [K-1, ...] > 0, the slopes at the interior knots.
    """

    widths: Tensor
    heights: Tensor
    derivatives: Tensor


def _thirds(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raw parameters [3K-1, ...] as widths [K, ...], heights [K, ...] and derivatives [K-1, ...], at least float32."""
    if (len(raw) + 1) % 3 or len(raw) < 2:
        raise ValueError(f"spline: 3K-1 raw parameters (K >= 1 bins) are needed on axis 0, found {len(raw)}.")
    bins = (len(raw) + 1) // 3
    return raw.to(torch.promote_types(raw.dtype, torch.float32)).split((bins, bins, bins - 1))


def durkan(raw: Tensor, bound: float, *, identity: bool = True, scale: float = 1.0) -> Knots:
    """Knots with floors: w = 2B (ε + (1 - Kε) softmax(c u_w)), the same for heights, d = ε + softplus(u_d + b).

    Args:
        raw: [3K-1, ...] unconstrained u_w | u_h | u_d.
        bound: B, half the width of the interval.
        identity: b = log(exp(1 - ε) - 1), so that zero parameters give the identity; False is the paper's b = 0.
        scale: c; the paper divides by the root of the conditioner's width, so that training starts from even bins.
    Raises:
        ValueError: if axis 0 is not 3K-1 long, or if Kε > 1.
    Source: Durkan et al. 2019 (Neural Spline Flows), section 3.1; constants of its published code.
    """
    widths, heights, derivatives = _thirds(raw)
    bins = len(widths)
    if bins * FLOOR > 1:
        raise ValueError(f"spline: at most {int(1 / FLOOR)} bins leave room for the floor {FLOOR}, found {bins}.")
    stretch = 2 * bound * (1 - bins * FLOOR)
    shift = math.log(math.expm1(1 - FLOOR)) if identity else 0.0

    least = raw.new_full((), 2 * bound * FLOOR, dtype=widths.dtype)

    def share(u: Tensor) -> Tensor:
        return torch.add(least, (u * scale if scale != 1 else u).softmax(0), alpha=stretch)

    return Knots(share(widths), share(heights), F.softplus(derivatives + shift) + FLOOR)


def bounded(raw: Tensor, bound: float, *, scale: float = 1.0) -> Knots:
    """Knots from softly limited parameters: w = 2B softmax(v_w), d = exp(v_d); zero parameters give the identity.

    v = u/(1 + |u/ℓ|) for derivatives and u/(1 + |2u/ℓ|) for c u_w and c u_h, with ℓ = log 1e-3: derivatives stay within
    (1e-3, 1e3), and two widths within that ratio of each other. There are no floors; it conditions better in float32
    and allows less sharp densities than `durkan`.

    Args:
        raw: [3K-1, ...] unconstrained u_w | u_h | u_d.
        bound: B, half the width of the interval.
        scale: c.
    Source: the zuko library (MonotonicRQSTransform), in place of the floors of Durkan et al. 2019, section 3.1.
    """
    widths, heights, derivatives = _thirds(raw)
    limit = -math.log(SLOPE)

    def share(u: Tensor) -> Tensor:
        u = u * scale if scale != 1 else u
        return (u / (1 + (2 / limit * u).abs())).softmax(0) * (2 * bound)

    return Knots(share(widths), share(heights), (derivatives / (1 + (derivatives / limit).abs())).exp())


def rational_quadratic(x: Tensor, knots: Knots, bound: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The spline (or its inverse) and the log of its slope, elementwise; the identity outside [-bound, bound].

    In the bin from (x_k, y_k) with width w, height h, s = h/w, end slopes d_0, d_1, and ξ = (x - x_k)/w, q = ξ(1 - ξ):

        y     = y_k + h (s ξ² + d_0 q) / D,                    D = s + (d_0 + d_1 - 2s) q
        dy/dx = s² (d_1 ξ² + 2 s q + d_0 (1 - ξ)²) / D²

    The inverse solves the quadratic for ξ in the form without cancellation; its gradient is that of the implicit
    function, so no square root is differentiated. Gradients of every order exist.

    Args:
        x: [...] inputs (points y if inverse).
        knots: widths, heights and derivatives that broadcast against [K, ...] and [K-1, ...].
        bound: B > 0, in the units of x.
    Returns:
        The mapped points in the dtype of x, and log|dy/dx| (log|dx/dy| if inverse) in at least float32, both [...].
        NaN gives NaN.
    Source: Durkan et al. 2019 (Neural Spline Flows), equations 4-8 and appendix A.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = torch.broadcast_shapes(x.shape, knots.widths.shape[1:])
    full = [part.to(dtype).expand(len(part), *shape) for part in knots]
    y, log_slope, *_ = _Spline.apply(x.to(dtype).expand(shape), *full, bound, inverse)
    return y.to(x.dtype), log_slope


class _Bin(NamedTuple):
    """The bin of each point: its width, its mean slope s = h/w, the slopes at its ends, and the position ξ in it."""

    width: Tensor
    slope: Tensor
    first: Tensor
    last: Tensor
    position: Tensor


def _look_up(values: Tensor, index: Tensor, edge: float) -> Tensor:
    """values[index] along axis 0, and `edge` where the index is -1 or one too large."""
    if len(values) == 0:
        return values.new_full(index.shape[1:], edge)
    found = values.gather(0, index.clamp(0, len(values) - 1))
    return torch.where((index < 0) | (index >= len(values)), edge, found)[0]


def _locate(v: Tensor, knots: Knots, bound: float, inverse: bool) -> tuple[_Bin, Tensor, Tensor, Tensor]:
    """The bin of each point, its lower corner, and which knots after the first lie at or below the point [K, ...].

    Distances are measured from -bound, so that sums of widths are knots as they stand.
    """
    rights, tops, v = knots.widths.cumsum(0), knots.heights.cumsum(0), v + bound
    passed = v >= (tops if inverse else rights)
    index = passed[:-1].sum(0, keepdim=True)
    left, bottom = _look_up(rights, index - 1, 0.0), _look_up(tops, index - 1, 0.0)
    width, height = knots.widths.gather(0, index)[0], knots.heights.gather(0, index)[0]
    first, last = _look_up(knots.derivatives, index - 1, 1.0), _look_up(knots.derivatives, index, 1.0)
    bin = _Bin(width, height / width, first, last, v)
    position = _solve(bin, v - bottom) if inverse else (v - left) / width
    # knots are rounded sums, so a point at the end of its bin may miss [0, 1], and D > 0 is certain only there
    return bin._replace(position=position.clamp(0, 1)), left, bottom, passed


def _solve(bin: _Bin, v: Tensor) -> Tensor:
    """ξ at the height v above the lower corner: the root 2c/(-b - √(b² - 4ac)) of a ξ² + b ξ + c = 0."""
    height, tension = bin.slope * bin.width, bin.first + bin.last - 2 * bin.slope
    a = height * (bin.slope - bin.first) + v * tension
    b = height * bin.first - v * tension
    c = -bin.slope * v
    # b² - 4ac >= 0 for 0 <= v <= h because a root exists there; only rounding goes below.
    # b + √… > 0: where b <= 0, v·tension >= h d_0, so a >= h s > 0, -4ac > 0 and √… > |b|.
    return 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())


def _evaluate(bin: _Bin) -> tuple[Tensor, Tensor, Tensor]:
    """r = (s ξ² + d_0 q)/D, the fraction of the height reached; D; and A in dy/dx = s² A/D²."""
    xi, rest = bin.position, 1 - bin.position
    q = xi * rest
    denominator = bin.slope + (bin.first + bin.last - 2 * bin.slope) * q
    numerator = bin.last * xi * xi + 2 * bin.slope * q + bin.first * rest * rest
    return (bin.slope * xi * xi + bin.first * q) / denominator, denominator, numerator


class _Gradients(NamedTuple):
    """Gradients of the input, of the lower corner (left, bottom) of its bin, and of the bin's sizes and end slopes."""

    x: Tensor
    left: Tensor
    bottom: Tensor
    width: Tensor
    height: Tensor
    first: Tensor
    last: Tensor


def _pull_back(bin: _Bin, gy: Tensor, gl: Tensor, inverse: bool) -> _Gradients:
    """Gradients from those of the mapped point (gy) and of its log-slope L (gl); the inverse by the implicit function.

    The inverse returns -L. With G = gy - gl ∂L/∂x, its input has the gradient G/(dy/dx), and the parameters have those
    of the forward map for -G/(dy/dx) and -gl in place of gy and gl.
    """
    width, s, first, last, xi = bin
    r, d, a = _evaluate(bin)
    rest = 1 - xi
    q, turn = xi * rest, rest - xi
    l_x = 2 * ((last * xi + s * turn - first * rest) / a - (first + last - 2 * s) * turn / d) / width
    slope = a * (s / d) ** 2
    if inverse:
        gx, gy, gl = -gy, (gl * l_x - gy) / slope, -gl
    else:
        gx = gy * slope + gl * l_x
    gyh = gy * (s * width) / d
    gs = gyh * (xi * xi - r * (1 - 2 * q)) + 2 * gl * (1 / s + q / a - (1 - 2 * q) / d)
    return _Gradients(
        x=-gy if inverse else gx,
        left=-gx,
        bottom=gy,
        width=-gs * s / width - xi * gx,
        height=gy * r + gs / width,
        first=gyh * q * (1 - r) + gl * (rest * rest / a - 2 * q / d),
        last=-gyh * q * r + gl * (xi * xi / a - 2 * q / d),
    )


class _Spline(torch.autograd.Function):
    """(y, log dy/dx) with the closed-form backward; what follows these outputs is kept for it.

    Where a graph of the gradient is asked for, the bin is looked up again from the inputs, differentiably.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, bound: float, inverse: bool
    ) -> tuple[Tensor, ...]:
        knots = Knots(widths, heights, derivatives)
        bin, left, bottom, passed = _locate(x.clamp(-bound, bound), knots, bound, inverse)
        r, d, a = _evaluate(bin)
        log_slope = a.log() + 2 * (bin.slope / d).log()
        y = left + bin.position * bin.width if inverse else bottom + r * (bin.slope * bin.width)
        outside = x.abs() > bound
        y = torch.where(outside, x, y - bound)
        log_slope = torch.where(outside, 0, -log_slope if inverse else log_slope)
        return y, log_slope, passed, *bin

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.bound, ctx.inverse = inputs[4:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[:4], *output[2:])

    @staticmethod
    def backward(ctx: Any, gy: Tensor, gl: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, widths, heights, derivatives, passed, *bin = ctx.saved_tensors
        if torch.is_grad_enabled():
            knots = Knots(widths, heights, derivatives)
            at = _Spline.apply(x, *knots, ctx.bound, True)[0] if ctx.inverse else x
            bin, _, _, passed = _locate(at.clamp(-ctx.bound, ctx.bound), knots, ctx.bound, False)
        outside = x.abs() > ctx.bound
        inner = _pull_back(_Bin(*bin), gy.masked_fill(outside, 0), gl.masked_fill(outside, 0), ctx.inverse)
        gx = torch.where(outside, gy, inner.x)
        if not any(ctx.needs_input_grad[1:4]):
            return gx, None, None, None, None, None
        return gx, *_spread(inner, passed), None, None


def _spread(inner: _Gradients, passed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all widths, heights and interior derivatives from those of the bin of each point.

    A knot is the sum of the bins below it, so every bin below the point's own has the gradient of the lower corner.
    """
    index = passed[:-1].sum(0, keepdim=True)
    widths = (passed * inner.left).scatter_(0, index, inner.width[None])  # at x = B too, which passes the last knot
    heights = (passed * inner.bottom).scatter_(0, index, inner.height[None])
    slopes = inner.x.new_zeros(len(passed) + 1, *inner.x.shape)
    slopes.scatter_(0, torch.cat((index, index + 1)), torch.stack((inner.first, inner.last)))
    return widths, heights, slopes[1:-1]
