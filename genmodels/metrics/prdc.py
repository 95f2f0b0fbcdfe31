"""Precision, recall, density and coverage: fidelity and diversity from nearest neighbours."""

import math
from collections.abc import Sequence
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
        holding: [m] how many balls of real items hold each fake.
        held: [n] how many fakes lie in the ball of each real item.
        alone: [m] in how many balls of real items each fake is the only one.
        recalled: [n] whether each real item lies in the ball of a fake.
        recalling: [m] how many real items lie in the ball of each fake and in no other's.
    """

    holding: Tensor
    held: Tensor
    alone: Tensor
    recalled: Tensor
    recalling: Tensor


def count_balls(real: Tensor, fake: Tensor, of_real: Tensor, of_fake: Tensor, ties: Ties) -> Balls:
    """Count who lies in whose balls, with exact comparisons, from blocks of distances.

    Args:
        real, fake: [n, D], [m, D].
        of_real, of_fake: [n], [m] radii of their balls.
        ties: whether a point on the edge lies inside ("inclusive") or not.
    """
    inclusive = ties == "inclusive"
    zeros = lambda x: torch.zeros(len(x), dtype=torch.float64, device=real.device)  # noqa: E731
    holding, held, last, balls, owner = zeros(fake), zeros(real), zeros(real), zeros(real), zeros(real)
    number = torch.arange(len(fake), dtype=torch.float64, device=real.device)
    for block in blocks(real, fake):
        i, j = block.rows, block.columns
        around = block.within(of_fake[None, j], inclusive).double()
        balls[i] += around.sum(1)
        owner[i] += around @ number[j]
        inside = block.within(of_real[i, None], inclusive).double()
        holding[j] += inside.sum(0)
        held[i] += inside.sum(1)
        last[i] += inside @ number[j]
    # the sum over a single fake is its number
    alone, recalling = (v[n == 1].long().bincount(minlength=len(fake)) for v, n in ((last, held), (owner, balls)))
    return Balls(holding, held, alone, balls > 0, recalling)


def _check(real: Tensor, fake: Tensor, k: int) -> None:
    for name, x in (("real", real), ("fake", fake)):
        if len(x) <= k or k < 1:
            raise ValueError(
                f"prdc: {name} has {len(x)} items, but more than k = {k} >= 1 are needed to have k neighbours each. "
                "Give more items, or choose another k."
            )
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"prdc: real has {real.shape[1]} features and fake has {fake.shape[1]}; use one extractor.")


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
    return {name: share.value for name, share in measure(real=real, fake=fake, k=k, ties=ties).items()}


class Share(NamedTuple):
    """A number with its standard error and, if it is a mean over the fakes, its items [m]."""

    value: float
    stderr: float
    items: Tensor | None = None


def measure(
    *, real: Tensor, fake: Tensor, k: int = 5, ties: Ties = "strict", group: int | None = None
) -> dict[str, Share]:
    """The four numbers with standard errors for another draw of fakes, the real items held fixed.

    Precision and density are means over independent fakes. Recall and coverage depend on the number of fakes: they are
    means over groups of so many.

    Their standard errors are delete-one jackknives over the fakes: without fake j coverage loses the balls in which it
    is the only one, and recall the real items that lie in its ball alone (the other balls stay as they are). Of
    coverage the square is at least the variance in expectation, whatever the model (Efron & Stein); both errors are too
    large where the number is near 1, by a factor of two and more. Binomial errors would be too small: neighbouring
    balls share their fakes, and a few outlying fakes whose balls are large hold many real items at once. How all four
    compare with the spread over draws is measured in `tests/unit/test_prdc.py`.

    With several groups the spread between them counts, if it is larger.

    Args:
        group: fakes to a group, more than k; None for a single group. Those left over count for precision and density.
    Raises:
        ValueError: if a set has no more than k items, or if their features differ in number.
    """
    group = len(fake) if group is None else group
    _check(real, fake[:group], k)
    of_real = radii(real, k)
    parts = fake.split(group)
    whole = [count_balls(real, part, of_real, radii(part, k), ties) for part in parts if len(part) == group]
    none = of_real.new_zeros(len(parts[-1]))  # balls of fakes left over, which are too few for theirs to compare
    rest = [count_balls(real, parts[-1], of_real, none, ties)] if len(parts) > len(whole) else []
    holding = torch.cat([balls.holding for balls in whole + rest])
    recalled = torch.stack([balls.recalled.double().mean() for balls in whole])
    covered = torch.stack([(balls.held > 0).double().mean() for balls in whole])
    return {
        "precision": _mean((holding > 0).double()),
        "recall": _mean_of_groups(recalled, _jackknife([balls.recalling for balls in whole], len(real))),
        "density": _mean(holding / k),
        "coverage": _mean_of_groups(covered, _jackknife([balls.alone for balls in whole], len(real))),
    }


def _mean(items: Tensor) -> Share:
    return Share(items.mean().item(), (items.var() / len(items)).sqrt().item(), items)


def _mean_of_groups(values: Tensor, variances: Tensor) -> Share:
    between = values.var() if len(values) > 1 else values.new_zeros(())
    return Share(values.mean().item(), (torch.maximum(variances.mean(), between) / len(values)).sqrt().item())


def _jackknife(lost: Sequence[Tensor], n: int) -> Tensor:
    """[G] variances of shares of n items, from how many of them each fake of a group is alone responsible for."""
    shares = torch.stack(list(lost)).double() / n
    group = shares.shape[1]
    return (group - 1) / group * (shares - shares.mean(1, keepdim=True)).square().sum(1)


def expected_coverage(n: int, m: int, k: int) -> float:
    """Coverage of n real items by m fakes of the same continuous law: 1 - Π_{i<k} (n - 1 - i)/(m + n - 1 - i).

    A real item is missed if its k nearest among the n - 1 other real items and the m fakes are all real.
    """
    return 1 - math.prod((n - 1 - i) / (m + n - 1 - i) for i in range(k))


@register(Metric, "prdc")
class PrecisionRecallDensityCoverage(FeatureMetric):
    """Precision and density (are samples plausible?), recall and coverage (is all there?), by nearest neighbours.

    They depend on the number n of reference items, recall and coverage also on that of samples: n is the smallest of
    both and `max_items`, by a fixed random choice of reference items, and recall and coverage are means over groups of
    n samples. n is stated with the numbers. Density may exceed 1. References: coverage and density of a perfect
    sampler, and the numbers of the other split (recall and coverage if it has n items). The standard errors cover
    another draw of samples, the reference held fixed (`measure`).

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
        drawn = self.drawn()
        n = min(len(self.real), len(drawn), self.max_items or len(drawn))
        real = chosen(self.real, n, "prdc reference")
        order = torch.cat(self.seeds).argsort()  # so that the groups depend on the seeds alone
        order = order[torch.randperm(len(order), generator=generator("prdc groups"))]
        found, references = self._measure(real, drawn[order], n), self._references(real)
        groups = f"{len(drawn) // n} groups of {n}" if len(drawn) >= 2 * n else f"{n}"
        size = {"precision": f"{len(drawn)}", "density": f"{len(drawn)}", "recall": groups, "coverage": groups}
        out = {}
        for name, share in found.items():
            items = None if share.items is None else torch.empty(len(drawn), dtype=torch.float64)
            if items is not None:
                items[order] = share.items.cpu()
            used = len(drawn) if items is not None else len(drawn) // n * n
            detail = f"k = {self.k}, {n} real, {size[name]} drawn" + ("" if self.ties == "strict" else ", inclusive")
            out[name] = Estimate(
                share.value, share.stderr, used, "share", "higher", "plug-in", references[name], items, detail=detail
            )
        return out

    def _measure(self, real: Tensor, fake: Tensor, group: int) -> dict[str, Share]:
        real, fake = real.to(self.device), fake.to(self.device)
        return measure(real=real, fake=fake, k=self.k, ties=self.ties, group=group)

    def _references(self, real: Tensor) -> dict[str, dict[str, float]]:
        """By estimate; found once for each size."""
        n = len(real)
        if n not in self.known:
            known = {"precision": {}, "recall": {}, "density": {"perfect sampler": 1.0}}
            known["coverage"] = {"perfect sampler": expected_coverage(n, n, self.k)}
            if self.fresh is not None:
                group = min(n, len(self.fresh))
                for name, share in self._measure(real, self.fresh, group).items():
                    if group == n or share.items is not None:
                        known[name][f"{self.other} set"] = share.value
            self.known[n] = known
        return self.known[n]


def chosen(x: Tensor, n: int, purpose: str) -> Tensor:
    """n of the rows: all of them, or always the same random choice."""
    return x if n == len(x) else x[torch.randperm(len(x), generator=generator(purpose, len(x)))[:n]]
