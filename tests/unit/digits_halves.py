"""The 1,797 digits in two random halves, one to refer to and one that is fresh, as features and as images."""

import functools

import torch
from torch import Tensor

from genmodels.data.digits import Digits
from genmodels.metrics.features import DigitsFeatures
from genmodels.rng import generator

SPLITS = ("train", "val", "test")


@functools.cache
def _order() -> Tensor:
    return torch.randperm(1797, generator=generator("digits halves"))


def images() -> tuple[Tensor, Tensor]:
    """[898, 1, 8, 8] and [899, 1, 8, 8] levels."""
    return torch.cat([Digits().all(split).x for split in SPLITS])[_order()].split((898, 899))


def classes() -> tuple[Tensor, Tensor]:
    """[898] and [899]."""
    return torch.cat([Digits().labels(split) for split in SPLITS])[_order()].split((898, 899))


def halves() -> tuple[Tensor, Tensor]:
    """[898, 64] and [899, 64] features."""
    first, second = images()
    return features(first), features(second)


def features(x: Tensor) -> Tensor:
    return DigitsFeatures()(x)
