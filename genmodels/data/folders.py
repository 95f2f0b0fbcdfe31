"""Files of a folder as items: how they are found, and how they are split by their names."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..registry import ConfigError
from ..schema import near
from .dataset import Split


def find(folder: Path, suffixes: tuple[str, ...], things: str) -> list[str]:
    """The files in a folder and its sub-folders that end so, links followed: paths within it with /, sorted.

    Args:
        suffixes: in lower case; files have them in either case.
        things: what the files are, for errors.
    Raises:
        ConfigError: if there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"data.path: {folder} is a file. A folder of {things} is needed; unpack it if it is one.")
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise ConfigError(f"data.path: there is no folder {folder}.{near(folder.name, beside)}")
    names, others, seen = [], Counter(), set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        files = [] if real in seen else [f for f in files if not f.startswith(".")]
        seen.add(real)
        for file in files:
            if file.lower().endswith(suffixes):
                names.append((Path(parent) / file).relative_to(folder).as_posix())
            else:
                others[Path(file).suffix or "without suffix"] += 1
    if not names:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "no files at all"
        raise ConfigError(
            f"data.path: {folder} holds no {things}. Looked in it and its sub-folders for {', '.join(suffixes)}; found "
            f"{found}. Name another folder, or convert the files."
        )
    return sorted(names)


def position(name: str) -> float:
    """A number in [0, 1) from a file's path within its folder."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6]) / 2**48


def assign(names: Sequence[str], val: int | float, test: int | float) -> dict[Split, list[int]]:
    """Which files belong to which split by the hashes of their names, see `cut`."""
    return cut([position(name) for name in names], val, test)


def cut(positions: Sequence[float], val: int | float, test: int | float) -> dict[Split, list[int]]:
    """Which files belong to which split, in the order of their positions u in [0, 1).

    A fraction f of test is u < f, a count n the n smallest u; of val it is u >= 1 - f, or the n largest.
    """
    u = np.array(positions)
    order = np.argsort(u, kind="stable").tolist()
    first = test if isinstance(test, int) else max(int((u < test).sum()), int(test > 0))
    last = val if isinstance(val, int) else max(int((u >= 1 - val).sum()), int(val > 0))
    first, last = min(first, len(order)), min(last, len(order))
    return {"train": order[first : len(order) - last], "val": order[len(order) - last :], "test": order[:first]}


def check_shares(val: int | float, test: int | float, things: str) -> None:
    """Raises ConfigError unless the held-out splits are numbers of files, or fractions below 1."""
    for name, part in {"val": val, "test": test}.items():
        if part < 0 or (isinstance(part, float) and part >= 1):
            raise ConfigError(
                f"data.{name}: a number of {things} (an integer from 0) or a fraction of them (from 0.0, below 1.0) is "
                f"needed, found {part}."
            )


def check_train(
    folder: Path, total: int, train: Sequence[int], val: int | float, test: int | float, thing: str
) -> None:
    """Raises ConfigError if no file is left to train on."""
    if not train:
        raise ConfigError(
            f"data: {folder} holds {total} {thing}{'s' * (total != 1)}, and with data.val={val} and data.test={test} "
            "none is left to train on. Lower them (0 is allowed), or add files."
        )
