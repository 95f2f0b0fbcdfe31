"""What metrics of fields share: a pass over the reference, distances to it, and what a perfect sampler would score."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...data.dataset import Dataset, Split
from ...types import Batch, Estimate, NotApplicable, Samples, SupportsSample
from ..metric import Metric, Subject
from ..neighbours import float64_device
from .summary import Norm, Summary, checked, distance, summarize, unit_noise

PIXELS = 2**16  # handled at once: more only leave the cache


@dataclass(frozen=True)
class Fields:
    """Items of a split as fields [B, H, W] float64, batch by batch; it can be gone through again.

    Args:
        rows: which items.
        batch_size: items read at once.
    """

    dataset: Dataset
    split: Split
    rows: Tensor
    batch_size: int
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self.rows.split(self.batch_size):
            yield from pieces(self.dataset.take(self.split, rows).x.to(self.device))

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.dataset.shape[-2:])


def pieces(x: Tensor) -> Iterator[Tensor]:
    """Items [B, 1, H, W] as fields [b, H, W] float64, some at a time."""
    for part in x.split(max(1, PIXELS // math.prod(x.shape[1:]))):
        yield checked(part, "a metric of fields")


@dataclass(frozen=True)
class Scale:
    """Range, mean and standard deviation of all pixels of some fields."""

    low: float
    high: float
    mean: float
    std: float


def scale(fields: Fields) -> Scale:
    """Of all pixels of those fields.

    Raises:
        NotApplicable: if they are constant.
    """
    n, total, square, low, high, shift = 0, 0.0, 0.0, math.inf, -math.inf, None
    for x in fields:
        shift = x.mean().item() if shift is None else shift  # squares about a point near the mean keep their digits
        n += x.numel()
        total += (x - shift).sum().item()
        square += (x - shift).square().sum().item()
        low, high = min(low, x.min().item()), max(high, x.max().item())
    if not high > low:
        raise NotApplicable(f"the fields of the split '{fields.split}' are constant")
    return Scale(low, high, shift + total / n, math.sqrt(square / n - (total / n) ** 2))


class FieldMetric(Metric):
    """Distances between statistics of drawn fields and those of held-out ones, each a norm of their difference.

    Items are fields [1, H, W]. A statistic is a smooth function of means over items, so that the delta method gives its
    standard error; that of a distance has the part of the drawn fields, and the reference is held fixed. References:
    "noise" is what a perfect sampler scores in the mean with as many fields, by the spread of the reference's own
    items, and "training data" what training items score, as many as are drawn if there are.

    Attributes:
        smallest: side of the fields that the statistics need.
        units: of the estimates, by name.
        curved: how many numbers of each item `of_means` takes, None for all; the means of those after them are
            statistics themselves.
    Args:
        reference: the split that drawn fields are compared with.
    """

    requires = (SupportsSample,)
    smallest: ClassVar[int] = 4
    units: ClassVar[dict[str, str]]
    detail: str = ""
    curved: int | None = 0

    def __init__(self, reference: Literal["val", "test"] = "test") -> None:
        self.reference = reference

    def prepare(self, fields: Fields) -> None:
        """Take scales, thresholds and filters from the reference, before any statistic is asked for."""

    @abstractmethod
    def per_item(self, x: Tensor) -> Tensor:
        """[B, K] float64 numbers of each field of [B, H, W] float64."""

    def of_means(self, means: Tensor) -> Tensor:
        """[V] statistics from the means of those numbers, or of the first `curved` of them."""
        return means

    @abstractmethod
    def norms(self, reference: Summary) -> dict[str, Norm]:
        """The distances by the names of their estimates (those of `units`), given the statistics of the reference.

        Raises:
            NotApplicable: if the reference has nothing to compare with.
        """

    def start(self, subject: Subject) -> None:
        data, shape = subject.dataset, subject.dataset.shape
        if len(shape) != 3 or shape[0] != 1 or min(shape[1:]) < self.smallest:
            raise NotApplicable(
                f"needs fields [1, H, W] with sides of {self.smallest} or more, the items are {list(shape)}"
            )
        if not data.size(self.reference):
            raise NotApplicable(f"the split '{self.reference}' of the protocol's data is empty")
        self.device = float64_device(subject.device)
        held = Fields(data, self.reference, torch.arange(data.size(self.reference)), subject.batch_size, self.device)
        self.prepare(held)
        self.known = self._summary([self.per_item(x) for x in held])
        self.distances = self.norms(self.known)
        self.noise: dict[str, float] | None = None
        size = data.size("train")
        count = min(size, subject.drawn or size)
        rows = torch.arange(count) * size // max(1, count)
        train = Fields(data, "train", rows, subject.batch_size, self.device)
        self.train = self._summary([self.per_item(x) for x in train]) if size else None
        self.restart()

    def restart(self) -> None:
        self.kept: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        self.kept += [self.per_item(x) for x in pieces(samples.x.to(self.device))]

    def _summary(self, parts: list[Tensor]) -> Summary:
        return summarize(torch.cat(parts).cpu(), self.of_means, self.curved)

    def drawn(self) -> Summary:
        """The statistics of everything taken in.

        Raises:
            ValueError: if that is nothing.
        """
        if not self.kept:
            raise ValueError(f"{self.registered_name}: no fields were taken in.")
        return self._summary(self.kept)

    def compute(self) -> dict[str, Estimate]:
        drawn = self.drawn()
        n, m = len(drawn.influence), len(self.known.influence)
        found, self.noise = {}, self.noise or unit_noise(self.distances, self.known)
        for name, norm in self.distances.items():
            value, influence = (score := distance(norm, drawn, self.known))
            references = {"noise": self.noise[name] * math.sqrt(1 / n + 1 / m)}
            if self.train is not None:
                references["training data"] = distance(norm, self.train, self.known).value
            items, unit = influence + value, self.units[name]
            found[name] = Estimate(
                value, score.stderr, n, unit, "lower", "plug-in", references, items, detail=self.detail
            )
        return found
