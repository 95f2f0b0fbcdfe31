"""The Inception network of the FID: the graph of 2015-12-05, its weights, and three ways to prepare images for it."""

from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import register
from .features import FeatureExtractor
from .image_features import ImageFeatures
from .weights import checksum, find, fit, read

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of both published files, the same bytes
FILES = {
    "pt_inception-2015-12-05-6726825d.pth": "a release file of the project pytorch-fid",
    "weights-inception-2015-12-05-6726825d.pth": "a release file of the project torch-fidelity",
    "inception-2015-12-05.safetensors": "the same tensors as safetensors, which the checksum does not cover",
}
SIDE = 299


class Conv(NamedTuple):
    """A convolution of a branch; with stride 2 it is not padded, else it keeps the size."""

    channels: int
    kernel: tuple[int, int]
    stride: int = 1


class Branch(NamedTuple):
    """One branch of a block: an optional pool, convolutions in a row, and a last pair of them side by side.

    Its modules are called `<name>` if there is one, else `<name>_1`, `<name>_2`, …, with a and b for the pair.
    """

    name: str
    row: tuple[Conv, ...] = ()
    fork: tuple[Conv, ...] = ()
    pool: Literal["mean", "max", "halve"] | None = None


def conv(channels: int, height: int, width: int | None = None, stride: int = 1) -> Conv:
    return Conv(channels, (height, height if width is None else width), stride)


def block_a(pooled: int) -> tuple[Branch, ...]:
    return (
        Branch("branch1x1", (conv(64, 1),)),
        Branch("branch5x5", (conv(48, 1), conv(64, 5))),
        Branch("branch3x3dbl", (conv(64, 1), conv(96, 3), conv(96, 3))),
        Branch("branch_pool", (conv(pooled, 1),), pool="mean"),
    )


def block_c(inside: int) -> tuple[Branch, ...]:
    lying, standing = conv(inside, 1, 7), conv(inside, 7, 1)
    return (
        Branch("branch1x1", (conv(192, 1),)),
        Branch("branch7x7", (conv(inside, 1), lying, conv(192, 7, 1))),
        Branch("branch7x7dbl", (conv(inside, 1), standing, lying, standing, conv(192, 1, 7))),
        Branch("branch_pool", (conv(192, 1),), pool="mean"),
    )


def block_e(pool: Literal["mean", "max"]) -> tuple[Branch, ...]:
    pair = (conv(384, 1, 3), conv(384, 3, 1))
    return (
        Branch("branch1x1", (conv(320, 1),)),
        Branch("branch3x3", (conv(384, 1),), pair),
        Branch("branch3x3dbl", (conv(448, 1), conv(384, 3)), pair),
        Branch("branch_pool", (conv(192, 1),), pool=pool),
    )


BLOCK_B = (
    Branch("branch3x3", (conv(384, 3, stride=2),)),
    Branch("branch3x3dbl", (conv(64, 1), conv(96, 3), conv(96, 3, stride=2))),
    Branch("branch_pool", pool="halve"),
)
BLOCK_D = (
    Branch("branch3x3", (conv(192, 1), conv(320, 3, stride=2))),
    Branch("branch7x7x3", (conv(192, 1), conv(192, 1, 7), conv(192, 7, 1), conv(192, 3, stride=2))),
    Branch("branch_pool", pool="halve"),
)
BLOCKS = {  # a mean leaves padding out; the maximum in the last block is a quirk of this graph
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": BLOCK_B,
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": BLOCK_D,
    "Mixed_7b": block_e("mean"),
    "Mixed_7c": block_e("max"),
}


class Unit(nn.Module):
    """Convolution without bias, batch norm with fixed statistics, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padded: bool) -> None:
        super().__init__()
        padding = tuple(k // 2 for k in kernel) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches over the same input, their outputs joined along the channels in order."""

    def __init__(self, inputs: int, branches: tuple[Branch, ...], width: float) -> None:
        super().__init__()
        self.plan: list[tuple[str | None, list[str], list[str]]] = []
        self.outputs = 0
        for name, row, fork, pool in branches:
            names = [f"{name}_{i + 1}" for i in range(len(row))] if len(row) + len(fork) > 1 else [name] * len(row)
            forked = [f"{name}_{len(row) + 1}{letter}" for letter, _ in zip("ab", fork, strict=False)]
            channels = inputs
            for key, spec in zip(names, row, strict=True):
                channels = self._add(key, channels, spec, width)
            ends = [self._add(key, channels, spec, width) for key, spec in zip(forked, fork, strict=True)]
            self.outputs += sum(ends) or channels
            self.plan.append((pool, names, forked))

    def _add(self, name: str, inputs: int, spec: Conv, width: float) -> int:
        outputs = scaled(spec.channels, width)
        self.add_module(name, Unit(inputs, outputs, spec.kernel, spec.stride, padded=spec.stride == 1))
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for pool, row, fork in self.plan:
            h = _pool(x, pool)
            for name in row:
                h = self.get_submodule(name)(h)
            parts += [self.get_submodule(name)(h) for name in fork] or [h]
        return torch.cat(parts, 1)


def _pool(x: Tensor, kind: str | None) -> Tensor:
    if kind == "mean":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if kind == "max":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.max_pool2d(x, 3, stride=2) if kind == "halve" else x


def scaled(channels: int, width: float) -> int:
    """Channels of a network of another width, at least one."""
    return max(1, round(channels * width))


class InceptionNetwork(nn.Module):
    """Images [B, 3, 299, 299] in [-1, 1] to [B, 2048]: the mean over all positions after the last block.

    Keys and shapes of its state are those of the published weights (566 tensors); the classifier `fc` is there for them
    alone.

    Args:
        width: factor of all channel counts; the published network has 1.
    Source: Szegedy et al. 2016 (Rethinking the Inception architecture), section 6; the graph of Heusel et al. 2017
        (TTUR).
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = 3
        stem = {"1a_3x3": (32, 3, 2, False), "2a_3x3": (32, 3, 1, False), "2b_3x3": (64, 3, 1, True)}
        stem |= {"3b_1x1": (80, 1, 1, True), "4a_3x3": (192, 3, 1, False)}
        for name, (outputs, kernel, stride, padded) in stem.items():
            unit = Unit(channels, scaled(outputs, width), (kernel, kernel), stride, padded)
            channels = scaled(outputs, width)
            self.add_module(f"Conv2d_{name}", unit)
        for name, branches in BLOCKS.items():
            block = Mixed(channels, branches, width)
            channels = block.outputs
            self.add_module(name, block)
        self.fc = nn.Linear(channels, 1008)

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, stride=2)
            if name != "fc":
                x = module(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def resize_tf1(x: Tensor, side: int = SIDE) -> Tensor:
    """[B, C, side, side]: bilinear as TensorFlow 1 did it, without half-pixel offsets.

    Output i lies at the source coordinate i · size / side of its axis; the last pixel is repeated beyond the border.
    """
    for axis in (3, 2):
        size = x.shape[axis]
        at = torch.arange(side, dtype=x.dtype, device=x.device) * torch.tensor(size / side, dtype=x.dtype)
        low = at.long()
        weight = (at - low)[:, None] if axis == 2 else at - low
        left, right = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = left + (right - left) * weight
    return x


def resize_pillow(x: Tensor, side: int = SIDE) -> Tensor:
    """[B, C, side, side]: Pillow's antialiased bicubic of every channel in float32, clipped to 0 … 255."""
    import numpy as np
    from PIL import Image

    planes = rearrange(x, "b c h w -> (b c) h w").cpu().numpy()
    sized = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
    return rearrange(torch.from_numpy(np.stack(sized)), "(b c) h w -> b c h w", b=len(x)).clamp(0, 255).to(x.device)


def prepare(x: Tensor, how: Literal["tf1", "pytorch_fid", "clean"]) -> Tensor:
    """Images [B, 3, H, W] of 0 … 255 as the network's input [B, 3, 299, 299]."""
    if how == "pytorch_fid":
        return 2 * F.interpolate(x / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    return ((resize_tf1 if how == "tf1" else resize_pillow)(x) - 128) / 128


@lru_cache(maxsize=1)
def load_network(path: Path, sha256: str) -> InceptionNetwork:
    """The network with the weights of a file, in eval mode and float32.

    Args:
        sha256: of the file; another one is another network.
    Raises:
        ValueError: if the file cannot be read, or naming the first key that is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        network = InceptionNetwork()
    state = fit(read(path), network.state_dict(), f"features 'inception': {path}")
    network.load_state_dict(state, assign=True)
    return network.float().eval().requires_grad_(False)


@register(FeatureExtractor, "inception")
class Inception(ImageFeatures):
    """2048 features of images from the Inception network of the FID.

    Grey images become three equal channels. The weights are the file that is given, else one of the published names in
    the folder $GENMODELS_WEIGHTS, else in ~/.cache/genmodels/weights; nothing is downloaded. Over the published weights
    the Fréchet distance is called FID with the preparation "tf1", and FID-clean or FID-pytorch_fid with the others;
    other weights are labelled "inception-unverified".

    Args:
        weights: path of the weights (.pth or .safetensors).
        preprocess: how images reach 299x299 pixels: "tf1" as the original, torch-fidelity and EDM (bilinear without
            half-pixel offsets, (x - 128) / 128), "pytorch_fid" (bilinear, 2 x/255 - 1), "clean" (Pillow's antialiased
            bicubic in float32).
    Raises:
        ValueError: if there are no weights, or if they are damaged or belong to another network.
    Source: Heusel et al. 2017 (TTUR), section 4; Parmar et al. 2022 (Clean-FID) for "clean".
    """

    local: ClassVar[tuple[str, ...]] = ("weights",)

    def __init__(self, weights: str | None = None, preprocess: Literal["tf1", "pytorch_fid", "clean"] = "tf1") -> None:
        self.weights, self.preprocess = weights, preprocess

    @cached_property
    def path(self) -> Path:
        return find(self.weights, FILES, "features 'inception'", f"SHA-256 {SHA256[:8]}…")

    @property
    def sha256(self) -> str:
        return checksum(self.path)

    @property
    def suffix(self) -> str:
        return "" if self.preprocess == "tf1" else f"-{self.preprocess}"

    @property
    def label(self) -> str:
        return ("inception" if self.sha256 == SHA256 else "inception-unverified") + self.suffix

    @property
    def identity(self) -> str:
        found = self.sha256
        weights = found[:8] if found == SHA256 else f"unverified:{found[:12]}"
        return f"inception-tf2015:{weights}:{self.preprocess}"

    @property
    def frechet_name(self) -> str:
        return f"FID{self.suffix}" if self.sha256 == SHA256 else super().frechet_name

    @property
    def kernel_name(self) -> str:
        return f"KID{self.suffix}" if self.sha256 == SHA256 else super().kernel_name

    def load(self) -> nn.Module:
        return load_network(self.path, self.sha256)

    def embed(self, images: Tensor) -> Tensor:
        return self.network(prepare(images, self.preprocess))
