"""Classifier two-sample tests: Bayes accuracies, the null hypothesis, copies, and errors against their spread."""

import math
import warnings
from functools import partial

import pytest
import torch

from genmodels.data.memory import InMemory
from genmodels.metrics import two_sample as module
from genmodels.metrics.metric import Metric, Subject
from genmodels.metrics.two_sample import (
    Answers,
    ClassifierTwoSampleTest,
    accuracy_stderr,
    auc_stderr,
    two_sample_test,
)
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import generator
from genmodels.types import Batch, Samples
from tests.evaluation_fakes import Points, UniformLevels


def normal(n, *key, dim=8):
    return torch.randn(n, dim, generator=generator("c2st", *key))


def shifted(n, *key, by=1.0):
    x = normal(n, *key)
    x[:, 0] += by
    return x


def copies(x, *key):
    return x[torch.randperm(len(x), generator=generator("c2st", *key))]


# The sd of the accuracy over draws of 1500 against 1500 is 0.0126 (logistic) and 0.011 (mlp): bounds are 4 of it.
@pytest.mark.parametrize("classifier", ["logistic", "mlp"])
@pytest.mark.slow_for("mlp")
def test_one_law_cannot_be_told_apart(classifier):
    found = two_sample_test(normal(1500, 0), normal(1500, 1), classifier)
    assert abs(found.accuracy - 0.5) < 0.055
    assert abs(found.auc - 0.5) < 0.065


@pytest.mark.parametrize("classifier", ["logistic", "mlp"])
def test_a_shift_is_seen_as_far_as_bayes_sees_it(classifier):
    """The best classifier of N(0, I) and N(e, I) has the accuracy Φ(1/2) = 0.6915 and the area Φ(1/√2) = 0.7602."""
    found = two_sample_test(shifted(1500, 0), normal(1500, 1), classifier)
    assert 0.65 < found.accuracy < 0.72
    assert 0.71 < found.auc < 0.79


def test_logistic_regression_is_blind_to_a_scale_that_the_mlp_sees():
    """Bayes accuracy for the scales 1 and 1.5 in 3 dimensions: 0.680."""
    fake, real = 1.5 * normal(1500, 0, dim=3), normal(1500, 1, dim=3)
    assert abs(two_sample_test(fake, real, "logistic").accuracy - 0.5) < 0.055
    assert 0.63 < two_sample_test(fake, real, "mlp").accuracy < 0.71


def test_copies_are_told_apart_worse_than_by_chance():
    real = normal(1500, 1)
    found = two_sample_test(copies(real, 2), real, "logistic")
    assert 0.43 < found.accuracy < 0.485  # 0.460, sd 0.007
    assert found.auc < 0.5 - 3 * auc_stderr(1500, 1500, 5)


def test_sides_of_different_size_score_like_equal_ones():
    """A vote for the larger side would be right in 3 of 4 cases."""
    found = two_sample_test(normal(500, 0), normal(1500, 1), "logistic")
    assert abs(found.accuracy - 0.5) < 4 * accuracy_stderr(found, 5)
    assert found.fake[0] == 500 and found.real[0] == 1500
    # trained on five times as many real items it would call nearly everything real: 0.56
    assert 0.63 < two_sample_test(shifted(300, 0), normal(1500, 1), "logistic").accuracy < 0.74
    apart = two_sample_test(normal(300, 0) + 20, normal(900, 1), "logistic")
    assert apart == Answers((300, 300), (900, 900), 1.0)


def test_exchanging_the_sides_changes_little():
    fake, real = shifted(1500, 0), normal(1500, 1)
    one, other = (two_sample_test(*sides, "logistic").accuracy for sides in ((fake, real), (real, fake)))
    assert 0 < abs(one - other) < 0.04  # the folds are others: sd 0.008


def test_constant_columns_and_equal_rows_are_harmless():
    fake, real = shifted(300, 0), normal(300, 1)
    fake[:, 3] = real[:, 3] = 7.0
    real[:, 5], fake[:, 5] = 0.0, 1e-3  # constant on either side: told apart
    assert two_sample_test(fake, real, "logistic").accuracy == 1
    collapsed = torch.ones(60, 8)
    found = two_sample_test(collapsed, collapsed.clone(), "mlp")
    assert (found.accuracy, found.auc) == (0.5, 0.5)


@pytest.mark.parametrize("classifier", ["logistic", "mlp"])
def test_numbers_do_not_depend_on_order_or_threads_and_no_warning_escapes(classifier):
    fake, real = shifted(200, 0), normal(250, 1)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = two_sample_test(fake, real, classifier)
        assert two_sample_test(copies(fake, 2), copies(real, 3), classifier) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_a_classifier_that_has_not_converged_says_nothing(monkeypatch):
    from sklearn.neural_network import MLPClassifier

    monkeypatch.setattr("sklearn.neural_network.MLPClassifier", partial(MLPClassifier, max_iter=1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        two_sample_test(normal(50, 0), normal(50, 1), "mlp")
    assert said == []


def test_standard_error_is_the_corrected_binomial_one():
    n = 10**6  # where the rule of succession does not matter
    answers = Answers((n, n // 2), (2 * n, n), 0.5)
    binomial = math.sqrt((0.25 / n + 0.25 / (2 * n)) / 4)
    assert accuracy_stderr(answers, 5) == pytest.approx(1.5 * binomial, rel=1e-5)  # 1 + 5/4 = 1.5²
    assert accuracy_stderr(Answers((100, 100), (100, 100), 1.0), 5) > 0
    # Mann-Whitney: of 2 and 3 values, the area takes the values of the rank sum over 6, with variance 6/(12·6)
    assert auc_stderr(2, 3, 2) == pytest.approx(math.sqrt(3 * 6 / 72), rel=1e-12)


def spread(classifier, draws, fake, real):
    found = [two_sample_test(fake(k), real(k), classifier) for k in range(draws)]
    values = torch.tensor([f.accuracy for f in found])
    areas = torch.tensor([f.auc for f in found])
    stderr = sum(accuracy_stderr(f, 5) for f in found) / draws
    return values, areas, stderr


def test_standard_error_covers_the_spread_over_draws():
    """30 draws know their spread to 13 %; the correction is 1.5 where 1.4 is needed without a difference, and about 1
    with a clear one."""
    values, areas, stderr = spread("logistic", 30, lambda k: normal(300, "f", k), lambda k: normal(300, "r", k))
    assert 0.85 < stderr / values.std().item() < 1.6
    assert 0.7 < auc_stderr(300, 300, 5) / areas.std().item() < 1.5
    values, _, stderr = spread("logistic", 30, lambda k: shifted(300, "f", k), lambda k: normal(300, "r", k))
    assert 1 < stderr / values.std().item() < 2.2


@pytest.mark.slow
def test_numbers_over_many_draws():
    null = lambda k: normal(1500, "f", k)  # noqa: E731
    real = lambda k: normal(1500, "r", k)  # noqa: E731
    values, areas, stderr = spread("logistic", 100, null, real)
    assert abs(values.mean() - 0.5) < 4 * 0.0126 / 10 and 0.0126 == pytest.approx(values.std().item(), rel=0.25)
    assert 0.95 < stderr / values.std().item() < 1.4
    assert (areas < 0.5 - 3 * auc_stderr(1500, 1500, 5)).sum() < 2  # flags of perfect samplers: < 2 %
    values, _, _ = spread("logistic", 60, lambda k: shifted(1500, "f", k), real)
    assert abs(values.mean() - 0.6908) < 0.005 and values.std() == pytest.approx(0.0087, rel=0.35)
    values, areas, _ = spread("logistic", 60, lambda k: copies(real(k), k), real)
    assert 0.45 < values.mean() < 0.47
    assert (areas < 0.5 - 3 * auc_stderr(1500, 1500, 5)).float().mean() > 0.9
    values, areas, stderr = spread("mlp", 25, null, real)
    assert 0.9 < stderr / values.std().item() < 2 and abs(values.mean() - 0.5) < 0.01
    assert (areas < 0.5 - 3 * auc_stderr(1500, 1500, 5)).sum() == 0


def scored(x, dataset, **options):
    metric = ClassifierTwoSampleTest(**options)
    metric.start(Subject(UniformLevels(dataset.shape), dataset, torch.device("cpu"), 64))
    metric.update(Samples(torch.arange(len(x)), x=x, features={metric.features.identity: metric.features(x)}), None)
    return metric.compute()


def test_metric_names_and_describes_its_estimates():
    x = torch.randn(400, 2, generator=generator("c2st")) + 1
    found = scored(x, Points())
    assert list(found) == ["C2ST-pixels", "C2ST-logistic-pixels"]
    logistic = found["C2ST-logistic-pixels"]
    direct = two_sample_test(x.double(), Points().all("train").x.double(), "logistic")
    assert abs(logistic.value - direct.accuracy) < 0.03  # the same items, dealt again
    assert (logistic.better, logistic.n, logistic.references) == ("lower", 400, {"indistinguishable": 0.5})
    assert logistic.detail.endswith(", 5 folds, 400 against 300")
    assert float(logistic.detail.split()[1].rstrip(",")) == pytest.approx(direct.auc, abs=0.03)
    assert all(estimate.flags == () for estimate in found.values())
    (name,) = scored(x, Points(), reference="test", classifiers=("logistic",), folds=3)
    assert name == "C2ST-logistic-pixels-test"


class ManyColumns(InMemory):
    """Standard normal in 32 dimensions: the more there are, the more a linear classifier learns by heart."""

    registered_name, shape = "many_columns", (32,)

    def __init__(self):
        for split, n in {"train": 1000, "val": 0, "test": 0}.items():
            self.hold(split, Batch(normal(n, "many", split, dim=32)))


def test_a_model_that_copies_is_flagged_by_all_estimates_and_a_perfect_one_is_not():
    """Copies show in the logistic regression first; the flag is the model's, whichever number a board ranks by."""
    dataset = ManyColumns()
    found = scored(copies(dataset.all("train").x, 1), dataset)
    assert {estimate.flags for estimate in found.values()} == {("overlap_suspected",)}
    fresh = scored(normal(1000, "fresh", dim=32), dataset)
    assert {estimate.flags for estimate in fresh.values()} == {()}


@pytest.mark.parametrize(("below", "flagged"), [(2.9, False), (3.1, True)])
def test_copies_are_suspected_three_standard_errors_below_a_half(monkeypatch, below, flagged):
    auc = 0.5 - below * auc_stderr(300, 300, 5)
    monkeypatch.setattr(module, "two_sample_test", lambda *_: Answers((300, 150), (300, 150), auc))
    found = scored(torch.randn(300, 2, generator=generator("c2st")), Points())
    assert all(bool(estimate.flags) is flagged for estimate in found.values())


def test_no_more_items_than_asked_for():
    x = torch.randn(400, 2, generator=generator("c2st"))
    found = scored(x, Points(), classifiers=("logistic",), max_items=100)["C2ST-logistic-pixels"]
    assert found.n == 100 and found.detail.endswith("5 folds, 100 against 100")
    again = scored(x.flip(0), Points(), classifiers=("logistic",), max_items=100)["C2ST-logistic-pixels"]
    assert again.value == found.value


def test_errors():
    with pytest.raises(ValueError, match="19 items; at least 20"):
        scored(torch.zeros(19, 2), Points())
    with pytest.raises(ValueError, match="the split 'val' has 5 items"):
        scored(torch.zeros(30, 2), Points((300, 5, 5)), reference="val")
    with pytest.raises(ValueError, match="folds=1"):
        ClassifierTwoSampleTest(folds=1)
    with pytest.raises(ConfigError, match="svm"):
        resolve(Metric, {"name": "c2st", "classifiers": ["svm"]}, "metric")
    node = resolve(Metric, {"name": "c2st", "classifiers": ["logistic"]}, "metric")
    assert build(Metric, node).classifiers == ("logistic",)
