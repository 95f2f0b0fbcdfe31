"""A bijection that is the flow of an ODE, and how a model has its layers of this kind solved."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..dynamics.regularization import Regularizer, evolve
from ..networks.network import Network
from ..registry import ConfigError, register
from ..rng import Noise
from ..solvers.base import Backprop, Controller, Gradient, Solver
from ..solvers.divergence import ProbeLaw, draw_probes, joint
from ..solvers.fields import RowField, narrow
from ..solvers.runge_kutta import Tsit5
from ..solvers.step_size import PI
from ..types import Condition, Shape
from .bijection import Bijection

Divergence = Literal["auto", "exact", "hutchinson", "none"]
FEW = 10  # components up to which the exact divergence is the default


@dataclass
class Solving:
    """How the continuous layers of a flow are solved in one pass through it, and what came of it.

    Args:
        divergence: auto is exact for items of up to 10 components, and Hutchinson's estimate for larger ones; none
            leaves log-determinants at 0.
        probes: of an estimate, for each item and layer; fixed during a solve.
        wide: step points and log-determinants in float64, whatever the network computes in.
        noise: what n items draw probes from, or what is random in regularizers.
        penalty: [B] sum over the layers solved so far; None for none.
        spread: [P, B] sum over layers of each probe's log-determinant less the mean over probes; None for none.
        logs: sums over the layers.
    """

    solver: Solver = Tsit5()
    controller: Controller = PI()
    gradient: Gradient = field(default_factory=Backprop)
    regularizers: tuple[Regularizer, ...] = ()
    progress: float = 1.0
    divergence: Divergence = "exact"
    probes: int = 1
    wide: bool = True
    law: ProbeLaw = "rademacher"
    noise: Callable[[int], Noise] | None = None
    penalty: Tensor | None = None
    spread: Tensor | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)

    def drawn(self, x: Tensor) -> Tensor | None:
        """[P, B, *shape] probes for points x, None for the exact divergence.

        Raises:
            ConfigError: if probes are wanted and there is nothing to draw them from.
        """
        if self.divergence == "exact" or (self.divergence == "auto" and math.prod(x.shape[1:]) <= FEW):
            return None
        if self.noise is None:
            raise ConfigError("continuous: estimates of the divergence need noise. Use the model `cnf`, which has it.")
        shape = tuple(x.shape[1:])
        return draw_probes(self.noise(len(x)), self.probes, shape, law=self.law, dtype=x.dtype).to(x.device)

    def add(self, penalty: Tensor, logs: dict[str, Tensor], log_det: Tensor | None) -> None:
        """What one layer has to say; log_det is [P, B] where it was estimated."""
        if self.regularizers:
            self.penalty = penalty if self.penalty is None else self.penalty + penalty
        for key, value in logs.items():
            self.logs[key] = self.logs[key] + value if key in self.logs else value
        if log_det is not None and len(log_det) > 1:
            own = log_det - log_det.mean(0)
            self.spread = own if self.spread is None else self.spread + own


class Velocity(RowField):
    """v(t, x) = end · network(end · t, x, condition), for t from 0 to 1."""

    def __init__(self, network: Network, end: Tensor | None, condition: Condition | None) -> None:
        super().__init__(network, condition)
        self.end = end

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if self.end is None:
            return super().__call__(t, x)
        return self.end.to(x.dtype) * self.f(self.end * t, x, *self.arguments)

    @property
    def pushes(self) -> bool:
        return getattr(self.f, "pushes", False)

    def push(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and its derivative along tangents [P, B or 1, *shape]."""
        if self.end is None:
            return self.f.push(t, x, tangents, *self.arguments)
        v, moved = self.f.push(self.end * t, x, tangents, *self.arguments)
        return self.end.to(x.dtype) * v, self.end.to(x.dtype) * moved

    def select(self, rows: Tensor) -> "Velocity":
        return Velocity(self.f, self.end, *narrow(self.arguments, rows))

    def tensors(self) -> tuple[Tensor, ...]:
        own = () if self.end is None or not self.end.requires_grad else (self.end,)
        return (*super().tensors(), *own)


@register(Bijection, "continuous")
class Continuous(Bijection):
    """z = x(1) of dx/dt = T f(T t, x) from x(0) = x; log|det ∂z/∂x| = ∫₀¹ div v dt.

    The inverse solves backwards, and undoes it to the solver's tolerance. How to solve is told by the model (`cnf`);
    in any other place it is tsit5 under pi with the exact divergence. Log-determinants are controlled like components
    of the state.

    Args:
        network: the field f, which sees the time T t.
        end: T, how long the flow lasts in the network's time.
        learn_end: train T.
        solver, controller: instead of the model's.
    Raises:
        ConfigError: unless end is above 0.
    Source: Chen et al. 2018 (Neural ODE), section 4; Grathwohl et al. 2019 (FFJORD).
    """

    numerical: ClassVar[bool] = True

    def __init__(
        self,
        network: Callable[..., Network],
        end: float = 1.0,
        learn_end: bool = False,
        solver: Solver | None = None,
        controller: Controller | None = None,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        if not 0 < end < math.inf:
            raise ConfigError(f"continuous: a time `end` above 0 is needed, found {end}.")
        self.shape, self.solver, self.controller = tuple(shape), solver, controller
        sizes = {"in_shape": self.shape, "out_shape": self.shape, "timed": True}
        self.network = network(**sizes, num_classes=num_classes, condition_shape=condition_shape)
        # its square keeps T above 0 at any step of an optimiser, and the scale of a step that of T
        self.root = nn.Parameter(torch.tensor(end).sqrt()) if learn_end else None
        if not learn_end:
            self.register_buffer("end", None if end == 1 else torch.tensor(end), persistent=False)
        self.solving: Solving | None = None

    def velocity(self, condition: Condition | None = None) -> Velocity:
        """The field, for t from 0 (x) to 1 (z)."""
        return Velocity(self.network, self.end if self.root is None else self.root.square(), condition)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(x, condition, (0.0, 1.0))

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(z, condition, (1.0, 0.0))

    def _solve(self, x: Tensor, condition: Condition | None, ends: tuple[float, float]) -> tuple[Tensor, Tensor]:
        how, velocity = self.solving or Solving(), self.velocity(condition)
        measured = how.divergence != "none"
        probes = how.drawn(x) if measured else None
        wide = torch.float64 if how.wide else x.dtype
        both = joint(velocity, x, probes, wide=wide, sketch=bool(how.regularizers))
        out = evolve(
            both if measured else velocity,
            both.start(x) if measured else x,
            torch.tensor(ends, dtype=torch.float64),
            solver=self.solver or how.solver,
            controller=self.controller or how.controller,
            gradient=how.gradient,
            regularizers=how.regularizers,
            progress=how.progress,
            noise=how.noise(len(x)) if how.regularizers and how.noise is not None else None,
        )
        if not measured:
            how.add(out.penalty, out.logs, None)
            return out.solution.x, x.new_zeros(len(x), dtype=torch.float64)
        z, log_det = both.split(out.solution.x)
        how.add(out.penalty, out.logs, None if probes is None else log_det)
        return z, log_det if probes is None else log_det.mean(0)
