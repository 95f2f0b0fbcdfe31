"""Tables from result files: `python -m evals.leaderboard runs/*`, or without arguments the published board."""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..commands import guarded
from ..files import write_text
from ..hashing import digest
from ..registry import ConfigError
from .protocol import FOLDER
from .results import BOARD_FILE, Items, Result, ResultError, combine, find, read
from .tables import MISSING, arrow, short, show, table

EVALS = FOLDER.parent
BENCHMARKS = "benchmarks"  # the folder of evals/results that holds timings instead of results
SIGNIFICANT = 1.96
COSTS = ("nfe", "seconds_per_item", "parameters")


@dataclass(frozen=True)
class Cell:
    """One estimate of one row; value None if it is missing or failed."""

    value: float | None
    stderr: float | None
    kind: str


@dataclass(frozen=True)
class Row:
    """One configuration, weights, step and sampling options; training seeds are averaged.

    Attributes:
        rank: first and last place that the uncertainty allows; None if unranked.
        unranked: why it has no rank.
    """

    name: str
    options: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    model: str
    weights: str
    step: int
    samples_seen: int
    cells: dict[str, Cell]
    commit: str | None
    dirty: bool
    results: tuple[str, ...]
    rank: tuple[int, int] | None = None
    unranked: str | None = None


@dataclass(frozen=True)
class Column:
    name: str
    unit: str
    better: str


@dataclass(frozen=True)
class Board:
    """All rows of one protocol hash; `columns[0]` ranks them if it belongs to the protocol's first metric.

    Attributes:
        references: by name, the value to read each column against.
    """

    protocol: str
    version: int
    hash: str
    description: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    references: dict[str, dict[str, float]]


AllItems = Mapping[str, Mapping[str, Items]]


def leaderboard(results: Sequence[Result], items: AllItems | None = None) -> list[Board]:
    """One board per protocol hash, sorted by name; a pure function of its arguments, whatever their order.

    Args:
        items: per-item values of estimates by the id of their result, for paired comparisons.
    """
    groups: dict[tuple, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r["created_utc"], r["id"])):
        protocol = result["protocol"]
        groups.setdefault((protocol["name"], protocol["version"], protocol["hash"]), []).append(result)
    return [_board(groups[key], items or {}) for key in sorted(groups)]


def _board(results: list[Result], items: AllItems) -> Board:
    protocol = results[-1]["protocol"]
    columns = _columns(results)
    rows = [_row(same) for same in _same_row(results)]
    first = {m["name"] for result in results for m in result["metrics"] if m["entry"] == 0}
    if columns and columns[0].name in first:
        rows = _ranked(rows, columns[0], items)
    else:
        rows = [dataclasses.replace(row, unranked=row.unranked or "its first metric was not measured") for row in rows]
    references: dict[str, dict[str, list[float]]] = {}
    for metric in (m for result in results for m in result["metrics"]):
        for name, value in metric["references"].items():
            references.setdefault(name, {}).setdefault(metric["name"], []).append(value)
    return Board(
        protocol["name"],
        protocol["version"],
        protocol["hash"],
        protocol["tree"].get("description", ""),
        tuple(columns),
        tuple(rows),
        _in_order_of_columns(
            {n: {m: statistics.median_low(v) for m, v in of.items()} for n, of in references.items()}, columns
        ),
    )


def _in_order_of_columns(references: dict[str, dict[str, float]], columns: list[Column]) -> dict[str, dict[str, float]]:
    """References of the first column first, in alphabetical order within it."""
    places = {column.name: k for k, column in enumerate(columns)}

    def place(name: str) -> tuple[int, str]:
        return min(places.get(metric, len(places)) for metric in references[name]), name

    return {name: references[name] for name in sorted(references, key=place)}


def _columns(results: list[Result]) -> list[Column]:
    """Every estimate that some model has, in the order of the protocol; costs have columns of their own."""
    found: dict[tuple[int, int, str], Column] = {}
    for result in results:
        for place, m in enumerate(result["metrics"]):
            if m["name"] not in COSTS and not any(c.name == m["name"] for c in found.values()):
                found[m["entry"], place, m["name"]] = Column(m["name"], m["unit"], m["better"])
    return [found[key] for key in sorted(found)]


def _same_row(results: list[Result]) -> list[list[Result]]:
    """Results of one configuration (but its name and seed), step, weights and options; of each seed the newest."""
    groups: dict[str, dict[int, Result]] = {}
    for result in results:  # oldest first, so that a newer one takes the place of an older one
        model = result["model"]
        config = {key: value for key, value in model["config"].items() if key not in ("name", "seed")}
        identity = [config, model["step"], model["weights"], result["answers"], result["provenance"]]
        groups.setdefault(digest(identity), {})[model["seed"]] = result
    return [[group[seed] for seed in sorted(group)] for group in groups.values()]


def _row(same: list[Result]) -> Row:
    first = same[0]
    metrics = [{m["name"]: m for m in result["metrics"]} for result in same]
    names = dict.fromkeys(name for by_name in metrics for name in by_name)
    flags = {f for by_name in metrics for m in by_name.values() for f in m["flags"] if f != "failed"}
    sources = [result[part] for result in same for part in ("training", "environment")]
    commits = sorted({s["commit"] for s in sources[::2] if s["commit"]})
    return Row(
        name=first["run"],
        options=_options(first),
        runs=tuple(result["run"] for result in same),
        seeds=tuple(result["model"]["seed"] for result in same),
        model=first["model"]["name"],
        weights=first["model"]["weights"],
        step=first["model"]["step"],
        samples_seen=first["model"]["samples_seen"],
        cells={name: _cell([by_name.get(name) for by_name in metrics]) for name in names},
        commit=commits[0] if len(commits) == 1 else None,
        dirty=any(source["dirty"] for source in sources),
        results=tuple(result["id"] for result in same),
        unranked="reported, not measured" if first["provenance"] == "reported" else _sentence(flags),
    )


def _sentence(flags: set[str]) -> str | None:
    return ", ".join(sorted(flag.replace("_", " ") for flag in flags)) or None


def _cell(metrics: list[dict | None]) -> Cell:
    if any(m is None or m["value"] is None for m in metrics):
        return Cell(None, None, "")
    value, stderr = combine([m["value"] for m in metrics], [m["stderr"] for m in metrics])
    return Cell(value, stderr, metrics[0]["kind"])


def _options(result: Result) -> str:
    """What was overridden: `sample.num_steps=10`."""
    if not result["overridden"]:
        return ""
    config, answers = result["model"]["config"], result["answers"]
    old = _flat({question: config.get(question, {}) for question in answers})
    return " ".join(f"{key}={value}" for key, value in _flat(answers).items() if old.get(key, MISSING) != value)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}".lstrip(".")).items()}


# ---- ranks -------------------------------------------------------------------------------------------------


def _ranked(rows: list[Row], column: Column, items: AllItems) -> list[Row]:
    """Rows with rank intervals, sorted: ranked ones by rank and value, then unranked ones by value, missing ones last.

    i beats j if it is better by more than 1.96 standard errors of the difference. The first place that i may have is
    one more than the number of rows that beat it, the last is n less the number of rows that it beats. This relation
    need not be transitive, hence intervals and no classes.
    """
    sign = 1 if column.better == "lower" else -1
    rows = [dataclasses.replace(row, unranked=row.unranked or _why_not(row, column)) for row in rows]
    ranked = [row for row in rows if row.unranked is None]

    def beats(i: Row, j: Row) -> bool:
        gain = sign * (j.cells[column.name].value - i.cells[column.name].value)
        return gain > SIGNIFICANT * difference_stderr(i, j, column.name, items)

    def ranks(i: Row) -> tuple[int, int]:
        return 1 + sum(beats(j, i) for j in ranked), len(ranked) - sum(beats(i, j) for j in ranked)

    done = [dataclasses.replace(row, rank=ranks(row) if row.unranked is None else None) for row in rows]

    def order(row: Row) -> tuple:
        cell = row.cells.get(column.name, Cell(None, None, ""))
        value = math.inf if cell.value is None else sign * cell.value
        return row.rank is None, row.rank[0] if row.rank else 0, value, row.name, row.options, row.results

    return sorted(done, key=order)


def _why_not(row: Row, column: Column) -> str | None:
    cell = row.cells.get(column.name)
    if cell is None or cell.value is None:
        return f"no {column.name}"
    if column.better == "none":
        return f"{column.name} has no better direction"
    return f"{column.name} has no standard error" if cell.stderr is None else None


def difference_stderr(i: Row, j: Row, name: str, items: AllItems) -> float:
    """Standard error of the difference of two rows: paired where both are single runs scored on the same items.

    Averages over training seeds vary with the seeds, which pairing by item cannot see; they are treated as independent.
    """
    pair = [items.get(row.results[0], {}).get(name) if len(row.results) == 1 else None for row in (i, j)]
    if all(pair) and np.array_equal(pair[0].ids, pair[1].ids) and len(pair[0].ids) > 1:
        return float(np.std(pair[0].values - pair[1].values, ddof=1) / math.sqrt(len(pair[0].ids)))
    return math.hypot(i.cells[name].stderr, j.cells[name].stderr)


# ---- text --------------------------------------------------------------------------------------------------

HEAD = """# Leaderboard

Generated by `python -m evals.leaderboard` from result files; nothing is typed by hand.

A rank is the range of places that the uncertainty allows: one row is better than another if they differ by more than
1.96 standard errors (paired by item where both have per-item values). Values are ± one standard error; a mean over
training seeds includes their spread. Before a likelihood, `=` means exact, `≤` a bound, `≈` up to a solver's tolerance,
`~` a stochastic estimate. `+` after a commit: the source had uncommitted changes.
"""


def markdown(boards: Sequence[Board]) -> str:
    """The boards as Markdown that also reads well as plain text."""
    return "\n".join([HEAD, *map(_section, boards)] if boards else [HEAD, "There are no results yet.", ""])


def _section(board: Board) -> str:
    measured = [c for c in board.columns if any(r.cells.get(c.name, _EMPTY).value is not None for r in board.rows)]
    headers = ["rank", "run", *(c.name.replace("_", " ") + arrow(c.better) for c in measured)]
    headers += ["NFE", "parameters", "s/item", "samples seen", "weights", "commit"]
    lines = [f"## {board.protocol}, version {board.version} ({board.hash})", "", board.description, ""]
    lines += [table(headers, [_line(row, measured) for row in board.rows], left=(1, len(headers) - 2)), ""]
    lines += [f"- {_label(row)} is not ranked: {row.unranked}." for row in board.rows if row.unranked]
    lines += [""] if any(row.unranked for row in board.rows) else []
    shown = {n: of for n, of in board.references.items() if any(c.name in of for c in measured)}
    if shown:
        columns = [c for c in measured if any(c.name in of for of in shown.values())]
        cells = [[n, *(show(of.get(c.name)) for c in columns)] for n, of in shown.items()]
        names = ["to read them against", *(c.name.replace("_", " ") for c in columns)]
        lines += [table(names, cells, left=(0,)), ""]
    return "\n".join(lines)


_EMPTY = Cell(None, None, "")


def _label(row: Row) -> str:
    parts = [row.name, row.options, f"(mean of {len(row.seeds)} seeds)" if len(row.seeds) > 1 else ""]
    return " ".join(part for part in parts if part)


def _line(row: Row, columns: Sequence[Column]) -> list[str]:
    def value(name: str) -> Cell:
        return row.cells.get(name, _EMPTY)

    places = MISSING if row.rank is None else "–".join(dict.fromkeys(map(str, row.rank)))
    cells = [show(value(c.name).value, value(c.name).stderr, value(c.name).kind) for c in columns]
    costs = [value(name).value for name in ("nfe", "parameters", "seconds_per_item")]
    seen = short(row.samples_seen)
    commit = (row.commit[:7] if row.commit else MISSING) + ("+" if row.dirty else "")
    return [places, _label(row), *cells, *map(show, costs[:2]), _digits(costs[2]), seen, row.weights, commit]


def _digits(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2g}"


def as_json(boards: Sequence[Board]) -> str:
    """The boards as JSON, every number in full."""
    tree = {"schema": "genmodels.leaderboard/1", "boards": [dataclasses.asdict(board) for board in boards]}
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# ---- command -----------------------------------------------------------------------------------------------


def collect(places: Sequence[str | Path], strict: bool) -> list[Board]:
    """The boards of all results found in runs, folders and files.

    Args:
        strict: a file that is no valid result is an error; otherwise it is named on stderr and left out.
    """
    results: list[Result] = []
    items: dict[str, Mapping[str, Items]] = {}
    for path in find(places):
        try:
            result, values = read(path)
        except ResultError as error:
            if strict:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        results.append(result)
        items[result["id"]] = values
    return leaderboard(results, items)


@guarded
def main(argv: Sequence[str]) -> None:
    """Compare runs; without arguments, regenerate the published leaderboard from evals/results."""
    parser = argparse.ArgumentParser("evals.leaderboard", description=main.__doc__)
    parser.add_argument("places", nargs="*", help="runs, folders of results, or result files (default: evals/results)")
    parser.add_argument("--out", type=Path, help="folder for LEADERBOARD.md and leaderboard.json")
    parser.add_argument("--check", action="store_true", help="only say whether the files on disk are up to date")
    given = parser.parse_args(list(argv))
    published = [p for p in (EVALS / "results").glob("*") if p.is_dir() and p.name != BENCHMARKS]
    boards = collect(given.places or published, strict=not given.places)
    if given.places and not boards:
        raise ConfigError("no results were found there. Make some: python -m evals.evaluate <run> --protocol <name>")
    out = given.out or (None if given.places else EVALS)
    files = {} if out is None else {out / "LEADERBOARD.md": markdown(boards), out / BOARD_FILE: as_json(boards)}
    if given.check:
        stale = [str(p) for p, text in files.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
        if stale:
            raise ConfigError(f"out of date: {', '.join(stale)}. Regenerate: python -m evals.leaderboard")
        return
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    print(markdown(boards) if given.places else "\n".join(f"written {path}" for path in files))


if __name__ == "__main__":
    sys.exit(main())
