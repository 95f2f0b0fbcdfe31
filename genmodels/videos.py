"""Videos as files: a GIF to watch, a folder of frames for programs, and both read back."""

from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .data.dataset import Dataset
from .pictures import enlarged, from_bytes, tiled, to_bytes

COLUMNS = 8  # videos beside each other in a GIF
PLAIN = ("1", "L", "P", "RGB", "LA", "PA", "RGBA")  # what Pillow calls pictures of 8 bits


def duration(rate: float) -> int:
    """Milliseconds that a GIF can show a frame for, nearest to 1/rate: a multiple of 10, and 20 at least.

    Raises:
        ValueError: if the rate is not positive.
    """
    if not rate > 0:
        raise ValueError(f"a video needs a positive number of frames a second, found {rate}.")
    return max(2, round(100 / rate)) * 10


def write_gif(path: Path, x: Tensor, dataset: Dataset) -> Path:
    """A GIF of the videos x [N, C, T, H, W], side by side, that plays again and again; pixels are enlarged to squares.

    One grey video is read back by `read_video` exactly. Colours are exact where a frame has few of them (GIF has 256).

    Raises:
        ValueError: if the data are no videos, or x is not of their shape.
    """
    from PIL import Image

    _, frames, height, width = _shape(dataset)
    if x.ndim != 5 or not len(x) or tuple(x.shape[1:]) != dataset.shape:
        raise ValueError(f"{path}: videos [N, {', '.join(map(str, dataset.shape))}] are needed, found {list(x.shape)}.")
    pixels, columns = to_bytes(x, dataset), min(COLUMNS, len(x))
    sheets = [enlarged(tiled(pixels[:, :, t], columns), max(height, width)) for t in range(frames)]
    first, *others = (Image.fromarray(sheet.squeeze(-1).numpy()) for sheet in sheets)
    length = duration(dataset.frame_rate)
    first.save(path, format="GIF", save_all=True, append_images=others, duration=length, loop=0)
    return path


def write_frames(folder: Path, x: Tensor, dataset: Dataset) -> Path:
    """PNG files 000.png, 001.png, … of the frames of one video x [C, T, H, W], pixel by pixel.

    Raises:
        ValueError: if the data are no videos, or x is not of their shape.
    """
    from PIL import Image

    if tuple(x.shape) != _shape(dataset):
        raise ValueError(f"{folder}: one video {list(dataset.shape)} is needed, found {list(x.shape)}.")
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(rearrange(to_bytes(x, dataset), "c t h w -> t h w c")):
        Image.fromarray(frame.squeeze(-1).numpy()).save(folder / f"{number:03}.png")
    return folder


def read_video(path: Path, dataset: Dataset, resize: bool = False) -> Tensor:
    """[1, C, T, H, W] float32 in data units: a GIF (or other animation), or a folder with a picture for each frame.

    Pictures in a folder are in the order of their names. Discrete data take their nearest levels. A GIF leaves out
    frames that equal the one before and shows that one for longer: where the stored frames are too few, each counts as
    often as it outlasts a frame of the data. Frames whose pixels are enlarged to squares, as `write_gif` does, are
    reduced to them.

    Args:
        resize: crop to the middle and resample where sizes differ, and make grey what is to be; frames are never left
            out or made up.
    Raises:
        ValueError: if there is no such file, the file is no picture, or the number of frames, their size or their
            channels are not those of the data.
    """
    channels, frames, height, width = _shape(dataset)
    stored = list(stored_frames(path))
    if len(stored) != frames:
        unit = duration(dataset.frame_rate)
        times = [max(1, round(length / unit)) for _, length in stored]
        if sum(times) != frames:
            raise ValueError(
                f"{path}: {len(stored)} frames were found, {frames} are needed. Cut the video, or put the frames that "
                "you choose into a folder, a PNG each."
            )
        stored = list(chain.from_iterable(repeat(each, n) for each, n in zip(stored, times, strict=True)))
    if resize and channels == 1:
        stored = [(image.convert("L").convert("RGB"), length) for image, length in stored]
    found = [_fitted(path, number, image, (height, width), resize) for number, (image, _) in enumerate(stored)]
    pixels = rearrange(torch.from_numpy(np.stack(found)), "t h w c -> 1 c t h w")
    if channels == 1:
        if not (pixels == pixels[:, :1]).all():
            raise ValueError(
                f"{path}: the frames have colours, and the data are grey. Change that, or ask for it (resize)."
            )
        pixels = pixels[:, :1]
    return from_bytes(pixels, dataset)


def _shape(dataset: Dataset) -> tuple[int, int, int, int]:
    if dataset.frame_rate is None or len(dataset.shape) != 4 or dataset.shape[0] not in (1, 3):
        raise ValueError(
            f"data '{dataset.registered_name}', items of shape {list(dataset.shape)}, are no videos: [1 or 3, T, H, W] "
            "and a frame_rate are needed."
        )
    return dataset.shape


def stored_frames(path: Path) -> Iterator[tuple[Any, float]]:
    """The frames of a file or folder as RGB pictures of Pillow, with the milliseconds that each is shown (or 0)."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder.")
    suffixes = Image.registered_extensions()
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: there are no pictures in this folder.")
    for file in files:
        try:
            with Image.open(file) as image:
                for frame in ImageSequence.Iterator(image):
                    yield _plain(file, frame), frame.info.get("duration", 0)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file}: this is no picture that can be read ({error}).") from error


def _plain(file: Path, image: Any) -> Any:
    if image.mode not in PLAIN:
        raise ValueError(f"{file}: pictures of 8 bits a channel are needed, found Pillow's mode {image.mode}.")
    solid = image.convert("RGBA")
    if solid.getchannel("A").getextrema()[0] < 255:
        raise ValueError(f"{file}: parts of the picture are transparent. Put it on a background first.")
    return solid.convert("RGB")


def _fitted(path: Path, number: int, image: Any, size: tuple[int, int], resize: bool) -> np.ndarray:
    """[H, W, 3] uint8 a frame in the size of the data."""
    from PIL import Image, ImageOps

    height, width = size
    pixels = np.asarray(image)
    zoom = max(1, image.height // height)
    small = pixels[::zoom, ::zoom]
    if small.shape[:2] == size and np.array_equal(small.repeat(zoom, 0).repeat(zoom, 1), pixels):
        return small
    if not resize:
        raise ValueError(
            f"{path}: frame {number} has {image.height}x{image.width} pixels, {height}x{width} are needed (or a whole "
            "multiple of them, in squares of one colour). Change its size, or ask for that (resize)."
        )
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
