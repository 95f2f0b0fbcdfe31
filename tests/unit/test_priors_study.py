"""The study of priors: runs are what they say, the reference is exact, and the table is made of what they measure."""

import pytest
import torch

from evals.studies import priors as study
from evals.studies.plans import ROOT
from genmodels.config import load
from genmodels.training.loop import train

TINY = ["train.steps=4", "train.save_every=2", "train.batch_size=8", "model.network.hidden=8", "model.network.blocks=1"]


def test_runs_differ_in_prior_objective_and_seed_alone():
    trees = {p.name: load([ROOT / "configs" / f"{p.config}.yaml"], [*p.overrides]).tree for p in study.toy2d()}
    assert len(trees) == 9 * len(study.SEEDS)
    assert {t["model"]["objective"] for t in trees.values()} == {"path", "local", "global", "ism"}
    priors = {name.split("-")[1]: t["model"]["process"]["prior"]["name"] for name, t in trees.items()}
    assert priors == {"gaussian": "gaussian", "logistic": "logistic", "mixture": "mixture"}
    for tree in trees.values():
        assert tree["train"]["steps"] == study.EVERY * study.POINTS
        for key in ("process", "objective", "simulation_steps"):
            tree["model"].pop(key)
        for key in ("seed", "name"):
            tree.pop(key, None)
    first, *others = trees.values()
    assert all(tree == first for tree in others)


def test_the_time_to_a_likelihood_is_interpolated():
    assert study.reached(study.Curve([1.0, 2.0, 3.0], [1.25, 0.75, 0.15])) == pytest.approx(2 + 5 / 6)
    assert study.reached(study.Curve([1.0, 2.0], [0.1, 0.05])) == 1.0
    assert study.reached(study.Curve([1.0], [0.5])) is None
    assert study.summary([None, 2.0, 4.0]) == "3 (2 to 4); never in 1 of 3"


def test_the_table_and_the_picture_are_made_of_runs(tmp_path, monkeypatch):
    for name, value in {"ITEMS": 20, "DRAWS": 2, "SEEDS": (0,)}.items():
        monkeypatch.setattr(study, name, value)
    (plan,) = [p for p in study.toy2d() if p.name == "priors-gaussian-path-0"]
    config = load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}", *plan.overrides, *TINY])
    run = train(config, root=tmp_path, quiet=True)
    monkeypatch.setattr(study, "distance", lambda run: 0.5)
    found = study.rows(tmp_path)
    ((where, (row,)),) = found.items()
    assert where == ("gaussian", "path") and len(row["curve"].above) == 2 and row["above"] > 0 and row["score"] > 0.01
    head, _, line, empty, note = study.table(found).splitlines()
    assert (empty, note + "\n") == ("", study.NOTE)
    assert head.count("|") == line.count("|") == 3 + len(study.COLUMNS)
    assert line.startswith(f"| gaussian | paths | {row['above']:.3g}")
    study.picture(found, tmp_path / "priors.png")
    assert (tmp_path / "priors.png").stat().st_size > 10_000
    assert " 0.5 (0.5 to 0.5) " in line
    # the reference: the gradient of the density at the data's end, and an error of 0 for itself
    model, data = run.load(), run.config.dataset()
    x = data.take("test", torch.arange(20)).x.double().requires_grad_()
    (slope,) = torch.autograd.grad(data.log_prob(x).sum(), x)
    y = model.transform(x.detach())[0]
    exact = study.exact_score(run, model, torch.tensor(0.0, dtype=torch.float64), y)
    torch.testing.assert_close(exact, slope * model.transform.std)
    x = model.transform(data.take("train", torch.arange(10_000)).x.double())[0]
    u, noise = torch.tensor(0.5, dtype=torch.float64), torch.Generator().manual_seed(0)
    y = torch.exp(-u / 2) * x + torch.randn(x.shape, generator=noise).double() * (-torch.expm1(-u)).sqrt()
    found = (y * study.exact_score(run, model, u, y)).sum(1)  # E y·∇log q = -D, by parts
    assert abs(found.mean() + 2) < 5 * found.std() / 100
    monkeypatch.setattr(model, "score", lambda t, y: study.exact_score(run, model, model.process.clock(t), y.double()))
    assert study.score_error(run, model) < 1e-8


@pytest.mark.slow
def test_distances_are_those_of_drawn_points(tmp_path, monkeypatch):
    """The law of noise that an untrained model keeps is nearer to the data than a shifted one."""
    monkeypatch.setattr(study, "DRAWN", 100)
    config = load(
        [ROOT / "configs" / "toy2d" / "local_dsm.yaml"], [*TINY, "train.sample_every=0", "train.eval_every=0"]
    )
    run = train(config, root=tmp_path, quiet=True)
    near = study.distance(run)
    model = run.load()
    sample = type(model).sample
    monkeypatch.setattr(type(model), "sample", lambda *a, **k: sample(*a, **k) + 3.0)
    assert 0 < near < study.distance(run)
