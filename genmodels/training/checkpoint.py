"""Checkpoints: safetensors and JSON, written whole or not at all, verified before they are read.

A checkpoint is a folder `<step>` with one safetensors file per set of tensors (`model`, one per average of the weights,
`optimizer`) and `state.json`: the step, the clock, and size and SHA-256 of every file. It is written under a temporary name
and renamed when complete. No pickle is involved in either direction.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = 1
Tensors = dict[str, Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or does not fit the model."""


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Tensors, header: Mapping[str, str]) -> None:
    """A safetensors file; tensors that share memory (tied weights) are stored once, their other names in the header."""
    kept: Tensors = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, value in tensors.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = value.detach().to("cpu").contiguous()
    save_file(kept, path, metadata={**header, "aliases": json.dumps(aliases)})
    _sync(path)


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, aliases resolved, and its header."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for alias, name in json.loads(header.get("aliases", "{}")).items():
        tensors[alias] = tensors[name]
    return tensors, header


def folder_of(root: Path, step: int) -> Path:
    return root / f"{step:08d}"


def steps_in(root: Path) -> list[int]:
    """The steps of which a checkpoint folder exists, ascending."""
    return sorted(int(p.name) for p in root.glob("[0-9]*") if p.is_dir() and p.name.isdigit())


def save(
    root: Path, sets: Mapping[str, Tensors], state: Mapping[str, Any], header: Mapping[str, str], keep: int
) -> Path:
    """Write the checkpoint of `state["step"]`, point `latest` to it, and remove all but the newest `keep`.

    Raises:
        OSError: if the disk is full; earlier checkpoints are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = root / f".writing-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        for name, tensors in sets.items():
            write_tensors(temporary / f"{name}.safetensors", tensors, header)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
        write_text(temporary / "state.json", json.dumps({"format": FORMAT, **state, "files": files}, indent=1))
        final = folder_of(root, state["step"])
        if final.exists():  # a damaged folder of the same step: a sound one would have been resumed from
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(root)
    write_text(root / "latest", final.name)
    for step in steps_in(root)[:-keep]:
        shutil.rmtree(folder_of(root, step))
    return final


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint, after every file was checked against it.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or altered.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'state.json'} cannot be read: {error}") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {state.get('format')}; this version reads format {FORMAT}."
        )
    for name, wanted in state["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != wanted["bytes"]:
            raise CheckpointError(f"{path} has {found or 'no'} bytes, {wanted['bytes']} were written.")
        if _sha256(path) != wanted["sha256"]:
            raise CheckpointError(f"{path} was altered after it was written (its checksum differs).")
    return state


def newest(root: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest sound checkpoint, its state, and what was wrong with newer ones; None if there is no checkpoint at all.

    Raises:
        CheckpointError: if there are checkpoints and all are damaged.
    """
    problems: list[str] = []
    for step in reversed(steps_in(root)):
        try:
            return folder_of(root, step), read_state(folder_of(root, step)), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("every checkpoint is damaged:\n  " + "\n  ".join(problems))
    return None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimiser's state as `exp_avg.<parameter>`, …; hyper-parameters are functions of configuration and step."""
    out: Tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                out[f"{key}.{name}"] = value
    return out


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put the tensors of `optimizer_tensors` back."""
    parameters = dict(model.named_parameters())
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        parameter = parameters[name]
        # Adam keeps its step count on the CPU; moments live beside their parameter.
        optimizer.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)
