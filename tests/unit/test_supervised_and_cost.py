"""Masks count, several targets of one item are not independent, and evaluations are counted exactly."""

import math

import pytest
import torch

from genmodels.metrics.metric import Subject
from genmodels.metrics.supervised import Accuracy, SquaredError, masked_sums
from genmodels.types import Batch, NotApplicable, Samples
from tests.evaluation_fakes import Classes, Points, Series, UniformLevels


def subject(dataset, model=None):
    return Subject(model or UniformLevels(dataset.shape), dataset, torch.device("cpu"), 64)


def scored(metric, dataset, prediction, batch):
    metric.start(subject(dataset))
    metric.update(Samples(torch.arange(len(batch)), prediction=prediction), batch)
    return next(iter(metric.compute().values()))


def test_accuracy_by_hand():
    batch = Batch(torch.zeros(4, 2), target=torch.tensor([0, 1, 1, 0]))
    logits = torch.tensor([[2.0, 1], [0, 1], [3, 1], [0, 1]])
    e = scored(Accuracy(), Classes(), logits, batch)
    assert e.value == 0.5 and e.better == "higher"
    assert e.stderr == pytest.approx(math.sqrt(1 / 3) / 2)  # sd with divisor n - 1 over √n
    assert e.items.tolist() == [1, 1, 0, 0]
    train, test = Classes().all("train").target, Classes().all("test").target
    assert e.references["most frequent class"] == pytest.approx((test == train.mode().values).double().mean().item())
    assert e.references["chance"] == 0.5


def test_accuracy_of_masked_sequences():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    batch = Batch(torch.zeros(2, 2), target=torch.tensor([[0, 1, 1], [1, 1, 1]]), target_mask=mask)
    logits = torch.tensor([[[1.0, 0], [1, 0], [0, 1]], [[0, 1], [1, 0], [1, 0]]])
    metric = Accuracy()
    metric.references = {}
    metric.restart()
    metric.update(Samples(torch.arange(2), prediction=logits), batch)
    assert metric.compute()["accuracy"].value == pytest.approx(2 / 3)  # (1 + 0 + 1) of 3 observed targets


def test_squared_error_by_hand():
    target = torch.tensor([[[1.0, math.nan], [2, 0]], [[0, 0], [math.nan, 4]]])
    batch = Batch(torch.zeros(2, 2), target=target, target_mask=target.isfinite())
    e = scored(SquaredError(), Series(), torch.ones(2, 2, 2), batch)
    sums, counts = torch.tensor([0.0 + 1 + 1, 1 + 1 + 9]), torch.tensor([3.0, 3.0])
    assert e.value == pytest.approx(13 / 6) and e.n == 2
    assert e.stderr == pytest.approx(((sums - 13 / 6 * counts).std() / (3 * math.sqrt(2))).item())


def test_ratio_error_with_unequal_counts():
    """Two items, one with a single observed target and one with three."""
    target = torch.tensor([[[1.0], [9], [9]], [[2], [0], [1]]])
    mask = torch.tensor([[[True], [False], [False]], [[True], [True], [True]]])
    e = scored(
        SquaredError(), Series(), torch.zeros(2, 3, 1), Batch(torch.zeros(2, 2), target=target, target_mask=mask)
    )
    assert e.value == pytest.approx(6 / 4) and e.items is None
    residuals = torch.tensor([1 - 1.5, 5 - 3 * 1.5])
    assert e.stderr == pytest.approx((residuals.std() / (2 * math.sqrt(2))).item())


def test_ratio_error_counts_items_and_not_entries():
    """Every entry of an item is the same: repeating it must not shrink the standard error."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(200, 1, 1, generator=g)
    data, zero = Series(), torch.zeros(200, 1, 1)
    one = scored(SquaredError(), data, zero, Batch(torch.zeros(200, 2), target=y))
    many = scored(SquaredError(), data, zero.expand(-1, 9, 1), Batch(torch.zeros(200, 2), target=y.expand(-1, 9, 1)))
    assert many.value == pytest.approx(one.value) and many.stderr == pytest.approx(one.stderr)


def test_training_mean_is_per_channel():
    data = Series()
    e = scored(SquaredError(), data, torch.zeros(200, 4, 2), data.all("test"))
    train, test = (data.all(split).target.flatten(0, 1) for split in ("train", "test"))
    mean = train.nanmean(0)
    assert e.references["training mean"] == pytest.approx(((test - mean) ** 2).nanmean().item(), rel=1e-5)
    assert e.references["training mean"] < 1.2 < e.value  # unit variance about (1, -2)


def test_mask_without_channels_covers_them_all():
    scores = torch.arange(12.0).reshape(1, 3, 4)
    total, count = masked_sums(scores, torch.tensor([[True, False, True]]))
    assert total.tolist() == [0 + 1 + 2 + 3 + 8 + 9 + 10 + 11] and count.tolist() == [8]


def test_wrong_shapes_and_data_are_explained():
    with pytest.raises(ValueError, match=r"accuracy: logits have shape \[4\]"):
        scored(Accuracy(), Classes(), torch.zeros(4), Classes().all("test")[:4])
    with pytest.raises(ValueError, match="squared_error: predictions have shape"):
        scored(SquaredError(), Series(), torch.zeros(4), Series().all("test")[:4])
    with pytest.raises(NotApplicable, match="no class labels"):
        Accuracy().start(subject(Series()))
    with pytest.raises(NotApplicable, match="no values"):
        SquaredError().start(subject(Classes()))
    with pytest.raises(NotApplicable):
        Accuracy().start(subject(Points()))
