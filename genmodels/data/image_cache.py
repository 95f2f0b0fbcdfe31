"""Decoded images in one memory-mapped file, with a manifest that says from what it was made."""

import fcntl
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files import new_file, write_text
from ..hashing import digest, fingerprint_files
from ..registry import ConfigError

VERSION = 1  # of the manifest, and of what decoding means


class CacheWarning(UserWarning):
    """A cache file is damaged and is made again."""


class Mapped:
    """Images [N, C, H, W] or rows [N, W] uint8 in a .npy file, read as asked for; each process maps the file itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_array": None}  # a pickled map would be a copy of the whole file

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, C, H, W] (or [B, W]) uint8."""
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return torch.from_numpy(self._array[rows.numpy()])


def cached(
    folder: Path,
    source: dict[str, Any],
    shape: tuple[int, ...],
    images: Callable[[], Iterable[np.ndarray]],
) -> Mapped:
    """The cache of some images, made unless the folder holds a sound one.

    The files are `<key>.npy` and `<key>.json` with the key a digest of the source; `cache.lock` lets one of several
    processes make them. Each appears whole or not at all, the manifest last.

    Args:
        source: plain data that decides every pixel (checksums of the files, options).
        shape: [N, C, H, W].
        images: the arrays [C, H, W] uint8 in order.
    Raises:
        ConfigError: if the folder cannot be written, or the disk is full.
    """
    facts = {"version": VERSION, "source": source, "shape": list(shape)}
    path = folder / f"{digest(facts)}.npy"
    what = f"the decoded images ({np.prod(shape, dtype=np.int64) / 1e6:,.1f} MB)"
    with _kept_in(folder, what, "to decode images whenever they are used"):
        if not _sound(path, facts):
            _write(path, facts, images())
    return Mapped(path)


def cached_rows(
    folder: Path,
    source: dict[str, Any],
    width: int,
    blocks: Callable[[dict[str, Any]], Iterator[np.ndarray]],
) -> tuple[Mapped, dict[str, Any]]:
    """The cache of rows whose number is known only when all were made, and the notes that their maker took.

    Files and locks are those of `cached`; the notes lie in the manifest.

    Args:
        source: plain data that decides every row.
        blocks: the rows [n, width] uint8, block by block; it may put plain data into the notes that it is given.
    Raises:
        ConfigError: if the folder cannot be written, or the disk is full; or from `blocks`.
    """
    facts = {"version": VERSION, "source": source, "width": width}
    path = folder / f"{digest(facts)}.npy"
    with _kept_in(folder, "the items", "to keep them in memory"):
        if not _sound(path, facts):
            path.with_suffix(".json").unlink(missing_ok=True)
            notes: dict[str, Any] = {}
            with new_file(path) as file:
                start, total = _head(file, (10**12, width)), 0
                for block in blocks(notes):
                    file.write(np.ascontiguousarray(block).data)
                    total += len(block)
                file.seek(0)
                end = _head(file, (total, width))
                assert end == start  # numpy pads headers, so that rows may be added later
            _sign(path, facts | {"notes": notes})
        notes = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["notes"]
    return Mapped(path), notes


@contextmanager
def _kept_in(folder: Path, what: str, without: str) -> Iterator[None]:
    """The folder, made and locked; what goes wrong with it as an error that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "cache.lock"):
            yield
    except OSError as error:
        raise ConfigError(
            f"data.cache: {folder} cannot hold {what}: {error.strerror or error}. Choose another "
            f"folder, free some space, or leave data.cache out {without}."
        ) from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sound(path: Path, facts: dict[str, Any]) -> bool:
    """Whether the file and its manifest are there and agree; a warning if they are there and do not."""
    manifest = path.with_suffix(".json")
    if not manifest.is_file():
        return False
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        same = found["fingerprint"] == fingerprint_files([path], path.parent)
        sound = same and {key: found[key] for key in facts} == facts
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        warnings.warn(f"{path} does not agree with its manifest; it is made again.", CacheWarning, stacklevel=4)
    return sound


def _write(path: Path, facts: dict[str, Any], images: Iterable[np.ndarray]) -> None:
    shape = tuple(facts["shape"])

    path.with_suffix(".json").unlink(missing_ok=True)
    with new_file(path) as file:
        _head(file, shape)
        for image in _counted(images, shape[0]):
            file.write(image.tobytes())
    _sign(path, facts)


def _head(file: BinaryIO, shape: tuple[int, ...]) -> int:
    """Write the head of a .npy file of bytes; where it ends."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _sign(path: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a file that is complete."""
    text = json.dumps(facts | {"fingerprint": fingerprint_files([path], path.parent)}, indent=1)
    write_text(path.with_suffix(".json"), text)


def _counted(images: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """The images, with a line on a terminal that counts them."""
    for k, image in enumerate(images, 1):
        yield image
        if sys.stderr.isatty() and (k % 100 == 0 or k == total):
            end = "\n" if k == total else ""
            print(f"\rdecoding images {k:,}/{total:,}", end=end, file=sys.stderr, flush=True)
