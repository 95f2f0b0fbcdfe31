"""What a step of training costs: memory, operations and time by part, measured on a few steps that leave no trace."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..data.dataset import Dataset
from ..data.stream import Passes, check_batch, indices, share, stream
from ..operations import count_operations
from ..rng import fold, generator
from ..types import Batch, Loss
from . import processes
from .ema import WeightAverage
from .step import Step

FEW = 2  # items from which memory and operations are told for a batch: both grow with their number
SOME = 8 * FEW  # items that a model is prepared from
PARTS = ("data", "forward", "backward", "update")


class TimedStep(Step):
    """A step that adds up the seconds of its parts; on a GPU each part waits until its work is done."""

    def __init__(self, config: Config, dataset: Dataset, accelerator: Any) -> None:
        torch.manual_seed(fold(config.seed, "init"))
        super().__init__(config, config.model(dataset.facts()), accelerator)
        self.dataset, self.config = dataset, config
        self.seconds = dict.fromkeys(PARTS, 0.0)
        # What is fitted to data before training is fitted to some items here: costs do not depend on its values.
        first = next(iter(Passes(dataset, min(SOME, config.train.batch_size), self.model.device)))
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

    def run(self, start: int, stop: int, items: int | None = None) -> float:
        """The seconds of the steps start … stop-1, loading included.

        Args:
            items: of a batch; None for those of the configuration.
        """
        s, pin = self.settings, self.model.device.type == "cuda"
        size = s.batch_size if items is None else items
        batches = stream(self.dataset, self.seed, size, start, stop, 0, 1, s.accumulate, s.workers, pin)
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


def affordable(step: TimedStep, seconds: float) -> int:
    """How many items of a batch make a step of about so many seconds: all of them where that is not more.

    The step is warm afterwards.
    """
    s = step.settings
    few = min(FEW * s.accumulate, s.batch_size)
    step.run(0, 1, few)
    each = step.run(1, 2, few) / few
    most = int(seconds / each) // s.accumulate * s.accumulate
    return min(s.batch_size, max(few, most))


class Memory(NamedTuple):
    """Bytes that training holds, by what they are for.

    Args:
        saved: what a forward pass keeps for the backward pass, of one micro-batch: by the growth from few items to
            twice as many.
        peak: measured on a GPU; on a CPU it is the sum of the others, without what single operations need.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    saved: int
    peak: int


def memory_of(step: TimedStep) -> Memory:
    """After at least one step: what is held, and on a GPU the peak of one more forward and backward pass."""
    model, batch = step.model, first_batch(step)
    few = min(FEW, len(batch))
    saved = _saved(step, batch[:few])
    if len(batch) > few:
        twice = min(2 * few, len(batch))
        slope = (_saved(step, batch[:twice]) - saved) / (twice - few)
        saved += round(slope * (len(batch) - few))
    weights = sum(map(_bytes, [*model.parameters(), *model.buffers()]))
    gradients = sum(map(_bytes, step.parameters))
    states = step.optimizer.state.values() if step.optimizer is not None else ()
    optimizer = sum(_bytes(v) for state in states for v in state.values() if isinstance(v, Tensor))
    averages = sum(_bytes(v) for average in step.averages.values() for v in average.distinct())
    held = (weights, gradients, optimizer, averages, saved)
    if model.device.type != "cuda":
        return Memory(*held, sum(held))
    torch.cuda.reset_peak_memory_stats()
    _pass(step, batch)
    return Memory(*held, torch.cuda.max_memory_allocated())


def _saved(step: TimedStep, batch: Batch) -> int:
    """Bytes that autograd keeps of the loss of a batch, weights and items of the batch not counted."""
    saved: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in [*step.model.parameters(), *step.model.buffers()]}

    def note(x: Tensor) -> Tensor:
        store = x.untyped_storage()
        if store.data_ptr() not in own:
            saved[store.data_ptr()] = store.nbytes()  # alive until the backward pass: no address serves twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        _pass(step, batch)
    return sum(saved.values())


def _pass(step: TimedStep, batch: Batch) -> None:
    """Forward and backward, without a trace."""
    step.model.train()
    loss = Step.forward(step, 0, 0, batch).value.mean()
    if loss.requires_grad:
        loss.backward()
    step.model.zero_grad(set_to_none=True)


def flops_of(step: TimedStep) -> tuple[int, int]:
    """Floating-point operations of one item: of the loss, and of the loss with its gradient.

    Matrix products, convolutions and attention are counted, two for a multiply-add; the rest is not.
    """
    batch = first_batch(step)[:FEW]
    with count_operations() as forward:
        Step.forward(step, 0, 0, batch)
    with count_operations() as both:
        _pass(step, batch)
    return forward.total // len(batch), both.total // len(batch)


def first_batch(step: TimedStep) -> Batch:
    """The first micro-batch of the run; of a model that is not trained, at most all items."""
    s, size = step.settings, step.dataset.size("train")
    rows = indices(step.seed, 0, s.batch_size if s.steps else min(s.batch_size, size), size)
    return step.dataset.take("train", share(rows, 0, 1, 0, s.accumulate)).to(step.model.device)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
