"""Scores of physical processes learnt from local kernels, against Fokker-Planck and closed-form references.

    python -m evals.studies.physics [--root runs/physics] [--steps 800] [--publish]

Four forward processes from a Gaussian start: a particle in a double well; four particles that attract each other in a
moving trap; three rotors on a ring, each pulling the others to its angle; and a swimmer in a trap, whose velocity alone
has noise. Their scores are known from grids, and of the linear process in closed form. Each is learnt by kernels of
several orders and by implicit score matching, and the double well from whole paths as well, with one network and one
number of updates. Figures are E|Gᵀ(s - ∇ log p)|²/E|Gᵀ∇ log p|² at several times, G the noise: of a swimmer the part
along its velocity, which is all that its reverse asks for. Its force bends only where there is no noise, so that Itô's
term is 0 and "order 1 + Itô" is order 1; order 0 has no noise in the position, and is refused. With `--publish` it
writes evals/results/physics.md and physics.png.
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
from genmodels.training.loop import train

from .physics_references import REFERENCES, SETTINGS, SHAPES, START, TIMES
from .plans import ROOT

RESULTS = ROOT / "evals" / "results"
BATCH = {"double_well": 512, "trapped_particles": 128, "kuramoto": 128, "swimmer": 128}  # exponentials of matrices cost
STEPS = {"double_well": 10, "trapped_particles": 4, "kuramoto": 4, "swimmer": 4}  # of simulated paths
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
    "kuramoto": {
        "order 0, δ = 0.2": {"order": 0, "increment": LONG},
        "order 1, δ = 0.2": {"order": 1, "increment": LONG},
        "order 1 + Itô, δ = 0.2": {"order": "ito", "increment": LONG},
        "order 1 + Itô, δ = 0.2, antithetic": {"order": "ito", "increment": LONG, "variance": "antithetic"},
        "implicit": {"objective": "ism"},
    },
    "swimmer": {
        "order 1, δ = 0.2": {"order": 1, "increment": LONG},
        "order 1, δ = 0.2, antithetic": {"order": 1, "increment": LONG, "variance": "antithetic"},
        "implicit": {"objective": "ism"},
    },
}
Errors = dict[str, dict[str, list[float]]]


def config(process: str, method: str, steps: int) -> Config:
    """The run of a method: one small network, the same updates for all."""
    given = dict(METHODS[process][method])
    node: dict[str, Any] = {"name": process, **SETTINGS[process]}
    if process == "trapped_particles":
        node["exact"] = given.pop("exact", False)
    model = {
        "name": "local_dsm",
        "network": {"name": "mlp", "hidden": [64, 64]},
        "process": node,
        "simulation_steps": STEPS[process],
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


def errors(root: Path, steps: int) -> Errors:
    """Relative squared errors by process and method, at the times."""
    found: Errors = {}
    for process, methods in METHODS.items():
        found[process], references = {}, REFERENCES[process]()
        for method in methods:
            start = from_tensors(data(process), transform="identity")  # forces act on positions as they are
            run = train(config(process, method, steps), root=root, dataset=start, quiet=True)
            score = scored(run.load())
            found[process][method] = [r.error(score) for r in references]
            print(process, method, *(f"{v:.4f}" for v in found[process][method]), flush=True)
    return found


def scored(model: Model) -> Callable[[float, Tensor], Tensor]:
    @torch.no_grad()
    def score(t: float, y: Tensor) -> Tensor:
        return model.score(torch.tensor(t, dtype=torch.float64), y.to(model.dtype)).double()

    return score


def table(found: Errors) -> str:
    """In Markdown."""
    head = [
        f"| E\\|Gᵀ(s - ∇ log p)\\|²/E\\|Gᵀ∇ log p\\|² at t = | {' | '.join(map(str, TIMES))} |",
        "|:---|" + "---:|" * 4,
    ]
    rows = [
        f"| {process.replace('_', ' ')}, {method} | {' | '.join(f'{v:.2g}' for v in values)} |"
        for process, methods in found.items()
        for method, values in methods.items()
    ]
    return "\n".join([*head, *rows]) + "\n"


def picture(found: Errors, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    for axis, (process, methods) in zip(figure.subplots(2, 2, sharey=True).flat, found.items(), strict=True):
        for method, values in methods.items():
            axis.plot(TIMES, values, marker="o", label=method)
        axis.set(yscale="log", xlabel="time of the process", title=process.replace("_", " "))
        axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in figure.axes[::2]:
        axis.set_ylabel("relative squared error of the score")
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
