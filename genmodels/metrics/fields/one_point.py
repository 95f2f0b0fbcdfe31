"""The law of a single pixel: histograms and Wasserstein distances of values, field by field."""

import math
from typing import Literal

import torch
from torch import Tensor

from ...registry import ConfigError, register
from ..metric import Metric
from .metric import FieldMetric, Fields, scale
from .summary import Norm, Summary, weighted

CELLS = 512  # of the range of the reference, in each of which the distribution functions cross at most once


def counts(places: Tensor, bins: int, weights: Tensor | None = None) -> Tensor:
    """[N, bins] float64 how often each place 0 … bins - 1 occurs in each row of [N, P], or the sum of its weights."""
    rows = bins * torch.arange(len(places), device=places.device)[:, None]
    flat = (places + rows).flatten()
    found = flat.bincount(None if weights is None else weights.flatten(), minlength=len(places) * bins)
    return found.double().reshape(len(places), bins)


def histogram(x: Tensor, edges: Tensor) -> Tensor:
    """[N, B + 2] shares of the values of each row of [N, P] below the first of B + 1 edges, in each bin, and above."""
    return counts(torch.bucketize(x.contiguous(), edges.to(x), right=True), len(edges) + 1) / x.shape[1]


def survivors(x: Tensor, low: float, high: float, cells: int) -> Tensor:
    """[N, cells + 2] areas under the function of survival S(t) = share of each row of [N, P] above t.

    ∫ S over each of equal cells of [low, high], with ∫ (1 - S) below `low` first and ∫ S above `high` last. The sum of
    the absolute differences of two rows is their 1-Wasserstein distance ∫ |S - S'| dt, exact but for cells in which
    S - S' has both signs.
    """
    width = (high - low) / cells
    u = (x - low) / width
    place = u.floor().long().clamp(0, cells - 1)
    within = counts(place, cells, (u - place).clamp(0, 1))
    above = counts(place, cells)
    above = above.flip(1).cumsum(1).flip(1) - above
    ends = torch.stack([(low - x).clamp(min=0).sum(1), (x - high).clamp(min=0).sum(1)], 1)
    return torch.cat([ends[:, :1], (above + within) * width, ends[:, 1:]], 1) / x.shape[1]


@register(Metric, "one_point")
class OnePoint(FieldMetric):
    """Distances between the laws of a single pixel: total variation of histograms, and 1-Wasserstein.

    The total variation is half the sum over bins, and what lies below and above them, of the absolute differences of
    shares. The Wasserstein distance ∫ |F - F_reference| dx is in units of the standard deviation of the reference; for
    fields x + δ of the reference's law it is |δ|/σ.

    Args:
        reference: the split that drawn fields are compared with.
        bins: of the histogram.
        limits: its range, in data units; null for four standard deviations about the mean of the reference.
    Raises:
        ConfigError: unless there are bins, and limits increase.
    """

    units = {"one_point_tv": "1", "one_point_w1": "standard deviations"}  # noqa: RUF012

    def __init__(
        self,
        reference: Literal["val", "test"] = "test",
        bins: int = 60,
        limits: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(reference)
        if bins < 1:
            raise ConfigError(f"one_point: at least 1 bin is needed, found {bins}.")
        if limits is not None and not (limits[0] < limits[1] and all(map(math.isfinite, limits))):
            raise ConfigError(f"one_point: limits must be finite and increase, found {list(limits)}.")
        self.bins, self.limits = bins, limits

    def prepare(self, fields: Fields) -> None:
        self.scale = scale(fields)
        low, high = self.limits or (self.scale.mean - 4 * self.scale.std, self.scale.mean + 4 * self.scale.std)
        self.edges = torch.linspace(low, high, self.bins + 1, dtype=torch.float64)
        self.detail = f"{self.bins} bins on {low:.3g} … {high:.3g}"

    def per_item(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([histogram(x, self.edges), survivors(x, self.scale.low, self.scale.high, CELLS)], 1)

    def norms(self, reference: Summary) -> dict[str, Norm]:
        first = self.bins + 2
        return {
            "one_point_tv": weighted(0.5, slice(first)),
            "one_point_w1": weighted(1 / self.scale.std, slice(first, None)),
        }
