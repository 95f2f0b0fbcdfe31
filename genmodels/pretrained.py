"""Models from folders of diffusers: `config.json` and weights as safetensors. Nothing is ever downloaded."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from .registry import ConfigError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INSIDE = "network."  # what wrappers of `genmodels.export` put before the names of weights


def check_folder(path: str, kind: str, where: str) -> dict[str, Any]:
    """The configuration of a folder that holds a model of the class `kind` of diffusers.

    Args:
        where: the component that asks, for messages.
    Raises:
        ConfigError: naming the files that are looked for, or the class that was found.
    """
    folder = Path(path)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        found = sorted(p.name for p in folder.iterdir())[:6] if folder.is_dir() else None
        shown = "there is no such folder" if found is None else f"it holds {', '.join(found) or 'nothing'}"
        inside = [p.parent.name for p in folder.glob(f"*/{CONFIG}")]
        hint = f" Its folders {', '.join(sorted(inside))} hold models; name one." if inside else ""
        raise ConfigError(
            f"{where}.path: {path} lacks {' and '.join(missing)} ({shown}). A folder written by diffusers' "
            f"save_pretrained is needed, with {CONFIG} and {WEIGHTS}; nothing is downloaded.{hint}"
        )
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise ConfigError(f"{where}.path: {folder / CONFIG} is not readable as JSON: {error}.") from None
    config = unwrapped(config) if isinstance(config, dict) else config
    if not isinstance(config, dict) or config.get("_class_name", kind) != kind:
        found = config.get("_class_name") if isinstance(config, dict) else None
        raise ConfigError(f"{where}.path: {folder / CONFIG} describes the class {found}; {kind} is needed.")
    return config


def unwrapped(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the network inside, if it is that of a wrapper of `genmodels.export`; else itself."""
    inside = config.get("unet")
    return inside if isinstance(inside, dict) and "_class_name" in inside else config


def load(path: str, kind: str, where: str) -> nn.Module:
    """The model of a folder in float32, in eval mode; of a wrapper of `genmodels.export` the network inside.

    Raises:
        ConfigError: as `check_folder`, or if the weights cannot be read or do not fit the configuration.
    """
    import diffusers
    import torch
    from safetensors.torch import load_file

    config, cls = check_folder(path, kind, where), getattr(diffusers, kind)
    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        if unwrapped(whole := json.loads((Path(path) / CONFIG).read_bytes())) is whole:
            model = cls.from_pretrained(path, torch_dtype=torch.float32, **options)
        else:
            model = cls.from_config(config)
            parts = load_file(Path(path) / WEIGHTS).items()
            model.load_state_dict({name.removeprefix(INSIDE): part for name, part in parts})
            model.float()
    except Exception as error:
        raise ConfigError(f"{where}.path: {path} cannot be loaded as {kind}: {error}") from error
    return model.eval()
