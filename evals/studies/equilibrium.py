"""Equilibrium models of digits beside an explicit network and a neural ODE of as many parameters, three seeds each.

    python -m evals.studies.equilibrium digits [--jobs 2] [--root runs/equilibrium] [--publish]

Every run is evaluated in full, and models with a dial also after 0, 1, 2, 4 and 8 moves of their search: 0 is what
their start alone is worth. With `--publish` it writes evals/results/equilibrium.md and equilibrium.png, the accuracy
against the evaluations of an answer.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from genmodels.evaluation.evaluate import publish
from genmodels.evaluation.results import read
from genmodels.files import write_text

from . import plans
from .plans import ROOT, Plan

RESULTS = ROOT / "evals" / "results"
PROTOCOL, SEEDS, DIAL = "digits_classify", (0, 1, 2), (0, 1, 2, 4, 8)
FIELD = (
    "{name: neural_ode, encoder: {name: mlp, hidden: [64], activation: relu}, latent: [64], "
    "network: {name: concat_mlp, hidden: [64], activation: relu, time: none}, solver: SOLVER, controller: CONTROLLER}"
)
TOLERANCE = "{name: pi, rtol: 5.0e-3, atol: 5.0e-3, norm: batch}"
BROYDEN = "model.solver={name: broyden, rtol: 5.0e-3}"
# by name: the configuration, and what is changed in it
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "explicit": ("digits/deq", ("model=" + FIELD.replace("SOLVER", "euler").replace("CONTROLLER", "fixed"),)),
    "neural-ode": ("digits/deq", ("model=" + FIELD.replace("SOLVER", "tsit5").replace("CONTROLLER", TOLERANCE),)),
    "deq": ("digits/deq", ()),
    "deq-broyden": ("digits/deq", (BROYDEN,)),
    "skip": ("digits/skip_deq", ()),
    "skip_reg": ("digits/skip_reg_deq", ()),
    "cdeq": ("digits/cdeq", ()),
    "cdeq-skip": ("digits/cdeq", ("model.start=predictor", "model.skip=5.0")),
    "cdeq-skip_reg": ("digits/cdeq", ("model.start=first", "model.skip=5.0")),
}
TITLES = {
    "explicit": "explicit residual block",
    "neural-ode": "neural ODE",
    "deq": "DEQ (Anderson)",
    "deq-broyden": "DEQ (Broyden)",
    "skip": "Skip DEQ (Anderson)",
    "skip_reg": "Skip Reg DEQ (Anderson)",
    "cdeq": "continuous DEQ (Tsit5)",
    "cdeq-skip": "continuous Skip DEQ",
    "cdeq-skip_reg": "continuous Skip Reg DEQ",
}
Row = dict[str, Any]


def digits() -> Iterator[Plan]:
    """Every model with every seed, the first seed of all of them first."""
    for seed in SEEDS:
        for name, (config, overrides) in MODELS.items():
            yield Plan(f"equilibrium-{name}-{seed}", config, PROTOCOL, (f"seed={seed}", *overrides))


STUDIES = {"digits": digits}


def dialled(root: Path, plan: Plan) -> None:
    """Evaluate a run with a dial at each of its places."""
    if "explicit" in plan.name or "neural-ode" in plan.name:
        return
    for moves in DIAL:
        command = [
            "-m",
            "evals.evaluate",
            str(root / plan.name),
            "--protocol",
            plan.protocol,
            f"predict.iterations={moves}",
        ]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{plan.name}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")


def rows(root: Path, results: Path = RESULTS) -> list[Row]:
    """One row for each model: means over the seeds, with standard errors, and its curve of accuracy against cost."""
    found = []
    for name in MODELS:
        whole, early = [], {moves: [] for moves in DIAL}
        for seed in SEEDS:
            run = f"equilibrium-{name}-{seed}"
            for path in sorted((results / PROTOCOL / run).glob("*.json")):
                result = read(path)[0]
                moves = result["answers"]["predict"].get("iterations")
                (whole if moves is None else early[moves]).append({**facts(result), "backward": backward(root / run)})
        if whole:
            curve = [summary(part) for part in early.values() if part]
            found.append({"model": name, "seeds": len(whole), "curve": curve, **summary(whole)})
    return found


def facts(result: dict[str, Any]) -> Row:
    """What a result says of accuracy and cost."""
    cost = result["cost"]["predict"]
    return {
        "accuracy": next(m["value"] for m in result["metrics"] if m["name"] == "accuracy"),
        "nfe": cost["nfe"],
        "milliseconds": 1e3 * cost["seconds_per_item"],
        "training": result["training"]["seconds"],
        "parameters": result["model"]["parameters"],
    }


def backward(run: Path) -> float | None:
    """Mean products of a backward pass over training, if the run is there and has them."""
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    values = [line["train/backward_nfe"] for line in lines if line.get("train/backward_nfe") is not None]
    return mean(values) if values else None


def summary(parts: list[Row]) -> Row:
    """Means by key, and the standard errors of means under key_error; None where a value is."""
    out: Row = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        known = all(value is not None for value in values)
        out[key] = mean(values) if known else None
        out[f"{key}_error"] = stdev(values) / len(values) ** 0.5 if known and len(values) > 1 else None
    return out


def table(found: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | parameters | accuracy ↑ | of the start alone | evaluations | backward products | training, s "
        "| ms an item | seeds |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in found:
        first = r["curve"][0] if r["curve"] else {}
        cells = [cell(r, key) for key in ("nfe", "backward", "training", "milliseconds")]
        lines.append(
            f"| {TITLES[r['model']]} | {r['parameters']:,.0f} | {cell(r, 'accuracy')} | {cell(first, 'accuracy')} | "
            f"{' | '.join(cells)} | {r['seeds']} |"
        )
    return "\n".join(lines) + "\n"


def cell(row: Row, key: str) -> str:
    """A mean with its standard error."""
    if row.get(key) is None:
        return ""
    error = row.get(f"{key}_error")
    return f"{row[key]:.3g}" + ("" if error is None else f" ± {error:.1g}")


def draw(found: list[Row], path: Path) -> None:
    """Accuracy against evaluations: a curve for models with a dial, with its full search at the end; else a point."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for k, r in enumerate(found):
        points = sorted([*r["curve"], r], key=lambda point: point["nfe"])
        x, y, e = ([point[key] for point in points] for key in ("nfe", "accuracy", "accuracy_error"))
        e = None if None in e else e
        panel.errorbar(x, y, e, marker="osD^v<>PX"[k], capsize=2, lw=1, label=TITLES[r["model"]])
    panel.set(xscale="symlog", xlabel="evaluations of an answer", ylabel="test accuracy")
    panel.grid(alpha=0.3, lw=0.5)
    panel.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    given = plans.parser(__doc__, STUDIES, "runs/equilibrium").parse_args()
    chosen = [plan for study in given.studies for plan in STUDIES[study]()]
    plans.carry_out_all(chosen, given.root, given.jobs, False)
    for plan in chosen:
        dialled(given.root, plan)
        for path in (given.root / plan.name / "eval" / plan.protocol).glob("*.json") if given.publish else ():
            publish(path, read(path)[0])
    if given.publish:
        found = rows(given.root)
        write_text(RESULTS / "equilibrium.md", table(found))
        draw(found, RESULTS / "equilibrium.png")
        print(RESULTS / "equilibrium.md")


if __name__ == "__main__":
    main()
