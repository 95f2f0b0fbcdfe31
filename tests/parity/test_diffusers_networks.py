"""Networks that wrap those of diffusers: their numbers, their folders, their labels and times."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genmodels.networks.network import Network
from genmodels.registry import ConfigError, build
from tests.contracts.test_network import LABELS, SMALL, TIMES, make

UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8, "norm_num_groups": 2, "num_class_embeds": 4,
}  # fmt: skip
DIT = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "num_attention_heads": 2, "attention_head_dim": 8,
    "num_layers": 2, "num_embeds_ada_norm": 3, "norm_num_groups": 1,
}  # fmt: skip
CLASSES = {"diffusers_unet": ("UNet2DModel", UNET), "diffusers_dit": ("DiTTransformer2DModel", DIT)}
both = pytest.mark.parametrize("name", CLASSES)


def theirs(name: str, **options: object) -> nn.Module:
    """A model of diffusers off its initial values, in eval mode."""
    import diffusers

    kind, sizes = CLASSES[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(diffusers, kind)(**sizes | options).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


def ours(name: str, path: Path, **given: object) -> Network:
    sizes = {"in_shape": (3, 8, 8), "out_shape": (3, 8, 8), "timed": True, "num_classes": 3, "condition_shape": None}
    options = {key: value for key, value in given.items() if key not in sizes}
    return build(Network, {"name": name, "path": str(path), **options}, **sizes | given).eval()


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@both
def test_a_folder_gives_the_same_numbers(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path)
    network, x = ours(name, tmp_path), images()
    for t, steps in ((TIMES, 1000 * TIMES), (TIMES[2], (1000 * TIMES[2]).expand(5))):
        assert torch.equal(network(t, x, LABELS), model(x, steps, class_labels=LABELS).sample)
    assert torch.equal(ours(name, tmp_path, time_scale=10.0)(TIMES, x, LABELS), network(TIMES / 100, x, LABELS))
    none = model(x, 1000 * TIMES, class_labels=torch.full((5,), 3)).sample
    assert torch.equal(network(TIMES, x, None), none)
    assert (none - network(TIMES, x, LABELS)).abs().max() > 1e-3


@both
def test_a_new_network_is_theirs_with_the_same_options(name):
    network = make(name, in_shape=(3, 8, 8)).float()
    model = theirs(name)
    found = {key: model.config[key] for key in SMALL[name]}
    assert {key: network.model.config[key] for key in SMALL[name]} == found
    model.load_state_dict(network.model.state_dict())
    x = images()
    assert torch.equal(network(TIMES, x, LABELS), model(x, 1000 * TIMES, class_labels=LABELS).sample)


def test_labels_are_dropped_by_the_model_and_not_by_the_transformer():
    network, x = make("diffusers_dit").double().train(), images().double()
    labels = torch.zeros(5, dtype=torch.long)
    with torch.random.fork_rng():
        draws = []
        for seed in range(20):  # dropped with probability 0.1 each: all would stay by chance once in 37,000 times
            torch.manual_seed(seed)
            draws.append(network(TIMES, x, labels))
    assert all(torch.equal(draw, draws[0]) for draw in draws)


@both
def test_of_mean_and_variance_the_mean_is_used(name, tmp_path):
    model = theirs(name, out_channels=6)
    model.save_pretrained(tmp_path)
    network, x = ours(name, tmp_path), images()
    assert torch.equal(network(TIMES, x, LABELS), model(x, 1000 * TIMES, class_labels=LABELS).sample[:, :3])


@both
def test_folders_that_do_not_fit_are_refused(name, tmp_path):
    theirs(name).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks config\.json and diffusion_pytorch_model\.safetensors"):
        ours(name, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="maps 3 to 3 channels; 1 to 1"):
        ours(name, tmp_path, in_shape=(1, 8, 8), out_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match=r"has rows for 4 labels; 11 \(10 classes and one for no label\)"):
        ours(name, tmp_path, num_classes=10)
    with pytest.raises(ConfigError, match=r"config\.json of that folder decides on dropout"):
        ours(name, tmp_path, dropout=0.1)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks diffusion_pytorch_model\.safetensors \(it holds config\.json\)"):
        ours(name, tmp_path)


def test_a_unet_with_labels_needs_data_with_labels_and_the_other_way_round(tmp_path):
    theirs("diffusers_unet").save_pretrained(tmp_path / "with")
    theirs("diffusers_unet", num_class_embeds=None).save_pretrained(tmp_path / "without")
    with pytest.raises(ConfigError, match="has rows for 4 labels; no labels are"):
        ours("diffusers_unet", tmp_path / "with", num_classes=None)
    with pytest.raises(ConfigError, match=r"has no labels; 4 .* Set model.conditional: false"):
        ours("diffusers_unet", tmp_path / "without")
    with pytest.raises(ConfigError, match="class_embed_type is identity"):
        ours("diffusers_unet", tmp_path / "without", num_classes=None, condition_shape=(4,))
    assert ours("diffusers_unet", tmp_path / "without", num_classes=None)(TIMES, images()).shape == (5, 3, 8, 8)
    with pytest.raises(ConfigError, match="levels need sides divisible by 2, found 7x8"):
        ours("diffusers_unet", tmp_path / "without", num_classes=None, in_shape=(3, 7, 8), out_shape=(3, 7, 8))


def test_transformers_refuse_vectors_and_images_that_are_not_square(tmp_path):
    with pytest.raises(ConfigError, match="square images with sides divisible by 2 are needed, found 8x12"):
        make("diffusers_dit", in_shape=(3, 8, 12))
    with pytest.raises(ConfigError, match="its conditions are class labels"):
        make("diffusers_dit", num_classes=None, condition_shape=(3,))
    theirs("diffusers_dit").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sample_size"] == 8
    larger = ours("diffusers_dit", tmp_path, in_shape=(3, 12, 12), out_shape=(3, 12, 12))
    assert larger(TIMES[:1], torch.zeros(1, 3, 12, 12), LABELS[:1]).shape == (1, 3, 12, 12)


def test_impossible_options_are_told_in_the_words_of_diffusers():
    with pytest.raises(ConfigError, match=r"diffusers_unet: .*down_block_types"):
        make("diffusers_unet", down_block_types=("DownBlock2D",))
