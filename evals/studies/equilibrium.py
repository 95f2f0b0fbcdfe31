"""Equilibrium models of digits beside an explicit network and neural ODEs of as many parameters, three seeds each.

    python -m evals.studies.equilibrium digits [--jobs 2] [--root runs/equilibrium] [--publish]

Every run is evaluated at every place of its dial, from what its start alone is worth to the whole search. With
`--publish` it writes evals/results/equilibrium.md, equilibrium.png (accuracy against the evaluations of an answer) and
equilibrium_tolerance.md (both against the tolerance of the search, by the same trained models).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import Protocol
from genmodels.evaluation.results import read
from genmodels.files import write_text
from genmodels.training.run import Run

from . import plans
from .plans import ROOT, Plan

RESULTS = ROOT / "evals" / "results"
PROTOCOL, SEEDS = "digits_anytime", (0, 1, 2)
TOLERANCES = (0.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
FIELD = (
    "{name: neural_ode, encoder: {name: mlp, hidden: [64], activation: relu}, latent: [64], "
    "network: {name: concat_mlp, hidden: [64], activation: relu, time: none}, solver: SOLVER, controller: CONTROLLER}"
)
PI = "{name: pi, rtol: TOLERANCE, atol: TOLERANCE, norm: batch}"


def explicit(solver: str, controller: str) -> tuple[str, tuple[str, ...]]:
    """A neural ODE in the place of the equilibrium."""
    return "digits/deq", ("model=" + FIELD.replace("SOLVER", solver).replace("CONTROLLER", controller),)


# by name: the configuration, and what is changed in it
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "explicit": explicit("euler", "fixed"),
    "neural-ode": explicit("tsit5", PI.replace("TOLERANCE", "5.0e-3")),
    "neural-ode-1e-6": explicit("tsit5", PI.replace("TOLERANCE", "1.0e-6")),
    "deq": ("digits/deq", ()),
    "deq-broyden": ("digits/deq", ("model.solver={name: broyden, rtol: 5.0e-3}",)),
    "skip": ("digits/skip_deq", ()),
    "skip_reg": ("digits/skip_reg_deq", ()),
    "cdeq": ("digits/cdeq", ()),
    "cdeq-skip": ("digits/cdeq", ("model.start=predictor", "model.skip=5.0")),
    "cdeq-skip_reg": ("digits/cdeq", ("model.start=first", "model.skip=5.0")),
}
TITLES = {
    "explicit": "explicit residual block",
    "neural-ode": "neural ODE",
    "neural-ode-1e-6": "neural ODE, tolerance 1e-6",
    "deq": "DEQ (Anderson)",
    "deq-broyden": "DEQ (Broyden)",
    "skip": "Skip DEQ (Anderson)",
    "skip_reg": "Skip Reg DEQ (Anderson)",
    "cdeq": "continuous DEQ (Tsit5)",
    "cdeq-skip": "continuous Skip DEQ",
    "cdeq-skip_reg": "continuous Skip Reg DEQ",
}
Row = dict[str, Any]


def name_of(model: str, seed: int) -> str:
    """Of a run."""
    return f"equilibrium-{model}-{seed}"


def digits() -> Iterator[Plan]:
    """Every model with every seed, the first seed of all of them first."""
    for seed in SEEDS:
        for name, (config, overrides) in MODELS.items():
            yield Plan(name_of(name, seed), config, PROTOCOL, (f"seed={seed}", *overrides))


STUDIES = {"digits": digits}


def rows(root: Path, results: Path = RESULTS) -> list[Row]:
    """One row for each model: means over the seeds, with standard errors, and its curve of accuracy against cost."""
    found = []
    for name in MODELS:
        whole, curves = [], []
        for run in (name_of(name, seed) for seed in SEEDS):
            for path in sorted((results / PROTOCOL / run).glob("*.json")):
                result = read(path)[0]
                whole.append({**facts(result), "backward": backward(root / run)})
                curves.append(curve(result))
        if whole:
            places = [summary(list(parts)) for parts in zip(*curves, strict=True)]
            found.append({"model": name, "seeds": len(whole), "curve": places, **summary(whole)})
    return found


def facts(result: dict[str, Any]) -> Row:
    """What a result says of accuracy and cost."""
    cost, values = result["cost"]["predict"], {m["name"]: m["value"] for m in result["metrics"]}
    return {
        "accuracy": values["accuracy"],
        "anytime": values["anytime_accuracy"],
        "nfe": cost["nfe"],
        "milliseconds": 1e3 * cost["seconds_per_item"],
        "training": result["training"]["seconds"],
        "parameters": result["model"]["parameters"],
    }


def curve(result: dict[str, Any]) -> list[Row]:
    """Accuracy and evaluations at every place of the dial, the cheapest first."""
    values = {m["name"]: m["value"] for m in result["metrics"]}
    places = [name.removeprefix("accuracy_at_") for name in values if name.startswith("accuracy_at_")]
    return [{"accuracy": values[f"accuracy_at_{k}"], "nfe": values[f"evaluations_at_{k}"]} for k in places]


def tolerances(root: Path) -> list[Row]:
    """Accuracy and evaluations of trained models by the tolerance of the search, seeds averaged."""
    protocol, found = Protocol.load(PROTOCOL), []
    for name in ("deq", "deq-broyden", "skip", "skip_reg", "cdeq", "cdeq-skip_reg"):
        for tolerance in TOLERANCES:
            parts = []
            for run in (Run.open(root / name_of(name, seed)) for seed in SEEDS):
                solver = {**run.config.tree["model"]["solver"], "rtol": tolerance}
                solver |= {"atol": tolerance} if solver["name"] == "infinite_time" else {}
                solver |= {"max_steps": 2000} if solver["name"] == "infinite_time" else {"max_iterations": 200}
                parts.append(facts(evaluate(run, protocol, overrides={"predict": {"solver": solver}})))
            found.append({"model": name, "tolerance": tolerance, "seeds": len(parts), **summary(parts)})
    return found


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
        "| model | parameters | accuracy ↑ | of the start alone | anytime accuracy ↑ | evaluations | backward products "
        "| training, s | ms an item | seeds |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in found:
        first = r["curve"][0] if r["curve"] else {}
        cells = [cell(r, key) for key in ("anytime", "nfe", "backward", "training", "milliseconds")]
        lines.append(
            f"| {TITLES[r['model']]} | {r['parameters']:,.0f} | {cell(r, 'accuracy')} | {cell(first, 'accuracy')} | "
            f"{' | '.join(cells)} | {r['seeds']} |"
        )
    return "\n".join(lines) + "\n"


def tolerance_table(found: list[Row]) -> str:
    """Accuracy (evaluations) by tolerance, one line for each model."""
    lines = [f"| model | {' | '.join(f'{t:g}' for t in TOLERANCES)} |", "|:---|" + "---:|" * len(TOLERANCES)]
    for name in dict.fromkeys(r["model"] for r in found):
        cells = [f"{cell(r, 'accuracy')} ({r['nfe']:.3g})" for r in found if r["model"] == name]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
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

    figure, panels = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    for k, r in enumerate(found):
        points = sorted([*r["curve"], r], key=lambda point: point["nfe"])
        x, y, e = ([point[key] for point in points] for key in ("nfe", "accuracy", "accuracy_error"))
        e = None if None in e else e
        for panel in panels:
            panel.errorbar(x, y, e, marker="osdD^v<>PX"[k], ms=5, mfc="none", capsize=2, lw=1, label=TITLES[r["model"]])
    for panel in panels:
        panel.set(xscale="log", xlabel="evaluations of an answer", ylabel="test accuracy")
        panel.grid(alpha=0.3, lw=0.5)
    best = max((r["accuracy"] for r in found), default=1.0)
    panels[1].set(ylim=(best - 0.04, best + 0.01), title="the same, enlarged", ylabel="")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    given = plans.parser(__doc__, STUDIES, "runs/equilibrium").parse_args()
    chosen = [plan for study in given.studies for plan in STUDIES[study]()]
    plans.carry_out_all(chosen, given.root, given.jobs, given.publish)
    if given.publish:
        found = rows(given.root)
        write_text(RESULTS / "equilibrium.md", table(found))
        draw(found, RESULTS / "equilibrium.png")
        write_text(RESULTS / "equilibrium_tolerance.md", tolerance_table(tolerances(given.root)))
        print(RESULTS / "equilibrium.md", RESULTS / "equilibrium_tolerance.md", sep="\n")


if __name__ == "__main__":
    main()
