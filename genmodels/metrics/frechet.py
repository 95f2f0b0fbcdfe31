"""The Fréchet distance between Gaussians fitted to features, its bias and its standard error."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..registry import register
from ..rng import generator
from ..types import Estimate
from .features import FeatureExtractor, Pixels
from .metric import FeatureMetric, Metric, Subject
from .statistics import Gaussian, gaussian

NEGATIVE_MASS = 1e-6  # share of the trace that rounding may turn into negative eigenvalues


def factor(covariance: Tensor) -> tuple[Tensor, bool]:
    """F [D, D] with F Fᵀ = S, and whether S is singular to working precision.

    Raises:
        ValueError: if negative eigenvalues add up to more than 1e-6 of the trace: S is no covariance.
    """
    values, vectors = torch.linalg.eigh(covariance)
    trace, negative = values.clamp(min=0).sum(), -values.clamp(max=0).sum()
    if negative > NEGATIVE_MASS * trace:
        raise ValueError(
            f"Fréchet distance: negative eigenvalues add up to {(negative / trace).item():.1e} of the trace, so this "
            "is no covariance. Accumulate it in float64 about a shift (`Moments`)."
        )
    singular = values[0] <= len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors * values.clamp(min=0).sqrt(), bool(singular)


def trace_root(first: Tensor, second: Tensor) -> Tensor:
    """tr((S₁ S₂)^½) for covariances [D, D], without a square root of a matrix that is not symmetric.

    With S = F Fᵀ it is Σ √λ(F₁ᵀ S₂ F₁); for singular S the sum of the singular values of F₁ᵀ F₂, where null directions
    contribute rounding errors of the order of eps and not of √eps.
    """
    (f, singular), (g, also) = factor(first), factor(second)
    if singular or also:
        return torch.linalg.svdvals(f.T @ g).sum()
    return torch.linalg.eigvalsh(f.T @ second @ f).clamp(min=0).sqrt().sum()


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m₁ - m₂|² + tr S₁ + tr S₂ - 2 tr((S₁ S₂)^½), in squared feature units.

    Raises:
        ValueError: if a covariance is none.
    Source: Heusel et al. 2017 (TTUR), equation 6; Dowson & Landau 1982.
    """
    mean = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return (mean + traces - 2 * trace_root(first.covariance, second.covariance)).item()


def bias_constant(covariance: Tensor) -> float:
    """C(S) in E[FD] ≈ C(S)(1/n₁ + 1/n₂) for two samples of one Gaussian; drop 1/n of a reference that is known exactly.

    C(S) = Σᵢ λᵢ + ½ (Σᵢⱼ λᵢ λⱼ/(λᵢ + λⱼ) + ½ Σᵢ λᵢ), the second order of the distance in the noise of mean and
    covariance; C(I) = D(D + 5)/4.
    """
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    sums = values[:, None] + values
    harmonic = torch.where(sums > 0, values[:, None] * values / sums.clamp(min=torch.finfo(sums.dtype).tiny), 0.0)
    return (1.25 * values.sum() + 0.5 * harmonic.sum()).item()


def optimal_map(source: Tensor, target: Tensor) -> Tensor:
    """T [D, D], symmetric, with T S_source T = S_target: the optimal transport between centred Gaussians.

    T = S_t^½ (S_t^½ S_s S_t^½)^-½ S_t^½, with the pseudo-inverse where it is singular.
    """
    values, vectors = torch.linalg.eigh(target)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner, basis = torch.linalg.eigh(root @ source @ root)
    kept = inner > len(inner) * torch.finfo(inner.dtype).eps * inner[-1]
    inverse = torch.where(kept, inner.clamp(min=torch.finfo(inner.dtype).tiny).rsqrt(), 0.0)
    half = root @ basis
    return (half * inverse) @ half.T


def influence(z: Tensor, sample: Gaussian, reference: Gaussian) -> Tensor:
    """[N] influence of each feature vector z [N, D] of a sample on its distance to a fixed reference.

    2 (z - m)·(m - m_r) + (z - m)ᵀ (I - T)(z - m) - tr((I - T) S), T the optimal map from the sample to the reference.
    Its standard deviation over √N is a standard error of the distance; a percentile bootstrap is none, because drawing
    with replacement adds the finite-sample bias once more.
    """
    centred = z.to(sample.mean) - sample.mean
    rest = torch.eye(len(sample.mean)).to(sample.covariance) - optimal_map(sample.covariance, reference.covariance)
    quadratic = ((centred @ rest) * centred).sum(1) - (rest * sample.covariance).sum()
    return 2 * centred @ (sample.mean - reference.mean) + quadratic


@register(Metric, "frechet")
class Frechet(FeatureMetric):
    """Fréchet distance between drawn samples and a split of the data, in the space of an extractor.

    It falls with the number of samples even for a perfect sampler (`bias_constant`), so numbers compare only at equal
    sample sizes; the reference "floor" is what a perfect sampler would score at these. The standard error is that of
    the drawn samples (`influence`), the reference held fixed.

    Args:
        features: the extractor.
        reference: the split that samples are compared with.
        allow_few: accept fewer samples than twice the number of features, where the covariance is poorly known.
    Source: Heusel et al. 2017 (TTUR), equation 6; Chong & Forsyth 2020 for the bias.
    """

    def __init__(
        self,
        features: FeatureExtractor = Pixels(),
        reference: Literal["train", "val", "test"] = "train",
        allow_few: bool = False,
    ) -> None:
        self.features, self.reference, self.allow_few = features, reference, allow_few
        self.label = f"FD-{features.label}" + ("" if reference == "train" else f"-{reference}")

        self.splits = ("train", "test") if reference != "val" else ("val", "test")

    def start(self, subject: Subject) -> None:
        data = subject.dataset
        real = subject.features(self.features, self.reference)
        self._check_enough(real, f"the split '{self.reference}'")
        self.target = gaussian(real)
        self.constant = bias_constant(self.target.covariance)
        other = "train" if self.reference == "test" else "test"
        self.known = {}
        if data.size(other) >= 2:
            self.known[f"{other} set"] = frechet_distance(gaussian(subject.features(self.features, other)), self.target)
        if data.levels is not None and data.bin_width is not None:
            noise = gaussian(self.features(uniform_noise(data, self.target.n)).cpu())
            self.known["uniform noise"] = frechet_distance(noise, self.target)
        self.restart()

    def compute(self) -> dict[str, Estimate]:
        z = self.drawn()
        self._check_enough(z, "the sample")
        drawn = gaussian(z)
        value = frechet_distance(drawn, self.target)
        stderr = influence(z, drawn, self.target).std().item() / math.sqrt(len(z))
        floor = self.constant * (1 / len(z) + 1 / self.target.n)
        references = {"floor": floor, **self.known}
        return {self.label: Estimate(value, stderr, len(z), "squared feature units", "lower", "plug-in", references)}

    def _check_enough(self, z: Tensor, what: str) -> None:
        least = 2 if self.allow_few else 2 * z.shape[1]
        if len(z) < least:
            raise ValueError(
                f"{self.label}: {what} has {len(z)} items for {z.shape[1]} features; at least {least} are needed for a "
                "usable covariance. Draw more, choose an extractor with fewer features, or set allow_few: true."
            )


def uniform_noise(dataset: Dataset, n: int) -> Tensor:
    """[n, *shape] items of independent, uniformly drawn levels: always the same ones."""
    levels = torch.randint(0, dataset.levels, (n, *dataset.shape), generator=generator("uniform noise"))
    return levels * dataset.bin_width
