"""The one protocol that every family implements: a loss; everything else is a capability (see `types`)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from .registry import kind
from .types import Batch, Loss, Shape


@kind
class Model(nn.Module, ABC):
    """A generative or predictive model.

    Constructors take configuration arguments first; keyword-only arguments without default come from the dataset:
    `shape` of one item, `num_classes`, `condition_shape`, `target_shape`, `transform` (data space -> model space).

    Attributes:
        shape: shape of one item in data units, without the batch axis.
        conditional: True if `sample` and `likelihood` take a condition (labels, embeddings).
        differentiates_twice: True if the loss itself differentiates the network (CNFs, implicit score matching); such
            losses cannot be compiled.
        collects: True if the loss adds what networks charge (see `Network.charges`).
        unused_parameters: True if a loss may leave some parameters without gradient (an expert that no item of the
            batch needs, a part that is not trained yet). Several processes then look for them in every step, which a
            loss whose backward pass itself accumulates into parameters does not allow.
        progress: how far training has come at a step, from 0 before the first to 1 after the last, for losses with a
            schedule (KL warm-up, annealed penalties); 1 outside training, where schedules are at their end.
    """

    shape: Shape
    conditional: bool = False
    progress: float = 1.0
    differentiates_twice: ClassVar[bool] = False
    collects: ClassVar[bool] = False
    unused_parameters: ClassVar[bool] = False

    @abstractmethod
    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        """The training objective of each item; all randomness comes from `generator`."""

    def forward(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        """`loss`: distributed wrappers synchronise gradients through `forward` alone."""
        return self.loss(batch, generator=generator)

    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Set buffers from the data before step 0, on one process; returns scalars to log.

        Standardisation, data-dependent initialisation, closed-form fits. What it computes must live in buffers or
        parameters that the constructor allocated, so that a checkpoint loads strictly.

        Args:
            batches: one pass over the training data in a fixed order; iterating again starts a new pass.
        """
        return {}

    def portray(self, folder: Path) -> list[Path]:
        """Let parts that can (a schedule found from the data) write pictures of what `prepare` found; their paths.

        Args:
            folder: of the run, made if there are any.
        """
        able = [part for part in self.modules() if part is not self and hasattr(part, "portray")]
        return [path for part in able for path in part.portray(folder)]

    @property
    def device(self) -> torch.device:
        """Where the model's parameters and buffers live (the CPU if it has none)."""
        return next((p.device for p in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def check_items(self, x: Tensor, where: str, shape: Shape | None = None) -> None:
        """Raises ValueError unless x is [B, *shape], of items in data units if no shape is given."""
        shape = self.shape if shape is None else shape
        if tuple(x.shape[1:]) != tuple(shape) or x.ndim == 0:
            wanted = ", ".join(["B", *map(str, shape)])
            raise ValueError(
                f"{where}: x has shape {list(x.shape)}, but this model was built for [{wanted}]. "
                "Add the batch axis, or rebuild the model for the other shape."
            )


def check_labels(condition: Tensor, num_classes: int | None, where: str) -> None:
    """Raises ValueError if a class label is outside 0 … num_classes, the last of which means "no label"."""
    if num_classes is None or condition.is_floating_point() or condition.numel() == 0:
        return
    low, high = condition.min().item(), condition.max().item()
    if low < 0 or high > num_classes:
        raise ValueError(
            f"{where}: the condition holds the class {low if low < 0 else high}, but there are only {num_classes} "
            f"classes, 0 … {num_classes - 1} ({num_classes} stands for no class)."
        )
