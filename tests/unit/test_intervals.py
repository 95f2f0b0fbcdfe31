"""Intervals cover what they claim, pairing removes what items share, and families keep their promise."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats

from genmodels.evaluation import intervals
from genmodels.evaluation.intervals import (
    levels,
    paired_blocks,
    paired_items,
    unpaired,
)


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- items in common ---------------------------------------------------------------------------------------------


def test_skewed_differences_are_covered():
    """Log-normal differences of 40 items: t* covers 93 of 100, percentiles of the mean 89 (sd of 2000 trials: 0.6)."""
    g, truth, repeats = rng(), math.exp(0.5), 2000
    ours = percentile = 0
    for repeat in range(repeats):
        d = g.lognormal(0, 1, 40)
        low, high = paired_items(d, np.zeros(40), 500, repeat).interval(0.95)
        ours += low <= truth <= high
        low, high = np.quantile(d[g.integers(0, 40, (500, 40))].mean(1), (0.025, 0.975))
        percentile += low <= truth <= high
    assert ours / repeats > 0.915 > percentile / repeats


@pytest.mark.parametrize(("n", "more", "less"), [(200, 0.01, 0.005), (500, 0.02, 0.02), (50, 0.3, 0.1)])
def test_differences_of_shares_are_covered(n, more, less):
    """Few items differ, as between two good classifiers; 4 sd of 2000 trials are 2 points."""
    g, covered, repeats = rng(), 0, 2000
    for _ in range(repeats):
        u = g.random(n)
        low, high = paired_items((u < more) * 1.0, (u > 1 - less) * 1.0, 100).interval(0.95)
        covered += low <= more - less <= high
    assert 0.93 < covered / repeats < 0.975


def test_shares_by_hand():
    """7 items for a alone and 2 for b alone of 100: (7.5 - 2.5)/102, and its error."""
    a, b = np.zeros(100), np.zeros(100)
    a[:7], b[7:9] = 1, 1
    d = paired_items(a, b)
    assert d.value == pytest.approx(0.05) and d.centre == pytest.approx(5 / 102)
    assert d.stderr == pytest.approx(math.sqrt(10 - 25 / 102) / 102)
    assert d.method == "paired on 100 items, 9 of which differ"
    half = paired_items(a / 2, b / 2)
    assert half.interval(0.9) == pytest.approx([x / 2 for x in d.interval(0.9)])


def test_pairing_removes_what_items_share():
    shared, g = rng(1).normal(0, 1, 500), rng(2)
    a, b = shared + 0.05 + 0.1 * g.normal(size=500), shared + 0.1 * g.normal(size=500)
    low, high = paired_items(a, b).interval(0.95)
    error = np.std(a - b, ddof=1) / math.sqrt(500)
    # 10 000 draws place a quantile of t* to about 0.03
    assert (low, high) == pytest.approx((np.mean(a - b) - 1.96 * error, np.mean(a - b) + 1.96 * error), abs=0.1 * error)
    alone = unpaired(a.mean(), a.std(ddof=1) / math.sqrt(500), b.mean(), b.std(ddof=1) / math.sqrt(500))
    assert low > 0 > alone.interval(0.95)[0] and np.diff(alone.interval(0.95)) > 5 * (high - low)


def test_order_unit_and_seed():
    a, b = rng(3).gamma(1.0, 1.0, 60), rng(4).gamma(2.0, 1.0, 60)
    low, high = paired_items(a, b, 2000, seed=7).interval(0.9)
    assert paired_items(a, b, 2000, seed=7).interval(0.9) == (low, high) != paired_items(a, b, 2000, 8).interval(0.9)
    assert paired_items(b, a, 2000, seed=7).interval(0.9) == pytest.approx((-high, -low), rel=1e-12)
    moved = paired_items(3 * a + 5, 3 * b + 5, 2000, seed=7).interval(0.9)
    assert moved == pytest.approx((3 * low, 3 * high), rel=1e-12)


def test_a_bootstrap_in_parts_is_the_same(monkeypatch):
    a, b = rng(5).normal(size=101), rng(6).normal(size=101)
    whole = paired_items(a, b, 1000).interval(0.95)
    monkeypatch.setattr(intervals, "AT_ONCE", 101 * 64)
    assert paired_items(a, b, 1000).interval(0.95) == whole


def test_skewness_moves_the_interval_and_not_the_value():
    d = rng(7).lognormal(0, 1, 50)
    found = paired_items(d, np.zeros(50))
    low, high = found.interval(0.95)
    assert found.value == pytest.approx(d.mean()) and high - d.mean() > 1.3 * (d.mean() - low)


def test_few_different_items_fall_back_to_student():
    a = np.zeros(30)
    a[:2] = (1.0, 2.0)
    d = paired_items(a, np.zeros(30))
    error = a.std(ddof=1) / math.sqrt(30)
    width = scipy.stats.t.ppf(0.975, 29) * error
    assert d.method == "paired on 30 items, Student's t"
    assert d.interval(0.95) == pytest.approx((0.1 - width, 0.1 + width))


def test_the_same_values_everywhere():
    same = paired_items(np.arange(5.0), np.arange(5.0))
    assert (same.value, same.interval(0.95), same.p_value) == (0, (0, 0), 1)
    base = rng().normal(3, 1, 50)
    apart = paired_items(base + 0.1, base)  # 0.1 but for rounding
    assert apart.interval(0.95) == pytest.approx((0.1, 0.1)) and apart.p_value == 0


def test_p_value_and_interval_agree():
    for seed in range(20):
        d = rng(seed).gamma(1.0, 1.0, 30) - 0.75
        found = paired_items(d, np.zeros(30), 4000, seed)
        for level in (0.5, 0.8, 0.95):
            if abs(found.p_value - (1 - level)) > 1e-3:  # beside the step of the resampled quantile
                low, high = found.interval(level)
                assert (low > 0 or high < 0) is (found.p_value < 1 - level)


# ---- blocks and standard errors ----------------------------------------------------------------------------------


def test_blocks_against_a_paired_t_test():
    a, b = [4.1, 4.4, 3.9, 4.6], [3.8, 4.3, 3.7, 4.2]
    found, expected = paired_blocks(a, b), scipy.stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue) and found.interval(0.95) == pytest.approx((low, high))
    assert found.method == "paired on 4 blocks, Student's t"


def test_unpaired_is_normal():
    d = unpaired(2.0, 0.3, 1.0, 0.4)
    z = NormalDist().inv_cdf(0.975)
    assert d.value == 1 and d.interval(0.95) == pytest.approx((1 - z * 0.5, 1 + z * 0.5))
    assert d.p_value == pytest.approx(2 * NormalDist().cdf(-2)) and d.method == "unpaired"


# ---- families ----------------------------------------------------------------------------------------------------


def of_p(p):
    """A normal difference with that p-value."""
    return unpaired(-NormalDist().inv_cdf(p / 2), 1.0, 0.0, 0.0)


def test_levels_by_hand():
    family = [of_p(p) for p in (0.03, 0.001, 0.013, 0.5)]  # Holm: .001 < .05/4, .013 < .05/3, .03 > .05/2
    assert levels(family, 0.95, "none") == [0.95] * 4
    assert levels(family, 0.95, "bonferroni") == pytest.approx([1 - 0.05 / 4] * 4)
    assert levels(family, 0.95, "holm") == pytest.approx([1 - 0.05 / 2, 1 - 0.05 / 4, 1 - 0.05 / 3, 1 - 0.05 / 2])
    assert levels([], 0.95, "holm") == []


def test_holm_speaks_of_more_than_bonferroni_and_errs_no_more():
    g, wrong, found = rng(), 0, dict.fromkeys(("holm", "bonferroni"), 0)
    for _ in range(2000):
        means = g.normal(0, 1, 4) + np.array([0, 0, 4, 4])
        family = [unpaired(m, 1.0, 0.0, 0.0) for m in means]
        for name in found:
            told = [
                d.interval(level)[0] > 0 or d.interval(level)[1] < 0
                for d, level in zip(family, levels(family, 0.95, name), strict=True)
            ]
            found[name] += sum(told[2:])
            wrong += name == "holm" and any(told[:2])
    assert found["holm"] > found["bonferroni"]
    assert wrong / 2000 < 0.05 + 4 * 0.005 and wrong / 2000 > 0.02  # about 1 - (1 - .05/2)² once both others are found
