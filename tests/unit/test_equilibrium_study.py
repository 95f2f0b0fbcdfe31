"""The study of equilibrium models: its runs are what they say, of one size, and its table is made of their results."""

import json

import pytest
import torch

from evals.studies import equilibrium as study
from evals.studies import warm_start
from evals.studies.plans import ROOT
from genmodels.config import load, read
from genmodels.evaluation.protocol import FOLDER


def config(plan):
    return load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}", *plan.overrides])


def test_runs_are_what_their_names_say():
    plans = list(study.digits())
    assert len({plan.name for plan in plans}) == len(plans) == 30
    asked = read(FOLDER / f"{study.PROTOCOL}.yaml")["dataset"]
    for plan in plans:
        tree = config(plan).tree
        assert tree["data"]["name"] == asked["name"] and tree["seed"] == int(plan.name[-1])
        model, name = tree["model"], plan.name.removeprefix("equilibrium-")[:-2]
        if name in ("explicit", "neural-ode", "neural-ode-1e-6"):
            solver = {"explicit": "euler"}.get(name, "tsit5")
            assert model["name"] == "neural_ode" and model["solver"]["name"] == solver
            continue
        start = "predictor" if name.endswith("skip") else "first" if name.endswith("skip_reg") else "zero"
        solver = "infinite_time" if "cdeq" in name else "broyden" if "broyden" in name else "anderson"
        assert (model["start"], model["solver"]["name"]) == (start, solver), name
        assert model["skip"] == (0.0 if start == "zero" else 5.0)


def test_models_are_of_one_size_but_for_predictors():
    facts = {"shape": [1, 8, 8], "target_shape": [10], "transform": {"name": "identity"}}
    facts |= {"num_classes": None, "condition_shape": None, "bin_width": None}
    sizes = {p.name[12:-2]: sum(v.numel() for v in config(p).model(facts).parameters()) for p in study.digits()}
    extra = {name: size for name, size in sizes.items() if name.endswith("skip")}
    plain = {name: size for name, size in sizes.items() if name not in extra}
    assert max(plain.values()) < 1.01 * min(plain.values()), plain
    assert len(set(extra.values())) == 1 and max(extra.values()) < 1.6 * max(plain.values())


def result(accuracy, nfe, gain):
    values = {"accuracy": accuracy, "anytime_accuracy": accuracy - 0.01}
    for place in (0, 2):
        values |= {f"accuracy_at_{place}": accuracy - gain, f"evaluations_at_{place}": 1.0 + place}
    return {
        "metrics": [{"name": name, "value": value} for name, value in values.items()],
        "cost": {"predict": {"nfe": nfe, "seconds_per_item": 0.002}},
        "training": {"seconds": 10.0 + round(50 * accuracy) - 45},
        "model": {"parameters": 17226},
    }


def test_the_table_is_made_of_results(tmp_path, monkeypatch):
    values = {}
    for seed, accuracy in ((0, 0.90), (1, 0.94)):
        run = study.name_of("skip", seed)
        path = tmp_path / "results" / study.PROTOCOL / run / "a.json"
        path.parent.mkdir(parents=True)
        path.touch()
        values[path] = result(accuracy, 4.0, 0.1)
        log = tmp_path / "runs" / run / "metrics.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("\n".join(json.dumps({"step": k, "train/backward_nfe": 4.0 + 2 * k}) for k in range(2)))
    monkeypatch.setattr(study, "read", lambda path: (values[path],))
    found = study.rows(tmp_path / "runs", tmp_path / "results")
    (line,) = study.table(found).splitlines()[2:]
    assert line == (
        "| Skip DEQ (Anderson) | 17,226 | 0.92 ± 0.02 | 0.82 ± 0.02 | 0.91 ± 0.02 | 4 ± 0 | 5 ± 0 | 11 ± 1 | 2 ± 0 "
        "| 2 |"
    )
    assert [point["nfe"] for point in found[0]["curve"]] == [1.0, 3.0]
    study.draw(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").is_file()
    assert study.backward(tmp_path / "nowhere") is None


def test_the_table_of_tolerances():
    rows = [
        {"model": "cdeq", "tolerance": t, "accuracy": 0.9 + 0.01 * k, "accuracy_error": 0.002, "nfe": 10.0 * k}
        for k, t in enumerate(study.TOLERANCES)
    ]
    (line,) = study.tolerance_table(rows).splitlines()[2:]
    assert line.startswith("| continuous DEQ (Tsit5) | 0.9 ± 0.002 (0) | 0.91 ± 0.002 (10) |")
    assert line.count("|") == len(study.TOLERANCES) + 2


def test_the_table_of_warm_starts():
    way = {"nfe": 50.0, "ms": 4.0, "fd": 2.5, "err": 0.12}
    row = {"steps": 5, "difference": 0.0123, "cold": way, "warm": {"nfe": 25.0, "ms": 2.0, "fd": 2.6, "err": 0.2}}
    (line,) = warm_start.table([row]).splitlines()[2:]
    assert line == "| 5 | 10 | 5.00 | 2.50 | 0.50 | 4 | 2 | 2.5 ± 0.1 | 2.6 ± 0.2 | 0.01 |"


class Drawn:
    """Samples of two classes of digits, 0 and 1; warm ones are off by a tenth."""

    def sample(self, n, *, condition, warm_start, num_steps):
        assert num_steps == 7
        return (condition >= 5).float()[:, None, None, None].expand(n, 1, 2, 2) + 0.1 * warm_start


def test_the_difference_is_relative_to_that_of_other_samples():
    spread = ((torch.arange(100) % 10 >= 5).float() - (torch.arange(100).roll(3) % 10 >= 5).float()).square().mean()
    assert warm_start.difference(Drawn(), {}, 7) == pytest.approx(0.1 / spread.sqrt().item())
