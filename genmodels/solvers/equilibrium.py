"""Gradients of fixed points z = f(z): of the implicit function, or cheaper ones that are not exact."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..registry import kind, register
from ..types import expand_like
from .fixed_point import Anderson, Broyden, FixedPoint, Map, Picard, evaluated
from .newton import flat, gmres, once
from .norms import finite_rows, rms
from .outcomes import Equilibrium, EquilibriumError, Outcome


@dataclass(frozen=True, slots=True)
class Adjoint:
    """How the linear system of a backward pass was solved.

    Args:
        residual: [B] float64 |g - (I - Jᵀ) λ|/|g|.
        converged: [B] bool, whether that is within the tolerance.
        nfe: products with Jᵀ, without the one that gives the residual.
    """

    residual: Tensor
    converged: Tensor
    nfe: int


@kind
class EquilibriumGradient(ABC):
    """How gradients get from a fixed point to what the map depends on. The fixed point itself does not depend on it.

    Attributes:
        adjoint: of the last backward pass; None before one, and for gradients without a linear system.
        unconverged: rows whose linear systems did not converge, since the beginning.
    """

    adjoint: Adjoint | None = None
    unconverged: int = 0

    def solve(self, f: Map, z: Tensor, solver: FixedPoint) -> Equilibrium:
        """The fixed points from z, with gradients."""
        with torch.no_grad():
            found = solver.solve(f, z.detach())
        return replace(found, z=self.attach(f, found.z))

    @abstractmethod
    def attach(self, f: Map, z: Tensor) -> Tensor:
        """z, fixed points of f, with gradients."""


@register(EquilibriumGradient, "implicit")
class Implicit(EquilibriumGradient):
    """dz = (I - J)⁻¹ ∂f with J = ∂f/∂z: exact at a fixed point, up to the tolerance of the linear system.

    The backward pass solves (I - Jᵀ) λ = g for every row by itself and hands λ to one recorded evaluation of f, whose
    graph gives the products with Jᵀ: one evaluation forwards, and as many backward passes of it as products. What
    does not converge within its products is used as it is, warned of once, and counted. Gradients can be taken once,
    not twice.

    Args:
        linear: "gmres"; "neumann" sums λ = Σ (Jᵀ)^k g; "anderson" and "broyden" iterate λ ← g + Jᵀ λ as for fixed
            points.
        rtol: of the residual, relative to |g|.
        max_iterations: products with Jᵀ.
    Raises:
        ValueError: if rtol is not positive or below the resolution of a state, or there is not at least one product.
    Source: Bai et al. 2019 (Deep equilibrium models), theorem 1.
    """

    def __init__(
        self,
        linear: Literal["gmres", "neumann", "anderson", "broyden"] = "gmres",
        rtol: float = 1e-3,
        max_iterations: int = 50,
    ) -> None:
        if rtol <= 0 or max_iterations < 1:
            raise ValueError(
                f"implicit: rtol > 0 and max_iterations >= 1 are needed, found {rtol:g} and {max_iterations}."
            )
        self.linear, self.rtol, self.max_iterations = linear, rtol, max_iterations

    def attach(self, f: Map, z: Tensor) -> Tensor:
        resolution = torch.finfo(z.dtype).eps
        if self.rtol < resolution:
            raise ValueError(
                f"implicit: rtol={self.rtol:g} is below the resolution {resolution:.2g} of {z.dtype}. Compute in "
                "float64, or raise it."
            )
        with torch.enable_grad():
            y = z.detach().requires_grad_()
            fy = evaluated(f, y)
        return _Implicit.apply(fy, y, z.detach(), self) if fy.requires_grad else z

    def adjoint_of(self, product: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
        """λ [B, *shape] with λ = g + Jᵀ λ, where Jᵀ is `product`; the books are kept up."""
        calls = 0

        def counted(v: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return product(v)

        solution = self._solved(counted, g)
        size = rms(g)
        residual = rms(g - solution + product(solution)) / torch.where(size > 0, size, 1.0)
        converged = residual <= self.rtol
        self.adjoint = Adjoint(residual, converged, calls)
        lost = int((~converged).sum())
        if lost and not self.unconverged:
            warnings.warn(
                f"implicit: {lost} of {len(g)} linear systems of the backward pass did not reach rtol={self.rtol:g} in "
                f"{calls} products ('{self.linear}'; the worst is left at {float(residual.max()):.2g}); gradients are "
                "not exact. Raise max_iterations or rtol, or make f more contractive. This is said once, and counted.",
                stacklevel=2,
            )
        self.unconverged += lost
        return solution

    def _solved(self, product: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
        # |λ| is about |g| or larger; the residual that is asked for is relative to |g|, row by row
        wide, size = torch.promote_types(g.dtype, torch.float32), rms(g)
        scale = expand_like(torch.where(size > 0, size, 1.0), g).to(wide)
        unit = g / scale
        pulled = lambda v: product(v.to(g.dtype)).to(wide)  # noqa: E731
        if self.linear == "gmres":
            matrix = lambda v: v - flat(pulled(v.reshape(g.shape)))  # noqa: E731
            found = gmres(matrix, flat(unit), self.rtol, self.max_iterations).reshape(g.shape)
        else:
            kinds = {"neumann": Picard, "anderson": Anderson, "broyden": Broyden}
            method = kinds[self.linear](0.0, max(self.rtol, 4 * torch.finfo(wide).eps), self.max_iterations)
            found = method.solve(lambda v: unit + pulled(v), unit).z
        return (scale * found).to(g.dtype)


class _Implicit(torch.autograd.Function):
    """z with z = f(z), whose cotangent g reaches f as λ = (I - Jᵀ)⁻¹ g."""

    @staticmethod
    def forward(ctx: Any, fy: Tensor, y: Tensor, z: Tensor, gradient: Implicit) -> Tensor:
        ctx.save_for_backward(fy, y)
        ctx.gradient = gradient
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        fy, y = ctx.saved_tensors

        def product(v: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(fy, y, v, retain_graph=True, allow_unused=True)
            return torch.zeros_like(v) if found is None else found

        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            found = ctx.gradient.adjoint_of(product, g)
        return once(found, fy, g), None, None, None


class _Unrolled(EquilibriumGradient):
    """Backpropagation through some further steps of plain iteration from the fixed point, which stays where it is."""

    steps: int
    damping: float

    def attach(self, f: Map, z: Tensor) -> Tensor:
        with torch.enable_grad():
            new = z.detach()
            for _ in range(self.steps):
                new = new + self.damping * (evaluated(f, new) - new)
        return _Through.apply(new, z)


class _Through(torch.autograd.Function):
    """z, whose cotangent goes to something else of the same shape."""

    @staticmethod
    def forward(ctx: Any, other: Tensor, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


@register(EquilibriumGradient, "jacobian_free")
class JacobianFree(_Unrolled):
    """dz = ∂f at the fixed point: the first term of (I - J)⁻¹ ∂f = Σ J^k ∂f, for one evaluation and no linear system.

    A direction of descent where J is small enough.

    Source: Fung et al. 2022 (JFB: Jacobian-free backpropagation for implicit networks), section 3.
    """

    steps, damping = 1, 1.0


@register(EquilibriumGradient, "phantom")
class Phantom(_Unrolled):
    """Backpropagation through damped iterations from the fixed point: dz = τ Σ_{k < steps} ((1 - τ) I + τ J)^k ∂f.

    With damping τ = 1 it is backpropagation through the last `steps` plain iterations (truncated).

    Args:
        steps: iterations.
        damping: τ.
    Raises:
        ValueError: if there is not at least one step, or the damping is not in (0, 1].
    Source: Geng et al. 2021 (On training implicit models), section 3.
    """

    def __init__(self, steps: int = 5, damping: float = 0.5) -> None:
        if steps < 1 or not 0 < damping <= 1:
            raise ValueError(f"phantom: steps >= 1 and 0 < damping <= 1 are needed, found {steps} and {damping:g}.")
        self.steps, self.damping = steps, damping


@register(EquilibriumGradient, "unrolled")
class Unrolled(EquilibriumGradient):
    """Backpropagation through every iteration of the solver, as of a network with shared weights and as many layers."""

    def solve(self, f: Map, z: Tensor, solver: FixedPoint) -> Equilibrium:
        return solver.solve(f, z)

    def attach(self, f: Map, z: Tensor) -> Tensor:
        return z


def equilibrium(
    f: Map,
    z: Tensor,
    *,
    solver: FixedPoint,
    gradient: EquilibriumGradient | None = None,
    on_failure: Literal["raise", "return"] = "return",
) -> Equilibrium:
    """Fixed points z = f(z), row by row.

    Args:
        f: [B, *shape] -> [B, *shape]; row i of the result depends on row i alone. A `RowMap` is narrowed to the rows
            that have not converged.
        z: [B, *shape] where to start.
        gradient: how gradients are taken; None for `implicit`. Without gradients the search keeps no graph.
        on_failure: "return" gives the best iterate of rows that did not converge, "raise" an error.
    Raises:
        ValueError: if the map changes the shape of the state, the start is not finite, not of floating point or has no
            batch axis, or the tolerances are below the resolution of its dtype.
        EquilibriumError: if a row meets an infinite or undefined state and has no finite iterate, or, with "raise", if
            it does not converge.
    """
    if on_failure not in ("raise", "return"):
        raise ValueError(f'equilibrium: on_failure is "raise" or "return", found {on_failure!r}.')
    solver.check_start(z)
    if not finite_rows(z).all():
        raise ValueError(f"equilibrium: row {int((~finite_rows(z)).nonzero()[0])} of the start is not finite.")
    found = (gradient or Implicit()).solve(f, z, solver) if torch.is_grad_enabled() else solver.solve(f, z)
    lost = found.outcome > 0 if on_failure == "raise" else ~found.residual.isfinite()
    if lost.any():
        kept = replace(found, outcome=torch.where(lost, found.outcome, Outcome.converged))
        raise EquilibriumError(kept, solver.title)
    return found
