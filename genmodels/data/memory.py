"""Data sets that fit into memory whole."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields

from torch import Tensor

from ..hashing import canonical
from ..types import Batch
from .dataset import SPLITS, Dataset, Split, check_finite


class InMemory(Dataset):
    """A data set of which every split is one batch; subclasses fill it with `hold`."""

    def hold(self, split: Split, items: Batch) -> None:
        """Keep the items of a split.

        Raises:
            ValueError: if x holds NaN or infinity, naming the first such item.
        """
        check_finite(self.registered_name, split, items.x)
        self.__dict__.setdefault("_splits", {})[split] = items

    def all(self, split: Split) -> Batch:
        """Every item of a split, in order.

        Raises:
            ValueError: if there is no such split.
        """
        splits = self.__dict__.get("_splits", {})
        if split not in splits:
            raise ValueError(f"data '{self.registered_name}' has no split '{split}'; it has {', '.join(splits)}.")
        return splits[split]

    def size(self, split: Split) -> int:
        return len(self.all(split))

    def take(self, split: Split, indices: Tensor) -> Batch:
        return self.all(split)[indices]

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


def _tensors(batch: Batch) -> list[tuple[str, Tensor]]:
    """Every tensor of a batch with its name."""
    given = {f.name: getattr(batch, f.name) for f in fields(batch)}
    nested = [(k, v if isinstance(v, Mapping) else {"": v}) for k, v in given.items() if v is not None]
    return [(f"{name}.{key}", part) for name, parts in nested for key, part in sorted(parts.items())]
