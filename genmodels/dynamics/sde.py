"""Neural SDEs: classifiers whose features diffuse, and forecasts that are laws of paths."""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from ..model import Model
from ..networks.mlp import MLP
from ..networks.network import Network
from ..registry import ConfigError, member, names, register
from ..rng import BatchNoise, Noise, SeedNoise, as_seeds
from ..solvers.base import Backprop, Controller, Gradient, Solver, title
from ..solvers.brownian import BrownianTree, path_seeds
from ..solvers.stochastic import SOSRI2, Calculus, RowSDE
from ..transforms import Transform
from ..types import Batch, Loss, Seeds, Shape
from .regularization import Evolved, Regularizer, evolve

Precision = Literal["float32", "float64"]
Seminorm = Callable[[Tensor], Tensor] | None


class Equation(nn.Module):
    """dz = f(z) dt + g(z) dW with networks f and g of z [B, size], and of the time too if they are timed.

    Args:
        drift: f.
        diffusion: g, which multiplies component by component; None for a linear layer.
    Raises:
        ConfigError: if the solver does not solve such an equation.
    """

    def __init__(
        self,
        drift: Callable[..., Network],
        diffusion: Callable[..., Network] | None,
        size: int,
        timed: bool,
        calculus: Calculus,
        solver: Solver,
    ) -> None:
        super().__init__()
        sizes = {"in_shape": (size,), "out_shape": (size,), "num_classes": None, "condition_shape": None}
        self.drift = drift(**sizes, timed=timed)
        self.diffusion = nn.Linear(size, size) if diffusion is None else diffusion(**sizes, timed=timed)
        self.timed, self.calculus = timed, calculus
        check_solver(solver, self.rows())

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        return called(self.drift, t if self.timed else None, z)

    def g(self, t: Tensor, z: Tensor) -> Tensor:
        return called(self.diffusion, t if self.timed else None, z)

    def rows(self) -> RowSDE:
        return RowSDE(self.f, self.g, calculus=self.calculus)


def check_solver(solver: Solver, field: RowSDE) -> None:
    """Raises ConfigError unless the solver solves such an equation."""
    if not solver.serves(field):
        usable = [name for name in names(Solver) if member(Solver, name, "solver").serves(field)]
        raise ConfigError(
            f"model.solver: '{title(solver)}' needs {solver.wanted()}, and this model's equation has "
            f"{field.noise_type} noise and {field.calculus} calculus. Use one of: {', '.join(usable)}."
        )


def called(network: nn.Module, t: Tensor | None, z: Tensor) -> Tensor:
    """A network of z, or the linear layer that stands for it."""
    return network(z) if isinstance(network, nn.Linear) else network(t, z)


class StochasticModel(Model):
    """What models with an SDE in them share: its settings, and a solve in training and in use.

    Attributes:
        tolerance: of the Brownian tree, as a share of the whole time.
        dtype: of all arithmetic.
    """

    equation: Equation
    solver: Solver
    controller: Controller
    gradient: Gradient
    regularizers: tuple[Regularizer, ...]
    tolerance: float
    dtype: torch.dtype

    def train_solve(
        self, field: RowSDE, z: Tensor, times: Tensor, noise: Noise, save: str = "last", seminorm: Seminorm = None
    ) -> Evolved:
        """z [B, *] through the times ([L] or [L, B]) on paths drawn from `noise`, in training with regularizers."""
        return evolve(
            field,
            z,
            times,
            solver=self.solver,
            controller=self.controller,
            gradient=self.gradient,
            regularizers=self.regularizers if self.training else (),
            progress=self.progress,
            noise=noise,
            brownian=self.tree(path_seeds(noise), z, times),
            save=save,
            seminorm=seminorm,
        )

    def solve(
        self,
        field: RowSDE,
        z: Tensor,
        times: Tensor,
        seeds: Tensor,
        solver: Solver | None,
        controller: Controller | None,
        save: str = "last",
        seminorm: Seminorm = None,
    ) -> Evolved:
        """z [B, *] through the times on the paths of the seeds [B], with the training's settings for None."""
        steps = (controller or self.controller).by_row()
        return evolve(
            field,
            z,
            times,
            solver=self.solver if solver is None else solver,
            controller=steps,
            gradient=self.gradient,
            brownian=self.tree(seeds, z, times),
            save=save,
            seminorm=seminorm,
        )

    def tree(self, seeds: Tensor, z: Tensor, times: Tensor) -> BrownianTree:
        """The paths of the seeds for a solve from z through the times; rows with their own times do not share ends."""
        first, last = times[0], times[-1]
        kind = {"tolerance": self.tolerance, "dtype": z.dtype, "device": z.device}
        return BrownianTree(
            seeds, tuple(z.shape[1:]), start=first, end=torch.where(last > first, last, first + 1), **kind
        )


def paths_of(seeds: Seeds | None, items: int, paths: int, where: str) -> Tensor:
    """[items * paths] seeds of Brownian paths, those of item i from its own seed alone.

    Raises:
        ValueError: if there is not a seed for each item, or not at least one path.
    """
    seeds = as_seeds(items if seeds is None else seeds)
    if len(seeds) != items:
        raise ValueError(f"{where}: one seed per item is needed, found {len(seeds)} for {items} items.")
    if paths < 1:
        raise ValueError(f"{where}: paths must be at least 1, found {paths}.")
    return path_seeds(SeedNoise(seeds, purpose="path"), paths).flatten()


@register(Model, "neural_sde")
class NeuralSDE(StochasticModel):
    """Class logits W z(1) + b of features that diffuse: z(0) = A x + a, dz = f(z) dt + g(z) dW on [0, 1].

    The loss is the cross-entropy on one path; a prediction is the mean of the logits over several. f and g are
    networks of the features; g multiplies dW component by component. Where a component of g depends on others, solvers
    of strong order 1 and 1.5 keep their error estimates and their order as for ordinary equations in the drift, but
    have strong order 1/2 in the noise.

    Args:
        controller: of the steps. The error estimate of stochastic Runge-Kutta methods is of the size of a whole step
            (see `sosri2`): rtol = atol = 0.1 to 0.3 are usual tolerances, and exponents (0.4, 0.1) steady.
        drift: f.
        diffusion: g; null for a linear layer.
        hidden: size of z.
        time_dependent: whether f and g see the time.
        calculus: of the equation.
        solver, gradient: of the equation.
        regularizers: of the solve, in training.
        tolerance: length of the last level of the Brownian tree, as a share of the time.
        precision: of all arithmetic.
    Raises:
        ConfigError: if the data have no classes, or the solver does not solve such an equation.
    Source: Pal et al. 2021 (Opening the Blackbox), section 4.3.
    """

    def __init__(
        self,
        controller: Controller,
        drift: Callable[..., Network] = MLP,
        diffusion: Callable[..., Network] | None = None,
        hidden: int = 32,
        time_dependent: bool = False,
        calculus: Calculus = "ito",
        solver: Solver = SOSRI2(),
        gradient: Gradient = Backprop(),
        regularizers: tuple[Regularizer, ...] = (),
        tolerance: float = 2**-14,
        precision: Precision = "float32",
        *,
        shape: Shape,
        target_shape: Shape | None,
        transform: Transform,
    ) -> None:
        super().__init__()
        if target_shape is None or len(target_shape) != 1 or hidden < 1:
            raise ConfigError(
                "neural_sde: data with classes as target and hidden >= 1 are needed, found target_shape "
                f"{None if target_shape is None else list(target_shape)} and hidden={hidden}."
            )
        self.shape, self.transform = tuple(shape), transform
        self.solver, self.controller, self.gradient = solver, controller, gradient
        self.regularizers, self.tolerance = tuple(regularizers), tolerance
        self.dtype = getattr(torch, precision)
        self.encoder = nn.Linear(math.prod(transform.out_shape(self.shape)), hidden)
        self.equation = Equation(drift, diffusion, hidden, time_dependent, calculus, solver)
        self.head = nn.Linear(hidden, target_shape[0])
        self.to(self.dtype)

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform."""
        self.transform.fit(batches)
        return {}

    def _start(self, batch: Batch, where: str) -> tuple[Tensor, Tensor]:
        self.check_items(batch.x, where)
        y = self.transform(batch.x.to(self.dtype), None)[0].to(self.dtype)
        return self.encoder(y.flatten(1)), torch.tensor([0.0, 1.0], dtype=torch.float64, device=y.device)

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        z, times = self._start(batch, "loss")
        if batch.target is None or batch.target.is_floating_point() or batch.target.ndim != 1:
            raise ValueError("loss: neural_sde needs one class label [B] for each item as target. Use task: classify.")
        noise = BatchNoise(len(batch), generator=generator, device=z.device)
        evolved = self.train_solve(self.equation.rows(), z, times, noise)
        logits = self.head(evolved.solution.x)
        cross = nn.functional.cross_entropy(logits, batch.target, reduction="none")
        right = (logits.argmax(1) == batch.target).to(cross.dtype).mean()
        logs = {**evolved.logs, "cross_entropy": cross.detach().mean(), "accuracy": right}
        return Loss(cross + evolved.penalty, logs)

    def predict(
        self,
        batch: Batch,
        *,
        seeds: Seeds | None = None,
        paths: int = 10,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Tensor:
        """[B, classes] mean logits over paths; those of item i come from its seed (0 … B-1 if none are given).

        Args:
            paths: for each item.
            solver: None for the training's.
            controller: None for the training's, with steps of each path's own.
        """
        keys = paths_of(seeds, len(batch), paths, "predict")
        z, times = self._start(batch, "predict")
        wide = z.repeat_interleave(paths, 0)
        end = self.solve(self.equation.rows(), wide, times, keys, solver, controller).solution.x
        return self.head(end).reshape(len(batch), paths, -1).mean(1)


@register(Model, "neural_sde_forecast")
class NeuralSDEForecast(StochasticModel):
    """Paths of dx = f(x) dt + g(x) dW from a given state, fitted to the means and variances of data that start alike.

    loss = mean over target times and channels of (E x̂ - E y)² + (Var x̂ - Var y)² with one model path for each item
    of a batch, and the moments of the whole training split, which `prepare` finds. A forecast is a law: mean and log
    standard deviation over several paths. At a time where all paths agree (the start) the latter is that of the
    smallest number, not -∞.

    Args:
        controller, drift, diffusion, time_dependent, calculus: of the equation, as for `neural_sde`.
        solver, gradient, regularizers, tolerance, precision: as for `neural_sde`.
    Raises:
        ConfigError: if the data are not forecasts from one observation, or the solver does not solve such an equation.
    Source: Pal et al. 2021 (Opening the Blackbox), section 4.3.
    """

    def __init__(
        self,
        controller: Controller,
        drift: Callable[..., Network] = MLP,
        diffusion: Callable[..., Network] | None = None,
        time_dependent: bool = False,
        calculus: Calculus = "ito",
        solver: Solver = SOSRI2(),
        gradient: Gradient = Backprop(),
        regularizers: tuple[Regularizer, ...] = (),
        tolerance: float = 2**-14,
        precision: Precision = "float32",
        *,
        shape: Shape,
        target_shape: Shape | None,
    ) -> None:
        super().__init__()
        if len(shape) != 2 or shape[0] != 1 or target_shape is None or tuple(target_shape[1:]) != tuple(shape[1:]):
            raise ConfigError(
                "neural_sde_forecast: items of shape [1, C], the state to start from, and targets [M, C] are needed, "
                f"found {list(shape)} and {None if target_shape is None else list(target_shape)}."
            )
        self.shape = tuple(shape)
        self.solver, self.controller, self.gradient = solver, controller, gradient
        self.regularizers, self.tolerance = tuple(regularizers), tolerance
        self.dtype = getattr(torch, precision)
        self.equation = Equation(drift, diffusion, shape[1], time_dependent, calculus, solver)
        for name in ("data_mean", "data_variance"):
            self.register_buffer(name, torch.full(tuple(target_shape), torch.nan))
        self.to(self.dtype)

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Find the moments of the targets.

        Raises:
            ValueError: if items do not share their start and their times, or nobody observed a target.
        """
        first, count, total, square = None, 0.0, 0.0, 0.0
        for batch in batches:
            facts = (batch.x, self._grid(batch, "prepare"))
            first = tuple(v[:1] for v in facts) if first is None else first
            if any(not torch.equal(v, one.expand_as(v)) for v, one in zip(facts, first, strict=True)):
                raise ValueError(
                    "neural_sde_forecast: the moments of paths that start in different states, or at different times, "
                    "say little about each; items must share their start and target_times (spread: 0)."
                )
            y, mask = batch.target.double(), batch.target_mask
            seen = (
                torch.ones_like(y) if mask is None else mask.reshape(*mask.shape, *[1] * (3 - mask.ndim)).expand_as(y)
            )
            y = torch.where(seen > 0, y, 0.0)
            count, total, square = count + seen.double().sum(0), total + y.sum(0), square + y.square().sum(0)
        if first is None or bool((count < 2).any()):
            raise ValueError("neural_sde_forecast: every target time needs at least two observations to have moments.")
        mean = total / count
        self.data_mean.copy_(mean)
        self.data_variance.copy_((square / count - mean.square()).clamp(min=0) * count / (count - 1))
        return {"data_variance": self.data_variance.mean()}

    def _grid(self, batch: Batch, where: str) -> Tensor:
        """[B, M + 1] the time of the start (0 if there is none) and those asked for."""
        self.check_items(batch.x, where)
        times, x = batch.target_times, batch.x
        if times is None or times.ndim != 2 or len(times) != len(x):
            raise ValueError(f"{where}: neural_sde_forecast needs target_times [{len(x)}, M].")
        start = torch.zeros_like(times[:, :1]) if batch.times is None else batch.times[:, :1]
        return torch.cat((start, times), 1).double()

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        times, places = distinct(self._grid(batch, "loss"))
        if len(batch) < 2 or len(places) != len(self.data_mean) + 1:
            raise ValueError(
                f"loss: neural_sde_forecast needs at least two items, for their variance, and {len(self.data_mean)} "
                f"target times, found {len(batch)} and {len(places) - 1}."
            )
        if not bool(self.data_mean.isfinite().all()):
            raise ValueError("loss: neural_sde_forecast does not know the data's moments. Call prepare first.")
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        x = batch.x[:, 0].to(self.dtype)
        evolved = self.train_solve(self.equation.rows(), x, times, noise, save="all")
        path = evolved.solution.path[places[1:]]
        means = (path.mean(1) - self.data_mean).square().mean()
        variances = (path.var(1) - self.data_variance).square().mean()
        logs = {**evolved.logs, "means": means.detach(), "variances": variances.detach()}
        return Loss(means + variances + evolved.penalty.mean(), logs)

    def predict(
        self,
        batch: Batch,
        *,
        seeds: Seeds | None = None,
        paths: int = 100,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Tensor:
        """[B, M, C, 2] mean and log standard deviation over paths, with the seeds and settings of `neural_sde`.

        Variances are those of the paths themselves (divided by their number), so that mixtures over items are unbiased.
        """
        keys = paths_of(seeds, len(batch), paths, "predict")
        grid = self._grid(batch, "predict").repeat_interleave(paths, 0)
        times, places = distinct(grid)
        x = batch.x[:, 0].to(self.dtype).repeat_interleave(paths, 0)
        solution = self.solve(self.equation.rows(), x, times, keys, solver, controller, save="all").solution
        path = solution.path[places[1:]].transpose(0, 1).reshape(len(batch), paths, -1, x.shape[1])
        variance = path.var(1, correction=0).clamp(min=torch.finfo(self.dtype).tiny)
        return torch.stack((path.mean(1), 0.5 * variance.log()), -1)


def distinct(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Times to solve through for a grid [B, L], and the place [L] of each column's state among them.

    Rows that share their times share one clock, [K] without repetitions; others keep their own, [L, B].
    """
    if len(grid) and bool((grid == grid[:1]).all()) and bool((grid[0] > grid[0, 0]).any()):
        return torch.unique_consecutive(grid[0], return_inverse=True)
    return grid.T, torch.arange(grid.shape[1], device=grid.device)
