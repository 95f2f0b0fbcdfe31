"""The sliced Wasserstein distance: exact transport along random lines, with the standard error of the whole."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import register
from ..rng import generator
from ..types import Estimate
from .features import FeatureExtractor, Pixels
from .metric import FeatureMetric, Metric, Subject
from .neighbours import float64_device

CHUNK = 2**23  # projected numbers held at once


class SlicedDistance(NamedTuple):
    """SW₂² and what it is made of.

    Args:
        value: the mean over directions, in squared feature units.
        per_direction: [P] float64 W₂² along each direction.
        influence: [N] float64 of each row of x on the value, with mean 0.
    """

    value: float
    per_direction: Tensor
    influence: Tensor


def unit_vectors(n: int, dim: int) -> Tensor:
    """[n, dim] float64 directions, uniform on the sphere: always the same ones."""
    directions = torch.randn(n, dim, generator=generator("directions"), dtype=torch.float64)
    return directions / directions.norm(dim=1, keepdim=True)


def merged_grid(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the quantile functions of n and of m numbers are both constant.

    Returns:
        [K] float64 lengths of those intervals of (0, 1), and [K] the rank of the quantile of either side on each.
    """
    cells = torch.unique(torch.cat([torch.arange(n + 1) * m, torch.arange(1, m) * n]))  # in units of 1/(n m): exact
    left = cells[:-1]
    return cells.diff().double() / (n * m), left // m, left // n


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> SlicedDistance:
    """SW₂² = mean over u of W₂²(u·x, u·y), W₂² = ∫₀¹ (F⁻¹(q) - G⁻¹(q))² dq, exact for any two numbers of rows.

    The influence of a row x on W₂² along u is the Kantorovich potential φ(u·x) minus its mean, φ'(s) = 2 (s - T(s))
    with T = G⁻¹∘F the optimal map; between the order statistics of a sample T is constant. Its standard deviation over
    √N is the standard error due to the sample x, for these directions and this y.

    Args:
        x: [N, D].
        y: [M, D].
        directions: [P, D] unit vectors.
    Raises:
        ValueError: if a side is empty, or the dimensions disagree.
    Source: Bonneel et al. 2015 (Sliced and Radon Wasserstein barycenters), section 2; Santambrogio 2015 (Optimal
        transport for applied mathematicians), chapter 2, for one dimension.
    """
    if not len(x) or not len(y) or not x.shape[1:] == y.shape[1:] == directions.shape[1:]:
        raise ValueError(
            f"sliced Wasserstein: rows of one dimension are needed on both sides, found {list(x.shape)}, "
            f"{list(y.shape)} and directions {list(directions.shape)}."
        )
    n, m = len(x), len(y)
    x, y = (v.to(directions.device, torch.float64) for v in (x, y))
    lengths, ranks, others = (v.to(directions.device) for v in merged_grid(n, m))
    steps = torch.arange(1, n, device=directions.device) * m  # F jumps at i/n: the ranks of y that meet there
    below, above = (steps - 1) // n, steps // n
    found, influence = [], torch.zeros(n, dtype=torch.float64, device=directions.device)
    for u in directions.double().split(max(1, CHUNK // (n + m))):
        p, order = (u @ x.T).sort(1)
        q = (u @ y.T).sort(1).values
        found.append((p[:, ranks] - q[:, others]).square() @ lengths)
        middle = (q[:, below] + q[:, above]) / 2  # T there; one number unless i/n is also a jump of G
        slopes = p[:, 1:] + p[:, :-1] - 2 * middle
        potential = torch.nn.functional.pad((slopes * p.diff(dim=1)).cumsum(1), (1, 0))
        influence += torch.empty_like(potential).scatter_(1, order, potential).sum(0)
    per_direction, influence = torch.cat(found), influence / len(directions)
    return SlicedDistance(per_direction.mean().item(), per_direction, influence - influence.mean())


@register(Metric, "sliced_wasserstein")
class SlicedWasserstein(FeatureMetric):
    """Squared sliced Wasserstein distance between drawn samples and a split of the data, in the space of an extractor.

    Like every plug-in distance it is above 0 for a perfect sampler, by about c(1/n + 1/m) for n drawn and m reference
    items: "floor" is what the other split scores, brought to the size of the sample by that law. The standard error
    has the part of the drawn samples and that of the directions; the reference is held fixed.

    Args:
        features: the extractor.
        reference: the split that samples are compared with.
        projections: random directions, the same for every model.
    Source: Bonneel et al. 2015 (Sliced and Radon Wasserstein barycenters), section 2.
    """

    def __init__(
        self,
        features: FeatureExtractor = Pixels(),
        reference: Literal["train", "val", "test"] = "train",
        projections: int = 1000,
    ) -> None:
        if projections < 2:
            raise ValueError(f"sliced_wasserstein: projections must be at least 2, found {projections}.")
        self.features, self.reference, self.projections = features, reference, projections
        self.label = f"SW2-{features.label}" + ("" if reference == "train" else f"-{reference}")
        self.other: Literal["train", "test"] = "train" if reference == "test" else "test"
        self.splits = (reference, self.other)

    def start(self, subject: Subject) -> None:
        data = subject.dataset
        if not data.size(self.reference):
            raise ValueError(f"{self.label}: the split '{self.reference}' is empty. Choose another reference.")
        self.target = subject.features(self.features, self.reference)
        self.directions = unit_vectors(self.projections, self.target.shape[1]).to(float64_device(subject.device))
        self.known = self.fresh = None
        if data.size(self.other):
            fresh = subject.features(self.features, self.other)
            self.known = sliced_wasserstein(fresh, self.target, self.directions).value
            self.fresh = len(fresh)
        self.restart()

    def compute(self) -> dict[str, Estimate]:
        z = self.drawn()
        n, m = len(z), len(self.target)
        if n < 2:
            raise ValueError(f"{self.label}: at least 2 samples are needed for a standard error, found {n}.")
        value, per_direction, influence = sliced_wasserstein(z, self.target, self.directions)
        stderr = math.hypot(
            influence.std().item() / math.sqrt(n), per_direction.std().item() / math.sqrt(len(per_direction))
        )
        references = None
        if self.known is not None:
            floor = self.known * (1 / n + 1 / m) / (1 / self.fresh + 1 / m)
            references = {"floor": floor, f"{self.other} set": self.known}
        items = (influence + value).cpu()
        detail = f"{self.projections} projections"
        unit = "squared feature units"
        return {self.label: Estimate(value, stderr, n, unit, "lower", "plug-in", references, items, detail=detail)}
