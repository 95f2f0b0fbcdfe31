"""What stands in pipeline folders beside classes of diffusers: our networks and transforms, a pipeline for any data."""

from inspect import signature
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..networks.network import Network
from ..registry import build
from ..rng import SeedNoise
from ..transforms import Transform

# diffusers loads components of pipelines from modules that have been imported, and imports none itself
from . import timestep_shared, whole, wrappers  # noqa: F401

Null = int | list[float] | None
SEEDS = 2**62  # seeds that a generator chooses among


class Answer(BaseOutput):
    """What a network answers.

    Args:
        sample: [B, *shape].
    """

    sample: Tensor


class Items(BaseOutput):
    """What a pipeline draws.

    Args:
        images: [B, *shape] items in data units, or a list of pictures.
    """

    images: Any


class GenModel(ModelMixin, ConfigMixin):
    """Any network of this package as a model of diffusers: `model(sample, timestep, class_labels).sample`.

    The network is asked at t = (timestep - time_offset)/time_scale, of any type of number.

    Args:
        network: its node {name: …, arguments…}.
        in_channels, sample_size: the shape [in_channels, *sample_size] of an item.
        num_classes: of class labels.
        condition_shape: of vectors as conditions, which are given as `class_labels`.
        time_scale, time_offset: of the timesteps.
    """

    @register_to_config
    def __init__(
        self,
        network: dict[str, Any],
        in_channels: int,
        sample_size: list[int],
        num_classes: int | None = None,
        condition_shape: list[int] | None = None,
        time_scale: float = 1000.0,
        time_offset: float = 0.0,
    ) -> None:
        super().__init__()
        shape = (in_channels, *sample_size)
        sizes = {"in_shape": shape, "out_shape": shape, "timed": True, "num_classes": num_classes}
        self.inner: Network = build(  # another name than that of the argument, which diffusers looks up first
            Network, network, **sizes, condition_shape=None if condition_shape is None else tuple(condition_shape)
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Answer | tuple[Tensor]:
        label = torch.as_tensor(timestep, device=sample.device)
        t = (label.double() - self.config.time_offset) / self.config.time_scale
        out = self.inner(t if t.ndim else t.expand(len(sample)), sample, class_labels)
        return Answer(sample=out) if return_dict else (out,)


class GenTransform(ModelMixin, ConfigMixin):
    """The way back from model space to data units, with what was fitted to the data.

    Args:
        transform: its node.
        shape: of an item in data units.
    """

    @register_to_config
    def __init__(self, transform: dict[str, Any], shape: list[int]) -> None:
        super().__init__()
        self.back: Transform = build(Transform, transform, shape=tuple(shape))
        self.register_buffer("version", torch.ones(()))  # a file of weights must hold something

    def forward(self, y: Tensor) -> Tensor:
        """[B, *shape] items in data units."""
        return self.back.inverse(y)


class GenPipeline(DiffusionPipeline):
    """Items of any shape from noise, with or without conditions, in the units of the data.

    Unlike DDPMPipeline it scales the noise it starts from and the network's input as the scheduler says, which paths
    that do not preserve the variance need. A `GenWhole` draws from its own prior, and has no scheduler.

    Args:
        model: a U-Net or transformer of diffusers, a `GenModel`, a wrapper of one, or a `GenWhole`.
        scheduler: one of diffusers, or a `GenScheduler`.
        transform: to data units; without one items stay in model space.
        prior_scale: standard deviation of the noise at the start; the scheduler's `init_noise_sigma` if not given.
        null: the label or vector that stands for "no condition".
        num_inference_steps, guidance_scale: defaults of a call.
        low, high: values of the data that are black and white, for pictures.
    """

    _optional_components: ClassVar[list[str]] = ["transform", "scheduler"]
    model_cpu_offload_seq = "model->transform"

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any = None,
        transform: nn.Module | None = None,
        prior_scale: float | None = None,
        null: Null = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        low: float = -1.0,
        high: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler, transform=transform)
        self.register_to_config(
            prior_scale=prior_scale, null=null, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            low=low, high=high,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | list[int] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seeds: list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        **timesteps: Any,
    ) -> Items | tuple[Any]:
        """Draw items.

        Args:
            batch_size: how many; that of the labels or seeds if they are given.
            class_labels: a label or vector for each; none draws unconditionally.
            guidance_scale: 1 is off.
            seeds: one for each item, which then depends on its seed alone and is that of the model's `sample`.
            generator: of the noise where no seeds are given.
            output_type: "pt" and "np" in data units, "pil" pictures.
            timesteps: `sigmas` or `timesteps`, for schedulers that take them in place of num_inference_steps; without
                them a network `OnStraightPath` says the sigmas of as many steps.
        Raises:
            ValueError: if labels and seeds differ in number, or the model has no conditions.
        """
        if isinstance(self.model, whole.GenWhole):
            return self._whole(
                batch_size, class_labels, guidance_scale, num_inference_steps, seeds, generator, output_type,
                return_dict, **timesteps,
            )  # fmt: skip
        device, steps = self._execution_device, num_inference_steps or self.config.num_inference_steps
        if not timesteps and isinstance(self.model, wrappers.OnStraightPath):
            timesteps = {"sigmas": self.model.sigmas(steps)}
        if timesteps:
            self.scheduler.set_timesteps(device=device, **timesteps)
        else:
            self.scheduler.set_timesteps(steps, device=device)
        x = self._start(batch_size, class_labels, seeds, generator)
        if hasattr(self.scheduler, "set_seeds"):
            self.scheduler.set_seeds(seeds)
        takes = "generator" in signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes else {}
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        labels = self._labels(class_labels, len(x), device, x.dtype)
        null = None if self.config.null is None else self._null(len(x), device, x.dtype)
        for t in self.progress_bar(self.scheduler.timesteps):
            fed = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            answer = self._ask(fed, t, null if labels is None else labels)
            if labels is not None and scale != 1 and null is not None:
                free = self._ask(fed, t, null)
                answer = free + scale * (answer - free)
            x = self.scheduler.step(answer, t, x, return_dict=False, **options)[0]
        items = x if self.transform is None else self.transform(x)
        items = self._shown(items, output_type)
        self.maybe_free_model_hooks()
        return Items(images=items) if return_dict else (items,)

    def _whole(
        self, batch_size: int, labels: Any, guidance: float | None, steps: int | None, seeds: list[int] | None,
        generator: Any, output_type: str, return_dict: bool, **timesteps: Any,
    ) -> Items | tuple[Any]:  # fmt: skip
        if timesteps:
            raise ValueError(
                f"{', '.join(timesteps)}: the model of this pipeline lays its own steps out. Leave it out."
            )
        n, device = _count(batch_size, labels, seeds), self._execution_device
        if seeds is None:
            each = generator if isinstance(generator, list) else [generator]
            counts = [1] * n if isinstance(generator, list) else [n]
            drawn = [torch.randint(SEEDS, (k,), generator=g) for k, g in zip(counts, each, strict=True)]
            seeds = torch.cat(drawn)
        given = None if labels is None else torch.as_tensor(labels, device=device)
        if given is not None and given.is_floating_point():
            given = given.to(self.model.dtype)
        items = self.model.draw(torch.as_tensor(seeds), given, steps, guidance)
        items = self._shown(items, output_type)
        self.maybe_free_model_hooks()
        return Items(images=items) if return_dict else (items,)

    def _ask(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.model(x, t.expand(len(x)), class_labels=labels).sample[:, : x.shape[1]]

    def _start(
        self, batch_size: int, labels: Tensor | list[int] | None, seeds: list[int] | None, generator: Any
    ) -> Tensor:
        config, device = self.model.config, self._execution_device
        n = _count(batch_size, labels, seeds)
        size = config.sample_size
        shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
        if seeds is not None:
            noise = SeedNoise(torch.as_tensor(seeds), device=device).normal(*shape, dtype=self.model.dtype)
        else:
            noise = randn_tensor((n, *shape), generator=generator, device=device, dtype=self.model.dtype)
        scale = self.config.prior_scale
        return noise * (getattr(self.scheduler, "init_noise_sigma", 1.0) if scale is None else scale)

    def _labels(self, given: Any, n: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        if given is None:
            return None
        labels = torch.as_tensor(given, device=device)
        if self.config.null is None and not self._conditional():
            raise ValueError("class_labels were given to a pipeline whose model has no conditions. Drop them.")
        return labels.to(dtype) if labels.is_floating_point() else labels

    def _conditional(self) -> bool:
        names = ("num_classes", "condition_shape", "num_class_embeds", "num_embeds_ada_norm", "class_embed_type")
        return any(self.model.config.get(name) for name in names)

    def _null(self, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        null = torch.as_tensor(self.config.null, device=device)
        return (null.to(dtype) if null.is_floating_point() else null).expand(n, *null.shape)

    def _shown(self, items: Tensor, output_type: str) -> Any:
        if output_type == "pt":
            return items
        if output_type == "np":
            return items.cpu().numpy()
        if output_type != "pil" or items.ndim != 4 or items.shape[1] not in (1, 3):
            raise ValueError(
                f"output_type: 'pt' and 'np' serve all data, 'pil' those of shape [1 or 3, H, W]; found "
                f"{output_type!r} for items of shape {list(items.shape[1:])}."
            )
        low, high = self.config.low, self.config.high
        pixels = ((items.float() - low) / (high - low)).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(np.nan_to_num(pixels))


def _count(batch_size: int, labels: Any, seeds: Any) -> int:
    """How many items are wanted: as many as there are labels or seeds, if they are given."""
    counts = {len(given) for given in (labels, seeds) if given is not None}
    if len(counts) > 1:
        raise ValueError(f"there are {len(labels)} class_labels and {len(seeds)} seeds; give one seed an item.")
    return counts.pop() if counts else batch_size
