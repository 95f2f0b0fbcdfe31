"""The solver that rectified flows are inverted with, its probe where one likes."""

from fractions import Fraction
from typing import Literal

from ..registry import ConfigError, register
from . import tableaux
from .base import Solver
from .runge_kutta import RungeKutta
from .tableaux import ButcherTableau


@register(Solver, "rf_solver")
class RFSolver(RungeKutta):
    """RF-Solver, x⁺ = x + h [(1 - 1/(2c)) k₁ + k_c/(2c)] with k_c = f(t + c h, x + c h k₁); order 2, two evaluations.

    It is Taylor's step h v + h²/2 dv/dt with dv/dt = (k_c - k₁)/(c h) from a probe ahead. Written with weights instead,
    nothing cancels: the published probe c = 1/2 is the explicit midpoint rule, in which k₁ has the weight 0. 2/3 is
    Ralston's method, 1 Heun's, which asks the field at the very end of the grid.

    On the flipped grid the leading errors of a method of even order cancel, so that a state comes back from a round
    trip to O(h³), an order better than it gets there. A probe of fixed length would lose the order where h is shorter.

    Order 3 is Heun's method x⁺ = x + h/4 (k₁ + 3 k₃) with probes at h/3 and 2h/3, three evaluations. A second
    difference quotient, of probes at h/2 and h/4, does not give it: with the O(h) error that the first one keeps, such
    a step stays of order 2, for three evaluations.

    Args:
        order: 2 or 3.
        probe: c in (0, 1], of order 2.
    Raises:
        ConfigError: for another order, a probe out of its range, or one given to order 3.
    Source: Wang et al. 2025 (Taming rectified flow for inversion and editing), algorithm 1; Hairer, Nørsett & Wanner,
        Solving Ordinary Differential Equations I, section II.1 (Heun's method of order 3).
    """

    tableau = tableaux.MIDPOINT

    def __init__(self, order: Literal[2, 3] = 2, probe: float = 0.5) -> None:
        if order not in (2, 3):
            raise ConfigError(f"rf_solver: order 2 or 3 is needed, found {order}. For order 4 take rk4.")
        if not 0 < probe <= 1:
            raise ConfigError(f"rf_solver: 0 < probe <= 1 is needed, in units of the step, found {probe}.")
        if order == 3 and probe != 0.5:
            raise ConfigError(f"rf_solver: order 3 has probes of its own, but probe = {probe} was given. Leave it out.")
        self.tableau = tableaux.HEUN3 if order == 3 else probed(probe)
        self.order, self.stages, self.stability = order, self.tableau.new_stages, self.tableau.stability


def probed(probe: float) -> ButcherTableau:
    """The method of order 2 with a second stage at the part `probe` of the step."""
    c = Fraction(probe)
    return ButcherTableau(2, (Fraction(0), c), ((), (c,)), (1 - 1 / (2 * c), 1 / (2 * c)), stability=2.0)
