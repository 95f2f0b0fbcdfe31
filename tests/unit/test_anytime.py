"""The worth of predictions at every price: by hand, and through the evaluator, which asks again for it alone."""

import math

import pytest
import torch

from genmodels.evaluation.evaluate import evaluate
from genmodels.metrics.anytime import AnytimeAccuracy
from genmodels.metrics.metric import Subject
from genmodels.registry import ConfigError
from genmodels.types import Batch, Samples
from tests.evaluation_fakes import Classes, FakeProtocol, FakeRun, Threshold


def started(**arguments):
    data = Classes()
    metric = AnytimeAccuracy(**arguments)
    metric.start(Subject(Threshold(), data, torch.device("cpu"), 64))
    assert metric.frequent == data.all("train").target.mode().values == 0
    return metric


def give(metric, named, target, nfe, place=None):
    logits = torch.nn.functional.one_hot(torch.tensor(named), 2).float()
    options = None if place is None else {"iterations": place}
    batch = Batch(torch.zeros(len(named), 2), target=torch.tensor(target))
    metric.update(Samples(torch.arange(len(named)), prediction=logits, nfe=nfe, options=options), batch)


def test_the_integral_by_hand():
    metric = started(budget=16.0)
    target = [0, 1, 1, 0, 1]  # the most frequent class of training, 0, is right in two of five
    give(metric, [0, 1, 1, 0, 0], target, 8.0)
    give(metric, [0, 0, 1, 1, 0], target, 2.0, place=1)
    give(metric, [1, 0, 0, 1, 1], target, 32.0, place=4)  # beyond the budget
    found = metric.compute()
    # from 1 to 2 the constant (quarter of log 16), from 2 to 8 place 1 (a half), from 8 on the full answer
    e = found["anytime_accuracy"]
    assert e.items.tolist() == pytest.approx([1, 0.25, 0.75, 0.5, 0])
    assert e.value == pytest.approx(0.25 * 0.4 + 0.5 * 0.4 + 0.25 * 0.8)
    assert e.stderr == pytest.approx(torch.tensor([1, 0.25, 0.75, 0.5, 0]).std().item() / math.sqrt(5))
    assert (e.better, found["accuracy_at_1"].value, found["accuracy_at_4"].value) == ("higher", 0.4, 0.2)
    assert (found["evaluations_at_1"].value, found["evaluations_at_1"].better) == (2.0, "none")
    assert set(found) == {
        "anytime_accuracy",
        *(f"{what}_at_{k}" for what in ("accuracy", "evaluations") for k in (1, 4)),
    }


def test_evaluations_are_means_over_items_and_less_than_one_costs_nothing():
    metric = started(budget=16.0)
    give(metric, [1, 1], [1, 1], 0.0)
    give(metric, [0], [1], 0.0)
    give(metric, [0, 0], [1, 1], 3.0, place=0)
    give(metric, [1], [1], 6.0, place=0)
    found = metric.compute()
    assert found["evaluations_at_0"].value == 4.0
    # the full answer is free: it counts up to 4 evaluations, where the (worse) place of 4 follows; order is by price
    assert found["anytime_accuracy"].value == pytest.approx(0.5 * 2 / 3 + 0.5 * 1 / 3)


def test_bad_arguments_are_refused():
    for bad in ({"budget": 1.0}, {"places": (0, 2, 2)}):
        with pytest.raises(ConfigError, match="a budget above 1 and places that differ"):
            AnytimeAccuracy(**bad)


class Dial(Threshold):
    """The answer is right after two moves of a search, and every move is an evaluation."""

    def predict(self, batch, *, seeds=None, sharpness: float = 1.0, iterations: int | None = None):
        moves = 5 if iterations is None else min(iterations, 5)
        for _ in range(moves):
            self.network(None, batch.x)
        score = sharpness * (batch.x[:, 0] - self.at) * (1 if moves >= 2 else -1)
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize("model", [Dial(), Threshold()], ids=["dial", "none"])
def test_the_evaluator_asks_at_every_place(tmp_path, model):
    data = Classes()
    metrics = ["accuracy", {"name": "anytime_accuracy", "places": [0, 1, 2], "budget": 10.0}]
    protocol = FakeProtocol(data, metrics, predict={"batch_size": 64})
    result = evaluate(FakeRun(tmp_path / "run", model, predict={"sharpness": 2.0}), protocol)
    found = {m["name"]: m["value"] for m in result["metrics"]}
    assert found["accuracy"] == 1.0
    if isinstance(model, Dial):
        assert [found[f"accuracy_at_{k}"] for k in (0, 1, 2)] == [0.0, 0.0, 1.0]
        assert [found[f"evaluations_at_{k}"] for k in (0, 1, 2)] == [0.0, 1.0, 2.0]
        # wrong up to two evaluations: the place of 0 evaluations begins where prices do
        assert found["anytime_accuracy"] == pytest.approx(1 - math.log10(2))
        assert result["cost"]["predict"]["nfe"] == 5.0 and result["cost"]["predict"]["items"] == data.size("test")
    else:
        assert not any("_at_" in name for name in found) and found["anytime_accuracy"] == 1.0
