"""The one way in which continuous-depth models solve, and penalties in training on solutions that take many steps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError, kind
from ..rng import Noise
from ..solvers.base import Backprop, Controller, Gradient, Solver, Termination, integrate, title
from ..solvers.fields import VectorField
from ..solvers.solution import Picked, Record, Solution
from .augmented import Augmented, Rate


@dataclass(frozen=True)
class Solve:
    """What a regularizer reads after a solve, without what others have added to it.

    Args:
        field: the model's own.
        times: [L] or [L, B] as they were solved.
        solver, controller: that solved.
        solution: of the model's own state.
        noise: draws for each row; None if the caller gave none.
        record: what was kept of the steps.
        picked: the steps that this regularizer asked for.
        integral: [B] its rate, integrated.
        seminorm: the part of a state that error norms see, None for all of it.
        brownian: the path that drove an SDE.
    """

    field: Any
    times: Tensor
    solver: Solver
    controller: Controller
    solution: Solution
    noise: Noise | None
    record: Record | None = None
    picked: Picked | None = None
    integral: Tensor | None = None
    seminorm: Callable[[Tensor], Tensor] | None = None
    brownian: Any = None

    @property
    def span(self) -> Tensor:
        """[] or [B] float64 distance between the first and the last time."""
        return (self.times[-1] - self.times[0]).abs()


@kind
class Regularizer(ABC):
    """A penalty in training on solutions that take many steps to compute.

    A member is a small class: it changes the times, asks for a record of the steps, integrates a rate along the
    solution, or none of these, and turns the solve into a value [B]. Nothing of it is computed in evaluation.

    With p the progress of training from 0 to 1, the value is multiplied by coefficient (end/coefficient)^p, or by
    coefficient + (end - coefficient) p if one of the two is 0; without `end` by coefficient.

    Args:
        coefficient: at the start of training.
        end: at its end, None for the same.
    Raises:
        ConfigError: if a coefficient is negative.
    Attributes:
        traced: True if the value needs the graph of the solver's own steps, which not every gradient method has.
        differentiates: True if the value itself differentiates the field, so that networks cannot be compiled.
    """

    traced: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False

    def __init__(self, coefficient: float, end: float | None = None) -> None:
        for key, value in (("coefficient", coefficient), ("end", end)):
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{title(self)}.{key}: a finite number of at least 0 is needed, found {value}.")
        self.coefficient, self.end = coefficient, end

    def weight(self, progress: float) -> float:
        """What the value is multiplied by when training has come as far as `progress`, from 0 to 1."""
        start, end = self.coefficient, self.coefficient if self.end is None else self.end
        if min(start, end) == 0:
            return start + (end - start) * progress
        return start * (end / start) ** progress

    def check(self, solver: Solver) -> None:
        """Raises ConfigError if the solver lacks what the value is made of."""

    def times(self, times: Tensor, noise: Noise | None) -> Tensor:
        """The times to solve over, [L] or [L, B], instead of these."""
        return times

    def record(self, rows: int, noise: Noise | None) -> Record | None:
        """What to keep of the accepted steps of a batch of so many rows."""
        return None

    def rate(self, x: Tensor, noise: Noise | None) -> Rate | None:
        """What to integrate along the solution that starts at x [B, *shape]."""
        return None

    @abstractmethod
    def value(self, solve: Solve) -> Tensor | None:
        """[B] the penalty before its coefficient; None for none."""


class Evolved(NamedTuple):
    """A solve with its penalty.

    Args:
        solution: of the model's own state.
        penalty: [B] what the regularizers add to the loss, in the dtype of the state.
        logs: "nfe", the mean over rows, and the mean value of each regularizer before its coefficient.
    """

    solution: Solution
    penalty: Tensor
    logs: dict[str, Tensor]


def evolve(
    field: Any,
    x: Tensor,
    times: Tensor,
    *,
    solver: Solver,
    controller: Controller,
    gradient: Gradient | None = Backprop(),
    regularizers: Sequence[Regularizer] = (),
    progress: float = 1.0,
    noise: Noise | None = None,
    brownian: Any = None,
    save: Literal["last", "all", "dense"] = "last",
    stop: Termination | None = None,
    max_steps: int = 10_000,
    on_failure: Literal["raise", "return"] = "raise",
    seminorm: Callable[[Tensor], Tensor] | None = None,
) -> Evolved:
    """Solve as `integrate` does, and charge for it as the regularizers say.

    Args:
        field, x, times, solver, controller, save, stop, max_steps, on_failure, seminorm: as in `integrate`.
        gradient: how to differentiate the solution; None if the penalty alone is wanted, which then is solved without
            graph wherever the regularizers allow.
        regularizers: charge in training; none in evaluation.
        progress: how far training has come, for their schedules.
        noise: what is random in regularizers: probes, picks, times.
        brownian: the noise of an SDE.
    Raises:
        ConfigError: if a regularizer needs what the solver, the gradient method or another regularizer does not allow,
            or noise that was not given.
    """
    _check(regularizers, solver, gradient, noise)
    for regularizer in regularizers:
        times = regularizer.times(times, noise)
    rates = [regularizer.rate(x, noise) for regularizer in regularizers]
    records = [regularizer.record(len(x), noise) for regularizer in regularizers]
    joint = Augmented.over(field, x, times, [rate for rate in rates if rate is not None], seminorm)
    record, graphless = _merge(records), gradient is None and not any(r.traced for r in regularizers)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not (graphless and joint.field is field)):
        whole = integrate(
            joint.field,
            joint.x,
            times,
            solver=solver,
            controller=controller,
            gradient=gradient or Backprop(),
            noise=brownian,
            save=save,
            stop=stop,
            record=record,
            max_steps=max_steps,
            on_failure=on_failure,
            seminorm=joint.seminorm,
        )
    solution, integrals = joint.separate(whole)
    common = Solve(field, times, solver, controller, solution, noise, record, None, None, seminorm, brownian)
    columns, picked = iter(integrals), _share(solution.picked, records)
    penalty, logs = torch.zeros(len(x), dtype=torch.float64, device=x.device), {"nfe": solution.nfe.double().mean()}
    for regularizer, rate, own in zip(regularizers, rates, picked, strict=True):
        value = regularizer.value(replace(common, picked=own, integral=None if rate is None else next(columns)))
        if value is not None:
            penalty = penalty + regularizer.weight(progress) * value
            name = title(regularizer)
            logs[name] = logs.get(name, 0.0) + value.detach().mean()
    return Evolved(solution, penalty.to(x.dtype), logs)


def _check(regularizers: Sequence[Regularizer], solver: Solver, gradient: Gradient | None, noise: Noise | None) -> None:
    for regularizer in regularizers:
        name = title(regularizer)
        if noise is None:
            raise ConfigError(f"regularizer '{name}' may draw: pass noise=BatchNoise(len(x), generator=generator).")
        if regularizer.traced and not (gradient is None or gradient.differentiates_trace):
            raise ConfigError(
                f"regularizer '{name}' differentiates the solver's own steps, which gradient '{title(gradient)}' does "
                "not keep. Use gradient 'backprop' or 'checkpoint', or the regularizer 'local'."
            )
        if type(regularizer).rate is not Regularizer.rate and solver.needs is not VectorField:
            raise ConfigError(
                f"regularizer '{name}' integrates along the solution of an ODE, and solver '{title(solver)}' solves "
                f"for a {solver.needs.__name__}. Use error_estimate, stiffness or local."
            )
        regularizer.check(solver)


def _merge(records: Sequence[Record | None]) -> Record | None:
    """One record that has what each asks for: their picks side by side, and the tolerances that any of them names."""
    asked = [record for record in records if record is not None]
    if not asked:
        return None
    tolerances = {(r.rtol, r.atol) for r in asked} - {(None, None)}
    ways = {r.pick for r in asked if r.picks is not None}
    if len(tolerances) > 1 or len(ways) > 1:
        found = f"rtol and atol of {sorted(tolerances)}" if len(tolerances) > 1 else f"picks by {sorted(ways)}"
        raise ConfigError(f"regularizers: steps are recorded in one way in a solve, but these ask for {found}.")
    rtol, atol = next(iter(tolerances), (None, None))
    picks = [r.picks for r in asked if r.picks is not None]
    stiffness = any(r.stiffness for r in asked)
    return Record(rtol, atol, torch.cat(picks) if picks else None, next(iter(ways), "time"), stiffness)


def _share(picked: Picked | None, records: Sequence[Record | None]) -> list[Picked | None]:
    """Each regularizer's own of the steps that were picked."""
    shares, start = [], 0
    for record in records:
        count = 0 if record is None or record.picks is None else len(record.picks)
        shares.append(Picked(*(part[start : start + count] for part in picked)) if count else None)
        start += count
    return shares
