"""What an answer costs: parameters, network evaluations, seconds."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..networks.network import networks
from ..registry import register
from ..types import Batch, Estimate, Samples, SupportsLogProb, SupportsPredict, SupportsSample
from .metric import Metric, Subject


class Evaluations:
    """Rows that passed through each outermost network of a model."""

    def __init__(self, count: int) -> None:
        self.rows = [0] * count

    def per_item(self, items: int) -> float:
        """Evaluations on the path of one item: rows over items, of the network that was used most.

        Guidance doubles it, Heun's method costs two per step, rejected steps count; coupling layers with a network each
        are passed once.
        """
        return max(self.rows, default=0) / items


@contextmanager
def count_evaluations(model: nn.Module) -> Iterator[Evaluations]:
    """Count the forward evaluations of a model's networks inside the block; backward passes are not counted."""
    found = networks(model)
    counted = Evaluations(len(found))

    def counter(k: int) -> Any:
        def count(module: nn.Module, inputs: tuple, output: Any) -> None:
            counted.rows[k] += output.shape[0]

        return count

    handles = [network.register_forward_hook(counter(k)) for k, network in enumerate(found)]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def num_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, tied ones counted once."""
    storages = {
        (p.untyped_storage().data_ptr(), p.storage_offset(), p.shape): p.numel()
        for p in model.parameters()
        if p.numel() and (p.requires_grad or not trainable)
    }
    return sum(storages.values())


@register(Metric, "cost")
class Cost(Metric):
    """Network evaluations and seconds per item of a model's first capability, and its number of parameters.

    Seconds are the median over batches of wall time over items: they describe one machine and one batch size, and rank
    nothing.
    """

    requires = (SupportsSample, SupportsLogProb, SupportsPredict)

    def start(self, subject: Subject) -> None:
        self.parameters = num_parameters(subject.model)
        self.restart()

    def restart(self) -> None:
        self.batches: list[tuple[int, float, float]] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        self.batches.append((len(samples.seeds), samples.seconds, samples.nfe))

    def compute(self) -> dict[str, Estimate]:
        n = sum(items for items, _, _ in self.batches)
        if n == 0:
            raise ValueError("cost: no answers were taken in.")
        nfe = sum(items * nfe for items, _, nfe in self.batches) / n
        seconds = statistics.median(seconds / items for items, seconds, _ in self.batches)
        return {
            "nfe": Estimate(nfe, None, n, "evaluations/item", "lower", "count"),
            "seconds_per_item": Estimate(seconds, None, n, "seconds/item", "lower", "measured"),
            "parameters": Estimate(float(self.parameters), None, 1, "1", "lower", "count"),
        }
