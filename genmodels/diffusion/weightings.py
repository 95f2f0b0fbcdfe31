"""Weights on the squared error of a network's answer, stated as weights on |x̂ - x|² so that they compare.

At fixed x_t an error of the answer is p̂ - p = -(Δ/σ)(x̂ - x), so that W |x̂ - x|² = W (σ/Δ)² |p̂ - p|². With S = α²/σ²
the signal-to-noise ratio and λ = log S: the errors of eps, v (variance preserving) and edm themselves are S, S + 1 and
S + 1/s² times that of x.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..registry import ConfigError, kind, register
from .parametrization import Target, determinant
from .schedules import Scales


@kind
class Weighting(ABC):
    """A weight on the squared error of what a network predicts, as a function of time.

    One with parameters is also an `nn.Module`, which the model that holds it trains and saves with its own.
    """

    def loss(
        self, error: Tensor, prediction: Target, scales: Scales, density: Tensor, sigma_data: float | Tensor = 1.0
    ) -> Tensor:
        """[B] what training minimises, from the mean squared error |p̂ - p|²/D [B] of each item: its weighted value."""
        return self(prediction, scales, density, sigma_data).to(error.dtype) * error

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


@register(Weighting, "error_of")
class ErrorOf(CleanWeighting):
    """W = (Δ/σ)² of some prediction: 1 on the error of that, whatever the network predicts.

    "x" is 1, "eps" the weighting "snr", "v" (α² + σ²)²/σ², "velocity" (α λ'/2)², "score" S/σ², "edm" that of its name.

    Args:
        prediction: whose error is to have the weight 1.
    Source: Kingma & Gao 2023 (Understanding diffusion objectives as the ELBO with simple data augmentation).
    """

    def __init__(self, prediction: Target = "velocity") -> None:
        self.prediction = prediction

    def on_clean(self, scales: Scales, density: Tensor, sigma_data: float | Tensor) -> Tensor:
        return (determinant(self.prediction, scales, sigma_data) / scales.sigma).square()


@register(Weighting, "p2")
class P2(CleanWeighting):
    """W = S/(k + S)^γ: the simple loss of DDPM with the weight of low noise taken back.

    Args:
        gamma: γ >= 0; 0 is the weighting "snr".
        k: > 0.
    Raises:
        ConfigError: unless gamma >= 0 and k > 0.
    Source: Choi et al. 2022 (Perception prioritized training of diffusion models), section 3.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        if not (gamma >= 0 and k > 0):
            raise ConfigError(f"p2: gamma >= 0 and k > 0 are needed, found {gamma} and {k}.")
        self.gamma, self.k = gamma, k

    def on_clean(self, scales: Scales, density: Tensor, sigma_data: float | Tensor) -> Tensor:
        snr = _snr(scales)
        return snr / (self.k + snr) ** self.gamma


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


@register(Weighting, "uncertainty")
class Uncertainty(nn.Module, Weighting):
    """loss = w |p̂ - p|²/(D e^u) + u with a learnt u(log(σ/α)/4): every noise level weighs alike, whatever its error.

    For a network that stands still the best u is log E[w |p̂ - p|²/D | t], and the loss then has the value 1 + u. u is
    a sum of `features` cosines of fixed frequencies and phases, with learnt factors that begin at 0, where the loss is
    that of w.

    Args:
        weighting: w.
        features: how many cosines.
    Raises:
        ConfigError: if there is no feature, or if w is learnt too.
    Source: Karras et al. 2024 (EDM2), whose frequencies and phases are random.
    """

    def __init__(self, weighting: Weighting = EDM(), features: int = 128) -> None:
        super().__init__()
        if features < 1:
            raise ConfigError(f"uncertainty.features: at least 1 is needed, found {features}.")
        if isinstance(weighting, Uncertainty):
            raise ConfigError("uncertainty.weighting: a weighting that is not learnt itself is needed.")
        self.weighting = weighting
        even = (torch.arange(features, dtype=torch.float64) + 0.5) / features
        # even quantiles of N(0, 1) and a golden-ratio sequence: EDM2's laws of frequencies and phases, without chance
        self.register_buffer("frequencies", 2 * math.pi * torch.special.ndtri(even), persistent=False)
        phases = 2 * math.pi * torch.frac(torch.arange(1, features + 1).double() * (math.sqrt(5) - 1) / 2)
        self.register_buffer("phases", phases, persistent=False)
        self.factors = nn.Parameter(torch.zeros(features))

    def __call__(self, prediction: Target, scales: Scales, density: Tensor, sigma_data: float | Tensor = 1.0) -> Tensor:
        return self.weighting(prediction, scales, density, sigma_data) / self.log_error(scales).exp()

    def log_error(self, scales: Scales) -> Tensor:
        """u, in the shape of t."""
        label = (scales.sigma / scales.alpha).log() / 4
        angles = label[..., None] * self.frequencies.to(label) + self.phases.to(label)
        # products and a sum, which autocast leaves as they are; cosines times √2 have unit variance
        return (math.sqrt(2 / len(self.factors)) * angles.cos() * self.factors.to(label)).sum(-1)

    def loss(
        self, error: Tensor, prediction: Target, scales: Scales, density: Tensor, sigma_data: float | Tensor = 1.0
    ) -> Tensor:
        weighted = super().loss(error, prediction, scales, density, sigma_data)
        return weighted + self.log_error(scales).to(error.dtype)
