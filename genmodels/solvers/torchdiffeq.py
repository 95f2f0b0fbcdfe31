"""torchdiffeq as a back-end: the same problems, solved by an independent implementation as a whole."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..types import expand_like
from .base import Controller, Fixed, Problem, Solver, State, title
from .fields import Counted, tensors_of
from .norms import finite_rows
from .solution import Result, Solution, worst
from .step_size import PI

# order of each method, and whether it controls its steps
METHODS = {
    "euler": (1, False),
    "midpoint": (2, False),
    "heun2": (2, False),
    "heun3": (3, False),
    "rk4": (4, False),
    "explicit_adams": (4, False),
    "implicit_adams": (4, False),
    "adaptive_heun": (2, True),
    "fehlberg2": (2, True),
    "bosh3": (3, True),
    "dopri5": (5, True),
    "dopri8": (8, True),
}
Method = Literal[
    "euler",
    "midpoint",
    "heun2",
    "heun3",
    "rk4",
    "explicit_adams",
    "implicit_adams",
    "adaptive_heun",
    "fehlberg2",
    "bosh3",
    "dopri5",
    "dopri8",
]


@register(Solver, "torchdiffeq")
class TorchDiffEq(Solver):
    """The integrators of the package torchdiffeq, in place of ours.

    Methods without step control (euler, midpoint, heun2, heun3, rk4, explicit_adams, implicit_adams) run on the grid of
    controller `fixed`; the others take rtol, atol, safety, factors, first and longest step from `pi`, and its exponents
    are (1, 0). Their clock and error norm are the batch's, whatever the controller's norm. Adaptive methods step over
    the requested times and interpolate, so the field is asked beyond the last one. Their rk4 is Kutta's 3/8 rule.

    It has no steps to give away: no trace, no dense output, no early stop, no times of each row's own, and of gradients
    backprop or the continuous ones. A failed solve leaves the last state that was finite, and no path.

    Args:
        method: which integrator.
        options: more of torchdiffeq's options for it.
        adjoint: whether gradients are those of its own `odeint_adjoint` (with the seminorm) instead of backpropagation.
    Raises:
        ConfigError: in `integrate`, if the problem asks for something that it does not have.
    Source: Chen et al. 2018 (Neural ODE).
    """

    order = 5
    stages = 1
    whole: ClassVar[bool] = True

    def __init__(self, method: Method = "dopri5", options: dict[str, Any] | None = None, adjoint: bool = False) -> None:
        self.method, self.options, self.adjoint = method, dict(options or {}), adjoint
        self.order, self.adaptive = METHODS[method]

    def step(self, field: Any, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> NoReturn:
        raise ConfigError(
            "solver 'torchdiffeq' integrates as a whole and has no single steps. What takes single steps (a local "
            "regulariser, a replay) needs a solver of ours: dopri5, tsit5, bosh3, heun, rk4 …"
        )

    def solve(self, problem: Problem, controller: Controller) -> Solution:
        self._check(problem, controller)
        field = _Watched(problem)
        if not len(problem.x):
            path = problem.x.expand(len(problem.times), *problem.x.shape)
            return field.solution(problem.x, path if problem.keep_path else None, Result.success, 0)
        solve, options = self._solve(problem, controller)
        # on a grid their adjoint passes every requested time, and in between takes the steps of one interval
        every = problem.keep_path or (self.adjoint and not self.adaptive)
        times = problem.times if every else torch.stack((problem.times[0], problem.times[-1]))
        try:
            path = solve(field, problem.x, times, method=self.method, options={**options, **self.options})
        except _Spent:
            return field.failed(Result.max_steps_reached)
        except AssertionError as error:
            return field.failed(_reason(error))
        steps = field.accepted if self.adaptive else field.attempts
        return field.solution(path[-1], path if problem.keep_path else None, Result.success, steps)

    def _check(self, problem: Problem, controller: Controller) -> None:
        lacks = {
            "record (its steps have no trace)": problem.record is not None,
            "save='dense' (it has no dense output)": problem.keep_dense,
            "stop (it does not end rows before the last time)": problem.stop is not None,
            "times [L, B] (it has one clock for the batch)": problem.times.ndim != 1,
        }
        for what, asked in lacks.items():
            if asked:
                raise ConfigError(f"solver 'torchdiffeq' cannot serve {what}. Use a solver of ours (dopri5, tsit5 …).")
        if not isinstance(controller, PI if self.adaptive else Fixed):
            raise ConfigError(
                f"solver 'torchdiffeq' with method {self.method} needs controller "
                f"'{'pi' if self.adaptive else 'fixed'}', found '{title(controller)}'."
            )
        if self.adjoint and any(v.grad_fn is not None for v in tensors_of(problem.field)):
            raise ConfigError(
                "solver 'torchdiffeq' with adjoint: true would count twice what a tensor that was computed from others "
                "shares with the field. Use adjoint: false with gradient: adjoint, or backprop."
            )

    def _solve(self, problem: Problem, controller: Any) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """torchdiffeq's function with its tolerances, and its options."""
        import torchdiffeq

        if self.adaptive:
            controller.check_resolution(problem.x.dtype)
            given: dict[str, Any] = {"rtol": controller.rtol, "atol": controller.atol}
            options = {"safety": controller.safety, "ifactor": controller.max_factor, "dfactor": controller.min_factor}
            options["norm"] = lambda error: problem.seminorm(error).square().mean().sqrt()
            longest = {"first_step": controller.first_step, "max_step": controller.max_step}
            options |= {name: value for name, value in longest.items() if value is not None}
        else:
            given, options = {}, {"grid_constructor": lambda f, x, t: controller.grid(problem.times)}
        if not (self.adjoint and torch.is_grad_enabled()):
            return lambda *of, **how: torchdiffeq.odeint(*of, **given, **how), options
        # the grid of a backward solve is its own: from one requested time to the one before, with as many steps
        backwards = {"norm": "seminorm"} if self.adaptive else {"grid_constructor": lambda f, x, t: controller.grid(t)}
        given |= {"adjoint_params": tensors_of(problem.field), "adjoint_options": backwards}
        return lambda *of, **how: torchdiffeq.odeint_adjoint(*of, **given, **how), options


class _Spent(Exception):
    """The steps that are allowed are used up."""


class _Watched:
    """The field as torchdiffeq calls it, with the callbacks by which it tells of its steps.

    Attributes:
        x, time: where the last step that was begun started; rows that are not finite stay where they were.
        attempts, accepted, rejected: steps so far.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.field = problem, Counted(problem.field, problem.solver.counts)
        self.x, self.attempts, self.accepted, self.rejected = problem.x, 0, 0, 0
        self.time = problem.times[:1].detach().expand(len(problem.x))
        if problem.solver.adaptive:
            self.callback_accept_step, self.callback_reject_step = self._accept, self._reject

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.field(t.to(torch.float64), x)

    def callback_step(self, t: Tensor, x: Tensor, h: Tensor) -> None:
        if self.attempts >= self.problem.max_steps:
            raise _Spent
        self.attempts += 1
        alive = finite_rows(x)
        whole = bool(alive.all())
        self.x = x if whole else torch.where(expand_like(alive, x), x, self.x)
        time = t.detach().to(torch.float64)
        self.time = time.expand(len(x)) if whole else torch.where(alive, time, self.time)

    def _accept(self, t: Tensor, x: Tensor, h: Tensor) -> None:
        self.accepted += 1

    def _reject(self, t: Tensor, x: Tensor, h: Tensor) -> None:
        self.rejected += 1

    def failed(self, result: Result) -> Solution:
        times, path = self.problem.times, None
        if self.problem.keep_path:
            rest = self.problem.x.new_full((len(times) - 1, *self.problem.x.shape), torch.nan)
            path = torch.cat((self.problem.x[None], rest))
        steps = self.accepted if self.problem.solver.adaptive else self.attempts
        return self._solution(self.x, path, torch.full_like(self.time, int(result)).long(), self.time, steps)

    def solution(self, x: Tensor, path: Tensor | None, result: Result, steps: int) -> Solution:
        """What torchdiffeq returned; on a grid rows may have left the finite numbers unnoticed."""
        alive = finite_rows(x)
        time = torch.where(alive, self.problem.times[-1].detach(), self.time)
        status = torch.where(alive, int(result), int(Result.non_finite))
        if not bool(alive.all()):
            x = torch.where(expand_like(alive, x), x, self.x)
            if path is not None:
                there = torch.stack([finite_rows(states) for states in path])
                path = torch.where(expand_like(there, path), path, torch.nan)
        return self._solution(x, path, status, time, steps)

    def _solution(self, x: Tensor, path: Tensor | None, status: Tensor, time: Tensor, steps: int) -> Solution:
        rows = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return Solution(
            x=x,
            path=path,
            nfe=rows + self.field.calls,
            steps=rows + steps,
            rejected=rows + self.rejected,
            result=worst(status),
            time=time,
            status=status,
        )


def _reason(error: AssertionError) -> Result:
    """What torchdiffeq's assertion says of a solve.

    Raises:
        AssertionError: the same, if it says something else.
    """
    text = str(error)
    if "underflow in dt" in text:
        return Result.step_underflow
    if "non-finite" in text:
        return Result.non_finite
    if "max_num_steps" in text:
        return Result.max_steps_reached
    raise error
