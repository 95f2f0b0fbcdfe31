"""Predictions against targets; masked entries do not count."""

import math
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..registry import register
from ..rng import generator
from ..types import Batch, Estimate, NotApplicable, Samples, SupportsPredict, expand_like
from .metric import Metric, Subject

SIMULATIONS = 200  # label sets behind the floor of the calibration error; its own error is a 14th of their spread


class Supervised(Metric):
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
        value, stderr = mean_and_error(s, c, self.registered_name)
        items = s / c if bool((c == c[0]).all()) else None  # with unequal counts the mean of items is another number
        return Estimate(value, stderr, len(s), unit, better, "exact", self.references or None, items)


def mean_and_error(sums: Tensor, counts: Tensor, name: str) -> tuple[float, float | None]:
    """r = Σs/Σc over items with sums s [n] and counts c [n], and its standard error, None for a single item.

    Raises:
        ValueError: if nothing was counted.
    """
    if counts.sum() == 0:
        raise ValueError(f"{name}: every target of every item is masked.")
    value = (sums.sum() / counts.sum()).item()
    if len(sums) == 1:
        return value, None
    return value, ((sums - value * counts).std() / (counts.mean() * math.sqrt(len(sums)))).item()


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


# ---- classes ---------------------------------------------------------------------------------------------------------


class _Classified(Supervised):
    """A score of class logits; its references score what a constant answer would be worth on the test split."""

    classes = True

    def baselines(self, subject: Subject) -> dict[str, float]:
        train = class_counts(subject, "train")
        test = class_counts(subject, "test", len(train))
        classes = max((subject.dataset.target_shape or (len(test),))[-1], len(test))
        share = torch.nn.functional.pad(train / train.sum(), (0, classes - len(train)))
        shares = {"class frequencies": share, "chance": torch.full((classes,), 1 / classes, dtype=torch.float64)}
        labels, weights = torch.arange(len(test)), test / test.sum()
        scored = {
            name: self.scores(constant.log().expand(len(labels), -1), labels)[weights > 0]
            for name, constant in shares.items()
        }
        means = {name: (score * weights[weights > 0]).sum().item() for name, score in scored.items()}
        return {name: value for name, value in means.items() if math.isfinite(value)}


def check_logits(prediction: Tensor, target: Tensor, name: str) -> None:
    """Raises ValueError unless the logits have the shape of the targets and one more axis, of classes."""
    if prediction.shape[:-1] != target.shape:
        raise ValueError(
            f"{name}: logits have shape {list(prediction.shape)}, targets {list(target.shape)}; "
            "one more axis, of classes, is needed last."
        )


def log_probability_of(target: Tensor, log_p: Tensor) -> Tensor:
    """log p of each target class; a class without a logit, such as the filler of masked targets, has probability 0."""
    known = (target >= 0) & (target < log_p.shape[-1])
    chosen = log_p.gather(-1, torch.where(known, target, 0)[..., None])[..., 0]
    return torch.where(known | chosen.isnan(), chosen, -math.inf)


@register(Metric, "accuracy")
class Accuracy(Supervised):
    """Share of class targets that the largest logit names; references: always the most frequent class, and chance."""

    classes = True

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        check_logits(prediction, target, "accuracy")
        hits = (prediction.argmax(-1) == target).double()
        return torch.where(prediction.isfinite().all(-1), hits, math.nan)

    def baselines(self, subject: Subject) -> dict[str, float]:
        counts = class_counts(subject, "train")
        test = class_counts(subject, "test", len(counts))
        classes = (subject.dataset.target_shape or (len(counts),))[-1]
        return {"most frequent class": (test[counts.argmax()] / test.sum()).item(), "chance": 1 / classes}

    def compute(self) -> dict[str, Estimate]:
        return {"accuracy": self.ratio("share", "higher")}


def class_counts(subject: Subject, split: str, least: int = 0) -> Tensor:
    """How often each class is an observed target of a split."""
    counts = torch.zeros(least, dtype=torch.float64)
    for batch in subject.dataset.batches(split, subject.batch_size):
        seen = batch.target if batch.target_mask is None else batch.target[batch.target_mask]
        found = seen.flatten().bincount(minlength=len(counts)).double()
        found[: len(counts)] += counts
        counts = found
    return counts


@register(Metric, "cross_entropy")
class CrossEntropy(_Classified):
    """Mean -log p of the target class in nats; references: the class frequencies of the training split, and chance.

    Infinite if an observed class has probability 0.
    """

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        check_logits(prediction, target, "cross_entropy")
        return -log_probability_of(target, prediction.double().log_softmax(-1))

    def compute(self) -> dict[str, Estimate]:
        return {"cross_entropy": self.ratio("nats", "lower")}


@register(Metric, "brier")
class Brier(_Classified):
    """Mean Σ_k (p_k - 1[k = y])² over classes k, between 0 and 2; references as for `cross_entropy`.

    Source: Brier 1950 (Verification of forecasts expressed in terms of probability).
    """

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        check_logits(prediction, target, "brier")
        log_p = prediction.double().log_softmax(-1)
        return log_p.exp().square().sum(-1) - 2 * log_probability_of(target, log_p).exp() + 1

    def compute(self) -> dict[str, Estimate]:
        return {"brier": self.ratio("1", "lower")}


@register(Metric, "calibration_error")
class CalibrationError(Supervised):
    """Σ_b |Σ_{i in b} (cᵢ - hᵢ)|/N of the largest class probability c and whether it is right, h, over bins b of c.

    The sum of absolute values is biased upwards: a perfectly calibrated classifier scores more than 0. The reference
    "calibrated" is what one with these confidences would score, the mean over simulated labels hᵢ ~ Bernoulli(cᵢ),
    independent of each other; a score near it shows no miscalibration.

    The standard error is that of the mean of sign_b (cᵢ - hᵢ) with the signs as found, over items. It is right where
    bins are clearly off, and too large near calibration, since a sum of |g_b| varies less than one of ±g_b.

    Args:
        bins: how many.
        binning: equal_mass puts the edges at quantiles of the confidences (ties stay together), equal_width evenly on
            [0, 1]. A bin includes its upper edge.
    Source: Guo et al. 2017 (On calibration of modern neural networks), section 2; Nixon et al. 2019 (Measuring
        calibration in deep learning), section 3 (equal mass).
    """

    classes = True

    def __init__(self, bins: int = 15, binning: Literal["equal_mass", "equal_width"] = "equal_mass") -> None:
        if bins < 1:
            raise ValueError(f"calibration_error: bins must be at least 1, found {bins}.")
        self.bins, self.binning = bins, binning

    def baselines(self, subject: Subject) -> dict[str, float]:
        return {}

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[*, 2] confidence of each prediction, and whether it is right; NaN where a logit is not finite."""
        check_logits(prediction, target, "calibration_error")
        confidence, named = prediction.double().softmax(-1).max(-1)
        finite = prediction.isfinite().all(-1, keepdim=True)
        return torch.where(finite, torch.stack([confidence, (named == target).double()], -1), math.nan)

    def restart(self) -> None:
        self.items = 0
        self.pairs: list[Tensor] = []
        self.owners: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        target, mask = batch.target.cpu(), batch.target_mask
        pairs = self.scores(samples.prediction.detach().cpu(), target)
        seen = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.cpu().expand_as(target)
        owners = expand_like(torch.arange(self.items, self.items + len(target)), target).expand_as(target)
        self.items += len(target)
        self.pairs.append(pairs[seen])
        self.owners.append(owners[seen])

    def compute(self) -> dict[str, Estimate]:
        if not self.pairs:
            raise ValueError("calibration_error: no predictions were taken in.")
        confidence, hit = torch.cat(self.pairs).T.contiguous()
        owner = torch.cat(self.owners)
        place = self._bins(confidence)
        signs = torch.zeros(self.bins, dtype=torch.float64).index_add(0, place, confidence - hit).sign()
        sums = torch.zeros(self.items, dtype=torch.float64).index_add(0, owner, signs[place] * (confidence - hit))
        value, stderr = mean_and_error(sums, owner.bincount(minlength=self.items).double(), "calibration_error")
        floor = {"calibrated": self._floor(confidence, place)} if math.isfinite(value) else None
        detail = f"{self.bins} bins of {self.binning.replace('_', ' ')}"
        estimate = Estimate(value, stderr, self.items, "share", "lower", "plug-in", floor, detail=detail)
        return {"calibration_error": estimate}

    def _bins(self, confidence: Tensor) -> Tensor:
        """[N] the bin of each confidence."""
        k = torch.arange(1, self.bins)
        if self.binning == "equal_width" or len(confidence) == 0:
            inner = k.double() / self.bins
        else:  # the last of the lowest k/bins of them, without rounding: bins differ by at most one entry
            inner = confidence.sort().values[(k * len(confidence) + self.bins - 1) // self.bins - 1]
        return torch.searchsorted(inner, confidence)

    def _floor(self, confidence: Tensor, place: Tensor) -> float:
        """The mean score of labels drawn with the stated confidences; the order of the items does not matter."""
        order, g = confidence.argsort(), generator("calibrated")
        confidence, place = confidence[order], place[order]
        total = 0.0
        for _ in range(SIMULATIONS):
            hit = (torch.rand(len(confidence), dtype=torch.float64, generator=g) < confidence).double()
            gaps = torch.zeros(self.bins, dtype=torch.float64).index_add(0, place, confidence - hit)
            total += gaps.abs().sum().item() / len(confidence)
        return total / SIMULATIONS


# ---- values ----------------------------------------------------------------------------------------------------------


class _Forecast(Supervised):
    """A score of predicted values, or of their laws: one more axis of size 2, mean and log standard deviation."""

    classes = False
    baseline: ClassVar[str]

    def baselines(self, subject: Subject) -> dict[str, float]:
        """The score of the mean of each channel over the training split, with its standard deviation."""
        count = total = square = 0.0
        for batch in subject.dataset.batches("train", subject.batch_size):
            seen, values = _observed(batch)
            count, total, square = count + seen.sum(0), total + values.sum(0), square + values.square().sum(0)
        mean = total / count.clamp(min=1)
        scale = (square / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        law = torch.stack([mean, scale.log()], -1)
        score = number = 0.0
        for batch in subject.dataset.batches("test", subject.batch_size):
            seen, values = _observed(batch)
            scores = self.scores(law.expand(*values.shape, 2), values)
            score, number = score + torch.where(seen > 0, scores, 0.0).sum(), number + seen.sum()
        found = (score / number).item()
        return {self.baseline: found} if math.isfinite(found) else {}


@register(Metric, "squared_error")
class SquaredError(_Forecast):
    """Mean squared error over observed targets; the reference predicts the training mean of each channel.

    Of a forecast that is a law (see `forecast_nll`) the mean is scored.
    """

    baseline = "training mean"

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape == (*target.shape, 2):
            prediction = prediction[..., 0]
        if prediction.shape != target.shape:
            raise ValueError(
                f"squared_error: predictions have shape {list(prediction.shape)}, targets {list(target.shape)}."
            )
        return (prediction.double() - target.double()) ** 2

    def compute(self) -> dict[str, Estimate]:
        return {"squared_error": self.ratio("squared data units", "lower")}


@register(Metric, "forecast_nll")
class ForecastNLL(_Forecast):
    """Mean -log N(y; μ, σ²) of observed targets in nats, of forecasts that are laws: [B, *, 2] holds μ and log σ.

    The reference is the normal law with the training mean and standard deviation of each channel.
    """

    baseline = "training law"

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape == target.shape:
            raise NotApplicable(
                "the model predicts values, not laws: a forecast with a law has one more axis of size 2, "
                "mean and log standard deviation"
            )
        if prediction.shape != (*target.shape, 2):
            raise ValueError(
                f"forecast_nll: predictions have shape {list(prediction.shape)}, targets {list(target.shape)}; one "
                "more axis of size 2 is needed last, mean and log standard deviation."
            )
        mean, log_std = prediction.double().unbind(-1)
        return 0.5 * math.log(2 * math.pi) + log_std + 0.5 * ((target.double() - mean) * torch.exp(-log_std)).square()

    def compute(self) -> dict[str, Estimate]:
        return {"forecast_nll": self.ratio("nats", "lower")}


def _observed(batch: Batch) -> tuple[Tensor, Tensor]:
    """Weights and targets as [entries, channels]; the last axis of a target with more than one is its channels."""
    y = batch.target.double()
    seen = torch.ones_like(y) if batch.target_mask is None else expand_like(batch.target_mask, y).expand_as(y).double()
    y = torch.where(seen > 0, y, 0.0)
    channels = y.shape[-1] if y.ndim > 2 else 1
    return seen.reshape(-1, channels), y.reshape(-1, channels)
