"""What models between noise and data share: items in model space, conditions, and when gradients are kept."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .conditions import Conditions
from .model import Model
from .networks.network import Network
from .rng import Noise
from .transforms import Transform
from .types import Condition, NotApplicable, Seeds, Shape


class ScoreModel(Model):
    """A network that learns the score (or velocity) of noised items in model space, under conditions if there are any.

    Args:
        conditional: whether the network sees the conditions of the data.
        condition_dropout: share of items whose condition is hidden in training.
        shape, num_classes, condition_shape, transform, bin_width: of the data.
    Attributes:
        model_shape: shape of one item in model space.
        conditions: the conditions of the network.
    Raises:
        ConfigError: unless 0 <= condition_dropout < 1.
    """

    def __init__(
        self,
        conditional: bool,
        condition_dropout: float,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        bin_width: float | None,
    ) -> None:
        super().__init__()
        self.shape, self.bin_width, self.transform = tuple(shape), bin_width, transform
        self.model_shape = transform.out_shape(self.shape)
        told = (num_classes, condition_shape) if conditional else (None, None)
        self.conditions = Conditions(condition_dropout, *told)
        self.conditional = self.conditions.active

    @property
    @abstractmethod
    def network(self) -> Network:
        """What is trained."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters: what the network computes in."""
        return next((p.dtype for p in self.network.parameters()), torch.get_default_dtype())

    def log_prob(
        self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None, **options: Any
    ) -> Tensor:
        """[B] nats: the value of `likelihood`, with its options."""
        return self.likelihood(x, condition=condition, seeds=seeds, **options).value

    def _to_model_space(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """[B, *model_shape] items, and [B] the log-determinant; without noise discrete items lie amid their cells."""
        y, log_det = self.transform(x.to(torch.promote_types(x.dtype, self.dtype)), noise)
        return y.to(self.dtype), log_det

    def _check_volume(self) -> None:
        """Raises NotApplicable if the way to model space is no change of variables."""
        if not self.transform.volume:
            raise NotApplicable("the transform to model space has no log-determinant, so data have no density.")

    @contextmanager
    def _gradients(self, x: Tensor) -> Iterator[None]:
        """Gradients where they are enabled and wanted: else a graph of every step of a solve is kept for nothing."""
        wanted = x.requires_grad or any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            yield
