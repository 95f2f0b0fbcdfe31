"""Linear bijections over components or channels (the first axis of an item): permutations, LU products, flattening."""

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import ConfigError, register
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
        order: "random" draws one, as parameters are drawn; "reverse" turns the axis round; or the list itself.
    Raises:
        ConfigError: if a list does not hold each of 0 … C-1 once.
    """

    def __init__(
        self,
        order: Literal["random", "reverse"] | tuple[int, ...] = "random",
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__(shape, num_classes, condition_shape)
        n = self.shape[0]
        if order == "random":
            places = torch.randperm(n)
        elif order == "reverse":
            places = torch.arange(n).flip(0)
        elif sorted(order) == list(range(n)):
            places = torch.tensor(order)
        else:
            raise ConfigError(
                f"permutation.order: a list that holds each of 0 … {n - 1} once is needed for items of shape "
                f"{list(self.shape)}, found {list(order)}."
            )
        self.register_buffer("order", places)

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


class Linear(Unconditional):
    """z = W x + b over components, or the channels of every pixel (a 1x1 convolution); log_det = pixels · log|det W|.

    Where no gradient is asked for, on the CPU, the inverse is one product with W⁻¹, which is kept together with copies
    of the numbers that it was made of and made again as soon as these differ from the present ones. W⁻¹ is made in
    float64 and rounded once, so that its product is as accurate as the substitutions (`solve`) that it replaces.

    Attributes:
        bias: [C] b, or None.
    """

    bias: nn.Parameter | None
    _kept: tuple[tuple[Tensor, ...], Tensor] | None = None

    @abstractmethod
    def weight(self) -> Tensor:
        """W, [C, C]."""

    @abstractmethod
    def solve(self, rows: Tensor) -> Tensor:
        """The rows W⁻¹ z of rows z, [N, C], in their dtype."""

    @abstractmethod
    def log_volume(self) -> Tensor:
        """[] float64 log|det W|."""

    def log_det(self, x: Tensor) -> Tensor:
        """[B] float64 log|det W| per pixel times the number of pixels."""
        return (self.log_volume() * math.prod(self.shape[1:])).expand(len(x))

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return F.linear(x.movedim(1, -1), self.weight(), self.bias).movedim(-1, 1), self.log_det(x)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        rows = z.movedim(1, -1)
        rows = rows if self.bias is None else rows - self.bias
        if self._keeps_inverse():
            rows = F.linear(rows, self.inverse_weight())
        else:
            rows = self.solve(rows.reshape(math.prod(rows.shape[:-1]), self.shape[0])).reshape(rows.shape)
        return rows.movedim(-1, 1), -self.log_det(z)

    def _keeps_inverse(self) -> bool:
        """Whether W⁻¹ may be kept: comparing waits for other devices, and tensors of transforms have no values."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return all(isinstance(p, nn.Parameter) and p.device.type == "cpu" for p in self._numbers()[0])

    def _numbers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters, and the buffers of a checkpoint."""
        buffers = [b for name, b in self._buffers.items() if name not in self._non_persistent_buffers_set]
        return [p for p in self._parameters.values() if p is not None], buffers

    @torch.no_grad()
    def inverse_weight(self) -> Tensor:
        """W⁻¹, [C, C]; the one that is kept, if it is that of the present parameters and buffers."""
        present = tuple(t for kind in self._numbers() for t in kind)
        if self._kept is None or not all(map(_same, self._kept[0], present)):
            eye = torch.eye(self.shape[0], dtype=torch.float64, device=present[0].device)
            inverse = self.solve(eye).mT.to(present[0].dtype).contiguous()
            self._kept = tuple(t.detach().clone() for t in present), inverse
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files are made without W⁻¹."""
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@register(Bijection, "lu_linear")
class LULinear(Linear):
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
        self.register_buffer("above", above(n), persistent=False)

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """L and U, [C, C] each, in the dtype of the parameters if none is given."""
        n, dtype = self.shape[0], dtype or self.bias.dtype
        lower, upper, diagonal = (p.to(dtype) for p in (self.lower, self.upper, self.diagonal))
        zeros = diagonal.new_zeros(n * n)
        unit = zeros.scatter(0, self.below, lower).unflatten(0, (n, n)) + torch.eye(n).to(zeros)
        upper = zeros.scatter(0, self.above, upper).unflatten(0, (n, n))
        return unit, upper + torch.diag(F.softplus(diagonal) + FLOOR)

    def log_volume(self) -> Tensor:
        return (F.softplus(self.diagonal.double()) + FLOOR).log().sum()

    def weight(self) -> Tensor:
        lower, upper = self.factors()
        return lower @ upper

    def solve(self, rows: Tensor) -> Tensor:
        return substitute(*self.factors(rows.dtype), rows)


def above(n: int) -> Tensor:
    """[n(n-1)/2] places of the entries above the diagonal in a flattened [n, n]."""
    rows, columns = torch.triu_indices(n, n, 1)
    return rows * n + columns


def substitute(lower: Tensor, upper: Tensor, rows: Tensor) -> Tensor:
    """The rows U⁻¹ L⁻¹ z of rows z [N, C], by substitution; the diagonal of L is one."""
    # rows of X solve X Uᵀ Lᵀ = Z
    rows = torch.linalg.solve_triangular(lower.mT, rows, upper=True, left=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper.mT, rows, upper=False, left=False)


@register(Bijection, "conv1x1")
class Conv1x1(LULinear):
    """z = W x + b over the channels of each pixel (a 1x1 convolution) or over components; W = L S U P.

    P is a fixed random permutation, L and U are the triangles of `lu_linear`, S a fixed diagonal of signs;
    log_det = pixels · Σ log diag(U). One layer in place of `permutation` and `lu_linear`, with C² + C parameters.

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

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """L and S U, [C, C] each."""
        lower, upper = super().factors(dtype)
        return lower, self.sign[:, None].to(upper) * upper

    def weight(self) -> Tensor:
        return super().weight().index_select(1, self.order.argsort())

    def solve(self, rows: Tensor) -> Tensor:
        return super().solve(rows).index_select(1, self.order.argsort())


@register(Bijection, "glow_conv1x1")
class GlowConv1x1(Linear):
    """z = P L (U + diag(s)) x over the channels of each pixel or over components, stored as published for Glow.

    L is unit lower and U strictly upper triangular; both are stored as full matrices of which the other entries are
    masked (they get no gradient), and s = sign · exp(log|s|), so that there are 2 C² + C parameters, and no bias.
    P and the signs are fixed. It starts at a random orthogonal W; log_det = pixels · Σ log|s|. `conv1x1` with
    `start: orthogonal` spans the same matrices with C² + C parameters, of which C are a bias.

    Source: Kingma & Dhariwal 2018 (Glow), section 3.2.
    """

    def __init__(self, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__(shape, num_classes, condition_shape)
        n = self.shape[0]
        self.bias = None
        p, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0])
        dtype = torch.get_default_dtype()
        self.lower, self.upper = (nn.Parameter(m.to(dtype)) for m in (lower.tril(-1), upper.triu(1)))
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log().to(dtype))
        self.register_buffer("sign", upper.diagonal().sign().to(dtype))
        self.register_buffer("order", p.argmax(1))  # (P y)_i = y_{order(i)}

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """L and U + diag(s), [C, C] each, in the dtype of the parameters if none is given."""
        lower, upper, log, sign = (
            t.to(dtype or self.lower.dtype) for t in (self.lower, self.upper, self.log_diagonal, self.sign)
        )
        return lower.tril(-1) + torch.eye(self.shape[0]).to(lower), upper.triu(1) + torch.diag(sign * log.exp())

    def log_volume(self) -> Tensor:
        return self.log_diagonal.sum(dtype=torch.float64)

    def weight(self) -> Tensor:
        lower, upper = self.factors()
        return (lower @ upper).index_select(0, self.order)

    def solve(self, rows: Tensor) -> Tensor:
        return substitute(*self.factors(rows.dtype), rows.index_select(1, self.order.argsort()))
