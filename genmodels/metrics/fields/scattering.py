"""Scattering coefficients of periodic fields: means of moduli of Morlet wavelets, and of moduli of these."""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...registry import ConfigError, register
from ...types import NotApplicable
from ..metric import Metric
from .metric import FieldMetric, Fields
from .summary import Norm, Summary, checked

ORIENTATIONS = 4
WIDTH, FREQUENCY = 0.8, 3 * math.pi / 4  # of the finest wavelet: standard deviation in pixels, radians per pixel
ALIASES = range(-2, 3)  # periods of the spectrum that reach into the first one


class Scattering(NamedTuple):
    """Scattering coefficients, [N, K] float64 each.

    Args:
        first: mean of |x * ψ_{j,θ}|, j (0 the finest) the slower index and θ the faster one.
        second: mean of ||x * ψ_{j,θ}| * ψ_{j',θ'}| for j' > j.
    """

    first: Tensor
    second: Tensor


def scales(height: int, width: int) -> int:
    """Octaves of fields of that size: the coarsest wavelet oscillates about three times along the shorter side."""
    return max(0, int(math.log2(min(height, width))) - 1)


@lru_cache(maxsize=32)
def morlet(height: int, width: int, scale: int, orientations: int = ORIENTATIONS) -> Tensor:
    """[L, H, W] float64 transforms of periodic Morlet wavelets of one scale, at angles πl/L.

    ψ̂(ω) = g(ω - ξ) - c g(ω), a bump g of height 1 with widths 1/(σ 2^j) along ξ and L/4 of that across, |ξ| = 3π/4/2^j,
    c such that the mean of ψ is 0; summed over the aliases of the grid.

    Source: Bruna & Mallat 2013 (Invariant scattering convolution networks), section 2.1.
    """
    axes = [2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width)]
    found = []
    for turn in range(orientations):
        angle = math.pi * turn / orientations
        direction = math.sin(angle), math.cos(angle)
        peak, base = (
            sum(
                _bump(axes[0] + 2 * math.pi * p, axes[1] + 2 * math.pi * q, direction, centre, scale, orientations)
                for p in ALIASES
                for q in ALIASES
            )
            for centre in (FREQUENCY / 2**scale, 0.0)
        )
        found.append(peak - peak[0, 0] / base[0, 0] * base)
    return torch.stack(found)


def _bump(
    rows: Tensor, columns: Tensor, direction: tuple[float, float], centre: float, scale: int, orientations: int
) -> Tensor:
    along = rows[:, None] * direction[0] + columns * direction[1] - centre
    across = (columns * direction[0] - rows[:, None] * direction[1]) * orientations / 4
    return torch.exp(-((WIDTH * 2**scale) ** 2) / 2 * (along.square() + across.square()))


def scattering(x: Tensor, octaves: int | None = None) -> Scattering:
    """Means of first and second order of fields [N, H, W], four orientations.

    A wavelet of scale j >= 2 and its modulus live on a grid 2^(j-1) times as coarse, that holds 99 % of it or more: the
    frequencies beyond are cut off.

    Args:
        octaves: how many scales; None for `scales`.
    Source: Mallat 2012 (Group invariant scattering), section 2; Bruna & Mallat 2013 (Invariant scattering convolution
        networks), section 2.2.
    """
    x = checked(x, "scattering")
    size = tuple(x.shape[1:])
    octaves = scales(*size) if octaves is None else octaves
    modes = torch.fft.fft2(x)[:, None]  # [N, 1, H, W]; then [N, paths, h, w]
    first, second = [], []
    for j in range(octaves):
        moduli = _moduli(modes, size, j)
        first.append(moduli.mean((2, 3)))
        inner = torch.fft.fft2(moduli)
        second += [_moduli(inner, size, k).mean((2, 3)) for k in range(j + 1, octaves)]
    none = [x.new_zeros(len(x), 0)]
    return Scattering(torch.cat(first or none, 1), torch.cat(second or none, 1))


def _moduli(modes: Tensor, size: tuple[int, int], scale: int) -> Tensor:
    """[N, P L, h, w] |u * ψ| of P fields by their modes [N, P, ., .], for every orientation."""
    coarse = tuple(min(n, 2 * math.ceil(n / 2**scale)) for n in size)
    filters = _cut(morlet(*size, scale).to(modes.device), coarse)
    kept = _cut(modes, coarse) * (math.prod(coarse) / math.prod(modes.shape[2:]))
    return torch.fft.ifft2(kept[:, :, None] * filters).abs().flatten(1, 2)


def _cut(modes: Tensor, size: tuple[int, int]) -> Tensor:
    """The modes of lowest frequency of [..., H, W], as many as a grid of that size has."""
    for axis, n in zip((-2, -1), size, strict=True):
        if n < modes.shape[axis]:
            places = torch.arange(n, device=modes.device)
            places = torch.where(places < (n + 1) // 2, places, places + modes.shape[axis] - n)
            modes = modes.index_select(axis, places)
    return modes


@register(Metric, "scattering")
class ScatteringDistance(FieldMetric):
    """Relative distance of the mean scattering coefficients of first and of second order.

    |S - S_reference|/|S_reference| with Euclidean norms over scales and four orientations. The first order has the ℓ¹
    norms of wavelet coefficients at every scale, the second how their envelopes vary at coarser ones. Fields x(1 + δ)
    of the reference's law score |δ| in both.

    Args:
        reference: the split that drawn fields are compared with.
        octaves: scales of the wavelets; null for all but the coarsest that fields of that size have.
    Raises:
        ConfigError: unless there are two octaves or more, and no more than fit.
        NotApplicable: if the coefficients of the reference are 0.
    Source: Mallat 2012 (Group invariant scattering), section 2; Bruna & Mallat 2013 (Invariant scattering convolution
        networks), section 2.2.
    """

    smallest = 8
    units = {"scattering_first": "1", "scattering_second": "1"}  # noqa: RUF012

    def __init__(self, reference: Literal["val", "test"] = "test", octaves: int | None = None) -> None:
        super().__init__(reference)
        if octaves is not None and octaves < 2:
            raise ConfigError(f"scattering: the second order needs 2 octaves or more, found {octaves}.")
        self.octaves = octaves

    def prepare(self, fields: Fields) -> None:
        most = scales(*fields.size)
        self.used = self.octaves or most
        if self.used > most:
            raise ConfigError(f"scattering: fields of {list(fields.size)} have {most} octaves, found {self.used}.")
        self.detail = f"{self.used} octaves, {ORIENTATIONS} orientations"

    def per_item(self, x: Tensor) -> Tensor:
        return torch.cat(scattering(x, self.used), 1)

    def norms(self, reference: Summary) -> dict[str, Norm]:
        first = self.used * ORIENTATIONS
        found = {}
        for name, part in zip(self.units, (slice(first), slice(first, None)), strict=True):
            whole = torch.linalg.vector_norm(reference.value[part])
            if not whole > 0:
                raise NotApplicable("the reference has no scattering coefficients")
            found[name] = lambda d, part=part, whole=whole: torch.linalg.vector_norm(d[..., part], dim=-1) / whole
        return found
