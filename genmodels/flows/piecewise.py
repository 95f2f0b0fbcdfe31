"""Monotonic splines that the rational-quadratic one is compared with: piecewise linear and piecewise quadratic.

Parameters lie on axis 0 ([P, …, N] beside inputs [..., N]), as in `splines`. Gradients are those of plain operations;
an inverse is found without a graph and joined to it by Newton steps, so that no root is differentiated.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register
from .knots import FLOOR, check_spline
from .monotone import Monotone, aligned, follow
from .splines import inside


@register(Monotone, "linear_spline")
class LinearSpline(Monotone):
    """Piecewise linear map of [-B, B] onto itself with K equal bins, the identity outside: P = K, for comparisons.

    y = -B + Σ_{j<k} h_j + ξ h_k with ξ in [0, 1] in bin k, and log dy/dx = log(K h_k / 2B), which jumps at the knots;
    heights h = 2B (ε + (1 - Kε) softmax(c u)). Zero parameters give the identity.

    Args:
        bins: K.
        bound: B, half the width of the interval, in model units.
        floor: ε, least height as a fraction of the interval; the paper has none, which overflows in float32.
    Raises:
        ValueError: if there is no bin, if the bound is not positive, or if K ε > 1.
    Source: Müller et al. 2019 (Neural Importance Sampling), section 4.1, with the tails of Durkan et al. 2019 (Neural
        Spline Flows), appendix C.
    """

    def __init__(self, bins: int = 8, bound: float = 3.0, floor: float = FLOOR, identity: bool = True) -> None:
        check_spline("linear_spline", bins, bound, floor)
        self.parameters, self.bound, self.floor, self.identity = bins, bound, floor, identity

    def __call__(self, x: Tensor, raw: Tensor, *, inverse: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        v, raw = aligned(x, raw, self.parameters)
        v, raw, outside = _prepared(v, raw, self.bound)
        bins, width = self.parameters, 2 * self.bound / self.parameters
        shares = self.floor + (1 - bins * self.floor) * (raw * scale).softmax(0)
        tops = 2 * self.bound * shares.cumsum(0)
        index = (v >= tops[:-1]).sum(0, keepdim=True) if inverse else (v / width).long().clamp(0, bins - 1)[None]
        height = 2 * self.bound * _take(shares, index)
        bottom = _take(F.pad(tops, _front(tops)), index)
        left = index[0].to(v.dtype) * width
        slope = height / width
        y = left + ((v - bottom) / slope).clamp(0, width) if inverse else bottom + (v - left) * slope
        return _joined(x, y, -slope.log() if inverse else slope.log(), outside, self.bound)


@register(Monotone, "quadratic_spline")
class QuadraticSpline(Monotone):
    """Piecewise quadratic map of [-B, B] onto itself, its slope piecewise linear: for comparisons.

    With slopes v_k at the knots, in bin k of width w: y = y_k + w (v_k ξ + (v_{k+1} - v_k) ξ²/2) and
    dy/dx = v_k + (v_{k+1} - v_k) ξ. Raw parameters are u_w (K) | u_v: w = 2B (ε + (1 - Kε) softmax(c u_w)), and
    v = ε + (1 - ε) a / area with a = softplus(c u_v) + ε.

    Args:
        bins: K.
        bound: B, half the width of the interval, in model units.
        tails: "linear" is the identity outside, with a_0 = a_K such that the slope there is 1 (P = 2K - 1);
            "bounded"
            refuses what lies outside, and the slopes at the ends are free (P = 2K + 1).
        identity: whether layers start at zero parameters, which give the identity.
    Raises:
        ValueError: if there is no bin (with linear tails: fewer than three; two of them
            leave only the identity), if the bound is not positive, or if the
            floors leave no room for the bins.
    Source: Müller et al. 2019 (Neural Importance Sampling), section 4.2, with the tails of Durkan et al. 2019 (Neural
        Spline Flows), appendix C.
    """

    def __init__(
        self, bins: int = 8, bound: float = 3.0, tails: Literal["linear", "bounded"] = "linear", identity: bool = True
    ) -> None:
        check_spline("quadratic_spline", bins, bound, FLOOR, least=3 if tails == "linear" else 1)
        self.bins, self.bound, self.tails, self.identity = bins, bound, tails, identity
        self.parameters = 2 * bins + (1 if tails == "bounded" else -1)

    def __call__(self, x: Tensor, raw: Tensor, *, inverse: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        v, raw = aligned(x if self.tails == "linear" else inside(x, self.bound), raw, self.parameters)
        v, raw, outside = _prepared(v, raw, self.bound)
        widths, slopes = self._knots(raw, scale)
        rights = widths.cumsum(0)
        tops = ((slopes[1:] + slopes[:-1]) / 2 * widths).cumsum(0)
        index = (v >= (tops if inverse else rights)[:-1]).sum(0, keepdim=True)
        width, first, last = _take(widths, index), _take(slopes, index), _take(slopes, index + 1)
        left, bottom = _take(F.pad(rights, _front(rights)), index), _take(F.pad(tops, _front(tops)), index)
        if not inverse:
            xi = ((v - left) / width).clamp(0, 1)
            y = bottom + width * xi * (first + (last - first) * xi / 2)
            return _joined(x, y, (first + (last - first) * xi).log(), outside, self.bound)
        with torch.no_grad():
            # ξ = 2c/(b + √(b² + 2(v_1 - v_0)c)) with b = v_0 and c = (y - y_k)/w; the root's argument is the square of
            # the slope at the solution, so only rounding goes below
            c = (v - bottom) / width
            xi = (2 * c / (first + (first**2 + 2 * (last - first) * c).clamp(min=0).sqrt())).clamp(0, 1)
        xi = follow(
            xi,
            lambda xi: bottom - v + width * xi * (first + (last - first) * xi / 2),
            lambda xi: width * (first + (last - first) * xi),
        )
        return _joined(x, left + width * xi, -(first + (last - first) * xi).log(), outside, self.bound)

    def _knots(self, raw: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Widths [K, ...] and slopes [K+1, ...]."""
        bins = self.bins
        shares = FLOOR + (1 - bins * FLOOR) * (raw[:bins] * scale).softmax(0)
        a = F.softplus(raw[bins:] * scale) + FLOOR
        if self.tails == "linear":
            # after division by the area a_0 = a_K must be 1: a_0 = area = a_0 (w_0 + w_{K-1})/2 + the rest
            ends = shares[[0, -1]] / 2
            rest = ends[0] * a[0] + ends[1] * a[-1] + ((a[1:] + a[:-1]) / 2 * shares[1:-1]).sum(0)
            edge = (rest / (1 - ends.sum(0)))[None]
            a = torch.cat((edge, a, edge))
        area = ((a[1:] + a[:-1]) / 2 * shares).sum(0)
        return 2 * self.bound * shares, FLOOR + (1 - FLOOR) * a / area


def _prepared(x: Tensor, raw: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """The distance of x from -bound, limited to the interval; raw for every point; and which points lie outside."""
    return x.clamp(-bound, bound) + bound, raw.expand(-1, *x.shape), x.abs() > bound


def _joined(x: Tensor, y: Tensor, log_slope: Tensor, outside: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Inside and outside together: y is measured from -bound, and the tails are the identity."""
    y = (y - bound).clamp(-bound, bound)
    return torch.where(outside, x.to(y.dtype), y).to(x.dtype), log_slope.masked_fill(outside, 0)


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(0, index)[0]


def _front(values: Tensor) -> tuple[int, ...]:
    """What `pad` needs to put a row of zeros before axis 0."""
    return (*(0,) * (2 * values.ndim - 2), 1, 0)
