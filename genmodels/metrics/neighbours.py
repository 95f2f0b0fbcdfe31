"""Nearest neighbours and balls around points, exact, from blocks: the matrix of all distances is never held.

Distances come from differences in float64, so that copies are at exactly 0 and ties are ties, whatever the blocks, the
order and the number of threads. Only pairs that matter are computed so: a matrix product, forty times as fast at 2048
features, rules out the others, with a bound on its rounding errors.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BUDGET = 2**23  # float64 numbers in the largest tensor, 64 MiB; a few of them live at once
ROWS, COLUMNS = 1024, 4096  # of one block, or fewer for many features
SPARE = 4  # candidates beyond the k nearest: with them, blocks rarely leave a doubt


def distances(x: Tensor, y: Tensor) -> Tensor:
    """[*, N, M] float64 Euclidean distances; from differences, each pair by itself."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def float64_device(device: torch.device) -> torch.device:
    """The device itself if it has float64 arithmetic, else the CPU."""
    return device if device.type == "cuda" else torch.device("cpu")


def slices(n: int, size: int) -> Iterator[slice]:
    """0 … n in consecutive parts of at most `size`."""
    return (slice(start, min(start + size, n)) for start in range(0, n, max(size, 1)))


def block_size(features: int) -> tuple[int, int]:
    """Rows and columns of a block whose own items, too, keep the budget."""
    return max(1, min(ROWS, BUDGET // features)), max(1, min(COLUMNS, BUDGET // features))


def mean(x: Tensor) -> Tensor:
    """[D] float64 mean of the rows, without a float64 copy of them all."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for rows in slices(len(x), block_size(x.shape[1])[1]):
        total += x[rows].double().sum(0)
    return total / len(x)


def squared_by_product(x: Tensor, y: Tensor) -> Tensor:
    """[N, M] |x|² + |y|² - 2 x·y of float64 rows: fast, and off by rounding errors of the order eps D (|x| + |y|)²."""
    return torch.addmm(y.square().sum(1)[None], x, y.T, alpha=-2).add_(x.square().sum(1)[:, None])


class Block(NamedTuple):
    """The distances between some rows of x and some rows of y.

    Args:
        rows, columns: which.
        x, y: [N, D], [M, D] all rows.
        squared: [r, c] squared distances, in float64, up to the bound.
        bound: [r, 1] how far they may be off, the rounding of `distances` included.
    """

    rows: slice
    columns: slice
    x: Tensor
    y: Tensor
    squared: Tensor
    bound: Tensor

    def within(self, radius: Tensor, inclusive: bool = False) -> Tensor:
        """[r, c] bool: distance < radius (<= if inclusive), exactly; radius [r, 1] or [1, c]."""
        square = radius.square()
        inside = self.squared < square - self.bound
        i, j = ((self.squared <= square + self.bound) & ~inside).nonzero(as_tuple=True)
        limit = radius.expand_as(inside)[i, j]
        for part in slices(len(i), max(1, BUDGET // self.x.shape[1])):
            a, b = i[part], j[part]
            d = _pairs(self.x[a + self.rows.start], self.y[b + self.columns.start, None])[:, 0]
            inside[a, b] = d <= limit[part] if inclusive else d < limit[part]
        return inside


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """[P, K] distances from x [P, D] to y [P, K, D]."""
    return distances(x[:, None], y)[:, 0]


def blocks(x: Tensor, y: Tensor) -> Iterator[Block]:
    """All pairs of rows of x [N, D] and y [M, D], row by row of blocks.

    With centred rows, unit roundoff u and any order of summation, norms and products are off by at most
    (D + 4) u (|x| + |y|)², centring adds 2 u (|x| + |y|)², differences (D + 2) u (|x| + |y|)²; the bound is twice that.
    """
    centre = mean(y)
    height, width = block_size(x.shape[1])
    slack = 2 * (x.shape[1] + 8) * torch.finfo(torch.float64).eps
    for rows in slices(len(x), height):
        left = x[rows].double() - centre
        for columns in slices(len(y), width):
            right = y[columns].double() - centre
            reach = left.square().sum(1, keepdim=True).sqrt() + right.square().sum(1).max().sqrt()
            yield Block(rows, columns, x, y, squared_by_product(left, right), slack * reach.square())


class Neighbours(NamedTuple):
    """Distances [N, k] to the k nearest rows, nearest first, and their numbers [N, k]; of equal ones the first come."""

    distances: Tensor
    indices: Tensor


def neighbours(x: Tensor, y: Tensor, k: int, own: bool = False) -> Neighbours:
    """The k nearest rows of y [M, D] to each row of x [N, D].

    Args:
        own: y is x, and no row is its own neighbour.
    Raises:
        ValueError: if y has too few rows.
    """
    available = len(y) - own
    if not 1 <= k <= available:
        raise ValueError(f"neighbours: k must be from 1 to the {available} items there are to choose from, found {k}.")
    found = [_settle(x, y, near, k, own) for near in _candidates(x, y, min(k + SPARE, available), own)]
    return Neighbours(torch.cat([f.distances for f in found]), torch.cat([f.indices for f in found]))


class _Candidates(NamedTuple):
    """Of a slice of rows: the numbers [r, c] of the seemingly nearest; a squared distance [r] that all others keep."""

    rows: slice
    indices: Tensor
    floor: Tensor


def _candidates(x: Tensor, y: Tensor, count: int, own: bool) -> Iterator[_Candidates]:
    """The running `count` smallest over the columns; the floor is infinite if no others are left."""
    squared, indices, bound = torch.empty(0), torch.empty(0), torch.zeros(())
    for block in blocks(x, y):
        if own:
            _forbid_own(block)
        found = block.squared.topk(min(count, block.squared.shape[1]), 1, largest=False)
        numbers = found.indices + block.columns.start
        if block.columns.start == 0:
            squared, indices, bound = found.values, numbers, block.bound[:, 0]
        else:
            squared, indices = torch.cat([squared, found.values], 1), torch.cat([indices, numbers], 1)
            squared, order = squared.topk(min(count, squared.shape[1]), 1, largest=False)
            indices, bound = indices.gather(1, order), torch.maximum(bound, block.bound[:, 0])
        if block.columns.stop == len(y):
            alone = count == len(y) - own
            floor = torch.full_like(bound, math.inf) if alone else squared[:, -1] - bound
            yield _Candidates(block.rows, indices, floor)


def _forbid_own(block: Block) -> None:
    """A row's distance to itself becomes infinite."""
    own = torch.arange(block.rows.start, block.rows.stop, device=block.squared.device) - block.columns.start
    here = ((own >= 0) & (own < block.squared.shape[1])).nonzero()[:, 0]
    block.squared[here, own[here]] = math.inf


def _settle(x: Tensor, y: Tensor, near: _Candidates, k: int, own: bool) -> Neighbours:
    """The k nearest among the candidates, by exact distances; rows where others may be as near see all of y."""
    left, indices = x[near.rows], near.indices.sort(1).values
    part = max(1, BUDGET // (x.shape[1] * indices.shape[1]))
    d = torch.cat([_pairs(left[some], y[indices[some]]) for some in slices(len(left), part)])
    d, order = d.sort(dim=1, stable=True)
    d, indices = d[:, :k].contiguous(), indices.gather(1, order)[:, :k].contiguous()
    doubtful = (near.floor <= d[:, -1].square()).nonzero()[:, 0]
    for some in slices(len(doubtful), max(1, BUDGET // len(y))):
        chosen = doubtful[some]
        every = _all_distances(left[chosen], y)
        if own:
            every.scatter_(1, (chosen + near.rows.start)[:, None], math.inf)
        sorted_ = every.sort(dim=1, stable=True)
        d[chosen], indices[chosen] = sorted_.values[:, :k], sorted_.indices[:, :k]
    return Neighbours(d, indices)


def _all_distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([distances(x, y[columns]) for columns in slices(len(y), block_size(x.shape[1])[1])], 1)


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [N] from each row of x to the nearest row of y, and its number [N]."""
    found = neighbours(x, y, 1)
    return found.distances[:, 0], found.indices[:, 0]


def radii(x: Tensor, k: int) -> Tensor:
    """[N] distance from each row of x to its k-th nearest other row.

    Raises:
        ValueError: if there are not more than k rows.
    """
    if len(x) <= k:
        raise ValueError(f"neighbours: {k} other items are needed for each item, but there are only {len(x)} in all.")
    return neighbours(x, x, k, own=True).distances[:, -1]
