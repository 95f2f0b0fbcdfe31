"""Decoded images in one memory-mapped file, with a manifest that says from what it was made."""

import fcntl
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """Images [N, C, H, W] uint8 in a .npy file, read as they are asked for; each process maps the file itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_array": None}  # a pickled map would be a copy of the whole file

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, C, H, W] uint8."""
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "cache.lock"):
            if not _sound(path, facts):
                _write(path, facts, images())
    except OSError as error:
        raise ConfigError(
            f"data.cache: {folder} cannot hold the decoded images ({np.prod(shape, dtype=np.int64) / 1e6:,.1f} MB): "
            f"{error.strerror or error}. Choose another folder, free some space, or leave data.cache out to decode "
            "images whenever they are used."
        ) from error
    return Mapped(path)


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
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for image in _counted(images, shape[0]):
            file.write(image.tobytes())
    text = json.dumps(facts | {"fingerprint": fingerprint_files([path], path.parent)}, indent=1)
    write_text(path.with_suffix(".json"), text)


def _counted(images: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """The images, with a line on a terminal that counts them."""
    for k, image in enumerate(images, 1):
        yield image
        if sys.stderr.isatty() and (k % 100 == 0 or k == total):
            end = "\n" if k == total else ""
            print(f"\rdecoding images {k:,}/{total:,}", end=end, file=sys.stderr, flush=True)
