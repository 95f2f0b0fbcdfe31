"""Bits per dimension and nats: units, bin widths, kinds, references, draws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genmodels.metrics.likelihood import (
    BitsPerDim,
    NegativeLogLikelihood,
    bits_per_dim,
    code_length,
    combine_draws,
    how_made,
)
from genmodels.metrics.metric import Subject
from genmodels.rng import generator
from genmodels.transforms import Affine, Compose, Dequantize, Logit
from genmodels.types import Batch, Likelihood, NotApplicable, Samples
from tests.evaluation_fakes import Levels, Points, UniformLevels

F64 = torch.float64


def subject(dataset):
    return Subject(UniformLevels(dataset.shape), dataset, torch.device("cpu"), 64)


@pytest.mark.parametrize(("levels", "width"), [(17, 1.0), (256, 1.0), (256, 1 / 255), (5, 1 / 3)])
def test_uniform_data_cost_the_logarithm_of_their_levels(levels, width):
    d = 6
    density = torch.tensor([-d * math.log(levels * width)], dtype=F64)  # uniform on [0, levels·width)^d
    mass = torch.tensor([-d * math.log(levels)], dtype=F64)
    assert bits_per_dim(density, d, width).item() == pytest.approx(math.log2(levels), rel=1e-14)
    assert bits_per_dim(mass, d, None).item() == pytest.approx(math.log2(levels), rel=1e-14)


def through(transform, v):
    """-log2 density per dimension of a standard normal law in model space, for given dequantised points."""
    y, log_det = transform(v)
    log_p = (-(y.double() ** 2) / 2 - math.log(2 * math.pi) / 2).sum(1) + log_det
    return bits_per_dim(log_p, v.shape[1], 1.0)


def test_parametrisations_of_one_density_cost_the_same():
    v = torch.rand(20, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) * 256
    unit = Compose((Affine(0.0, 256.0), Affine(0.5, 0.5)))  # [0, 1), then [-1, 1)
    centred = Affine(128.0, 128.0)
    assert torch.allclose(through(unit, v), through(centred, v), rtol=0, atol=1e-13)


def test_published_example_of_the_logit_transform():
    """L = 256, y ~ N(0, 1): the bits of four dequantised values."""
    v = torch.tensor([0.5, 1.25, 128.75, 255.999], dtype=F64)[:, None]
    expected = {1e-6: [28.373937, 22.033260, 7.325800, 99.494585], 0.05: [11.229193, 11.078703, 7.477791, 11.335486]}
    for alpha, bits in expected.items():
        assert through(Logit(0.0, 256.0, alpha), v).tolist() == pytest.approx(bits, abs=2e-6)
    assert through(Logit(0.0, 256.0, 0.05), v).mean().item() == pytest.approx(10.280293, abs=1e-6)


def test_dequantisation_bounds_the_exact_code_length():
    """N(1.3, 0.6²), the cell [1, 2): exact 0.811498 bits, expected uniform bound 0.835911."""
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    x = Dequantize(levels=3)(torch.ones(20_000, 1, dtype=F64))[0] - 0.5 + u[:, None]
    log_p = -(((x[:, 0] - 1.3) / 0.6) ** 2) / 2 - math.log(0.6 * math.sqrt(2 * math.pi))
    assert bits_per_dim(log_p, 1, 1.0).mean().item() == pytest.approx(0.835911, abs=1e-6)
    assert -math.log2(log_p.exp().mean().item()) == pytest.approx(0.811498, abs=1e-6)


# ---- draws -------------------------------------------------------------------------------------------------------

EXACT = 0.811498  # bits of the cell [1, 2) under N(1.3, 0.6²)


def log_density(u):
    """log p(1 + u) of N(1.3, 0.6²)."""
    return -(((u - 0.3) / 0.6) ** 2) / 2 - math.log(0.6 * math.sqrt(2 * math.pi))


def combined(u, how):
    """Bits of items with the draws u [K, N], combined."""
    return -combine_draws([Likelihood(log_density(row), "exact") for row in u], how).value / math.log(2)


def test_two_importance_draws_by_quadrature():
    grid = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    pairs = torch.cartesian_prod(grid, grid).T
    # the midpoint rule errs by about h²/24 times the second derivative: 1e-7
    assert combined(pairs, "importance").mean().item() == pytest.approx(0.822887, abs=1e-6)
    assert combined(pairs, "mean").mean().item() == pytest.approx(0.835911, abs=1e-6)


@pytest.mark.parametrize(("draws", "expected"), [(1, 0.835911), (10, 0.813643), (100, 0.811710), (1000, 0.811519)])
def test_importance_tightens_the_bound(draws, expected):
    u = torch.rand(draws, 2_000_000 // draws if draws > 1 else 500_000, dtype=F64, generator=generator("iw", draws))
    bits = combined(u, "importance")
    # (p̄/P - 1)/ln 2 has mean zero and takes the first order of -log2 p̄ away: what is left is about its square
    mass = 2**-EXACT
    steadied = bits + (log_density(u).exp().mean(0) / mass - 1) / math.log(2)
    error = steadied.std().item() / math.sqrt(len(bits))
    assert error < 1e-4 / draws**0.5
    assert steadied.mean().item() == pytest.approx(expected, abs=4 * error + 1e-6)


def test_dequantised_uniform_data_leave_nothing_to_tighten():
    flat = [Likelihood(torch.full((3,), -2.0), "exact")] * 4
    for how in ("mean", "importance"):
        found = combine_draws(flat, how)
        assert torch.allclose(found.value, torch.full((3,), -2.0, dtype=F64)) and (found.stderr == 0).all()


def test_importance_is_between_the_mean_and_the_largest_draw():
    values = torch.randn(7, 50, dtype=F64, generator=generator("between")) * 300  # far beyond the range of exp
    draws = [Likelihood(row, "bound") for row in values]
    mean, importance = (combine_draws(draws, how).value for how in ("mean", "importance"))
    assert torch.allclose(mean, values.mean(0), rtol=1e-14)
    assert (mean < importance).all() and (importance <= values.max(0).values).all()
    assert (importance >= values.max(0).values - math.log(7)).all()


@pytest.mark.parametrize("how", ["mean", "importance"])
def test_error_of_an_item_is_the_spread_of_its_combined_value(how):
    """Of many repetitions with 50 draws; the first order in the noise of exp(ℓ) is right to a few per cent here."""
    u = torch.rand(50, 4000, dtype=F64, generator=generator("spread"))
    found = combine_draws([Likelihood(log_density(row), "exact") for row in u], how)
    # sd of 4000 values: 1.1 % of itself; the bias of the importance weights' first order is 1/K
    assert found.stderr.square().mean().sqrt().item() == pytest.approx(found.value.std().item(), rel=0.06)


def test_a_single_draw_keeps_its_error_and_kinds_weaken():
    one = Likelihood(torch.zeros(2), "stochastic", torch.tensor([3.0, 1.0]))
    assert combine_draws([one]).stderr.tolist() == [3, 1] and combine_draws([one]).value.dtype == F64
    assert combine_draws([Likelihood(torch.zeros(2), "exact")]).stderr is None
    two = combine_draws([Likelihood(torch.tensor([1.0, 5.0]), "exact"), one])
    assert two.kind == "stochastic" and two.value.tolist() == [0.5, 2.5]
    assert two.stderr.tolist() == pytest.approx([0.5, 2.5])  # sd with divisor 1 over √2


@pytest.mark.parametrize(("kind", "why"), [("stochastic", "estimate of log p"), ("numerical", "the solver's errors")])
def test_importance_needs_the_density_itself(kind, why):
    good, bad = Likelihood(torch.zeros(2), "exact"), Likelihood(torch.zeros(2), kind)
    with pytest.raises(ValueError, match=rf"this one is {kind}: .*{why}.*Use combine: mean"):
        combine_draws([good, bad], "importance")
    assert combine_draws([good, bad], "mean").kind == kind
    with pytest.raises(ValueError, match="at least one draw"):
        combine_draws([])


def test_probe_noise_would_be_taken_for_likelihood():
    """Why: unbiased noise of variance 1 in log p raises the average of p by e^½, however many draws there are."""
    noise = torch.randn(2000, 300, dtype=F64, generator=generator("probes"))
    fooled = combine_draws([Likelihood(row, "bound") for row in noise], "importance").value  # true log p: 0
    assert fooled.mean().item() == pytest.approx(0.5, abs=0.02)


def test_words_for_how_a_likelihood_was_made():
    assert how_made(1, "mean", {}) == how_made(1, "importance", {"divergence": "exact", "probes": 1}) == ""
    assert how_made(5, "mean", {"draws": 2}) == "10 draws"
    assert how_made(5, "importance", {"draws": 1}) == "iw-5" and how_made(5, "importance", {"draws": 2}) == (
        "iw-5, 2 draws"
    )
    assert how_made(5, "mean", {"divergence": "hutchinson", "probes": 2}) == "5 draws, 2 probes"
    assert how_made(1, "mean", {"divergence": "hutchinson"}) == "1 probe"
    assert how_made(1, "mean", {"method": "elbo"}) == "elbo at 1 time"
    elbo = {"method": "elbo", "divergence": "hutchinson", "probes": 8, "draws": 2}
    assert how_made(1, "mean", elbo) == "2 draws, elbo at 8 times"


# ---- metrics -----------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 100), st.integers(1, 50))
def test_rescaling_the_unit_of_the_data_changes_nothing(scale, d):
    log_p = torch.tensor([-3.0 * d], dtype=F64)
    moved = log_p - d * math.log(scale)  # the density of scale·x
    assert bits_per_dim(moved, d, scale).item() == pytest.approx(bits_per_dim(log_p, d, 1.0).item(), abs=1e-9)


def all_of(metric, dataset, values, kind, stderr=None):
    metric.start(subject(dataset))
    batch = dataset.all("test")[: len(values)]
    metric.update(Samples(torch.arange(len(values)), likelihood=Likelihood(values, kind, stderr)), batch)
    return metric.compute()


def fed(metric, dataset, values, kind, stderr=None):
    return next(iter(all_of(metric, dataset, values, kind, stderr).values()))


@pytest.mark.parametrize(
    ("kind", "reported"),
    [("pmf", "pmf"), ("exact", "bound"), ("bound", "bound"), ("numerical", "numerical"), ("stochastic", "stochastic")],
)
def test_kind_of_a_code_length(kind, reported):
    e = fed(BitsPerDim(), Levels(), torch.tensor([-3.0, -4.0], dtype=F64), kind)
    assert e.kind == reported == fed(NegativeLogLikelihood(), Levels(), torch.zeros(2), kind).kind
    assert e.value == pytest.approx(3.5 / (3 * math.log(2)))
    assert e.references == {"uniform": math.log2(5)}


def test_width_of_the_levels_enters_for_densities_only():
    class Halves(Levels):
        bin_width = 0.5

    values = torch.tensor([-3.0, -4.0], dtype=F64)
    mass, density = (fed(BitsPerDim(), Halves(), values, kind).value for kind in ("pmf", "bound"))
    assert density - mass == pytest.approx(1.0)


def test_a_stream_is_as_good_as_its_weakest_part():
    metric, data = NegativeLogLikelihood(), Points()
    metric.start(subject(data))
    for kind in ("exact", "stochastic", "bound"):
        metric.update(Samples(torch.arange(2), likelihood=Likelihood(torch.zeros(2), kind)), data.all("test")[:2])
    assert metric.compute()["nll"].kind == "stochastic"


def test_true_law_is_the_reference_of_nll():
    data = Points()
    truth = data.log_prob(data.all("test").x)
    e = fed(NegativeLogLikelihood(), data, truth, "exact")
    assert e.value == pytest.approx(e.references["true law"], rel=1e-12) and e.unit == "nats"
    assert e.value == pytest.approx(1 + math.log(2 * math.pi), abs=4 * e.stderr)
    assert e.stderr == pytest.approx(truth.std().item() / math.sqrt(len(truth)))
    assert torch.equal(e.items, -truth)


def test_nats_of_discrete_data_are_the_code_length():
    """A density and a mass of the same model: uniform on 5 levels of width ½ in 3 dimensions costs 3 log 5 nats."""

    class Halves(Levels):
        bin_width = 0.5

    density = torch.full((4,), -3 * math.log(5 * 0.5), dtype=F64)
    mass = torch.full((4,), -3 * math.log(5), dtype=F64)
    for values, kind in ((density, "exact"), (mass, "pmf")):
        found = all_of(NegativeLogLikelihood(), Halves(), values, kind)
        bits = fed(BitsPerDim(), Halves(), values, kind)
        assert found["nll"].value == pytest.approx(3 * math.log(5), rel=1e-14) and found["nll"].unit == "nats"
        assert found["nats_per_dim"].value == pytest.approx(math.log(5), rel=1e-14)
        assert found["nats_per_dim"].value == pytest.approx(bits.value * math.log(2), rel=1e-14)
        assert found["nats_per_dim"].unit == "nats/dim"
        assert found["nll"].references == {"uniform": pytest.approx(3 * math.log(5))}
        assert found["nats_per_dim"].references == {"uniform": pytest.approx(math.log(5))}


def test_nats_per_dimension_of_continuous_data():
    data = Points()
    found = all_of(NegativeLogLikelihood(), data, data.log_prob(data.all("test").x), "exact")
    whole, each = found["nll"], found["nats_per_dim"]
    assert (each.value, each.stderr) == pytest.approx((whole.value / 2, whole.stderr / 2))
    assert each.references["true law"] == pytest.approx(whole.references["true law"] / 2) and each.kind == "exact"
    assert torch.allclose(each.items, whole.items / 2)
    assert code_length(torch.tensor([-2.0]), 5, None).tolist() == [2.0]


class Wide(Points):
    """Points of N(0, 4), whose density is known to 0.03 nats."""

    log_prob_stderr = 0.03

    def __init__(self):
        for split in ("train", "val", "test"):
            self.hold(split, Batch(2 * torch.randn(4000, 2, generator=generator("wide", split))))

    def log_prob(self, x):
        return -(x.double() ** 2).sum(1) / 8 - math.log(8 * math.pi)


def test_divergence_from_a_known_law_is_the_mean_of_paired_differences():
    """KL(N(0, 4) | N(m, 4 e²)) in the plane, e = 1.1: 2 log e + (8 + m²)/(8 e²) - 1, with the spread of differences."""
    data = Wide()
    x, e, m = data.all("test").x.double(), 1.1, torch.tensor([0.3, 0.0], dtype=F64)
    log_p = -((x - m) ** 2).sum(1) / (8 * e**2) - math.log(8 * math.pi * e**2)
    metric = NegativeLogLikelihood()
    metric.start(subject(data))
    for rows in torch.arange(4000).split(1500):
        answers = Samples(rows, likelihood=Likelihood(log_p[rows], "stochastic", torch.full((len(rows),), 0.1)))
        metric.update(answers, data.take("test", rows))
    found = metric.compute()
    kl, nll = found["kl_per_dim"], found["nats_per_dim"]
    exact = 2 * math.log(e) + (8 + 0.09) / (8 * e**2) - 1
    assert (kl.n, kl.unit, kl.better, kl.kind) == (4000, "nats/dim", "lower", "stochastic")
    assert kl.value == pytest.approx(nll.value - nll.references["true law"], rel=1e-9)
    # differences are linear and quadratic in x: variances (m/4e²)² 4 and 2·2·(½(1 - 1/e²))²
    spread = math.sqrt((0.3 / (4 * e**2)) ** 2 * 4 + (1 - 1 / e**2) ** 2)
    assert kl.stderr == pytest.approx(math.hypot(spread / math.sqrt(4000), 0.03) / 2, rel=0.02)
    assert kl.value == pytest.approx(exact / 2, abs=4 * spread / math.sqrt(4000) / 2)
    assert kl.references == {"true law": 0.0} and kl.detail == "noise of the draws 0.00079"
    assert torch.allclose(kl.items, (data.log_prob(x) - log_p) / 2, rtol=0, atol=1e-12)


def test_paired_differences_are_known_better_than_the_entropy_and_vanish_for_the_law_itself():
    data = Points()
    found = all_of(NegativeLogLikelihood(), data, data.log_prob(data.all("test").x), "exact")
    assert found["kl_per_dim"].value == found["kl_per_dim"].stderr == 0 < 0.01 < found["nats_per_dim"].stderr
    assert all_of(NegativeLogLikelihood(), data, torch.zeros(1), "exact")["kl_per_dim"].stderr is None


def test_data_of_unknown_law_have_no_divergence_and_protocols_keep_their_hash():
    class Unknown(Points):
        def log_prob(self, x):
            return None

    for data in (Unknown(), Levels()):
        values = torch.zeros(3, dtype=F64)
        assert set(all_of(NegativeLogLikelihood(), data, values, "exact")) == {"nll", "nats_per_dim"}
    assert NegativeLogLikelihood.version == 2  # which is in every hash


def test_noise_of_the_probes_is_counted_once():
    """sd/√n over items covers both the items' spread (sd 1) and the noise of their estimates (sd 0.75)."""
    g, n, repeats = generator("noise"), 400, 1500
    lengths = 3 + torch.randn(repeats, n, dtype=F64, generator=g)
    noisy = lengths + 0.75 * torch.randn(repeats, n, dtype=F64, generator=g)
    truth = noisy.mean(1).std().item()  # of the whole experiment, items and probes drawn anew
    assert truth == pytest.approx(1.25 / math.sqrt(n), rel=0.08)  # 1.8 % is one standard error of 1500 repetitions
    data, stderr = Points((300, 20, n)), torch.full((n,), 0.75)
    e = fed(NegativeLogLikelihood(), data, -noisy[0], "stochastic", stderr)
    assert e.stderr == pytest.approx(truth, rel=0.15)  # sd of 400 values: 3.5 % of itself
    both = math.hypot(e.stderr, 0.75 / math.sqrt(n))
    assert both > 1.1 * truth  # what adding the items' errors again would claim
    covered = (noisy.mean(1) - 3).abs() < 1.96 * noisy.std(1) / math.sqrt(n)
    assert covered.double().mean().item() == pytest.approx(0.95, abs=0.025)  # 4 binomial standard errors
    assert e.detail == f"noise of the draws {0.75 / math.sqrt(n):.2g}"


def test_noise_is_told_in_the_unit_of_the_estimate():
    stderr = torch.tensor([3.0, 4.0])  # rms √12.5, over √2
    found = all_of(NegativeLogLikelihood(), Levels(), torch.tensor([-3.0, -4.0], dtype=F64), "bound", stderr)
    assert found["nll"].detail == "noise of the draws 2.5" and found["nats_per_dim"].detail.endswith(" 0.83")
    bits = fed(BitsPerDim(), Levels(), torch.tensor([-3.0, -4.0], dtype=F64), "bound", stderr)
    assert bits.detail == f"noise of the draws {2.5 / (3 * math.log(2)):.2g}"
    for silent in (None, torch.zeros(2)):
        assert fed(BitsPerDim(), Levels(), torch.zeros(2), "bound", silent).detail == ""


def test_code_lengths_need_levels():
    with pytest.raises(NotApplicable, match="nll"):
        BitsPerDim().start(subject(Points()))


def test_infinite_cost_is_not_hidden():
    e = fed(BitsPerDim(), Levels(), torch.tensor([-3.0, -math.inf], dtype=F64), "pmf")
    assert math.isinf(e.value)
