"""Weights of published networks: found on this machine, hashed, read and checked. Nothing is ever downloaded."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..hashing import sha256

VARIABLE = "GENMODELS_WEIGHTS"
CACHE = Path("~/.cache/genmodels/weights")
OTHERWISE = "Without weights use `features: digits` (8x8 digits) or `features: pixels`."


def find(
    given: str | None,
    files: Mapping[str, str],
    where: str,
    mark: str,
    argument: str = "weights",
    otherwise: str = OTHERWISE,
) -> Path:
    """The file that is given, else the first of some names in the folder $GENMODELS_WEIGHTS, else in the cache.

    Args:
        files: names that are looked for, and where each comes from.
        where: who asks, for messages.
        mark: what the published file is known by.
        argument: that names a file.
        otherwise: what can be done without it.
    Raises:
        ValueError: saying what is needed, where it was looked for, and what to set.
    """
    if given is not None and Path(given).expanduser().is_file():
        return Path(given).expanduser()
    folders = [Path(place).expanduser() for place in (os.environ.get(VARIABLE), CACHE) if place]
    found = [folder / name for folder in folders for name in files if (folder / name).is_file()]
    if given is None and found:
        return found[0]
    looked = f"there is no file {given}" if given is not None else "no weights in " + " or ".join(map(str, folders))
    names = "; ".join(f"{name} ({origin})" for name, origin in files.items())
    raise ValueError(
        f"{where}: {looked}. Needed is one of {names}; {mark}. Nothing is downloaded: put it into a folder and set the "
        f"environment variable {VARIABLE} to that folder, or copy it to {CACHE}, or give `{argument}: <path>`. "
        f"{otherwise}"
    )


def checksum(path: Path) -> str:
    """SHA-256 of a file, read again only when its time or size changes."""
    stat = path.stat()
    return _checksum(path.resolve(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _checksum(path: Path, time: int, size: int) -> str:
    return sha256(path)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of `torch.save` that holds a flat dictionary of them.

    Raises:
        ValueError: if it is neither, or damaged.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged, perhaps a copy that was cut off; its "
            f"SHA-256 is {checksum(path)[:12]}…. Copy the file again."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}; a flat dictionary of tensors is needed.")
    return state


def fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state, if it has exactly the keys and shapes that are wanted.

    Raises:
        ValueError: naming the first key that is missing, unexpected, or of another shape.
    """
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    if missing or unexpected:
        first = f"lacks '{missing[0]}'" if missing else f"has the unexpected '{unexpected[0]}'"
        raise ValueError(
            f"{where} {first} ({len(missing)} keys missing, {len(unexpected)} unexpected): it belongs to another "
            "network."
        )
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            raise ValueError(
                f"{where}: '{key}' has the shape {list(state[key].shape)}, {list(tensor.shape)} is needed: it belongs "
                "to another network."
            )
    return dict(state)
