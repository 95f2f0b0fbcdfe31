"""Leaderboards as data: JSON with everything, CSV with one line per number."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence

from .board import EMPTY, Board, Cell, Quoted, Row
from .costs import cost, shown
from .tables import FAILED

HEADERS = (
    *("protocol", "version", "protocol_hash", "row", "status", "metric", "value", "stderr", "kind", "unit", "better"),
    *("rank_low", "rank_high", "not_ranked_because", "source", "run", "seeds", "options", "weights", "step"),
    *("config_hash", "commit", "dirty"),
)


def as_json(boards: Sequence[Board]) -> str:
    """The boards as JSON, every number in full."""
    tree = {"schema": "genmodels.leaderboard/2", "boards": [dataclasses.asdict(board) for board in boards]}
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(boards: Sequence[Board]) -> str:
    """The boards in long form: one line for each metric and cost of each row, every number in full.

    Ranks stand on the lines of the metric that ranks.
    """
    return _lines(
        HEADERS, (line for board in boards for row in (*board.rows, *board.quoted) for line in _long(board, row))
    )


def wide_csv(board: Board) -> str:
    """One board as it is read: one line for each row, a column and its standard error for each metric."""
    columns, costs = board.measured(), shown(board)
    metrics = [f"{c.name}{part}" for c in columns for part in ("", "_stderr", "_kind")]
    rows = []
    for row in (*board.rows, *board.quoted):
        cells = [row.cells.get(c.name, EMPTY) for c in columns]
        values = [part for cell in cells for part in (cell.value, cell.stderr, _kind(cell))]
        values += [cost(row, board.first, c.name) for c in costs]
        rows.append([*_who(row), *_place(row), *values])
    return _lines(["row", "status", "rank_low", "rank_high", *metrics, *(c.name for c in costs)], rows)


def _kind(cell: Cell) -> str:
    return FAILED if cell.failed else cell.kind


def _lines(headers: Sequence[str], rows: Iterable[Sequence]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows(rows)
    return buffer.getvalue()


def _who(row: Row | Quoted) -> tuple[str, str]:
    return (row.name, "quoted") if isinstance(row, Quoted) else (row.label, "measured")


def _place(row: Row | Quoted) -> tuple[int | None, int | None]:
    return (None, None) if isinstance(row, Quoted) or row.rank is None else row.rank


def _long(board: Board, row: Row | Quoted) -> Iterable[list]:
    start = [board.protocol, board.version, board.hash, *_who(row)]
    facts = [row.source, *[""] * 8] if isinstance(row, Quoted) else _facts(row)
    reason = "" if isinstance(row, Quoted) else row.unranked or ""
    for k, column in enumerate(board.columns):
        cell = row.cells.get(column.name, EMPTY)
        ranks = [*_place(row), reason] if k == 0 else [None, None, ""]
        if cell.told or ranks[2]:
            kind = _kind(cell)
            yield [*start, column.name, cell.value, cell.stderr, kind, column.unit, column.better, *ranks, *facts]
    for of in shown(board):
        value = cost(row, board.first, of.name)
        if value is not None:
            yield [*start, of.name, value, None, "cost", of.unit, "lower", None, None, "", *facts]


def _facts(row: Row) -> list:
    seeds = " ".join(map(str, row.seeds))
    return ["", row.name, seeds, row.options, row.weights, row.step, row.config_hash, row.commit, row.dirty]
