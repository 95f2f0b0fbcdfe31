"""Pipelines of diffusers as editors: the velocity that a stock pipeline steps, asked at any time under any prompt."""

import copy
import inspect
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from ..conditions import check_interval
from ..networks.attention import Attention, Tap, fused
from ..registry import ConfigError
from .editor import Editor, Prompt
from .exact import within
from .pixels import check_frames, fitted, pictures, pixels

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Output = Literal["pil", "pixels", "latent"]


class Told(NamedTuple):
    """What a pipeline is told: embeddings of a prompt by the names of `encode_prompt`, for one item or for each.

    Args:
        prompted: of the prompt.
        free: of the negative prompt, away from which guidance goes; None if there is none.
        true_guidance: scale of that guidance where a model is told another one (`true_cfg_scale`); 1 is off.
    """

    prompted: dict[str, Tensor]
    free: dict[str, Tensor] | None = None
    true_guidance: float = 1.0


class PipelineEditor(Editor):
    """A rectified flow in the latent space of an unmodified pipeline; `of_pipeline` finds the class for one.

    The transformer is called with the arguments that the pipeline gives it, and only for the call are states in its
    precision. States are the autoencoder's latents, normalised, [B, C, (T,) H, W]: patches are packed for the call.
    Whatever happens to the pipeline (LoRA, quantisation, offload, another scheduler) is seen at the next call.

    Args:
        items: what `encode` takes and `decode` gives: pictures of PIL (encode takes tensors, too), tensors
            [B, 3, (T,) H, W] in [0, 1], or the latents themselves.
        resize: pictures to the nearest sides that the model takes.
        max_sequence_length: of texts, in tokens; None for the pipeline's own.
    Attributes:
        family: by which `defaults` knows it.
    """

    family: ClassVar[str]
    embeddings: ClassVar[tuple[str, ...]]
    video: ClassVar[bool] = False
    joint: ClassVar[bool] = False  # both answers of guidance by one call on 2B rows [free; prompted]
    stacks: ClassVar[dict[str, tuple[str, ...]]]  # attribute of the transformer -> its self-attention layers
    beside: ClassVar[tuple[str, ...]] = ()  # stacks whose layers are chosen by name only
    fuses: ClassVar[bool] = True  # whether its attention reads projections that were fused
    fused_norms: ClassVar[bool] = True  # whether it normalises queries and keys of such

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        items: Output = "pil",
        resize: bool = False,
        max_sequence_length: int | None = None,
    ) -> None:
        own = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
        self.pipe, self.items, self.resize = pipe, items, resize
        self.max_sequence_length = own if max_sequence_length is None else max_sequence_length
        self._grid()  # refuses pipelines that are no rectified flows
        config = pipe.transformer.config
        if config.get("out_channels") not in (None, config.in_channels):
            raise ConfigError(
                f"of_pipeline: the transformer takes {config.in_channels} channels and gives {config.out_channels}, as "
                "those for filling in or for control by pictures do. Take a model that makes items of texts alone."
            )

    @property
    def told_guidance(self) -> bool:
        """Whether guidance is a number that the model is told (guidance-distilled), and not a second answer."""
        return False

    @torch.no_grad()
    def prompt(
        self,
        text: str | Sequence[str],
        guidance: float = 1.0,
        negative: str | Sequence[str] = "",
        true_guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
    ) -> Prompt:
        """A text, or one for each item, as the pipeline's own text encoders understand it.

        Args:
            guidance: as the pipeline's `guidance_scale`; 1 is off, or what an inversion tells guidance-distilled
                models.
            negative: where guidance goes away from.
            true_guidance: as `true_cfg_scale`, for models that are told the guidance; 1 is off.
        Raises:
            ValueError: if the pipeline has no text encoder, or a guidance has no effect on the model.
        """
        if self.pipe.text_encoder is None:
            raise ValueError(
                f"prompt: this {type(self.pipe).__name__} has no text encoder. Give embeddings to `prepared`."
            )
        prompted = self._texts([text] if isinstance(text, str) else list(text))
        guided = true_guidance != 1 or not self.told_guidance
        free = self._texts([negative] if isinstance(negative, str) else list(negative)) if guided else None
        self.pipe.maybe_free_model_hooks()
        return self.prepared(prompted, free, guidance, true_guidance, interval)

    def prepared(
        self,
        prompted: dict[str, Tensor],
        free: dict[str, Tensor] | None = None,
        guidance: float = 1.0,
        true_guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
    ) -> Prompt:
        """A prompt of embeddings [1 or B, …] by the names of the pipeline's `encode_prompt`, as `prompt` makes it.

        Raises:
            ValueError: if names are missing or unknown, a guidance has no effect, or the interval is none.
        """
        if interval is not None:
            check_interval(interval)
        for given in (prompted, free or prompted):
            if set(given) != set(self.embeddings):
                raise ValueError(
                    f"prompt: {type(self.pipe).__name__} needs {', '.join(self.embeddings)}, found {', '.join(given)}."
                )
        if self.told_guidance and true_guidance != 1 and free is None:
            raise ValueError(f"prompt: true_guidance {true_guidance} needs a negative prompt to guide away from.")
        if not self.told_guidance and true_guidance != 1:
            raise ValueError(
                f"prompt: true_guidance {true_guidance} is for models that are told a guidance. Use guidance="
                f"{true_guidance}."
            )
        return Prompt(Told(prompted, free, true_guidance), guidance, interval)

    @torch.no_grad()
    def velocity(self, t: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
        told = prompt.condition
        if not isinstance(told, Told):
            raise ValueError("prompt: a pipeline needs one made by `prompt` or `prepared` of its editor.")
        acts = within(prompt.interval, 1 - t, t)
        scale = prompt.guidance if acts else 1.0
        weight = (told.true_guidance if acts else 1.0) if self.told_guidance else scale
        told_scale = scale if self.told_guidance else 1.0
        device = self.pipe._execution_device
        state, t = x.to(device), t.to(device)
        prompted = _rows(told.prompted, len(x), device)
        if weight == 1:
            return self._ask(t, state, prompted, told_scale, "cond").to(x)
        if told.free is None:
            raise ValueError(f"prompt: guidance {weight} needs a negative prompt to guide away from, or guidance=1.")
        free = _rows(told.free, len(x), device)
        if self.joint:
            both = {name: torch.cat([free[name], value]) for name, value in prompted.items()}
            without, found = self._ask(t, torch.cat([state, state]), both, told_scale, "cond_uncond").chunk(2)
        else:
            found = self._ask(t, state, prompted, told_scale, "cond")
            without = self._ask(t, state, free, told_scale, "uncond")
        # in the precision of the states: the difference of two answers in 16 bits loses most of its digits
        without = without.to(x)
        return without + weight * (found.to(x) - without)

    def times(self, num_steps: int, x: Tensor) -> Tensor:
        """The noise levels that the pipeline's scheduler steps for such states, in rising order.

        Raises:
            ValueError: if they do not fall strictly from at most 1 to 0.
        """
        grid = self._grid()
        grid.set_timesteps(**self._timesteps(num_steps, x, grid.config), device="cpu")
        levels = grid.sigmas.double().cpu()
        if len(levels) != num_steps + 1 or levels[-1] != 0 or levels[0] > 1 or not bool((levels.diff() < 0).all()):
            raise ValueError(
                f"times: the scheduler {type(self.pipe.scheduler).__name__} gives noise levels that do not fall from 1 "
                "to 0. Give the pipeline a FlowMatchEulerDiscreteScheduler."
            )
        return levels.flip(0)

    def _grid(self) -> Any:
        """A scheduler of its own with the pipeline's noise levels; asking for these changes a scheduler."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler, config = self.pipe.scheduler, self.pipe.scheduler.config
        flow = type(scheduler).__name__.startswith("FlowMatch") or isinstance(
            scheduler, FlowMatchEulerDiscreteScheduler
        )
        if not (flow or config.get("use_flow_sigmas")) or config.get("invert_sigmas"):
            raise ConfigError(
                f"of_pipeline: the scheduler {type(scheduler).__name__} is not that of a rectified flow with t = 0 at "
                "data (a FlowMatch scheduler, or one with use_flow_sigmas). Load the pipeline with such a one."
            )
        return FlowMatchEulerDiscreteScheduler.from_config(config) if flow else copy.deepcopy(scheduler)

    def encode(self, items: Any) -> Tensor:
        """[B, C, (T,) H, W] latents: the mode of the autoencoder's posterior, normalised.

        Raises:
            ValueError: if sizes, channels or numbers of frames do not fit the model, or it has no autoencoder.
        """
        if self.items == "latent":
            return self._checked(items)
        self._needs_vae("encode")
        found = fitted(pixels(items, self.video), self.multiple, self.resize)
        if self.video:
            check_frames(found.shape[2], self.every)
        vae = self.pipe.vae
        with torch.no_grad():
            encoded = vae.encode(found.to(self.pipe._execution_device, vae.dtype) * 2 - 1)
        mode = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents  # of AutoencoderTiny
        self.pipe.maybe_free_model_hooks()
        return self._normalised(mode if mode.dtype == torch.float64 else mode.float())

    def decode(self, x: Tensor) -> Any:
        """Items of latents, in the form that was asked for."""
        if self.items == "latent":
            return x
        self._needs_vae("decode")
        vae = self.pipe.vae
        with torch.no_grad():
            latents = self._raw(x.to(self.pipe._execution_device)).to(vae.dtype)
            found = vae.decode(latents, *self._decoding(latents), return_dict=False)[0].float()
        self.pipe.maybe_free_model_hooks()
        found = (found / 2 + 0.5).clamp(0, 1)
        return pictures(found) if self.items == "pil" else found

    def attention(self) -> list[Attention]:
        return self._layers(self.pipe.transformer)

    def _layers(self, transformer: nn.Module) -> list[Attention]:
        """Modules are looked up now: LoRA and fused projections put others in their places."""
        found = []
        for stack, names in self.stacks.items():
            main = stack not in self.beside
            for number, block in enumerate(getattr(transformer, stack)):
                for name in names:
                    layer = getattr(block, name, None)
                    if layer is not None:
                        end = "" if name == names[0] else f".{name}"
                        found.append(Attention(f"{stack}.{number}{end}", "all", self._taps(layer), main))
        return found

    def _taps(self, layer: nn.Module) -> dict[str, Tap]:
        if self.fuses and self._fused(layer):
            taps = fused(layer.to_qkv)
            if not self.fused_norms:
                return taps
        else:
            taps = {name: Tap(getattr(layer, f"to_{name}")) for name in "qkv"}
        norms = {name: getattr(layer, f"norm_{name}", None) for name in "qk"}
        return taps | {name: Tap(norm) for name, norm in norms.items() if norm is not None}

    def _fused(self, layer: nn.Module) -> bool:
        return getattr(layer, "fused_projections", False)

    def tokens(self, x: Tensor, words: int, layer: str) -> int:
        """Tokens of an item that a layer attends over, with a text of so many."""
        height, width = self._patch
        places = x[0, 0].numel() // (height * width)
        return places + (words if layer.startswith("single_transformer_blocks.") else 0)

    def _checked(self, x: Any) -> Tensor:
        channels = self._channels
        axes = 5 if self.video else 4
        if not isinstance(x, Tensor) or x.ndim != axes or x.shape[1] != channels or not x.is_floating_point():
            found = f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            shown = f"[B, {channels}, T, H, W]" if self.video else f"[B, {channels}, H, W]"
            raise ValueError(f"items: latents {shown} of floating point are needed, found {found}.")
        patch = self._patch
        if any(side % unit for side, unit in zip(x.shape[-2:], patch, strict=True)):
            raise ValueError(f"items: latents have {list(x.shape[-2:])} places, but patches {list(patch)}.")
        return x if x.dtype == torch.float64 else x.float()

    def _needs_vae(self, what: str) -> None:
        if self.pipe.vae is None:
            raise ValueError(
                f'{what}: this {type(self.pipe).__name__} has no autoencoder. Work on latents: items="latent".'
            )

    @property
    def _channels(self) -> int:
        return self.pipe.transformer.config.in_channels

    @property
    @abstractmethod
    def _patch(self) -> tuple[int, int]:
        """Height and width of the patches of latents that are one token."""

    @property
    @abstractmethod
    def multiple(self) -> tuple[int, int]:
        """What the height and the width of pictures must be multiples of."""

    @property
    def every(self) -> int:
        """Frames of a video that the autoencoder squeezes into one."""
        return 1

    @abstractmethod
    def _texts(self, texts: list[str]) -> dict[str, Tensor]:
        """The pipeline's own embeddings of texts, by name."""

    @abstractmethod
    def _ask(self, t: Tensor, x: Tensor, told: dict[str, Tensor], guidance: float, context: str) -> Tensor:
        """[B, C, (T,) H, W] the transformer's answer, called as the pipeline calls it, in its precision."""

    @abstractmethod
    def _timesteps(self, num_steps: int, x: Tensor, config: Any) -> dict[str, Any]:
        """What the pipeline gives to the scheduler's set_timesteps."""

    @abstractmethod
    def _normalised(self, z: Tensor) -> Tensor:
        """Latents of the flow of the autoencoder's."""

    @abstractmethod
    def _raw(self, x: Tensor) -> Tensor:
        """Latents of the autoencoder of the flow's."""

    def _decoding(self, latents: Tensor) -> tuple[Tensor | None, ...]:
        """What else the autoencoder's decoder is told."""
        return ()


def _rows(told: dict[str, Tensor], rows: int, device: torch.device) -> dict[str, Tensor]:
    for name, value in told.items():
        if len(value) not in (1, rows):
            raise ValueError(f"prompt: {name} is of {len(value)} texts, but there are {rows} items. Give one, or each.")
    return {name: value.to(device).expand(rows, *value.shape[1:]) for name, value in told.items()}


def cached(transformer: nn.Module, context: str) -> AbstractContextManager:
    """As pipelines tell diffusers' caches which of their calls this is."""
    return transformer.cache_context(context) if hasattr(transformer, "cache_context") else nullcontext()


def even(num_steps: int) -> numpy.ndarray:
    """[num_steps] noise levels from 1 down to 1/num_steps."""
    return numpy.linspace(1.0, 1 / num_steps, num_steps)


def shift_of(tokens: int, config: Any, highest: float = 1.15) -> float:
    """μ of the shifted times for so many tokens: linear between two numbers of tokens, as stock pipelines have it."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", highest)
    return least + (most - least) / (high - low) * (tokens - low)
