"""Penalties on what the solver itself says of its steps: its error and its stiffness, on every step or on a few."""

from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from ..registry import ConfigError, member, names, register
from ..rng import Noise
from ..solvers.base import Solver, Step, title
from ..solvers.fields import VectorField
from ..solvers.norms import rms
from ..solvers.runge_kutta import Tsit5
from ..solvers.solution import Record
from ..types import expand_like
from .regularization import Regularizer, Solve

Aggregation = Literal["mean", "sum", "max"]
PerStep = Literal["error", "squared", "steps"]


@register(Regularizer, "error_estimate")
class ErrorEstimate(Regularizer):
    """ERNODE: the local errors of the accepted steps, as the solver estimates them, with their graph.

    Each step j of length h_j and error norm E_j (1 is what the tolerance allows) counts as E_j h_j ("error"), as E_j²
    ("squared"), or as E_j^{1/k} ("steps"), with k the order of the error estimate: by E ~ h^k a step of the length that
    the tolerance allows would be h_j E_j^{-1/k}, so that Σ E_j^{1/k} is the number of steps that the solution is worth.

    E is inversely proportional to the tolerances that it is measured by. Give `rtol` and `atol` to measure by these
    whatever the solve's own are: the sum of "steps" is then the same at every tolerance of the solve, as E^{1/k} ~ h.
    Step control leaves E of the solve's own tolerances as it is when these change, and lets h grow as their k-th root;
    so without reference tolerances the gradient of the mean of "steps", that of the sum of E h and that of the mean of
    E² depend little on them. Other forms change by powers of the tolerance, and their coefficients with them.

    Args:
        coefficient, end: see `Regularizer`.
        per_step: what a step counts as.
        aggregation: of the steps of a row.
        rtol, atol: reference tolerances; null for the controller's.
    Raises:
        ConfigError: if one of rtol and atol is given without the other, or the solver estimates no errors.
    Source: Pal et al. 2021 (Opening the Blackbox), section 3; the published coefficients mean the mean of E h.
    """

    traced = True

    def __init__(
        self,
        coefficient: float = 100.0,
        end: float | None = None,
        per_step: PerStep = "error",
        aggregation: Aggregation = "mean",
        rtol: float | None = None,
        atol: float | None = None,
    ) -> None:
        super().__init__(coefficient, end)
        _check_tolerances(self, rtol, atol)
        self.per_step, self.aggregation, self.rtol, self.atol = per_step, aggregation, rtol, atol

    def check(self, solver: Solver) -> None:
        _need_errors(self, solver)

    def record(self, rows: int, noise: Noise | None) -> Record:
        return Record(self.rtol, self.atol, stiffness=False)

    def value(self, solve: Solve) -> Tensor:
        record, trace = solve.record, solve.solution.trace
        if (record.rtol, record.atol) != (self.rtol, self.atol):
            raise ConfigError(
                f"regularizer '{title(self)}' measures errors by rtol={self.rtol}, atol={self.atol}, another one by "
                f"rtol={record.rtol}, atol={record.atol}. Give both the same."
            )
        return aggregate(step_value(self.per_step, trace.error, trace.h, solve.solver), trace.taken, self.aggregation)


@register(Regularizer, "stiffness")
class Stiffness(Regularizer):
    """SRNODE: the estimated stiffness of the accepted steps, with its graph.

    Each step counts as S_j / s, where S estimates the largest |eigenvalue| of the field's Jacobian and s is the
    solver's stability size on the negative real axis (1 where it states none), so that h_j S_j / s = 1 where stability
    limits the step.

    Args:
        coefficient, end: see `Regularizer`.
        aggregation: of the steps of a row.
        times_step: count S_j h_j / s instead.
    Raises:
        ConfigError: if the solver estimates no stiffness.
    Source: Pal et al. 2021 (Opening the Blackbox), section 3; its code takes the maximum of S / 3.5068 without h.
    """

    traced = True

    def __init__(
        self,
        coefficient: float = 0.1,
        end: float | None = None,
        aggregation: Aggregation = "max",
        times_step: bool = False,
    ) -> None:
        super().__init__(coefficient, end)
        self.aggregation, self.times_step = aggregation, times_step

    def record(self, rows: int, noise: Noise | None) -> Record:
        return Record()

    def value(self, solve: Solve) -> Tensor:
        trace = solve.solution.trace
        _need_stiffness(self, solve.solver, trace.stiffness)
        stiffness = trace.stiffness / (solve.solver.stability or 1.0)
        return aggregate(stiffness * trace.h if self.times_step else stiffness, trace.taken, self.aggregation)


@register(Regularizer, "local")
class Local(Regularizer):
    """Local regularization: one more solver step with graph, from a random place on a solution without.

    The main solve may be differentiated in any way, or not at all: the penalty costs the memory of a step. `pick`
    chooses the place, row by row: "time" uniformly in time (unbiased in the paper's sense), so that a step of length h
    is met with chance h/T; "step" uniformly among the accepted steps except the last (biased).

    Form "own_step" retakes the step of length h that the solver itself took there, from its state as a constant, with
    every evaluation differentiated: averaged over the picks this is ∂/∂θ of the global penalty at fixed states. By
    default the value estimates the mean over steps for "step" and the mean weighted by h for "time"; `mean` makes
    either pick estimate the other one by the weight T/(N h) or N h/T, where N is the number of steps. Each row has a
    norm of its own here: under a controller with norm "batch", where the global forms have one norm E for all rows, the
    mean of rows' E² is E² and that of their E (or E^{1/k}) at most E (or E^{1/k}); it falls short the more, the more
    rows differ.

    Form "reference" is that of the authors' code: state, first slope and step length are constants, the length is the
    automatic choice of a first step, no longer than the time left, and the step is one of Tsit5 whatever solved. Such
    steps are short and their errors tiny.

    Args:
        coefficient, end: see `Regularizer`.
        pick: how the place is chosen.
        form: which step is taken there.
        quantity: what the step counts as: "error" E h, "squared" E² or "steps" E^{1/k} (see error_estimate), or
            "stiffness" S / s (see stiffness).
        samples: places for each row; the value is the mean over them.
        mean: the mean to estimate, "steps" or "time"; null for that which `pick` gives without weights.
        rtol, atol: reference tolerances of E; null for the controller's.
    Raises:
        ConfigError: if samples is below 1, tolerances are incomplete, the solver lacks the estimate, or the form
            "reference" is asked for an SDE.
    Source: Pal et al. 2023 (Locally Regularized Neural Differential Equations), section 3.
    """

    def __init__(
        self,
        coefficient: float = 100.0,
        end: float | None = None,
        pick: Literal["time", "step"] = "time",
        form: Literal["own_step", "reference"] = "own_step",
        quantity: Literal["error", "squared", "steps", "stiffness"] = "error",
        samples: int = 1,
        mean: Literal["steps", "time"] | None = None,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> None:
        super().__init__(coefficient, end)
        _check_tolerances(self, rtol, atol)
        if samples < 1:
            raise ConfigError(f"local.samples: at least 1 is needed, found {samples}.")
        self.pick, self.form, self.quantity, self.samples = pick, form, quantity, samples
        self.mean = mean or {"time": "time", "step": "steps"}[pick]
        self.tolerances = None if rtol is None else (rtol, atol)

    def check(self, solver: Solver) -> None:
        if self.form == "reference" and solver.needs is not VectorField:
            raise ConfigError(
                f"local: form 'reference' takes a step of Tsit5 along an ODE, and solver '{title(solver)}' solves for "
                f"a {solver.needs.__name__}. Use form: own_step."
            )
        if self.quantity != "stiffness" and self.form == "own_step":
            _need_errors(self, solver)

    def record(self, rows: int, noise: Noise | None) -> Record:
        u = rearrange(noise.uniform(self.samples, dtype=torch.float64), "b p -> p b")
        if self.pick == "time":  # one place in each of as many equal parts of the time
            u = (torch.arange(self.samples, dtype=u.dtype, device=u.device)[:, None] + u) / self.samples
        return Record(picks=u, pick=self.pick, stiffness=False)

    def value(self, solve: Solve) -> Tensor:
        take = self._own_step if self.form == "own_step" else self._reference_step
        return torch.stack([take(solve, t, s, x) for t, s, x in zip(*solve.picked, strict=True)]).mean(0)

    def _own_step(self, solve: Solve, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
        state = solve.solver.start(solve.field, t, x)
        step = solve.solver.step(solve.field, t, s, x, state, _fresh(solve))
        value = self._value(solve, solve.solver, t, s, x, step)
        h, steps, span = (s - t).abs(), solve.solution.steps, solve.span
        if self.pick == "time" and self.mean == "steps":
            return torch.where(h > 0, span / (steps * h).clamp(min=torch.finfo(h.dtype).tiny), 0.0) * value
        if self.pick == "step" and self.mean == "time":
            return steps * h / span.clamp(min=torch.finfo(h.dtype).tiny) * value
        return value

    def _reference_step(self, solve: Solve, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.pick == "time":  # uniform within a step that was met with chance h/T: uniform in time
                r = torch.lerp(t, s, solve.noise.uniform(dtype=torch.float64).to(t))
                state = solve.solver.start(solve.field, t, x)
                t, x = r, solve.solver.step(solve.field, t, r, x, state, _fresh(solve)).x
            slope = solve.field(t, x)
            end = solve.times[-1].to(t)
            s = t + (end - t).sign() * torch.minimum(self._first_length(solve, t, x, slope), (end - t).abs())
        solver = Tsit5()
        return self._value(solve, solver, t, s, x, solver.step(solve.field, t, s, x, (slope,), None))

    def _value(self, solve: Solve, solver: Solver, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor:
        if self.quantity == "stiffness":
            return _need_stiffness(self, solver, solver.stiffness(t, s, x, step)) / (solver.stability or 1.0)
        error = _norm(solve, self._tolerances(solve), step.error, torch.maximum(x.abs(), step.x.abs()))
        return step_value(self.quantity, error, (s - t).abs(), solver)

    def _tolerances(self, solve: Solve) -> tuple[float, float] | None:
        own = getattr(solve.controller, "rtol", None), getattr(solve.controller, "atol", None)
        given = self.tolerances or (None if None in own else own)
        if given is None and self.form == "reference":
            raise ConfigError(
                f"local: form 'reference' chooses a step by tolerances, which controller '{title(solve.controller)}' "
                "does not have. Give rtol and atol, or use form 'own_step'."
            )
        return given

    def _first_length(self, solve: Solve, t: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        """[B] the automatic choice of a first step of Tsit5: Hairer, Nørsett & Wanner, section II.4."""
        tolerances, sign = self._tolerances(solve), (solve.times[-1] - solve.times[0]).sign()
        d0, d1 = (_norm(solve, tolerances, y, x.abs()) for y in (x, slope))
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        wide = expand_like(sign * h0, x).to(x.dtype)
        probe = solve.field(t + sign * h0, x + wide * slope)
        steepest = torch.maximum(d1, _norm(solve, tolerances, probe - slope, x.abs()) / h0)
        h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** (1 / Tsit5.order))
        return torch.minimum(100 * h0, h1)


def step_value(per_step: str, error: Tensor, h: Tensor, solver: Solver) -> Tensor:
    """What steps of lengths h with error norms E count as, of the same shape; its gradient at E = 0 is 0."""
    if per_step == "error":
        return error * h
    if per_step == "squared":
        return error.square()
    some = error > 0
    return torch.where(some, torch.where(some, error, 1.0) ** (1 / solver.error_order), 0.0)


def aggregate(values: Tensor, taken: Tensor, how: Aggregation) -> Tensor:
    """[B] the mean, sum or maximum over the steps of each row of values [N, B] >= 0, which are 0 where not taken."""
    if how == "max":
        return values.amax(0) if len(values) else values.sum(0)
    total = values.sum(0)
    return total / taken.sum(0).clamp(min=1) if how == "mean" else total


def _norm(solve: Solve, tolerances: tuple[float, float] | None, error: Tensor, size: Tensor) -> Tensor:
    """[B] root mean square of what step control sees of error / (atol + rtol size)."""
    scaled = error if tolerances is None else error / (tolerances[1] + tolerances[0] * size)
    return rms(scaled if solve.seminorm is None else solve.seminorm(scaled))


def _fresh(solve: Solve) -> Any:
    """Another path of the noise that drives an SDE; None for an ODE."""
    return None if solve.brownian is None else solve.brownian.another(solve.noise)


def _check_tolerances(regularizer: Regularizer, rtol: float | None, atol: float | None) -> None:
    valid = (rtol is None and atol is None) or (None not in (rtol, atol) and rtol >= 0 and atol > 0)
    if not valid:
        raise ConfigError(
            f"{title(regularizer)}: reference tolerances rtol >= 0 and atol > 0 are given together or not at all, "
            f"found rtol={rtol}, atol={atol}."
        )


def _need_errors(regularizer: Regularizer, solver: Solver) -> None:
    if not solver.adaptive:
        usable = [name for name in names(Solver) if member(Solver, name, "solver").adaptive]
        raise ConfigError(
            f"regularizer '{title(regularizer)}' needs an error estimate, which solver '{title(solver)}' does not "
            f"have. Use one of: {', '.join(usable)}."
        )


def _need_stiffness(regularizer: Regularizer, solver: Solver, stiffness: Tensor | None) -> Tensor:
    if stiffness is None:
        raise ConfigError(
            f"regularizer '{title(regularizer)}' needs a stiffness estimate, which solver '{title(solver)}' does not "
            "have. Use one with two stages at the same time, such as tsit5 or dopri5."
        )
    return stiffness
