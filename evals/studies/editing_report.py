"""The tables and the pictures of `evals.studies.editing`: from its rows alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

Row = dict[str, Any]

TRIPS = {
    "vanilla": "Euler",
    "uni_inv": "Uni-Inv, Euler",
    "ab2": "AB2",
    "heun": "Heun",
    "rf_solver": "RF-Solver",
    "fireflow": "FireFlow",
    "rf_solver_3": "RF-Solver of order 3",
    "fixed_point": "fixed points of Euler, 3 iterations",
}
ORDERS = {
    "vanilla": 1,
    "uni_inv": 2,
    "ab2": 2,
    "heun": 3,
    "rf_solver": 3,
    "fireflow": 3,
    "rf_solver_3": 3,
}  # there, back
FIELDS = {
    "digits": "trained on digits, even steps",
    "digits_denser": "trained on digits, denser steps at images (shift ½)",
    "mixture": "exact mixture, even steps",
}
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000", "#8A8A8A")
MARKERS = "osvD^x*+"
CLOSER = 0.85  # success of settings that are shown once more
FITTED = 4  # of the largest budgets, to which slopes are fitted
FAMILIES = {  # of settings, by what their names begin with
    "RF-Edit, V of last half": ("#D55E00", "^"),
    "RF-Edit, V of all": ("#0072B2", "o"),
    "RF-Edit": ("#56B4E9", "s"),
    "FlowEdit": ("#009E73", "D"),
    "DNAEdit": ("#E69F00", "v"),
    "Uni-Edit": ("#CC79A7", "*"),
    "RF-Inversion": ("#8A8A8A", "x"),
    "": ("#000000", "+"),
}


def part(rows: Sequence[Row], name: str, **wanted: Any) -> list[Row]:
    """The rows of a part with these facts."""
    return [row for row in rows if row["part"] == name and all(row.get(key) == v for key, v in wanted.items())]


def slope(rows: Sequence[Row], what: str) -> float | None:
    """p of error ~ steps^-p, fitted by least squares to logarithms at the largest budgets; None for less than three."""
    last = [row for row in sorted(rows, key=lambda row: row["budget"])[-FITTED:] if row[what] > 0]
    if len(last) < 3:
        return None
    n, e = ([math.log(row[key]) for row in last] for key in ("steps", what))
    middle = sum(n) / len(n)
    return -sum((a - middle) * b for a, b in zip(n, e, strict=True)) / sum((a - middle) ** 2 for a in n)


def factors(rows: Sequence[Row], field: str, method: str) -> dict[int, float]:
    """How many times less than Euler's the error of a round trip is, by budget."""
    own, euler = (
        {row["budget"]: row["back"] for row in part(rows, "trip", field=field, method=name)}
        for name in (method, "vanilla")
    )
    return {budget: euler[budget] / error for budget, error in own.items() if error > 0 and budget in euler}


# ---- tables ----------------------------------------------------------------------------------------------------------


def shown(of: Mapping[str, float | None] | None) -> str:
    """Value ± error, to the digits that the error leaves; nothing for nothing."""
    if of is None or of["value"] is None:
        return ""
    value, error = of["value"], of["stderr"]
    if not error:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{digits}f} ± {error:.{digits}f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    made = [f"| {' | '.join(head)} |", "|:---|" + "---:|" * (len(head) - 1)]
    return "\n".join(made + [f"| {' | '.join(line)} |" for line in lines]) + "\n"


def budgets(rows: Sequence[Row]) -> list[int]:
    return sorted({row["budget"] for row in part(rows, "trip")})


def trip_table(rows: Sequence[Row], field: str, what: str) -> str:
    columns, lines = budgets(rows), []
    for method, title in TRIPS.items():
        own = {row["budget"]: row for row in part(rows, "trip", field=field, method=method)}
        fitted = slope(list(own.values()), what)
        cells = [f"{own[b][what]:.2e} ({own[b]['steps']})" if b in own else "" for b in columns]
        lines.append([title, *cells, "" if fitted is None else f"{fitted:.2f}"])
    told = {"back": "item that came back", "noise": "noise"}[what]
    return markdown([f"{FIELDS[field]}: RMS error of the {told} ↓ at NFE ≤", *map(str, columns), "slope"], lines)


def factor_table(rows: Sequence[Row]) -> str:
    """How much better than Euler's method, and how fast that grows beside what orders promise."""
    columns, lines = budgets(rows), []
    for field, place in FIELDS.items():
        for method, order in ORDERS.items():
            found = factors(rows, field, method)
            ends = [b for b in columns if b in found][-FITTED:]
            if method == "vanilla" or len(ends) < 2:
                continue
            grown = found[ends[-1]] / found[ends[0]]
            promised = (ends[-1] / ends[0]) ** (order - 1)
            cells = [f"{found[b]:.3g}" if b in found else "" for b in columns]
            lines.append([f"{TRIPS[method]}, {place}", *cells, f"{grown:.3g}", f"{promised:.3g}"])
    head = ["Euler's error of what came back, over that of … at NFE ≤", *map(str, columns)]
    return markdown([*head, f"growth over the last {FITTED}", "by orders"], lines)


def board_table(rows: Sequence[Row]) -> str:
    head = ["setting", "success ↑", "distance ↓", "distance in features ↓", "reconstruction PSNR ↑", "NFE", "bytes"]
    lines = []
    for row in part(rows, "board"):
        names = ("edit_success", "edit_distance", "edit_feature_distance", "reconstruction_psnr")
        cells = [shown(row.get(name)) for name in names]
        lines.append([row["setting"], *cells, f"{row['nfe']:g}", f"{row['edit_memory']['value']:,.0f}"])
    return markdown(head, lines)


def words(share: Mapping[str, Any]) -> str:
    """A sharing, in words."""
    if not share:
        return "nothing"
    named = {"last_half": "last half", "all": "all"}[share["blocks"]]
    more = [f"{key}: {value}" for key, value in share.items() if key not in ("steps", "blocks")]
    return ", ".join([f"V of {named}, {share['steps']} of 15 steps", *more])


def same_table(rows: Sequence[Row]) -> str:
    found = part(rows, "same")
    (plain,) = (row["back"] for row in found if not row["share"])
    lines = [[words(r["share"]), f"{r['back']:.4f}", f"{r['back'] / plain:.2f}", f"{r['bytes']:,}"] for r in found]
    return markdown(["RF-Edit under the own class, shared", "RMS error ↓", "over that of nothing", "bytes"], lines)


def memory_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in part(rows, "memory"):
        how = ", ".join(f"{key}: {value}" for key, value in row["keeping"].items())
        lines.append([how, f"{row['bytes']:,}", f"{row['seconds']:.2f}", f"{row['off']:.2g}"])
    return markdown(["V of all blocks, 5 of 15 steps", "bytes", "seconds", "RMS off the default"], lines)


def text(rows: Sequence[Row]) -> str:
    """All tables, and what their figures are."""
    board = part(rows, "board")
    beside = ", ".join(f"{name} {value:.3g}" for name, value in (board[0]["references"] if board else {}).items())
    notes = (
        "NFE counts evaluations both ways, for the board those of the network; a method takes as many steps (in "
        "brackets) as they pay for. Errors of images are in levels of 0 … 16, those of noise in standard deviations. "
        f"Slopes are p of error ~ steps^-p, fitted to the last {FITTED} columns; a round trip has order 1 by Euler's "
        "method, 2 by Uni-Inv and AB2, and 3 by the others (fixed points have none: they are as good as their "
        "iterations). Success is the share of edits that a fixed classifier takes for the target, distances are those "
        f"of an edit from its image ({beside}). Bytes are those of shared features, per image on the board, in all "
        "below it.\n"
    )
    trips = [trip_table(rows, field, what) for what in ("back", "noise") for field in FIELDS]
    return "\n".join([*trips, factor_table(rows), board_table(rows), same_table(rows), memory_table(rows), notes])


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path) -> None:
    """Round trips on both flows, success against distance, and sharing under the own class."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(14.4, 8.4), layout="constrained")
    for panel, (field, place) in zip(panels[0], FIELDS.items(), strict=True):
        if not part(rows, "trip", field=field):
            continue
        for k, (method, title) in enumerate(TRIPS.items()):
            own = part(rows, "trip", field=field, method=method)
            style = {"color": COLOURS[k], "marker": MARKERS[k], "ms": 4.5, "lw": 1.2, "label": title}
            panel.plot([row["nfe"] for row in own], [row["back"] for row in own], **style)
        panel.set(xscale="log", yscale="log", xlabel="evaluations there and back")
        panel.set_title(f"round trips, {place}", fontsize=9)
        panel.set_xticks(budgets(rows), map(str, budgets(rows)))
        panel.set_xticks([], minor=True)
    panels[0, 0].set_ylabel("RMS error of the item")
    panels[0, 0].legend(frameon=False, fontsize=8)
    _success(panels[1, 0], part(rows, "board"))
    _success(panels[1, 1], [row for row in part(rows, "board") if row["edit_success"]["value"] > CLOSER])
    panels[1, 1].set_title(f"of these, success above {CLOSER}")
    _sharing(panels[1, 2], part(rows, "same"))
    for panel in panels.flat:
        panel.grid(alpha=0.3, lw=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def family(setting: str) -> str:
    """The longest beginning of its name that is one of a family."""
    return max((name for name in FAMILIES if setting.startswith(name)), key=len)


def _success(panel: Any, board: Sequence[Row]) -> None:
    for name, (colour, marker) in FAMILIES.items():
        own = [row for row in board if family(row["setting"]) == name]
        if own:
            x, y = ([row[key]["value"] for row in own] for key in ("edit_distance", "edit_success"))
            error = [row["edit_success"]["stderr"] or 0 for row in own]
            style = {"color": colour, "marker": marker, "ms": 5, "ls": "", "capsize": 2, "lw": 0.8}
            panel.errorbar(x, y, error, label=name or "solvers, nothing shared", **style)
    for row in board[:1]:
        for name in ("nearest of the class", "of the class"):
            if name in row["references"]:
                panel.axvline(row["references"][name], color="0.6", lw=0.8, ls=(0, (4, 2)), zorder=0)
                at = (row["references"][name], 0.02)
                panel.annotate(
                    name,
                    at,
                    (3, 0),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    fontsize=7,
                    color="0.4",
                )
    panel.set(xlabel="distance of the edit from its image, levels", ylabel="share of edits that succeed")
    panel.set_title("success against what is kept")
    if board:
        panel.legend(frameon=False, fontsize=7)


def _sharing(panel: Any, same: Sequence[Row]) -> None:
    for blocks, colour in (("last_half", "#D55E00"), ("all", "#0072B2")):
        own = [row for row in same if row["share"].keys() == {"steps", "blocks"} and row["share"]["blocks"] == blocks]
        points = [row for row in same if not row["share"]] + own
        steps = [row["share"].get("steps", 0) for row in points]
        label = f"values of {blocks.replace('_', ' ')}"
        panel.plot(steps, [row["back"] for row in points], color=colour, marker="o", ms=4.5, lw=1.2, label=label)
    panel.set(xlabel="shared steps of 15", ylabel="RMS error, levels", title="RF-Edit under the own class")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=8)


def draw_strips(images: Mapping[str, Tensor], pairs: Sequence[tuple[int, int]], path: Path) -> None:
    """A row of pictures for each name, a column for each item."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(images), len(pairs), figsize=(0.46 * len(pairs) + 2.2, 0.46 * len(images) + 0.4), squeeze=False
    )
    figure.subplots_adjust(
        left=2.2 / (0.46 * len(pairs) + 2.2), right=0.995, bottom=0.01, top=0.94, wspace=0.06, hspace=0.06
    )
    for line, (name, x) in zip(panels, images.items(), strict=True):
        for panel, picture in zip(line, x, strict=True):
            panel.imshow(picture[0].clamp(0, 16).numpy(), cmap="gray", vmin=0, vmax=16)
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for panel, (source, target) in zip(panels[0], pairs, strict=True):
        panel.set_title(f"{source} → {target}", fontsize=8, pad=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
