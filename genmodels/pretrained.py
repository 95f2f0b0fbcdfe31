"""Models from folders of diffusers: `config.json` and weights as safetensors. Nothing is ever downloaded."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from .registry import ConfigError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


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
    if not isinstance(config, dict) or config.get("_class_name", kind) != kind:
        found = config.get("_class_name") if isinstance(config, dict) else None
        raise ConfigError(f"{where}.path: {folder / CONFIG} describes the class {found}; {kind} is needed.")
    return config


def load(path: str, kind: str, where: str) -> nn.Module:
    """The model of a folder in float32, in eval mode.

    Raises:
        ConfigError: as `check_folder`, or if the weights cannot be read or do not fit the configuration.
    """
    import diffusers
    import torch

    check_folder(path, kind, where)
    try:
        model = getattr(diffusers, kind).from_pretrained(
            path, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
    except Exception as error:
        raise ConfigError(f"{where}.path: {path} cannot be loaded as {kind}: {error}") from error
    return model.eval()
