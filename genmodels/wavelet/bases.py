"""Bases of functions of one variable on [-1, 1], in which potentials are expanded."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register


@kind
class Basis(ABC):
    """Functions R_k(s) of s in [-1, 1], k < count, with their first two derivatives.

    R_k(-s) = constant - R_{K-1-k}(s), so that R_k - R_{K-1-k} is even.

    Attributes:
        count: K.
        spans_linear: whether some combination of them is s itself.
    """

    count: int
    spans_linear: bool

    @abstractmethod
    def derivatives(self, s: Tensor, order: int) -> Tensor:
        """[*, K] the functions (order 0) or their derivatives of order 1 or 2 at s [*]."""

    def combine(self, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Σ_k b_k R_k(s) and its first two derivatives, each shaped like s."""
        return self.combination(b, s.dtype)(s)

    def combination(self, b: Tensor, dtype: torch.dtype, orders: int = 3) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """s of a dtype -> the first `orders` of what `combine` gives; what depends on b alone is found once."""
        b = b.to(dtype)
        return lambda s: tuple(self.derivatives(s, order) @ b for order in range(orders))


@register(Basis, "b_spline")
class BSpline(Basis):
    """R_k' is the k-th cubic B-spline on equal intervals: potentials have three continuous derivatives.

    With h = 2/(K - 3) the knots are -1, -1 + h, …, 1, and Σ_k R_k' = 1.

    Args:
        count: K >= 4; K - 3 intervals.
    Raises:
        ConfigError: unless count >= 4.
    """

    spans_linear = True

    def __init__(self, count: int = 16) -> None:
        if count < 4:
            raise ConfigError(f"b_spline: count >= 4 is needed (one interval), found {count}.")
        self.count, self.intervals = count, count - 3

    def _place(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the interval of s, and where in it, from 0 to 1."""
        place = (s + 1) * (self.intervals / 2)
        index = place.floor().clamp(0, self.intervals - 1)
        return index.long(), place - index

    def _pieces(self, b: Tensor) -> Tensor:
        """[K - 3, *, 5] coefficients of Σ b_k R_k on every interval in powers of the place r, for b [K, *]."""
        ends = torch.tensor([[1, -3, 3, -1], [4, 0, -6, 3], [1, 3, 3, -3], [0, 0, 0, 1]]).to(b) / 6
        windows = b.unfold(0, 4, 1)  # [K - 3, *, 4]
        slope = windows @ ends * (2 / self.intervals)
        integral = slope / torch.arange(1, 5).to(b)
        steps = integral.sum(-1).cumsum(0)
        start = torch.cat([torch.zeros_like(steps[:1]), steps[:-1]])
        return torch.cat([start.unsqueeze(-1), integral], -1)

    def combination(self, b: Tensor, dtype: torch.dtype, orders: int = 3) -> Callable[[Tensor], tuple[Tensor, ...]]:
        pieces, h = self._pieces(b.double()).to(dtype).T.contiguous(), 2 / self.intervals

        def combined(s: Tensor) -> tuple[Tensor, ...]:
            index, r = self._place(s)
            p0, p1, p2, p3, p4 = (torch.take(column, index) for column in pieces)
            value = p0 + r * (p1 + r * (p2 + r * (p3 + r * p4)))
            slope = (p1 + r * (2 * p2 + r * (3 * p3 + r * 4 * p4))) / h
            return (value, slope, (2 * p2 + r * (6 * p3 + r * 12 * p4)) / h**2) if orders > 2 else (value, slope)

        return combined

    def derivatives(self, s: Tensor, order: int) -> Tensor:
        index, r = self._place(s)
        if order == 0:
            pieces = self._pieces(torch.eye(self.count, dtype=torch.float64)).to(s)  # [K - 3, K, 5]
            powers = r.unsqueeze(-1) ** torch.arange(5, device=s.device)
            return torch.einsum("...ki,...i->...k", pieces[index], powers)
        weights = _cubic(r) if order == 1 else [w * (self.intervals / 2) for w in _cubic_slope(r)]
        out = s.new_zeros(*s.shape, self.count)
        places = index.unsqueeze(-1) + torch.arange(4, device=s.device)
        return out.scatter_(-1, places, torch.stack(weights, -1))


def _cubic(r: Tensor) -> list[Tensor]:
    """The four cubic B-splines that do not vanish at the place r of an interval."""
    q = 1 - r
    return [q**3 / 6, 2 / 3 - r**2 * (2 - r) / 2, 2 / 3 - q**2 * (2 - q) / 2, r**3 / 6]


def _cubic_slope(r: Tensor) -> list[Tensor]:
    q = 1 - r
    return [-(q**2) / 2, r * (1.5 * r - 2), q * (2 - 1.5 * q), r**2 / 2]


@register(Basis, "sigmoid")
class Sigmoid(Basis):
    """R_k(s) = sigmoid(-(s - c_k)/(extent · spacing)) with centres c_k equally spaced on [-1, 1].

    Fits in it are far worse conditioned than in `b_spline`: neighbours overlap almost wholly.

    Args:
        count: K >= 2.
        extent: width of a sigmoid in spacings of the centres.
    Raises:
        ConfigError: unless count >= 2 and extent > 0.
    Source: Guth et al. 2023 (Conditionally strongly log-concave generative models).
    """

    spans_linear = False

    def __init__(self, count: int = 24, extent: float = 1.0) -> None:
        if count < 2 or not extent > 0:
            raise ConfigError(f"sigmoid: count >= 2 and extent > 0 are needed, found {count} and {extent:g}.")
        self.count, self.extent = count, extent

    def derivatives(self, s: Tensor, order: int) -> Tensor:
        centres = torch.linspace(-1, 1, self.count, dtype=s.dtype, device=s.device)
        width = self.extent * 2 / (self.count - 1)
        value = torch.sigmoid((centres - s.unsqueeze(-1)) / width)
        if order == 0:
            return value
        slope = value * (1 - value)
        return -slope / width if order == 1 else slope * (1 - 2 * value) / width**2
