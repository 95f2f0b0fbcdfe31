"""Samplers of denoisers that add noise on the way: EDM's, with its churn, and predictor-corrector methods."""

import math
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..types import expand_like
from .base import Solver, State, Step
from .exponential import DenoisingSolver, Level, check_direction, estimates, mixed, path, white, wide
from .fields import DenoisingField

MOST_CHURN = math.sqrt(2) - 1  # γ above which a step would remove less noise than it adds (Karras et al. 2022)


class Churned(DenoisingSolver):
    """A step in r = σ/α for y = x/α, where dy/dr = ε̂, after noise was added: r̂ = (1 + γ) r, ŷ = y + √(r̂² - r²) s z.

    γ = min(s_churn/N, √2 - 1) over a grid of N steps, where s_min <= r <= s_max, and s = s_noise. r̂ is at most the last
    level at which the denoiser can be asked.

    Raises:
        ConfigError: unless s_churn >= 0, 0 <= s_min <= s_max and s_noise > 0.
    """

    def __init__(
        self, s_churn: float = 0.0, s_min: float = 0.0, s_max: float | None = None, s_noise: float = 1.0
    ) -> None:
        if not (s_churn >= 0 and 0 <= s_min <= (math.inf if s_max is None else s_max) and s_noise > 0):
            raise ConfigError(
                f"{self.registered_name}: s_churn >= 0, 0 <= s_min <= s_max and s_noise > 0 are needed, found "
                f"{s_churn}, {s_min}, {s_max} and {s_noise}."
            )
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise
        self.steps: int | None = None

    @property
    def draws(self) -> bool:
        return self.s_churn > 0

    def along(self, steps: int) -> "Churned":
        if self.steps is not None or self.s_churn == 0:
            return self
        told = copy(self)
        told.steps = steps
        return told

    def churned(self, field: DenoisingField, t: Tensor, s: Tensor, x: Tensor, noise: Any) -> tuple[Tensor, Tensor]:
        """The time and the state after noise was added."""
        if self.s_churn == 0:
            return t, x
        if self.steps is None:
            raise ValueError(
                f"integrate: '{self.registered_name}' with s_churn divides it by the number of steps: call "
                "along(steps) first, as controller 'fixed' and `sample` do."
            )
        now = Level.of(field, t)
        check_direction(Level.of(field, s).half - now.half, noise, self.registered_name)
        ratio = now.sigma / now.alpha
        inside = (ratio >= self.s_min) & (ratio <= (math.inf if self.s_max is None else self.s_max))
        factor = 1 + min(self.s_churn / self.steps, MOST_CHURN) * (inside & ratio.isfinite() & (s != t)).double()
        later = field.schedule.time(-2 * (ratio * factor).log())
        last = getattr(field, "t_max", field.schedule.t_max)  # where a network ends may lie before the end of its path
        later = torch.where(factor > 1, torch.maximum(later.clamp(max=last), t), t)
        then = Level.of(field, later)
        scale = torch.where(now.alpha > 0, then.alpha / now.alpha, 1.0)
        spread = then.alpha * ((then.sigma / then.alpha).square() - ratio.square()).clamp(min=0).sqrt()
        spread = torch.where(factor > 1, self.s_noise * spread, 0.0)
        return later, wide(scale, x) * x + wide(spread, x) * white(noise, t, s, x)


@register(Solver, "edm_euler")
class EDMEuler(Churned):
    """EDM's sampler with Euler's steps: y⁺ = ŷ + (r_s - r̂) ε̂, which is DDIM's step, after the churn; one evaluation.

    Args:
        s_churn: noise added over the whole grid; 0 for the ODE.
        s_min, s_max: noise levels σ/α within which it is added; an s_max of null is no bound.
        s_noise: standard deviation of what is added, a little above 1 against a loss of detail.
    Source: Karras et al. 2022 (EDM), algorithm 2 without lines 6 to 9.
    """

    order, stages = 1, 1

    def step(self, field: DenoisingField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        t, x = self.churned(field, t, s, x, noise)
        return Step(mixed(Level.of(field, s), *estimates(field, t, x)), None, ())


@register(Solver, "edm_heun")
class EDMHeun(Churned):
    """EDM's sampler: Heun's method y⁺ = ŷ + (r_s - r̂)(ε̂ + ε̂_s)/2 after the churn; order 2, two evaluations per step.

    A step from or to σ = 0 or α = 0 is Euler's (DDIM's).

    Args:
        s_churn: noise added over the whole grid; 0 for the ODE.
        s_min, s_max: noise levels σ/α within which it is added; an s_max of null is no bound.
        s_noise: standard deviation of what is added, a little above 1 against a loss of detail.
    Source: Karras et al. 2022 (EDM), algorithm 2.
    """

    order, stages = 2, 2

    def step(self, field: DenoisingField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        t, x = self.churned(field, t, s, x, noise)
        clean, eps = estimates(field, t, x)
        now, then = Level.of(field, t), Level.of(field, s)
        ahead = mixed(then, clean, eps)
        inner = now.half.isfinite() & then.half.isfinite()
        if s.device.type == "cpu" and not bool(inner.any()):
            return Step(ahead, None, ())
        at = torch.where(inner, s, t)  # a network need not answer where σ = 0
        other = estimates(field, at, torch.where(expand_like(inner, x), ahead, x))[1]
        run = torch.where(inner, then.sigma - then.alpha * (now.sigma / now.alpha), 0.0)
        return Step(ahead + wide(0.5 * run, x) * (other - eps), None, ())


@register(Solver, "predictor_corrector")
class PredictorCorrector(DenoisingSolver):
    """An ancestral step (DDPM's), then Langevin steps at its end: x ← x - ε ε̂/σ + √(2ε) z with ε = 2 r² σ².

    The paper has ε = 2 (r |z|/|g|)² for the score g = -ε̂/σ, with norms averaged over a batch; here stands what the
    quotient is for |ε̂| = |z|, so that an item depends on its own noise alone. The norms of that item alone will not do:
    steps that depend on the state leave another law than p, and in few dimensions |g| comes near 0. As the curvature of
    log p is at most 1/σ², steps of one length are stable for r < 1.

    Step k of m takes z from the area between the Brownian path and its chord over part k of the interval, which is
    independent of the increments that the predictor sees. At σ = 0 nothing is corrected.

    Args:
        corrections: m, at least 1.
        snr: r, the signal-to-noise ratio of a correction.
    Raises:
        ConfigError: unless corrections >= 1 and 0 < snr < 1.
    Source: Song et al. 2021 (Score-based generative modeling through SDEs), appendix G, algorithm 4.
    """

    order = 1

    def __init__(self, corrections: int = 1, snr: float = 0.16) -> None:
        if not (corrections >= 1 and 0 < snr < 1):
            raise ConfigError(
                f"predictor_corrector: corrections >= 1 and 0 < snr < 1 are needed, found {corrections} and {snr}."
            )
        self.corrections, self.snr, self.stages = corrections, snr, 1 + corrections

    @property
    def draws(self) -> bool:
        return True

    def step(self, field: DenoisingField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        clean, eps = estimates(field, t, x)
        now, then = Level.of(field, t), Level.of(field, s)
        h = then.half - now.half
        check_direction(h, noise, "predictor_corrector")
        mean = mixed(then._replace(sigma=then.sigma * torch.exp(-h)), clean, eps)
        x = mean + wide(then.sigma * (-torch.expm1(-2 * h)).sqrt(), x) * white(noise, t, s, x)
        noisy = (then.sigma > 0) & (s != t)
        if s.device.type == "cpu" and not bool(noisy.any()):
            return Step(x, None, ())
        at = torch.where(noisy, s, t)  # a network need not answer where σ = 0
        for k in range(self.corrections):
            z = self._normal(noise, t, s, k, x)
            g = estimates(field, at, x)[1]  # -σ times the score
            moved = x - wide(2 * self.snr**2 * then.sigma, x) * g + wide(2 * self.snr * then.sigma, x) * z
            x = torch.where(expand_like(noisy, x), moved, x)
        return Step(x, None, ())

    def _normal(self, noise: Any, t: Tensor, s: Tensor, k: int, x: Tensor) -> Tensor:
        """[B, *shape] standard normal from the area over part k of the interval, of variance length/12."""
        ends = torch.lerp(t, s, k / self.corrections), torch.lerp(t, s, (k + 1) / self.corrections)
        length = (ends[1] - ends[0]).abs()
        scale = torch.where(length > 0, 12 / torch.where(length > 0, length, 1.0), 0.0).sqrt()
        return wide(scale, x) * path(noise).increment(*ends).h.to(x.dtype)
