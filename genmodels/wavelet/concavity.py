"""How convex conditional energies are: spectra of their Hessians over fields, which decide how wide packets may be."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rng import generator
from .conditional import MEMORY, QUANTILES, Conditional, smallest_eigenvalue
from .filter_bank import Packets
from .score_matching import FitWarning
from .tree import Level

DENSE = 256  # coefficients up to which all eigenvalues are found
STEPS = 240  # of Lanczos' recursion at most
TOLERANCE = 1e-4  # of its eigenvalues, over the largest of them
RARE = 0.02  # share of fields with a negative direction that is not told

Product = Callable[[Tensor, Tensor], Tensor]
"""(u [*, H, W], z [*, dim]) -> [*, dim], the product of a Hessian at u with z; leading axes broadcast."""


@dataclass(frozen=True)
class Spectrum:
    """The ends of the spectra of Hessians at some fields.

    Args:
        lowest, highest: [B] float64 smallest and largest eigenvalue at each field.
    """

    lowest: Tensor
    highest: Tensor

    @property
    def smallest(self) -> float:
        """Over all fields."""
        return float(self.lowest.min())

    @property
    def largest(self) -> float:
        """Over all fields."""
        return float(self.highest.max())

    @property
    def mean(self) -> float:
        """Of the smallest eigenvalues."""
        return float(self.lowest.mean())

    @property
    def negative(self) -> float:
        """Share of the fields where some direction has negative curvature."""
        return float((self.lowest < 0).double().mean())

    def quantile(self, q: float) -> float:
        """Of the smallest eigenvalues."""
        return float(self.lowest.quantile(q))

    def quantiles(self) -> Tensor:
        """[21] of the smallest eigenvalues, at 0, 5 %, …, 100 % of the fields."""
        return self.lowest.quantile(torch.linspace(0, 1, QUANTILES, dtype=torch.float64, device=self.lowest.device))


def spectrum(product: Product, u: Tensor, dim: int) -> Spectrum:
    """The ends of the spectra of symmetric matrices [dim, dim] that belong to fields.

    All eigenvalues up to 256 coefficients, Lanczos' recursion beyond (an end is then known to some 1e-4 of the largest
    eigenvalue, and a smallest one never too small).

    Args:
        product: see `Product`; that of a conditional energy is `Conditional.hessian`, that of any energy of pixels
            `restricted` makes.
        u: [B, H, W] float64 fields.
    Raises:
        ValueError: if there are no fields.
    """
    if not len(u):
        raise ValueError("spectrum: at least one field is needed, found none.")
    number = dim * max(u[0].numel(), dim) if dim <= DENSE else STEPS * dim
    ends = []
    for part in u.split(max(1, MEMORY // (8 * number))):
        if dim <= DENSE:
            ends.append(_dense(product, part, dim))
        else:
            ends.append(lanczos(lambda z, part=part: product(part, z), _start(part, dim)))
    return Spectrum(*(torch.cat(side) for side in zip(*ends, strict=True)))


def restricted(level: Level, pixels: Callable[[Tensor, Tensor], Tensor]) -> Product:
    """The Hessian of an energy of pixels in the coefficients of a level: (u, z) -> Ḡ ∇²E(u) Ḡᵀ z.

    Of an energy of the whole field (as of a known law) this is the conditional Hessian of its finest levels exactly,
    since E and the conditional energy differ by a function of what is given.

    Args:
        pixels: (u, v) -> ∇²E(u) v, both [*, H, W].
    """
    return lambda u, z: level.detail(pixels(u, level.synthesize(z)))


def _dense(product: Product, u: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    matrix = product(u.unsqueeze(1), torch.eye(dim, dtype=u.dtype, device=u.device)).expand(len(u), dim, dim)
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    return values[:, 0], values[:, -1]


def _start(u: Tensor, dim: int) -> Tensor:
    """[B, dim] the same for every field: a spectrum does not depend on what else is in its batch."""
    return torch.randn(dim, dtype=u.dtype, generator=generator("lanczos")).to(u.device).expand(len(u), dim)


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """[B] smallest and largest eigenvalues of B symmetric matrices, by Krylov spaces with full orthogonalisation.

    Args:
        product: [B, dim] -> [B, dim].
        start: [B, dim] where the spaces begin.
        steps: their dimension at most; they end when both residuals are below 1e-4 of the largest eigenvalue.
    """
    count, dim = start.shape
    steps = min(steps, dim)
    basis = start.new_zeros(count, steps + 1, dim)
    basis[:, 0] = start / start.norm(dim=1, keepdim=True)
    matrix = start.new_zeros(count, steps, steps)
    fresh = generator("lanczos", "restart")
    for k in range(steps):
        w, known = product(basis[:, k]), basis[:, : k + 1]
        matrix[:, k, k] = (w * basis[:, k]).sum(1)
        size = w.norm(dim=1)
        for _ in range(2):
            w = w - torch.einsum("bkd,bk->bd", known, torch.einsum("bkd,bd->bk", known, w))
        beta = w.norm(dim=1)
        ended = ~(beta > 1e-10 * size)  # the space is invariant: go on from outside of it
        beta = beta.masked_fill(ended, 0)
        last = k + 1 == steps
        if last or (k + 1) % 10 == 0:
            values, vectors = torch.linalg.eigh(matrix[:, : k + 1, : k + 1])
            residual = (beta.unsqueeze(1) * vectors[:, -1, [0, -1]]).abs().amax(1)
            if last or (not ended.any() and (residual <= TOLERANCE * values.abs().amax(1)).all()):
                break
        if ended.any():
            other = torch.randn(dim, dtype=w.dtype, generator=fresh).to(w.device).expand(count, dim)
            for _ in range(2):
                other = other - torch.einsum("bkd,bk->bd", known, torch.einsum("bkd,bd->bk", known, other))
            w = torch.where(ended.unsqueeze(1), other, w)
        basis[:, k + 1] = w / w.norm(dim=1, keepdim=True)
        matrix[:, k, k + 1] = matrix[:, k + 1, k] = beta
    return values[:, 0], values[:, -1]


def curvature(conditional: Conditional) -> Callable[[Tensor, Tensor], Tensor]:
    """(u, v) -> ∇²Ē(u) v by pixels, both [*, H, W]."""
    return lambda u, v: sum(term.hessian(theta, u, v) for term, theta in conditional.parts())


def worst(conditional: Conditional) -> float:
    """A number below the eigenvalues of ∇²_ζ Ē at every field: λ_min(Ḡ K Ḡᵀ) + min v″, K of the quadratic terms.

    It is what theorems ask for, and mostly far below what fields of the law meet.
    """
    far = smallest_eigenvalue(conditional.at_infinity, conditional.level.dim, conditional.theta.device)
    return far + sum(term.least_curvature(theta) for term, theta in conditional.parts())


def upper_half(level: Level, wavelet: str) -> Level | None:
    """The ring that holds the upper half of a level's band of frequencies, of packets of twice the depth; None if tiles
    would have less than two coefficients a side, or if there is no band.

    Its coefficients are combinations of those of the level, so that the energy given all below is the same function.
    """
    depth = level.packets.depth + 1
    if not level.conditional or any(n % 2**depth or n >> depth < 2 for n in level.size):
        return None
    return Level(Packets(level.size, wavelet, depth).to(level.index.device), 2 * level.ring + 1)


def measure(conditional: Conditional, u: Tensor) -> Spectrum:
    """Keep what the spectrum of the conditional Hessian is at fields u [B, H, W] float64 in the conditional."""
    found = spectrum(conditional.hessian, u, conditional.level.dim)
    conditional.minima.copy_(found.quantiles())
    conditional.negative.fill_(found.negative)
    conditional.largest.fill_(found.largest)
    return found


def judge(conditionals: Sequence[Conditional], units: Sequence[Tensor], wavelet: str) -> None:
    """Measure every level at its fields, and warn of bands whose energy is not convex there.

    Few fields are taken of large grids. A level of one coefficient is measured but not warned of: its chain is replaced
    by quadrature.

    Args:
        units: fields u [B, H, W] float64 of every level.
    """
    told, depths = [], set()
    for c, u in zip(conditionals, units, strict=True):
        some = u[: affordable(c.level)]
        found = measure(c, some)
        if found.negative > RARE and c.level.dim > 1:
            told.append(f"{c.level.label}: {_account(found, len(some))}{_outlook(c, some, wavelet)}")
            depths.update([c.level.packets.depth] if c.level.conditional else [])
    if told:
        cure = "More octaves help"
        if depths:
            cure = (
                f"Narrower packets (subdivisions: {min(depths) + 1}, where tiles keep 4 pixels a side) may cure it, "
                "at the price of less certain parameters"
            )
        warnings.warn(
            "conditional energies that are not convex at the training fields, so that a small score matching loss does "
            f"not bound the error, and chains may have several modes to find. {'; '.join(told)}. {cure}; "
            "`genmodels concavity` fits and compares them.",
            FitWarning,
            stacklevel=2,
        )


def affordable(level: Level) -> int:
    """How many fields of a level are measured when a model is fitted: 64 up to some 22 x 22, at least 8."""
    return min(64, max(8, 2**15 // math.prod(level.size)))


def _account(found: Spectrum, count: int) -> str:
    return (
        f"smallest eigenvalue of the Hessian {found.smallest:.3g} (median {found.quantile(0.5):.3g}; negative on "
        f"{found.negative:.0%} of {count} fields)"
    )


def _outlook(conditional: Conditional, u: Tensor, wavelet: str) -> str:
    """What the same energy is in the upper half of the band: exact for packets of half the width."""
    half = upper_half(conditional.level, wavelet)
    if half is None:
        return ""
    found = spectrum(restricted(half, curvature(conditional)), u, half.dim)
    return f", in the upper half of its band {found.smallest:.3g} ({found.negative:.0%})"
