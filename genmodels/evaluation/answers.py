"""The questions that a model is asked, once per protocol: draw samples, score items, predict, edit; and their price.

Items are visited in batches of fixed seeds. Of several processes each answers every world-th batch, and the first one
sees all answers in order: what metrics make of them does not depend on how many processes there are.
"""

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..metrics.cost import count_evaluations, peak_memory, reset_peak_memory
from ..metrics.features import FeatureExtractor, to_levels
from ..metrics.likelihood import combine_draws
from ..model import Model
from ..operations import count_operations
from ..rng import generator
from ..sampling import to_device
from ..solvers.solution import SolverError
from ..training import processes
from ..types import (
    Batch,
    Condition,
    Likelihood,
    NotApplicable,
    Samples,
    SupportsEdit,
    SupportsLogProb,
    SupportsPredict,
    SupportsSample,
    expand_like,
)
from .protocol import Protocol

QUESTIONS = {"sample": SupportsSample, "likelihood": SupportsLogProb, "predict": SupportsPredict, "edit": SupportsEdit}
Answer = tuple[Samples, Batch | None]
Progress = Callable[[str, int, int], None]


TIMED = 5  # batches that a median time rests on
PATIENCE = 5.0  # seconds that may be spent on timing what has been answered already
COUNTED = 2  # items whose operations are counted
NAMED = 20  # failed answers that are named


@dataclass
class Bill:
    """What a question has cost so far.

    Attributes:
        items: how many were answered.
        seconds: machine time, summed over processes.
        evaluations: of the network, summed over items.
        timings: seconds per item of each batch.
        flops_per_item: operations of matrix products, convolutions and attention.
        peak_memory: bytes, of the first process.
    """

    items: int = 0
    seconds: float = 0.0
    evaluations: float = 0.0
    timings: list[float] = field(default_factory=list)
    flops_per_item: int | None = None
    peak_memory: int | None = None

    def add(self, samples: Samples) -> None:
        n = len(samples.seeds)
        self.items += n
        self.seconds += samples.seconds
        self.evaluations += samples.nfe * n
        self.timings.append(samples.seconds / n)

    @property
    def nfe(self) -> float:
        return self.evaluations / max(self.items, 1)

    @property
    def seconds_per_item(self) -> float:
        return statistics.median(self.timings)


@dataclass
class Failures:
    """Answers that are not finite: how many of how many, the seeds or item numbers of the first, and what a solver said
    that gave up."""

    items: int = 0
    of: int = 0
    first: list[int] = field(default_factory=list)
    reason: str = ""

    def add(self, samples: Samples, bad: Tensor, reason: str = "") -> None:
        self.reason = self.reason or reason
        self.items += int(bad.sum())
        self.of += len(bad)
        self.first += samples.seeds[bad].tolist()[: NAMED - len(self.first)]


@dataclass(frozen=True)
class Interview:
    """A model and everything needed to question it.

    Args:
        model: in eval mode, on its device.
        protocol: says what is asked.
        options: keyword arguments of `sample`, `likelihood`, `predict` and `edit` by question.
        extractors: whose features of drawn items the metrics want, by identity, ready for the protocol's data.
        progress: told (question, items done, items in all) after every batch.
    """

    model: Model
    protocol: Protocol
    options: dict[str, dict[str, Any]]
    progress: Progress | None = None
    extractors: dict[str, FeatureExtractor] = field(default_factory=dict)
    bills: dict[str, Bill] = field(default_factory=dict)
    failures: dict[str, Failures] = field(default_factory=dict)

    @property
    def dataset(self) -> Dataset:
        return self.protocol.dataset

    def ask(self, question: str, block: int = 0) -> Iterator[Answer]:
        """The answers to a question, batch by batch, on process 0; other processes share the work and see none.

        Drawn items that are not finite are left out, and counted like likelihoods and predictions that are not.

        Raises:
            NotApplicable: if the model cannot answer in its configuration.
            ValueError: if an answer has the wrong shape.
        """
        bill, failures = self.bills.setdefault(question, Bill()), self.failures.setdefault(question, Failures())
        total, done = self._count(question), 0
        reset_peak_memory(self.model.device)
        for samples, batch in processes.in_order(self._batches(question, block), self._answer(question)):
            bill.add(samples)
            bad = ~_finite(samples)
            failures.add(samples, bad, samples.failure)
            done += len(samples.seeds)
            yield (_without(samples, bad) if question == "sample" else samples), batch
            if self.progress is not None:
                self.progress(question, done, total)
        if processes.main():
            bill.peak_memory = max(filter(None, (bill.peak_memory, peak_memory(self.model.device))), default=None)

    def again(self, question: str, setting: dict[str, Any], block: int = 0) -> Iterator[Answer]:
        """The answers under further options, marked with them; they are on no bill."""
        options = {**self.options, question: self.options[question] | setting}
        for samples, batch in dataclasses.replace(self, options=options, bills={}, failures={}).ask(question, block):
            yield dataclasses.replace(samples, options=setting), batch

    def price(self, question: str) -> None:
        """Complete the bill of an answered question.

        The operations of a few items are counted, and the first batch is timed again until the median rests on `TIMED`
        batches, as often as `PATIENCE` allows.
        """
        bill, rows = self.bills[question], self._batches(question, 0)[0]
        bare = {**self.options, "edit": {**self.options.get("edit", {}), "reconstruct": False}}
        answer = dataclasses.replace(self, extractors={}, options=bare)._answer(question)
        try:
            with count_operations() as counted:
                few = len(answer(rows[:COUNTED])[0].seeds)
            bill.flops_per_item = counted.total // few
        except Exception as error:  # what was answered is worth more than its price
            warnings.warn(
                f"operations of `{question}` could not be counted: {type(error).__name__}: {error}", stacklevel=2
            )
            return
        left = PATIENCE
        while len(bill.timings) < TIMED and bill.seconds_per_item * len(rows) <= left:
            again = answer(rows)[0].seconds
            bill.timings.append(again / len(rows))
            left -= again

    def _answer(self, question: str) -> Callable[[Tensor], Answer]:
        ways = {"sample": self._sample, "likelihood": self._score, "predict": self._predict, "edit": self._edit}
        return ways[question]

    def _count(self, question: str) -> int:
        if question == "sample":
            return self.protocol.sample.num_items
        asked = getattr(self.protocol, question)
        size = self.dataset.size(asked.split)
        return min(size, asked.num_items or size)

    def _batches(self, question: str, block: int) -> list[Tensor]:
        """The seeds of a block, or the indices of the items of a split, in batches."""
        asked, count = getattr(self.protocol, question), self._count(question)
        if count == 0:
            raise NotApplicable(f"the split '{asked.split}' of the protocol's data is empty")
        rows = torch.arange(count) + (block * count if question == "sample" else 0)
        return [part.clone() for part in rows.split(asked.batch_size)]

    def _sample(self, seeds: Tensor) -> Answer:
        condition = conditions(self.model, self.dataset, seeds, self.protocol.sample.labels)
        failure = ""
        with self._measured(len(seeds)) as cost, torch.no_grad():
            given = to_device(condition, self.model.device)
            try:
                x = self.model.sample(seeds, condition=given, **self.options["sample"]).detach()
            except SolverError as error:
                x, failure = torch.full((len(seeds), *self.dataset.shape), torch.nan), str(error)
        if tuple(x.shape) != (len(seeds), *self.dataset.shape):
            raise ValueError(
                f"sample: the model answered {len(seeds)} seeds with shape {list(x.shape)}; "
                f"[{len(seeds)}, {', '.join(map(str, self.dataset.shape))}] is needed."
            )
        x = x.cpu() if x.dtype in (torch.float32, torch.float64) else x.cpu().float()
        finite = x.flatten(1).isfinite().all(1)
        x = torch.where(expand_like(finite, x), to_levels(x, self.dataset), torch.nan)  # infinity is no level
        features = {name: _features(extract, x, finite) for name, extract in self.extractors.items()}
        return Samples(seeds, x=x, condition=condition, features=features, failure=failure, **cost), None

    def _score(self, rows: Tensor) -> Answer:
        asked = self.protocol.likelihood
        size = self.dataset.size(asked.split)
        batch = self.dataset.take(asked.split, rows)
        moved = batch.to(self.model.device)
        condition = moved.condition if self.model.conditional else None
        draws, failure = [], ""
        with self._measured(len(rows)) as cost, torch.no_grad():
            try:
                for k in range(asked.draws):  # draw k of item i has the seed i + k·size
                    seeds, options = rows + k * size, self.options["likelihood"]
                    draws.append(self.model.likelihood(moved.x, condition=condition, seeds=seeds, **options))
            except SolverError as error:
                draws, failure = [Likelihood(torch.full((len(rows),), torch.nan), "numerical")], str(error)
        for draw in draws:
            _check_length("likelihood", draw.value, len(rows))
            if draw.value.ndim != 1:
                raise ValueError(
                    f"likelihood: the model answered with a tensor of shape {list(draw.value.shape)}, not [B]."
                )
        try:
            likelihood = combine_draws(draws, "mean" if failure else asked.combine)
        except ValueError as reason:
            raise NotApplicable(str(reason)) from reason
        return Samples(rows, condition=batch.condition, likelihood=likelihood, failure=failure, **cost), batch

    def _predict(self, rows: Tensor) -> Answer:
        batch = self.dataset.take(self.protocol.predict.split, rows)
        with self._measured(len(rows)) as cost, torch.no_grad():
            prediction = self.model.predict(batch.to(self.model.device), seeds=rows, **self.options["predict"])
        _check_length("predict", prediction, len(rows))
        return Samples(rows, prediction=prediction.detach().cpu(), **cost), batch

    def _edit(self, rows: Tensor) -> Answer:
        """Edits of items, and apart from their cost the reconstructions if `reconstruct` is among the options."""
        batch = self.dataset.take(self.protocol.edit.split, rows)
        if not self.model.conditional or self.dataset.num_classes is None:
            raise NotApplicable("edits go from class to class; the model or the protocol's data have none")
        wanted = target_classes(batch.condition, rows, self.dataset.num_classes)
        moved, target = batch.to(self.model.device), wanted.to(self.model.device)
        given, options = {"source": moved.condition, "seeds": rows}, self.options["edit"]
        with self._measured(len(rows)) as cost, torch.no_grad():
            made = self.model.edit(moved.x, target=target, **given, **{**options, "reconstruct": False})
        again = None
        if options["reconstruct"]:
            again = self.model.edit(moved.x, target=moved.condition, **given, **options).reconstruction.cpu()
        x = made.x.detach().cpu()
        _check_length("edit", x, len(rows))
        finite = x.flatten(1).isfinite().all(1)
        x = torch.where(expand_like(finite, x), to_levels(x, self.dataset), torch.nan)
        features = {name: _features(extract, x, finite) for name, extract in self.extractors.items()}
        stored = made.stored / len(rows)
        found = Samples(rows, x=x, condition=wanted, features=features, reconstruction=again, stored=stored, **cost)
        return found, batch

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


def _finite(samples: Samples) -> Tensor:
    """[n] bool: which answers, with their features, hold neither NaN nor infinity."""
    likelihood = None if samples.likelihood is None else samples.likelihood.value
    answer = next(v for v in (samples.x, likelihood, samples.prediction) if v is not None)
    again = [] if samples.reconstruction is None else [samples.reconstruction]
    parts = [answer, *again, *(samples.features or {}).values()]
    return torch.stack([v.reshape(len(v), -1).isfinite().all(1) for v in parts]).all(0)


def _without(samples: Samples, bad: Tensor) -> Samples:
    """Drawn items but the bad ones."""
    if not bad.any():
        return samples
    keep: Callable[[Tensor], Tensor] = lambda v: v[~bad]  # noqa: E731
    condition, features = samples.condition, samples.features or {}
    kept = {key: keep(v) for key, v in condition.items()} if isinstance(condition, dict) else condition
    kept = keep(condition) if isinstance(condition, Tensor) else kept
    found = {name: keep(v) for name, v in features.items()}
    return dataclasses.replace(samples, seeds=keep(samples.seeds), x=keep(samples.x), condition=kept, features=found)


def _features(extract: FeatureExtractor, x: Tensor, finite: Tensor) -> Tensor:
    """[B, D] features of items [B, *shape] on the CPU; NaN where an item is not finite."""
    if finite.all():
        return extract(x).cpu()
    found = extract(torch.where(expand_like(finite, x), x, 0.0)).cpu()
    return torch.where(finite[:, None], found, torch.nan)


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


def target_classes(labels: Tensor, items: Tensor, classes: int) -> Tensor:
    """[B] int64 the class that each item is edited to: (c + 1 + i mod (K - 1)) mod K for item i of class c.

    Raises:
        NotApplicable: if there is only one class.
    """
    if classes < 2:
        raise NotApplicable("edits go from class to class, and the data have only one")
    return (labels + 1 + items % (classes - 1)) % classes


def _check_length(question: str, value: Tensor, items: int) -> None:
    if value.ndim == 0 or len(value) != items:
        raise ValueError(f"{question}: the model answered {items} items with a tensor of shape {list(value.shape)}.")
