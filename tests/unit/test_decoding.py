"""Image files of every kind become the levels that they mean, and damaged ones are named."""

import numpy as np
import pytest
from PIL import Image

from genmodels.data.decoding import Decoder, inspect
from genmodels.registry import ConfigError
from tests.data_files import picture


def decoder(**options) -> Decoder:
    defaults = {"size": None, "channels": 3, "resize": "crop", "filter": "box", "upscale": False, "background": 255}
    return Decoder(**{**defaults, **options})


def colours(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 0, 1)


def test_colour_and_grey_files_keep_their_levels(tmp_path):
    rgb, grey = picture(0, 6, 9), picture(1, 6, 9, 1)[:, :, 0]
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(grey).save(tmp_path / "grey.bmp")
    np.testing.assert_array_equal(decoder()(tmp_path / "rgb.png"), colours(rgb))
    np.testing.assert_array_equal(decoder(channels=1)(tmp_path / "grey.bmp"), grey[None])
    np.testing.assert_array_equal(decoder()(tmp_path / "grey.bmp"), np.stack([grey] * 3))
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decoder(channels=1)(tmp_path / "rgb.png")[0] - luma).max() <= 0.51  # rounded, weights to 1/65536


def test_palettes_black_and_white_and_other_colour_spaces(tmp_path):
    flat = np.zeros((4, 4, 3), np.uint8)
    flat[:2], flat[2:] = (250, 10, 30), (0, 90, 200)
    image = Image.fromarray(flat)
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    image.convert("YCbCr").save(tmp_path / "ycbcr.tif")
    np.testing.assert_array_equal(decoder()(tmp_path / "palette.png"), colours(flat))
    np.testing.assert_array_equal(decoder()(tmp_path / "cmyk.tif"), colours(flat))
    assert np.abs(decoder()(tmp_path / "ycbcr.tif").astype(int) - colours(flat)).max() <= 2  # rounded twice
    for name in ("palette.png", "cmyk.tif", "ycbcr.tif"):
        luma = decoder(channels=1)(tmp_path / name)
        assert np.abs(luma - (flat @ np.array([0.299, 0.587, 0.114]))[None]).max() <= 2
    with Image.open(tmp_path / "ycbcr.tif") as kept:
        assert kept.mode == "YCbCr"
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert decoder(channels=1)(tmp_path / "bits.png").tolist() == [[[255, 0]]]


def test_lab_files_become_grey_and_colour(tmp_path):
    Image.new("LAB", (3, 2), (255, 128, 128)).save(tmp_path / "lab.tif")  # L* = 100, a* = b* = 0: white
    assert decoder()(tmp_path / "lab.tif").min() >= 250 and decoder(channels=1)(tmp_path / "lab.tif").min() >= 250


@pytest.mark.parametrize("background", [0, 255])
def test_transparent_pixels_are_laid_over_the_background(tmp_path, background):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., :3] = (200, 100, 50)
    rgba[..., 3] = [[0, 255], [128, 64]]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * background
    assert np.abs(decoder(background=background)(tmp_path / "a.png") - colours(expected)).max() <= 1  # integer blending
    Image.fromarray(rgba[..., [0, 3]]).save(tmp_path / "la.png")
    grey = alpha[..., 0] * 200 + (1 - alpha[..., 0]) * background
    assert np.abs(decoder(background=background, channels=1)(tmp_path / "la.png") - grey).max() <= 1
    paletted = Image.fromarray(rgba[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE, colors=1)
    paletted.save(tmp_path / "p.png", transparency=0)
    assert (decoder(background=background)(tmp_path / "p.png") == background).all()
    Image.fromarray(rgba[..., :3]).save(tmp_path / "rgb.png", transparency=(200, 100, 50))
    assert (decoder(background=background)(tmp_path / "rgb.png") == background).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm", "big_endian.tif"])
def test_sixteen_bits_become_eight(tmp_path, name):
    values = np.array([[0, 128, 129, 257], [300, 32896, 65406, 65535]], np.uint16)
    image = Image.fromarray(values)
    if name == "deep.pgm":
        (tmp_path / name).write_bytes(b"P5 4 2 65535 " + values.astype(">u2").tobytes())
    elif name == "big_endian.tif":
        Image.frombytes("I;16B", (4, 2), values.astype(">u2").tobytes()).save(tmp_path / name)
    else:
        image.save(tmp_path / name)
    expected = [[0, 0, 1, 1], [1, 128, 254, 255]]  # v/257, rounded
    assert decoder(channels=1)(tmp_path / name).tolist() == [expected]
    assert decoder()(tmp_path / name).tolist() == [expected] * 3


@pytest.mark.parametrize("values", [np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70000, np.int32)])
def test_values_without_a_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ConfigError, match=r"x\.tif holds .* values from .*whose black and white are not known"):
        decoder()(tmp_path / "x.tif")


UPRIGHT = {  # what the stored image means, EXIF 2.3, tag 0x0112
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_exif_orientation_is_applied(tmp_path, orientation, suffix):
    path = tmp_path / f"x{suffix}"
    smooth = np.add.outer(np.arange(16) * 9, np.arange(24) * 4).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth).save(path, exif=exif, **({"quality": 98} if suffix == ".jpg" else {}))
    expected = UPRIGHT[orientation](smooth).astype(int)
    assert np.abs(decoder(channels=1)(path)[0] - expected).max() <= (3 if suffix == ".jpg" else 0)
    assert inspect(path) == expected.shape[::-1] == ((16, 24) if orientation >= 5 else (24, 16))


@pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 8)])
def test_crop_is_the_centre_of_the_scaled_image(tmp_path, height, width):
    array = picture(3, height, width)
    Image.fromarray(array).save(tmp_path / "x.png")
    square = array[(height - 8) // 2 :, (width - 8) // 2 :][:8, :8]
    blocks = square.reshape(4, 2, 4, 2, 3).astype(float).mean((1, 3))
    assert np.abs(decoder(size=4)(tmp_path / "x.png") - colours(blocks)).max() <= 1  # rounded twice
    np.testing.assert_array_equal(decoder(size=8)(tmp_path / "x.png"), colours(square))


def test_crop_between_pixels_is_centred(tmp_path):
    """The central columns of 16 are 3.5 … 12.5; an antialiased ramp keeps its values at the new centres."""
    Image.fromarray(np.add.outer(np.arange(9), np.arange(16) * 10).astype(np.uint8)).save(tmp_path / "x.png")
    found = decoder(size=3, channels=1, filter="bilinear")(tmp_path / "x.png")[0].astype(float)
    assert np.abs(found - np.add.outer([1, 4, 7], [45, 75, 105])).max() <= 1


def test_squash_and_pad(tmp_path):
    array = picture(4, 4, 8)
    Image.fromarray(array).save(tmp_path / "x.png")
    squashed = array.reshape(2, 2, 2, 4, 3).astype(float).mean((1, 3))
    assert np.abs(decoder(size=2, resize="squash")(tmp_path / "x.png") - colours(squashed)).max() <= 1  # rounded twice
    padded = decoder(size=4, resize="pad", background=7)(tmp_path / "x.png")
    scaled = array.reshape(2, 2, 4, 2, 3).astype(float).mean((1, 3))
    assert (padded[:, [0, 3]] == 7).all() and np.abs(padded[:, 1:3] - colours(scaled)).max() <= 1
    grey = decoder(size=4, resize="pad", background=7, channels=1)(tmp_path / "x.png")
    assert (grey[:, [0, 3]] == 7).all()


def test_the_filter_is_the_chosen_one(tmp_path):
    Image.fromarray(picture(5, 16, 16)).save(tmp_path / "x.png")
    found = {name: decoder(size=5, filter=name)(tmp_path / "x.png").tobytes() for name in ("nearest", "box", "lanczos")}
    assert len(set(found.values())) == 3
    with Image.open(tmp_path / "x.png") as image:
        lanczos = np.asarray(image.resize((5, 5), Image.Resampling.LANCZOS))
    assert found["lanczos"] == np.ascontiguousarray(colours(lanczos)).tobytes()


@pytest.mark.parametrize(
    ("resize", "size", "fits"),
    [
        ("crop", 6, True),
        ("crop", 7, False),
        ("squash", 7, False),
        ("pad", 9, True),
        ("pad", 10, False),
        ("none", 6, False),
    ],
)
def test_small_images_are_enlarged_only_if_allowed(tmp_path, resize, size, fits):
    Image.fromarray(picture(6, 6, 9)).save(tmp_path / "x.png")
    if fits:
        assert decoder(size=size, resize=resize)(tmp_path / "x.png").shape == (3, size, size)
        return
    words = "data.resize is 'none'" if resize == "none" else "data.upscale=true"
    with pytest.raises(ConfigError, match=rf"x\.png is 9 x 6 pixels.*{words}"):
        decoder(size=size, resize=resize)(tmp_path / "x.png")
    if resize != "none":
        assert decoder(size=size, resize=resize, upscale=True)(tmp_path / "x.png").shape == (3, size, size)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (50, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert (decoder(channels=1)(tmp_path / "x.gif") == 50).all()


# ---- damage ----


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_cut_files_are_found_from_their_end(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(picture(7, 64, 64)).save(path)
    whole = path.read_bytes()
    assert inspect(path) == (64, 64)
    path.write_bytes(whole + b"junk")
    assert inspect(path) == (64, 64)
    path.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=rf"x\{suffix} cannot be decoded: .*cut short or damaged; replace it"):
        inspect(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".gif", ".webp", ".ppm"])
def test_damage_is_named_when_a_file_is_decoded(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(picture(8, 64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(ConfigError, match=rf"x\{suffix} (cannot be decoded|is no image)"):
        decoder()(path)


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "the file is empty"), (b"<html>", "the file begins with b'<html>'")]
)
def test_files_that_are_no_images(tmp_path, content, what):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"x\.png is no image that Pillow can read: {what}"):
        inspect(tmp_path / "x.png")


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "x.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ConfigError, match=r"x\.png cannot be read: No such file"):
        inspect(tmp_path / "x.png")


def test_images_too_large_to_be_meant(tmp_path, monkeypatch):
    Image.fromarray(picture(9, 64, 64)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        ConfigError,
        match=r"x\.png is too large to be decoded: Image size \(4096 pixels\) exceeds limit of 2000 pixels\. Make it",
    ):
        inspect(tmp_path / "x.png")


def test_illegible_metadata_do_not_matter(tmp_path):
    Image.fromarray(picture(10)).save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xffnonsense")
    assert decoder()(tmp_path / "x.png").shape == (3, 8, 8)


def test_many_files_come_in_order(tmp_path):
    paths = [tmp_path / f"{k}.png" for k in range(20)]
    for k, path in enumerate(paths):
        Image.fromarray(picture(k)).save(path)
    found = list(decoder().many(paths))
    assert all(np.array_equal(image, colours(picture(k))) for k, image in enumerate(found)) and len(found) == 20
    assert list(decoder().many([])) == []
