"""Precision, recall, density and coverage: hand-made cases, independent code, null values, and what errors cover."""

import math

import numpy as np
import pytest
import torch

from genmodels.metrics.metric import Subject
from genmodels.metrics.prdc import (
    PrecisionRecallDensityCoverage,
    expected_coverage,
    measure,
    precision_recall_density_coverage,
)
from genmodels.rng import generator
from genmodels.types import Samples
from tests.evaluation_fakes import Points, UniformLevels
from tests.unit.digits_halves import classes, halves

NAMES = ("precision", "recall", "density", "coverage")


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator("prdc test", seed))


SMALL = column(0, 1, 2, 10), column(0.5, 1.5, 9, 20)
LARGER = column(0, 1, 3, 6, 10, 11), column(0.5, 3.5, 4, 12, 30)
TIED = column(0, 1, 2, 10), column(3, 3, 18, 2.5)
CONSTANT = torch.full((50, 3), 2.0), torch.full((50, 3), 2.0)
LITERAL = [
    (SMALL, 1, "strict", (3 / 4, 1, 5 / 4, 1)),
    (LARGER, 1, "strict", (3 / 5, 1, 6 / 5, 2 / 3)),
    (LARGER, 1, "inclusive", (4 / 5, 1, 7 / 5, 5 / 6)),
    (TIED, 1, "strict", (3 / 4, 1 / 4, 1, 1 / 2)),
    (TIED, 1, "inclusive", (1, 1 / 2, 7 / 4, 1 / 2)),
    (CONSTANT, 5, "strict", (0, 0, 0, 0)),
    (CONSTANT, 5, "inclusive", (1, 1, 10, 1)),
]


@pytest.mark.parametrize(("sets", "k", "ties", "expected"), LITERAL)
def test_literal_cases(sets, k, ties, expected):
    found = precision_recall_density_coverage(real=sets[0], fake=sets[1], k=k, ties=ties)
    assert tuple(found) == NAMES
    assert tuple(found.values()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("sets", "k"), [(SMALL, 1), (LARGER, 1), (TIED, 1), (CONSTANT, 5), ("normal", 3), ("copies", 5)]
)
def test_the_prdc_package_says_the_same(sets, k, capsys):
    package = pytest.importorskip("prdc")
    if isinstance(sets, str):
        x = normal(150, 6)
        sets = x, (x.repeat(2, 1) if sets == "copies" else 0.9 * normal(220, 6, seed=1) + 0.2)
    theirs = package.compute_prdc(sets[0].numpy(), sets[1].numpy(), nearest_k=k)
    ours = precision_recall_density_coverage(real=sets[0], fake=sets[1], k=k)
    # copies lie on edges, where the package's rounding decides; what does not depend on ties must agree
    for name in ("precision", "coverage") if len(sets[1]) == 300 else NAMES:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name


@pytest.mark.parametrize("ties", ["strict", "inclusive"])
def test_brute_force_on_whole_numbers(ties):
    """Ties at nearly every edge, in numpy and exact."""
    x, y = (2 * normal(80, 3)).round().numpy(), (2 * normal(110, 3, seed=1)).round().numpy()
    squares = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(-1)  # noqa: E731
    kth = lambda a: np.sort(squares(a, a), 1)[:, 4]  # noqa: E731  (the item itself comes first)
    d, below = squares(x, y), np.less if ties == "strict" else np.less_equal
    of_real, of_fake = below(d, kth(x)[:, None]), below(d, kth(y)[None])
    expected = of_real.any(0).mean(), of_fake.any(1).mean(), of_real.sum() / 4 / 110, of_real.any(1).mean()
    found = precision_recall_density_coverage(real=torch.from_numpy(x), fake=torch.from_numpy(y), k=4, ties=ties)
    assert tuple(found.values()) == pytest.approx(expected, rel=1e-12)


def test_which_is_which():
    """All fakes at one real item: every one plausible, nothing else there; and the other way round."""
    real = normal(300, 8)
    collapsed = real[:1] + 0.05 * normal(300, 8, seed=1)
    found = precision_recall_density_coverage(real=real, fake=collapsed)
    assert found["precision"] > 0.99 and found["recall"] < 0.02 and found["coverage"] < 0.1
    swapped = precision_recall_density_coverage(real=collapsed, fake=real)
    assert swapped["precision"] < 0.02 and swapped["recall"] > 0.99
    with pytest.raises(TypeError):
        precision_recall_density_coverage(real, collapsed)


@pytest.mark.parametrize(
    ("n", "m", "k", "expected"), [(300, 300, 3, 0.8763), (300, 100, 3, 0.5802), (10_000, 10_000, 5, 0.9688)]
)
def test_expected_coverage(n, m, k, expected):
    assert expected_coverage(n, m, k) == pytest.approx(expected, abs=5e-5)


def test_a_perfect_sampler_scores_what_is_expected_of_it():
    """Means of 60 draws, n ≠ m, within 4 standard errors of the mean."""
    draws = [measure(real=normal(150, 4, seed=i), fake=normal(90, 4, seed=-i - 1), k=3) for i in range(60)]
    for name, expected in (("density", 1.0), ("coverage", expected_coverage(150, 90, 3))):
        values = torch.tensor([draw[name].value for draw in draws])
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(draws)), name
        assert values.std() / math.sqrt(len(draws)) < 0.02


@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_standard_errors_cover_another_draw_of_fakes(scale):
    """200 draws of fakes for one real set; the ratio of standard error to sd has itself a spread of 5 %.

    Precision and density: right. Recall and coverage: hardly too small, and too large near 1.
    """
    real = normal(200, 8)
    draws = [measure(real=real, fake=scale * normal(200, 8, seed=i + 1)) for i in range(200)]
    ratio = {}
    for name in NAMES:
        sd = torch.tensor([draw[name].value for draw in draws]).std()
        ratio[name] = (torch.tensor([draw[name].stderr for draw in draws]).square().mean().sqrt() / sd).item()
    assert 0.84 < ratio["precision"] < 1.16 and 0.84 < ratio["density"] < 1.16, ratio
    assert 0.8 < ratio["recall"] < (1.8 if scale == 1 else 2.6), ratio  # recall is 0.95, and 0.995
    assert 0.9 < ratio["coverage"] < 1.8, ratio


@pytest.mark.parametrize(("n", "dim", "k", "shift"), [(300, 2, 5, 1.0), (300, 8, 5, 0.7), (300, 8, 3, 1.0)])
def test_a_few_outlying_fakes_make_recall_uncertain(n, dim, k, shift):
    """60 draws of fakes shifted in every direction, whose sparse side holds many real items at once.

    The ratio's own spread is 9 %; the jackknife is right at low recall and up to twice too large near 1. A binomial
    error would be 0.3 to 0.65 of the sd.
    """
    real = normal(n, dim, seed=1000)
    draws = [measure(real=real, fake=normal(n, dim, seed=i + 1) + shift, k=k)["recall"] for i in range(60)]
    values, errors = (torch.tensor(v) for v in zip(*((d.value, d.stderr) for d in draws), strict=True))
    assert 0.8 < errors.square().mean().sqrt() / values.std() < 2.2
    binomial = (values.mean() * (1 - values.mean()) / n).sqrt()
    assert binomial / values.std() < 0.7


def test_groups_of_fakes():
    """Precision and density are over all fakes; recall and coverage are means over whole groups."""
    real, fake = normal(60, 3), 1.1 * normal(130, 3, seed=1)
    found = measure(real=real, fake=fake, group=60)
    parts = [measure(real=real, fake=part) for part in (fake[:60], fake[60:120])]
    for name in ("recall", "coverage"):
        assert found[name].value == pytest.approx((parts[0][name].value + parts[1][name].value) / 2, rel=1e-12)
        within = (parts[0][name].stderr ** 2 + parts[1][name].stderr ** 2) / 2
        between = (parts[0][name].value - parts[1][name].value) ** 2 / 2
        variance = max(within, between) / 2
        assert found[name].stderr == pytest.approx(math.sqrt(variance), rel=1e-12)
    whole = measure(real=real, fake=fake)
    for name in ("precision", "density"):
        assert torch.equal(found[name].items, whole[name].items) and found[name].stderr == whole[name].stderr


@pytest.mark.parametrize(
    ("real", "fake", "k", "message"),
    [
        (5, 9, 5, "real has 5 items, but more than k = 5"),
        (9, 5, 5, "fake has 5 items, but more than k = 5"),
        (9, 9, 0, "more than k = 0 >= 1"),
    ],
)
def test_too_few_items(real, fake, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall_density_coverage(real=normal(real, 2), fake=normal(fake, 2), k=k)


def test_other_features():
    with pytest.raises(ValueError, match="real has 2 features and fake has 3"):
        precision_recall_density_coverage(real=normal(9, 2), fake=normal(9, 3))


# ---- digits -----------------------------------------------------------------------------------------------------


def test_coverage_notices_what_is_missing():
    """Of 898 real and 899 fresh digits: half of the fresh ones twice, and five classes alone."""
    real, fresh = halves()
    whole = measure(real=real, fake=fresh)["coverage"]
    assert abs(whole.value - expected_coverage(898, 899, 5)) < 4 * whole.stderr
    twice = measure(real=real, fake=torch.cat([fresh[:450], fresh[:449]]))["coverage"]
    assert twice.value < whole.value - 4 * whole.stderr
    assert twice.value == pytest.approx(expected_coverage(898, 450, 5), abs=0.03)
    few = measure(real=real, fake=fresh[classes()[1] < 5])["coverage"]
    assert few.value < 0.6


# ---- the metric -------------------------------------------------------------------------------------------------


def started(sizes=(300, 20, 200), **options):
    metric = PrecisionRecallDensityCoverage(**options)
    metric.start(Subject(UniformLevels((2,)), Points(sizes), torch.device("cpu"), 64))
    return metric


def feed(metric, x, order=None, size=64):
    rows = torch.arange(len(x)) if order is None else order
    for part in rows.split(size):
        metric.update(Samples(part, x=x[part], features={metric.features.identity: metric.features(x[part])}), None)
    return metric.compute()


def test_estimates_say_what_they_rest_on():
    x = normal(700, 2)
    found = feed(started(), x)
    assert tuple(found) == NAMES and {e.better for e in found.values()} == {"higher"}
    assert found["precision"].n == 700 and found["coverage"].n == 600
    assert found["precision"].detail == "k = 5, 300 real, 700 drawn"
    assert found["recall"].detail == "k = 5, 300 real, 2 groups of 300 drawn"
    assert found["coverage"].references == {"perfect sampler": expected_coverage(300, 300, 5)}
    assert found["density"].references.keys() == {"perfect sampler", "test set"}
    assert found["recall"].references == {}  # 200 test items say nothing of 300
    found = feed(started(max_items=200), x[:250])
    assert found["coverage"].references.keys() == {"perfect sampler", "test set"}
    assert found["precision"].detail == "k = 5, 200 real, 250 drawn" and found["recall"].n == 200


def test_fewer_samples_than_real_items():
    metric = started()
    found = feed(metric, normal(120, 2))
    assert found["coverage"].detail == "k = 5, 120 real, 120 drawn"
    metric.restart()
    assert feed(metric, normal(500, 2))["coverage"].detail == "k = 5, 300 real, 300 drawn"


def test_items_come_in_the_order_of_the_samples():
    x = normal(700, 2)
    x[5] = 100.0  # no real item is near
    order = torch.randperm(700, generator=generator("order"))
    plain, mixed = feed(started(), x), feed(started(), x, order, 37)
    assert plain["precision"].items[5] == 0 == mixed["precision"].items[(order == 5).nonzero()[0]]
    for name in NAMES:
        assert mixed[name].value == pytest.approx(plain[name].value, rel=1e-12)
        assert mixed[name].stderr == pytest.approx(plain[name].stderr, rel=1e-9)
    for name in ("precision", "density"):
        assert torch.equal(mixed[name].items, plain[name].items[order])


def test_options():
    with pytest.raises(ValueError, match="k must be >= 1 and max_items > k"):
        PrecisionRecallDensityCoverage(max_items=5)
    assert "inclusive" in feed(started(ties="inclusive"), normal(300, 2))["precision"].detail
