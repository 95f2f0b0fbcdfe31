"""The bispectrum of periodic fields on equilateral and squeezed triangles of wave numbers."""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ...registry import ConfigError, register
from ...types import NotApplicable
from ..metric import Metric
from .metric import FieldMetric, Fields
from .spectrum import rings
from .summary import Norm, Summary, checked, rms

Triangle = tuple[int, int, int]


def equilateral(height: int, width: int, count: int = 8) -> list[Triangle]:
    """At most `count` triangles (k, k, k) of rings, spaced evenly in log k, that close without wrapping round."""
    return [(k, k, k) for k in _spaced(1, (max(height, width) - 1.5) / 3, count)]


def squeezed(height: int, width: int, count: int = 8) -> list[Triangle]:
    """At most `count` triangles (1, k, k), k >= 2, spaced evenly in log k, that close without wrapping round."""
    return [(1, k, k) for k in _spaced(2, (max(height, width) - 2.5) / 2, count)]


def _spaced(first: int, last: float, count: int) -> list[int]:
    """Whole numbers from `first` to `last`, about evenly spaced in their logarithms."""
    last = math.floor(last)
    if last <= first:
        return [first] * (last == first)
    steps = max(1, count - 1)
    return sorted({round(first * (last / first) ** (i / steps)) for i in range(count)})


def bispectrum(x: Tensor, triangles: list[Triangle]) -> Tensor:
    """[N, T] float64 mean of X(k₁) X(k₂) X(k₃)/(H W) of each field over the modes of rings with k₁ + k₂ + k₃ = 0.

    With x_b the field whose modes outside the ring b are removed, and δ_b the same for a unit impulse, it is
    mean(x₁ x₂ x₃)/(H W mean(δ₁ δ₂ δ₃)): all triads by one inverse FFT a ring. Independent pixels with third cumulant κ
    have B = κ everywhere; x = g + f (g² - σ²) for a normal g of spectrum P has 2f (P₁P₂ + P₂P₃ + P₃P₁) + O(f³).

    Args:
        x: [N, H, W] or [N, 1, H, W], taken as periodic.
        triangles: of rings, see `genmodels.metrics.fields.spectrum.rings`.
    Raises:
        ValueError: if there are no such fields, or a triangle that no triad closes.
    Source: Scoccimarro 2015 (Fast estimators for redshift-space clustering), section II, for the filters.
    """
    x = checked(x, "bispectrum")
    size = tuple(x.shape[1:])
    norms = torch.tensor([_triads(size, t) for t in triangles], dtype=torch.float64, device=x.device)
    modes, ring = torch.fft.fft2(x), rings(*size).to(x.device)
    bands = {b: torch.fft.ifft2(modes * (ring == b)).real for b in {b for t in triangles for b in t}}
    found = [(bands[a] * bands[b] * bands[c]).mean((1, 2)) for a, b, c in triangles]
    return torch.stack(found, 1) / norms if triangles else x.new_zeros(len(x), 0)


@lru_cache(maxsize=512)
def _triads(size: tuple[int, int], triangle: Triangle) -> float:
    """H W mean(δ₁ δ₂ δ₃): the number of triads over (H W)²."""
    ring = rings(*size)
    a, b, c = (torch.fft.ifft2((ring == band).double()).real for band in triangle)
    pixels = math.prod(size)
    found = (pixels * (a * b * c).mean()).item()
    if round(found * pixels**2) < 1:
        raise ValueError(f"bispectrum: no three modes of the rings {triangle} add up to 0 in fields of {list(size)}.")
    return found


@register(Metric, "bispectrum")
class Bispectrum(FieldMetric):
    """Root mean square over triangles of the error of the bispectrum, in standard errors of the reference's.

    Equilateral triangles (k, k, k) tell the skewness of one scale, squeezed ones (1, k, k) how the power of small
    scales follows a large one. The unit is that of the reference's own mean over its m fields, so that a perfect
    sampler of n fields scores about √(1 + m/n); fields without third moments are told from those with them.

    Args:
        reference: the split that drawn fields are compared with.
        triangles: at most so many of either kind, evenly spaced in log k.
    Raises:
        ConfigError: if no triangle is asked for.
        NotApplicable: if the reference's fields all have one bispectrum.
    Source: Scoccimarro 2015 (Fast estimators for redshift-space clustering), section II, for the filters.
    """

    smallest = 8
    units = dict.fromkeys(("bispectrum_equilateral", "bispectrum_squeezed"), "standard errors of the reference")

    def __init__(self, reference: Literal["val", "test"] = "test", triangles: int = 8) -> None:
        super().__init__(reference)
        if triangles < 1:
            raise ConfigError(f"bispectrum: at least 1 triangle of either kind is needed, found {triangles}.")
        self.triangles = triangles

    def prepare(self, fields: Fields) -> None:
        self.kinds = tuple(kind(*fields.size, self.triangles) for kind in (equilateral, squeezed))
        self.detail = ", ".join(
            f"{name} {', '.join(str(t[1]) for t in kind)}"
            for name, kind in zip(("k, k, k:", "1, k, k:"), self.kinds, strict=True)
        )

    def per_item(self, x: Tensor) -> Tensor:
        return bispectrum(x, [t for kind in self.kinds for t in kind])

    def norms(self, reference: Summary) -> dict[str, Norm]:
        if not (reference.stderr > 0).all():
            raise NotApplicable("the bispectrum of the reference's fields has no spread")
        first = len(self.kinds[0])
        parts = slice(first), slice(first, None)
        return {name: rms(reference.stderr[p], p) for name, p in zip(self.units, parts, strict=True)}
