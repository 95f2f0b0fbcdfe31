"""What every metric must do, whatever it measures."""

import itertools
import math
from functools import partial

import pytest
import torch

from genmodels.diffusion.model import DiffusionModel
from genmodels.evaluation.answers import QUESTIONS
from genmodels.metrics.metric import Metric, Subject
from genmodels.networks.mlp import MLP
from genmodels.registry import build, names, resolve
from genmodels.transforms import Identity
from genmodels.types import Likelihood, NotApplicable, Samples
from tests.evaluation_fakes import Classes, Glyphs, Levels, Points, Series, SharedStart, UniformLevels, answers


def straight(shape):
    """Flow matching of items of any shape, untrained, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = partial(MLP, hidden=(8,))
        facts = {"num_classes": None, "condition_shape": None, "bin_width": None}
        return DiffusionModel(network, shape=shape, transform=Identity(), **facts).double()


DATA = [Levels(), Points(), Classes(), Series(), SharedStart(), Glyphs()]


def started(name):
    """The metric with default arguments on the first data set that it applies to, and the question that feeds it."""
    for dataset, make in itertools.product(DATA, (UniformLevels, straight)):
        metric = build(Metric, resolve(Metric, name, "metric"))
        question = next(q for q, capability in QUESTIONS.items() if capability is metric.requires[0])
        try:
            metric.start(Subject(make(dataset.shape), dataset, torch.device("cpu"), 64))
        except NotApplicable:
            continue
        return metric, dataset, question
    raise AssertionError(f"no test data set suits the metric '{name}'")


def feed(metric, dataset, question, n, batch_size, order=None, spoil=False):
    """Hand over the same n answers, in batches of some size and in some order."""
    given, items = answers(dataset, n, question)
    order = torch.arange(n) if order is None else order
    for rows in order.split(batch_size):
        parts = {key: value[rows] for key, value in given.items()}
        if spoil:
            for value in filter(torch.is_floating_point, parts.values()):
                value[0] = math.nan
            spoil = False
        if "stored" in parts:
            parts["stored"] = parts["stored"].mean().item()
        if "likelihood" in parts:
            parts["likelihood"] = Likelihood(parts["likelihood"], "exact")
        if metric.registered_name in (
            "forecast_nll",
            "moments",
        ):  # forecasts that are laws: mean and log standard deviation
            parts["prediction"] = torch.stack([parts["prediction"], 0.1 * parts["prediction"]], -1)
        if metric.features is not None:
            parts["features"] = {metric.features.identity: metric.features(parts["x"]).cpu()}
        samples = Samples(rows, **parts)
        metric.update(samples, None if items is None else items[rows])


def numbers(estimates):
    return {name: (e.value, e.stderr) for name, e in estimates.items()}


@pytest.mark.parametrize("name", names(Metric))
def test_declares_itself(name):
    metric, _, _ = started(name)
    assert metric.version >= 1 and isinstance(metric.fingerprint, str)
    assert metric.requires and set(metric.requires) <= set(QUESTIONS.values())
    assert metric.__class__.__doc__


@pytest.mark.parametrize("name", names(Metric))
def test_nothing_taken_in_is_an_error(name):
    metric, _, _ = started(name)
    with pytest.raises(ValueError, match=r"no .* taken in"):
        metric.compute()


@pytest.mark.parametrize("name", names(Metric))
def test_estimates_are_complete(name):
    metric, dataset, question = started(name)
    feed(metric, dataset, question, 150, 40)
    estimates = metric.compute()
    assert estimates
    for estimate in estimates.values():
        assert math.isfinite(estimate.value) and estimate.unit and estimate.kind
        assert estimate.stderr is None or (math.isfinite(estimate.stderr) and estimate.stderr >= 0)
        assert estimate.better in ("lower", "higher", "none")
        assert estimate.items is None or math.isclose(estimate.items.mean(), estimate.value, rel_tol=1e-12)
        assert all(math.isfinite(value) for value in (estimate.references or {}).values())


@pytest.mark.parametrize("name", names(Metric))
def test_batches_and_order_do_not_matter(name):
    metric, dataset, question = started(name)
    feed(metric, dataset, question, 150, 150)
    whole = numbers(metric.compute())
    again, _, _ = started(name)
    feed(again, dataset, question, 150, 37, torch.randperm(150, generator=torch.Generator().manual_seed(1)))
    for key, (value, stderr) in numbers(again.compute()).items():
        assert value == pytest.approx(whole[key][0], rel=1e-9, abs=1e-12), key
        if stderr is not None:
            assert stderr == pytest.approx(whole[key][1], rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize("name", names(Metric))
@pytest.mark.slow_for("c2st")
def test_restart_forgets_the_answers_and_keeps_the_reference(name):
    metric, dataset, question = started(name)
    feed(metric, dataset, question, 150, 50)
    first = numbers(metric.compute())
    metric.restart()
    feed(metric, dataset, question, 90, 50)
    assert numbers(metric.compute()) != first
    metric.restart()
    feed(metric, dataset, question, 150, 50)
    assert numbers(metric.compute()) == first


@pytest.mark.parametrize("name", names(Metric))
@pytest.mark.slow_for("c2st", "kinetic_energy", "lipschitz", "mmd", "sliced_wasserstein")
def test_standard_error_falls_with_n(name):
    metric, dataset, question = started(name)
    feed(metric, dataset, question, 500, 100)
    few = numbers(metric.compute())
    metric.restart()
    feed(metric, dataset, question, 4000, 500)
    for key, (_, stderr) in numbers(metric.compute()).items():
        if stderr:  # a factor of 2.8, or less where the reference data limit it
            assert 1 < few[key][1] / stderr < 4.2, key


@pytest.mark.parametrize("name", names(Metric))
def test_an_answer_that_is_not_finite_spoils_the_estimate_and_nothing_else(name):
    metric, dataset, question = started(name)
    if question == "sample":
        pytest.skip("drawn items that are not finite never reach a metric")
    feed(metric, dataset, question, 150, 50)
    clean = numbers(metric.compute())
    metric.restart()
    feed(metric, dataset, question, 150, 50, spoil=True)
    spoilt = metric.compute()
    assert spoilt.keys() == clean.keys() and all(math.isnan(estimate.value) for estimate in spoilt.values())
    metric.restart()
    feed(metric, dataset, question, 150, 50)
    assert numbers(metric.compute()) == clean
