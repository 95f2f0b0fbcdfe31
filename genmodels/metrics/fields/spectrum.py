"""The power spectrum of periodic fields in rings of wave numbers, and how far two of them are apart."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...registry import ConfigError, register
from ...types import NotApplicable
from ..metric import Metric
from .metric import FieldMetric, Fields
from .summary import Norm, Summary, checked, rms, summarize


def wave_numbers(height: int, width: int) -> Tensor:
    """[H, W] float64 |k| of the modes of `torch.fft.fft2`, in cycles per longer side."""
    longer = max(height, width)
    rows, columns = (longer * torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    return (rows.square()[:, None] + columns.square()).sqrt()


def rings(height: int, width: int) -> Tensor:
    """[H, W] int64 bin of each mode: b holds b - 1/2 <= |k| < b + 1/2."""
    return (wave_numbers(height, width) + 0.5).floor().long()


def power(x: Tensor) -> Tensor:
    """[N, H, W] float64 power |FFT x|²/(H W) of fields [N, H, W]: its mean over modes is the mean of x² over pixels."""
    x = checked(x, "power")
    return torch.fft.fft2(x).abs().square() / math.prod(x.shape[1:])


def radial_spectrum(x: Tensor, largest: int | None = None) -> Tensor:
    """[N, K + 1] float64 mean power of each field in the rings k = 0 … K.

    Args:
        x: [N, H, W] or [N, 1, H, W], taken as periodic.
        largest: K; None for that of Nyquist, half the longer side. Modes beyond it (corners) are left out.
    Raises:
        ValueError: if there are no such fields, or K is beyond the corners.
    """
    found = power(x)
    bins = rings(*found.shape[1:]).flatten().to(found.device)
    largest = max(found.shape[1:]) // 2 if largest is None else largest
    if not 0 <= largest <= int(bins.max()):
        raise ValueError(f"radial_spectrum: these fields have rings 0 … {int(bins.max())}, asked for {largest}.")
    counts = bins.bincount()[: largest + 1]
    inside = bins <= largest
    total = found.new_zeros(len(found), largest + 1)
    return total.index_add_(1, bins[inside], found.flatten(1)[:, inside]) / counts


class SpectrumErrors(NamedTuple):
    """Relative errors P/P_reference - 1 of a radial spectrum.

    Args:
        k: [K] rings, from 1.
        error: [K] float64.
        stderr: [K] standard error that the fields bring.
        noise: [K] standard error that the reference brings.
    """

    k: Tensor
    error: Tensor
    stderr: Tensor
    noise: Tensor

    @property
    def rms(self) -> float:
        """√(mean over rings of the squared error): what the metric `spectrum` reports."""
        return self.error.square().mean().sqrt().item()


def spectrum_errors(x: Tensor, reference: Tensor, largest: int | None = None) -> SpectrumErrors:
    """The relative error of the spectrum of fields [N, H, W] in each ring k >= 1, against fields [M, H, W].

    Args:
        largest: last ring, see `radial_spectrum`.
    """
    found, known = (summarize(radial_spectrum(v, largest)[:, 1:]) for v in (x, reference))
    ratio = found.value / known.value
    k = torch.arange(1, len(ratio) + 1)
    return SpectrumErrors(k, ratio - 1, found.stderr / known.value, known.stderr * ratio / known.value)


@register(Metric, "spectrum")
class Spectrum(FieldMetric):
    """Root mean square over rings of the relative error of the radial power spectrum of fields.

    P(k) is the mean of |FFT x|²/(H W) over modes and fields in the ring |k| in [k - 1/2, k + 1/2), k = 1 … K, in cycles
    per longer side; the value is √(mean over k of (P/P_reference - 1)²). Fields x(1 + δ) of the reference's law score
    (1 + δ)² - 1. The mean, k = 0, is left to `magnetization`.

    Args:
        reference: the split that drawn fields are compared with.
        largest: K; null for Nyquist, half the longer side. Corners beyond it are left out.
    Raises:
        NotApplicable: if the reference has no power in a ring.
    """

    units = {"spectrum": "1"}  # noqa: RUF012

    def __init__(self, reference: Literal["val", "test"] = "test", largest: int | None = None) -> None:
        super().__init__(reference)
        if largest is not None and largest < 1:
            raise ConfigError(f"spectrum: largest must be a ring k >= 1, found {largest}.")
        self.largest = largest

    def prepare(self, fields: Fields) -> None:
        last = int(rings(*fields.size).max())
        if self.largest is not None and self.largest > last:
            raise ConfigError(f"spectrum: fields of {list(fields.size)} have rings up to {last}, found {self.largest}.")
        self.detail = f"k = 1 … {self.largest or max(fields.size) // 2}"

    def per_item(self, x: Tensor) -> Tensor:
        return radial_spectrum(x, self.largest)[:, 1:]

    def norms(self, reference: Summary) -> dict[str, Norm]:
        empty = reference.value <= 0
        if empty.any():
            raise NotApplicable(f"the reference has no power at k = {int(empty.nonzero()[0]) + 1}")
        return {"spectrum": rms(reference.value)}
