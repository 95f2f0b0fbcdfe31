"""Rows of numbers from the user's files."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..schema import near
from ..transforms import Transform
from ..types import Batch
from .array_files import SUFFIXES, ArrayFile, find, shown
from .dataset import SPLITS, Dataset, Split, proposal
from .memory import InMemory
from .partition import Order, partition, proposal_for
from .text_table import DELIMITERS, TextTable

GRAIN = 1e-2  # spacing of float32 numbers against the spread of their column, beyond which it is told
Columns = str | int | tuple[str | int, ...]
NAMES: dict[Split, tuple[str, ...]] = {  # what the arrays of a file may be called that hold its splits
    "train": ("train",),
    "val": ("validation", "valid", "val"),
    "test": ("test",),
}


class ArrayTable:
    """One array [N, D] of a file, read as a table; it has the attributes and methods of a `TextTable`."""

    names = None

    def __init__(self, file: ArrayFile, name: str) -> None:
        self.file, self.name, self.title = file, name, file.where(name)
        self.shape = file.shapes[name]
        if len(self.shape) != 2:
            advice = " For one number a row, save x.reshape(-1, 1)." if len(self.shape) == 1 else ""
            advice = " `data: array` reads items of any shape." if len(self.shape) > 2 else advice
            raise ConfigError(
                f"{self.title} has shape {shown(self.shape)}; a table needs [N, D], one row an item.{advice}"
            )
        if 0 in self.shape:
            raise ConfigError(f"{self.title} is empty: its shape is {shown(self.shape)}.")
        self.width = self.shape[1]

    def read(self, columns: list[int]) -> np.ndarray:
        """[N, len(columns)] float64: the chosen columns."""
        return self.file.read(self.name)[:, columns].astype(np.float64)

    def place(self, row: int) -> str:
        return f"row {row}"

    def label(self, column: int) -> str:
        return f"column {column} (counted from 0)"


AnyTable = TextTable | ArrayTable


def open_tables(path: Path, array: str | None, delimiter: str | None, header: bool | None) -> dict[Split, AnyTable]:
    """The tables of a file: one for "train", or those of all splits that its arrays are named after.

    Raises:
        ConfigError: if the file is of no known kind, or if it holds several arrays of which none is chosen.
    """
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        return {"train": TextTable(path, delimiter, header)}
    if path.is_dir() or suffix not in SUFFIXES:
        known = ", ".join((*SUFFIXES, *DELIMITERS))
        what = "a folder" if path.is_dir() else f"a file of kind {suffix!r}"
        raise ConfigError(f"data.path: {path} is {what}; a table is read from {known}.")
    file = ArrayFile(path)
    if array is not None:
        return {"train": ArrayTable(file, file.choose(array))}
    if "train" in file.shapes:
        named = {split: [n for n in names if n in file.shapes] for split, names in NAMES.items()}
        return {split: ArrayTable(file, names[0]) for split, names in named.items() if names}
    if not file.shapes:
        raise ConfigError(f"{path} is empty: it holds no array.")
    if len(file.shapes) != 1:
        listed = ", ".join(f"'{name}' {shown(shape)}" for name, shape in file.shapes.items())
        raise ConfigError(
            f"{path} holds {len(file.shapes)} arrays: {listed}. Choose one with data.array, or name them train, "
            "validation and test."
        )
    return {"train": ArrayTable(file, *file.shapes)}


def locate(table: AnyTable, column: str | int, key: str) -> int:
    """The place of a column that is given by name or by place (from 0).

    Raises:
        ConfigError: if there is no such column, with the nearest name, or if several have the name.
    """
    if isinstance(column, int):
        if not 0 <= column < table.width:
            raise ConfigError(
                f"{key}: {table.title} has no column {column}; it has {table.width}, 0 … {table.width - 1}."
            )
        return column
    if table.names is None:
        raise ConfigError(
            f"{key}: {table.title} gives its columns no names, so {column!r} must be a place, 0 … {table.width - 1}."
        )
    places = [k for k, name in enumerate(table.names) if name == column]
    if not places:
        known = ", ".join(table.names)
        raise ConfigError(f"{key}: {table.title} has no column {column!r}.{near(column, table.names)} It has: {known}.")
    if len(places) > 1:
        raise ConfigError(
            f"{key}: {table.title} has {len(places)} columns {column!r}; give the place, one of {places}."
        )
    return places[0]


def read_float32(table: AnyTable, columns: list[int]) -> tuple[Tensor, np.ndarray]:
    """[N, len(columns)] float32, and the same as read, in float64.

    Raises:
        ConfigError: naming the first row that holds NaN, infinity or a number beyond float32, and how many do.
    """
    values = table.read(columns)
    with np.errstate(over="ignore"):
        x = values.astype(np.float32)
    bad = ~np.isfinite(x)
    if bad.any():
        row, k = np.argwhere(bad)[0]
        value, rows = values[row, k], int(bad.any(1).sum())
        what = f"{value:g}" if not np.isfinite(value) else f"{value:g}, beyond the range of float32 (3.4e38)"
        many = f"{rows:,} of {len(x):,} rows hold" if rows > 1 else f"1 of {len(x):,} rows holds"
        raise ConfigError(
            f"{table.title}, {table.place(int(row))}, {table.label(columns[k])}: found {what} ({many} NaN, infinity or "
            "too large a number). Delete such rows, fill them in, or leave the column out with data.columns."
        )
    _warn_of_grain(table, columns, values, x)
    return torch.from_numpy(x), values


def _warn_of_grain(table: AnyTable, columns: list[int], values: np.ndarray, x: np.ndarray) -> None:
    """Warn of columns whose neighbours in float32 are far apart against their spread (time stamps, identifiers)."""
    grain, spread = np.spacing(np.abs(x).max(0)), values.std(0)
    for k in np.flatnonzero((spread > 0) & (grain > GRAIN * spread)):
        warnings.warn(
            f"{table.title}, {table.label(columns[k])}: float32 numbers of this size lie {grain[k]:g} apart, and their "
            f"spread is {spread[k]:.3g}. Subtract an offset from the column before, or leave it out with data.columns.",
            stacklevel=2,
        )


@dataclass(frozen=True)
class Named:
    """Which columns play which part, as a configuration names them.

    Args:
        columns: those to model, None for all others.
        key: "data.condition" or "data.target", what the columns `aside` are.
    """

    columns: tuple[str | int, ...] | None
    key: str
    aside: tuple[str | int, ...]

    def places(self, table: AnyTable, first: AnyTable) -> tuple[list[int], list[int]]:
        """The places of the columns to model and of those aside, in a table.

        Args:
            first: the table of the training rows, whose columns the table must share.
        Raises:
            ConfigError: if a column is missing or asked for twice, or if none is left to model.
        """
        aside = [locate(table, column, self.key) for column in self.aside]
        if self.columns is not None:
            chosen = [locate(table, column, "data.columns") for column in self.columns]
        else:
            chosen = [k for k in range(table.width) if k not in aside]
            _check_alike(table, first)
        both = chosen + aside
        twice = [k for k in both if both.count(k) > 1]
        if twice:
            raise ConfigError(f"data: {table.label(twice[0])} of {table.title} is asked for twice; name it once.")
        if not chosen:
            raise ConfigError(f"data: no column of {table.title} is left to model; it has {table.width}.")
        return chosen, aside


def _check_alike(table: AnyTable, first: AnyTable) -> None:
    """Raises ConfigError unless two tables have the same columns in the same order."""
    mend = "Give all files the same columns in the same order, or choose them by name with data.columns."
    if table.width != first.width:
        raise ConfigError(f"{table.title} has {table.width} columns, but {first.title} has {first.width}. {mend}")
    if table.names and first.names and table.names != first.names:
        k = next(k for k, pair in enumerate(zip(table.names, first.names, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"{table.title} calls column {k} (counted from 0) {table.names[k]!r}, but {first.title} calls it "
            f"{first.names[k]!r}. {mend}"
        )


@register(Dataset, "table")
class Table(InMemory):
    """Rows of numbers from a .npy, .npz, .csv, .tsv, .txt or HDF5 file of the user's.

    Numbers are read as float64 and given as float32. The arrays train, validation and test of an .npz or HDF5 file are
    the splits; `val_path` and `test_path` are files for a split. What has no rows of its own is cut from the training
    rows: n_test = int(test·N), then n_val = int(val·(N - n_test)). The proposed transform standardises. The fingerprint
    covers every number of every split, whatever kind of file it came from.

    Args:
        path: the file, relative to the working directory.
        columns: names or places (from 0) of the columns to model, in that order; null for all but `condition` or
            `target`. Text files name their columns in a header.
        condition: column or columns that are given to the model.
        target: column or columns that a predictive model must output.
        classes: number of classes, if `condition` or `target` is one column of labels 0 … classes-1; null if it holds
            real values.
        val, test: share of the rows, or number of rows if at least 1.
        order: "shuffled" cuts the splits from rows in random order; "file" takes the last rows for testing and those
            before them for validation.
        seed: of the shuffle.
        val_path, test_path: files of their own for these splits, with the same columns.
        array: name of the array to read from .npz or HDF5.
        delimiter: between the fields of a text file; null for the comma in .csv, the tab in .tsv, spaces in .txt.
        header: whether a text file begins with names; null to find out.
        transform: instead of the proposed one.
    Raises:
        ConfigError: naming file, row and column of what is no finite number, and the way out.
    """

    local = ("path", "val_path", "test_path")

    def __init__(
        self,
        path: str,
        columns: tuple[str | int, ...] | None = None,
        condition: Columns | None = None,
        target: Columns | None = None,
        classes: int | None = None,
        val: float = 0.1,
        test: float = 0.1,
        order: Order = "shuffled",
        seed: int = 0,
        val_path: str | None = None,
        test_path: str | None = None,
        array: str | None = None,
        delimiter: str | None = None,
        header: bool | None = None,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        if condition is not None and target is not None:
            raise ConfigError("data: `condition` and `target` are both given; a table has one of them.")
        key, asked = ("data.condition", condition) if target is None else ("data.target", target)
        self.names = Named(columns, key, () if asked is None else asked if isinstance(asked, tuple) else (asked,))
        self.classes = classes
        tables = open_tables(find(path, "data.path"), array, delimiter, header)
        for split, other in (("val", val_path), ("test", test_path)):
            if other is not None:
                tables[split] = _only(open_tables(find(other, f"data.{split}_path"), array, delimiter, header))
        self._settle(tables["train"])
        parts = {split: self._items(table, tables["train"]) for split, table in tables.items()}
        cut = {"val": 0.0 if "val" in parts else val, "test": 0.0 if "test" in parts else test}
        order = "file" if not any(cut.values()) else order
        rows = partition(len(parts["train"]), **cut, order=order, seed=seed, where="data 'table'")
        for split in SPLITS:
            self.hold(split, parts[split] if split in parts and split != "train" else parts["train"][rows[split]])
        self.transform = proposal(transform, proposal_for(None, 1.0))

    def fingerprint(self) -> str:
        return self.checksum()

    def _settle(self, table: AnyTable) -> None:
        """The facts that follow from which columns play which part."""
        chosen, aside = self.names.places(table, table)
        self.shape = (len(chosen),)
        if self.classes is not None and (len(aside) != 1 or self.classes < 1):
            raise ConfigError(
                "data.classes: a number of classes (at least 1) goes with one column of labels as data.condition or "
                f"data.target, found {self.classes} classes and {len(aside)} columns."
            )
        width = (len(aside),) if self.classes is None else None
        if aside and self.names.key == "data.condition":
            self.num_classes, self.condition_shape = self.classes, width
        elif aside:
            self.target_shape = width or (self.classes,)

    def _items(self, table: AnyTable, first: AnyTable) -> Batch:
        """Every row of a table as items."""
        chosen, aside = self.names.places(table, first)
        x, values = read_float32(table, chosen + aside)
        if not aside:
            return Batch(x)
        given = x[:, len(chosen) :].contiguous()
        if self.classes is not None:
            given = self._labels(table, values[:, -1], aside[0])
        x = x[:, : len(chosen)].contiguous()
        return Batch(x, **{self.names.key.removeprefix("data."): given})

    def _labels(self, table: AnyTable, values: np.ndarray, column: int) -> Tensor:
        """[N] int64 labels; ConfigError naming the first that is none."""
        bad = (values != np.floor(values)) | (values < 0) | (values >= self.classes)
        if bad.any():
            row = int(bad.argmax())
            raise ConfigError(
                f"{table.title}, {table.place(row)}, {table.label(column)}: {values[row]:g} is no label; with "
                f"data.classes={self.classes} labels are the whole numbers 0 … {self.classes - 1} ({int(bad.sum()):,} "
                f"of {len(bad):,} rows hold another). Raise data.classes, renumber the labels from 0, or leave out "
                "data.classes to read real values."
            )
        return torch.from_numpy(values.astype(np.int64))


def _only(tables: dict[Split, AnyTable]) -> AnyTable:
    """The table of a file that holds one split."""
    if len(tables) > 1:
        raise ConfigError(
            f"{tables['train'].file.path} holds arrays for {', '.join(tables)}, but is given for one split. "
            "Choose one with data.array, or give that file alone as data.path."
        )
    return tables["train"]
