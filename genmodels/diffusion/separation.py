"""How well data are told apart under noise, λ(s): all that the kinetic energy of a Gaussian path asks of them.

For data x with E x = 0 and E|x|²/D = 1, seen as y = x + z/s with z ~ N(0, I),

    λ(s) = E|E[x | y]|²/D = E<x, E[x | y]>/D = 1 - mmse(s)/D,    mmse(s) = E|x - E[x | y]|²

grows from λ(0) = 0 to λ(∞) = 1. The best linear denoiser shows that λ(s) >= s²/(1 + s²), with equality for N(0, I)
alone, so that 1 - γ = (1 - λ)(1 + s²) lies in [0, 1]. It is what is interpolated: then λ keeps to its bounds between
nodes, and γ keeps its digits where λ is near 1.

Data of another mean or scale are described by two numbers more. With v = E|x - E x|²/D, their mean squared error at
x_t = α x + σ ε is v (1 - λ(√v α/σ)) for each component.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from ..distributions import GaussianMixture
from ..rng import SeedNoise
from ..types import sum_items
from .denoiser import Denoiser
from .interpolation import cubic, isotonic, pchip_slopes
from .observed import Moments, finite_set

NODES = 48  # signal-to-noise ratios of a curve
SMALLEST, LARGEST = 0.05, 1000.0  # the first and last of them; the first is 0.5/√D if that is smaller
NOISE = 4.0  # standard errors by which estimates of a growing function may fall before that is worth a word


class Separation(ABC):
    """λ of some data, their mean square and variance.

    Attributes:
        mean_square: E|x|²/D.
        variance: v = E|x - E x|²/D, at most the mean square.
        span: the signal-to-noise ratios between which λ is not simple, of centred data of unit variance.
    """

    mean_square: float
    variance: float
    span: tuple[float, float]

    @abstractmethod
    def residual(self, s: Tensor) -> Tensor:
        """1 - γ = (1 - λ)(1 + s²) in [0, 1], float64, at ratios s >= 0 of centred data of unit variance."""

    def __call__(self, s: Tensor) -> Tensor:
        """λ(s) float64, of centred data of unit variance."""
        s = s.double()
        return 1 - self.residual(s) / (1 + s.square())


class Spectrum(Separation):
    """λ of a Gaussian with these variances along its axes, whose mean is v.

    With μ_i = λ_i/v: λ(s) = mean of μ² s²/(1 + μ s²), and 1 - γ = mean of μ (1 + s²)/(1 + μ s²). For any other data
    with this covariance it is a lower bound, that of the best linear denoiser.

    Args:
        variances: [D] eigenvalues of the covariance, >= 0.
        mean_square: E|x|²/D; None for centred data.
    """

    def __init__(self, variances: Tensor, mean_square: float | None = None) -> None:
        self.variances = variances.double().clamp(min=0)
        self.variance = float(self.variances.mean())
        self.mean_square = self.variance if mean_square is None else mean_square
        _check_spread(self.variance)
        self.relative = self.variances / self.variance
        self.span = SMALLEST, LARGEST

    def residual(self, s: Tensor) -> Tensor:
        # numerator and denominator of μ(1 + s²)/(1 + μ s²) divided by 1 + s²: finite for every s
        share = 1 / (1 + s.double().square())[..., None]
        mu = self.relative.to(s.device)
        return (mu / (share + mu * (1 - share))).nan_to_num(0.0).mean(-1)

    def distance(self) -> float:
        """W2²/D from N(0, I) to the Gaussian of this covariance, and to its mean: a lower bound for other data.

        (E|x|² - tr C)/D + mean of (√λ_i - 1)².

        Source: Gelbrich 1990 (On a formula for the L2 Wasserstein metric between measures on
            Euclidean and Hilbert spaces).
        """
        return self.mean_square - self.variance + float((self.variances.sqrt() - 1).square().mean())


@dataclass(frozen=True)
class Curve(Separation):
    """λ at nodes, between which it is interpolated in log s.

    Below the first node γ is proportional to s², above the last one it is constant.

    Args:
        ratios: [K] float64, increasing: s.
        values: [K] λ, as estimated.
        stderr: [K] standard errors.
        inner: [K] the form E<x, E[x | y]>/D on the same draws, which must agree within noise; NaN if it is not known.
        mean_square, variance: of the data.
    """

    ratios: Tensor
    values: Tensor
    stderr: Tensor
    inner: Tensor
    mean_square: float
    variance: float

    @property
    def span(self) -> tuple[float, float]:
        return float(self.ratios[0]), float(self.ratios[-1])

    def mended(self) -> Tensor:
        """[K] λ made nondecreasing, and kept between s²/(1 + s²) and 1."""
        grown = isotonic(self.values, 1 / self.stderr.square().clamp(min=1e-12))
        square = self.ratios.square()
        return grown.clamp(max=1.0).maximum(square / (1 + square))

    def problems(self) -> list[str]:
        """What had to be mended beyond noise, a sentence each."""
        noise = NOISE * self.stderr.clamp(min=1e-6)
        fallen = (isotonic(self.values, 1 / self.stderr.square().clamp(min=1e-12)) - self.values).abs()
        below = self.ratios.square() / (1 + self.ratios.square()) - self.values
        said = []
        if (fallen > noise).any():
            k = int((fallen / noise).argmax())
            said.append(
                f"λ falls by more than its noise near s = {self.ratios[k]:.3g} (by {fallen[k]:.3g}, standard error "
                f"{self.stderr[k]:.2g}), which no data do; the nearest growing curve is used"
            )
        if (below > noise).any():
            k = int((below / noise).argmax())
            said.append(
                f"λ = {self.values[k]:.3g} at s = {self.ratios[k]:.3g} is below s²/(1 + s²), that of a Gaussian, which "
                "any data reach: the denoiser behind it is worse than a linear one there; the bound is used"
            )
        return said

    def residual(self, s: Tensor) -> Tensor:
        nodes, s = self.ratios.to(s.device), s.double()
        left = ((1 - self.mended()) * (1 + self.ratios.square())).clamp(0, 1).to(s.device)
        x = nodes.log()
        inside = cubic(x, left, pchip_slopes(x, left), s.clamp(nodes[0], nodes[-1]).log())[0]
        low = 1 - (1 - left[0]) * (s / nodes[0]).square()
        return torch.where(s < nodes[0], low, inside).clamp(0, 1)


def _check_spread(variance: float) -> None:
    if not variance > 0 or not math.isfinite(variance):
        raise ValueError(
            f"separation: the items have the variance {variance:g}, so that there is nothing to tell apart. "
            "Items that differ, and are finite, are needed."
        )


def default_ratios(dims: int) -> Tensor:
    """[48] evenly spaced in log s, from where items begin to be told apart."""
    first = min(SMALLEST, 0.5 / math.sqrt(dims))
    return torch.logspace(math.log10(first), math.log10(LARGEST), NODES, dtype=torch.float64)


def of_items(
    batches: Iterable[Tensor],
    *,
    ratios: Tensor | None = None,
    queries: int = 1000,
    leave_one_out: bool = False,
    dtype: torch.dtype = torch.float64,
    generator: Generator,
) -> Curve:
    """λ of the law that gives each of finitely many items the same weight.

    E[x | y] = Σ_j w_j x_j with w = softmax of -s²|y - x_j|²/2 is exact; the mean over y is one over items x_i and noise
    z drawn once for all s. Leaving item i out of the sum at its own y gives 1 - E|x_i - x̂_i|²/D instead, that of a
    denoiser that has not seen it: a lower bound of the λ of the law that the items were drawn from, where the λ of the
    items themselves says how far memory tells them apart.

    Args:
        batches: [B, *] items; iterating again starts a new pass with the same items.
        ratios: [K] increasing; as `default_ratios` if None.
        queries: how many y; each costs a comparison with every item.
        dtype: float32 or float64, in which items are compared.
    Raises:
        ValueError: if there are fewer than 2 items or queries, or if all items are the same.
    Source: Shaul et al. 2023 (On kinetic optimal probability paths for generative models), section 3.1.
    """
    found = Moments.of(batches)
    _check_spread(found.variance)
    s = default_ratios(found.dims) if ratios is None else ratios.double()
    drawn = finite_set(batches, found, s, queries, leave_one_out, dtype, generator)
    forms = [1 - drawn.error, 2 * drawn.inner - drawn.square]  # equal in the mean, because E|x|²/D = 1
    mean, stderr = _least_noisy(forms if leave_one_out else [*forms, drawn.square])
    return Curve(s.cpu(), mean, stderr, drawn.inner.mean(0).cpu(), found.mean_square, found.variance)


def _least_noisy(forms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[K] mean and standard error of that of some [M, K] with the same mean which spreads least, for each ratio.

    The error of x̂ is exact where items are told apart, and its square where they are not; either is wrong by the spread
    of |x|² at the other end.
    """
    means, errors = (torch.stack(part) for part in zip(*((f.mean(0), f.std(0)) for f in forms), strict=True))
    best = errors.argmin(0, keepdim=True)
    return means.gather(0, best)[0].cpu(), errors.gather(0, best)[0].cpu() / math.sqrt(len(forms[0]))


def of_covariance(batches: Iterable[Tensor]) -> Spectrum:
    """λ of the Gaussian with the mean and covariance of the items [B, *]: the best linear denoiser's.

    Raises:
        ValueError: as `of_items`.
    """
    found = Moments.of(batches)
    _check_spread(found.variance)
    return Spectrum(torch.linalg.eigvalsh(found.covariance(batches)), found.mean_square)


def at_least(curve: Curve, bound: Separation) -> Curve:
    """The larger of two lower bounds of one λ, at the nodes of the first."""
    other = bound(curve.ratios)
    stderr = torch.where(other > curve.values, 0.0, curve.stderr)
    return replace(curve, values=torch.maximum(curve.values, other), stderr=stderr)


def of_denoiser(
    denoiser: Denoiser, batches: Iterable[Tensor], *, ratios: Tensor | None = None, generator: Generator
) -> Curve:
    """1 - E|x - x̂|²/(D v) on noised items, [B, *] in model space without conditions: a lower bound of λ, reached by the
    exact denoiser.

    Each item is asked once for each ratio. Ratios that the denoiser's path does not reach are left out.

    Raises:
        ValueError: as `of_items`, or if no ratio is within reach.
    """
    found = Moments.of(batches)
    _check_spread(found.variance)
    s = default_ratios(found.dims) if ratios is None else ratios.double()
    path = denoiser.schedule
    log_snr = 2 * s.log() - math.log(found.variance)
    ends = torch.tensor((denoiser.t_min, denoiser.t_max), dtype=torch.float64)
    high, low = path.log_snr(ends).tolist()
    s, log_snr = s[(log_snr > low) & (log_snr < high)], log_snr[(log_snr > low) & (log_snr < high)]
    if not len(s):
        raise ValueError("separation: the denoiser's path reaches none of the ratios. Give ratios= that it does.")
    errors = []
    with torch.no_grad():
        for x in batches:
            eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
            of_batch = []
            for t in path.time(log_snr.to(x.device)):
                alpha, sigma = (c.to(x.dtype) for c in path.scales(t))
                clean = denoiser.predict(t.expand(len(x)), alpha * x + sigma * eps).x
                of_batch.append(sum_items((clean - x).double().square()) / (found.dims * found.variance))
            errors.append(torch.stack(of_batch, 1).cpu())
    values = 1 - torch.cat(errors)
    stderr = values.std(0) / math.sqrt(len(values))
    return Curve(s, values.mean(0), stderr, values.new_full((len(s),), math.nan), found.mean_square, found.variance)


def of_mixture(law: GaussianMixture, *, ratios: Tensor, seeds: int = 4000) -> Curve:
    """λ of a mixture of Gaussians from its exact denoiser, averaged over items and noise of the seeds."""
    dims, covariance = law.means.shape[1], law.covariance()
    variance = float(covariance.trace()) / dims
    mean_square = variance + float(law.mean().square().mean())
    noise = SeedNoise(seeds, purpose="separation")
    x = law.sample(noise, dtype=torch.float64).reshape(seeds, dims)
    z, root = noise.normal(dims, dtype=torch.float64), math.sqrt(variance)
    cleans = []
    for s in ratios.double().tolist():
        y = (x + root / s * z).reshape(-1, *law.shape)
        cleans.append((law.denoiser(y, 1.0, root / s).reshape(seeds, dims) - law.mean()) / root)
    clean, x = torch.stack(cleans, 1), ((x - law.mean()) / root)[:, None]
    square, inner, error = (part.mean(2) for part in (clean.square(), x * clean, (x - clean).square()))
    mean, stderr = _least_noisy([1 - error, 2 * inner - square, square])
    return Curve(ratios.double(), mean, stderr, inner.mean(0), mean_square, variance)


class NotMonotone(UserWarning):
    """An estimate of λ that had to be mended beyond its noise."""


def warn_of(curve: Curve, where: str) -> None:
    """Warn of what had to be mended."""
    for problem in curve.problems():
        warnings.warn(f"{where}: {problem}.", NotMonotone, stacklevel=3)
