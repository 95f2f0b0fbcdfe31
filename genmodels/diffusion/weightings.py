"""Weights on the squared error of a network's answer, stated as weights on |x̂ - x|² so that they compare.

At fixed x_t an error of the answer is p̂ - p = -(Δ/σ)(x̂ - x), so that W |x̂ - x|² = W (σ/Δ)² |p̂ - p|². With S = α²/σ²
the signal-to-noise ratio and λ = log S: the errors of eps, v (variance preserving) and edm themselves are S, S + 1 and
S + 1/s² times that of x.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register
from .parametrization import Target, determinant
from .schedules import Scales


@kind
class Weighting(ABC):
    """A weight on the squared error of what a network predicts, as a function of time."""

    @abstractmethod
    def __call__(self, prediction: Target, scales: Scales, density: Tensor, sigma_data: float | Tensor = 1.0) -> Tensor:
        """Weight on |p̂ - p|² float64, in the shape of t.

        Args:
            density: of the law that the times were drawn from, for weightings that are integrals over time.
            sigma_data: root mean square of the data in model space.
        """


@register(Weighting, "uniform")
class Uniform(Weighting):
    """1 on |p̂ - p|² itself, whatever is predicted: W = (Δ/σ)²."""

    def __call__(self, prediction: Target, scales: Scales, density: Tensor, sigma_data: float | Tensor = 1.0) -> Tensor:
        return torch.ones_like(scales.alpha)


class CleanWeighting(Weighting):
    """A weight W on |x̂ - x|², and through it on the error of whatever a network predicts."""

    @abstractmethod
    def on_clean(self, scales: Scales, density: Tensor, sigma_data: float | Tensor) -> Tensor:
        """W float64, in the shape of t."""

    def __call__(self, prediction: Target, scales: Scales, density: Tensor, sigma_data: float | Tensor = 1.0) -> Tensor:
        delta = determinant(prediction, scales, sigma_data)
        return self.on_clean(scales, density, sigma_data) * (scales.sigma / delta).square()


def _snr(scales: Scales) -> Tensor:
    return (scales.alpha / scales.sigma).square()


def _rate(scales: Scales, density: Tensor) -> Tensor:
    """-dλ/dt / density: the log-SNR that a draw of t stands for."""
    return 2 * (scales.dsigma / scales.sigma - scales.dalpha / scales.alpha) / density


@register(Weighting, "snr")
class SNR(CleanWeighting):
    """W = S: 1 on |ε̂ - ε|², the simple loss of DDPM, whatever is predicted.

    Source: Ho et al. 2020 (Denoising diffusion probabilistic models), equation 14.
    """

    def on_clean(self, scales: Scales, density: Tensor, sigma_data: float | Tensor) -> Tensor:
        return _snr(scales)


@register(Weighting, "min_snr")
class MinSNR(CleanWeighting):
    """W = min(S, γ).

    Args:
        gamma: γ > 0, the largest weight.
    Source: Hang et al. 2023 (Efficient diffusion training via min-SNR weighting strategy), section 3.4.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ConfigError(f"min_snr: gamma must be > 0, found {gamma}.")
        self.gamma = gamma

    def on_clean(self, scales: Scales, density: Tensor, sigma_data: float | Tensor) -> Tensor:
        return _snr(scales).clamp(max=self.gamma)


@register(Weighting, "edm")
class EDM(CleanWeighting):
    """W = S + 1/s², s the root mean square of the data: 1 on the error of EDM's network, whatever is predicted.

    Source: Karras et al. 2022 (EDM), section 5 and table 1 (λ(σ) with their σ = σ/α).
    """

    def on_clean(self, scales: Scales, density: Tensor, sigma_data: float | Tensor) -> Tensor:
        return _snr(scales) + sigma_data**-2


@register(Weighting, "elbo")
class ELBO(CleanWeighting):
    """W = S/2 · (-dλ/dt)/q(t), q the density of the times.

    The expected loss times D is then ½ ∫ |ε̂ - ε|² dλ, the diffusion term of the evidence bound in nats, for any
    schedule and any law of the times (which only change its variance).

    Source: Kingma et al. 2021 (Variational diffusion models), equations 15 and 18.
    """

    def on_clean(self, scales: Scales, density: Tensor, sigma_data: float | Tensor) -> Tensor:
        return 0.5 * _snr(scales) * _rate(scales, density)


@register(Weighting, "sigmoid")
class Sigmoid(CleanWeighting):
    """W = S/2 · sigmoid(bias - λ) · (-dλ/dt)/q(t): the evidence bound's terms, with those of fine detail faded out.

    Like `elbo` it is an integral over the log-SNR, which schedule and law of the times do not change.

    Args:
        bias: log-SNR at which the weight has fallen to a half.
    Source: Kingma & Gao 2023 (Understanding diffusion objectives as the ELBO with simple data augmentation),
        appendix D.
    """

    def __init__(self, bias: float = 2.0) -> None:
        self.bias = bias

    def on_clean(self, scales: Scales, density: Tensor, sigma_data: float | Tensor) -> Tensor:
        snr = _snr(scales)
        return 0.5 * snr * torch.sigmoid(self.bias - snr.log()) * _rate(scales, density)
