"""What a step of training costs: memory, operations and time by part, measured on a few steps that leave no trace."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..config import Config
from ..data.dataset import Dataset
from ..data.stream import Passes, check_batch, indices, share, stream
from ..rng import fold, generator
from ..types import Batch, Loss
from . import processes
from .ema import WeightAverage
from .step import Step

PARTS = ("data", "forward", "backward", "update")


class TimedStep(Step):
    """A step that adds up the seconds of its parts; on a GPU each part waits until its work is done."""

    def __init__(self, config: Config, dataset: Dataset, accelerator: Any) -> None:
        torch.manual_seed(fold(config.seed, "init"))
        super().__init__(config, config.model(dataset.facts()), accelerator)
        self.dataset, self.config = dataset, config
        self.seconds = dict.fromkeys(PARTS, 0.0)
        # A flow's first layers are initialised from data; a set that is read whole for it would take its time here.
        first = next(iter(Passes(dataset, config.train.batch_size, self.model.device)))
        self.model.prepare([first], generator=generator(config.seed, "prepare"))
        self.start({rule.label: WeightAverage(rule, self.model) for rule in config.train.ema})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self._now()
        with torch.profiler.record_function(name):
            yield
        self.seconds[name] += self._now() - began

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def forward(self, step: int, part: int, batch: Batch) -> Loss:
        with self.part("forward"):
            return super().forward(step, part, batch)

    def backward(self, value: Tensor) -> None:
        with self.part("backward"):
            super().backward(value)

    def update(self, step: int, loss: Tensor) -> tuple[Tensor, str | None]:
        with self.part("update"):
            return super().update(step, loss)

    def run(self, start: int, stop: int) -> float:
        """The seconds of the steps start … stop-1, loading included."""
        s, pin = self.settings, self.model.device.type == "cuda"
        batches = stream(self.dataset, self.seed, s.batch_size, start, stop, 0, 1, s.accumulate, s.workers, pin)
        began = self._now()
        for step in range(start, stop):
            with self.part("data"):
                _, parts = next(batches)
            self(step, parts)
        return self._now() - began


def timed_step(config: Config) -> TimedStep:
    """The step of a configuration on fresh weights, in this process alone.

    Raises:
        ConfigError: if `train` would refuse the batch size, or cannot compile the model.
    """
    dataset, s = config.dataset(), config.train
    if s.steps:
        check_batch(s.batch_size, 1, s.accumulate, dataset.size("train"))
    return TimedStep(config, dataset, processes.join())


class Memory(NamedTuple):
    """Bytes that training holds, by what they are for.

    Args:
        saved: what a forward pass keeps for the backward pass, of one micro-batch.
        peak: measured on a GPU; on a CPU it is the sum of the others, without what single operations need.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    saved: int
    peak: int


def memory_of(step: TimedStep) -> Memory:
    """After at least one step: what is held, and the peak of one more forward and backward pass."""
    model, cuda = step.model, step.model.device.type == "cuda"
    batch = first_batch(step)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    saved: dict[tuple[int, int], int] = {}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def note(x: Tensor) -> Tensor:
        store = x.untyped_storage()
        if store.data_ptr() not in own:
            saved[store.data_ptr(), store.nbytes()] = store.nbytes()
        return x

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = Step.forward(step, 0, 0, batch).value.mean()
    if loss.requires_grad:
        loss.backward()
    model.zero_grad(set_to_none=True)
    weights = sum(map(_bytes, [*model.parameters(), *model.buffers()]))
    gradients = sum(map(_bytes, step.parameters))
    states = step.optimizer.state.values() if step.optimizer is not None else ()
    optimizer = sum(_bytes(v) for state in states for v in state.values() if isinstance(v, Tensor))
    averages = sum(_bytes(v) for average in step.averages.values() for v in average.tensors.values())
    held = (weights, gradients, optimizer, averages, sum(saved.values()))
    return Memory(*held, torch.cuda.max_memory_allocated() if cuda else sum(held))


def flops_of(step: TimedStep) -> tuple[int, int]:
    """Floating-point operations of one item: of the loss, and of the loss with its gradient.

    Matrix products, convolutions and attention are counted, two for a multiply-add; the rest is not.
    """
    batch = first_batch(step)
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            loss = Step.forward(step, 0, 0, batch).value.mean()
            if backward and loss.requires_grad:
                loss.backward()
        counts.append(counter.get_total_flops() // len(batch))
    step.model.zero_grad(set_to_none=True)
    return counts[0], counts[1]


def first_batch(step: TimedStep) -> Batch:
    """The first micro-batch of the run; of a model that is not trained, at most all items."""
    s, size = step.settings, step.dataset.size("train")
    rows = indices(step.seed, 0, s.batch_size if s.steps else min(s.batch_size, size), size)
    return step.dataset.take("train", share(rows, 0, 1, 0, s.accumulate)).to(step.model.device)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
