"""Masks count, several targets of one item are not independent, and evaluations are counted exactly."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from genmodels.metrics import supervised
from genmodels.metrics.auroc import AUROC
from genmodels.metrics.metric import Subject
from genmodels.metrics.supervised import (
    Accuracy,
    Brier,
    CalibrationError,
    CrossEntropy,
    ForecastNLL,
    SquaredError,
    masked_sums,
)
from genmodels.rng import generator
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


def binormal(n: int, shift: float, *key: object) -> tuple[torch.Tensor, Batch]:
    """Logits whose log odds are normal, shifted in class 1: the area is Φ(shift/√2)."""
    g = generator("auroc", *key)
    label = (torch.rand(n, generator=g) < 0.2).long()
    odds = torch.randn(n, generator=g, dtype=torch.float64) + shift * label
    return torch.stack((-odds / 2, odds / 2), 1), Batch(torch.zeros(n, 2), target=label)


def test_auroc_and_its_error_are_those_of_all_pairs():
    logits, batch = binormal(80, 1.0)
    logits = (4 * logits).round() / 4  # with ties
    e = scored(AUROC(), Classes(), logits, batch)
    assert e.value == pytest.approx(roc_auc_score(batch.target, logits[:, 1] - logits[:, 0]), rel=1e-12)
    high, low = ((logits[:, 1] - logits[:, 0])[batch.target == k] for k in (1, 0))
    wins = (high[:, None] > low).double() + (high[:, None] == low).double() / 2
    variance = wins.mean(1).var() / len(high) + wins.mean(0).var() / len(low)
    assert e.stderr == pytest.approx(variance.sqrt().item(), rel=1e-12) and e.references == {"chance": 0.5}


def test_error_of_auroc_is_its_spread_over_data_sets():
    """To 10 %: 400 of them give a standard deviation to 3.5 %; the mean is Φ(1/√2)."""
    found = [scored(AUROC(), Classes(), *binormal(200, 1.0, k)) for k in range(400)]
    values, errors = (torch.tensor([getattr(e, key) for e in found]) for key in ("value", "stderr"))
    assert values.mean().item() == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=3 * values.std().item() / 20)
    assert errors.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=0.1)


def test_auroc_needs_two_classes_and_says_so():
    three = Classes()
    three.target_shape = (3,)
    with pytest.raises(NotApplicable, match="one of two classes"):
        AUROC().start(subject(three))
    with pytest.raises(ValueError, match="found 3 items of class 0 and 0 of 1"):
        scored(AUROC(), Classes(), torch.zeros(3, 2), Batch(torch.zeros(3, 2), target=torch.zeros(3).long()))
    logits, batch = binormal(9, 0.0)
    logits[4] = math.nan
    assert math.isnan(scored(AUROC(), Classes(), logits, batch).value)


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


# ---- probabilities of classes ------------------------------------------------------------------------------------

F64 = torch.float64


def labelled(n, classes, seed=0, scale=2.0):
    """Logits [n, classes], and labels drawn from the probabilities they state."""
    g = generator("labelled", seed)
    logits = scale * torch.randn(n, classes, dtype=F64, generator=g)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]


def estimate(metric, logits, target, mask=None, batch_size=None):
    """Of a metric that reads no reference data."""
    metric.references = {}
    metric.restart()
    for rows in torch.arange(len(logits)).split(batch_size or len(logits)):
        batch = Batch(torch.zeros(len(rows), 1), target=target[rows], target_mask=None if mask is None else mask[rows])
        metric.update(Samples(rows, prediction=logits[rows]), batch)
    return next(iter(metric.compute().values()))


def test_cross_entropy_and_brier_against_scikit_learn():
    from sklearn.metrics import brier_score_loss, log_loss

    logits, target = labelled(500, 4)
    p = logits.softmax(1).numpy()
    e = estimate(CrossEntropy(), logits, target, batch_size=64)
    assert e.value == pytest.approx(log_loss(target.numpy(), p, labels=range(4)), rel=1e-12) and e.unit == "nats"
    assert e.items.mean().item() == pytest.approx(e.value) and e.stderr == pytest.approx(
        e.items.std().item() / math.sqrt(500)
    )
    brier = estimate(Brier(), logits, target).value
    assert brier == pytest.approx(((p - np.eye(4)[target]) ** 2).sum(1).mean(), rel=1e-12)
    two, binary = labelled(300, 2)
    half = brier_score_loss(binary.numpy(), two.softmax(1)[:, 1].numpy())
    assert estimate(Brier(), two, binary).value == pytest.approx(2 * half, rel=1e-12)


def test_proper_scores_are_lowest_for_the_true_law():
    logits, target = labelled(20_000, 3)
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1)
    e = estimate(CrossEntropy(), logits, target)
    assert e.value == pytest.approx(entropy.mean().item(), abs=4 * e.stderr)
    for metric in (CrossEntropy, Brier):
        right, sharp, flat = (estimate(metric(), logits * a, target).value for a in (1, 1.5, 0.6))
        assert right < min(sharp, flat)


def test_masked_classes_may_hold_any_number():
    """Fillers outside the classes count for nothing; observed, such a class has probability 0."""
    logits = torch.log(torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.3, 0.7]]], dtype=F64))
    target, mask = torch.tensor([[0, -100], [1, 0]]), torch.tensor([[True, False], [True, True]])
    costs = -np.log([0.9, 0.8, 0.3])
    e = estimate(CrossEntropy(), logits, target, mask)
    assert e.value == pytest.approx(costs.mean()) and e.items is None and e.n == 2
    residuals = torch.tensor([costs[0] - e.value, costs[1] + costs[2] - 2 * e.value])
    assert e.stderr == pytest.approx((residuals.std() / (1.5 * math.sqrt(2))).item())
    squares = [2 * 0.1**2, 2 * 0.2**2, 2 * 0.7**2]
    assert estimate(Brier(), logits, target, mask).value == pytest.approx(np.mean(squares))
    everything = torch.ones_like(mask)
    assert math.isinf(estimate(CrossEntropy(), logits, target, everything).value)
    assert estimate(Brier(), logits, target, everything).value == pytest.approx(np.mean([*squares, 1.5]))
    gaps = [0.9 - 1, 0.8 - 1, 0.7 - 0]
    assert estimate(CalibrationError(1), logits, target, mask).value == pytest.approx(abs(np.mean(gaps)))


def test_references_of_class_probabilities():
    data = Classes()
    train, test = (data.all(split).target for split in ("train", "test"))
    share, seen = train.double().mean().item(), test.double().mean().item()
    e = scored(CrossEntropy(), data, torch.zeros(len(test), 2), data.all("test"))
    assert e.value == pytest.approx(math.log(2)) == e.references["chance"]
    expected = -(seen * math.log(share) + (1 - seen) * math.log(1 - share))
    assert e.references["class frequencies"] == pytest.approx(expected)
    e = scored(Brier(), data, torch.zeros(len(test), 2), data.all("test"))
    assert e.value == pytest.approx(0.5) == e.references["chance"]
    assert e.references["class frequencies"] == pytest.approx(seen * 2 * (1 - share) ** 2 + (1 - seen) * 2 * share**2)


class Unseen(Classes):
    """A third class that only the test split has."""

    target_shape = (3,)

    def __init__(self):
        super().__init__()
        test = self.all("test")
        self.hold("test", test.replace(target=torch.cat([torch.tensor([2]), test.target[1:]])))


def test_a_class_that_training_lacks_has_no_finite_reference():
    data = Unseen()
    e = scored(CrossEntropy(), data, torch.zeros(200, 3), data.all("test"))
    assert e.references == {"chance": pytest.approx(math.log(3))}
    assert set(scored(Brier(), data, torch.zeros(200, 3), data.all("test")).references) == {
        "chance",
        "class frequencies",
    }


# ---- calibration -------------------------------------------------------------------------------------------------


def test_calibration_error_of_equal_widths_against_scikit_learn():
    from sklearn.calibration import calibration_curve

    logits, target = labelled(1000, 5)
    confidence, named = (a.numpy() for a in logits.softmax(1).max(1))
    right, stated = calibration_curve(named == target.numpy(), confidence, n_bins=15)
    mass = np.histogram(confidence, np.linspace(0, 1, 16))[0]
    expected = (np.abs(right - stated) * mass[mass > 0]).sum() / 1000
    e = estimate(CalibrationError(15, "equal_width"), logits, target, batch_size=300)
    assert e.value == pytest.approx(expected, rel=1e-10) and e.detail == "15 bins of equal width"


def test_calibration_error_of_equal_masses():
    logits, target = labelled(990, 5)
    confidence, named = (a.numpy() for a in logits.softmax(1).max(1))
    gaps = (confidence - (named == target.numpy()))[np.argsort(confidence)].reshape(15, 66)
    e = estimate(CalibrationError(), logits, target, batch_size=300)
    assert e.value == pytest.approx(np.abs(gaps.mean(1)).mean(), rel=1e-10) and e.detail == "15 bins of equal mass"
    for n in (7, 15, 100, 989):
        counts = CalibrationError()._bins(torch.from_numpy(confidence[:n])).bincount(minlength=15)
        assert counts.sum() == n and counts.max() - counts.min() <= 1 and len(counts) == 15


def test_calibration_error_by_hand():
    """Two bins: confidences .6, .6 (one right) and .9, 1 (both right): (|1.2 - 1| + |1.9 - 2|)/4."""
    p = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.9, 0.1], [1.0, 0.0]], dtype=F64)
    target = torch.tensor([0, 0, 0, 0])
    e = estimate(CalibrationError(2), p.clamp(min=1e-300).log(), target)
    assert e.value == pytest.approx(0.3 / 4)
    signed = torch.tensor([0.6 - 1, 0.6, 1 - 0.9, 0.0])  # the second bin is too modest
    assert e.stderr == pytest.approx(signed.std().item() / 2, rel=1e-6) and e.items is None
    assert estimate(CalibrationError(1), p.clamp(min=1e-300).log(), target).value == pytest.approx(0.1 / 4)


def test_confidences_that_are_all_equal_share_a_bin():
    logits = torch.tensor([[1.0, 0.0]], dtype=F64).expand(100, 2)
    target = (torch.arange(100) >= 70).long()
    e = estimate(CalibrationError(), logits, target)
    assert e.value == pytest.approx(abs(1 / (1 + math.exp(-1)) - 0.7))


@pytest.fixture
def few_simulations(monkeypatch):
    """Floors are averaged over many data sets here."""
    monkeypatch.setattr(supervised, "SIMULATIONS", 10)


def calibration_errors(temperature, repeats=150, n=1000):
    found = [labelled(n, 4, seed) for seed in range(repeats)]
    return [estimate(CalibrationError(), temperature * logits, target) for logits, target in found]


def test_floor_is_what_a_calibrated_classifier_scores(few_simulations):
    found = calibration_errors(1.0)
    values = torch.tensor([e.value for e in found], dtype=F64)
    floors = torch.tensor([e.references["calibrated"] for e in found], dtype=F64)
    error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(floors.mean().item(), abs=4 * error)
    assert values.mean() > 10 * error  # the true error is zero: all of it is bias
    claimed = np.mean([e.stderr for e in found])
    assert 1 < claimed / values.std().item() < 3  # cautious near calibration


def test_error_of_the_calibration_error(few_simulations):
    """A classifier twice too sure of itself: the linear error is the spread over data sets."""
    found = calibration_errors(2.0)
    values = torch.tensor([e.value for e in found], dtype=F64)
    assert all(e.value > 2 * e.references["calibrated"] for e in found)
    # sd of 150 values: 5.8 % of itself
    assert np.mean([e.stderr for e in found]) == pytest.approx(values.std().item(), rel=0.2)


def test_calibration_counts_items_and_not_entries():
    logits, target = labelled(400, 3)
    one = estimate(CalibrationError(), 2 * logits, target)
    many = estimate(CalibrationError(), (2 * logits)[:, None].expand(-1, 6, -1), target[:, None].expand(-1, 6))
    assert (many.value, many.stderr, many.n) == (pytest.approx(one.value), pytest.approx(one.stderr), 400)


def test_calibration_refusals():
    with pytest.raises(ValueError, match="bins must be at least 1"):
        CalibrationError(0)
    with pytest.raises(ValueError, match="every target of every item is masked"):
        estimate(CalibrationError(), torch.zeros(3, 2), torch.zeros(3).long(), torch.zeros(3, dtype=torch.bool))
    for metric in (CrossEntropy(), Brier(), CalibrationError()):
        with pytest.raises(ValueError, match=rf"{metric.registered_name}: logits have shape \[4\]"):
            scored(metric, Classes(), torch.zeros(4), Classes().all("test")[:4])
        with pytest.raises(NotApplicable, match="no class labels"):
            metric.start(subject(Series()))


# ---- forecasts that are laws -------------------------------------------------------------------------------------


def test_forecast_nll_against_torch_distributions():
    g = generator("forecast")
    target = torch.randn(50, 4, 2, generator=g)
    mean, log_std = torch.randn(2, 50, 4, 2, generator=g)
    mask = torch.rand(50, 4, 2, generator=g) < 0.5
    data, law = Series(), torch.stack([mean, log_std], -1)
    batch = Batch(torch.zeros(50, 2), target=target.where(mask, torch.nan), target_mask=mask)
    expected = -torch.distributions.Normal(mean.double(), log_std.double().exp()).log_prob(target.double())
    e = scored(ForecastNLL(), data, law, batch)
    assert e.value == pytest.approx(expected[mask].mean().item(), rel=1e-6) and e.unit == "nats"
    squared = scored(SquaredError(), data, law, batch)
    assert squared.value == scored(SquaredError(), data, mean, batch).value


def test_forecast_nll_is_lowest_at_the_true_scale():
    target = 3 * torch.randn(20_000, 1, 1, generator=generator("scale"))
    nll = {}
    for std in (2.0, 3.0, 4.0):
        law = torch.stack([torch.zeros_like(target), torch.full_like(target, math.log(std))], -1)
        nll[std] = scored(ForecastNLL(), Series(), law, Batch(torch.zeros(20_000, 2), target=target))
    assert nll[3.0].value < min(nll[2.0].value, nll[4.0].value)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(3)
    assert nll[3.0].value == pytest.approx(entropy, abs=4 * nll[3.0].stderr)


def test_training_law_is_per_channel():
    data = Series()
    train, test = (data.all(split).target.double().flatten(0, 1) for split in ("train", "test"))
    mean, std = train.nanmean(0), (train.square().nanmean(0) - train.nanmean(0) ** 2).sqrt()
    expected = -torch.distributions.Normal(mean, std).log_prob(test.nan_to_num()).where(test.isfinite(), torch.nan)
    metric = ForecastNLL()
    metric.start(subject(data))
    assert metric.references == {"training law": pytest.approx(expected.nanmean().item(), rel=1e-9)}


def test_a_forecast_without_a_law_is_not_scored():
    data = Series()
    with pytest.raises(NotApplicable, match=r"predicts values, not laws: .* one more axis of size 2"):
        scored(ForecastNLL(), data, torch.zeros(200, 4, 2), data.all("test"))
    with pytest.raises(ValueError, match=r"forecast_nll: predictions have shape \[200, 4, 2, 3\]"):
        scored(ForecastNLL(), data, torch.zeros(200, 4, 2, 3), data.all("test"))
