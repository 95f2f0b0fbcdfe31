"""Gaussian paths x_t = α(t) x + σ(t) ε: scales, their derivatives, and the log signal-to-noise ratio with its inverse.

Time runs from 0 (data) to 1 (noise) and is float64, as is all that follows from it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..registry import ConfigError, kind, register

BISECTIONS = 80  # halvings of an interval of length 1: below the spacing of float64 numbers wherever t > 1e-8
SLACK = 1e-6  # by which rounding to float32 may take a time over the ends


class Scales(NamedTuple):
    """α, σ and their time derivatives, float64, in the shape of t."""

    alpha: Tensor
    sigma: Tensor
    dalpha: Tensor
    dsigma: Tensor


def as_times(t: Tensor, last: float = 1.0) -> Tensor:
    """Times in float64.

    Args:
        last: of a path that ends later than at 1.

    Raises:
        ValueError: if they are integers (steps of a discrete chain are not times), or outside 0 to 1. Numbers on an
            accelerator are not looked at, because reading them would wait for it, nor are those of a traced program.
    """
    if not t.is_floating_point():
        raise ValueError(
            f"times are real numbers from 0 (data) to 1 (noise), found {t.dtype}. Step k of T, counted from 0, "
            "is the time (k + 1)/T."
        )
    hidden = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    if t.device.type == "cpu" and t.numel() and not hidden:
        low, high = (end.item() for end in t.detach().aminmax())
        if not (low >= -SLACK and high <= max(last, 1.0) + SLACK):
            raise ValueError(
                f"times run from 0 (data) to 1 (noise), found {low:g} to {high:g}. Divide steps by their number; "
                "`Schedule.time` is the time of a log-SNR."
            )
    return t.double()


@kind
class Schedule(ABC):
    """A Gaussian path from data to noise; its log-SNR = 2 log(α/σ) falls strictly with t.

    It is the law of dx = f x dt + g dW with f = `drift` and g² = `squared_diffusion`, started at the item. A schedule
    states these only if it has closed forms that its scales agree with (see `checks.check_schedule`).
    A schedule that is an `nn.Module` as well may keep what it knows of its path in buffers: they are part of its model.

    Attributes:
        t_min, t_max: ends of the times at which scales and derivatives are finite; models live between them.
        ready: False while the path is not known, because a checkpoint will bring it.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    ready: bool = True

    @abstractmethod
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(α, σ) float64 at times of any shape and precision."""

    def __call__(self, t: Tensor) -> Scales:
        """Scales with derivatives: by forward-mode differentiation, unless a schedule states them."""
        t = as_times(t, self.t_max)
        values, slopes = torch.func.jvp(self.scales, (t,), (torch.ones_like(t),))
        return Scales(*values, *slopes)

    def drift(self, t: Tensor) -> Tensor:
        """f = α'/α float64, per unit time; -infinite where α = 0."""
        s = self(t)
        return s.dalpha / s.alpha

    def squared_diffusion(self, t: Tensor) -> Tensor:
        """g² = dσ²/dt - 2 f σ² = -σ² dλ/dt float64, per unit time, λ the log-SNR; infinite where α = 0."""
        s = self(t)
        return 2 * s.sigma * (s.dsigma - s.sigma * s.dalpha / s.alpha)

    def fit(self, batches: Iterable[Tensor], *, generator: Generator) -> dict[str, Tensor]:
        """Find from the training data what the path depends on, before training; returns scalars to log.

        Args:
            batches: [B, *] items in model space; each iteration is a pass over the same ones.
        Raises:
            ConfigError: if no path can be made of them.
        """
        return {}

    def portray(self, folder: Path) -> list[Path]:
        """Write pictures of what `fit` found into a folder, made if there are any; their paths."""
        return []

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(α/σ) float64; infinite where one of them is 0."""
        alpha, sigma = self.scales(t)
        return 2 * (alpha.log() - sigma.log())

    def time(self, log_snr: Tensor) -> Tensor:
        """The time of a log-SNR, float64; t_min or t_max if it lies beyond theirs, infinite ones included."""
        high, low = self.log_snr(log_snr.new_tensor((self.t_min, self.t_max), dtype=torch.float64))
        return self._time(log_snr.double().clamp(low, high)).clamp(self.t_min, self.t_max)

    def _time(self, log_snr: Tensor) -> Tensor:
        """`time` by bisection, unless a schedule has a closed form."""
        low, high = torch.full_like(log_snr, self.t_min), torch.full_like(log_snr, self.t_max)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            later = self.log_snr(middle) > log_snr
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return (low + high) / 2


@register(Schedule, "linear")
class Linear(Schedule):
    """α = 1 - t, σ = t: straight paths from items to noise (rectified flow, conditional optimal transport).

    Source: Lipman et al. 2023 (Flow Matching), example II; Liu et al. 2023 (Flow straight and fast), section 2.
    """

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_times(t)
        return 1 - t, t

    def __call__(self, t: Tensor) -> Scales:
        alpha, sigma = self.scales(t)
        one = torch.ones_like(sigma)
        return Scales(alpha, sigma, -one, one)

    def _time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)


@register(Schedule, "vp")
class VariancePreserving(Schedule):
    """α = e^{-B/2}, σ² = 1 - e^{-B} with B(t) = β_min t + (β_max - β_min) t²/2.

    Begins at t_min = 1e-5, because σ' is infinite at 0.

    Args:
        beta_min, beta_max: noise rate at t = 0 and t = 1, per unit time.
    Raises:
        ConfigError: unless 0 < beta_min <= beta_max.
    Source: Song et al. 2021 (Score-based generative modeling through SDEs), equations 32-33 and appendix C.
    """

    t_min = 1e-5

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise ConfigError(f"vp: 0 < beta_min <= beta_max is needed, found {beta_min} and {beta_max}.")
        self.beta_min, self.slope = beta_min, beta_max - beta_min

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * self.slope * t)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = self._integral(as_times(t))
        return torch.exp(-0.5 * b), torch.sqrt(-torch.expm1(-b))

    def __call__(self, t: Tensor) -> Scales:
        alpha, sigma = self.scales(t)
        beta = self.beta_min + self.slope * t.double()
        return Scales(alpha, sigma, -0.5 * beta * alpha, 0.5 * beta * alpha.square() / sigma)

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.squared_diffusion(t)

    def squared_diffusion(self, t: Tensor) -> Tensor:
        return self.beta_min + self.slope * as_times(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.expm1(self._integral(as_times(t))).log()

    def _time(self, log_snr: Tensor) -> Tensor:
        return self._inverse(torch.nn.functional.softplus(-log_snr))

    def _inverse(self, b: Tensor) -> Tensor:
        """The t at which B(t) = b: the root of slope/2 t² + β_min t = b, written so that nothing cancels."""
        return 2 * b / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * self.slope * b))


@register(Schedule, "sub_vp")
class SubVariancePreserving(VariancePreserving):
    """α = e^{-B/2}, σ = 1 - e^{-B} with B(t) = β_min t + (β_max - β_min) t²/2: less noise than "vp" at every time.

    Begins at 0, where its σ' is β_min.

    Args:
        beta_min, beta_max: noise rate at t = 0 and t = 1, per unit time.
    Raises:
        ConfigError: unless 0 < beta_min <= beta_max.
    Source: Song et al. 2021 (Score-based generative modeling through SDEs), section 3.4 and appendix C.
    """

    t_min = 0.0

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = self._integral(as_times(t))
        return torch.exp(-0.5 * b), -torch.expm1(-b)

    def __call__(self, t: Tensor) -> Scales:
        alpha, sigma = self.scales(t)
        beta = self.beta_min + self.slope * t.double()
        return Scales(alpha, sigma, -0.5 * beta * alpha, beta * alpha.square())

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + self.slope * as_times(t))

    def squared_diffusion(self, t: Tensor) -> Tensor:
        t = as_times(t)
        return -(self.beta_min + self.slope * t) * torch.expm1(-2 * self._integral(t))

    def log_snr(self, t: Tensor) -> Tensor:
        b = self._integral(as_times(t))
        return -b - 2 * (-torch.expm1(-b)).log()

    def _time(self, log_snr: Tensor) -> Tensor:
        # σ/α = 2 sinh(B/2)
        return self._inverse(2 * torch.asinh(0.5 * torch.exp(-log_snr / 2)))


@register(Schedule, "trigonometric")
class Trigonometric(Schedule):
    """α = cos(πt/2), σ = sin(πt/2): variance preserving, at constant angular speed.

    Source: Albergo & Vanden-Eijnden 2023 (Building normalizing flows with stochastic interpolants), equation 5.
    """

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_times(t)
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)  # cos(π/2) would round to 6e-17

    def __call__(self, t: Tensor) -> Scales:
        alpha, sigma = self.scales(t)
        return Scales(alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha)

    def _time(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-log_snr / 2))


@register(Schedule, "cosine")
class Cosine(Schedule):
    """α = cos θ(t)/cos θ(0), σ² = 1 - α², θ(t) = π/2 (t + s)/(1 + s).

    σ² is formed as sin(θ - θ(0)) sin(θ + θ(0))/cos² θ(0), in which nothing cancels. Begins at t_min = 1e-5, because σ'
    is infinite at 0. The paper's clipping of β concerns its last discrete step, where α = 0; here predictions that
    determine nothing at α = 0 end earlier instead (see `parametrization.domain`).

    Args:
        offset: s, which keeps the noise level from vanishing too fast near the data.
    Raises:
        ConfigError: unless 0 < offset < 1.
    Source: Nichol & Dhariwal 2021 (Improved denoising diffusion probabilistic models), equation 17.
    """

    t_min = 1e-5

    def __init__(self, offset: float = 0.008) -> None:
        if not 0 < offset < 1:
            raise ConfigError(f"cosine: 0 < offset < 1 is needed, found {offset}.")
        self.start, self.speed = math.pi / 2 * offset / (1 + offset), math.pi / 2 / (1 + offset)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_times(t)
        square = torch.sin(self.speed * t) * torch.sin(self.speed * t + 2 * self.start)
        return torch.sin(self.speed * (1 - t)) / math.cos(self.start), square.sqrt() / math.cos(self.start)

    def __call__(self, t: Tensor) -> Scales:
        alpha, sigma = self.scales(t)
        dalpha = -self.speed * torch.cos(self.speed * (1 - t.double())) / math.cos(self.start)
        return Scales(alpha, sigma, dalpha, -alpha * dalpha / sigma)

    def _time(self, log_snr: Tensor) -> Tensor:
        alpha2, sigma2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        scale = math.cos(self.start) ** 2
        angle = torch.atan2((math.sin(self.start) ** 2 + scale * sigma2).sqrt(), (scale * alpha2).sqrt())
        return (angle - self.start) / self.speed


@register(Schedule, "edm")
class EDM(Schedule):
    """α = 1, σ(t) = (σ_min^{1/ρ} + t (σ_max^{1/ρ} - σ_min^{1/ρ}))^ρ: noise is added and the signal never shrinks.

    Evenly spaced times are the step sizes of EDM's sampler. t = 0 is σ_min, not 0.

    Args:
        sigma_min, sigma_max: σ at t = 0 and t = 1, in units of model space.
        rho: ρ; larger values take shorter steps at low noise.
    Raises:
        ConfigError: unless 0 < sigma_min < sigma_max and rho > 0.
    Source: Karras et al. 2022 (Elucidating the design space of diffusion-based generative models), equation 5.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not (0 < sigma_min < sigma_max and rho > 0):
            raise ConfigError(
                f"edm: 0 < sigma_min < sigma_max and rho > 0 are needed, found {sigma_min}, {sigma_max} and {rho}."
            )
        self.rho, self.low = rho, sigma_min ** (1 / rho)
        self.width = sigma_max ** (1 / rho) - self.low

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_times(t)
        return torch.ones_like(t), (self.low + self.width * t) ** self.rho

    def __call__(self, t: Tensor) -> Scales:
        alpha, sigma = self.scales(t)
        dsigma = self.rho * self.width * (self.low + self.width * t.double()) ** (self.rho - 1)
        return Scales(alpha, sigma, torch.zeros_like(alpha), dsigma)

    def _time(self, log_snr: Tensor) -> Tensor:
        return (torch.exp(-log_snr / (2 * self.rho)) - self.low) / self.width


@register(Schedule, "ve")
class VarianceExploding(Schedule):
    """α = 1, σ(t) = σ_min (σ_max/σ_min)^t: noise is added at an even rate of its logarithm.

    t = 0 is σ_min, not 0. The noise N(0, σ_max²) that models start from neglects what is left of the data at t = 1, so
    σ_max must be large beside them.

    Args:
        sigma_min, sigma_max: σ at t = 0 and t = 1, in units of model space.
    Raises:
        ConfigError: unless 0 < sigma_min < sigma_max.
    Source: Song et al. 2021 (Score-based generative modeling through SDEs), section 3.4 and appendix C.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ConfigError(f"ve: 0 < sigma_min < sigma_max is needed, found {sigma_min} and {sigma_max}.")
        self.start, self.growth = math.log(sigma_min), math.log(sigma_max / sigma_min)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_times(t)
        return torch.ones_like(t), torch.exp(self.start + self.growth * t)

    def __call__(self, t: Tensor) -> Scales:
        alpha, sigma = self.scales(t)
        return Scales(alpha, sigma, torch.zeros_like(alpha), self.growth * sigma)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (self.start + self.growth * as_times(t))

    def _time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2 - self.start) / self.growth


def from_flow_matching_time(tau: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(t, v) of this package from the time τ (1 = data) and velocity u = dx/dτ of papers on flow matching.

    t = 1 - τ and v(t, x) = dx/dt = -u(τ, x); the map is its own inverse.

    Source: Lipman et al. 2023 (Flow Matching), section 2, for τ and u.
    """
    return 1 - tau, -u
