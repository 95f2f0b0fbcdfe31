"""Monotonic rational-quadratic splines of a scalar: values, inverses, log-slopes, and gradients in closed form.

Parameters lie on axis 0 and everything else follows ([P, …, N] beside inputs [..., N]): with the batch innermost, sums,
softmaxes and look-ups run over contiguous memory. Nothing branches on values, so the same code runs compiled, under
vmap, and without waiting for a GPU (but for the check of inputs of the `bounded` splines).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .knots import LIMIT, Form


def rational_quadratic(x: Tensor, raw: Tensor, form: Form, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The spline (or its inverse) and the log of its slope, elementwise.

    In the bin from (x_k, y_k) with width w, height h, s = h/w, end slopes d_0, d_1, and ξ = (x - x_k)/w, q = ξ(1 - ξ):

        y     = y_k + h (s ξ² + d_0 q) / D,                    D = s + (d_0 + d_1 - 2s) q
        dy/dx = s² (d_1 ξ² + 2 s q + d_0 (1 - ξ)²) / D²

    The inverse solves the quadratic for ξ in the form without cancellation; its gradient is that of the implicit
    function, so no square root is differentiated. Gradients of every order exist.

    Outside [-B, B], `linear` is the identity, `bounded` is not defined, and `circular` goes on periodically, so that
    f(x + 2B) = f(x) + 2B: a map of the circle [-B, B) with ends joined smoothly, of which -B is a fixed point.

    Args:
        x: [...] inputs (points y if inverse).
        raw: [P, ...] parameters, see `knots.Form`, that broadcast against [P, *x.shape].
    Returns:
        The mapped points in the dtype of x, and log|dy/dx| (log|dx/dy| if inverse) in at least float32, both [...].
        NaN gives NaN.
    Raises:
        ValueError: if P fits no number of bins; or, for `bounded`, if an input lies outside: reading that waits for
            the device. Compiled or under vmap nothing is read, and inputs outside give NaN.
    Source: Durkan et al. 2019 (Neural Spline Flows), equations 4-8 and appendix A; circular: Rezende et al. 2020
        (Normalizing Flows on Tori and Spheres), section 2.1.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, raw.dtype), torch.float32)
    shape = torch.broadcast_shapes(x.shape, raw.shape[1:])
    bins = form.bins(len(raw))
    v = (inside(x, form.bound) if form.tails == "bounded" else x).to(dtype).expand(shape)
    raw = raw.to(dtype).reshape(len(raw), *(1,) * (len(shape) + 1 - raw.ndim), *raw.shape[1:])
    turns = 0.0
    if form.tails == "circular":
        turns = 2 * form.bound * ((v.detach() + form.bound) / (2 * form.bound)).floor()
        v = v - turns
    y, log_slope, *_ = _Spline.apply(v, raw, form, bins, inverse)
    return (y + turns if form.tails == "circular" else y).to(x.dtype), log_slope


def inside(x: Tensor, bound: float) -> Tensor:
    """x, with NaN for what lies outside and cannot be read.

    Raises:
        ValueError: naming the first element outside.
    """
    outside = x.abs() > bound
    if torch.compiler.is_compiling():
        return x.masked_fill(outside, math.nan)
    try:
        found = bool(outside.any())
    except RuntimeError:  # under vmap there is no single answer
        return x.masked_fill(outside, math.nan)
    if found:
        at = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"spline: element {at} (the last axis counts items) is {x[at].item():.6g}, outside "
            f"[{-bound:g}, {bound:g}], where a spline with tails=bounded is defined. Raise bound, scale the data, or "
            "take tails=linear."
        )
    return x


class _Bin(NamedTuple):
    """The bin of each point, stacked on axis 0: its lower corner (left, bottom), its size (width, height), and the
    slopes at its ends. Distances are measured from -bound, so that sums of widths are knots as they stand."""

    corner: Tensor
    size: Tensor
    ends: Tensor


def _running_sums(shares: Tensor) -> Tensor:
    """shares.cumsum(1). On a CPU, adding whole rows runs along memory, where cumsum walks across it."""
    bins, each = shares.shape[1], shares[:, 0].numel()
    if shares.device.type != "cpu" or each < 64 * bins:
        return shares.cumsum(1)
    sums = shares.clone()
    for k in range(1, bins):
        sums[:, k] += sums[:, k - 1]
    return sums


def _locate(v: Tensor, raw: Tensor, shares: Tensor, form: Form, bins: int, inverse: bool) -> tuple[_Bin, Tensor]:
    """The bin of each point v >= 0 and its number [1, ...]: how many knots after the first lie at or below it."""
    edges = form.edges(_running_sums(shares))
    passed = v >= edges[int(inverse), :-1]
    index = passed.sum(0, keepdim=True, dtype=torch.uint8 if bins <= 256 else torch.int16)
    place = index.long()
    both = place.expand(2, *place.shape)
    full = (2, bins, *v.shape)
    size = form.sizes(shares.expand(full).gather(1, both)[:, 0], bins)
    corner = edges.expand(full).gather(1, (both - 1).clamp(min=0))[:, 0] * index.to(v.dtype).clamp(max=1)
    slopes = raw[2 * bins :]
    if len(slopes) == 0:
        return _Bin(corner, size, torch.ones_like(size)), index
    rows, free = form.ends(place, bins)
    ends = form.slopes(slopes.expand(len(slopes), *v.shape).gather(0, rows))
    return _Bin(corner, size, torch.ones_like(ends).lerp(ends, free.to(ends.dtype))), index


def _position(v: Tensor, bin: _Bin, inverse: bool) -> Tensor:
    """ξ of the point v; if inverse, at the height v: the root 2c/(-b - √(b² - 4ac)) of a ξ² + b ξ + c = 0."""
    left, bottom = bin.corner
    width, height = bin.size
    if not inverse:
        # knots are rounded sums, so a point at the end of its bin may miss [0, 1], and D > 0 is certain only there
        return ((v - left) / width).clamp(0, 1)
    v, s, (first, last) = v - bottom, height / width, bin.ends
    bend = v * (first + last - 2 * s)
    a, b, c = height * (s - first) + bend, height * first - bend, -s * v
    # b² - 4ac >= 0 for 0 <= v <= h because a root exists there; only rounding goes below.
    # b + √… > 0: where b <= 0, v·tension >= h d_0, so a >= h s > 0, -4ac > 0 and √… > |b|.
    return (2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())).clamp(0, 1)


def _evaluate(bin: _Bin, xi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s; r = (s ξ² + d_0 q)/D, the fraction of the height reached; D; and A in dy/dx = s² A/D²."""
    (width, height), (first, last) = bin.size, bin.ends
    s, rest = height / width, 1 - xi
    q, square = xi * rest, xi * xi
    sq = s * q
    denominator = s + (first + last) * q - 2 * sq
    numerator = last * square + 2 * sq + first * rest * rest
    return s, (s * square + first * q) / denominator, denominator, numerator


class _Gradients(NamedTuple):
    """Gradients of the input, of the lower corner of its bin, and of the bin's size and end slopes (stacked)."""

    x: Tensor
    corner: Tensor
    size: Tensor
    ends: Tensor


def _pull_back(bin: _Bin, xi: Tensor, gy: Tensor, gl: Tensor, inverse: bool) -> _Gradients:
    """Gradients from those of the mapped point (gy) and of its log-slope L (gl); the inverse by the implicit function.

    The inverse returns -L. With G = gy - gl ∂L/∂x, its input has the gradient G/(dy/dx), and the parameters have those
    of the forward map for -G/(dy/dx) and -gl in place of gy and gl.
    """
    width, (first, last) = bin.size[0], bin.ends
    s, r, d, a = _evaluate(bin, xi)
    rest = 1 - xi
    q, turn = xi * rest, rest - xi
    l_x = 2 * ((last * xi + s * turn - first * rest) / a - (first + last - 2 * s) * turn / d) / width
    slope = a * (s / d) ** 2
    if inverse:
        gx, gy, gl = -gy, (gl * l_x - gy) / slope, -gl
    else:
        gx = gy * slope + gl * l_x
    gyh, la, ld = gy * (s * width) / d, gl / a, 2 * gl / d
    gs = gyh * (xi * xi - r * (1 - 2 * q)) + 2 * (gl / s + la * q) - ld * (1 - 2 * q)
    gsw = gs / width
    return _Gradients(
        x=-gy if inverse else gx,
        corner=torch.stack((-gx, gy)),
        size=torch.stack((-gsw * s - xi * gx, gy * r + gsw)),
        ends=torch.stack((gyh * q * (1 - r) + la * rest * rest - ld * q, la * xi * xi - ld * q - gyh * q * r)),
    )


class _Spline(torch.autograd.Function):
    """(y, log dy/dx) with the closed-form backward; what follows these outputs is kept for it.

    Where a graph of the gradient is asked for, the bin is looked up again from the inputs, differentiably.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, raw: Tensor, form: Form, bins: int, inverse: bool) -> tuple[Tensor, ...]:
        bound = form.bound
        v = x.clamp(-bound, bound) + bound
        shares = form.shares(raw, bins)
        bin, index = _locate(v, raw, shares, form, bins, inverse)
        xi = _position(v, bin, inverse)
        s, r, d, a = _evaluate(bin, xi)
        log_slope = (a * (s / d) ** 2).log()
        log_slope = -log_slope if inverse else log_slope
        y = bin.corner[0] + xi * bin.size[0] if inverse else bin.corner[1] + r * bin.size[1]
        y = y - bound
        if form.tails == "linear":
            outside = x.abs() > bound
            y, log_slope = torch.where(outside, x, y), log_slope.masked_fill(outside, 0)
        else:
            y = y.clamp(-bound, bound)  # rounded sums may miss the ends, and the next layer refuses what lies outside
        return y, log_slope, shares, index, *bin

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.form, ctx.bins, ctx.inverse = inputs[2:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for all that is kept would take longer than the gradient
        ctx.save_for_backward(*inputs[:2], *output[2:])

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gl: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, raw, shares, index, *bin = ctx.saved_tensors
        form, bins, bound, inverse = ctx.form, ctx.bins, ctx.form.bound, ctx.inverse
        gy, gl = (torch.zeros_like(x) if g is None else g for g in (gy, gl))
        bin = _Bin(*bin)
        at = x
        if torch.is_grad_enabled():
            at = _Spline.apply(x, raw, form, bins, True)[0] if inverse else x
            shares = form.shares(raw, bins)
            bin, index = _locate(at.clamp(-bound, bound) + bound, raw, shares, form, bins, False)
        xi = _position(at.clamp(-bound, bound) + bound, bin, inverse and not torch.is_grad_enabled())
        if form.tails == "linear":
            outside = x.abs() > bound
            inner = _pull_back(bin, xi, gy.masked_fill(outside, 0), gl.masked_fill(outside, 0), inverse)
            gx = torch.where(outside, gy, inner.x)
        else:
            inner = _pull_back(bin, xi, gy, gl, inverse)
            gx = inner.x
        graw = _spread(inner, bin, index, raw, shares, form) if ctx.needs_input_grad[1] else None
        return gx, graw, None, None, None


def _spread(inner: _Gradients, bin: _Bin, index: Tensor, raw: Tensor, shares: Tensor, form: Form) -> Tensor:
    """Gradients of all raw parameters from those of the bin of each point.

    A knot is the sum of the bins below it, so every bin below the point's own has the gradient of the lower corner:
    G_j = g_corner for j < k, g_size for j = k, 0 above. Through the softmax, p (G - ⟨G, p⟩) with
    ⟨G, p⟩ = g_corner Σ_{j<k} p_j + g_size p_k, both known from the corner and the size.
    """
    bins = shares.shape[1]
    stretch, least = form.stretch(bins), 2 * form.bound * form.floor
    near = index.to(shares.dtype)
    share = (bin.size - least) / stretch
    corner, size = inner.corner.mul_(stretch * form.scale), inner.size.mul_(stretch * form.scale)
    mean = corner * ((bin.corner - least * near) / stretch) + size * share
    out = mean.new_zeros(len(raw), *mean.shape[1:])
    row = torch.arange(bins, device=index.device, dtype=shares.dtype).reshape(bins, *(1,) * (index.ndim - 1))
    logits = out[: 2 * bins].view(2, bins, *out.shape[1:])
    # all in place: of every intermediate result here there would be 2K numbers for each number of x
    logits.sub_(row).add_(near).clamp_(0, 1).mul_(corner[:, None]).sub_(mean[:, None]).mul_(shares)
    place = index.long()
    logits.scatter_add_(1, place.expand(2, *place.shape), (share * size)[:, None])
    del share, mean, near
    if not form.floor:
        logits.div_((1 + (2 / LIMIT * form.scale * raw[: 2 * bins].reshape(2, bins, *raw.shape[1:])).abs()) ** 2)
    if len(raw) > 2 * bins:
        rows, free = form.ends(place, bins)
        del place, corner, size
        ends = inner.ends.mul_(form.slopes_gradient(bin.ends)).mul_(free.to(shares.dtype))
        out[2 * bins :].scatter_add_(0, rows, ends)
    return out.sum_to_size(raw.shape)
