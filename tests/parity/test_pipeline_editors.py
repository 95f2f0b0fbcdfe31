"""Editors of pipelines against the stock pipelines of diffusers: same times, velocities, prompts and pictures."""

import copy
import json
import math
import re
import sys
from itertools import pairwise

import numpy
import pytest
import torch
from einops import rearrange
from PIL import Image

from genmodels.commands import sample
from genmodels.editing.apply import edit, invert
from genmodels.editing.by_inversion import RFEdit, Vanilla
from genmodels.editing.editor import Walk
from genmodels.editing.pipelines import SETTINGS, defaults, load_pipeline, of_pipeline, shared_bytes
from genmodels.editing.selection import select
from genmodels.editing.sharing import Sharing
from genmodels.rng import SeedNoise
from genmodels.solvers.runge_kutta import Euler
from tests import tiny_pipelines as tiny

FAMILIES = ("flux", "sd3", "wan", "hunyuan_video", "ltx")
TEXTS, TRUE = ("flux", "sd3", "wan"), ("flux", "hunyuan_video")


def editor_of(name, pipe=None, items="latent"):
    return of_pipeline(tiny.shared(name) if pipe is None else pipe, items, max_sequence_length=24)


def state_of(name, latents):
    """The latents of a stock pipeline as an editor has them: not packed."""
    if name == "flux":
        return rearrange(latents, "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=2, q=2)
    return rearrange(latents, "b (t h w) c -> b c t h w", t=2, h=2) if name == "ltx" else latents


def latents_of(name, state):
    if name == "flux":
        return rearrange(state, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    return rearrange(state, "b c t h w -> b (t h w) c") if name == "ltx" else state


def told(editor, name, text="a cat", **guidance):
    """A prompt of two items for the editor, and the same as arguments of the stock pipeline."""
    call = dict(tiny.CALLS[name], guidance_scale=guidance.get("guidance", 1.0))
    if "true_guidance" in guidance:
        call["true_cfg_scale"] = guidance["true_guidance"]
    negative = "true_guidance" in guidance or ("guidance" in guidance and not editor.told_guidance)
    if name in TEXTS:
        call |= {"prompt": [text] * 2} | ({"negative_prompt": ["a dog, bad"] * 2} if negative else {})
        return editor.prompt(text, negative="a dog, bad", **guidance), call
    own, free = tiny.prepared(name, len(text)), tiny.prepared(name, 2)
    twice = {key: value.expand(2, *value.shape[1:]) for key, value in own.items()}
    if negative:
        twice |= {f"negative_{key}": value.expand(2, *value.shape[1:]) for key, value in free.items()}
    return editor.prepared(own, free, **guidance), call | twice


def chosen(editor, **options):
    sharing = Sharing(**options)
    found = select(editor.attention(), sharing.blocks, sharing.over, sharing.tensors)
    return [layer.name for layer in found]


def apart(x, y):
    return ((x - y).norm() / y.norm()).item()


def stock(pipe, latents, call, steps=4, output="latent"):
    with torch.no_grad():
        return pipe(latents=latents, num_inference_steps=steps, output_type=output, return_dict=False, **call)[0]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_a_walk_by_eulers_method_is_the_stock_pipeline(name):
    """In float32 to 1e-5: guidance off, on, and by true_cfg_scale beside what the model is told."""
    editor, z = editor_of(name), tiny.latents(name, 0, 2)
    ways = [{}, {"guidance": 3.0}] + [{"guidance": 2.0, "true_guidance": 4.0}] * (name in TRUE)
    ends = []
    for guidance in ways:
        prompt, call = told(editor, name, **guidance)
        x = state_of(name, z)
        found = Walk(editor, prompt, editor.times(4, x)).solve(Euler(), x, True)
        wanted = state_of(name, stock(editor.pipe, z, call))
        assert apart(found, wanted) < 1e-5
        ends.append(found)
    assert all(apart(a, b) > 1e-3 for a, b in pairwise(ends))  # guidance does something


def text_encoders(name):
    """Of the families that `tiny_pipelines` gives prepared prompts: Llama and CLIP for HunyuanVideo, T5 for LTX."""
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    if name == "ltx":
        return {"text_encoder": tiny.t5_encoder(7), "tokenizer": tiny.t5_tokenizer()}
    with tiny.seeded(7):
        llama = LlamaConfig(
            vocab_size=44, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
        )
        clip = CLIPTextConfig(
            vocab_size=514, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )  # fmt: skip
        own = {"text_encoder": LlamaModel(llama).eval(), "text_encoder_2": CLIPTextModel(clip).eval()}
    return own | {"tokenizer": tiny.t5_tokenizer(), "tokenizer_2": tiny.clip_tokenizer()}


@pytest.mark.parametrize("name", ["hunyuan_video", "ltx"])
def test_texts_are_read_as_the_stock_pipeline_reads_them(name):
    """Other families are read by the walk above; a text of HunyuanVideo begins after 95 tokens of a template."""
    shared = tiny.shared(name)
    parts = {"vae": None, "transformer": shared.transformer, "scheduler": shared.scheduler}
    pipe = type(shared)(**parts, **text_encoders(name))
    pipe.set_progress_bar_config(disable=True)
    editor, z = of_pipeline(pipe, "latent", max_sequence_length=400), tiny.latents(name, 0)
    ways = {"true_guidance": 3.0} if name == "hunyuan_video" else {"guidance": 3.0}
    scales = {"true_cfg_scale": 3.0, "guidance_scale": 1.0} if name == "hunyuan_video" else {"guidance_scale": 3.0}
    call = tiny.CALLS[name] | {"prompt": "a cat", "negative_prompt": "a dog, bad", "max_sequence_length": 400} | scales
    x = state_of(name, z)
    prompt = editor.prompt("a cat", negative="a dog, bad", **ways)
    found = Walk(editor, prompt, editor.times(2, x)).solve(Euler(), x, True)
    assert apart(found, state_of(name, stock(pipe, z, call, 2))) < 1e-5
    other = Walk(editor, editor.prompt("a bird", **ways), editor.times(2, x)).solve(Euler(), x, True)
    assert apart(found, other) > 1e-4


def test_prompts_of_items_are_their_own():
    editor = editor_of("sd3")
    x, t = state_of("sd3", tiny.latents("sd3", 0, 2)), torch.tensor(0.4, dtype=torch.float64)
    both = editor.velocity(t, x, editor.prompt(["a cat", "a dog"], guidance=2.0))
    each = [
        editor.velocity(t, x[i : i + 1], editor.prompt(text, guidance=2.0)) for i, text in enumerate(("a cat", "a dog"))
    ]
    assert apart(both, torch.cat(each)) < 1e-5
    with pytest.raises(ValueError, match="of 2 texts, but there are 3 items"):
        editor.velocity(t, x[[0, 1, 1]], editor.prompt(["a cat", "a dog"]))


def test_guidance_acts_within_its_interval():
    """Noise levels t/(1 - t) of 0.5 … 2; at t = 1 the level is infinite. Outside, a told guidance is 1."""
    for name, guidance in (("wan", {"guidance": 3.0}), ("flux", {"guidance": 3.0, "true_guidance": 2.0})):
        editor, x = editor_of(name), state_of(name, tiny.latents(name, 0))
        plain, whole = editor.prompt("a cat"), editor.prompt("a cat", **guidance)
        part, above = (editor.prompt("a cat", interval=i, **guidance) for i in ((0.5, 2.0), (0.5, math.inf)))
        for t, acts in ((0.25, False), (0.5, True), (0.8, False), (1.0, False)):
            t = torch.tensor(t, dtype=torch.float64)
            wanted = editor.velocity(t, x, whole if acts else plain)
            assert torch.equal(editor.velocity(t, x, part), wanted)
            assert torch.equal(editor.velocity(t, x, above), editor.velocity(t, x, whole if t >= 0.5 else plain))


def test_steps_of_schedulers_for_several_kinds_of_models_are_theirs():
    """UniPC, with which Wan comes: the knots are its sigmas, though its own times are rounded to integers."""
    from diffusers import UniPCMultistepScheduler

    pipe = copy.copy(tiny.shared("wan"))
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    times = editor_of("wan", pipe).times(5, torch.zeros(1, 4, 2, 8, 8))
    even = numpy.linspace(1, 1e-3, 6)[:-1]
    torch.testing.assert_close(times[1:].flip(0), torch.tensor(3 * even / (1 + 2 * even)), atol=2e-6, rtol=0)
    assert times[0] == 0 and pipe.scheduler.num_inference_steps is None  # the pipeline's own is left alone


def test_times_of_sd3_may_be_shifted_by_the_size():
    """As the stock pipeline does where its scheduler asks for it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = copy.copy(tiny.shared("sd3"))
    ends = {}
    for least in (0.2, 2.0):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=least)
        editor, z = editor_of("sd3", pipe), tiny.latents("sd3", 0, 2)
        prompt, call = told(editor, "sd3")
        ends[least] = Walk(editor, prompt, editor.times(2, z)).solve(Euler(), z, True)
        assert apart(ends[least], stock(pipe, z, call, 2)) < 1e-5
    assert apart(*ends.values()) > 1e-3
    # a line through 0.5 at 256 tokens and 1.15 at 4096; patches of 2 x 2 latents are the tokens
    pipe = tiny.build("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe.transformer.register_to_config(patch_size=2)
    wanted = copy.deepcopy(pipe.scheduler)
    wanted.set_timesteps(3, mu=0.5 + 0.65 * (16 * 24 - 256) / (4096 - 256))
    times = editor_of("sd3", pipe).times(3, torch.zeros(1, 4, 32, 48))
    torch.testing.assert_close(times, wanted.sigmas.flip(0).double(), atol=1e-6, rtol=0)


def test_times_of_flux_are_published():
    """Knots for 1024² pixels, that is 4096 tokens; the pipeline's configuration has the shift of FLUX.1-dev."""
    times = editor_of("flux").times(5, torch.zeros(1, 1, 128, 128))
    wanted = torch.tensor([0, 0.441200, 0.677987, 0.825702, 0.926647, 1], dtype=torch.float64)
    torch.testing.assert_close(times, wanted, atol=1e-6, rtol=0)


def test_two_transformers_and_times_of_tokens_as_wan_2_2_has_them():
    pipe, other = tiny.build("wan"), tiny.build("wan")
    with tiny.seeded(9):
        for parameter in other.transformer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    pipe.register_modules(transformer_2=other.transformer)
    pipe.register_to_config(boundary_ratio=0.8)
    editor, z = editor_of("wan", pipe), tiny.latents("wan", 0, 2)
    prompt, call = told(editor, "wan", guidance=3.0)
    assert apart(Walk(editor, prompt, editor.times(4, z)).solve(Euler(), z, True), stock(pipe, z, call)) < 1e-5
    assert editor._at(0.8) is pipe.transformer and editor._at(0.799) is pipe.transformer_2  # the stock t >= boundary
    assert chosen(editor) == ["blocks.1", "blocks.2"] * 2 and chosen(editor, blocks=(0,)) == ["blocks.0"] * 2
    sharing = Sharing(steps=4)  # beyond the boundary, too
    other = editor.prompt("a dog", guidance=3.0)
    made = edit(editor, z, prompt, other, method=RFEdit(4, sharing), noise=SeedNoise([0, 1]), reconstruct=False)
    assert made.stored == shared_bytes(editor, sharing, z, prompt)
    pipe.register_to_config(boundary_ratio=None, expand_timesteps=True)
    assert apart(Walk(editor, prompt, editor.times(4, z)).solve(Euler(), z, True), stock(pipe, z, call)) < 1e-5


@pytest.mark.parametrize("name", TEXTS)
def test_pictures_are_decoded_as_the_stock_pipeline_does_and_encoding_undoes_its_scaling(name):
    editor, z = editor_of(name, items="pixels"), tiny.latents(name, 0, 2)
    _, call = told(editor, name)
    wanted = stock(editor.pipe, z, call, 1, "pt")
    wanted = rearrange(wanted, "b t c h w -> b c t h w") if name == "wan" else wanted
    found = editor.decode(state_of(name, stock(editor.pipe, z, call, 1)))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert found.std() > 0.01
    mode = editor.pipe.vae.encode(2 * found - 1).latent_dist.mode()
    torch.testing.assert_close(editor._raw(editor.encode(found)), mode, atol=1e-5, rtol=1e-5)
    shown = of_pipeline(editor.pipe).decode(editor.encode(found))
    again = of_pipeline(editor.pipe).encode(
        shown
    )  # through PIL: to half a level of 255, and what the network makes of it
    assert apart(again, editor.encode(editor.decode(editor.encode(found)))) < 0.05
    one = shown[0][0] if name == "wan" else shown[0]
    pixel = editor.decode(editor.encode(found))[0, :, 0] if name == "wan" else editor.decode(editor.encode(found))[0]
    torch.testing.assert_close(
        torch.tensor(numpy.array(one)) / 255, rearrange(pixel, "c h w -> h w c"), atol=0.51 / 255, rtol=0
    )


def test_small_autoencoders_that_give_no_distribution_encode():
    from diffusers import AutoencoderTiny

    sizes = {"encoder_block_out_channels": (4, 4), "num_encoder_blocks": (1, 1)}
    sizes |= {"decoder_block_out_channels": (4, 4), "num_decoder_blocks": (1, 1)}
    pipe = copy.copy(tiny.shared("flux"))
    with tiny.seeded(0):
        pipe.vae = AutoencoderTiny(latent_channels=1, **sizes).eval()
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(editor_of("flux", pipe, "pixels").encode(x), pipe.vae.encode(2 * x - 1).latents)


def test_values_of_the_late_single_stream_blocks_are_chosen():
    flux = editor_of("flux")
    assert chosen(flux) == [f"single_transformer_blocks.{i}" for i in (2, 3)]
    assert chosen(flux, blocks=("transformer_blocks.1",)) == ["transformer_blocks.1"]
    assert len(chosen(flux, blocks="all")) == 4 and chosen(flux, blocks=(0,)) == ["single_transformer_blocks.0"]
    block = tiny.shared("flux").transformer.single_transformer_blocks[3].attn
    taps = flux.attention()[-1].taps
    assert taps["v"].module is block.to_v and taps["q"].module is block.norm_q and taps["k"].module is block.norm_k
    assert chosen(editor_of("sd3"), blocks="all") == [f"transformer_blocks.{i}" for i in range(3)]
    assert chosen(editor_of("hunyuan_video"), blocks="all") == [f"single_transformer_blocks.{i}" for i in range(2)]
    assert chosen(editor_of("ltx")) == ["transformer_blocks.1"]


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_features_are_of_the_size_foretold(name):
    editor = editor_of(name)
    x = state_of(name, tiny.latents(name, 0, 2))
    source, target = (told(editor, name, text, guidance=2.0)[0] for text in ("a cat", "a small dog"))
    sharing = Sharing(steps=2, tensors=("q", "v"))
    made = edit(editor, x, source, target, method=RFEdit(3, sharing), noise=SeedNoise([0, 1]), reconstruct=False)
    assert made.stored == shared_bytes(editor, sharing, x, source) > 0
    assert made.nfe == 12
    plain = edit(editor, x, source, target, method=RFEdit(3, None), noise=SeedNoise([0, 1]), reconstruct=False)
    assert apart(made.items, plain.items) > 1e-5  # the stored values were used


def video_vae(name, timestep_conditioning=False):
    """Tiny autoencoders of the families that `tiny_pipelines` has no complete pipeline of."""
    from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLLTXVideo

    with tiny.seeded(3):
        if name == "hunyuan_video":
            return AutoencoderKLHunyuanVideo(
                latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
            ).eval()
        vae = AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, True, False), timestep_conditioning=timestep_conditioning,
            decoder_spatio_temporal_scaling=(True, True, True, False), scaling_factor=0.7,
        ).eval()  # fmt: skip
        vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, 8))
        vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
        return vae


@pytest.mark.parametrize(("name", "conditioned"), [("hunyuan_video", False), ("ltx", False), ("ltx", True)])
def test_videos_are_decoded_as_the_stock_pipeline_does_where_only_the_text_encoder_is_missing(name, conditioned):
    transformer, scheduler = tiny.shared(name).transformer, tiny.shared(name).scheduler
    vae = video_vae(name, conditioned)
    parts = dict.fromkeys(("text_encoder", "tokenizer"))
    parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2")) if name == "hunyuan_video" else {}
    pipe = type(tiny.shared(name))(vae=vae, transformer=transformer, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    editor = editor_of(name, pipe, "pixels")
    side = 2 if name == "ltx" else 4
    height, frames = editor.multiple[0] * side // editor._patch[0], editor.every + 1
    _, call = told(editor_of(name), name)
    call |= {"height": height, "width": height, "num_frames": frames}
    z = tiny.latents(name, 0, 2)
    wanted = rearrange(stock(pipe, z, call, 2, "pt"), "b t c h w -> b c t h w")
    found = editor.decode(state_of(name, stock(pipe, z, call, 2)))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    mode = vae.encode(2 * found - 1).latent_dist.mode()
    torch.testing.assert_close(editor._raw(editor.encode(found)), mode, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no text encoder"):
        editor.prompt("a cat")


def shares(pipe, name="flux"):
    """An edit that takes over values."""
    editor = editor_of(name, pipe)
    x = state_of(name, tiny.latents(name, 0))
    source, target = editor.prompt("a cat"), editor.prompt("a small dog", guidance=2.0)
    method = RFEdit(2, Sharing(steps=1, tensors=("q", "k", "v")))
    return edit(editor, x, source, target, method=method, noise=SeedNoise([0]), reconstruct=False)


class Adapted(torch.nn.Module):
    """A layer beside a linear one, in its place: how LoRA and quantisation are put into networks."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora(x)


def test_layers_put_in_the_place_of_projections_are_shared_of():
    """Fused projections give the same edit, of a part of them; adapters another, which a store by hand makes, too."""
    for name in TEXTS:
        pipe = tiny.build(name)
        if name == "sd3":  # diffusers leaves these out of fused attention
            for block in pipe.transformer.transformer_blocks:
                block.attn.norm_q = block.attn.norm_k = block.attn.norm_added_q = block.attn.norm_added_k = None
        before = shares(pipe, name)
        pipe.transformer.fuse_qkv_projections()
        fused = shares(pipe, name)
        assert apart(fused.items, before.items) < 1e-4 and fused.stored == before.stored > 0
        tap = editor_of(name, pipe).attention()[-1].taps["v"]
        assert tap.part == (2, 3) and tap.module.out_features % 3 == 0
        pipe.transformer.unfuse_qkv_projections()
        assert apart(shares(pipe, name).items, before.items) < 1e-6
    pipe = tiny.build("sd3")
    pipe.transformer.fuse_qkv_projections()  # its norms never run then, and queries are those before them
    assert shares(pipe, "sd3").stored > 0
    pipe = tiny.build("flux")
    block = pipe.transformer.single_transformer_blocks[3].attn
    with tiny.seeded(5):
        block.to_v = Adapted(block.to_v)
    assert editor_of("flux", pipe).attention()[-1].taps["v"].module is block.to_v
    adapted = shares(pipe)
    with torch.no_grad():
        block.to_v.base_layer.weight += block.to_v.lora.weight
    block.to_v = block.to_v.base_layer
    assert apart(adapted.items, shares(pipe).items) < 1e-4 < apart(adapted.items, before.items)


def test_networks_that_wait_in_memory_of_the_host_are_called_by_their_hooks():
    """Hooks of accelerate, module by module as sequential offload has them and on the whole network."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    pipe = tiny.build("flux")
    wanted = shares(pipe).items
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert next(pipe.transformer.parameters()).is_meta  # none there unless a hook brings it
    assert torch.equal(shares(pipe).items, wanted)
    remove_hook_from_module(pipe.transformer, recurse=True)
    pipe = tiny.build("flux")
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = [component._hf_hook for component in (pipe.text_encoder, pipe.transformer, pipe.vae)]
    assert torch.equal(shares(pipe).items, wanted)
    editor = editor_of("flux", pipe, "pixels")
    pictures = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(editor.encode(pictures), editor_of("flux", items="pixels").encode(pictures))
    after = [component._hf_hook for component in (pipe.text_encoder, pipe.transformer, pipe.vae)]
    # set anew whenever texts or pictures are through, so that no network stays beside the next one
    assert all(a is not b for a, b in zip(hooks, after, strict=True))


def test_states_stay_in_float32_where_the_network_computes_in_bfloat16():
    pipe = tiny.build("flux", torch.bfloat16)
    editor, x = editor_of("flux", pipe), state_of("flux", tiny.latents("flux", 0))
    prompt = editor.prompt("a cat", guidance=2.0)
    assert prompt.condition.prompted["prompt_embeds"].dtype == torch.bfloat16
    times = editor.times(6, x)
    found = Walk(editor, prompt, times).solve(Euler(), x, True)
    wanted = x
    for t, s in pairwise(times.flip(0)):
        told_now = prompt.condition.prompted
        v = pipe.transformer(
            hidden_states=latents_of("flux", wanted).bfloat16(),
            timestep=(1000 * t).bfloat16()[None] / 1000,
            guidance=torch.tensor([2.0]),
            pooled_projections=told_now["pooled_prompt_embeds"],
            encoder_hidden_states=told_now["prompt_embeds"],
            txt_ids=torch.zeros(24, 3, dtype=torch.bfloat16),
            img_ids=pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.bfloat16),
        ).sample
        wanted = wanted + float(s - t) * state_of("flux", v).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert not torch.equal(found, found.bfloat16().float())
    pictures = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert of_pipeline(pipe, "pixels", max_sequence_length=24).encode(pictures).dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["flux", pytest.param("sd3", marks=pytest.mark.slow), pytest.param("wan", marks=pytest.mark.slow)]
)
def test_rf_solver_returns_where_eulers_method_does_not(name):
    """From items that the flow makes through noise and back, at 40 evaluations: an order of magnitude and more."""
    editor = editor_of(name)
    prompt, z = editor.prompt("a cat"), state_of(name, tiny.latents(name, 0))
    x = Walk(editor, prompt, editor.times(8, z)).solve(Euler(), z, True)
    errors = [
        apart(invert(editor, x, prompt, method=method, noise=SeedNoise([0])).reconstruction, x)
        for method in (Vanilla(20), RFEdit(10, None))
    ]
    assert errors[1] < errors[0] / 15


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines as users have them on their disks, saved when they are asked for."""
    home = tmp_path_factory.mktemp("pipelines")
    level = numpy.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
    Image.fromarray(level).save(home / "photo.png")
    clip = [Image.fromarray(level).rotate(30 * k).resize((16, 16), Image.Resampling.NEAREST) for k in range(5)]
    clip[0].save(home / "clip.gif", save_all=True, append_images=clip[1:])
    return lambda name: str(home / name if (home / name).exists() else tiny.save(name, home / name))


def command(capsys, *words):
    """The status, the last line and the errors of `python sample.py`."""
    status = sample([*map(str, words)])
    said = capsys.readouterr()
    return status, said.out.strip().split("\n"), said.err


def test_saved_folders_are_loaded_and_photographs_edited(folders, capsys, tmp_path):
    """Ten lines of a user, from a folder to a picture; and the same by a command, to the last pixel."""
    editor = of_pipeline(load_pipeline(folders("flux")), max_sequence_length=24)
    photograph = Image.open(folders("photo.png"))
    cat, dog = editor.prompt("a cat", guidance=1), editor.prompt("a dog", guidance=2)
    method, noise = RFEdit(num_steps=15, share=Sharing(steps=2)), SeedNoise([0])
    made = edit(editor, photograph, cat, dog, method=method, noise=noise)
    kept = editor.decode(editor.encode(photograph))[0]
    assert made.items[0].size == (8, 8) and made.items[0].mode == "RGB"
    levels = [numpy.asarray(image, dtype=float) for image in (made.reconstruction[0], made.items[0], kept)]
    assert abs(levels[0] - levels[2]).mean() <= 1 < abs(levels[1] - levels[2]).mean() / 4
    assert made.nfe == 60 and made.stored == 2 * 2 * 2 * 40 * 32 * 4

    out, words = tmp_path / "made", ("--from", "a cat", "--to", "a dog", "edit.max_sequence_length=24")
    status, said, errors = command(
        capsys, "--pipeline", folders("flux"), "--edit", folders("photo.png"), *words, "--out", out
    )
    assert status == 0, errors
    assert f"about {made.stored / 2**30:.3g} GiB in memory of the host" in said[-2] and "60 evaluations" in said[-1]
    told = json.loads((out / "edit.json").read_text())
    assert numpy.array_equal(numpy.asarray(Image.open(out / "edit.png")), numpy.asarray(made.items[0]))
    assert numpy.array_equal(numpy.asarray(Image.open(out / "source.png")), numpy.asarray(photograph))
    assert (told["nfe"], told["stored_bytes"], told["from"], told["to"]) == (60, made.stored, ["a cat"], ["a dog"])
    assert told["options"]["method"]["num_steps"] == 15 and "Wang et al." in told["setting"]
    assert told["peak_memory_bytes"] > 0 and (out / "strip.png").is_file()
    # how far the autoencoder alone is off hides how well RF-Solver returns
    assert told["reconstruction"]["mse"] == pytest.approx(told["autoencoder"]["mse"], rel=0.1)


def test_precision_seeds_and_guidance_are_those_of_the_command(folders, capsys, tmp_path):
    place = ("--pipeline", folders("flux"), "--edit", folders("photo.png"), "--to", "a dog", "--out", tmp_path / "made")
    short, stored = (*place, "--num-steps", 2, "edit.max_sequence_length=24"), {}
    for dtype in ("float32", "bf16"):
        assert command(capsys, *short, "--dtype", dtype)[0] == 0
        told = json.loads((tmp_path / "made" / "edit.json").read_text())
        assert told["dtype"] == dtype
        stored[dtype] = told["stored_bytes"]
    assert stored["float32"] == 2 * stored["bf16"]
    drawn = ("--method", "flowedit", "edit.method.n_max=2", "--seeds", "0,1", "--batch-size", 2)
    assert command(capsys, *short, *drawn)[0] == 0
    first, second = ((tmp_path / "made" / f"edit-{i}.png").read_bytes() for i in (0, 1))
    assert first != second
    ends = []
    for scale in (1.5, 30):
        assert command(capsys, *short, "edit.negative=a cat", f"edit.true_guidance={scale}")[0] == 0
        ends.append((tmp_path / "made" / "edit.png").read_bytes())
    assert ends[0] != ends[1]


def test_folders_saved_with_our_scheduler_are_loaded(monkeypatch, tmp_path):
    """Where nothing has imported it yet."""
    import genmodels.export.rf_solver as ours

    pipe = copy.copy(tiny.shared("wan"))
    pipe.register_modules(scheduler=ours.RFSolverScheduler.from_config(pipe.scheduler.config))
    pipe.save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "genmodels.export.rf_solver")
    monkeypatch.delattr("genmodels.export.rf_solver")
    assert type(load_pipeline(str(tmp_path)).scheduler).__name__ == "RFSolverScheduler"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_other_families_are_edited_and_inverted_by_the_command(name, folders, capsys, tmp_path):
    item, out = folders("clip.gif" if name == "wan" else "photo.png"), tmp_path / "made"
    own = ["--pipeline", folders(name), "--num-steps", 6, "edit.max_sequence_length=24"]
    status, said, errors = command(
        capsys, *own, "--edit", item, "--from", "a cat", "--to", "a dog", "--seeds", "3,4", "--inject-steps", 1,
        "edit.guidance=3", "--dtype", "bf16", "--out", out,
    )  # fmt: skip
    assert status == 0, errors
    told = json.loads((out / "edit.json").read_text())
    assert told["nfe"] == 24 and told["stored_bytes"] > 0 and told["options"]["guidance"] == 3
    assert f"{told['stored_bytes'] / 2**30 / 2:.3g} GiB" in said[-2]  # of one item at a time
    if name == "wan":
        assert Image.open(out / "edit-1.gif").n_frames > 1
    same = [numpy.asarray(Image.open(out / f"edit-{k}.png")) for k in range(2)]
    assert numpy.array_equal(*same)  # nothing is drawn
    status, said, errors = command(capsys, *own, "--invert", item, "--from", "a cat", "--out", tmp_path / "inverted")
    assert status == 0 and "noise of mean square" in said[-1], errors
    assert numpy.load(tmp_path / "inverted" / "noise.npz")["arr_0"].shape[0] == 1


def test_words_that_do_not_fit_a_pipeline_are_refused(folders, capsys, tmp_path):
    photo, place = folders("photo.png"), ("--pipeline", folders("flux"))
    Image.open(photo).convert("L").save(tmp_path / "grey.png")
    Image.open(photo).resize((9, 8)).save(tmp_path / "odd.png")
    for words, message in [
        ((*place, "--edit", photo), "--to: say what the edits shall show"),
        ((*place, "--edit", tmp_path / "no.png", "--to", "b"), "there is no such picture"),
        ((*place, "--edit", photo, "--to", "b", "--method", "none"), "no EditMethod is called 'none'"),
        (("run", *place, "--edit", photo, "--to", "b"), "choose one; a pipeline stands in place of a run"),
        (("--edit", photo, "--to", "b"), "name the folder of a run, or a pipeline"),
        (("run", "--edit", photo, "--to", "b", "--dtype", "bf16"), "--dtype: is for pipelines"),
        (place, "--pipeline: is for --edit and --invert"),
        ((*place, "--weights", "best", "--edit", photo, "--to", "b"), "--weights: is for runs"),
        (("--pipeline", tmp_path, "--edit", photo, "--to", "b"), "cannot be loaded as a pipeline of diffusers"),
        ((*place, "--edit", tmp_path / "grey.png", "--to", "b"), "mode L, and colour"),
        ((*place, "--edit", tmp_path / "odd.png", "--to", "b"), "8x8 or 10x8.*--resize"),
        ((*place, "--edit", photo, "--to", "b", "--inject-steps", 16), "from 0 to its 15 steps, found 16"),
        ((*place, "--edit", photo, "--to", "b", "edit.negative=c"), "edit.negative has no effect on FluxPipeline"),
        ((*place, "--edit", photo, "--to", "b", "--num-steps", 0), "at least 1 is needed, found 0"),
        ((*place, "--edit", photo, "--to", "b", "--batch-size", -1), "batch_size must be at least 1, found -1"),
        ((*place, "--edit", photo, "--to", "b", "edit.max_sequence_length=0"), "length must be at least 1, found 0"),
    ]:
        status, _, errors = command(capsys, *words, "--out", tmp_path / "made")
        assert status == 2 and re.search(message, errors), errors
        assert not (tmp_path / "made").exists()


def test_sizes_channels_and_forms_that_do_not_fit_are_refused():
    flux, wan = editor_of("flux", items="pil"), editor_of("wan", items="pil")
    grey = Image.new("L", (8, 8))
    for items, message in [
        (torch.rand(1, 3, 9, 8), "8x9 pixels.*height that is one of 2: 8x8 or 8x10.*resize=True makes them 8x8"),
        (torch.rand(1, 1, 8, 8), r"\[B, 3, H, W\].*found \[1, 1, 8, 8\]"),
        (torch.rand(1, 3, 8, 8) * 255, "pixels in \\[0, 1\\] are needed"),
        (torch.full((1, 3, 8, 8), math.nan), "pixels in \\[0, 1\\] are needed"),
        (grey, r'mode L; use picture.convert\("RGB"\)'),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 10))], "one size are needed, found 8x8, 8x10"),
        ("photo.png", "pictures of PIL or a tensor are needed, found str"),
        ([], "no pictures"),
    ]:
        with pytest.raises(ValueError, match=message):
            flux.encode(items)
    with pytest.raises(ValueError, match="4 frames, but the model needs 1 \\+ a multiple of 2: 3 or 5"):
        wan.encode([Image.new("RGB", (16, 16))] * 4)
    with pytest.raises(ValueError, match="one length"):
        wan.encode([[Image.new("RGB", (16, 16))] * 3, [Image.new("RGB", (16, 16))] * 5])
    turned = Image.fromarray(numpy.arange(8 * 10 * 3, dtype=numpy.uint8).reshape(8, 10, 3))
    turned.getexif()[0x0112] = 6  # the camera was turned by a quarter to the left
    assert torch.equal(flux.encode(turned), flux.encode(turned.transpose(Image.Transpose.ROTATE_270)))
    asked = of_pipeline(flux.pipe, "pixels", resize=True)
    assert asked.encode(torch.rand(1, 3, 9, 13)).shape == (1, 1, 8, 12)  # 6.5 pairs are 6
    clip = torch.ones(1, 3, 3, 17, 15) * torch.tensor([0.1, 0.5, 0.9]).reshape(1, 3, 1, 1, 1)
    resized = of_pipeline(wan.pipe, "pixels", resize=True).encode(clip)
    torch.testing.assert_close(resized, wan.encode(clip[..., :16, :1].expand(1, 3, 3, 16, 16)), atol=1e-4, rtol=1e-4)
    latents = editor_of("flux")
    with pytest.raises(ValueError, match=r"latents \[B, 1, H, W\]"):
        latents.encode(torch.rand(1, 4, 8, 8))
    with pytest.raises(ValueError, match="patches"):
        latents.encode(torch.rand(1, 1, 7, 8))


def test_pipelines_and_prompts_that_do_not_fit_are_refused(tmp_path):
    from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    class OtherPipeline(DiffusionPipeline):
        pass

    with pytest.raises(
        ValueError, match=r"OtherPipeline is not supported. Supported are FluxPipeline, StableDiff.*LTX"
    ):
        of_pipeline(OtherPipeline())
    flux = copy.copy(tiny.shared("flux"))
    for scheduler in (DDIMScheduler(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True)):
        flux.scheduler = scheduler
        with pytest.raises(ValueError, match="not that of a rectified flow"):
            of_pipeline(flux)
    inpainting = copy.copy(tiny.shared("flux"))
    inpainting.transformer = copy.deepcopy(inpainting.transformer)
    inpainting.transformer.register_to_config(in_channels=8, out_channels=4)
    with pytest.raises(ValueError, match="takes 8 channels and gives 4"):
        of_pipeline(inpainting)
    with pytest.raises(ValueError, match="offload keeps networks off a GPU"):
        load_pipeline(str(tmp_path), offload=True)
    with pytest.raises(ValueError, match="cannot be loaded as a pipeline of diffusers"):
        load_pipeline(str(tmp_path))
    hunyuan, ltx, sd3 = editor_of("hunyuan_video", items="pil"), editor_of("ltx"), editor_of("sd3")
    with pytest.raises(ValueError, match="no autoencoder"):
        hunyuan.encode(torch.rand(1, 3, 5, 32, 32))
    with pytest.raises(ValueError, match="no autoencoder"):
        hunyuan.decode(torch.rand(1, 4, 2, 4, 4))
    own = tiny.prepared("ltx", 0)
    with pytest.raises(ValueError, match="needs prompt_embeds, prompt_attention_mask, found prompt_embeds"):
        ltx.prepared({"prompt_embeds": own["prompt_embeds"]})
    with pytest.raises(ValueError, match=r"is for models that are told a guidance. Use guidance=2.0"):
        sd3.prompt("a cat", true_guidance=2.0)
    with pytest.raises(ValueError, match="needs a negative prompt"):
        hunyuan.prepared(tiny.prepared("hunyuan_video", 0), true_guidance=2.0)
    with pytest.raises(ValueError, match="two noise levels"):
        ltx.prepared(own, interval=(2.0, 1.0))
    x, t = torch.rand(1, 8, 2, 2, 2), torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs a negative prompt to guide away from, or guidance=1"):
        ltx.velocity(t, x, ltx.prepared(own, guidance=2.0))
    with pytest.raises(ValueError, match="made by `prompt` or `prepared`"):
        ltx.velocity(t, x, ltx.prepared(own)._replace(condition="a cat"))


def test_settings_are_published_ones_or_said_to_be_ours():
    flux, wan = editor_of("flux"), editor_of("wan")
    assert defaults(flux, "rf_edit")[:3] == ({"num_steps": 15, "share": {"steps": 2}}, 1.0, 2.0)
    assert defaults(flux, "rf_edit", style=True).options == {"num_steps": 25, "share": {"steps": 4}}
    assert defaults(editor_of("hunyuan_video"), "rf_edit")[:3] == ({"num_steps": 25, "share": {"steps": 2}}, 1.0, 6.0)
    assert defaults(flux, "flowedit")[:3] == ({"num_steps": 28, "n_max": 24, "n_min": 0}, 1.5, 5.5)
    assert defaults(editor_of("sd3"), "flowedit")[1:3] == (3.5, 13.5)
    assert "ours" in defaults(wan, "rf_edit").origin and defaults(wan, "heun").options == {}
    assert all("et al." in setting.origin or "ours" in setting.origin for setting in SETTINGS.values())
    schnell = copy.copy(tiny.shared("flux"))
    schnell.transformer = copy.deepcopy(schnell.transformer)
    schnell.transformer.register_to_config(guidance_embeds=False)
    with pytest.warns(UserWarning, match="Inversion in 4 steps fails"):
        untold = of_pipeline(schnell)
    assert defaults(untold, "rf_edit").target_guidance == 1


def test_the_way_through_a_scheduler_of_the_stock_pipeline_is_that_of_a_walk():
    """RF-Solver both ways, guided: the pipeline counts evaluations, the walk steps."""
    from genmodels.export.rf_solver import RFSolverScheduler

    for name in FAMILIES:
        pipe, z = copy.copy(tiny.shared(name)), tiny.latents(name, 0, 2)
        editor, x = editor_of(name), state_of(name, z)
        prompt, call = told(editor, name, guidance=2.0)
        solver = RFEdit(3, None).down
        for inversion in (False, True):
            pipe.scheduler = RFSolverScheduler.from_config(tiny.shared(name).scheduler.config, inversion=inversion)
            wanted = state_of(name, stock(pipe, z, call, 3))
            times = of_pipeline(pipe, "latent").times(3, x)  # whichever scheduler the pipeline has
            assert torch.equal(times, editor.times(3, x))
            assert apart(Walk(editor, prompt, times).solve(solver, x, not inversion), wanted) < 1e-5
