"""What was found of a kinetic-optimal path, as a picture and as numbers."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .kinetic import Energy
from .schedules import Linear, Schedule
from .separation import Curve
from .tabulated import Table

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.55"


def write(folder: Path, data: Curve, path: Table, energies: Mapping[str, Energy]) -> list[Path]:
    """λ, the path and the energies in `kinetic_path.png`, their numbers in `kinetic_path.json`, the path in a .csv.

    The latter is what the schedule `tabulated` reads: other models can be trained or sampled on the path.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "kinetic_path.json", folder / "kinetic_path.png"
    numbers.write_text(json.dumps(_numbers(data, energies), indent=1) + "\n", encoding="utf-8")
    table = folder / "kinetic_path.csv"
    table.write_text(_columns(path), encoding="utf-8")
    with matplotlib.rc_context({"font.size": 9}):
        _figure(data, path, energies).savefig(picture, dpi=160)
    return [picture, numbers, table]


def _numbers(data: Curve, energies: Mapping[str, Energy]) -> dict[str, Any]:
    inner = [None if value != value else value for value in data.inner.tolist()]
    return {
        "mean_square": data.mean_square,
        "variance": data.variance,
        "energies": {name: each._asdict() for name, each in energies.items()},
        "separation": {
            "s": data.ratios.tolist(),
            "lambda": data.values.tolist(),
            "stderr": data.stderr.tolist(),
            "inner": inner,
            "used": data.mended().tolist(),
        },
        "mended": data.problems(),
    }


def _columns(path: Table) -> str:
    """Times, scales and derivatives of the knots, as a .csv that loses no digit."""
    t = path.knots[0]
    rows = zip(*(part.tolist() for part in (t, *path(t))), strict=True)
    return "\n".join(["t,alpha,sigma,dalpha,dsigma", *(",".join(map(repr, row)) for row in rows)]) + "\n"


def _figure(data: Curve, path: Schedule, energies: Mapping[str, Energy]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 6.4), layout="constrained")
    separation, scales, ratio, bars = figure.subplots(2, 2).flatten()
    _separation(separation, data)
    t = torch.linspace(0, 1, 801, dtype=torch.float64)
    for schedule, style, label in ((path, "-", "kinetic optimal"), (Linear(), (0, (4, 1.5)), "linear")):
        alpha, sigma = schedule.scales(t)
        scales.plot(t, alpha, color=BLUE, linestyle=style, label=f"α, {label}")
        scales.plot(t, sigma, color=ORANGE, linestyle=style, label=f"σ, {label}")
        ratio.plot(
            t[1:-1], schedule.log_snr(t)[1:-1], color=BLUE if style == "-" else GREY, linestyle=style, label=label
        )
    alpha, sigma = path.scales(t)
    scales.plot(t, data(math.sqrt(data.variance) * alpha / sigma), color=GREEN, label="λ along it")
    scales.set(xlabel="t (0 = data, 1 = noise)", title="the path")
    ratio.set(xlabel="t (0 = data, 1 = noise)", title="log-SNR")
    names = list(energies)
    bars.barh(names, [energies[name].marginal for name in names], color=[BLUE, *[GREY] * (len(names) - 1)])
    for row, name in enumerate(names):
        bars.text(energies[name].marginal, row, f" {energies[name].marginal:.4g}", va="center")
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set(title="kinetic energy E for each component, from t = 0.001")
    for axes in (separation, scales, ratio):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(True, linewidth=0.5, color="0.9")
    for axes in (separation, scales, ratio, bars):
        axes.title.set_fontsize(9.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _separation(axes: Any, data: Curve) -> None:
    s, values, error = data.ratios, data.values, data.stderr
    fine = torch.logspace(float(s[0].log10()), float(s[-1].log10()), 400, dtype=torch.float64)
    axes.plot(fine, data(fine), color=BLUE, label="λ, as used")
    axes.fill_between(s, values - 2 * error, values + 2 * error, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(s, values, "o", color=BLUE, markersize=2.5, label="estimate ± 2 standard errors")
    axes.plot(fine, fine.square() / (1 + fine.square()), color=GREY, linestyle=(0, (4, 1.5)), label="N(0, I)")
    axes.set(xscale="log", xlabel="s = signal over noise, centred data of unit variance", title="separation λ(s)")
    axes.set_ylim(-0.03, 1.05)
