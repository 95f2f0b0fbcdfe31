"""Neural CDEs beside an ODE-RNN and a GRU on series with gaps: the digits, read row by row, with rows lost.

    python -m evals.studies.series digits [--jobs 2] [--root runs/series] [--publish]

Every model reads the same rows with three seeds of its own, and is given the same steps of training. With `--publish`
it writes evals/results/series.md and evals/results/series.png from the published results.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from genmodels.evaluation.results import read
from genmodels.files import write_text

from . import plans
from .plans import Plan

RESULTS = Path(__file__).resolve().parents[1] / "results"
CONFIG = "series/cde"
DROPPED = {0.0: "digit_series", 0.3: "digit_series_30", 0.6: "digit_series_60"}
SEEDS = (0, 1, 2)
ODE_RNN = "{name: ode_rnn, hidden: 48, units: 64, field: {name: mlp, hidden: [64], activation: tanh}}"
# In place of the model of the configuration; sizes with about as many parameters as the CDE. Rate and weight decay have
# the least cross-entropy on the validation items with 30 % of the rows lost and another seed, out of 0.002, 0.005 and
# 0.01 times 0.01, 0.3, 1 and 3, for every model.
MODELS = {
    "cde": (),
    "cde-hermite": ("model.control.name=hermite", "model.control.intensity=true"),
    "ode_rnn": (f"model={ODE_RNN}", "train.optimizer.lr=0.01", "train.optimizer.weight_decay=0.01"),
    "gru": ("model={name: gru, hidden: 96}", "train.optimizer.lr=0.01", "train.optimizer.weight_decay=0.3"),
}
TITLES = {"cde": "CDE, linear", "cde-hermite": "CDE, Hermite", "ode_rnn": "ODE-RNN", "gru": "GRU"}
COLOURS = {"cde": "#0072B2", "cde-hermite": "#56B4E9", "ode_rnn": "#E69F00", "gru": "#000000"}
Row = dict[str, Any]


def run(model: str, dropped: float, seed: int) -> str:
    """The name of a run."""
    return f"series-{model}-{round(100 * dropped)}-{seed}"


def digits() -> Iterator[Plan]:
    """Every model on every share of lost rows, with three seeds."""
    for dropped, protocol in DROPPED.items():
        for model, overrides in MODELS.items():
            for seed in SEEDS:
                own = (f"seed={seed}", f"data.dropped={dropped}", *overrides)
                yield Plan(run(model, dropped, seed), CONFIG, protocol, own)


STUDIES: dict[str, Callable[[], Iterator[Plan]]] = {"digits": digits}


def rows(results: Path = RESULTS) -> list[Row]:
    """One row for each share and model: the accuracies of the seeds, and what the models cost."""
    found = []
    for dropped, protocol in DROPPED.items():
        for model in MODELS:
            places = (results / protocol / run(model, dropped, seed) for seed in SEEDS)
            read_in = [read(path)[0] for place in places for path in sorted(place.glob("*.json"))[:1]]
            if len(read_in) == len(SEEDS):
                found.append({"dropped": dropped, "model": model, **summary(read_in)})
    return found


def summary(results: list[dict]) -> Row:
    """What the results of several seeds of one model come to.

    The standard error is that of the mean over the seeds: all are scored on the same test items.
    """
    accuracies = [next(m["value"] for m in r["metrics"] if m["name"] == "accuracy") for r in results]
    return {
        "accuracy": mean(accuracies),
        "stderr": stdev(accuracies) / len(accuracies) ** 0.5,
        "parameters": results[0]["model"]["parameters"],
        "nfe": mean(r["cost"]["predict"]["nfe"] for r in results),
        "seconds": mean(r["training"]["seconds"] for r in results),
    }


def table(found: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        f"| rows lost | model | accuracy ↑ ({len(SEEDS)} seeds) | parameters | evaluations | seconds of training |",
        "|---:|:---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['dropped']:.0%} | {TITLES[r['model']]} | {r['accuracy']:.3f} ± {r['stderr']:.3f} | "
        f"{r['parameters']:,} | {r['nfe']:.3g} | {r['seconds']:.0f} |"
        for r in found
    ]
    return "\n".join(lines) + "\n"


def draw(found: list[Row], path: Path) -> None:
    """Accuracy against the share of lost rows, one line a model."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    for model in MODELS:
        x, y, e = ([r[key] for r in found if r["model"] == model] for key in ("dropped", "accuracy", "stderr"))
        panel.errorbar([100 * v for v in x], y, e, color=COLOURS[model], marker="o", capsize=2, label=TITLES[model])
    panel.set(xlabel="rows lost (%)", ylabel="test accuracy (higher is better)", xticks=[100 * d for d in DROPPED])
    panel.grid(alpha=0.3, lw=0.5)
    panel.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    given = plans.parser(__doc__, STUDIES, "runs/series").parse_args()
    chosen = [plan for study in given.studies for plan in STUDIES[study]()]
    plans.carry_out_all(chosen, given.root, given.jobs, given.publish)
    if given.publish:
        found = rows()
        write_text(RESULTS / "series.md", table(found))
        draw(found, RESULTS / "series.png")
        print(RESULTS / "series.md")


if __name__ == "__main__":
    main()
