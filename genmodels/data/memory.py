"""Data sets that fit into memory whole."""

from torch import Tensor

from ..types import Batch
from .dataset import Dataset, Split, check_finite


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
