"""Implicit Runge-Kutta methods for stiff fields: each stage is the solution of an equation."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from ..registry import register
from ..rng import Noise
from ..types import expand_like
from . import tableaux_implicit as tableaux
from .base import Solver, State, Step
from .fields import VectorField
from .newton import Dense, Krylov, Linearised, implicit
from .norms import rms
from .runge_kutta import RungeKutta, combination

LARGEST_DENSE = 32  # components of a state up to which linear: auto forms its Jacobian


class DiagonallyImplicit(RungeKutta):
    """k_i = f(t + c_i h, x + h Σ_{j<i} a_ij k_j + h γ k_i), x⁺ = x + h Σ b_i k_i, error h Σ (b_i - b̂_i) k_i.

    The steps of an explicit method on a field with a fast mode are at most stability / |eigenvalue| long, whatever the
    tolerance; these methods damp such modes at any step.

    A stage is found by the simplified Newton iteration: J = ∂f/∂x at the start of the step serves every stage, and is
    taken anew at the iterate after every fourth iteration. It stops when a row's update, with what its rate of
    convergence leaves to come, is within a fraction of the controller's tolerance; on a fixed grid, at the level of
    rounding. A row that does not converge is not finite: step control rejects the step and shortens it, and on a
    fixed grid the row fails. Rows that have converged stand still, so that results do not depend on other rows.

    Gradients are those of the implicit function at each stage, not of the iteration: one linear system with Jᵀ, for one
    more evaluation of a stage when gradients are on. They can be taken once, not twice.

    Evaluations of the field are counted as everywhere, and every product with J or its transpose as one more: a
    Jacobian of D components costs 1 + D (dense), each iteration of GMRES 1 (krylov). Rows are evaluated together until
    the last has converged, and the count of each row is that of the batch. Products of the backward pass count nowhere.

    Args:
        linear: "dense" factors the Jacobian [B, D, D] of each row, "krylov" needs products with it alone, "auto" is
            dense up to 32 components.
        fraction: of the tolerance of step control, to which stages are solved.
        iterations: of Newton's method before a row counts as not converging.
    Source: Hairer & Wanner, Solving Ordinary Differential Equations II, sections IV.6 and IV.8.
    """

    implicit = True

    def __init__(
        self, linear: Literal["auto", "dense", "krylov"] = "auto", fraction: float = 0.02, iterations: int = 12
    ) -> None:
        if linear not in ("auto", "dense", "krylov"):
            raise ValueError(f"{type(self).__name__}: linear is 'auto', 'dense' or 'krylov', found {linear!r}.")
        if not 0 < fraction < 1 or iterations < 2:
            raise ValueError(
                f"{type(self).__name__}: 0 < fraction < 1 and iterations >= 2 are needed, found {fraction} and "
                f"{iterations}."
            )
        self.linear, self.fraction, self.iterations = linear, fraction, iterations
        self.tolerances: tuple[float, float] | None = None

    def within(self, rtol: float, atol: float) -> "DiagonallyImplicit":
        solver = copy.copy(self)
        solver.tolerances = (rtol, atol)
        return solver

    def step(
        self, field: VectorField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Noise | None = None
    ) -> Step:
        tableau, h = self.tableau, s - t
        wide = expand_like(h, x).to(x.dtype)
        first = state[0] if tableau.fsal else torch.zeros_like(x)
        newton, slopes = _Newton(self, field, t, h, x, first), []
        for c, row, gamma in zip(tableau.nodes, tableau.matrix, tableau.diagonal, strict=True):
            base = torch.addcmul(x, wide, combination(row, slopes)) if any(row) else x
            at = t if c == 0 else s if c == 1 else torch.add(t, h, alpha=c)
            if gamma:
                slopes.append(newton.stage(at, base, gamma, slopes[-1] if slopes else first))
            else:
                slopes.append(first)
        new = torch.addcmul(x, wide, combination(tableau.weights, slopes))
        error = None if tableau.error_weights is None else wide * combination(tableau.error_weights, slopes)
        error = None if error is None else newton.marked(error, torch.inf)
        return Step(newton.marked(new, torch.nan), error, (slopes[-1],) if tableau.fsal else (), tuple(slopes))


class _Newton:
    """The simplified Newton iteration of the stages of one step from t to t + h."""

    def __init__(self, solver: DiagonallyImplicit, field: Any, t: Tensor, h: Tensor, x: Tensor, slope: Tensor) -> None:
        self.solver, self.field, self.t, self.h, self.x = solver, field, t.detach(), h, x.detach()
        dense = solver.linear == "dense" or (solver.linear == "auto" and x[0].numel() <= LARGEST_DENSE)
        self.kind = Dense if dense else Krylov
        self.failed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.rate = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        self.goal = self._goal(slope.detach())
        self.system: Linearised | None = None

    def stage(self, t: Tensor, base: Tensor, gamma: float, guess: Tensor) -> Tensor:
        """k = f(t, base + h γ k), with the gradients of the implicit function."""
        scale = self.h * gamma
        with torch.no_grad():
            k = self._iterate(t.detach(), base.detach(), scale.detach(), guess.detach())
        if not torch.is_grad_enabled():
            return k
        y = torch.addcmul(base, expand_like(scale, base).to(base.dtype), k)
        f = self.field(t, y)
        if not f.requires_grad:
            return k
        if not y.requires_grad:  # only the field's own parameters want gradients
            y.requires_grad_()
            f = self.field(t, y)
        return implicit(f, y, scale, k, self.kind)

    def marked(self, value: Tensor, mark: float) -> Tensor:
        """`mark` in the rows that failed."""
        return torch.where(expand_like(self.failed, value), mark, value)

    def _iterate(self, t: Tensor, base: Tensor, scale: Tensor, k: Tensor) -> Tensor:
        if self.system is None:
            self.system = self._linearise(self.t, self.x, scale)
        wide, system, rate = expand_like(scale, base).to(base.dtype), self.system, self.rate
        running, before = ~self.failed, None
        for i in range(self.solver.iterations):
            y = torch.addcmul(base, wide, k)
            if i and i % 4 == 0:
                system, before, rate = self._linearise(t, y, scale), None, torch.where(running, torch.inf, rate)
            update = system.solve(self.field(t, y) - k)
            k = torch.where(expand_like(running, k), k + update, k)
            size = rms(wide * update / self.goal)
            if before is None:  # no rate of this stage's own: an update within the goal is needed, and a good record
                done = (size <= 1) & (rate <= 0.5)
            else:
                rate = torch.where(running, size / before, rate)
                # near the goal an update that does not shrink any more is rounding
                done = ((rate < 1) & (rate / (1 - rate) * size <= 1)) | ((rate > 0.3) & (size <= 16))
            running, before = running & ~(done | (size == 0)), size
            if not running.any():
                break
        self.rate = rate
        self.failed = self.failed | running
        return k

    def _linearise(self, t: Tensor, y: Tensor, scale: Tensor) -> Linearised:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            return self.kind(self.field(t, y), y, scale, self.field)

    def _goal(self, slope: Tensor) -> Tensor:
        """[B, *shape] error of the state up to which a stage is solved."""
        x, eps = self.x, torch.finfo(self.x.dtype).eps
        size = expand_like(rms(x) + self.h.detach().abs() * rms(slope), x).to(x.dtype)
        goal = 4 * eps * size
        if self.solver.tolerances is not None:
            rtol, atol = self.solver.tolerances
            goal = goal + self.solver.fraction * (atol + rtol * x.abs())
        return goal.expand_as(x).clamp(min=torch.finfo(x.dtype).tiny)


@register(Solver, "implicit_midpoint")
class ImplicitMidpoint(DiagonallyImplicit):
    """x⁺ = x + h k, k = f(t + h/2, x + h/2 k): order 2, A-stable, symplectic; a fast mode is not damped but kept.

    Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section II.7.
    """

    tableau = tableaux.IMPLICIT_MIDPOINT


@register(Solver, "trapezoid")
class Trapezoid(DiagonallyImplicit):
    """x⁺ = x + h/2 (f(t, x) + f(s, x⁺)): order 2, A-stable; a fast mode is not damped but kept.

    Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section II.7.
    """

    tableau = tableaux.TRAPEZOID


@register(Solver, "kvaerno3")
class Kvaerno3(DiagonallyImplicit):
    """Kværnø 3(2): order 3, L-stable, with error and stiffness estimates; three implicit stages.

    Source: Kværnø 2004, Singly diagonally implicit Runge-Kutta methods with an explicit first stage.
    """

    tableau = tableaux.KVAERNO3


@register(Solver, "esdirk54")
class ESDIRK54(DiagonallyImplicit):
    """ESDIRK5(4)7L[2]SA2: order 5, L-stable, with an error estimate; six implicit stages, all of them within the step.

    Source: Kennedy & Carpenter 2019, Diagonally implicit Runge-Kutta methods for stiff ODEs, table 11.
    """

    tableau = tableaux.ESDIRK54
