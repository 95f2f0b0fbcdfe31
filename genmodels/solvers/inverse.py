"""The exact inverse of a solver's steps, by fixed-point iteration."""

from typing import Any

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..types import expand_like
from .base import Solver, State, Step, title
from .fields import VectorField
from .norms import rms
from .runge_kutta import Euler

SHRINKS = 0.9  # an iteration's factor on updates above which it is not taken to converge
COARSE = 2.0**-6  # of a step's length: a field rounded to bf16 (2⁻⁸) cannot keep its updates much below that


@register(Solver, "inverse")
class Inverse(Solver):
    """The step from t to s that a solver Φ takes back exactly: x⁺ with Φ(s → t, x⁺) = x; the order is that of Φ.

    By the iteration y ← y + x - Φ(s → t, y) from y = Φ(t → s, x). It shrinks errors by a factor of about |h λ|, λ the
    largest eigenvalue of ∂f/∂x: on long steps through a steep field it diverges. Rows whose updates shrink by less
    than a tenth an iteration and stay above 1/64 of the step, or that miss the tolerance, are not finite afterwards.
    Integrated up by `inverse` of Φ and down by Φ on the same grid, a state returns to rounding, the field's included.
    The inverse of Euler's method is implicit Euler's.

    Gradients are those of the iterations made.

    Args:
        solver: Φ, explicit and without memory between steps.
        iterations: of every step, each of as many evaluations as a step of Φ, and as many before the first; at most so
            many if a tolerance is given.
        tolerance: of the root mean square of an update, relative to that of the state, at which a row is done; null to
            make every iteration.
    Raises:
        ConfigError: if Φ is implicit, has memory, draws noise, or steps other fields; if the numbers are not positive.
    Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section II.8 (adjoint methods).
    """

    order, stages = 1, 21

    def __init__(self, solver: Solver = Euler(), iterations: int = 20, tolerance: float | None = None) -> None:
        if solver.needs is not VectorField or solver.whole or solver.implicit or _remembers(solver):
            raise ConfigError(
                f"inverse: solver '{title(solver)}' cannot be inverted. Use an explicit one that steps velocities and "
                "remembers nothing between steps, such as euler or rf_solver."
            )
        if iterations < 1:
            raise ConfigError(f"inverse: iterations must be at least 1, found {iterations}.")
        if tolerance is not None and not tolerance > 0:
            raise ConfigError(f"inverse: tolerance must be above 0, or null, found {tolerance}.")
        self.solver, self.iterations, self.tolerance = solver, iterations, tolerance
        self.order, self.stages = solver.order, (iterations + 1) * solver.stages

    def step(self, field: VectorField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any = None) -> Step:
        y = self.solver.step(field, t, s, x, (), noise).x
        scale = torch.maximum(rms(x.detach()), rms(y.detach()))
        rounding = 16 * torch.finfo(x.dtype).eps * scale
        lenient = torch.maximum(rounding, COARSE * rms((y - x).detach()))
        goal = (
            torch.full_like(scale, -1.0) if self.tolerance is None else torch.maximum(rounding, self.tolerance * scale)
        )
        running, first, size = torch.ones_like(scale, dtype=torch.bool), torch.zeros_like(scale), scale
        for number in range(self.iterations):
            update = x - self.solver.step(field, s, t, y, (), noise).x
            # rows that are done stand still, so that they do not depend on others
            y = torch.where(expand_like(running, y), y + update, y)
            size = rms(update.detach())
            first, running = size if number == 0 else first, running & ~(size <= goal)
            if self.tolerance is not None and not bool(running.any()):
                break
        if self.tolerance is None:
            goal = torch.maximum(SHRINKS ** (self.iterations - 1) * first, lenient)
        failed = running & ~(size <= goal)  # what is undefined failed, too
        return Step(torch.where(expand_like(failed, y), torch.nan, y), None, ())


def _remembers(solver: Solver) -> bool:
    """Whether a solver hands anything from step to step, told by what it would begin with."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    return bool(solver.start(lambda t, x: x, x[0, 0], x))
