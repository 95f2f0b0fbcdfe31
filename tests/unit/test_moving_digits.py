"""Moving digits: paths by their formula, digits whole at every place, items that depend on split and index alone."""

import pytest
import torch

from genmodels.data.dataset import SPLITS, Dataset
from genmodels.data.digits import Digits
from genmodels.data.moving_digits import MovingDigits, placed, windows
from genmodels.registry import ConfigError, build, resolve


@pytest.fixture(scope="module")
def data():
    return MovingDigits(copies=2)


@pytest.fixture(scope="module")
def digits():
    return Digits()


def test_every_frame_shows_the_digit_of_the_item_and_nothing_else(data, digits):
    for split in SPLITS:
        images, items = digits.all(split), data.all(split)
        n = len(images)
        assert len(items) == n * (2 if split == "train" else 1)
        shown = torch.arange(len(items)) % n
        seen = windows(items.x, data.places(split))
        assert torch.equal(seen, images.x[shown].expand(-1, 8, -1, -1))
        assert torch.equal(items.x.sum((1, 3, 4)), seen.sum((2, 3)))  # no level lies beside it
        assert torch.equal(items.condition, images.condition[shown])


@pytest.mark.parametrize(("size", "speed"), [(16, 2), (10, 2)])
def test_digits_go_straight_and_turn_at_the_walls(size, speed):
    """Against billiards step by step: what would pass a wall goes back as far as it would have passed it."""
    places, reach = MovingDigits(frames=30, size=size, speed=speed, copies=1).places("train"), size - 8
    assert places.min() == 0 and places.max() == reach
    ways = [(start, v) for start in range(reach + 1) for v in range(-speed, speed + 1)]
    possible = {tuple(billiard(start, v, reach, 30)) for start, v in ways}
    assert {tuple(path) for path in torch.cat((places[..., 0], places[..., 1])).tolist()} == possible


def billiard(at: int, v: int, reach: int, frames: int) -> list[int]:
    walked = [at]
    while len(walked) < frames:
        at += v
        if not 0 <= at <= reach:
            at, v = (-at if at < 0 else 2 * reach - at), -v
        walked.append(at)
    return walked


def test_starts_and_velocities_are_spread_evenly():
    """81 starts and 24 velocities, none of which stands still: chi-square within 5 deviations of its mean."""
    data = MovingDigits(frames=2, copies=10)
    places = data.places("train")
    start = (places[:, 0, 0] * 9 + places[:, 0, 1]).bincount(minlength=81)
    amid = ((places[:, 0] >= 2) & (places[:, 0] <= 6)).all(1)  # no wall is met
    steps = (places[:, 1] - places[:, 0])[amid]
    velocity = ((steps[:, 0] + 2) * 5 + steps[:, 1] + 2).bincount(minlength=25)
    assert velocity[12] == 0
    for counts in (start, torch.cat((velocity[:12], velocity[13:]))):
        expected = counts.sum() / len(counts)
        chi2, dof = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
        assert abs(chi2 - dof) < 5 * (2 * dof) ** 0.5


def test_an_item_depends_on_its_split_and_index_alone(data):
    """Not on how many copies there are, nor on how long the video is; the seed changes paths, not digits."""
    longer = MovingDigits(frames=12, copies=1)
    other = MovingDigits(copies=2, seed=1)
    for split in SPLITS:
        n = longer.size(split)
        assert torch.equal(longer.all(split).x[:, :, :8], data.all(split).x[:n])
        assert torch.equal(
            windows(other.all(split).x, other.places(split)), windows(data.all(split).x, data.places(split))
        )
        assert (other.places(split) != data.places(split)).any(2).any(1).double().mean() > 0.99
    n = longer.size("train")
    repeated = (data.places("train")[:n] == data.places("train")[n:]).all(2).all(1)
    assert repeated.double().mean() < 0.01 and (data.places("test") != data.places("train")[:500]).any()
    assert data.fingerprint() == MovingDigits(copies=2).fingerprint() != other.fingerprint()


def test_what_lies_elsewhere_is_black():
    image = torch.arange(64).reshape(1, 1, 8, 8)
    video = placed(image, torch.tensor([[[0, 3], [2, 0]]]), 11)
    expected = torch.zeros(1, 1, 2, 11, 11, dtype=torch.int64)
    expected[0, 0, 0, 0:8, 3:11] = expected[0, 0, 1, 2:10, 0:8] = image[0, 0]
    assert torch.equal(video, expected)


def test_they_are_videos_of_ten_classes(data):
    assert data.shape == (1, 8, 16, 16) and data.frame_rate == 8 and data.num_classes == 10
    assert "frame_rate" not in data.facts()  # no model asks for it: checkpoints stay as they are
    assert Digits().frame_rate is None


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"size": 8}, {"speed": 0}, {"speed": 9}, {"copies": 0}])
def test_impossible_motion_is_refused(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ConfigError, match=rf"data 'moving_digits': .*are needed, found .*{name}={value}"):
        build(Dataset, resolve(Dataset, {"name": "moving_digits", **wrong}, "data"))
