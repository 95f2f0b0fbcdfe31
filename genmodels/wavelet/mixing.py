"""How well Markov chains mix: autocorrelation times with their errors, effective sizes, and rank-normalised split R̂.

Traces are [T, B, *]: T recorded states of B chains, of any number of observables, each judged on its own.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 5.0  # autocorrelation times that are summed over: what an exponential decay leaves out is e^{-5} of it


class AutocorrelationTime(NamedTuple):
    """Recorded states that are worth one independent draw.

    Args:
        tau: [*] τ = 1 + 2 Σ_{t=1}^{W} ρ(t); NaN for a constant.
        stderr: [*] τ √(2 (2W + 1)/(T B)), inf where the window never closed: the chains are too short.
        window: [*] int64 W.
    """

    tau: Tensor
    stderr: Tensor
    window: Tensor


def _trace(x: Tensor, least: int, chains: int = 1) -> Tensor:
    if x.ndim < 2 or x.shape[0] < least or x.shape[1] < chains:
        raise ValueError(
            f"mixing: a trace [T, B, *] of at least {least} states of at least {chains} chains is needed, found "
            f"{list(x.shape)}."
        )
    if not x.isfinite().all():
        raise ValueError("mixing: the trace has values that are not finite.")
    return x.double()


def autocorrelation(x: Tensor, *, one_law: bool = True) -> Tensor:
    """[T, *] float64 ρ(t) of a trace [T, B, *]: autocovariances averaged over chains, over that at t = 0.

    Each lag is averaged over the T - t pairs that there are; NaN for a constant.

    Args:
        one_law: whether all chains sample one law, so that deviations are from the mean of all: then chains that have
            not mixed are correlated for ever. Otherwise they are from each chain's own mean, which biases τ by -τ/T.
    """
    x = _trace(x, 2)
    length, size = x.shape[0], x.abs().amax((0, 1))
    x = x - (x.mean((0, 1)) if one_law else x.mean(0))
    padded = 2 ** math.ceil(math.log2(2 * length))
    power = torch.fft.rfft(x, n=padded, dim=0).abs().square().mean(1)
    sums = torch.fft.irfft(power, n=padded, dim=0)[:length]
    pairs = torch.arange(length, 0, -1, dtype=torch.float64, device=x.device)
    covariance = sums / pairs.reshape(-1, *[1] * (sums.ndim - 1))
    # a constant's mean may be off by a rounding, which is no variance
    varies = covariance[0] > (1e-14 * size) ** 2
    return torch.where(varies, covariance / covariance[0], math.nan)


def autocorrelation_time(x: Tensor, *, window: float = WINDOW, one_law: bool = True) -> AutocorrelationTime:
    """τ of every observable of a trace [T, B, *], summed over the first window W >= `window` · max(τ(W), 1).

    Source: Sokal 1997, section 3; Madras & Sokal 1988, appendix C.
    """
    rho = autocorrelation(x, one_law=one_law)
    length = rho.shape[0]
    sums = 2 * rho.cumsum(0) - 1
    lags = torch.arange(length, device=rho.device).reshape(-1, *[1] * (rho.ndim - 1))
    closed = lags >= window * sums.clamp(min=1)
    found = closed.any(0)
    at = torch.where(found, closed.int().argmax(0), length - 1)
    tau = sums.gather(0, at[None])[0]
    stderr = tau.abs() * (2 * (2 * at + 1) / (length * x.shape[1])).sqrt()
    return AutocorrelationTime(tau, torch.where(found | tau.isnan(), stderr, math.inf), at)


def decay_time(x: Tensor, *, one_law: bool = True) -> Tensor:
    """[*] lag at which ρ falls to 1/e; inf if it does not.

    Between the lags around it log ρ is linear, as it is of exponentials; ρ is, if it is not positive after it.
    """
    rho = autocorrelation(x, one_law=one_law)
    below = rho < math.exp(-1)
    at = below.int().argmax(0)[None]
    after, before = rho.gather(0, at)[0], rho.gather(0, (at - 1).clamp(min=0))[0]
    straight = (before - math.exp(-1)) / (before - after)
    exponential = (1 + before.log()) / (before / after.clamp(min=1e-300)).log()
    share = torch.where(after > 0, exponential, straight)
    return torch.where(below.any(0), at[0] - 1 + share, torch.where(rho[0].isnan(), math.nan, math.inf))


def effective_size(x: Tensor, *, window: float = WINDOW, one_law: bool = True) -> Tensor:
    """[*] T B/τ: independent draws that would give as good a mean."""
    return x.shape[0] * x.shape[1] / autocorrelation_time(x, window=window, one_law=one_law).tau


def split_r_hat(x: Tensor) -> Tensor:
    """[*] rank-normalised split R̂ of a trace [T, B, *]: near 1 if the halves of all chains sample one law.

    The larger of that of normal scores of the values and that of their distances from the median, so that it sees
    unlike locations and unlike scales, with tails of any kind; NaN for a constant. Values up to 1.01 are good.

    Source: Vehtari et al. 2021.
    """
    x = _trace(x, 4)
    half = x.shape[0] // 2
    x = torch.cat((x[:half], x[-half:]), 1)
    ordered = x.flatten(0, 1).sort(0).values
    folded = (x - (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2).abs()
    return torch.maximum(_r_hat(_normal_scores(x)), _r_hat(_normal_scores(folded)))


def _normal_scores(x: Tensor) -> Tensor:
    """Φ^{-1}((r - 3/8)/(S + 1/4)) of the ranks r among all S values of an observable; equal values share their rank."""
    values = x.reshape(x.shape[0] * x.shape[1], -1).mT.contiguous()
    ordered = values.sort(1).values
    rank = (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True) + 1) / 2
    scores = torch.special.ndtri((rank.double() - 0.375) / (values.shape[1] + 0.25))
    return scores.mT.reshape(x.shape)


def _r_hat(x: Tensor) -> Tensor:
    """√((1 - 1/T) + var of the chains' means/mean of their variances)."""
    within, between = x.var(0).mean(0), x.mean(0).var(0)
    return torch.where(within + between > 0, ((1 - 1 / x.shape[0]) + between / within).sqrt(), math.nan)
