"""Small irregular series and networks with known solutions, for tests of continuous-depth models."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genmodels.networks.network import Network
from genmodels.rng import BatchNoise, generator
from genmodels.types import Batch

POINTS, CHANNELS, ASKED = 7, 2, 5


def irregular(n: int = 6, *, channels: int = CHANNELS, classes: int | None = None, dtype: torch.dtype = torch.float64):
    """Noise at irregular times 3 … 5 of each item's own, 60 % observed channel by channel, with values or labels asked.

    Item i has its last i % 3 points unobserved, and item 1 a whole point in the middle.
    """
    noise = BatchNoise(n, generator=generator("irregular", n))
    times = 3 + 2 * noise.uniform(POINTS).double().sort(1).values
    asked = 3 + 2 * noise.uniform(ASKED).double().sort(1).values
    mask = noise.uniform(POINTS, channels) < 0.6
    mask[:, 0, 0] = True
    for i in range(n):
        mask[i, POINTS - i % 3 :] = False
    mask[1 : min(n, 2), 3] = False
    x = noise.normal(POINTS, channels, dtype=dtype) * mask
    if classes is not None:
        return Batch(x, times=times, mask=mask, target=torch.arange(n) % classes)
    y, counts = noise.normal(ASKED, channels, dtype=dtype), noise.uniform(ASKED, channels) < 0.8
    return Batch(x, times=times, mask=mask, target=y * counts, target_times=asked, target_mask=counts)


class LinearField(Network):
    """f(z) = A z, or g(z) = C z."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())
        self.in_shape, self.out_shape = (matrix.shape[1],), (matrix.shape[0],)

    def forward(self, t: Tensor | None, x: Tensor, condition: None = None) -> Tensor:
        return x @ self.matrix.T


def linear(matrix: list[list[float]] | Tensor) -> Callable[..., Network]:
    """The builder of a linear field."""
    return lambda **sizes: LinearField(torch.as_tensor(matrix, dtype=torch.float32))
