"""Training curves of runs beside each other: one panel a quantity, one line a run."""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..registry import ConfigError
from ..schema import near
from .run import Run

DEFAULT = ("train/loss", "val/loss")
STDERR = "_stderr"  # a quantity logged as <key> and <key>_stderr is drawn with a band of one standard error
# The seven colours of Okabe and Ito that are dark enough for lines on white; told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
AXES = {"step": "optimiser steps", "seconds": "training time [s]", "samples": "training items seen"}
FEW = 12  # points up to which each is marked

Axis = Literal["step", "seconds", "samples"]
Curve = dict[str, np.ndarray]


def curves(
    runs: Sequence[Run],
    path: Path,
    keys: Sequence[str] | None = None,
    *,
    x: Axis = "step",
    window: float = 0,
    log: bool = False,
) -> Path:
    """Draw what runs logged, and write it as .png, .pdf or .svg.

    Args:
        keys: quantities of metrics.jsonl, a panel each; None for the losses.
        x: the horizontal axis.
        window: steps over which a moving mean is taken, with the values faint behind it; 0 for the values alone.
        log: logarithmic vertical axes.
    Raises:
        ConfigError: if a run has no metrics yet, or no run logged a key; if a value cannot be shown on a log scale; if
            the kind of file is not known.
    """
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--out: a .png, .pdf or .svg is written, found '{path}'.")
    if window < 0:
        raise ConfigError(f"--smooth: a number of steps of at least 0 is needed, found {window:g}.")
    logged = {label: _metrics(run) for label, run in zip(labels(runs), runs, strict=True)}
    panels = {key: {name: curve(lines, key) for name, lines in logged.items()} for key in _chosen(keys, logged)}
    if log:
        _check_positive(panels)
    import matplotlib

    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "genmodels", "pdf.fonttype": 42}):
        figure = _draw(panels, list(logged), x, window, log)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
    return path


def labels(runs: Sequence[Run]) -> list[str]:
    """The names of runs; the paths of those that share theirs."""
    often = Counter(run.name for run in runs)
    found = [run.name if often[run.name] == 1 else str(run.path) for run in runs]
    twice = next((name for name, times in Counter(found).items() if times > 1), None)
    if twice:
        raise ConfigError(f"{twice} is given twice.")
    return found


def _metrics(run: Run) -> list[dict[str, Any]]:
    lines = run.metrics()
    if not lines:
        raise ConfigError(f"{run.path} has no metrics yet. Train it: python train.py {run.path}/config.yaml")
    return lines


def _chosen(keys: Sequence[str] | None, logged: dict[str, list[dict[str, Any]]]) -> list[str]:
    known = {key for lines in logged.values() for line in lines for key in line if key not in AXES}
    known = {key for key in known if not key.endswith(STDERR)}
    if keys is None:
        keys = [key for key in DEFAULT if key in known] or sorted(known)
    for key in keys:
        if key not in known:
            hint = near(key, known)
            raise ConfigError(
                f"--keys: no run has logged '{key}'.{hint} Logged: {', '.join(sorted(known)) or 'nothing'}."
            )
    return list(dict.fromkeys(keys))


def curve(lines: list[dict[str, Any]], key: str) -> Curve:
    """The lines that have a quantity, as arrays: step, seconds, samples, value, stderr; null becomes NaN."""
    rows = [line for line in lines if key in line]
    columns = {axis: axis for axis in AXES} | {"value": key, "stderr": key + STDERR}
    return {name: np.array([row.get(column) for row in rows], dtype=float) for name, column in columns.items()}


def smooth(curve: Curve, window: float) -> Curve:
    """Moving means over a window of steps, centred, and narrowed at the ends so that no side outweighs the other.

    m_i = mean of v_j with |s_j - s_i| <= min(window / 2, s_i - s_0, s_n - s_i); standard errors as of independent
    values. Those that are not finite are left out.
    """
    s, v, e = (curve[name] for name in ("step", "value", "stderr"))
    good = np.isfinite(v)
    half = np.minimum(window / 2, np.minimum(s - s[:1], s[-1:] - s))
    first, last = np.searchsorted(s, s - half, "left"), np.searchsorted(s, s + half, "right")

    def total(of: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(of)])
        return sums[last] - sums[first]

    n = total(good.astype(float))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total(np.where(good, v, 0.0)) / n
        error = np.sqrt(total(np.where(good, np.square(e), 0.0))) / n
    return curve | {"value": mean, "stderr": error}


def _check_positive(panels: dict[str, dict[str, Curve]]) -> None:
    for key, of in panels.items():
        for name, one in of.items():
            if (one["value"] <= 0).any():
                raise ConfigError(
                    f"--log: {key} of {name} has values that are not above 0 (down to {np.nanmin(one['value']):.4g}); "
                    "draw it without --log."
                )


def _draw(panels: dict[str, dict[str, Curve]], names: list[str], x: Axis, window: float, log: bool) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    banded = any(np.isfinite(one["stderr"]).any() for of in panels.values() for one in of.values())
    notes = [f"means over {window:g} steps"] * bool(window) + ["bands: ±1 standard error"] * banded
    beside = 0.6 + 0.075 * max(map(len, [*names, *notes]))  # inches that the legend needs at this size of type
    figure = Figure(
        figsize=(3.9 * columns + beside, max(2.9 * rows, 0.215 * (len(names) + len(notes)) + 0.3)), layout="constrained"
    )
    looks = [{"color": colour, "linestyle": style} for style, colour in product(STYLES, COLOURS)]
    look = {name: looks[k % len(looks)] for k, name in enumerate(names)}
    end = max((one[x].max() for of in panels.values() for one in of.values() if len(one[x])), default=1.0)
    for place, (key, of) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for name, one in of.items():
            _line(axes, one, x, window, look[name])
        _dress(axes, key, x, log)
        axes.set_xlim(-0.02 * end, 1.02 * end or 1.0)
    handles = [Line2D([], [], label=name, linewidth=1.6, **look[name]) for name in names]
    figure.legend(
        handles=handles,
        loc="outside right upper",
        frameon=False,
        title="\n".join(notes) or None,
        alignment="left",
        handlelength=2.4,
    )
    return figure


def _line(axes: Any, one: Curve, x: Axis, window: float, look: dict[str, Any]) -> None:
    mean = smooth(one, window) if window and len(one["value"]) else one
    across, value, error = one[x], mean["value"], mean["stderr"]
    dots = {"marker": "o", "markersize": 3} if len(value) <= FEW else {}
    if window:
        axes.plot(across, one["value"], color=look["color"], linewidth=0.6, alpha=0.3)
    axes.plot(across, value, linewidth=1.4, **look, **dots)
    if np.isfinite(error).any():
        axes.fill_between(across, value - error, value + error, color=look["color"], alpha=0.18, linewidth=0)


def _dress(axes: Any, key: str, x: Axis, log: bool) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

    if log:
        axes.set_yscale("log", nonpositive="clip")
        low, high = axes.get_ylim()
        if high < 10 * low:  # powers of ten would leave it without marks
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.set_xlabel(AXES[x])
    axes.set_title(key, fontsize=9.5, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, linewidth=0.5, color="0.9")
    axes.set_axisbelow(True)
