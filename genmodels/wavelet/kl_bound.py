"""How far the law of conditional energies can be from that of the data, by the convexity of the energies."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .concavity import spectrum, worst
from .conditional import Conditional
from .score_matching import Gram, Sandwich

Score = Callable[[Tensor], Tensor]
"""∇ log p of the fields of a level: y [B, H, W] in data units -> [B, H, W]."""


@dataclass(frozen=True)
class Bound:
    """The share of one level.

    Args:
        label: of the level.
        alpha: smallest eigenvalue of ∇²_ζ Ē over the fields given.
        worst: a number below it at every field whatsoever.
        divergence: Fisher divergence ℓ(θ) - ℓ(p) = ½ E|∇_ζ log p - ∇_ζ log p_θ|², exact or estimated.
        error: its standard error over the fields.
        exact: whether the score of the data's law was known; otherwise the divergence is what could be seen of it.
    """

    label: str
    alpha: float
    worst: float
    divergence: float
    error: float
    exact: bool

    @property
    def kl(self) -> float:
        """divergence/α in nats; infinite where α is not positive, since then nothing is bounded."""
        return self.divergence / self.alpha if self.alpha > 0 else math.inf

    @property
    def proved(self) -> float:
        """The same with the curvature at the worst field, as the theorem wants it; infinite for most energies."""
        return self.divergence / self.worst if self.worst > 0 else math.inf


@dataclass(frozen=True)
class KLBound:
    """KL(p ‖ p_θ) <= Σ_j divergence_j/α_j, in nats of the whole field.

    Args:
        levels: from coarse to fine.
    """

    levels: tuple[Bound, ...]

    @property
    def kl(self) -> float:
        """Over all levels, by the convexity seen at fields."""
        return sum(level.kl for level in self.levels)

    @property
    def proved(self) -> float:
        """Over all levels, by the convexity at the worst field."""
        return sum(level.proved for level in self.levels)


@torch.no_grad()
def kl_bound(
    conditionals: Sequence[Conditional],
    units: Sequence[Tensor],
    true_score: Sequence[Score | None] | None = None,
    *,
    trained_on: int | None = None,
    richer: Sequence[Conditional] | None = None,
    measured: int = 64,
) -> KLBound:
    """Bound KL(p ‖ p_θ) level by level.

    If ∇²_ζ Ē >= α at all fields, then KL(p(·|x_j) ‖ p_θ(·|x_j)) <= ½ E|∇ log p - ∇ log p_θ|²/α, by the inequality of
    Bakry and Émery, and the KL of the field is the sum over levels. Two things keep it from a proof on real data:

    - α is the smallest over the fields given, where the law lives, not over all that exist. `Bound.proved` takes the
      worst field instead, and is infinite for all energies with a double well.
    - The law of data has no known score, and ℓ(p) cannot be had from samples. What is seen of the divergence is then
      ½ tr(H Cov θ), by which parameters fitted to `trained_on` fields exceed the best of their class on average, plus
      the drop of the loss in a `richer` class, which sees the misspecification that this class can mend and no other:
      a number below the divergence.

    Args:
        conditionals: from coarse to fine.
        units: fields u [B, H, W] float64 of every level, best of data that nothing was fitted to.
        true_score: for each level ∇ log p of its field where it is known, else None. Of a known energy E of the whole
            field it is -∇E at the finest level: E and its conditional energy differ by a function of what is given.
        trained_on: training fields; as many as given if None.
        richer: conditionals of the same levels with more features, fitted to other fields.
        measured: how many fields α is the smallest of, at most.
    Source: Bakry & Émery 1985 (Diffusions hypercontractives).
    """
    scores = [None] * len(conditionals) if true_score is None else true_score
    more = [None] * len(conditionals) if richer is None else richer
    levels = []
    for c, u, score, rich in zip(conditionals, units, scores, more, strict=True):
        if score is None:
            divergence, error = _seen(c, u, rich, len(u) if trained_on is None else trained_on)
        else:
            divergence, error = _mean(fisher(c, u, score))
        found = spectrum(c.hessian, u[:measured], c.level.dim)
        levels.append(Bound(c.level.label, found.smallest, worst(c), divergence, error, score is not None))
    return KLBound(tuple(levels))


def fisher(conditional: Conditional, u: Tensor, score: Score) -> Tensor:
    """[B] ½ |∇_ζ log p - ∇_ζ log p_θ|² at fields u [B, H, W], whose mean is ℓ(θ) - ℓ(p)."""
    unit = conditional.unit.to(u)
    difference = unit * score(unit * u) + conditional.energy(u)[1]
    return 0.5 * conditional.level.detail(difference).square().sum(1)


def excess(conditional: Conditional, u: Tensor, trained_on: int) -> float:
    """½ tr(H Cov θ) = tr(H⁻¹ E[r rᵀ])/2n: by how much the loss of θ, fitted to n fields, exceeds the least of its
    class, on average and to first order in 1/n."""
    gram = Gram(conditional)
    gram.update(u)
    sandwich = Sandwich(gram)
    sandwich.update(u)
    root = gram.h.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    normal, meat = (root[:, None] * m * root for m in (gram.h, sandwich.meat))
    inverse = torch.linalg.pinv(normal, rtol=1e-10, hermitian=True)  # directions without information have no part in ℓ
    return float((inverse * meat).sum()) / (2 * trained_on)


def _seen(conditional: Conditional, u: Tensor, richer: Conditional | None, trained_on: int) -> tuple[float, float]:
    if not len(conditional.theta):
        return 0.0, 0.0
    sampling = excess(conditional, u, trained_on)
    if richer is None:
        return sampling, 0.0
    scale = (richer.unit / conditional.unit).square()  # losses are in units of 1/σ²
    drop, error = _mean(conditional.loss(u) - richer.loss(u * (conditional.unit / richer.unit)) / scale)
    return sampling + max(0.0, drop), error


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
