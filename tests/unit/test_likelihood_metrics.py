"""Bits per dimension and nats: units, bin widths, kinds, references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genmodels.metrics.likelihood import BitsPerDim, NegativeLogLikelihood, bits_per_dim
from genmodels.metrics.metric import Subject
from genmodels.transforms import Affine, Compose, Dequantize, Logit
from genmodels.types import Likelihood, NotApplicable, Samples
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


def test_dequantisation_bounds_the_exact_code_length():
    """N(1.3, 0.6²), the cell [1, 2): exact 0.811498 bits, expected uniform bound 0.835911."""
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    x = Dequantize(levels=3)(torch.ones(20_000, 1, dtype=F64))[0] - 0.5 + u[:, None]
    log_p = -(((x[:, 0] - 1.3) / 0.6) ** 2) / 2 - math.log(0.6 * math.sqrt(2 * math.pi))
    assert bits_per_dim(log_p, 1, 1.0).mean().item() == pytest.approx(0.835911, abs=1e-6)
    assert -math.log2(log_p.exp().mean().item()) == pytest.approx(0.811498, abs=1e-6)


@given(st.floats(0.01, 100), st.integers(1, 50))
def test_rescaling_the_unit_of_the_data_changes_nothing(scale, d):
    log_p = torch.tensor([-3.0 * d], dtype=F64)
    moved = log_p - d * math.log(scale)  # the density of scale·x
    assert bits_per_dim(moved, d, scale).item() == pytest.approx(bits_per_dim(log_p, d, 1.0).item(), abs=1e-9)


def fed(metric, dataset, values, kind):
    metric.start(subject(dataset))
    batch = dataset.all("test")[: len(values)]
    metric.update(Samples(torch.arange(len(values)), likelihood=Likelihood(values, kind)), batch)
    return next(iter(metric.compute().values()))


@pytest.mark.parametrize(
    ("kind", "reported"),
    [("pmf", "pmf"), ("exact", "bound"), ("bound", "bound"), ("numerical", "numerical"), ("stochastic", "stochastic")],
)
def test_kind_of_a_code_length(kind, reported):
    e = fed(BitsPerDim(), Levels(), torch.tensor([-3.0, -4.0], dtype=F64), kind)
    assert e.kind == reported
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


def test_each_applies_to_its_own_data():
    with pytest.raises(NotApplicable, match="nll"):
        BitsPerDim().start(subject(Points()))
    with pytest.raises(NotApplicable, match="bits_per_dim"):
        NegativeLogLikelihood().start(subject(Levels()))


def test_infinite_cost_is_not_hidden():
    e = fed(BitsPerDim(), Levels(), torch.tensor([-3.0, -math.inf], dtype=F64), "pmf")
    assert math.isinf(e.value)
