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

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ..config import read
from ..hashing import canonical
from ..registry import ConfigError
from ..schema import near
from .board import Cell, Quoted
from .protocol import FOLDER, Protocol, tree_of
from .results import Result

KEYS = ("name", "source", "values", "nfe", "parameters", "note")
KINDS = ("pmf", "exact", "bound", "numerical", "stochastic")


def load_quoted(folder: Path, protocols: Iterable[str]) -> dict[str, tuple[Quoted, ...]]:
    """The quoted rows of those protocols that have a file in the folder.

    Raises:
        ConfigError: naming the file, the row and the key that does not fit.
    """
    paths = {name: folder / f"{name}.yaml" for name in sorted(set(protocols))}
    return {name: read_quoted(path) for name, path in paths.items() if path.is_file()}


def quoted_for(results: Iterable[Result], folder: Path) -> dict[str, tuple[Quoted, ...]]:
    """The quoted rows by protocol hash, for those results whose protocol is the one in evals/protocols of its name.

    Figures are quoted for a frozen protocol; another one of that name, or another version, may measure something else.

    Raises:
        ConfigError: naming the file of quoted rows, the row and the key that does not fit.
    """
    protocols = {result["protocol"]["hash"]: result["protocol"]["tree"] for result in results}
    names = {key: name for key, tree in protocols.items() if (name := _frozen_name(tree))}
    rows = load_quoted(folder, names.values())
    return {key: rows[name] for key, name in names.items() if name in rows}


def _frozen_name(tree: Mapping[str, Any]) -> str | None:
    """The name of the frozen protocol that says the same as a tree; None if there is none."""
    name = tree.get("name") if isinstance(tree, dict) else None
    if not isinstance(name, str) or name not in {path.stem for path in FOLDER.glob("*.yaml")}:
        return None
    frozen = Protocol(_filled(tree_of(name)))
    return name if _facts(tree) == _facts(frozen.portable) else None


def _facts(tree: Mapping[str, Any]) -> str:
    """What decides numbers."""
    return canonical({key: value for key, value in tree.items() if key not in ("description", "imports")})


def _filled(node: Any) -> Any:
    """A tree in which something stands where each machine says where its data lie; a portable one leaves that out."""
    if isinstance(node, dict):
        return {key: _filled(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(item) for item in node]
    return "somewhere" if node == MISSING else node


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
    free = [key for key, value in costs.items() if value <= 0]
    if free:
        raise ConfigError(f"{where}.{free[0]}: a number above 0 is needed, found {costs[free[0]]!r}.")
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
    if stderr is not None and stderr < 0:
        raise ConfigError(f"{where}.stderr: a number that is not negative is needed, found {stderr!r}.")
    return Cell(_number(value["value"], f"{where}.value"), stderr, kind)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{where}: a finite number is needed, found {value!r}.")
    return value
