"""Figures that papers report, from evals/quoted/<protocol>.yaml: shown with their source, compared with nothing.

columns: [FID, bits_per_dim]          # estimates that the file speaks of
rows:
  - name: Somebody et al.
    source: the paper, table 3        # required
    values: {FID: 3.2, bits_per_dim: {value: 2.99, stderr: 0.01, kind: bound}}
    nfe: 35                           # these may be left out
    parameters: 1000000
    note: what makes it differ from the protocol
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import read
from ..registry import ConfigError
from ..schema import near
from .board import Cell, Quoted

KEYS = ("name", "source", "values", "nfe", "parameters", "note")
KINDS = ("pmf", "exact", "bound", "numerical", "stochastic")


def load_quoted(folder: Path, protocols: Iterable[str]) -> dict[str, tuple[Quoted, ...]]:
    """The quoted rows of those protocols that have a file in the folder.

    Raises:
        ConfigError: naming the file, the row and the key that does not fit.
    """
    paths = {name: folder / f"{name}.yaml" for name in sorted(set(protocols))}
    return {name: read_quoted(path) for name, path in paths.items() if path.is_file()}


def read_quoted(path: Path) -> tuple[Quoted, ...]:
    """The rows of one file, in its order.

    Raises:
        ConfigError: naming the file, the row and the key that does not fit.
    """
    tree = read(path)
    _check_keys(tree, ("columns", "rows"), ("columns", "rows"), str(path))
    columns = tree["columns"]
    if not isinstance(columns, list) or not columns or not all(isinstance(name, str) for name in columns):
        raise ConfigError(f"{path}: columns: a list of names is needed, found {columns!r}.")
    if not isinstance(tree["rows"], list):
        raise ConfigError(f"{path}: rows: a list is needed, found {tree['rows']!r}.")
    return tuple(_quoted(row, columns, f"{path}: rows[{k}]") for k, row in enumerate(tree["rows"]))


def _check_keys(node: Any, known: tuple[str, ...], needed: tuple[str, ...], where: str) -> None:
    if not isinstance(node, dict):
        raise ConfigError(f"{where}: a mapping is needed, found {node!r}.")
    unknown = [key for key in node if key not in known]
    if unknown:
        raise ConfigError(f"{where}: the key '{unknown[0]}' is unknown.{near(unknown[0], known)}")
    missing = [key for key in needed if not node.get(key)]
    if missing:
        raise ConfigError(f"{where}: '{missing[0]}' is missing.")


def _quoted(row: Any, columns: list[str], where: str) -> Quoted:
    _check_keys(row, KEYS, ("name", "source", "values"), where)
    for key in ("name", "source", "note"):
        if not isinstance(row.get(key, ""), str):
            raise ConfigError(f"{where}.{key}: text is needed, found {row[key]!r}.")
    values = row["values"]
    if not isinstance(values, dict):
        raise ConfigError(f"{where}.values: a mapping of columns is needed, found {values!r}.")
    unknown = [name for name in values if name not in columns]
    if unknown:
        raise ConfigError(
            f"{where}.values: there is no column '{unknown[0]}'.{near(unknown[0], columns)} "
            f"The file's columns are {', '.join(columns)}."
        )
    cells = {name: _cell(value, f"{where}.values.{name}") for name, value in values.items()}
    costs = {key: _number(row[key], f"{where}.{key}") for key in ("nfe", "parameters") if row.get(key) is not None}
    return Quoted(row["name"], row["source"], cells, note=row.get("note", ""), **costs)


def _cell(value: Any, where: str) -> Cell:
    if not isinstance(value, dict):
        return Cell(_number(value, where))
    _check_keys(value, ("value", "stderr", "kind"), (), where)
    if "value" not in value:
        raise ConfigError(f"{where}: 'value' is missing.")
    kind, stderr = value.get("kind", ""), value.get("stderr")
    if kind and kind not in KINDS:
        raise ConfigError(f"{where}.kind: one of {', '.join(KINDS)} is needed, found {kind!r}.")
    stderr = None if stderr is None else _number(stderr, f"{where}.stderr")
    return Cell(_number(value["value"], f"{where}.value"), stderr, kind)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where}: a finite number is needed, found {value!r}.")
    return value
