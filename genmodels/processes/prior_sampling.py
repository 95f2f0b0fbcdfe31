"""Samples of a diffusion with any drift, from its prior back to data."""

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from ..diffusion.checks import one_of
from ..rng import Noise
from ..solvers.base import Controller, Solver, integrate
from ..solvers.brownian import BrownianTree, path_seeds
from ..solvers.fields import SDE, RowField
from ..solvers.stochastic import RowSDE
from ..types import expand_like
from .clocks import Clock
from .local_score import reverse_kernel
from .process import Process

Spacing = Literal["clock", "time", "quadratic"]
TOLERANCE = 2.0**-20  # of the Brownian tree: the shortest steps, at the data's end, must not miss their noise


def reverse_grid(clock: Clock, first: float, steps: int, spacing: Spacing) -> Tensor:
    """[steps + 1] float64 u from U down to `first`, even in u ("clock"), in t ("time") or in √u ("quadratic")."""
    first = torch.tensor(first, dtype=torch.float64)
    one_of("sample", "spacing", spacing, ("clock", "time", "quadratic"))
    if spacing == "time":
        return clock(torch.linspace(1.0, float(clock.inverse(first)), steps + 1, dtype=torch.float64))
    power = 2 if spacing == "quadratic" else 1
    ends = clock.total ** (1 / power), float(first) ** (1 / power)
    return torch.linspace(*ends, steps + 1, dtype=torch.float64) ** power


class ReverseSDE(RowSDE):
    """dy = β (F - Q s) dt + √β G dW, which solvers integrate from t = 1 down to t_min.

    Source: Anderson 1982 (Reverse-time diffusion equation models).
    """

    def __init__(self, process: Process, score: nn.Module, condition: Tensor | None) -> None:
        self.process, self.score = process, score
        matrix = process.amplitude(torch.tensor(0.5 * process.clock.total, dtype=torch.float64)).ndim == 2
        super().__init__(self._drift, self._diffusion, condition, noise_type="general" if matrix else "additive")

    def _drift(self, t: Tensor, x: Tensor, condition: Tensor | None) -> Tensor:
        u = self.process.clock(t)
        pulled = self.process.spread(u, self.score(u, x, condition))
        return expand_like(self.process.clock.rate(t), x).to(x.dtype) * (self.process.force(u, x) - pulled)

    def _diffusion(self, t: Tensor, x: Tensor, condition: Tensor | None) -> Tensor:
        g = self.process.amplitude(self.process.clock(t)).to(x.dtype)
        root = expand_like(self.process.clock.rate(t).sqrt(), x).to(x.dtype)
        if g.ndim == 2:
            return root[..., None] * g.reshape(*x.shape[1:], -1).expand(*x.shape, g.shape[1])
        return (root * expand_like(g, x)).expand_as(x)

    def select(self, rows: Tensor) -> "ReverseSDE":
        (condition,) = self.arguments
        return ReverseSDE(self.process, self.score, None if condition is None else condition[rows])


def reverse_sample(
    process: Process,
    score: nn.Module,
    flow: RowField,
    y: Tensor,
    grid: Tensor,
    condition: Tensor | None,
    noise: Noise,
    solver: Solver | None,
    controller: Controller,
) -> Tensor:
    """[B, *shape] y taken down the grid of u: by exponential steps, or by a solver of the reverse SDE or of the flow.

    Args:
        flow: velocity of the probability-flow ODE on the model's time.
        grid: [L] decreasing u.
        solver: None for exponential steps.
    """
    if solver is None:
        for u, to in itertools.pairwise(grid):
            kernel = reverse_kernel(process, u, to, y, score(u.expand(len(y)), y, condition))
            y = kernel.sample(noise.normal(*y.shape[1:], dtype=y.dtype))
        return y
    times = process.clock.inverse(grid)
    if solver.needs is not SDE:
        return integrate(flow, y, times, solver=solver, controller=controller).x
    sde = ReverseSDE(process, score, condition)
    g = process.amplitude(grid[0])
    shape = (g.shape[1],) if g.ndim == 2 else tuple(y.shape[1:])
    ends = {"start": float(times[-1]), "end": float(times[0])}
    tree = BrownianTree(path_seeds(noise), shape, **ends, tolerance=TOLERANCE, dtype=y.dtype, device=y.device)
    return integrate(sde, y, times, solver=solver, controller=controller, noise=tree).x
