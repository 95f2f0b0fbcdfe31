"""Times, labels and vectors as features for networks."""

import math

import torch
from torch import Tensor, nn

from ..types import Shape


class TimeEmbedding(nn.Module):
    """Times (or labels of about their range) as a vector: sines and cosines of many frequencies, two linear layers.

    The phases are formed in float64, because a float32 time would cost the fastest ones three digits. Their frequency
    also bounds how fast a velocity field can change with time, and so the steps that an adaptive solver needs.

    Args:
        width: features out.
        frequencies: number of sine/cosine pairs.
        highest: largest frequency, in periods per unit time; the lowest is 1/4.
    """

    def __init__(self, width: int, frequencies: int = 64, highest: float = 64.0) -> None:
        super().__init__()
        octaves = torch.linspace(math.log(0.25), math.log(highest), frequencies, dtype=torch.float64)
        self.register_buffer("frequency", octaves.exp(), persistent=False)
        self.net = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, batch: int) -> Tensor:
        """[batch, width] from t of shape [] or [batch]."""
        phase = 2 * math.pi * t.double().expand(batch)[:, None] * self.frequency
        return self.net(torch.cat((phase.cos(), phase.sin()), 1).to(self.net[0].weight.dtype))


class ConditionEmbedding(nn.Module):
    """Class labels or vectors as [B, width]; zeros if the network is unconditional.

    Labels 0 … num_classes-1 and the label num_classes, which means "none", each have a row of a table. Vectors (any
    shape, flattened) pass through a linear layer. `None` is the label "none", or the vector 0, in every row; a model
    that drops single vectors owns the one that replaces them, and no parameter here is left without a gradient.
    """

    def __init__(self, width: int, *, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__()
        self.width, self.num_classes, self.condition_shape = width, num_classes, condition_shape
        if num_classes is not None:
            self.table = nn.Embedding(num_classes + 1, width)
            nn.init.normal_(self.table.weight, std=0.02)
        elif condition_shape is not None:
            self.linear = nn.Linear(math.prod(condition_shape), width)

    def forward(self, condition: Tensor | None, batch: int, like: Tensor) -> Tensor:
        """[batch, width] from labels [batch], vectors [batch, *condition_shape], or None.

        Raises:
            ValueError: if a condition is given to an unconditional network, or is of another kind or size.
        """
        if condition is not None:
            self.check(condition, batch)
        if self.num_classes is not None:
            none = torch.full((batch,), self.num_classes, device=like.device)
            return self.table(none if condition is None else condition)
        if self.condition_shape is not None:
            weight = self.linear.weight
            none = weight.new_zeros(batch, weight.shape[1])
            return self.linear(none if condition is None else condition.flatten(1).to(weight.dtype))
        return like.new_zeros(batch, self.width)

    def check(self, condition: Tensor, batch: int) -> None:
        """Raises as `forward`."""
        if self.num_classes is None and self.condition_shape is None:
            raise ValueError(
                "a condition was given to a network that was built without num_classes or condition_shape."
            )
        found = f"found {str(condition.dtype).removeprefix('torch.')} of shape {list(condition.shape)}"
        if self.num_classes is not None:
            if condition.is_floating_point() or condition.shape != (batch,):
                raise ValueError(
                    f"condition: class labels, integers of shape [{batch}], are needed, {found}. Give one number below "
                    f"{self.num_classes} for each item, or build the model for data with such conditions."
                )
        elif condition.ndim < 2 or condition.shape[1:].numel() != math.prod(self.condition_shape):
            wanted = ", ".join(map(str, (batch, *self.condition_shape)))
            raise ValueError(
                f"condition: vectors of shape [{wanted}] are needed, {found}. Give one for each item, or build the "
                "model for data with such conditions."
            )
