"""Paths x samplers x evaluations on digits: what a path changes in training, what in sampling, and what a sampler does.

    python -m evals.studies.paths digits [--jobs 2] [--root runs/paths] [--publish]

One network and one training serve all paths. Rule: they are flow matching (velocity, even times, no weighting), so that
nothing but the path differs; but "edm" is trained as EDM is (a network cannot be fed noise of σ = 80 as it is), and
"vp_eps" is the path of "vp" by noise prediction, as DDPM is trained. Unconditional and, by fewer samplers,
class-conditional without guidance.

Rule of times: Euler and Heun take even steps of the path's own t, which is what a path chooses; on EDM's path they are
EDM's, steps in σ between even times. (Heun asks at the first time as well, where σ' of VP and cosine is large.) Solvers
of denoisers take the same noise levels on every path, as their steps depend on these alone: what differs between paths
is what was learnt. These are evenly spaced in σ/(α + σ); DPM-Solver++ 3M, which extrapolates over two steps of the
log-SNR, has EDM's (ρ = 7), where the last step is not many times the one before. A budget buys as many steps as it
pays for.

The linear models are sampled on the paths of the others as well (`sample.schedule`). It writes paths.md, paths.json
(every figure) and paths.png into the folder of the runs, or with `--publish` into evals/results, and publishes what
`digits_paths` says of the runs. Any single figure is that of

    python -m evals.evaluate runs/paths/<run> --protocol digits_paths sample.solver=ddim sample.num_steps=10 …
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import Protocol
from genmodels.evaluation.results import read
from genmodels.files import write_text
from genmodels.hashing import digest
from genmodels.registry import build
from genmodels.solvers.base import Solver
from genmodels.training.run import Run

from . import paths_report, plans
from .plans import ROOT, Plan

RESULTS = ROOT / "evals" / "results"
PROTOCOL = "digits_paths"
BUDGETS = (2, 5, 10, 20, 50, 100)
SHARES, LEVELS = {"name": "shifted", "shift": 1.0}, {"name": "karras", "rho": 7.0}
PARTS = 50  # of the evidence bound
KEPT = "paths-measured.json"  # in the folder of a run, so that a study that was interrupted goes on

VELOCITY = ("model.prediction=velocity", "model.times={name: uniform}")
PATHS = {
    "linear": ("digits/flow_matching", VELOCITY),
    "kinetic_optimal": ("digits/kinetic_optimal", VELOCITY),
    "trigonometric": ("digits/trigonometric", VELOCITY),
    "cosine": ("digits/cosine", VELOCITY),
    "vp": ("digits/vp", VELOCITY),
    "vp_eps": ("digits/vp", ()),
    "edm": ("digits/edm", ()),
}
TRAINING = (
    "model.network={name: residual_mlp, hidden: 256, blocks: 4}",
    "train.steps=3000",
    "train.sample_every=0",
    "train.eval_every=0",
    "likelihood={divergence: hutchinson, probes: 1, controller: {name: pi, rtol: 1.0e-4, atol: 1.0e-4}}",
    "sample={solver: {name: dpmpp}, num_steps: 50, grid: {name: shifted, shift: 1.0}, guidance: 1.0}",
)
LABELS = {"free": "model.conditional=false", "given": "model.conditional=true"}
SEEDS = {"free": (0, 1), "given": (0,)}

SAMPLERS: dict[str, dict[str, Any]] = {
    "euler": {"solver": {"name": "euler"}, "grid": "even"},
    "heun": {"solver": {"name": "heun"}, "grid": "even"},
    "ddim": {"solver": {"name": "ddim"}, "grid": SHARES},
    "dpmpp_2m": {"solver": {"name": "dpmpp", "order": 2}, "grid": SHARES},
    "dpmpp_3m": {"solver": {"name": "dpmpp", "order": 3}, "grid": LEVELS},
    "sde_2m": {"solver": {"name": "dpmpp", "order": 2, "eta": 1.0}, "grid": SHARES},
}
ON_EDM = {"euler": {"name": "edm_euler"}, "heun": {"name": "edm_heun"}}
FEW = ("euler", "dpmpp_2m")  # of every run but the first of each path
OTHERS = ("kinetic_optimal", "trigonometric", "vp")  # on which the linear model is sampled,
MOVED = ("euler", "heun")  # by these
Row = dict[str, Any]


class Named(NamedTuple):
    """What a run's name says."""

    path: str
    labels: str
    seed: int

    def __str__(self) -> str:
        return f"paths-{self.path}-{self.labels}-{self.seed}"

    @classmethod
    def of(cls, name: str) -> "Named":
        _, path, labels, seed = name.split("-")
        return cls(path, labels, int(seed))


def digits() -> Iterator[Plan]:
    """The runs, those first that others are sampled on."""
    for labels, switch in LABELS.items():
        for seed in SEEDS[labels]:
            for path, (config, overrides) in PATHS.items():
                name = str(Named(path, labels, seed))
                yield Plan(name, config, PROTOCOL, (*overrides, *TRAINING, switch, f"seed={seed}"))


STUDIES = {"digits": digits}


def samplers(run: Named) -> list[str]:
    """Those that a run is drawn with."""
    return list(SAMPLERS) if run.labels == "free" and run.seed == 0 else list(FEW)


def options(sampler: str, path: str) -> dict[str, Any]:
    """What a sampler is on a path, for the section `sample`."""
    found = SAMPLERS[sampler]
    return {**found, "solver": ON_EDM[sampler]} if path == "edm" and sampler in ON_EDM else found


def steps_for(sampler: str, budget: int) -> int | None:
    """As many steps as the budget pays for; None if the solver needs more."""
    solver = build(Solver, SAMPLERS[sampler]["solver"])
    steps = budget // solver.stages
    try:
        solver.along(steps)
    except ValueError:
        return None
    return steps or None


def protocol(*metrics: str) -> Protocol:
    """That of the study with some of its metrics: what is not asked for is not paid for, what is has the same value."""
    tree = Protocol.load(PROTOCOL).tree
    kept = [metric for metric in tree["metrics"] if metric["name"] in metrics]
    return Protocol({**tree, "name": f"{PROTOCOL}_{'_'.join(metrics)}", "metrics": kept})


def drawn(run: Run, sampler: str, budget: int, **more: Any) -> Row | None:
    """The distance of what a sampler draws with no more than so many evaluations."""
    steps = steps_for(sampler, budget)
    if steps is None:
        return None
    sample = {**options(sampler, Named.of(run.name).path), "num_steps": steps, **more}
    result = evaluate(run, protocol("frechet"), overrides={"sample": sample})
    (found,) = result["metrics"]
    nfe = result["cost"]["sample"]["nfe"]
    return {"sampler": sampler, "budget": budget, "nfe": nfe, "value": found["value"], "stderr": found["stderr"]}


def bound(run: Run) -> Row:
    """bits/dim by the evidence bound of the SDE."""
    answer = {"method": "elbo", "probes": PARTS}
    (found,) = evaluate(run, protocol("bits_per_dim"), overrides={"likelihood": answer})["metrics"]
    return {"value": found["value"], "stderr": found["stderr"]}


def schedule_of(path: str, root: Path) -> dict[str, Any]:
    """A path as `sample.schedule`: the kinetic-optimal one from the table that its first run keeps."""
    if path != "kinetic_optimal":
        return {"name": path}
    run = root / str(Named(path, "free", 0))
    return {"name": "tabulated", "file": str((run / "prepare" / "kinetic_path.csv").resolve())}


def measured(folder: Path) -> list[Row]:
    """All distances of a run, and its bound; from its own notes if these were made of the same run and plan."""
    run, name = Run.open(folder), Named.of(folder.name)
    plan = [
        BUDGETS,
        {s: options(s, name.path) for s in samplers(name)},
        OTHERS,
        MOVED,
        PARTS,
        protocol("frechet").hash,
        run.step,
    ]
    key, notes = digest({"config": run.config.hash, "plan": plan}), folder / KEPT
    if notes.is_file() and (known := json.loads(notes.read_text()))["key"] == key:
        return known["rows"]
    rows = [drawn(run, sampler, budget) for sampler in samplers(name) for budget in BUDGETS]
    if name == Named("linear", "free", 0):
        for other in OTHERS:
            schedule = schedule_of(other, folder.parent)
            moved = [drawn(run, s, budget, schedule=schedule) for s in MOVED for budget in BUDGETS]
            rows += [row and {**row, "on": other} for row in moved]
    rows += [{"sampler": "bound", **bound(run)}]
    told = [{**name._asdict(), **row} for row in rows if row is not None]
    write_text(notes, json.dumps({"key": key, "rows": told}))
    return told


def all_measured(folders: Iterable[Path], jobs: int) -> list[Row]:
    """The rows of all runs, so many runs at a time, each on its share of the cores."""
    folders = list(folders)
    if jobs == 1:
        return [row for folder in folders for row in _told(measured, folder)]
    threads = max(1, torch.get_num_threads() // jobs)
    start = partial(torch.set_num_threads, threads)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start) as pool:
        return [row for rows in pool.map(partial(_told, measured), folders) for row in rows]


def _told(work: Callable[[Path], list[Row]], folder: Path) -> list[Row]:
    rows = work(folder)
    print(folder.name, flush=True)
    return rows


def facts(folder: Path) -> Row:
    """What the protocol says of a run: code length, energy of its velocity beside exact ones, largest K."""
    results = [read(path)[0] for path in sorted((folder / "eval" / PROTOCOL).glob("*.json"))]
    result = next(result for result in results if not result["overridden"])
    kept = {row["name"]: row for row in result["metrics"]}
    wanted = ("FD-digits", "bits_per_dim", "kinetic_energy", "lipschitz")
    values = {name: {k: kept[name][k] for k in ("value", "stderr", "references", "detail")} for name in wanted}
    return {**Named.of(folder.name)._asdict(), **values}


def report(rows: Sequence[Row], known: Sequence[Row], folder: Path) -> list[Path]:
    """The three files."""
    files = [folder / f"paths.{suffix}" for suffix in ("md", "json", "png")]
    write_text(files[0], paths_report.text(rows, known))
    write_text(files[1], json.dumps({"distances": rows, "runs": known}, indent=1) + "\n")
    paths_report.draw(rows, known, files[2])
    return files


def main() -> None:
    given = plans.parser(__doc__, STUDIES, "runs/paths").parse_args()
    every = list(digits())
    plans.carry_out_all(every, given.root, given.jobs, given.publish)
    folders = [given.root / plan.name for plan in every]
    rows = all_measured(folders, given.jobs)
    made = report(rows, [facts(folder) for folder in folders], RESULTS if given.publish else given.root)
    print(*made, sep="\n")


if __name__ == "__main__":
    main()
