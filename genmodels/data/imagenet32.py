"""ImageNet at 32x32 or 64x64 pixels from the files that were published, in memory or from a memory-mapped cache."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..hashing import digest, fingerprint_files
from ..registry import ConfigError, register
from ..transforms import Transform
from ..types import Batch, Shape
from .cifar10 import AlteredData, Checksum
from .dataset import Dataset, centred, proposal
from .downsampled import BATCHES, CLASSES, COUNTS, HOME, LABEL, MD5, TEST, Source, locate, read
from .image_cache import cached_rows
from .memory import Held


@register(Dataset, "imagenet32")
class ImageNet32(Held):
    """The 1,281,167 training and 50,000 validation images of ImageNet-1k, downsampled to 32x32 or 64x64 pixels.

    The published files are train_data_batch_1 … train_data_batch_10 and val_data, each a pickled dictionary or an .npz
    of data [N, 3·size²] (bytes, channel by channel, row by row) and labels 1 … 1000. They are read as they are or
    inside of their zip archives; pickles by an unpickler that admits arrays of numbers and plain containers.

    Splits: the validation images are "test"; of the training images the last `val` (in the order of the files) are
    "val" and the others "train". Class k is the published label k + 1, numbered as in the file map_clsloc.txt of the
    data set's authors, which is not the alphabetical order of WordNet's names that other versions of ImageNet have.

    Batches are read one at a time. Without a cache all images are kept in memory in bytes: 4.1 GB, 16.4 GB at 64x64,
    in every process. With a cache they are written to one file at the first use, which all processes map. The proposed
    transform adds uniform dequantisation noise and maps [0, 256) to [-1, 1); for classification it maps [0, 255] to
    [-1, 1] without noise.

    Args:
        path: folder that holds the batches, folders of them, or their zip archives; ~ is the home folder.
        size: 32 or 64, that of the files.
        task: "generate" gives labels as condition, "classify" as target.
        labels: give the labels as condition.
        flip: give every training image mirrored as well.
        val: how many training images are held out.
        cache: folder for the file of all images; null to keep them in memory.
        checksum: what to do if files are not the published ones: "error", "warn", or "ignore". Pickled batches of
            32x32 pixels are known by their MD5, others by their numbers of images.
        transform: instead of the proposed one.
    Raises:
        ConfigError: if files are missing, there twice, cut short, altered, or hold anything else.
    Source: Chrabaszcz et al. 2017 (A downsampled variant of ImageNet).
    """

    local = ("path", "cache")
    bin_width = 1.0
    levels = 256

    def __init__(
        self,
        path: str,
        size: Literal[32, 64] = 32,
        task: Literal["generate", "classify"] = "generate",
        labels: bool = True,
        flip: bool = False,
        val: int = 10_000,
        cache: str | None = None,
        checksum: Checksum = "error",
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        classify = task == "classify"
        self.shape = (3, size, size)
        self.num_classes = CLASSES if labels and not classify else None
        self.target_shape = (CLASSES,) if classify else None
        self.transform = proposal(transform, centred(self.levels, noise=not classify))
        sources = locate(Path(os.path.expanduser(path)))
        get, notes = _opened(sources, size, None if cache is None else Path(os.path.expanduser(cache)))
        if checksum != "ignore":
            _compare(path, size, notes, checksum)
        counts = notes["counts"]
        total = sum(counts[name] for name in BATCHES if name != TEST)
        if not 0 <= val < total:
            raise ConfigError(f"data.val: 0 … {total - 1:,} of the {total:,} training images, found {val:,}.")
        given = "target" if classify else "condition" if labels else None
        first = total - val
        for split, start, stop in (("train", 0, first), ("val", first, total), ("test", total, total + counts[TEST])):
            items = Pictures(get, start, stop, self.shape, given)
            self.hold(split, items, mirrored=flip and split == "train")
        sizes = [total, counts[TEST]]
        self._digest = digest({"contents": notes["sha256"], "sizes": sizes, "options": [size, task, labels, flip, val]})

    def fingerprint(self) -> str:
        """12 hexadecimal digits of pixels, labels and every argument that decides the items, in whatever files."""
        return self._digest


class Blocks:
    """Blocks of rows [n, W] as one array, of which copies of the rows asked for are given."""

    def __init__(self, blocks: list[np.ndarray]) -> None:
        self.blocks, self.ends = blocks, np.cumsum([len(block) for block in blocks])

    def __call__(self, rows: Tensor) -> Tensor:
        wanted = rows.numpy()
        out = np.empty((len(wanted), self.blocks[0].shape[1]), np.uint8)
        of = np.searchsorted(self.ends, wanted, side="right")
        for k in np.unique(of):
            mine = of == k
            out[mine] = self.blocks[k][wanted[mine] - (self.ends[k] - len(self.blocks[k]))]
        return torch.from_numpy(out)


@dataclass(frozen=True)
class Pictures:
    """Items of a split: the rows start … stop - 1 of what `read` gives, pixels and class."""

    read: Callable[[Tensor], Tensor]
    start: int
    stop: int
    shape: Shape
    given: str | None

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, rows: Tensor) -> Batch:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"data 'imagenet32': items are 0 … {len(self) - 1}.")
        found = self.read(self.start + rows)
        low, high = found[:, -LABEL:].long().unbind(1)
        images = found[:, :-LABEL].reshape(-1, *self.shape)
        return Batch(images) if self.given is None else Batch(images, **{self.given: low + 256 * high})


def _opened(sources: dict[str, Source], size: int, cache: Path | None) -> tuple[Callable, dict[str, Any]]:
    """What reads rows, and notes of the files: counts and MD5 by batch, the SHA-256 of all rows."""
    blocks = partial(_read_all, sources, size)
    if cache is None:
        notes: dict[str, Any] = {}
        return Blocks(list(blocks(notes))), notes
    files = sorted({source.file for source in sources.values()})
    facts = {"files": fingerprint_files(files, None), "batches": [source.name for source in sources.values()]}
    return cached_rows(cache, facts | {"size": size}, 3 * size**2 + LABEL, blocks)


def _read_all(sources: dict[str, Source], size: int, notes: dict[str, Any]) -> Iterator[np.ndarray]:
    found = hashlib.sha256()
    notes |= {"counts": {}, "md5": {}}
    for name, source in sources.items():
        rows, notes["md5"][name] = read(source, size)
        notes["counts"][name] = len(rows)
        found.update(rows.data)
        yield rows
    notes["sha256"] = found.hexdigest()


def _compare(path: str, size: int, notes: dict[str, Any], checksum: Checksum) -> None:
    """An error or a warning if readable files are not the published ones."""

    def published(name: str) -> bool:
        known = size == 32 and notes["md5"][name] is not None
        return notes["md5"][name] == MD5[name] if known else notes["counts"][name] == COUNTS[name]

    altered = [name for name in BATCHES if not published(name)]
    if not altered:
        return
    message = (
        f"data.path: {path}: {', '.join(altered)} can be read, but {'is' if len(altered) == 1 else 'are'} altered: the "
        f"MD5, or the number of images, is not that of the published file, so that results are not comparable. Get the "
        f"files from {HOME}"
    )
    if checksum == "error":
        raise ConfigError(f"{message}, or accept what is there with data.checksum=warn.")
    warnings.warn(f"{message}.", AlteredData, stacklevel=4)
