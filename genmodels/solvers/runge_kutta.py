"""Explicit Runge-Kutta methods: one step rule, driven by a tableau."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..registry import register
from ..rng import Noise
from ..types import expand_like
from . import tableaux, tableaux_order8
from .base import Solver, State, Step, hermite
from .fields import VectorField
from .norms import rms
from .tableaux import ButcherTableau


class RungeKutta(Solver):
    """k_i = f(t + c_i h, x + h Σ_{j<i} a_ij k_j), x⁺ = x + h Σ b_i k_i, error h Σ (b_i - b̂_i) k_i, with h = s - t.

    Within a step x(t + θ h) = x + h Σ b_i(θ) k_i where the tableau has such weights, else the cubic of both ends.

    A method whose last stage lies at (s, x⁺) hands that evaluation on to the next step. If the last two stages share
    their time, stiffness = rms(k_m - k_{m-1}) / rms(Y_m - Y_{m-1}) with the stages' states Y, 0 where these coincide;
    for y' = λ y it is |λ|.

    Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section II.1; Hairer & Wanner, part II,
        section IV.2 (stiffness).
    """

    tableau: ClassVar[ButcherTableau]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "tableau"):
            return
        cls.order, cls.stages = cls.tableau.order, cls.tableau.new_stages
        cls.adaptive, cls.stability = cls.tableau.b_hat is not None, cls.tableau.stability

    def start(self, field: VectorField, t: Tensor, x: Tensor) -> State:
        return (field(t, x),) if self.tableau.fsal else ()

    def slope(self, field: VectorField, t: Tensor, x: Tensor, state: State) -> Tensor:
        return state[0] if self.tableau.fsal else field(t, x)

    def step(
        self, field: VectorField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Noise | None = None
    ) -> Step:
        tableau, h = self.tableau, s - t
        length = _length(h, x)
        slopes = [self.slope(field, t, x, state)]
        y = x
        for c, row in zip(tableau.nodes[1:], tableau.matrix[1:], strict=True):
            y = advanced(x, length, row, slopes)
            # t + h need not be s in floating point, and fields may end there
            slopes.append(field(s if c == 1 else torch.add(t, h, alpha=c), y))
        new = y if tableau.fsal else advanced(x, length, tableau.weights, slopes)
        error = None if tableau.error_weights is None else length * combination(tableau.error_weights, slopes)
        return Step(new, error, (slopes[-1],) if tableau.fsal else (), tuple(slopes))

    def stiffness(self, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor | None:
        if not self.tableau.paired:
            return None
        # the states' own difference would cancel: it is taken from the slopes
        wide = expand_like(s - t, x).to(x.dtype)
        apart = rms(wide * combination(self.tableau.pair_weights, step.slopes))
        away = rms(step.slopes[-1] - step.slopes[-2])
        return torch.where(apart > 0, away / torch.where(apart > 0, apart, 1.0), 0.0)

    def interpolant(self, field: VectorField, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor:
        wide = expand_like(s - t, x).to(x.dtype)
        if self.tableau.dense is None and self.tableau.fsal:
            return hermite(x, step.x, wide * step.slopes[0], wide * step.slopes[-1])
        if self.tableau.dense is None:
            return super().interpolant(field, t, s, x, step)
        return torch.stack((x, *(wide * combination(weights, step.slopes) for weights in self.tableau.dense)))


def combination(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Σ weights_i slopes_i, without the terms whose weight is 0."""
    total: Any = None
    for weight, slope in zip(weights, slopes, strict=False):
        if weight:
            total = weight * slope if total is None else torch.add(total, slope, alpha=weight)
    return total


def advanced(x: Tensor, length: Tensor | float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """x + length Σ weights_i slopes_i; the sum is taken first, so that x is rounded once."""
    total = combination(weights, slopes)
    return torch.add(x, total, alpha=length) if isinstance(length, float) else torch.addcmul(x, length, total)


def _length(h: Tensor, x: Tensor) -> Tensor | float:
    """A step's length as the cheapest thing to multiply by: a number where reading it costs no wait for a device."""
    if h.ndim == 0 and h.device.type == "cpu" and not h.requires_grad:
        return float(h)
    return expand_like(h, x).to(x.dtype)


@register(Solver, "euler")
class Euler(RungeKutta):
    """x⁺ = x + h f(t, x); order 1, one evaluation per step."""

    tableau = tableaux.EULER


@register(Solver, "midpoint")
class Midpoint(RungeKutta):
    """x⁺ = x + h f(t + h/2, x + h/2 k₁); order 2, two evaluations per step."""

    tableau = tableaux.MIDPOINT


@register(Solver, "heun")
class Heun(RungeKutta):
    """x⁺ = x + h/2 (k₁ + k₂), k₂ = f(t + h, x + h k₁); order 2, two evaluations per step, error against Euler's method.

    Source: Karras et al. 2022 (EDM), algorithm 1, for the sampling of diffusion models.
    """

    tableau = tableaux.HEUN


@register(Solver, "ralston")
class Ralston(RungeKutta):
    """x⁺ = x + h/4 (k₁ + 3 k₂), k₂ = f(t + 2h/3, x + 2h/3 k₁); order 2 with the least error bound, two evaluations.

    Source: Ralston 1962, Runge-Kutta methods with minimum error bounds.
    """

    tableau = tableaux.RALSTON


@register(Solver, "bosh3")
class Bosh3(RungeKutta):
    """Bogacki-Shampine 3(2): order 3 with an error estimate; three evaluations per step (FSAL).

    Source: Bogacki & Shampine 1989, A 3(2) pair of Runge-Kutta formulas.
    """

    tableau = tableaux.BOSH3


@register(Solver, "rk4")
class RK4(RungeKutta):
    """The classical Runge-Kutta method: order 4, four evaluations per step.

    Source: Kutta 1901; Hairer, Nørsett & Wanner, table II.1.2 left.
    """

    tableau = tableaux.RK4


@register(Solver, "rk38")
class RK38(RungeKutta):
    """Kutta's 3/8 rule: order 4, four evaluations per step (what torchdiffeq calls rk4).

    Source: Kutta 1901; Hairer, Nørsett & Wanner, table II.1.2 right.
    """

    tableau = tableaux.RK38


@register(Solver, "dopri5")
class Dopri5(RungeKutta):
    """Dormand-Prince 5(4): order 5 with error and stiffness estimates; six evaluations per step (FSAL).

    The error estimate is the authors' own; torchdiffeq's, after Shampine, is 2/3 of it.

    Source: Dormand & Prince 1980, A family of embedded Runge-Kutta formulae; Hairer, Nørsett & Wanner, table II.5.2.
    """

    tableau = tableaux.DOPRI5


@register(Solver, "tsit5")
class Tsit5(RungeKutta):
    """Tsitouras 5(4): order 5 with error and stiffness estimates; six evaluations per step (FSAL).

    Source: Tsitouras 2011, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption.
    """

    tableau = tableaux.TSIT5


@register(Solver, "dopri8")
class Dopri8(RungeKutta):
    """Dormand-Prince 8(7): order 8 with an error estimate; thirteen evaluations per step (FSAL).

    For tolerances below about 1e-8, in float64. Its last two stages nearly coincide, so that their quotient would be
    rounding noise: it estimates no stiffness.

    Source: Prince & Dormand 1981, High order embedded Runge-Kutta formulae.
    """

    tableau = tableaux_order8.DOPRI8

    def stiffness(self, t: Tensor, s: Tensor, x: Tensor, step: Step) -> None:
        return None
