"""Leaderboards from results: which results share a table, which a row, and what the row is called."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..hashing import digest
from .board import AllItems, Bill, Board, Cell, Column, Quoted, Row
from .provenance import overrides
from .ranking import frontier, ranked
from .results import Result, combine
from .tables import SYMBOLS, failure

AXES = ("nfe", "parameters", "training")  # costs that quality is drawn against
TRADES = (("edit_success", "edit_distance"),)  # columns that are paid for with another column


def leaderboard(
    results: Sequence[Result], items: AllItems | None = None, quoted: Mapping[str, Sequence[Quoted]] | None = None
) -> list[Board]:
    """One board per protocol hash, sorted by name; a pure function of its arguments, whatever their order.

    Args:
        items: per-item values of estimates by the id of their result, for paired comparisons.
        quoted: rows that somebody else reports, by the hash of the protocol; shown beside measured rows only.
    """
    groups = _by_protocol(results)
    return [_board(groups[key], items or {}, (quoted or {}).get(key[2], ())) for key in sorted(groups)]


def superseded(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    """The results that no leaderboard shows, since a newer one is of the same row and seed: each with that one."""
    pairs = []
    for group in _by_protocol(results).values():
        newest = {_seed_of_row(result): result for result in group}
        pairs += [(result, newest[_seed_of_row(result)]) for result in group]
    return [(old, new) for old, new in pairs if old["id"] != new["id"]]


def _by_protocol(results: Sequence[Result]) -> dict[tuple[str, int, str], list[Result]]:
    """Results by name, version and hash of their protocol, oldest first."""
    groups: dict[tuple[str, int, str], list[Result]] = {}
    for result in sorted(results, key=lambda r: (r["created_utc"], r["id"])):
        protocol = result["protocol"]
        groups.setdefault((protocol["name"], protocol["version"], protocol["hash"]), []).append(result)
    return groups


def _board(results: list[Result], items: AllItems, quoted: Sequence[Quoted]) -> Board:
    protocol = results[-1]["protocol"]
    columns = _columns(results)
    rows = _told_apart([_row(same) for same in _same_row(results)])
    first = {m["name"] for result in results for m in result["metrics"] if m["entry"] == 0}
    if columns and columns[0].name in first:
        rows = ranked(rows, columns[0], items)
    else:
        reason = "its first metric was not measured"
        rows = [dataclasses.replace(row, unranked=row.barred or reason) for row in sorted(rows, key=lambda r: r.label)]
    names = {column.name for column in columns}
    return Board(
        protocol["name"],
        protocol["version"],
        protocol["hash"],
        protocol["tree"].get("description", ""),
        tuple(columns),
        tuple(rows),
        _references(results, columns),
        tuple(row for row in quoted if names & set(row.cells)),
        tuple(frontier(rows, column, axis, items) for column, axis in _drawn(columns, rows)),
    )


def _drawn(columns: Sequence[Column], rows: Sequence[Row]) -> list[tuple[Column, str]]:
    """The column that ranks, and the first likelihood, each against every cost; before them columns that are traded."""

    def likelihood(column: Column) -> bool:
        return any(row.cells[column.name].kind in SYMBOLS for row in rows if column.name in row.cells)

    able = [column for column in columns if column.better != "none"]
    by_name = {column.name: column for column in able}
    traded = [(by_name[name], other) for name, other in TRADES if name in by_name and other in by_name]
    priced = dict.fromkeys([*able[:1], *[column for column in able if likelihood(column)][:1]])
    models = {(row.config_hash, row.weights, row.step) for row in rows}
    axes = AXES[:1] if traded and len(models) == 1 else AXES  # one model has one size
    return [*traded, *((column, axis) for column in priced for axis in axes)]


def _references(results: list[Result], columns: list[Column]) -> dict[str, dict[str, float]]:
    """The middle of what results say; references of the first column first, in alphabetical order within it."""
    found: dict[str, dict[str, list[float]]] = {}
    for metric in (m for result in results for m in result["metrics"]):
        for name, value in metric["references"].items():
            found.setdefault(name, {}).setdefault(metric["name"], []).append(value)
    places = {column.name: k for k, column in enumerate(columns)}

    def place(name: str) -> tuple[int, str]:
        return min(places.get(metric, len(places)) for metric in found[name]), name

    return {n: {m: statistics.median_low(v) for m, v in found[n].items()} for n in sorted(found, key=place)}


def _columns(results: list[Result]) -> list[Column]:
    """Every estimate that some model has, in the order of the protocol; of each metric those that only failed last."""
    found: dict[tuple[int, bool, int, str], Column] = {}
    valued = {m["name"] for result in results for m in result["metrics"] if m["value"] is not None}
    for result in results:
        for place, m in enumerate(result["metrics"]):
            if not any(c.name == m["name"] for c in found.values()):
                key = m["entry"], m["name"] not in valued, place, m["name"]
                found[key] = Column(m["name"], m["unit"], m["better"], m["question"])
    return [found[key] for key in sorted(found)]


def _same_row(results: list[Result]) -> list[list[Result]]:
    """Results of one configuration (but its name and seed), step, weights and options; of each seed the newest."""
    groups: dict[str, dict[int, Result]] = {}
    for result in results:  # oldest first, so that a newer one takes the place of an older one
        row, seed = _seed_of_row(result)
        groups.setdefault(row, {})[seed] = result
    return [[group[seed] for seed in sorted(group)] for group in groups.values()]


def _seed_of_row(result: Result) -> tuple[str, int]:
    """Which row a result belongs to, and its training seed. How a run edits is told by the answers, if it was asked."""
    model = result["model"]
    config = {key: value for key, value in model["config"].items() if key not in ("name", "seed", "edit")}
    return digest([config, model["step"], model["weights"], result["answers"]]), model["seed"]


def _row(same: list[Result]) -> Row:
    first = same[0]
    metrics = [{m["name"]: m for m in result["metrics"]} for result in same]
    names = dict.fromkeys(name for by_name in metrics for name in by_name)
    sources = [result[part] for result in same for part in ("training", "environment")]
    commits = sorted({s["commit"] for s in sources[::2] if s["commit"]})
    several = f"(mean of {len(same)} seeds)" if len(same) > 1 else ""
    options = " ".join(overrides(first))
    return Row(
        label=" ".join(part for part in (first["run"], options, several) if part),
        name=first["run"],
        options=options,
        runs=tuple(result["run"] for result in same),
        seeds=tuple(result["model"]["seed"] for result in same),
        model=first["model"]["name"],
        config_hash=first["model"]["config_hash"],
        weights=first["model"]["weights"],
        step=first["model"]["step"],
        samples_seen=first["model"]["samples_seen"],
        parameters=first["model"]["parameters"],
        training=_mean([_device_seconds(result["training"]) for result in same]),
        hardware=", ".join(sorted({result["training"]["hardware"] or "unknown hardware" for result in same})),
        cells={name: _cell([by_name.get(name) for by_name in metrics]) for name in names},
        bills=_bills(same),
        commit=commits[0] if len(commits) == 1 else None,
        dirty=any(source["dirty"] for source in sources),
        results=tuple(result["id"] for result in same),
        barred=_barred(same),
    )


def _barred(same: list[Result]) -> str | None:
    """Why a row takes part in no comparison."""
    flags = {f for result in same for m in result["metrics"] for f in m["flags"] if f != "failed"}
    model = same[0]["model"]
    unfinished = model["step"] < model["steps"] and model["weights"] != "best"
    reasons = [flag.replace("_", " ") for flag in sorted(flags)]
    for result in same:
        where = f" in {result['run']} (training seed {result['model']['seed']})" if len(same) > 1 else ""
        reasons += [f"{words}{where}" for words in _failures(result)]
    reasons += [f"training unfinished ({model['step']:,} of {model['steps']:,} steps)"] if unfinished else []
    return ", ".join(reasons) or None


def _failures(result: Result) -> list[str]:
    """What went wrong, in words: answers that are not finite, and estimates that failed although theirs are."""
    failed = {question: of for question, of in result["failures"].items() if of["items"]}
    others = [m["name"] for m in result["metrics"] if "failed" in m["flags"] and m["question"] not in failed]
    words = [failure(question, of) for question, of in failed.items()]
    return [*words, f"{', '.join(others)} failed"] if others else words


def _cell(metrics: list[dict | None]) -> Cell:
    found = [m for m in metrics if m is not None]
    if any("failed" in m["flags"] for m in found):
        return Cell(question=found[0]["question"], failed=True)
    if len(found) < len(metrics) or any(m["value"] is None for m in found):
        return Cell(question=found[0]["question"])
    value, stderr = combine([m["value"] for m in found], [m["stderr"] for m in found])
    return Cell(value, stderr, found[0]["kind"], found[0]["question"])


def _device_seconds(training: Mapping[str, Any]) -> float | None:
    return None if training["seconds"] is None else training["seconds"] * (training["world_size"] or 1)


def _mean(values: Sequence[float | None]) -> float | None:
    return None if any(v is None for v in values) else statistics.fmean(values)


def _bills(same: list[Result]) -> dict[str, Bill]:
    """By question that all seeds were asked, the means over seeds."""
    costs = [result["cost"] for result in same]
    asked = [question for question in costs[0] if all(question in cost for cost in costs)]
    names = [field.name for field in dataclasses.fields(Bill)]
    return {q: Bill(**{name: _mean([cost[q][name] for cost in costs]) for name in names}) for q in asked}


def _told_apart(rows: list[Row]) -> list[Row]:
    """Rows with labels that differ, by as little as does it: configuration, then weights, step, and result."""
    for mark in (
        lambda row: row.config_hash[:6],
        lambda row: row.weights,
        lambda row: f"step {row.step:,}",
        lambda row: row.results[0][:6],
    ):
        together: dict[str, set[str]] = {}
        for row in rows:
            together.setdefault(row.label, set()).add(mark(row))
        twice = Counter(row.label for row in rows)
        rows = [
            dataclasses.replace(row, label=f"{row.label} ({mark(row)})")
            if twice[row.label] > 1 and len(together[row.label]) > 1
            else row
            for row in rows
        ]
    return rows
