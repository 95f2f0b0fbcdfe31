"""Images in FITS files, the format of astronomy: the part of it that maps of one plane need."""

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..registry import ConfigError

SUFFIXES = (".fits", ".fit", ".fts")
BLOCK, CARD = 2880, 80  # bytes of a block and of a line of a header
KINDS = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}

Header = dict[str, Any]


class _Damaged(Exception):
    """What is wrong with a file, and how to mend it."""


def read_image(path: Path) -> np.ndarray:
    """[H, W] float64: the first image of a file, of the primary unit or else of the first extension that has one.

    Values are BZERO + BSCALE · stored; integers that BLANK marks are NaN. Axes of length 1 beyond the second are
    dropped.

    Raises:
        ConfigError: naming the file, if it is no FITS file, is truncated, holds no image, or one of other than two
            axes.
    Source: Pence et al. 2010 (Definition of the Flexible Image Transport System), sections 3, 4 and 7.1.
    """
    try:
        with path.open("rb") as file:
            header = _first_image(file)
            return _values(file, header)
    except _Damaged as error:
        raise ConfigError(f"{path} {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error


def image_shape(path: Path) -> tuple[int, int]:
    """Height and width of the first image of a file, from the headers alone.

    Raises:
        ConfigError: as `read_image`, but for what is wrong with the data.
    """
    try:
        with path.open("rb") as file:
            return _plane(_axes(_first_image(file)))
    except _Damaged as error:
        raise ConfigError(f"{path} {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error


def _first_image(file: BinaryIO) -> Header:
    """The header of the first unit with an image; the file stands at its data."""
    header = _header(file, primary=True)
    compressed = False
    while header is not None:
        image = header.get("XTENSION", "IMAGE").strip() == "IMAGE"
        if image and _axes(header):
            return header
        compressed = compressed or header.get("ZIMAGE") is True
        file.seek(_padded(_data_bytes(header)), 1)
        header = _header(file, primary=False)
    if compressed:
        raise _Damaged("holds a compressed image in a table. Unpack it first: funpack FILE.")
    raise _Damaged("holds no image: every unit is empty or a table. Write the map into the primary unit.")


def _header(file: BinaryIO, primary: bool) -> Header | None:
    """The values of a header by keyword, as far as they are numbers, logical or text; None at the end of the file."""
    found: Header = {}
    while True:
        block = file.read(BLOCK)
        if primary and not found and not block.startswith(b"SIMPLE  ="):
            raise _Damaged("is no FITS file: it does not begin with 'SIMPLE  ='. Name a file of FITS images.")
        if not primary and not found and not block.startswith(b"XTENSION="):
            return None  # nothing, or records that the standard lets follow the last unit
        if len(block) < BLOCK:
            raise _Damaged(f"is truncated in a header ({len(block):,} of {BLOCK:,} bytes). Copy it again.")
        for k in range(0, BLOCK, CARD):
            card = block[k : k + CARD].decode("ascii", "replace")
            if card.rstrip() == "END":
                return found
            if card[8:10] == "= ":
                found[card[:8].rstrip()] = _value(card[10:])


def _value(text: str) -> Any:
    """A value before its comment: text in quotes, T or F, a whole or a real number; None for anything else."""
    text = text.strip()
    if text.startswith("'"):
        return text[1:].split("'")[0].rstrip()
    text = text.split("/")[0].strip()
    if text in ("T", "F"):
        return text == "T"
    for kind in (int, float):
        try:
            return kind(text.replace("D", "E"))
        except ValueError:
            continue
    return None


def _whole(header: Header, key: str, default: int | None = None) -> int:
    value = header.get(key, default)
    if type(value) is not int or (key.startswith("NAXIS") and value < 0):
        raise _Damaged(f"has a damaged header: {key} must be a whole number, found {value!r}. Write the file again.")
    return value


def _axes(header: Header) -> list[int]:
    """The lengths of the axes in the order of numpy, the fastest last."""
    return [_whole(header, f"NAXIS{k}") for k in range(_whole(header, "NAXIS"), 0, -1)]


def _data_bytes(header: Header) -> int:
    axes = _axes(header)
    if not axes:
        return 0
    extra = _whole(header, "PCOUNT", 0) if "XTENSION" in header else 0
    return abs(_whole(header, "BITPIX")) // 8 * _whole(header, "GCOUNT", 1) * (extra + math.prod(axes))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _plane(axes: list[int]) -> tuple[int, int]:
    shape = axes
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or 0 in shape:
        raise _Damaged(
            f"holds an array of shape {axes}, but a map has two axes [height, width]. Write each plane as a file of "
            "its own, or all as one .npy stack [N, height, width]."
        )
    return shape[0], shape[1]


def _values(file: BinaryIO, header: Header) -> np.ndarray:
    shape, bits = _plane(_axes(header)), _whole(header, "BITPIX")
    if bits not in KINDS:
        raise _Damaged(f"has BITPIX = {bits}; {', '.join(map(str, KINDS))} are defined. Write the file again.")
    kind = np.dtype(KINDS[bits])
    content = file.read(min(math.prod(shape) * kind.itemsize, Path(file.name).stat().st_size))
    if len(content) < math.prod(shape) * kind.itemsize:
        raise _Damaged(
            f"is truncated: its image of {list(shape)} takes {math.prod(shape) * kind.itemsize:,} bytes, but "
            f"{len(content):,} are there. Copy it again."
        )
    stored = np.frombuffer(content, kind).reshape(shape)
    scale, zero = (header.get(key, default) for key, default in (("BSCALE", 1.0), ("BZERO", 0.0)))
    if not all(isinstance(number, int | float) for number in (scale, zero)):
        raise _Damaged(f"has a damaged header: BSCALE = {scale!r}, BZERO = {zero!r} must be numbers.")
    values = stored.astype(np.float64) * scale + zero
    if bits > 0 and type(header.get("BLANK")) is int:
        values[stored == header["BLANK"]] = np.nan
    return values
