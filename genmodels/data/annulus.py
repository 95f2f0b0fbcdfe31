"""A disc inside a ring: the classes of the plane that no flow of the plane can part."""

import math

import torch

from ..registry import ConfigError, register
from ..types import Batch
from .dataset import Dataset
from .memory import InMemory
from .trajectories import item_noise, sizes


@register(Dataset, "annulus")
class Annulus(InMemory):
    """Points of the disc |x| < inner (class 0) and of the ring low < |x| < high (class 1), to be told apart.

    Each class is uniform by area: the radius is √(a² + u (b² - a²)) with u uniform on [0, 1). Items take the classes in
    turn, so that both have one half. An ODE of the plane is a homeomorphism and cannot take the disc out of the ring,
    unless it is given a further dimension or time to squeeze it through.

    Args:
        count: training items; a quarter as many validate, as many test.
        inner, low, high: radii of the disc, and of the ring from within and without.
        seed: of the draws.
    Source: Dupont et al. 2019 (Augmented Neural ODEs), whose concentric classes these are.
    """

    shape = (2,)
    target_shape = (2,)

    def __init__(
        self, count: int = 2000, inner: float = 0.5, low: float = 1.0, high: float = 1.5, seed: int = 0
    ) -> None:
        if not 0 < inner <= low < high:
            raise ConfigError(
                f"data 'annulus': 0 < inner <= low < high is needed, found inner={inner:g}, low={low:g}, high={high:g}."
            )
        bounds = torch.tensor([[0.0, inner], [low, high]], dtype=torch.float64).square()
        for split, n in sizes(count, "annulus").items():
            u = item_noise(n, "annulus", split, seed).uniform(2, dtype=torch.float64)
            labels = torch.arange(n) % 2
            start, end = bounds[labels].unbind(1)
            radius, angle = (start + u[:, 0] * (end - start)).sqrt(), 2 * math.pi * u[:, 1]
            x = torch.stack((radius * angle.cos(), radius * angle.sin()), 1)
            self.hold(split, Batch(x.float(), target=labels))
