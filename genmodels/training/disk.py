"""What a disk refuses, told with the mend: folders that may not be written, and want of space."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..registry import ConfigError
from .checkpoint import CheckpointError
from .console import count

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
LISTED = 3  # neighbours that are named


class DiskFull(CheckpointError):
    """A write failed for want of space; what was saved before is untouched."""


@contextmanager
def writing(problem: str, mend: str) -> Iterator[None]:
    """Raises ConfigError with the problem and its mend where the block is not allowed to write."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise ConfigError(f"{problem}: {error.strerror}. {mend}") from None


def full(error: OSError, run: Path, saved: str) -> DiskFull:
    """The error to tell when a write into a run failed for want of space.

    Args:
        saved: a sentence on what the run has saved.
    """
    root = next(folder for folder in run.resolve().parents if folder.is_dir())
    others = [(_bytes(folder), folder.name) for folder in root.iterdir() if folder.is_dir() and folder.name != run.name]
    listed = ", ".join(f"{name} ({count(size)}B)" for size, name in sorted(others, reverse=True)[:LISTED])
    also = f" The largest beside this run in {root}: {listed}." if listed else ""
    return DiskFull(
        f"{run}: {error.strerror or error} (writing {error.filename or 'a file'}; "
        f"{count(shutil.disk_usage(root).free)}B free there, this run holds {count(_bytes(run))}B). {saved} "
        f"Free some space, or start again with a lower train.keep, which removes older checkpoints first.{also} "
        "The same command goes on from there."
    )


def _bytes(folder: Path) -> int:
    """What the files below a folder take."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
