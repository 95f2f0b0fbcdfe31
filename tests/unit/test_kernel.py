"""MMD²: numbers by hand, closed forms, unbiasedness, and standard errors against simulated spread."""

import math

import numpy as np
import pytest
import torch

from genmodels.metrics import kernel as kernel_module
from genmodels.metrics import neighbours
from genmodels.metrics.features import Pixels
from genmodels.metrics.kernel import (
    GaussianKernel,
    KernelDistance,
    MaximumMeanDiscrepancy,
    cubic,
    kernel_sums,
    kid_of_blocks,
    kid_of_subsets,
    median_distance,
    mmd,
    permutation_p,
)
from genmodels.metrics.metric import Subject
from genmodels.rng import generator
from genmodels.types import Samples
from tests.evaluation_fakes import Points, UniformLevels
from tests.unit.digits_halves import classes, features, halves, images


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator("kernel test", seed))


def gaussian(*bandwidths, centre=0.0):
    return GaussianKernel(bandwidths, torch.tensor(centre, dtype=torch.float64))


def test_kid_by_hand():
    assert mmd(column(0, 1), column(1, 2), cubic).value == pytest.approx(9.5, rel=1e-14)


def test_gaussian_by_hand():
    found = mmd(column(0, 1), column(2, 3), gaussian(1.0)).value
    assert found == pytest.approx(
        2 * math.exp(-0.5) - (2 * math.exp(-2) + math.exp(-4.5) + math.exp(-0.5)) / 2, rel=1e-14
    )
    assert found == pytest.approx(0.768906208, abs=1e-9)


def test_several_bandwidths_are_averaged():
    x, y = normal(20, 3), normal(30, 3, seed=1) + 0.5
    each = [mmd(x, y, gaussian(s)).value for s in (0.5, 1.0, 2.0)]
    assert mmd(x, y, gaussian(0.5, 1.0, 2.0)).value == pytest.approx(sum(each) / 3, rel=1e-12)


@pytest.mark.parametrize("size", [(1024, 4096), (7, 11)])
def test_against_whole_matrices(size, monkeypatch):
    """Numpy, pair by pair, whatever the blocks."""
    monkeypatch.setattr(neighbours, "ROWS", size[0])
    monkeypatch.setattr(neighbours, "COLUMNS", size[1])
    x, y = normal(40, 5).numpy(), 0.5 + normal(60, 5, seed=1).numpy()
    off = lambda k: (k.sum() - np.trace(k)) / len(k) / (len(k) - 1)  # noqa: E731
    for kernel, plain in (
        (cubic, lambda a, b: (a @ b.T / 5 + 1) ** 3),
        (gaussian(1.5), lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 4.5)),
    ):
        expected = off(plain(x, x)) + off(plain(y, y)) - 2 * plain(x, y).mean()
        assert mmd(torch.from_numpy(x), torch.from_numpy(y), kernel).value == pytest.approx(expected, rel=1e-12)
        sums, whole = kernel_sums(kernel, torch.from_numpy(x), torch.from_numpy(y)), plain(x, y)
        assert np.allclose(sums.rows, whole.sum(1)) and np.allclose(sums.columns, whole.sum(0))
        assert sums.squares.item() == pytest.approx((whole**2).sum())


def test_far_away_data():
    """The cubic kernel depends on the origin, the Gaussian one does not: its centre keeps the digits."""
    x, y = normal(50, 4), normal(60, 4, seed=1) + 0.3
    near = mmd(x, y, gaussian(2.0))
    far = mmd(x + 1e6, y + 1e6, gaussian(2.0, centre=1e6))
    assert far.value == pytest.approx(near.value, rel=1e-7)  # 1e6 + x itself loses 10 digits


def draws(count, n, m, dim, kernel, mean=0.0, scale=1.0, fixed=False):
    """Value and both standard errors [count, 3]."""
    x = normal(n, dim, seed=-1)
    out = []
    for i in range(count):
        first = x if fixed else normal(n, dim, seed=2 * i)
        out.append(tuple(mmd(first, mean + scale * normal(m, dim, seed=2 * i + 1), kernel)))
    return torch.tensor(out, dtype=torch.float64)


def off_by(values, expected):
    """In standard errors of the mean."""
    return abs(values.mean() - expected).item() / (values.std().item() / math.sqrt(len(values)))


def kid_of_a_shift(a, dim):
    """E KID between N(0, I) and N(mu, I), a = |mu|²."""
    return 3 * a / dim + 3 * a**2 / dim**2 + (a**3 + 6 * a**2 + 3 * a * dim + 6 * a) / dim**3


def mmd_of_gaussians(a, b, distance, dim, s):
    """MMD² between N(0, a² I) and N(mu, b² I), |mu| = distance."""
    e = lambda v, d: (s**2 / (s**2 + v)) ** (dim / 2) * math.exp(-(d**2) / (2 * (s**2 + v)))  # noqa: E731
    return e(2 * a * a, 0) + e(2 * b * b, 0) - 2 * e(a * a + b * b, distance)


def test_closed_forms_are_those_of_the_literature():
    assert kid_of_a_shift(1, 4) == pytest.approx(1.328125, rel=1e-12)
    assert mmd_of_gaussians(1, 1.5, 1, 3, 2) == pytest.approx(0.102152, abs=5e-7)


@pytest.mark.parametrize("count", [400, pytest.param(8000, marks=pytest.mark.slow)])
def test_unbiased_where_both_laws_are_one(count):
    values = draws(count, 40, 60, 4, cubic)[:, 0]
    assert off_by(values, 0) < 4
    assert 0.48 < (values < 0).double().mean() < 0.66  # not clipped: 56 % lie below


@pytest.mark.parametrize("count", [400, pytest.param(8000, marks=pytest.mark.slow)])
def test_unbiased_for_a_shift(count):
    assert off_by(draws(count, 40, 60, 4, cubic, mean=0.5)[:, 0], kid_of_a_shift(1, 4)) < 4


@pytest.mark.parametrize("count", [400, pytest.param(8000, marks=pytest.mark.slow)])
def test_unbiased_with_a_gaussian_kernel(count):
    values = draws(count, 60, 40, 3, gaussian(2.0), mean=1 / math.sqrt(3), scale=1.5)[:, 0]
    assert off_by(values, mmd_of_gaussians(1, 1.5, 1, 3, 2)) < 4


@pytest.mark.parametrize("kernel", [cubic, gaussian(2.0)])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (0.5, 1.0), (0.0, 1.3)])
@pytest.mark.parametrize("fixed", [True, False])
def test_standard_errors_are_the_spread(kernel, mean, scale, fixed):
    """sd of 150 draws, itself known to 6–12 % (KID has heavy tails).

    Where both laws are one, the standard error of both may be a third too large: four-fold variances of the projections
    are compared with their noise, and what is negative is cut.
    """
    found = draws(150, 100, 150, 4, kernel, mean, scale, fixed)
    ratio = found[:, 1 if fixed else 2].square().mean().sqrt() / found[:, 0].std()
    assert 0.8 < ratio < 1.4, ratio


def test_standard_errors_are_not_too_large_where_both_laws_are_one():
    """250 draws. In many dimensions little noise is cut, and the projections' noise must be taken off: else √2.

    Once both samples are drawn; once the reference is so large and fixed that next to nothing but the rest is left.
    """
    found = draws(250, 60, 90, 64, cubic)
    assert 0.86 < found[:, 2].square().mean().sqrt() / found[:, 0].std() < 1.15
    x = normal(1500, 16)
    own = kernel_sums(cubic, x, x, own=True)
    found = torch.tensor([tuple(mmd(x, normal(40, 16, seed=i), cubic, own)) for i in range(250)], dtype=torch.float64)
    assert 0.86 < found[:, 1].square().mean().sqrt() / found[:, 0].std() < 1.25


def test_constant_features():
    same = mmd(torch.ones(9, 3), torch.ones(7, 3), cubic)
    assert tuple(same) == (0, 0, 0)


def test_too_few_items():
    with pytest.raises(ValueError, match="both samples need at least 2 items, found 1 and 5"):
        mmd(normal(1, 2), normal(5, 2), cubic)


def test_subsets_are_those_of_torch_fidelity():
    """Its recipe, from numpy: one RandomState(2020), fakes drawn first, both without replacement."""
    fake, real = normal(120, 6), normal(200, 6, seed=1) + 0.1
    state, expected = np.random.RandomState(2020), []
    for _ in range(7):
        f, r = fake.numpy()[state.choice(120, 50, replace=False)], real.numpy()[state.choice(200, 50, replace=False)]
        ff, rr, fr = (((a @ b.T) / 6 + 1) ** 3 for a, b in ((f, f), (r, r), (f, r)))
        own = (ff.sum() - np.trace(ff) + rr.sum() - np.trace(rr)) / (50 * 49)
        expected.append(own - 2 * fr.sum() / 50**2)
    assert kid_of_subsets(fake, real, 7, 50) == pytest.approx(expected, rel=1e-12)


def test_permutations_by_hand():
    """Two far groups of two: 2 of the 6 splits are the observed one, and chance must find them that often."""
    x, y = column(0, 1), column(10, 11)
    assert permutation_p(x, y, gaussian(2.0), 3000) == pytest.approx(1 / 3, abs=0.035)  # 4 sd of a binomial share


def test_permutation_p_is_the_rank_of_the_observed_value():
    x, y = normal(12, 2), normal(9, 2, seed=1) + 0.4
    pooled, kernel = torch.cat([x, y]), gaussian(1.0)
    g = generator("permutations", 12, 21)
    observed, above = mmd(x, y, kernel).value, 1
    for _ in range(99):
        first = torch.zeros(21, dtype=torch.bool)
        first[torch.randperm(21, generator=g)[:12]] = True
        above += mmd(pooled[first], pooled[~first], kernel).value >= observed
    assert permutation_p(x, y, kernel, 99) == pytest.approx(above / 100, abs=1e-12)


def test_permutation_p_is_uniform_under_the_hypothesis_and_small_under_others():
    p = torch.tensor(
        [permutation_p(normal(20, 2, seed=i), normal(30, 2, seed=-i), gaussian(1.0), 99) for i in range(1, 151)]
    )
    for level in (0.1, 0.3, 0.5):
        assert abs((p <= level).double().mean() - level) < 4 * math.sqrt(level * (1 - level) / 150)
    assert permutation_p(normal(40, 2), normal(40, 2, seed=1) + 2, gaussian(1.0), 99) == 0.01


# ---- digits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores():
    """KID to one half of the digits, and its standard error of both samples, of sets that stand for models."""
    from scipy.ndimage import gaussian_filter

    (first, second), real = images(), halves()[0]
    g = generator("digits scores")
    noisy = (first + 1.6 * torch.randn(first.shape, generator=g)).round().clamp(0, 16)
    blurred = torch.from_numpy(gaussian_filter(first.numpy(), (0, 0, 0.8, 0.8))).round()
    flat = first.flatten(1).double()
    values, vectors = torch.linalg.eigh(flat.T.cov())
    root = vectors * values.clamp(min=0).sqrt()
    fitted = flat.mean(0) + torch.randn(len(flat), 64, generator=g, dtype=torch.float64) @ root.T
    sets = {
        "other half": second,
        "copy": first,
        "noise": noisy,
        "blur": blurred,
        "classes 0-4": first[classes()[0] < 5],
        "Gaussian fit": fitted.round().clamp(0, 16).reshape(-1, 1, 8, 8).float(),
        "uniform noise": torch.randint(0, 17, first.shape, generator=g).float(),
    }
    return {name: mmd(real, features(x), cubic) for name, x in sets.items()}


def test_digits_are_ranked_as_they_look(scores):
    value = {name: found.value for name, found in scores.items()}
    assert value["copy"] < 0 and abs(value["other half"]) < 3 * scores["other half"].stderr_of_both
    assert value["other half"] < value["noise"] < value["Gaussian fit"] < value["blur"] < value["uniform noise"]
    assert value["Gaussian fit"] < value["classes 0-4"] < value["uniform noise"]


def test_copies_lie_far_below_zero(scores):
    """At the lower bound, which is but 2.7 standard errors of both below 0."""
    copy, real = scores["copy"], halves()[0]
    own = kernel_sums(cubic, real, real, own=True)
    assert copy.value == pytest.approx(-2 / 898 * (own.diagonal / 898 - own.rows.sum() / 898 / 897).item(), rel=1e-9)


# ---- the metrics ------------------------------------------------------------------------------------------------


def started(metric, sizes=(300, 20, 200)):
    metric.start(Subject(UniformLevels((2,)), Points(sizes), torch.device("cpu"), 64))
    return metric


def feed(metric, x):
    for part in x.split(100):
        found = {metric.features.identity: metric.features(part)}
        metric.update(Samples(torch.arange(len(part)), x=part, features=found), None)
    return metric.compute()


def test_names_references_and_flags():
    data = Points((300, 20, 200))
    found = feed(started(KernelDistance()), data.all("val").x)
    assert list(found) == ["KID-pixels"] and not found["KID-pixels"].flags
    assert found["KID-pixels"].references.keys() == {"perfect sampler", "test set"}
    assert found["KID-pixels"].references["test set"] == mmd(data.all("train").x, data.all("test").x, cubic).value
    copied = feed(started(KernelDistance(reference="test")), data.all("test").x)
    assert list(copied) == ["KID-pixels-test"] and copied["KID-pixels-test"].value < 0
    assert copied["KID-pixels-test"].references.keys() == {"perfect sampler", "train set"}


def test_kid_proper_has_its_name():
    class Official(Pixels):
        kernel_name = "KID"

    assert KernelDistance(Official()).label == "KID" and KernelDistance(Official(), "test").label == "KID-test"


def test_blocks_are_disjoint_and_cover_both_samples():
    """Items 1 … n in one dimension: that the cubic kernel's sums of the parts are those of a partition."""
    x, y = (torch.arange(1.0, n + 1, dtype=torch.float64)[:, None] for n in (203, 157))
    seen = []

    def spy(a, b, kernel):
        seen.append((a[:, 0].tolist(), b[:, 0].tolist()))
        return mmd(a, b, kernel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_module, "mmd", spy)
        found = kid_of_blocks(x, y, 50)
    assert len(found) == 3 and all(len(a) == len(b) == 50 for a, b in seen)
    for side, whole in ((0, 203), (1, 157)):
        items = [v for pair in seen for v in pair[side]]
        assert len(set(items)) == 150 and set(items) <= set(range(1, whole + 1)) and items != sorted(items)
    assert found.tolist() == [mmd(column(*a), column(*b), cubic).value for a, b in seen]


def test_blocks_are_unbiased_with_the_error_of_another_draw(monkeypatch):
    """200 draws; a standard error from 6 blocks has itself a spread of a third, its root mean square one of 2 %."""
    monkeypatch.setattr(KernelDistance, "subset_size", 30)
    values, errors = [], []
    shift = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for k in range(200):
        metric = started(KernelDistance(protocol="blocks"))
        metric.real = normal(180, 2, seed=2 * k)
        e = feed(metric, shift + normal(180, 2, seed=2 * k + 1))["KID-pixels"]
        values.append(e.value)
        errors.append(e.stderr)
    assert e.detail == "6 blocks of 30"
    v, s = torch.tensor(values), torch.tensor(errors)
    a, d = 1.0, 2.0  # 3a/D + 3a²/D² + (a³ + 6a² + 3aD + 6a)/D³ for N(0, I) against a mean of squared length a
    expected = 3 * a / d + 3 * a**2 / d**2 + (a**3 + 6 * a**2 + 3 * a * d + 6 * a) / d**3
    assert abs(v.mean() - expected) < 4 * v.std() / math.sqrt(200)
    assert (
        0.82 < s.square().mean().sqrt() / v.std() < 1.2
    )  # the sd of 200 values is known to 5 %, with heavy tails to 8 %
    with pytest.raises(ValueError, match="blocks of 30 need 60 items of each side; found 40 drawn"):
        feed(started(KernelDistance(protocol="blocks")), normal(40, 2))


def test_the_same_split_in_another_order_is_a_tie():
    """Both samples hold the same numbers, so that no split is below the observed one: brute force over exact sums."""
    x = torch.tensor([0.1, 0.2, 0.3, 0.7, 1.1], dtype=torch.float64)[:, None]
    kernel = gaussian(0.37)
    pooled, count = torch.cat([x, x]), 200
    g = generator("permutations", 5, 10)
    splits = [torch.arange(5)] + [torch.randperm(10, generator=g)[:5] for _ in range(count)]

    def value(first):
        rest = torch.tensor([i for i in range(10) if i not in first.tolist()])
        return mmd(pooled[first.sort().values], pooled[rest], kernel).value

    found = [value(first) for first in splits]
    ties = sum(v >= found[0] - 1e-9 for v in found)
    assert permutation_p(x, x, kernel, count) == ties / (1 + count) and ties == 1 + count


def test_subsets_have_no_standard_error(monkeypatch):
    monkeypatch.setattr(KernelDistance, "subset_size", 50)
    x = normal(120, 2)
    e = feed(started(KernelDistance(protocol="subsets")), x)["KID-pixels"]
    values = kid_of_subsets(x, Points((300, 20, 200)).all("train").x, 100, 50)
    assert e.value == pytest.approx(np.mean(values), rel=1e-12) and e.stderr is None
    assert e.detail == f"100 overlapping subsets of 50, sd {np.std(values):.2g}"
    with pytest.raises(ValueError, match="subsets of 50 need 50 items of each side; found 40 drawn and 300 of 'train'"):
        feed(started(KernelDistance(protocol="subsets")), x[:40])


def test_the_bandwidth_comes_from_the_reference():
    metric = started(MaximumMeanDiscrepancy(scales=(0.5, 1.0)))
    train = Points((300, 20, 200)).all("train").x.double()
    median = torch.pdist(train).median().item()
    assert metric.kernel.bandwidths == pytest.approx((median / 2, median), rel=1e-12)
    feed(metric, 5 + 3 * normal(200, 2))
    assert metric.kernel.bandwidths == pytest.approx((median / 2, median), rel=1e-12)


def test_no_bandwidth():
    with pytest.raises(ValueError, match="their median distance, 0, is no bandwidth"):
        median_distance(torch.ones(20, 3))
    with pytest.raises(ValueError, match="scales must be > 0"):
        MaximumMeanDiscrepancy(scales=(1.0, 0.0))


def test_p_value_as_a_further_estimate():
    metric = started(MaximumMeanDiscrepancy(permutations=99))
    found = feed(metric, normal(200, 2) + 1)
    assert list(found) == ["MMD2-pixels", "MMD2-pixels p"]
    assert found["MMD2-pixels p"].value == 0.01 and found["MMD2-pixels p"].better == "none"
    assert found["MMD2-pixels"].value > 5 * found["MMD2-pixels"].stderr
