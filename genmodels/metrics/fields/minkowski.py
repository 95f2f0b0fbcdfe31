"""Shapes of excursion sets {x >= threshold} of periodic fields: area, boundary, Euler characteristic; and peaks."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...registry import ConfigError, register
from ..metric import Metric
from .metric import FieldMetric, Fields, scale
from .one_point import counts
from .summary import Norm, Summary, checked, rms

KINDS = ("minkowski_area", "minkowski_length", "minkowski_euler", "peak_counts")


class Minkowski(NamedTuple):
    """Minkowski functionals per pixel, [..., T] at each threshold.

    Args:
        area: V₀, the share of pixels at or above it.
        length: V₁, a quarter of the length of the boundary.
        euler: V₂, the Euler characteristic: components less holes.
    """

    area: Tensor
    length: Tensor
    euler: Tensor


def minkowski(x: Tensor, thresholds: Tensor) -> Minkowski:
    """[N, T] float64 functionals of the excursion sets of each field, counted on squares of 2 x 2 pixels.

    The length follows from Crofton's formula: π/4 of the pairs of neighbours, along rows and columns, of which one is
    in the set and the other out of it, which has the right mean for isotropic fields where the perimeter of pixels
    would be 4/π too long. The Euler characteristic is (squares with one pixel in the set - squares with three)/4: the
    mean of what sets have whose pixels touch by sides, and by corners too, so that the complement has its negative.

    Args:
        x: [N, H, W] or [N, 1, H, W], taken as periodic.
        thresholds: [T], increasing.
    Source: Mantz, Jacobs & Mecke 2008 (Utilizing Minkowski functionals for image analysis), section 3.
    """
    x = checked(x, "minkowski")
    thresholds = thresholds.to(x)
    right, down = x.roll(-1, 2), x.roll(-1, 1)
    row = torch.minimum(x, right), torch.maximum(x, right)
    column = torch.minimum(x, down), torch.maximum(x, down)
    square = torch.minimum(row[0], row[0].roll(-1, 1)), torch.maximum(row[1], row[1].roll(-1, 1))
    all_in = [exceeding(part[0].flatten(1), thresholds) for part in (row, column, square)]
    any_in = [exceeding(part[1].flatten(1), thresholds) for part in (row, column, square)]
    area = exceeding(x.flatten(1), thresholds)
    crossings = any_in[0] - all_in[0] + any_in[1] - all_in[1]
    by_sides = area - all_in[0] - all_in[1] + all_in[2]  # vertices, edges and faces of the lattice of pixels' centres
    by_corners = area - any_in[0] - any_in[1] + any_in[2]  # faces, edges and corners of closed pixels
    pixels = math.prod(x.shape[1:])
    return Minkowski(area / pixels, math.pi / 16 * crossings / pixels, (by_sides + by_corners) / 2 / pixels)


def exceeding(x: Tensor, thresholds: Tensor) -> Tensor:
    """[N, T] float64 how many values of each row of [N, P] are at or above each of increasing thresholds."""
    places = torch.bucketize(x.contiguous(), thresholds, right=True)
    return counts(places, len(thresholds) + 1).flip(1).cumsum(1).flip(1)[:, 1:]


def gaussian_minkowski(heights: Tensor, slope: float) -> Minkowski:
    """The mean functionals of a smooth isotropic normal field, per unit of area, at heights ν in standard deviations.

    V₀ = erfc(ν/√2)/2, V₁ = √τ e^(-ν²/2)/8, V₂ = τ ν e^(-ν²/2)/(2π)^(3/2) with τ = E|∇x|²/(2 Var x).

    Args:
        slope: √τ, in inverse units of length.
    Source: Schmalzing & Górski 1998 (Minkowski functionals used in the morphological analysis of cosmic microwave
        background anisotropy maps), section 2.
    """
    bell = torch.exp(-heights.square() / 2)
    area = torch.erfc(heights / math.sqrt(2)) / 2
    return Minkowski(area, slope * bell / 8, slope**2 * heights * bell / (2 * math.pi) ** 1.5)


def peaks(x: Tensor, thresholds: Tensor) -> Tensor:
    """[N, T + 1] float64 peaks per pixel of each field of [N, H, W] by height: below, between and above the thresholds.

    A peak is a pixel above all eight neighbours.
    """
    x = checked(x, "peaks")
    row = torch.maximum(x.roll(1, 2), x.roll(-1, 2))
    around = torch.maximum(x, row)
    around = torch.maximum(row, torch.maximum(around.roll(1, 1), around.roll(-1, 1)))
    places = torch.bucketize(x.contiguous(), thresholds.to(x), right=True).where(x > around, len(thresholds) + 1)
    return counts(places.flatten(1), len(thresholds) + 2)[:, :-1] / math.prod(x.shape[1:])


@register(Metric, "minkowski")
class MinkowskiFunctionals(FieldMetric):
    """Errors of the Minkowski functionals of excursion sets, and of the numbers of peaks by height.

    Each is the root mean square over thresholds of the difference, over the largest absolute value that the functional
    of the reference has at any of them: a share, whatever the units and the size of the fields. Thresholds are evenly
    spaced about the mean of the reference; peaks (pixels above their eight neighbours) are counted between them.

    Args:
        reference: the split that drawn fields are compared with.
        thresholds: how many.
        extent: how far they reach, in standard deviations of the reference.
    Raises:
        ConfigError: unless there are two thresholds or more and the extent is positive.
    Source: Mantz, Jacobs & Mecke 2008 (Utilizing Minkowski functionals for image analysis), section 3.
    """

    units = dict.fromkeys(KINDS, "1")

    def __init__(self, reference: Literal["val", "test"] = "test", thresholds: int = 25, extent: float = 3.0) -> None:
        super().__init__(reference)
        if thresholds < 2 or not (extent > 0 and math.isfinite(extent)):
            raise ConfigError(
                f"minkowski: 2 thresholds or more and a positive extent are needed, found {thresholds} and {extent}."
            )
        self.thresholds, self.extent = thresholds, extent

    def prepare(self, fields: Fields) -> None:
        found = scale(fields)
        heights = torch.linspace(-self.extent, self.extent, self.thresholds, dtype=torch.float64)
        self.values = found.mean + found.std * heights
        self.detail = f"{self.thresholds} thresholds within {self.extent:g} standard deviations"

    def per_item(self, x: Tensor) -> Tensor:
        return torch.cat([*minkowski(x, self.values), peaks(x, self.values)], 1)

    def norms(self, reference: Summary) -> dict[str, Norm]:
        sizes = [self.thresholds] * 3 + [self.thresholds + 1]
        parts = torch.arange(sum(sizes)).split(sizes)
        largest = [reference.value[part].abs().max() for part in parts]
        return {k: rms(top, part) for k, part, top in zip(KINDS, parts, largest, strict=True) if top > 0}
