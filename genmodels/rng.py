"""Randomness as a function of keys: training noise of (seed, step), sample i of seed i."""

import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from .types import Seeds


def fold(*keys: int | str) -> int:
    """A 63-bit integer that depends on every key and on their order: blake2b of their representation.

    Raises:
        TypeError: if a key is neither an integer nor a string (1 and 1.0 must not be two streams).
    """
    plain = tuple(key if isinstance(key, str) else int(operator.index(key)) for key in keys)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=8).digest(), "big") >> 1


def generator(*keys: int | str, device: torch.device | str = "cpu") -> Generator:
    """A generator seeded by the keys alone."""
    return Generator(device).manual_seed(fold(*keys))


def as_seeds(seeds: Seeds) -> Tensor:
    """[n] int64: the seeds themselves, or 0 … n-1 for an int n.

    Raises:
        ValueError: if a count or a seed is negative, or if the seeds are not a flat list of integers.
    """
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if seeds < 0:
            raise ValueError(f"seeds: a count must be at least 0, found {seeds}.")
        return torch.arange(seeds)
    try:
        out = torch.as_tensor(seeds if isinstance(seeds, Tensor | str) else list(seeds))
    except (TypeError, ValueError, RuntimeError):
        out = torch.empty(0, 0)
    out = out.to(torch.int64) if out.numel() == 0 else out
    if out.ndim != 1 or out.dtype not in (torch.int64, torch.int32) or (out < 0).any():
        raise ValueError(f"seeds: a count or a flat list of integers >= 0 is needed, found {seeds!r}.")
    return out.to("cpu", torch.int64)


def stream(purpose: str, seed: int) -> int:
    """The 32-bit start of the random stream of a seed.

    Torch's CPU generator reads 32 bits of its seed, so a hash would give some of 50 000 seeds the same stream with
    probability 1/4. This is a bijection of the seed's low 32 bits: no two seeds below 2^32 share a stream.

    Source: Appleby (MurmurHash3), 32-bit finaliser.
    """
    x = (seed ^ fold(purpose, seed >> 32)) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16


class Noise(ABC):
    """A source of random tensors for n items.

    Draws are made in float32 and cast, so a float64 model sees the same noise as a float32 one. A narrower dtype would
    round uniform draws up to 1.
    """

    def __init__(self, n: int, device: torch.device | str) -> None:
        self.n = n
        self.device = torch.device(device)

    @abstractmethod
    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, *shape] standard normal."""

    @abstractmethod
    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, *shape] uniform on [0, 1)."""


class SeedNoise(Noise):
    """Item i is drawn from its own generator, seeded by seeds[i]: the same for every batch size and device.

    The generators run on the CPU, and successive calls continue their streams.

    Args:
        purpose: separates streams that share seeds (a sample's start from a dequantisation, say).
    """

    def __init__(self, seeds: Seeds, *, purpose: str = "sample", device: torch.device | str = "cpu") -> None:
        self.seeds = as_seeds(seeds)
        super().__init__(len(self.seeds), device)
        self.generators = [Generator().manual_seed(stream(purpose, s)) for s in self.seeds.tolist()]

    def _stack(self, draw: Callable[[Tensor, Generator], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.n, *shape)
        for row, g in zip(out, self.generators, strict=True):
            draw(row, g)
        return out.to(self.device, dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._stack(lambda row, g: row.normal_(generator=g), shape, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._stack(lambda row, g: row.uniform_(generator=g), shape, dtype)


class BatchNoise(Noise):
    """One generator for the whole batch (torch's default one if None): fast, for training."""

    def __init__(self, n: int, *, generator: Generator | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__(n, device)
        self.generator = generator
        self.source = generator.device if generator is not None else self.device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.n, *shape, generator=self.generator, device=self.source).to(self.device, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(self.n, *shape, generator=self.generator, device=self.source).to(self.device, dtype)
