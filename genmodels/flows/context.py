"""Conditions as the vectors that the layers of other packages take."""

import math

import torch.nn.functional as F
from torch import Tensor

from ..types import Condition, Shape


def context_vectors(
    condition: Condition | None, like: Tensor, num_classes: int | None, condition_shape: Shape | None
) -> Tensor | None:
    """[B, width] in the dtype of `like` [B, *]; None where there are neither classes nor vectors.

    Labels become one-hot, vectors are flattened; the label `num_classes`, which means "none", and no condition at all
    are zeros.
    """
    if num_classes is not None:
        if condition is None:
            return like.new_zeros(len(like), num_classes)
        return F.one_hot(condition, num_classes + 1)[:, :-1].to(like.dtype)
    if condition_shape is not None:
        width = math.prod(condition_shape)
        return like.new_zeros(len(like), width) if condition is None else condition.flatten(1).to(like.dtype)
    return None
