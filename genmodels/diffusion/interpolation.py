"""Piecewise cubics through knots that keep their order: what tabulated paths and separations are read from."""

import torch
from torch import Tensor


def pchip_slopes(x: Tensor, y: Tensor) -> Tensor:
    """[K] slopes at the knots of the shape-preserving cubic: monotone wherever the knots are.

    Inside, the weighted harmonic mean of the two secants, and 0 where they differ in sign; at the ends the three-point
    formula, kept to the sign of the secant and to three times its size.

    Args:
        x: [K] strictly increasing.
        y: [K].
    Source: Fritsch & Butland 1984 (A method for constructing local monotone piecewise cubic interpolants).
    """
    h, secant = x.diff(), y.diff() / x.diff()
    if len(x) == 2:
        return secant.repeat(2)
    left, right = secant[:-1], secant[1:]
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    same = left * right > 0
    safe_left, safe_right = left.where(same, torch.ones_like(left)), right.where(same, torch.ones_like(right))
    inner = ((w1 + w2) / (w1 / safe_left + w2 / safe_right)).where(same, torch.zeros_like(left))
    first, last = _end(h[0], h[1], secant[0], secant[1]), _end(h[-1], h[-2], secant[-1], secant[-2])
    return torch.cat((first[None], inner, last[None]))


def _end(h: Tensor, h_next: Tensor, secant: Tensor, secant_next: Tensor) -> Tensor:
    slope = ((2 * h + h_next) * secant - h * secant_next) / (h + h_next)
    slope = torch.where(slope.sign() == secant.sign(), slope, torch.zeros_like(slope))
    steep = (secant.sign() != secant_next.sign()) & (slope.abs() > 3 * secant.abs())
    return torch.where(steep, 3 * secant, slope)


def limit_slopes(x: Tensor, y: Tensor, slopes: Tensor) -> Tensor:
    """[K] the slopes, made smaller where the cubic between increasing knots would turn back.

    With a and b the slopes at the ends of an interval over its secant, a, b >= 0 and a² + b² <= 9 are enough.

    Source: Fritsch & Carlson 1980 (Monotone piecewise cubic interpolation).
    """
    secant = y.diff() / x.diff()
    size = torch.hypot(slopes[:-1] / secant, slopes[1:] / secant)
    factor = (3 / size).clamp(max=1.0)
    one = factor.new_ones(1)
    return slopes.clamp(min=0) * torch.minimum(torch.cat((factor, one)), torch.cat((one, factor)))


def cubic(x: Tensor, y: Tensor, slopes: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative, in the shape of `at`, of the cubics through the knots with those slopes.

    Continuous with its derivative, and exact at knots. Measured from the nearer knot, so that what is small beside a
    knot keeps its digits. Beyond the ends the outermost cubics go on.

    Args:
        x: [K] strictly increasing.
        y, slopes: [K].
    """
    k = torch.searchsorted(x, at.detach().contiguous(), right=True).clamp(1, len(x) - 1) - 1
    h = x[k + 1] - x[k]
    secant = (y[k + 1] - y[k]) / h
    right = 2 * (at - x[k]) > h
    near, far = torch.where(right, slopes[k + 1], slopes[k]), torch.where(right, slopes[k], slopes[k + 1])
    step = torch.where(right, at - x[k + 1], at - x[k])
    s = step.abs() / h
    square, third = 3 * secant - 2 * near - far, near + far - 2 * secant
    value = torch.where(right, y[k + 1], y[k]) + step * (near + s * (square + s * third))
    return value, near + s * (2 * square + 3 * s * third)


def isotonic(y: Tensor, weights: Tensor) -> Tensor:
    """[K] the nondecreasing sequence nearest to y in weighted squares, by pooling neighbours that are out of order.

    Source: Barlow et al. 1972 (Statistical inference under order restrictions), chapter 1.
    """
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(y.tolist(), weights.tolist(), strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            before = pools.pop()
            total = before[1] + pool[1]
            mean = (before[0] * before[1] + pool[0] * pool[1]) / total
            pool = (mean, total, before[2] + pool[2])
        pools.append(pool)
    return torch.cat([y.new_full((count,), value) for value, _, count in pools])
