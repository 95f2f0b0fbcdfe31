"""The study of editing: its settings are valid, and its files are made of what it measures."""

import json
import math
import re

import pytest
import torch

from evals.studies import editing as study
from evals.studies import editing_report as report
from evals.studies.plans import ROOT
from genmodels.config import load
from genmodels.editing.method import EditMethod
from genmodels.evaluation.answers import Interview
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import Protocol
from genmodels.registry import names
from genmodels.training.loop import train

TINY = ["train.steps=3", "train.batch_size=8", "train.optimizer.lr=0.5", "train.sample_every=0", "train.eval_every=0"]
TINY += ["model.network.width=8", "model.network.depth=2", "model.network.heads=2"]


def test_settings_are_valid_and_differ():
    (plan,) = study.digits()
    config = load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}"])
    answers = {title: json.dumps(config.answer("edit", options)) for title, options in study.SETTINGS.items()}
    assert len(set(answers.values())) == len(answers)
    for title, answer in answers.items():
        told = json.loads(answer)
        method, numbers = told["method"], re.findall(r"(?<![\w.])\d+", title.split(", guidance")[0])
        share = method.get("share") or {}
        facts = {method["num_steps"], share.get("steps"), method.get("n_max"), method.get("skip"), method.get("stop")}
        assert {int(n) for n in numbers} <= facts | {int(method.get("omega") or 0)}, title
        assert ("guidance 2" in title) == (told["guidance"] == 2), title
    assert set(study.STRIPS) <= set(study.SETTINGS) and len(study.STRIPS) == len(set(study.STRIPS))
    used = {study.method_of(node.node).registered_name for node in study.TRIPS.values()}
    used |= {options["method"]["name"] for options in study.SETTINGS.values()}
    assert used == set(names(EditMethod)), "methods that the study leaves out"
    assert set(report.TRIPS) == set(study.TRIPS) and set(report.FIELDS) == {*study.GRIDS, "mixture"}
    assert study.ITEMS >= 200 and study.SHOWN == 20


def test_round_trips_cost_what_they_say_and_have_their_orders(monkeypatch):
    """On the exact flow of the ring, whose figures stand in the notes of RF-Solver: 222 times Euler's at NFE 100."""
    monkeypatch.setattr(study, "BUDGETS", study.BUDGETS[3:6])
    noise, points, _ = study.exact(8)
    rows = []
    for name in ("vanilla", "uni_inv", "rf_solver", "fireflow"):
        found = study.round_trips(study.EDITOR, points, study.SOURCE, name, noise)
        rows += [{"part": "trip", "field": "mixture", **row} for row in found]
        assert all(row["nfe"] <= row["budget"] < row["nfe"] + study.TRIPS[name].per_step for row in found)
    told = {(row["method"], row["steps"]): row for row in rows}
    root2 = math.sqrt(2)  # the notes' errors are of vectors of the plane, the study's of components
    assert root2 * told["vanilla", 50]["back"] == pytest.approx(4.14e-2, rel=2e-3)
    assert root2 * told["rf_solver", 25]["back"] == pytest.approx(1.86e-4, rel=4e-3)
    assert root2 * told["rf_solver", 25]["noise"] == pytest.approx(8.28e-4, rel=2e-3)
    assert root2 * told["fireflow", 49]["back"] == pytest.approx(6.91e-5 * (50 / 49) ** 3, rel=2e-2)
    assert report.factors(rows, "mixture", "rf_solver")[100] == pytest.approx(222, abs=1)
    for name, order in report.ORDERS.items():
        own = report.part(rows, "trip", method=name)
        assert not own or report.slope(own, "back") == pytest.approx(order, abs=0.1)


def test_slopes_are_those_of_powers():
    rows = [{"steps": n, "budget": 4 * n, "back": 3.0 * n**-2.5, "noise": 0.0} for n in (2, 4, 8, 16, 32)]
    rows[0]["back"] = 1e9  # before the last four
    assert report.slope(rows, "back") == pytest.approx(2.5) and report.slope(rows, "noise") is None
    assert report.family("RF-Edit, V of last half, 2") == "RF-Edit, V of last half" and report.family("Heun, 15") == ""
    assert report.family("RF-Edit, QK of all, 5") == "RF-Edit"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run that was hardly trained, measured in small."""
    patch = pytest.MonkeyPatch()
    whole = Protocol.load(study.PROTOCOL).tree
    small = Protocol({**whole, "edit": {**whole["edit"], "num_items": 10}})
    patch.setattr(study.Protocol, "load", classmethod(lambda cls, name: small))
    patch.setattr(Interview, "price", lambda self, question: None)  # costs are tested where they are measured
    patch.setattr(study, "BUDGETS", (8, 12, 16))
    patch.setattr(study, "GRIDS", {"digits": study.GRIDS["digits"]})
    patch.setattr(study, "ITEMS", 12)
    patch.setattr(study, "SHOWN", 3)
    patch.setattr(study, "FINE", {**study.FINE, "num_steps": 2})
    patch.setattr(study, "STRIPS", study.STRIPS[:2])
    chosen = ("Euler, 30 steps", "RF-Edit, V of all, 5")
    few = {"trip": ("vanilla", "rf_solver"), "board": chosen, "same": study.SAME[:2], "memory": study.KEEPING[:2]}
    patch.setattr(study, "PARTS", {part: (study.PARTS[part][0], of) for part, of in few.items()})
    (plan,) = study.digits()
    config = load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}", *TINY])
    run = train(config, root=tmp_path_factory.mktemp("editing"), quiet=True)
    yield run, study.all_measured(run.path, 1)
    patch.undo()


def test_what_was_measured_is_kept_and_is_that_of_the_protocol(measured, monkeypatch):
    run, rows = measured
    counts = {part: len(report.part(rows, part)) for part in study.PARTS}
    assert counts == {"trip": 2 * 2 * 3, "board": 2, "same": 2, "memory": 2}
    again = evaluate(run, study.Protocol.load(study.PROTOCOL), overrides={"edit": study.SETTINGS["Euler, 30 steps"]})
    (own,) = report.part(rows, "board", setting="Euler, 30 steps")
    assert own["nfe"] == 60 and own["file"].startswith("eval/digits_edit/")
    for m in again["metrics"]:
        assert (own[m["name"]]["value"], own[m["name"]]["stderr"]) == (m["value"], m["stderr"])
    monkeypatch.setattr(study, "evaluate", lambda *_, **__: pytest.fail("a result was there"))
    monkeypatch.setattr(study, "edited", lambda *_: pytest.fail("notes were there"))
    assert study.all_measured(run.path, 1) == rows
    # under the own class, with nothing shared, RF-Solver's round trip of as many steps
    images = study.subject(run, 12)
    made = study.method_of({"name": "rf_edit", "share": None}).edit(
        images.editor,
        images.editor.encode(images.x),
        *[study.Prompt(images.labels)] * 2,
        images.editor.times(15, images.x),
        study.SeedNoise(torch.arange(12)),
    )
    plain = study.rms(images.editor.decode(made.x), images.x)
    assert report.part(rows, "same")[0]["back"] == pytest.approx(plain, rel=1e-6)
    device, half = report.part(rows, "memory")
    assert device["bytes"] == 2 * half["bytes"] == 5 * 2 * 2 * 12 * 16 * 8 * 4  # steps, blocks, evaluations, images, …
    assert device["off"] == 0 < half["off"] < 1e-2


def test_the_report_tells_what_was_measured(measured, tmp_path):
    run, rows = measured
    page, numbers, picture, strips = study.report(run, rows, tmp_path)
    assert json.loads(numbers.read_text()) == rows
    text = page.read_text()
    (own,) = report.part(rows, "trip", field="digits", method="rf_solver", budget=16)
    assert f"| {own['back']:.2e} (4) |" in text and "| Euler, 30 steps |" in text
    (board,) = report.part(rows, "board", setting="RF-Edit, V of all, 5")
    (line,) = [line for line in text.splitlines() if line.startswith("| RF-Edit, V of all, 5 |")]
    assert report.shown(board["edit_success"]) in line and f"{board['edit_memory']['value']:,.0f}" in line
    factor = report.factors(rows, "digits", "rf_solver")
    euler = report.part(rows, "trip", field="digits", method="vanilla", budget=8)[0]["back"]
    first = report.part(rows, "trip", field="digits", method="rf_solver", budget=8)[0]["back"]
    assert factor[8] == euler / first
    widths = [line.count("|") for block in text.split("\n\n") for line in block.splitlines() if line.startswith("|")]
    assert len(set(widths)) <= 5 and picture.stat().st_size > 10_000 and strips.stat().st_size > 5_000
