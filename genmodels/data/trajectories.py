"""Curves seen at irregular times with noise and gaps: what the simulated series have in common."""

from abc import abstractmethod

import torch
from torch import Tensor

from ..registry import ConfigError
from ..rng import Noise, SeedNoise
from ..types import Batch
from .dataset import SPLITS, Split
from .memory import InMemory


def sizes(count: int, name: str) -> dict[Split, int]:
    """Items of each split: `count` train, a quarter as many validate, as many test.

    Raises:
        ConfigError: if there are fewer than four.
    """
    if count < 4:
        raise ConfigError(f"data '{name}': count must be at least 4, found {count}.")
    return dict(zip(SPLITS, (count, count // 4, count), strict=True))


def item_noise(n: int, name: str, split: Split, seed: int) -> SeedNoise:
    """Noise by which item i of a split depends on i and the seed alone, not on how many there are."""
    return SeedNoise(n, purpose=f"data {name} {split} {seed}")


def irregular_times(noise: Noise, points: int) -> Tensor:
    """[n, points] float64 increasing: ordered uniform times in (0, 1).

    Sums of exponential gaps over the sum of one gap more have the law of ordered uniforms, and no two are equal.

    Source: Pyke 1965 (Spacings), section 2.
    """
    u = noise.uniform(points + 1, dtype=torch.float64) + 2**-25  # draws are multiples of 2^-24: never 0, never 1
    gaps = -torch.log1p(-u)
    return gaps.cumsum(1)[:, :-1] / gaps.sum(1, keepdim=True)


def chosen(noise: Noise, points: int, share: float) -> Tensor:
    """[n, points] bool, true at round(share · points) places of each item, one at least."""
    count = max(1, round(share * points))
    places = noise.uniform(points).argsort(dim=1, stable=True)[:, :count]
    return torch.zeros(noise.n, points, dtype=torch.bool).scatter(1, places, True)


class Trajectories(InMemory):
    """Curves y(t) [C] on [0, horizon], each seen at times of its own: y(t_j) + noise z, z ~ N(0, I).

    Subclasses say what their curves are (`curves`), and call `observe` once their parameters are set.

    Attributes:
        channels: C.
        horizon: the end of time.
    """

    channels: int
    horizon: float

    @abstractmethod
    def curves(self, noise: Noise, times: Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, L, C] float64 values at the times [n, L], and labels [n] int64 where there are classes.

        Each item's parameters are drawn from the noise, its own for every item.
        """

    def observe(self, task: str, count: int, points: int, observed: float, noise: float, seed: int) -> None:
        """Draw the items of every split.

        Times are ordered uniforms (`irregular_times`). Of the values that are given, a share `observed` (exactly, and
        at least one) is seen; the others are 0, and their mask is False. To interpolate, the values at all times are
        asked for; to forecast (or extrapolate), the first half of the times is given, and the values at all the others
        are asked for. Targets have the noise of observations, and where a value is both seen and asked for, the same
        noise: no prediction of what is not seen has a mean squared error below noise².

        Args:
            task: "interpolate", "forecast", "extrapolate" (the same) or "classify".
        """
        self._check(points, observed, noise)
        whole = (points, self.channels)
        ahead = task in ("forecast", "extrapolate")
        self.shape = (points // 2, self.channels) if ahead else whole
        for split, n in sizes(count, self.registered_name).items():
            draws = item_noise(n, self.registered_name, split, seed)
            times = self.horizon * irregular_times(draws, points)
            seen = chosen(draws, self.shape[0], observed)
            y, labels = self.curves(draws, times)
            y = (y + noise * draws.normal(*whole, dtype=torch.float64)).float()
            given = len(seen[0])
            start = given if ahead else 0
            asked = (
                {"target": labels}
                if task == "classify"
                else {
                    "target": y[:, start:].contiguous(),
                    "target_times": times[:, start:].contiguous(),
                    "target_mask": torch.ones(n, points - start, dtype=torch.bool),
                }
            )
            x = torch.where(seen[..., None], y[:, :given], 0.0)
            self.hold(split, Batch(x, times=times[:, :given].contiguous(), mask=seen, **asked))
        classes = int(labels.max()) + 1 if task == "classify" else 0
        self.target_shape = (classes,) if classes else (points - start, self.channels)

    def _check(self, points: int, observed: float, noise: float) -> None:
        name = self.registered_name
        if points < 2:
            raise ConfigError(f"data '{name}': points must be at least 2, found {points}.")
        if not 0 < observed <= 1:
            raise ConfigError(f"data '{name}': observed must be a share in (0, 1], found {observed:g}.")
        if not noise >= 0:
            raise ConfigError(f"data '{name}': noise must be at least 0, found {noise:g}.")
