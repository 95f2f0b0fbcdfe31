"""A scheduler for pipelines of diffusers whose steps are those of our solvers."""

from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ..diffusion.grids import TimeGrid
from ..diffusion.parametrization import Target, target
from ..diffusion.schedules import Schedule
from ..diffusion.time_condition import TimeCondition
from ..registry import build
from ..solvers.base import Solver
from ..solvers.brownian import BrownianTree
from ..types import expand_like
from .stepping import Grid, Labels, Plan, Pushed, check_solver, place, times_of_sigmas

Node = str | dict[str, Any]
Numbers = Tensor | list[float] | None


class GenScheduler(SchedulerMixin, ConfigMixin):
    """Any path, prediction and explicit solver of this package behind the interface of diffusers' schedulers.

    A step of a solver that asks the network m times is m entries of `timesteps`: `step` takes the answer to one entry
    and returns the state at which the next is to be asked, until the last returns the item. Times are float64, labels
    for the network real numbers (`time_scale` · t + `time_offset`, or log(σ/α)/4 for "edm"), and entries are counted,
    not looked up. Solvers with noise draw it along Brownian paths, of `set_seeds` or of seeds from the generator.

    Args:
        schedule: the path, a name or a node {name: …, arguments…}; plain JSON, as all of the configuration.
        prediction: what the network predicts.
        solver: an explicit solver, name or node: any that steps a field or a denoiser.
        num_train_timesteps: labels per unit of time, unless `time_scale` says so.
        sigma_data: root mean square of the data in model space, for "edm".
        grid: where n steps begin and end; it has no say where times are given, so that a shift acts once.
        denoise: end with x̂ at the last of n times, where the path has noise at its first time; else n steps go from
            t_max to t_min. Either way edm_heun, whose step to σ = 0 is Euler's, has 2n - 1 entries and the order 2, as
            Heun's method has in diffusers.
        time_scale, time_offset: of the labels; num_train_timesteps (1 for "edm") and 0 if not given.
        time_condition: what the network makes of the time, where its labels do not do for all times of the path.
    Raises:
        ConfigError: if path, prediction, solver or numbers do not fit.
    Source: Karras et al. 2022 (EDM), algorithm 1 and equation 7; von Platen et al. 2022 (Diffusers), class
        SchedulerMixin.
    """

    _compatibles: ClassVar[list[str]] = []

    @register_to_config
    def __init__(
        self,
        schedule: Node = "linear",
        prediction: Target = "velocity",
        solver: Node = "euler",
        num_train_timesteps: int = 1000,
        sigma_data: float = 1.0,
        grid: Node = "even",
        denoise: bool = True,
        time_scale: float | None = None,
        time_offset: float = 0.0,
        time_condition: Node | None = None,
    ) -> None:
        self.path: Schedule = build(Schedule, schedule)
        self.solver: Solver = build(Solver, solver)
        check_solver(self.solver)
        told = None if time_condition is None else build(TimeCondition, time_condition)
        self.denoiser = Pushed(self.path, prediction, sigma_data, told)
        scale = time_scale or (1.0 if prediction == "edm" else float(num_train_timesteps))
        self.labels = Labels(self.path, prediction == "edm", scale, time_offset)
        span = (self.denoiser.t_min, self.denoiser.t_max)
        noisy = float(self.path.scales(torch.tensor(span[0], dtype=torch.float64))[1]) > 0
        self.grid = Grid(build(TimeGrid, grid), self.path, span, denoise and noisy)
        self._lay(torch.linspace(*span, num_train_timesteps, dtype=torch.float64).flip(0), None, planned=False)

    @property
    def order(self) -> int:
        """Entries of `timesteps` per step of the solver."""
        return self.solver.stages

    @property
    def init_noise_sigma(self) -> float:
        """σ at the first time, by which standard noise is multiplied to start from."""
        return float(self.path.scales(self.plan.nodes[0])[1])

    @property
    def step_index(self) -> int | None:
        """The entry that the next step answers; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The entry that the first step answers; it must begin a step of the solver."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Numbers = None,
        timesteps: Numbers = None,
    ) -> None:
        """Lay out the steps: as many on the grid, or between given noise levels σ(t), or given labels.

        Raises:
            ValueError: unless exactly one is given (a number may repeat the length of the others), and unless given
                times fall strictly, within the times of the path.
        """
        given = [name for name, v in (("sigmas", sigmas), ("timesteps", timesteps)) if v is not None]
        if len(given) == 2:
            raise ValueError("set_timesteps: sigmas and timesteps are two ways to give the same times. Give one.")
        if not given:
            self._lay(self.grid.of(num_inference_steps), device)
            return
        values = torch.as_tensor(sigmas if timesteps is None else timesteps, dtype=torch.float64, device="cpu")
        if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()):
            raise ValueError(f"set_timesteps: {given[0]} must be a list of finite numbers, found {values.tolist()}.")
        if num_inference_steps is not None and num_inference_steps != len(values):
            raise ValueError(f"set_timesteps: {num_inference_steps} steps, but {len(values)} {given[0]} are given.")
        t = self.labels.times(values) if sigmas is None else times_of_sigmas(self.path, values, self.grid.span)
        self._lay(self.grid.given(t, given[0]), device)

    def _lay(self, nodes: Tensor, device: str | torch.device | None, planned: bool = True) -> None:
        self.plan = Plan.bare(nodes)
        if planned:
            self.stepper = self.solver.along(len(nodes) - 1 + self.grid.denoises)
            self.plan = Plan.of(self.stepper, self.denoiser, nodes, self.grid.denoises)
        self.num_inference_steps = self.plan.steps if planned else None
        times = self.plan.times
        labels = self.labels(times)
        self.timesteps = labels.to(device, torch.float32 if str(device).startswith("mps") else torch.float64)
        self.sigmas = torch.cat((self.path.scales(times)[1], times.new_zeros(1)))
        self._step_index, self._begin_index = None, None
        self._interval, self._state, self._x, self._noise, self._seeds = 0, None, None, None, None
        self.denoiser.push(())

    def set_seeds(self, seeds: list[int] | Tensor | None) -> None:
        """The seeds of the items' noise, after `set_timesteps`: item i then depends on seed i alone."""
        self._seeds = seeds

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network is given in place of x_t: x_t/√(σ² + α² sigma_data²) for "edm", x_t itself for others."""
        if self.config.prediction != "edm":
            return sample
        alpha, sigma = self.path.scales(self.labels.times(_as_tensor(timestep, sample)))
        scale = (sigma.square() + (alpha * self.config.sigma_data).square()).rsqrt()
        return expand_like(scale, sample).to(sample.dtype) * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """[B, *shape] α x + σ ε at labels [] or [B], any that the path has."""
        alpha, sigma = self.path.scales(self.labels.times(_as_tensor(timesteps, original_samples)))
        alpha, sigma = (expand_like(c, noise).to(noise.dtype) for c in (alpha, sigma))
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """[B, *shape] α ε - σ x: the v of diffusers, which is the time derivative of x_t on no path of ours."""
        scales = self.path(self.labels.times(_as_tensor(timesteps, sample)))
        return target("v", sample, noise, scales)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at which the network is asked next, or the item after the last entry.

        Args:
            model_output: [B, *shape] the network's answer at `timestep`; of twice the channels of the sample, the first
                half is used.
            timestep: a label; or [B] one for each item, each an entry of `timesteps`, for solvers that evaluate once
                and remember nothing: then every row takes its own step, and nothing is counted.
            sample: [B, *shape] the state where it was asked.
            generator: of the seeds of the items' noise, for solvers that draw some and were told no seeds.
        Raises:
            ValueError: if the timestep is no entry, or not the one that is due.
        """
        if self.num_inference_steps is None:
            raise ValueError("step: call set_timesteps first.")
        wide = torch.promote_types(sample.dtype, torch.float32)
        output, x = model_output[:, : sample.shape[1]].to(wide), sample.to(wide)
        if isinstance(timestep, Tensor) and timestep.ndim == 1 and len(timestep) == len(sample) and len(sample) > 1:
            previous = self._rows(output, timestep, x)
        else:
            previous = self._one(output, timestep, x, generator)
        previous = previous.to(sample.dtype)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _one(self, output: Tensor, timestep: float | Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
        label = float(torch.as_tensor(timestep).flatten()[0])
        if self._step_index is None:
            entry = self._entry(label) if self._begin_index is None else self._begin_index
            self._interval, self._step_index, self._state = self.plan.begins(entry), entry, None
            self.denoiser.push(())
            self._noise = self._path(x, generator) if self.plan.random else None
        if self._step_index >= len(self.timesteps):
            raise ValueError("step: the last entry was answered. Call set_timesteps to start again.")
        if place(self.timesteps, label, self._step_index) != self._step_index:
            due = float(self.timesteps[self._step_index])
            raise ValueError(f"step: the timestep {label:g} was given, but entry {self._step_index} is {due:g}.")
        if self.plan.first[self._step_index] and self.denoiser.fresh:
            self._x = x  # a pipeline may have edited it
        self.denoiser.push((*self.denoiser.outputs, output))
        self._step_index += 1
        return self._advance()

    def _entry(self, label: float) -> int:
        """The entry of a label that begins a step: the inner ones of a step may share theirs with the next."""
        starts = [entry for entry, first in enumerate(self.plan.first) if first]
        return starts[place(self.timesteps[starts], label)]

    def _path(self, x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> BrownianTree:
        seeds = self._seeds
        if seeds is None:
            each = generator if isinstance(generator, list) else [generator] * len(x)
            drawn = [torch.randint(2**62, (1,), generator=g, device=g.device if g else "cpu").cpu() for g in each]
            seeds = torch.cat(drawn)
        if len(seeds) != len(x):
            raise ValueError(f"step: {len(seeds)} seeds or generators for {len(x)} items; one for each is needed.")
        return self.plan.path(seeds, tuple(x.shape[1:]), x.dtype, x.device)

    def _advance(self) -> Tensor:
        """Run the solver on the answers so far, to the state at which it wants another one or to the end."""
        while self._interval < self.plan.steps:
            advanced = self.plan.attempt(self.stepper, self.denoiser, self._interval, self._x, self._state, self._noise)
            if isinstance(advanced, Tensor):
                return advanced
            self._x, self._state = advanced
            self._interval += 1
            self.denoiser.push(())
        return self._x

    def _rows(self, output: Tensor, timesteps: Tensor, x: Tensor) -> Tensor:
        if not self.plan.memoryless:
            raise ValueError(
                "step: one timestep for each item needs a solver that asks once a step, remembers and draws nothing; "
                f"'{self.solver.registered_name}' does not. Use euler or ddim."
            )
        entries = torch.tensor([place(self.timesteps, float(label)) for label in timesteps])
        self.denoiser.push((output,))
        new = self.plan.rows(self.stepper, self.denoiser, entries.to(x.device), x)
        self.denoiser.push(())
        return new

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _as_tensor(labels: float | Tensor | None, like: Tensor) -> Tensor:
    if labels is None:
        raise ValueError("this scheduler needs the timestep.")
    return torch.as_tensor(labels, dtype=None if isinstance(labels, Tensor) else torch.float64, device=like.device)
