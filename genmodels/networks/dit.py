"""Diffusion transformer: patches as tokens, with time and condition acting through layer norms that start at zero."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape
from .attention import Attention, fused
from .mlp import Embeddings, pick
from .network import Network, check_images

SLOWEST = 10_000.0  # positions per radian of the slowest sine


class Modulation(nn.Linear):
    """Shifts, scales and gates [B, 1, width] from vectors, see `Embeddings.distinct`; all 0 at the start."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width, count * width)
        self.count = count
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, c: Tensor, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        return pick(super().forward(c), rows).unsqueeze(1).chunk(self.count, 2)


class Block(nn.Module):
    """Attention and a two-layer network on tokens h, each shifted, scaled and gated by the vector c.

    h = h + g₁ Attention((1 + s₁) LN(h) + b₁); h = h + g₂ W₂ gelu(W₁ ((1 + s₂) LN(h) + b₂)), with b, s, g linear in c.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.qkv, self.merge, self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.modulation = Modulation(width, 6)

    def forward(self, h: Tensor, c: Tensor, rows: Tensor | None = None) -> Tensor:
        b1, s1, g1, b2, s2, g2 = self.modulation(c, rows)
        h = torch.addcmul(h, g1, self.attend(normalized(h, b1, s1)))
        return torch.addcmul(h, g2, self.expand(normalized(h, b2, s2)))

    def attend(self, h: Tensor) -> Tensor:
        return self.merge(attended(self.qkv(h), self.heads, self.dropout if self.training else 0.0))

    def expand(self, h: Tensor) -> Tensor:
        h = F.gelu(self.first(h))  # its tanh approximation is the slower one on CPUs
        return self.second(F.dropout(h, self.dropout, self.training))


def attended(qkv: Tensor, heads: int, dropout: float) -> Tensor:
    """[B, N, width] softmax(q kᵀ / √d) v of every head, from queries, keys and values side by side [B, N, 3·width]."""
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return rearrange(out, "b h n d -> b n (h d)")


def normalized(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) LN(h) + shift for tokens h [B, N, width]."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


@register(Network, "dit")
class DiT(Network):
    """Transformer over the patches of an image [C, H, W], conditioned by adaLN-Zero; its first output is 0.

    Patches become tokens by a linear layer plus fixed sines of row and column, and tokens patches by another.

    Args:
        patch: side of a patch in pixels; it must divide H and W.
        width: features of a token; a multiple of 4 and of heads.
        depth: number of blocks.
        heads: attention heads.
        expansion: hidden width of a block's two-layer network over width.
        dropout: share dropped of attention weights and hidden features in training.
    Raises:
        ConfigError: if in_shape and out_shape are not images of one size that patches tile, or the width does not fit.
    Source: Peebles & Xie 2023 (Scalable diffusion models with transformers), section 3.2.
    """

    blockwise = True

    def __init__(
        self,
        patch: int = 2,
        width: int = 128,
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
                "dit: depth >= 1, expansion > 0 and 0 <= dropout < 1 are needed, found "
                f"depth={depth}, expansion={expansion}, dropout={dropout}."
            )
        self.rows, self.columns = in_shape[1] // patch, in_shape[2] // patch
        self.embeddings = Embeddings(width, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        # without time and condition something must still set the scales, shifts and gates
        self.constant = None if self.embeddings.active else nn.Parameter(torch.zeros(width))
        self.enter = nn.Linear(in_shape[0] * patch**2, width)
        nn.init.xavier_uniform_(self.enter.weight)
        self.register_buffer("positions", positions(self.rows, self.columns, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, round(expansion * width), dropout) for _ in range(depth))
        self.modulation, self.leave = Modulation(width, 2), nn.Linear(width, out_shape[0] * patch**2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        c, rows = self.embeddings.distinct(t, x, condition)
        c = F.silu(c if self.constant is None else c + self.constant)
        h = self.enter(rearrange(x, "b c (i p) (j q) -> b (i j) (c p q)", p=self.patch, q=self.patch))
        h = h + self.positions.to(x.dtype)
        for block in self.blocks:
            h = self.recompute(block, h, c, rows)
        out = self.leave(normalized(h, *self.modulation(c, rows)))
        return rearrange(out, "b (i j) (c p q) -> b c (i p) (j q)", i=self.rows, p=self.patch, q=self.patch)

    def attention(self) -> list[Attention]:
        return [Attention(f"blocks.{i}", "space", fused(block.qkv)) for i, block in enumerate(self.blocks)]


def positions(rows: int, columns: int, width: int) -> Tensor:
    """[rows·columns, width] sines and cosines of the row, then of the column, at width/4 frequencies each.

    Source: Vaswani et al. 2017 (Attention is all you need), section 3.5, for each axis; Peebles & Xie 2023.
    """
    frequencies = SLOWEST ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def waves(n: int) -> Tensor:
        phase = torch.outer(torch.arange(n, dtype=torch.float64), frequencies)
        return torch.cat((phase.sin(), phase.cos()), 1)

    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat((waves(rows)[i.flatten()], waves(columns)[j.flatten()]), 1).float()


def _check(in_shape: Shape, out_shape: Shape, patch: int, width: int, heads: int) -> None:
    check_images("dit", in_shape, out_shape)
    _, height, columns = in_shape
    if patch < 1 or height % patch or columns % patch:
        usable = [p for p in range(1, min(height, columns) + 1) if height % p == 0 and columns % p == 0]
        raise ConfigError(
            f"dit.patch: patches of {patch} pixels do not tile {height}x{columns}. Use one of: "
            f"{', '.join(map(str, usable))}."
        )
    if heads < 1 or width < 4 or width % heads or width % 4:
        raise ConfigError(f"dit.width: a multiple of 4 and of heads = {heads} is needed, found {width}.")
