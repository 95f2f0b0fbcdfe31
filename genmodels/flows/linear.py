"""Linear bijections over components or channels (the first axis of an item): permutations, LU products, flattening."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import register
from ..types import Condition, Shape
from .bijection import Bijection

FLOOR = 1e-3  # least diagonal entry of U


class Unconditional(Bijection):
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
class Permutation(Unconditional):
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
class Flatten(Unconditional):
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
class LULinear(Unconditional):
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

    def weight(self) -> Tensor:
        """W, [C, C]."""
        lower, upper = self.factors()
        return lower @ upper

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return F.linear(x.movedim(1, -1), self.weight(), self.bias).movedim(-1, 1), self.log_det(x)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self.factors()
        rows = z.movedim(1, -1) - self.bias
        flat = rows.reshape(math.prod(rows.shape[:-1]), self.shape[0])
        # rows of X solve X Uᵀ Lᵀ = Z
        flat = torch.linalg.solve_triangular(lower.mT, flat, upper=True, left=False, unitriangular=True)
        flat = torch.linalg.solve_triangular(upper.mT, flat, upper=False, left=False)
        return flat.reshape(rows.shape).movedim(-1, 1), -self.log_det(z)


@register(Bijection, "conv1x1")
class Conv1x1(LULinear):
    """z = W x + b over the channels of each pixel (a 1x1 convolution) or over components; W = L S U P.

    P is a fixed random permutation, L and U are the triangles of `lu_linear`, S a fixed diagonal of signs;
    log_det = pixels · Σ log diag(U). One layer in place of `permutation` and `lu_linear`.

    Args:
        start: "permutation" starts at W = P, "orthogonal" at a random orthogonal W, which is factorised into L S U P.
    Source: Kingma & Dhariwal 2018 (Glow), section 3.2; Durkan et al. 2019 (Neural Spline Flows), section 5.3.
    """

    def __init__(
        self,
        start: Literal["permutation", "orthogonal"] = "permutation",
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__(shape=shape, num_classes=num_classes, condition_shape=condition_shape)
        n = self.shape[0]
        self.register_buffer("order", torch.randperm(n))
        self.register_buffer("sign", torch.ones(n))
        if start == "orthogonal":
            self._factorise(torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0])

    @torch.no_grad()
    def _factorise(self, w: Tensor) -> None:
        """Set the parameters so that the map is W = w [C, C], without bias."""
        # Wᵀ = P' A R with pivots gives W P' = Rᵀ Aᵀ = (Rᵀ D⁻¹)(D Aᵀ), D = diag(R), triangular as L and S U are
        p, a, r = torch.linalg.lu(w.mT)
        d = r.diagonal()
        self.order.copy_(p.argmax(0))
        self.sign.copy_(d.sign())
        self.lower.copy_((r.mT / d).flatten()[self.below])
        self.upper.copy_((d.abs()[:, None] * a.mT).flatten()[self.above])
        self.diagonal.copy_((d.abs() - FLOOR).expm1().log())

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and S U, [C, C] each."""
        lower, upper = super().factors()
        return lower, self.sign[:, None] * upper

    def weight(self) -> Tensor:
        return super().weight().index_select(1, self.order.argsort())

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(z)
        return x.index_select(1, self.order.argsort()), log_det
