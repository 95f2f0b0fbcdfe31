"""The cell of multi-scale equilibrium models: images of several sizes, each a state beside the others."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape
from .cells import Cell, Injection, check_block, dropped, shifted
from .mlp import Embeddings
from .network import check_images
from .weight_norm import Conv2d

RETURNED = 0.1  # what starts out to come back of a state, beside what comes of the item


class _Residual(nn.Module):
    """norm(relu(z + norm(drop(conv(relu(norm(conv z)))) + u) + e)), on images of one size.

    e is the same at every place, and would be taken out again by the norm that u passes through.

    Source: Bai et al. 2020 (Multiscale deep equilibrium models), section 4.1.
    """

    def __init__(self, channels: int, expansion: int, kernel: int, groups: int, weight_norm: bool) -> None:
        super().__init__()
        wide, pad = expansion * channels, (kernel // 2,) * 2
        self.first = Conv2d(channels, wide, kernel, pad, weight_norm=weight_norm)
        self.second = Conv2d(wide, channels, kernel, pad, weight_norm=weight_norm)
        sizes = (wide, channels, channels)
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(groups, size), size) for size in sizes)

    def forward(
        self, z: Tensor, u: Tensor | None = None, shift: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        inside, after, last = self.norms
        h = self.second(F.relu(inside(self.first(z))))
        h = h if mask is None else h * mask
        h = after(h if u is None else h + u)
        return last(F.relu(z + h if shift is None else z + h + shift))


@register(Cell, "multiscale_cell")
class MultiscaleCell(Cell):
    """Residual blocks on images of several sizes, each half the one before, and what fuses them; one state for all.

    Every scale passes through a block of its own, norm(relu(z + norm(drop(conv(relu(norm(conv z)))) + u) + e)); u and
    e enter the first alone.
    Then every scale i receives norm(relu(conv1x1 Σ_j T_ij h_j)), where T_ij is the identity for i = j, strided 3x3
    convolutions with norms on the way down, and a 3x3 convolution with a norm and nearest neighbours on the way up.
    States are the scales, flattened one after the other.

    `read` brings every scale to `head` channels by a 1x1 convolution and adds them up on the way down to the smallest.

    Args:
        channels: of each scale.
        head: channels of each scale in what is read from a state; the last one's are given out.
        expansion, kernel, groups, dropout, weight_norm: see `conv_cell`.
    Raises:
        ConfigError: if items are not images whose sides can be halved so often, or a number is out of its range.
    Source: Bai et al. 2020 (Multiscale deep equilibrium models), section 4.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (24, 24),
        head: tuple[int, ...] = (24, 48),
        expansion: int = 5,
        kernel: int = 3,
        groups: int = 8,
        dropout: float = 0.2,
        weight_norm: bool = False,
        *,
        in_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        check_images(self.registered_name, in_shape, in_shape)
        check_block(self.registered_name, channels, expansion, kernel, dropout)
        size, count = in_shape[1:], len(channels)
        if len(head) != count or min(head) < 1 or any(side % 2 ** (count - 1) for side in size):
            raise ConfigError(
                f"multiscale_cell: {count} scales need as many `head` channels, found {list(head)}, and sides that can "
                f"be halved {count - 1} times, found {list(size)}."
            )
        self.item_shape, self.dropout = tuple(in_shape), dropout
        self.scales = [(c, size[0] >> i, size[1] >> i) for i, c in enumerate(channels)]
        self.sizes = [math.prod(scale) for scale in self.scales]
        self.in_shape, self.out_shape = (sum(self.sizes),), (head[-1], *self.scales[-1][1:])
        self.entrance = nn.Conv2d(in_shape[0], channels[0], kernel, padding=kernel // 2)
        self.embeddings = Embeddings(channels[0], timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        self.blocks = nn.ModuleList(_Residual(c, expansion, kernel, groups, weight_norm) for c in channels)
        norm = lambda c: nn.GroupNorm(math.gcd(groups, c), c)  # noqa: E731
        self.ways = nn.ModuleList(nn.ModuleList(_way(channels, i, j, norm) for j in range(count)) for i in range(count))
        self.after = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.ReLU(), norm(c)) for c in channels)
        self.necks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, h, 1), norm(h), nn.ReLU()) for c, h in zip(channels, head, strict=True)
        )
        self.downs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), norm(b), nn.ReLU()) for a, b in pairwise(head)
        )
        self._start_as_a_contraction()

    @torch.no_grad()
    def _start_as_a_contraction(self) -> None:
        """Make little of what comes back of a state: norms give all that they are given the same size, and so undo it.

        The item enters the first scale, and goes down from there; the rest starts out small beside it.
        """
        for block in self.blocks:
            (block.second.weight if block.second.gain is None else block.second.gain).mul_(RETURNED)
        quiet = [after[-1] for after in self.after] + [norm for block in self.blocks[1:] for norm in block.norms[1:]]
        quiet += [self.ways[i][j][1] for i, j in combinations(range(len(self.scales)), 2)]  # on the way up
        for norm in quiet:
            norm.weight.mul_(RETURNED)

    def inject(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Injection:
        u = self.entrance(x)
        masks = {
            f"mask{i}": dropped(u.new_empty(len(u), c), self.dropout, self.training)
            for i, (c, *_) in enumerate(self.scales)
        }
        found = {"u": u} | shifted(self.embeddings, t, x, condition)
        return found | {key: mask[:, :, None, None] for key, mask in masks.items() if mask is not None}

    def split(self, z: Tensor) -> list[Tensor]:
        """The images [B, C, H, W] of every scale."""
        parts = z.split(self.sizes, 1)
        return [part.reshape(len(z), *scale) for part, scale in zip(parts, self.scales, strict=True)]

    def forward(self, t: Tensor | None, z: Tensor, condition: Condition | None = None) -> Tensor:
        inner = [
            block(
                part, *((condition["u"], condition.get("shift")) if i == 0 else (None, None)), condition.get(f"mask{i}")
            )
            for i, (block, part) in enumerate(zip(self.blocks, self.split(z), strict=True))
        ]
        fused = [
            after(sum(way(part) for way, part in zip(ways, inner, strict=True)))
            for ways, after in zip(self.ways, self.after, strict=True)
        ]
        return torch.cat([part.flatten(1) for part in fused], 1)

    def read(self, z: Tensor) -> Tensor:
        first, *rest = (neck(part) for neck, part in zip(self.necks, self.split(z), strict=True))
        for down, part in zip(self.downs, rest, strict=True):
            first = down(first) + part
        return first


def _way(channels: Sequence[int], to: int, source: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    """From the images of one scale to those of another."""
    if to == source:
        return nn.Identity()
    if to < source:  # up
        up = nn.Upsample(scale_factor=2 ** (source - to), mode="nearest")
        return nn.Sequential(
            nn.Conv2d(channels[source], channels[to], 3, padding=1, bias=False), norm(channels[to]), up
        )
    steps: list[nn.Module] = []
    for k in range(source, to):
        width = channels[to] if k == to - 1 else channels[source]
        steps += [nn.Conv2d(channels[source], width, 3, 2, 1, bias=False), norm(width)]
        steps += [] if k == to - 1 else [nn.ReLU()]
    return nn.Sequential(*steps)
