"""Terms of an energy that are linear in their parameters: Σ_k θ_k Φ_k(u) of fields on a periodic grid."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..registry import ConfigError, kind, register
from ..types import sum_items
from .tree import Level

Shift = tuple[int, int]
Energy = Callable[[Tensor], tuple[Tensor, Tensor]]


@kind
class Term(nn.Module, ABC):
    """A part Σ_k θ_k Φ_k(u) of the energy of a level, with exact derivatives.

    Fields are u = y/σ [B, H, W], in units of the level's standard deviation. Derivatives are given by pixels; the level
    projects them on the coefficients that it draws.

    Args:
        level: supplied by the model.
    Attributes:
        names: of the features Φ_k, in order.
    """

    names: list[str]

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.__dict__["level"] = level  # no child: levels belong to the tree

    def __len__(self) -> int:
        return len(self.names)

    def fit(self, u: Tensor) -> None:
        """Set buffers from some training fields u [N, H, W], before anything else is asked."""

    @abstractmethod
    def features(self, u: Tensor) -> Tensor:
        """[B, M] float64 Φ_k(u)."""

    @abstractmethod
    def gradients(self, u: Tensor) -> Tensor:
        """[B, M, H, W] ∂Φ_k/∂u."""

    @abstractmethod
    def laplacians(self, u: Tensor) -> Tensor:
        """[B, M] float64 tr(Ḡ ∂²Φ_k/∂u² Ḡᵀ), exact."""

    @abstractmethod
    def energy(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """[B] float64 Σ θ_k Φ_k(u), and its gradient [B, H, W]."""

    def at(self, theta: Tensor, dtype: torch.dtype) -> Energy:
        """u [B, H, W] of a dtype -> what `energy` gives; terms may find what depends on θ alone once for a chain, so
        that it is to be asked for anew when θ or the term has changed."""
        return partial(self.energy, theta)

    @abstractmethod
    def hessian(self, theta: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """[*, H, W] product of the Hessian at u [*, H, W] with v [*, H, W]."""

    @abstractmethod
    def laplacian(self, theta: Tensor, u: Tensor) -> Tensor:
        """[B] float64 tr(Ḡ ∂²/∂u² Ḡᵀ) of the energy."""

    @abstractmethod
    def diagonal(self, theta: Tensor, u: Tensor) -> Tensor:
        """[dim] mean over u [B, H, W] of the Hessian's diagonal in the level's coefficients."""

    def at_infinity(self, theta: Tensor, v: Tensor) -> Tensor:
        """[*, H, W] product of v with the Hessian far from the data, where terms that stay bounded count as nothing."""
        return torch.zeros_like(v)

    def least_curvature(self, theta: Tensor) -> float:
        """A number below all eigenvalues, at every field, of the Hessian less that of `at_infinity`."""
        return -math.inf


class QuadraticForm(Term):
    """½ uᵀ K u with K = Σ θ_k K_k: the Hessian is K everywhere.

    Attributes:
        traces: [M] float64 tr(Ḡ K_k Ḡᵀ).
    """

    traces: Tensor

    @abstractmethod
    def matrix(self, theta: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """v [*, H, W] of a dtype -> K v."""

    def laplacians(self, u: Tensor) -> Tensor:
        return self.traces.expand(len(u), -1)

    def product(self, theta: Tensor, v: Tensor) -> Tensor:
        """[*, H, W] K v."""
        return self.matrix(theta, v.dtype)(v)

    def energy(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.at(theta, u.dtype)(u)

    def at(self, theta: Tensor, dtype: torch.dtype) -> Energy:
        product = self.matrix(theta, dtype)

        def energy(u: Tensor) -> tuple[Tensor, Tensor]:
            gradient = product(u)
            return 0.5 * sum_items(gradient * u), gradient

        return energy

    def hessian(self, theta: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return self.product(theta, v)

    def laplacian(self, theta: Tensor, u: Tensor) -> Tensor:
        return (self.traces @ theta.to(self.traces)).expand(len(u))

    def at_infinity(self, theta: Tensor, v: Tensor) -> Tensor:
        return self.product(theta, v)

    def least_curvature(self, theta: Tensor) -> float:
        return 0.0


class Stationary(QuadraticForm):
    """A quadratic form ½ uᵀ K u whose K is a circulant of the grid: a product in Fourier space.

    Attributes:
        symbols: [M, H, W//2 + 1] float64 real Fourier symbols of the features' matrices.
    """

    symbols: Tensor

    def matrix(self, theta: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        if not self.names:
            return torch.zeros_like
        symbol = torch.einsum("m,mhw->hw", theta.to(self.symbols), self.symbols).to(dtype)
        return lambda v: torch.fft.irfft2(torch.fft.rfft2(v) * symbol, s=self.level.size)

    def gradients(self, u: Tensor) -> Tensor:
        if not self.names:  # on a single pixel; transforms of nothing are an error
            return u.new_zeros(len(u), 0, *self.level.size)
        return torch.fft.irfft2(torch.fft.rfft2(u).unsqueeze(1) * self.symbols.to(u), s=self.level.size)

    def features(self, u: Tensor) -> Tensor:
        return 0.5 * (self.gradients(u) * u.unsqueeze(1)).sum((2, 3), dtype=torch.float64)


@register(Term, "quadratic")
class Quadratic(Stationary):
    """½ Σ_o a_o Σ_{s in o} Σ_i u_i u_{i+s}: pixels that interact with those within reach, by orbits of shifts.

    Shifts s with |s|_∞ <= reach are tied by the symmetries of the lattice; with the orbit of the four neighbours alone
    this is the coupling a Σ_<ij> u_i u_j. The reach is at most half of the grid, so that coarse levels have all shifts
    but the farthest (the sum of all is (Σ u)², which details do not change), and a quarter of it (at least 1) where an
    octave is parted into rings, whose narrow bands tell fewer shifts apart.

    Args:
        reach: in pixels of the level's grid.
        symmetry: "lattice" ties the 8 rotations and reflections of a shift, "inversion" only s and -s (fields with a
            preferred direction).
        own: whether ½ Σ u_i² is a feature too; a potential of splines holds it already.
    Raises:
        ConfigError: unless reach >= 1, or own is true and reach 0.
    Source: Marchand et al. 2022 (Wavelet conditional renormalization group).
    """

    def __init__(
        self,
        reach: int = 3,
        symmetry: Literal["lattice", "inversion"] = "lattice",
        own: bool = False,
        *,
        level: Level,
    ) -> None:
        super().__init__(level)
        if reach < 0 or (reach == 0 and not own):
            raise ConfigError(f"quadratic: reach >= 1, or own: true with reach 0, is needed, found reach {reach}.")
        height, width = level.size
        most = [n // 2 if level.packets.depth <= 1 else max(1, n // 4) for n in level.size]
        orbits = _orbits(level.size, [min(reach, n) for n in most], symmetry)
        if level.conditional and 1 + sum(map(len, orbits.values())) == height * width:
            orbits.popitem()  # all shifts together are (Σ u)², without a detail
        if own:
            orbits = {(0, 0): {(0, 0)}, **orbits}
        self.orbits = orbits
        self.names = [f"shift {a},{b}" for a, b in orbits]
        rows, columns = torch.arange(height).double() / height, torch.arange(width // 2 + 1).double() / width
        waves = lambda s: torch.cos(2 * math.pi * (s[0] * rows[:, None] + s[1] * columns))  # noqa: E731
        symbols = [sum(map(waves, o)) for o in orbits.values()]  # none on a single pixel
        symbols = torch.stack(symbols) if symbols else torch.zeros(0, height, width // 2 + 1, dtype=torch.float64)
        self.register_buffer("symbols", symbols, persistent=False)
        traces = [sum(level.shift_trace(*s) for s in o) for o in orbits.values()]
        self.register_buffer("traces", torch.tensor(traces, dtype=torch.float64), persistent=False)

    def diagonal(self, theta: Tensor, u: Tensor) -> Tensor:
        rows, columns = self.level.packets.rows, self.level.packets.columns
        total = torch.zeros(self.level.size, dtype=torch.float64, device=rows.device)
        for coefficient, orbit in zip(theta.to(rows), self.orbits.values(), strict=True):
            for a, b in orbit:
                vertical, horizontal = (rows * rows.roll(-a, 1)).sum(1), (columns * columns.roll(-b, 1)).sum(1)
                total += coefficient * vertical[:, None] * horizontal
        return total.flatten()[self.level.index]


def _orbits(size: tuple[int, int], reach: list[int], symmetry: str) -> dict[Shift, set[Shift]]:
    """Shifts other than 0 by their orbit, named by a member, modulo the grid and each once."""
    orbits: dict[Shift, set[Shift]] = {}
    seen = {(0, 0)}
    for a in range(max(reach) + 1):
        for b in range(-max(reach), max(reach) + 1) if symmetry == "inversion" else range(a + 1):
            same = {(a, b), (-a, -b)}
            if symmetry == "lattice":
                same |= {(i * p, k * q) for p, q in ((a, b), (b, a)) for i in (1, -1) for k in (1, -1)}
            inside = {s for s in same if abs(s[0]) <= reach[0] and abs(s[1]) <= reach[1]}
            found = {(p % size[0], q % size[1]) for p, q in inside} - seen
            if found:
                orbits[a, b] = found
                seen |= found
    return orbits
