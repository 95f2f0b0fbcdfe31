"""Pictures in and out of editing: files as items of a data set, and strips of what was made of them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..data.dataset import Dataset
from ..data.decoding import Picture, converted, loaded, opened
from ..pictures import shades
from ..registry import ConfigError
from ..types import Shape

SIDE = 112  # pixels of a picture in a strip, at least
GREY, INK, PAPER = 96, (0, 0, 0), (255, 255, 255)
TEXT, LINE = 13, 17  # height of letters, and of a line of them, in pixels


class Scale(NamedTuple):
    """What pixels 0 … 255 stand for.

    Args:
        low, high: what is black and white.
        levels: of discrete data, evenly spaced from low to high; None for continuous data.
    """

    low: float = 0.0
    high: float = 1.0
    levels: int | None = None

    @property
    def peak(self) -> float:
        """The range of the pixels, as `psnr` wants it."""
        return self.high - self.low

    def pixels(self, x: Tensor) -> Tensor:
        """uint8 nearest to values; those of discrete data are rounded to their levels first."""
        share = (x.detach().double().cpu() - self.low) / self.peak
        if self.levels:
            share = (share * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)
        return (255 * share).nan_to_num(0).round().clamp(0, 255).to(torch.uint8)

    def values(self, pixels: Tensor) -> Tensor:
        """float32 on the straight line from low to high; a pixel that `pixels` writes for a level is that level."""
        share = pixels.double() / 255
        if self.levels:
            level = (share * (self.levels - 1)).round()
            exact = (255 * level / (self.levels - 1)).round() == pixels
            share = torch.where(exact, level / (self.levels - 1), share)
        return (self.low + self.peak * share).float()


def scale_of(dataset: Dataset) -> Scale:
    """Black and white as samples are drawn."""
    return Scale(*shades(dataset), dataset.levels)


def are_pictures(shape: Shape) -> bool:
    """Whether items [C, H, W] or [C, T, H, W] can be drawn: grey or coloured."""
    return len(shape) in (3, 4) and shape[0] in (1, 3)


def read_picture(path: Path, shape: Shape, scale: Scale, resize: bool = False) -> Tensor:
    """[1, C, H, W] float32 the picture of a file as an item of a model.

    Args:
        shape: (C, H, W), C = 1 for grey and 3 for colour.
        resize: whether to crop to the middle, resample, and convert what has another size or other channels.
    Raises:
        ConfigError: if there is no such file, if it is no picture, or has another size or other channels, unless
            `resize`.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such picture. Give a file, or an item of a split such as test:5.")
    channels, height, width = shape
    with opened(path) as image:
        found = loaded(path, image)
        has = _channels(found), *found.size[::-1]
        if has != tuple(shape) and not resize:
            raise ConfigError(
                f"{path} is {_told(*has)}, and the items of the model are {_told(*shape)}. Give a picture like those, "
                "or add --resize, which crops to the middle, resamples and converts."
            )
        found = _cropped(converted(path, found, channels, 0), width, height)
    pixels = torch.from_numpy(np.array(found)).reshape(height, width, channels)
    return scale.values(rearrange(pixels, "h w c -> 1 c h w"))


def _channels(image: Picture) -> int:
    """Of what a file holds: palettes stand for their colours, bits for grey."""
    if image.mode == "P":
        return 4 if image.has_transparency_data else 3
    return len(image.getbands())


def _told(channels: int, height: int, width: int) -> str:
    kind = {1: "grey (1 channel)", 3: "of colour (3 channels)"}.get(channels, f"of {channels} channels")
    return f"{width} x {height} pixels, {kind}"


def _cropped(image: Picture, width: int, height: int) -> Picture:
    """The largest part amid an image with the sides' ratio, resampled."""
    from PIL import Image

    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC, box=box)


def write_picture(path: Path, item: Tensor, scale: Scale) -> Path:
    """A PNG of one item [C, H, W], pixel by pixel, which `read_picture` reads back; frames [C, T, H, W] in a row."""
    _picture(item, scale).save(path)
    return path


def _picture(item: Tensor, scale: Scale, gap: int = 0) -> Picture:
    """An item as an image of Pillow; the frames of a video beside each other."""
    from PIL import Image

    pixels = scale.pixels(item)
    if pixels.ndim == 4:
        pixels = torch.nn.functional.pad(pixels, (0, gap), value=GREY)
        pixels = rearrange(pixels, "c t h w -> c h (t w)")[..., : -gap or None]
    pixels = rearrange(pixels, "c h w -> h w c").numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


class Panel(NamedTuple):
    """One stage of an edit: items [B, C, H, W] or [B, C, T, H, W], and what to write beside them."""

    label: str
    items: Tensor


def write_strip(path: Path, panels: Sequence[Panel], names: Sequence[str], scale: Scale) -> Path:
    """A PNG of what became of items, enlarged: a row for each, its stages from left to right.

    Videos have a row for each stage instead, their frames from left to right.

    Args:
        names: of the items; not written if there is one.
    """
    names = names if len(names) > 1 else [""]
    video = panels[0].items.ndim == 5
    enlarged = [[_enlarged(_picture(item, scale, 1)) for item in panel.items] for panel in panels]
    if video:
        lefts = [f"{name}\n{panel.label}".strip() for name in names for panel in panels]
        cells = [[enlarged[k][i]] for i in range(len(names)) for k in range(len(panels))]
        sheet = _table(cells, lefts, None)
    else:
        cells = [list(row) for row in zip(*enlarged, strict=True)]
        sheet = _table(cells, list(names), [panel.label for panel in panels])
    sheet.save(path)
    return path


def _enlarged(image: Picture) -> Picture:
    from PIL import Image

    zoom = max(1, SIDE // image.height)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).convert("RGB")


def _table(cells: list[list[Picture]], lefts: list[str], tops: list[str] | None, gap: int = 8) -> Picture:
    """Pictures of one size in rows and columns on white, with labels at the left of rows and above columns."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT)
    width, height = cells[0][0].size
    lefts = ["\n".join(textwrap.fill(line, 24) for line in text.split("\n")) for text in lefts]
    tops = [textwrap.fill(text, max(8, width // 7)) for text in tops or ()]
    margin = max(_breadth(font, text) for text in lefts)
    margin += gap if margin else 0
    head = LINE * max((text.count("\n") + 1 for text in tops), default=0)
    down = max(height, LINE * max(text.count("\n") + 1 for text in lefts)) + gap
    across = max(width, *(_breadth(font, text) for text in tops)) + gap if tops else width + gap
    size = (gap + margin + across * len(cells[0]), gap + head + down * len(cells))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(tops):
        draw.multiline_text((gap + margin + across * column, gap // 2), text, INK, font=font)
    for row, (text, line) in enumerate(zip(lefts, cells, strict=True)):
        draw.multiline_text((gap, gap + head + down * row), text, INK, font=font)
        for column, cell in enumerate(line):
            sheet.paste(cell, (gap + margin + across * column, gap + head + down * row))
    return sheet


def _breadth(font: Any, text: str) -> int:
    return max(int(font.getlength(line)) + 1 if line else 0 for line in text.split("\n"))
