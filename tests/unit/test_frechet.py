"""The Fréchet distance against closed forms, its routes against each other, its bias and error against simulation."""

import math

import pytest
import torch

from genmodels.metrics import frechet
from genmodels.metrics.features import Pixels
from genmodels.metrics.frechet import (
    Frechet,
    bias_constant,
    factor,
    frechet_distance,
    influence,
    optimal_map,
    trace_root,
)
from genmodels.metrics.metric import Subject
from genmodels.metrics.statistics import Gaussian, Moments, gaussian
from genmodels.types import Samples
from tests.evaluation_fakes import Levels, Points, UniformLevels

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def fd(x, y):
    return frechet_distance(gaussian(x), gaussian(y))


def law(mean, covariance):
    return Gaussian(torch.tensor(mean, dtype=F64), torch.tensor(covariance, dtype=F64), 100)


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=F64)).tolist()


def orthogonal(d):
    return torch.linalg.qr(normal(d, d, seed=9)).Q


# ---- closed forms ------------------------------------------------------------------------------------------------


def test_commuting_covariances():
    assert frechet_distance(law([0, 0, 0], diagonal(1, 4, 9)), law([1, 2, 2], diagonal(4, 4, 1))) == pytest.approx(14)


def test_covariances_that_do_not_commute():
    # 2x2: tr √M = √(tr M + 2 √det M)
    a, b = [[2, 1], [1, 2]], diagonal(1, 3)
    expected = 4 + 4 - 2 * math.sqrt(8 + 2 * math.sqrt(3 * 3))
    assert expected == pytest.approx(0.516685226452, abs=1e-12)
    assert frechet_distance(law([0, 0], a), law([0, 0], b)) == pytest.approx(expected, abs=1e-13)


def test_orthogonal_null_spaces():
    assert frechet_distance(law([0, 0], diagonal(1, 0)), law([0, 0], diagonal(0, 1))) == pytest.approx(2, abs=1e-14)


def test_divisor_is_n_minus_one():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert fd(x, y) == pytest.approx(6, abs=1e-12)  # 5 with the divisor n


def test_shifted_normal():
    zero, one = law([0.0] * 5, diagonal(*[1.0] * 5)), law([1.0] * 5, diagonal(*[1.0] * 5))
    assert frechet_distance(zero, one) == pytest.approx(5, abs=1e-13)


@pytest.mark.parametrize(("n", "tolerance"), [(300, 1e-9), (20, 1e-9)])
def test_a_set_is_at_distance_zero_from_itself(n, tolerance):
    x = normal(n, 64)
    assert abs(fd(x, x)) < tolerance * gaussian(x).covariance.trace()


def test_moves_and_scales_like_a_squared_distance():
    x, y, q = normal(300, 8), 1.5 * normal(400, 8, seed=1) + 0.3, orthogonal(8)
    value = fd(x, y)
    assert fd(x @ q, y @ q) == pytest.approx(value, rel=1e-11)
    assert fd(x + 7, y + 7) == pytest.approx(value, rel=1e-11)
    assert fd(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-11)
    assert fd(y, x) == pytest.approx(value, rel=1e-11)


# ---- routes and numerics -----------------------------------------------------------------------------------------


def trace_of_product(first, second):
    """Independent of ours: eigenvalues of the product, which is not symmetric."""
    return torch.linalg.eigvals(first @ second).sqrt().real.sum()


def trace_of_features(x, y):
    """Independent of ours: nuclear norm of the Gram matrix of centred features, without any covariance."""
    x, y = x - x.mean(0), y - y.mean(0)
    return torch.linalg.svdvals(x @ y.T).sum() / math.sqrt((len(x) - 1) * (len(y) - 1))


def test_trace_term_agrees_with_two_independent_formulas():
    x, y = normal(300, 64), normal(400, 64, seed=1)
    ours = trace_root(gaussian(x).covariance, gaussian(y).covariance)
    assert ours == pytest.approx(trace_of_product(gaussian(x).covariance, gaussian(y).covariance).item(), rel=1e-9)
    assert ours == pytest.approx(trace_of_features(x, y).item(), rel=1e-9)


def test_singular_covariances_lose_no_digits():
    x, y = normal(20, 64), normal(20, 64, seed=1)
    ours = trace_root(gaussian(x).covariance, gaussian(y).covariance)
    assert ours == pytest.approx(trace_of_features(x, y).item(), rel=1e-8)


def test_a_matrix_that_is_no_covariance_is_refused():
    with pytest.raises(ValueError, match="negative eigenvalues"):
        factor(torch.diag(torch.tensor([1.0, -1e-3], dtype=F64)))


# ---- streaming ---------------------------------------------------------------------------------------------------


def test_stream_equals_batch_and_processes_merge():
    x = normal(500, 16) * torch.arange(1, 17) + 10
    whole = gaussian(x)
    assert torch.allclose(whole.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)
    shift = x[:3].mean(0)
    parts = [Moments(shift), Moments(shift)]
    for k, rows in enumerate(x.split(37)):
        parts[k % 2].update(rows)
    parts[0].merge(parts[1])
    merged = parts[0].gaussian()
    assert merged.n == 500
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-12) and torch.allclose(
        merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12
    )
    with pytest.raises(ValueError, match="same shift"):
        parts[0].merge(_about(x))


def _about(x):
    moments = Moments(x[0])
    moments.update(x)
    return moments


def test_far_from_the_origin_the_covariance_keeps_its_digits():
    x = normal(400, 8)
    near, far = gaussian(x), gaussian(x + 1e6)
    # the data themselves are rounded to 1e6·eps ≈ 1e-10; without a shift the error would be 1e12·eps ≈ 1e-4
    assert torch.allclose(near.covariance, far.covariance, atol=1e-9)


def test_too_few_vectors_have_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        gaussian(torch.zeros(1, 3))


# ---- bias --------------------------------------------------------------------------------------------------------


def test_bias_constant_of_the_identity():
    for d in (1, 4, 16):
        assert bias_constant(torch.eye(d, dtype=F64)) == pytest.approx(d * (d + 5) / 4, rel=1e-12)


def test_bias_constant_counts_only_the_support():
    s = torch.diag(torch.tensor([2.0, 2.0, 0.0], dtype=F64))
    assert bias_constant(s) == pytest.approx(2 * bias_constant(torch.eye(2, dtype=F64)))


def simulated(draws, d, n, spread=None):
    """FD between two samples of one Gaussian, repeatedly."""
    scale = torch.ones(d, dtype=F64) if spread is None else spread.sqrt()
    return torch.tensor(
        [fd(normal(n, d, seed=2 * k) * scale, normal(n, d, seed=2 * k + 1) * scale) for k in range(draws)]
    )


def test_perfect_samplers_score_the_floor():
    values = simulated(200, 16, 500)
    expected = bias_constant(torch.eye(16, dtype=F64)) * 2 / 500  # 0.3360
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(200)


@pytest.mark.slow
def test_bias_law_for_unequal_eigenvalues():
    spread = 10 * (-torch.arange(64, dtype=F64) / 8).exp()
    values = simulated(300, 64, 1000, spread)
    expected = bias_constant(torch.diag(spread)) * 2 / 1000
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(300) + 0.01 * expected  # the law is first order


# ---- standard error ----------------------------------------------------------------------------------------------


def test_optimal_map_transports_one_covariance_to_the_other():
    s, t = torch.cov(normal(50, 6).T), torch.cov(3 * normal(50, 6, seed=1).T)
    m = optimal_map(s, t)
    assert torch.allclose(m, m.T, atol=1e-10) and torch.allclose(m @ s @ m, t, rtol=1e-8, atol=1e-8)


def test_influence_is_the_derivative_along_one_more_point():
    x, reference = 1.3 * normal(60, 4) + 0.5, gaussian(normal(200, 4, seed=1))
    base = Gaussian(x.mean(0), torch.cov(x.T, correction=0), 60)
    values = influence(x, base, reference)
    assert values.mean().abs() < 1e-9
    for k in (0, 7):
        e, d = 1e-6, x[k] - base.mean
        moved = Gaussian(base.mean + e * d, (1 - e) * base.covariance + e * (1 - e) * torch.outer(d, d), 60)
        slope = (frechet_distance(moved, reference) - frechet_distance(base, reference)) / e
        assert slope == pytest.approx(values[k].item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("shift", "low", "high"), [(1.0, 0.9, 1.1), (0.0, 0.9, 1.8)])
def test_standard_error_covers_the_spread_over_samples(shift, low, high):
    # 300 draws know their standard deviation to 4 %. At the null the true influence vanishes; that of the fitted
    # Gaussians does not, and errs on the safe side.
    d, n, reference = 8, 400, gaussian(normal(1000, 8, seed=10_000))
    values, errors = [], []
    for k in range(300):
        x = normal(n, d, seed=k) + shift * torch.eye(d, dtype=F64)[0]
        values.append(frechet_distance(gaussian(x), reference))
        errors.append(influence(x, gaussian(x), reference).std() / math.sqrt(n))
    ratio = torch.stack(errors).mean() / torch.tensor(values).std()
    assert low < ratio < high


# ---- the metric --------------------------------------------------------------------------------------------------


def started(dataset, **arguments):
    metric = Frechet(Pixels(), **arguments)
    metric.start(Subject(UniformLevels(), dataset, torch.device("cpu"), 50))
    return metric


def test_references_say_what_to_expect():
    data = Levels(sizes=(2000, 20, 2000))
    metric = started(data)
    fresh = Levels(sizes=(10, 10, 1500)).all("test").x
    metric.update(Samples(torch.arange(1500), x=fresh), None)
    e = metric.compute()["FD-pixels"]
    assert e.n == 1500 and e.better == "lower" and e.kind == "plug-in"
    constant = bias_constant(gaussian(data.all("train").x.flatten(1)).covariance)
    assert e.references["floor"] == pytest.approx(constant * (1 / 1500 + 1 / 2000), rel=1e-12)
    assert e.references["test set"] == pytest.approx(
        fd(data.all("train").x.flatten(1), data.all("test").x.flatten(1)), rel=1e-9, abs=1e-12
    )
    assert e.value < 5 * e.references["floor"] < e.references["uniform noise"]
    assert e.stderr > 0


def test_samples_are_rounded_to_levels_first():
    data = Levels()
    plain, noisy = started(data), started(data)
    x = data.all("test").x
    plain.update(Samples(torch.arange(200), x=x), None)
    noisy.update(Samples(torch.arange(200), x=x + 0.4), None)
    assert plain.compute()["FD-pixels"] == noisy.compute()["FD-pixels"]


def test_split_and_other_reference_are_named():
    metric = started(Points(), reference="test")
    metric.update(Samples(torch.arange(100), x=torch.randn(100, 2, generator=torch.Generator().manual_seed(0))), None)
    (label, e) = next(iter(metric.compute().items()))
    assert label == "FD-pixels-test" and set(e.references) == {"floor", "train set"}


def test_too_few_samples_are_refused_unless_asked_for():
    data = Levels()
    metric = started(data)
    metric.update(Samples(torch.arange(5), x=data.all("test").x[:5]), None)
    with pytest.raises(ValueError, match="allow_few"):
        metric.compute()
    few = started(data, allow_few=True)
    few.update(Samples(torch.arange(5), x=data.all("test").x[:5]), None)
    assert few.compute()["FD-pixels"].value > 0
    with pytest.raises(ValueError, match="split 'train' has 5 items"):
        started(Levels(sizes=(5, 5, 5)))


def test_the_reference_noise_is_always_the_same():
    data = Levels()
    assert torch.equal(frechet.uniform_noise(data, 9), frechet.uniform_noise(data, 9))
    assert set(frechet.uniform_noise(data, 200).unique().tolist()) == {0, 1, 2, 3, 4}
