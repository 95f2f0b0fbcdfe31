"""Editors of pipelines against the stock pipelines of diffusers: same times, velocities, prompts and pictures."""

import copy
import math

import numpy
import pytest
import torch
from einops import rearrange
from PIL import Image

from genmodels.editing.by_inversion import RFEdit, Vanilla
from genmodels.editing.edit import edit, invert
from genmodels.editing.editor import Walk
from genmodels.editing.pipelines import SETTINGS, defaults, load_pipeline, of_pipeline, shared_bytes
from genmodels.editing.selection import select
from genmodels.editing.sharing import Sharing
from genmodels.rng import SeedNoise
from genmodels.solvers.rf_solver import RFSolver
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
    assert all(apart(a, b) > 1e-3 for a, b in zip(ends, ends[1:], strict=False))  # guidance does something


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
    source, target = (told(editor, name, text)[0] for text in ("a cat", "a small dog"))
    sharing = Sharing(steps=2, tensors=("q", "v"))
    made = edit(editor, x, source, target, method=RFEdit(3, sharing), noise=SeedNoise([0, 1]), reconstruct=False)
    assert made.stored == shared_bytes(editor, sharing, x, source) > 0
    assert made.nfe == 12
    plain = edit(editor, x, source, target, method=RFEdit(3, None), noise=SeedNoise([0, 1]), reconstruct=False)
    assert apart(made.items, plain.items) > 1e-5  # the stored values were used
