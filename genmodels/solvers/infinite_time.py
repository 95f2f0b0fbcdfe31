"""Fixed points as the rest of a flow, which an adaptive solver follows."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from ..registry import register
from ..types import expand_like
from .base import Controller, Fixed, Solver, integrate
from .fields import RowField
from .fixed_point import EXPLOSION, FixedPoint, Map, RowMap, evaluated
from .norms import rms
from .outcomes import Equilibrium, Outcome
from .runge_kutta import Tsit5
from .solution import Result
from .step_size import PI
from .termination import SteadyState


@register(FixedPoint, "infinite_time")
class InfiniteTime(FixedPoint):
    """The rest of dz/dt = f(z) - z: an adaptive solver follows the flow until rms(f(z) - z) <= atol + rtol rms(z).

    It converges where every eigenvalue of the Jacobian of f has a real part below 1, also where f is no contraction.
    The residual that is reported is that of the state at the end, for one evaluation more. Of a row that does not come
    to rest, start and end are weighed, for another one: the one with the lesser residual is given.

    Args:
        rtol, atol: of the rest.
        solver, controller: of the flow; by default Tsit5 with tolerances as loose as those of the rest.
        horizon: time at which a row that has not come to rest is given up.
        max_steps: of a row, rejected ones included.
    Raises:
        ValueError: if the horizon or max_steps are not positive, or the controller does not adapt steps.
    Source: Pal et al. 2022 (Continuous deep equilibrium models), section 3.1.
    """

    def __init__(
        self,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        solver: Solver = Tsit5(),
        controller: Controller | None = None,
        horizon: float = 1e3,
        max_steps: int = 500,
    ) -> None:
        self.rtol, self.atol = rtol, atol
        self.check_tolerances()
        if horizon <= 0 or max_steps < 1:
            raise ValueError(f"infinite_time: horizon > 0 and max_steps >= 1 are needed, found {horizon}, {max_steps}.")
        if isinstance(controller, Fixed):
            raise ValueError("infinite_time: steps must adapt on the way to rest. Use a controller such as pi.")
        self.solver, self.horizon, self.max_steps = solver, horizon, max_steps
        self.controller = controller or PI(max(rtol, 1e-12), max(atol, 1e-12))

    def limited(self, iterations: int) -> "InfiniteTime":
        solver = copy.copy(self)
        solver.max_steps = min(iterations, self.max_steps)
        return solver

    def solve(self, f: Map, z: Tensor) -> Equilibrium:
        self.check_start(z)
        arguments = f.arguments if isinstance(f, RowMap) else ()
        plain = f.f if isinstance(f, RowMap) else f
        field = RowField(lambda t, z, *given: evaluated(lambda z: plain(z, *given), z) - z, *arguments)
        out = integrate(
            field if isinstance(f, RowMap) else (lambda t, z: evaluated(f, z) - z),
            z,
            torch.tensor([0.0, self.horizon], dtype=torch.float64),
            solver=self.solver,
            controller=self.controller,
            stop=SteadyState(self.rtol, self.atol),
            max_steps=self.max_steps,
            on_failure="return",
        )
        with torch.no_grad():
            end = evaluated(f, out.x) if len(z) else z
            residual = rms(end - out.x)
        outcome = torch.where(out.stopped, Outcome.converged, Outcome.exhausted)
        outcome = torch.where(residual.isfinite() & (out.status != int(Result.non_finite)), outcome, Outcome.non_finite)
        nothing = torch.full_like(residual, torch.nan)
        found = Equilibrium(out.x, residual, out.steps, out.nfe + 1, outcome, nothing, residual[None])
        lost = (outcome != Outcome.converged).nonzero()[:, 0]
        return _weighed(f, z, found, end, lost) if len(lost) else found


def _weighed(f: Map, z: Tensor, found: Equilibrium, end: Tensor, lost: Tensor) -> Equilibrium:
    """With the start in place of an end that is worse; f was evaluated at the end."""
    with torch.no_grad():
        start = evaluated(f.select(lost), z[lost]) if isinstance(f, RowMap) else evaluated(f, z)[lost]
        first, last = rms(start - z[lost]), found.residual[lost]
        moved, stretched = rms(found.z[lost] - z[lost]), rms(end[lost] - start)
    # a flow at the speed of its residual gets so far alone if the residual grows
    ran_away = (last > EXPLOSION * first) | (moved > EXPLOSION * first)
    slope = torch.where(moved > 0, stretched / moved, torch.nan)
    worse = first.isfinite() & ~(last <= first)
    put = lambda whole, part: whole.index_copy(0, lost, part)  # noqa: E731
    return replace(
        found,
        z=put(found.z, torch.where(expand_like(worse, z[lost]), z[lost], found.z[lost])),
        residual=put(found.residual, torch.where(worse, first, last)),
        nfe=put(found.nfe, found.nfe[lost] + 1),
        outcome=put(found.outcome, torch.where(ran_away, Outcome.diverged, found.outcome[lost])),
        lipschitz=put(found.lipschitz, torch.where(slope.isfinite(), slope, torch.nan)),
        history=torch.stack((put(found.residual, first), put(torch.full_like(found.residual, torch.nan), last))),
    )
