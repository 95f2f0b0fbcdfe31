"""The batches of downsampled ImageNet: pickled or .npz, in folders or in their zip archives, read one at a time."""

import hashlib
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..registry import ConfigError
from .cifar10 import ByteArrayUnpickler, ForbiddenPickle

HOME = "the download page of ImageNet (image-net.org, 'Download downsampled image data')"
TRAIN = tuple(f"train_data_batch_{k}" for k in range(1, 11))
TEST = "val_data"
BATCHES = (*TRAIN, TEST)
CLASSES = 1000
COUNTS = {**dict.fromkeys(TRAIN, 128_116), TRAIN[-1]: 128_123, TEST: 50_000}  # 1,281,167 training images
SIZES = {3 * side * side: side for side in (8, 16, 32, 64)}  # the published ones, by the width of their rows
LABEL = 2  # bytes that follow the pixels of a row: the class 0 … 999, low byte first
# of the pickled batches of 32x32 pixels
MD5 = {
    "train_data_batch_1": "6c4495e65cd24a8c3019857ef9b758ee",
    "train_data_batch_2": "3dd727de4155836807dfc19f98c9fe70",
    "train_data_batch_3": "03d3dc4e850e23e1d526f268a0196296",
    "train_data_batch_4": "876f7e6d6ddb1f52ecb654ffdc8293f6",
    "train_data_batch_5": "c789bcdd1feed34a9bc58598a1a1bf7d",
    "train_data_batch_6": "8ce5344cb1e11f31bc507cae4c856083",
    "train_data_batch_7": "32ecc8ad6c55b1c9cb6cf79a2cc46094",
    "train_data_batch_8": "bdeb6da3d05771121992b48c59c69439",
    "train_data_batch_9": "58417149b5ce31688f805341e7f57b4f",
    "train_data_batch_10": "46ad60a1144aaf97a143914453b0dabb",
    "val_data": "06c02b8b4c8de8b3a36b07859a49de6f",
}


@dataclass(frozen=True)
class Source:
    """Where a batch lies: a file, or a member of a zip archive."""

    file: Path
    member: str | None = None

    @property
    def name(self) -> str:
        return Path(self.member or self.file.name).name

    @property
    def npz(self) -> bool:
        return self.name.endswith(".npz")

    def __str__(self) -> str:
        return str(self.file) if self.member is None else f"{self.file}: {self.member}"

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        if self.member is None:
            with self.file.open("rb") as file:
                yield file
        else:
            with zipfile.ZipFile(self.file) as archive, archive.open(self.member) as file:
                yield file


def locate(path: Path) -> dict[str, Source]:
    """Where the eleven batches lie, by name: in a folder, its sub-folders, or zip archives in either.

    Files come before members of archives, and pickled batches before .npz.

    Raises:
        ConfigError: if batches are missing, or there twice in one form, or if an archive is damaged.
    """
    if not path.exists():
        raise ConfigError(
            f"data.path: there is no {path}. Get the training and validation images (batches for Python, or npz) from "
            f"{HOME} and name the folder that holds their archives or what is in them; nothing is downloaded."
        )
    files = [path] if path.is_file() else sorted(p for p in (*path.glob("*"), *path.glob("*/*")) if p.is_file())
    members = [source for file in files if file.suffix.lower() == ".zip" for source in _members(file)]
    found: dict[str, Source] = {}
    for form in ([Source(file) for file in files], members):
        for npz in (False, True):
            _add(found, [source for source in form if source.npz == npz])
    missing = [name for name in BATCHES if name not in found]
    if missing:
        holds = ", ".join(sorted({source.name for source in (*map(Source, files), *members)})[:8])
        raise ConfigError(
            f"data.path: {path} lacks {', '.join(missing)} (or .npz of these names); it holds {holds or 'nothing'}. "
            f"Get them from {HOME}: training and validation images are archives of their own."
        )
    return {name: found[name] for name in BATCHES}


def _add(found: dict[str, Source], sources: list[Source]) -> None:
    """Add batches that are not there yet."""
    for name in BATCHES:
        same = [source for source in sources if source.name.removesuffix(".npz") == name]
        if name not in found and len(same) > 1:
            raise ConfigError(
                f"data.path: {name} is there twice, as {same[0]} and as {same[1]}. Name the folder of one of them; "
                "images of different sizes have files of the same names."
            )
        if same:
            found.setdefault(name, same[0])


def _members(archive: Path) -> list[Source]:
    with _told(Source(archive)), zipfile.ZipFile(archive) as found:
        return [Source(archive, name) for name in found.namelist() if not name.endswith("/")]


@contextmanager
def _told(source: Source) -> Iterator[None]:
    """What a damaged file raises, as an error that names it."""
    try:
        yield
    except ConfigError:
        raise
    except ForbiddenPickle as error:
        raise ConfigError(
            f"{source} asks for {error}, which the published file does not. Only arrays of numbers and plain "
            f"containers are read; nothing of it was run. Do not trust this file; get it from {HOME}."
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        if isinstance(error, PermissionError):
            raise ConfigError(f"data.path: {source.file} cannot be read: {error.strerror}.") from error
        size = source.file.stat().st_size
        raise ConfigError(
            f"{source} is cut short or damaged ({size:,} bytes in {source.file.name}; {type(error).__name__}: {error})."
            f" Get it from {HOME} again."
        ) from error


class PickledNumbers:
    """Stands in for the type of a pickled array of numbers."""

    def __init__(self, code: bytes | str, *flags: Any) -> None:
        self.code, self.order = code.decode() if isinstance(code, bytes) else code, "="
        if self.code not in ("u1", "i4", "i8", "f4", "f8"):
            raise ForbiddenPickle(f"an array of the type {self.code!r}")

    def __setstate__(self, state: tuple) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.order = order if order in ("<", ">") else "="


class PickledArray:
    """Stands in for a pickled array, so that a pickle reaches none of numpy's own code; `array` is read from it."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, numbers, column_major, data = state
        kind = np.dtype(numbers.order + numbers.code)
        self.array = np.frombuffer(data, kind).reshape(shape, order="F" if column_major else "C")


def _reconstruct(*arguments: Any) -> PickledArray:
    return PickledArray()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in protocols of Python 2."""
    if encoding not in ("latin1", b"latin1"):
        raise ForbiddenPickle(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


class ArrayUnpickler(ByteArrayUnpickler):
    """Reads arrays of numbers and plain containers; anything else that a pickle asks for is refused by its name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        allowed = super().find_class(module, name)  # refuses
        return {"_reconstruct": _reconstruct, "dtype": PickledNumbers}.get(name, allowed)


def read(source: Source, side: int) -> tuple[np.ndarray, str | None]:
    """The rows [N, 3·side² + 2] uint8 of a batch, pixels [3, side, side] and class; the MD5 of the file if pickled.

    Raises:
        ConfigError: naming the file, if it is damaged, asks for more than arrays, or holds something else.
    """
    with _told(source):
        if source.npz:
            with source.open() as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays:
                return _rows(source, {key: arrays[key] for key in arrays.files if key != "mean"}, side), None
        with source.open() as file:
            content = file.read()
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        found = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        del content  # as large as the batch
        return _rows(source, found, side), md5


def _rows(source: Source, found: Any, side: int) -> np.ndarray:
    if not isinstance(found, dict):
        raise ConfigError(f"{source}: a dictionary with 'data' and 'labels' is needed, found {type(found).__name__}.")
    parts = {k.decode("latin1") if isinstance(k, bytes) else k: getattr(v, "array", v) for k, v in found.items()}
    if not {"data", "labels"} <= parts.keys():
        raise ConfigError(
            f"{source}: 'data' and 'labels' are needed, found {', '.join(map(repr, parts)) or 'nothing'}."
        )
    pixels, width = parts["data"], 3 * side * side
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != width:
        array = isinstance(pixels, np.ndarray)
        shown = f"{pixels.dtype} {list(pixels.shape)}" if array else type(pixels).__name__
        other = SIZES.get(pixels.shape[1]) if array and pixels.ndim == 2 else None
        mend = f" Those are images of {other}x{other} pixels: set data.size={other}." if other in (32, 64) else ""
        raise ConfigError(
            f"{source}: 'data' must be an array of bytes [N, {width}] (3 x {side} x {side}), found {shown}.{mend}"
        )
    rows = np.empty((len(pixels), width + LABEL), np.uint8)
    rows[:, :width] = pixels
    rows[:, width:] = _classes(source, parts["labels"], len(pixels))
    return rows


def _classes(source: Source, labels: Any, count: int) -> np.ndarray:
    """[N, 2] uint8: the labels 1 … 1000 as classes 0 … 999, low byte first."""
    whole = isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" and labels.ndim == 1
    whole = whole or (isinstance(labels, list) and all(type(k) is int for k in labels))
    if not whole or len(labels) != count or (count and not 1 <= min(labels) <= max(labels) <= CLASSES):
        sized = f"{len(labels):,} values" if isinstance(labels, list | np.ndarray) else type(labels).__name__
        others = ", some of them others" if isinstance(labels, list | np.ndarray) and len(labels) == count else ""
        raise ConfigError(
            f"{source}: 'labels' must be {count:,} integers 1 … {CLASSES}, one for each image, found {sized}{others}."
        )
    return (np.asarray(labels, np.int64) - 1).astype("<u2")[:, None].view(np.uint8)
