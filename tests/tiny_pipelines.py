"""Pipelines of diffusers as users have them, but tiny: random weights, in the real format of folders, made offline.

`flux()`, `sd3()` and `wan()` are complete: transformer, VAE, text encoders and tokenizers, whose `save_pretrained`
writes what `from_pretrained` reads. `hunyuan_video()` and `ltx()` are transformers with a scheduler: they take
prepared prompts and give latents. A call adds `CALLS[name]`, which makes items of the smallest size, to a prompt; for
the last two `prepared(name, seed)` stands in place of a prompt.

A network as initialised is nearly linear, so that no solver could fail on it, and frequencies of its embedding of time
are beyond the steps of any. `lively` makes an ordinary differential equation of it that bends as trained ones do.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FASTEST = 5.0  # radians per unit of time
CALLS: dict[str, dict[str, Any]] = {
    "flux": {"height": 8, "width": 8, "max_sequence_length": 24},
    "sd3": {"height": 8, "width": 8, "max_sequence_length": 24},
    "wan": {"height": 16, "width": 16, "num_frames": 3, "max_sequence_length": 24},
    "hunyuan_video": {"height": 32, "width": 32, "num_frames": 5},
    "ltx": {"height": 64, "width": 64, "num_frames": 9},
}
LATENTS = {  # of one item, as the pipelines take and give them
    "flux": (16, 4),
    "sd3": (4, 8, 8),
    "wan": (4, 2, 8, 8),
    "hunyuan_video": (4, 2, 4, 4),
    "ltx": (8, 8),
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights that are drawn within depend on the seed alone, and what is drawn after does not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def lively(transformer: nn.Module, gain: float, weights: float = 1.5) -> nn.Module:
    """Make the velocity of a random network bend, smoothly in time: weights and output larger, no fast frequency.

    Frequencies are those of diffusers' sinusoidal embedding of 1000 t, 1000 · 10^(-4k/n) for k < n, cosines first.
    """
    from diffusers.models.embeddings import TimestepEmbedding

    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim >= 2:
                parameter *= weights
        transformer.proj_out.weight *= gain
        for module in transformer.modules():
            if isinstance(module, TimestepEmbedding):
                columns = module.linear_1.weight
                pairs = columns.shape[1] // 2
                fast = 1000 * 10 ** (-4 * torch.arange(pairs) / pairs) > FASTEST
                columns[:, fast.repeat(2)] = 0.0
    return transformer.eval().requires_grad_(False)


def clip_tokenizer() -> Any:
    """A tokenizer of CLIP without merges: one token a byte."""
    from transformers import CLIPTokenizer

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in shown] + [chr(256 + number) for number in range(256 - len(shown))]
    vocabulary = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: k for k, token in enumerate(vocabulary)}, merges=[], model_max_length=77)


def clip_encoder(seed: int, projected: bool = False) -> Any:
    """A text encoder of CLIP, 32 wide; with a projection for SD3, which reads its last layer but one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514, hidden_size=32, intermediate_size=37, num_hidden_layers=3 if projected else 2,
        num_attention_heads=4, max_position_embeddings=77, hidden_act="gelu" if projected else "quick_gelu",
        projection_dim=32, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    with seeded(seed):
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_tokenizer() -> Any:
    """A tokenizer of T5 whose pieces are single characters."""
    from transformers import T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=64)


def t5_encoder(seed: int, multilingual: bool = False) -> Any:
    """A text encoder of T5, or of UMT5 as Wan has it, 32 wide."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    kind, config = (UMT5EncoderModel, UMT5Config) if multilingual else (T5EncoderModel, T5Config)
    with seeded(seed):
        sizes = {"vocab_size": 44, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
        return kind(config(**sizes, decoder_start_token_id=0)).eval()


def image_vae(seed: int, channels: int) -> Any:
    """An autoencoder of pictures whose latents have their size."""
    from diffusers import AutoencoderKL

    with seeded(seed):
        return AutoencoderKL(
            sample_size=32, in_channels=3, out_channels=3, block_out_channels=(4,), layers_per_block=1,
            latent_channels=channels, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
            shift_factor=0.0609, scaling_factor=1.5035,
        ).eval()  # fmt: skip


def flux(layers: int = 2, single_layers: int = 4, gain: float = 3.0) -> Any:
    """A complete FluxPipeline of a guidance-distilled model with the shift of FLUX.1-dev."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with seeded(0):
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=layers, num_single_layers=single_layers, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(1, channels=1),
        text_encoder=clip_encoder(2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(3),
        tokenizer_2=t5_tokenizer(),
        transformer=lively(transformer, gain),
    )


def sd3(layers: int = 3, gain: float = 3.0) -> Any:
    """A complete StableDiffusion3Pipeline with the shift of SD3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with seeded(0):
        transformer = SD3Transformer2DModel(
            sample_size=32, patch_size=1, in_channels=4, num_layers=layers, attention_head_dim=8,
            num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64,
            out_channels=4, qk_norm="rms_norm",
        )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=lively(transformer, gain),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(1, channels=4),
        text_encoder=clip_encoder(2, projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(3, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(4),
        tokenizer_3=t5_tokenizer(),
    )


def wan(layers: int = 3, gain: float = 4.0) -> Any:
    """A complete WanPipeline: videos of any odd number of frames, latents of half their height, width and length."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    with seeded(0):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=32, freq_dim=256, ffn_dim=32, num_layers=layers, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )  # fmt: skip
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
            latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[0.5, 0.6, 0.7, 0.8], scale_factor_temporal=2,
            scale_factor_spatial=2,
        ).eval()  # fmt: skip
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(1, multilingual=True),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=lively(transformer, gain),
    )


def hunyuan_video(layers: int = 1, single_layers: int = 2, gain: float = 3.0) -> Any:
    """A HunyuanVideoPipeline of a transformer alone, with the shift of its model."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    with seeded(0):
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=layers,
            num_single_layers=single_layers, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
        )  # fmt: skip
    return HunyuanVideoPipeline(
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), transformer=lively(transformer, gain),
    )  # fmt: skip


def ltx(layers: int = 2, gain: float = 3.0) -> Any:
    """An LTXPipeline of a transformer alone, with the shift of its model."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    with seeded(0):
        transformer = LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
            cross_attention_dim=32, num_layers=layers, caption_channels=32,
        )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return LTXPipeline(
        vae=None, text_encoder=None, tokenizer=None, scheduler=scheduler, transformer=lively(transformer, gain)
    )


BUILDERS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (flux, sd3, wan, hunyuan_video, ltx)}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A new pipeline that says nothing while it runs."""
    pipeline = BUILDERS[name]()
    if dtype != torch.float32:
        pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prepared(name: str, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random prompt as `hunyuan_video` and `ltx` take it without text encoders."""
    generator = torch.Generator().manual_seed(seed)
    if name == "hunyuan_video":
        embeds, pooled = torch.randn(1, 6, 16, generator=generator), torch.randn(1, 8, generator=generator)
        return {
            "prompt_embeds": embeds.to(dtype),
            "pooled_prompt_embeds": pooled.to(dtype),
            "prompt_attention_mask": torch.ones(1, 6, dtype=dtype),
        }
    embeds = torch.randn(1, 6, 32, generator=generator)
    return {"prompt_embeds": embeds.to(dtype), "prompt_attention_mask": torch.ones(1, 6, dtype=torch.bool)}


def latents(name: str, seed: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, *LATENTS[name]] normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *LATENTS[name], generator=generator, dtype=torch.float64).to(dtype)


@functools.cache
def shared(name: str) -> Any:
    """A pipeline in float32 that many tests use: leave its weights alone, and give back its scheduler."""
    return build(name)


def save(name: str, folder: Path) -> Path:
    """The folder of a pipeline as `save_pretrained` writes it."""
    BUILDERS[name]().save_pretrained(folder)
    return folder
