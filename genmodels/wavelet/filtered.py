"""Potentials of filtered fields: Σ_i v((h * u)_i), interactions of more than one pixel."""

from typing import Literal

import torch
from torch import Tensor

from ..registry import register
from ..types import sum_items
from .bases import Basis, BSpline
from .potential import Potential
from .terms import Energy, Shift, Term
from .tree import Level

STENCILS: dict[str, list[dict[Shift, float]]] = {  # filters that the symmetries of the lattice take to one another
    "pair_mean": [{(0, 0): 0.5, (0, 1): 0.5}, {(0, 0): 0.5, (1, 0): 0.5}],
    "pair_difference": [{(0, 0): -1.0, (0, 1): 1.0}, {(0, 0): -1.0, (1, 0): 1.0}],
    "block": [{(0, 0): 0.25, (0, 1): 0.25, (1, 0): 0.25, (1, 1): 0.25}],
    "cross": [{(0, 0): 0.2, (0, 1): 0.2, (0, -1): 0.2, (1, 0): 0.2, (-1, 0): 0.2}],
    "laplacian": [{(0, 0): -1.0, (0, 1): 0.25, (0, -1): 0.25, (1, 0): 0.25, (-1, 0): 0.25}],
}
NO_DETAIL = 1e-12  # Σ (h Ḡᵀ)² over the coefficients, of a filter that does not see them


@register(Term, "filtered_potential")
class FilteredPotential(Potential):
    """Σ_k θ_k Σ_h Σ_i ρ_k((h * u)_i): a potential v of local means or differences of the level's field.

    (h * u)_i = Σ_s h_s u_{i+s}. Filters of a stencil that are rotations of one another share v. Its quadratic part is
    left to `quadratic` with reach >= 1 (2 for "cross" and "laplacian") and its linear part has no detail: of the basis
    one function is left out for each. What keeps chains from running away is the guard of a `potential` of the pixels.

    Args:
        stencil: h, "pair_mean" (u_i + u_j)/2 and "pair_difference" u_j - u_i of neighbours, "block" the mean of 2 x 2
            pixels, "cross" that of a pixel and its four neighbours, "laplacian" the mean of those less the pixel.
        basis: the functions ρ_k, of s = 2(t - a)/(b - a) - 1 on an interval [a, b] of the filtered training data.
        even: v(-t) = v(t) and a = -b, for fields whose law has that symmetry; of differences, also for fields whose law
            is symmetric under reflections.
        largest: side of the largest grid on which the term has features; None for all. It has none on a single pixel,
            nor where no filter sees the coefficients that the level draws.
    """

    guards = False

    def __init__(
        self,
        stencil: Literal["pair_mean", "pair_difference", "block", "cross", "laplacian"] = "pair_mean",
        basis: Basis = BSpline(),
        even: bool = False,
        largest: int | None = None,
        *,
        level: Level,
    ) -> None:
        super().__init__(basis, even, level=level)
        self.filters = STENCILS[stencil]
        weights = [self._over_pairs(f, level.weights) for f in self.filters]
        seen = max(level.size) > 1 and max(float(w.max()) for w in weights) > NO_DETAIL
        hidden = not seen or (largest is not None and max(level.size) > largest)
        expansion = self._expansion(even)[: 0 if hidden else None]
        self.inside = len(expansion)
        tails = [] if hidden else [f"{stencil} {name}" for name in self.names[-1 if even else -2 :]]
        self.names = [f"{stencil} {k + 1}/{self.inside}" for k in range(self.inside)] + tails
        self.register_buffer("expansion", expansion, persistent=False)
        self.register_buffer("weights", torch.cat(weights), persistent=False)  # [F H, W] diag(h Ḡᵀ Ḡ hᵀ)

    def _expansion(self, even: bool) -> Tensor:
        count, middle = self.basis.count, self.basis.count // 2
        eye = torch.eye(count, dtype=torch.float64)
        if even:
            pairs = (eye - eye.flip(0))[:middle]
            return pairs[:-1] if self.basis.spans_linear else pairs
        if not self.basis.spans_linear:
            return eye
        return torch.cat([eye[: middle - 1], eye[middle + 1 :]])

    @staticmethod
    def _over_pairs(f: dict[Shift, float], of) -> Tensor:  # noqa: ANN001 - (Shift, Shift) -> Tensor
        """Σ_{s, t} h_s h_t of(s, t)."""
        return sum(a * b * of(s, t) for s, a in f.items() for t, b in f.items())

    def filtered(self, u: Tensor) -> Tensor:
        """[*, F, H, W] h * u of fields u [*, H, W]."""
        return torch.stack([sum(c * u.roll((-a, -b), (-2, -1)) for (a, b), c in f.items()) for f in self.filters], -3)

    def spread(self, w: Tensor) -> Tensor:
        """[*, H, W] the transpose of `filtered`, of w [*, F, H, W]."""
        return sum(
            c * part.roll(s, (-2, -1)) for part, f in zip(w.unbind(-3), self.filters, strict=True) for s, c in f.items()
        )

    def fit(self, u: Tensor) -> None:
        if self.names:
            super().fit(self.filtered(u))

    def _stacked(self, u: Tensor) -> Tensor:
        """[B, F H, W]: to the functions of one variable, filtered fields are just more pixels."""
        return self.filtered(u).flatten(-3, -2)

    def features(self, u: Tensor) -> Tensor:
        return super().features(self._stacked(u)) if self.names else self._none(u)

    def gradients(self, u: Tensor) -> Tensor:
        if not self.names:
            return u.new_zeros(len(u), 0, *self.level.size)
        return self.spread(super().gradients(self._stacked(u)).unflatten(-2, (len(self.filters), -1)))

    def laplacians(self, u: Tensor) -> Tensor:
        return super().laplacians(self._stacked(u)) if self.names else self._none(u)

    def at(self, theta: Tensor, dtype: torch.dtype) -> Energy:
        if not self.names:
            return lambda u: (torch.zeros(len(u), dtype=torch.float64, device=u.device), torch.zeros_like(u))
        shape = self.shape_at(theta, dtype, orders=2)

        def energy(u: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = shape(self.filtered(u))
            return sum_items(value), self.spread(slope)

        return energy

    def hessian(self, theta: Tensor, u: Tensor, v: Tensor) -> Tensor:
        if not self.names:
            return torch.zeros_like(v)
        return self.spread(self.shape(theta, self.filtered(u))[2] * self.filtered(v))

    def laplacian(self, theta: Tensor, u: Tensor) -> Tensor:
        return super().laplacian(theta, self._stacked(u)) if self.names else sum_items(torch.zeros_like(u))

    def diagonal(self, theta: Tensor, u: Tensor) -> Tensor:
        """Exact, of the curvature v'' averaged over the fields."""
        total = torch.zeros(self.level.size, dtype=torch.float64, device=self.weights.device)
        if self.names:
            curvature = self.shape(theta, self.filtered(u))[2].mean(0, dtype=torch.float64)
            for mean, f in zip(curvature, self.filters, strict=True):
                total += self._over_pairs(f, lambda s, t, mean=mean: self._between(mean, s, t))
        return total.flatten()[self.level.index]

    def _between(self, mean: Tensor, s: Shift, t: Shift) -> Tensor:
        """[H, W] Σ_i c_i g[i + s] g[i + t] of every coefficient's field g, rows of A ⊗ A, and weights c [H, W]."""
        vertical, horizontal = (
            m.roll(-s[axis], 1) * m.roll(-t[axis], 1)
            for axis, m in enumerate((self.level.packets.rows, self.level.packets.columns))
        )
        return vertical @ mean @ horizontal.T

    def at_infinity(self, theta: Tensor, v: Tensor) -> Tensor:
        return self.spread(min(self._curvatures(theta)) * self.filtered(v)) if self.names else torch.zeros_like(v)

    def least_curvature(self, theta: Tensor) -> float:
        most = sum(sum(map(abs, f.values())) ** 2 for f in self.filters)  # of the eigenvalues of Σ hᵀ h
        return most * super().least_curvature(theta) if self.names else 0.0

    @staticmethod
    def _none(u: Tensor) -> Tensor:
        return torch.zeros(len(u), 0, dtype=torch.float64, device=u.device)
