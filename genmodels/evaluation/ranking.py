"""Rank intervals, and which rows are worth their price."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from .board import EMPTY, AllItems, Column, Frontier, Row
from .costs import cost

SIGNIFICANT = 1.96


def ranked(rows: Sequence[Row], column: Column, items: AllItems) -> list[Row]:
    """Rows with rank intervals, sorted: ranked ones by rank and value, then unranked ones by value, missing ones last.

    i beats j if it is better by more than 1.96 standard errors of the difference. The first place that i may have is
    one more than the number of rows that beat it, the last is n less the number of rows that it beats. This relation
    need not be transitive, hence intervals and no classes.
    """
    rows = [dataclasses.replace(row, unranked=row.barred or _why_not(row, column)) for row in rows]
    able = [row for row in rows if row.unranked is None]

    def ranks(i: Row) -> tuple[int, int]:
        behind = sum(beats(j, i, column, items) for j in able)
        return 1 + behind, len(able) - sum(beats(i, j, column, items) for j in able)

    done = [dataclasses.replace(row, rank=ranks(row) if row.unranked is None else None) for row in rows]

    def order(row: Row) -> tuple:
        value = row.cells.get(column.name, EMPTY).value
        value = math.inf if value is None else sign(column) * value
        return row.rank is None, row.rank[0] if row.rank else 0, value, row.name, row.options, row.label, row.results

    return sorted(done, key=order)


def sign(column: Column) -> int:
    """What a column is multiplied with so that lower is better."""
    return -1 if column.better == "higher" else 1


def _why_not(row: Row, column: Column) -> str | None:
    cell = row.cells.get(column.name, EMPTY)
    if cell.value is None:
        return f"no {column.name}"
    if column.better == "none":
        return f"{column.name} has no better direction"
    return f"{column.name} has no standard error" if cell.stderr is None else None


def beats(i: Row, j: Row, column: Column, items: AllItems) -> bool:
    """Whether i is better than j by more than 1.96 standard errors of the difference."""
    gain = sign(column) * (j.cells[column.name].value - i.cells[column.name].value)
    return gain > SIGNIFICANT * difference_stderr(i, j, column.name, items)


def difference_stderr(i: Row, j: Row, name: str, items: AllItems) -> float:
    """Standard error of the difference of two rows: paired where both are single runs scored on the same items.

    Averages over training seeds vary with the seeds, which pairing by item cannot see; they are treated as independent.
    """
    pair = [items.get(row.results[0], {}).get(name) if len(row.results) == 1 else None for row in (i, j)]
    if all(pair) and np.array_equal(pair[0].ids, pair[1].ids) and len(pair[0].ids) > 1:
        return float(np.std(pair[0].values - pair[1].values, ddof=1) / math.sqrt(len(pair[0].ids)))
    return math.hypot(i.cells[name].stderr, j.cells[name].stderr)


def frontier(rows: Sequence[Row], column: Column, name: str, items: AllItems) -> Frontier:
    """The rows that no other row beats at the same price or less.

    Args:
        name: of the cost; what costs nothing is the cheapest.
    """
    prices = [cost(row, column, name) for row in rows]
    drawn = [
        row.cells.get(column.name, EMPTY).value is not None and p is not None
        for row, p in zip(rows, prices, strict=True)
    ]
    rivals = [k for k, row in enumerate(rows) if drawn[k] and not row.barred and _why_not(row, column) is None]
    machines = {rows[k].hardware for k in rivals}

    def standing(k: int) -> str | None:
        if not drawn[k]:
            return None
        if k not in rivals:
            return "apart"
        cheaper = [rows[j] for j in rivals if j != k and prices[j] <= prices[k]]
        if any(beats(row, rows[k], column, items) for row in cheaper):
            return "dominated"
        value = sign(column) * rows[k].cells[column.name].value
        return "tied" if any(sign(column) * row.cells[column.name].value < value for row in cheaper) else "front"

    comparable = name != "training" or len(machines) <= 1
    return Frontier(column.name, name, tuple(standing(k) for k in range(len(rows))), comparable)
