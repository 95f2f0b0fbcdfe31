"""Copies are found, fresh data are not accused."""

import itertools
import math

import pytest
import torch

from genmodels.data.digits import Digits
from genmodels.metrics import neighbours
from genmodels.metrics.authenticity import Authenticity, authentic, memorised_share, nearest_counts, share_below
from genmodels.metrics.metric import Subject
from genmodels.metrics.neighbours import distances, nearest, radii
from genmodels.rng import generator
from genmodels.types import Batch, Samples
from tests.evaluation_fakes import Levels, Points, UniformLevels


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_authentic_by_hand():
    train = column(0, 1, 10)  # gaps 1, 1, 9
    x = column(-2, 0.5, 14, 30)  # farther than the gap, nearer, nearer than the wide gap, farther
    assert authentic(*nearest(x, train), radii(train, 1)).tolist() == [True, False, False, True]
    assert authentic(*nearest(column(2.0), train), radii(train, 1)).tolist() == [False]  # as near as the gap is wide


@pytest.mark.parametrize("budget", [2**23, 100])
def test_ties_share_their_vote(budget, monkeypatch):
    monkeypatch.setattr(neighbours, "BUDGET", budget)
    monkeypatch.setattr(neighbours, "COLUMNS", 2)
    assert nearest_counts(column(0.5, 0.0), column(0, 1, 5)).tolist() == [1.5, 0.5, 0]
    x, pool = (torch.randn(n, 2, generator=generator("votes", n)).round() for n in (70, 60))
    tied = distances(x, pool) == distances(x, pool).min(1, keepdim=True).values
    assert torch.allclose(nearest_counts(x, pool), (tied / tied.sum(1, keepdim=True)).double().sum(0), rtol=1e-6)


def test_share_below_by_hand_and_pair_by_pair():
    assert share_below(column(1, 2)[:, 0], column(2, 3, 0)[:, 0]).value == 3.5 / 6
    x, y = (torch.randn(n, generator=generator("share", n), dtype=torch.float64) for n in (40, 70))
    assert share_below(x, y).value == pytest.approx((x[:, None] < y).double().mean().item(), rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_standard_error_of_share_below_is_its_spread(shift):
    """400 draws know an sd to 3.5 %."""
    g = generator("spread of share", int(shift))
    draw = lambda n: torch.randn(n, generator=g, dtype=torch.float64)  # noqa: E731
    found = [share_below(draw(40) - shift, draw(70)) for _ in range(400)]
    value, stderr = torch.tensor(found, dtype=torch.float64).T
    assert stderr.square().mean().sqrt() / value.std() == pytest.approx(1, abs=0.14)
    if shift == 0:
        assert stderr.mean() == pytest.approx(math.sqrt((1 / 40 + 1 / 70) / 12), rel=0.05)


def test_memorised_share_has_the_exact_mean_and_variance_of_relabelling():
    votes = torch.tensor([3.0, 0, 1, 5, 0, 2], dtype=torch.float64)
    every = []
    for chosen in itertools.combinations(range(6), 4):
        order = [*chosen, *(set(range(6)) - set(chosen))]
        every.append(memorised_share(votes[order], 4))
    values = torch.tensor([share.value for share in every], dtype=torch.float64)
    assert values.mean().abs() < 1e-12
    assert every[0].stderr == pytest.approx(values.std(correction=0).item(), rel=1e-12)


def test_memorised_share_of_a_memoriser_is_one():
    assert memorised_share(torch.tensor([1.0, 1, 1, 0, 0]), 3).value == pytest.approx(1)


@pytest.fixture(scope="module")
def digits():
    return Digits()


def samples(metric, x):
    return Samples(torch.arange(len(x)), x=x, features={metric.features.identity: metric.features(x)})


def scored(digits, x):
    metric = Authenticity()
    metric.start(Subject(UniformLevels((1, 8, 8)), digits, torch.device("cpu"), 256))
    for part in x.split(200):
        metric.update(samples(metric, part), None)
    return metric.compute()


def test_fresh_data_are_not_accused(digits):
    fresh = scored(digits, digits.all("val").x)
    assert not any(e.flags for e in fresh.values())
    assert abs(fresh["memorised"].value) < 3 * fresh["memorised"].stderr
    assert fresh["copies"].value == 0
    assert abs(fresh["nearer"].value - 0.5) < 3 * fresh["nearer"].stderr
    e = fresh["authenticity"]
    assert abs(e.value - e.references["test set"]) < 4 * e.stderr


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_copies_with_and_without_noise_are_flagged(digits, noise):
    x = digits.all("train").x[:600]
    x = x + noise * torch.randn(x.shape, generator=generator("copies"))
    found = scored(digits, x)
    assert found["memorised"].flags == ("overlap_suspected",) and found["memorised"].value > 0.9
    assert found["authenticity"].value < 0.5 * found["authenticity"].references["test set"]
    assert found["nearer"].value > 0.95
    assert (found["copies"].value == 1) == (noise == 0) == bool(found["copies"].flags)


def test_averaging_is_not_copying(digits):
    """Means of neighbours lie nearer to the data than the data to each other, to training and test items alike."""
    pool = torch.cat([digits.all("train").x, digits.all("test").x])
    near = distances(digits.all("val").x.flatten(1), pool.flatten(1)).topk(4, largest=False).indices
    found = scored(digits, pool[near].mean(1))
    assert found["nearer"].value > 0.7
    assert found["authenticity"].value < 0.5 * found["authenticity"].references["test set"]
    assert abs(found["memorised"].value) < 3 * found["memorised"].stderr
    assert not any(e.flags for e in found.values())


def test_duplicates_that_the_data_have_anyway_are_no_copies():
    data = Levels()  # 5³ possible items: the test set repeats the training set all the time
    metric = Authenticity()
    metric.start(Subject(UniformLevels(), data, torch.device("cpu"), 256))
    metric.update(samples(metric, data.all("val").x), None)
    e = metric.compute()["copies"]
    assert e.value > 0.5 and e.references["test set"] > 0.5 and not e.flags


def plane(sizes, twins=0):
    """Points of the plane; the first `twins` training items occur twice."""
    data = Points(sizes)
    x = data.all("train").x
    data.hold("train", Batch(torch.cat([x[:twins], x[: len(x) - twins]])))
    return data


def fed(data, x):
    metric = Authenticity()
    metric.start(Subject(UniformLevels((2,)), data, torch.device("cpu"), 64))
    metric.update(Samples(torch.arange(len(x)), x=x, features={metric.features.identity: metric.features(x)}), None)
    return metric.compute()


def test_without_test_items_copies_are_judged_by_the_twins_of_the_training_set():
    fresh = torch.randn(100, 2, generator=generator("no test items"))
    data = plane((200, 0, 0))
    assert fed(data, data.all("train").x[:100])["copies"].flags == ("overlap_suspected",)
    assert fed(data, fresh)["copies"].flags == () and "memorised" not in fed(data, fresh)
    twins = plane((200, 0, 0), twins=100)  # each item occurs twice, so that half copies are no sign of anything
    half = torch.cat([twins.all("train").x[:50], fresh[:50]])
    assert fed(twins, half)["copies"].value == 0.5 and fed(twins, half)["copies"].flags == ()


def test_few_honest_samples_are_not_accused():
    """12 samples may well lie nearer to training items: their share is uncertain by about 0.4."""
    flags = [
        fed(plane((200, 0, 100)), torch.randn(12, 2, generator=generator("few", k)))["memorised"].flags
        for k in range(40)
    ]
    assert flags == [()] * 40


def test_negative_zero_is_zero():
    data = plane((200, 0, 0))
    x = data.all("train").x.clone()
    x[0] = 0.0
    data.hold("train", Batch(x))
    assert fed(data, torch.tensor([[-0.0, 0.0], [7.0, 7.0]]))["copies"].value == 0.5
