"""Copies are found, fresh data are not accused."""

import itertools
import math

import pytest
import torch

from genmodels.data.digits import Digits
from genmodels.metrics.authenticity import (
    Authenticity,
    authentic,
    distances,
    memorised_share,
    nearest,
    nearest_counts,
    nearest_other,
)
from genmodels.metrics.metric import Subject
from genmodels.rng import generator
from genmodels.types import Samples
from tests.evaluation_fakes import Levels, UniformLevels


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_nearest_neighbours_by_hand():
    train = column(0, 1, 3, 10)
    assert nearest_other(train).tolist() == [1, 1, 2, 7]
    d, index = nearest(column(0.25, 2.5, 7), train)
    assert d.tolist() == [0.25, 0.5, 3] and index.tolist() == [0, 2, 3]


def test_authentic_by_hand():
    train = column(0, 1, 10)  # gaps 1, 1, 9
    x = column(-2, 0.5, 14, 30)  # farther than the gap, nearer, nearer than the wide gap, farther
    assert authentic(x, train, nearest_other(train)).tolist() == [True, False, False, True]


def test_copies_are_at_distance_zero_however_far_out():
    x = torch.randn(50, 8, dtype=torch.float64, generator=generator(0)) + 1e6
    assert (distances(x, x).diagonal() == 0).all()


def test_ties_share_their_vote():
    assert nearest_counts(column(0.5, 0.0), column(0, 1, 5)).tolist() == [1.5, 0.5, 0]


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


def scored(digits, x):
    metric = Authenticity()
    metric.start(Subject(UniformLevels((1, 8, 8)), digits, torch.device("cpu"), 256))
    for part in x.split(200):
        metric.update(Samples(torch.arange(len(part)), x=part), None)
    return metric.compute()


def test_fresh_data_are_not_accused(digits):
    fresh = scored(digits, digits.all("val").x)
    assert not any(e.flags for e in fresh.values())
    assert abs(fresh["memorised"].value) < 3 * fresh["memorised"].stderr
    assert fresh["copies"].value == 0
    e = fresh["authenticity"]
    assert abs(e.value - e.references["test set"]) < 4 * e.stderr


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_copies_with_and_without_noise_are_flagged(digits, noise):
    x = digits.all("train").x[:600]
    x = x + noise * torch.randn(x.shape, generator=generator("copies"))
    found = scored(digits, x)
    assert found["memorised"].flags == ("overlap_suspected",) and found["memorised"].value > 0.9
    assert found["authenticity"].value < 0.5 * found["authenticity"].references["test set"]
    assert (found["copies"].value == 1) == (noise == 0) == bool(found["copies"].flags)


def test_averaging_is_not_copying(digits):
    """Means of neighbours lie nearer to the data than the data to each other, to training and test items alike."""
    pool = torch.cat([digits.all("train").x, digits.all("test").x])
    neighbours = distances(digits.all("val").x.flatten(1), pool.flatten(1)).topk(4, largest=False).indices
    found = scored(digits, pool[neighbours].mean(1))
    assert found["authenticity"].value < 0.5 * found["authenticity"].references["test set"]
    assert abs(found["memorised"].value) < 3 * found["memorised"].stderr
    assert not any(e.flags for e in found.values())


def test_duplicates_that_the_data_have_anyway_are_no_copies():
    data = Levels()  # 5³ possible items: the test set repeats the training set all the time
    metric = Authenticity()
    metric.start(Subject(UniformLevels(), data, torch.device("cpu"), 256))
    metric.update(Samples(torch.arange(20), x=data.all("val").x), None)
    e = metric.compute()["copies"]
    assert e.value > 0.5 and e.references["test set"] > 0.5 and not e.flags


def test_one_broken_sample_fails_the_estimates(digits):
    x = digits.all("val").x.clone()
    x[3, 0, 0, 0] = math.nan
    assert all(math.isnan(e.value) and not e.flags for e in scored(digits, x).values())
