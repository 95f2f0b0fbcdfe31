"""Editing of items by a diffusion model on the straight path."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..editing.by_inversion import Vanilla
from ..editing.edit import Inversion, edit, invert
from ..editing.editor import Prompt
from ..editing.method import EditMethod
from ..registry import ConfigError
from ..rng import SeedNoise, as_seeds
from ..types import Condition, Edited, Seeds
from .checks import at_least_one
from .grids import Even, TimeGrid
from .guidance import check_guidance

if TYPE_CHECKING:
    from ..editing.own import ModelEditor


class _Part(NamedTuple):
    items: Tensor
    source: Prompt
    target: Prompt
    noise: SeedNoise


class Editable:
    """The capability `SupportsEdit` of a diffusion model; nothing but methods."""

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        *,
        source: Condition | None,
        target: Condition | None,
        seeds: Seeds | None = None,
        method: EditMethod = Vanilla(),
        grid: TimeGrid = Even(),
        guidance: float = 1.0,
        source_guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        reconstruct: bool = True,
        batch_size: int = 256,
    ) -> Edited:
        """Items of one condition turned into such of another.

        Args:
            x: [B, *shape] in data units.
            source: [B, *] what the items are; None for no condition.
            target: [B, *] what they shall be.
            seeds: of what a method draws, one for each item; 0 … B - 1 if None.
            method: how, in how many steps.
            grid: of the times of the steps.
            guidance: on the way under the target; 1 is off.
            source_guidance: on the way under the source. An inversion is undone by the same guidance alone.
            interval: noise levels (low, high) of σ/α within which guidance acts.
            reconstruct: whether to tell what the method makes of the items under their own condition.
            batch_size: how many are edited at once.
        Raises:
            ConfigError: if the model is no rectified flow, or the method does not fit it.
            ValueError: if items, conditions or seeds do not fit, or guidance meets a model without conditions.
        """
        _check(guidance, source_guidance, interval)
        if not self.conditional:
            raise ConfigError("edit: the model knows no conditions, so that there is no target to edit to.")
        editor = self.editor(grid)
        before = Prompt(source, source_guidance, interval)
        parts = _parts(editor, x, before, Prompt(target, guidance, interval), seeds, batch_size)
        made = [
            edit(editor, p.items, p.source, p.target, method=method, noise=p.noise, reconstruct=reconstruct)
            for p in parts
        ]
        return Edited(
            torch.cat([part.items for part in made]),
            torch.cat([part.reconstruction for part in made]) if reconstruct else None,
            None if made[0].noise is None else torch.cat([part.noise for part in made]),
            made[0].nfe,
            sum(part.stored for part in made),
        )

    @torch.no_grad()
    def invert(
        self,
        x: Tensor,
        *,
        source: Condition | None,
        seeds: Seeds | None = None,
        method: EditMethod = Vanilla(),
        grid: TimeGrid = Even(),
        source_guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        batch_size: int = 256,
    ) -> Inversion:
        """The noise [B, *model_shape] of items x [B, *shape], and what the way back makes of it; arguments as `edit`.

        Raises:
            ConfigError, ValueError: as `edit`; and if the method does not invert.
        """
        _check(source_guidance, source_guidance, interval)
        editor, prompt = self.editor(grid), Prompt(source, source_guidance, interval)
        made = [
            invert(editor, p.items, p.source, method=method, noise=p.noise)
            for p in _parts(editor, x, prompt, prompt, seeds, batch_size)
        ]
        noise, back = (torch.cat(parts) for parts in zip(*(part[:2] for part in made), strict=True))
        return Inversion(noise, back, made[0].nfe, sum(part.seconds for part in made))

    def editor(self, grid: TimeGrid = Even()) -> "ModelEditor":
        """What editing methods ask: velocities under prompts, times, and the way between items and model space.

        Raises:
            ConfigError: if the model is no rectified flow.
        """
        from ..editing.own import ModelEditor  # it is made of samplers, whose models have this method

        return ModelEditor(self, grid)


def _check(guidance: float, other: float, interval: tuple[float, float] | None) -> None:
    """Raises ValueError if a number is none, or an interval has no guidance to act on."""
    for scale in (guidance, other):
        check_guidance(scale, None, None, None)
    check_guidance(other if guidance == 1 else guidance, interval, None, None)


def _parts(
    editor: "ModelEditor", x: Tensor, source: Prompt, target: Prompt, seeds: Seeds | None, batch_size: int
) -> Iterator[_Part]:
    """Batches of items with their prompts and noise; one empty one if there are no items."""
    at_least_one("edit", batch_size=batch_size)
    editor.model.check_items(x, "edit")
    seeds = as_seeds(len(x) if seeds is None else seeds)
    if len(seeds) != len(x):
        raise ValueError(f"edit: {len(x)} seeds are needed, one per item, found {len(seeds)}.")
    told = [
        prompt._replace(condition=editor.check(prompt.condition, len(x), prompt.guidance, "edit"))
        for prompt in (source, target)
    ]
    for rows in torch.arange(len(x)).split(batch_size):
        cut = (p._replace(condition=None if p.condition is None else p.condition[rows]) for p in told)
        noise = SeedNoise(seeds[rows], purpose="edit", device=editor.model.device)
        yield _Part(x[rows], *cut, noise)
