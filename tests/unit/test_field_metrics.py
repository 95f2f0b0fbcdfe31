"""Metrics of fields: exact values under known changes, what a perfect sampler scores, and what they do not apply to."""

import math

import pytest
import torch

from genmodels.evaluation.protocol import Protocol
from genmodels.metrics.fields.bispectrum import bispectrum
from genmodels.metrics.fields.minkowski import minkowski, peaks
from genmodels.metrics.fields.moments import MAGNETIZATION, MOMENTS, field_moments, magnetization
from genmodels.metrics.fields.scattering import scattering
from genmodels.metrics.fields.spectrum import spectrum_errors
from genmodels.metrics.metric import Metric, Subject
from genmodels.registry import ConfigError, build
from genmodels.types import NotApplicable, Samples
from tests.evaluation_fakes import Points
from tests.random_fields import HeldFields, free_spectrum, gaussian_fields

DISTANCES = (
    "spectrum",
    "one_point",
    "field_moments",
    "magnetization",
    "bispectrum",
    "minkowski",
    "wavelet_bands",
    "scattering",
)


def skewed(n, *key, size=16):
    """Fields with a mean, third moments and correlations."""
    return (0.7 * gaussian_fields(n, free_spectrum(size), *key)).exp()


@pytest.fixture(scope="module")
def data():
    return HeldFields(skewed(90, "train"), skewed(60, "test"))


def score(name, dataset, drawn, count=None, **arguments):
    metric = build(Metric, {"name": name, **arguments})
    metric.start(Subject(None, dataset, torch.device("cpu"), 25, drawn=count))
    metric.update(Samples(torch.arange(len(drawn)), x=drawn[:, None]), None)
    return metric.compute()


DELTA = 0.1
SCALED = {
    "spectrum": 0.21,
    "second_moment_error": 0.21,
    "fourth_moment_error": 1.1**4 - 1,
    "skewness_error": 0.0,
    "excess_kurtosis_error": 0.0,
    "abs_magnetization_error": 0.1,
    "susceptibility_error": 0.21,
    "binder_cumulant_error": 0.0,
    "wavelet_l1": 0.1,
    "wavelet_skewness": 0.0,
    "wavelet_kurtosis": 0.0,
    "scattering_first": 0.1,
    "scattering_second": 0.1,
}


@pytest.mark.parametrize("name", ["spectrum", "field_moments", "magnetization", "wavelet_bands", "scattering"])
def test_scaling_the_reference_has_closed_forms(name, data):
    test = data.all("test").x[:, 0]
    for key, found in score(name, data, (1 + DELTA) * test).items():
        if key in SCALED:
            assert found.value == pytest.approx(SCALED[key], rel=1e-9, abs=1e-9), key
        assert found.better == "lower" and found.n == 60


@pytest.mark.parametrize("name", DISTANCES)
def test_the_reference_itself_is_at_distance_0_and_everything_else_further_than_noise(name, data):
    test = data.all("test").x[:, 0]
    same = score(name, data, test)
    assert all(e.value == 0 and e.stderr == 0 for e in same.values())
    changed = score(name, data, 1.25 * test.roll(1, 0).pow(1.5))
    for key, found in changed.items():
        slow = ("binder_cumulant_error", "bispectrum_squeezed", "wavelet_skewness")  # noise of 60 fields is large
        assert found.value > found.references["noise"] * (0.5 if key in slow else 2), key
        assert found.items.mean().item() == pytest.approx(found.value, rel=1e-9)


def test_absolute_errors_are_differences_of_the_statistics(data):
    """By their definitions, in the units of the statistic itself."""
    drawn, test = skewed(70, "drawn").pow(1.3), data.all("test").x[:, 0]

    def pixels(x):
        z = (x - x.mean()) / x.std(correction=0)
        return z.pow(3).mean().item(), z.pow(4).mean().item() - 3

    def binder(x):
        m = x.mean((1, 2))
        return 1 - m.pow(4).mean().item() / (3 * m.square().mean().item() ** 2)

    found = score("field_moments", data, drawn) | score("magnetization", data, drawn)
    for k, name in enumerate(("skewness_error", "excess_kurtosis_error")):
        assert found[name].value == pytest.approx(abs(pixels(drawn)[k] - pixels(test)[k]), rel=1e-6), name
    assert found["binder_cumulant_error"].value == pytest.approx(abs(binder(drawn) - binder(test)), rel=1e-6)


def test_orders_of_scattering_are_compared_apart(data):
    drawn, test = skewed(70, "drawn").pow(1.3), data.all("test").x[:, 0]
    own, known = ([part.double().flatten(1).mean(0) for part in scattering(x)] for x in (drawn, test))
    for key, a, b in zip(("scattering_first", "scattering_second"), own, known, strict=True):
        found = score("scattering", data, drawn)[key].value
        assert found == pytest.approx(((a - b).norm() / b.norm()).item(), rel=1e-6), key


def test_shifts_move_the_one_point_law(data):
    test = data.all("test").x[:, 0]
    found = score("one_point", data, test + 5.0)
    assert found["one_point_w1"].value == pytest.approx(5 / test.std(correction=0).item(), rel=1e-9)
    bins = score("one_point", data, test + 1.0, bins=4, limits=[0, 2])["one_point_tv"]
    edges = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]).double()
    shares = [
        torch.bucketize(x.flatten(), edges, right=True).bincount(minlength=6) / x.numel() for x in (test, test + 1)
    ]
    assert bins.value == pytest.approx((shares[0] - shares[1]).abs().sum().item() / 2, rel=1e-6)
    assert bins.detail == "4 bins on 0 … 2"


def test_coefficients_of_scaled_bands_move_by_their_means(data):
    """|δ| E|x̄|/σ of each band, in the mean over bands."""
    from genmodels.metrics.fields.wavelets import bands

    test = data.all("test").x[:, 0]
    expected = [0.1 * c.abs().mean() / c.square().mean().sqrt() for c in bands(test).values()]
    found = score("wavelet_bands", data, 1.1 * test)["wavelet_w1"]
    assert found.value == pytest.approx(
        (sum(expected) / len(expected)).item(), rel=1e-2
    )  # cells about 0 have both signs


def test_a_change_of_sign_doubles_the_bispectrum():
    data = HeldFields(skewed(40, "a"), skewed(60, "b"))
    test = data.all("test").x[:, 0]
    found = score("bispectrum", data, -test, triangles=3)
    for kind, triangles in (
        ("equilateral", [(1,) * 3, (2,) * 3, (4,) * 3]),
        ("squeezed", [(1, 2, 2), (1, 3, 3), (1, 6, 6)]),
    ):
        items = bispectrum(test, triangles)
        errors = 2 * items.mean(0) / (items.std(0) / math.sqrt(60))
        assert found[f"bispectrum_{kind}"].value == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-9)
    noise = found["bispectrum_equilateral"].references["noise"]
    assert 0.7 * math.sqrt(2) < noise < math.sqrt(2)  # √(1 + m/n) is the root of the mean square


def test_shapes_are_compared_by_threshold(data):
    test = data.all("test").x[:, 0]
    found = score("minkowski", data, test + 0.3, thresholds=5, extent=2.0)
    values = test.mean() + test.std(correction=0) * torch.linspace(-2, 2, 5, dtype=torch.float64)
    pairs = [*zip(minkowski(test, values), minkowski(test + 0.3, values), strict=True)]
    pairs.append((peaks(test, values), peaks(test + 0.3, values)))
    for (key, estimate), (known, moved) in zip(found.items(), pairs, strict=True):
        expected = (moved.mean(0) - known.mean(0)).square().mean().sqrt() / known.mean(0).abs().max()
        assert estimate.value == pytest.approx(expected.item(), rel=1e-9), key


@pytest.mark.parametrize("name", DISTANCES)
def test_a_perfect_sampler_scores_the_noise(name):
    """In the mean over estimates and fifteen pairs of sets."""
    ratios = []
    for k in range(15):
        drawn, known = (gaussian_fields(n, free_spectrum(8), "perfect", n, k) for n in (40, 60))
        drawn, known = (x + 0.2 * x.square() for x in (drawn, known))
        ratios += [e.value / e.references["noise"] for e in score(name, HeldFields(known[:2], known), drawn).values()]
    # one ratio varies by 0.3 to 0.8, and those of one pair of sets go together
    most = 1.7 if name == "magnetization" else 1.35  # errors of fourth moments are too small with 60 numbers
    assert 0.7 < sum(ratios) / len(ratios) < most


def test_standard_errors_are_the_spread_of_sets_of_samples(data):
    """Of a model that is off, against one reference."""
    found = [score("spectrum", data, 1.2 * skewed(50, "spread", k))["spectrum"] for k in range(40)]
    values, stderrs = (torch.tensor([getattr(e, key) for e in found]) for key in ("value", "stderr"))
    assert 0.75 < stderrs.square().mean().sqrt() / values.std() < 1.35  # the spread of 40 is known to 11 %


def test_training_items_are_scored_like_as_many_drawn_ones(data):
    train, test = data.all("train").x[:, 0], data.all("test").x[:, 0]
    rows = torch.arange(30) * 90 // 30
    found = score("spectrum", data, test, count=30)["spectrum"].references
    assert found["training data"] == pytest.approx(spectrum_errors(train[rows], test).rms, rel=1e-9)
    found = score("spectrum", data, test, count=500)["spectrum"].references
    assert found["training data"] == pytest.approx(spectrum_errors(train, test).rms, rel=1e-9)
    noise = [score("spectrum", data, test[:n])["spectrum"].references["noise"] for n in (15, 60)]
    assert noise[0] / noise[1] == pytest.approx(math.sqrt((1 / 15 + 1 / 60) / (2 / 60)), rel=1e-9)


def test_values_are_reported_beside_those_of_the_data(data):
    drawn = skewed(70, "values")
    found = score("field_values", data, drawn)
    assert tuple(found) == MOMENTS + MAGNETIZATION
    for summary, names in ((field_moments, MOMENTS), (magnetization, MAGNETIZATION)):
        own, data_, train = (summary(x) for x in (drawn, data.all("test").x, data.all("train").x))
        for i, name in enumerate(names):
            estimate = found[name]
            assert estimate.value == pytest.approx(own.value[i].item(), rel=1e-9)
            assert estimate.stderr == pytest.approx(own.stderr[i].item(), rel=1e-9)
            expected = {"data": data_.value[i].item(), "training data": train.value[i].item()}
            assert estimate.references == pytest.approx(expected, rel=1e-9) and estimate.better == "none"


def test_fields_without_means_have_no_magnetization():
    x = skewed(30, "centred").float()
    x = x - x.mean((1, 2), keepdim=True)
    dataset = HeldFields(x, x)
    with pytest.raises(NotApplicable, match="mean 0"):
        score("magnetization", dataset, x)
    assert tuple(score("field_values", dataset, x)) == MOMENTS
    assert score("spectrum", dataset, 1.1 * x)["spectrum"].value == pytest.approx(0.21, rel=1e-5)


@pytest.mark.parametrize("name", [*DISTANCES, "field_values"])
def test_only_one_channel_fields_that_vary(name):
    with pytest.raises(NotApplicable, match=r"needs fields \[1, H, W\]"):
        score(name, Points(), torch.zeros(3, 2))
    flat = torch.ones(5, 16, 16)
    if name != "magnetization":  # fields of mean 1 have one
        with pytest.raises(NotApplicable, match=r"constant|no power|no spread|no scattering"):
            score(name, HeldFields(flat, flat), flat)


def test_bands_without_coefficients_are_named():
    """Fields that do not change along rows, axis 0, but for rounding."""
    x = skewed(20, "stripes")[:, :1].float().expand(20, 16, 16)
    with pytest.raises(NotApplicable, match="the high-low band of octave 1 of the reference is 0"):
        score("wavelet_bands", HeldFields(x, x), x)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "spectrum", "largest": 0}, "ring k >= 1"),
        ({"name": "spectrum", "largest": 12}, "rings up to 11"),
        ({"name": "one_point", "bins": 0}, "at least 1 bin"),
        ({"name": "one_point", "limits": [1, 1]}, "increase"),
        ({"name": "bispectrum", "triangles": 0}, "at least 1 triangle"),
        ({"name": "minkowski", "thresholds": 1}, "2 thresholds"),
        ({"name": "minkowski", "extent": -1.0}, "positive extent"),
        ({"name": "scattering", "octaves": 1}, "2 octaves"),
        ({"name": "scattering", "octaves": 4}, "have 3 octaves"),
    ],
)
def test_arguments_that_do_not_fit(node, message, data):
    with pytest.raises(ConfigError, match=message):
        score(dataset=data, drawn=data.all("test").x[:, 0], **node)


@pytest.mark.parametrize("name", ["phi4_32", "phi4_64", "lognormal_64"])
def test_protocols_of_fields_start_with_the_spectrum_and_suit_their_data(name):
    """On fields of that size from elsewhere: what is asked of them must fit."""
    protocol = Protocol.load(name)
    size = protocol.dataset.shape[-1]
    x = skewed(6, name, size=size)
    found = {}
    for metric in protocol.metrics():
        metric.start(Subject(None, HeldFields(x, x), torch.device("cpu"), 6))
        metric.update(Samples(torch.arange(6), x=1.1 * x[:, None]), None)
        found |= metric.compute()
    assert next(iter(found)) == "spectrum" and found["spectrum"].value == pytest.approx(0.21)
    assert found["spectrum"].detail == f"k = 1 … {size // 2}" and len(found) > 20
