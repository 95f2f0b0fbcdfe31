"""How the rows of one file become training, validation and test items, and what discrete values propose."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..registry import ConfigError
from ..rng import generator
from .dataset import Split, centred

Order = Literal["shuffled", "file"]


def held_out(n: int, val: float, test: float, where: str) -> tuple[int, int]:
    """How many of n items validate and test: n_test = int(test·n), then n_val = int(val·(n - n_test)).

    Args:
        val, test: a share below 1, or a whole number of items.
        where: who asks, for errors.
    Raises:
        ConfigError: if a number is negative or has a fraction, or if nothing is left for training.
    Source: Papamakarios et al. 2017 (Masked Autoregressive Flow), the UCI data sets, with shares 0.1 and 0.1.
    """
    for name, given in (("val", val), ("test", test)):
        if given < 0 or (given >= 1 and given != int(given)):
            raise ConfigError(
                f"{where}: {name} must be a share below 1 (0.1) or a whole number of items (500), found {given:g}."
            )
    n_test = int(test * n) if test < 1 else int(test)
    n_val = int(val * (n - n_test)) if val < 1 else int(val)
    if n_val + n_test >= n:
        raise ConfigError(
            f"{where}: of {n:,} items, val={val:g} takes {n_val:,} and test={test:g} takes {n_test:,}: none is left to "
            "train on. Lower val or test."
        )
    return n_val, n_test


def partition(n: int, val: float, test: float, order: Order, seed: int, where: str) -> dict[Split, Tensor]:
    """The rows of each split: of all rows in their order, or shuffled, the last ones test and those before validate.

    Raises:
        ConfigError: as `held_out`.
    """
    n_val, n_test = held_out(n, val, test, where)
    rows = torch.arange(n) if order == "file" else torch.randperm(n, generator=generator("split", seed))
    return dict(zip(("train", "val", "test"), rows.split([n - n_val - n_test, n_val, n_test]), strict=True))


def proposal_for(levels: int | None, bin_width: float) -> dict[str, Any]:
    """The node of the transform that suits: standardise (levels is None), or `centred`."""
    return {"name": "standardize"} if levels is None else centred(levels, bin_width=bin_width)


def off_levels(x: Tensor, levels: int, bin_width: float) -> Tensor:
    """[B] bool: items with a value that is none of 0, bin_width, …, (levels - 1)·bin_width, to 1e-4 of a width."""
    level = x.flatten(1) / bin_width
    nearest = level.round()
    return ~(((level - nearest).abs() <= 1e-4) & (nearest >= 0) & (nearest < levels)).all(1)


def check_levels(levels: int | None, bin_width: float, where: str) -> None:
    """Raises ConfigError unless there are at least two levels (or None) at a distance above 0."""
    if bin_width <= 0 or (levels is not None and levels < 2):
        raise ConfigError(
            f"{where}: at least 2 levels and a bin_width > 0 are needed, found levels={levels} and "
            f"bin_width={bin_width:g}."
        )
