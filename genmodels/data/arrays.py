"""Large arrays that stay on disk: items are read when they are asked for."""

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..hashing import digest, fingerprint_files
from ..registry import ConfigError, register
from ..rng import generator
from ..transforms import Transform
from ..types import Batch, expand_like
from .array_files import find, open_npy, shown
from .dataset import Dataset, Split, proposal
from .partition import check_levels, held_out, off_levels, proposal_for

OPEN = 64  # maps kept open: each holds a file descriptor, of which a process may often have 1024


class Shards:
    """.npy files of equal item shape as one array [N, *shape], of which only the rows asked for are read.

    A copy sent to another process carries the names of the files and opens them there.

    Attributes:
        paths: the files, in their order.
        shape: of one item.
        dtype: of the stored numbers.
    Args:
        paths: at least one.
    Raises:
        ConfigError: if a file cannot be read, or holds items of another shape or type than the first.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.maps = paths, OrderedDict()
        arrays = map(open_npy, paths)
        first = next(arrays)
        self.shape, self.dtype = first.shape[1:], first.dtype
        sizes = [len(first)]
        for path, array in zip(paths[1:], arrays, strict=True):
            if array.shape[1:] != self.shape or array.dtype != self.dtype:
                hint = " Name a file of labels as data.labels." if () in (self.shape, array.shape[1:]) else ""
                raise ConfigError(
                    f"{path} holds items {shown(array.shape[1:])} {array.dtype}, but {paths[0]} holds items "
                    f"{shown(self.shape)} {self.dtype}. All files of a folder must agree in shape and type.{hint}"
                )
            sizes.append(len(array))
        self.ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "maps": OrderedDict()}  # a pickled map would be the whole file

    def read(self, rows: np.ndarray) -> np.ndarray:
        """[B, *shape]: the rows [B], any order and with repeats; each is read once, in the order of the file."""
        unique, places = np.unique(rows, return_inverse=True)
        out = np.empty((len(unique), *self.shape), self.dtype)
        start, stop = 0, 0
        while stop < len(unique):
            shard = bisect_right(self.ends, unique[stop])
            start, stop = stop, int(np.searchsorted(unique, self.ends[shard]))
            first = self.ends[shard - 1] if shard else 0
            out[start:stop] = self._map(shard)[unique[start:stop] - first]
        return out[places]

    def where(self, row: int) -> str:
        """The file and the row in it of a row of all."""
        shard = bisect_right(self.ends, row)
        return f"{self.paths[shard]}, row {row - (self.ends[shard - 1] if shard else 0)}"

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self.maps:
            if len(self.maps) == OPEN:
                self.maps.popitem(last=False)
            self.maps[shard] = open_npy(self.paths[shard])
        self.maps.move_to_end(shard)
        return self.maps[shard]


def spaced(n: int, count: int) -> np.ndarray:
    """[count] int64: evenly spaced numbers of 0 … n-1, the middles of `count` equal parts."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * n // max(1, 2 * count)


def skip(indices: np.ndarray, before: np.ndarray) -> np.ndarray:
    """[B] the rows at indices [B] into the rows that are left when some are taken out: i + #{k: before_k <= i}.

    Args:
        before: how many of the rows left lie before the k-th row taken out, increasing.
    """
    return indices + np.searchsorted(before, indices, side="right")


def _held(n: int, n_val: int, n_test: int, order: str) -> dict[str, np.ndarray]:
    """The rows of the validation and of the test split."""
    if order == "file":
        return {"val": np.arange(n - n_val - n_test, n - n_test), "test": np.arange(n - n_test, n)}
    test = spaced(n, n_test)
    val = skip(spaced(n - n_test, n_val), test - np.arange(n_test))
    return {"val": _mixed(val, "val"), "test": _mixed(test, "test")}


def _mixed(rows: np.ndarray, split: str) -> np.ndarray:
    return rows[torch.randperm(len(rows), generator=generator("array", split)).numpy()]


def shards_of(path: Path, without: Path | None) -> list[Path]:
    """The file, or the .npy files of the folder in the order of their names, numbers by size (x2 before x10).

    Args:
        without: a file of the folder that is something else.
    Raises:
        ConfigError: if there is none.
    """
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() == ".npy" and p.resolve() != without]
        if not found:
            raise ConfigError(f"data.path: the folder {path} holds no .npy file of items.")
        return sorted(found, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"([0-9]+)", p.name)])
    if path.suffix.lower() != ".npy":
        raise ConfigError(
            f"data.path: {path} is no .npy file and no folder of .npy files, which is what can be read in parts. Write "
            "it with numpy.save(path, x); `data: table` reads tables of other kinds."
        )
    return [path]


@register(Dataset, "array")
class Array(Dataset):
    """Items of any shape from a .npy file [N, *shape], or from a folder of such files, read from disk when asked for.

    Numbers may be whole or real; items are given as float32. Discrete data (`levels`) propose dequantisation,
    continuous data standardisation, which reads the training items once. NaN, infinity and values beside the levels are
    looked for in the items that are taken, not in the whole file. The fingerprint rests on `fingerprint_files`.

    Args:
        path: file or folder; the files of a folder follow each other in the order of their names, x2 before x10.
        labels: .npy file of N whole numbers 0 … classes-1.
        classes: number of classes; null for the largest label + 1.
        task: whether labels are the condition ("generate") or the target ("classify").
        levels: number of levels 0, bin_width, … of discrete data; null for 256 of uint8, 2 of bool, else continuous.
        bin_width: spacing of the levels.
        val, test: share of the items, or number of items if at least 1.
        order: "spaced" takes evenly spaced items for testing, then evenly spaced ones of the rest for validation, and
            mixes either, so that the first n are a random subset; "file" takes the last items for testing and those
            before them for validation.
        channels_last: images are stored [H, W, C]; they are given as [C, H, W].
        flip: add the mirror image of every training image, as training items N … 2N-1; images [C, H, W] only.
        transform: instead of the proposed one.
    Raises:
        ConfigError: if a file cannot be read or does not fit the others, naming both; from `take`, if an item holds
            NaN, infinity or a value that is none of the levels, naming file and row.
    """

    local = ("path", "labels")

    def __init__(
        self,
        path: str,
        labels: str | None = None,
        classes: int | None = None,
        task: Literal["generate", "classify"] = "generate",
        levels: int | None = None,
        bin_width: float = 1.0,
        val: float = 0.1,
        test: float = 0.1,
        order: Literal["spaced", "file"] = "spaced",
        channels_last: bool = False,
        flip: bool = False,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        label_file = None if labels is None else find(labels, "data.labels")
        self.shards = Shards(shards_of(find(path, "data.path"), label_file and label_file.resolve()))
        self.channels_last, self.flip = channels_last, flip
        self.shape = self._item_shape()
        self.levels = {"uint8": 256, "bool": 2}.get(str(self.shards.dtype)) if levels is None else levels
        check_levels(self.levels, bin_width, "data 'array'")
        self.bin_width = None if self.levels is None else bin_width
        n_val, n_test = held_out(len(self.shards), val, test, "data 'array'")
        self.order, self.held = order, _held(len(self.shards), n_val, n_test, order)
        taken = np.sort(np.concatenate((self.held["val"], self.held["test"])))
        self.before = taken - np.arange(len(taken))  # how many training rows lie before each row held out
        self.sizes = {"train": len(self.shards) - len(taken), "val": n_val, "test": n_test}
        self.labels, self.label_file, self.task = self._labels(label_file, classes), label_file, task
        count = None if self.labels is None else classes or int(self.labels.max()) + 1
        self.num_classes = count if task == "generate" else None
        self.target_shape = (count,) if count and task == "classify" else None
        self.transform = proposal(transform, proposal_for(self.levels, bin_width))

    def size(self, split: Split) -> int:
        return self.sizes[split] * (2 if self.flip and split == "train" else 1)

    def take(self, split: Split, indices: Tensor) -> Batch:
        size = self.size(split)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise IndexError(f"data 'array', split '{split}': indices must lie in 0 … {size - 1}, found {indices}.")
        rows = self.rows(split, indices.numpy() % max(1, self.sizes[split]))
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, and is told
            x = torch.from_numpy(self.shards.read(rows).astype(np.float32))
        x = rearrange(x, "b h w c -> b c h w").contiguous() if self.channels_last else x
        self._check(x, rows)
        x = torch.where(expand_like(indices >= self.sizes[split], x), x.flip(-1), x) if self.flip else x
        if self.labels is None:
            return Batch(x)
        labels = torch.from_numpy(self.labels[rows])
        return Batch(x, condition=labels) if self.task == "generate" else Batch(x, target=labels)

    def rows(self, split: Split, indices: np.ndarray) -> np.ndarray:
        """[B] rows of the file (of all files together) of items of a split, without mirror images."""
        return skip(indices, self.before) if split == "train" else self.held[split][indices]

    def fingerprint(self) -> str:
        labels = None if self.label_file is None else fingerprint_files([self.label_file], None)
        facts = [fingerprint_files(self.shards.paths, None), labels, self.levels, self.bin_width, self.num_classes]
        return digest([*facts, self.order, self.sizes, self.channels_last, self.flip])

    def _item_shape(self) -> tuple[int, ...]:
        shape = self.shards.shape
        if not shape:
            raise ConfigError(
                f"{self.shards.paths[0]} has shape {shown((len(self.shards),))}; [N, *shape] is needed. For one number "
                "an item, save x.reshape(-1, 1)."
            )
        if (self.flip or self.channels_last) and len(shape) != 3:
            key = "flip" if self.flip else "channels_last"
            raise ConfigError(
                f"data.{key}: images [C, H, W] are needed, but the items of {self.shards.paths[0]} have shape "
                f"{shown(shape)}."
            )
        return (shape[2], *shape[:2]) if self.channels_last else shape

    def _labels(self, path: Path | None, classes: int | None) -> np.ndarray | None:
        """[N] int64 labels of all rows."""
        if classes is not None and (path is None or classes < 1):
            raise ConfigError(f"data.classes: a number of classes (at least 1) goes with data.labels, found {classes}.")
        if path is None:
            return None
        found, n = open_npy(path), len(self.shards)
        if found.shape != (n,):
            raise ConfigError(f"{path} has shape {shown(found.shape)}, but there are {n:,} items: [{n}] is needed.")
        if found.dtype.kind not in "iu":
            raise ConfigError(f"{path} holds {found.dtype}, but labels are whole numbers: save y.astype('int64').")
        labels = np.array(found, dtype=np.int64)
        bad = (labels < 0) | (labels >= (classes or np.inf))
        if bad.any():
            row, range_ = int(bad.argmax()), f"0 … {classes - 1}" if classes else "0 or more"
            raise ConfigError(
                f"{path}, row {row} holds the label {labels[row]}; labels must be {range_} ({int(bad.sum()):,} of "
                f"{n:,} are not). Renumber them from 0."
            )
        return labels

    def _check(self, x: Tensor, rows: np.ndarray) -> None:
        """Raises ConfigError if an item holds NaN, infinity, or a value that is none of the levels."""
        bad = ~x.flatten(1).isfinite().all(1)
        what, mend = "NaN or infinity (as float32)", "Remove or mask such items."
        if not bad.any() and self.levels is not None:
            bad = off_levels(x, self.levels, self.bin_width)
            what = f"a value that is none of the {self.levels} levels k·{self.bin_width:g}, k = 0 … {self.levels - 1}"
            mend = "Correct data.levels and data.bin_width, or leave both out for continuous data."
        if bad.any():
            row = int(rows[bad.numpy()].min())
            raise ConfigError(f"{self.shards.where(row)} holds {what}. {mend}")
