"""A layer whose output is the fixed point of a cell, and the network that it makes between two linear maps."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..rng import Noise
from ..solvers.equilibrium import EquilibriumGradient, Implicit, Unrolled, equilibrium
from ..solvers.fixed_point import Anderson, FixedPoint, RowMap, evaluated
from ..solvers.norms import rms
from ..solvers.outcomes import Equilibrium
from ..types import Condition, Shape
from .cells import Cell, Injection
from .mlp import MLP
from .network import Network

Start = Literal["zero", "first", "predictor"]


class Settled(NamedTuple):
    """States of a batch and what they cost.

    Args:
        found: the fixed points; of 0 iterations where the start itself was asked for.
        penalty: [B] what training adds to the loss, in the dtype of the states.
        logs: means over rows: evaluations, residual and share converged, forwards and backwards (of the step before),
            and the penalties before their coefficients.
    """

    found: Equilibrium
    penalty: Tensor
    logs: dict[str, Tensor]


class EquilibriumLayer(nn.Module):
    """z* = f(z*, u) for the injection u of each item, found from a start that may be learned.

    start "zero": z₀ = 0 (DEQ). "predictor": z₀ = g(u) with a network g of its own (Skip DEQ). "first": z₀ = f(0, u),
    without further parameters (Skip Reg DEQ). In training the loss gets

        skip · mean |z* - z₀| + jacobian · |εᵀ ∂f/∂z|²/D at z*, ε ~ N(0, I),

    with means over the D components of a state; gradients of the first term flow into both z* and z₀.

    Args:
        cell: f.
        solver: finds the fixed points.
        gradient: differentiates them.
        start: see above; a predictor learns from the skip term, from pretraining, or through an unrolled gradient.
        predictor: g, from the flattened injection to states; for start "predictor".
        skip: coefficient, needs another start than "zero".
        jacobian: coefficient.
        pretraining: share of training in which the fixed point is replaced by `depth` plain iterations,
            through which loss and gradients go.
        depth: see there.
    Raises:
        ConfigError: if a number is out of its range, or a coefficient or the predictor has nothing to act on.
    Source: Bai et al. 2019 (Deep equilibrium models); Bai et al. 2021 (Stabilizing equilibrium models by Jacobian
        regularization), section 3.2; Pal et al. 2022 (Continuous deep equilibrium models), sections 3.1 and 3.2.
    """

    def __init__(
        self,
        cell: Cell,
        solver: FixedPoint,
        gradient: EquilibriumGradient,
        start: Start = "zero",
        predictor: Callable[..., Network] | None = None,
        skip: float = 0.0,
        jacobian: float = 0.0,
        pretraining: float = 0.0,
        depth: int = 5,
    ) -> None:
        super().__init__()
        if min(skip, jacobian) < 0 or not 0 <= pretraining < 1 or depth < 1:
            raise ConfigError(
                "equilibrium: skip >= 0, jacobian >= 0, 0 <= pretraining < 1 and depth >= 1 are needed, found "
                f"{skip:g}, {jacobian:g}, {pretraining:g} and {depth}."
            )
        if (skip and start == "zero") or (predictor is not None and start != "predictor"):
            raise ConfigError(
                f"equilibrium: start={start!r} has nothing to learn from a skip coefficient of {skip:g} or a predictor "
                "of its own. Use start: predictor, or start: first."
            )
        taught = skip > 0 or pretraining > 0 or isinstance(gradient, Unrolled)
        if start == "predictor" and not taught:
            raise ConfigError(
                "equilibrium: start='predictor' with a skip coefficient of 0 leaves the predictor as it began, for "
                "gradients of fixed points do not reach their start. Set skip above 0, or use start: zero or first."
            )
        # a gradient keeps books, and may have been given to other layers too
        self.cell, self.solver, self.gradient, self.start = cell, solver, copy.copy(gradient), start
        self.differentiates_twice = jacobian > 0
        self.skip, self.jacobian, self.pretraining, self.depth = skip, jacobian, pretraining, depth
        self.predictor = None
        if start == "predictor":
            sizes = {"in_shape": cell.in_shape, "out_shape": cell.in_shape, "timed": False}
            made = predictor or (lambda **facts: MLP((64,), "relu", **facts))
            self.predictor = made(**sizes, num_classes=None, condition_shape=None)
        self._warm: Tensor | None = None
        self._keeps = False

    def started(self, injection: Injection) -> Tensor:
        """[B, *state] z₀."""
        first = next(iter(injection.values()))
        if self.start == "zero":
            return first.new_zeros(len(first), *self.cell.in_shape)
        first = self.cell.guess(injection) if self._guesses(injection) else injection["u"]
        return first if self.start == "first" else self.predictor(None, first)

    def _guesses(self, injection: Injection) -> bool:
        """Whether the start takes an evaluation f(0, u); a predictor does where u has another shape than a state."""
        lifted = tuple(injection["u"].shape[1:]) == tuple(self.cell.in_shape)
        return self.start == "first" or (self.start == "predictor" and not lifted)

    def _start(self, injection: Injection) -> Tensor:
        """[B, *state] z₀ in the precision of the parameters."""
        return self.started(injection).to(next(self.cell.parameters()).dtype)

    def _last(self, injection: Injection) -> Tensor | None:
        """[B, *state] where the last search ended, if it was of as many rows and is kept."""
        rows = len(next(iter(injection.values())))
        return self._warm if self._warm is not None and len(self._warm) == rows else None

    def forward(
        self,
        injection: Injection,
        *,
        progress: float = 1.0,
        noise: Noise | None = None,
        solver: FixedPoint | None = None,
        limit: int | None = None,
    ) -> Settled:
        """The states of items with these injections.

        Args:
            progress: how far training has come.
            noise: for the probes of the Jacobian; None draws them from torch's own generator.
            solver: instead of that of training.
            limit: moves of the solver away from the start at most; 0 gives the start itself, without a search.
        """
        with self.cell.held():
            # states are kept in the precision of the parameters, whatever a cell computes in
            f = RowMap(lambda z, u: self.cell(None, z, u).to(z.dtype), injection)
            warm = self._last(injection)
            # a start that nothing is compared with would cost an evaluation for nothing
            z0 = self._start(injection) if warm is None or self.training else None
            first = z0 if warm is None else warm
            if self.training and progress < self.pretraining:
                found = tied(f, z0, self.depth)
            elif limit == 0:
                found = tied(f, first, 0)
            else:
                search = solver or self.solver
                search = search if limit is None else search.limited(limit)
                found = equilibrium(f, first, solver=search, gradient=self.gradient)
            if z0 is not None and self._guesses(injection):
                found = replace(found, nfe=found.nfe + 1)
            if self._keeps:
                self._warm = found.z.detach()
            penalty, logs = self._charges(f, found, z0, noise)
        return Settled(found, penalty, self._books(found) | logs)

    def _charges(
        self, f: RowMap, found: Equilibrium, z0: Tensor | None, noise: Noise | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        penalty, logs = found.z.new_zeros(len(found.z)), {}
        if not self.training:
            return penalty, logs
        if self.skip:
            distance = (found.z - z0).abs().flatten(1).mean(1)
            penalty, logs["skip"] = penalty + self.skip * distance, distance.detach().mean()
        if self.jacobian:
            size = jacobian_norm(f, found.z, noise)
            penalty, logs["jacobian"] = penalty + self.jacobian * size, size.detach().mean()
        return penalty, logs

    def _books(self, found: Equilibrium) -> dict[str, Tensor]:
        logs = {"nfe": found.nfe, "residual": found.residual, "converged": found.converged}
        logs = {key: value.double().mean() for key, value in logs.items() if len(value)}
        adjoint = self.gradient.adjoint
        if self.training and adjoint is not None:
            logs["backward_nfe"] = torch.tensor(float(adjoint.nfe))
            logs["backward_residual"] = adjoint.residual.mean()
            logs["backward_converged"] = adjoint.converged.double().mean()
        return logs

    @contextmanager
    def warm(self) -> Iterator[None]:
        """Inside, a search starts where the last one of a batch of as many items ended."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps, self._warm = False, None


def tied(f: RowMap, z: Tensor, depth: int) -> Equilibrium:
    """So many plain iterations from z, in a graph; of 0 the start. The residual is that before the last one."""
    before = z
    for _ in range(depth):
        before, z = z, evaluated(f, z)
    residual, count = rms(z - before).detach(), torch.full((len(z),), depth, device=z.device)
    if not depth:
        residual = torch.full_like(residual, torch.nan)
    nothing = torch.full_like(residual, torch.nan)
    return Equilibrium(z, residual, count, count, torch.ones_like(count), nothing, residual[None])


def jacobian_norm(f: RowMap, z: Tensor, noise: Noise | None) -> Tensor:
    """[B] an unbiased estimate of |∂f/∂z|²_F/D at z, from one normal probe a row; z counts as a constant."""
    with torch.enable_grad():
        y = z.detach().requires_grad_()
        eps = torch.randn_like(z) if noise is None else noise.normal(*z.shape[1:], dtype=z.dtype)
        (product,) = torch.autograd.grad(f(y), y, eps, create_graph=True)
    return product.square().flatten(1).mean(1)


@register(Network, "equilibrium")
class EquilibriumNetwork(Network):
    """out = W read(z*) + b with the fixed point z* = f(z*, u) of a cell whose injection u knows x, t and the condition.

    W is a convolution where both sides are images of one size. As many layers as it takes, with the parameters of
    one. While sampling, `warm` starts each search at the last state of the same rows: along the path of a sample
    fixed points move little.

    Args:
        cell, solver, gradient, start, predictor, skip, jacobian: see `EquilibriumLayer`; what training adds to the loss
            is collected by models that ask for it (`charges`), and refused in others.
    Source: Bai et al. 2019 (Deep equilibrium models), for the layer.
    """

    def __init__(
        self,
        cell: Callable[..., Cell],
        solver: FixedPoint = Anderson(),
        gradient: EquilibriumGradient = Implicit(),
        start: Start = "zero",
        predictor: Callable[..., Network] | None = None,
        skip: float = 0.0,
        jacobian: float = 0.0,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape, self.charges = tuple(in_shape), tuple(out_shape), max(skip, jacobian) > 0
        made = cell(in_shape=in_shape, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        self.layer = EquilibriumLayer(made, solver, gradient, start, predictor, skip, jacobian)
        read = made.out_shape
        self.images = len(read) == len(out_shape) == 3 and read[1:] == self.out_shape[1:]
        self.exit = (
            nn.Conv2d(read[0], out_shape[0], 3, padding=1)
            if self.images
            else nn.Linear(math.prod(read), math.prod(out_shape))
        )
        self.settled: Settled | None = None

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        cell = self.layer.cell
        settled = self.layer(cell.inject(t, x, condition))
        found = settled.found
        # the penalty alone needs a graph, for as long as nobody has asked for it
        self.settled = settled._replace(found=replace(found, z=found.z.detach()))
        self.passed(int(found.nfe.sum()) - len(x))  # the call itself counts as one
        h = cell.read(found.z)
        return self.exit(h if self.images else h.flatten(1)).reshape(len(x), *self.out_shape)


def charges(module: nn.Module) -> tuple[Tensor | float, dict[str, Tensor]]:
    """What the equilibrium networks inside a module add to the loss [B] of the batch that they saw last, and log."""
    total, logs = 0.0, {}
    for part in module.modules():
        if isinstance(part, EquilibriumNetwork) and part.settled is not None:
            total, logs = total + part.settled.penalty, logs | part.settled.logs
            part.settled = None
    return total, logs


@contextmanager
def warm(module: nn.Module) -> Iterator[None]:
    """Inside, the equilibrium layers of a module start each search where the last one of as many items ended.

    Raises:
        ValueError: if there are none.
    """
    layers = [part for part in module.modules() if isinstance(part, EquilibriumLayer)]
    if not layers:
        raise ValueError("warm_start: this model has no equilibrium network whose searches could start warm. Drop it.")
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.warm())
        yield
