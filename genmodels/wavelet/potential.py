"""The potential of single pixels: Σ_i v(u_i), with a guard for its tails."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..types import sum_items
from .bases import Basis, BSpline
from .terms import Energy, Term
from .tree import Level

SHARE, LEAST, MOST = 1e-3, 30, 0.1  # of the training pixels beyond each end: which share, but how many at least
MANY = 2**23  # of them, whose quantiles are found
NODES = 4001  # where the least curvature is looked for


@register(Term, "potential")
class Potential(Term):
    """Σ_k θ_k Σ_i ρ_k(u_i): a potential v of each pixel of the level's grid, in a fixed basis.

    On an interval [a, b] that holds all but a thousandth of the training pixels at either end, v = Σ θ_k ρ_k. Beyond, v
    goes on as a parabola with the slope at the end: v(b) + v'(b)(t - b) + κ(t - b)²/2. Its curvature κ is a parameter
    too (one for both ends of an even potential), which a guard may raise so that no chain runs away.

    Args:
        basis: the functions ρ_k, of s = 2(t - a)/(b - a) - 1.
        even: v(-t) = v(t) and a = -b, for fields whose law has that symmetry. Their mean is taken to be 0 in model
            space (a transform that subtracts the sample's mean breaks the symmetry by as much).
        warp: take ρ_k of asinh(t - median) instead of t, for skewed fields with heavy tails.
    Attributes:
        guards: whether its tails may be raised to keep chains from running away.
    Source: Guth et al. 2023 (Conditionally strongly log-concave generative models).
    """

    guards = True  # its tails act on every pixel
    interval: Tensor
    centre: Tensor

    def __init__(self, basis: Basis = BSpline(), even: bool = False, warp: bool = False, *, level: Level) -> None:
        super().__init__(level)
        self.basis, self.even, self.warp = basis, even, warp
        eye, half = torch.eye(basis.count, dtype=torch.float64), basis.count // 2
        if even:
            expansion = (eye - eye.flip(0))[:half]
        elif basis.spans_linear and level.conditional:
            # Σ u_i has no detail, so that v = t is invisible: one function less spans the rest (nearly, of a warped t)
            expansion = torch.cat([eye[:half], eye[half + 1 :]])
        else:
            expansion = eye
        self.inside = len(expansion)  # features; the others are of the tails
        self.names = [f"potential {k + 1}/{self.inside}" for k in range(self.inside)]
        self.names += ["tails"] if even else ["lower tail", "upper tail"]
        self.register_buffer("expansion", expansion, persistent=False)
        self.register_buffer("interval", torch.tensor([-1.0, 1.0], dtype=torch.float64))
        self.register_buffer("centre", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weights", level.weights(), persistent=False)

    def fit(self, u: Tensor) -> None:
        values = u.flatten()
        values = values[:: max(1, len(values) // MANY)]
        if self.warp:
            self.centre.copy_(values.median())
        share = min(MOST, max(SHARE, LEAST / len(values)))
        if self.even:
            end = values.abs().quantile(1 - 2 * share)
            self.interval.copy_(torch.stack((-end, end)))
        else:
            self.interval.copy_(values.quantile(values.new_tensor([share, 1 - share])))

        if not self.interval[1] > self.interval[0]:
            raise ConfigError(
                f"potential of {self.level.label}: all but {2 * share:.1%} of the training pixels are "
                f"{float(self.interval[0]):.4g} standard deviations, so that a potential has no interval. Sparse "
                "fields, or ones with a few huge values, need another transform (a logarithm, say), or none of those."
            )

    def _tails(self, beyond: Tensor) -> Tensor:
        """[*, 1 or 2] how far u is beyond the lower and the upper end, or beyond any of an even potential."""
        parts = (beyond,) if self.even else (beyond.clamp(max=0), beyond.clamp(min=0))
        return torch.stack(parts, -1)

    def _curvatures(self, theta: Tensor) -> tuple[float, float]:
        """κ of the lower and the upper tail."""
        low, high = theta[self.inside :].expand(2).tolist()
        return low, high

    def raise_tails(self, theta: Tensor, missing: float) -> Tensor:
        """Raise the flatter tail in place by `missing`, the other at least to the same; [M] which are as flat then."""
        tails = theta[self.inside :]
        least = float(tails.min()) + missing
        tails.clamp_(min=least)
        return torch.cat((torch.zeros(self.inside, dtype=torch.bool, device=theta.device), tails < least + 1e-9))

    def _places(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s of u, clamped to [-1, 1]; how far u is beyond the interval; ds/du and d²s/du²."""
        return self._placing()(u)

    def _placing(self) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """`_places`, with the interval read from the device once."""
        low, high = self.interval.tolist()
        if not self.warp:
            rate = 2 / (high - low)

            def straight(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
                inside = u.clamp(low, high)
                s = (inside - low) * rate - 1
                return s.clamp(-1, 1), u - inside, torch.full_like(u, rate), torch.zeros_like(u)

            return straight
        centre = self.centre.item()
        start, end = math.asinh(low - centre), math.asinh(high - centre)
        rate = 2 / (end - start)

        def warped(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            inside = u.clamp(low, high)
            moved = inside - centre
            s = (torch.asinh(moved) - start) * rate - 1
            root = torch.rsqrt(1 + moved.square())
            return s.clamp(-1, 1), u - inside, rate * root, -rate * moved * root**3

        return warped

    def features(self, u: Tensor) -> Tensor:
        s, beyond, rate, _ = self._places(u)
        value = self.basis.derivatives(s, 0) + self.basis.derivatives(s, 1) * (rate * beyond).unsqueeze(-1)
        inside = value.sum((1, 2), dtype=torch.float64) @ self.expansion.T
        return torch.cat((inside, 0.5 * self._tails(beyond).square().sum((1, 2), dtype=torch.float64)), 1)

    def gradients(self, u: Tensor) -> Tensor:
        s, beyond, rate, _ = self._places(u)
        slopes = (self.basis.derivatives(s, 1) @ self.expansion.to(u).T) * rate.unsqueeze(-1)
        return torch.cat((slopes, self._tails(beyond)), -1).movedim(-1, 1).contiguous()

    def laplacians(self, u: Tensor) -> Tensor:
        s, beyond, rate, bend = self._places(u)
        weight = self.weights.to(u) * (beyond == 0)
        curved = torch.einsum("bhw,bhwk->bk", weight * rate.square(), self.basis.derivatives(s, 2))
        if self.warp:
            curved = curved + torch.einsum("bhw,bhwk->bk", weight * bend, self.basis.derivatives(s, 1))
        tails = (self.weights.to(u).unsqueeze(-1) * (self._tails(beyond) != 0)).sum((1, 2))
        return torch.cat((curved.double() @ self.expansion.T, tails.double()), 1)

    def shape(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v, v' and v'' at u [*]."""
        return self.shape_at(theta, u.dtype)(u)

    def shape_at(self, theta: Tensor, dtype: torch.dtype, orders: int = 3) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """u of a dtype -> the first `orders` of what `shape` gives; what depends on θ alone is found once."""
        placing, (low, high) = self._placing(), self._curvatures(theta)
        inside = theta[: self.inside].to(self.expansion) @ self.expansion
        combined = self.basis.combination(inside, dtype, orders)

        def shape(u: Tensor) -> tuple[Tensor, ...]:
            s, beyond, rate, bend = placing(u)
            value, slope, *curvature = combined(s)
            curvature = [c * rate.square() + slope * bend for c in curvature]
            slope = slope * rate
            tail = torch.full_like(u, high).masked_fill_(beyond < 0, low)
            bent = tail * beyond
            return (
                torch.addcmul(value, beyond, torch.add(slope, bent, alpha=0.5)),
                slope + bent,
                *(torch.where(beyond == 0, c, tail) for c in curvature),
            )

        return shape

    def energy(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.at(theta, u.dtype)(u)

    def at(self, theta: Tensor, dtype: torch.dtype) -> Energy:
        shape = self.shape_at(theta, dtype, orders=2)

        def energy(u: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = shape(u)
            return sum_items(value), slope

        return energy

    def hessian(self, theta: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return self.shape(theta, u)[2] * v

    def laplacian(self, theta: Tensor, u: Tensor) -> Tensor:
        return sum_items(self.weights.to(u) * self.shape(theta, u)[2])

    def diagonal(self, theta: Tensor, u: Tensor) -> Tensor:
        mean = self.shape(theta, u)[2].mean(0, dtype=torch.float64)
        rows, columns = self.level.packets.rows.square(), self.level.packets.columns.square()
        return (rows @ mean @ columns.T).flatten()[self.level.index]

    def at_infinity(self, theta: Tensor, v: Tensor) -> Tensor:
        return min(self._curvatures(theta)) * v

    def least_curvature(self, theta: Tensor) -> float:
        """min v'' less the curvature of the flatter tail, or 0 where that curves least."""
        low, high = self.interval.tolist()
        places = torch.linspace(low, high, NODES, dtype=torch.float64, device=self.interval.device)
        return min(0.0, float(self.shape(theta, places)[2].min()) - min(self._curvatures(theta)))
