"""The contract of a metric: answers of a model stream in, estimates with their uncertainty come out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..data.dataset import Dataset
from ..model import Model
from ..registry import kind
from ..types import Batch, Estimate, Samples


@dataclass(frozen=True)
class Subject:
    """What a metric may look at before the answers come.

    Args:
        model: the model under evaluation, in eval mode.
        dataset: the data set of the protocol (not of the run).
        device: where feature extractors run.
        batch_size: items per batch for passes over reference data.
    """

    model: Model
    dataset: Dataset
    device: torch.device
    batch_size: int


@kind
class Metric(ABC):
    """One property of a model, measured from its answers.

    The evaluator asks each question once (draw samples, score test items, predict) and hands every answer to all
    metrics whose `requires` names that capability. A metric never draws anything itself.

    Attributes:
        requires: capability protocols, any of which provides the answers (`SupportsSample`, `SupportsLogProb`, …); the
            metric is fed from the first that the model has.
        version: raised when a change alters the numbers; it is part of every protocol's hash.
    """

    requires: ClassVar[tuple[type, ...]]
    version: ClassVar[int] = 1

    @property
    def fingerprint(self) -> str:
        """What else the numbers depend on (the checksum of a feature extractor); part of every protocol's hash."""
        return ""

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
