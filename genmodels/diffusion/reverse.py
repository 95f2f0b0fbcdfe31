"""Denoisers as what solvers integrate: the rows of a batch under their conditions, and the SDEs of a path."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register
from ..solvers.fields import RowField, narrow, tensors_of
from ..types import Condition, expand_like
from .denoiser import Denoiser
from .parametrization import Prediction
from .remembered import Pair, Remembered
from .schedules import Schedule


class DenoiserRows:
    """A denoiser under a condition for each row: called, the velocity of its ODE; and x̂, ε̂ for solvers that need them.

    Args:
        condition: [B, *], or None.
        known: what is kept of the times of a grid; None for nothing.
    """

    def __init__(self, denoiser: Denoiser, condition: Condition | None = None, known: Remembered | None = None) -> None:
        self.denoiser, self.condition, self.known = denoiser, condition, known
        self.schedule: Schedule = known or denoiser.schedule
        self.t_max = denoiser.t_max

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        shares = None if self.denoiser.prediction == "velocity" or self.known is None else self.known.shares(t)
        if shares is None:
            return self.denoiser.velocity(t, x, self.condition)
        return _combined(shares.velocity, x, self.denoiser.answer(t, x, self.condition))

    def predict(self, t: Tensor, x: Tensor) -> Prediction:
        shares = None if self.known is None else self.known.shares(t)
        if shares is None:
            return self.denoiser.predict(t, x, self.condition)
        p = self.denoiser.answer(t, x, self.condition)
        return Prediction(_combined(shares.clean, x, p), _combined(shares.eps, x, p))

    def select(self, rows: Tensor) -> "DenoiserRows":
        return DenoiserRows(self.denoiser, *narrow((self.condition,), rows), self.known)

    def tensors(self) -> tuple[Tensor, ...]:
        """What it depends on and gradients are wanted of."""
        return tensors_of(RowField(self.denoiser.velocity, self.condition))


def _combined(shares: Pair, x: Tensor, p: Tensor) -> Tensor:
    """[B, *shape] a x + b p, in the dtype of x; p itself if it is that."""
    p = p.to(x.dtype)
    return p if shares == (0, 1) else torch.add(x * shares[0], p, alpha=shares[1])


@kind
class Diffusivity(ABC):
    """e(t) of the SDE that is sampled with: how much noise is added, and removed again, on the way.

    Any e >= 0 leaves the law of x_t at every time as it is, if the denoiser is exact.

    Source: Karras et al. 2022 (EDM), equation 6 and appendix B.5; Albergo & Vanden-Eijnden 2023 (Building normalizing
        flows with stochastic interpolants).
    """

    @abstractmethod
    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        """e at float64 times, in their shape, per square root of unit time."""


@register(Diffusivity, "path")
class OfPath(Diffusivity):
    """e² = scale · g² with g² = 2σ (σ' - σ α'/α), the noise of the path's own SDE dx = (α'/α) x dt + g dW.

    It is infinite where α = 0: sampling then begins at α/σ = 1e-3, with short steps (grid: log_snr).

    Args:
        scale: 1 for the reverse of that SDE, 0 for the ODE.
    Raises:
        ConfigError: if scale < 0.
    Source: Song et al. 2021 (Score-based generative modeling through SDEs), equation 6; Kingma et al. 2021 (Variational
        diffusion models), section 3.1.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = _positive("path", scale)

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        s = schedule(t)
        return (self.scale * 2 * s.sigma * (s.dsigma - s.sigma * s.dalpha / s.alpha)).sqrt()


@register(Diffusivity, "constant")
class Constant(Diffusivity):
    """e = scale at all times.

    Args:
        scale: 0 for the ODE; large values need short steps near the data, where the score grows as 1/σ.
    Raises:
        ConfigError: if scale < 0.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = _positive("constant", scale)

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.full_like(t, self.scale, dtype=torch.float64)


@register(Diffusivity, "proportional")
class Proportional(Diffusivity):
    """e² = 2 · scale · σ²: noise is replaced at the rate `scale`, whatever the level; finite on every path.

    Args:
        scale: share of the noise replaced per unit time; 0 for the ODE.
    Raises:
        ConfigError: if scale < 0.
    Source: Karras et al. 2022 (EDM), equation 6, whose β(t) is the scale.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = _positive("proportional", scale)

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return math.sqrt(2 * self.scale) * schedule.scales(t)[1]


def _positive(name: str, scale: float) -> float:
    if not scale >= 0:
        raise ConfigError(f"{name}: scale >= 0 is needed, found {scale}.")
    return scale


class PathSDE:
    """dx = [v ∓ e²/2 ∇ log p_t] dt + e dW: the law of x_t as the ODE has it, - from noise to data and + the other way.

    One evaluation of the denoiser gives the drift v ± e² ε̂/(2σ). Noise is additive.

    Args:
        condition: [B, *], or None.
        to_data: whether it is solved with t falling.
    Raises:
        ValueError: when asked where e or e²/σ is infinite (α = 0, or σ = 0).
    Source: Song et al. 2021 (Score-based generative modeling through SDEs), equation 6; Karras et al. 2022 (EDM),
        equation 6.
    """

    noise_type: Literal["additive"] = "additive"
    calculus: Literal["ito"] = "ito"

    def __init__(
        self, denoiser: Denoiser, diffusivity: Diffusivity, condition: Condition | None = None, to_data: bool = True
    ) -> None:
        self.denoiser, self.diffusivity, self.condition, self.to_data = denoiser, diffusivity, condition, to_data

    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        clean, eps = self.denoiser.predict(t, x, self.condition)
        scales, e = self.denoiser.schedule(t), self._finite(t)
        pull = 0.5 * e.square() / scales.sigma
        if not bool(pull.isfinite().all()):
            self._refuse(t)
        push = scales.dsigma + pull if self.to_data else scales.dsigma - pull
        dalpha, push = (expand_like(c, x).to(x.dtype) for c in (scales.dalpha, push))
        return dalpha * clean + push * eps

    def diffusion(self, t: Tensor, x: Tensor) -> Tensor:
        return expand_like(self._finite(t), x).to(x.dtype).expand_as(x)

    def _finite(self, t: Tensor) -> Tensor:
        e = self.diffusivity(self.denoiser.schedule, t)
        if not bool(e.isfinite().all()):
            self._refuse(t)
        return e

    def _refuse(self, t: Tensor) -> None:
        raise ValueError(
            f"the SDE with diffusivity '{self.diffusivity.registered_name}' was asked at t = {t.flatten()[0]:.9g}, "
            "where it is singular. Start and end where 0 < α and 0 < σ."
        )

    def select(self, rows: Tensor) -> "PathSDE":
        return PathSDE(self.denoiser, self.diffusivity, *narrow((self.condition,), rows), self.to_data)

    def tensors(self) -> tuple[Tensor, ...]:
        """What it depends on and gradients are wanted of."""
        return tensors_of(RowField(self.denoiser.velocity, self.condition))
