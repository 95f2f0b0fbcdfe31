"""U-Net: convolutions at several resolutions, from fine to coarse and back, with connections across."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape, expand_like
from .attention import Attention as Layer
from .attention import fused
from .mlp import Embeddings
from .network import Network, check_images

Modulation = Literal["scale_shift", "shift"]
Resample = Literal["down", "up"]


class Style(NamedTuple):
    """What all blocks of a U-Net have in common; `embedding` is the width of e, None if there is none."""

    groups: int
    dropout: float
    modulation: Modulation
    embedding: int | None
    scale: float


def normalization(channels: int, groups: int) -> nn.GroupNorm:
    """A group norm of at most as many groups as divide the channels, with at least four channels in each."""
    return nn.GroupNorm(max(g for g in range(1, max(1, min(groups, channels // 4)) + 1) if channels % g == 0), channels)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters set to 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def resampled(h: Tensor, resample: Resample | None) -> Tensor:
    """Half the resolution by the mean of 2x2 pixels, or twice the resolution by repeating them."""
    if resample is None:
        return h
    return F.avg_pool2d(h, 2) if resample == "down" else F.interpolate(h, scale_factor=2.0, mode="nearest")


class Residual(nn.Module):
    """scale (skip(x) + W₂ drop(silu(m(N₂, W₁ silu(N₁(x)), e)))), where W are 3x3 convolutions and N group norms.

    With y = W₁ …, the modulation m is (1 + s) N₂(y) + b ("scale_shift") or N₂(y + b) ("shift") with s and b linear in
    e, and N₂(y) without e. With a resampling, x and what enters W₁ are resampled first. skip is a 1x1 convolution where
    the number of channels changes, and W₂ starts at 0.
    """

    def __init__(self, before: int, after: int, style: Style, resample: Resample | None = None) -> None:
        super().__init__()
        self.style, self.resample = style, resample
        self.norm_first, self.first = normalization(before, style.groups), nn.Conv2d(before, after, 3, padding=1)
        self.norm_second = normalization(after, style.groups)
        self.second = zeroed(nn.Conv2d(after, after, 3, padding=1))
        numbers = 2 * after if style.modulation == "scale_shift" else after
        self.embed = None if style.embedding is None else nn.Linear(style.embedding, numbers)
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, e: Tensor | None) -> Tensor:
        y = self.first(resampled(F.silu(self.norm_first(x)), self.resample))
        y = self._modulated(y, e)
        y = self.second(F.dropout(F.silu(y), self.style.dropout, self.training))
        return self.style.scale * (self.skip(resampled(x, self.resample)) + y)

    def _modulated(self, y: Tensor, e: Tensor | None) -> Tensor:
        if self.embed is None:
            return self.norm_second(y)
        numbers = expand_like(self.embed(e), y)
        if self.style.modulation == "shift":
            return self.norm_second(y + numbers)
        scale, shift = numbers.chunk(2, 1)
        return torch.addcmul(shift, self.norm_second(y), 1 + scale)


class Attention(nn.Module):
    """scale (x + W_o softmax(q kᵀ/√d) v) with q, k, v = W N(x) in every head and pixels as tokens; W_o starts at 0."""

    def __init__(self, channels: int, heads: int, style: Style) -> None:
        super().__init__()
        self.heads, self.scale = heads, style.scale
        self.norm = normalization(channels, style.groups)
        self.qkv, self.merge = nn.Linear(channels, 3 * channels), zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.qkv(rearrange(self.norm(x), "b c i j -> b (i j) c"))
        q, k, v = rearrange(h, "b n (three h d) -> three b h n d", three=3, h=self.heads).unbind(0)
        h = self.merge(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return self.scale * (x + rearrange(h, "b (i j) c -> b c i j", i=x.shape[2]))


class Step(nn.Module):
    """A residual block, with attention after it if `heads` is not None; `crossing` ones take a connection as well."""

    def __init__(self, before: int, after: int, style: Style, heads: int | None, crossing: bool = False) -> None:
        super().__init__()
        self.residual = Residual(before, after, style)
        self.attention = None if heads is None else Attention(after, heads, style)
        self.crossing = crossing

    def forward(self, h: Tensor, e: Tensor | None, across: Tensor | None = None) -> Tensor:
        h = self.residual(h if across is None else torch.cat((h, across), 1), e)
        return h if self.attention is None else self.attention(h)


class Convolution(nn.Module):
    """A change of resolution by one 3x3 convolution: with stride 2 down, after repeating pixels up."""

    crossing = False

    def __init__(self, channels: int, resample: Resample) -> None:
        super().__init__()
        self.resample = resample
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if resample == "down" else 1, padding=1)

    def forward(self, h: Tensor, e: Tensor | None) -> Tensor:
        return self.conv(h if self.resample == "down" else resampled(h, "up"))


class Change(Residual):
    """A change of resolution inside a residual block."""

    crossing = False


@register(Network, "unet")
class UNet(Network):
    """Residual blocks from the full resolution down and up again, each level linked to its twin across.

    Level l has multipliers[l] · channels channels at 1/2^l of the resolution: `blocks` residual blocks on the way down,
    two with attention between them at the bottom, and blocks + 1 on the way up, each of which also sees one result of
    the way down. The last layer of each block and of the network starts at zero, so that the first output is 0.

    The defaults are those of ADM; modulation "shift", resample "convolution" and head_channels 64 give the network that
    flow matching papers train on CIFAR-10.

    Args:
        channels: channels at the full resolution before the multipliers.
        multipliers: one for each level; every level but the last halves the resolution.
        blocks: residual blocks of a level on the way down.
        attention: the resolutions (longer side in pixels) at which attention follows every block.
        heads: attention heads.
        head_channels: channels of a head, from which the number of heads follows; null for `heads` everywhere.
        dropout: share of the features dropped inside each block in training.
        embedding: width of the embedding of time and condition over channels.
        modulation: how it acts, see `Residual`.
        resample: how resolution changes: inside a residual block, or by one convolution.
        groups: most groups of a group norm; fewer where channels do not divide, or would be fewer than 4 in a group.
        skip_scale: multiply the sum of a block and its input by 1/√2.
    Attributes:
        head: the last layer, a convolution.
        width: channels that it reads.
    Raises:
        ConfigError: if in_shape and out_shape are not images of one size, or sides, levels, heads and attention do not
            fit.
    Source: Dhariwal & Nichol 2021 (Diffusion models beat GANs on image synthesis), section 3; Ho et al. 2020
        (Denoising diffusion probabilistic models), appendix B; Karras et al. 2022 (EDM), appendix F.2, for skip_scale.
    """

    blockwise = True

    def __init__(
        self,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (),
        heads: int = 4,
        head_channels: int | None = None,
        dropout: float = 0.0,
        embedding: int = 4,
        modulation: Modulation = "scale_shift",
        resample: Literal["block", "convolution"] = "block",
        groups: int = 32,
        skip_scale: bool = False,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape, self.width = tuple(in_shape), tuple(out_shape), channels
        check_images("unet", self.in_shape, self.out_shape)
        _check_numbers(channels, multipliers, blocks, dropout, embedding, groups)
        sides = _sides(self.in_shape, len(multipliers))
        _check_attention(attention, sides)
        width = embedding * channels
        self.embeddings = Embeddings(width, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        scale = 0.5**0.5 if skip_scale else 1.0
        style = Style(groups, dropout, modulation, width if self.embeddings.active else None, scale)
        widths = [m * channels for m in multipliers]
        counts = [
            _heads(w, heads, head_channels) if side in attention else None
            for w, side in zip(widths, sides, strict=True)
        ]
        bottom = _heads(widths[-1], heads, head_channels)
        self.enter = nn.Conv2d(in_shape[0], channels, 3, padding=1)
        self.down, kept = _way_down(channels, widths, blocks, style, counts, resample)
        self.middle = nn.ModuleList(Step(widths[-1], widths[-1], style, n) for n in (bottom, None))
        self.up = _way_up(kept, widths, blocks, style, counts, resample)
        self.norm = normalization(widths[0], groups)
        self.head = zeroed(nn.Conv2d(widths[0], out_shape[0], 3, padding=1))

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        e = self.embeddings(t, x, condition)
        e = F.silu(e) if self.embeddings.active else None
        h = self.enter(x)
        kept = [h]
        for step in self.down:
            h = self.recompute(step, h, e)
            kept.append(h)
        for step in self.middle:
            h = self.recompute(step, h, e)
        for step in self.up:
            h = self.recompute(step, h, e, kept.pop()) if step.crossing else self.recompute(step, h, e)
        return self.head(F.silu(self.norm(h)))

    def attention(self) -> list[Layer]:
        ways = {"down": self.down, "middle": self.middle, "up": self.up}
        steps = [(f"{way}.{i}", step) for way, steps in ways.items() for i, step in enumerate(steps)]
        found = [(name, step.attention) for name, step in steps if isinstance(step, Step) and step.attention]
        return [Layer(name, "space", fused(attention.qkv)) for name, attention in found]


def _change(channels: int, style: Style, resample: str, way: Resample) -> nn.Module:
    return Change(channels, channels, style, way) if resample == "block" else Convolution(channels, way)


def _way_down(
    channels: int, widths: list[int], blocks: int, style: Style, heads: list[int | None], resample: str
) -> tuple[nn.ModuleList, list[int]]:
    """The steps down, and the channels of every result that is kept for the way up."""
    steps, kept = nn.ModuleList(), [channels]
    for level, width in enumerate(widths):
        for _ in range(blocks):
            steps.append(Step(kept[-1], width, style, heads[level]))
            kept.append(width)
        if level < len(widths) - 1:
            steps.append(_change(width, style, resample, "down"))
            kept.append(width)
    return steps, kept


def _way_up(
    kept: list[int], widths: list[int], blocks: int, style: Style, heads: list[int | None], resample: str
) -> nn.ModuleList:
    steps, current = nn.ModuleList(), widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks + 1):
            steps.append(Step(current + kept.pop(), width, style, heads[level], crossing=True))
            current = width
        if level > 0:
            steps.append(_change(width, style, resample, "up"))
    return steps


def _sides(shape: Shape, levels: int) -> list[int]:
    """The longer side of the image at every level."""
    _, height, width = shape
    unit, common = 2 ** (levels - 1), math.gcd(height, width)
    if common % unit:
        most = (common & -common).bit_length()  # powers of 2 in both sides, and one
        raise ConfigError(
            f"unet.multipliers: {levels} levels halve the image {levels - 1} times, but {height}x{width} is not "
            f"divisible by {unit}. Use at most {most} multiplier{'s' if most > 1 else ''} for images of this size, or "
            f"sides that are multiples of {unit}."
        )
    return [max(height, width) // 2**level for level in range(levels)]


def _heads(width: int, heads: int, head_channels: int | None) -> int:
    """How many heads attention of some channels has."""
    if head_channels is not None and (head_channels < 1 or width % head_channels):
        raise ConfigError(
            f"unet.head_channels: a divisor of the {width} channels at attention is needed, found {head_channels}."
        )
    if head_channels is None and (heads < 1 or width % heads):
        raise ConfigError(f"unet.heads: a divisor of the {width} channels at attention is needed, found {heads}.")
    return heads if head_channels is None else width // head_channels


def _check_attention(attention: tuple[int, ...], sides: list[int]) -> None:
    absent = [side for side in attention if side not in sides]
    if absent:
        raise ConfigError(
            f"unet.attention: no level has the resolution {absent[0]}; those of this network are "
            f"{', '.join(map(str, sides))} (longer side in pixels)."
        )


def _check_numbers(
    channels: int, multipliers: tuple[int, ...], blocks: int, dropout: float, embedding: int, groups: int
) -> None:
    counts = {"channels": channels, "blocks": blocks, "embedding": embedding, "groups": groups}
    small = [f"{name}={value}" for name, value in counts.items() if value < 1]
    if small or not multipliers or min(multipliers) < 1 or not 0 <= dropout < 1:
        raise ConfigError(
            "unet: channels, blocks, embedding, groups and every multiplier must be at least 1 and 0 <= dropout < 1, "
            f"found {', '.join([*small, f'multipliers={list(multipliers)}', f'dropout={dropout}'])}."
        )
