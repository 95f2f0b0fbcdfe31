"""A diffusion model on the straight path as an editor: its denoiser, its guidance and its grids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.grids import Even, TimeGrid
from ..diffusion.remembered import Remembered
from ..diffusion.reverse import DenoiserRows
from ..diffusion.samplers import Guidance
from ..diffusion.schedules import Linear, Schedule
from ..types import NotApplicable
from .editor import Attention, Editor, Prompt

if TYPE_CHECKING:
    from ..diffusion.model import DiffusionModel


class ModelEditor(Editor):
    """The flow of a diffusion model in its model space; a prompt's condition is that of the model, [B, *] or None.

    Any coupling of items and noise will do: the flow is one between the same laws. With the latents of an autoencoder
    as model space, latents are what is edited.

    Args:
        grid: of the times of the steps, between the ends of the path.
    Raises:
        NotApplicable: if the model is no rectified flow.
    """

    def __init__(self, model: "DiffusionModel", grid: TimeGrid = Even()) -> None:
        check_straight(model.schedule)
        self.model, self.grid = model, grid
        self.span = model.denoiser.t_min, model.denoiser.t_max
        self._guided: dict[tuple, tuple[Denoiser, Remembered]] = {}

    def velocity(self, t: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
        denoiser, known = self._denoiser(prompt)
        condition = self.model.conditions.checked(prompt.condition, len(x), "velocity", guidance=prompt.guidance)
        return DenoiserRows(denoiser, condition, known)(t, x.to(self.model.dtype)).to(x.dtype)

    def times(self, num_steps: int, x: Tensor) -> Tensor:
        return self.grid.times(num_steps, self.model.schedule, self.span)

    def encode(self, items: Tensor) -> Tensor:
        """[B, *model_shape] of items [B, *shape] in data units; discrete ones lie in the middle of their cells."""
        self.model.check_items(items, "edit")
        y, _ = self.model._to_model_space(items.to(self.model.device), None)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def decode(self, x: Tensor) -> Tensor:
        """[B, *shape] in data units, not rounded to levels."""
        return self.model.transform.continuous(x)

    def attention(self) -> Sequence[Attention]:
        return self.model.network.attention()

    def _denoiser(self, prompt: Prompt) -> tuple[Denoiser, Remembered]:
        """The denoiser under the guidance of a prompt, and what is kept of the times at which it was asked."""
        key = prompt.guidance, prompt.interval and tuple(prompt.interval)
        if key not in self._guided:
            interval = None if prompt.guidance == 1 else prompt.interval
            denoiser = Guidance(prompt.guidance, interval).of(self.model)
            self._guided[key] = denoiser, Remembered(denoiser, torch.tensor(self.span, dtype=torch.float64))
        return self._guided[key]

    def checked(self, prompt: Prompt, items: int) -> Prompt:
        """A prompt for so many items whose condition is [B, *], or None for an unconditional model.

        Raises:
            ValueError: if the condition does not fit the model or the items, or the guidance the model.
        """
        self._denoiser(prompt)
        told = self.model.conditions.checked(prompt.condition, items, "edit", guidance=prompt.guidance)
        return prompt._replace(condition=told)


def check_straight(schedule: Schedule) -> None:
    """Raises NotApplicable unless a path is α = 1 - t, σ = t."""
    if not isinstance(schedule, Linear):
        name = getattr(schedule, "registered_name", type(schedule).__name__)
        raise NotApplicable(
            f"edit: the model is not a rectified flow: model.schedule is '{name}'. Train or take one with "
            "model.schedule=linear."
        )
