"""What regularizing continuous depth costs and saves, as a table and two pictures.

    python -m evals.studies.regularization_table [--root runs/regularization]

Reads the published results of `evals.studies.regularization` and writes evals/results/regularization.md, with means and
standard errors over seeds, and regularization_front.png, the quality against the evaluations of a prediction. Where the
runs are still there, regularization_training.png shows their evaluations over training.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genmodels.evaluation.results import read
from genmodels.files import write_text

from .regularization import EXPERIMENTS, SEEDS, methods

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUESTIONS = ("predict", "likelihood")  # of whose answers the cost is told: the first that was asked
COLUMNS = ("quality", "nfe", "seconds", "training")
Row = dict[str, float]


def rows(name: str) -> dict[str, list[Row]]:
    """By method, one row a seed: quality, evaluations and seconds of an answer, seconds of training."""
    experiment, found = EXPERIMENTS[name], {}
    for method in methods(experiment):
        for seed in SEEDS:
            for path in sorted((RESULTS / experiment.protocol / f"{name}-{method}-{seed}").glob("*.json")):
                found.setdefault(method, []).append(_row(read(path)[0], experiment.metric))
    return found


def _row(result: dict[str, Any], metric: str) -> Row:
    cost = next(result["cost"][question] for question in QUESTIONS if question in result["cost"])
    value = next(m["value"] for m in result["metrics"] if m["name"] == metric)
    values = (value, cost["nfe"], cost["seconds_per_item"], result["training"]["seconds"])
    return dict(zip(COLUMNS, values, strict=True))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Over seeds; the standard error is None for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def table(name: str) -> str:
    """One row a method, with the seeds that it rests on."""
    metric = EXPERIMENTS[name].metric.replace("_", " ")
    head = f"| {name}: method | {metric} | NFE | ms an item | training, s | seeds |\n|:---|---:|---:|---:|---:|---:|"
    lines = []
    for method, found in rows(name).items():
        scaled = [{**row, "seconds": 1e3 * row["seconds"]} for row in found]
        cells = [_cell(*mean_and_error([row[column] for row in scaled])) for column in COLUMNS]
        lines.append(f"| {method} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join([head, *lines])


def _cell(mean: float, error: float | None) -> str:
    if error is not None and error < 1e-12 * abs(mean):  # of equal values, but for rounding
        error = 0.0
    return f"{mean:.4g}" + ("" if error is None else f" ± {error:.2g}")


def draw_front(names: Sequence[str], path: Path) -> None:
    """Quality against the evaluations of an answer: one panel an experiment, one marker a method."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.8), layout="constrained", squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for k, (method, found) in enumerate(rows(name).items()):
            (x, dx), (y, dy) = (mean_and_error([row[column] for row in found]) for column in ("nfe", "quality"))
            panel.errorbar(x, y, dy, dx, fmt="osD^v<>PX*ph8"[k % 13], color=_colour(k), capsize=2, label=method)
        panel.set(xlabel="evaluations of an answer", ylabel=EXPERIMENTS[name].metric.replace("_", " "), title=name)
        panel.grid(alpha=0.3, lw=0.5)
        panel.legend(fontsize=6)
    _save(figure, path)


def draw_training(names: Sequence[str], root: Path, path: Path) -> None:
    """Evaluations of a training solve over the steps of training, of the first seed."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.8), layout="constrained", squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for k, method in enumerate(methods(EXPERIMENTS[name])):
            log = root / f"{name}-{method}-{SEEDS[0]}" / "metrics.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
            curve = [(line["step"], line["train/nfe"]) for line in lines if line.get("train/nfe") is not None]
            if curve:
                panel.plot(*zip(*curve, strict=True), lw=1.2, color=_colour(k), label=method)
        panel.set(xlabel="steps of training", ylabel="evaluations of a solve", title=name)
        panel.grid(alpha=0.3, lw=0.5)
        panel.legend(fontsize=6)
    _save(figure, path)


def _colour(k: int) -> Any:
    """The k-th of twenty that can be told apart, strong ones first."""
    import matplotlib.pyplot as plt

    return plt.get_cmap("tab20")(2 * k % 20 + (k >= 10))


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/regularization"), help="folder of the runs")
    root = parser.parse_args().root
    names = [name for name in EXPERIMENTS if rows(name)]
    if not names:
        raise SystemExit("there are no results. Run: python -m evals.studies.regularization annulus --publish")
    write_text(RESULTS / "regularization.md", "\n\n".join(map(table, names)) + "\n")
    draw_front(names, RESULTS / "regularization_front.png")
    here = [name for name in names if any(root.glob(f"{name}-*/metrics.jsonl"))]
    if here:
        draw_training(here, root, RESULTS / "regularization_training.png")
    print(RESULTS / "regularization.md")


if __name__ == "__main__":
    main()
