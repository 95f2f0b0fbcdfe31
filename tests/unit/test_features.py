"""The digits extractor: its weights, its accuracy, and that the distance over it orders sets as it should."""

import shutil

import pytest
import torch

from genmodels.data.digits import Digits
from genmodels.metrics import digits_features, train_digits_features
from genmodels.metrics.bures import bias_constant, factor, frechet_distance
from genmodels.metrics.digits_features import WEIGHTS, DigitsNetwork, accuracy, load_network
from genmodels.metrics.features import DigitsFeatures, Pixels, RandomProjection, features_of, to_levels
from genmodels.metrics.frechet import uniform_noise
from genmodels.metrics.statistics import gaussian
from genmodels.rng import generator
from tests.evaluation_fakes import Levels, Points


@pytest.fixture(scope="module")
def digits():
    return Digits()


def everything(digits):
    return torch.cat([digits.all(split).x for split in ("train", "val", "test")])


def test_released_classifier_knows_digits(digits):
    assert accuracy(load_network(), digits.all("test").x, digits.labels("test")) >= 0.98
    assert sum(p.numel() for p in DigitsNetwork().parameters()) == 72_842


def test_other_weights_are_refused(tmp_path):
    copy = tmp_path / "weights.safetensors"
    shutil.copyfile(WEIGHTS, copy)
    assert load_network(copy) is not None
    load_network.cache_clear()
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        load_network(copy)
    with pytest.raises(ValueError, match="missing"):
        load_network(tmp_path / "nothing.safetensors")


def test_identity_names_the_weights():
    assert DigitsFeatures().identity == f"digits-cnn-v1:{digits_features.SHA256[:12]}"
    assert Pixels(16.0).identity != Pixels().identity


def test_features_belong_to_their_item(digits):
    x, extract = digits.all("test").x[:40], DigitsFeatures()
    assert torch.allclose(extract(x)[7:9], extract(x[7:9]), atol=1e-5)
    assert features_of(extract, digits, "val", 33).shape == (100, 64)
    with pytest.raises(ValueError, match=r"\[3\].*8x8"):
        extract(torch.zeros(2, 3))


def test_rounding_to_levels():
    x = torch.tensor([[-3.0, 0.49, 0.5], [1.4, 3.6, 9.0]])
    assert to_levels(x, Levels()).tolist() == [[0, 0, 1], [1, 4, 4]]
    assert to_levels(x, Points()) is x


def test_distance_orders_sets_as_people_do(digits):
    x, extract, g = everything(digits), DigitsFeatures(), generator("test features")
    reference = gaussian(extract(x))

    def fd(y, against=reference):
        return frechet_distance(gaussian(extract(to_levels(y, digits))), against)

    order = torch.randperm(len(x), generator=g)
    halves = fd(x[order[:898]], gaussian(extract(x[order[898:]])))
    floor = bias_constant(reference.covariance) * (1 / 898 + 1 / 899)
    fitted = gaussian(x.flatten(1))
    root = factor(fitted.covariance)
    normal = torch.randn(len(x), root.shape[1], generator=g, dtype=torch.float64) @ root.T + fitted.mean
    sets = [x + 16 * sd * torch.randn(x.shape, generator=g) for sd in (0.1, 0.25)]
    sets += [normal.reshape(x.shape), uniform_noise(digits, len(x))]
    values = [fd(y) for y in sets]
    # Real data against real data is at its floor (its spread over splits is about a fifth). The first set is the data
    # themselves with noise, so what their independent half has in addition is the sampling error of two halves.
    assert 0.4 * floor < halves < 2 * floor
    assert [halves, *values[1:]] == sorted([halves, *values[1:]]) and values == sorted(values)
    assert values[1] > 4 * halves and values[2] > 2 * values[1] and values[3] > 2 * values[2]


def test_pixel_moments_are_blind_to_what_the_extractor_sees(digits):
    """Figures for the raw vector in [0, 1], which do not depend on any trained weights."""
    x, extract, g = everything(digits), Pixels(16.0), generator("test features")
    fitted = gaussian(extract(x))
    root = factor(fitted.covariance)
    normal = (torch.randn(len(x), root.shape[1], generator=g, dtype=torch.float64) @ root.T + fitted.mean) * 16
    assert frechet_distance(gaussian(extract(to_levels(normal, digits).float())), fitted) == pytest.approx(
        0.19, abs=0.02
    )
    noise = uniform_noise(digits, 1797)
    assert frechet_distance(gaussian(extract(noise)), fitted) == pytest.approx(10.1, abs=0.2)


def test_recipe_learns_quickly(digits):
    x, labels = digits.all("train").x, digits.labels("train")
    network = train_digits_features.train(x, labels, epochs=2)
    assert accuracy(network, digits.all("val").x, digits.labels("val")) > 0.5  # chance: 0.1


@pytest.mark.slow
def test_recipe_reaches_the_released_accuracy(digits):
    x, labels = (
        torch.cat([digits.all(s).x for s in ("train", "val")]),
        torch.cat([digits.labels(s) for s in ("train", "val")]),
    )
    network = train_digits_features.train(x, labels)
    assert accuracy(network, digits.all("test").x, digits.labels("test")) >= 0.98


def test_augmentation_shifts_by_at_most_one_pixel():
    x = torch.zeros(400, 1, 8, 8)
    x[:, 0, 4, 4] = 1000.0
    moved = train_digits_features.augment(x, generator("augment")).flatten(1).argmax(1)
    rows, columns = moved // 8, moved % 8
    assert set(rows.tolist()) == {3, 4, 5} and set(columns.tolist()) == {3, 4, 5}
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 9


def test_random_projections_are_fixed_and_keep_lengths(digits):
    x = digits.all("train").x[:200]
    extract = RandomProjection(dims=400, scale=2.0)
    z = extract(x)
    assert z.shape == (200, 400) and z.dtype == torch.float64 and torch.equal(RandomProjection(400, scale=2.0)(x), z)
    assert torch.equal(z, (x.flatten(1).double() / 2) @ extract.matrix(64))
    # |Gx|²/|x|² is a χ² over 400 degrees of freedom by 400: its standard deviation is 0.07, less for the mean
    ratio = z.square().sum(1) / (x.flatten(1).double() / 2).square().sum(1)
    assert abs(ratio.mean().item() - 1) < 0.15
    assert not torch.allclose(RandomProjection(400, seed=1, scale=2.0)(x), z)
    kinds = [RandomProjection(), RandomProjection(32), RandomProjection(seed=1), RandomProjection(scale=2.0)]
    assert len({each.identity for each in kinds}) == 4
    with pytest.raises(ValueError, match="dims >= 1 and scale > 0"):
        RandomProjection(0)


def test_distance_does_not_see_an_orthogonal_projection(digits, monkeypatch):
    """x → x Q with Qᵀ Q = 1 turns both Gaussians alike; on one number the distance is that of a line."""
    extract = RandomProjection(64)
    x, y = digits.all("train").x, digits.all("test").x
    direct = frechet_distance(gaussian(Pixels()(x)), gaussian(Pixels()(y)))
    line = RandomProjection(1)
    a, b = line(x).flatten(), line(y).flatten()
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(gaussian(line(x)), gaussian(line(y))) == pytest.approx(expected.item(), rel=1e-9)
    orthogonal = torch.linalg.qr(extract.matrix(64)).Q
    monkeypatch.setattr(extract, "matrix", lambda size: orthogonal)
    assert frechet_distance(gaussian(extract(x)), gaussian(extract(y))) == pytest.approx(direct, rel=1e-6)


def test_names_of_distances_follow_the_label():
    assert (Pixels().frechet_name, DigitsFeatures().kernel_name) == ("FD-pixels", "KID-digits")
