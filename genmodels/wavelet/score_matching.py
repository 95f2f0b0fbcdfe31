"""Closed-form score matching of energies that are linear in their parameters, from streamed sums."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from ..registry import ConfigError
from .conditional import Conditional

SINGULAR = 1e-13  # eigenvalue of a normalised Gram matrix that float64 cannot tell from 0
STILL = 1e-24  # mean |∇Φ|² that is rounding alone: fields are in units of their deviation, features of order 1
SHOWN = 6  # names of features in a message


class FitWarning(UserWarning):
    """A fit is less certain than it looks."""


class Gram:
    """Sums over fields of H = ∇Φ ∇Φᵀ [M, M] and g = ΔΦ [M], float64.

    They only add up: streams over several processes are merged by adding.
    """

    def __init__(self, conditional: Conditional) -> None:
        count = len(conditional.theta)
        if not count:
            raise ConfigError(
                f"score matching of {conditional.level.label}: no term has a feature there. Add a potential, or let "
                "quadratic have own: true."
            )
        self.conditional, self.n = conditional, 0
        self.h = torch.zeros(count, count, dtype=torch.float64, device=conditional.theta.device)
        self.g = torch.zeros_like(self.h[0])

    def pieces(self, u: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """∇Φ [b, M, dim] and what g is the mean of, [b, M], of some of the fields u [B, H, W] float64 at a time."""
        for part in u.split(self.conditional.rows()):
            yield self.conditional.gradients(part), self.conditional.laplacians(part)

    def update(self, *fields: Tensor) -> None:
        """Take in what `pieces` takes."""
        for gradients, right in self.pieces(*fields):
            rows = gradients.transpose(0, 1).flatten(1)
            self.h += rows @ rows.T
            self.g += right.sum(0)
            self.n += len(right)

    def solve(self, regularization: float) -> None:
        """Set θ = D^{-½} (D^{-½} H D^{-½} + λ)⁻¹ D^{-½} g, D = diag H, and the condition number of the matrix solved.

        Raises:
            ConfigError: if a feature never varies, or if the matrix is singular without regularisation; the features
                are named.
        """
        names, label = self.conditional.names, self.conditional.level.label
        diagonal = self.h.diagonal() / self.n
        still = [name for name, size in zip(names, diagonal.tolist(), strict=True) if not size > STILL]
        if still:
            raise ConfigError(
                f"score matching of {label}: the fields give no information on {_shown(still)}: their gradients vanish "
                "on all of them. Use fewer functions, a smaller reach, or more fields."
            )
        root = diagonal.rsqrt()
        normal = root[:, None] * (self.h / self.n) * root
        values, vectors = torch.linalg.eigh(normal)
        if values[0] < SINGULAR:
            close = vectors[:, values < SINGULAR].abs().amax(1)
            involved = [names[k] for k in close.argsort(descending=True).tolist() if close[k] > 0.1]
            told = (
                f"score matching of {label}: the Gram matrix is singular: {self.n} fields cannot tell "
                f"{_shown(involved)} apart. Use fewer functions, a smaller reach, or more fields"
            )
            if not regularization > 0:
                raise ConfigError(f"{told}, or a regularization > 0.")
            warnings.warn(f"{told}; the regularization {regularization:g} decides.", FitWarning, stacklevel=2)
        values = values.clamp(min=0) + regularization
        self.conditional.condition.copy_(values[-1] / values[0])
        self.conditional.theta.copy_(root * (vectors @ ((vectors.T @ (root * self.g / self.n)) / values)))
        self.bread = root[:, None] * (vectors / values @ vectors.T) * root


class Projection(Gram):
    """Sums of a regression of vectors t on gradients of features: H as above and g = ∇Φ · t, so that E|∇Φᵀ θ - t|² is
    least."""

    def pieces(self, u: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """As above, of fields u and their vectors t [B, dim]."""
        rows = self.conditional.rows()
        for part, wanted in zip(u.split(rows), target.split(rows), strict=True):
            gradients = self.conditional.gradients(part)
            yield gradients, torch.einsum("bmd,bd->bm", gradients, wanted)


class Sandwich:
    """Standard errors of θ: Cov ≈ H⁻¹ E[r rᵀ] H⁻¹/n with r = ∇Φ ∇Φᵀ θ - g of each field, float64."""

    def __init__(self, gram: Gram) -> None:
        self.gram, self.meat = gram, torch.zeros_like(gram.h)

    def update(self, *fields: Tensor) -> None:
        """Take in the same as the Gram matrix had."""
        theta = self.gram.conditional.theta
        for rows, right in self.gram.pieces(*fields):
            residual = torch.einsum("bmd,bd->bm", rows, torch.einsum("bmd,m->bd", rows, theta)) - right
            self.meat += residual.T @ residual

    def finish(self) -> None:
        """Set the errors of the conditional."""
        covariance = self.gram.bread @ (self.meat / self.gram.n) @ self.gram.bread / self.gram.n
        self.gram.conditional.errors.copy_(covariance.diagonal().clamp(min=0).sqrt())


def _shown(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + rest
