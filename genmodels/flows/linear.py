"""Linear bijections over components or channels (the first axis of an item): permutations, LU products, reshaping."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import register
from ..types import Condition, Shape
from .bijection import Bijection

FLOOR = 1e-3  # least diagonal entry of U


class _Unconditional(Bijection):
    """A bijection of items of `shape` that ignores the condition."""

    def __init__(self, shape: Shape, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if not self.shape:
            raise ValueError(f"{self.registered_name}: items need at least one axis, found shape=().")

    @staticmethod
    def no_change(x: Tensor) -> Tensor:
        """[B] float64 zeros: the log-determinant of a map that keeps volumes."""
        return x.new_zeros(len(x), dtype=torch.float64)


@register(Bijection, "permutation")
class Permutation(_Unconditional):
    """z_i = x_{order(i)} over components, or channels of an image; log_det = 0. The order is fixed once built.

    Args:
        order: "random" draws one, as parameters are drawn; "reverse" turns the axis round.
    """

    def __init__(
        self,
        order: Literal["random", "reverse"] = "random",
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__(shape, num_classes, condition_shape)
        n = self.shape[0]
        self.register_buffer("order", torch.randperm(n) if order == "random" else torch.arange(n).flip(0))

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.order), self.no_change(x)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return z.index_select(1, self.order.argsort()), self.no_change(z)


@register(Bijection, "flatten")
class Flatten(_Unconditional):
    """z = the numbers of x as one vector, in row-major order; log_det = 0."""

    def __init__(self, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__(shape, num_classes, condition_shape)

    @property
    def out_shape(self) -> Shape:
        return (math.prod(self.shape),)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return x.reshape(len(x), *self.out_shape), self.no_change(x)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return z.reshape(len(z), *self.shape), self.no_change(z)


@register(Bijection, "lu_linear")
class LULinear(_Unconditional):
    """z = W x + b with W = L U over components, or over the channels of every pixel (a 1x1 convolution).

    L is lower triangular with unit diagonal, U upper triangular with diagonal softplus(v) + 1e-3, and
    log_det = pixels · Σ log diag(U), so that W is invertible whatever its parameters. It starts as the identity. After
    a fixed `permutation` it acts as W = L U P.

    Source: Durkan et al. 2019 (Neural Spline Flows), section 3.2; Kingma & Dhariwal 2018 (Glow), section 3.2.
    """

    def __init__(self, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__(shape, num_classes, condition_shape)
        n = self.shape[0]
        self.lower = nn.Parameter(torch.zeros(n * (n - 1) // 2))
        self.upper = nn.Parameter(torch.zeros(n * (n - 1) // 2))
        self.diagonal = nn.Parameter(torch.full((n,), math.log(math.expm1(1 - FLOOR))))
        self.bias = nn.Parameter(torch.zeros(n))
        rows, columns = torch.tril_indices(n, n, -1)
        self.register_buffer("below", rows * n + columns, persistent=False)
        rows, columns = torch.triu_indices(n, n, 1)
        self.register_buffer("above", rows * n + columns, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U, [C, C] each."""
        n = self.shape[0]
        zeros = self.bias.new_zeros(n * n)
        lower = zeros.scatter(0, self.below, self.lower).unflatten(0, (n, n)) + torch.eye(n).to(zeros)
        upper = zeros.scatter(0, self.above, self.upper).unflatten(0, (n, n))
        return lower, upper + torch.diag(F.softplus(self.diagonal) + FLOOR)

    def log_det(self, x: Tensor) -> Tensor:
        """[B] float64 log|det W| per pixel times the number of pixels."""
        one = (F.softplus(self.diagonal.double()) + FLOOR).log().sum() * math.prod(self.shape[1:])
        return one.expand(len(x))

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self.factors()
        return F.linear(x.movedim(1, -1), lower @ upper, self.bias).movedim(-1, 1), self.log_det(x)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self.factors()
        rows = z.movedim(1, -1) - self.bias
        flat = rows.reshape(math.prod(rows.shape[:-1]), self.shape[0])
        # rows of X solve X Uᵀ Lᵀ = Z
        flat = torch.linalg.solve_triangular(lower.mT, flat, upper=True, left=False, unitriangular=True)
        flat = torch.linalg.solve_triangular(upper.mT, flat, upper=False, left=False)
        return flat.reshape(rows.shape).movedim(-1, 1), -self.log_det(z)
