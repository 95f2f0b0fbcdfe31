"""The Fréchet distance of Gaussians (squared Bures-Wasserstein), with its bias, its influence function and its limit.

No square root is taken of a matrix that is not symmetric: tr((S₁ S₂)^½) = ‖F₁ᵀ F₂‖_* (the sum of the singular values)
for any F with F Fᵀ = S, and its squares are the eigenvalues of F₁ᵀ S₂ F₁.
"""

import math

import torch
from torch import Tensor

from ..rng import generator
from .statistics import ROWS, Gaussian, gaussian

NEGATIVE_MASS = 1e-6  # share of the trace that rounding may turn into negative eigenvalues
ROUNDING = 1e-9  # share of the trace term that rounding may add to it before singular values are taken instead
SIZES = 8  # of subsets that the distance of unlimited samples is extrapolated from


def factor(covariance: Tensor) -> Tensor:
    """F [D, r] with F Fᵀ = S and r its rank; eigenvalues below D·eps of the largest count as 0.

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
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def trace_root(first: Tensor, second: Tensor) -> Tensor:
    """tr((S₁ S₂)^½) for covariances [D, D].

    Σ √λ(Lᵀ S₂ L) with the Cholesky factor L of S₁. Where S₁ has none, or where rounding errors of the eigenvalues
    could show in their roots, by its factor of full rank.
    """
    lower, failed = torch.linalg.cholesky_ex(first)
    fast = None if failed else _sum_of_roots(lower.T @ second @ lower)
    return thin_trace_root(factor(first), second) if fast is None else fast


def thin_trace_root(thin: Tensor, covariance: Tensor) -> Tensor:
    """tr((F Fᵀ S)^½) for F [D, r] and a covariance S [D, D]: Σ √λ(Fᵀ S F).

    Where rounding could show, the singular values of Fᵀ F_S, to which null directions add errors of the order of eps
    and not of √eps.
    """
    fast = _sum_of_roots(thin.T @ covariance @ thin)
    return torch.linalg.svdvals(thin.T @ factor(covariance)).sum() if fast is None else fast


def _sum_of_roots(matrix: Tensor) -> Tensor | None:
    """Σ √λ of a symmetric matrix; None if it is not positive definite, or too little so for its rounding errors.

    An eigenvalue has an error of about eps·λ_max, its root one of eps·λ_max/(2√λ).
    """
    if not len(matrix):
        return matrix.new_zeros(())
    values = torch.linalg.eigvalsh(matrix)
    roots = values.sqrt()  # NaN of a negative one, which passes no comparison
    rounding = torch.finfo(values.dtype).eps * values[-1] * roots.reciprocal().sum() / 2
    return roots.sum() if rounding < ROUNDING * roots.sum() else None


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m₁ - m₂|² + tr S₁ + tr S₂ - 2 tr((S₁ S₂)^½), in squared feature units.

    From the features themselves where there are fewer of them than dimensions (`Gaussian.thin`): that is exact, and
    faster by the square of the ratio.

    Raises:
        ValueError: if a covariance that was needed in full is none.
    Source: Heusel et al. 2017 (TTUR), equation 6; Dowson & Landau 1982.
    """
    if first.thin is not None and second.thin is not None:
        root = torch.linalg.svdvals(first.thin.T @ second.thin).sum()
    elif first.thin is not None:
        root = thin_trace_root(first.thin, second.covariance)
    elif second.thin is not None:
        root = thin_trace_root(second.thin, first.covariance)
    else:
        root = trace_root(first.covariance, second.covariance)
    mean = (first.mean - second.mean).square().sum()
    return (mean + first.covariance.trace() + second.covariance.trace() - 2 * root).item()


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
    """[N] influence of each feature vector z [N, D] of a sample on its distance to a fixed reference, on the CPU.

    2 (z - m)·(m - m_r) + (z - m)ᵀ (I - T)(z - m) - tr((I - T) S), T the optimal map from the sample to the reference;
    its mean over the sample is 0 by definition, and made so. Its standard deviation over √N is a standard error of the
    distance. At the null the true influence vanishes; that of two fitted Gaussians does not, and the standard error is
    then too large, by at most √2; so it is where there are fewer samples than features. A percentile bootstrap is no
    interval: drawing with replacement adds the finite-sample bias once more.
    """
    shift = 2 * (sample.mean - reference.mean)
    rest = torch.eye(len(shift)).to(sample.covariance) - optimal_map(sample.covariance, reference.covariance)
    parts = []
    for rows in z.split(ROWS):
        centred = rows.to(sample.mean) - sample.mean
        parts.append((centred @ shift + ((centred @ rest) * centred).sum(1)).cpu())
    values = torch.cat(parts)
    return values - values.mean()


def extrapolated_distance(z: Tensor, reference: Gaussian) -> float:
    """The distance that ever more vectors like z [N, D] would approach: a in the least-squares fit FD_n = a + b/n.

    For k = 1 … 8 the sample is cut into k disjoint parts of n ≈ N/k by a fixed random permutation of its own, and FD_n
    is the mean over the parts. Because the parts of every size hold the whole sample, the first-order error of a is
    that of FD_N, and `influence` gives its standard error. (At the null the second order is what counts; its variance
    is twice that of FD_N, and the standard error from `influence`, too large for FD_N, is right.)

    The bias of the reference, if that is a sample, stays.
    Source: Chong & Forsyth 2020.
    """
    distances, inverses = [], []
    for k in range(1, SIZES + 1):
        order = torch.randperm(len(z), generator=generator("extrapolated distance", k))
        parts = [gaussian(z[rows], reference.mean.device) for rows in order.tensor_split(k)]
        distances.append(sum(frechet_distance(part, reference) for part in parts) / k)
        inverses.append(sum(1 / part.n for part in parts) / k)
    y, x = torch.tensor(distances, dtype=torch.float64), torch.tensor(inverses, dtype=torch.float64)
    slope = ((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()
    return (y.mean() - slope * x.mean()).item()


def standard_error(influences: Tensor) -> float:
    """The standard error of a distance whose sample has these influences [N]."""
    return influences.std().item() / math.sqrt(len(influences))
