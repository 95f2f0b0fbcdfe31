"""Laws of the times at which a denoiser is trained."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register
from ..rng import Noise
from .schedules import Schedule, as_times

Span = tuple[float, float]
HALF_STEP = 2.0**-25  # uniform draws are multiples of 2^-24: their midpoints never reach 0 or 1


@kind
class TimeLaw(ABC):
    """A law on the times of a schedule: that of a distribution function F, restricted to a span.

    F may lack a constant factor and summand, which drop out where it is restricted. Times are F⁻¹ of uniform draws, so
    that every law can be stratified: then item i of n takes the draw (i + u)/n with one u for the batch, which is
    uniform for each item and spreads the batch evenly over the law.

    Args:
        stratified: whether the draws of a batch are spread evenly.
    Source: Kingma et al. 2021 (Variational diffusion models), appendix I.1, for stratification.
    """

    def __init__(self, stratified: bool = False) -> None:
        self.stratified = stratified

    @abstractmethod
    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        """F(t) before the restriction, for float64 times."""

    @abstractmethod
    def slope(self, t: Tensor, schedule: Schedule) -> Tensor:
        """F'(t), for float64 times strictly between the ends."""

    @abstractmethod
    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        """F⁻¹(u), for float64 u strictly between the values of F at the ends."""

    def sample(self, noise: Noise, schedule: Schedule, span: Span | None = None) -> Tensor:
        """[n] float64 times, one per item of the noise, within the span (t_min to t_max of the schedule if None)."""
        u = noise.uniform(dtype=torch.float64) + HALF_STEP
        if self.stratified:
            u = (torch.arange(noise.n, dtype=torch.float64, device=u.device) + u[:1]) / noise.n
        first, last = span or (schedule.t_min, schedule.t_max)
        low, high = self._mass(schedule, first, last, u.device)
        return self.quantile(low + (high - low) * u, schedule).clamp(first, last)

    def density(self, t: Tensor, schedule: Schedule, span: Span | None = None) -> Tensor:
        """F'(t)/(F(last) - F(first)) float64 at times within the span, per unit time."""
        t = as_times(t, schedule.t_max)
        low, high = self._mass(schedule, *(span or (schedule.t_min, schedule.t_max)), t.device)
        return self.slope(t, schedule) / (high - low)

    def _mass(self, schedule: Schedule, first: float, last: float, device: torch.device) -> Tensor:
        return self.cdf(torch.tensor((first, last), dtype=torch.float64, device=device), schedule)


@register(TimeLaw, "uniform")
class Uniform(TimeLaw):
    """Every time alike.

    Args:
        stratified: spread the draws of a batch evenly.
    """

    def __init__(self, stratified: bool = False) -> None:
        super().__init__(stratified)

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return t

    def slope(self, t: Tensor, schedule: Schedule) -> Tensor:
        return torch.ones_like(t)

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u


@register(TimeLaw, "logit_normal")
class LogitNormal(TimeLaw):
    """log(t/(1 - t)) ~ N(loc, scale²): most training in the middle, little at the ends.

    Args:
        loc: above 0 for more noise.
        scale: > 0.
        stratified: spread the draws of a batch evenly.
    Source: Esser et al. 2024 (Scaling rectified flow transformers), equation 19.
    """

    def __init__(self, loc: float = 0.0, scale: float = 1.0, stratified: bool = False) -> None:
        super().__init__(stratified)
        self.loc, self.scale = loc, _positive("logit_normal", scale)

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return torch.special.ndtr((torch.logit(t) - self.loc) / self.scale)

    def slope(self, t: Tensor, schedule: Schedule) -> Tensor:
        return _normal_density((torch.logit(t) - self.loc) / self.scale) / (self.scale * t * (1 - t))

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.loc + self.scale * torch.special.ndtri(u))


@register(TimeLaw, "log_normal")
class LogNormal(TimeLaw):
    """log(σ/α) ~ N(loc, scale²), whatever the schedule.

    Args:
        loc: of the logarithm of the noise level.
        scale: > 0.
        stratified: spread the draws of a batch evenly.
    Source: Karras et al. 2022 (EDM), table 1 and section 5, with P_mean and P_std.
    """

    def __init__(self, loc: float = -1.2, scale: float = 1.2, stratified: bool = False) -> None:
        super().__init__(stratified)
        self.loc, self.scale = loc, _positive("log_normal", scale)

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return torch.special.ndtr((-schedule.log_snr(t) / 2 - self.loc) / self.scale)

    def slope(self, t: Tensor, schedule: Schedule) -> Tensor:
        s = schedule(t)
        stretch = s.dsigma / s.sigma - s.dalpha / s.alpha  # d log(σ/α)/dt
        return _normal_density((-schedule.log_snr(t) / 2 - self.loc) / self.scale) * stretch / self.scale

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return schedule.time(-2 * (self.loc + self.scale * torch.special.ndtri(u)))


@register(TimeLaw, "importance")
class Importance(TimeLaw):
    """Density in proportion to g²/σ² = -dλ/dt, λ the log-SNR: the times that the evidence bound weights alike.

    Even in λ, so that F is -λ, and F⁻¹ the schedule's own inverse: closed where the schedule has one (for "vp" B =
    log(1 + e^F), and t from B), by bisection elsewhere. Under it the weighting "elbo" is the same at every time.

    Args:
        max_log_snr, min_log_snr: between these, because the whole of a path that reaches α = 0 or σ = 0 has no such
            law; the default ends are σ/α = 1e-3 and α/σ = 1e-3.
        stratified: spread the draws of a batch evenly.
    Raises:
        ConfigError: unless min_log_snr < max_log_snr.
    Source: Song et al. 2021 (Maximum likelihood training of score-based diffusion models).
    """

    def __init__(
        self, max_log_snr: float = 13.815511, min_log_snr: float = -13.815511, stratified: bool = False
    ) -> None:
        super().__init__(stratified)
        if not -math.inf < min_log_snr < max_log_snr < math.inf:
            raise ConfigError(
                f"importance: min_log_snr < max_log_snr is needed, found {min_log_snr} and {max_log_snr}."
            )
        self.high, self.low = max_log_snr, min_log_snr

    def cdf(self, t: Tensor, schedule: Schedule) -> Tensor:
        return -schedule.log_snr(t).clamp(self.low, self.high)

    def slope(self, t: Tensor, schedule: Schedule) -> Tensor:
        s, log_snr = schedule(t), schedule.log_snr(t)
        # a time that was drawn at an end may lie beyond it by rounding
        inside = (log_snr > self.low - 1e-6) & (log_snr < self.high + 1e-6)
        return torch.where(inside, 2 * (s.dsigma / s.sigma - s.dalpha / s.alpha), 0.0)

    def quantile(self, u: Tensor, schedule: Schedule) -> Tensor:
        return schedule.time(-u)

    def _mass(self, schedule: Schedule, first: float, last: float, device: torch.device) -> Tensor:
        ends = super()._mass(schedule, first, last, device)
        if device.type == "cpu" and not ends[0] < ends[1]:
            raise ValueError(
                f"importance: no time from {first:g} to {last:g} has a log-SNR between {self.low:g} and {self.high:g}. "
                "Widen min_log_snr and max_log_snr."
            )
        return ends


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def _positive(law: str, scale: float) -> float:
    if not (scale > 0 and math.isfinite(scale)):
        raise ConfigError(f"{law}: scale must be > 0, found {scale}.")
    return scale
