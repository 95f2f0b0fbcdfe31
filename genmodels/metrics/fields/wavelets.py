"""Laws of wavelet coefficients: their ℓ¹ norms, skewness, kurtosis and marginals, band by band."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...registry import register
from ...types import NotApplicable
from ...wavelet.filter_bank import Packets
from ..metric import Metric
from .metric import FieldMetric, Fields, scale
from .moments import of_powers, powers
from .one_point import survivors
from .summary import Norm, Summary, checked, rms, summarize, weighted

WAVELET = "db4"
COARSEST = 4  # sides at which low-pass fields are not split any more
CELLS = 64  # of a band's range, for its marginal
EMPTY = 1e-6  # standard deviation of a band that is 0 but for rounding in float32, in those of pixels


class Band(NamedTuple):
    """A band of the wavelet transform: octave 1 is the finest; direction "low-high" is low along rows (axis 0)."""

    octave: int
    direction: str


def octaves(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes of the fields that are split: halved as long as both sides are even and above 4."""
    found = []
    while min(height, width) > COARSEST and height % 2 == width % 2 == 0:
        found.append((height, width))
        height, width = height // 2, width // 2
    return found


@lru_cache(maxsize=32)
def _packets(size: tuple[int, int], wavelet: str) -> Packets:
    return Packets(size, wavelet)


def bands(x: Tensor, wavelet: str = WAVELET) -> dict[Band, Tensor]:
    """The details [N, h, w] float64 of every octave of fields [N, H, W] down to 4 x 4 or an odd side, finest first.

    The transform is orthogonal and periodic, one octave after the other; the last low-pass field is left out.
    """
    x, found = checked(x, "bands"), {}
    for octave, size in enumerate(octaves(*x.shape[1:]), 1):
        c = _packets(size, wavelet).to(x.device)(x)
        h, w = size[0] // 2, size[1] // 2
        found[Band(octave, "low-high")] = c[:, :h, w:]
        found[Band(octave, "high-low")] = c[:, h:, :w]
        found[Band(octave, "high-high")] = c[:, h:, w:]
        x = c[:, :h, :w]
    return found


def band_statistics(x: Tensor, wavelet: str = WAVELET) -> dict[Band, Summary]:
    """E|x̄|, E x̄², E x̄⁴, skewness and excess kurtosis of each band of fields [N, H, W]."""
    found = {}
    for band, c in bands(x, wavelet).items():
        items = torch.cat([c.abs().mean((1, 2))[:, None], powers(c)], 1)
        found[band] = summarize(items, lambda m: torch.cat([m[:1], of_powers(m[1:])]))
    return found


@register(Metric, "wavelet_bands")
class WaveletBands(FieldMetric):
    """Errors of the laws of wavelet coefficients: ℓ¹ norm, skewness, kurtosis and marginal of every band.

    Bands are three an octave of the periodic Daubechies transform with eight taps, from the finest until the low-pass
    field is 4 x 4 (or has an odd side). Root mean squares over bands of the relative error of E|x̄| and of the
    differences of skewness and excess kurtosis, and the mean over bands of the 1-Wasserstein distance of the
    coefficients in units of the standard deviation that the band has in the reference. Fields x(1 + δ) of the
    reference's law score |δ| in the first, 0 in the two next, and |δ| E|x̄|/σ in the last.

    Args:
        reference: the split that drawn fields are compared with.
    Raises:
        NotApplicable: if the fields cannot be split, or a band of the reference is 0.
    """

    smallest = 8
    units = {  # noqa: RUF012
        "wavelet_l1": "1",
        "wavelet_skewness": "1",
        "wavelet_kurtosis": "1",
        "wavelet_w1": "standard deviations",
    }

    def prepare(self, fields: Fields) -> None:
        if not octaves(*fields.size):
            raise NotApplicable(f"fields of {list(fields.size)} cannot be halved: sides must be even")
        whole = scale(fields).std
        low, high, square = [], [], []
        for x in fields:
            flat = [c.flatten(1) for c in bands(x).values()]
            low.append(torch.stack([c.min() for c in flat]))
            high.append(torch.stack([c.max() for c in flat]))
            square.append(torch.stack([c.square().mean(1).sum() for c in flat]))
        self.low, self.high = torch.stack(low).amin(0).tolist(), torch.stack(high).amax(0).tolist()
        self.std = (torch.stack(square).sum(0) / len(fields.rows)).sqrt().cpu()
        flat = next((b for b, std in zip(bands(x), self.std.tolist(), strict=True) if std <= EMPTY * whole), None)
        if flat is not None:
            raise NotApplicable(f"the {flat.direction} band of octave {flat.octave} of the reference is 0")
        self.curved, self.detail = 7 * len(self.low), f"{len(self.low)} bands"

    def per_item(self, x: Tensor) -> Tensor:
        flat = [c.flatten(1) for c in bands(x).values()]
        numbers = [torch.cat([c.abs().mean(1)[:, None], powers(c[:, None])], 1) for c in flat]
        areas = [survivors(c, *limits, CELLS) for c, *limits in zip(flat, self.low, self.high, strict=True)]
        return torch.cat(numbers + areas, 1)

    def of_means(self, means: Tensor) -> Tensor:
        """[3B] ℓ¹ norms of the bands, then skewness of each, then kurtosis."""
        numbers = means.reshape(-1, 7)
        shapes = [of_powers(m[1:])[2:] for m in numbers]
        return torch.cat([numbers[:, 0], torch.stack(shapes, 1).flatten()])

    def norms(self, reference: Summary) -> dict[str, Norm]:
        n = len(self.low)
        weights = (1 / (n * self.std)).repeat_interleave(CELLS + 2)
        found = [
            rms(reference.value[:n], slice(n)),
            rms(1.0, slice(n, 2 * n)),
            rms(1.0, slice(2 * n, 3 * n)),
            weighted(weights, slice(3 * n, None)),
        ]
        return dict(zip(self.units, found, strict=True))
