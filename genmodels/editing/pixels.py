"""Pictures and videos as tensors: from PIL and back, with sides that an autoencoder takes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ..data.decoding import turned

if TYPE_CHECKING:
    from PIL import Image


def pixels(items: Any, video: bool) -> Tensor:
    """[B, 3, H, W] or, for videos, [B, 3, T, H, W] in [0, 1].

    Args:
        items: a tensor of that shape (the batch axis may be left out), a picture of PIL or a list of such; for videos
            a list of frames, or a list of such lists.
    Raises:
        ValueError: if they are neither, are not RGB, differ in size, or leave [0, 1].
    """
    if not isinstance(items, Tensor):
        return _from_pil(items, video)
    items = items[None] if items.ndim == (4 if video else 3) else items
    if items.ndim != (5 if video else 4) or items.shape[1] != 3 or not items.is_floating_point():
        needed = "[B, 3, T, H, W]" if video else "[B, 3, H, W]"
        raise ValueError(
            f"items: {needed} of floating point in [0, 1] is needed, found {list(items.shape)} of {items.dtype}."
        )
    low, high = items.min().item(), items.max().item()
    if not (low >= 0 and high <= 1):  # also if a pixel is not a number
        raise ValueError(f"items: pixels in [0, 1] are needed, found {low:.3g} … {high:.3g}. Rescale them.")
    return items.float()


def _from_pil(items: Any, video: bool) -> Tensor:
    if not video:
        return torch.stack(_tensors(items if isinstance(items, list | tuple) else [items]))
    clips = items if isinstance(items, list | tuple) and items and isinstance(items[0], list | tuple) else [items]
    made = [torch.stack(_tensors(clip if isinstance(clip, list | tuple) else [clip]), dim=1) for clip in clips]
    if len({clip.shape for clip in made}) > 1:
        raise ValueError(f"items: videos of one length are needed, found {[clip.shape[1] for clip in made]} frames.")
    return torch.stack(made)


def _tensors(pictures: Sequence[Any]) -> list[Tensor]:
    import numpy
    from PIL import Image

    if not pictures:
        raise ValueError("items: there are no pictures.")
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            raise ValueError(f"items: pictures of PIL or a tensor are needed, found {type(picture).__name__}.")
        if picture.mode != "RGB":
            raise ValueError(f'items: a picture has the mode {picture.mode}; use picture.convert("RGB").')
    pictures = [turned(picture) for picture in pictures]
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise ValueError(f"items: pictures of one size are needed, found {shown}.")
    return [rearrange(torch.from_numpy(numpy.array(p)), "h w c -> c h w").float() / 255 for p in pictures]


def fitted(items: Tensor, multiple: tuple[int, int], resize: bool) -> Tensor:
    """Items whose height and width are multiples of these two; others are resized to the nearest such if asked.

    Raises:
        ValueError: naming the nearest sizes, unless `resize`.
    """
    sides = items.shape[-2:]
    if all(side % unit == 0 for side, unit in zip(sides, multiple, strict=True)):
        return items
    nearest = [max(unit, round(side / unit) * unit) for side, unit in zip(sides, multiple, strict=True)]
    if not resize:
        below = [max(unit, side // unit * unit) for side, unit in zip(sides, multiple, strict=True)]
        above = [-(-side // unit) * unit for side, unit in zip(sides, multiple, strict=True)]
        raise ValueError(
            f"items: {sides[1]}x{sides[0]} pixels, but the model needs a width that is a multiple of {multiple[1]} and "
            f"a height that is one of {multiple[0]}: {below[1]}x{below[0]} or {above[1]}x{above[0]}. Crop or resize "
            f"them, or ask for it (resize=True makes them {nearest[1]}x{nearest[0]})."
        )
    flat = rearrange(items, "b c t h w -> (b t) c h w") if items.ndim == 5 else items
    flat = torch.nn.functional.interpolate(flat, size=nearest, mode="bicubic", antialias=True).clamp(0, 1)
    return rearrange(flat, "(b t) c h w -> b c t h w", b=len(items)) if items.ndim == 5 else flat


def check_frames(frames: int, every: int) -> None:
    """Raises ValueError unless a video has 1 + n · every frames, which is what an autoencoder squeezes into n + 1."""
    if frames % every != 1 % every:
        below = (frames - 1) // every * every + 1
        raise ValueError(
            f"items: {frames} frames, but the model needs 1 + a multiple of {every}: {below} or {below + every}. "
            "Drop or repeat some."
        )


def pictures(items: Tensor) -> "list[Image.Image] | list[list[Image.Image]]":
    """Pictures of PIL of [B, 3, H, W], or a list of frames for each of [B, 3, T, H, W], in [0, 1]."""
    from PIL import Image

    if items.ndim == 5:
        return [pictures(clip) for clip in rearrange(items, "b c t h w -> b t c h w")]
    levels = rearrange((items.clamp(0, 1) * 255).round().to(torch.uint8), "b c h w -> b h w c")
    return [Image.fromarray(level) for level in levels.cpu().numpy()]
