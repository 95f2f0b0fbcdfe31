"""The evidence bound on log p(x) of a denoiser's reverse SDE.

With y = T(x), λ the log-SNR and times t_0 < t_1 between which σ/α and α/σ are at least 1e-3,

    log p(x) >= log|det ∂T/∂x| + E[log p(y | y_{t_0})] - ½ ∫ E|ε̂ - ε|² |dλ| - KL(N(α y, σ²) ‖ N(0, σ²) at t_1)

where the generative model draws y_{t_1} ~ N(0, σ(t_1)²), runs dy = [f y - g² s] dt + g dw from t_1 to t_0 and draws y
from a decoder. For the exact score all but what the prior neglects is an equality, up to terms of order (σ/α)⁴ at t_0.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..rng import Noise, SeedNoise
from ..transforms import Dequantize
from ..types import Likelihood, expand_like, sum_items
from .denoiser import Denoiser
from .parametrization import SMALLEST_RATIO
from .times import Span

if TYPE_CHECKING:
    from .model import DiffusionModel

Decoder = Literal["gaussian", "discretized"]
BEYOND = 1e30  # an edge at infinity whose gradient is 0 and no NaN


class Constant(Noise):
    """One number in place of every draw: what a random transform does at the ends of its range."""

    def __init__(self, n: int, value: float, device: torch.device) -> None:
        super().__init__(n, device)
        self.value = value

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((self.n, *shape), self.value, dtype=dtype, device=self.device)

    uniform = normal


def evidence_bound(
    model: "DiffusionModel",
    x: Tensor,
    condition: Tensor | None,
    seeds: Tensor,
    *,
    probes: int,
    draws: int,
    decoder: Decoder = "gaussian",
) -> Tensor:
    """[draws, B] unbiased estimates of the bound, in nats and data units.

    Each draw cuts the path into `probes` parts of equal log-SNR and asks the network at one time in each (that is the
    law "importance", under which every time weighs alike), and once at t_0 for the decoder.

    The decoder is N(x̂(y_{t_0}), (σ/α)²). Items of discrete data are dequantised first, as for other likelihoods; under
    "discretized" they are not, but the decoder's mass of the item's cell [x, x + bin_width) (or the cell around x if
    the transform does not dequantise) is taken, the outermost cells of a `dequantize` reaching to infinity. That is
    meant for models trained on the levels themselves: others do not know, below the width of a cell, where in it an
    item is.

    Raises:
        ValueError: if the decoder is discretized but the data are not discrete.
    Source: Kingma et al. 2021 (Variational diffusion models); Song et al. 2021 (Maximum
        likelihood training of score-based diffusion models), theorem 3; Ho et al. 2020 (Denoising diffusion
        probabilistic models), equation 13, for the discretized decoder.
    """
    if decoder == "discretized" and model.bin_width is None:
        raise ValueError("likelihood: decoder discretized needs data with a bin_width. Use decoder: gaussian.")
    ends = span(model.denoiser)
    noise, dequantise = SeedNoise(seeds, purpose="elbo", device=x.device), None
    if decoder == "gaussian" and model.bin_width is not None:
        dequantise = SeedNoise(seeds, purpose="dequantise", device=x.device)
    values = []
    for _ in range(draws):
        y, log_volume = model._to_model_space(x, dequantise)
        loss = prior_divergence(model.denoiser, y, ends[1])
        for k in range(probes):
            u = (k + noise.uniform(dtype=torch.float64)) / probes
            eps = noise.normal(*y.shape[1:], dtype=y.dtype)
            loss = loss + diffusion_loss(model.denoiser, u, y, eps, condition, ends) / probes
        clean, width = decode(model.denoiser, y, noise.normal(*y.shape[1:], dtype=y.dtype), condition, ends[0])
        if decoder == "gaussian":
            log_p = log_volume + sum_items(log_normal(y - clean, width))
        else:
            low, high = cell(model, x)
            log_p = sum_items(log_mass((low - clean) / width, (high - clean) / width))
            log_p = log_p - x[0].numel() * math.log(model.bin_width)
        values.append(log_p - loss)
    return torch.stack(values)


def mean_over_draws(values: Tensor) -> Likelihood:
    """The mean of bounds [draws, B], with a standard error if there are two or more."""
    stderr = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else None
    return Likelihood(values.mean(0), "bound", stderr)


def span(denoiser: Denoiser) -> Span:
    """(t_0, t_1): the denoiser's times at which σ/α and α/σ are at least 1e-3."""
    limit = -2 * torch.tensor(SMALLEST_RATIO, dtype=torch.float64).log()
    first, last = (float(denoiser.schedule.time(end)) for end in (limit, -limit))
    return max(first, denoiser.t_min), min(last, denoiser.t_max)


def prior_divergence(denoiser: Denoiser, y: Tensor, t: float) -> Tensor:
    """[B] KL(N(α y, σ²) ‖ N(0, σ²)) = α² |y|²/(2 σ²) nats, at one time."""
    log_snr = denoiser.schedule.log_snr(torch.tensor(t, dtype=torch.float64))
    return 0.5 * float(log_snr.exp()) * sum_items(y.double().square())


def diffusion_loss(
    denoiser: Denoiser, u: Tensor, y: Tensor, eps: Tensor, condition: Tensor | None, ends: Span
) -> Tensor:
    """[B] ½ (λ(t_0) - λ(t_1)) |ε̂ - ε|² nats at the times that cut the range of λ at u [B]; uniform u give ½ ∫ dλ."""
    low, high = denoiser.schedule.log_snr(torch.tensor(ends, dtype=torch.float64, device=u.device))
    t = denoiser.schedule.time(low + (high - low) * u)
    alpha, sigma = (expand_like(c, y).to(y.dtype) for c in denoiser.schedule.scales(t))
    found = denoiser.predict(t, alpha * y + sigma * eps, condition).eps
    return 0.5 * (low - high) * sum_items((found - eps).double().square())


def decode(denoiser: Denoiser, y: Tensor, eps: Tensor, condition: Tensor | None, t: float) -> tuple[Tensor, float]:
    """x̂ [B, *shape] float64 of items noised to time t, and the decoder's standard deviation σ/α."""
    time = torch.tensor(t, dtype=torch.float64, device=y.device)
    alpha, sigma = (float(c) for c in denoiser.schedule.scales(time))
    clean = denoiser.predict(time.expand(len(y)), alpha * y + sigma * eps, condition).x
    return clean.double(), sigma / alpha


def cell(model: "DiffusionModel", x: Tensor) -> tuple[Tensor, Tensor]:
    """[B, *shape] float64 lower and upper edges, in model space, of the cells that discrete items stand for."""
    found = next((part for part in model.transform.modules() if isinstance(part, Dequantize)), None)
    if found is None:
        return tuple(model.transform(x.double() + way * model.bin_width / 2)[0] for way in (-1, 1))
    low, high = (model.transform(x.double(), Constant(len(x), end, x.device))[0] for end in (0.0, 1.0))
    low = torch.where(x <= 0, -BEYOND, low)
    return low, torch.where(x >= (found.levels - 1) * found.bin_width, BEYOND, high)


def log_normal(x: Tensor, scale: float) -> Tensor:
    """log N(x; 0, scale²) of each number, float64."""
    return -0.5 * (x.double() / scale).square() - math.log(scale) - 0.5 * math.log(2 * math.pi)


def log_mass(low: Tensor, high: Tensor) -> Tensor:
    """log(Φ(high) - Φ(low)) of each pair low < high, float64, also far out in the tails."""
    flip = low > -high  # the mass of [-high, -low] is the same, and its logarithms keep their digits
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return upper + torch.log(-torch.expm1(lower - upper))
