"""The study of shared times: its runs are what they say, and its table is made of what they measure."""

import pytest
import torch

from evals.studies import etsdm as study
from evals.studies.plans import ROOT, Plan
from genmodels.config import load
from genmodels.training.loop import train

TINY = ["train.steps=2", "train.batch_size=8", "train.sample_every=0", "train.eval_every=0", "model.network.hidden=16"]


def tree(plan):
    return load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}", *plan.overrides]).tree


def test_runs_are_what_their_names_say():
    """All are one model but for what the network is told of the time, and the linear path."""
    plans = {plan.name.removeprefix("etsdm-"): tree(plan)["model"] for plan in study.digits()}
    assert len(plans) == len(list(study.digits())) == 12
    told = {name: model.pop("time_condition") for name, model in plans.items()}
    assert {name: node["name"] for name, node in told.items() if name in (*study.MAIN, *study.OTHER_LABELS)} == {
        "shared": "shared", "unshared": "identity", "log_snr": "log_snr", "linear": "identity", "remap": "remap"
    }  # fmt: skip
    for n, until in study.OTHERS:
        assert (told[f"{n}-{until}"]["intervals"], told[f"{n}-{until}"]["until"]) == (n, until)
        assert study.label_of(f"{n}-{until}") == f"E-TSDM, n = {n}, t̃ = {until}"
    linear = plans.pop("linear")
    assert (linear["schedule"]["name"], linear["prediction"]) == ("linear", "velocity")
    assert all(model == plans["shared"] for model in plans.values())
    assert (plans["shared"]["schedule"]["name"], plans["shared"]["prediction"]) == ("vp", "eps")


def test_the_table_and_the_picture_are_made_of_runs(tmp_path, monkeypatch):
    for name, value in {"CURVE": (1, 10, 20, 300), "ITEMS": 20, "BUDGETS": (4,), "FEW": (4,), "DRAWN": 150}.items():
        monkeypatch.setattr(study, name, value)
    plan = Plan("etsdm-shared", "digits/etsdm", "")
    monkeypatch.setattr(study, "digits", lambda: iter([plan, Plan("etsdm-unshared", "digits/etsdm_unshared", "")]))
    config = load([ROOT / "configs" / "digits" / "etsdm.yaml"], [f"name={plan.name}", *TINY])
    run = train(config, root=tmp_path, quiet=True)
    (row,) = study.rows(tmp_path)
    assert row["inside"] == (0, 0) and row["edge"][0] > row["edge"][1] > 0 and row["other"][0] > 0
    at = row["constants"].at
    assert at.index.tolist() == [1, 10, 20, 40, 60, 80, 100, 300]
    k = row["constants"].value[at.edge].argmax()
    assert row["edge"] == (row["constants"].value[at.edge][k], row["constants"].stderr[at.edge][k])
    head, _, line = study.table([row]).splitlines()
    assert head.count("|") == line.count("|") == 7 + len(study.SOLVERS)
    assert line.startswith(f"| E-TSDM, n = 5, t̃ = 0.1 | 0 | {study.shown(row['edge'])} |")
    assert set(row["distances"]) == {("ddim", 4), ("dpmpp", 4)} and all(e > 0 for _, e in row["distances"].values())
    study.draw([row], tmp_path / "etsdm.png")
    assert (tmp_path / "etsdm.png").stat().st_size > 10_000
    # an answer of 0 is as wrong as the noise is large, wherever it is asked
    monkeypatch.setattr(type(run.load()), "answer", lambda self, t, x, condition=None: torch.zeros_like(x))
    plain, perturbed = study.early_errors(run)
    assert plain == pytest.approx(perturbed) and plain[0] == pytest.approx(1, abs=4 * plain[1])
    # each item's is a mean of the squares of 64 noises, and the standard error that of 20 items
    assert plain[1] == pytest.approx((2 / 64 / 20) ** 0.5, rel=0.5)
