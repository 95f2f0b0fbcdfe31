"""The Fréchet distance against closed forms, its routes against each other, its bias and error against simulation."""

import math
import time

import pytest
import torch

from genmodels.data.digits import Digits
from genmodels.metrics import bures
from genmodels.metrics.bures import (
    bias_constant,
    extrapolated_distance,
    factor,
    frechet_distance,
    influence,
    optimal_map,
    standard_error,
    thin_trace_root,
    trace_root,
)
from genmodels.metrics.features import DigitsFeatures
from genmodels.metrics.statistics import Gaussian, Moments, gaussian

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def fd(x, y):
    return frechet_distance(gaussian(x), gaussian(y))


def full(x):
    """The Gaussian of features as a file would hold it: without its thin root."""
    return gaussian(x)._replace(thin=None)


def law(mean, covariance):
    return Gaussian(torch.tensor(mean, dtype=F64), torch.tensor(covariance, dtype=F64), 100)


def standard(d):
    return Gaussian(torch.zeros(d, dtype=F64), torch.eye(d, dtype=F64), None)


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


@pytest.mark.parametrize("n", [300, 64, 20])
def test_a_set_is_at_distance_zero_from_itself(n):
    x = normal(n, 64)
    for form in (gaussian, full):
        assert abs(frechet_distance(form(x), form(x))) < 1e-9 * gaussian(x).covariance.trace()


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
    return torch.linalg.eigvals(first @ second).sqrt().real.sum().item()


def trace_of_features(x, y):
    """Independent of ours: nuclear norm of the Gram matrix of centred features, without any covariance."""
    x, y = x - x.mean(0), y - y.mean(0)
    return torch.linalg.svdvals(x @ y.T).sum().item() / math.sqrt((len(x) - 1) * (len(y) - 1))


def test_trace_term_agrees_with_two_independent_formulas():
    x, y = normal(300, 64), normal(400, 64, seed=1)
    first, second = gaussian(x), gaussian(y)
    ours = trace_root(first.covariance, second.covariance)
    assert ours == pytest.approx(trace_of_product(first.covariance, second.covariance), rel=1e-9)
    assert ours == pytest.approx(trace_of_features(x, y), rel=1e-9)
    singular_values = torch.linalg.svdvals(factor(first.covariance).T @ factor(second.covariance)).sum()
    assert ours == pytest.approx(singular_values.item(), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 30), (20, 300), (300, 20), (64, 64), (64, 300), (65, 65)])
def test_singular_covariances_lose_no_digits(n, m):
    # Eigenvalues of the product, which only have √eps in null directions, agree to the 1e-4 that these allow.
    x, y = normal(n, 64), normal(m, 64, seed=1)
    exact, first, second = trace_of_features(x, y), gaussian(x), gaussian(y)
    total = first.covariance.trace() + second.covariance.trace()
    assert trace_of_product(first.covariance, second.covariance) == pytest.approx(exact, abs=1e-4)
    for a in (first, full(x)):
        for b in (second, full(y)):
            value = frechet_distance(a, b) - (first.mean - second.mean).square().sum()
            assert (total - value) / 2 == pytest.approx(exact, rel=1e-10)


def test_thin_roots_are_roots():
    for n in (2, 20, 64):
        found = gaussian(normal(n, 64) + 5)
        assert found.thin.shape == (64, n - 1)
        assert torch.allclose(found.thin @ found.thin.T, found.covariance, atol=1e-13)
    assert gaussian(normal(65, 64)).thin is None


def test_copies_among_few_samples_lose_no_digits():
    x = normal(10, 64).repeat(2, 1)  # the thin root has rank 9 of 19
    y = normal(300, 64, seed=1)
    ours = thin_trace_root(gaussian(x).thin, gaussian(y).covariance)
    assert ours == pytest.approx(trace_of_features(x, y), rel=1e-10)


def test_fast_route_is_left_when_rounding_could_show():
    # The roots of the product have a condition number of 1e8: from its eigenvalues the trace would be off by 3e-10 for
    # each small direction.
    spread = torch.logspace(0, -8, 64, dtype=F64)
    q, p = orthogonal(64), torch.linalg.qr(normal(64, 64, seed=5)).Q
    s = (q * spread) @ q.T
    assert bures._sum_of_roots(torch.linalg.cholesky(s).T @ s @ torch.linalg.cholesky(s)) is None
    assert trace_root(s, s) == pytest.approx(spread.sum().item(), rel=1e-12)
    assert bures._sum_of_roots((p * torch.linspace(1, 2, 64, dtype=F64)) @ p.T) is not None


def test_a_matrix_that_is_no_covariance_is_refused():
    bad = torch.diag(torch.tensor([1.0, -1e-3], dtype=F64))
    with pytest.raises(ValueError, match=r"negative eigenvalues add up to 1.0e-03"):
        factor(bad)
    for pair in ((bad, torch.eye(2, dtype=F64)), (torch.eye(2, dtype=F64), bad)):
        with pytest.raises(ValueError, match="negative eigenvalues"):
            trace_root(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1000, 4000])
def test_inception_sized_features_take_seconds(n):
    x, y = gaussian(normal(n, 2048)), gaussian(1.1 * normal(n, 2048, seed=1))
    began = time.process_time()
    frechet_distance(x, y)
    assert time.process_time() - began < 10  # CPU seconds of one thread; measured 0.3 and 1.5


# ---- streaming ---------------------------------------------------------------------------------------------------


def test_stream_equals_batch_and_processes_merge():
    x = normal(500, 16) * torch.arange(1, 17) + 10
    whole = gaussian(x)
    assert torch.allclose(whole.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)
    parts = [Moments(x[:3].mean(0)), Moments(x[:3].mean(0))]
    for k, rows in enumerate(x.split(37)):
        parts[k % 2].update(rows)
    parts[0].merge(parts[1])
    merged = parts[0].gaussian()
    assert merged.n == 500 and torch.allclose(merged.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
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


def single(x):
    """Sums in float32 about the origin, as many tools keep them."""
    total, outer = torch.zeros(x.shape[1]), torch.zeros(x.shape[1], x.shape[1])
    for rows in x.split(50):
        total, outer = total + rows.sum(0), outer + rows.T @ rows
    mean = total / len(x)
    covariance = (outer - len(x) * torch.outer(mean, mean)) / (len(x) - 1)
    return Gaussian(mean.double(), covariance.double(), len(x))


def test_sums_in_single_precision_would_spoil_the_distance():
    # float32 features with a mean of 10.4 and a distance of 0.07 between two samples of one law
    x, y = ((10.4 + 0.047 * normal(1000, 256, seed=k)).float() for k in (0, 1))
    exact = frechet_distance(*(Gaussian(z.double().mean(0), torch.cov(z.double().T), 1000) for z in (x, y)))
    assert exact == pytest.approx(bias_constant(0.047**2 * torch.eye(256, dtype=F64)) * 2 / 1000, rel=0.05)
    streams = Moments(), Moments()
    for rows, others in zip(x.split(64), y.split(64), strict=True):
        streams[0].update(rows)
        streams[1].update(others)
    assert frechet_distance(*(stream.gaussian() for stream in streams)) == pytest.approx(exact, abs=3e-9)
    with pytest.raises(ValueError, match="no covariance"):
        frechet_distance(single(x), single(y))


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
    expected = bias_constant(torch.eye(16, dtype=F64)) * 2 / 500
    assert expected == pytest.approx(0.3360, abs=1e-12)
    assert abs(values.mean() - expected) < 4 * 0.0396 / math.sqrt(200)
    # second order of the distance in Wishart noise: a sum of squares of normal variables, whose sd at S = I is
    # (1/n₁ + 1/n₂) √(D (D + 9))/2; 200 draws know it to 5 %
    assert values.std() == pytest.approx(2 / 500 * math.sqrt(16 * 25) / 2, rel=0.2)


def test_floor_of_an_exact_reference_lacks_its_share():
    values = torch.tensor([frechet_distance(gaussian(normal(500, 16, seed=k)), standard(16)) for k in range(200)])
    assert abs(values.mean() - 0.1680) < 4 * values.std() / math.sqrt(200)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "n", "expected"), [(64, 1000, 2.2080), (64, 5000, 0.4416)])
def test_bias_law_in_more_dimensions(d, n, expected):
    values = simulated(60, d, n)
    assert bias_constant(torch.eye(d, dtype=F64)) * 2 / n == pytest.approx(expected, abs=1e-12)
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(60) + 0.01 * expected  # the law is first order


@pytest.mark.slow
def test_bias_law_for_unequal_eigenvalues():
    spread = 10 * (-torch.arange(64, dtype=F64) / 8).exp()
    values = simulated(300, 64, 1000, spread)
    expected = bias_constant(torch.diag(spread)) * 2 / 1000
    assert expected == pytest.approx(1.153, abs=1e-3)
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(300) + 0.01 * expected


@pytest.mark.parametrize(("draws", "margin"), [(12, 0.25), pytest.param(100, 0.15, marks=pytest.mark.slow)])
def test_bias_law_holds_for_real_features(draws, margin):
    # Halves of all digits score about their floor though digits are not Gaussian. One split has a relative sd of 0.2;
    # over many splits the law is off by up to a tenth, because the fourth moments are not those of a Gaussian.
    data = Digits()
    z = DigitsFeatures()(torch.cat([data.all(split).x for split in ("train", "val", "test")])).double()
    g, values = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        order = torch.randperm(len(z), generator=g)
        values.append(fd(z[order[:898]], z[order[898:]]))
    law = bias_constant(gaussian(z).covariance) * (1 / 898 + 1 / 899)
    assert sum(values) / draws == pytest.approx(law, rel=margin)


# ---- standard error ----------------------------------------------------------------------------------------------


def test_optimal_map_transports_one_covariance_to_the_other():
    s, t = torch.cov(normal(50, 6).T), torch.cov(3 * normal(50, 6, seed=1).T)
    m = optimal_map(s, t)
    assert torch.allclose(m, m.T, atol=1e-10) and torch.allclose(m @ s @ m, t, rtol=1e-8, atol=1e-8)


def test_influence_is_the_derivative_along_one_more_point():
    x, reference = 1.3 * normal(60, 4) + 0.5, gaussian(normal(200, 4, seed=1))
    base = Gaussian(x.mean(0), torch.cov(x.T, correction=0), 60)
    values = influence(x, base, reference)
    assert values.mean().abs() < 1e-12
    for k in (0, 7):
        e, d = 1e-6, x[k] - base.mean
        moved = Gaussian(base.mean + e * d, (1 - e) * base.covariance + e * (1 - e) * torch.outer(d, d), 60)
        slope = (frechet_distance(moved, reference) - frechet_distance(base, reference)) / e
        assert slope == pytest.approx(values[k].item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("shift", "low", "high"), [(1.0, 0.9, 1.1), (0.0, 0.9, 1.5)])
def test_standard_error_covers_the_spread_over_samples(shift, low, high):
    # 300 draws know their standard deviation to 4 %. At the null the standard error is too large by at most √2.
    d, n, reference = 8, 400, gaussian(normal(1000, 8, seed=10_000))
    values, errors = [], []
    for k in range(300):
        x = normal(n, d, seed=k) + shift * torch.eye(d, dtype=F64)[0]
        values.append(frechet_distance(gaussian(x), reference))
        errors.append(standard_error(influence(x, gaussian(x), reference)))
    assert low < sum(errors) / 300 / torch.tensor(values).std() < high


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_intervals_hold_what_they_promise(shift):
    # Of 200 nominal 95 % intervals for E[FD_n] and for the limit; a binomial sd is 1.5 %, the limit keeps a bias of
    # second order of half a standard error at the null. Measured: 0.96 to 1 and 0.91 to 0.97.
    d, n = 16, 500
    values, limits, errors = [], [], []
    for k in range(200):
        x = normal(n, d, seed=k) + shift * torch.eye(d, dtype=F64)[0]
        found = gaussian(x)
        values.append(frechet_distance(found, standard(d)))
        limits.append(extrapolated_distance(x, standard(d)))
        errors.append(standard_error(influence(x, found, standard(d))))
    value, limit, error = (torch.tensor(each, dtype=F64) for each in (values, limits, errors))
    assert ((value - value.mean()).abs() < 1.96 * error).double().mean() >= 0.9
    assert ((limit - shift**2).abs() < 1.96 * error).double().mean() >= 0.9


def test_differences_on_the_same_seeds_have_a_paired_standard_error():
    # Two models that turn the same noise into samples, the second a little wider. Over 200 sets of seeds the sd of the
    # difference of their distances is known to 5 %; errors of the linearisation are of the order of D/n = 2 %. Without
    # pairing it would be several times too large.
    d, n, reference = 8, 400, standard(8)
    differences, paired, unpaired = [], [], []
    for k in range(200):
        noise = normal(n, d, seed=k)
        sets = [noise + 0.5, 1.1 * noise + 0.5 + 0.1 * normal(n, d, seed=k + 1000)]
        values = [frechet_distance(gaussian(x), reference) for x in sets]
        first, second = (influence(x, gaussian(x), reference) for x in sets)
        differences.append(values[0] - values[1])
        paired.append(standard_error(first - second))
        unpaired.append(math.hypot(standard_error(first), standard_error(second)))
    spread = torch.tensor(differences).std()
    assert sum(paired) / 200 == pytest.approx(spread.item(), rel=0.2)
    assert sum(unpaired) / 200 > 2 * spread


# ---- extrapolation -----------------------------------------------------------------------------------------------


def test_extrapolation_removes_the_bias_of_the_samples():
    # shift 1 in 8 dimensions, so that the limit is 1; FD_400 is 1 + 26/400 = 1.065. The mean of 60 limits has a
    # standard error of 0.013.
    d, n, reference = 8, 400, standard(8)
    sets = [normal(n, d, seed=k) + torch.eye(d, dtype=F64)[0] for k in range(60)]
    limits = torch.tensor([extrapolated_distance(x, reference) for x in sets], dtype=F64)
    values = torch.tensor([frechet_distance(gaussian(x), reference) for x in sets], dtype=F64)
    assert abs(limits.mean() - 1) < 4 * limits.std() / math.sqrt(60) < 0.06
    assert 0.03 < (values - limits).mean() < 0.12
    assert limits.std() < 1.3 * values.std()  # parts of every size hold all samples: hardly any precision is lost
    assert limits[0] == extrapolated_distance(sets[0], reference)


def test_extrapolation_is_exact_for_a_law_in_one_over_n(monkeypatch):
    # also where parts are of unequal size: 8 sizes of 101 vectors
    monkeypatch.setattr(bures, "frechet_distance", lambda part, reference: 0.7 + 12 / part.n)
    assert extrapolated_distance(normal(101, 3), standard(3)) == pytest.approx(0.7, abs=1e-12)
