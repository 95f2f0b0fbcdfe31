"""Damped, forced oscillators, whose motion is known in closed form."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..rng import Noise
from .dataset import Dataset
from .trajectories import Trajectories


def motion(
    t: Tensor, start: Tensor, speed: Tensor, rate: Tensor, damping: Tensor, force: Tensor, drive: Tensor
) -> Tensor:
    """Position at t of y'' + 2ζω y' + ω² y = f cos Ωt from y(0) = start, y'(0) = speed, for ζ < 1.

    y = e^(-ζωt) (c cos ω_d t + s sin ω_d t) + p cos Ωt + q sin Ωt with ω_d = ω √(1 - ζ²), D = (ω² - Ω²)² + (2ζωΩ)²,
    p = f (ω² - Ω²)/D, q = 2 f ζωΩ/D, c = start - p, s = (speed + ζω c - Ω q)/ω_d.

    Args:
        t, start, speed, rate, damping, force, drive: t, y(0), y'(0), ω, ζ, f and Ω, of shapes that broadcast; D must
            not be 0: without damping, Ω must not be ω.
    """
    decay, detuning = damping * rate, rate**2 - drive**2
    turning, size = rate * (1 - damping**2).sqrt(), detuning**2 + (2 * decay * drive) ** 2
    p, q = force * detuning / size, 2 * force * decay * drive / size
    c = start - p
    s = (speed + decay * c - drive * q) / turning
    free = (-decay * t).exp() * (c * (turning * t).cos() + s * (turning * t).sin())
    return free + p * (drive * t).cos() + q * (drive * t).sin()


@register(Dataset, "oscillators")
class Oscillators(Trajectories):
    """Positions of damped oscillators with a periodic force, y'' + 2ζω y' + ω² y = f cos Ωt, seen at irregular times.

    Each item has its own law: ω uniform in 1 … 3, ζ in 0.02 … 0.2, Ω in 0.5 … 2, f in 0 … `force`, y(0) and y'(0)/ω
    standard normal over √2. Time runs from 0 to 10. Motion is in closed form (`motion`). What is given, seen and asked
    for says `Trajectories.observe`.

    Args:
        task: "interpolate" asks for the values at all times; "forecast" gives the first half of the times and asks for
            the values at the others.
        count: training items; a quarter as many validate, as many test.
        points: times of an item.
        observed: share of the values given that is seen.
        noise: standard deviation of the observations' noise.
        force: the largest amplitude of the force; 0 for free oscillators.
        seed: of the draws.
    """

    unit_of_time = "seconds"
    channels = 1
    horizon = 10.0

    def __init__(
        self,
        task: Literal["interpolate", "forecast"] = "interpolate",
        count: int = 1000,
        points: int = 50,
        observed: float = 0.5,
        noise: float = 0.05,
        force: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not force >= 0:
            raise ConfigError(f"data 'oscillators': force must be at least 0, found {force:g}.")
        self.force = force
        self.observe(task, count, points, observed, noise, seed)

    def curves(self, noise: Noise, times: Tensor) -> tuple[Tensor, None]:
        u = noise.uniform(4, 1, dtype=torch.float64)
        z = noise.normal(2, 1, dtype=torch.float64) / math.sqrt(2)
        rate, damping = 1 + 2 * u[:, 0], 0.02 + 0.18 * u[:, 1]
        drive, force = 0.5 + 1.5 * u[:, 2], self.force * u[:, 3]
        return motion(times, z[:, 0], rate * z[:, 1], rate, damping, force, drive)[..., None], None
