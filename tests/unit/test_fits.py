"""FITS files written byte by byte: which image is read, how numbers are stored, and what is refused."""

import numpy as np
import pytest

from genmodels.data import fits
from genmodels.registry import ConfigError
from tests.data_files import fits_card, fits_unit

VALUES = np.arange(12.0).reshape(3, 4)


def table(**cards: object) -> bytes:
    """An extension with a binary table of 5 rows of 600 bytes, and 3000 bytes of heap."""
    head = {"BITPIX": 8, "NAXIS": 2, "NAXIS1": 600, "NAXIS2": 5, "PCOUNT": 3000, "GCOUNT": 1, "TFIELDS": 1} | cards
    lines = [fits_card("XTENSION", "BINTABLE"), *(fits_card(key, value) for key, value in head.items())]
    header = b"".join(lines) + b"END".ljust(80)
    return header + b" " * (-len(header) % 2880) + b"\x07" * 6000 + bytes(3 * 2880 - 6000)


def read(tmp_path, content: bytes):
    path = tmp_path / "map.fits"
    path.write_bytes(content)
    try:
        shape = fits.image_shape(path)
    except ConfigError as error:
        with pytest.raises(ConfigError) as same:
            fits.read_image(path)
        assert str(same.value) == str(error)
        raise
    values = fits.read_image(path)
    assert values.shape == shape and values.dtype == np.float64
    return values


@pytest.mark.parametrize("bits", [8, 16, 32, 64, -32, -64])
def test_every_kind_of_number_is_read(tmp_path, bits):
    values = VALUES + (0.5 if bits < 0 else 0) - (3 if bits != 8 else 0)
    assert np.array_equal(read(tmp_path, fits_unit(values, bits)), values)


def test_whole_numbers_are_scaled_and_blanks_are_nan(tmp_path):
    """BZERO = 32768 stores unsigned 16-bit numbers; a scale may be written with Fortran's D."""
    stored = np.array([[-32768, 32767, 0], [5, -7, 1]])
    unsigned = read(tmp_path, fits_unit(stored, 16, BZERO=32768, BSCALE=1.0))
    assert np.array_equal(unsigned, stored + 32768.0)
    scaled = read(tmp_path, fits_unit(stored, 16, BSCALE=0.25, BZERO=-1.5, BLANK=-7))
    expected = stored * 0.25 - 1.5
    expected[1, 1] = np.nan
    np.testing.assert_array_equal(scaled, expected)
    content = fits_unit(stored, 32, BSCALE="x").replace(fits_card("BSCALE", "x"), b"BSCALE  = 2.5D-1 / unit".ljust(80))
    assert np.array_equal(read(tmp_path, content), stored * 0.25)
    with pytest.raises(ConfigError, match=r"BSCALE = 'x'.*must be numbers"):
        fits.read_image(write(tmp_path, fits_unit(stored, 16, BSCALE="x")))
    real = read(tmp_path, fits_unit(VALUES, -32, BLANK=3))
    assert np.array_equal(real, VALUES)  # BLANK has no meaning for reals


def write(tmp_path, content: bytes):
    path = tmp_path / "other.fits"
    path.write_bytes(content)
    return path


def test_the_first_image_is_read_behind_empty_units_and_tables(tmp_path):
    image, later = (fits_unit(VALUES + k, -64, first=False, EXTNAME="it's / ok") for k in (0, 1))
    assert np.array_equal(read(tmp_path, fits_unit(None) + table() + image + later), VALUES)
    assert np.array_equal(read(tmp_path, fits_unit(VALUES + 2) + image), VALUES + 2)
    assert np.array_equal(read(tmp_path, fits_unit(None) + table(GCOUNT=1) + image + b"rubbish"), VALUES)


def test_a_long_header_and_axes_of_length_one(tmp_path):
    many = {f"KEY{k}": k for k in range(60)}  # two blocks of cards
    assert np.array_equal(read(tmp_path, fits_unit(VALUES[None, None], -32, **many)), VALUES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no FITS file.*SIMPLE"),
        (b"\x93NUMPY" + bytes(4000), "is no FITS file"),
        (fits_unit(VALUES)[:1000], r"truncated in a header \(1,000 of 2,880 bytes\). Copy it again"),
        (fits_unit(None), "holds no image.*Write the map into the primary unit"),
        (fits_unit(None) + table(), "holds no image"),
        (fits_unit(None) + table(ZIMAGE=True), "compressed image.*funpack"),
        (fits_unit(VALUES[0]), r"shape \[4\], but a map has two axes"),
        (fits_unit(np.zeros((2, 3, 4))), r"shape \[2, 3, 4\].*Write each plane as a file"),
        (fits_unit(np.zeros((0, 4))), r"shape \[0, 4\]"),
        (fits_unit(VALUES).replace(b"NAXIS1  =", b"NAXISX  ="), "NAXIS1 must be a whole number.*found None"),
        (fits_unit(VALUES).replace(fits_card("NAXIS1", 4), fits_card("NAXIS1", -4)), "NAXIS1 must be.*found -4"),
    ],
)
def test_what_is_no_map_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "map.fits"))


def test_damage_that_headers_do_not_show_is_found_when_values_are_read(tmp_path):
    big = np.zeros((60, 50))
    with pytest.raises(ConfigError, match=r"truncated: its image of \[60, 50\] takes 12,000 bytes, but 8,320 are"):
        fits.read_image(write(tmp_path, fits_unit(big)[: 2880 + 8320]))
    odd = fits_unit(VALUES).replace(fits_card("BITPIX", -32), fits_card("BITPIX", 24))
    with pytest.raises(ConfigError, match="BITPIX = 24; 8, 16, 32, 64, -32, -64 are defined"):
        fits.read_image(write(tmp_path, odd))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        fits.read_image(tmp_path)
