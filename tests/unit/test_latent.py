"""Latent space: diffusers' own numbers, weights that stay out of a run, and a model trained in it from end to end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genmodels.config import Config
from genmodels.data.dataset import Dataset
from genmodels.data.memory import InMemory
from genmodels.latent import Latent
from genmodels.registry import ConfigError, build, register
from genmodels.rng import SeedNoise, generator
from genmodels.schema import MEMBERS
from genmodels.training.loop import train
from genmodels.training.run import Run
from genmodels.transforms import Transform
from genmodels.types import Batch, NotApplicable
from tests.autoencoders import save, tiny

SHAPE = (3, 8, 12)


def images(n: int, key: str = "images") -> Tensor:
    return torch.randint(256, (n, *SHAPE), generator=generator(key)).float()


def theirs(path: str | None = None) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(path or tiny(), low_cpu_mem_usage=False).eval()


def test_latents_and_images_are_those_of_diffusers():
    x, model = images(5), theirs()
    transform = Latent(tiny(), batch_size=2, shape=SHAPE)
    with torch.no_grad():
        posterior = model.encode(x / 127.5 - 1).latent_dist
        y, log_det = transform(x)
        torch.testing.assert_close(y, 0.7 * (posterior.mean - 0.1), rtol=0, atol=1e-5)
        drawn, _ = transform(x, SeedNoise(5))
        expected = posterior.mean + posterior.std * SeedNoise(5).normal(2, 4, 6)
        torch.testing.assert_close(drawn, 0.7 * (expected - 0.1), rtol=0, atol=1e-5)
        back = model.decode(posterior.mean).sample
    torch.testing.assert_close(transform.inverse(y), (127.5 * (back + 1)).clamp(0, 255), rtol=0, atol=1e-3)
    assert torch.equal(log_det, torch.zeros(5, dtype=torch.float64)) and transform.out_shape(SHAPE) == (2, 4, 6)
    assert (drawn - y).abs().max() > 1e-2


def test_scaling_shift_and_mean_can_be_chosen():
    x, plain = images(3), Latent(tiny(), 1.0, 0.0, shape=SHAPE)
    other = Latent(tiny(), 2.0, -0.5, sample=False, shape=SHAPE)
    torch.testing.assert_close(other(x, SeedNoise(3))[0], 2 * (plain(x)[0] + 0.5))
    torch.testing.assert_close(other.inverse(other(x)[0]), plain.inverse(plain(x)[0]), rtol=0, atol=1e-2)


def test_row_i_depends_on_seed_i_alone():
    x, transform = images(4), Latent(tiny(), shape=SHAPE)
    together, _ = transform(x, SeedNoise([9, 4, 7, 12]))
    alone, _ = transform(x[2:3], SeedNoise([7]))
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-5)


def test_the_autoencoder_is_no_part_of_the_model_but_moves_with_it():
    transform = Latent(tiny(), shape=SHAPE)
    assert list(transform.parameters()) == [] and set(transform.state_dict()) == {"scaling", "shift", "weights"}
    assert not any(p.requires_grad for p in transform.autoencoder.parameters())
    transform.train()
    assert not transform.autoencoder.training
    x = images(2)
    single, _ = transform(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform(x)[0], single)
    double, _ = transform.double()(x.double())
    assert next(transform.autoencoder.parameters()).dtype == torch.float64
    assert 0 < (double - single).abs().max() < 1e-4


def test_images_are_encoded_and_decoded_in_parts():
    seen: list[int] = []
    transform = Latent(tiny(), batch_size=2, shape=SHAPE)
    for part in (transform.autoencoder.encoder, transform.autoencoder.decoder):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    transform.inverse(transform(images(5))[0])
    assert seen == [2, 2, 1] * 2


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({"high": 0.0}, SHAPE, "low < high"),
        ({"scaling": 0.0}, SHAPE, "scaling > 0"),
        ({}, (1, 8, 12), r"images of 3 channels with sides divisible by 2, found items of shape \[1, 8, 12\]"),
        ({}, (3, 8, 9), "divisible by 2"),
        ({"path": "nowhere"}, SHAPE, r"nowhere lacks config.json and diffusion_.* \(there is no"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, shape, message):
    with pytest.raises(ConfigError, match=message):
        build(Transform, {"name": "latent", "path": tiny(), **arguments}, shape=shape)


def test_folders_of_something_else_are_named(tmp_path):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"lacks config.json and .* Its folders model hold models; name one"):
        Latent(str(tmp_path), shape=SHAPE)
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(ConfigError, match="describes the class UNet2DModel; AutoencoderKL is needed"):
        Latent(str(folder), shape=SHAPE)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        Latent(str(folder), shape=SHAPE)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"none")
    with pytest.raises(ConfigError, match="cannot be loaded as AutoencoderKL"):
        Latent(str(folder), shape=SHAPE)


# ---- a model in latent space -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of weights of its own, and a small data set that proposes it."""
    monkeypatch.setitem(MEMBERS, Dataset, dict(MEMBERS[Dataset]))
    path = Path(shutil.copytree(tiny(), tmp_path / "autoencoder"))

    @register(Dataset, "latent_images")
    class Images(InMemory):
        """Random images."""

        shape, levels, bin_width = SHAPE, 256, 1.0

        def __init__(self) -> None:
            self.transform = {"name": "latent", "path": str(path)}
            for split in ("train", "val", "test"):
                self.hold(split, Batch(images(24, split)))

    return path


DIFFUSION = {"name": "diffusion", "network": {"name": "unet", "channels": 8, "multipliers": [1, 2], "blocks": 1}}
COUPLING = {
    "name": "coupling",
    "map": "affine",
    "network": {"name": "unet", "channels": 8, "multipliers": [1], "blocks": 1},
}
FLOW = {"name": "flow", "layers": [COUPLING, {**COUPLING, "swap": True}]}


def configuration(model: dict, **settings: object) -> Config:
    short = {"steps": 2, "batch_size": 8, "ema": [{"name": "constant"}], "sample_every": 2, "eval_every": 2}
    sample = {"num_steps": 3} if model is DIFFUSION else {}
    return Config({"name": "latent", "data": "latent_images", "model": model, "sample": sample,
                   "train": short | settings})  # fmt: skip


@pytest.mark.parametrize("model", [DIFFUSION, FLOW], ids=["diffusion", "flow"])
def test_a_model_is_trained_in_latent_space_and_samples_images(model, folder, tmp_path):
    run = train(configuration(model, precision="bf16"), root=tmp_path / "runs", quiet=True)
    model = run.load()
    assert model.model_shape == (2, 4, 6) and not any("autoencoder" in name for name in model.state_dict())
    options = run.config.options("sample")
    together, alone = model.sample([3, 5, 8], **options), model.sample([5], **options)
    assert together.shape == (3, *SHAPE) and 0 <= together.min() < together.max() <= 255
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=0.05)
    with pytest.raises(NotApplicable, match="no log-determinant"):
        model.likelihood(images(2))
    with pytest.raises(ValueError, match=r"built for \[B, 3, 8, 12\]"):
        model.encode(torch.zeros(2, 2, 4, 6))
    assert model.encode(images(2)).shape == (2, 2, 4, 6)
    logs = model.loss(Batch(images(2)), generator=generator("loss")).logs
    assert "bits_per_dim" not in logs, "a density of latents is none of images"


def test_other_weights_in_the_folder_are_refused_by_a_checkpoint(folder, tmp_path):
    run = train(configuration(DIFFUSION), root=tmp_path / "runs", quiet=True)
    before = run.load().sample(2, num_steps=2)
    config = (folder / "config.json").read_text()
    save(folder, seed=1)
    assert (folder / "config.json").read_text() == config
    with pytest.raises(ConfigError, match=r"latent\.path: .*safetensors has the SHA-256 .* Put those weights back"):
        Run.open(run.path).load()
    save(folder, seed=0)
    assert torch.equal(Run.open(run.path).load().sample(2, num_steps=2), before)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"lacks config\.json"):
        Run.open(run.path).load()
