"""Linear bijections made of Householder reflections: orthogonal maps, QR products and singular value products."""

import torch
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Shape
from .bijection import Bijection
from .linear import Linear, above


def reflected(vectors: Tensor) -> Tensor:
    """Q = H_n … H_1 [C, C] for H_i = I - 2 v_i v_iᵀ / |v_i|² of the rows v_i of [n, C], which may not be zero.

    With unit columns V = (v_1, …, v_n), H_1 H_2 … H_n = I - V M⁻¹ Vᵀ for the upper triangular M that holds 1/2 on its
    diagonal and Vᵀ V above it: one triangular system in place of n products.

    Source: Joffrain et al. 2006 (Accumulating Householder transformations, revisited).
    """
    v = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    halves = torch.eye(len(v)).to(v) / 2
    y = torch.linalg.solve_triangular(torch.triu(v @ v.mT, 1) + halves, v, upper=True)
    return torch.eye(v.shape[1]).to(v) - y.mT @ v


def start_vectors(reflections: int, shape: Shape, where: str) -> nn.Parameter:
    """[reflections, C] random vectors, each of which comes twice running, so that Q = I; of an odd number one is left.

    Raises:
        ConfigError: if there is no reflection.
    """
    if reflections < 1:
        raise ConfigError(f"{where}.reflections: at least one is needed, found {reflections}.")
    pairs = torch.randn((reflections + 1) // 2, shape[0])
    return nn.Parameter(pairs.repeat_interleave(2, 0)[:reflections].contiguous())


@register(Bijection, "householder")
class Householder(Linear):
    """z = Q x over components, or the channels of every pixel: Q = H_n … H_1 of reflections; log_det = 0.

    H_i = I - 2 v_i v_iᵀ / |v_i|². It starts as the identity for even n, as one random reflection for odd n.
    Every orthogonal C x C matrix is a product of at most C reflections; det Q = (-1)ⁿ never changes.

    Args:
        reflections: n.
    Source: Tomczak & Welling 2016 (Householder flow).
    """

    def __init__(
        self, reflections: int = 10, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None
    ) -> None:
        super().__init__(shape, num_classes, condition_shape)
        self.bias = None
        self.vectors = start_vectors(reflections, self.shape, "householder")

    def weight(self) -> Tensor:
        return reflected(self.vectors)

    def solve(self, rows: Tensor) -> Tensor:
        return rows @ reflected(self.vectors.to(rows.dtype))

    def log_volume(self) -> Tensor:
        return self.vectors.new_zeros((), dtype=torch.float64)


@register(Bijection, "qr_linear")
class QRLinear(Linear):
    """z = Q R x + b over components, or the channels of every pixel, with n reflections in Q (see `householder`).

    R is upper triangular with diagonal exp(r); log_det = pixels · Σ r. It starts as the identity for even n.

    Args:
        reflections: n; with n >= C every matrix is reached, up to the sign of its determinant.
    Source: Hoogeboom et al. 2019 (Emerging convolutions); Tomczak & Welling 2016 (Householder flow).
    """

    def __init__(
        self, reflections: int = 10, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None
    ) -> None:
        super().__init__(shape, num_classes, condition_shape)
        n = self.shape[0]
        self.vectors = start_vectors(reflections, self.shape, "qr_linear")
        self.upper = nn.Parameter(torch.zeros(n * (n - 1) // 2))
        self.log_diagonal = nn.Parameter(torch.zeros(n))
        self.bias = nn.Parameter(torch.zeros(n))
        self.register_buffer("above", above(n), persistent=False)

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Q and R, [C, C] each, in the dtype of the parameters if none is given."""
        n = self.shape[0]
        vectors, upper, log = (p.to(dtype or p.dtype) for p in (self.vectors, self.upper, self.log_diagonal))
        strict = upper.new_zeros(n * n).scatter(0, self.above, upper).unflatten(0, (n, n))
        return reflected(vectors), strict + torch.diag(log.exp())

    def log_volume(self) -> Tensor:
        return self.log_diagonal.sum(dtype=torch.float64)

    def weight(self) -> Tensor:
        q, r = self.factors()
        return q @ r

    def solve(self, rows: Tensor) -> Tensor:
        q, r = self.factors(rows.dtype)
        return torch.linalg.solve_triangular(r.mT, rows @ q, upper=False, left=False)  # X Rᵀ = Z Q


@register(Bijection, "svd_linear")
class SVDLinear(Linear):
    """z = Q_1 diag(exp(s)) Q_2 x + b over components, or the channels of every pixel; log_det = pixels · Σ s.

    Q_1 and Q_2 are products of n reflections each (see `householder`). It starts as the identity for even n. The
    singular values exp(s) are parameters of their own, so that a penalty on them is one on the map's stretching.

    Args:
        reflections: n.
    Source: Durkan et al. 2019 (Neural Spline Flows), appendix B; Tomczak & Welling 2016 (Householder flow).
    """

    def __init__(
        self, reflections: int = 10, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None
    ) -> None:
        super().__init__(shape, num_classes, condition_shape)
        self.first = start_vectors(reflections, self.shape, "svd_linear")
        self.second = start_vectors(reflections, self.shape, "svd_linear")
        self.log_diagonal = nn.Parameter(torch.zeros(self.shape[0]))
        self.bias = nn.Parameter(torch.zeros(self.shape[0]))

    def log_volume(self) -> Tensor:
        return self.log_diagonal.sum(dtype=torch.float64)

    def weight(self) -> Tensor:
        return (reflected(self.first) * self.log_diagonal.exp()) @ reflected(self.second)

    def solve(self, rows: Tensor) -> Tensor:
        first, second, log = (p.to(rows.dtype) for p in (self.first, self.second, self.log_diagonal))
        return (rows @ reflected(first) * (-log).exp()) @ reflected(second)
