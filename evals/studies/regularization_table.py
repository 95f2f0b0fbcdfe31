"""What regularizing continuous depth costs and saves, as a table and two pictures.

    python -m evals.studies.regularization_table [--root runs/regularization]

Reads the published results of `evals.studies.regularization` and writes evals/results/regularization.md, with means and
standard errors over seeds, and regularization_front.png, the quality against the evaluations of a prediction. Where the
runs are still there, regularization_training.png shows their evaluations over training. Spirals have a last row, of
what the same solver takes for the law of the data itself: no model can be as good and much cheaper.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genmodels.data import spiral_dynamics, spiral_series
from genmodels.dynamics.latent_ode import LatentODE
from genmodels.dynamics.sde import NeuralSDEForecast
from genmodels.evaluation.results import read
from genmodels.files import write_text
from genmodels.registry import build
from genmodels.solvers.base import Controller, Solver, integrate
from genmodels.solvers.brownian import BrownianTree
from genmodels.solvers.stochastic import RowSDE

from .regularization import EXPERIMENTS, SEEDS, methods

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUESTIONS = ("predict", "likelihood")  # of whose answers the cost is told: the first that was asked
DRAWS = signature(LatentODE.predict).parameters["draws"].default  # of a prediction
PATHS = signature(NeuralSDEForecast.predict).parameters["paths"].default
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


def law_of_spirals() -> float:
    """Evaluations for the draws of a prediction of `spiral_series`, with the solver and tolerance of its latent ODEs.

    A spiral r = inner + growth θ, θ' = ω is the field y' = ω (growth y/|y| + Jy) with the quarter turn J; its mirror
    image costs as much.
    """
    angle = 2 * math.pi * torch.rand(256, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = (spiral_series.INNER + spiral_series.GROWTH * angle) * torch.cat((angle.cos(), angle.sin()), 1)

    def field(t: Tensor, y: Tensor) -> Tensor:
        outwards, onwards = y / y.norm(dim=1, keepdim=True), torch.stack((-y[:, 1], y[:, 0]), 1)
        return 2 * math.pi * spiral_series.TURNS * (spiral_series.GROWTH * outwards + onwards)

    return DRAWS * _evaluations(field, start, torch.tensor([0.0, 1.0]), "tsit5", {"rtol": 1e-4, "atol": 1e-4})


def law_of_noisy_spirals() -> float:
    """Evaluations for the paths of a prediction of `spiral_sde`, with the solver and tolerance of spiral/sde."""
    times = torch.linspace(0, 1, spiral_dynamics.POINTS, dtype=torch.float64)
    start = torch.tensor([spiral_dynamics.START]).expand(100, 2)
    field = RowSDE(lambda t, u: spiral_dynamics.drift(u), lambda t, u: 0.2 * u, calculus="ito")
    ends = {"start": times[0], "end": times[-1]}
    tree = BrownianTree(torch.arange(100), (2,), **ends, tolerance=1e-4, dtype=start.dtype, device=start.device)
    steps = {"rtol": 0.3, "atol": 0.3, "exponents": [0.4, 0.1]}
    return PATHS * _evaluations(field, start, times, "sosri2", steps, noise=tree, save="all")


def _evaluations(field: Any, start: Tensor, times: Tensor, solver: str, steps: dict[str, Any], **kind: Any) -> float:
    controller = build(Controller, {"name": "pi", **steps})
    whole = integrate(field, start, times.double(), solver=build(Solver, solver), controller=controller, **kind)
    return float(whole.nfe.double().mean())


LAWS: dict[str, Callable[[], float]] = {"spirals": law_of_spirals, "spiral_sde": law_of_noisy_spirals}


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
    if name in LAWS:
        lines.append(f"| (the law of the data) | | {_plain(LAWS[name](), 4)} | | | |")
    return "\n".join([head, *lines])


def _cell(mean: float, error: float | None) -> str:
    if error is not None and error < 1e-12 * abs(mean):  # of equal values, but for rounding
        error = 0.0
    return _plain(mean, 4) + ("" if error is None else f" ± {_plain(error, 2)}")


def _plain(value: float, digits: int) -> str:
    """So many digits, without an exponent where the number is large."""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text else text


def draw_front(names: Sequence[str], path: Path) -> None:
    """Quality against the evaluations of an answer: one panel an experiment, one marker a method."""
    figure, panels = _panels(names)
    for panel, name in zip(panels, names, strict=True):
        for method, found in rows(name).items():
            (x, dx), (y, dy) = (mean_and_error([row[column] for row in found]) for column in ("nfe", "quality"))
            panel.errorbar(x, y, dy, dx, **_style(method), ls="", capsize=2)
        panel.set(xlabel="evaluations of an answer", ylabel=EXPERIMENTS[name].metric.replace("_", " "), title=name)
    _finish(figure, path)


def draw_training(names: Sequence[str], root: Path, path: Path) -> None:
    """Evaluations of a training solve over the steps of training, of the first seed."""
    figure, panels = _panels(names)
    for panel, name in zip(panels, names, strict=True):
        for method in methods(EXPERIMENTS[name]):
            log = root / f"{name}-{method}-{SEEDS[0]}" / "metrics.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
            curve = [(line["step"], line["train/nfe"]) for line in lines if line.get("train/nfe") is not None]
            if curve:
                panel.plot(*zip(*curve, strict=True), lw=1.2, **{**_style(method), "marker": None})
        panel.set(xlabel="steps of training", ylabel="evaluations of a solve", title=name)
    _finish(figure, path)


ORDER = methods(EXPERIMENTS["annulus"])  # all of them


def _style(method: str) -> dict[str, Any]:
    """Colour, marker and name of a method, the same in every panel."""
    import matplotlib.pyplot as plt

    k = ORDER.index(method)
    colour = plt.get_cmap("tab20")(2 * k % 20 + (k >= 10))
    return {"color": colour, "marker": "osD^v<>PX*ph8"[k], "label": method.replace("_", " ")}


def _panels(names: Sequence[str]) -> tuple[Any, list[Any]]:
    """A figure with a panel for each name, four in a row."""
    import matplotlib.pyplot as plt

    across = min(len(names), 4)
    down = math.ceil(len(names) / across)
    figure, panels = plt.subplots(down, across, figsize=(3.6 * across, 3 * down + 0.6), squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    return figure, list(panels.flat[: len(names)])


def _finish(figure: Any, path: Path) -> None:
    """One legend for all panels, in the order of the methods; then the file."""
    import matplotlib.pyplot as plt

    known: dict[str, Any] = {}
    for panel in figure.axes:
        panel.grid(alpha=0.3, lw=0.5)
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    labels = [method.replace("_", " ") for method in ORDER if method.replace("_", " ") in known]
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend([known[label] for label in labels], labels, loc="lower center", ncol=6, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
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
