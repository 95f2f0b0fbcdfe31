"""Items in parts that fit into memory: each is edited or inverted by itself, and what they give is put together."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion.checks import at_least_one
from ..rng import Noise, SeedNoise, as_seeds
from ..types import Seeds
from .apply import Edit, Inversion, edit, invert
from .editor import Editor, Prompt
from .method import EditMethod

if TYPE_CHECKING:
    from .own import ModelEditor


class Part(NamedTuple):
    """Some items, what they are, what they shall be, and what a method draws for them."""

    items: Any
    source: Prompt
    target: Prompt
    noise: Noise


def edit_parts(editor: Editor, parts: Iterable[Part], *, method: EditMethod, reconstruct: bool = True) -> Edit:
    """What `edit` makes of all parts, in their order; nfe is of one item, seconds and bytes are of all.

    Raises:
        ConfigError, ValueError: as `edit`.
    """
    made = [edit(editor, *part[:3], method=method, noise=part.noise, reconstruct=reconstruct) for part in parts]
    items, back, noise = (_joined(values) for values in zip(*(m[:3] for m in made), strict=True))
    return Edit(items, back, noise, made[0].nfe, sum(m.seconds for m in made), sum(m.stored for m in made))


def invert_parts(editor: Editor, parts: Iterable[Part], *, method: EditMethod) -> Inversion:
    """What `invert` makes of all parts under their source prompts, in their order.

    Raises:
        ConfigError, ValueError: as `invert`.
    """
    made = [invert(editor, part.items, part.source, method=method, noise=part.noise) for part in parts]
    noise, back = (_joined(values) for values in zip(*(m[:2] for m in made), strict=True))
    return Inversion(noise, back, made[0].nfe, sum(m.seconds for m in made))


def _joined(values: tuple) -> Any:
    """Tensors along their first axis, lists one after another, None for None."""
    if values[0] is None:
        return None
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]


def model_parts(
    editor: "ModelEditor", x: Tensor, source: Prompt, target: Prompt, seeds: Seeds | None, batch_size: int
) -> Iterator[Part]:
    """Items x [B, *shape] of a model in batches with their rows of both prompts; one empty batch if there are none.

    Args:
        seeds: one for each item; 0 … B - 1 if None.
    Raises:
        ValueError: if items, conditions or seeds do not fit the model or each other, or guidance the model.
    """
    at_least_one("edit", batch_size=batch_size)
    editor.model.check_items(x, "edit")
    seeds = as_seeds(len(x) if seeds is None else seeds)
    if len(seeds) != len(x):
        raise ValueError(f"edit: {len(x)} seeds are needed, one per item, found {len(seeds)}.")
    told = [editor.checked(prompt, len(x)) for prompt in (source, target)]
    for rows in torch.arange(len(x)).split(batch_size):
        cut = (p._replace(condition=None if p.condition is None else p.condition[rows]) for p in told)
        yield Part(x[rows], *cut, SeedNoise(seeds[rows], purpose="edit", device=editor.model.device))
