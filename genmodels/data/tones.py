"""Synthesised notes: sound that small models learn in minutes, without files."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..registry import ConfigError, register
from ..rng import generator
from ..transforms import Transform
from .audio import Audio
from .dataset import SPLITS, Dataset
from .mel import AudioFeatures
from .memory import InMemory

HARMONICS = 6
LOWEST, HIGHEST = 110.0, 880.0  # fundamental frequencies in hertz
VIBRATO = 0.01  # largest relative deviation of the frequency
NOISE = 0.003  # standard deviation of the noise, about 100 levels of 16 bits


@register(Dataset, "tones")
class Tones(Audio, InMemory):
    """Notes of a few harmonics with vibrato, decay and faint noise, as amplitudes [segment] in (-1, 1).

    x(t) = A Σ_h a_h exp(-d h t) sin(h φ(t) + θ_h) / Σ_h a_h + ε for the harmonics h = 1 … 6 below half the rate, with
    φ(t) = 2πf (t + (δ/2πv) sin(2πvt + ψ)), f log-uniform in 110 … 880 Hz, v in 4 … 7 Hz, δ in 0 … 0.01, phases
    uniform, a_h = r^(h-1) u_h, r in 0.3 … 0.9, u_h in 0.5 … 1, d in 0 … 4 per second, A in 0.2 … 0.8, and
    ε ~ N(0, 0.003²). The splits are independent draws. The proposed transform is the identity, as for recordings.

    Args:
        size: training items; a tenth of that validate, as many test.
        segment: samples of an item.
        rate: samples a second, at least 2000.
        condition: features of each item that are its condition; at 8000 Hz for example
            `{name: log_mel, bands: 20, window: 256, hop: 64}`.
        seed: of the draws.
        transform: instead of the proposed one.
    """

    def __init__(
        self,
        size: int = 3000,
        segment: int = 1024,
        rate: int = 8000,
        condition: Callable[..., AudioFeatures] | None = None,
        seed: int = 0,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        if size < 1 or rate < 2000:
            raise ConfigError(f"data 'tones': size >= 1 and rate >= 2000 are needed, found {size} and {rate}.")
        self.describe(rate, segment, condition, transform)
        for split in SPLITS:
            n = size if split == "train" else max(1, size // 10)
            self.hold(split, self.batch(notes(n, segment, rate, generator("tones", seed, split))))


def notes(n: int, segment: int, rate: int, g: Generator) -> Tensor:
    """[n, segment] float32 amplitudes, see `Tones`."""
    u = torch.rand(n, 7 + 2 * HARMONICS, 1, generator=g, dtype=torch.float64)
    pitch = LOWEST * (HIGHEST / LOWEST) ** u[:, 0]
    speed, depth, turn = 4 + 3 * u[:, 1], VIBRATO * u[:, 2], 2 * math.pi * u[:, 3]
    t = torch.arange(segment, dtype=torch.float64) / rate
    angle = 2 * math.pi * speed
    phase = 2 * math.pi * pitch * (t + depth / angle * (angle * t + turn).sin())
    ratio, decay, loudness = 0.3 + 0.6 * u[:, 4], 4 * u[:, 5], 0.2 + 0.6 * u[:, 6]
    x, total = torch.zeros(n, segment, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64)
    for h in range(1, HARMONICS + 1):
        weight = ratio ** (h - 1) * (0.5 + 0.5 * u[:, 6 + h]) * (h * pitch * (1 + VIBRATO) < rate / 2)
        x += weight * (-decay * h * t).exp() * (h * phase + 2 * math.pi * u[:, 6 + HARMONICS + h]).sin()
        total += weight
    return (loudness * x / total + NOISE * torch.randn(n, segment, generator=g, dtype=torch.float64)).float()
