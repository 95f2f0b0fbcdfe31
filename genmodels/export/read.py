"""Models of diffusers as diffusion models here: `python -m genmodels import folder --name x`. Nothing is downloaded."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..commands import guarded
from ..config import Config
from ..data.dataset import context
from ..diffusion.model import DiffusionModel
from ..model import Model
from ..pretrained import unwrapped
from ..registry import ConfigError, build, resolve
from ..training.run import Run
from ..transforms import Transform
from .schedulers import WRAPPERS, Training, read_json, through, training_of

NETWORKS = {"UNet2DModel": "diffusers_unet", "DiTTransformer2DModel": "diffusers_dit"}
PARTS = ("unet", "transformer", "model")  # what pipelines call their network
LEVELS = 256
# 8-bit pixels as such models know them, x/127.5 - 1, with ½ more for the mean of the noise that spreads a level
PIXELS = {
    "name": "compose",
    "parts": [{"name": "dequantize", "levels": LEVELS}, {"name": "affine", "loc": LEVELS / 2, "scale": 127.5}],
}


class Imported(NamedTuple):
    """A model of diffusers in this package, and what a run of it says.

    Args:
        model: in eval mode; it takes and gives 8-bit pixels 0 … 255.
        sample: the section on sampling that draws as the folder's own scheduler does, as far as it is known here: the
            keyword arguments of `model.sample`, resolved but not built.
        tree: of a configuration, not resolved.
        facts: of the data.
    """

    model: DiffusionModel
    sample: dict[str, Any]
    tree: dict[str, Any]
    facts: dict[str, Any]


def from_diffusers(
    folder: str | Path,
    *,
    null_label: bool | None = None,
    image_tokens: int | None = None,
    transform: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Imported:
    """The diffusion model that a pipeline folder holds: its path, prediction, network and labels of time.

    The path of schedulers with a table of ᾱ is that table, exact at its steps (`discrete`); flow-matching schedulers
    have the linear path, those of EDM theirs. A network in a wrapper of this package is taken out of it, and what the
    wrapper says of time and path goes to the model. Clipping and thresholding of x̂ are no part of it and are left out.

    Args:
        folder: with model_index.json, as `save_pretrained` of a pipeline writes it: a UNet2DModel or a
            DiTTransformer2DModel, a scheduler, and for latents an AutoencoderKL.
        null_label: of a U-Net with labels, whether its last row stands for "no label".
        image_tokens: of a shift that depends on the size of images, the tokens of one; for transformers it is known.
        transform: node of the map from data to model space; for 8-bit pixels, or the autoencoder, if not given.
        dtype: of the weights and of all that is computed with them.
    Raises:
        ConfigError: if the folder, a class or a prediction type is not known here, listing those that are.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json", "a pipeline folder")
    part = next((name for name in PARTS if isinstance(index.get(name), list) and index[name][0]), None)
    if part is None or not (folder / "scheduler").is_dir():
        parts = ", ".join(key for key, value in index.items() if isinstance(value, list))
        raise ConfigError(
            f"import: {folder} needs a scheduler and one of {', '.join(PARTS)}; it has {parts or 'none'}."
        )
    config = read_json(folder / part / "config.json", "a network")
    wrapper, config = config, unwrapped(config)
    name = NETWORKS.get(config.get("_class_name", ""))
    if name is None:
        raise ConfigError(
            f"import: {folder / part} holds the class {config.get('_class_name')}; known are {', '.join(NETWORKS)}, "
            f"alone or in {', '.join(WRAPPERS)}."
        )
    training = training_of(folder / "scheduler", _tokens(config) if image_tokens is None else image_tokens)
    training = training if wrapper is config else through(training, wrapper)
    network = {"name": name, "path": str(folder / part), "time_scale": training.time_scale,
               "time_offset": training.time_offset}  # fmt: skip
    num_classes, null = _labels(config, name, null_label)
    if name == "diffusers_unet" and num_classes is not None and not null:
        network["add_null"] = True
    vae = folder / "vae" if index.get("vae", [None])[0] else None
    facts = _facts(config, num_classes, vae, transform)
    node = {
        "name": "diffusion", "network": network, "schedule": training.schedule, "prediction": training.prediction,
        "sigma_data": training.sigma_data, "condition_dropout": 0.1 if null else 0.0,
        "time_condition": training.time_condition,
    }  # fmt: skip
    tree = {"data": "external", "model": node, "sample": training.sample}
    model = build(Model, resolve(Model, node, "model"), **context(facts))
    if training.negated:
        _negate(model)
    model.denoiser.network.to(dtype)
    return Imported(model.eval(), Config({**tree, "name": "import"}).answer("sample"), tree, facts)


def _tokens(config: dict[str, Any]) -> int | None:
    """Tokens of an image for a transformer, None for a U-Net, which has none."""
    patch, size = config.get("patch_size"), config.get("sample_size")
    return None if patch is None or not isinstance(size, int) else (size // patch) ** 2


def _labels(config: dict[str, Any], name: str, null_label: bool | None) -> tuple[int | None, bool]:
    """The number of classes, and whether there is a row for none."""
    if name == "diffusers_dit":
        rows = config.get("num_embeds_ada_norm") or 0
        return (rows or None), True
    rows = config.get("num_class_embeds")
    if rows is not None and null_label is None:
        raise ConfigError(
            f"import: the U-Net has a table of {rows} labels, and its folder does not say whether the last stands for "
            "no label. Say null_label=True (--null-label yes) if it does, or False (no)."
        )
    return (None if rows is None else rows - bool(null_label)), bool(null_label)


def _facts(
    config: dict[str, Any], num_classes: int | None, vae: Path | None, transform: dict[str, Any] | None
) -> dict[str, Any]:
    size = config.get("sample_size")
    if not isinstance(size, int) and not (isinstance(size, list) and len(size) == 2):
        raise ConfigError(f"import: the network's sample_size is {size}; a number or two are needed.")
    channels, sides = config["in_channels"], [size, size] if isinstance(size, int) else list(size)
    node = PIXELS if transform is None else transform
    if vae is not None:
        coder = read_json(vae / "config.json", "an autoencoder")
        unit = 2 ** (len(coder.get("block_out_channels", [64])) - 1)
        channels, sides = coder.get("in_channels", 3), [unit * side for side in sides]
        node = {"name": "latent", "path": str(vae)} if transform is None else transform
    whole = transform is None
    return {
        "shape": [channels, *sides], "num_classes": num_classes, "condition_shape": None, "target_shape": None,
        "bin_width": 1.0 if whole else None, "levels": LEVELS if whole else None, "sample_rate": None,
        "transform": resolve(Transform, node, "transform"),
    }  # fmt: skip


def _negate(model: DiffusionModel) -> None:
    """Change the sign of the answers: EDM's schedulers have two of them, and the prediction "edm" has one."""
    inner = model.denoiser.network.model
    last = inner.conv_out if hasattr(inner, "conv_out") else inner.proj_out_2
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.neg_()


def times_of(scheduler: Any, training: Training) -> torch.Tensor:
    """[L] float64 falling times on the path of what a scheduler of diffusers has laid with `set_timesteps`.

    Where it ends without noise the last is 0. Float labels are taken as they are.
    """
    if training.prediction == "velocity":
        return scheduler.sigmas.double().cpu()
    if training.prediction == "edm":
        from ..diffusion.schedules import Schedule

        levels = scheduler.sigmas.double().cpu()
        times = build(Schedule, training.schedule).time(-2 * levels[levels > 0].log())
        return times
    labels = scheduler.timesteps.double().cpu()
    times = (labels - training.time_offset) / training.time_scale
    stride = scheduler.config.num_train_timesteps // len(labels)
    end = labels[-1] - stride
    last = (end - training.time_offset) / training.time_scale if end >= 0 else labels.new_zeros(())
    if end < 0 and not getattr(scheduler.config, "set_alpha_to_one", True):
        last = (labels.new_zeros(()) - training.time_offset) / training.time_scale
    return torch.cat((times, last[None])) if last < times[-1] else times


def import_run(folder: str | Path, name: str, *, root: str | Path = "runs", **options: Any) -> Run:
    """A run that holds the model of a pipeline folder as its step 0: to be sampled, scored, evaluated, trained further.

    The run needs the folder again wherever it is loaded: its configurations say how the network is made.

    Args:
        options: of `from_diffusers`.
    Raises:
        ConfigError: as `from_diffusers`, or if there is a run of that name.
    """
    found = from_diffusers(folder, **options)
    config = Config({**found.tree, "name": name})
    if (Path(root) / name).exists():
        raise ConfigError(f"import: {Path(root) / name} exists. Choose another name.")
    run = Run.create(config, root)
    state = {"step": 0, "samples": 0, "seconds": 0.0, "steps": config.train.steps, "world_size": 1, "data": None,
             "best": None}  # fmt: skip
    run.save({"model": found.model.state_dict()}, state, found.facts)
    return run


@guarded
def main(argv: Sequence[str]) -> None:
    """Make a run of a model that diffusers wrote, which sample.py and evals.evaluate then serve like any other."""
    parser = argparse.ArgumentParser("genmodels import", description=main.__doc__)
    parser.add_argument("folder", help="a pipeline folder, with model_index.json")
    parser.add_argument("--name", required=True, help="of the run")
    parser.add_argument("--root", default="runs", help="folder of runs (default: runs)")
    parser.add_argument(
        "--null-label", choices=("yes", "no"), help="of a U-Net with labels: whether the last one stands for no label"
    )
    parser.add_argument("--image-tokens", type=int, help="of a shift that depends on the size of images")
    given = parser.parse_args(list(argv))
    null = None if given.null_label is None else given.null_label == "yes"
    run = import_run(given.folder, given.name, root=given.root, null_label=null, image_tokens=given.image_tokens)
    model = run.load()
    count = sum(math.prod(p.shape) for p in model.parameters())
    print(f"{run.path}  ({count:,} parameters, items {list(model.shape)}; python sample.py {run.path} --seeds 0-7)")
    print(json.dumps(run.config.tree["sample"]))
