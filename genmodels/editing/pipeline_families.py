"""Families of pipelines: how each normalises and packs latents, what it tells its transformer, and which times."""

from typing import Any, ClassVar

import numpy
import torch
from einops import rearrange
from torch import Tensor, nn

from ..networks.attention import Attention
from .pipeline_editor import PipelineEditor, cached, even, shift_of


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


class Flux(PipelineEditor):
    """FLUX.1: 2x2 patches, a shift of times by the number of tokens; guidance is told to all but schnell.

    In single-stream blocks texts and picture are one sequence, the text first; taps of double-stream blocks, which are
    chosen by name only, are of the picture's tokens.

    The stock pipeline is FluxPipeline of diffusers 0.42.
    """

    family = "flux"
    embeddings = ("prompt_embeds", "pooled_prompt_embeds")
    stacks: ClassVar = {"transformer_blocks": ("attn",), "single_transformer_blocks": ("attn",)}
    beside = ("transformer_blocks",)

    @property
    def told_guidance(self) -> bool:
        return bool(self.pipe.transformer.config.guidance_embeds)

    @property
    def _channels(self) -> int:
        return self.pipe.transformer.config.in_channels // 4

    @property
    def _patch(self) -> tuple[int, int]:
        return 2, 2

    @property
    def multiple(self) -> tuple[int, int]:
        return 2 * self.pipe.vae_scale_factor, 2 * self.pipe.vae_scale_factor

    def _texts(self, texts: list[str]) -> dict[str, Tensor]:
        found = self.pipe.encode_prompt(texts, texts, max_sequence_length=self.max_sequence_length)
        return dict(zip(self.embeddings, found[:2], strict=True))

    def _ask(self, t: Tensor, x: Tensor, told: dict[str, Tensor], guidance: float, context: str) -> Tensor:
        transformer, text = self.pipe.transformer, told["prompt_embeds"]
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        # the pipeline's latents are in the precision of its embeddings, and so are its times
        timestep = (1000 * t).to(torch.promote_types(torch.float32, text.dtype)).to(text.dtype).expand(len(x)) / 1000
        scale = torch.full([len(x)], guidance, device=x.device, dtype=torch.float32) if self.told_guidance else None
        with cached(transformer, context):
            found = transformer(
                hidden_states=rearrange(x.to(text.dtype), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
                timestep=timestep,
                guidance=scale,
                pooled_projections=told["pooled_prompt_embeds"],
                encoder_hidden_states=text,
                txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=text.dtype),
                img_ids=_places(height, width, x.device, text.dtype),
                joint_attention_kwargs={},
                return_dict=False,
            )[0]
        return rearrange(found, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)

    def _timesteps(self, num_steps: int, x: Tensor, config: Any) -> dict[str, Any]:
        mu = shift_of(x.shape[-2] // 2 * (x.shape[-1] // 2), config)
        if config.get("use_flow_sigmas"):
            return {"num_inference_steps": num_steps, "mu": mu}
        return {"sigmas": even(num_steps), "mu": mu}

    def _normalised(self, z: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (z - (config.shift_factor or 0.0)) * config.scaling_factor

    def _raw(self, x: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return x / config.scaling_factor + (config.shift_factor or 0.0)


def _places(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[H W, 3] of each token: 0, its row and its column."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).to(device, dtype)


class StableDiffusion3(PipelineEditor):
    """Stable Diffusion 3 and 3.5: guidance by one call on twice the items.

    Taps are of the picture's tokens; q and k are [B, heads, tokens, head width] after their norm.

    The stock pipeline is StableDiffusion3Pipeline of diffusers 0.42.
    """

    family = "sd3"
    embeddings = ("prompt_embeds", "pooled_prompt_embeds")
    joint = True
    stacks: ClassVar = {"transformer_blocks": ("attn", "attn2")}
    fused_norms = False  # diffusers 0.42 leaves them out, so that fusing changes what these models make

    @property
    def _patch(self) -> tuple[int, int]:
        return _pair(self.pipe.transformer.config.patch_size)

    @property
    def multiple(self) -> tuple[int, int]:
        height, width = self._patch
        return self.pipe.vae_scale_factor * height, self.pipe.vae_scale_factor * width

    def _texts(self, texts: list[str]) -> dict[str, Tensor]:
        found = self.pipe.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2]}

    def _ask(self, t: Tensor, x: Tensor, told: dict[str, Tensor], guidance: float, context: str) -> Tensor:
        text = told["prompt_embeds"]
        return self.pipe.transformer(
            hidden_states=x.to(text.dtype),
            timestep=(1000 * t).to(torch.promote_types(torch.float32, text.dtype)).expand(len(x)),
            encoder_hidden_states=text,
            pooled_projections=told["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def _timesteps(self, num_steps: int, x: Tensor, config: Any) -> dict[str, Any]:
        if not config.get("use_dynamic_shifting"):
            return {"num_inference_steps": num_steps}
        height, width = self._patch
        tokens = x.shape[-2] // height * (x.shape[-1] // width)
        return {"num_inference_steps": num_steps, "mu": shift_of(tokens, config, 1.16)}

    def _fused(self, layer: nn.Module) -> bool:
        # unfusing puts the processors back, but leaves the layers' own mark
        return type(layer.processor).__name__.startswith("Fused")

    _normalised, _raw = Flux._normalised, Flux._raw


class Video(PipelineEditor):
    """What families of videos share: latents [B, C, T, H, W], frames squeezed but for the first.

    Attributes:
        frame_rate: frames per second that the models were made for.
    """

    video = True
    frame_rate: float = 24

    @property
    def _patch(self) -> tuple[int, int]:
        return _pair(self.pipe.transformer.config.patch_size)

    @property
    def multiple(self) -> tuple[int, int]:
        height, width = self._patch
        return self.pipe.vae_scale_factor_spatial * height, self.pipe.vae_scale_factor_spatial * width

    @property
    def every(self) -> int:
        return self.pipe.vae_scale_factor_temporal


class Wan(Video):
    """Wan 2.1 and 2.2, text to video: guidance by two calls; 2.2 has a second transformer for low noise.

    Layers of both transformers have the same names: one of the two runs at a time.

    The stock pipeline is WanPipeline of diffusers 0.42.
    """

    family = "wan"
    embeddings = ("prompt_embeds",)
    stacks: ClassVar = {"blocks": ("attn1",)}
    frame_rate = 16

    def attention(self) -> list[Attention]:
        second = self.pipe.transformer_2
        return super().attention() + ([] if second is None else self._layers(second))

    def _texts(self, texts: list[str]) -> dict[str, Tensor]:
        found, _ = self.pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": found}

    def _ask(self, t: Tensor, x: Tensor, told: dict[str, Tensor], guidance: float, context: str) -> Tensor:
        transformer = self._at(float(t))
        dtype = self.pipe.transformer.dtype
        timestep = (1000 * t).to(torch.promote_types(torch.float32, dtype)).expand(len(x))
        if self.pipe.config.expand_timesteps:  # one time for each token
            timestep = timestep[:, None].expand(-1, x[0, 0, :, ::2, ::2].numel())
        with cached(transformer, context):
            return transformer(
                hidden_states=x.to(dtype),
                timestep=timestep,
                encoder_hidden_states=told["prompt_embeds"].to(dtype),
                return_dict=False,
            )[0]

    def _at(self, t: float) -> nn.Module:
        """The transformer of a time: the second one, if there is one, below the boundary."""
        boundary = self.pipe.config.boundary_ratio
        return self.pipe.transformer if boundary is None or t >= boundary else self.pipe.transformer_2

    def _timesteps(self, num_steps: int, x: Tensor, config: Any) -> dict[str, Any]:
        return {"num_inference_steps": num_steps}

    def _normalised(self, z: Tensor) -> Tensor:
        mean, std = self._moments(z)
        return (z - mean) / std

    def _raw(self, x: Tensor) -> Tensor:
        mean, std = self._moments(x)
        return x * std + mean

    def _moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        return (
            rearrange(torch.tensor(config.latents_mean).to(z), "c -> 1 c 1 1 1"),
            rearrange(torch.tensor(config.latents_std).to(z), "c -> 1 c 1 1 1"),
        )


class HunyuanVideo(Video):
    """HunyuanVideo, text to video: guidance is told.

    In single-stream blocks video and text are one sequence, the video first; double-stream blocks are chosen by name.

    The stock pipeline is HunyuanVideoPipeline of diffusers 0.42.
    """

    family = "hunyuan_video"
    embeddings = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    stacks: ClassVar = {"transformer_blocks": ("attn",), "single_transformer_blocks": ("attn",)}
    beside = ("transformer_blocks",)
    fuses = False

    @property
    def told_guidance(self) -> bool:
        return bool(self.pipe.transformer.config.guidance_embeds)

    def _texts(self, texts: list[str]) -> dict[str, Tensor]:
        found = self.pipe.encode_prompt(
            texts, device=self.pipe._execution_device, max_sequence_length=self.max_sequence_length
        )
        return dict(zip(self.embeddings, found, strict=True))

    def _ask(self, t: Tensor, x: Tensor, told: dict[str, Tensor], guidance: float, context: str) -> Tensor:
        transformer = self.pipe.transformer
        dtype = transformer.dtype
        with cached(transformer, context):
            return transformer(
                hidden_states=x.to(dtype),
                timestep=(1000 * t).to(torch.promote_types(torch.float32, dtype)).expand(len(x)),
                encoder_hidden_states=told["prompt_embeds"].to(dtype),
                encoder_attention_mask=told["prompt_attention_mask"].to(dtype),
                pooled_projections=told["pooled_prompt_embeds"].to(dtype),
                guidance=torch.full([len(x)], guidance, dtype=dtype, device=x.device) * 1000.0,
                return_dict=False,
            )[0]

    def _timesteps(self, num_steps: int, x: Tensor, config: Any) -> dict[str, Any]:
        return {"sigmas": numpy.linspace(1.0, 0.0, num_steps + 1)[:-1]}

    def _normalised(self, z: Tensor) -> Tensor:
        return z * self.pipe.vae.config.scaling_factor

    def _raw(self, x: Tensor) -> Tensor:
        return x / self.pipe.vae.config.scaling_factor


class LTX(Video):
    """LTX-Video, text to video: guidance by one call on twice the items, times shifted by the number of tokens.

    Attributes:
        frame_rate: which the transformer is told.

    The stock pipeline is LTXPipeline of diffusers 0.42.
    """

    family = "ltx"
    embeddings = ("prompt_embeds", "prompt_attention_mask")
    joint = True
    stacks: ClassVar = {"transformer_blocks": ("attn1",)}
    fuses = False
    frame_rate = 25

    @property
    def multiple(self) -> tuple[int, int]:
        height, width = self._patch
        return self.pipe.vae_spatial_compression_ratio * height, self.pipe.vae_spatial_compression_ratio * width

    @property
    def every(self) -> int:
        return self.pipe.vae_temporal_compression_ratio

    @property
    def _channels(self) -> int:
        config = self.pipe.transformer.config
        return config.in_channels // (config.patch_size_t * config.patch_size**2)

    def _texts(self, texts: list[str]) -> dict[str, Tensor]:
        found = self.pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return dict(zip(self.embeddings, found[:2], strict=True))

    def _ask(self, t: Tensor, x: Tensor, told: dict[str, Tensor], guidance: float, context: str) -> Tensor:
        pipe, text = self.pipe, told["prompt_embeds"]
        frames, height, width = x.shape[2:]
        sizes = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
        space = pipe.vae_spatial_compression_ratio
        with cached(pipe.transformer, "cond_uncond"):
            found = pipe.transformer(
                hidden_states=pipe._pack_latents(x.to(text.dtype), *sizes),
                encoder_hidden_states=text,
                timestep=(1000 * t).to(torch.promote_types(torch.float32, text.dtype)).expand(len(x)),
                encoder_attention_mask=told["prompt_attention_mask"],
                num_frames=frames,
                height=height,
                width=width,
                rope_interpolation_scale=(pipe.vae_temporal_compression_ratio / self.frame_rate, space, space),
                return_dict=False,
            )[0]
        return pipe._unpack_latents(found, frames, height, width, *sizes)

    def _timesteps(self, num_steps: int, x: Tensor, config: Any) -> dict[str, Any]:
        return {"sigmas": even(num_steps), "mu": shift_of(x[0, 0].numel(), config)}

    def _normalised(self, z: Tensor) -> Tensor:
        vae = self.pipe.vae
        return self.pipe._normalize_latents(z, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def _raw(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        return self.pipe._denormalize_latents(x, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def _decoding(self, latents: Tensor) -> tuple[Tensor | None, ...]:
        if not self.pipe.vae.config.timestep_conditioning:
            return (None,)
        return (torch.zeros(len(latents), device=latents.device, dtype=latents.dtype),)  # nothing is denoised


FAMILIES: dict[str, type[PipelineEditor]] = {
    "FluxPipeline": Flux,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "WanPipeline": Wan,
    "HunyuanVideoPipeline": HunyuanVideo,
    "LTXPipeline": LTX,
}
