"""Networks that turn a condition into what the layers of a model see, once per call."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..registry import kind
from ..types import Condition, Shape


@kind
class ConditionEncoder(nn.Module, ABC):
    """A network from conditions to features [B, *out_shape].

    Constructors take configuration arguments first; the parent supplies `shape` of one item, `num_classes` and
    `condition_shape` by keyword.

    Attributes:
        out_shape: shape of the features of one condition, without the batch axis.
    """

    out_shape: Shape

    @abstractmethod
    def forward(self, condition: Condition) -> Tensor:
        """[B, *out_shape] from labels [B], or vectors [B, *condition_shape]."""
