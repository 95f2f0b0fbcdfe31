"""Predictions against targets; masked entries do not count."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from ..registry import register
from ..types import Batch, Estimate, NotApplicable, Samples, SupportsPredict, expand_like
from .metric import Metric, Subject


class _Supervised(Metric):
    """A mean over all observed targets of all items.

    An item may hold several targets, which are not independent: with sums sᵢ and counts cᵢ per item the value is
    r = Σs/Σc and its standard error that of a ratio, sd(sᵢ - r cᵢ)/(c̄ √n).
    """

    requires = (SupportsPredict,)
    classes: bool

    def start(self, subject: Subject) -> None:
        first = subject.dataset.take("test", torch.zeros(1, dtype=torch.int64)).target
        if first is None or first.is_floating_point() is self.classes:
            raise NotApplicable(
                f"the items of the data set have no {'class labels' if self.classes else 'values'} as target"
            )
        self.references = self.baselines(subject)
        self.restart()

    @abstractmethod
    def baselines(self, subject: Subject) -> dict[str, float]:
        """What predicting a constant fitted to the training targets would score on the test split."""

    @abstractmethod
    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The score of every target, in the target's shape."""

    def restart(self) -> None:
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        scores = self.scores(samples.prediction.detach().cpu(), batch.target.cpu())
        total, count = masked_sums(scores, batch.target_mask)
        self.sums.append(total)
        self.counts.append(count)

    def ratio(self, unit: str, better: str) -> Estimate:
        """The mean over observed targets."""
        if not self.sums:
            raise ValueError(f"{self.registered_name}: no predictions were taken in.")
        s, c = torch.cat(self.sums), torch.cat(self.counts)
        if c.sum() == 0:
            raise ValueError(f"{self.registered_name}: every target of every item is masked.")
        value = (s.sum() / c.sum()).item()
        stderr = ((s - value * c).std() / (c.mean() * math.sqrt(len(s)))).item() if len(s) > 1 else None
        items = s / c if bool((c == c[0]).all()) else None  # with unequal counts the mean of items is another number
        return Estimate(value, stderr, len(s), unit, better, "exact", self.references or None, items)


def masked_sums(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B] float64 sums of the observed scores of each item, and [B] how many they are.

    Args:
        scores: [B], [B, M] or [B, M, C].
        mask: [B, M] or [B, M, C], True where a target counts; None for all.
    """
    scores = scores.double()
    seen = torch.ones_like(scores) if mask is None else expand_like(mask.cpu(), scores).expand_as(scores).double()
    scores = torch.where(seen > 0, scores, 0.0)  # what is masked may be NaN
    return scores.reshape(len(scores), -1).sum(1), seen.reshape(len(seen), -1).sum(1)


@register(Metric, "accuracy")
class Accuracy(_Supervised):
    """Share of class targets that the largest logit names; references: always the most frequent class, and chance."""

    classes = True

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape[:-1] != target.shape:
            raise ValueError(
                f"accuracy: logits have shape {list(prediction.shape)}, targets {list(target.shape)}; "
                "one more axis, of classes, is needed last."
            )
        hits = (prediction.argmax(-1) == target).double()
        return torch.where(prediction.isfinite().all(-1), hits, math.nan)

    def baselines(self, subject: Subject) -> dict[str, float]:
        counts = _class_counts(subject, "train")
        test = _class_counts(subject, "test", len(counts))
        classes = (subject.dataset.target_shape or (len(counts),))[-1]
        return {"most frequent class": (test[counts.argmax()] / test.sum()).item(), "chance": 1 / classes}

    def compute(self) -> dict[str, Estimate]:
        return {"accuracy": self.ratio("share", "higher")}


def _class_counts(subject: Subject, split: str, least: int = 0) -> Tensor:
    """How often each class is an observed target of a split."""
    counts = torch.zeros(least, dtype=torch.float64)
    for batch in subject.dataset.batches(split, subject.batch_size):
        seen = batch.target if batch.target_mask is None else batch.target[batch.target_mask]
        found = seen.flatten().bincount(minlength=len(counts)).double()
        found[: len(counts)] += counts
        counts = found
    return counts


@register(Metric, "squared_error")
class SquaredError(_Supervised):
    """Mean squared error over observed targets; the reference predicts the training mean of each channel."""

    classes = False

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape != target.shape:
            raise ValueError(
                f"squared_error: predictions have shape {list(prediction.shape)}, targets {list(target.shape)}."
            )
        return (prediction.double() - target.double()) ** 2

    def baselines(self, subject: Subject) -> dict[str, float]:
        total = count = 0.0
        for batch in subject.dataset.batches("train", subject.batch_size):
            seen, values = _observed(batch)
            total, count = total + (values * seen).sum(0), count + seen.sum(0)
        mean = total / count.clamp(min=1)
        error = number = 0.0
        for batch in subject.dataset.batches("test", subject.batch_size):
            seen, values = _observed(batch)
            error, number = error + ((values - mean).square() * seen).sum(), number + seen.sum()
        return {"training mean": (error / number).item()}

    def compute(self) -> dict[str, Estimate]:
        return {"squared_error": self.ratio("squared data units", "lower")}


def _observed(batch: Batch) -> tuple[Tensor, Tensor]:
    """Weights and targets as [entries, channels]; the last axis of a target with more than one is its channels."""
    y = batch.target.double()
    seen = torch.ones_like(y) if batch.target_mask is None else expand_like(batch.target_mask, y).expand_as(y).double()
    y = torch.where(seen > 0, y, 0.0)
    channels = y.shape[-1] if y.ndim > 2 else 1
    return seen.reshape(-1, channels), y.reshape(-1, channels)
