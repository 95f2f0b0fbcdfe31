"""Leaderboards as one HTML file that needs no network, no server and, to be read, no script."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .board import EMPTY, Board, Cell, Column, Quoted, Row
from .costs import Cost, cost, shown, write
from .drawing import interval_axis, intervals, scatter
from .exports import as_csv, wide_csv
from .markdown import commit, places
from .provenance import provenance
from .results import Result
from .tables import FAILED, MISSING, SYMBOLS, arrow, show

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
LARGEST = 200_000  # bytes of a picture that is put into the page
KINDS = {  # what the symbol before a likelihood means, in the order of what it certifies
    "exact": ("=", "exact"),
    "bound": ("≤", "upper bound"),
    "numerical": ("≈", "up to a solver’s tolerance"),
    "stochastic": ("~", "stochastic estimate"),
}


def page(boards: Sequence[Board], results: Mapping[str, Result], grids: Mapping[str, bytes | None]) -> str:
    """The page; a pure function of its arguments.

    Args:
        results: by id.
        grids: PNG of drawn items by the id of their result.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    views = [_view(board, results, grids) for board in boards]
    files = {"leaderboard.csv": as_csv(boards)} | {
        view["file"]: wide_csv(b) for view, b in zip(views, boards, strict=True)
    }
    return environment.get_template("page.html.jinja").render(
        boards=views,
        kinds=KINDS,
        css=_text("page.css"),
        js=_text("page.js"),
        data=_safe({"files": files}),
    )


def _code(words: str) -> "Markup":
    """Text whose `marked` parts are code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(words))))


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _safe(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, sort_keys=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def identity(board: Board) -> str:
    """What a board is called in addresses: letters, digits, hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{board.protocol}-{board.hash[:6]}").strip("-")


def _view(board: Board, results: Mapping[str, Result], grids: Mapping[str, bytes | None]) -> dict[str, Any]:
    """What the template needs of one board."""
    key = identity(board)
    plots = [scatter(board, frontier, f"{key}-p{k}") for k, frontier in enumerate(board.frontiers)]
    drawn = [(plot, frontier) for plot, frontier in zip(plots, board.frontiers, strict=True) if plot]
    rows = [_line(board, row, k) for k, row in enumerate((*board.rows, *board.quoted))]
    return {
        "id": key,
        "file": f"{key}.csv",
        "board": board,
        "headers": _headers(board),
        "rows": rows,
        "kinds": [kind for kind in (*KINDS, "none") if any(kind in row["kinds"] for row in rows)],
        "plots": drawn,
        "incomparable": any(not frontier.comparable for _, frontier in drawn),
        "grids": [grid for row in board.rows if (grid := _grid(row, results, grids))],
        "references": _references(board),
        "provenance": [provenance(row, [results[i] for i in row.results]) for row in board.rows],
        "glossary": [_meaning(column, board, results) for column in board.measured()],
    }


# ---- the table ---------------------------------------------------------------------------------------------------


def _headers(board: Board) -> list[dict[str, Any]]:
    """Columns in order: key, text, whether they are numbers, which way they are sorted first."""
    found = [_header("rank", "rank", "number", "places that the uncertainty allows"), _header("row", "run", "text", "")]
    for k, column in enumerate(board.measured()):
        unit = "" if column.unit == "1" else column.unit
        text = f"{column.name.replace('_', ' ')}{arrow(column.better)}"
        found.append(_header(column.name, text, "number", unit, column.better == "higher"))
        if k == 0 and column == board.first:
            axis = interval_axis(board)
            scale = " (log scale)" if axis and axis.log else ""
            tip = f"1.96 standard errors to both sides{scale}"
            found.append(_header("interval", f"95 % interval{scale}", "none", tip))
    found += [_header(c.name, c.heading, "number", c.unit) for c in shown(board)]
    return [*found, _header("weights", "weights", "text", ""), _header("commit", "commit", "text", "")]


def _header(key: str, text: str, sort: str, tip: str, down: bool = False) -> dict[str, Any]:
    return {"key": key, "text": text, "sort": sort, "tip": tip, "down": down}


def _line(board: Board, row: Row | Quoted, number: int) -> dict[str, Any]:
    """One row of the table: cells with what is shown and what is sorted by."""
    measured = isinstance(row, Row)
    cells = [_cell("rank", places(row) if measured else MISSING, number if measured and row.rank else None)]
    for k, column in enumerate(board.measured()):
        cells.append(_value(column, row.cells.get(column.name, EMPTY)))
        if k == 0 and column == board.first:
            cells.append(_cell("interval", intervals(board)[number] if measured else "", None))
    cells += [_priced(c, cost(row, board.first, c.name)) for c in shown(board)]
    for key, text in (
        (("weights", row.weights), ("commit", commit(row))) if measured else (("weights", ""), ("commit", ""))
    ):
        cells.append(_cell(key, text or MISSING, text or None))
    label = row.label if measured else row.name
    words = [label, row.model, row.weights, row.unranked or ""] if measured else [label, row.source, row.note, "quoted"]
    return {
        "number": number,
        "label": label,
        "row": row,
        "measured": measured,
        "step": measured and (number == 0 or row.rank is None or row.rank[0] != board.rows[number - 1].rank[0]),
        "kinds": sorted({_kind(cell.kind) for cell in row.cells.values()} - {""}) or ["none"],
        "words": " ".join(words).lower(),
        "cells": cells,
    }


def _kind(kind: str) -> str:
    """The kind by its symbol: a mass and a density that are known exactly have one."""
    return "exact" if kind == "pmf" else kind if kind in KINDS else ""


def _cell(key: str, text: str, value: float | str | None, kind: str = "", spread: str = "") -> dict[str, Any]:
    return {"key": key, "text": text, "value": value, "kind": kind, "spread": spread}


def _value(column: Column, cell: Cell) -> dict[str, Any]:
    text, _, spread = (FAILED if cell.failed else show(cell.value, cell.stderr)).partition(" ± ")
    symbol = SYMBOLS.get(cell.kind, "= " if cell.kind == "exact" else "").strip()
    return _cell(column.name, text, cell.value, symbol if cell.value is not None else "", spread)


def _priced(of: Cost, value: float | None) -> dict[str, Any]:
    return _cell(of.name, write(value, of), value)


# ---- beside the table --------------------------------------------------------------------------------------------


def _grid(row: Row, results: Mapping[str, Result], grids: Mapping[str, bytes | None]) -> dict[str, Any] | None:
    """The picture of a row, or why it is left out; None if there is none."""
    data = grids.get(row.results[0])
    if data is None:
        return None
    size = f"{len(data) / 1000:,.0f} kB"
    uri = None if len(data) > LARGEST else f"data:image/png;base64,{base64.b64encode(data).decode()}"
    drawn = results[row.results[0]]["protocol"]["name"]
    alt = f"The first items drawn by {row.label} under the protocol {drawn}, in a grid"
    return {"label": row.label, "rank": places(row), "uri": uri, "alt": alt, "size": size}


def _references(board: Board) -> dict[str, Any]:
    """Values to read the columns against."""
    columns = [c for c in board.measured() if any(c.name in of for of in board.references.values())]
    names = [name for name, of in board.references.items() if any(c.name in of for c in columns)]
    return {
        "headers": [c.name.replace("_", " ") for c in columns],
        "rows": [(name, [show(board.references[name].get(c.name)) for c in columns]) for name in names],
    }


def _meaning(column: Column, board: Board, results: Mapping[str, Result]) -> dict[str, Any]:
    """What a column says, and how its numbers were made."""
    own = [m for row in board.rows for i in row.results for m in results[i]["metrics"] if m["name"] == column.name]
    better = {"none": "neither way is better"}.get(column.better, f"{column.better} is better")
    return {
        "name": column.name,
        "unit": "" if column.unit == "1" else column.unit,
        "better": better,
        "question": ", ".join(dict.fromkeys(m["question"] for m in own)) or column.question,
        "sizes": ", ".join(f"{n:,}" for n in sorted({m["n"] for m in own})),
        "detail": "; ".join(sorted({m["detail"] for m in own if m["detail"]})),
    }
