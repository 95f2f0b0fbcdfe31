"""What was observed of irregular series, and what is asked of them: sorted out, checked, and read off in order."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Batch, expand_like


class Series(NamedTuple):
    """The observations of each item in the order in which they are read: points where nothing was seen are gone.

    Args:
        x: [B, L, C] values, 0 where not observed.
        mask: [B, L, C] bool, True where observed; False throughout after the last observation.
        times: [B, L] float64 in the model's unit; after the last observation its time is repeated.
        length: [B] int64 number of observed points.
    """

    x: Tensor
    mask: Tensor
    times: Tensor
    length: Tensor

    @property
    def seen(self) -> Tensor:
        """[B, L] bool, True up to the last observation."""
        return torch.arange(self.times.shape[1], device=self.times.device) < self.length[:, None]

    @property
    def gaps(self) -> Tensor:
        """[B, L] time since the observation read before; 0 at the first."""
        return self.times.diff(dim=1, prepend=self.times[:, :1]).abs()

    def backwards(self) -> "Series":
        """The same observations from the last to the first; times then decrease."""
        order = (self.length[:, None] - 1 - torch.arange(self.times.shape[1], device=self.times.device)).clamp(min=0)
        x, mask, times = (pick(v, order) for v in (self.x, self.mask, self.times))
        return Series(torch.where(self.seen[..., None], x, 0.0), mask & self.seen[..., None], times, self.length)


def pick(values: Tensor, order: Tensor) -> Tensor:
    """[B, K, *] the entries of values [B, L, *] at the places order [B, K] of each row."""
    return values[torch.arange(len(values), device=values.device)[:, None], order]


def observed(batch: Batch, dtype: torch.dtype, where: str) -> Series:
    """What was seen of a batch of series, in the data's unit of time.

    Raises:
        ValueError: if there are no times, if shapes do not fit, or if an item (which is named) has times that decrease
            or are not finite, values that are not finite, or no observation at all.
    """
    x, times = batch.x.to(dtype), _times(batch.times, "times", len(batch), where)
    if times.shape[1] != x.shape[1]:
        raise ValueError(f"{where}: x has {x.shape[1]} points, but times has {times.shape[1]}. Give one time each.")
    mask = _as_mask(batch.mask, x, f"{where}: mask")
    seen = mask.any(2)
    length = seen.sum(1)
    faults = {
        "has times that decrease or are not finite. Sort its points by time": _disordered(times),
        "has an observed value that is NaN or infinite. Mask it": (mask & ~x.isfinite()).flatten(1).any(1),
        "has no observation: its mask is False everywhere. Leave it out": length == 0,
    }
    refuse(faults, where)
    place = torch.arange(x.shape[1], device=x.device)
    order = (~seen).to(torch.uint8).argsort(dim=1, stable=True)
    order = torch.where(place < length[:, None], order, order.gather(1, (length - 1).clamp(min=0)[:, None]))
    order = order[:, : int(length.max()) if len(batch) else 0]
    mask = pick(mask, order) & (place[: order.shape[1]] < length[:, None])[..., None]
    return Series(torch.where(mask, pick(x, order), 0.0), mask, pick(times, order), length)


class Targets(NamedTuple):
    """What is asked of each item.

    Args:
        times: [B, M] float64 in the model's unit, not decreasing.
        values: [B, M, C], 0 where they do not count; None if only times were given.
        mask: [B, M, C] bool, True where a value counts.
    """

    times: Tensor
    values: Tensor | None
    mask: Tensor | None


def targets(batch: Batch, channels: int, dtype: torch.dtype, where: str) -> Targets:
    """The times asked for and the values there, in the data's unit of time.

    Raises:
        ValueError: if there are no target times, if shapes do not fit, or if the times of an item (which is named)
            decrease or are not finite.
    """
    times = _times(batch.target_times, "target_times", len(batch), where)
    refuse({"has target_times that decrease or are not finite. Sort them": _disordered(times)}, where)
    if batch.target is None:
        return Targets(times, None, None)
    if tuple(batch.target.shape) != (*times.shape, channels):
        raise ValueError(
            f"{where}: target has shape {list(batch.target.shape)}, but target_times ask for "
            f"[{', '.join(map(str, (*times.shape, channels)))}]."
        )
    values = batch.target.to(dtype)
    mask = _as_mask(batch.target_mask, values, f"{where}: target_mask")
    return Targets(times, torch.where(mask, values, 0.0), mask)


def _times(times: Tensor | None, name: str, items: int, where: str) -> Tensor:
    if times is None or times.ndim != 2 or len(times) != items:
        found = "none" if times is None else f"shape {list(times.shape)}"
        raise ValueError(
            f"{where}: the batch needs {name} [{items}, points] in the data's unit of time, found {found}."
        )
    return times.double()


def _as_mask(mask: Tensor | None, values: Tensor, name: str) -> Tensor:
    """[B, L, C] bool from [B, L], [B, L, C] or None (everything)."""
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.shape not in (values.shape, values.shape[:2]):
        raise ValueError(f"{name} has shape {list(mask.shape)}, but the values have {list(values.shape)}.")
    return expand_like(mask.bool(), values).expand_as(values)


def _disordered(times: Tensor) -> Tensor:
    return (times.diff(dim=1) < 0).any(1) | ~times.isfinite().all(1)


def refuse(faults: dict[str, Tensor], where: str) -> None:
    """Raises ValueError naming the first item that has a fault; waits for a device once."""
    found = torch.stack(list(faults.values())).cpu()
    for fault, rows in zip(faults, found, strict=True):
        if rows.any():
            item = int(rows.nonzero()[0])
            raise ValueError(f"{where}: item {item} of the batch {fault} ({int(rows.sum())} of {len(rows)} items).")
