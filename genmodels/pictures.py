"""Levels as shades of grey or colour: what pictures and videos have in common."""

import math

import torch
from einops import rearrange
from torch import Tensor

from .data.dataset import Dataset

MARGIN = 96  # the grey between tiles
LEAST = 48  # pixels of the longer side of a tile, enlarged


def shades(dataset: Dataset) -> tuple[float, float]:
    """The values that are drawn black and white: levels 0 … top, or the range of (some) training items."""
    if dataset.levels:
        return 0.0, (dataset.bin_width or 1.0) * (dataset.levels - 1)
    low, high = dataset.take("train", torch.arange(min(256, dataset.size("train")))).x.aminmax()
    return low.item(), max(high.item(), low.item() + torch.finfo(torch.float32).tiny)


def to_bytes(x: Tensor, dataset: Dataset) -> Tensor:
    """uint8 of the same shape: black 0 … white 255, beyond them clipped; NaN is black."""
    low, high = shades(dataset)
    return ((x.float() - low) / (high - low) * 255).nan_to_num(0).round().clamp(0, 255).to(torch.uint8)


def from_bytes(pixels: Tensor, dataset: Dataset) -> Tensor:
    """float32 values of uint8 pixels, the nearest levels of discrete data: the inverse of `to_bytes` there."""
    low, high = shades(dataset)
    x = low + pixels.double() / 255 * (high - low)
    if dataset.levels:
        width = dataset.bin_width or 1.0
        x = (x / width).round() * width
    return x.float()


def tiled(pixels: Tensor, columns: int) -> Tensor:
    """[H', W', C] uint8 the images [N, C, H, W] row by row, with a margin of one pixel between them."""
    n, channels, height, width = pixels.shape
    rows = math.ceil(n / columns)
    padded = pixels.new_full((rows * columns, channels, height + 1, width + 1), MARGIN)
    padded[:n, :, :height, :width] = pixels
    return rearrange(padded, "(r c) k h w -> (r h) (c w) k", r=rows, c=columns)[:-1, :-1]


def enlarged(sheet: Tensor, side: int) -> Tensor:
    """The pixels [H, W, C] as squares, so that `side` of them measure `LEAST` or nearly so."""
    zoom = max(1, LEAST // side)
    return sheet.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
