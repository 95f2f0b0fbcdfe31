"""How people hear and see sound, and what samples of it are drawn given."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from scipy.io import wavfile

from genmodels.data.external import External, from_tensors
from genmodels.data.tones import Tones
from genmodels.registry import ConfigError
from genmodels.sampling import conditions, default_seeds, request, write_picture, write_samples
from genmodels.sounds import spectrogram, write_sounds
from tests.contracts import families


@pytest.fixture(scope="module")
def data():
    from genmodels.data.dataset import Dataset
    from genmodels.registry import build, resolve

    mel = {"name": "log_mel", "bands": 8, "window": 128, "hop": 32}
    return build(Dataset, resolve(Dataset, {"name": "tones", "size": 30, "segment": 512, "condition": mel}, "data"))


@pytest.fixture
def model(data):
    return families.AudioFlow(shape=data.shape, condition_shape=data.condition_shape)


# ---- files ----


def test_sounds_are_written_under_their_seeds(tmp_path):
    x = Tones(size=3, segment=300).all("train").x
    assert write_sounds(tmp_path / "a", x, 8000, [4, 0, 12_345]) == ""
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["00000.wav", "00004.wav", "12345.wav"]
    assert write_sounds(tmp_path / "b", x[:1], 8000, [7]) == "" and (tmp_path / "b" / "007.wav").exists()
    rate, levels = wavfile.read(tmp_path / "a" / "00004.wav")
    assert rate == 8000 and np.abs(levels / 2**15 - x[0].double().numpy()).max() <= 2**-16


def test_clipping_is_said(tmp_path, data):
    x = torch.zeros(3, 512)
    x[0, :5], x[2, :3], x[1, 7] = 1.5, -2.0, 1.0
    path, remark = write_samples(tmp_path / "s", x, data, request([0, 1, 2], None, {}, "model", 3))
    assert remark == "8 of 1,536 amplitudes in 2 of 3 files were beyond [-1, 1] and are clipped"
    assert path == tmp_path / "s.png" and len(list((tmp_path / "s").iterdir())) == 3
    with Image.open(path) as image:
        assert image.text["clipped"] == remark and json.loads(image.text["seeds"]) == [0, 1, 2]
        assert image.text["weights"] == "model" and image.text["step"] == "3"
    plain = write_samples(tmp_path / "t", x / 4, data, request([0, 1, 2], None, {}, "model", 3))
    assert plain.remark == ""
    with Image.open(plain.path) as image:
        assert "clipped" not in image.text


@pytest.mark.parametrize("amplitude", [1.0, 0.1])
def test_a_sine_stands_at_its_level_and_frequency(amplitude):
    t = torch.arange(4000) / 8000
    levels, hop = spectrogram((amplitude * (2 * math.pi * 1000 * t).sin())[None], 8000)
    column = levels[0, :, levels.shape[2] // 2]
    assert column.amax().item() == pytest.approx(20 * math.log10(amplitude), abs=0.01)
    assert column.argmax() * 4000 / (len(column) - 1) == 1000 and levels.shape[2] * hop == pytest.approx(
        4000, abs=2 * hop
    )


@pytest.mark.parametrize(("n", "samples"), [(1, 20), (3, 700), (20, 16_000)])
@pytest.mark.slow_for("20-16000")
def test_pictures_of_any_number_of_sounds_are_light(tmp_path, n, samples):
    x = 0.3 * torch.randn(n, samples, generator=torch.Generator().manual_seed(0))  # noise makes the largest files
    dataset = from_tensors(x.repeat(3, 1), sample_rate=8000)
    path = write_picture(tmp_path / "x.y", x, dataset, {})
    assert path.name == "x.y.png" and path.stat().st_size < 200_000  # what a page of results takes in
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert len(np.unique(pixels)) > 20 and pixels.shape[1] == int(72 * (3.1 * min(n, 4) + 1.5))
    if n == 3:
        assert write_picture(tmp_path / "z", torch.full_like(x, torch.nan), dataset, {}).exists()


def test_colour_bars_keep_their_colours(tmp_path):
    """Also those of levels that no sound has."""
    dataset = from_tensors(torch.zeros(9, 4000), sample_rate=8000)
    x = 0.01 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    with Image.open(write_picture(tmp_path / "x", x, dataset, {})) as image:
        found = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).astype(float)
    wanted = 255 * colormaps["magma"](np.linspace(0, 1, 17))[:, :3]
    assert np.abs(found - wanted[:, None]).max(-1).min(1).max() < 16


def test_sound_given_from_python_is_heard_without_its_items(tmp_path):
    known = External.known_by(from_tensors(torch.zeros(20, 64), sample_rate=8000).facts())
    written = write_samples(tmp_path / "s", torch.zeros(2, 64), known, {"seeds": [0, 1]})
    assert written.path.suffix == ".png" and (tmp_path / "s" / "001.wav").exists()
    plain = External.known_by(from_tensors(torch.zeros(20, 64)).facts())
    assert write_samples(tmp_path / "p", torch.zeros(2, 64), plain, {"seeds": [0, 1]}).path.suffix == ".npz"


# ---- conditions ----


def test_few_sounds_are_drawn_by_default(model, data):
    assert default_seeds(model, data) == list(range(8))


@pytest.mark.parametrize(("chosen", "split"), [(None, "val"), ("val", "val"), ("test", "test"), ("train", "train")])
def test_conditions_come_from_the_items_of_a_split(model, data, chosen, split):
    items = data.all(split).condition
    seeds = [4, 0, 31]
    assert torch.equal(conditions(model, data, seeds, chosen), items[[s % len(items) for s in seeds]])


def test_all_seeds_may_take_one_item(model, data):
    found = conditions(model, data, [4, 0, 31], "train:7")
    assert torch.equal(found, data.all("train").condition[[7, 7, 7]])


def test_conditions_come_from_a_file(model, data, tmp_path):
    x = Tones(size=3, segment=512, seed=5).all("train").x
    write_sounds(tmp_path, x.reshape(1, -1), 8000, [0])
    found = conditions(model, data, [1, 0, 5], str(tmp_path / "000.wav"))
    torch.testing.assert_close(found, data.features(x)[[1, 0, 2]], atol=0.05, rtol=0)  # 16 bits against float32
    with pytest.raises(ConfigError, match="has 16,000 samples a second"):
        write_sounds(tmp_path, x, 16_000, [0, 1, 2])
        conditions(model, data, [0], str(tmp_path / "001.wav"))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("none.wav", "there is no file 'none.wav', and it is neither a class nor one of train, val, test"),
        ("test:3", "the split 'test' has items 0 … 2"),
        ("test:x", "the split 'test' has items 0 … 2"),
        ("test:", "the split 'test' has items 0 … 2"),
        ("3", "this model takes no class label"),
        (3, "this model takes no class label"),
    ],
)
def test_what_is_no_condition(model, data, chosen, message):
    with pytest.raises(ConfigError, match=f"--condition.*{message}"):
        conditions(model, data, [0], chosen)


def test_empty_splits_and_models_without_conditions(model, data, fakes):
    bare = from_tensors(torch.zeros(20, 512), condition=torch.zeros(20, 8, 17), val=0.0, test=0.1)
    assert conditions(model, bare, [0]).shape == (1, 8, 17)
    with pytest.raises(ConfigError, match="the split 'val' has none"):
        conditions(model, bare, [0], "val")
    with pytest.raises(ConfigError, match="the items of its data have none"):
        conditions(model, from_tensors(torch.zeros(20, 512)), [0], "test")
    with pytest.raises(ConfigError, match="makes no conditions from files"):
        conditions(model, bare, [0], __file__)
    line = fakes.Line()
    with pytest.raises(ConfigError, match="--condition test: this model takes no condition"):
        conditions(fakes.Regression(shape=line.shape), line, [0], "test")


def test_classes_may_come_from_items_too(fakes):
    squares = fakes.Squares()
    classy = fakes.Classy(shape=squares.shape, num_classes=3)
    assert conditions(classy, squares, [4, 5], "2").tolist() == [2, 2]
    assert conditions(classy, squares, [4, 5, 30], "test").tolist() == squares.all("test").condition[[4, 5, 0]].tolist()
