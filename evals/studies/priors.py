"""Priors and objectives of nonlinear diffusions on a plane of known density: likelihood against seconds of training.

    python -m evals.studies.priors toy2d [--jobs 2] [--root runs/priors] [--publish]

Eight Gaussians are taken to a Gaussian, a logistic and a mixture prior, and scores are learnt from paths, from local
kernels and by implicit score matching, with one network, one number of updates and the same seeds; the Gaussian prior
has its exact kernel in place of local ones. It writes priors.md and priors.png (nats above the entropy by seconds) into
the folder of the runs, or with `--publish` into evals/results.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import Protocol
from genmodels.files import write_text
from genmodels.model import Model
from genmodels.processes.priors import Gaussian
from genmodels.training import checkpoint
from genmodels.training.run import Run

from . import plans
from .plans import ROOT, Plan

RESULTS = ROOT / "evals" / "results"
SEEDS = (0, 1, 2)
CONFIGS = {"gaussian": "local_dsm_gaussian", "logistic": "local_dsm", "mixture": "local_dsm_mixture"}
LABELS = {"path": "paths", "local": "local kernels", "global": "exact kernel", "ism": "implicit"}
METHODS = [(prior, how) for prior in CONFIGS for how in ("path", "global" if prior == "gaussian" else "local", "ism")]
POINTS, EVERY = 8, 375  # of a curve, and updates between them
ITEMS = 1000  # test items behind each likelihood
DRAWS = 4  # of each bound
DRAWN = 2000
GOAL = 0.25  # nats above the entropy whose time is told
U = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # times of the process at which scores are compared
Row = dict[str, Any]


class Curve(NamedTuple):
    """Seconds of training, and nats above the truth on test items, at each checkpoint."""

    seconds: list[float]
    above: list[float]


def name_of(prior: str, how: str, seed: int) -> str:
    return f"priors-{prior}-{how}-{seed}"


def toy2d() -> Iterator[Plan]:
    """Runs that keep `POINTS` checkpoints; the number of steps is that of the configuration."""
    for prior, how in METHODS:
        for seed in SEEDS:
            kept = (
                f"train.keep={POINTS + 1}",
                f"train.save_every={EVERY}",
                "train.sample_every=0",
                "train.eval_every=0",
            )
            overrides = (f"model.objective={how}", f"seed={seed}", *kept)
            yield Plan(name_of(prior, how, seed), f"toy2d/{CONFIGS[prior]}", "", overrides)


STUDIES = {"toy2d": toy2d}


def above(run: Run, model: Model) -> float:
    """Mean of log p(x) - log p_model(x) over test items."""
    data = run.config.dataset()
    x = data.take("test", torch.arange(ITEMS) % data.size("test")).x
    return float((data.log_prob(x.double()) - model.log_prob(x)).mean())


@torch.no_grad()
def curve(run: Run) -> Curve:
    """At every checkpoint that was kept, of the first average of the weights."""
    model, name = run.load(), run.weights_name()
    found = Curve([], [])
    for step in checkpoint.steps_in(run.checkpoints):
        path = run.folder_of(step) / f"{name}.safetensors"
        if step:
            checkpoint.load_weights(model, checkpoint.read_tensors(path)[0], path)
            found.seconds.append(float(checkpoint.read_state(run.folder_of(step))["seconds"]))
            found.above.append(above(run, model))
    return found


def exact_score(run: Run, model: Model, u: Tensor, y: Tensor) -> Tensor:
    """[N, 2] of the mixture that eight Gaussians become under the process of a standard normal prior."""
    law, transform = run.config.dataset().law, model.transform
    decay = torch.exp(-u / 2)
    means = decay * (law.means.double() - transform.mean) / transform.std
    variances = decay.square() * run.config.dataset().noise ** 2 / transform.std.square() - torch.expm1(-u)
    apart = y[:, None] - means
    shares = (-0.5 * apart.square() / variances).sum(-1).softmax(-1)
    return -(shares[..., None] * apart / variances).sum(1)


@torch.no_grad()
def score_error(run: Run, model: Model) -> float | None:
    """E|s - ∇log q|²/E|∇log q|² over times `U`; None unless the prior is the standard normal one."""
    if not isinstance(model.process.prior, Gaussian):
        return None
    data, g = run.config.dataset(), torch.Generator().manual_seed(0)
    x = model.transform(data.take("test", torch.arange(ITEMS) % data.size("test")).x.double())[0]
    wrong, size = 0.0, 0.0
    for u in torch.tensor(U, dtype=torch.float64):
        z = torch.randn(x.shape, generator=g, dtype=torch.float64)
        y = torch.exp(-u / 2) * x + (-torch.expm1(-u)).sqrt() * z
        exact, given = exact_score(run, model, u, y), model.score(model.process.clock.inverse(u), y.to(model.dtype))
        wrong += float((given.double() - exact).square().sum(1).mean())
        size += float(exact.square().sum(1).mean())
    return wrong / size


def bound(run: Run, model: Model, method: str) -> tuple[float, float]:
    """Nats that a bound is above the truth, and the scatter of one draw for an item."""
    data = run.config.dataset()
    x = data.take("test", torch.arange(ITEMS) % data.size("test")).x
    found = model.likelihood(x, method=method, draws=DRAWS)
    return float((data.log_prob(x.double()) - found.value).mean()), float(found.stderr.mean()) * DRAWS**0.5


def distance(run: Run) -> float:
    """Squared sliced Wasserstein distance of drawn points."""
    sample = {"num_items": DRAWN, "batch_size": DRAWN}
    tree = {"name": "priors", "version": 1, "dataset": {"name": "eight_gaussians"}, "sample": sample}
    (estimate,) = evaluate(run, Protocol({**tree, "metrics": [{"name": "sliced_wasserstein"}]}))["metrics"]
    return estimate["value"]


def row(run: Run) -> Row:
    """What is measured of one run."""
    model, found = run.load(), curve(run)
    (path, path_scatter), (local, local_scatter) = (bound(run, model, method) for method in ("path", "local"))
    return {
        "curve": found,
        "above": found.above[-1],
        "step": 1000 * found.seconds[-1] / run.step,
        "goal": reached(found),
        "score": score_error(run, model),
        "path": path,
        "path_scatter": path_scatter,
        "local": local,
        "local_scatter": local_scatter,
        "distance": distance(run),
    }


def reached(found: Curve) -> float | None:
    """Seconds of training until the curve is at most `GOAL`, by linear interpolation; None if it never is."""
    before = (0.0, math.inf)
    for here in zip(found.seconds, found.above, strict=True):
        if here[1] <= GOAL:
            share = 1.0 if not math.isfinite(before[1]) else (before[1] - GOAL) / (before[1] - here[1])
            return before[0] + share * (here[0] - before[0])
        before = here
    return None


NOTE = (
    f"Bounds are means over {ITEMS} items and {DRAWS} draws, the same for all seeds of training: by chance they are "
    f"off by their scatter over the root of {ITEMS * DRAWS}, also below the truth. Both hold up to the error of paths "
    "of `simulation_steps` steps, which those by local kernels feel more, the more the longer the clock is.\n"
)
COLUMNS = {
    "above": "nats above the truth ↓",
    "path": "bound by paths ↓",
    "path_scatter": "its scatter, a draw ↓",
    "local": "bound by local kernels ↓",
    "local_scatter": "its scatter, a draw ↓",
    "score": "relative error of scores ↓",
    "distance": "squared sliced Wasserstein ↓",
    "step": "ms an update ↓",
    "goal": f"seconds to {GOAL:g} nats above ↓",
}


def summary(values: list[float | None]) -> str:
    """Mean and range over seeds; how many never came there if some did not."""
    there = [v for v in values if v is not None]
    if not there:
        return "" if len(values) else "-"
    text = f"{sum(there) / len(there):.3g} ({min(there):.3g} to {max(there):.3g})"
    return text if len(there) == len(values) else f"{text}; never in {len(values) - len(there)} of {len(values)}"


def table(found: dict[tuple[str, str], list[Row]]) -> str:
    """In Markdown: means over seeds, with their range."""
    head = ["prior", "scores from", *COLUMNS.values()]
    lines = [f"| {' | '.join(head)} |", "|:---|:---|" + "---:|" * len(COLUMNS)]
    for (prior, how), rows in found.items():
        cells = [summary([r[key] for r in rows]) for key in COLUMNS]
        if not cells[-1]:
            cells[-1] = "never"
        lines.append(f"| {prior} | {LABELS[how]} | {' | '.join(cells)} |")
    return "\n".join((*lines, "", NOTE))


def picture(found: dict[tuple[str, str], list[Row]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(CONFIGS), sharey=True)
    for (prior, how), rows in found.items():
        axis = axes[list(CONFIGS).index(prior)]
        for k, r in enumerate(rows):
            colour, label = f"C{list(LABELS).index(how)}", LABELS[how] if k == 0 else None
            axis.plot(r["curve"].seconds, r["curve"].above, color=colour, label=label, lw=1.2)
        axis.set(title=f"{prior} prior", xlabel="seconds of training", yscale="log")
        axis.grid(alpha=0.3, lw=0.5)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("nats above the truth")
    figure.savefig(path, dpi=130)


def rows(root: Path) -> dict[tuple[str, str], list[Row]]:
    """Of the runs that are there."""
    found: dict[tuple[str, str], list[Row]] = {}
    for prior, how in METHODS:
        for seed in SEEDS:
            if (root / name_of(prior, how, seed)).is_dir():
                found.setdefault((prior, how), []).append(row(Run.open(root / name_of(prior, how, seed))))
                print(name_of(prior, how, seed), f"{found[prior, how][-1]['above']:.3f}", flush=True)
    return found


def main() -> None:
    given = plans.parser(__doc__, STUDIES, "runs/priors").parse_args()
    plans.carry_out_all(list(toy2d()), given.root, given.jobs, published=False)
    found, folder = rows(given.root), RESULTS if given.publish else given.root
    write_text(folder / "priors.md", table(found))
    picture(found, folder / "priors.png")
    print(folder / "priors.md", folder / "priors.png", sep="\n")


if __name__ == "__main__":
    main()
