"""Clocks of diffusions: the time u of a process in its own units against the time t of a model, 0 = data, 1 = noise."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register


@kind
class Clock(ABC):
    """u(t) = ∫₀ᵗ β, increasing from u(0) = 0 to u(1) = U.

    A process that is autonomous in u has the drift β(t) F(y) and the noise √β(t) G in t.

    Attributes:
        total: U.
    """

    total: float

    def __call__(self, t: Tensor) -> Tensor:
        """float64 u at times t, in the shape of t.

        Raises:
            ValueError: unless 0 <= t <= 1.
        """
        return self.at(inside(t, 1.0, "t"))

    def inverse(self, u: Tensor) -> Tensor:
        """float64 t at which the clock shows u, in the shape of u.

        Raises:
            ValueError: unless 0 <= u <= U.
        """
        return self.when(inside(u, self.total, "u"))

    @abstractmethod
    def at(self, t: Tensor) -> Tensor:
        """u of float64 times in [0, 1]."""

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """float64 β(t) = du/dt."""

    @abstractmethod
    def when(self, u: Tensor) -> Tensor:
        """t of float64 u in [0, U]."""

    @abstractmethod
    def advice(self, total: float) -> str:
        """Which arguments would make U = total, in words."""


def inside(value: Tensor, end: float, name: str) -> Tensor:
    """The value in float64, with rounding beyond the ends removed.

    Raises:
        ValueError: if it is an integer tensor (steps are not times), or lies outside [0, end] by more than rounding.
    """
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise ValueError(
            f"clock: {name} is a real number from 0 to {end:g}, found {value.dtype}. Step k of T, counted from 0, is "
            "the time t = (k + 1)/T."
        )
    value = torch.as_tensor(value, dtype=torch.float64)
    slack = 1e-6 * end
    if value.device.type == "cpu" and bool(((value < -slack) | (value > end + slack) | value.isnan()).any()):
        wrong = value[(value < -slack) | (value > end + slack) | value.isnan()].flatten()[0]
        raise ValueError(
            f"clock: 0 <= {name} <= {end:g} is needed, found {name} = {float(wrong):.9g}. t runs from 0 (data) to 1 "
            "(noise), and u from 0 to the clock's total."
        )
    return value.clamp(0.0, end)


@register(Clock, "constant")
class Constant(Clock):
    """u = total · t: t is the process's own time as a share of its horizon.

    Args:
        total: U > 0, the horizon.
    Raises:
        ConfigError: unless total > 0.
    """

    def __init__(self, total: float = 1.0) -> None:
        if not 0 < total < math.inf:
            raise ConfigError(f"constant: total > 0 is needed, found {total}.")
        self.total = total

    def at(self, t: Tensor) -> Tensor:
        return self.total * t

    def rate(self, t: Tensor) -> Tensor:
        return torch.full_like(t.double(), self.total)

    def when(self, u: Tensor) -> Tensor:
        return u / self.total

    def advice(self, total: float) -> str:
        return f"total: {total:.3g}"


@register(Clock, "linear")
class Linear(Clock):
    """u = β_min t + (β_max - β_min) t²/2, that of the variance-preserving SDE.

    Args:
        beta_min, beta_max: β at t = 0 and t = 1; U is their mean.
    Raises:
        ConfigError: unless 0 < beta_min < beta_max.
    Source: Song et al. 2021 (Score-based generative modeling through SDEs), appendix C.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min < beta_max < math.inf:
            raise ConfigError(f"linear: 0 < beta_min < beta_max is needed, found {beta_min} and {beta_max}.")
        self.beta_min, self.beta_max = beta_min, beta_max
        self.total = (beta_min + beta_max) / 2

    def at(self, t: Tensor) -> Tensor:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t.square()

    def rate(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t.double()

    def when(self, u: Tensor) -> Tensor:
        # 2u/(b + √(b² + 2(B - b)u)) is the root of the quadratic without cancellation at small u
        slope = self.beta_max - self.beta_min
        return 2 * u / (self.beta_min + (self.beta_min**2 + 2 * slope * u).sqrt())

    def advice(self, total: float) -> str:
        return f"beta_max: {2 * total - self.beta_min:.3g}"
