"""The study of paths: its runs are what their names say, and its files are made of what they measure."""

import json

import pytest

from evals.studies import paths as study
from evals.studies import paths_report as report
from evals.studies.plans import ROOT
from genmodels.config import load
from genmodels.evaluation.answers import Interview
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import Protocol
from genmodels.registry import build
from genmodels.solvers.base import Solver
from genmodels.training.loop import train

TINY = [
    *("train.steps=2", "train.batch_size=8", "model.network.hidden=8", "model.network.blocks=1"),
    "likelihood={solver: euler, controller: fixed, num_steps: 2}",
]


def tree(plan):
    return load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}", *plan.overrides]).tree


def test_runs_are_what_their_names_say():
    """Of one kind of labels all are one model and one training, but for the path; EDM and noise prediction by name."""
    plans = list(study.digits())
    assert len({plan.name for plan in plans}) == len(plans) == 7 * 3
    common = {}
    for plan in plans:
        name, node = study.Named.of(plan.name), tree(plan)
        assert str(name) == plan.name == node["name"] and node["seed"] == name.seed
        model = node["model"]
        told = model.pop("schedule")["name"], model.pop("prediction"), model.pop("times")["name"]
        expected = {"vp_eps": ("vp", "eps", "uniform"), "edm": ("edm", "edm", "log_normal")}
        assert told == expected.get(name.path, (name.path, "velocity", "uniform"))
        assert model.pop("conditional") == (name.labels == "given")
        rest = {key: value for key, value in node.items() if key not in ("name", "seed")}
        assert rest == common.setdefault("all", rest), plan.name
        assert node["sample"]["guidance"] == 1 and model["weighting"]["name"] == "uniform"


def test_budgets_buy_the_steps_that_they_pay_for():
    assert [study.steps_for("euler", b) for b in (2, 5)] == [2, 5]
    assert [study.steps_for("heun", b) for b in (1, 2, 5)] == [None, 1, 2]
    assert [study.steps_for("dpmpp_3m", b) for b in (2, 5)] == [None, 5]
    assert [study.steps_for("sde_2m", b) for b in (2, 5)] == [2, 5]
    assert {name: build(Solver, node["solver"]).draws for name, node in study.SAMPLERS.items() if "sde" in name} == {
        "sde_2m": True
    }
    assert study.samplers(study.Named("edm", "free", 0)) == list(study.SAMPLERS)
    on = {path: study.options("heun", path)["solver"]["name"] for path in study.PATHS}
    assert on.pop("edm") == "edm_heun" and set(on.values()) == {"heun"}
    assert all(build(Solver, node).stages == 4 // study.steps_for(s, 4) for s, node in study.ON_EDM.items())
    assert study.samplers(study.Named("vp", "given", 0)) == study.samplers(study.Named("vp", "free", 1)) == [*study.FEW]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two runs that were hardly trained: their rows, facts and folders."""
    root = tmp_path_factory.mktemp("paths")
    patch = pytest.MonkeyPatch()
    whole = Protocol.load(study.PROTOCOL).tree
    few = {"sample": {**whole["sample"], "num_items": 150}, "likelihood": {**whole["likelihood"], "num_items": 8}}
    metrics = [m if m["name"] != "lipschitz" else {**m, "at": [1, 500]} for m in whole["metrics"]]
    small = Protocol({**whole, **few, "metrics": metrics})
    patch.setattr(study.Protocol, "load", classmethod(lambda cls, name: small))
    patch.setattr(study, "BUDGETS", (2, 4))
    patch.setattr(Interview, "price", lambda self, question: None)  # costs are tested where they are measured
    patch.setattr(study, "PARTS", 4)
    patch.setattr(study, "MOVED", ("euler",))
    patch.setattr(study, "OTHERS", ("kinetic_optimal", "vp"))
    kept = {name: node for name, node in study.SAMPLERS.items() if name in ("euler", "dpmpp_3m")}
    patch.setattr(study, "SAMPLERS", kept)
    plans = [plan for plan in study.digits() if plan.name in ("paths-linear-free-0", "paths-kinetic_optimal-free-0")]
    folders = []
    for plan in plans[::-1]:
        extra = ["model.schedule.queries=20"] if "kinetic" in plan.name else []
        config = load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}", *plan.overrides, *TINY, *extra])
        run = train(config, root=root, quiet=True)
        evaluate(run, small, overrides={})
        folders.append(run.path)
    rows = study.all_measured(folders, 1)
    yield rows, [study.facts(folder) for folder in folders], folders
    patch.undo()


def test_rows_are_of_the_samplers_and_budgets(measured):
    rows, _, folders = measured
    assert study.all_measured(folders[:1], 1) == [row for row in rows if row["path"] == "kinetic_optimal"]  # from notes
    told = [(r["path"], r["sampler"], r["budget"]) for r in rows if "on" not in r and "budget" in r]
    per_path = [("euler", 2), ("euler", 4), ("dpmpp_3m", 4)]
    assert told == [(path, *each) for path in ("kinetic_optimal", "linear") for each in per_path]
    assert all(row["nfe"] == row["budget"] and row["stderr"] > 0 for row in rows if "budget" in row)
    # on its own path a figure is that of the command; on another it is another
    moved = {row["on"]: row["value"] for row in rows if row.get("on") and row["budget"] == 4}
    own = report.found(rows, path="linear", sampler="euler", budget=4)
    assert len({*moved.values(), own[0]}) == 3
    assert report.found(rows, path="linear", sampler="bound")[0] > 0


def test_a_figure_is_that_of_the_protocol(measured):
    """What `evals.evaluate --protocol digits_paths` gives with the options of a row, to the last digit."""
    rows, known, folders = measured
    run = study.Run.open(folders[1])
    sample = {**study.SAMPLERS["euler"], "num_steps": 4}
    result = evaluate(run, study.Protocol.load(study.PROTOCOL), overrides={"sample": sample})
    value = {row["name"]: row["value"] for row in result["metrics"]}["FD-digits"]
    assert value == report.found(rows, path="linear", sampler="euler", budget=4)[0]
    assert study.facts(folders[1]) == known[1]  # of the run's own sampler


def test_the_report_tells_what_was_measured(measured, tmp_path):
    rows, known, _ = measured
    page, numbers, picture = study.report(rows, known, tmp_path)
    assert json.loads(numbers.read_text()) == {"distances": rows, "runs": known}
    lines = page.read_text().splitlines()
    value, error = report.found(rows, path="linear", sampler="euler", budget=4)
    assert any(line.startswith("| linear, Euler |") and report.shown((value, error)) in line for line in lines)
    (winner,) = [line for line in lines if line.startswith("| kinetic-optimal |")]
    least = min((r["value"], r["sampler"]) for r in rows if r["path"] == "kinetic_optimal" and r.get("budget") == 4)
    assert winner.endswith(f"({report.SAMPLERS[least[1]]}) |")
    heads = [line.count("|") for line in lines if line.startswith("|")]
    assert len(set(heads)) == 2  # those of budgets, and that of facts
    assert picture.stat().st_size > 10_000


def test_means_over_seeds_have_the_larger_error():
    alike = [{"value": 2.0, "stderr": 0.4}, {"value": 2.0, "stderr": 0.3}]
    assert report.mean(alike) == pytest.approx((2.0, 0.25))
    assert report.mean([{"value": 1.0, "stderr": 0.1}, {"value": 3.0, "stderr": 0.1}]) == pytest.approx((2.0, 1.0))
    assert report.mean([{"value": 5.0, "stderr": 0.5}]) == (5.0, 0.5)
    assert [report.shown(p) for p in ((12.345, 0.25), (1234.5, 21.0), (2.0, 0.0), None)] == [
        "12.35 ± 0.25", "1,234 ± 21", "2", ""
    ]  # fmt: skip
