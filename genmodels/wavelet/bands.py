"""Quadratic interactions between coefficients of wavelet packets: tiles with tiles, at shifts of the tiles' grid."""

from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch import Tensor

from ..registry import ConfigError, register
from .terms import QuadraticForm, Shift, Term
from .tree import Level

Tile = tuple[int, int]
Entry = tuple[int, int, Shift, float]  # K[(c, n), (d, n - s)] += value at every n, for channels c, d


@register(Term, "bands")
class Bands(QuadraticForm):
    """½ Σ_{c,d,s} K_{c,d,s} Σ_n z_c[n] z_d[n-s]: coefficients of packets that interact with those of near positions.

    Channels c are the tiles z_c [h, w] of the level's packets: those of the ring that is drawn, and those of rings
    below it. All pairs interact but those that are given both, at every shift with |s|_∞ <= reach on the tiles' grid;
    K is symmetric, so that of one tile only a half-plane of shifts counts. The form is not changed by shifts of the
    field by 2^M pixels. With C varying and G given tiles and a window of S = (2 reach + 1)² shifts that fits in the
    tiles there are (C(C-1)/2 + C G) S + C (S + 1)/2 features, less one unless `own`.

    The coarsest level is one tile, the field itself. Shifts of `quadratic` by multiples of 2^M pixels are forms of this
    kind too (all shifts, if the window covers the tiles): beside them neither can be told from the other.

    Args:
        reach: in coefficients of a tile; 0 for interactions at one position. Shifts count once modulo the tile.
        below: how many rings below the one drawn interact with it.
        neighbours: only tiles interact whose bands differ by at most one along rows and along columns.
        own: whether ½ Σ_c Σ z_c² is a feature too; a potential of splines holds it already. Without, the powers of
            tiles enter as differences to that of the first.
    Raises:
        ConfigError: unless reach >= 0 and below >= 0.
    Source: Guth et al. 2023 (Conditionally strongly log-concave generative models).
    """

    feature: Tensor
    place: Tensor
    value: Tensor

    def __init__(
        self, reach: int = 2, below: int = 1, neighbours: bool = False, own: bool = False, *, level: Level
    ) -> None:
        super().__init__(level)
        if reach < 0 or below < 0:
            raise ConfigError(f"bands: reach >= 0 and below >= 0 are needed, found {reach} and {below}.")
        split = 2**level.packets.depth
        self.split, self.tile = split, tuple(n // split for n in level.size)
        varying, given = tiles(level.ring, below)
        channels = varying + given
        self.varying = len(varying)
        self.channels = [p * split + r for p, r in channels]
        found = list(_features(channels, len(varying), _window(self.tile, reach), self.tile, neighbours, own))
        self.names = [name for name, _ in found]
        entries = [(m, *entry) for m, (_, part) in enumerate(found) for entry in part]
        place = [self._place(c, d, s) for _, c, d, s, _ in entries]
        trace = torch.zeros(len(found), dtype=torch.float64)
        for m, c, d, s, value in entries:
            if c == d < self.varying and s == (0, 0):
                trace[m] += value * self.tile[0] * self.tile[1]
        self.register_buffer("feature", torch.tensor([e[0] for e in entries], dtype=torch.int64), persistent=False)
        self.register_buffer("place", torch.tensor(place, dtype=torch.int64), persistent=False)
        self.register_buffer("value", torch.tensor([e[-1] for e in entries], dtype=torch.float64), persistent=False)
        self.register_buffer("traces", trace, persistent=False)

    def _place(self, c: int, d: int, s: Shift) -> int:
        """Of K_{c,d,s} in a kernel [C, C, h, w]."""
        height, width = self.tile
        return ((c * len(self.channels) + d) * height + s[0] % height) * width + s[1] % width

    def kernel(self, theta: Tensor) -> Tensor:
        """[C, C, h, w] float64 K_{c,d,s}, first the tiles drawn, then those given."""
        flat = theta.new_zeros(len(self.channels) ** 2 * self.tile[0] * self.tile[1], dtype=torch.float64)
        flat = flat.index_add(0, self.place, theta.double()[self.feature] * self.value)
        return flat.unflatten(0, (len(self.channels), len(self.channels), *self.tile))

    def _analyse(self, u: Tensor) -> Tensor:
        """[*, C, h, w] the channels of fields u [*, H, W]."""
        every = rearrange(self.level.packets(u), "... (p h) (r w) -> ... (p r) h w", p=self.split, r=self.split)
        return every[..., self.channels, :, :]

    def _synthesise(self, z: Tensor) -> Tensor:
        """[*, H, W] fields of channels z [*, C, h, w]; the adjoint of `_analyse`."""
        every = z.new_zeros(*z.shape[:-3], self.split**2, *self.tile)
        every[..., self.channels, :, :] = z
        return self.level.packets.inverse(
            rearrange(every, "... (p r) h w -> ... (p h) (r w)", p=self.split, r=self.split)
        )

    def matrix(self, theta: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        symbol = torch.fft.rfft2(self.kernel(theta)).to(dtype.to_complex())

        def product(v: Tensor) -> Tensor:
            mixed = torch.einsum("cdhw,...dhw->...chw", symbol, torch.fft.rfft2(self._analyse(v)))
            return self._synthesise(torch.fft.irfft2(mixed, s=self.tile))

        return product

    def features(self, u: Tensor) -> Tensor:
        waves = torch.fft.rfft2(self._analyse(u.double()))
        products = torch.einsum("bchw,bdhw->bcdhw", waves, waves.conj())
        every = torch.fft.irfft2(products, s=self.tile).flatten(1)  # Σ_n z_c[n] z_d[n-s]
        parts = 0.5 * every[:, self.place] * self.value
        return u.new_zeros(len(u), len(self), dtype=torch.float64).index_add(1, self.feature, parts)

    def gradients(self, u: Tensor) -> Tensor:
        z = self._analyse(u)
        slopes = z.new_zeros(len(u), len(self), *z.shape[1:])
        area = self.tile[0] * self.tile[1]
        pair, shift = self.place // area, self.place % area
        for s in shift.unique().tolist():
            moved = z.roll(divmod(s, self.tile[1]), (-2, -1))
            here = shift == s
            c, d = pair[here] // len(self.channels), pair[here] % len(self.channels)
            slopes[:, self.feature[here], c] += moved[:, d] * self.value[here].to(z).reshape(-1, 1, 1)
        return self._synthesise(slopes)

    def diagonal(self, theta: Tensor, u: Tensor) -> Tensor:
        own = self.kernel(theta)[:, :, 0, 0].diagonal()[: self.varying]
        return own[self.level.tile]  # the ring's tiles are numbered row by row, as here


def tiles(ring: int, below: int) -> tuple[list[Tile], list[Tile]]:
    """The tiles (band along rows, along columns) of a ring, and those of so many rings below it, row by row."""
    rings = lambda low, high: [(p, r) for p in range(high + 1) for r in range(high + 1) if max(p, r) >= low]  # noqa: E731
    return rings(ring, ring), rings(max(ring - below, 0), ring - 1)


def _shortest(s: int, n: int) -> int:
    """s modulo n in (-n/2, n/2]."""
    return n // 2 - (n // 2 - s) % n


def _window(tile: tuple[int, int], reach: int) -> list[Shift]:
    """Shifts within reach modulo the tile, each once and by its shortest form."""
    near = [sorted({_shortest(s, n) for s in range(-reach, reach + 1)}, reverse=True) for n in tile]
    return [(a, b) for a in near[0] for b in near[1]]


def _features(
    channels: list[Tile], varying: int, window: list[Shift], tile: Tile, neighbours: bool, own: bool
) -> Iterator[tuple[str, list[Entry]]]:
    """Names, and the entries of the matrix K of each feature ½ zᵀ K z."""
    pairs = [(c, d) for c in range(varying) for d in range(c, len(channels))]
    for c, d in pairs:
        (p, r), (q, t) = channels[c], channels[d]
        if neighbours and max(abs(p - q), abs(r - t)) > 1:
            continue
        seen: set[Shift] = set()
        for s in window:
            if s in seen:
                continue
            back = tuple(_shortest(-a, n) for a, n in zip(s, tile, strict=True))
            name = f"band {p},{r} with {q},{t} at {s[0]},{s[1]}"
            if c != d:
                yield name, [(c, d, s, 1.0), (d, c, back, 1.0)]
            elif s != (0, 0):
                seen |= {s, back}
                yield name, [(c, c, s, 1.0)] + ([(c, c, back, 1.0)] if back != s else [])
            elif own:
                yield name, [(c, c, s, 1.0)]
            elif c > 0:
                yield f"{name} less that of the first band", [(c, c, s, 1.0), (0, 0, s, -1.0)]
