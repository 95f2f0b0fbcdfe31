"""What a leaderboard consists of, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass

from .results import Items

AllItems = Mapping[str, Mapping[str, Items]]  # per-item values of estimates, by the id of their result


@dataclass(frozen=True)
class Cell:
    """One estimate of one row; value None if it is missing or failed.

    Attributes:
        question: whose answers it was made from.
        failed: whether it was measured, but is not finite or was made from answers that are not.
    """

    value: float | None = None
    stderr: float | None = None
    kind: str = ""
    question: str = ""
    failed: bool = False

    @property
    def told(self) -> bool:
        """Whether there is something to show."""
        return self.failed or self.value is not None


EMPTY = Cell()


@dataclass(frozen=True)
class Bill:
    """What the answer to one question costs per item; None where it was not measured.

    Attributes:
        flops_per_item: two for a multiply-add.
        peak_memory: bytes.
    """

    nfe: float | None = None
    seconds_per_item: float | None = None
    flops_per_item: float | None = None
    peak_memory: float | None = None


@dataclass(frozen=True)
class Row:
    """One configuration, weights, step and sampling options; training seeds are averaged.

    Attributes:
        label: what sets the row apart from all others of its board.
        bills: by question.
        training: seconds x devices.
        hardware: that it was trained on.
        barred: why it may take part in no comparison.
        rank: first and last place that the uncertainty allows; None if unranked.
        unranked: why it has no rank.
    """

    label: str
    name: str
    options: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    model: str
    config_hash: str
    weights: str
    step: int
    samples_seen: int
    parameters: int
    training: float | None
    hardware: str
    cells: dict[str, Cell]
    bills: dict[str, Bill]
    commit: str | None
    dirty: bool
    results: tuple[str, ...]
    barred: str | None = None
    rank: tuple[int, int] | None = None
    unranked: str | None = None


@dataclass(frozen=True)
class Quoted:
    """A row of figures that somebody else reports; it takes part in no comparison.

    Attributes:
        source: where they stand.
    """

    name: str
    source: str
    cells: dict[str, Cell]
    nfe: float | None = None
    parameters: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Column:
    """One estimate; `question` is the one that most often feeds it."""

    name: str
    unit: str
    better: str
    question: str


@dataclass(frozen=True)
class Frontier:
    """Which rows are worth their price in one metric and one cost.

    Attributes:
        metric: name of a column.
        cost: name of a cost, or of another column of which less is better.
        standing: for each row of the board "front" (no row is as cheap and better), "tied" (some are, but none by more
            than the uncertainty), "dominated", "apart" (drawn without taking part), or None (a value is missing).
        comparable: False if the cost was paid on different machines, so that there is no front.
    """

    metric: str
    cost: str
    standing: tuple[str | None, ...]
    comparable: bool


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
    quoted: tuple[Quoted, ...] = ()
    frontiers: tuple[Frontier, ...] = ()

    @property
    def first(self) -> Column | None:
        """The column that comes first; None if nothing was measured."""
        return self.columns[0] if self.columns else None

    def measured(self) -> list[Column]:
        """Columns that have a value in some row, or failed there."""
        rows = (*self.rows, *self.quoted)
        return [c for c in self.columns if any(row.cells.get(c.name, EMPTY).told for row in rows)]
