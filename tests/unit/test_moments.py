"""Moments of forecasts against those of data: closed forms, the floor of exact moments, and refusals."""

import math

import pytest
import torch
from torch import Tensor

from genmodels.metrics.metric import Subject
from genmodels.metrics.moments import Moments
from genmodels.rng import generator
from genmodels.types import Batch, NotApplicable, Samples
from tests.evaluation_fakes import Series, SharedStart, UniformLevels

SCALE = torch.tensor([[0.5, 1.0], [2.0, 0.3]], dtype=torch.float64)


def subject(dataset) -> Subject:
    return Subject(UniformLevels(dataset.shape), dataset, torch.device("cpu"), 64)


def scored(y: Tensor, mean: Tensor, std: Tensor, parts: int = 3):
    metric = Moments()
    metric.restart()
    law = torch.stack([mean.expand_as(y), std.expand_as(y).log()], -1)
    for rows in torch.arange(len(y)).chunk(parts):
        metric.update(Samples(rows, prediction=law[rows]), Batch(torch.zeros(len(rows), 1, 2), target=y[rows]))
    return metric.compute()["moments"]


def normal(n: int, seed: int = 0) -> Tensor:
    return 1 + SCALE * torch.randn(n, 2, 2, generator=generator("moments", seed), dtype=torch.float64)


def test_the_value_is_the_mean_squared_gap_of_means_and_variances():
    y = normal(50)
    mean, variance = y.mean(0), y.var(0, correction=0)
    found = scored(y, mean + 0.1, (variance + 0.2).sqrt())
    assert found.value == pytest.approx(0.1**2 + 0.2**2, rel=1e-9)
    assert scored(y, mean, variance.sqrt()).value == pytest.approx(0.0, abs=1e-20)


def test_laws_of_items_are_mixed():
    """Two kinds of items with means ±1 and variance 0.25: a mixture of mean 0 and variance 1.25."""
    y = normal(40)
    sign = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0).double()[:, None, None]
    found = scored(y, sign.expand_as(y), torch.tensor(0.5).double())
    gaps = y.mean(0).square() + (1.25 - y.var(0, correction=0)).square()
    assert found.value == pytest.approx(gaps.mean().item(), rel=1e-9)


def test_exact_moments_score_the_floor_and_errors_are_those_over_data_sets():
    values, floors, errors, shifted = [], [], [], []
    for seed in range(200):
        y = normal(100, seed)
        exact = scored(y, torch.ones(()).double(), SCALE)
        values.append(exact.value)
        floors.append(exact.references["exact moments"])
        off = scored(y, torch.tensor(1.5).double(), SCALE)
        shifted.append(off.value)
        errors.append(off.stderr)
    values, floors, shifted = (torch.tensor(v, dtype=torch.float64) for v in (values, floors, shifted))
    # Var y/n + 2 (Var y)²/n for normal data; 200 data sets know the mean value to 7 %
    truth = ((SCALE.square() + 2 * SCALE.pow(4)) / 100).mean().item()
    assert floors.mean().item() == pytest.approx(truth, rel=0.05)
    assert values.mean().item() == pytest.approx(truth, abs=4 * float(values.std()) / math.sqrt(200))
    assert sum(errors) / 200 == pytest.approx(float(shifted.std()), rel=0.2)


def test_where_the_metric_has_no_meaning_it_says_so():
    Moments().start(subject(SharedStart()))
    with pytest.raises(NotApplicable, match="all observed"):
        Moments().start(subject(Series()))
    scattered = SharedStart()
    items = scattered.all("test")
    scattered.hold("test", items.replace(x=items.x + torch.arange(len(items))[:, None, None]))
    with pytest.raises(NotApplicable, match="do not share their start"):
        Moments().start(subject(scattered))
    y, metric = normal(5), Moments()
    metric.restart()
    with pytest.raises(NotApplicable, match="predicts values, not laws"):
        metric.update(Samples(torch.arange(5), prediction=y), Batch(torch.zeros(5, 1, 2), target=y))
    with pytest.raises(ValueError, match=r"predictions have shape \[5, 2, 2, 3\]"):
        law = torch.zeros(5, 2, 2, 3)
        metric.update(Samples(torch.arange(5), prediction=law), Batch(torch.zeros(5, 1, 2), target=y))
    with pytest.raises(ValueError, match="no predictions were taken in"):
        metric.compute()
    assert scored(normal(1), torch.ones(()).double(), SCALE, 1).stderr is None
