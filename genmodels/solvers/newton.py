"""Newton's method for the stages of implicit solvers: linear systems (I - scale J) v = r, row by row."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..types import expand_like
from .fields import Counted


class Linearised(ABC):
    """The matrix I - scale J with J = ∂f/∂y, where f [B, *shape] was computed from y [B, *shape] with a graph.

    Every product with J or its transpose counts as one evaluation of the field.

    Args:
        scale: [] or [B], h γ of the stage.
        field: the field that counts, None outside of a solve.
    """

    def __init__(self, f: Tensor, y: Tensor, scale: Tensor, field: Any = None) -> None:
        self.f, self.y, self.field = f, y, field
        self.scale = scale.detach().to(y.dtype)

    @abstractmethod
    def solve(self, r: Tensor) -> Tensor:
        """v [B, *shape] with (I - scale J) v = r."""

    @abstractmethod
    def solve_transposed(self, r: Tensor) -> Tensor:
        """v [B, *shape] with (I - scale Jᵀ) v = r."""

    def pulled(self, v: Tensor) -> Tensor:
        """Jᵀ v."""
        self._count()
        return _gradient(self.f, self.y, v)

    def _count(self) -> None:
        if isinstance(self.field, Counted):
            self.field.calls += 1


class Dense(Linearised):
    """By the LU factors of the matrix [B, D, D], which D products with Jᵀ give."""

    def __init__(self, f: Tensor, y: Tensor, scale: Tensor, field: Any = None) -> None:
        super().__init__(f, y, scale, field)
        units = torch.eye(y[0].numel(), dtype=y.dtype, device=y.device)
        rows = [self.pulled(unit.reshape(y.shape[1:]).expand_as(y)) for unit in units]
        jacobian = torch.stack([flat(row) for row in rows], 1)
        self.f = self.y = None  # the graph is not needed any more
        self.factors, self.pivots, _ = torch.linalg.lu_factor_ex(units - expand_like(self.scale, jacobian) * jacobian)

    def solve(self, r: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self.factors, self.pivots, flat(r)[..., None]).reshape(r.shape)

    def solve_transposed(self, r: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self.factors, self.pivots, flat(r)[..., None], adjoint=True).reshape(r.shape)


class Krylov(Linearised):
    """Without a matrix, by GMRES: J v is the derivative of Jᵀ u with respect to u along v.

    The residual of `solve` is at most 1e-3 |r| for each row, as the next step of Newton's method corrects what is left;
    that of `solve_transposed`, which gives gradients, is at the level of rounding.
    """

    def solve(self, r: Tensor) -> Tensor:
        return self._gmres(self.pushed, r, 1e-3)

    def solve_transposed(self, r: Tensor) -> Tensor:
        return self._gmres(self.pulled, r, 10 * torch.finfo(r.dtype).eps)

    def pushed(self, v: Tensor) -> Tensor:
        """J v."""
        self._count()
        u, product = self._transposed
        return _gradient(product, u, v)

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        """u and Jᵀ u with its graph, in which it is linear."""
        u = torch.zeros_like(self.f, requires_grad=True)
        with torch.enable_grad():
            return u, _gradient(self.f, self.y, u, create_graph=True)

    def _gmres(self, product: Callable[[Tensor], Tensor], r: Tensor, tolerance: float) -> Tensor:
        def matrix(v: Tensor) -> Tensor:
            v = v.reshape(r.shape)
            return flat(v - expand_like(self.scale, v) * product(v))

        return gmres(matrix, flat(r), tolerance).reshape(r.shape)


def gmres(matrix: Callable[[Tensor], Tensor], r: Tensor, tolerance: float, most: int = 100) -> Tensor:
    """v [B, D] with |r - matrix(v)| <= tolerance |r| for each row, or the best of `most` products.

    A row that has converged takes no part in further iterations: its result does not depend on the other rows. Nor does
    one whose matrix is singular, to rounding, on what it has spanned: it keeps the best of the products before.

    Source: Saad & Schultz 1986 (GMRES).
    """
    size = torch.linalg.vector_norm(r, dim=1)
    most, goal, done = min(most, r.shape[1]), tolerance * size, size == 0
    basis = [r / torch.where(done, 1.0, size)[:, None]]
    upper = torch.eye(most, dtype=r.dtype, device=r.device).repeat(len(r), 1, 1)
    rotations: list[tuple[Tensor, Tensor]] = []
    rest, right = size, []
    for j in range(most):
        if done.all():
            break
        w, column = matrix(basis[j]), torch.zeros(len(r), j + 1, dtype=r.dtype, device=r.device)
        whole = torch.linalg.vector_norm(w, dim=1)
        known = torch.stack(basis, 1)
        for _ in range(2):  # once more, against rounding
            part = torch.einsum("bjd,bd->bj", known, w)
            w, column = w - torch.einsum("bj,bjd->bd", part, known), column + part
        entries, length = list(column.unbind(1)), torch.linalg.vector_norm(w, dim=1)
        for i, (c, s) in enumerate(rotations):
            entries[i], entries[i + 1] = c * entries[i] + s * entries[i + 1], c * entries[i + 1] - s * entries[i]
        radius = torch.hypot(entries[j], length)
        broken = done | (radius <= 10 * torch.finfo(r.dtype).eps * whole)
        c, s = (torch.where(broken, 1.0, v / torch.where(broken, 1.0, radius)) for v in (entries[j], length))
        rotations.append((c, s))
        entries[j] = radius
        upper[:, : j + 1, j] = torch.where(broken[:, None], upper[:, : j + 1, j], torch.stack(entries, 1))
        right.append(torch.where(broken, 0.0, c * rest))
        rest = torch.where(broken, rest, -s * rest)
        done = broken | ~(rest.abs() > goal)  # nan ends, too
        basis.append(w / torch.where(length > 0, length, 1.0)[:, None])
    if not right:
        return torch.zeros_like(r)
    n = len(right)
    weights = torch.linalg.solve_triangular(upper[:, :n, :n], torch.stack(right, 1)[..., None], upper=True)
    return torch.einsum("bj,bjd->bd", weights[..., 0], torch.stack(basis[:n], 1))


class _Once(torch.autograd.Function):
    """The same, which can not be differentiated with respect to itself or to what it depends on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *causes: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "implicit: gradients of implicit functions can be taken once, not twice: the solution of the linear system "
            "has no graph. Unroll the iteration (gradient: unrolled or phantom) or integrate explicitly."
        )


def once(x: Tensor, *causes: Tensor) -> Tensor:
    """x, of which gradients with respect to anything that the causes depend on raise an error instead of being 0."""
    return _Once.apply(x, *causes) if torch.is_grad_enabled() else x


class _Implicit(torch.autograd.Function):
    """k with k = f(y + scale k), whose gradient is that of the implicit function: (I - scale Jᵀ)⁻¹ v."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, y: Tensor, scale: Tensor, k: Tensor, linear: type[Linearised]) -> Tensor:
        ctx.save_for_backward(f, y, scale)
        ctx.linear = linear
        return k.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        f, y, scale = ctx.saved_tensors
        with torch.no_grad():
            found = ctx.linear(f, y, scale).solve_transposed(v)
        return once(found, f, v), None, None, None, None


def implicit(f: Tensor, y: Tensor, scale: Tensor, k: Tensor, linear: type[Linearised]) -> Tensor:
    """k, the solution of k = f(base + scale k), with the gradients of the implicit function.

    Args:
        f: [B, *shape] the field at y, with graph.
        y: [B, *shape] base + scale k, with the graph of base and scale, k held constant.
    """
    return _Implicit.apply(f, y, scale.detach(), k, linear)


def flat(x: Tensor) -> Tensor:
    """[B, D] from [B, *shape]."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def _gradient(out: Tensor, at: Tensor, v: Tensor, *, create_graph: bool = False) -> Tensor:
    """vᵀ ∂out/∂at, 0 where out does not depend on it."""
    if not out.requires_grad:
        return torch.zeros_like(at)
    (value,) = torch.autograd.grad(out, at, v, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(at) if value is None else value
