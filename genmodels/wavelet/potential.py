"""The potential of single pixels: Σ_i v(u_i), with a guard for its tails."""

import math

import torch
from torch import Tensor

from ..registry import register
from ..types import sum_items
from .bases import Basis, BSpline
from .terms import Term
from .tree import Level

MARGIN = 1.02  # the range of the basis over that of the data


@register(Term, "potential")
class Potential(Term):
    """Σ_k θ_k Σ_i ρ_k(u_i): a potential v of each pixel of the level's grid, in a fixed basis.

    On the range [a, b] of the training data (2 % wider) v = Σ θ_k ρ_k. Beyond, v continues with its slope at the end
    and, as a guard, with the curvature c: v(b) + v'(b)(t - b) + c (t - b)²/2, so that no chain runs away.

    Args:
        basis: the functions ρ_k, of s = 2(t - a)/(b - a) - 1.
        even: v(-t) = v(t) and a = -b, for fields whose law has that symmetry.
        warp: take ρ_k of asinh(t - median) instead of t, for skewed fields with heavy tails.
    Attributes:
        guards: whether `tail` may be set to keep chains from running away.
    Source: Guth et al. 2023 (Conditionally strongly log-concave generative models).
    """

    guards = True  # its tails act on every pixel
    interval: Tensor
    centre: Tensor
    tail: Tensor

    def __init__(self, basis: Basis = BSpline(), even: bool = False, warp: bool = False, *, level: Level) -> None:
        super().__init__(level)
        self.basis, self.even, self.warp = basis, even, warp
        eye = torch.eye(basis.count, dtype=torch.float64)
        if even:
            expansion = (eye - eye.flip(0))[: basis.count // 2]
        elif basis.spans_linear and level.conditional and not warp:
            # Σ u_i has no detail, so that v = t would be invisible: one function less spans the rest
            expansion = torch.cat([eye[: basis.count // 2], eye[basis.count // 2 + 1 :]])
        else:
            expansion = eye
        self.names = [f"potential {k + 1}/{len(expansion)}" for k in range(len(expansion))]
        self.register_buffer("expansion", expansion, persistent=False)
        self.register_buffer("interval", torch.tensor([-1.0, 1.0], dtype=torch.float64))
        self.register_buffer("centre", torch.zeros((), dtype=torch.float64))
        self.register_buffer("tail", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weights", level.weights(), persistent=False)

    def fit(self, u: Tensor, low: float, high: float) -> None:
        if self.warp:
            self.centre.copy_(u.flatten()[:: max(1, u.numel() // 100_000)].median())
        if self.even:
            high = max(abs(low), abs(high))
            low = -high
        middle, half = (low + high) / 2, MARGIN * (high - low) / 2
        self.interval.copy_(torch.tensor([middle - half, middle + half]))

    def _places(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s of u, clamped to [-1, 1]; how far u is beyond the interval; ds/du and d²s/du²."""
        low, high = self.interval.tolist()
        inside = u.clamp(low, high)
        if not self.warp:
            rate = 2 / (high - low)
            s = (inside - low) * rate - 1
            return s.clamp(-1, 1), u - inside, torch.full_like(u, rate), torch.zeros_like(u)
        centre = self.centre.item()
        start, end = math.asinh(low - centre), math.asinh(high - centre)
        rate, moved = 2 / (end - start), inside - centre
        s = (torch.asinh(moved) - start) * rate - 1
        root = torch.rsqrt(1 + moved.square())
        return s.clamp(-1, 1), u - inside, rate * root, -rate * moved * root**3

    def features(self, u: Tensor) -> Tensor:
        s, beyond, rate, _ = self._places(u)
        value = self.basis.derivatives(s, 0) + self.basis.derivatives(s, 1) * (rate * beyond).unsqueeze(-1)
        return value.sum((1, 2), dtype=torch.float64) @ self.expansion.T

    def gradients(self, u: Tensor) -> Tensor:
        s, _, rate, _ = self._places(u)
        slopes = self.basis.derivatives(s, 1) @ self.expansion.to(u).T
        return (slopes * rate.unsqueeze(-1)).movedim(-1, 1).contiguous()

    def laplacians(self, u: Tensor) -> Tensor:
        s, beyond, rate, bend = self._places(u)
        weight = self.weights.to(u) * (beyond == 0)
        curved = torch.einsum("bhw,bhwk->bk", weight * rate.square(), self.basis.derivatives(s, 2))
        if self.warp:
            curved = curved + torch.einsum("bhw,bhwk->bk", weight * bend, self.basis.derivatives(s, 1))
        return curved.double() @ self.expansion.T

    def shape(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v, v' and v'' at u [*], with the guard."""
        s, beyond, rate, bend = self._places(u)
        value, slope, curvature = self.basis.combine(theta.to(self.expansion) @ self.expansion, s)
        slope, curvature = slope * rate, curvature * rate.square() + slope * bend
        tail = self.tail.to(u)
        return (
            value + slope * beyond + 0.5 * tail * beyond.square(),
            slope + tail * beyond,
            torch.where(beyond == 0, curvature, tail),
        )

    def energy(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        value, slope, _ = self.shape(theta, u)
        return sum_items(value), slope

    def hessian(self, theta: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return self.shape(theta, u)[2] * v

    def laplacian(self, theta: Tensor, u: Tensor) -> Tensor:
        return sum_items(self.weights.to(u) * self.shape(theta, u)[2])

    def diagonal(self, theta: Tensor, u: Tensor) -> Tensor:
        mean = self.shape(theta, u)[2].mean(0, dtype=torch.float64)
        rows, columns = self.level.packets.rows.square(), self.level.packets.columns.square()
        return (rows @ mean @ columns.T).flatten()[self.level.index]

    def at_infinity(self, theta: Tensor, v: Tensor) -> Tensor:
        return self.tail.to(v) * v
