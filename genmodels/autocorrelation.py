"""Autocorrelation of the states of Markov chains, and the times in which they forget, with their errors.

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


def check_trace(x: Tensor, least: int, chains: int = 1) -> Tensor:
    """A trace [T, B, *] in float64; raises ValueError unless it is finite, of so many states and chains at least."""
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
    x = check_trace(x, 2)
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
