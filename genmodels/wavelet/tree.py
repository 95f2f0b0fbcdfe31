"""Which coefficients are drawn given which: octaves of a grid, split into rings of wavelet packets."""

import math

import torch
from torch import Tensor, nn

from ..registry import ConfigError
from .filter_bank import Packets, analysis

TILE = 4  # pixels a side of the smallest tile of rings that nobody asked for by octave


class Level(nn.Module):
    """One conditional p(x̄ | what is coarser): a ring of packets, seen on the grid of its octave.

    A ring q holds the tiles whose larger band index is q. Its field y on the grid H x W has all bands <= q; the
    coefficients x̄ = Ḡ y of the ring are drawn, those below are given. The coarsest level has no ring below: the whole
    field is drawn.

    Args:
        packets: of the octave's grid.
        ring: q; 0 with packets of depth 0 for the whole field.
    Attributes:
        dim: number of coefficients drawn.
        conditional: False for the coarsest level.
        tile: [dim] int64, which tile of the ring a coefficient belongs to, counted from 0.
    """

    index: Tensor
    tile: Tensor

    def __init__(self, packets: Packets, ring: int) -> None:
        super().__init__()
        self.packets, self.ring, self.size = packets, ring, packets.size
        self.conditional = packets.depth > 0
        index = self._mask().flatten().nonzero().squeeze(1)
        height, width = (n >> packets.depth for n in self.size)
        row, column = index // self.size[1] // height, index % self.size[1] // width
        tile = torch.unique(row * 2**packets.depth + column, return_inverse=True)[1]
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("tile", tile, persistent=False)
        self.dim = len(index)

    @property
    def label(self) -> str:
        """`32x32` of an octave or the whole field, `32x32 band 3/4` of one of several rings."""
        grid, (rings, ring) = f"{self.size[0]}x{self.size[1]}", (2**self.packets.depth, self.ring)
        return grid if rings <= 2 else f"{grid} band {ring}/{rings}"

    def detail(self, y: Tensor) -> Tensor:
        """[*, dim] coefficients Ḡ y of fields y [*, H, W]."""
        return self.packets(y).flatten(-2)[..., self.index]

    def synthesize(self, z: Tensor) -> Tensor:
        """[*, H, W] fields Ḡᵀ z of coefficients z [*, dim]."""
        c = z.new_zeros(*z.shape[:-1], self.size[0] * self.size[1])
        c[..., self.index] = z
        return self.packets.inverse(c.unflatten(-1, self.size))

    def weights(self, s: tuple[int, int] = (0, 0), t: tuple[int, int] = (0, 0)) -> Tensor:
        """[H, W] float64 (Ḡᵀ Ḡ)[i + s, i + t] at every pixel i: how much two move together with the coefficients.

        With s = t = 0, how much a pixel moves: Σ w = dim.
        """
        vertical, horizontal = (
            m.roll(-s[axis], 1) * m.roll(-t[axis], 1)
            for axis, m in enumerate((self.packets.rows, self.packets.columns))
        )
        return vertical.T @ self._mask() @ horizontal

    def shift_trace(self, a: int, b: int) -> float:
        """tr(Ḡ T Ḡᵀ) of the shift (T y)[i, k] = y[i + a, k + b]: Σ_{(p, r) in the ring} c_a[p] c_b[r]."""
        vertical, horizontal = (
            (m * m.roll(-s, 1)).sum(1) for m, s in ((self.packets.rows, a), (self.packets.columns, b))
        )
        return float(vertical @ self._mask() @ horizontal)

    def _mask(self) -> Tensor:
        return (self.packets.band == self.ring).double()


class Known(Level):
    """What a level is given, as a level that draws all of it: functions of it have their derivatives by these.

    Args:
        packets: of the grid.
        ring: q; the coefficients are those of the bands below it.
    """

    def __init__(self, packets: Packets, ring: int = 1) -> None:
        super().__init__(packets, ring)
        self.conditional = False

    @property
    def label(self) -> str:
        return f"the free energy on {self.size[0]}x{self.size[1]}" + (
            f" bands < {self.ring}/{2**self.packets.depth}" if self.packets.depth else ""
        )

    def _mask(self) -> Tensor:
        return (self.packets.band < self.ring).double()


class Tree(nn.Module):
    """The levels of a field from coarse to fine.

    An octave of depth M splits its H x W grid into 2^M x 2^M tiles, of which the rings q = 2^M - 1 … 2^(M-1) are
    levels; what is left is a field on the grid H/2 x W/2, where the next octave begins.

    Args:
        size: (H, W) of the fields.
        wavelet: a name of `genmodels.wavelet.filters`.
        octaves: how many; None for as many as both sizes allow. With 0 there is one level, the field itself.
        subdivisions: M, of each octave from the finest, as far as its grid can be halved so often; or of every octave,
            then less on grids whose tiles would have fewer than 4 pixels a side.
    Attributes:
        levels: coarse to fine; the first draws the coarsest field whole.
    Raises:
        ConfigError: if the sizes cannot be halved so often, or a number is out of its range.
    """

    def __init__(
        self,
        size: tuple[int, int],
        wavelet: str = "db4",
        octaves: int | None = None,
        subdivisions: int | tuple[int, ...] = 1,
    ) -> None:
        super().__init__()
        self.size, self.wavelet = tuple(size), wavelet
        most = min(_halvings(n) for n in size)
        octaves = most if octaves is None else octaves
        if not 0 <= octaves <= most:
            raise ConfigError(
                f"octaves: a grid of {size[0]} x {size[1]} can be halved {most} times, not {octaves}. Both sizes must "
                f"be multiples of {2 ** max(octaves, 0)}: crop or pool the fields, or give fewer octaves."
            )
        given = (subdivisions,) * octaves if isinstance(subdivisions, int) else subdivisions
        if len(given) != octaves or any(not 1 <= m <= 5 for m in given):
            raise ConfigError(
                f"subdivisions: one number from 1 to 5, or one for each of the {octaves} octaves from the finest, is "
                f"needed, found {subdivisions}."
            )
        levels, first = [], []
        for k, m in enumerate(given):
            grid = tuple(n >> k for n in size)
            least = TILE if isinstance(subdivisions, int) else 1
            deepest = max(1, _halvings(math.gcd(*grid)) - _halvings(least))
            packets = Packets(grid, wavelet, min(m, deepest))
            rings = 2**packets.depth
            levels += [Level(packets, q) for q in range(rings - 1, rings // 2 - 1, -1)]
            first += [False] * (rings // 2 - 1) + [True]
        coarsest = Level(Packets(tuple(n >> octaves for n in size), wavelet, 0), 0)
        self.levels = nn.ModuleList([coarsest, *reversed(levels)])
        self.begins = [False, *reversed(first)]  # whether a level is the first of its octave
        for k in range(octaves):
            for axis in (0, 1):
                half = size[axis] >> (k + 1)
                matrix = analysis(2 * half, wavelet, 1)[:half]
                self.register_buffer(f"low_{2 * half}", matrix, persistent=False)

    def _low(self, size: int) -> Tensor:
        return getattr(self, f"low_{size}")

    def _apply(self, fn, recurse: bool = True):  # noqa: ANN001, ANN202 - torch's own signature
        """As in `Packets`: the matrices stay float64."""
        kept = {name: b for name, b in self._buffers.items()}
        super()._apply(fn, recurse)
        for name, matrix in kept.items():
            setattr(self, name, matrix.to(fn(matrix.new_empty(0)).device))
        return self

    def coarsen(self, y: Tensor) -> Tensor:
        """[*, H/2, W/2] low-pass field of y [*, H, W]; a constant c becomes 2 c."""
        return self._low(y.shape[-2]).to(y) @ y @ self._low(y.shape[-1]).to(y).T

    def refine(self, y: Tensor) -> Tensor:
        """[*, 2 H, 2 W] field without details whose low-pass field is y [*, H, W]."""
        return self._low(2 * y.shape[-2]).to(y).T @ y @ self._low(2 * y.shape[-1]).to(y)

    def decompose(self, x: Tensor) -> list[Tensor]:
        """The field of every level, coarse to fine, of fields x [*, H, W]: the last one is x itself."""
        fields = []
        for k in range(len(self.levels) - 1, 0, -1):
            fields.append(x)
            x = self.lower(k, x)
        return [x, *reversed(fields)]

    def lower(self, k: int, y: Tensor) -> Tensor:
        """The field of level k - 1, of the field y of level k."""
        known = self.given(k, y)
        return self.coarsen(known) if self.begins[k] else known

    def lift(self, k: int, y: Tensor) -> Tensor:
        """The adjoint of `lower`: takes gradients by the field of level k - 1 to those by the field of level k."""
        return self.refine(y) if self.begins[k] else self.given(k, y)

    def known(self, k: int) -> Known:
        """What level k >= 1 is given, on the grid of the field of level k - 1."""
        level = self.levels[k]
        if self.begins[k]:
            return Known(Packets(self.levels[k - 1].size, self.wavelet, 0))
        return Known(level.packets, level.ring)

    def base(self, k: int, below: Tensor | None, count: int, like: Tensor) -> Tensor:
        """[B, H, W] what is known of the field of level k, given the field of level k - 1 (None at the coarsest)."""
        if k == 0:
            return like.new_zeros(count, *self.levels[0].size)
        return self.refine(below) if self.begins[k] else below

    def given(self, k: int, y: Tensor) -> Tensor:
        """[*, H, W] the field y of level k without what that level draws: `base` of the field below."""
        level = self.levels[k]
        return y - level.synthesize(level.detail(y))


def _halvings(n: int) -> int:
    return (n & -n).bit_length() - 1
