"""Series that a model draws at any times, from a law of where they start."""

from abc import abstractmethod

import torch
from torch import Tensor

from ..rng import Noise, SeedNoise, as_seeds
from ..solvers.base import Controller, Solver
from ..types import Condition, Seeds
from .recurrent import SeriesModel, check_positive


class SeriesGenerator(SeriesModel):
    """A model of series whose latent states have a prior law from the earliest time of the training data on."""

    @torch.no_grad()
    def sample(
        self,
        seeds: Seeds,
        *,
        condition: Condition | None = None,
        times: Tensor | None = None,
        mean: bool = False,
        solver: Solver | None = None,
        controller: Controller | None = None,
        batch_size: int = 512,
    ) -> Tensor:
        """[n, M, C] series from the prior, in data units; item i depends on seed i (and times i) alone.

        Args:
            seeds: n, or n seeds.
            times: [M] or [n, M] in the data's unit, not decreasing; by default as many as an item has points, evenly
                spread over the times of the training data.
            mean: leave the observation noise out.
            solver, controller: as in `predict`.
            batch_size: how many are drawn at once.
        Raises:
            ValueError: if the times decrease, or begin before those of the training data.
        """
        seeds = as_seeds(seeds)
        check_positive("sample", batch_size=batch_size)
        if condition is not None:
            raise ValueError(f"sample: {self.registered_name} takes no condition.")
        grid, drawn = self.sample_times(times, len(seeds)), []
        for rows in torch.arange(len(seeds)).split(batch_size):  # one empty part if there are no seeds
            noise = SeedNoise(seeds[rows], device=self.device)
            drawn.append(self._sample(noise, grid[rows], mean, solver, controller))
        return torch.cat(drawn)

    @abstractmethod
    def _sample(
        self, noise: Noise, grid: Tensor, mean: bool, solver: Solver | None, controller: Controller | None
    ) -> Tensor:
        """[B, M, C] series at times [B, M] of the model's clock, without their observation noise for `mean`."""

    def sample_times(self, times: Tensor | None, n: int) -> Tensor:
        """[n, M] float64 times of samples on the model's clock."""
        if times is None:
            times = self.ends[0] + (self.ends[1] - self.ends[0]) * torch.linspace(
                0, 1, self.shape[0], dtype=torch.float64, device=self.device
            )
        grid = self.clock(times.to(self.device, torch.float64)).expand(n, -1)
        if bool((grid.diff(dim=1) < 0).any()) or bool((grid < 0).any()) or not bool(grid.isfinite().all()):
            raise ValueError(
                f"sample: times must not decrease and start at {float(self.origin):.6g} or later, the earliest of the "
                "training data, where the prior holds."
            )
        return grid
