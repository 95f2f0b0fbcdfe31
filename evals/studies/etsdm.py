"""Networks that share early times (E-TSDM) beside ones that do not, on digits: Lipschitz constants in t, and quality.

    python -m evals.studies.etsdm digits [--jobs 2] [--root runs/etsdm] [--publish]

Five models are trained alike: told in what interval an early time lies, the time itself, the log-SNR or √t, and one
of the linear path; then E-TSDM with other numbers of intervals n and other t̃. It writes etsdm.md (Lipschitz constants,
errors at early times, Fréchet distances by evaluations) and etsdm.png (K over t, distances) into the folder of the
runs, or with `--publish` into evals/results.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genmodels.diffusion.parametrization import target
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import Protocol
from genmodels.files import write_text
from genmodels.metrics.lipschitz import Grid, grid, perturbed_error, quotients
from genmodels.rng import SeedNoise
from genmodels.training.run import Run
from genmodels.types import Batch

from . import plans
from .paths_report import shown
from .plans import ROOT, Plan

RESULTS = ROOT / "evals" / "results"
T = 1000
CURVE = (*range(1, 121), *range(130, 300, 10), *range(300, 1000, 50), T)
ITEMS = 250  # noised test items behind each K
OFF = 0.05  # standard deviation of the perturbation of early states, in model space
BUDGETS = (5, 10, 20, 50)
# one evaluation a step; 2M extrapolates over steps of the log-SNR, the last of which is huge if they are even in t
SOLVERS: dict[str, Any] = {"ddim": "even", "dpmpp": {"name": "shifted", "shift": 1.0}}
FEW = (10, 50)  # of the ablations
DRAWN = 2000
MAIN = {
    "shared": ("digits/etsdm", "E-TSDM, n = 5, t̃ = 0.1"),
    "unshared": ("digits/etsdm_unshared", "t itself"),
    "log_snr": ("digits/etsdm_log_snr", "log-SNR"),
    "linear": ("digits/etsdm_linear", "linear path, velocity"),
}
OTHERS = [(n, 0.1) for n in (1, 2, 10, 20)] + [(5, until) for until in (0.05, 0.2, 0.4)]
OTHER_LABELS = {"remap": ("model.time_condition={name: remap, power: 0.5}", "√t")}
Row = dict[str, Any]
Pair = tuple[float, float]


class Constants(NamedTuple):
    """K per step of T, by time; with standard errors."""

    at: Grid
    value: Tensor
    stderr: Tensor


def digits() -> Iterator[Plan]:
    """The models of the comparison, then those of the ablation."""
    for name, (config, _) in MAIN.items():
        yield Plan(f"etsdm-{name}", config, "")
    for name, (override, _) in OTHER_LABELS.items():
        yield Plan(f"etsdm-{name}", "digits/etsdm", "", (override,))
    for n, until in OTHERS:
        yield Plan(f"etsdm-{n}-{until}", "digits/etsdm", "", (shared(n, until),))


STUDIES = {"digits": digits}


def shared(n: int, until: float) -> str:
    """The override that shares the times below `until` in n intervals."""
    return f"model.time_condition={{name: shared, intervals: {n}, until: {until}}}"


def mean_of(values: Tensor) -> Pair:
    """Mean over items and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def protocol() -> Protocol:
    """Fréchet distance of drawn digits alone; small enough for every sampler and budget."""
    sample = {"num_items": DRAWN, "labels": "train-marginal", "batch_size": DRAWN // 5}  # none is timed a second time
    metrics = [{"name": "frechet", "features": "digits"}]
    return Protocol(
        {"name": "etsdm", "version": 1, "dataset": {"name": "digits"}, "sample": sample, "metrics": metrics}
    )


def distance(run: Run, solver: str, budget: int) -> Pair:
    """Fréchet distance at so many evaluations, and its standard error."""
    options = {"solver": solver, "num_steps": budget, "grid": SOLVERS[solver]}
    (estimate,) = evaluate(run, protocol(), overrides={"sample": options})["metrics"]
    return estimate["value"], estimate["stderr"]


def held_out(run: Run) -> tuple[Batch, Tensor]:
    """Test items, and seeds for their noise."""
    data, seeds = run.config.dataset(), torch.arange(ITEMS)
    return data.take("test", seeds % data.size("test")), seeds


@torch.no_grad()
def constants(run: Run) -> Constants:
    """K over t on noised test items."""
    model, (batch, seeds) = run.load(), held_out(run)
    found = grid(model, T, CURVE)
    values = quotients(model, found, batch, seeds) / T
    return Constants(found, values.mean(1), values.std(1) / ITEMS**0.5)


@torch.no_grad()
def early_errors(run: Run) -> tuple[Pair, Pair]:
    """Mean squared error of the network's answer for t < 0.1, and the same with states off by noise of size `OFF`."""
    model, (batch, seeds) = run.load(), held_out(run)
    condition = batch.condition if model.conditional else None
    noise, errors = SeedNoise(seeds, purpose="early"), []
    y, _ = model.transform(batch.x, noise)
    eps, off = (noise.normal(*y.shape[1:], dtype=y.dtype) for _ in range(2))
    for t in torch.linspace(0.005, 0.095, 10, dtype=torch.float64):
        scales = model.schedule(t)
        x = scales.alpha * y + scales.sigma * eps
        wanted = target(model.denoiser.prediction, y, eps, scales, model.denoiser.sigma_data)
        answer = partial(model.answer, condition=condition)
        errors.append(torch.stack([perturbed_error(answer, t, x, wanted, size * off) for size in (0.0, OFF)]))
    plain, perturbed = torch.stack(errors).mean(0)  # of each item, which has one noise at all times
    return mean_of(plain), mean_of(perturbed)


def summary(found: Constants) -> Row:
    """The largest K inside intervals, over edges, and at any time but those, each with its standard error.

    The largest of noisy means errs upwards by about that error.
    """
    kinds = {"inside": found.at.inside, "edge": found.at.edge, "other": ~(found.at.inside | found.at.edge)}
    return {name: largest(found, where) for name, where in kinds.items()}


def largest(found: Constants, where: Tensor) -> Pair | None:
    """The largest K among some times."""
    if not where.any():
        return None
    k = int(found.value[where].argmax())
    return float(found.value[where][k]), float(found.stderr[where][k])


def label_of(name: str) -> str:
    """How a run is called in tables."""
    if name in MAIN:
        return MAIN[name][1]
    if name in OTHER_LABELS:
        return OTHER_LABELS[name][1]
    n, until = name.split("-")
    return f"E-TSDM, n = {n}, t̃ = {until}"


def rows(root: Path) -> Iterator[Row]:
    """One row a run that is there: constants, errors, and distances by (solver, budget)."""
    for plan in digits():
        name = plan.name.removeprefix("etsdm-")
        if not (root / plan.name).is_dir():
            continue
        run = Run.open(root / plan.name)
        budgets = BUDGETS if name in MAIN else FEW
        distances = {(solver, b): distance(run, solver, b) for solver in SOLVERS for b in budgets}
        plain, perturbed = early_errors(run)
        found = constants(run)
        row = {"name": name, "label": label_of(name), "constants": found, "distances": distances}
        yield {**row, **summary(found), "error": plain, "perturbed": perturbed}
        print(plan.name, flush=True)


def table(found: list[Row]) -> str:
    """The rows in Markdown; K per 1/1000 of time."""
    columns = [(solver, budget) for solver in SOLVERS for budget in BUDGETS]
    head = ["network is told", "K inside ↓", "K over an edge ↓", "largest K elsewhere ↓"]
    head += ["error, t < 0.1 ↓", f"states off by {OFF:g} ↓", *(f"FD {s}, {b} evaluations ↓" for s, b in columns)]
    lines = [f"| {' | '.join(head)} |", "|:---|" + "---:|" * (len(head) - 1)]
    for r in found:
        cells = [shown(r[key]) for key in ("inside", "edge", "other", "error", "perturbed")]
        cells += [shown(r["distances"].get(column)) for column in columns]
        lines.append(f"| {r['label']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7")


def draw(found: list[Row], path: Path) -> None:
    """K over t, where jumps at edges are points and K = 0 inside intervals is not drawn; FD over evaluations."""
    import matplotlib.pyplot as plt

    figure, (panel, quality) = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
    kept = [r for r in found if r["name"] in (*MAIN, *OTHER_LABELS)]
    for colour, r in zip(COLOURS, kept, strict=False):
        at, value, error = r["constants"].at, r["constants"].value, r["constants"].stderr
        line, edge = ~(at.inside | at.edge), at.edge
        # a line does not lead over the times whose labels are shared
        curve = torch.where(line, value, torch.nan)
        panel.plot(at.t, curve, color=colour, lw=1.2, label=r["label"])
        panel.fill_between(at.t, curve - 2 * error, curve + 2 * error, color=colour, alpha=0.2, lw=0)
        panel.errorbar(at.t[edge], value[edge], 2 * error[edge], color=colour, ls="", marker="o", mfc="none", capsize=2)
        for solver, style in zip(SOLVERS, ("-", ":"), strict=True):
            points = [(b, *r["distances"][solver, b]) for b in BUDGETS if (solver, b) in r["distances"]]
            drawn = {"color": colour, "ls": style, "marker": "o", "ms": 3.5, "lw": 1.2, "capsize": 2}
            if points:
                quality.errorbar(*zip(*points, strict=True), **drawn, label=r["label"] if style == "-" else None)
    panel.set(xscale="log", yscale="log", xlabel="t", ylabel="K(t), per 1/1000 of time")
    panel.set_title("how fast the answer changes (points: over an edge)", fontsize=9.5)
    quality.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="FD-digits")
    quality.set_title("DDIM (solid) and DPM-Solver++ 2M (dotted)", fontsize=9.5)
    quality.set_xticks(BUDGETS, map(str, BUDGETS))
    quality.set_xticks([], minor=True)
    quality.yaxis.set_major_formatter("{x:g}")
    quality.yaxis.set_minor_formatter("{x:g}")
    for each in (panel, quality):
        each.grid(alpha=0.3, lw=0.5)
        each.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    given = plans.parser(__doc__, STUDIES, "runs/etsdm").parse_args()
    plans.carry_out_all(list(digits()), given.root, given.jobs, published=False)
    found, folder = list(rows(given.root)), RESULTS if given.publish else given.root
    write_text(folder / "etsdm.md", table(found))
    draw(found, folder / "etsdm.png")
    print(folder / "etsdm.md", folder / "etsdm.png", sep="\n")


if __name__ == "__main__":
    main()
