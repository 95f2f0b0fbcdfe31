"""What editing methods insist on: settings within their ranges, and results that are numbers."""

import torch
from torch import Tensor

from ..registry import ConfigError


def check_range(argument: str, value: float, low: float, high: float, why: str) -> None:
    """Raises ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"edit.method.{argument}: {value!r} is not within {low:g} and {high:g}, {why}.")


def check_steps(num_steps: int) -> None:
    """Raises ConfigError unless there is a step."""
    if num_steps < 1:
        raise ConfigError(f"edit.method.num_steps: at least 1 is needed, found {num_steps}.")


def check_finite(x: Tensor, method: str) -> Tensor:
    """The states themselves.

    Raises:
        ValueError: if one of them is not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"editing: {method} ended in numbers that are not finite. Take more steps, or float32.")
    return x
