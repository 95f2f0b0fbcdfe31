"""Patches of photographs: the recipe against a direct computation, and splits that share no pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels.data import patches
from genmodels.data.dataset import SPLITS
from genmodels.data.patches import NaturalPatches, corners, cut, densities, grey, photographs
from genmodels.registry import ConfigError


def cover(split: str, size: int, stride: int, height: int = 427, width: int = 640) -> np.ndarray:
    """[height, width] number of patches of a split that hold each pixel."""
    count = np.zeros((height, width), int)
    for r, c in corners(split, size, stride, height, width).tolist():
        count[r : r + size, c : c + size] += 1
    return count


@pytest.mark.parametrize("size", [2, 7, 8, 40])
def test_splits_share_no_pixel(size):
    used = sum((cover(split, size, max(1, size // 2), height=90) > 0).astype(int) for split in SPLITS)
    assert used.max() == 1


def test_splits_are_the_documented_stripes():
    columns = {split: cover(split, 8, 1, height=8).any(0).reshape(16, 40) for split in SPLITS}
    stripes = {split: set(np.flatnonzero(c.any(1)).tolist()) for split, c in columns.items()}
    assert stripes["val"] == {2, 10} and stripes["test"] == {6, 14}
    assert stripes["train"] == set(range(16)) - {2, 6, 10, 14}
    # every column of its stripes is used, and patches cross from one training stripe to the next
    assert columns["train"].sum() == 12 * 40
    assert [0, 36] in corners("train", 8, 1, 427, 640).tolist()


def test_held_out_patches_do_not_overlap():
    assert cover("test", 8, 8).max() == cover("val", 8, 8).max() == 1 and cover("test", 8, 8).sum() == 530 * 64


def test_the_sizes_are_the_documented_ones():
    data = NaturalPatches()
    assert [data.size(split) for split in SPLITS] == [94_500, 1_060, 1_060]
    assert data.shape == (63,) and data.levels is None and data.bin_width is None


def test_cut_takes_what_slicing_takes():
    images = torch.arange(2 * 3 * 9 * 11).reshape(2, 3, 9, 11)
    places = torch.tensor([[0, 0], [5, 7], [2, 3]])
    found = cut(images, places, 4)
    direct = [image[:, r : r + 4, c : c + 4] for image in images for r, c in places.tolist()]
    assert torch.equal(found, torch.stack(direct))


def test_grey_is_what_pillow_makes_of_a_photograph():
    photos = photographs()
    for photo, mine in zip(photos, grey(photos), strict=True):
        reference = np.asarray(Image.fromarray(photo.permute(1, 2, 0).numpy()).convert("L")).astype(int)
        # Pillow's weights are rounded to 1/65536, which may move a level at a tie
        difference = np.abs(reference - mine[0].numpy())
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_the_recipe_by_hand():
    patch = torch.tensor([[[[0, 255], [10, 7]]]], dtype=torch.uint8)
    u = torch.tensor([[[[0.5, 0.25], [0.0, 0.75]]]])
    v = np.array([0.5, 255.25, 10.0, 7.75]) / 256
    np.testing.assert_allclose(densities(patch, u)[0].numpy(), (v - v.mean())[:3], rtol=1e-6)


def test_vectors_belong_to_the_photographs():
    """With minus the sum as the last pixel, each vector is a patch of its own split up to a constant and the noise."""
    data = NaturalPatches(stride=5)
    photos = grey(photographs())
    for split in SPLITS:
        x = data.all(split).x[:40]
        whole = torch.cat((x, -x.sum(1, keepdim=True)), 1).double()
        places = corners(split, 8, 5 if split == "train" else 8, 427, 640)
        levels = cut(photos, places, 8).flatten(1).double()
        centred = (levels - levels.mean(1, keepdim=True)) / 256
        # noise in [0, 1)/256 less its mean moves a pixel by less than 1/256
        nearest = torch.stack([(centred - row).abs().amax(1).min() for row in whole])
        assert nearest.max() < 1 / 256


def test_the_noise_is_uniform_and_fixed_by_the_seed(monkeypatch):
    flat = torch.full((2, 3, 427, 640), 77, dtype=torch.uint8)
    monkeypatch.setattr(patches, "photographs", lambda: flat)
    a, again, other = NaturalPatches(stride=6), NaturalPatches(stride=6), NaturalPatches(stride=6, seed=1)
    x = a.all("train").x
    assert torch.equal(x, again.all("train").x) and not torch.equal(x, other.all("train").x)
    # u less the mean of 64: variance (1 - 1/64)/12 levels²; 680,000 draws of kurtosis 1.8: 0.11 %
    assert (256 * x).var().item() == pytest.approx((1 - 1 / 64) / 12, rel=5e-3)
    assert len(x.unique(dim=0)) == len(x)


def test_images_are_the_levels_of_the_photographs():
    data = NaturalPatches(form="image", size=5, channels=3, stride=40)
    photos = photographs()
    for split in SPLITS:
        found = data.all(split).x
        assert found.dtype == torch.float32 and found.shape[1:] == (3, 5, 5) == data.shape
        stride = 40 if split == "train" else 5
        expected = cut(photos, corners(split, 5, stride, 427, 640), 5).float()
        assert not torch.equal(found, expected)  # the order is random
        assert sorted(row.numpy().tobytes() for row in found) == sorted(row.numpy().tobytes() for row in expected)
    assert (data.levels, data.bin_width) == (256, 1.0) and data.baselines() == {"uniform": 8.0}


def test_flipped_items_follow_the_others():
    plain, flipped = (NaturalPatches(form="image", stride=20, flip=flip) for flip in (False, True))
    n = plain.size("train")
    assert flipped.size("train") == 2 * n and flipped.size("test") == plain.size("test")
    rows = torch.tensor([3, n + 3, n, 0, 2 * n - 1])
    x = plain.all("train").x
    expected = torch.stack([x[3], x[3].flip(-1), x[0].flip(-1), x[0], x[n - 1].flip(-1)])
    assert torch.equal(flipped.take("train", rows).x, expected)
    assert torch.equal(flipped.all("train").x[n:], x.flip(-1))
    for bad in (-1, 2 * n):
        with pytest.raises(IndexError, match=f"items are 0 … {2 * n - 1}"):
            flipped.take("train", torch.tensor([bad]))


def test_the_fingerprint_changes_with_pixels_and_options(monkeypatch):
    options = [{}, {"seed": 1}, {"size": 7}, {"stride": 99}, {"form": "image"}, {"form": "image", "channels": 3}]
    prints = [NaturalPatches(**{"stride": 9, **o}).fingerprint() for o in options]
    assert NaturalPatches(stride=9).fingerprint() == prints[0] and len(set(prints)) == len(prints)
    other = photographs().clone()
    other[0, 0, 0, 0] ^= 128
    monkeypatch.setattr(patches, "photographs", lambda: other)
    assert NaturalPatches(stride=9).fingerprint() != prints[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 41}, r"data.size: .*2 … 40 pixels are possible, found 41"),
        ({"size": 1}, "found 1"),
        ({"stride": 0}, "data.stride: must be at least 1, found 0"),
        ({"channels": 3}, "channels: 3 does not go with. Add data.form=image"),
        ({"flip": True}, "flip: true does not go with"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        NaturalPatches(**arguments)
