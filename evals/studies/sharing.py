"""What sharing one network among the steps of a flow costs and saves: likelihood against parameters, as a picture.

    python -m evals.studies.sharing

Reads the published results of `evals.studies.flows` (digits, patches, toy2d) and writes evals/results/sharing.png and
evals/results/sharing.md.
"""

import re
from pathlib import Path
from statistics import median
from typing import Any

from genmodels.evaluation.results import read
from genmodels.files import write_text

from .flows import DEPTHS, PLANES, VARIANTS

RESULTS = Path(__file__).resolve().parents[1] / "results"
STUDIES = {  # by the first part of the runs' names: protocol, metric, its unit, and what the steps are
    "digits-affine": ("digits", "bits_per_dim", "bits/dim", "digits, affine couplings"),
    "digits-nsf": ("digits", "bits_per_dim", "bits/dim", "digits, spline couplings"),
    "patches-nsf": ("natural_patches", "nll", "nats", "patches, spline couplings"),
}
KINDS = ("unshared", *VARIANTS)
COLOURS = dict(zip(KINDS, ("#000000", "#D55E00", "#E69F00", "#0072B2"), strict=True))
MARKERS = dict(zip(DEPTHS, "osD", strict=True))
WILD = 10  # times the usual standard error: a few items decide such a value, and it is written instead of drawn
Row = dict[str, Any]


def rows(study: str) -> list[Row]:
    """One row a run of the study: depth, variant, parameters in training and at inference, value, standard error."""
    protocol, metric, *_ = STUDIES[study]
    found = []
    for path in sorted((RESULTS / protocol).glob(f"{study}-k*/*.json")):
        result = read(path)[0]
        named = re.fullmatch(r".*-k(\d+)-(\w+)", result["run"])
        estimate = next(m for m in result["metrics"] if m["name"] == metric)
        model = result["model"]
        counts = (model["parameters"], model.get("x-inference_parameters", model["parameters"]))
        found.append((int(named[1]), named[2], *counts, estimate["value"], estimate["stderr"]))
    names = ("depth", "variant", "parameters", "at inference", "value", "stderr")
    return [dict(zip(names, row, strict=True)) for row in sorted(found, key=lambda row: (row[0], KINDS.index(row[1])))]


def table(study: str) -> str:
    *_, unit, what = STUDIES[study]
    head = f"| {what}: steps K | variant | parameters | at inference | {unit} ↓ |\n|---:|:---|---:|---:|---:|\n"
    lines = [
        f"| {r['depth']} | {r['variant']} | {r['parameters']:,} | {r['at inference']:,} | {r['value']:.4g} ± "
        f"{r['stderr']:.2g} |"
        for r in rows(study)
    ]
    return head + "\n".join(lines)


def planes() -> str:
    """NLL less that of the true law, with the parameters, of the flows of the plane: one row a flow."""
    names = {"nsf": "NSF (coupling)", "nsf_ar": "NSF (autoregressive)", "maf": "MAF", "realnvp": "Real NVP"}
    lines = ["| nats above the true law (parameters) | " + " | ".join(KINDS) + " |", "|:---|" + "---:|" * len(KINDS)]
    for plane in PLANES:
        for flow, name in names.items():
            found = [_excess(RESULTS / plane / f"{plane}-{flow}-{kind}") for kind in KINDS]
            lines.append(f"| {plane}, {name} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _excess(folder: Path) -> str:
    result = read(next(folder.glob("*.json")))[0]
    estimate = next(m for m in result["metrics"] if m["name"] == "nll")
    above = estimate["value"] - estimate["references"]["true law"]
    return f"{above:.3f} ({result['model']['parameters']:,})"


def draw(path: Path) -> None:
    """Likelihood against parameters: one panel a study, one line a variant, one marker a depth."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    figure, panels = plt.subplots(1, len(STUDIES), figsize=(4.4 * len(STUDIES), 3.8), layout="constrained")
    for panel, (study, (*_, unit, what)) in zip(panels, STUDIES.items(), strict=True):
        found = rows(study)
        usual = median(r["stderr"] for r in found)
        for kind in KINDS:
            line = [r for r in found if r["variant"] == kind and r["stderr"] < WILD * usual]
            x, y, e = ([r[key] for r in line] for key in ("parameters", "value", "stderr"))
            panel.errorbar(x, y, e, color=COLOURS[kind], capsize=2, lw=1.2, label=kind)
            for r in line:
                panel.plot(r["parameters"], r["value"], MARKERS[r["depth"]], color=COLOURS[kind], markersize=6)
        wild = [r for r in found if r["stderr"] >= WILD * usual]
        notes = [f"K = {r['depth']}, {r['variant']}: {r['value']:.2f} ± {r['stderr']:.2f}" for r in wild]
        panel.text(0.98, 0.98, "\n".join(notes), transform=panel.transAxes, ha="right", va="top", fontsize=8)
        panel.set(xscale="log", xlabel="trained parameters", ylabel=f"test {unit} (lower is better)", title=what)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3, lw=0.5)
    depths = [plt.Line2D([], [], marker=m, ls="", color="grey", label=f"K = {k}") for k, m in MARKERS.items()]
    lines = panels[-1].get_legend_handles_labels()[0]
    figure.legend(handles=[*lines, *depths], loc="outside lower center", ncols=len(lines) + len(depths), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    missing = [name for name in STUDIES if len(rows(name)) < len(DEPTHS) * len(KINDS)]
    if missing:
        raise SystemExit(
            f"sharing: {missing} are not complete. Run: python -m evals.studies.flows digits patches --publish"
        )
    write_text(RESULTS / "sharing.md", "\n\n".join([*map(table, STUDIES), planes()]) + "\n")
    draw(RESULTS / "sharing.png")
    print(RESULTS / "sharing.png")


if __name__ == "__main__":
    main()
