"""Networks of diffusers in other terms of time and of state, so that stock schedulers and pipelines serve any model."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..diffusion.denoiser import OnSchedule, denoiser_of
from ..diffusion.grids import TimeGrid
from ..diffusion.parametrization import Target
from ..diffusion.schedules import Linear, Schedule
from ..diffusion.time_condition import TimeCondition
from ..registry import build
from ..types import Condition
from .stepping import Labels
from .timestep_shared import described, network_of

Node = dict[str, Any]


class _Wrapper(ModelMixin, ConfigMixin):
    """A network of diffusers, or a `GenModel`, behind its own configuration with the entries of the wrapper."""

    _supports_gradient_checkpointing = True
    network: nn.Module

    def _hold(self, network: Any, **entries: Any) -> None:
        self.network = network_of(network, type(self).__name__)
        # not under the key of the argument: attributes of theirs are looked up in the configuration first
        self.register_to_config(unet=described(self.network), **entries)

    @property
    def config(self) -> Any:
        """The network's own configuration, with the entries of the wrapper."""
        return FrozenDict({**self._internal_dict["unet"], **self._internal_dict})


class Relabelled(_Wrapper):
    """A network that is told another label of time than the timestep: scale · f(t) + offset for the time t of it.

    The scheduler keeps its timesteps, and the path its times. Timesteps whose label is infinite are told the closest
    finite one.

    Args:
        unet: a model of diffusers or a `GenModel`, or its configuration.
        schedule: node of the path.
        time_condition: node of f.
        time_scale, time_offset: timestep = time_scale · t + time_offset; for "edm", time_scale · log(σ/α)/4.
        edm: whether timesteps are those of the prediction "edm".
        own_scale, own_offset: of the network's own timesteps.
    Source: Yang et al. 2024 (Lipschitz Singularities in Diffusion Models), whose labels are an example.
    """

    def __init__(
        self,
        unet: Any,
        schedule: Node,
        time_condition: Node,
        time_scale: float = 1000.0,
        time_offset: float = 0.0,
        edm: bool = False,
        own_scale: float = 1000.0,
        own_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self._hold(
            unet, schedule=schedule, time_condition=time_condition, time_scale=time_scale, time_offset=time_offset,
            edm=edm, own_scale=own_scale, own_offset=own_offset,
        )  # fmt: skip
        path: Schedule = build(Schedule, schedule)
        self.told: TimeCondition = build(TimeCondition, time_condition)
        self.path, self.labels = path, Labels(path, edm, time_scale, time_offset)
        self.span = self.told.domain(path)

    def forward(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        t = self.labels.times(torch.as_tensor(timestep, device=sample.device)).clamp(*self.span)
        label = self.told(t, self.path) * self.config.own_scale + self.config.own_offset
        return self.network(sample, label, *args, **kwargs)


class OnStraightPath(_Wrapper):
    """A network of any path, prediction and label as a velocity ε̂ - x̂ on the straight path x_s = (1 - s) x + s ε.

    s = σ/(α + σ) at the time of equal log-SNR, x_s = x_t/(α + σ), and timesteps are num_train_timesteps · s: what
    FlowMatchEulerDiscreteScheduler (shift 1) runs, whose step from s to s' is then DDIM's on the path itself,
    x_t' = α' x̂ + σ' ε̂. Beyond the path's first and last s the network is asked there.

    Args:
        unet: a model of diffusers or a `GenModel`, or its configuration.
        schedule, prediction, sigma_data, time_condition: of the model; nodes and numbers.
        own_scale, own_offset: the network's timestep is own_scale · label + own_offset.
        grid: node of the law of times of `sigmas`.
        num_train_timesteps: of the scheduler.
    Source: Karras et al. 2022 (EDM), section 2 and appendix B.2 (the scaling s(t)); Lipman et al. 2023 (Flow
        Matching), example II.
    """

    def __init__(
        self,
        unet: Any,
        schedule: Node,
        prediction: Target,
        sigma_data: float = 1.0,
        time_condition: Node | None = None,
        own_scale: float = 1000.0,
        own_offset: float = 0.0,
        grid: str | Node = "even",
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self._hold(
            unet, schedule=schedule, prediction=prediction, sigma_data=sigma_data, time_condition=time_condition,
            own_scale=own_scale, own_offset=own_offset, grid=grid, num_train_timesteps=num_train_timesteps,
        )  # fmt: skip
        path: Schedule = build(Schedule, schedule)
        condition = None if time_condition is None else build(TimeCondition, time_condition)
        self.law: TimeGrid = build(TimeGrid, grid)
        denoiser = denoiser_of(self._ask, path, prediction, sigma_data, condition)
        # neither is a part with weights of its own
        self.parts = SimpleNamespace(path=path, denoiser=denoiser, straight=OnSchedule(denoiser, Linear()))

    def _ask(self, label: Tensor, x: Tensor, condition: Condition | None) -> Tensor:
        label = (label * self.config.own_scale + self.config.own_offset).expand(len(x))
        return self.network(x, label, class_labels=condition).sample[:, : x.shape[1]]

    def sigmas(self, steps: int) -> list[float]:
        """Falling s at which steps of the model's own grid begin; the last goes to s = 0."""
        denoiser, path = self.parts.denoiser, self.parts.path
        span = denoiser.t_min, denoiser.t_max
        noisy = float(path.scales(torch.tensor(span[0], dtype=torch.float64))[1]) > 0
        if steps == 1:
            t = torch.tensor(span[1:], dtype=torch.float64)
        else:
            t = self.law.times(steps, path, span, noisy).flip(0)[:steps]
        alpha, sigma = path.scales(t)
        return (sigma / (alpha + sigma)).tolist()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        from .pipeline import Answer

        straight = self.parts.straight
        s = torch.as_tensor(timestep, device=sample.device).double() / self.config.num_train_timesteps
        out = straight.answer(s.clamp(straight.t_min, straight.t_max), sample, class_labels)
        return Answer(sample=out) if return_dict else (out,)
