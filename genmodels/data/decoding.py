"""Image files as arrays of one shape: any file that Pillow reads, and errors that name the file."""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..registry import ConfigError

Picture = Any  # a PIL.Image.Image; Pillow is imported where it is used
Resize = Literal["crop", "pad", "squash", "none"]
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
ENDINGS = {"PNG": b"IEND\xaeB\x60\x82", "JPEG": b"\xff\xd9"}  # a file that lacks its own is decoded to be sure
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}  # what undoes each EXIF orientation
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error)


@dataclass(frozen=True)
class Decoder:
    """How a file becomes an array [channels, height, width] uint8.

    Args:
        size: side of the square that is wanted; None to keep the file's size.
        channels: 1 for grey (BT.601 luma), 3 for colour.
        resize: how another size is brought to it, see `ImageFolder`.
        filter: of Pillow's `resize`.
        upscale: allow images that are too small.
        background: grey level 0 … 255 behind transparent pixels and beside padded images.
    """

    size: int | None
    channels: int
    resize: Resize
    filter: Filter
    upscale: bool
    background: int

    def __call__(self, path: Path) -> np.ndarray:
        """Raises ConfigError naming the file if it cannot be decoded, or has a size that the options do not allow."""
        with opened(path) as image:
            found = loaded(path, image)
            self.check_size(path, found.size)
            pixels = np.asarray(self._sized(converted(path, found, self.channels, self.background)))
        return pixels[None] if self.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def many(self, paths: Sequence[Path]) -> Iterator[np.ndarray]:
        """The arrays of some files in order, decoded by several threads (Pillow works outside the interpreter)."""
        with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1, len(paths)))) as pool:
            yield from pool.map(self, paths)

    def check_size(self, path: Path, found: tuple[int, int]) -> None:
        """Raises ConfigError if an image of (width, height) cannot become an item."""
        width, height = found
        if self.size is None or (self.resize == "none" and width == height == self.size):
            return
        if self.resize == "none":
            raise ConfigError(
                f"{path} is {width} x {height} pixels, data.size asks for {self.size} x {self.size}, and data.resize "
                "is 'none'. Choose data.resize=crop (or pad, squash), or resize the files."
            )
        side = max(found) if self.resize == "pad" else min(found)
        if side < self.size and not self.upscale:
            raise ConfigError(
                f"{path} is {width} x {height} pixels, too small for data.size={self.size} with "
                f"data.resize={self.resize}. Remove it, ask for data.size={side} or less, or allow enlarging with "
                "data.upscale=true."
            )

    def _sized(self, image: Picture) -> Picture:
        from PIL import Image

        size, (width, height) = self.size, image.size
        if size is None or width == height == size:
            return image
        how = Image.Resampling[self.filter.upper()]
        if self.resize == "squash":
            return image.resize((size, size), how)
        if self.resize == "crop":  # one resampling of the central square is the scaled image's central square
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            return image.resize((size, size), how, box=(left, top, left + side, top + side))
        scale = size / max(width, height)
        inner = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), how)
        whole = Image.new(image.mode, (size, size), _level(image.mode, self.background))
        whole.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
        return whole


@contextmanager
def opened(path: Path) -> Iterator[Picture]:
    """The image of a file with only its header read, while the file is open.

    Raises:
        ConfigError: naming the file, if it is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # given the path, Pillow would map uncompressed TIFF files into memory, and it garbles those that are turned
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            file.seek(0)
            start = file.read(24)
            what = f"begins with {start!r}" if start else "is empty"
            raise ConfigError(
                f"{path} is no image that Pillow can read: the file {what}. Replace it, or remove it from the folder."
            ) from None
        except (Image.DecompressionBombError, *DAMAGE) as error:
            raise _damaged(path, error) from error
        yield image


def _orientation(image: Picture) -> int:
    """The EXIF orientation 1 … 8 as far as it has been read; 1 where it is not stated or not legible."""
    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif"}:
        return 1  # asking further would decode the image
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        return image.getexif().get(0x0112, 1)
    except DAMAGE:
        return 1


def inspect(path: Path) -> tuple[int, int]:
    """Width and height of an image from its header; a PNG or JPEG that lacks its end is decoded to be sure.

    Raises:
        ConfigError: naming the file, if it is no image or is cut short.
    """
    with opened(path) as image:
        size = image.size[::-1] if _orientation(image) >= 5 else image.size
        ending = ENDINGS.get(image.format or "")
        if ending is not None:
            with path.open("rb") as file:
                file.seek(-min(len(ending), file.seek(0, 2)), 2)
                if file.read() != ending:
                    loaded(path, image)
    return size


def loaded(path: Path, image: Picture) -> Picture:
    """The decoded image, turned as its EXIF orientation says; the first frame of an animation."""
    try:
        image.load()
    except DAMAGE as error:
        raise _damaged(path, error) from error
    return turned(image)


def turned(image: Picture) -> Picture:
    """The image, turned as its EXIF orientation says."""
    from PIL import Image

    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _damaged(path: Path, error: Exception) -> ConfigError:
    reason = str(error).rstrip(".")
    if "decompression bomb" in reason:
        return ConfigError(
            f"{path} is too large to be decoded: {reason.partition(', could be')[0]}. Make it smaller, or remove it."
        )
    return ConfigError(
        f"{path} cannot be decoded: {reason}. The file is cut short or damaged; replace it, or remove it from the "
        "folder."
    )


def converted(path: Path, image: Picture, channels: int, background: int) -> Picture:
    """The image in mode L or RGB, with transparent pixels over the background."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_bytes(path, np.asarray(image), image.mode))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        under = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(under, over)
    if image.mode not in ("1", "L", "P"):
        image = image.convert("RGB")  # Pillow has no direct way from some modes to grey
    return image.convert("L" if channels == 1 else "RGB")


def _bytes(path: Path, values: np.ndarray, mode: str) -> np.ndarray:
    """Levels 0 … 65535 as 0 … 255, rounded.

    Raises:
        ConfigError: if the values are of a kind without a stated range.
    """
    if mode.startswith("F") or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        kind = "floating-point" if mode.startswith("F") else "32-bit"
        raise ConfigError(
            f"{path} holds {kind} values from {values.min()} to {values.max()}, whose black and white are not known. "
            "Convert it to 8 or 16 bits per channel, or read it as an array of numbers."
        )
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


def _level(mode: str, value: int) -> Any:
    return value if mode == "L" else (value,) * len(mode)
