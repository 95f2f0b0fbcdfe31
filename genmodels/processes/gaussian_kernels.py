"""Gaussian transition kernels N(m, P) of a state, with what drawing, scoring and whitening need of P."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..types import sum_items


class Kernel(ABC):
    """N(m, P) row by row, with a root L of P = L Lᵀ.

    Attributes:
        mean: [B, *shape] m.
    """

    mean: Tensor

    @abstractmethod
    def root(self, z: Tensor) -> Tensor:
        """[B, *shape] L z."""

    @abstractmethod
    def root_transposed(self, v: Tensor) -> Tensor:
        """[B, *shape] Lᵀ v: takes a score to the scale of the noise."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """[B, *shape] L⁻¹ v."""

    @abstractmethod
    def solve_transposed(self, z: Tensor) -> Tensor:
        """[B, *shape] L⁻ᵀ z: the score of m + L z is minus this."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """[B] float64 log|det L|."""

    def sample(self, z: Tensor) -> Tensor:
        """[B, *shape] m + L z."""
        return self.mean + self.root(z)

    def score(self, y: Tensor) -> Tensor:
        """[B, *shape] ∇ log N(y; m, P) = -P⁻¹ (y - m)."""
        return -self.solve_transposed(self.solve(y - self.mean))

    def log_prob(self, y: Tensor) -> Tensor:
        """[B] float64 log N(y; m, P)."""
        size = math.prod(y.shape[1:])
        return -0.5 * (sum_items(self.solve(y - self.mean).square()) + size * math.log(2 * math.pi)) - self.log_det()


class DiagonalKernel(Kernel):
    """N(m, diag(v)).

    Args:
        mean: [B, *shape].
        variance: v, which broadcasts to the mean.
    """

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.mean, self.variance = mean, variance.expand_as(mean)
        self.scale = self.variance.sqrt()

    def root(self, z: Tensor) -> Tensor:
        return self.scale * z

    def sample(self, z: Tensor) -> Tensor:
        return torch.addcmul(self.mean, self.scale, z)

    def root_transposed(self, v: Tensor) -> Tensor:
        return self.scale * v

    def solve(self, v: Tensor) -> Tensor:
        return v / self.scale

    def solve_transposed(self, z: Tensor) -> Tensor:
        return z / self.scale

    def log_det(self) -> Tensor:
        return sum_items(self.scale.double().log())


class DenseKernel(Kernel):
    """N(m, P) with a full covariance of the flattened item, in float64.

    Args:
        mean: [B, *shape].
        covariance: [n, n] or [B, n, n], n = prod(shape).
    Raises:
        ValueError: if a covariance is not positive definite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean = mean
        self.covariance = covariance.double().expand(len(mean), *covariance.shape[-2:])
        self.lower, info = torch.linalg.cholesky_ex(self.covariance)
        if info.device.type == "cpu" and bool(info.any()):
            row = int(info.nonzero()[0])
            raise ValueError(
                f"kernel: the covariance of row {row} is not positive definite (its smallest eigenvalue is "
                f"{float(torch.linalg.eigvalsh(self.covariance[row])[0]):.3g}): noise does not reach every coordinate "
                "over this increment. Use order 1 or ito, under which noise spreads through the drift, a longer "
                "increment, or a process whose noise reaches all coordinates."
            )

    def _flat(self, v: Tensor) -> Tensor:
        return v.reshape(len(v), -1, 1).to(self.lower.dtype)

    def _shaped(self, v: Tensor, like: Tensor) -> Tensor:
        return v.reshape(like.shape).to(like.dtype)

    def root(self, z: Tensor) -> Tensor:
        return self._shaped(self.lower @ self._flat(z), z)

    def root_transposed(self, v: Tensor) -> Tensor:
        return self._shaped(self.lower.mT @ self._flat(v), v)

    def solve(self, v: Tensor) -> Tensor:
        return self._shaped(torch.linalg.solve_triangular(self.lower, self._flat(v), upper=False), v)

    def solve_transposed(self, z: Tensor) -> Tensor:
        return self._shaped(torch.linalg.solve_triangular(self.lower.mT, self._flat(z), upper=True), z)

    def log_det(self) -> Tensor:
        return self.lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
