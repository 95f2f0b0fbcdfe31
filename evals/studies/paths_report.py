"""The tables and the picture of `evals.studies.paths`: from its rows alone."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Pair = tuple[float, float]

PATHS = {
    "linear": "linear",
    "kinetic_optimal": "kinetic-optimal",
    "trigonometric": "trigonometric",
    "cosine": "cosine",
    "vp": "VP",
    "vp_eps": "VP, eps",
    "edm": "EDM",
}
SAMPLERS = {
    "euler": "Euler",
    "heun": "Heun",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_3m": "DPM++ 3M",
    "sde_2m": "DPM++ 2M SDE",
}
LABELS = {"free": "unconditional", "given": "class-conditional"}
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#8A8A8A",
    "#E69F00",
)  # told apart by the colour-blind
MARKERS = "os^Dvx*"
DISTANCES = (2, 5, 10, 20, 50, 100)  # marked on the axis of the picture


def mean(rows: Sequence[Row]) -> Pair:
    """Over the seeds of training; its error is that of drawing, or that over seeds where it is larger."""
    values, errors = [row["value"] for row in rows], [row["stderr"] for row in rows]
    n = len(values)
    middle = sum(values) / n
    of_drawing = math.sqrt(sum(e * e for e in errors)) / n
    if n == 1:
        return middle, of_drawing
    over_seeds = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1) / n)
    return middle, max(of_drawing, over_seeds)


def found(rows: Sequence[Row], **wanted: Any) -> Pair | None:
    """The mean of the rows with these facts, of drawing on the path of training unless `on` is given."""
    wanted = {"on": None, **wanted}
    fitting = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return mean(fitting) if fitting else None


def budgets(rows: Sequence[Row]) -> list[int]:
    return sorted({row["budget"] for row in rows if "budget" in row})


def paths(rows: Sequence[Row], **wanted: Any) -> list[str]:
    """In their order, those of which there are rows with these facts."""
    there = {row["path"] for row in rows if all(row.get(key) == value for key, value in wanted.items())}
    return [path for path in PATHS if path in there]


def best(rows: Sequence[Row], path: str, labels: str, budget: int) -> tuple[Pair, str] | None:
    """The least distance of a path at a budget, and by what sampler; of the first seed of training, which has all."""
    drawn = {
        sampler: found(rows, path=path, labels=labels, seed=0, sampler=sampler, budget=budget) for sampler in SAMPLERS
    }
    known = [(pair, sampler) for sampler, pair in drawn.items() if pair is not None]
    return min(known) if known else None


# ---- tables ----------------------------------------------------------------------------------------------------------


def shown(pair: Pair | None) -> str:
    """Value ± error, to the digits that the error leaves; nothing for nothing."""
    if pair is None:
        return ""
    value, error = pair
    if not error > 0 or not math.isfinite(error):
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{digits}f} ± {error:.{digits}f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    made = [f"| {' | '.join(head)} |", "|:---|" + "---:|" * (len(head) - 1)]
    return "\n".join(made + [f"| {' | '.join(line)} |" for line in lines]) + "\n"


def best_table(rows: Sequence[Row], labels: str) -> str:
    columns = budgets(rows)
    lines = []
    for path in paths(rows, labels=labels):
        winners = [best(rows, path, labels, budget) for budget in columns]
        cells = ["" if won is None else f"{shown(won[0])} ({SAMPLERS[won[1]]})" for won in winners]
        lines.append([PATHS[path], *cells])
    return markdown([f"{LABELS[labels]}: best FD ↓ at no more evaluations than", *map(str, columns)], lines)


def whole_table(rows: Sequence[Row], labels: str) -> str:
    columns, lines = budgets(rows), []
    for path in paths(rows, labels=labels):
        for sampler, title in SAMPLERS.items():
            pairs = [found(rows, path=path, labels=labels, sampler=sampler, budget=budget) for budget in columns]
            if any(pairs):
                lines.append([f"{PATHS[path]}, {title}", *map(shown, pairs)])
    return markdown([f"{LABELS[labels]}: FD ↓ at no more evaluations than", *map(str, columns)], lines)


def moved_table(rows: Sequence[Row]) -> str:
    columns, lines = budgets(rows), []
    for sampler in ("euler", "heun"):
        for other in (None, *PATHS):
            facts = {"path": "linear", "labels": "free", "seed": 0, "sampler": sampler, "on": other}
            pairs = [found(rows, budget=budget, **facts) for budget in columns]
            if any(pairs):
                lines.append([f"{PATHS[other or 'linear']}, {SAMPLERS[sampler]}", *map(shown, pairs)])
    return markdown(["one linear model, sampled on: FD ↓ at no more evaluations than", *map(str, columns)], lines)


def facts_table(rows: Sequence[Row], known: Sequence[Row]) -> str:
    """One row a path: what the runs of all seeds say of it."""
    head = ["path", "bits/dim ↓ (ODE)", "bits/dim ↓ (evidence bound)", "kinetic energy", "of conditional velocities"]
    head += ["of remembered items", "largest K per 1/1000 of time"]
    lines = []
    for labels, title in LABELS.items():
        for path in paths(known, labels=labels):
            runs = [run for run in known if (run["path"], run["labels"]) == (path, labels)]
            pairs = {key: mean([run[key] for run in runs]) for key in ("bits_per_dim", "kinetic_energy", "lipschitz")}
            exact = runs[0]["kinetic_energy"]["references"]
            energies = (exact.get(key) for key in ("conditional velocities", "remembered items"))
            bound = found(rows, path=path, labels=labels, sampler="bound")
            cells = [shown(pairs["bits_per_dim"]), shown(bound), shown(pairs["kinetic_energy"])]
            cells += ["" if value is None else f"{value:.4g}" for value in energies]
            lines.append([f"{PATHS[path]}, {title}", *cells, shown(pairs["lipschitz"])])
    return markdown(head, lines)


def text(rows: Sequence[Row], known: Sequence[Row]) -> str:
    """All tables, and what their figures are."""
    there = [labels for labels in LABELS if paths(rows, labels=labels)]
    references = known[0]["FD-digits"]["references"]
    beside = ", ".join(f"{name} {value:.3g}" for name, value in references.items())
    notes = (
        f"FD: Fréchet distance to the training images in features of a classifier ({beside}). ± is the standard error "
        "of drawing, or that over seeds of training where there are several and it is larger. The best of a row was "
        "chosen by the draws that it is told of, among the samplers of the first seed. Kinetic energies are per "
        "component and unit time, from the first time of each path (1e-5 for VP and cosine, whose conditional energy "
        "grows without end towards 0); that of EDM, whose noise has σ = 80, does not compare.\n"
    )
    parts = [best_table(rows, labels) for labels in there]
    parts += [facts_table(rows, known), moved_table(rows), *(whole_table(rows, labels) for labels in there), notes]
    return "\n".join(parts)


# ---- picture ---------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], known: Sequence[Row], path: Path) -> None:
    """FD against evaluations: samplers on the linear path, paths under two samplers, and one model on other paths."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9.6, 7.4), sharex=True, sharey=True, layout="constrained")
    (first, second), (third, fourth) = panels
    linear = {"path": "linear", "labels": "free", "seed": 0}
    _lines(first, rows, SAMPLERS, [{**linear, "sampler": sampler} for sampler in SAMPLERS])
    first.set_title("samplers, linear path", fontsize=10)
    for panel, sampler, how in ((second, "euler", "even steps of t"), (third, "dpmpp_2m", "the same noise levels")):
        _lines(panel, rows, PATHS, [{"path": name, "labels": "free", "sampler": sampler} for name in PATHS])
        panel.set_title(f"paths, {SAMPLERS[sampler]} ({how})", fontsize=10)
    _lines(fourth, rows, PATHS, [{**linear, "sampler": "euler", "on": None if p == "linear" else p} for p in PATHS])
    fourth.set_title("linear model on other paths, Euler", fontsize=10)
    columns = budgets(rows)
    test = known[0]["FD-digits"]["references"].get("test set")
    for panel in panels.flat:
        if test is not None:
            panel.axhline(test, color="0.6", lw=0.8, ls=(0, (4, 2)), zorder=0)
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(columns, map(str, columns))
        panel.set_xticks([], minor=True)
        panel.set_yticks(DISTANCES, [f"{distance:g}" for distance in DISTANCES])
        panel.set_yticks([], minor=True)
        panel.grid(alpha=0.3, lw=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8, ncol=2)
    if test is not None:
        first.annotate("test images", (columns[0], test), (0, 3), textcoords="offset points", fontsize=8, color="0.4")
    for panel in panels[1]:
        panel.set_xlabel("network evaluations, at most")
    for panel in panels[:, 0]:
        panel.set_ylabel("FD-digits")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(panel: Any, rows: Sequence[Row], names: dict[str, str], facts: Sequence[Row]) -> None:
    """A line with error bars for each name of which there are rows."""
    for k, ((_, title), wanted) in enumerate(zip(names.items(), facts, strict=True)):
        points = [(budget, found(rows, budget=budget, **wanted)) for budget in budgets(rows)]
        points = [(budget, pair) for budget, pair in points if pair is not None]
        if points:
            x, pairs = zip(*points, strict=True)
            y, errors = zip(*pairs, strict=True)
            style = {"color": COLOURS[k], "marker": MARKERS[k], "ms": 4.5, "lw": 1.2, "capsize": 2, "label": title}
            panel.errorbar(x, y, errors, **style)
