"""Precision, recall, density and coverage: fidelity and diversity from nearest neighbours."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import register
from ..rng import generator
from ..types import Batch, Estimate, Samples
from .features import FeatureExtractor, Pixels
from .metric import FeatureMetric, Metric, Subject
from .neighbours import blocks, float64_device, radii

Ties = Literal["strict", "inclusive"]


class Balls(NamedTuple):
    """Which points lie in which balls; a ball reaches from a point to its k-th nearest other point of the same set.

    Args:
        k: that number.
        holding: [m] how many balls of real items hold each fake.
        held: [n] how many fakes lie in the ball of each real item.
        recalled: [n] whether each real item lies in the ball of a fake.
        alone: [m] in how many balls of real items each fake is the only one.
    """

    k: int
    holding: Tensor
    held: Tensor
    recalled: Tensor
    alone: Tensor

    @property
    def precise(self) -> Tensor:
        """[m] bool: each fake lies in the ball of a real item."""
        return self.holding > 0

    @property
    def covered(self) -> Tensor:
        """[n] bool: a fake lies in the ball of each real item."""
        return self.held > 0


def count_balls(*, real: Tensor, fake: Tensor, k: int = 5, ties: Ties = "strict") -> Balls:
    """Count who lies in whose balls, with exact comparisons, from blocks of distances.

    Args:
        real: [n, D].
        fake: [m, D].
        k: of the nearest neighbours, 1 or more.
        ties: whether a point on the edge lies inside ("inclusive") or not.
    Raises:
        ValueError: if a set has no more than k items, or if their features differ in number.
    """
    for name, x in (("real", real), ("fake", fake)):
        if len(x) <= k or k < 1:
            raise ValueError(
                f"prdc: {name} has {len(x)} items, but more than k = {k} >= 1 are needed to have k neighbours each. "
                "Give more items, or choose another k."
            )
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"prdc: real has {real.shape[1]} features and fake has {fake.shape[1]}; use one extractor.")
    inclusive = ties == "inclusive"
    of_real, of_fake = radii(real, k)[:, None], radii(fake, k)[None]
    zeros = lambda x: torch.zeros(len(x), dtype=torch.float64, device=real.device)  # noqa: E731
    holding, held, last, recalled = zeros(fake), zeros(real), zeros(real), zeros(real)
    number = torch.arange(len(fake), dtype=torch.float64, device=real.device)
    for block in blocks(real, fake):
        i, j = block.rows, block.columns
        recalled[i] += block.within(of_fake[:, j], inclusive).any(1)
        inside = block.within(of_real[i], inclusive).double()
        holding[j] += inside.sum(0)
        held[i] += inside.sum(1)
        last[i] += inside @ number[j]
    alone = last[held == 1].long().bincount(minlength=len(fake))  # the sum over a single fake is its number
    return Balls(k, holding, held, recalled > 0, alone)


def precision_recall_density_coverage(
    *, real: Tensor, fake: Tensor, k: int = 5, ties: Ties = "strict"
) -> dict[str, float]:
    """The four shares of n real and m fake items by name; r and ρ are distances to the k-th nearest of one's own set.

    precision = 1/m Σ_j 1[∃i: |y_j - x_i| < r_i]        recall   = 1/n Σ_i 1[∃j: |x_i - y_j| < ρ_j]
    density   = 1/(k m) Σ_j Σ_i 1[|y_j - x_i| < r_i]    coverage = 1/n Σ_i 1[∃j: |x_i - y_j| < r_i]

    Args:
        real: [n, D].
        fake: [m, D].
        ties: "strict" compares by <, "inclusive" by <=.
    Raises:
        ValueError: if a set has no more than k items, or if their features differ in number.
    Source: Kynkäänniemi et al. 2019 (Improved precision and recall), section 2; Naeem et al. 2020 (Reliable fidelity),
    section 3.
    """
    balls = count_balls(real=real, fake=fake, k=k, ties=ties)
    return {name: share.items.mean().item() for name, share in summarise(balls).items()}


class Share(NamedTuple):
    """Per-item values [n] whose mean is the number, and its standard error."""

    items: Tensor
    stderr: float


def summarise(balls: Balls) -> dict[str, Share]:
    """The four numbers with standard errors.

    precision, density: over the fakes, which are independent given the real items: exact for another draw of fakes.
    coverage: delete-one jackknife over the fakes, the real items fixed. Without fake j the balls are lost in which it is
    the only one. At least the true variance in expectation (for one fake less), whatever the model: up to 1.6 times the
    true standard error where coverage is near 1, and right where it is low. The share of covered real items is no
    binomial variable: neighbouring balls share their fakes.
    recall: binomial over the real items, which are independent given the fakes. Over draws of fakes it was within 20 %
    of the truth in simulations, except near recall 1 in few dimensions (0.7 times the truth).
    """
    m, n = len(balls.holding), len(balls.held)
    precise, density, recalled = balls.precise.double(), balls.holding / balls.k, balls.recalled.double()
    alone = balls.alone.double() / n
    jackknife = (m - 1) / m * (alone - alone.mean()).square().sum()
    return {
        "precision": Share(precise, precise.std(correction=0).item() / math.sqrt(m)),
        "recall": Share(recalled, recalled.std(correction=0).item() / math.sqrt(n)),
        "density": Share(density, density.std().item() / math.sqrt(m)),
        "coverage": Share(balls.covered.double(), math.sqrt(jackknife)),
    }


def expected_coverage(n: int, m: int, k: int) -> float:
    """Coverage of n real items by m fakes of the same continuous law: 1 - Π_{i<k} (n - 1 - i)/(m + n - 1 - i).

    A real item is missed if its k nearest among the n - 1 other real items and the m fakes are all real.
    """
    return 1 - math.prod((n - 1 - i) / (m + n - 1 - i) for i in range(k))


@register(Metric, "prdc")
class PrecisionRecallDensityCoverage(FeatureMetric):
    """Precision and density (are samples plausible?), recall and coverage (is everything there?), by nearest neighbours.

    All four depend on the sizes of both sets, so both are cut to the same size n = m, the smaller of the two and of
    `max_items`, by a fixed random choice; it is stated with the numbers. Density may exceed 1. References: coverage and
    density of a perfect sampler, and the numbers of the test set (if it is large enough, for recall and coverage).
    What the standard errors cover: another draw of samples, the reference held fixed (see `summarise`).

    Args:
        features: the extractor.
        k: neighbours; numbers for different k are different metrics.
        reference: the split that samples are compared with.
        ties: whether a point at exactly the distance of the k-th neighbour counts ("inclusive") or not ("strict").
        max_items: the largest n; None for no limit.
    Source: Kynkäänniemi et al. 2019 (Improved precision and recall), section 2; Naeem et al. 2020 (Reliable fidelity),
    section 3.
    """

    def __init__(
        self,
        features: FeatureExtractor = Pixels(),
        k: int = 5,
        reference: Literal["train", "val", "test"] = "train",
        ties: Ties = "strict",
        max_items: int | None = 10_000,
    ) -> None:
        if k < 1 or (max_items is not None and max_items <= k):
            raise ValueError(f"prdc: k must be >= 1 and max_items > k, found k = {k}, max_items = {max_items}.")
        self.features, self.k, self.reference, self.ties, self.max_items = features, k, reference, ties, max_items
        self.other = "train" if reference == "test" else "test"
        self.splits = (reference, self.other)

    def start(self, subject: Subject) -> None:
        self.device = float64_device(subject.device)
        self.real = subject.features(self.features, self.reference)
        size = subject.dataset.size(self.other)
        self.fresh = subject.features(self.features, self.other) if size > self.k else None
        self.known: dict[int, dict[str, float]] = {}
        self.restart()

    def restart(self) -> None:
        super().restart()
        self.seeds: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        super().update(samples, batch)
        self.seeds.append(samples.seeds)

    def compute(self) -> dict[str, Estimate]:
        fake = self.drawn()
        n = min(len(self.real), len(fake), self.max_items or len(fake))
        real = chosen(self.real, n, "prdc reference")
        if n < len(fake):  # in the order of the seeds, so that the choice depends on them alone
            used = chosen(fake[torch.cat(self.seeds).argsort()], n, "prdc samples")
        else:
            used = fake
        references = self._references(real)
        detail = f"k = {self.k}, {n} real and {n} drawn items" + ("" if self.ties == "strict" else ", inclusive")
        out = {}
        for name, (items, stderr) in summarise(self._balls(real, used)).items():
            kept = items.cpu() if name in ("precision", "density") and n == len(fake) else None
            out[name] = Estimate(
                items.mean().item(), stderr, n, "share", "higher", "plug-in", references[name], kept, detail=detail
            )
        return out

    def _balls(self, real: Tensor, fake: Tensor) -> Balls:
        return count_balls(real=real.to(self.device), fake=fake.to(self.device), k=self.k, ties=self.ties)

    def _references(self, real: Tensor) -> dict[str, dict[str, float]]:
        """By estimate; found once for each size."""
        n = len(real)
        if n not in self.known:
            known = {"precision": {}, "recall": {}, "density": {"perfect sampler": 1.0}}
            known["coverage"] = {"perfect sampler": expected_coverage(n, n, self.k)}
            if self.fresh is not None:
                fresh = chosen(self.fresh, min(n, len(self.fresh)), "prdc fresh")
                for name, share in summarise(self._balls(real, fresh)).items():
                    if len(fresh) == n or name in ("precision", "density"):  # which do not depend on the number of fakes
                        known[name][f"{self.other} set"] = share.items.mean().item()
            self.known[n] = known
        return self.known[n]


def chosen(x: Tensor, n: int, purpose: str) -> Tensor:
    """n of the rows: all of them, or always the same random choice."""
    return x if n == len(x) else x[torch.randperm(len(x), generator=generator(purpose, len(x)))[:n]]
