"""The contract of a metric: answers of a model stream in, estimates with their uncertainty come out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.dataset import Dataset, Split
from ..model import Model
from ..registry import kind
from ..types import Batch, Estimate, Samples, SupportsSample
from .features import FeatureExtractor, features_of


@dataclass(frozen=True)
class Subject:
    """What a metric may look at before the answers come.

    Args:
        model: the model under evaluation, in eval mode.
        dataset: the data set of the protocol (not of the run).
        device: where feature extractors run.
        batch_size: items per batch for passes over reference data.
        held: features of splits that are known already, by the extractor's identity and the split.
        drawn: how many items will be drawn in a block, if that is known.
    """

    model: Model
    dataset: Dataset
    device: torch.device
    batch_size: int
    held: dict[tuple[str, Split], Tensor] = field(default_factory=dict)
    drawn: int | None = None

    def features(self, extractor: FeatureExtractor, split: Split) -> Tensor:
        """[N, D] features of a split on the CPU, found once for all metrics."""
        key = extractor.identity, split
        if key not in self.held:
            extractor.start(self.dataset, self.device)
            self.held[key] = features_of(extractor, self.dataset, split, self.batch_size)
        return self.held[key]


@kind
class Metric(ABC):
    """One property of a model, measured from its answers.

    The evaluator asks each question once (draw samples, score test items, predict) and hands every answer to all
    metrics whose `requires` names that capability. A metric never draws anything itself. Drawn items come rounded to
    the levels of the data, and items that hold NaN or infinity never reach a metric: the evaluator counts them, and
    marks every estimate of that question as failed.

    Attributes:
        requires: capability protocols, any of which provides the answers (`SupportsSample`, `SupportsLogProb`, …); the
            metric is fed from the first that the model has.
        version: raised when a change alters the numbers; it is part of every protocol's hash.
        features: the extractor whose features of drawn items the metric wants in `Samples.features`; None for none.
        splits: the splits whose features it reads from its subject (`Subject.features`); empty ones are left out.
    """

    requires: ClassVar[tuple[type, ...]]
    version: ClassVar[int] = 1
    features: FeatureExtractor | None = None
    splits: tuple[Split, ...] = ()

    @property
    def fingerprint(self) -> str:
        """What else the numbers depend on (the identity of the extractor); part of every protocol's hash."""
        return "" if self.features is None else self.features.identity

    def settings(self, model: Model) -> Sequence[dict[str, Any]]:
        """Further options of the question, beside those of the run, under which it is asked again for this metric.

        After the answers to the question itself those under each setting are handed to `update`, with
        `Samples.options`. It may depend on the model and the metric's arguments only.
        """
        return ()

    @abstractmethod
    def start(self, subject: Subject) -> None:
        """Read the reference data and be ready for the first answer; called once.

        Raises:
            NotApplicable: if the metric has no meaning for these data; the evaluator records the reason.
        """

    @abstractmethod
    def restart(self) -> None:
        """Forget every answer and keep the reference data: the next block of seeds begins."""

    @abstractmethod
    def update(self, samples: Samples, batch: Batch | None) -> None:
        """Take in one answer, and the data it answers (None for drawn samples)."""

    @abstractmethod
    def compute(self) -> dict[str, Estimate]:
        """The estimates by name.

        Raises:
            ValueError: if nothing was taken in, or too little.
        """


class FeatureMetric(Metric):
    """A metric of all features of the drawn items at once, in the space of its extractor."""

    requires = (SupportsSample,)
    features: FeatureExtractor

    def restart(self) -> None:
        self.kept: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        self.kept.append(samples.features[self.features.identity])

    def drawn(self) -> Tensor:
        """[N, D] features of everything taken in, in that order.

        Raises:
            ValueError: if that is nothing.
        """
        if not self.kept:
            raise ValueError(f"{self.registered_name}: no samples were taken in.")
        return torch.cat(self.kept)
