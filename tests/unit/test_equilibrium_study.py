"""The study of equilibrium models: its runs are what they say, of one size, and its table is made of their results."""

import json

import pytest

from evals.studies import equilibrium as study
from evals.studies.plans import ROOT
from genmodels.config import load, read
from genmodels.evaluation.protocol import FOLDER


def config(plan):
    return load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}", *plan.overrides])


def test_runs_are_what_their_names_say():
    plans = list(study.digits())
    assert len({plan.name for plan in plans}) == len(plans) == 27
    asked = read(FOLDER / f"{study.PROTOCOL}.yaml")["dataset"]
    for plan in plans:
        tree = config(plan).tree
        assert tree["data"]["name"] == asked["name"] and tree["seed"] == int(plan.name[-1])
        model, name = tree["model"], plan.name.removeprefix("equilibrium-")[:-2]
        if name in ("explicit", "neural-ode"):
            solver = {"explicit": "euler", "neural-ode": "tsit5"}[name]
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


def test_the_table_is_made_of_results(tmp_path, monkeypatch):
    values = {}
    for seed, accuracy in ((0, 0.90), (1, 0.94)):
        run = f"equilibrium-skip-{seed}"
        for moves, gain, nfe in ((None, 0.0, 4.0), (0, -0.1, 0.0), (2, -0.02, 3.0)):
            path = tmp_path / "results" / study.PROTOCOL / run / f"{moves}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            values[path] = {
                "metrics": [{"name": "cross_entropy", "value": 9.0}, {"name": "accuracy", "value": accuracy + gain}],
                "cost": {"predict": {"nfe": nfe, "seconds_per_item": 2e-3}},
                "training": {"seconds": 10.0 + seed},
                "model": {"parameters": 17226},
                "answers": {"predict": {} if moves is None else {"iterations": moves}},
            }
        log = tmp_path / "runs" / run / "metrics.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("\n".join(json.dumps({"step": k, "train/backward_nfe": 4.0 + 2 * k}) for k in range(2)))
    monkeypatch.setattr(study, "read", lambda path: (values[path],))
    found = study.rows(tmp_path / "runs", tmp_path / "results")
    (line,) = study.table(found).splitlines()[2:]
    assert line == (
        "| Skip DEQ (Anderson) | 17,226 | 0.92 ± 0.02 | 0.82 ± 0.02 | 4 ± 0 | 5 ± 0 | 10.5 ± 0.5 | 2 ± 0 | 2 |"
    )
    assert [point["nfe"] for point in found[0]["curve"]] == [0.0, 3.0]
    study.draw(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").is_file()
    assert study.backward(tmp_path / "nowhere") is None
    with pytest.raises(KeyError):
        study.facts({})
