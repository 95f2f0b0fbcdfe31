"""A folder of pictures as a data set: any files that Pillow reads, brought to one size and split by their names."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..hashing import digest, fingerprint_files
from ..registry import ConfigError, register
from ..transforms import Transform
from ..types import Batch, Shape
from .dataset import SPLITS, Dataset, centred, proposal
from .decoding import SUFFIXES, Decoder, Filter, Resize, inspect
from .folders import assign, check_shares, check_train, find
from .image_cache import Mapped, cached
from .memory import Held

LEVELS = 256
CHECKED = 20_000  # files whose headers are read at the start


@register(Dataset, "image_folder")
class ImageFolder(Held):
    """The images of a folder and its sub-folders, as [channels, size, size] with the levels 0 … 255.

    Files are found by their suffix (.png, .jpg, .jpeg, .webp, .gif, .bmp, .tif, .tiff, .ppm and relatives, in either
    case; hidden files are left out), turned as their EXIF orientation says, and brought to 8 bits: palettes and other
    colour spaces are converted, 16-bit levels divided by 257, transparent pixels laid over the background; colour
    profiles are ignored, and of an animation the first frame is taken.

    The split follows a hash of each file's path within the folder. With fractions, adding or removing files moves no
    other file to another split, except that a fraction above 0 gives at least one image. With counts, each file that is
    added may move at most one other. Inside a split the order follows the hash too, so that any first n items are a
    random subset.

    Headers are read at the start (of 20,000 evenly spaced files, if there are more), and PNG and JPEG files that lack
    their end are found then; other damage when a file is decoded. Without a cache, images are decoded whenever they
    are used. The proposed transform adds uniform dequantisation noise and maps [0, 256) to [-1, 1); for classification
    it maps [0, 255] to [-1, 1] without noise.

    Args:
        path: the folder; ~ is the home folder.
        size: side of the square items in pixels; null keeps the files' size, which must then be the same for all.
        channels: 1 for grey, 3 for colour.
        resize: "crop" scales the short side to the size and takes the centre, "pad" scales the long side and fills up
            with the background, "squash" ignores the aspect ratio, "none" refuses images of another size.
        filter: of the scaling.
        upscale: allow images that are smaller than the size.
        background: grey level 0 … 255 behind transparent pixels and beside padded images.
        flip: give every training image mirrored as well.
        labels: give the first sub-folder of each file as its class, classes in the order of their names.
        task: "generate" gives labels as condition, "classify" as target (and needs no `labels`).
        val, test: how many images (an integer) or which fraction of them.
        cache: folder for the decoded images of this path and these options: one file, made at the first use and read
            by memory map after that; null to decode every time.
        transform: instead of the proposed one.
    Raises:
        ConfigError: if the folder or its images cannot be used, naming the file and the way out.
    """

    local = ("path", "cache")
    bin_width = 1.0
    levels = LEVELS

    def __init__(
        self,
        path: str,
        size: int | None = None,
        channels: Literal[1, 3] = 3,
        resize: Resize = "crop",
        filter: Filter = "lanczos",
        upscale: bool = False,
        background: int = 255,
        flip: bool = False,
        labels: bool = False,
        task: Literal["generate", "classify"] = "generate",
        val: int | float = 0.05,
        test: int | float = 0.05,
        cache: str | None = None,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        _check(size, background, val, test)
        classify = task == "classify"
        if not path.strip():
            raise ConfigError("data.path: the folder of images must be named, found an empty text.")
        self.folder = Path(os.path.expanduser(path))
        self.names = find(self.folder, SUFFIXES, "images")
        self.decoder = Decoder(size, channels, resize, filter, upscale, background)
        paths = [self.folder / name for name in self.names]
        width, height = _common_size(paths, self.decoder)
        self.shape = (channels, height, width)
        self.transform = proposal(transform, centred(LEVELS, noise=not classify))
        self.classes, numbers = _classes(self.folder, self.names) if labels or classify else ((), None)
        self.num_classes = len(self.classes) if labels and not classify else None
        self.target_shape = (len(self.classes),) if classify else None
        split = assign(self.names, val, test)
        check_train(self.folder, len(self.names), split["train"], val, test, "image")
        self._options = {"labels": labels or classify, "task": task, "val": val, "test": test, "flip": flip}
        read = Decoded(self.decoder, paths, self.shape)
        if cache is not None:
            read = self._cached(Path(os.path.expanduser(cache)), read)
        for name in SPLITS:
            rows = torch.tensor(split[name], dtype=torch.int64)
            self.hold(name, Pictures(read, rows, numbers, classify), mirrored=flip and name == "train")

    def _cached(self, folder: Path, decoded: "Decoded") -> Mapped:
        import PIL

        source = {"files": self._contents_of_files, "decoder": vars(self.decoder), "pillow": PIL.__version__}
        return cached(folder, source, (len(self.names), *self.shape), decoded.all)

    @cached_property
    def _contents_of_files(self) -> str:
        return fingerprint_files([self.folder / name for name in self.names], self.folder)

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the files (`hashing.fingerprint_files`) and of the options that decide the items."""
        return digest({"files": self._contents_of_files, "decoder": vars(self.decoder), "options": self._options})


@dataclass(frozen=True)
class Pictures:
    """Items of a split: rows of what `read` gives, with the label of each."""

    read: Callable[[Tensor], Tensor]
    rows: Tensor
    labels: Tensor | None
    classify: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Batch:
        chosen = self.rows[rows]
        labels = None if self.labels is None else self.labels[chosen]
        return Batch(self.read(chosen), **{"target" if self.classify else "condition": labels})


@dataclass(frozen=True)
class Decoded:
    """Images that are decoded whenever they are asked for, [B, *shape] uint8."""

    decoder: Decoder
    paths: Sequence[Path]
    shape: Shape

    def __call__(self, rows: Tensor) -> Tensor:
        out = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        for row, image in zip(out, self.each([self.paths[i] for i in rows.tolist()]), strict=True):
            row.copy_(torch.from_numpy(image.copy()))
        return out

    def all(self) -> Iterator[np.ndarray]:
        """Every image in order, a few at a time in memory."""
        for start in range(0, len(self.paths), 256):
            yield from self.each(self.paths[start : start + 256])

    def each(self, paths: Sequence[Path]) -> Iterator[np.ndarray]:
        for path, image in zip(paths, self.decoder.many(paths), strict=True):
            if image.shape != self.shape:
                raise _mixed(self.paths[0], self.shape[:0:-1], path, image.shape[:0:-1])
            yield image


def _check(size: int | None, background: int, val: int | float, test: int | float) -> None:
    if size is not None and size < 1:
        raise ConfigError(f"data.size: must be at least 1, or null to keep the files' size, found {size}.")
    if not 0 <= background <= 255:
        raise ConfigError(f"data.background: a grey level 0 … 255 is needed, found {background}.")
    check_shares(val, test, "images")


def _common_size(paths: Sequence[Path], decoder: Decoder) -> tuple[int, int]:
    """Width and height of the items, after a look at the headers.

    Raises:
        ConfigError: naming files that are no images, are cut short, or do not fit the options or the other files.
    """
    chosen = paths[:: -(-len(paths) // CHECKED)]
    sound: dict[Path, tuple[int, int]] = {}
    problems: dict[Path, ConfigError] = {}
    for path in chosen:
        try:
            found = inspect(path)
            decoder.check_size(path, found)
            first, size = next(iter(sound.items()), (path, found))
            if decoder.size is None and found != size:
                raise _mixed(first, size, path, found)
            sound[path] = found
        except ConfigError as error:
            problems[path] = error
    if problems:
        (_, error), *more = problems.items()
        names = ", ".join(path.name for path, _ in more[:3]) + (", …" if len(more) > 3 else "")
        rest = f" {len(more):,} more of {len(chosen):,} files cannot be used: {names}." if more else ""
        raise ConfigError(f"{error}{rest}")
    return next(iter(sound.values())) if decoder.size is None else (decoder.size, decoder.size)


def _mixed(one: Path, size: Sequence[int], other: Path, other_size: Sequence[int]) -> ConfigError:
    return ConfigError(
        f"{one} is {size[0]} x {size[1]} pixels and {other} is {other_size[0]} x {other_size[1]}, but items need one "
        f"size. Set data.size, for example to {min(*size, *other_size)} (data.resize says how images are brought to "
        "it), or resize the files."
    )


def _classes(folder: Path, names: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """The names of the classes, and the number [N] int64 of each file's."""
    loose = next((name for name in names if "/" not in name), None)
    if loose is not None:
        raise ConfigError(
            f"data.labels: {folder / loose} lies in no sub-folder, so that it has no class. Move the images of each "
            "class into a folder named after it, or set data.labels=false."
        )
    of = [name.split("/")[0] for name in names]
    classes = tuple(sorted(set(of)))
    number = {name: k for k, name in enumerate(classes)}
    return classes, torch.tensor([number[name] for name in of])
