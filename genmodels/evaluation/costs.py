"""The cost columns of a leaderboard: name, heading, unit, and where a row keeps them."""

from collections.abc import Callable
from dataclasses import dataclass

from .board import EMPTY, Bill, Board, Column, Quoted, Row
from .tables import MISSING, mebibytes, scaled, short


@dataclass(frozen=True)
class Cost:
    """One cost; `text` writes a value of it."""

    name: str
    heading: str
    unit: str
    text: Callable[[float], str]


def _two_digits(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


COSTS = (
    Cost("nfe", "NFE", "evaluations per item", short),
    Cost("seconds_per_item", "s/item", "seconds per item", _two_digits),
    Cost("flops_per_item", "FLOPs/item", "operations per item", scaled),
    Cost("parameters", "parameters", "parameters", short),
    Cost("samples_seen", "samples seen", "items", short),
    Cost("training", "training s × devices", "device seconds", _whole),
    Cost("peak_memory", "peak memory", "bytes", mebibytes),
)
BY_NAME = {cost.name: cost for cost in COSTS}


def bill(row: Row, column: Column) -> Bill:
    """What the answers cost that a column's estimate was made from."""
    question = row.cells.get(column.name, EMPTY).question or column.question
    return row.bills.get(question, Bill())


def cost(row: Row | Quoted, column: Column | None, name: str) -> float | None:
    """A cost of a row; those of answers are of the question that feeds the column. No cost: a value of that name."""
    if name not in BY_NAME:
        return row.cells.get(name, EMPTY).value
    if hasattr(row, name):
        return getattr(row, name)
    if isinstance(row, Quoted) or column is None:
        return None
    return getattr(bill(row, column), name)


def named(name: str) -> Cost:
    """The cost of that name, or a column in the place of one."""
    return BY_NAME.get(name) or Cost(name, name.replace("_", " "), "", short)


def shown(board: Board) -> list[Cost]:
    """Costs that some row of a board has."""
    rows = (*board.rows, *board.quoted)
    return [c for c in COSTS if any(cost(row, board.first, c.name) is not None for row in rows)]


def write(value: float | None, of: Cost) -> str:
    """A cost as text."""
    return MISSING if value is None else of.text(value)
