"""Seeds, conditions and files of samples."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from genmodels.registry import ConfigError
from genmodels.sampling import (
    COLUMNS,
    conditions,
    default_batch_size,
    default_seeds,
    draw,
    draw_in_batches,
    parse_seeds,
    request,
    write_arrays,
    write_picture,
)


@pytest.fixture
def classy(fakes):
    dataset = fakes.Squares()
    return fakes.Classy(shape=dataset.shape, num_classes=3), dataset


@pytest.fixture
def points(fakes):
    dataset = fakes.Line()
    return fakes.Regression(shape=dataset.shape), dataset


# ---- seeds ---


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", [7]), ("0-3", [0, 1, 2, 3]), ("3,7, 20-22", [3, 7, 20, 21, 22]), ("5-5", [5]), ("2,2", [2, 2])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


BAD_SEEDS = ["", "a", "1,,2", "-3", "3-", "5-3", "1.5", "0-1-2", "٣", "1 2", "0x10", "9223372036854775808", "0-9999999"]


@pytest.mark.parametrize("text", BAD_SEEDS)
def test_what_are_no_seeds(text):
    with pytest.raises(ConfigError, match=r"^--seeds: '.*' is (no seed and no range like 0-63|out of range)"):
        parse_seeds(text)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 20)), min_size=1, max_size=5))
def test_ranges_are_what_they_say(parts):
    text = ",".join(f"{first}-{first + more}" for first, more in parts)
    assert parse_seeds(text) == [s for first, more in parts for s in range(first, first + more + 1)]


def test_default_seeds_fill_a_row_for_each_class(classy, points):
    assert default_seeds(*classy) == list(range(3 * COLUMNS))
    assert default_seeds(*points) == list(range(64))


# ---- conditions ---


def test_the_class_of_a_seed_is_a_function_of_the_seed(classy):
    every = conditions(*classy, list(range(60)))
    assert every.tolist() == [(seed // 8) % 3 for seed in range(60)]
    for seeds in ([17], [59, 3, 8], list(range(40, 60))):
        assert conditions(*classy, seeds).tolist() == [every[s] for s in seeds]
    assert conditions(*classy, [4, 50], 2).tolist() == [2, 2]


@pytest.mark.parametrize("chosen", [-1, 3, 99])
def test_a_class_out_of_range(classy, chosen):
    with pytest.raises(ConfigError, match=rf"--condition: class {chosen} is out of range; there are 0 … 2"):
        conditions(*classy, [0], chosen)


def test_a_class_for_a_model_that_takes_none(points):
    assert conditions(*points, [0, 1]) is None
    with pytest.raises(ConfigError, match="--condition: this model takes no class label"):
        conditions(*points, [0], 1)


@pytest.mark.parametrize("val", [5, 0])
def test_embeddings_come_from_validation_items_or_else_from_training(fakes, points, val):
    model, dataset = points[0], fakes.Line(items=7, val=val)
    for split in ("train", "val"):
        items = dataset.all(split)
        dataset.hold(split, items.replace(condition=items.x + 1))
    model.conditional, dataset.condition_shape = True, (2,)
    found = conditions(model, dataset, [0, 9])
    split, n = ("val", 5) if val else ("train", 7)
    assert torch.equal(found, dataset.all(split).condition[[0, 9 % n]])


# ---- drawing ---


def test_item_i_depends_on_seed_i_alone(classy):
    seeds = list(range(30))
    whole, _ = draw(*classy, seeds, {})
    for part in ([29], [4, 17, 3], seeds[10:20]):
        assert torch.equal(draw(*classy, part, {})[0], whole[part])
    assert torch.equal(draw(*classy, [4], {"contrast": 0.0})[0], torch.zeros(1, 1, 4, 4))


def test_batches_depend_on_the_number_of_seeds_alone(classy, monkeypatch):
    """Their sizes are written down: another rule would change the last bits of samples that people have."""
    assert [default_batch_size(n) for n in (1, 32, 33, 64, 80, 1024, 5000)] == [8, 8, 9, 16, 20, 256, 256]
    calls = []
    sample = classy[0].sample
    monkeypatch.setattr(
        classy[0], "sample", lambda seeds, **rest: (calls.append(list(seeds)), sample(seeds, **rest))[1]
    )
    x = draw_in_batches(*classy, list(range(20)), {}, 2)
    assert calls == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
    assert torch.equal(x, draw(*classy, list(range(20)), {}, 2)[0])
    calls.clear()
    draw_in_batches(*classy, list(range(20)), {}, batch_size=15)
    assert [len(seeds) for seeds in calls] == [15, 5]
    for size in (0, -1):
        with pytest.raises(ConfigError, match=f"--batch-size: at least 1 is needed, found {size}"):
            draw_in_batches(*classy, [0], {}, batch_size=size)


def test_a_model_without_samples_is_told(fakes):
    dataset = fakes.Line()
    with pytest.raises(ConfigError, match=r"Twice does not draw samples"):
        draw(fakes.Twice(shape=(2,)), dataset, [0], {})


# ---- files ---


def test_a_picture_holds_its_pixels_and_its_seeds(classy, tmp_path):
    dataset = classy[1]
    x = torch.zeros(10, 1, 4, 4)
    x[0, 0, 0, 0], x[1, 0, 3, 3], x[9] = 4.0, 2.0, 9.0  # white, grey, and beyond the range
    notes = request(list(range(10)), torch.arange(10) % 3, {"contrast": 1.0}, "ema-0.9", 12)
    path = write_picture(tmp_path / "00000012", x, dataset, notes)
    assert path == tmp_path / "00000012.png"
    with Image.open(path) as image:
        pixels, text = np.asarray(image), image.text
    zoom = 48 // 4
    assert pixels.shape == (zoom * (2 * 5 - 1), zoom * (8 * 5 - 1))  # 2 rows of 8, a margin between
    small = pixels[::zoom, ::zoom]
    assert (small[0, 0], small[0, 1], small[3, 8]) == (255, 0, 128) and small[0, 4] == 96 == small[4, 0]
    assert (small[5:9, 5:9] == 255).all()
    assert json.loads(text["seeds"]) == list(range(10)) and json.loads(text["condition"]) == [i % 3 for i in range(10)]
    assert json.loads(text["sample"]) == {"contrast": 1.0} and text["weights"] == "ema-0.9" and text["step"] == "12"


def test_continuous_images_use_the_range_of_the_data(fakes, classy, tmp_path):
    dataset = classy[1]
    dataset.levels = dataset.bin_width = None
    data = dataset.all("train")
    dataset.hold("train", data.replace(x=data.x / 4 - 0.5))  # from -0.5 to 0.5
    x = torch.tensor([-0.5, 0.0, 0.5, torch.nan]).reshape(4, 1, 1, 1).expand(4, 1, 4, 4)
    with Image.open(write_picture(tmp_path / "x", x, dataset, {})) as image:
        assert [int(v) for v in np.asarray(image)[0, :: 5 * 12]] == [0, 128, 255, 0]


def test_colour_pictures(fakes, classy, tmp_path):
    dataset = classy[1]
    dataset.shape, dataset.levels = (3, 4, 4), 256
    x = torch.tensor([10.0, 20.0, 30.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    with Image.open(write_picture(tmp_path / "x", x, dataset, {})) as image:
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (10, 20, 30)


def test_points_are_scattered_and_hold_their_seeds(points, tmp_path):
    x, condition = draw(*points, [0, 1, 2], {})
    x[2] = torch.nan
    path = write_picture(tmp_path / "a.b", x, points[1], request([0, 1, 2], condition, {}, "model", 3))
    with Image.open(path) as image:
        assert image.size == (960, 480) and json.loads(image.text["seeds"]) == [0, 1, 2]
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert path.name == "a.b.png"


def test_anything_else_is_arrays(points, tmp_path):
    dataset = points[1]
    dataset.shape = (5,)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    path = write_picture(tmp_path / "x", x, dataset, {"seeds": [4, 5, 6], "step": 2})
    with np.load(path) as found:
        assert np.array_equal(found["arr_0"], x.numpy())
        assert json.loads(str(found["notes"])) == {"seeds": [4, 5, 6], "step": 2}
    assert write_arrays(tmp_path / "y.npz", x, {}).exists() and path.suffix == ".npz"
