"""Patches of the two photographs that come with scikit-learn: natural image statistics, no download."""

import functools
import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..hashing import digest
from ..registry import ConfigError, register
from ..rng import generator
from ..transforms import Transform
from ..types import Batch
from .dataset import SPLITS, Dataset, Split, centred, proposal
from .memory import InMemory

LEVELS = 256
STRIPE = 40  # columns; both photographs are 427 rows by 640 columns, 16 stripes each
SPLIT_OF: tuple[Split, ...] = ("train", "train", "val", "train", "train", "train", "test", "train")  # stripe mod 8


@functools.cache
def photographs() -> Tensor:
    """[2, 3, 427, 640] uint8: china.jpg and flower.jpg."""
    from sklearn.datasets import load_sample_images

    return torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).contiguous()


def grey(rgb: Tensor) -> Tensor:
    """[N, 1, H, W] uint8 luma Y = 0.299 R + 0.587 G + 0.114 B, rounded, of [N, 3, H, W] uint8.

    Source: ITU-R Recommendation BT.601, section 2.5.1.
    """
    thousandths = (rgb.long() * torch.tensor([299, 587, 114])[:, None, None]).sum(1, keepdim=True)
    return ((thousandths + 500) // 1000).byte()


def corners(split: Split, size: int, stride: int, height: int, width: int) -> Tensor:
    """[N, 2] row and column of the upper left pixel of each patch in one photograph that lies wholly in a split."""
    owner = np.array([SPLITS.index(SPLIT_OF[c // STRIPE % len(SPLIT_OF)]) for c in range(width)]) == SPLITS.index(split)
    edges = np.flatnonzero(np.diff(owner, prepend=False, append=False))  # starts and ends of runs of columns
    columns = [c for a, b in edges.reshape(-1, 2).tolist() for c in range(a, b - size + 1, stride)]
    return torch.cartesian_prod(torch.arange(0, height - size + 1, stride), torch.tensor(columns))


def cut(images: Tensor, places: Tensor, size: int) -> Tensor:
    """[N·P, C, size, size]: the patches at P places of N images [N, C, H, W], image by image."""
    rows, columns = (places[:, k, None] + torch.arange(size) for k in (0, 1))
    return rearrange(images[:, :, rows[:, :, None], columns[:, None, :]], "n c p h w -> (n p) c h w")


def densities(patches: Tensor, u: Tensor) -> Tensor:
    """[N, size² - 1] float32 from grey patches [N, 1, size, size] and noise u of that shape in [0, 1).

    v = (x + u)/256; v minus its mean over the patch; without the last pixel, which is minus the sum of the others.

    Source: Uria et al. 2013 (RNADE), natural image patches; Papamakarios et al. 2017 (MAF), BSDS300.
    """
    v = (patches.double().flatten(1) + u.double().flatten(1)) / LEVELS
    return (v - v.mean(1, keepdim=True))[:, :-1].float()


@register(Dataset, "natural_patches")
class NaturalPatches(InMemory):
    """Square patches of two photographs, as vectors prepared like BSDS300 or as small images.

    The form "bsds" follows the recipe of the BSDS300 density benchmark, here with few and correlated patches: grey,
    uniform noise that removes the 256 levels (drawn once), scaled to [0, 1], each patch's mean subtracted, the last
    pixel dropped: size² - 1 numbers, 63 for size 8. The form "image" gives levels 0 … 255 of [channels, size, size].

    Each photograph (427 x 640) is cut into 16 stripes of 40 columns. Stripes 2 and 10 are "val", 6 and 14 "test", the
    others "train", and a patch lies wholly in stripes of its split: splits share no pixel. Training patches start at
    every stride-th row and column of their stripes and overlap; validation and test patches tile theirs without
    overlap. Inside a split the order is random, so that any first n items are a random subset. With the defaults there
    are 94,500 training, 1,060 validation and 1,060 test patches.

    Args:
        form: "bsds" or "image".
        size: side of a patch in pixels, 2 … 40.
        channels: 1 for grey, 3 for colour; "bsds" is grey.
        stride: pixels between training patches, both ways.
        seed: of the noise and the order.
        flip: give every training image mirrored as well (form "image").
        transform: instead of the proposed one: "standardize" for vectors, [0, 256) to [-1, 1) with noise for images.
    Raises:
        ConfigError: if an argument is out of range or does not go with the form.
    Source: Uria et al. 2013 (RNADE), natural image patches, for the recipe; the photographs are scikit-learn's.
    """

    def __init__(
        self,
        form: Literal["bsds", "image"] = "bsds",
        size: int = 8,
        channels: Literal[1, 3] = 1,
        stride: int = 2,
        seed: int = 0,
        flip: bool = False,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        vectors = form == "bsds"
        _check(vectors, size, channels, stride, flip)
        self.shape = (size**2 - 1,) if vectors else (channels, size, size)
        self.levels, self.bin_width = (None, None) if vectors else (LEVELS, 1.0)
        self.transform = proposal(transform, {"name": "standardize"} if vectors else centred(LEVELS))
        photos = photographs()
        photos = grey(photos) if channels == 1 else photos
        for split in SPLITS:
            places = corners(split, size, stride if split == "train" else size, *photos.shape[2:])
            patches = cut(photos, places, size)
            g = generator("natural_patches", seed, split)
            patches = patches[torch.randperm(len(patches), generator=g)]
            x = densities(patches, torch.rand(patches.shape, generator=g)) if vectors else patches
            self.hold(split, Batch(x), mirrored=flip and split == "train")
        options = [form, size, channels, stride, seed, flip]
        self._digest = digest({"options": options, "pixels": hashlib.sha256(photos.numpy().tobytes()).hexdigest()})

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the decoded photographs and of every argument that decides the items."""
        return self._digest


def _check(vectors: bool, size: int, channels: int, stride: int, flip: bool) -> None:
    if not 2 <= size <= STRIPE:
        raise ConfigError(
            f"data.size: natural_patches are cut from stripes of {STRIPE} columns; 2 … {STRIPE} pixels are possible, "
            f"found {size}."
        )
    if stride < 1:
        raise ConfigError(f"data.stride: must be at least 1, found {stride}.")
    if vectors and (channels != 1 or flip):
        asked = "channels: 3" if channels != 1 else "flip: true"
        raise ConfigError(
            f"data: natural_patches of the form 'bsds' are grey vectors, which {asked} does not go with. Add "
            "data.form=image, or leave that option out."
        )
