"""Signatures and log-signatures of piecewise linear paths to depth 3, and the control of the log-ODE method."""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError, register
from .paths import Control, Linear, Path, Series

Levels = tuple[Tensor, ...]  # of the tensor algebra without its constant 1: [*, C], [*, C, C], [*, C, C, C]
DEPTHS = (1, 2, 3)


def outer(a: Tensor, b: Tensor, left: int, right: int) -> Tensor:
    """a ⊗ b of tensors with `left` and `right` trailing axes, over shared leading axes."""
    return a.reshape(*a.shape, *[1] * right) * b.reshape(*b.shape[: b.ndim - right], *[1] * left, *b.shape[-right:])


def signature(increments: Tensor, depth: int) -> Levels:
    """The iterated integrals S^{i…j} = ∫…∫ dX^i … dX^j of piecewise linear paths, to a depth of 1, 2 or 3.

    With S_k those before increment Δ_k, Chen's identity adds up
    S¹ = Σ Δ,  S² = Σ (S¹_k ⊗ Δ + Δ⊗Δ/2),  S³ = Σ (S²_k ⊗ Δ + S¹_k ⊗ Δ⊗Δ/2 + Δ⊗Δ⊗Δ/6).

    Args:
        increments: [*, L, C].
    Returns:
        [*, C], [*, C, C], [*, C, C, C] up to the depth.
    Source: Kidger & Lyons 2021 (Signatory), section 2.
    """
    check_depth(depth)
    d = increments
    levels = [d.sum(-2)]
    if depth > 1:
        before = d.cumsum(-2) - d
        square = outer(d, d, 1, 1) / 2
        second = outer(before, d, 1, 1) + square
        levels.append(second.sum(-3))
    if depth > 2:
        earlier = second.cumsum(-3) - second
        third = outer(earlier, d, 2, 1) + outer(before, square, 1, 2) + outer(square, d, 2, 1) / 3
        levels.append(third.sum(-4))
    return tuple(levels)


def chen(a: Levels, b: Levels) -> Levels:
    """The signature of one path followed by another, of theirs: the product in the tensor algebra."""
    out = [a[0] + b[0]]
    if len(a) > 1:
        out.append(a[1] + outer(a[0], b[0], 1, 1) + b[1])
    if len(a) > 2:
        out.append(a[2] + outer(a[1], b[0], 2, 1) + outer(a[0], b[1], 1, 2) + b[2])
    return tuple(out)


def logarithm(s: Levels) -> Levels:
    """log(1 + s) = s - s⊗s/2 + s⊗s⊗s/3 in the truncated tensor algebra."""
    out = [s[0]]
    if len(s) > 1:
        square = outer(s[0], s[0], 1, 1)
        out.append(s[1] - square / 2)
    if len(s) > 2:
        mixed = outer(s[0], s[1], 1, 2) + outer(s[1], s[0], 2, 1)
        out.append(s[2] - mixed / 2 + outer(square, s[0], 2, 1) / 3)
    return tuple(out)


def lyndon_words(channels: int, depth: int) -> list[tuple[int, ...]]:
    """The words up to a length that are smaller than each of their rotations, by length and then in order.

    They number a basis of the free Lie algebra: C, then C(C-1)/2, then (C³-C)/3.
    """
    check_depth(depth)
    words: list[tuple[int, ...]] = [(i,) for i in range(channels)]
    if depth > 1:
        words += combinations(range(channels), 2)
    if depth > 2:
        letters = range(channels)
        words += [(i, j, k) for i in letters for j in range(i, channels) for k in range(i + 1, channels)]
    return words


def logsignature(increments: Tensor, depth: int) -> Tensor:
    """[*, D] the log-signature of piecewise linear paths with increments [*, L, C], at the Lyndon words.

    The coefficients of log S at those words determine it. At depth 2 they are the increment X^i(1) - X^i(0) and the
    areas ½ ∫ (X^i dX^j - X^j dX^i) for i < j, of the path from its start.

    Source: Kidger & Lyons 2021 (Signatory), section 2; Morrill et al. 2021 (Neural rough differential equations),
        section 2.
    """
    levels = logarithm(signature(increments, depth))
    words = lyndon_words(increments.shape[-1], depth)
    parts = []
    for length, level in enumerate(levels, 1):
        chosen = torch.tensor([w for w in words if len(w) == length], device=increments.device).reshape(-1, length)
        parts.append(level[(..., *chosen.unbind(1))])
    return torch.cat(parts, -1)


def dimension(channels: int, depth: int) -> int:
    """Coefficients of a log-signature."""
    check_depth(depth)
    return sum((channels, channels * (channels - 1) // 2, (channels**3 - channels) // 3)[:depth])


def check_depth(depth: int) -> None:
    if depth not in DEPTHS:
        raise ConfigError(f"log-signature: depth must be 1, 2 or 3, found {depth}.")


class _Windows(NamedTuple):
    """[B, W + 1] times at the ends of windows, [B, W, window, C] increments within them, [B, C] the first value."""

    times: Tensor
    increments: Tensor
    start: Tensor


@register(Control, "log_ode")
class LogODE(Control):
    """For long series: within a window the control runs at the constant rate LogSig(X over the window)/length.

    X is the linear interpolation. A field of D columns then answers to what a window does to second or third order
    without a step for each observation. X(t_0) fills the first channels of the start, and 0 the others.

    Args:
        depth: of the log-signature, 1 to 3; D grows with the power `depth` of the channels.
        window: observations that a window takes in.
    Source: Morrill et al. 2021 (Neural rough differential equations), section 3.
    """

    kinks = True

    def __init__(self, depth: int = 2, window: int = 8, time: bool = True, intensity: bool = False) -> None:
        super().__init__(time, intensity)
        check_depth(depth)
        if window < 1:
            raise ConfigError(f"control.window: a window takes in at least 1 observation, found {window}.")
        self.depth, self.window = depth, window

    def channels(self, values: int) -> int:
        return dimension(super().channels(values), self.depth)

    def interpolate(self, series: Series) -> Path:
        cut = self._cut(series)
        rates = logsignature(cut.increments, self.depth)
        start = torch.nn.functional.pad(cut.start, (0, rates.shape[-1] - cut.start.shape[-1]))
        values = torch.cat((start[:, None], start[:, None] + rates.cumsum(1)), 1)
        length = cut.times.diff(dim=1)[:, :, None]
        rates = torch.where(length > 0, rates / torch.where(length > 0, length, 1.0).to(rates.dtype), 0.0)
        return Path(cut.times, cut.times, torch.stack((values[:, :-1], rates), -1))

    def _cut(self, series: Series) -> _Windows:
        line = Linear().interpolate(series)
        length = series.times.diff(dim=1)[:, :, None].to(line.pieces.dtype)
        increments = line.pieces[..., 1] * length
        n, w = increments.shape[1], self.window
        count = -(-n // w)
        increments = torch.nn.functional.pad(increments, (0, 0, 0, count * w - n))
        ends = (torch.arange(count + 1, device=length.device) * w).clamp(max=n)
        shape = (len(increments), count, w, increments.shape[-1])
        return _Windows(series.times[:, ends], increments.reshape(shape), line.pieces[:, 0, :, 0])
