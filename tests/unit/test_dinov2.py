"""DINOv2 as extractor: the rule for its position embeddings, the preparation of images, and how folders are named."""

import json
import math
import shutil
import sys

import pytest
import torch
from torch.nn import functional as F

from genmodels.metrics import dinov2
from genmodels.metrics.dinov2 import MEAN, STD, Dinov2, resize, resize_positions
from genmodels.rng import generator
from tests.unit.test_inception import CPU, Images, noise


def cubic(distance):
    """The cubic convolution kernel with a = -3/4."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def hub_matrix(n, side, offset=0.1):
    """[side, n]: bicubic at the source coordinates (i + 1/2) n / (side + offset) - 1/2, borders repeated."""
    matrix = torch.zeros(side, n, dtype=torch.float64)
    for i in range(side):
        at = (i + 0.5) * n / (side + offset) - 0.5
        for k in range(math.floor(at) - 1, math.floor(at) + 3):
            matrix[i, min(max(k, 0), n - 1)] += cubic(at - k)
    return matrix


@pytest.mark.parametrize(("n", "side"), [(37, 16), (6, 4), (4, 7)])
def test_position_embeddings_follow_the_rule_of_the_authors_loader(n, side):
    positions = torch.randn(1, 1 + n * n, 3, generator=generator("positions"))
    found = resize_positions(positions, side)

    def literally(offset):
        rows = hub_matrix(n, side, offset).float()
        grid = torch.einsum("ih,jw,hwd->ijd", rows, rows, positions[0, 1:].reshape(n, n, 3))
        return torch.cat([positions[0, :1], grid.reshape(-1, 3)])

    assert torch.allclose(found[0], literally(0.1), atol=2e-5)
    assert (found[0] - literally(0.0)).norm() > 0.02 * found.norm()  # dividing by the number of patches itself


def test_a_grid_of_the_right_size_is_left_alone():
    positions = torch.randn(1, 1 + 16 * 16, 3, generator=generator("positions"))
    assert torch.equal(resize_positions(positions, 16), positions)


def test_ways_of_resizing_differ_by_rounding_alone():
    x = torch.randint(0, 256, (2, 3, 300, 260), generator=generator("pictures")).float()
    ours, pillow = resize(x, "torch"), resize(x, "pil")
    assert ours.shape == pillow.shape == (2, 3, 224, 224)
    assert pillow.min() >= 0 and pillow.max() <= 255 and torch.equal(pillow, pillow.round())
    # rounded once per axis and in between: a third of a level on average
    assert (ours.clamp(0, 255) - pillow).abs().mean() < 0.5
    aliased = F.interpolate(x, size=(224, 224), mode="bicubic")
    assert (aliased - pillow).abs().mean() > 10


# ---- the network ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra `hub`)")
    config = transformers.Dinov2Config(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=518, layerscale_value=0.5
    )
    model = transformers.Dinov2Model(config)
    g = generator("dinov2")
    for name, parameter in model.named_parameters():  # sharp attention, so that the class token sees single patches
        scale = 0.4 if parameter.ndim == 2 else 1.0 if "position" in name else 0.05
        parameter.data = torch.randn(parameter.shape, generator=g) * scale + ("norm" in name or "lambda" in name)
    path = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(path)
    return path


@pytest.fixture
def without_weights(tmp_path):
    """A folder that is complete by its names."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "hidden_size": 1024, "patch_size": 14}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def started(folder, **options):
    extract = Dinov2(str(folder), **options)
    extract.start(Images(), CPU)
    return extract


def test_features_are_the_normalised_class_token_under_that_rule(folder):
    """The same network by transformers, given images and position embeddings that are computed here."""
    from transformers import Dinov2Model

    x = noise(3)
    model = Dinov2Model.from_pretrained(folder, local_files_only=True).eval()
    rows, positions = hub_matrix(37, 16).float(), model.embeddings.position_embeddings.data
    grid = torch.einsum("ih,jw,hwd->ijd", rows, rows, positions[0, 1:].reshape(37, 37, -1)).reshape(1, 256, -1)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (MEAN, STD))
    pixels = (F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True) / 255 - mean) / std
    with torch.no_grad():
        plain = model(pixels).last_hidden_state[:, 0]
        model.embeddings.position_embeddings.data = torch.cat([positions[:, :1], grid], 1)
        expected = model(pixels).last_hidden_state[:, 0]
    z = started(folder)(x)
    assert z.shape == (3, 96) and torch.allclose(z, expected, atol=1e-4)
    assert not torch.allclose(z, plain, atol=1e-2)  # transformers' own rule is another
    layer_norm = model.layernorm
    whitened = (z - layer_norm.bias) / layer_norm.weight
    assert whitened.mean(1).abs().max() < 1e-4 and torch.allclose(whitened.var(1, False), torch.ones(3), atol=1e-3)


def test_features_belong_to_their_item_and_resizing_matters(folder):
    x = noise(34)
    extract = started(folder)
    assert torch.allclose(extract(x)[30:34], extract(x[30:34]), atol=1e-4)
    assert not torch.allclose(extract(x[:2]), started(folder, resize="pil")(x[:2]), atol=1e-3)
    grey = noise(2, channels=1)
    three = extract(grey.expand(-1, 3, -1, -1))
    extract.start(Images(channels=1), CPU)
    assert torch.equal(extract(grey), three)


def test_other_weights_in_the_same_folder_are_read_again(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "changing"
    shutil.copytree(folder, path)
    x, file = noise(2), path / "model.safetensors"
    before = started(path)(x)
    save_file({k: v * 1.1 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    assert not torch.allclose(started(path)(x), before, atol=1e-3)


def test_folders_that_transformers_cannot_load(folder, tmp_path):
    path = tmp_path / "cut"
    shutil.copytree(folder, path)
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(ValueError, match="cut cannot be loaded as Dinov2Model"):
        started(path)


def test_weights_that_transformers_would_complete_at_random(folder, tmp_path):
    path = tmp_path / "deeper"
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 3}
    (path / "config.json").write_text(json.dumps(config))
    dinov2.load_network.cache_clear()
    with pytest.raises(ValueError, match=r"do not fit: missing keys, the first is '.*layer\.2\."):
        started(path)


# ---- names ---


def test_identity_is_what_the_numbers_depend_on(without_weights, tmp_path):
    def identity(change=None, **options):
        copy = tmp_path / "copies" / str(len(seen))
        copy.mkdir(parents=True)
        for file in without_weights.glob("*.*"):
            shutil.copyfile(file, copy / file.name)
        if change:
            change(copy)
        seen.append(copy)
        return Dinov2(str(copy), **options).identity

    def configured(**facts):
        def change(copy):
            config = json.loads((copy / "config.json").read_text()) | facts
            (copy / "config.json").write_text(json.dumps(config))

        return change

    seen = []
    first = identity()
    assert identity() == first and "hub-positions:torch-bicubic-224" in first
    assert identity(configured(transformers_version="9")) == first
    others = [
        identity(configured(layer_norm_eps=1e-5)),
        identity(configured(num_attention_heads=8)),
        identity(lambda copy: (copy / "model.safetensors").write_bytes(b"others")),
        identity(resize="pil"),
    ]
    assert len({first, *others}) == 5
    assert Dinov2(str(without_weights)).label == "dinov2-l14" and Dinov2.local == ("path",)
    assert Dinov2(str(without_weights)).frechet_name == "FD-dinov2-l14"


def test_folders_that_hold_something_else(without_weights, tmp_path):
    with pytest.raises(ValueError, match=r"lacks config.json and model.safetensors.*nothing is downloaded"):
        Dinov2(str(tmp_path / "nowhere")).identity  # noqa: B018
    for content, message in (
        ('{"model_type": "vit"}', "the model 'vit'"),
        ('{"model_type": "dinov2", "patch_size": 16}', "patches of 16; 'dinov2' with patches of 14"),
        ("{", "is not JSON"),
    ):
        (without_weights / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Dinov2(str(without_weights)).label  # noqa: B018


def test_a_missing_package_is_named(without_weights, monkeypatch):
    dinov2.load_network.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the package transformers .*pip install 'genmodels\[hub\]'"):
        started(without_weights)
