"""Step control: the controller, its first steps and its norms."""

import warnings
from copy import copy
from typing import Literal

import torch
from torch import Tensor

from ..registry import ConfigError, member, names, register
from ..types import expand_like
from .base import Controller, Problem, Solver, State, title
from .batch import solve_batch
from .fields import Counted
from .norms import rms
from .rows import solve_rows
from .solution import Solution


@register(Controller, "pi")
class PI(Controller):
    """Proportional-integral control of each row's own steps by its own error.

    E = rms(error / (atol + rtol max(|x|, |x⁺|))) over the row; a step with E <= 1 is accepted. With k the order of the
    solver and (p, q) the exponents, h⁺ = h clip(safety E^{-p/k} E₋^{q/k}, min_factor, max_factor), where E₋ (at least
    1e-4) belongs to the row's last accepted step; after a rejection h⁺ = h clip(safety E^{-p/k}, min_factor, 1). The
    first step is Hairer's automatic choice, for one evaluation more. Step lengths are constants to autograd.

    With the norm "batch" there is one clock for the batch and E is taken over all of it: faster, and what is found for
    an item depends on its batch. Answers about single items are to be had with "row".

    Steps are shortened to land on the requested times, rather than interpolated between: every method keeps its order
    there, in values and in gradients, and the field is never evaluated beyond the last time. A grid finer than the
    steps costs at least a step for each interval.

    Args:
        rtol: relative tolerance; in float32 below about 1e-6 it buys evaluations, not accuracy.
        atol: absolute tolerance, in units of the state.
        safety: factor below 1 on the predicted step.
        min_factor: least factor between steps.
        max_factor: greatest factor between steps.
        exponents: (p, q): (0.85, 0.2) is Hairer's DOPRI5 control, (0.7, 0.4) the smoother one of SciML for Tsit5,
            (1, 0) the elementary integral control.
        first_step: length of the first step, None for the automatic choice.
        max_step: longest step; set it where the error estimate is blind (a narrow event, a fast forcing).
        norm: whether every row has steps of its own ("row"), or the batch has one clock ("batch").
    Raises:
        ValueError: if an argument is out of its range; in `integrate`, if rtol is below the resolution of the state.
    Source: Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section II.4; Gustafsson 1991.
    """

    def __init__(
        self,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        safety: float = 0.9,
        min_factor: float = 0.2,
        max_factor: float = 10.0,
        exponents: tuple[float, float] = (0.85, 0.2),
        first_step: float | None = None,
        max_step: float | None = None,
        norm: Literal["row", "batch"] = "row",
    ) -> None:
        rules = (
            (rtol > 0 and atol > 0, "rtol > 0 and atol > 0", (rtol, atol)),
            (0 < safety <= 1, "0 < safety <= 1", safety),
            (0 < min_factor < 1 < max_factor, "0 < min_factor < 1 < max_factor", (min_factor, max_factor)),
            (exponents[0] > 0 and exponents[1] >= 0, "exponents (p, q) with p > 0 and q >= 0", exponents),
            (first_step is None or first_step > 0, "first_step > 0", first_step),
            (max_step is None or max_step > 0, "max_step > 0", max_step),
        )
        for holds, rule, found in rules:
            if not holds:
                raise ValueError(f"pi: {rule} is needed, found {found}.")
        self.rtol, self.atol, self.safety = rtol, atol, safety
        self.min_factor, self.max_factor, self.exponents = min_factor, max_factor, tuple(exponents)
        self.first_step, self.max_step, self.norm = first_step, max_step, norm

    def by_row(self) -> "PI":
        if self.norm == "row":
            return self
        own = copy(self)
        own.norm = "row"
        return own

    def check(self, solver: Solver) -> None:
        if not solver.adaptive:
            usable = [
                n for n in names(Solver) if (m := member(Solver, n, "solver")).adaptive and m.needs is solver.needs
            ]
            raise ConfigError(
                f"integrate: controller '{title(self)}' needs an error estimate, which solver '{title(solver)}' does "
                f"not have. Use one of: {', '.join(usable)}; or controller 'fixed'."
            )

    def solve(self, problem: Problem) -> Solution:
        self.check_resolution(problem.x.dtype)
        problem = problem._replace(solver=problem.solver.within(self.rtol, self.atol))
        if self.norm == "batch":
            return solve_batch(self, problem)
        return solve_rows(self, problem)

    def check_resolution(self, dtype: torch.dtype) -> None:
        """Raises ValueError if rtol asks for more digits than a state has; warns where rounding sets the steps."""
        resolution = torch.finfo(dtype).eps
        if self.rtol < resolution:
            raise ValueError(
                f"pi: rtol = {self.rtol:g} is below the resolution {resolution:.2g} of {dtype}. Compute in float64 "
                "(precision: float64), or raise rtol."
            )
        if dtype == torch.float32 and self.rtol < 1e-6:
            warnings.warn(
                f"pi: with rtol = {self.rtol:g} in float32 rounding, not the field, sets many of the steps: numbers of "
                "evaluations say little then. Compute in float64 (precision: float64), or take rtol >= 1e-6.",
                stacklevel=4,
            )

    def row_norm(self, problem: Problem, error: Tensor, x: Tensor, new: Tensor) -> Tensor:
        """[n] E of each row."""
        scale = torch.maximum(x.abs(), new.abs()).mul_(self.rtol).add_(self.atol)
        return rms(problem.seminorm(error / scale))

    @torch.no_grad()
    def first_steps(self, problem: Problem, field: Counted, t: Tensor, x: Tensor, state: State) -> Tensor:
        """[n] length of the first step: Hairer, Nørsett & Wanner, section II.4, 'starting step size'."""
        longest = min(problem.span, self.max_step or problem.span)
        if self.first_step is not None:
            return torch.full_like(t, min(self.first_step, longest))
        slope = problem.solver.slope(field, t, x, state)
        d0, d1 = self.row_norm(problem, x, x, x), self.row_norm(problem, slope, x, x)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=longest)
        wide = problem.direction * expand_like(h0, x).to(x.dtype)
        probe = problem.solver.velocity(field, t + problem.direction * h0, x + wide * slope)
        steepest = torch.maximum(d1, self.row_norm(problem, probe - slope, x, x) / h0)
        h1 = (0.01 / steepest) ** (1 / problem.solver.error_order)
        h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), h1)
        h = torch.minimum(100 * h0, h1).clamp(max=longest)
        return torch.where(h.isfinite() & (h > 0), h, 1e-3 * longest)  # an infinite slope: the attempts will tell
