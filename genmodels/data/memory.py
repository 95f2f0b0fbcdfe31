"""Data sets whose splits are held as items that are indexed like a batch: a batch in memory, or a reader of files."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from ..hashing import canonical
from ..types import Batch, expand_like
from .dataset import SPLITS, Dataset, Split, check_finite


class Items(Protocol):
    """The items of a split; `Batch` is one. x may be uint8: levels are kept in bytes and given as float32."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Batch: ...


class Held(Dataset):
    """A data set that holds the items of every split; subclasses fill it with `hold`."""

    def hold(self, split: Split, items: Items, *, mirrored: bool = False) -> None:
        """Keep the items of a split.

        Args:
            mirrored: the split has twice the items: item N + i is item i of N with its last axis reversed.
        """
        self.__dict__.setdefault("_splits", {})[split] = (items, mirrored)

    def _held(self, split: Split) -> tuple[Items, bool]:
        splits = self.__dict__.get("_splits", {})
        if split not in splits:
            raise ValueError(f"data '{self.registered_name}' has no split '{split}'; it has {', '.join(splits)}.")
        return splits[split]

    def size(self, split: Split) -> int:
        items, mirrored = self._held(split)
        return len(items) * (2 if mirrored else 1)

    def take(self, split: Split, indices: Tensor) -> Batch:
        items, mirrored = self._held(split)
        if not mirrored:
            return _floats(items[indices])
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < 2 * len(items):
            raise IndexError(f"data '{self.registered_name}', split '{split}': items are 0 … {2 * len(items) - 1}.")
        batch = _floats(items[indices % len(items)])
        turned = expand_like(indices >= len(items), batch.x)
        return batch.replace(x=torch.where(turned, batch.x.flip(-1), batch.x))

    def baselines(self) -> dict[str, float]:
        """Bits/dim of levels that are all equally likely: log2 levels."""
        return {} if self.levels is None else {"uniform": math.log2(self.levels)}


class InMemory(Held):
    """A data set of which every split is one batch; subclasses fill it with `hold`."""

    def hold(self, split: Split, items: Batch, *, mirrored: bool = False) -> None:
        """Keep the items of a split, see `Held.hold`.

        Raises:
            ValueError: if x holds NaN or infinity, naming the first such item.
        """
        if items.x.is_floating_point():
            check_finite(self.registered_name, split, items.x)
        super().hold(split, items, mirrored=mirrored)

    def all(self, split: Split) -> Batch:
        """Every item of a split, in order; of data kept in bytes this is a copy in floats.

        Raises:
            ValueError: if there is no such split.
        """
        items, mirrored = self._held(split)
        whole = isinstance(items, Batch) and items.x.is_floating_point() and not mirrored
        return items if whole else self.take(split, torch.arange(self.size(split)))

    def checksum(self) -> str:
        """12 hexadecimal digits that change with the levels, with any number of any split, and with their order.

        A fingerprint for data that are the same on every machine, because they were read and not computed.
        """
        found = hashlib.sha256(canonical([self.levels, self.bin_width]).encode())
        for split in SPLITS:
            for name, part in _tensors(self.all(split)):
                found.update(canonical([name, list(part.shape), str(part.dtype)]).encode())
                found.update(part.contiguous().numpy())
        return found.hexdigest()[:12]


def _floats(batch: Batch) -> Batch:
    return batch if batch.x.is_floating_point() else batch.replace(x=batch.x.float())


def _tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    """Every tensor of a batch with its name."""
    given = {f.name: getattr(batch, f.name) for f in fields(batch)}
    nested = [(k, v if isinstance(v, Mapping) else {"": v}) for k, v in given.items() if v is not None]
    return [(f"{name}.{key}", part) for name, parts in nested for key, part in sorted(parts.items())]
