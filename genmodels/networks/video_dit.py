"""Diffusion transformer of videos: attention within frames and along time in turn, and a network on every token."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape
from .attention import Attention, fused
from .dit import Modulation, attended, normalized, positions
from .mlp import Embeddings
from .network import Network

Axis = Literal["space", "time"]
# tokens come as [B, (t n), width]; those in the second place attend to each other
ALONG: dict[Axis, str] = {"space": "(b t) n d", "time": "(b n) t d"}


class AxisAttention(nn.Module):
    """Self-attention of tokens [B, T·N, width] among those of one frame ("space") or of one place ("time")."""

    def __init__(self, width: int, heads: int, dropout: float, axis: Axis) -> None:
        super().__init__()
        self.heads, self.dropout, self.along = heads, dropout, ALONG[axis]
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor, frames: int) -> Tensor:
        sizes = {"t": frames, "n": h.shape[1] // frames}
        qkv = rearrange(self.qkv(h), f"b (t n) d -> {self.along}", **sizes)
        out = attended(qkv, self.heads, self.dropout if self.training else 0.0)
        return self.merge(rearrange(out, f"{self.along} -> b (t n) d", **sizes))


class VideoBlock(nn.Module):
    """Attention in space, attention in time and a two-layer network on tokens h, all set by the vector c.

    h = h + g₁ Space(m₁(h)); h = h + g₂ Time(m₂(h)); h = h + g₃ W₂ gelu(W₁ m₃(h)), with m_i(h) = (1 + s_i) LN(h) + b_i
    and b, s, g linear in c.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.space, self.time = (AxisAttention(width, heads, dropout, axis) for axis in ALONG)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.modulation = Modulation(width, 9)

    def forward(self, h: Tensor, c: Tensor, rows: Tensor | None, frames: int) -> Tensor:
        b1, s1, g1, b2, s2, g2, b3, s3, g3 = self.modulation(c, rows)
        h = torch.addcmul(h, g1, self.space(normalized(h, b1, s1), frames))
        h = torch.addcmul(h, g2, self.time(normalized(h, b2, s2), frames))
        return torch.addcmul(h, g3, self.expand(normalized(h, b3, s3)))

    def expand(self, h: Tensor) -> Tensor:
        return self.second(F.dropout(F.gelu(self.first(h)), self.dropout, self.training))


@register(Network, "video_dit")
class VideoDiT(Network):
    """Transformer over the patches of a video [C, T, H, W], with attention in space and time apart; starts at 0.

    Patches of single frames become tokens by a linear layer plus fixed sines of frame, row and column, and tokens
    patches by another. Time and condition act as in `dit` (adaLN-Zero).

    Args:
        patch: side of a patch in pixels; it must divide H and W.
        width: features of a token; a multiple of 12 (a third of the sines for each axis) and of heads.
        depth: number of blocks, each of which attends in space and in time.
        heads: attention heads.
        expansion: hidden width of a block's two-layer network over width.
        dropout: share dropped of attention weights and hidden features in training.
    Raises:
        ConfigError: if in_shape and out_shape are not videos of one size that patches tile, or the width does not fit.
    Source: Ma et al. 2024 (Latte), its third variant; Peebles & Xie 2023 (Scalable diffusion models with
        transformers), section 3.2.
    """

    blockwise = True

    def __init__(
        self,
        patch: int = 4,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        expansion: float = 4.0,
        dropout: float = 0.0,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape, self.patch = tuple(in_shape), tuple(out_shape), patch
        _check(self.in_shape, self.out_shape, patch, width, heads)
        if depth < 1 or round(expansion * width) < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                "video_dit: depth >= 1, expansion > 0 and 0 <= dropout < 1 are needed, found "
                f"depth={depth}, expansion={expansion}, dropout={dropout}."
            )
        channels, self.frames, height, columns = self.in_shape
        self.rows, self.columns = height // patch, columns // patch
        self.embeddings = Embeddings(width, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        # without time and condition something must still set the scales, shifts and gates
        self.constant = None if self.embeddings.active else nn.Parameter(torch.zeros(width))
        self.enter = nn.Linear(channels * patch**2, width)
        nn.init.xavier_uniform_(self.enter.weight)
        places = places_of(self.frames, self.rows, self.columns, width)
        self.register_buffer("positions", places, persistent=False)
        self.blocks = nn.ModuleList(VideoBlock(width, heads, round(expansion * width), dropout) for _ in range(depth))
        self.modulation, self.leave = Modulation(width, 2), nn.Linear(width, self.out_shape[0] * patch**2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        c, rows = self.embeddings.distinct(t, x, condition)
        c = F.silu(c if self.constant is None else c + self.constant)
        h = self.enter(rearrange(x, "b c t (i p) (j q) -> b (t i j) (c p q)", p=self.patch, q=self.patch))
        h = h + self.positions.to(x.dtype)
        for block in self.blocks:
            h = self.recompute(block, h, c, rows, self.frames)
        out = self.leave(normalized(h, *self.modulation(c, rows)))
        sizes = {"t": self.frames, "i": self.rows, "p": self.patch, "q": self.patch}
        return rearrange(out, "b (t i j) (c p q) -> b c t (i p) (j q)", **sizes)

    def attention(self) -> list[Attention]:
        return [
            Attention(f"blocks.{number}.{axis}", axis, fused(getattr(block, axis).qkv))
            for number, block in enumerate(self.blocks)
            for axis in ALONG
        ]


def places_of(frames: int, rows: int, columns: int, width: int) -> Tensor:
    """[frames·rows·columns, width] sines and cosines of frame, row and column, a third of the width each.

    Source: Vaswani et al. 2017 (Attention is all you need), section 3.5, for each axis.
    """
    third = width // 3
    when = positions(frames, 1, 2 * third)[:, :third]
    where = positions(rows, columns, 2 * third)
    return torch.cat((when.repeat_interleave(len(where), 0), where.repeat(frames, 1)), 1)


def _check(in_shape: Shape, out_shape: Shape, patch: int, width: int, heads: int) -> None:
    if len(in_shape) != 4 or len(out_shape) != 4 or in_shape[1:] != out_shape[1:]:
        raise ConfigError(
            f"video_dit: videos [C, T, H, W] of one size are needed, found items of shape {list(in_shape)} in and "
            f"{list(out_shape)} out. Use dit for images, mlp or residual_mlp for vectors."
        )
    _, _, height, columns = in_shape
    if patch < 1 or height % patch or columns % patch:
        usable = [p for p in range(1, min(height, columns) + 1) if height % p == 0 and columns % p == 0]
        raise ConfigError(
            f"video_dit.patch: patches of {patch} pixels do not tile frames of {height}x{columns}. Use one of: "
            f"{', '.join(map(str, usable))}."
        )
    if heads < 1 or width < 12 or width % heads or width % 12:
        raise ConfigError(f"video_dit.width: a multiple of 12 and of heads = {heads} is needed, found {width}.")
