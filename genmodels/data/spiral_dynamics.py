"""Cubic spirals of the plane: a neural ODE's and a neural SDE's first data."""

from typing import Literal

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..types import Batch
from .dataset import Dataset, Split
from .memory import InMemory
from .trajectories import item_noise, sizes

START = (2.0, 0.0)
POINTS = 30  # on [0, 1]
SUBSTEPS = 16  # between two points; half these steps move means and variances by less than 5e-4 (tests)


def drift(u: Tensor) -> Tensor:
    """[*, 2] du/dt = (-0.1 u₁³ + 2 u₂³, -2 u₁³ - 0.1 u₂³)."""
    first, second = (u**3).unbind(-1)
    return torch.stack((-0.1 * first + 2 * second, -2 * first - 0.1 * second), -1)


def flow(u: Tensor, h: float) -> Tensor:
    """[*, 2] u after a time h of the drift alone, one step of the classical Runge-Kutta method."""
    k1 = drift(u)
    k2 = drift(u + h / 2 * k1)
    k3 = drift(u + h / 2 * k2)
    k4 = drift(u + h * k3)
    return u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def paths(start: Tensor, increments: Tensor, noise: float) -> Tensor:
    """Paths of du = drift(u) dt + noise u dW (Ito, a Brownian motion a component) at evenly spaced times on [0, 1].

    Each step goes half a step along the drift's flow, multiplies by exp(noise dW - noise² h/2), which solves the noise
    alone exactly, and goes the other half (Strang's splitting, of weak order 2); two halves in a row are one step.

    Args:
        start: [B, 2] float64.
        increments: [B, P, S, 2] float64 increments of the Brownian motions over the S steps between two times.
    Returns:
        [B, P + 1, 2] float64.
    Source: Strang 1968 (On the construction and comparison of difference schemes), section 2.
    """
    steps = increments.shape[1] * increments.shape[2]
    h, u, out = 1 / steps, start, [start]
    factor = (noise * increments - noise**2 * h / 2).exp()
    for between in factor.unbind(1):
        jumps = between.unbind(1)
        u = flow(u, h / 2) * jumps[0]
        for jump in jumps[1:]:
            u = flow(u, h) * jump
        u = flow(u, h / 2)
        out.append(u)
    return torch.stack(out, 1)


class _Spirals(InMemory):
    """Paths [30, 2] from a start, asked for given the start or given themselves."""

    unit_of_time = "1"

    def fill(self, task: str, count: int, spread: float, noise: float, seed: int) -> None:
        name = self.registered_name
        for key, value in (("spread", spread), ("noise", noise)):
            if not value >= 0:
                raise ConfigError(f"data '{name}': {key} must be at least 0, found {value:g}.")
        whole = task == "generate"
        self.shape = (POINTS, 2) if whole else (1, 2)
        self.target_shape = None if whole else (POINTS, 2)
        for split, n in sizes(count, name).items():
            self.hold(split, self._items(split, n, whole, spread, noise, seed))

    def _items(self, split: Split, n: int, whole: bool, spread: float, noise: float, seed: int) -> Batch:
        draws = item_noise(n, self.registered_name, split, seed)
        start = torch.tensor(START, dtype=torch.float64) + spread * (2 * draws.uniform(2, dtype=torch.float64) - 1)
        steps = (POINTS - 1, SUBSTEPS, 2)
        increments = draws.normal(*steps, dtype=torch.float64) if noise else torch.zeros(n, *steps, dtype=torch.float64)
        u = paths(start, increments * ((POINTS - 1) * SUBSTEPS) ** -0.5, noise).float()
        times = torch.linspace(0, 1, POINTS, dtype=torch.float64).repeat(n, 1)
        seen = torch.ones(n, POINTS, dtype=torch.bool)
        if whole:
            return Batch(u, times=times, mask=seen)
        first = {"times": times[:, :1].contiguous(), "mask": seen[:, :1].contiguous()}
        return Batch(u[:, :1].contiguous(), target=u, target_times=times, target_mask=seen, **first)


@register(Dataset, "spiral_ode")
class SpiralODE(_Spirals):
    """Spirals du₁/dt = -0.1 u₁³ + 2 u₂³, du₂/dt = -2 u₁³ - 0.1 u₂³ at 30 even times on [0, 1], given where they start.

    x [1, 2] is u(0), uniform on the square of half-width `spread` around (2, 0), at time 0; the target is u at all
    times, the first included, without noise, accurate to the rounding of float32.

    Args:
        count: training items; a quarter as many validate, as many test.
        spread: half the width of the square of starts; 0 makes all items the one spiral of the papers.
        seed: of the draws.
    Source: Chen et al. 2018 (Neural Ordinary Differential Equations), the demonstration in its code.
    """

    def __init__(self, count: int = 1000, spread: float = 0.25, seed: int = 0) -> None:
        self.fill("forecast", count, spread, 0.0, seed)


@register(Dataset, "spiral_sde")
class SpiralSDE(_Spirals):
    """Spirals with noise, du₁ = (-0.1 u₁³ + 2 u₂³) dt + noise u₁ dW₁, du₂ = (-2 u₁³ - 0.1 u₂³) dt + noise u₂ dW₂ (Ito).

    All start in (2, 0), or around it, and are given at 30 even times on [0, 1], the start included. They are simulated
    in steps of 1/464 with increments of their own (`paths`).

    Args:
        count: training items; a quarter as many validate, as many test.
        task: "forecast" gives the start, x [1, 2] at time 0, and asks for the path as target; "generate" gives the path
            [30, 2] itself.
        noise: of the diffusion.
        spread: half the width of the square of starts.
        seed: of the draws.
    Source: Pal et al. 2021 (Opening the Blackbox), its spiral.
    """

    def __init__(
        self,
        count: int = 10_000,
        task: Literal["forecast", "generate"] = "forecast",
        noise: float = 0.2,
        spread: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.fill(task, count, spread, noise, seed)
