"""Means and variances of forecasts against those of data that start alike."""

import math

import torch
from torch import Tensor

from ..registry import register
from ..types import Batch, Estimate, NotApplicable, Samples, SupportsPredict
from .metric import Metric, Subject


@register(Metric, "moments")
class Moments(Metric):
    """Mean of (E ŷ - E y)² + (Var ŷ - Var y)² over target times and channels, for items that share start and times.

    The items are paths of one process from one state. The law of the forecasts is the mixture of the laws predicted for
    each item, [n, M, C, 2] means and log standard deviations; the data's moments are those of the n targets. The
    standard error is the jackknife's over items. The reference "exact moments" is what the true moments would score,
    which finite data do not let fall to 0: the mean of (Var y + E (y - E y)⁴ - (Var y)²)/n.

    Source: Pal et al. 2021 (Opening the Blackbox), section 4.2 (the loss of the spiral SDE).
    """

    requires = (SupportsPredict,)

    def start(self, subject: Subject) -> None:
        first = None
        for batch in subject.dataset.batches("test", subject.batch_size):
            y, mask = batch.target, batch.target_mask
            if y is None or not y.is_floating_point() or y.ndim != 3 or (mask is not None and not bool(mask.all())):
                raise NotApplicable("moments need targets [B, M, C] that are all observed")
            facts = [batch.x, batch.times, batch.target_times]
            first = first or [None if v is None else v[:1] for v in facts]
            for value, one in zip(facts, first, strict=True):
                if one is not None and not torch.equal(value, one.expand_as(value)):
                    raise NotApplicable("the items of the data set do not share their start and their times")
        self.restart()

    def restart(self) -> None:
        self.kept: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        y, law = batch.target.double().cpu(), samples.prediction.double().cpu()
        if law.shape == y.shape:
            raise NotApplicable(
                "the model predicts values, not laws: a forecast with a law has one more axis of size 2, "
                "mean and log standard deviation"
            )
        if law.shape != (*y.shape, 2):
            raise ValueError(
                f"moments: predictions have shape {list(law.shape)}, targets {list(y.shape)}; one more axis of size 2 "
                "is needed last, mean and log standard deviation."
            )
        mean, log_std = law.unbind(-1)
        self.kept.append(torch.stack((y, y.square(), mean, (2 * log_std).exp() + mean.square()), -1))

    def compute(self) -> dict[str, Estimate]:
        if not self.kept:
            raise ValueError("moments: no predictions were taken in.")
        items = torch.cat(self.kept)  # [n, M, C, 4]
        n, total = len(items), items.sum(0)
        value, stderr = _distance(total / n).item(), None
        if n > 1:
            without = _distance((total - items) / (n - 1))
            stderr = math.sqrt((n - 1) / n * (without - without.mean()).square().sum().item())
        y = items[..., 0]
        around = (y - y.mean(0)).square()
        floor = ((around.mean(0) + around.square().mean(0) - around.mean(0).square()) / n).mean().item()
        references = {"exact moments": floor} if math.isfinite(floor) else None
        return {"moments": Estimate(value, stderr, n, "1", "lower", "plug-in", references)}


def _distance(moments: Tensor) -> Tensor:
    """[*] the measure from mean first and second moments [*, M, C, 4]: of the data, then of the forecasts."""
    mean, square, mean_model, square_model = moments.unbind(-1)
    gap = (square_model - mean_model.square()) - (square - mean.square())
    return ((mean_model - mean).square() + gap.square()).mean((-1, -2))
