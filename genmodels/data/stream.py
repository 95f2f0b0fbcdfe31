"""The training stream: which items a step sees is a function of the seed and the step, so nothing needs saving."""

import signal
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..registry import ConfigError
from ..rng import generator
from ..types import Batch
from .dataset import Dataset


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "data", epoch))


def check_batch(batch_size: int, world: int, accumulate: int, size: int) -> None:
    """Raises ConfigError if a batch is larger than the data or cannot be divided over processes and micro-batches."""
    if not 1 <= batch_size <= size:
        raise ConfigError(
            f"train.batch_size: a batch of {batch_size} items was asked of a training split of {size}. "
            f"Set train.batch_size to at least 1 and at most {size}."
        )
    if batch_size % (world * accumulate):
        raise ConfigError(
            f"train.batch_size: {batch_size} items cannot be divided equally over {world} "
            f"process{'es' if world > 1 else ''} times {accumulate} micro-batches. "
            f"Make train.batch_size a multiple of {world * accumulate}, or change train.accumulate."
        )


def indices(seed: int, step: int, batch_size: int, size: int) -> Tensor:
    """The items [batch_size] int64 of one step over all processes.

    Item j of a run is perm_e[j mod size] with the epoch e = j div size and perm_e a permutation drawn from (seed, e);
    step k owns the items k·batch_size … (k + 1)·batch_size - 1. Every epoch covers the data exactly once; a batch may
    end one epoch and begin the next.

    Args:
        step: counts from 0.
        size: number of training items.
    Raises:
        ConfigError: if a batch is larger than the data.
    """
    check_batch(batch_size, 1, 1, size)
    epoch, first = divmod(step * batch_size, size)
    head = _permutation(seed, epoch, size)[first : first + batch_size]
    return torch.cat((head, _permutation(seed, epoch + 1, size)[: batch_size - len(head)]))


def share(rows: Tensor, rank: int, world: int, part: int = 0, parts: int = 1) -> Tensor:
    """The items of one process in one micro-batch.

    Micro-batch `part` is the part-th of `parts` equal runs of the rows, of which process `rank` takes every world-th:
    what all processes together see in a micro-batch does not depend on their number.

    Raises:
        ConfigError: if the rows cannot be divided equally.
    """
    check_batch(len(rows), world, parts, len(rows))
    return rows.reshape(parts, -1)[part, rank::world]


class _Steps(TorchDataset):
    """Step k as the micro-batches of one process. An error of the data is an item: in a worker process it would come
    back buried in a traceback."""

    def __init__(self, dataset: Dataset, seed: int, batch_size: int, rank: int, world: int, accumulate: int) -> None:
        self.dataset, self.seed, self.batch_size = dataset, seed, batch_size
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __getitem__(self, step: int) -> list[Batch] | Exception:
        rows = indices(self.seed, step, self.batch_size, self.dataset.size("train"))
        parts = [share(rows, self.rank, self.world, part, self.accumulate) for part in range(self.accumulate)]
        try:
            return [self.dataset.take("train", part) for part in parts]
        except (ValueError, OSError) as error:
            return error


def stream(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[tuple[int, list[Batch]]]:
    """The steps start … stop-1, each with the micro-batches of this process.

    Args:
        batch_size: items per step over all processes and micro-batches.
        accumulate: micro-batches per step.
        workers: processes that take items ahead of the step, two steps each; the items are the same for any number.
        pin: whether batches lie in pinned memory, from which a GPU copies without waiting.
    Raises:
        ConfigError: if a batch is larger than the training split or cannot be divided equally.
        ValueError, OSError: what the data set raised.
    """
    check_batch(batch_size, world, accumulate, dataset.size("train"))
    loader = DataLoader(
        _Steps(dataset, seed, batch_size, rank, world, accumulate),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_parent,
        generator=generator(seed, "loader"),  # the loader draws a number from it; the run's own state stays untouched
    )
    for step, batches in zip(range(start, stop), loader, strict=True):
        if isinstance(batches, Exception):
            raise batches
        yield step, batches


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach the whole process group: training decides when its workers end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Passes:
    """The training data in a fixed order, on a device; each iteration is a new pass."""

    def __init__(self, dataset: Dataset, batch_size: int, device: torch.device) -> None:
        self.dataset, self.batch_size, self.device = dataset, batch_size, device

    def __iter__(self) -> Iterator[Batch]:
        return (batch.to(self.device) for batch in self.dataset.batches("train", self.batch_size))
