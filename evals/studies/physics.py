"""Scores of physical processes learnt from local kernels, against Fokker-Planck and closed-form references.

    python -m evals.studies.physics [--root runs/physics] [--steps 800] [--publish]

Two forward processes from a Gaussian start: a particle in a double well, whose density at every time is solved for on a
grid, and four particles that attract each other in a moving trap, whose law is Gaussian and known. Each is learnt by
kernels of several orders, from whole paths and by implicit score matching, with one network and one number of updates.
Figures are E|s - ∇ log p|²/E|∇ log p|² at several times. With `--publish` it writes evals/results/physics.md and
physics.png.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genmodels.config import Config
from genmodels.data.external import from_tensors
from genmodels.files import write_text
from genmodels.model import Model
from genmodels.processes.fokker_planck import FokkerPlanck
from genmodels.processes.physics import DoubleWell, TrappedParticles
from genmodels.training.loop import train

from .plans import ROOT

RESULTS = ROOT / "evals" / "results"
TIMES = (0.1, 0.3, 0.5, 1.0)
START = {"double_well": (0.5, 0.3), "trapped_particles": (1.0, 0.5)}  # mean and deviation of every component
SHAPES = {"double_well": (1,), "trapped_particles": (4, 1)}
BATCH = {"double_well": 512, "trapped_particles": 128}  # dense kernels take exponentials of matrices, row by row
LONG = 0.2  # an increment at which orders differ
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "double_well": {
        "order 0, δ = 0.2": {"order": 0, "increment": LONG},
        "order 1, δ = 0.2": {"order": 1, "increment": LONG},
        "order 1 + Itô, δ = 0.2": {"order": "ito", "increment": LONG},
        "order 1 + Itô, δ chosen": {"order": "ito"},
        "order 1 + Itô, δ chosen, antithetic": {"order": "ito", "variance": "antithetic"},
        "order 1 + Itô, δ = 0.05, antithetic": {"order": "ito", "increment": 0.05, "variance": "antithetic"},
        "paths": {"objective": "path"},
        "implicit": {"objective": "ism"},
    },
    "trapped_particles": {
        "order 0, δ = 0.2": {"order": 0, "increment": LONG},
        "order 1 + Itô, δ = 0.2": {"order": "ito", "increment": LONG},
        "exact kernel": {"exact": True},
        "implicit": {"objective": "ism"},
    },
}
Errors = dict[str, dict[str, list[float]]]


def config(process: str, method: str, steps: int) -> Config:
    """The run of a method: one small network, the same updates for all."""
    given = dict(METHODS[process][method])
    node: dict[str, Any] = {"name": process}
    if process == "trapped_particles":
        node["exact"] = given.pop("exact", False)
    model = {
        "name": "local_dsm",
        "network": {"name": "mlp", "hidden": [64, 64]},
        "process": node,
        "simulation_steps": 10 if process == "double_well" else 4,
        "t_min": 0.02,
        "objective": "local",
        **given,
    }
    settings = {
        "steps": steps,
        "batch_size": BATCH[process],
        "optimizer": {"name": "adam", "lr": 3e-3},
        "learning_rate": {"name": "cosine"},
        "sample_every": 0,
        "eval_every": 0,
        "save_every": steps,
        "log_every": steps,
        "ema": [{"name": "constant", "value": 0.99}],
    }
    name = f"{process}-{list(METHODS[process]).index(method)}"
    return Config({"name": name, "data": "external", "model": model, "train": settings})


def data(process: str, count: int = 20_000) -> Tensor:
    mean, deviation = START[process]
    g = torch.Generator().manual_seed(0)
    return mean + deviation * torch.randn(count, *SHAPES[process], generator=g)


def double_well_errors(score: Callable[[float, Tensor], Tensor]) -> list[float]:
    """Relative errors at the times, over the density that a grid of 1600 cells has."""
    process, (mean, deviation) = DoubleWell(shape=(1,)), START["double_well"]
    q = float(process.amplitude(torch.zeros(()))) ** 2
    equation = FokkerPlanck(lambda t, y: process.force(t, y), [q], low=[-4.0], high=[4.0], cells=[1600])
    start = equation.density(lambda y: torch.exp(-0.5 * ((y[:, 0] - mean) / deviation).square()))
    found = []
    for t, density in zip(TIMES, equation.solve(start, (0.0, *TIMES)), strict=True):
        wrong, size = density.score_error(lambda y, t=t: score(t, y))
        found.append(wrong / size)
    return found


def trapped_errors(score: Callable[[float, Tensor], Tensor]) -> list[float]:
    """The same over 4,000 draws of the exact Gaussian law."""
    process, (mean, deviation) = TrappedParticles(shape=SHAPES["trapped_particles"]), START["trapped_particles"]
    size, found = process.size, []
    for t in TIMES:
        zero, end = torch.zeros(1, dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
        basis = torch.eye(size, dtype=torch.float64).reshape(size, *process.shape)
        origin = process.kernel(zero, end, torch.zeros(1, *process.shape, dtype=torch.float64))
        moved = (process.kernel(zero, end, basis).mean - origin.mean).reshape(size, size).mT  # affine in the start
        covariance = origin.covariance[0] + deviation**2 * moved @ moved.mT
        law = torch.distributions.MultivariateNormal(origin.mean.flatten() + moved.sum(1) * mean, covariance)
        z = torch.randn(4000, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = law.mean + z @ torch.linalg.cholesky(covariance).mT
        exact = -torch.linalg.solve(covariance, (y - law.mean).mT).mT
        given = score(t, y.reshape(-1, *process.shape)).reshape(-1, size)
        found.append(float((given - exact).square().sum(1).mean() / exact.square().sum(1).mean()))
    return found


REFERENCES = {"double_well": double_well_errors, "trapped_particles": trapped_errors}


def errors(root: Path, steps: int) -> Errors:
    """Relative squared errors by process and method, at the times."""
    found: Errors = {}
    for process, methods in METHODS.items():
        found[process] = {}
        for method in methods:
            start = from_tensors(data(process), transform="identity")  # forces act on positions as they are
            run = train(config(process, method, steps), root=root, dataset=start, quiet=True)
            found[process][method] = REFERENCES[process](scored(run.load()))
            print(process, method, *(f"{v:.4f}" for v in found[process][method]), flush=True)
    return found


def scored(model: Model) -> Callable[[float, Tensor], Tensor]:
    @torch.no_grad()
    def score(t: float, y: Tensor) -> Tensor:
        return model.score(torch.tensor(t, dtype=torch.float64), y.to(model.dtype)).double()

    return score


def table(found: Errors) -> str:
    """In Markdown."""
    head = [f"| E\\|s - ∇ log p\\|²/E\\|∇ log p\\|² at t = | {' | '.join(map(str, TIMES))} |", "|:---|" + "---:|" * 4]
    rows = [
        f"| {process.replace('_', ' ')}, {method} | {' | '.join(f'{v:.2g}' for v in values)} |"
        for process, methods in found.items()
        for method, values in methods.items()
    ]
    return "\n".join([*head, *rows]) + "\n"


def picture(found: Errors, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axis, (process, methods) in zip(figure.subplots(1, 2), found.items(), strict=True):
        for method, values in methods.items():
            axis.plot(TIMES, values, marker="o", label=method)
        axis.set(yscale="log", xlabel="time of the process", title=process.replace("_", " "))
        axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("relative squared error of the score")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/physics"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--publish", action="store_true", help="write evals/results/physics.md and physics.png")
    given = parser.parse_args()
    found = errors(given.root, given.steps)
    print(table(found))
    if given.publish:
        write_text(RESULTS / "physics.md", table(found))
        picture(found, RESULTS / "physics.png")


if __name__ == "__main__":
    main()
