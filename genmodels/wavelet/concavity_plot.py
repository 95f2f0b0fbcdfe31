"""Pictures of conditional energies: their smallest curvatures over fields by band, and the potentials found."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..registry import ConfigError
from .conditional import Conditional

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"
SPREAD = 30.0  # ratio of a large and a middling eigenvalue beyond which the axis is logarithmic on both sides of 0
COLUMNS = 4

Quantiles = Sequence[tuple[str, Tensor]]
"""Bands from coarse to fine, each with quantiles at equal steps (0, …, 1) of its smallest eigenvalue over fields."""


def write(folder: Path, conditionals: Sequence[Conditional]) -> list[Path]:
    """`concavity.png` and, of levels with potentials, `potentials.png`; nothing of a model that was not measured."""
    if any(c.minima.isnan().any() for c in conditionals):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    found = [(c.level.label, c.minima.cpu()) for c in conditionals]
    paths = [boxes(folder / "concavity.png", {"training fields": found})]
    curves = [(c.level.label, *curve) for c in conditionals if (curve := _potential(c)) is not None]
    return paths + ([potentials(folder / "potentials.png", curves)] if curves else [])


def boxes(path: Path, groups: Mapping[str, Quantiles]) -> Path:
    """The distribution of the smallest eigenvalue by band: boxes of quartiles, whiskers at 5 % and 95 %, dots at every
    quantile given.

    Args:
        path: .png, .pdf or .svg.
        groups: by what the fields are, drawn beside each other.
    Raises:
        ConfigError: of another kind of file.
    """
    check_suffix(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "genmodels", "pdf.fonttype": 42}):
        rows = max(map(len, groups.values()))
        figure = Figure(figsize=(6.4, 1.4 + 0.34 * rows * len(groups)), layout="constrained")
        axes = figure.add_subplot()
        height = 0.7 / len(groups)
        for k, (colour, of) in enumerate(zip((BLUE, ORANGE), groups.values(), strict=False)):
            places = torch.arange(len(of)) + (k - (len(groups) - 1) / 2) * height
            _boxes(axes, of, places.tolist(), 0.8 * height, colour)
        _dress(axes, groups)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    return path


def check_suffix(path: Path) -> None:
    """Raises ConfigError unless a picture can be written there."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--out: a .png, .pdf or .svg is written, found '{path}'.")


def _boxes(axes: Any, of: Quantiles, places: list[float], height: float, colour: str) -> None:
    names = ("whislo", "q1", "med", "q3", "whishi")
    stats = []
    for _, quantiles in of:
        at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
        stats.append({**dict(zip(names, quantiles.double().quantile(at).tolist(), strict=True)), "fliers": []})
    line = {"color": colour, "linewidth": 1.1}
    axes.bxp(
        stats, positions=places, widths=height, orientation="horizontal", showfliers=False, manage_ticks=False,
        boxprops=line, whiskerprops=line, capprops=line, medianprops={**line, "linewidth": 2.2},
    )  # fmt: skip
    for place, (_, quantiles) in zip(places, of, strict=True):
        axes.plot(quantiles, [place] * len(quantiles), ".", color=colour, markersize=3, alpha=0.5)


def _dress(axes: Any, groups: Mapping[str, Quantiles]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    values = torch.cat([quantiles for of in groups.values() for _, quantiles in of]).abs()
    middle = float(values.median())
    if middle > 0 and float(values.max()) > SPREAD * middle:
        axes.set_xscale("symlog", linthresh=10.0 ** math.ceil(math.log10(middle)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    first = next(iter(groups.values()))
    axes.set_yticks(range(len(first)), [label for label, _ in first])
    axes.set_ylim(-0.6, len(first) - 0.4)
    low, high = axes.get_xlim()
    low, high = min(low, -0.05 * high), max(high, -0.05 * low)
    axes.axvspan(low, 0, color=ORANGE, alpha=0.08, linewidth=0)
    axes.axvline(0, color="black", linewidth=1.0)
    axes.set_xlim(low, high)
    axes.set_xlabel("smallest eigenvalue of the conditional Hessian [1/σ²]; not convex left of 0")
    axes.grid(True, axis="x", linewidth=0.5, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        handles = [Line2D([], [], color=c, label=name) for c, name in zip((BLUE, ORANGE), groups, strict=False)]
        axes.figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)


def potentials(path: Path, curves: Sequence[tuple[str, Tensor, Tensor]]) -> Path:
    """A panel for each level: its potential v(u) less the least value, over the range of the training data.

    Args:
        curves: label, u and v of each.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(2.3 * columns + 0.4, 1.9 * rows + 0.3), layout="constrained")
        for place, (label, u, v) in enumerate(curves, 1):
            axes = figure.add_subplot(rows, columns, place)
            axes.plot(u, v - v.min(), color=BLUE, linewidth=1.4)
            axes.set_title(label, fontsize=9.5, loc="left")
            axes.grid(True, linewidth=0.5, color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
        figure.supxlabel("u = y/σ", fontsize=9)
        figure.supylabel("potential v(u) [nats]", fontsize=9)
        figure.savefig(path, dpi=160)
    return path


def _potential(conditional: Conditional) -> tuple[Tensor, Tensor] | None:
    """u and v of the sum of the level's potentials of single pixels; None if it has none."""
    pointwise = [(term, theta) for term, theta in conditional.parts() if hasattr(term, "shape")]
    if not pointwise:
        return None
    low, high = pointwise[0][0].interval.tolist()
    u = torch.linspace(low, high, 401, dtype=torch.float64, device=conditional.theta.device)
    return u.cpu(), sum(term.shape(theta, u)[0] for term, theta in pointwise).cpu()
