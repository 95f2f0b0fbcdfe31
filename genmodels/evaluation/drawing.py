"""Drawings of a leaderboard as SVG with the same bytes everywhere: quality against cost, and intervals.

Colours and fonts are those of the page (classes); positions are rounded to a tenth of a unit.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from .axis import Axis, fit, labels
from .board import EMPTY, Board, Column, Frontier
from .costs import BY_NAME, cost, named, write
from .ranking import SIGNIFICANT, sign
from .tables import arrow, show

WIDTH, HEIGHT = 380, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 368, 12, 228
LETTER, LINE = 6.2, 12  # size of a letter of a label, roughly
LONGEST = 22  # letters of a label
CROWDED = 0.08  # share of a label that may cover something else, unless it is on the front
QUOTED = "quoted"
ORDER = ("front", "tied", "dominated", QUOTED, "apart")  # of labels: who finds the best place
INTERVAL = 110  # width of the drawing of an interval


@dataclass(frozen=True)
class Point:
    """One row in a drawing; `standing` as in `Frontier`, or "quoted"."""

    row: int
    label: str
    standing: str
    price: float
    value: float
    spread: float
    told: str


def scatter(board: Board, frontier: Frontier, identity: str) -> Markup | None:
    """Quality against the logarithm of a cost, or against another column, with 95 % intervals; None if less than two
    rows can be drawn.

    What is free stands before all others, behind a gap in the axis; if all is, there is nothing to draw.


    Args:
        identity: what the names of its parts begin with, unique on the page.
    """
    column = next(c for c in board.columns if c.name == frontier.metric)
    points = _points(board, frontier, column)
    if sum(point.standing != QUOTED for point in points) < 2 or not any(point.price for point in points):
        return None
    x = fit([p.price for p in points], LEFT, RIGHT, log=frontier.cost in BY_NAME or None, margin=0.08)
    ends = [p.value + s * p.spread for p in points for s in (-1, 1)]
    positive = [e for e, p in zip(ends, [p for p in points for _ in (0, 1)], strict=True) if p.value > 0 and e > 0]
    y = fit(positive if len(positive) == len(ends) else ends, BOTTOM, TOP, log=scale(column))
    heading = _heading(board, frontier.cost)
    name = f"{column.name.replace('_', ' ')} against {heading}"
    front = [p for p in points if p.standing == "front"] if frontier.comparable else []
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{identity}-t {identity}-d">',
        Markup('<title id="{}-t">{}</title>').format(identity, name),
        Markup('<desc id="{}-d">{}</desc>').format(identity, _told(front, points, frontier.comparable)),
        _grid(x, y, f"{column.name.replace('_', ' ')}{arrow(column.better)}", heading),
        _front(front, x, y, sign(column)),
        *(_mark(p, x, y, frontier.comparable) for p in points),
        *_labels(points, x, y),
        "</svg>",
    ]
    return Markup("".join(parts))


def _heading(board: Board, name: str) -> str:
    """What stands at the axis of a cost, or of a column in its place."""
    column = next((c for c in board.columns if name not in BY_NAME and c.name == name), None)
    return named(name).heading + (arrow(column.better) if column else "")


def _points(board: Board, frontier: Frontier, column: Column) -> list[Point]:
    found = []
    rows = [(row, row.label, s) for row, s in zip(board.rows, frontier.standing, strict=True) if s is not None]
    rows += [(row, row.name, QUOTED) for row in board.quoted]
    for row, label, standing in rows:
        cell, price = row.cells.get(column.name, EMPTY), cost(row, column, frontier.cost)
        if cell.value is None or price is None:
            continue
        told = f"{label}: {show(cell.value, cell.stderr, cell.kind)} at {write(price, named(frontier.cost))}"
        number = board.rows.index(row) if standing != QUOTED else len(board.rows) + board.quoted.index(row)
        found.append(Point(number, label, standing, price, cell.value, SIGNIFICANT * (cell.stderr or 0), told))
    if len({row.name for row in board.rows}) > 1 or board.quoted:
        return found
    return [replace(p, label=name) for p, name in zip(found, distinct([p.label for p in found]), strict=True)]


def distinct(labels: Sequence[str]) -> list[str]:
    """Labels of one run by their options, without the path, and without those that a component's name implies.

    >>> distinct(["run", "run e.m.name=heun e.m.n=2 e.m.k=[1, 2]", "run e.m.name=heun e.m.n=3 e.m.k=[1, 2]"])
    ['run', 'heun n=2', 'heun n=3']
    """
    options = [dict(re.findall(r"(\S+)=(.*?)(?= \S+=|$)", label)) for label in labels]

    def implied(own: dict[str, str], key: str) -> bool:
        names = [(k, v) for k, v in own.items() if k.endswith(".name") and k != key]
        return any(all(o.get(key) == own[key] for o in options if o.get(k) == v) for k, v in names)

    found = []
    for label, own in zip(labels, options, strict=True):
        kept = {key.rpartition(".")[2]: value for key, value in own.items() if not implied(own, key)}
        found.append(" ".join(v if k == "name" else f"{k}={v}" for k, v in kept.items()) or label)
    return found if len(set(found)) == len(set(labels)) else list(labels)


def _told(front: Sequence[Point], points: Sequence[Point], comparable: bool) -> str:
    """What the drawing shows, in words."""
    every = "; ".join(point.told for point in points)
    if not comparable:
        return f"Measured on different machines, so there is no front. {every}."
    return f"On the front: {', '.join(point.label for point in front) or 'none'}. {every}."


def _grid(x: Axis, y: Axis, up: str, along: str) -> str:
    parts = ['<g class="axis" aria-hidden="true">']
    for value, text in zip(y.ticks(), labels(y.ticks()), strict=True):
        at = f"{y(value):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{text}</text>')
    for value, text in zip(x.ticks(), labels(x.ticks()), strict=True):
        at = f"{x(value):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        parts.append(f'<text x="{at}" y="{BOTTOM + 16}" text-anchor="middle">{text}</text>')
    pieces = [(LEFT, RIGHT)] if x.zero is None else [(LEFT, 2 * x.zero - LEFT), (x.start, RIGHT)]  # a gap after 0
    for left, right in pieces:
        parts.append(f'<line class="base" x1="{left:.1f}" x2="{right:.1f}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    middle, centre = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    parts.append(f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(along)}</text>')
    turn = f'transform="rotate(-90 12 {centre:.0f})"'
    parts.append(f'<text class="name" x="12" y="{centre:.0f}" text-anchor="middle" {turn}>{escape(up)}</text></g>')
    return "".join(parts)


def _front(front: Sequence[Point], x: Axis, y: Axis, way: int) -> str:
    """The stairs below which nothing was measured: at each price the best value so far."""
    if not front:
        return ""
    steps = sorted(front, key=lambda p: (p.price, way * p.value))
    path = f"M{x(steps[0].price):.1f} {y(steps[0].value):.1f}"
    path += "".join(f"H{x(p.price):.1f}V{y(p.value):.1f}" for p in steps[1:])
    return f'<path class="stairs" d="{path}H{RIGHT}"/>'


def _mark(point: Point, x: Axis, y: Axis, comparable: bool) -> Markup:
    at, height = x(point.price), y(point.value)
    standing = point.standing if comparable or point.standing in ("apart", QUOTED) else "alone"
    bar = ""
    if point.spread:
        ends = f'y1="{y(point.value - point.spread):.1f}" y2="{y(point.value + point.spread):.1f}"'
        bar = f'<line x1="{at:.1f}" x2="{at:.1f}" {ends}/>'
    shapes: dict[str, Callable[[], str]] = {
        "apart": lambda: f'<path d="M{at - 3.5:.1f} {height - 3.5:.1f}l7 7m0 -7l-7 7"/>',
        QUOTED: lambda: f'<path d="M{at:.1f} {height - 5:.1f}l5 5l-5 5l-5 -5z"/>',
    }
    shape = shapes.get(standing, lambda: f'<circle cx="{at:.1f}" cy="{height:.1f}" r="4"/>')()
    head = Markup('<g class="point {}" data-row="{}"><title>{}</title>').format(standing, point.row, point.told)
    return head + Markup(f"{bar}{shape}</g>")


Box = tuple[float, float, float, float]


def _labels(points: Sequence[Point], x: Axis, y: Axis) -> list[Markup]:
    """Each point's name at the side where it covers least; where all are crowded, only those on the front have one,
    and none that would lie on another."""
    taken: list[Box] = [_box(x(p.price) - 5, y(p.value) - 5, 10, 10) for p in points]
    for p in points:
        top, bottom = sorted((y(p.value - p.spread), y(p.value + p.spread)))
        taken.append(_box(x(p.price) - 1, top, 2, bottom - top))
    found, names = [], []
    for point in sorted(points, key=lambda p: (ORDER.index(p.standing), p.price, p.row)):
        text, at, height = _short(point.label), x(point.price), y(point.value)
        long = LETTER * len(text)
        sides = [(at + dx, height + dy) for dy in (-6, 6, -15, 15) for dx in (8, -8 - long, -long / 2)]
        boxes = [_box(left, middle - LINE / 2, long, LINE) for left, middle in sides]
        covered = [round(_covered(box, taken) / (long * LINE), 4) for box in boxes]
        best = min(range(len(boxes)), key=lambda k: (covered[k], k))
        on_another = any(_common(boxes[best], name) > CROWDED * long * LINE for name in names)
        if on_another or (covered[best] > CROWDED and point.standing != "front"):
            continue
        taken.append(boxes[best])
        names.append(boxes[best])
        left, top = boxes[best][:2]
        form = Markup('<text class="label {}" data-row="{}" x="{}" y="{}">{}</text>')
        found.append(form.format(point.standing, point.row, f"{left:.1f}", f"{top + 9.5:.1f}", text))
    return found


def _short(label: str) -> str:
    """Both ends of a long name: where names differ, they mostly do there.

    >>> _short("digits-flow_matching sample.num_steps=10")
    'digits-flow…um_steps=10'
    """
    half = LONGEST // 2
    return label if len(label) <= LONGEST else f"{label[:half]}…{label[-half:]}"


def _box(left: float, top: float, width: float, height: float) -> Box:
    return left, top, left + width, top + height


def _covered(box: Box, taken: Sequence[Box]) -> float:
    """Area that a box shares with others, and three times what lies outside the drawing."""
    shared = sum(_common(box, other) for other in taken)
    inside = _common(box, (LEFT + 2, 2, WIDTH - 2, BOTTOM - 2))
    return shared + 3 * ((box[2] - box[0]) * (box[3] - box[1]) - inside)


def _common(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def intervals(board: Board) -> list[Markup]:
    """For each measured row the 95 % interval of the metric that ranks, all on one scale; empty where it is missing."""
    axis, cells = interval_axis(board), [row.cells.get(board.columns[0].name, EMPTY) for row in board.rows]
    return [
        Markup()
        if axis is None or cell.value is None
        else _interval(axis, cell.value, SIGNIFICANT * (cell.stderr or 0), "" if row.rank else " apart")
        for row, cell in zip(board.rows, cells, strict=True)
    ]


def interval_axis(board: Board) -> Axis | None:
    """The scale of all intervals; None if there are none."""
    cells = [row.cells.get(board.columns[0].name, EMPTY) for row in board.rows]
    ends = [c.value + s * SIGNIFICANT * (c.stderr or 0) for c in cells if c.value is not None for s in (-1, 1)]
    return fit(ends, 4, INTERVAL - 4, log=scale(board.columns[0])) if ends else None


def scale(column: Column) -> bool | None:
    """Whether its axis is logarithmic: shares are not, for others their values decide."""
    return False if column.unit == "share" else None


def _interval(axis: Axis, value: float, spread: float, apart: str) -> Markup:
    ends = f'x1="{axis(value - spread):.1f}" x2="{axis(value + spread):.1f}"' if spread else 'x1="0" x2="0"'
    return Markup(
        f'<svg class="interval{apart}" viewBox="0 0 {INTERVAL} 16" width="{INTERVAL}" height="16" aria-hidden="true">'
        f'<line class="base" x1="0" x2="{INTERVAL}" y1="8" y2="8"/><line {ends} y1="8" y2="8"/>'
        f'<circle cx="{axis(value):.1f}" cy="8" r="3"/></svg>'
    )
