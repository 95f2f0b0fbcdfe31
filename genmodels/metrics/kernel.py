"""Squared maximum mean discrepancy (MMD²): KID with its cubic kernel, and with Gaussian kernels."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import register
from ..rng import generator
from ..types import Estimate
from .features import FeatureExtractor, Pixels
from .metric import FeatureMetric, Metric, Subject
from .neighbours import block_size, float64_device, mean, slices, squared_by_product

Kernel = Callable[[Tensor, Tensor], Tensor]  # float64 [N, D], [M, D] -> [N, M]
BANDWIDTH_ITEMS = 1000


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """(x·y/D + 1)³.

    Source: Bińkowski et al. 2018 (Demystifying MMD GANs).
    """
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


class GaussianKernel:
    """Mean of exp(-|x - y|²/(2 s²)) over bandwidths s.

    Args:
        bandwidths: > 0, in feature units.
        centre: [D] a point near the data, which takes the rounding errors of far-away data off.
    """

    def __init__(self, bandwidths: tuple[float, ...], centre: Tensor) -> None:
        self.bandwidths, self.centre = bandwidths, centre

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squared = squared_by_product(x - self.centre, y - self.centre)
        return sum((squared / (-2 * s * s)).exp_() for s in self.bandwidths) / len(self.bandwidths)


class Sums(NamedTuple):
    """Of a kernel matrix.

    Args:
        rows, columns: [N], [M]; without the diagonal if both sets are one.
        squares: [] of all those squared.
        diagonal: [] the diagonal's own sum if both sets are one.
    """

    rows: Tensor
    columns: Tensor
    squares: Tensor
    diagonal: Tensor


def kernel_sums(kernel: Kernel, x: Tensor, y: Tensor, own: bool = False) -> Sums:
    """Sums over k(x_i, y_j) in float64, block by block.

    Args:
        own: y is x: leave out the diagonal.
    """
    rows = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    columns, squares, diagonal = rows.new_zeros(len(y)), rows.new_zeros(()), rows.new_zeros(())
    height, width = block_size(x.shape[1])
    for i in slices(len(x), height):
        left = x[i].double()
        for j in slices(len(y), width):
            values = kernel(left, y[j].double())
            if own:
                diagonal += _clear_diagonal(values, i.start - j.start)
            rows[i] += values.sum(1)
            columns[j] += values.sum(0)
            squares += values.square_().sum()
    return Sums(rows, columns, squares, diagonal)


def _clear_diagonal(block: Tensor, offset: int) -> float | Tensor:
    """Zeros on the diagonal of a square matrix, as far as it crosses a block of it, and the sum of what was there."""
    if not -block.shape[0] < offset < block.shape[1]:
        return 0.0
    diagonal = block.diagonal(offset)
    total = diagonal.sum()
    diagonal.zero_()
    return total


class Discrepancy(NamedTuple):
    """MMD² and its standard errors.

    Args:
        value: unbiased, hence below 0 about every other time if both laws are one.
        stderr: over draws of the second sample, the first held fixed.
        stderr_of_both: over draws of both samples.
    """

    value: float
    stderr: float
    stderr_of_both: float


def mmd(x: Tensor, y: Tensor, kernel: Kernel, own: Sums | None = None) -> Discrepancy:
    """1/(n(n-1)) Σ_{i≠j} k(x_i, x_j) + 1/(m(m-1)) Σ_{i≠j} k(y_i, y_j) - 2/(nm) Σ_ij k(x_i, y_j), never clipped.

    Standard errors from the Hoeffding decomposition. The projections 2 g(y_j) on single items, where
    g(y_j) = mean_{l≠j} k(y_j, y_l) - mean_i k(x_i, y_j), give the variance 4 Var(g)/m. The rest, with ζ the variance of
    the doubly centred kernel, gives 2 ζ_yy/m² (and 2 ζ_xx/n² + 4 ζ_xy/(nm) if x is drawn, too). 4/m times the sample
    variance of g holds twice that rest, which is taken off; where both laws are one, only the rest is left.

    Args:
        x: [n, D].
        y: [m, D].
        own: `kernel_sums(kernel, x, x, own=True)` if it is known.
    Raises:
        ValueError: if a sample has fewer than two items.
    Source: Gretton et al. 2012 (A kernel two-sample test), lemma 6; Bińkowski et al. 2018 (Demystifying MMD GANs).
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"MMD²: both samples need at least 2 items, found {n} and {m}.")
    xx = kernel_sums(kernel, x, x, own=True) if own is None else own
    yy, xy = kernel_sums(kernel, y, y, own=True), kernel_sums(kernel, x, y)
    of_x, of_y, x_to_y, y_to_x = xx.rows / (n - 1), yy.rows / (m - 1), xy.rows / m, xy.columns / n
    value = of_x.mean() + of_y.mean() - 2 * y_to_x.mean()
    rest_x = 2 * _rest(xx.squares / (n * (n - 1)), of_x, of_x) / (n * (n - 1))
    rest_y = 2 * _rest(yy.squares / (m * (m - 1)), of_y, of_y) / (m * (m - 1))
    rest = rest_x + rest_y + 4 * _rest(xy.squares / (n * m), x_to_y, y_to_x) / (n * m)
    from_x, from_y = 4 * (of_x - x_to_y).var() / n, 4 * (of_y - y_to_x).var() / m
    given = rest_y + (from_y - 2 * rest_y).clamp(min=0)
    both = rest + (from_x + from_y - 2 * rest).clamp(min=0)
    return Discrepancy(value.item(), given.sqrt().item(), both.sqrt().item())


def _rest(square: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """E (k(a, b) - E_b k(a, b) - E_a k(a, b) + E k)² from the mean square and the means over rows and columns."""
    return (square - rows.square().mean() - columns.square().mean() + rows.mean() ** 2).clamp(min=0)


def permutation_p(x: Tensor, y: Tensor, kernel: Kernel, permutations: int) -> float:
    """(1 + number of permutations with MMD² >= the observed)/(1 + permutations), the pooled items split at random.

    With a ∈ {0, 1}^N the membership of the first sample, all sums of MMD² follow from aᵀKa, K1 and the diagonal.
    """
    pooled, n, total = torch.cat([x, y]), len(x), len(x) + len(y)
    g = generator("permutations", n, total)
    first = [torch.arange(n)] + [torch.randperm(total, generator=g)[:n] for _ in range(permutations)]
    member = torch.zeros(total, 1 + permutations, dtype=torch.float64)
    member.scatter_(0, torch.stack(first, 1), 1.0)
    member = member.to(x.device)
    within, sums = member.new_zeros(1 + permutations), member.new_zeros(total)
    height, width = block_size(max(x.shape[1], 1 + permutations))
    for i in slices(total, height):
        for j in slices(total, width):
            values = kernel(pooled[i].double(), pooled[j].double())
            _clear_diagonal(values, i.start - j.start)
            within += (member[i] * (values @ member[j])).sum(0)
            sums[i] += values.sum(1)
    across = member.T @ sums - within
    rest = sums.sum() - within - 2 * across
    m = total - n
    found = within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * across / (n * m)
    tolerance = 1e-12 * sums.abs().sum() / total**2  # the same split in another order is a tie
    return (found >= found[0] - tolerance).sum().item() / (1 + permutations)


def median_distance(x: Tensor) -> float:
    """Median of the distances between rows of [N, D], over a fixed random choice of at most 1000 of them.

    Raises:
        ValueError: if it is 0.
    """
    chosen = x[torch.randperm(len(x), generator=generator("bandwidth", len(x)))[:BANDWIDTH_ITEMS]]
    value = torch.pdist(chosen.double()).median().item()
    if not value > 0:
        raise ValueError(
            "MMD²: half of all pairs of reference items coincide, so their median distance, 0, is no bandwidth. "
            "Choose other features."
        )
    return value


def kid_of_subsets(fake: Tensor, real: Tensor, subsets: int, size: int) -> list[float]:
    """KID of pairs of random subsets, as torch-fidelity draws them: RandomState(2020), fakes first, no replacement."""
    import numpy

    state = numpy.random.RandomState(2020)
    values = []
    for _ in range(subsets):
        y = fake[torch.from_numpy(state.choice(len(fake), size, replace=False))]
        x = real[torch.from_numpy(state.choice(len(real), size, replace=False))]
        values.append(mmd(x, y, cubic).value)
    return values


def kid_of_blocks(real: Tensor, fake: Tensor, size: int) -> Tensor:
    """[B] KID of disjoint blocks of so many items of each side, always cut by the same random order."""
    count = min(len(real), len(fake)) // size
    x, y = (
        v[torch.randperm(len(v), generator=generator("kid blocks", side))[: count * size]].split(size)
        for v, side in ((real, "real"), (fake, "fake"))
    )
    return torch.tensor([mmd(a, b, cubic).value for a, b in zip(x, y, strict=True)], dtype=torch.float64)


class KernelMetric(FeatureMetric):
    """MMD² between drawn samples and a split of the data; the kernel depends on the reference alone.

    Unbiased at every sample size: 0 for a perfect sampler, and below 0 about every other time. The standard error is
    that of the drawn samples, the reference held fixed, as ranks need it; that of both is stated beside it. Copies of
    the reference score far below 0, down to -(1/n + 1/m) times the trace of the centred kernel; but so do, now and
    then, honest samples of heavy-tailed features, so that a low value flags nothing: `authenticity` finds copies.
    """

    detail: str

    def __init__(self, features: FeatureExtractor, reference: Literal["train", "val", "test"]) -> None:
        self.features, self.reference = features, reference
        self.other = "train" if reference == "test" else "test"
        self.splits = (reference, self.other)

    @abstractmethod
    def choose_kernel(self, real: Tensor) -> Kernel:
        """The kernel for a reference [N, D]."""

    def start(self, subject: Subject) -> None:
        self.device = float64_device(subject.device)
        self.real = subject.features(self.features, self.reference).to(self.device)
        self.kernel = self.choose_kernel(self.real)
        self.own = kernel_sums(self.kernel, self.real, self.real, own=True)
        self.known = {"perfect sampler": 0.0}
        if subject.dataset.size(self.other) >= 2:
            fresh = subject.features(self.features, self.other).to(self.device)
            self.known[f"{self.other} set"] = mmd(self.real, fresh, self.kernel, self.own).value
        self.restart()

    def full(self, z: Tensor) -> Estimate:
        """The estimate from all pairs of items."""
        found = mmd(self.real, z, self.kernel, self.own)
        detail = f"{self.detail}, ± {found.stderr_of_both:.2g} if the reference is drawn anew, too"
        return Estimate(found.value, found.stderr, len(z), "1", "lower", "unbiased", self.known, detail=detail)


@register(Metric, "kid")
class KernelDistance(KernelMetric):
    """Kernel distance: unbiased MMD² of features with the kernel (x·y/D + 1)³; KID proper on FID's Inception features.

    Args:
        features: the extractor.
        reference: the split that samples are compared with.
        protocol: "full" takes all pairs of items; "blocks" the mean over disjoint random blocks of 1000 of each side,
            with the standard error of independent ones (over draws of both sides); "subsets" the mean over 100 pairs of
            random subsets of 1000, drawn as torch-fidelity draws them. Those overlap, so that their spread is no
            standard error and none is given.
    Source: Bińkowski et al. 2018 (Demystifying MMD GANs).
    """

    detail = "all pairs"
    subsets, subset_size = 100, 1000

    def __init__(
        self,
        features: FeatureExtractor = Pixels(),
        reference: Literal["train", "val", "test"] = "train",
        protocol: Literal["full", "blocks", "subsets"] = "full",
    ) -> None:
        super().__init__(features, reference)
        self.protocol = protocol
        name = getattr(features, "kernel_name", None) or f"KID-{features.label}"
        self.label = name + ("" if reference == "train" else f"-{reference}")

    def choose_kernel(self, real: Tensor) -> Kernel:
        return cubic

    def compute(self) -> dict[str, Estimate]:
        z = self.drawn().to(self.device)
        estimate = {"full": self.full, "blocks": self._of_blocks, "subsets": self._of_subsets}[self.protocol]
        return {self.label: estimate(z)}

    def _check_enough(self, z: Tensor, count: int) -> None:
        least = count * self.subset_size
        if min(len(z), len(self.real)) < least:
            raise ValueError(
                f"{self.label}: {self.protocol} of {self.subset_size} need {least} items of each side; found {len(z)} "
                f"drawn and {len(self.real)} of '{self.reference}'. Draw more, or set protocol: full."
            )

    def _of_blocks(self, z: Tensor) -> Estimate:
        self._check_enough(z, 2)
        found = kid_of_blocks(self.real, z, self.subset_size)
        stderr = (found.std() / math.sqrt(len(found))).item()
        detail = f"{len(found)} blocks of {self.subset_size}"
        return Estimate(found.mean().item(), stderr, len(z), "1", "lower", "unbiased", self.known, detail=detail)

    def _of_subsets(self, z: Tensor) -> Estimate:
        self._check_enough(z, 1)
        values = torch.tensor(kid_of_subsets(z, self.real, self.subsets, self.subset_size), dtype=torch.float64)
        spread = f"{self.subsets} overlapping subsets of {self.subset_size}, sd {values.std(correction=0).item():.2g}"
        return Estimate(values.mean().item(), None, len(z), "1", "lower", "unbiased", self.known, detail=spread)


@register(Metric, "mmd")
class MaximumMeanDiscrepancy(KernelMetric):
    """Unbiased MMD² of features with a Gaussian kernel, whose bandwidth is the median distance of reference items.

    Args:
        features: the extractor.
        reference: the split that samples are compared with, and that the bandwidth comes from.
        scales: the kernel is the mean over bandwidths of so many median distances.
        permutations: of the pooled items, for a p-value of "one law" as a further estimate, at least
            1/(1 + permutations); 0 for none.
    Source: Gretton et al. 2012 (A kernel two-sample test), lemma 6.
    """

    def __init__(
        self,
        features: FeatureExtractor = Pixels(),
        reference: Literal["train", "val", "test"] = "train",
        scales: tuple[float, ...] = (1.0,),
        permutations: int = 0,
    ) -> None:
        super().__init__(features, reference)
        if not scales or min(scales) <= 0 or permutations < 0:
            raise ValueError(f"mmd: scales must be > 0 and permutations >= 0, found {scales} and {permutations}.")
        self.scales, self.permutations = tuple(scales), permutations
        self.label = f"MMD2-{features.label}" + ("" if reference == "train" else f"-{reference}")

    def choose_kernel(self, real: Tensor) -> Kernel:
        median = median_distance(real)
        self.detail = f"median distance {median:.4g}"
        return GaussianKernel(tuple(scale * median for scale in self.scales), mean(real))

    def compute(self) -> dict[str, Estimate]:
        z = self.drawn().to(self.device)
        out = {self.label: self.full(z)}
        if self.permutations:
            p = permutation_p(self.real, z, self.kernel, self.permutations)
            detail = f"{self.permutations} permutations"
            out[f"{self.label} p"] = Estimate(p, None, len(z), "1", "none", "permutation", detail=detail)
        return out
