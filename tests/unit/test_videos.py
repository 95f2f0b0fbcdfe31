"""Videos as files: exact round trips of grey levels, what is refused on the way back, pictures of samples."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels.data.moving_digits import MovingDigits
from genmodels.metrics.features import FeatureExtractor
from genmodels.pictures import from_bytes, to_bytes
from genmodels.registry import build, resolve
from genmodels.rng import generator
from genmodels.sampling import default_seeds, request, write_picture
from genmodels.videos import duration, read_video, write_frames, write_gif


@pytest.fixture(scope="module")
def data():
    return MovingDigits(copies=1)


@pytest.fixture
def colours(data):
    """Videos of 8-bit colours, as wide as they are high no longer."""
    other = MovingDigits(copies=1)
    other.shape, other.levels, other.frame_rate = (3, 4, 6, 5), 256, 25.0
    return other


def test_levels_survive_a_gif_and_a_folder_of_frames(data, tmp_path):
    noise = torch.randint(0, 17, (1, *data.shape), generator=generator("levels")).float()
    still = noise[:, :, :1].expand_as(noise)  # stored as one frame
    halting = noise[:, :, [0, 0, 1, 1, 1, 1, 2, 0]]
    rare = torch.zeros_like(noise)
    rare[0, 0, 3, 15, 0], rare[0, 0, 3, 0, 15] = 16.0, 1.0
    for k, x in enumerate((data.take("test", torch.tensor([3])).x, noise, still, halting, rare)):
        assert torch.equal(read_video(write_gif(tmp_path / f"{k}.gif", x, data), data), x)
        assert torch.equal(read_video(write_frames(tmp_path / f"{k}", x[0], data), data), x)


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_every_level_has_a_grey_of_its_own(data, levels):
    other = MovingDigits(copies=1)
    other.levels, other.bin_width = levels, 0.5
    x = torch.arange(levels) * 0.5
    assert torch.equal(from_bytes(to_bytes(x, other), other), x)
    assert to_bytes(torch.tensor([-3.0, levels, torch.nan]), other).tolist() == [0, 255, 0]


def test_a_gif_plays_at_its_rate_again_and_again(data, tmp_path):
    x = data.take("test", torch.arange(11)).x
    with Image.open(write_gif(tmp_path / "x.gif", x, data)) as image:
        assert image.n_frames == 8 and image.info["loop"] == 0 and image.size == (3 * (8 * 17 - 1), 3 * (2 * 17 - 1))
        for frame in range(8):
            image.seek(frame)
            assert image.info["duration"] == 120  # of 125 ms the nearest hundredths of a second
            pixels = np.asarray(image.convert("L"))[::3, ::3]
            for k in (0, 7, 10):  # each in its tile
                i, j = divmod(k, 8)
                tile = pixels[17 * i : 17 * i + 16, 17 * j : 17 * j + 16]
                assert np.array_equal(tile, (x[k, 0, frame] * 255 / 16).round().numpy())
            assert (pixels[16] == 96).all() and (pixels[17:, -1] == 96).all()
    assert [duration(rate) for rate in (25.0, 8.0, 1000.0, 0.5)] == [40, 120, 20, 2000]
    with pytest.raises(ValueError, match="positive number of frames a second, found 0"):
        duration(0.0)


def test_colours_survive(colours, tmp_path):
    """A frame of 30 pixels has at most 30 colours."""
    x = torch.randint(0, 256, (1, *colours.shape), generator=generator("colours")).float()
    assert torch.equal(read_video(write_frames(tmp_path / "frames", x[0], colours), colours), x)
    assert torch.equal(read_video(write_gif(tmp_path / "x.gif", x, colours), colours), x)


def test_other_sizes_are_resized_only_if_asked(data, tmp_path):
    other = MovingDigits(copies=1, size=18)
    path = write_gif(tmp_path / "x.gif", other.take("test", torch.tensor([0])).x, other)
    with pytest.raises(ValueError, match=r"x\.gif: frame 0 has 36x36 pixels, 16x16 are needed.*\(resize\)"):
        read_video(path, data)
    found = read_video(path, data, resize=True)
    assert found.shape == (1, *data.shape) and torch.equal(found, found.round())
    # smooth: a frame keeps its mean level, to the tenth that levels and edges of digits at the wall take
    expected = other.take("test", torch.tensor([0])).x.mean((1, 3, 4))
    torch.testing.assert_close(found.mean((1, 3, 4)), expected, rtol=0.1, atol=0)
    wide = write_frames(tmp_path / "wide", data.take("test", torch.tensor([0])).x[0], data)
    for frame in wide.iterdir():  # between two red sides, which a crop to the middle leaves out
        sheet = Image.new("RGB", (24, 16), (255, 0, 0))
        sheet.paste(Image.open(frame).convert("RGB"), (4, 0))
        sheet.save(frame)
    assert torch.equal(read_video(wide, data, resize=True), data.take("test", torch.tensor([0])).x)
    twice = read_video(write_gif(tmp_path / "y.gif", data.take("test", torch.tensor([0])).x, data), data)
    assert torch.equal(twice, data.take("test", torch.tensor([0])).x)  # squares of pixels are no other size


def test_what_is_no_such_video_is_refused(data, colours, tmp_path):
    x = data.take("test", torch.tensor([0])).x
    long = MovingDigits(copies=1, frames=11)
    gif = write_gif(tmp_path / "long.gif", long.take("test", torch.tensor([0])).x, long)
    (tmp_path / "text.gif").write_text("GIF89a, nearly")
    (tmp_path / "empty").mkdir()
    ragged = write_frames(tmp_path / "ragged", x[0], data)
    Image.new("L", (16, 15)).save(ragged / "005.png")
    red = write_frames(tmp_path / "red", x[0], data)
    Image.new("RGB", (16, 16), (255, 0, 0)).save(red / "002.png")
    fine = write_frames(tmp_path / "fine", x[0], data)
    for frame in fine.iterdir():
        Image.open(frame).resize((32, 32), Image.Resampling.NEAREST).save(frame)
    assert torch.equal(read_video(fine, data), x)
    speck = Image.open(fine / "004.png")
    speck.putpixel((31, 0), 77)
    speck.save(fine / "004.png")
    clear = write_frames(tmp_path / "clear", x[0], data)
    Image.new("RGBA", (16, 16), (9, 9, 9, 100)).save(clear / "002.png")
    deep = write_frames(tmp_path / "deep", x[0], data)
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(deep / "002.png")
    for path, message in (
        (gif, "11 frames were found, 8 are needed. Cut the video"),
        (tmp_path / "none.gif", "there is no such file or folder"),
        (tmp_path / "text.gif", "no picture that can be read"),
        (tmp_path / "empty", "there are no pictures in this folder"),
        (ragged, "frame 5 has 15x16 pixels, 16x16 are needed"),
        (fine, "frame 4 has 32x32 pixels.*in squares of one colour"),
        (red, "the frames have colours, and the data are grey"),
        (clear, "parts of the picture are transparent"),
        (deep, "8 bits a channel are needed, found Pillow's mode I;16"),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            read_video(path, data)


def test_what_is_not_of_the_data_is_not_written(data, fakes, tmp_path):
    with pytest.raises(ValueError, match=r"videos \[N, 1, 8, 16, 16\] are needed, found \[2, 1, 7, 16, 16\]"):
        write_gif(tmp_path / "x.gif", torch.zeros(2, 1, 7, 16, 16), data)
    with pytest.raises(ValueError, match=r"one video \[1, 8, 16, 16\] is needed, found \[1, 1, 8, 16, 16\]"):
        write_frames(tmp_path / "x", torch.zeros(1, 1, 8, 16, 16), data)
    for act in (
        lambda d: write_gif(tmp_path / "x.gif", torch.zeros(1, *d.shape), d),
        lambda d: read_video(tmp_path, d),
    ):
        with pytest.raises(ValueError, match=r"items of shape \[1, 4, 4\], are no videos"):
            act(fakes.Squares())
    assert list(tmp_path.iterdir()) == []


def test_samples_are_a_sheet_with_a_row_for_each_and_a_gif_beside_it(data, fakes, tmp_path):
    x = data.take("test", torch.arange(3)).x
    path = write_picture(tmp_path / "a.b", x, data, request([0, 8, 16], torch.arange(3), {}, "model", 3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b.gif", "a.b.png"] and path.name == "a.b.png"
    with Image.open(path) as image:
        assert image.text["seeds"] == "[0, 8, 16]"
        sheet = np.asarray(image)[::3, ::3]
    assert sheet.shape == (3 * 17 - 1, 8 * 17 - 1)
    for k in range(3):
        for frame in range(8):
            tile = sheet[17 * k : 17 * k + 16, 17 * frame : 17 * frame + 16]
            assert np.array_equal(tile, (x[k, 0, frame] * 255 / 16).round().numpy())
    classy = fakes.Classy(shape=data.shape, num_classes=10)
    assert default_seeds(classy, data) == list(range(0, 80, 8))  # one of each class: seed // 8
    assert default_seeds(fakes.Regression(shape=(2,)), data) == list(range(8))


def test_four_axes_without_a_rate_are_arrays(data, tmp_path):
    volume = MovingDigits(copies=1)
    volume.frame_rate = None
    assert write_picture(tmp_path / "x", torch.zeros(2, *data.shape), volume, {}).suffix == ".npz"
    volume.frame_rate, volume.shape = 8.0, (2, 4, 8, 8)  # nor are two channels a picture
    assert write_picture(tmp_path / "y", torch.zeros(2, 2, 4, 8, 8), volume, {}).suffix == ".npz"


def test_features_of_images_refuse_videos(data):
    for node, message in (
        ({"name": "digits"}, r"items have shape \[1, 8, 16, 16\].*8x8 images"),
        ({"name": "dinov2", "path": "weights"}, r"items have shape \[1, 8, 16, 16\]; images"),
    ):
        extractor = build(FeatureExtractor, resolve(FeatureExtractor, node, "features"))
        with pytest.raises(ValueError, match=f"features '{node['name']}'.*{message}"):
            extractor.start(data, torch.device("cpu"))
            extractor(data.take("test", torch.tensor([0])).x)
