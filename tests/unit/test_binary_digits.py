"""The digits in black and white: the same items as in grey, cut at half of the range."""

import math

import numpy as np
import pytest
import torch

from genmodels.data.dataset import SPLITS, Dataset, context
from genmodels.evaluation.protocol import Protocol
from genmodels.registry import build, resolve
from genmodels.rng import BatchNoise, generator


def make(name, **arguments):
    return build(Dataset, resolve(Dataset, {"name": name, **arguments}, "data"))


def test_they_are_the_digits_cut_at_half_of_their_range():
    grey, black = make("digits"), make("binary_digits")
    assert (black.levels, black.bin_width, black.shape, black.num_classes) == (2, 1.0, (1, 8, 8), 10)
    for split in SPLITS:
        x = black.all(split).x
        assert torch.equal(x, (grey.all(split).x > 7.5).float())
        assert torch.equal(black.labels(split), grey.labels(split))
    assert black.fingerprint() != grey.fingerprint()


def test_some_test_images_equal_a_training_image():
    black = make("binary_digits")
    seen = {row.numpy().tobytes() for row in black.all("train").x}
    assert sum(row.numpy().tobytes() in seen for row in black.all("test").x) == 18


def test_the_baselines_are_probability_mass_functions_of_two_levels():
    """Against a direct computation in numpy."""
    data = make("binary_digits")
    v, labels = data.all("train").x.flatten(1).numpy(), data.labels("train").numpy()
    test = data.all("test").x.flatten(1).numpy()

    def score(rows):
        p = (rows.sum(0) + 0.1) / (len(rows) + 0.2)
        return (test * np.log(p) + (1 - test) * np.log1p(-p)).sum(1)

    parts = np.stack([score(v[labels == c]) + np.log(np.mean(labels == c)) for c in range(10)])
    mixture = np.logaddexp.reduce(parts, 0)
    found = data.baselines()
    assert found["uniform"] == 1.0
    assert found["histograms"] == pytest.approx(-score(v).mean() / (64 * math.log(2)), abs=1e-6)
    assert found["class histograms"] == pytest.approx(-mixture.mean() / (64 * math.log(2)), abs=1e-6)
    assert 0.4 < found["class histograms"] < found["histograms"] < 0.6


def test_the_proposed_transform_is_for_densities_of_two_levels():
    x = make("binary_digits").all("val").x
    transform = context(make("binary_digits").facts())["transform"]
    y, _ = transform(x, BatchNoise(len(x), generator=generator("y")))
    assert -1 <= y.min() < -0.99 and 0.99 < y.max() < 1
    assert torch.equal((y >= 0).float(), x)
    assert torch.equal(transform.inverse(y), x)
    chosen = make("binary_digits", transform={"name": "affine", "scale": 2.0}).facts()["transform"]
    assert chosen["name"] == "affine"


def test_the_protocol_ranks_by_the_code_length_of_the_test_images():
    protocol = Protocol.load("binary_digits")
    assert protocol.dataset.levels == 2
    assert protocol.tree["metrics"][0]["name"] == "bits_per_dim"
    assert protocol.likelihood.split == "test" and protocol.likelihood.num_items is None


def test_protocols_of_the_grey_digits_keep_their_hashes():
    """Published results are filed under them."""
    found = {name: Protocol.load(name).hash for name in ("digits", "digits_demo", "digits_classify")}
    assert found == {"digits": "85335806832b", "digits_demo": "532ed964ab98", "digits_classify": "4d7fd1a9b569"}
