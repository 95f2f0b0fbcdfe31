"""Which variables each variable may depend on: orders, graphs, the ranks in which they can be found one after another.

A matrix `depends` [D, D] holds True at (i, j) where what steers variable i may depend on variable j.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import ConfigError


def from_order(order: Sequence[int], where: str) -> Tensor:
    """[D, D] bool: every variable depends on those before it in `order`, a list of all places 0 … D-1.

    Raises:
        ConfigError: if a place is missing, named twice, or does not exist.
    """
    count = len(order)
    if sorted(order) != list(range(count)):
        raise ConfigError(
            f"{where}: the order must name every place 0 … {count - 1} of the {count} variables once, "
            f"found {list(order)}."
        )
    place = torch.tensor(order, dtype=torch.long, device="cpu").argsort()
    return place[:, None] > place


def from_adjacency(adjacency: Sequence[Sequence[int]], count: int, where: str) -> Tensor:
    """[D, D] bool from rows of 0 and 1: row i marks the variables on which variable i may depend.

    The diagonal is ignored (zuko asks for ones there): a variable depends on itself through its own map alone.

    Raises:
        ConfigError: if the matrix is not [D, D] or holds other numbers, and if the graph has a cycle, which is named.
    """
    if len(adjacency) != count or any(len(row) != count or not set(row) <= {0, 1} for row in adjacency):
        raise ConfigError(
            f"{where}: adjacency must have {count} rows of {count} numbers 0 or 1 (row i marks the variables on which "
            f"variable i may depend), found {[list(row) for row in adjacency]}."
        )
    depends = torch.tensor([list(row) for row in adjacency], dtype=torch.bool, device="cpu")
    depends = depends & ~torch.eye(count, dtype=torch.bool, device="cpu")
    cycle = _cycle(depends)
    if cycle:
        raise ConfigError(
            f"{where}: the adjacency has a cycle: variable {' depends on '.join(map(str, cycle))}. Remove one of these "
            "ones, so that the variables can be found one after another."
        )
    return depends


def _cycle(depends: Tensor) -> list[int]:
    """A cycle of the graph as [i, …, i], each place depending on the next; empty if there is none."""
    left = set(range(len(depends)))
    parents = [row.nonzero().flatten().tolist() for row in depends]
    while free := [i for i in left if not left.intersection(parents[i])]:
        left.difference_update(free)
    if not left:
        return []
    path = [min(left)]  # everything left depends on something left, so a walk must return
    while path.count(path[-1]) < 2:
        path.append(min(left.intersection(parents[path[-1]])))
    return path[path.index(path[-1]) :]


def ranks(depends: Tensor) -> Tensor:
    """[D] int64: 0 where a variable depends on none, otherwise one more than the highest rank that it depends on."""
    rank = torch.zeros(len(depends), dtype=torch.long, device="cpu")
    while True:
        longer = torch.where(depends, rank + 1, 0).amax(1)
        if torch.equal(longer, rank):
            return rank
        rank = longer


def times(sets: Tensor, rank: Tensor) -> Tensor:
    """[S] int64: how many ranks must be known before every variable of each set [S, D] is."""
    return torch.where(sets, rank + 1, 0).amax(1)


def distinct(depends: Tensor, empty: bool) -> Tensor:
    """[S, D] bool: the different rows of `depends`, in lexicographic order (of the natural order: by size).

    Args:
        empty: keep the empty set; it is kept anyway where there is no other.
    """
    sets = depends.unique(dim=0)
    return sets if empty or not depends.any() else sets[sets.any(1)]


def contains(larger: Tensor, smaller: Tensor) -> Tensor:
    """[L, S] bool: whether each set of `larger` [L, D] holds all of each of `smaller` [S, D]."""
    return (~larger).float() @ smaller.float().mT == 0
