"""MNIST, EMNIST and other images in the IDX files of MNIST, which users bring."""

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..hashing import digest
from ..registry import ConfigError, register
from ..transforms import Transform
from ..types import Batch
from .dataset import SPLITS, Dataset, centred, proposal
from .memory import InMemory

LEVELS = 256
HALF = 128  # the middle of the levels: images are binarised there
WHAT = {3: "images", 1: "labels"}  # an IDX file by its number of axes
MAGIC = {axes: 0x0800 + axes for axes in WHAT}  # unsigned bytes, and how many axes
GZIP = b"\x1f\x8b"


class Edition(NamedTuple):
    """How the files of one data set are named, and which labels they hold.

    Args:
        prefix: before train-images-idx3-ubyte and its like.
        classes: how many.
        first: the lowest label.
    """

    prefix: str
    classes: int
    first: int = 0

    @property
    def home(self) -> str:
        if self.prefix:
            return "the EMNIST page of NIST (the archive of the binary format, 'gzip')"
        return "the MNIST page of its authors (LeCun, Cortes and Burges)"


Files = Literal[
    "mnist", "emnist-balanced", "emnist-byclass", "emnist-bymerge", "emnist-digits", "emnist-letters", "emnist-mnist"
]
EDITIONS: dict[str, Edition] = {
    "mnist": Edition("", 10),
    "emnist-balanced": Edition("emnist-balanced-", 47),
    "emnist-byclass": Edition("emnist-byclass-", 62),
    "emnist-bymerge": Edition("emnist-bymerge-", 47),
    "emnist-digits": Edition("emnist-digits-", 10),
    "emnist-letters": Edition("emnist-letters-", 26, 1),
    "emnist-mnist": Edition("emnist-mnist-", 10),
}


@register(Dataset, "mnist")
class MNIST(InMemory):
    """Grey images from IDX files: 70,000 handwritten digits of 28x28 pixels (MNIST), letters and digits (EMNIST).

    A folder holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte,
    for EMNIST emnist-letters-train-images-idx3-ubyte … emnist-letters-test-labels-idx1-ubyte; each plain or as .gz.
    Other data in files of MNIST's names and ten classes (Fashion-MNIST, KMNIST) and of any size of image are read too.
    EMNIST's files hold images column by column, which are turned upright; its letters are the classes 0 … 25.

    Splits: of the training images the last `val` (in the order of the file) are "val" and the others "train"; the test
    images are "test". Levels are kept in bytes.

    In black and white a pixel is 1 where its level is at least 128 of 255, and 0 elsewhere: always the same image, so
    that likelihoods of runs compare. Papers on autoencoders mostly draw each pixel anew at each use, with the
    probability level/255; their log-likelihoods are of other, noisier images.

    The proposed transform adds uniform dequantisation noise and maps [0, 256), or [0, 2), to [-1, 1); for
    classification it maps [0, 255], or [0, 1], to [-1, 1] without noise. Models of two levels (`vae`, `nade`, `made`)
    take images in black and white as they are.

    Args:
        path: the folder; ~ is the home folder.
        files: which of the data sets, by the names of its files.
        binarize: black and white.
        task: "generate" gives labels as condition, "classify" as target.
        labels: give the labels as condition.
        val: how many training images are held out.
        transform: instead of the proposed one.
    Raises:
        ConfigError: if files are missing, cut short, not of this format, or do not fit each other.
    Source: LeCun et al. 1998 (Gradient-based learning applied to document recognition), section 3; Cohen et al. 2017
        (EMNIST), section 2.
    """

    local = ("path",)
    bin_width = 1.0

    def __init__(
        self,
        path: str,
        files: Files = "mnist",
        binarize: bool = False,
        task: Literal["generate", "classify"] = "generate",
        labels: bool = True,
        val: int = 10_000,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        classify, edition = task == "classify", EDITIONS[files]
        self.levels = 2 if binarize else LEVELS
        self.num_classes = edition.classes if labels and not classify else None
        self.target_shape = (edition.classes,) if classify else None
        self.transform = proposal(transform, centred(self.levels, noise=not classify))
        places = locate(Path(os.path.expanduser(path)), edition)
        contents = {key: contents_of(place, edition.home) for key, place in places.items()}
        x, y, x_test, y_test = (parse(places[key], contents[key], axes, edition.home) for key, axes in KEYS.items())
        for name, images, classes in (("train", x, y), ("test", x_test, y_test)):
            _check_pair(places[f"{name} images"], images, places[f"{name} labels"], classes, edition)
        if x.shape[1:] != x_test.shape[1:]:
            raise ConfigError(
                f"{places['train images']} holds images of {_size(x)} pixels and {places['test images']} of "
                f"{_size(x_test)}: they are of different data sets. Get both from {edition.home} again."
            )
        if not 0 <= val < len(x):
            raise ConfigError(f"data.val: 0 … {len(x) - 1:,} of the {len(x):,} training images, found {val:,}.")
        first = len(x) - val
        parts = {"train": (x[:first], y[:first]), "val": (x[first:], y[first:]), "test": (x_test, y_test)}
        for split in SPLITS:
            images, classes = parts[split]
            images = (images.mT if edition.prefix else images)[:, None]
            images = (images >= HALF).to(torch.uint8) if binarize else images.contiguous()
            classes = classes.long() - edition.first
            given = {"target": classes} if classify else {"condition": classes} if labels else {}
            self.hold(split, Batch(images, **given))
        self.shape = tuple(images.shape[1:])
        sums = {key: hashlib.sha256(content).hexdigest() for key, content in contents.items()}
        self._digest = digest({"files": sums, "options": [files, binarize, task, labels, val]})

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the files' (unpacked) contents and of every argument that decides the items."""
        return self._digest


KEYS = {"train images": 3, "train labels": 1, "test images": 3, "test labels": 1}  # with their numbers of axes


def locate(folder: Path, edition: Edition) -> dict[str, Path]:
    """The four files, plain or compressed.

    Raises:
        ConfigError: naming the files that are missing, and what the folder holds instead.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(
            f"data.path: a folder with the four files of images and labels is needed, but {folder} {found}. Get them "
            f"from {edition.home} and name their folder; nothing is downloaded."
        )
    places, missing = {}, []
    for key, axes in KEYS.items():
        split, what = key.split()
        split = "t10k" if split == "test" and not edition.prefix else split
        name = f"{edition.prefix}{split}-{what}-idx{axes}-ubyte"
        place = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if place is None:
            missing.append(name)
        else:
            places[key] = place
    if missing:
        holds = sorted(p.name for p in folder.iterdir())
        names = (", ".join(holds[:8]) or "nothing") + (", …" if len(holds) > 8 else "")
        other = next((n for n, e in EDITIONS.items() if e != edition and any(_starts(h, e) for h in holds)), None)
        hint = "" if other is None else f" Those are read with data.files={other}."
        raise ConfigError(
            f"data.path: {folder} lacks {', '.join(missing)} (plain or .gz); it holds {names}.{hint} Get them from "
            f"{edition.home}."
        )
    return places


def _starts(name: str, edition: Edition) -> bool:
    return name.startswith(f"{edition.prefix}train-images-idx3-ubyte")


def contents_of(place: Path, home: str) -> bytes:
    """The bytes of a file, unpacked if they are compressed, whatever its name says.

    Raises:
        ConfigError: if it cannot be read or unpacked.
    """
    try:
        content = place.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP) else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{place} is cut short or damaged ({len(content):,} bytes; {error}). Get it from {home} again."
        ) from error
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror}.") from error


def parse(place: Path, content: bytes, axes: int, home: str) -> Tensor:
    """[N, H, W] or [N] uint8 of an IDX file: magic number, sizes (big-endian, four bytes each), bytes.

    Raises:
        ConfigError: naming the file, if it has another magic number, or fewer or more bytes than it says.
    """
    head, sizes = 4 + 4 * axes, []
    magic = int.from_bytes(content[:4], "big")
    if len(content) >= 4 and magic != MAGIC[axes]:
        other = next((f", which stands for {WHAT[n]}" for n, number in MAGIC.items() if number == magic), "")
        raise ConfigError(
            f"{place} is no IDX file of {WHAT[axes]}: it starts with the number {magic} (0x{magic:08x}){other}, "
            f"where {MAGIC[axes]} (0x{MAGIC[axes]:08x}) is needed. Get it from {home}."
        )
    if len(content) >= head:
        sizes = [int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(axes)]
    stated, needed = f"{' x '.join(map(str, sizes))} {WHAT[axes]}", head + math.prod(sizes) * bool(sizes)
    if len(content) != needed:
        says = f"it says that it holds {stated}" if sizes else "its header is not whole"
        state = "is cut short" if len(content) < needed else "has bytes behind its end"
        raise ConfigError(
            f"{place} {state}: {says}, which takes {needed:,} bytes, but there are {len(content):,} (unpacked). Get it "
            f"from {home} again."
        )
    if needed == head:
        raise ConfigError(f"{place} holds nothing: it says that it holds {stated}. Get it from {home}.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=head).reshape(sizes)


def _size(images: Tensor) -> str:
    return "x".join(map(str, images.shape[1:]))


def _check_pair(images_at: Path, images: Tensor, labels_at: Path, labels: Tensor, edition: Edition) -> None:
    """Raises ConfigError if there are not as many labels as images, or other labels than the data set has."""
    if len(images) != len(labels):
        raise ConfigError(
            f"{images_at} holds {len(images):,} images, but {labels_at} {len(labels):,} labels: they are not of one "
            f"data set. Get both from {edition.home} again."
        )
    last = edition.first + edition.classes - 1
    wrong = (labels < edition.first) | (labels > last)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ConfigError(
            f"{labels_at}: label {place} is {int(labels[place])}, where {edition.first} … {last} are expected. Set "
            "data.files to the data set that these files are of."
        )
