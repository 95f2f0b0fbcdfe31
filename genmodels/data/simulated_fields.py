"""Fields on a torus that are simulated: the splits, drawn when an item is first asked for."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ..hashing import digest
from ..registry import ConfigError
from ..transforms import Transform
from ..types import Batch
from .dataset import Split, proposal
from .memory import InMemory, Items

BLOCK = 2**22  # sites that are drawn together


class SimulatedFields(InMemory):
    """Periodic fields [1, H, W], whose splits are independent draws; nothing is drawn before an item is asked for.

    Subclasses call `plan` with what their configuration says, and say what decides the fields and how they are drawn.

    Attributes:
        counts: items of each split.
        version: of the simulation: another one gives other items under the same arguments.
    """

    periodic = True
    version: ClassVar[int] = 1

    def plan(
        self, shape: tuple[int, int], count: int, reference: int, transform: Callable[..., Transform] | None
    ) -> None:
        """`count` training items, a fifth as many for validation, `reference` test items, one standardisation.

        Raises:
            ConfigError: unless there are 5 training items and 1 test item at least.
        """
        for name, given, least in (("count", count, 5), ("reference", reference, 1)):
            if given < least:
                raise ConfigError(f"data '{self.registered_name}': {name} must be at least {least}, found {given}.")
        self.shape = (1, *shape)
        self.counts: dict[Split, int] = {"train": count, "val": count // 5, "test": reference}
        self.transform = proposal(transform, {"name": "standardize_channels"})

    @property
    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """The arguments that decide the fields, beside how many there are."""

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the recipe, the version and the counts.

        Contents do not count: the last bits of a simulation differ between processors, and those of a chain grow, so
        that the same law and seed would have another hash on another machine. Nothing is simulated for it either.
        """
        facts = {"data": self.registered_name, "version": self.version, "shape": list(self.shape)}
        return digest(facts | {"items": self.counts, "recipe": self.recipe})

    @abstractmethod
    def draw(self, split: Split) -> Tensor:
        """[N, H, W] the fields of a split."""

    def size(self, split: Split) -> int:
        return self.counts[split]

    def _held(self, split: Split) -> tuple[Items, bool]:
        if split not in self.__dict__.get("_splits", {}):
            self.hold(split, Batch(self.draw(split).float().unsqueeze(1)))
        return super()._held(split)


def sides(size: int | tuple[int, int], where: str) -> tuple[int, int]:
    """Height and width of a field.

    Raises:
        ConfigError: if one is below 2.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 2:
        raise ConfigError(f"{where}: size must be at least 2 sites (or [height, width]), found {size}.")
    return height, width


def frequencies(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[H, 1] and [1, W] float64 waves along each axis, from -n/2 to n/2, in the order of the FFT."""
    rows, columns = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in shape)
    return rows.reshape(-1, 1), columns.reshape(1, -1)


def stationary(spectrum: Tensor, count: int, source: Generator) -> Tensor:
    """[N, H, W] float64 Gaussian fields of mean 0 with E|x̂_k|²/(H W) = P_k, by filtering white noise.

    The mean of P over modes is then the variance of a site.

    Args:
        spectrum: P [H, W] >= 0 in the order of the FFT, even under k → -k.
    """
    root, shape = spectrum.sqrt(), spectrum.shape
    parts = torch.arange(count).split(max(1, BLOCK // math.prod(shape)))
    noise = (torch.randn(len(part), *shape, generator=source, dtype=torch.float64) for part in parts)
    half = root[:, : shape[1] // 2 + 1]
    return torch.cat([torch.fft.irfft2(torch.fft.rfft2(white) * half, s=shape) for white in noise])
