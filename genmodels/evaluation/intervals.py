"""Intervals for the difference of two means: from items in common, from blocks in common, from standard errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal

import numpy as np

Family = Literal["none", "holm", "bonferroni"]
AT_ONCE = 2_000_000  # numbers that a bootstrap draws at a time


@dataclass(frozen=True)
class Difference:
    """An estimate d of a difference δ, with the law of (centre - δ)/stderr, from which intervals follow.

    Attributes:
        value: d itself.
        centre: what the intervals are built around; the value, or it drawn towards zero.
        quantile: the quantile of that law at a probability.
        p_value: twice the smaller tail of that law beyond δ = 0.
        method: in words, for readers.
    """

    value: float
    centre: float
    stderr: float
    quantile: Callable[[float], float] = field(repr=False)
    p_value: float
    method: str

    def interval(self, level: float) -> tuple[float, float]:
        """The equal-tailed interval of a level."""
        tail = (1 - level) / 2
        high, low = (self.centre - self.quantile(q) * self.stderr for q in (tail, 1 - tail))
        return low, high


def paired_items(a: np.ndarray, b: np.ndarray, draws: int = 10_000, seed: int = 0) -> Difference:
    """Of the means of values a and b [n] of the same items: a bootstrap of items, each with its two values.

    The resampled statistic is t* = (d̄* - d̄)/se*, the mean difference in units of its own standard error. Its quantiles
    follow the skewness of the differences, which those of d̄* (percentile) do not; how often both cover is compared in
    `tests/unit/test_intervals.py`. Shares (differences that are 0
    or ±c) have too few values for t*; for them half a count is added to each of the four cells of the table of pairs.
    If so few items differ that some resample has no spread, Student's t is used.

    Source: Efron & Tibshirani 1993 (An introduction to the bootstrap), section 12.5; Agresti & Min 2005 (Simple
        improved confidence intervals for comparing matched proportions), section 2.
    """
    d = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    n, mean, words = len(d), float(d.mean()), f"paired on {len(d):,} items"
    sizes = np.unique(np.abs(d[d != 0]))
    if len(sizes) == 1:
        return _shares(d / sizes[0], float(sizes[0]), f"{words}, {np.count_nonzero(d):,} of which differ")
    stderr = float(_spread(d, d)) / math.sqrt(n)
    t = _resampled(d, draws, np.random.default_rng(seed)) if stderr > 0 else np.zeros(draws)
    if not np.isfinite(t).all():
        return _student(mean, stderr, n - 1, words)
    t.sort()
    return Difference(mean, mean, stderr, lambda q: float(np.quantile(t, q)), _tail(t, mean, stderr), words)


def _resampled(d: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draws] values of t*; not finite where a resample has no spread."""
    n, parts, mean = len(d), [], d.mean()
    rows = max(1, AT_ONCE // n)
    for start in range(0, draws, rows):
        drawn = d[rng.integers(0, n, (min(rows, draws - start), n))]
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append((drawn.mean(1) - mean) / (_spread(drawn, d) / math.sqrt(n)))
    return np.concatenate(parts)


def _spread(drawn: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Standard deviations of the last axis; what rounding leaves of equal values is 0."""
    spread = drawn.std(-1, ddof=1)
    return np.where(spread > 1e-12 * np.abs(d).max(), spread, 0.0)


def _tail(t: np.ndarray, mean: float, stderr: float) -> float:
    if stderr == 0:
        return float(mean == 0)
    beyond = min(np.count_nonzero(t >= mean / stderr), np.count_nonzero(t <= mean / stderr))
    return min(1.0, 2 * (1 + int(beyond)) / (1 + len(t)))


def _shares(signs: np.ndarray, size: float, words: str) -> Difference:
    """Of paired shares: signs [n] in -1, 0, 1; a hit of one model alone counts `size`."""
    n, more, less = len(signs) + 2, np.count_nonzero(signs > 0) + 0.5, np.count_nonzero(signs < 0) + 0.5
    centre = size * (more - less) / n
    stderr = size * math.sqrt(more + less - (more - less) ** 2 / n) / n
    return _pivotal(size * float(signs.mean()), centre, stderr, NormalDist().cdf, NormalDist().inv_cdf, words)


def paired_blocks(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Of the means of values a and b [k] of blocks that share their seeds: Student's t with k - 1 degrees."""
    d = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return _student(float(d.mean()), float(d.std(ddof=1)) / math.sqrt(len(d)), len(d) - 1, f"paired on {len(d)} blocks")


def unpaired(a: float, stderr_a: float, b: float, stderr_b: float) -> Difference:
    """Of two independent estimates: normal, with the root of the sum of squares of their standard errors."""
    law = NormalDist()
    return _pivotal(a - b, a - b, math.hypot(stderr_a, stderr_b), law.cdf, law.inv_cdf, "unpaired")


def _student(mean: float, stderr: float, df: int, words: str) -> Difference:
    from scipy.special import stdtr, stdtrit

    words = f"{words}, Student's t"
    return _pivotal(mean, mean, stderr, lambda t: float(stdtr(df, t)), lambda q: float(stdtrit(df, q)), words)


def _pivotal(
    value: float,
    centre: float,
    stderr: float,
    cdf: Callable[[float], float],
    quantile: Callable[[float], float],
    words: str,
) -> Difference:
    p = 2 * cdf(-abs(centre) / stderr) if stderr > 0 else float(centre == 0)
    return Difference(value, centre, stderr, quantile, p, words)


def levels(differences: Sequence[Difference], level: float, family: Family) -> list[float]:
    """The level of each interval, so that those that exclude zero are the differences to speak of.

    With α = 1 - level and m differences: none gives every one the level itself; bonferroni 1 - α/m; holm 1 - α/m to the
    one with the smallest p-value, and as long as the interval excludes zero, 1 - α/(m-1) to the next, and so on; all
    after the first that does not have its level. Under both a difference of zero is spoken of with probability α at
    most, whatever the others are.

    Source: Holm 1979 (A simple sequentially rejective multiple test procedure), section 3.
    """
    m, alpha = len(differences), 1 - level
    if family == "none":
        return [level] * m
    found, left = [1 - alpha / max(m, 1)] * m, m
    if family == "bonferroni":
        return found
    waiting = sorted(range(m), key=lambda k: differences[k].p_value)
    for place, k in enumerate(waiting):
        found[k] = 1 - alpha / left
        low, high = differences[k].interval(found[k])
        if low <= 0 <= high:
            for other in waiting[place:]:
                found[other] = found[k]
            break
        left -= 1
    return found
