"""Inversion and editing of digits by a trained rectified flow: errors by evaluations, edits, sharing and its memory.

    python -m evals.studies.editing digits [--jobs 2] [--root runs/editing] [--publish]

One run, of digits/flow_matching, is trained if it is not there. Then on test images:

- trip: images are inverted under their class and brought back, by every method that inverts, with no more than so many
  evaluations both ways. Errors are root mean squares: of images in levels of 0 … 16, of noise beside that of RF-Solver
  of order 3 in 200 steps, with standard deviation 1. Steps are even, and denser at images, where the velocity changes
  fastest. The same on the exact flow of the ring of `editing_mixtures`.
- board: the protocol digits_edit under each setting of methods and of sharing.
- same: what RF-Edit makes of images under their own class, by what is shared.
- memory: bytes and seconds of an edit of these images, by where and how features are kept.

What was measured is kept in the folder of the run, so that a study that was interrupted goes on. It writes editing.md,
editing.json (every figure), editing.png and editing_strips.png (edits of 20 images) into the folder of the runs, or
with `--publish` into evals/results, and publishes the results of the protocol. Any row of the board is that of

    python -m evals.evaluate runs/editing/digits-flow_matching --protocol digits_edit edit.method=flowedit …
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genmodels.diffusion.grids import TimeGrid
from genmodels.editing.apply import edit
from genmodels.editing.editor import Editor, Prompt
from genmodels.editing.method import EditMethod
from genmodels.evaluation.answers import target_classes
from genmodels.evaluation.evaluate import evaluate, publish, result_path
from genmodels.evaluation.protocol import Protocol
from genmodels.evaluation.results import ResultError, read
from genmodels.files import new_file, write_text
from genmodels.hashing import digest
from genmodels.registry import build, resolve
from genmodels.rng import SeedNoise
from genmodels.training.run import Run

from . import editing_report, plans
from .editing_mixtures import EDITOR, SOURCE, exact
from .plans import ROOT, Plan

Row = dict[str, Any]
Node = dict[str, Any]

RESULTS = ROOT / "evals" / "results"
RUN, PROTOCOL = "digits-flow_matching", "digits_edit"
ITEMS, SHOWN = 250, 20  # test images that errors rest on, and those that are drawn
BUDGETS = (8, 16, 28, 48, 72, 100, 144, 200)  # evaluations up and down together
FINE = {"name": "rf_edit", "num_steps": 200, "share": None, "order": 3}
GRIDS: dict[str, Node] = {"digits": {"name": "even"}, "digits_denser": {"name": "shifted", "shift": 0.5}}


class Trip(NamedTuple):
    """A method that inverts, and what it costs both ways.

    Args:
        per_step: evaluations of a step up and one down.
        once: evaluations besides.
    """

    node: Node
    per_step: int
    once: int = 0

    def steps(self, budget: int) -> int:
        """As many as the budget pays for."""
        return (budget - self.once) // self.per_step


TRIPS = {
    "vanilla": Trip({"name": "vanilla"}, 2),
    "uni_inv": Trip({"name": "uni_inv"}, 2, 1),
    "ab2": Trip({"name": "ab2"}, 2),
    "heun": Trip({"name": "heun"}, 4),
    "rf_solver": Trip({"name": "rf_edit", "share": None}, 4),
    "fireflow": Trip({"name": "fireflow", "share": None}, 2, 2),
    "rf_solver_3": Trip({"name": "rf_edit", "share": None, "order": 3}, 6),
    "fixed_point": Trip({"name": "fixed_point", "iterations": 3, "solver": {"name": "euler"}}, 5),
}


def rf_edit(**share: Any) -> Node:
    """RF-Edit with this sharing."""
    return {"method": {"name": "rf_edit", "share": share or None}}


SHARED = (1, 2, 3, 5, 8, 15)  # of 15 steps
SETTINGS: dict[str, Node] = {
    "Euler, 30 steps": {"method": {"name": "vanilla", "num_steps": 30}},
    "Uni-Inv, 30": {"method": {"name": "uni_inv", "num_steps": 30}},
    "AB2, 30": {"method": {"name": "ab2", "num_steps": 30}},
    "Heun, 15": {"method": {"name": "heun", "num_steps": 15}},
    "FireFlow, 29": {"method": {"name": "fireflow", "num_steps": 29, "share": None}},
    "FireFlow, 8, V of all, 1": {"method": {"name": "fireflow"}},
    "RF-Solver, 15": rf_edit(),
    **{f"RF-Edit, V of last half, {m}": rf_edit(steps=m) for m in SHARED},
    **{f"RF-Edit, V of all, {m}": rf_edit(steps=m, blocks="all") for m in SHARED[1:]},
    "RF-Edit, V of all, 5, mid": rf_edit(steps=5, blocks="all", evaluations="mid"),
    "RF-Edit, QK of all, 5": rf_edit(steps=5, blocks="all", tensors=("q", "k")),
    "RF-Edit, QKV of all, 5": rf_edit(steps=5, blocks="all", tensors=("q", "k", "v")),
    "RF-Edit, V added to all, 5": rf_edit(steps=5, blocks="all", combine="add"),
    "RF-Edit, V of last half, 2, guidance 2": {**rf_edit(steps=2), "guidance": 2.0},
    "RF-Edit, V of all, 5, guidance 2": {**rf_edit(steps=5, blocks="all"), "guidance": 2.0},
    "Uni-Edit, 15, ω 5": {"method": {"name": "uni_edit"}},
    "Uni-Edit, 15, ω 1": {"method": {"name": "uni_edit", "omega": 1.0}},
    "RF-Inversion, 28, stop 7": {"method": {"name": "rf_inversion"}},
    "RF-Inversion, 28, stop 14": {"method": {"name": "rf_inversion", "stop": 14}},
    **{f"FlowEdit, 28, n_max {n}": {"method": {"name": "flowedit", "n_max": n}} for n in (12, 16, 20, 24, 28)},
    "FlowEdit, 28, n_max 24, guidance 2": {"method": {"name": "flowedit"}, "guidance": 2.0},
    **{f"DNAEdit, 28, skip {n}": {"method": {"name": "dnaedit", "skip": n}} for n in (4, 12)},
}
SAME = [{}] + [{"steps": m, "blocks": b} for b in ("last_half", "all") for m in SHARED]
SAME += [
    {"steps": m, "blocks": "all", **more} for m in (5, 15) for more in ({"evaluations": "mid"}, {"pairing": "time"})
]
KEEPING = [{"store": store, "precision": p} for store in ("device", "host", "disk") for p in ("same", "half")]
KEEPING += [{"store": "host", "precision": p, "evaluations": "mid"} for p in ("same", "half")]
STRIPS = ("Euler, 30 steps", "RF-Solver, 15", "RF-Edit, V of last half, 2", "RF-Edit, V of all, 5")
STRIPS += ("RF-Edit, V of all, 15", "FireFlow, 8, V of all, 1", "Uni-Edit, 15, ω 1", "RF-Inversion, 28, stop 7")
STRIPS += ("FlowEdit, 28, n_max 24", "FlowEdit, 28, n_max 16", "DNAEdit, 28, skip 4")


def digits() -> Iterator[Plan]:
    """The run; its results under the protocol are made with those of all settings."""
    yield Plan(RUN, "digits/flow_matching", "")


STUDIES = {"digits": digits}


def method_of(node: Node) -> EditMethod:
    return build(EditMethod, resolve(EditMethod, node, "edit.method"))


class Subject(NamedTuple):
    """Test images, and the flow that is asked."""

    editor: Editor
    x: Tensor
    labels: Tensor
    targets: Tensor


def subject(run: Run, items: int, grid: str = "digits") -> Subject:
    data, model = Protocol.load(PROTOCOL).dataset, run.load(None, "cpu")
    rows = torch.arange(items)
    batch = data.take("test", rows)
    targets = target_classes(batch.condition, rows, data.num_classes)
    times = build(TimeGrid, resolve(TimeGrid, GRIDS[grid], "grid"))
    return Subject(model.editor(times), batch.x, batch.condition, targets)


def rms(x: Tensor, y: Tensor) -> float:
    """Root mean square over items and components."""
    return (x.double() - y.double()).square().mean().sqrt().item()


# ---- parts -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def round_trips(editor: Editor, items: Tensor, prompt: Prompt, name: str, fine: Tensor) -> list[Row]:
    """Errors of noises and of items that came back, by budget; without those at which a method failed."""
    trip, x, found = TRIPS[name], editor.encode(items), []
    for budget in BUDGETS:
        steps = trip.steps(budget)
        if steps < 2:
            continue
        method = method_of({**trip.node, "num_steps": steps})
        times, noise = editor.times(steps, x), SeedNoise(torch.arange(len(x)))
        try:
            made = method.edit(editor, x, prompt, prompt, times, noise)
        except ValueError as error:  # fixed points that are not found on steps as long as that
            print(f"{name}, {steps} steps: {error}", flush=True)
            continue
        assert made.nfe == trip.per_step * steps + trip.once
        errors = {"back": rms(editor.decode(made.x), items), "noise": rms(made.noise, fine)}
        found.append({"method": name, "budget": budget, "steps": steps, "nfe": made.nfe, **errors})
    return found


@torch.no_grad()
def fine_noise(run: Run) -> Tensor:
    """What a fine solver takes the images to; from the run's notes if it is there."""
    notes = run.path / "editing" / f"noise-{_key(run, 'noise', FINE)}.pt"
    if notes.is_file():
        return torch.load(notes, weights_only=True)
    images, method = subject(run, ITEMS, list(GRIDS)[-1]), method_of(FINE)
    x = images.editor.encode(images.x)
    times, noise = images.editor.times(method.num_steps, x), SeedNoise(torch.arange(len(x)))
    found = method.invert(images.editor, x, Prompt(images.labels), times, noise).x
    notes.parent.mkdir(exist_ok=True)
    with new_file(notes) as target:
        torch.save(found, target)
    return found


def trip(run: Run, name: str) -> list[Row]:
    """On the flow of the run, and on the exact one."""
    found, (noise, points, _) = [], exact(8)
    for grid in GRIDS:
        images = subject(run, ITEMS, grid)
        made = round_trips(images.editor, images.x, Prompt(images.labels), name, fine_noise(run))
        found += [{"field": grid, **row} for row in made]
    return found + [{"field": "mixture", **row} for row in round_trips(EDITOR, points, SOURCE, name, noise)]


def board(run: Run, title: str) -> list[Row]:
    """What the protocol says of a setting; from the result that the run has already, if it has one."""
    protocol, options = Protocol.load(PROTOCOL), SETTINGS[title]
    result = known(run, protocol, options) or evaluate(run, protocol, overrides={"edit": options}, device="cpu")
    values = {m["name"]: {"value": m["value"], "stderr": m["stderr"]} for m in result["metrics"]}
    (references,) = (m["references"] for m in result["metrics"] if m["name"] == "edit_success")
    (distances,) = (m["references"] for m in result["metrics"] if m["name"] == "edit_distance")
    cost = {key: result["cost"]["edit"][key] for key in ("items", "nfe")}
    file = str(result_path(run.path, result).relative_to(run.path))
    return [{"setting": title, "file": file, **cost, **values, "references": references | distances}]


def known(run: Run, protocol: Protocol, options: Node) -> Row | None:
    """The run's own result of a protocol under options of `edit`."""
    answers = {"edit": run.config.answer("edit", options)}
    for path in sorted((run.path / "eval" / protocol.name).glob("*.json")):
        try:
            result = read(path)[0]
        except ResultError:
            continue
        same = result["protocol"]["hash"] == protocol.hash and result["model"]["config_hash"] == run.config.hash
        if same and result["answers"] == answers and result["model"]["step"] == run.step:
            return result
    return None


def edited(images: Subject, options: Node, targets: Tensor, reconstruct: bool = False) -> Any:
    """Images under options of `edit` (its method and guidance), as `genmodels.editing.edit.edit` gives them."""
    target = Prompt(targets, options.get("guidance", 1.0))
    noise = SeedNoise(torch.arange(len(images.x)), purpose="edit")
    method = method_of(options["method"])
    given = {"method": method, "noise": noise, "reconstruct": reconstruct}
    return edit(images.editor, images.x, Prompt(images.labels), target, **given)


def same(run: Run, share: Node) -> list[Row]:
    """How far images are from themselves under their own class."""
    images = subject(run, ITEMS)
    made = edited(images, rf_edit(**share), images.labels)
    return [{"share": share, "back": rms(made.items, images.x), "bytes": made.stored}]


def memory(run: Run, keeping: Node) -> list[Row]:
    """Bytes and seconds of an edit that shares the values of all blocks in 5 of 15 steps; the quicker of two."""
    images = subject(run, ITEMS)
    made = [edited(images, rf_edit(steps=5, blocks="all", **keeping), images.targets) for _ in range(2)]
    plain = edited(images, rf_edit(steps=5, blocks="all"), images.targets)
    seconds = min(each.seconds for each in made)
    return [{"keeping": keeping, "bytes": made[0].stored, "seconds": seconds, "off": rms(made[0].items, plain.items)}]


PARTS: dict[str, tuple[Callable[[Run, Any], list[Row]], Sequence[Any]]] = {
    "trip": (trip, tuple(TRIPS)),
    "board": (board, tuple(SETTINGS)),
    "same": (same, SAME),
    "memory": (memory, KEEPING),
}
ALONE = ("memory",)  # timed with all cores to itself


# ---- all of them -----------------------------------------------------------------------------------------------------


def _key(run: Run, part: str, of: Any) -> str:
    """What a measurement depends on."""
    plans_of = {"trip": [BUDGETS, TRIPS.get(str(of)), FINE, GRIDS], "board": [SETTINGS.get(str(of)), PROTOCOL]}
    return digest(
        {"config": run.config.hash, "step": run.step, "items": ITEMS, "of": of, "plan": plans_of.get(part, part)}
    )


def measured(folder: Path, unit: tuple[str, Any]) -> list[Row]:
    """The rows of one unit of a part; from the run's notes if these are of the same run and plan."""
    (part, of), run = unit, Run.open(folder)
    notes = folder / "editing" / f"{part}-{_key(run, part, of)}.json"
    if part != "board" and notes.is_file():
        return json.loads(notes.read_text())
    rows = [{"part": part, **row} for row in PARTS[part][0](run, of)]
    notes.parent.mkdir(exist_ok=True)
    if part != "board":
        write_text(notes, json.dumps(rows))
    print(part, of, flush=True)
    return rows


def all_measured(folder: Path, jobs: int) -> list[Row]:
    """The rows of all parts, so many units at a time, each on its share of the cores."""
    fine_noise(Run.open(folder))  # before many ask for it
    units = [(part, of) for part, (_, every) in PARTS.items() if part not in ALONE for of in every]
    alone = [(part, of) for part in ALONE for of in PARTS[part][1]]
    work = partial(measured, folder)
    if jobs == 1:
        return [row for unit in units + alone for row in work(unit)]
    start = partial(torch.set_num_threads, max(1, torch.get_num_threads() // jobs))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start) as pool:
        found = list(pool.map(work, units))
    return [row for rows in found + [work(unit) for unit in alone] for row in rows]


def strips(run: Run) -> dict[str, Tensor]:
    """Images by the name of what was made of them; the first are the sources and RF-Solver's reconstructions."""
    images = subject(run, SHOWN)
    back = edited(images, SETTINGS["RF-Solver, 15"], images.targets, reconstruct=True)
    found = {"source": images.x, "reconstruction": back.reconstruction}
    return found | {title: edited(images, SETTINGS[title], images.targets).items for title in STRIPS}


def report(run: Run, rows: Sequence[Row], folder: Path) -> list[Path]:
    """The four files."""
    files = [folder / name for name in ("editing.md", "editing.json", "editing.png", "editing_strips.png")]
    write_text(files[0], editing_report.text(rows))
    write_text(files[1], json.dumps(rows, indent=1) + "\n")
    editing_report.draw(rows, files[2])
    images = subject(run, SHOWN)
    pairs = list(zip(images.labels.tolist(), images.targets.tolist(), strict=True))
    editing_report.draw_strips(strips(run), pairs, files[3])
    return files


def main() -> None:
    given = plans.parser(__doc__, STUDIES, "runs/editing").parse_args()
    every = [plan for name in given.studies for plan in STUDIES[name]()]
    plans.carry_out_all(every, given.root, given.jobs, False)
    folder = given.root / RUN
    rows = all_measured(folder, given.jobs)
    made = report(Run.open(folder), rows, RESULTS if given.publish else given.root)
    for row in rows if given.publish else ():
        if row["part"] == "board":
            publish(folder / row["file"], read(folder / row["file"])[0])
    print(*made, sep="\n")


if __name__ == "__main__":
    main()
