"""The training items as a denoiser sees them."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Generator, Tensor

from ..model import Model
from ..rng import BatchNoise, Noise
from ..rng import generator as generator_of
from ..transforms import Transform
from ..types import Batch


class InModelSpace:
    """Training items [B, *] in model space, with the same noise (of dequantisation) in every pass.

    Args:
        transform: from data to model space, fitted.
        batches: one pass over the data; iterating again starts a new one.
        generator: gives one number, of which the noise is made.
    """

    def __init__(self, transform: Transform, batches: Iterable[Batch], generator: Generator) -> None:
        self.transform, self.batches = transform, batches
        self.key = int(torch.randint(2**62, (), generator=generator, device=generator.device))

    def __iter__(self) -> Iterator[Tensor]:
        again = generator_of("items in model space", self.key)
        for batch in self.batches:
            noise = BatchNoise(len(batch), generator=again, device=batch.x.device)
            yield self.transform(batch.x.to(torch.promote_types(batch.x.dtype, torch.float32)), noise)[0]


def root_mean_square(
    model: Model, move: Callable[[Tensor, Noise], tuple[Tensor, Tensor]], batches: Iterable[Batch], generator: Generator
) -> float:
    """That of all components of the training items, which `move` takes to the model's space.

    Raises:
        ValueError: if there are no items, or they are 0 everywhere.
    """
    total, count = 0.0, 0
    for batch in batches:
        noise = BatchNoise(len(batch), generator=generator, device=model.device)
        y, _ = move(batch.x.to(model.device), noise)
        total, count = total + float(y.double().square().sum()), count + y.numel()
    if not total > 0:
        raise ValueError(f"{model.registered_name}: the training data are empty, or 0 everywhere in model space.")
    return math.sqrt(total / count)
