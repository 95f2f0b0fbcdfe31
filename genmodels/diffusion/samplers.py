"""How a diffusion model is solved between noise and data: times, field, guidance and noise for any kind of solver."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..rng import SeedNoise
from ..solvers.base import Controller, Fixed, Solver, integrate, title
from ..solvers.brownian import Brownian, BrownianTree, path_seeds
from ..solvers.fields import SDE
from .checks import at_least_one
from .denoiser import Denoiser, Guided
from .grids import TimeGrid
from .guidance import Autoguided, WithinInterval, check_guidance, load_guide, nulls_of
from .parametrization import domain
from .path_change import moved
from .remembered import Remembered
from .reverse import DenoiserRows, Diffusivity, PathSDE
from .schedules import Schedule

if TYPE_CHECKING:
    from .model import DiffusionModel

# A Brownian tree lacks a share tolerance · span/(8 h) of the variance over a step h: 1e-4 of it over the shortest step.
LACKING = 8e-4
FINEST = 2.0**-40


@dataclass(frozen=True)
class Guidance:
    """How x̂ is pushed: x̂_other + scale (x̂ - x̂_other), where the other is told no condition, or is a weaker model.

    With a guide and a scale of its own both act: x̂_guide + guide_scale (x̂_null + scale (x̂ - x̂_null) - x̂_guide).

    Args:
        scale: 1 is off.
        interval: noise levels (low, high) of σ/α within which it acts, all of it; None for all.
        guide: the run of the weaker model; None for no condition.
        guide_scale: of the guide; None if `scale` is the guide's, and nothing is pushed away from no condition.
    Raises:
        ValueError: if a number is not finite, the interval is not one, or an option has no effect.
    Source: Karras et al. 2024 (Guiding a diffusion model with a bad version of itself); Ho & Salimans 2022
        (Classifier-free diffusion guidance).
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    guide: str | None = None
    guide_scale: float | None = None

    def __post_init__(self) -> None:
        check_guidance(self.scale, self.interval, self.guide, self.guide_scale)

    @property
    def away(self) -> float:
        """The scale away from "no condition"; 1 if only a weaker model guides."""
        return self.scale if self.guide is None or self.guide_scale is not None else 1.0

    def of(self, model: "DiffusionModel") -> Denoiser:
        """The guided denoiser of a model.

        Raises:
            ValueError: if the model cannot be guided so.
        """
        if self.scale == 1 and self.guide_scale is None:
            return model.denoiser
        guided: Denoiser = model.denoiser
        if self.away != 1:
            model.conditions.check_guidance(self.scale, ", or the run of a weaker model as guide")
            guided = Guided(model.denoiser, self.scale, model.conditions.null)
        if self.guide is not None:
            guide = load_guide(self.guide, model)
            scale = self.scale if self.guide_scale is None else self.guide_scale
            guided = Autoguided(guided, guide.denoiser, scale, guide.conditional, nulls_of(model, guide))
        return guided if self.interval is None else WithinInterval(guided, model.denoiser, self.interval)


class Sampler:
    """The map between noise and data of a model, for one choice of solver, times, guidance and noise.

    Args:
        denoise: whether the last step goes from the first time of the path to σ = 0, where it gives x̂.
        diffusivity: of the SDE, for solvers of SDEs.
        schedule: the path to be solved along; None for that of the model.
    Attributes:
        times: [L] rising, from data to noise.
        scale: standard deviation of the latents: σ at the last time.
    Raises:
        ValueError: if there are too few steps, or if guidance or the path does not fit the model.
        NotApplicable: if the solver adds noise, and items and noise were coupled in training.
    """

    def __init__(
        self,
        model: "DiffusionModel",
        num_steps: int,
        solver: Solver,
        controller: Controller,
        grid: TimeGrid,
        guidance: Guidance,
        denoise: bool = False,
        diffusivity: Diffusivity | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        at_least_one("diffusion", num_steps=num_steps)
        if solver.draws:  # what a step takes away for the noise that it adds is told by the score
            model.check_independent(f"solver '{title(solver)}', which adds noise")
        self.denoiser, self.controller = moved(guidance.of(model), schedule), controller
        self.diffusivity = diffusivity if solver.needs is SDE else None
        span = self.denoiser.t_min, self.denoiser.t_max
        if self.diffusivity is not None:  # its drift is singular at both ends
            low, high = domain("score", self.denoiser.schedule)
            span = max(span[0], low), min(span[1], high)
        # a path that begins without noise ends there in any case
        self.denoise = denoise and float(self.denoiser.schedule.scales(torch.tensor(span[0]).double())[1]) > 0
        fixed = isinstance(controller, Fixed)
        self.solver = solver.along(num_steps * controller.steps) if fixed else solver
        self.times = (
            grid.times(num_steps, self.denoiser.schedule, span, self.denoise)
            if fixed
            else torch.tensor(span, dtype=torch.float64)
        )
        self.known = Remembered(self.denoiser, self.times) if fixed else None
        self.scale = float(self.denoiser.schedule.scales(self.times[-1])[1])

    def solve(self, x: Tensor, condition: Tensor | None, to_data: bool, noise: Brownian | None = None) -> Tensor:
        """[B, *shape] where x is taken by the whole grid, in model space."""
        if self.diffusivity is None:
            field: DenoiserRows | PathSDE = DenoiserRows(self.denoiser, condition, self.known)
        else:
            field = PathSDE(self.denoiser, self.diffusivity, condition, to_data)
        times = self.times.flip(0) if to_data else self.times
        x = integrate(field, x, times, solver=self.solver, controller=self.controller, noise=noise).x
        return self.denoiser.predict(times[-1].to(x.device), x, condition).x if self.denoise and to_data else x

    def path(self, noise: SeedNoise, shape: tuple[int, ...], dtype: torch.dtype) -> BrownianTree | None:
        """A Brownian path for every item of the noise, fine enough for the shortest step; None if none is needed."""
        if not self.solver.draws:
            return None
        start, end = self.times[0].item(), self.times[-1].item()
        steps = self.controller.grid(self.times) if isinstance(self.controller, Fixed) else self.times
        shortest = steps.diff().min().item() / (end - start)
        tolerance = min(2.0**-14, max(FINEST, LACKING * shortest))
        kind = {"tolerance": tolerance, "dtype": dtype, "device": noise.device}
        return BrownianTree(path_seeds(noise), shape, start=start, end=end, **kind)
