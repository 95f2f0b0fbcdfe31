"""Editing where every velocity is exact: what is wrong with an edit is the method's fault, and none of a network's.

    python -m evals.studies.editing_mixtures [--publish]

Items of a ring of eight Gaussians are edited into such of a wider ring that is turned by half a mode, and compared with
their exact edits: both rings' flows from the same noise. Solvers are compared by the evaluations that they take on the
flow of the first ring: from noise to items, back, and there and back. With `--publish` it writes
evals/results/editing_mixtures.md and editing_mixtures.png. It takes seconds on a CPU.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genmodels.distributions import GaussianMixture
from genmodels.editing.editor import Prompt, Walk
from genmodels.editing.exact import MixtureEditor
from genmodels.editing.method import EditMethod
from genmodels.files import write_text
from genmodels.registry import build
from genmodels.rng import SeedNoise
from genmodels.solvers.base import Solver
from genmodels.solvers.runge_kutta import Dopri8

from .plans import ROOT

RESULTS = ROOT / "evals" / "results"
EDITOR = MixtureEditor()
EXACT = 64  # steps of order 8, which err by rounding alone
SEEDS = 10  # batches of noises for methods that draw

METHODS: dict[str, dict[str, Any]] = {
    "RF-Solver, 15 steps": {"name": "rf_edit", "num_steps": 15, "share": None},
    "RF-Solver, 25": {"name": "rf_edit", "num_steps": 25, "share": None},
    "RF-Solver of order 3, 10": {"name": "rf_edit", "num_steps": 10, "share": None, "order": 3},
    "Heun, 15": {"name": "heun", "num_steps": 15},
    "Heun, 25": {"name": "heun", "num_steps": 25},
    "FireFlow, 29": {"name": "fireflow", "num_steps": 29, "share": None},
    "FireFlow, 49": {"name": "fireflow", "num_steps": 49, "share": None},
    "AB2, 30": {"name": "ab2", "num_steps": 30},
    "AB2, 50": {"name": "ab2", "num_steps": 50},
    "Uni-Inv, 30": {"name": "uni_inv", "num_steps": 30},
    "Uni-Inv, 50": {"name": "uni_inv", "num_steps": 50},
    "Euler, 30": {"name": "vanilla", "num_steps": 30},
    "Euler, 50": {"name": "vanilla", "num_steps": 50},
    "fixed points of RF-Solver, 15, 20 iterations": {"name": "fixed_point", "num_steps": 15},
    "Uni-Edit, 15, α 0.6, ω 5": {"name": "uni_edit"},
    "Uni-Edit, 15, α 0.6, ω 1": {"name": "uni_edit", "omega": 1.0},
    "Uni-Edit, 15, α 0.8, ω 1": {"name": "uni_edit", "alpha": 0.8, "omega": 1.0},
    "FlowEdit, 28, n_max 24": {"name": "flowedit"},
    "FlowEdit, 50, n_max 50, n_avg 8": {"name": "flowedit", "num_steps": 50, "n_max": 50, "n_avg": 8},
    "DNAEdit, 28, mvg 0.85, skip 4": {"name": "dnaedit"},
    "RF-Inversion, 28, stop 7": {"name": "rf_inversion"},
    "RF-Inversion, 28, stop 14": {"name": "rf_inversion", "stop": 14},
    "RF-Inversion, 28, stop 7, stochastic": {"name": "rf_inversion", "stochastic": True},
}
DRAWING = ("flowedit", "dnaedit", "rf_inversion")
SOLVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # up and down
    "Euler": ({"name": "euler"}, {"name": "euler"}),
    "Uni-Inv up, Euler down": ({"name": "uni_inv"}, {"name": "euler"}),
    "AB2": ({"name": "ab2"}, {"name": "ab2"}),
    "Heun": ({"name": "heun"}, {"name": "heun"}),
    "RF-Solver": ({"name": "rf_solver"}, {"name": "rf_solver"}),
    "FireFlow": ({"name": "fireflow"}, {"name": "fireflow"}),
    "RF-Solver of order 3": ({"name": "rf_solver", "order": 3}, {"name": "rf_solver", "order": 3}),
    "RK4": ({"name": "rk4"}, {"name": "rk4"}),
}
BUDGETS = (8, 16, 32, 64, 128)  # evaluations each way
FITTED = 3  # of the largest budgets, to which slopes are fitted
SHOWN = ("RF-Solver, 15 steps", "FlowEdit, 28, n_max 24", "DNAEdit, 28, mvg 0.85, skip 4", "RF-Inversion, 28, stop 7")


class Row(NamedTuple):
    """Figures of one edit."""

    nfe: int
    movement: float
    log_prob: float
    rms: float


class Errors(NamedTuple):
    """Root mean squares of one solver by budget, with the evaluations taken."""

    nfe: list[int]
    down: list[float]
    up: list[float]
    trip: list[float]

    def slope(self, what: str) -> float:
        """Of the logarithm of the error by that of evaluations, fitted by least squares."""
        n, e = (torch.tensor(v[-FITTED:], dtype=torch.float64).log() for v in (self.nfe, getattr(self, what)))
        n = n - n.mean()
        return float((n * e).sum() / n.square().sum())


def ring(radius: float, turn: float) -> GaussianMixture:
    """Eight modes of deviation 0.3 and equal weight."""
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4 + turn
    means = radius * torch.stack((angles.cos(), angles.sin()), -1)
    return GaussianMixture.from_tensors(torch.ones(8), means, torch.full((8, 2), 0.3**2))


SOURCE, TARGET = Prompt(ring(2.0, 0.0)), Prompt(ring(2.5, math.pi / 8))


def quantiles(side: int) -> Tensor:
    """[side², 2] normal quantiles at the middles of cells of equal probability."""
    one = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side)
    return torch.cartesian_prod(one, one)


def walked(solver: Solver, prompt: Prompt, x: Tensor, num_steps: int, to_data: bool) -> tuple[Tensor, int]:
    walk = Walk(EDITOR, prompt, EDITOR.times(num_steps, x))
    return walk.solve(solver, x, to_data), walk.calls


def exact(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noises, the items of the first ring that they make, and those of the second."""
    z = quantiles(side)
    return z, *(walked(Dopri8(), prompt, z, EXACT, True)[0] for prompt in (SOURCE, TARGET))


def figures(x: Tensor, y: Tensor, wanted: Tensor, nfe: int) -> Row:
    movement, log_prob = (y - x).norm(dim=1).mean(), TARGET.condition.log_prob(y).mean()
    return Row(nfe, float(movement), float(log_prob), rms(y - wanted))


def rms(apart: Tensor) -> float:
    return float(apart.square().sum(1).mean().sqrt())


def edited(node: dict[str, Any], x: Tensor, batch: int = 0) -> tuple[Tensor, int]:
    method = build(EditMethod, node)
    seeds = range(batch * len(x), (batch + 1) * len(x))
    made = method.edit(EDITOR, x, SOURCE, TARGET, EDITOR.times(method.num_steps, x), SeedNoise(seeds, purpose="edit"))
    return made.x, made.nfe


def edits(names: tuple[str, ...] = tuple(METHODS)) -> dict[str, list[Row]]:
    """Of 256 items, for each batch of noises."""
    _, x, wanted = exact(16)
    found = {"none": [figures(x, x, wanted, 0)], "exact": [figures(x, wanted, wanted, 0)]}
    for name in names:
        batches = range(SEEDS if METHODS[name]["name"] in DRAWING else 1)
        found[name] = [figures(x, y, wanted, nfe) for y, nfe in (edited(METHODS[name], x, k) for k in batches)]
    return found


def steps(solver: Solver, budget: int) -> int:
    """As many as take at most so many evaluations, with those before the first step."""
    walk = Walk(EDITOR, SOURCE, EDITOR.times(1, torch.zeros(0)))
    solver.start(walk, torch.tensor(0.0, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    return (budget - walk.calls) // solver.stages


def errors(names: tuple[str, ...] = tuple(SOLVERS)) -> dict[str, Errors]:
    """Of 64 items."""
    z, x, _ = exact(8)
    found = {}
    for name in names:
        up, down = (build(Solver, node) for node in SOLVERS[name])
        found[name] = Errors([], [], [], [])
        for budget in BUDGETS:
            n = steps(up, budget) if up.registered_name == down.registered_name else budget
            above, rise = walked(up, SOURCE, x, n, False)
            below, fall = walked(down, SOURCE, z, n, True)
            again, _ = walked(down, SOURCE, above, n, True)
            for kept, value in zip(found[name], (fall, rms(below - x), rms(above - z), rms(again - x)), strict=True):
                kept.append(value)
            assert abs(rise - fall) <= 1, name
    return found


def summary(values: list[float]) -> str:
    """Mean ± standard deviation over batches of noises; decimals that rounding of states does not reach."""
    v = torch.tensor(values, dtype=torch.float64)
    mean = f"{v.mean():.4f}" if len(v) == 1 or v.std() < 0.002 else f"{v.mean():.3f}"
    return mean if len(v) == 1 else f"{v.mean():.3f} ± {v.std():.3f}"


def edit_table(found: dict[str, list[Row]]) -> str:
    lines = [
        "| method | NFE | movement | log p of the target ↑ | RMS from the exact edit ↓ |",
        "|:---|---:|---:|---:|---:|",
    ]
    for name, rows in found.items():
        apart = [r.rms for r in rows]
        last = summary(apart) if len(rows) > 1 else "0" if name == "exact" else f"{apart[0]:.2g}"
        cells = [summary([r.movement for r in rows]), summary([r.log_prob for r in rows]), last]
        lines.append(f"| {name} | {rows[0].nfe or ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


WAYS = {"down": "noise to items", "up": "items to noise", "trip": "there and back"}


def error_table(found: dict[str, Errors], what: str) -> str:
    lines = [
        f"| {WAYS[what]}: RMS error ↓ at NFE {'each way ' if what == 'trip' else ''}≤ | "
        f"{' | '.join(map(str, BUDGETS))} | slope |",
        "|:---|" + "---:|" * (len(BUDGETS) + 1),
    ]
    for name, each in found.items():
        cells = [f"{v:.2e}" for v in getattr(each, what)]
        lines.append(f"| {name} | {' | '.join(cells)} | {each.slope(what):.2f} |")
    return "\n".join(lines)


NOTE = f"""Items are the exact images of a grid of normal quantiles: 256 of the edits, 64 of the errors. Movement is the
mean distance that an edit goes, log p the mean of the log density in nats. The exact edit is that of both flows, which
is neither the nearest item of the target nor the likeliest. NFE counts evaluations both ways. Methods that draw are
given as mean ± standard deviation over {SEEDS} batches of noises. A point of the plane is one position, so that the
mask of Uni-Edit is 0. Slopes are of log error by log NFE over the last {FITTED} columns; where a solver cannot take as
many evaluations, it takes fewer.
"""


def table(rows: dict[str, list[Row]], found: dict[str, Errors]) -> str:
    """In Markdown."""
    return "\n\n".join((edit_table(rows), *(error_table(found, what) for what in WAYS), NOTE))


def picture(found: dict[str, Errors], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    for axis, (what, title) in zip(top.subplots(1, 3, sharey=True), WAYS.items(), strict=True):
        for name, each in found.items():
            style = "--" if name.startswith("Uni-Inv") else "-"  # its way down is Euler's
            axis.plot(each.nfe, getattr(each, what), style, marker="o", ms=3, lw=1.2, label=name)
        axis.set(xscale="log", yscale="log", title=title, xlabel="NFE" + " each way" * (what == "trip"))
        axis.set_xticks(BUDGETS, [str(n) for n in BUDGETS], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    top.axes[0].set_ylabel("root mean square error")
    top.legend(*top.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    _, x, wanted = exact(8)
    shown = {"exact": wanted} | {name: edited(METHODS[name], x)[0] for name in SHOWN}
    for axis, (name, y) in zip(bottom.subplots(1, len(shown), sharex=True, sharey=True), shown.items(), strict=True):
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            axis.plot(*zip(a, b, strict=True), color="0.75", lw=0.7, zorder=1)
        axis.scatter(*x.T, s=6, color="C0", label="item", zorder=2)
        axis.scatter(*y.T, s=6, color="C3", label="edit", zorder=3)
        axis.set(title=name.split(",")[0], aspect="equal", xticks=(), yticks=())
    bottom.axes[0].legend(fontsize=8, frameon=False, loc="center")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="write evals/results/editing_mixtures.md and .png")
    given = parser.parse_args()
    found = errors()
    text = table(edits(), found)
    print(text)
    if given.publish:
        picture(found, RESULTS / "editing_mixtures.png")
        write_text(RESULTS / "editing_mixtures.md", text)


if __name__ == "__main__":
    main()
