"""Control paths X of a controlled differential equation dz = f(z) dX: series, irregular and with gaps, made continuous.

A path is a piecewise polynomial of each row over that row's own knots. Each channel is interpolated over those knots
alone at which it was observed, so that what stands in values where nothing was observed, and times at which nothing
was, change nothing.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..registry import kind, register


class Path(NamedTuple):
    """Piecewise polynomials over each row's own parameter s, constant before the first knot and after the last.

    The parameter is time itself but where a path moves while time stands still (`rectilinear`).

    Args:
        knots: [B, K] float64 non-decreasing parameters; a shorter row repeats its last one.
        times: [B, K] float64 time at each knot, non-decreasing.
        pieces: [B, K - 1, C, P] coefficients of the powers of s - knots[:, k] between the knots k and k + 1, lowest
            first.
    """

    knots: Tensor
    times: Tensor
    pieces: Tensor

    @property
    def channels(self) -> int:
        return self.pieces.shape[2]

    def locate(self, s: Tensor) -> Tensor:
        """[B, M] the piece that holds each parameter s [B, M]; of the two that meet at a knot, the earlier one."""
        found = torch.searchsorted(self.knots, s.contiguous()) - 1
        return found.clamp(0, self.pieces.shape[1] - 1)

    def value(self, s: Tensor, piece: Tensor | None = None) -> Tensor:
        """[B, C] X at the parameter s, [] or [B] float64; from the piece [B] if it is given."""
        u, coefficients = self._local(s, piece)
        out = coefficients[..., -1]
        for c in coefficients.unbind(-1)[-2::-1]:
            out = out * u + c
        return out

    def derivative(self, s: Tensor, piece: Tensor | None = None) -> Tensor:
        """[B, C] dX/ds at the parameter s, [] or [B] float64; at a kink, that of the earlier piece or of `piece` [B].

        0 before the first knot and after the last.
        """
        u, coefficients = self._local(s, piece)
        out = torch.zeros_like(coefficients[..., 0])
        for power in range(coefficients.shape[-1] - 1, 0, -1):
            out = out * u + power * coefficients[..., power]
        outside = (s < self.knots[:, 0]) | (s > self.knots[:, -1])
        return torch.where(outside[:, None], 0.0, out)

    def parameter(self, t: Tensor) -> Tensor:
        """[B, M] the parameter at which the path has taken in all that was observed by the times t [B, M]."""
        k = torch.searchsorted(self.times, t.contiguous(), right=True) - 1
        k = k.clamp(0, self.knots.shape[1] - 2)
        start, end = self.times.gather(1, k), self.times.gather(1, k + 1)
        share = torch.where(end > start, (t - start) / torch.where(end > start, end - start, 1.0), t >= end)
        s, e = self.knots.gather(1, k), self.knots.gather(1, k + 1)
        return s + share.clamp(0, 1) * (e - s)

    def _local(self, s: Tensor, piece: Tensor | None) -> tuple[Tensor, Tensor]:
        """The distance [B, 1] from the knot before s, and the coefficients [B, C, P] there."""
        s = torch.minimum(torch.maximum(s, self.knots[:, 0]), self.knots[:, -1])
        piece = self.locate(s[:, None])[:, 0] if piece is None else piece
        rows = torch.arange(len(s), device=s.device)
        return (s - self.knots[rows, piece])[:, None].to(self.pieces.dtype), self.pieces[rows, piece]


class Series(NamedTuple):
    """The observations of each row in order, without times at which nothing was observed; N is the most of a row.

    Args:
        times: [B, N] float64 strictly increasing; a shorter row repeats its last time.
        values: [B, N, C] 0 where not observed.
        mask: [B, N, C] True where observed.
        count: [B] observations of each row.
    """

    times: Tensor
    values: Tensor
    mask: Tensor
    count: Tensor


class Knots(NamedTuple):
    """The same, for each channel by itself: [B, J, C] own times and values, a shorter channel repeating its last.

    A channel begins and ends with its row: with its first and its last observed value (0 where there is none).

    Args:
        index: [B, N, C] the last own knot at each time of the row.
    """

    times: Tensor
    values: Tensor
    index: Tensor


@kind
class Control(ABC):
    """Makes a continuous path of observations: time, the values, and how many values have been observed so far.

    Args:
        time: add time as the first channel; without it what is computed does not depend on how fast a path is walked.
        intensity: add for each channel the number of its observations so far, where that they were made says something.

    Attributes:
        kinks: whether derivatives jump at knots, so that a solver must land on them to keep its order.
    """

    kinks: ClassVar[bool] = False

    def __init__(self, time: bool = True, intensity: bool = False) -> None:
        self.time, self.intensity = time, intensity

    def channels(self, values: int) -> int:
        """Channels of the path of a series with so many."""
        return self.time + values * (1 + self.intensity)

    def path(
        self, times: Tensor, values: Tensor, mask: Tensor | None = None, *, per_count: Tensor | float = 1.0
    ) -> Path:
        """The path through a batch of series; gradients flow to the values.

        Args:
            times: [B, L] increasing where something was observed.
            values: [B, L, C] real.
            mask: [B, L] or [B, L, C] True where observed, None for everywhere.
            per_count: [C] what one observation adds to the channels of intensity.
        Raises:
            ValueError: if shapes do not fit, times do not increase, a value is not finite, or a row has no observation.
        """
        series = observed(times, values, mask)
        parts, seen = [series.values], [series.mask]
        present = torch.arange(series.times.shape[1], device=values.device) < series.count[:, None]
        if self.time:
            parts.insert(0, series.times[:, :, None].to(values.dtype))
            seen.insert(0, present[:, :, None])
        if self.intensity:
            parts.append(series.mask.cumsum(1).to(values.dtype) * per_count)
            seen.append(present[:, :, None].expand_as(series.mask))
        return self.interpolate(series._replace(values=torch.cat(parts, 2), mask=torch.cat(seen, 2)))

    @abstractmethod
    def interpolate(self, series: Series) -> Path:
        """The path through a series of all channels."""


def observed(times: Tensor, values: Tensor, mask: Tensor | None) -> Series:
    """What was observed of a batch of series, moved to the front of each row (see `Control.path`)."""
    mask = _checked(times, values, mask)
    seen = mask.any(2)
    count = seen.sum(1)
    if len(count) and not count.all():
        raise ValueError(f"control: nothing was observed of item {int((count == 0).nonzero()[0])}. Leave it out.")
    n = max(2, int(count.max())) if len(count) else 2
    order = (~seen).to(torch.uint8).argsort(dim=1, stable=True)
    place = torch.arange(n, device=times.device)
    order = order.gather(1, torch.minimum(place, count[:, None] - 1))
    times, present = times.to(torch.float64).gather(1, order), place < count[:, None]
    wrong = ((times.diff(dim=1) <= 0) | ~times.diff(dim=1).isfinite()) & present[:, 1:]
    if wrong.any():
        item, k = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"control: the times of observations must increase; item {item} goes from {float(times[item, k])!r} to "
            f"{float(times[item, k + 1])!r} at position {int(order[item, k + 1])}. Sort them, and merge what was "
            "observed at one time."
        )
    wide = order[:, :, None].expand(-1, -1, values.shape[2])
    mask = mask.gather(1, wide) & present[:, :, None]
    values = torch.where(mask, values.gather(1, wide), 0.0)
    if not values.isfinite().all():
        item, k, c = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"control: the value of item {item}, position {int(order[item, k])}, channel {c} is not finite; set its "
            "mask to False if it was not observed."
        )
    return Series(times, values, mask, count)


def _checked(times: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The mask [B, L, C] of a series."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    right = values.ndim == 3 and times.shape == values.shape[:2] and mask.shape in (values.shape, values.shape[:2])
    if not right or not values.shape[1] or not values.is_floating_point() or mask.dtype != torch.bool:
        raise ValueError(
            "control: times [B, L], real values [B, L, C] and a Boolean mask [B, L] or [B, L, C] are needed, found "
            f"times {list(times.shape)}, {values.dtype} {list(values.shape)} and {mask.dtype} {list(mask.shape)}."
        )
    return (mask if mask.ndim == 3 else mask[:, :, None]).expand_as(values)


def own_knots(series: Series) -> Knots:
    """The knots of each channel by itself."""
    times, values, mask, count = series
    n = times.shape[1]
    place = torch.arange(n, device=times.device)[None, :, None]
    first = mask.to(torch.uint8).argmax(1, keepdim=True)
    last = n - 1 - mask.flip(1).to(torch.uint8).argmax(1, keepdim=True)
    start, end = (place == 0).expand_as(mask), (place == count[:, None, None] - 1).expand_as(mask)
    values = torch.where(start & ~mask, values.gather(1, first), values)
    values = torch.where(end & ~mask & ~start, values.gather(1, last), values)
    mask = mask | start | end
    index = mask.cumsum(1) - 1
    most = index[:, -1:]
    j = max(2, int(most.max()) + 1) if len(times) else 2
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True).gather(1, torch.minimum(place[:, :j], most))
    return Knots(times[:, :, None].expand_as(values).gather(1, order), values.gather(1, order), index)


class Spline(Control):
    """A control that interpolates each channel by polynomials between its own knots."""

    def interpolate(self, series: Series) -> Path:
        own = own_knots(series)
        pieces = self.pieces(own.times, own.values.double())
        index = own.index[:, :-1].clamp(max=pieces.shape[1] - 1)
        pieces = pieces.gather(1, index[..., None].expand(*index.shape, pieces.shape[-1]))
        times = series.times
        shift = times[:, :-1, None] - own.times.gather(1, index)
        pieces = _shifted(pieces, shift).to(series.values.dtype)
        still = (times.diff(dim=1) == 0)[:, :, None, None]
        still = still & (torch.arange(pieces.shape[-1], device=times.device) > 0)
        return Path(times, times, torch.where(still, 0.0, pieces))

    @abstractmethod
    def pieces(self, t: Tensor, x: Tensor) -> Tensor:
        """[B, J - 1, C, P] coefficients between knots at times t [B, J, C] with values x [B, J, C], both float64.

        A shorter channel repeats its last knot.
        """


def _shifted(pieces: Tensor, shift: Tensor) -> Tensor:
    """The polynomials p(u + shift) in powers of u (Horner's scheme, repeated)."""
    out = list(pieces.unbind(-1))
    for low in range(len(out) - 1):
        for power in range(len(out) - 2, low - 1, -1):
            out[power] = out[power] + shift * out[power + 1]
    return torch.stack(out, -1)


def slopes(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and slopes of the intervals, [B, J - 1, C] each; 0 for both where a knot is repeated."""
    h = t.diff(dim=1)
    return h, torch.where(h > 0, x.diff(dim=1) / torch.where(h > 0, h, 1.0), 0.0)


@register(Control, "linear")
class Linear(Spline):
    """Straight lines between observations: X = x_k + m_k u with m_k the slope of the interval.

    Derivatives jump at knots, where solvers land. A value enters from the observation before it on, so that this is
    causal only up to the next observation.
    Source: Kidger et al. 2020 (Neural controlled differential equations for irregular time series).
    """

    kinks = True

    def pieces(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.stack((x[:, :-1], slopes(t, x)[1]), -1)


@register(Control, "hermite")
class Hermite(Spline):
    """Cubics with backward differences: the derivative at a knot is the slope of the interval before it.

    X = x_k + b u + c u² + d u³ with b = m_{k-1} (m_0 for the first), c = 2 (m_k - b)/h, d = -(m_k - b)/h², so that
    X' runs from m_{k-1} to m_k. What is observed after a knot does not change the path before the last one. A gap of a
    channel is one interval of it.
    Source: Morrill et al. 2022 (On the choice of interpolation scheme for neural CDEs).
    """

    def pieces(self, t: Tensor, x: Tensor) -> Tensor:
        h, m = slopes(t, x)
        b = torch.cat((m[:, :1], m[:, :-1]), 1)
        wide = torch.where(h > 0, h, 1.0)
        return torch.stack((x[:, :-1], b, 2 * (m - b) / wide, -(m - b) / wide.square()), -1)


@register(Control, "natural_cubic")
class NaturalCubic(Spline):
    """Cubics with two continuous derivatives and X'' = 0 at both ends; every value changes the whole path.

    With M = X'' at the knots: h_{k-1} M_{k-1} + 2 (h_{k-1} + h_k) M_k + h_k M_{k+1} = 6 (m_k - m_{k-1}), and
    X = x_k + (m_k - h_k (2 M_k + M_{k+1})/6) u + M_k u²/2 + (M_{k+1} - M_k) u³/(6 h_k).
    Source: Kidger et al. 2020 (Neural controlled differential equations for irregular time series), section 3.
    """

    def pieces(self, t: Tensor, x: Tensor) -> Tensor:
        h, m = slopes(t, x)
        inside = h[:, 1:] > 0  # a knot between two intervals: neither an end nor a repetition
        diagonal = torch.where(inside, 2 * (h[:, 1:] + h[:, :-1]), 1.0)
        right = torch.where(inside, 6 * m.diff(dim=1), 0.0)
        curved = tridiagonal(torch.where(inside, h[:, :-1], 0.0), diagonal, h[:, 1:], right)
        curved = torch.nn.functional.pad(curved, (0, 0, 1, 1))
        low, high = curved[:, :-1], curved[:, 1:]
        cubic = torch.where(h > 0, (high - low) / (6 * torch.where(h > 0, h, 1.0)), 0.0)
        return torch.stack((x[:, :-1], m - h * (2 * low + high) / 6, low / 2, cubic), -1)


def tridiagonal(lower: Tensor, diagonal: Tensor, upper: Tensor, right: Tensor) -> Tensor:
    """y of lower_k y_{k-1} + diagonal_k y_k + upper_k y_{k+1} = right_k along axis 1, for diagonally dominant systems.

    All [B, J, C]; the first entry of `lower` and the last of `upper` do not count.
    """
    ups: list[Tensor] = []
    found: list[Tensor] = []
    for k in range(diagonal.shape[1]):
        pivot, rest = diagonal[:, k], right[:, k]
        if k:
            pivot, rest = pivot - lower[:, k] * ups[-1], rest - lower[:, k] * found[-1]
        ups.append(upper[:, k] / pivot)
        found.append(rest / pivot)
    for k in range(diagonal.shape[1] - 2, -1, -1):
        found[k] = found[k] - ups[k] * found[k + 1]
    return torch.stack(found, 1) if found else right


@register(Control, "rectilinear")
class Rectilinear(Control):
    """Causal: time moves to the next observation while values stay, then values jump while time stands still.

    The knots of t = (0, 1), x = (a, b) are (0, a), (1, a), (1, b), at the parameters 0, 1, 2. Before its first
    observation a channel has that value, which is not causal: where that matters, give it a value at the first time.
    Source: Morrill et al. 2022 (On the choice of interpolation scheme for neural CDEs).
    """

    kinks = True

    def interpolate(self, series: Series) -> Path:
        own = own_knots(series)
        held = own.values.gather(1, own.index.clamp(max=own.values.shape[1] - 1))
        times, values = (each.repeat_interleave(2, 1) for each in (series.times, held))
        times, moving = times[:, 1:], values[:, :-1]
        if self.time:
            moving = torch.cat((times[:, :, None].to(moving.dtype), moving[:, :, 1:]), 2)
        knots = torch.minimum(torch.arange(times.shape[1], device=times.device), 2 * series.count[:, None] - 2)
        return Path(knots.double(), times.contiguous(), torch.stack((moving[:, :-1], moving.diff(dim=1)), -1))
