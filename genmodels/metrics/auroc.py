"""The area under the ROC curve, for classes of which one is rare."""

import math

import torch
from torch import Tensor

from ..registry import register
from ..types import Batch, Estimate, NotApplicable, Samples
from .metric import Metric, Subject
from .supervised import Supervised, check_logits


@register(Metric, "auroc")
class AUROC(Supervised):
    """Area under the ROC curve of a classifier of two classes: P(s⁺ > s⁻) + P(s⁺ = s⁻)/2.

    Over pairs of an item of class 1 and one of class 0, with their log odds s. It does not depend on how rare a
    class is; a constant scores 0.5. With A_i the share of items of class 0 that item i of class 1 beats, and B_j
    the share of items of class 1 that beat item j of class 0, the standard error is √(var(A)/n⁺ + var(B)/n⁻).

    Source: DeLong et al. 1988 (Comparing the areas under two or more correlated receiver operating characteristic
        curves).
    """

    classes = True

    def baselines(self, subject: Subject) -> dict[str, float]:
        if subject.dataset.target_shape != (2,):
            raise NotApplicable("the targets are not one of two classes for each item")
        return {"chance": 0.5}

    def scores(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[B] log odds of class 1."""
        check_logits(prediction, target, "auroc")
        odds = prediction.double().log_softmax(-1)
        return odds[..., 1] - odds[..., 0]

    def restart(self) -> None:
        self.odds: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        target = batch.target.cpu()
        seen = torch.ones_like(target, dtype=torch.bool) if batch.target_mask is None else batch.target_mask.cpu()
        self.odds.append(self.scores(samples.prediction.detach().cpu(), target)[seen])
        self.labels.append(target[seen])

    def compute(self) -> dict[str, Estimate]:
        if not self.odds:
            raise ValueError("auroc: no predictions were taken in.")
        odds, label = torch.cat(self.odds), torch.cat(self.labels)
        high, low = odds[label == 1], odds[label == 0]
        if not (len(high) and len(low)):
            raise ValueError(f"auroc: both classes are needed, found {len(low)} items of class 0 and {len(high)} of 1.")
        if odds.isnan().any():
            return {"auroc": Estimate(math.nan, None, len(odds), "share", "higher", "exact", self.references)}
        beaten, beating = _share_below(low, high), 1 - _share_below(high, low)
        spread = beaten.var() / len(high) + beating.var() / len(low) if min(len(high), len(low)) > 1 else None
        stderr = None if spread is None else spread.sqrt().item()
        return {"auroc": Estimate(beaten.mean().item(), stderr, len(odds), "share", "higher", "exact", self.references)}


def _share_below(values: Tensor, bars: Tensor) -> Tensor:
    """[M] shares of the values [N] below each bar [M]; those that are equal count half."""
    ordered = values.sort().values
    sides = [torch.searchsorted(ordered, bars, right=right) for right in (False, True)]
    return sum(sides).double() / (2 * len(values))
