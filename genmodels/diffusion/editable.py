"""Editing of items by a diffusion model on the straight path."""

import torch
from torch import Tensor

from ..editing.apply import Inversion
from ..editing.by_inversion import RFEdit
from ..editing.editor import Prompt
from ..editing.method import EditMethod
from ..editing.own import ModelEditor
from ..editing.parts import edit_parts, invert_parts, model_parts
from ..registry import ConfigError
from ..types import Condition, Edited, Seeds
from .grids import Even, TimeGrid
from .guidance import check_guidance


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
        method: EditMethod = RFEdit(),
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
            NotApplicable: if the model is no rectified flow.
            ConfigError: if the method does not fit it.
            ValueError: if items, conditions or seeds do not fit, or guidance meets a model without conditions.
        """
        check_scales(guidance, source_guidance, interval)
        if not self.conditional:
            raise ConfigError("edit: the model knows no conditions, so that there is nothing to edit towards.")
        editor = self.editor(grid)
        prompts = Prompt(source, source_guidance, interval), Prompt(target, guidance, interval)
        parts = model_parts(editor, x, *prompts, seeds, batch_size)
        made = edit_parts(editor, parts, method=method, reconstruct=reconstruct)
        return Edited(made.items, made.reconstruction, made.noise, made.nfe, made.stored)

    @torch.no_grad()
    def invert(
        self,
        x: Tensor,
        *,
        source: Condition | None,
        seeds: Seeds | None = None,
        method: EditMethod = RFEdit(),
        grid: TimeGrid = Even(),
        source_guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        batch_size: int = 256,
    ) -> Inversion:
        """The noise [B, *model_shape] of items x [B, *shape], and what the way back makes of it; arguments as `edit`.

        Raises:
            NotApplicable, ConfigError, ValueError: as `edit`; and if the method does not invert.
        """
        check_scales(source_guidance, source_guidance, interval)
        editor, prompt = self.editor(grid), Prompt(source, source_guidance, interval)
        return invert_parts(editor, model_parts(editor, x, prompt, prompt, seeds, batch_size), method=method)

    def editor(self, grid: TimeGrid = Even()) -> ModelEditor:
        """What editing methods ask: velocities under prompts, times, and the way between items and model space.

        Raises:
            NotApplicable: if the model is no rectified flow.
        """
        return ModelEditor(self, grid)


def check_scales(guidance: float, other: float, interval: tuple[float, float] | None) -> None:
    """Raises ValueError if a number is none, or an interval has no guidance to act on."""
    for scale in (guidance, other):
        check_guidance(scale, None, None, None)
    check_guidance(other if guidance == 1 else guidance, interval, None, None)
