"""The contract of every network: `(t, x, condition) -> out`, with autocast at its border and nowhere else."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..registry import kind
from ..types import Condition


@kind
class Network(nn.Module, ABC):
    """A neural network from items of `in_shape` to items of `out_shape`.

    Constructors take configuration arguments first; the parent supplies `in_shape`, `out_shape`, `timed` (whether t is
    given), `num_classes` and `condition_shape` by keyword. A condition of class labels may hold the value
    `num_classes`, which stands for "no label"; `condition=None` stands for that in every row.

    Attributes:
        autocast: dtype for the arithmetic inside, None for the parameters' own. Inputs arrive and outputs leave in the
            caller's dtype, so nothing outside the network ever sees reduced precision.
    """

    autocast: torch.dtype | None = None

    def __call__(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        if self.autocast is None:
            return super().__call__(t, x, condition)
        with torch.autocast(x.device.type, dtype=self.autocast):
            return super().__call__(t, x, condition).to(x.dtype)

    @abstractmethod
    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, *out_shape] from t of shape [] or [B] (None if not timed), x [B, *in_shape] and a condition [B, *]."""


def networks(model: nn.Module) -> list[Network]:
    """The outermost networks of a model: not those that are parts of another."""
    found: list[Network] = []

    def visit(module: nn.Module) -> None:
        if isinstance(module, Network):
            found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return list({id(n): n for n in found}.values())


def set_autocast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Make every network of a model compute in `dtype` (None: as its parameters are)."""
    for network in networks(model):
        network.autocast = dtype
