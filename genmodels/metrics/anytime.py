"""What predictions are worth at every price: the accuracy of a model whose answers can be had for less."""

import inspect
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..model import Model
from ..registry import ConfigError, register
from ..types import Batch, Estimate, Samples
from .metric import Metric, Subject
from .supervised import Accuracy, class_counts, masked_sums, mean_and_error


@register(Metric, "anytime_accuracy")
class AnytimeAccuracy(Accuracy):
    """∫ a(c) d log c / log C over the price c = 1 … C of an answer, in evaluations of the network.

    Items are predicted in full, and again at every place of a dial. a(c) is the accuracy of the dearest of these
    answers that costs at most c, and below the cheapest one that of the most frequent class of the training split.
    No answer is chosen by its accuracy, so the mean over items is unbiased. A model without the option has one answer,
    in full. Beside the integral stand the points of the curve, `accuracy_at_<place>` for `evaluations_at_<place>`.

    Args:
        option: of `predict`, the dial.
        places: its values.
        budget: C.
    Raises:
        ConfigError: if the budget is not above 1, or a place is named twice.
    Source: Zilberstein 1996 (Using anytime algorithms in intelligent systems), for performance profiles.
    """

    def __init__(
        self, option: str = "iterations", places: tuple[int, ...] = (0, 1, 2, 4, 8), budget: float = 100.0
    ) -> None:
        if budget <= 1 or len(set(places)) < len(places):
            raise ConfigError(
                f"anytime_accuracy: a budget above 1 and places that differ are needed, found {budget:g} and "
                f"{list(places)}."
            )
        self.option, self.places, self.budget = option, tuple(places), budget

    def start(self, subject: Subject) -> None:
        super().start(subject)
        self.frequent = int(class_counts(subject, "train").argmax())

    def settings(self, model: Model) -> list[dict[str, Any]]:
        known = inspect.signature(model.predict).parameters
        return [{self.option: place} for place in self.places] if self.option in known else []

    def restart(self) -> None:
        super().restart()
        self.constant: list[Tensor] = []
        # by place, None for the full answer: sums of hits of the items, and evaluations of each
        self.hits: dict[int | None, list[Tensor]] = {}
        self.prices: dict[int | None, list[Tensor]] = {}

    def update(self, samples: Samples, batch: Batch | None) -> None:
        place = samples.options.get(self.option) if samples.options else None
        target = batch.target.cpu()
        total, count = masked_sums(self.scores(samples.prediction.detach().cpu(), target), batch.target_mask)
        self.hits.setdefault(place, []).append(total)
        self.prices.setdefault(place, []).append(torch.full_like(total, samples.nfe))
        if place is None:
            self.counts.append(count)
            self.constant.append(masked_sums((target == self.frequent).double(), batch.target_mask)[0])

    def compute(self) -> dict[str, Estimate]:
        if not self.counts:
            raise ValueError("anytime_accuracy: no predictions were taken in.")
        count = torch.cat(self.counts)
        hits = {place: torch.cat(parts) for place, parts in self.hits.items()}
        prices = {place: torch.cat(parts).mean().item() for place, parts in self.prices.items()}
        order = sorted(prices, key=lambda place: prices[place])
        edges = [1.0, *(min(max(prices[place], 1.0), self.budget) for place in order), self.budget]
        answers = [torch.cat(self.constant), *(hits[place] for place in order)]
        shares = [math.log(b / a) / math.log(self.budget) for a, b in pairwise(edges)]
        worth = sum(share * answer for share, answer in zip(shares, answers, strict=True))
        found = {"anytime_accuracy": self._estimate(worth, count, f"up to {self.budget:g} evaluations")}
        for place in (place for place in self.places if place in hits):
            nfe = Estimate(prices[place], None, len(count), "evaluations", "none", "count")
            found |= {f"accuracy_at_{place}": self._estimate(hits[place], count), f"evaluations_at_{place}": nfe}
        return found

    def _estimate(self, hits: Tensor, count: Tensor, detail: str = "") -> Estimate:
        value, stderr = mean_and_error(hits, count, self.registered_name)
        items = hits / count if bool((count == count[0]).all()) else None
        return Estimate(value, stderr, len(count), "share", "higher", "exact", self.references, items, detail=detail)
