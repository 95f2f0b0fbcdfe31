"""The study of regularized continuous depth: its runs are what they say, and its table is made of their results."""

import math
from inspect import signature

import pytest
import torch

from evals.studies import regularization_table as report
from evals.studies.plans import ROOT
from evals.studies.regularization import EXPERIMENTS, SEEDS, STUDIES, methods, regularizers
from genmodels.config import load, read
from genmodels.data import spiral_dynamics
from genmodels.data.spiral_dynamics import SpiralSDE
from genmodels.data.spiral_series import SpiralSeries
from genmodels.dynamics.regularization import Regularizer
from genmodels.evaluation.protocol import FOLDER
from genmodels.registry import build, names
from genmodels.rng import generator


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_runs_have_names_of_their_own_and_a_seed_each(name):
    plans = list(STUDIES[name]())
    assert len({plan.name for plan in plans}) == len(plans) == len(SEEDS) * len(methods(EXPERIMENTS[name]))
    assert all(plan.overrides[0] == f"seed={plan.name[-1]}" for plan in plans)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_methods_are_the_regularizers_of_their_names(name):
    """And every registered one is compared where the model is an ODE."""
    experiment, seen = EXPERIMENTS[name], set()
    for method in methods(experiment):
        made = [build(Regularizer, node) for node in regularizers(experiment, method)]
        seen |= {r.registered_name for r in made}
        assert (method == "vanilla") == (made == [])
        assert method != "both" or [r.registered_name for r in made] == ["error_estimate", "stiffness"]
        assert not method.startswith("local") or [r.registered_name for r in made] == ["local"]
    assert seen == set(names(Regularizer)) if "taylor" in experiment.coefficients else "taylor" not in seen


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_runs_are_configurations_with_the_metric_of_the_table(name):
    experiment = EXPERIMENTS[name]
    path, protocol = ROOT / "configs" / f"{experiment.config}.yaml", FOLDER / f"{experiment.protocol}.yaml"
    if not (path.is_file() and protocol.is_file()):
        pytest.skip("configuration or protocol is not here")
    for plan in list(STUDIES[name]())[: len(methods(experiment))]:
        tree = load([path], [f"name={plan.name}", *plan.overrides]).tree
        assert tree["data"]["name"] == read(protocol)["dataset"]["name"]
        method = plan.name.removeprefix(f"{name}-").rpartition("-")[0]
        given = regularizers(experiment, method)
        assert [node["name"] for node in tree["model"]["regularizers"]] == [node["name"] for node in given]
        assert all(node.items() <= tree_node.items() for node, tree_node in
                   zip(given, tree["model"]["regularizers"], strict=True))  # fmt: skip
    assert experiment.metric in [metric["name"] for metric in read(protocol)["metrics"]]


def test_table_has_means_and_errors_over_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    values = {
        "annulus-vanilla-3": (0.9, 100, 2.0),
        "annulus-vanilla-4": (0.7, 140, 4.0),
        "annulus-steps-3": (1, 60, 1.5),
    }
    for run in values:
        path = tmp_path / "annulus" / run / "result.json"
        path.parent.mkdir(parents=True)
        path.touch()

    def read_one(path):
        quality, nfe, seconds = values[path.parent.name]
        cost = {"nfe": nfe, "seconds_per_item": 1e-3 * seconds}
        return ({"metrics": [{"name": "accuracy", "value": quality}], "cost": {"predict": cost},
                 "training": {"seconds": 10 * seconds}},)  # fmt: skip

    monkeypatch.setattr(report, "read", read_one)
    lines = report.table("annulus").splitlines()[2:]
    assert lines == [
        "| vanilla | 0.8 ± 0.1 | 120 ± 20 | 3 ± 1 | 30 ± 10 | 2 |",
        "| steps | 1 | 60 | 1.5 | 15 | 1 |",
    ]
    report.draw_front(["annulus"], tmp_path / "front.png")
    log = tmp_path / "runs" / "annulus-vanilla-3" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 10, "train/nfe": 80.0}\n{"step": 20, "train/nfe": null}\n{"step": 30, "train/nfe": 92}\n')
    report.draw_training(["annulus"], tmp_path / "runs", tmp_path / "training.png")
    assert (tmp_path / "front.png").is_file() and (tmp_path / "training.png").is_file()


def test_the_law_of_spirals_is_theirs(monkeypatch):
    """The field is the rate of change of the closed form of the data."""
    seen = []
    monkeypatch.setattr(report, "_evaluations", lambda *given: seen.extend(given) or 7.0)
    assert report.table("spirals").splitlines()[-1] == "| (the law of the data) | | 56 | | | |"
    field, start, times = seen[:3]
    data, start = SpiralSeries(count=4), start[:1]

    class Angle:
        def uniform(self, *size, **kind):
            return start.norm().sub(0.2).div(0.1 * 2 * math.pi).reshape(1, 1)

    t = times.double()[None].requires_grad_()
    path = data.curves(Angle(), t)[0]
    slope = torch.stack([torch.autograd.grad(path[..., k].sum(), t, retain_graph=True)[0] for k in range(2)], -1)
    torch.testing.assert_close(path[:, 0], start, rtol=1e-12, atol=1e-12)
    for k in range(2):
        torch.testing.assert_close(field(times[k], path[:, k]), slope[:, k], rtol=1e-10, atol=1e-10)


def test_the_law_of_spirals_with_noise_is_that_of_the_data(monkeypatch):
    seen = []
    monkeypatch.setattr(report, "_evaluations", lambda *given, **kind: seen.extend(given) or 7.0)
    assert report.law_of_noisy_spirals() == 700.0  # of the paths of a prediction
    field, start, times, solver, steps = seen
    u = torch.randn(6, 2, generator=generator("law"))
    torch.testing.assert_close(field.drift(times[0], u), spiral_dynamics.drift(u))
    torch.testing.assert_close(field.diffusion(times[0], u), signature(SpiralSDE).parameters["noise"].default * u)
    assert field.calculus == "ito" and start.tolist() == [[2.0, 0.0]] * 100
    torch.testing.assert_close(times, SpiralSDE(count=4).take("train", torch.tensor([0])).target_times[0])
    model = load([ROOT / "configs" / "spiral" / "sde.yaml"], ["name=x"]).tree["model"]
    assert model["solver"]["name"] == solver and steps.items() <= model["controller"].items()


def test_large_numbers_have_no_exponents():
    assert [report._plain(v, 4) for v in (53190.4, 0.02951, 123.44, 9999.0)] == ["53,190", "0.02951", "123.4", "9999"]


def test_standard_error_of_a_mean():
    assert report.mean_and_error([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7 / 3), rel=1e-12))
    assert report.mean_and_error([2.5]) == (2.5, None)
