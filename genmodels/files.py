"""Files and folders that appear whole or not at all, at whatever moment a process ends."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it takes the place of the old one in one step when the block ends well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new one, never a part."""
    with new_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of an old one when the block ends well.

    What killed processes left of other folders beside it is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent)
    temporary = path.with_name(f".writing-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def tidy(root: Path) -> None:
    """Remove what a killed process left of `new_folder`."""
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
