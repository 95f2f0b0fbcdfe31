"""Edit, invert and reconstruct items by any method: the one way for our models and for pipelines."""

import copy
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError
from ..rng import Noise, SeedNoise
from .editor import Editor, Prompt
from .method import EditMethod


class Edit(NamedTuple):
    """What `edit` made.

    Args:
        items: the edit.
        reconstruction: what the same method makes of the source under its own prompt at equal guidance, with nothing
            shared; None if it was not asked for.
        noise: [B, *latent] where the source was taken at t = 1; None for methods that do not invert.
        nfe: evaluations of the velocity for the edit; a guided one counts once.
        seconds: wall clock, of the edit alone.
        stored: bytes of shared features.
    """

    items: Any
    reconstruction: Any
    noise: Tensor | None
    nfe: int
    seconds: float
    stored: int


@torch.no_grad()
def edit(
    editor: Editor,
    items: Any,
    source: Prompt,
    target: Prompt,
    *,
    method: EditMethod,
    noise: Noise | None = None,
    reconstruct: bool = True,
) -> Edit:
    """Turn items described by the source prompt into such as the target prompt describes.

    Args:
        noise: what methods draw from; None for that of the seeds 0 … B - 1.
    Raises:
        ConfigError, ValueError: if the method does not fit the editor.
    """
    x = editor.encode(items)
    times, noise = _times(editor, method, x), noise or _noise(x)
    same = copy.deepcopy(noise)  # so that edit and reconstruction differ in prompts alone
    began = time.perf_counter()
    made = method.edit(editor, x, source, target, times, noise)
    seconds = time.perf_counter() - began
    again = method.plain().edit(editor, x, source, source, times, same).x if reconstruct else None
    back = None if again is None else editor.decode(again)
    return Edit(editor.decode(made.x), back, made.noise, made.nfe, seconds, made.stored)


class Inversion(NamedTuple):
    """What `invert` made.

    Args:
        noise: [B, *latent] where the items were taken at t = 1.
        reconstruction: items that the way down makes of it under the same prompt.
        nfe: evaluations of the velocity on the way up.
        seconds: wall clock of the way up.
    """

    noise: Tensor
    reconstruction: Any
    nfe: int
    seconds: float


@torch.no_grad()
def invert(editor: Editor, items: Any, source: Prompt, *, method: EditMethod, noise: Noise | None = None) -> Inversion:
    """The noise from which a flow makes items, and what it makes of it; arguments as `edit`.

    Raises:
        ConfigError: if the method does not invert.
    """
    x = editor.encode(items)
    times, noise = _times(editor, method, x), noise or _noise(x)
    same = copy.deepcopy(noise)
    began = time.perf_counter()
    found = method.plain().invert(editor, x, source, times, noise)
    seconds = time.perf_counter() - began
    back = method.plain().edit(editor, x, source, source, times, same)
    return Inversion(found.x, editor.decode(back.x), found.nfe, seconds)


def _times(editor: Editor, method: EditMethod, x: Tensor) -> Tensor:
    if method.num_steps < 1:
        raise ConfigError(f"edit.method.num_steps: at least 1 is needed, found {method.num_steps}.")
    return editor.times(method.num_steps, x)


def _noise(x: Tensor) -> Noise:
    return SeedNoise(len(x), purpose="edit", device=x.device)
