"""Orthogonal periodic wavelet packets of a grid as one matrix an axis, exact at every even size."""

import torch
from torch import Tensor, nn

from ..registry import ConfigError
from .filters import low_pass


def split_matrix(size: int, wavelet: str) -> Tensor:
    """[L, L] float64: low-pass rows A[n, (2n + k) mod L] += h[k], then high-pass rows with g[k] = (-1)^k h[K-1-k].

    Filters longer than the circle wrap round it, which keeps A orthogonal.

    Args:
        size: L, even.
    """
    h = low_pass(wavelet, size)
    signs = torch.where(torch.arange(len(h)) % 2 == 0, 1.0, -1.0).to(h)
    mirror = h.flip(0).roll(2) if wavelet == "shannon" else h.flip(0)  # h[1-k] of a filter symmetric about 0
    g = signs * mirror
    places = (2 * torch.arange(size // 2)[:, None] + torch.arange(len(h))) % size
    halves = [
        torch.zeros(size // 2, size, dtype=torch.float64).scatter_add_(1, places, f.expand_as(places)) for f in (h, g)
    ]
    return torch.cat(halves)


def analysis(size: int, wavelet: str = "db4", depth: int = 1) -> Tensor:
    """[L, L] float64 orthogonal matrix A of the full packet tree: c = A x, rows grouped by band in order of frequency.

    There are 2^depth bands of L/2^depth rows each. A high-pass branch reverses frequencies, so that every second block
    is split into (high, low) instead of (low, high).

    Args:
        size: L, divisible by 2^depth.
        wavelet: a name of `genmodels.wavelet.filters`.
        depth: 0 gives the identity.
    Raises:
        ConfigError: if the size is not divisible, or the wavelet unknown.
    """
    if size < 1 or depth < 0 or size % 2**depth:
        raise ConfigError(
            f"wavelet packets: {size} points cannot be split {depth} times in two. The size of an axis must be a "
            f"multiple of {2 ** max(depth, 0)}: crop or pool the fields, or split less."
        )
    blocks = [torch.eye(size, dtype=torch.float64)]
    for _ in range(depth):
        matrix = split_matrix(len(blocks[0]), wavelet)
        halves = [(matrix @ block).chunk(2) for block in blocks]
        blocks = [part for i, (low, high) in enumerate(halves) for part in ((high, low) if i % 2 else (low, high))]
    return torch.cat(blocks)


class Packets(nn.Module):
    """Coefficients C = A_H x A_Wᵀ of fields x [*, H, W]: separable packets, orthogonal and periodic.

    Tile (p, r) of C holds the band p of frequencies along rows and r along columns; tiles are
    H/2^depth x W/2^depth. Σ C² = Σ x², and the inverse is the transpose.

    Args:
        size: (H, W), each divisible by 2^depth.
        wavelet: a name of `genmodels.wavelet.filters`.
        depth: how often each axis is split; 0 for the identity.
    Attributes:
        band: [H, W] int64, the larger of the two band indices of each coefficient.
    Raises:
        ConfigError: as of `analysis`.
    """

    rows: Tensor
    columns: Tensor
    band: Tensor

    def __init__(self, size: tuple[int, int], wavelet: str = "db4", depth: int = 1) -> None:
        super().__init__()
        self.size, self.depth = tuple(size), depth
        height, width = size
        self.register_buffer("rows", analysis(height, wavelet, depth), persistent=False)
        self.register_buffer("columns", analysis(width, wavelet, depth), persistent=False)
        vertical, horizontal = (torch.arange(n) * 2**depth // n for n in size)
        self.register_buffer("band", torch.maximum(vertical[:, None], horizontal), persistent=False)

    def _apply(self, fn, recurse: bool = True):  # noqa: ANN001, ANN202 - torch's own signature
        """Devices change, the precision does not: the matrices stay float64 whatever `model.float()` does."""
        kept = self.rows, self.columns
        super()._apply(fn, recurse)
        self.rows, self.columns = (m.to(fn(m.new_empty(0)).device) for m in kept)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[*, H, W] coefficients of x [*, H, W]."""
        if self.depth == 0:
            return x
        return self.rows.to(x) @ x @ self.columns.to(x).T

    def inverse(self, c: Tensor) -> Tensor:
        """[*, H, W] field of the coefficients c [*, H, W]."""
        if self.depth == 0:
            return c
        return self.rows.to(c).T @ c @ self.columns.to(c)
