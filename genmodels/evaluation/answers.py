"""The three questions that a model is asked, once per protocol: draw samples, score items, predict.

Items are visited in batches of fixed seeds, so several processes can each take every world-th batch; what metrics
gather from them only adds up.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..metrics.cost import count_evaluations
from ..model import Model
from ..rng import generator
from ..sampling import to_device
from ..types import (
    Batch,
    Condition,
    Likelihood,
    NotApplicable,
    Samples,
    SupportsLogProb,
    SupportsPredict,
    SupportsSample,
)
from .protocol import Protocol

QUESTIONS = {"sample": SupportsSample, "likelihood": SupportsLogProb, "predict": SupportsPredict}
Answer = tuple[Samples, Batch | None]
Progress = Callable[[str, int, int], None]


@dataclass
class Bill:
    """What a question has cost so far: items, seconds, and evaluations summed over items."""

    items: int = 0
    seconds: float = 0.0
    evaluations: float = 0.0


@dataclass(frozen=True)
class Interview:
    """A model and everything needed to question it.

    Args:
        model: in eval mode, on its device.
        protocol: says what is asked.
        options: keyword arguments of `sample`, `likelihood` and `predict` by question.
        progress: told (question, items done, items in all) after every batch.
    """

    model: Model
    protocol: Protocol
    options: dict[str, dict[str, Any]]
    progress: Progress | None = None
    bills: dict[str, Bill] = field(default_factory=dict)

    @property
    def dataset(self) -> Dataset:
        return self.protocol.dataset

    def ask(self, question: str, block: int = 0) -> Iterator[Answer]:
        """The answers to a question, batch by batch.

        Raises:
            NotApplicable: if the model cannot answer in its configuration.
            ValueError: if an answer has the wrong shape.
        """
        answers = {"sample": self._samples, "likelihood": self._likelihoods, "predict": self._predictions}
        bill = self.bills.setdefault(question, Bill())
        total = self._count(question)
        for done, (samples, batch) in answers[question](block):
            bill.items += len(samples.seeds)
            bill.seconds += samples.seconds
            bill.evaluations += samples.nfe * len(samples.seeds)
            yield samples, batch
            if self.progress is not None:
                self.progress(question, done, total)

    def _count(self, question: str) -> int:
        if question == "sample":
            return self.protocol.sample.num_items
        asked = getattr(self.protocol, question)
        size = self.dataset.size(asked.split)
        return min(size, asked.num_items or size)

    def _rows(self, question: str) -> Iterator[Tensor]:
        """The indices of the items of a split, in batches."""
        rows = torch.arange(self._count(question))
        if len(rows) == 0:
            raise NotApplicable(f"the split '{getattr(self.protocol, question).split}' of the protocol's data is empty")
        yield from rows.split(getattr(self.protocol, question).batch_size)

    def _samples(self, block: int) -> Iterator[tuple[int, Answer]]:
        asked, done = self.protocol.sample, 0
        for seeds in (block * asked.num_items + torch.arange(asked.num_items)).split(asked.batch_size):
            condition = conditions(self.model, self.dataset, seeds, asked.labels)
            with self._measured(len(seeds)) as cost, torch.no_grad():
                given = to_device(condition, self.model.device)
                x = self.model.sample(seeds, condition=given, **self.options["sample"]).detach()
            if tuple(x.shape) != (len(seeds), *self.dataset.shape):
                raise ValueError(
                    f"sample: the model answered {len(seeds)} seeds with shape {list(x.shape)}; "
                    f"[{len(seeds)}, {', '.join(map(str, self.dataset.shape))}] is needed."
                )
            done += len(seeds)
            yield done, (Samples(seeds, x=x.cpu(), condition=condition, **cost), None)

    def _likelihoods(self, block: int) -> Iterator[tuple[int, Answer]]:
        asked, done = self.protocol.likelihood, 0
        size = self.dataset.size(asked.split)
        for rows in self._rows("likelihood"):
            batch = self.dataset.take(asked.split, rows)
            moved = batch.to(self.model.device)
            condition = moved.condition if self.model.conditional else None
            draws = []
            with self._measured(len(rows)) as cost, torch.no_grad():
                for k in range(asked.draws):  # draw k of item i has the seed i + k·size
                    seeds, options = rows + k * size, self.options["likelihood"]
                    draws.append(self.model.likelihood(moved.x, condition=condition, seeds=seeds, **options))
            for draw in draws:
                _check_length("likelihood", draw.value, len(rows))
            done += len(rows)
            yield done, (Samples(rows, condition=batch.condition, likelihood=mean_over_draws(draws), **cost), batch)

    def _predictions(self, block: int) -> Iterator[tuple[int, Answer]]:
        asked, done = self.protocol.predict, 0
        for rows in self._rows("predict"):
            batch = self.dataset.take(asked.split, rows)
            with self._measured(len(rows)) as cost, torch.no_grad():
                prediction = self.model.predict(batch.to(self.model.device), seeds=rows, **self.options["predict"])
            _check_length("predict", prediction, len(rows))
            done += len(rows)
            yield done, (Samples(rows, prediction=prediction.detach().cpu(), **cost), batch)

    @contextmanager
    def _measured(self, items: int) -> Iterator[dict[str, float]]:
        """Fills a dictionary with the seconds of the block and its network evaluations per item."""
        cost: dict[str, float] = {}
        with count_evaluations(self.model) as counted:
            began = self._now()
            yield cost
            cost |= {"seconds": self._now() - began, "nfe": counted.per_item(items)}

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def conditions(model: Model, dataset: Dataset, seeds: Tensor, policy: str) -> Condition | None:
    """What the sample of each seed is drawn given, by the protocol's policy; None for models that take no condition.

    Raises:
        NotApplicable: if the model needs a condition and the data have none.
    """
    if not model.conditional:
        return None
    split = "train" if policy == "train-marginal" else "test"
    size = dataset.size(split)
    order = torch.randperm(size, generator=generator("labels")) if policy == "train-marginal" else torch.arange(size)
    condition = dataset.take(split, order[seeds % size]).condition if size else None
    if condition is None:
        raise NotApplicable("the model needs a condition, and the items of the protocol's data have none")
    return condition


def mean_over_draws(draws: list[Likelihood]) -> Likelihood:
    """The mean of several estimates of log p of the same items, on the CPU; a mean of bounds is a bound."""
    value = torch.stack([draw.value.detach().double().cpu() for draw in draws]).mean(0)
    if any(draw.stderr is None for draw in draws):
        return Likelihood(value, draws[0].kind)
    squares = torch.stack([draw.stderr.detach().double().cpu() ** 2 for draw in draws])
    return Likelihood(value, draws[0].kind, (squares.sum(0) / len(draws) ** 2).sqrt())


def _check_length(question: str, value: Tensor, items: int) -> None:
    if value.ndim == 0 or len(value) != items:
        raise ValueError(f"{question}: the model answered {items} items with a tensor of shape {list(value.shape)}.")
