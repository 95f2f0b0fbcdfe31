"""Series of unequal lengths in one batch: padding, parts lost, and scales taken from what was observed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rng import Noise


def stack(series: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, L, C] float32, times [N, L] float64 and mask [N, L, C] of series that are padded to the longest, L.

    Behind its end a series repeats its last time, with the mask False; x is 0 wherever the mask is False.

    Args:
        series: of each item its values [L_i, C], times [L_i] (at least one) and mask [L_i, C].
    """
    n, length, channels = len(series), max(len(times) for _, times, _ in series), series[0][0].shape[1]
    x, times = torch.zeros(n, length, channels), torch.empty(n, length, dtype=torch.float64)
    mask = torch.zeros(n, length, channels, dtype=torch.bool)
    for row, (values, when, seen) in enumerate(series):
        end = len(when)
        x[row, :end] = torch.where(seen, values, 0.0)
        times[row, :end], times[row, end:] = when, when[-1]
        mask[row, :end] = seen
    return x, times, mask


def thinned(mask: Tensor, dropped: float, noise: Noise) -> Tensor:
    """[N, L, C] the mask without a share `dropped` of the steps at which anything was seen; one at least is left."""
    seen = mask.any(2)
    kept = ((1 - dropped) * seen.sum(1)).round().clamp(min=1)
    order = torch.where(seen, noise.uniform(mask.shape[1]), 2.0).argsort(dim=1, stable=True)
    places = order.argsort(dim=1)  # of each step among those of its item
    return mask & (places < kept[:, None])[..., None]


def scales(x: Tensor, mask: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Offset and scale [C] of each channel over its observed values: mean and standard deviation, or least and range.

    A channel that is constant, or never observed, has the scale 1.

    Args:
        x: [N, L, C] values; what stands where the mask is False does not matter.
        kind: "standard" or "minmax".
    """
    x, count = x.double(), mask.sum((0, 1)).clamp(min=1)
    least, most = torch.where(mask, x, torch.inf).amin((0, 1)), torch.where(mask, x, -torch.inf).amax((0, 1))
    offset, scale = least, most - least
    if kind == "standard":
        offset = torch.where(mask, x, 0.0).sum((0, 1)) / count
        scale = (torch.where(mask, x - offset, 0.0).square().sum((0, 1)) / count).sqrt()
    varied = most > least  # the deviation of a constant is a rounding error
    return torch.where(mask.any(1).any(0), offset, 0.0), torch.where(varied, scale, 1.0)


def rescaled(x: Tensor, mask: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """[N, L, C] float32 (x - offset)/scale where the mask is True, 0 elsewhere."""
    return torch.where(mask, (x.double() - offset) / scale, 0.0).float()
