"""Exact posterior means over finitely many items that stream by in batches."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

BLOCK = 2048  # items that are compared at once, whatever the size of the batches
BUDGET = 2**28  # bytes that sums for queries may take; more queries mean more passes


@dataclass(frozen=True)
class Moments:
    """Number, mean and size of items.

    Attributes:
        count: N.
        mean: [D] float64.
        mean_square: E|x|²/D; `variance` is E|x - mean|²/D.
    """

    count: int
    mean: Tensor
    mean_square: float
    variance: float

    @property
    def dims(self) -> int:
        return len(self.mean)

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> "Moments":
        """In two passes over [B, *] items.

        Raises:
            ValueError: if there are fewer than 2 items, or if they are not finite.
        """
        total, count = 0.0, 0
        for x in _blocks(batches):
            total, count = total + x.double().sum(0), count + len(x)
        if count < 2:
            raise ValueError(f"separation: at least 2 items are needed, found {count}.")
        mean = total / count
        if not mean.isfinite().all():
            raise ValueError("separation: some items hold NaN or infinity. Leave them out.")
        spread = sum(float((x.double() - mean).square().sum()) for x in _blocks(batches)) / (count * len(mean))
        square = float(mean.square().mean())
        # the mean of equal items is off by its rounding
        spread = spread if spread > 1e-24 * square else 0.0
        return cls(count, mean, spread + square, spread)

    def covariance(self, batches: Iterable[Tensor]) -> Tensor:
        """[D, D] float64, in a third pass."""
        parts = ((x.double() - self.mean) for x in _blocks(batches))
        return sum(x.mT @ x for x in parts) / self.count


class Drawn(NamedTuple):
    """[M, K] float64 of each query at each ratio, for centred items of unit variance.

    square |x̂|²/D, inner <x, x̂>/D and error |x - x̂|²/D, with x̂ = E[x | y].
    """

    square: Tensor
    inner: Tensor
    error: Tensor


def _blocks(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The items [B, *] as [BLOCK, D] and a rest."""
    held, rows = [], 0
    for x in batches:
        held.append(x.reshape(len(x), math.prod(x.shape[1:])))
        rows += len(x)
        while rows >= BLOCK:
            whole = torch.cat(held)
            yield whole[:BLOCK]
            held, rows = [whole[BLOCK:]], rows - BLOCK
    if rows:
        yield torch.cat(held)


def finite_set(
    batches: Iterable[Tensor],
    moments: Moments,
    ratios: Tensor,
    queries: int,
    leave_one_out: bool,
    dtype: torch.dtype,
    generator: Generator,
) -> Drawn:
    """Posterior means under the law of the items, at y = x_i + z/s for drawn items i and noise z.

    Every item is drawn equally often if there are more queries than items, and otherwise at most once. The weights are
    those of |y - x_j|²/2 s² = |x_i - x_j|²/2 s² + s <z, x_i - x_j> + const: both products serve every ratio.

    Raises:
        ValueError: if there are fewer than 2 queries.
    """
    if queries < 2:
        raise ValueError(f"separation: at least 2 queries are needed for a standard error, found {queries}.")
    n, device = moments.count, moments.mean.device
    times_over = torch.arange(queries) // n
    rows = torch.cat(
        [torch.randperm(n, generator=generator, device=generator.device).cpu() for _ in range(int(times_over[-1]) + 1)]
    )[:queries]
    group = max(1, BUDGET // (len(ratios) * moments.dims * torch.finfo(dtype).bits // 8))
    scale, mean = math.sqrt(moments.variance), moments.mean
    parts = []
    for chosen in rows.split(group):
        x = _items(batches, chosen, moments.dims, device)
        x = ((x - mean) / scale).to(dtype)
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64, device=generator.device).to(x)
        own = chosen.to(device) if leave_one_out else None
        centred = (((block.double() - mean) / scale).to(dtype) for block in _blocks(batches))
        parts.append(_posterior(x, z, centred, ratios.to(x), own))
    return Drawn(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _items(batches: Iterable[Tensor], rows: Tensor, dims: int, device: torch.device) -> Tensor:
    """[M, D] float64: the items of these numbers."""
    found, first = torch.empty(len(rows), dims, dtype=torch.float64, device=device), 0
    for block in _blocks(batches):
        here = (rows >= first) & (rows < first + len(block))
        found[here.to(device)] = block[(rows[here] - first).to(block.device)].double()
        first += len(block)
    return found


def _posterior(x: Tensor, z: Tensor, blocks: Iterable[Tensor], ratios: Tensor, own: Tensor | None) -> Drawn:
    """As softmax over items that come in blocks: sums relative to the largest exponent so far."""
    shape = (len(ratios), len(x))
    top = x.new_full(shape, -math.inf)
    mass, sums = x.new_zeros(shape), x.new_zeros(*shape, x.shape[1])
    length, along, first = x.square().sum(1, keepdim=True), (x * z).sum(1, keepdim=True), 0
    for block in blocks:
        apart = (length + block.square().sum(1) - 2 * x @ block.mT).clamp(min=0) / 2
        lean = along - z @ block.mT
        for k, s in enumerate(ratios):
            exponent = -s * (s * apart + lean)
            if own is not None:
                here = (own >= first) & (own < first + len(block))
                exponent[here, own[here] - first] = -math.inf
            high = torch.maximum(top[k], exponent.amax(1))
            keep, weight = (top[k] - high).exp().nan_to_num(0.0), (exponent - high[:, None]).exp().nan_to_num(0.0)
            mass[k] = mass[k] * keep + weight.sum(1)
            sums[k] = torch.addmm(sums[k] * keep[:, None], weight, block)
            top[k] = high
        first += len(block)
    clean = (sums / mass[..., None]).double()
    parts = (clean.square(), x.double() * clean, (x.double() - clean).square())
    return Drawn(*(part.mean(-1).mT for part in parts))
