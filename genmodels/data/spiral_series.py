"""Spirals that wind one way or the other, seen at irregular times with noise."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..registry import register
from ..rng import Noise
from .dataset import Dataset
from .trajectories import Trajectories

TURNS, INNER, GROWTH = 1.5, 0.2, 0.1  # turns in a unit of time, least radius, growth of the radius a radian


@register(Dataset, "spiral_series")
class SpiralSeries(Trajectories):
    """Archimedean spirals, anticlockwise (class 0) and clockwise (class 1), seen at irregular times with noise.

    y(t) = (0.2 + 0.1 θ) (cos θ, ±sin θ), θ = θ₀ + 3π t on t in [0, 1], θ₀ uniform on [0, 2π): one and a half turns of a
    spiral that all items share, up to the mirror. Items take the two directions in turn. What is given, seen and asked
    for says `Trajectories.observe`.

    Args:
        task: "interpolate" asks for the values at all times, "extrapolate" gives the first half of the times and asks
            for the values at the others, "classify" asks for the direction.
        count: training items; a quarter as many validate, as many test.
        points: times of an item.
        observed: share of the values given that is seen.
        noise: standard deviation of the observations' noise.
        seed: of the draws.
    Source: Chen et al. 2018 (Neural Ordinary Differential Equations), section 5.1.
    """

    unit_of_time = "1"
    channels = 2
    horizon = 1.0

    def __init__(
        self,
        task: Literal["interpolate", "extrapolate", "classify"] = "interpolate",
        count: int = 1000,
        points: int = 50,
        observed: float = 0.6,
        noise: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.observe(task, count, points, observed, noise, seed)

    def curves(self, noise: Noise, times: Tensor) -> tuple[Tensor, Tensor]:
        clockwise = torch.arange(len(times)) % 2
        angle = 2 * math.pi * (noise.uniform(1, dtype=torch.float64) + TURNS * times)
        y = torch.stack((angle.cos(), angle.sin() * (1 - 2 * clockwise[:, None])), -1)
        return (INNER + GROWTH * angle)[..., None] * y, clockwise
