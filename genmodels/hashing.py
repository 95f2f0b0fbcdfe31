"""Digests: of plain data by its canonical JSON, of files by their bytes."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BUDGET = 256 * 2**20  # bytes of contents that a fingerprint of files reads
BLOCK = 2**16  # bytes that it reads in one piece where it cannot read everything


def canonical(tree: Any) -> str:
    """JSON with sorted keys, no spaces and shortest float form: equal trees give equal text."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(tree: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(tree).encode()).hexdigest()[:12]


def sha256(path: Path) -> str:
    """64 hexadecimal digits: the SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_files(paths: Iterable[Path], root: Path | None) -> str:
    """12 hexadecimal digits that change with names, sizes or contents of files, but not with their order.

    Of files that together hold at most 256 MiB every byte is read. Of more, 256 MiB are: from up to 4096 files, evenly
    spaced in the order of their names with the first and the last, equal shares in evenly spaced blocks of 64 KiB that
    hold the first and the last byte. Names and sizes of all files always count; a change between the blocks that keeps
    the size is not seen.

    Args:
        root: folder to which names are relative, so that a copy elsewhere has the same fingerprint; None to let the
            order of the files count instead of their names.
    Raises:
        ValueError: if a file is not below the root.
        OSError: if a file cannot be read.
    """
    files = [("", path) for path in paths] if root is None else sorted((_name(path, root), path) for path in paths)
    sizes = [path.stat().st_size for _, path in files]
    chosen = range(len(files)) if sum(sizes) <= BUDGET else _spread(len(files), BUDGET // BLOCK)
    share = BUDGET if sum(sizes) <= BUDGET else BUDGET // len(chosen)
    contents = [_contents(files[i][1], sizes[i], share) for i in chosen]
    return digest([[name for name, _ in files], sizes, contents])


def _name(path: Path, root: Path) -> str:
    """A path within a folder; it need not be text: its bytes count."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("latin-1")


def _contents(path: Path, size: int, share: int) -> str:
    """SHA-256 of a file, or of the evenly spaced blocks that fit into a share of it."""
    if size <= share:
        return sha256(path)
    found = hashlib.sha256()
    with path.open("rb") as file:
        for start in _spread(size - BLOCK + 1, share // BLOCK):
            file.seek(start)
            found.update(file.read(BLOCK))
    return found.hexdigest()


def _spread(n: int, count: int) -> list[int]:
    """Up to `count` evenly spaced numbers of 0 … n-1 with both ends."""
    if count >= n:
        return list(range(n))
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]
