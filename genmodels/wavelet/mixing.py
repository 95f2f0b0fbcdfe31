"""How well Markov chains mix: times of decay, effective sizes, and rank-normalised split R̂.

Traces are [T, B, *]: T recorded states of B chains, of any number of observables, each judged on its own.
"""

import math

import torch
from torch import Tensor

from ..autocorrelation import WINDOW, autocorrelation, autocorrelation_time, check_trace


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
    x = check_trace(x, 4)
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
