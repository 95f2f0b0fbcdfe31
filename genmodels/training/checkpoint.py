"""Checkpoints: safetensors and JSON, written whole or not at all, verified before they are read.

A checkpoint is a folder `<step>` with one safetensors file per set of tensors (`model`, one per average of the weights,
`best`, `optimizer`) and `state.json`: the step, the clock, and size and SHA-256 of every file. It is written under a
temporary name and renamed when complete. No pickle is involved in either direction.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import new_folder, sync, write_text
from ..hashing import digest, sha256

FORMAT = 2
Tensors = dict[str, Tensor]
State = dict[str, Any]


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or does not fit the model."""


class NewerFormat(CheckpointError):
    """A checkpoint that a later version of this package wrote: nothing may be written beside it."""


def _from_1(state: State) -> State:
    """Format 1 knew neither how many steps were planned on how many processes, nor the data, nor the best weights."""
    return {**state, "steps": None, "world_size": None, "data": None, "best": None}


# From each older format to the one after it; a checkpoint is brought up to date as it is read, never on disk.
MIGRATIONS: dict[int, Callable[[State], State]] = {1: _from_1}


def write_tensors(path: Path, tensors: Tensors, header: Mapping[str, str]) -> None:
    """A safetensors file; equal views of one memory (tied weights) are stored once, their other names in the header."""
    kept: Tensors = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    memories: set[int] = set()
    for name, value in tensors.items():
        key = _place(name, value)
        if key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        kept[name] = value.detach().to("cpu").contiguous()
        memory = kept[name].untyped_storage().data_ptr()
        if memory in memories:  # another view of a stored tensor: the format takes no overlaps
            kept[name] = kept[name].clone()
        memories.add(memory)
    try:
        save_file(kept, path, metadata={**header, "aliases": json.dumps(aliases)})
    except SafetensorError as error:  # it wraps the error of the file system in a text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None
    sync(path)


def copies(tensors: Tensors) -> Tensors:
    """Copies on the CPU; what is one tensor under several names (tied weights) stays one."""
    made: dict[tuple, Tensor] = {}
    out: Tensors = {}
    for name, value in tensors.items():
        key = _place(name, value)
        made[key] = made[key] if key in made else value.detach().to("cpu", copy=True)
        out[name] = made[key]
    return out


def _place(name: str, value: Tensor) -> tuple:
    """What equal views of one memory have in common."""
    return (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)


def load_weights(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Put a checkpoint's tensors into a model.

    Raises:
        CheckpointError: naming the tensors that do not fit.
    """
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise CheckpointError(
            f"{path} does not fit the model that its configuration builds now: {problems} "
            "The code has changed since; meta.json names the commit that wrote it."
        ) from None


class Match(NamedTuple):
    """What of some tensors fits a model, by name.

    Args:
        loaded: same name and shape.
        missing: the model's own that the tensors lack.
        reshaped: of another shape, as "name [there] -> [here]".
        unused: not in the model.
    """

    loaded: list[str]
    missing: list[str]
    reshaped: list[str]
    unused: list[str]


def load_matching(model: nn.Module, tensors: Tensors) -> Match:
    """Put those tensors into a model that fit it by name and shape; the others of the model stay as they are."""
    own = model.state_dict()
    common = [name for name in own if name in tensors]
    fits = [name for name in common if own[name].shape == tensors[name].shape]
    shapes = [f"{n} {list(tensors[n].shape)} -> {list(own[n].shape)}" for n in common if n not in set(fits)]
    model.load_state_dict({**own, **{name: tensors[name] for name in fits}})
    return Match(fits, [n for n in own if n not in tensors], shapes, [n for n in tensors if n not in own])


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, aliases resolved, and its header."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for alias, name in json.loads(header.get("aliases", "{}")).items():
        tensors[alias] = tensors[name]
    return tensors, header


def read_header(path: Path) -> dict[str, str]:
    """The header of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


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
        OSError: if it cannot be written, for want of space perhaps; earlier checkpoints are untouched.
    """
    final = folder_of(root, state["step"])
    with new_folder(final) as temporary:  # a folder of that step can only be damaged: a sound one would be resumed from
        for name, tensors in sets.items():
            write_tensors(temporary / f"{name}.safetensors", tensors, header)
        facts = {"format": FORMAT, **state, "files": manifest(temporary)}
        write_text(temporary / "state.json", json.dumps({**facts, "digest": digest(facts)}, indent=1))
    write_text(root / "latest", final.name)
    prune(root, keep, state["step"])
    return final


def prune(root: Path, keep: int, sound: int) -> None:
    """Remove all but the newest `keep` checkpoints up to one that is known to be sound.

    Newer ones can only be damaged: they do not count, or the sound one might go in their favour.
    """
    for step in [step for step in steps_in(root) if step <= sound][:-keep]:
        shutil.rmtree(folder_of(root, step))


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a folder."""
    return {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}


def read_state(folder: Path) -> State:
    """The `state.json` of a checkpoint, after every file was checked against it.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or altered.
        NewerFormat: if a later version of this package wrote it.
    """
    path = folder / "state.json"
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    found = state.get("format") if isinstance(state, dict) else None
    found = found if isinstance(found, int) else None
    if found is not None and found > FORMAT:
        raise NewerFormat(
            f"{path} has format {found}: a newer version of genmodels wrote it, and this one reads formats up to "
            f"{FORMAT}. Upgrade genmodels; nothing was changed."
        )
    if found != FORMAT and found not in MIGRATIONS:
        raise CheckpointError(f"{path} has checkpoint format {found}; this version reads formats 1 to {FORMAT}.")
    if found > 1 and state.pop("digest", None) != digest(state):
        raise CheckpointError(f"{path} was altered after it was written (its digest differs).")
    for older in range(found, FORMAT):
        state = MIGRATIONS[older](state)
    if not (isinstance(state.get("files"), dict) and {"step", "samples", "seconds"} <= state.keys()):
        raise CheckpointError(f"{path} is incomplete.")
    if state["step"] != int(folder.name) or "model.safetensors" not in state["files"]:
        raise CheckpointError(f"{path} describes step {state['step']} with {', '.join(state['files']) or 'no files'}.")
    for name, wanted in state["files"].items():
        check_file(folder / name, wanted)
    return state


def check_file(path: Path, wanted: dict[str, Any]) -> None:
    """Raises CheckpointError unless a file is what a `manifest` says of it."""
    try:
        size = path.stat().st_size if path.is_file() else None
        sound = size == wanted["bytes"] and sha256(path) == wanted["sha256"]
    except (OSError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be compared with what was written: {error}.") from None
    if size is None:
        raise CheckpointError(f"{path} is missing.")
    if size != wanted["bytes"]:
        raise CheckpointError(f"{path} has {size:,} bytes, {wanted['bytes']:,} were written.")
    if not sound:
        raise CheckpointError(f"{path} was altered after it was written (its checksum differs).")


def newest(root: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest sound checkpoint, its state, and what was wrong with newer ones; None if there is no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints and all are damaged, with the ways out; NewerFormat if the newest that
            is sound was written by a later version.
    """
    problems: list[str] = []
    for step in reversed(steps_in(root)):
        try:
            return folder_of(root, step), read_state(folder_of(root, step)), problems
        except NewerFormat:
            raise
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"every checkpoint of {root.parent} is damaged:\n  {listed}\nPut a sound copy of one of these folders "
            "back, or start again: the train command with --fresh sets this run aside. Nothing was changed."
        )
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
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        parameter = parameters[name]
        # Moments live beside their parameter; the step count of Adam does so only if its kernel is fused.
        home = parameter.device if key != "step" or fused else torch.device("cpu")
        kept = value.to(home, copy=True)
        if kept.shape == parameter.shape:  # fused kernels go through memory, whose order must be the parameter's
            kept = torch.empty_like(parameter, dtype=kept.dtype, device=home).copy_(kept)
        optimizer.state[parameter][key] = kept
