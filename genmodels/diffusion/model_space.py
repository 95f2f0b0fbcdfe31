"""The training items as a denoiser sees them."""

from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor

from ..rng import BatchNoise
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
