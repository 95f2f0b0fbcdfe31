"""How long the increment of a local kernel may be, and the law of the times that scores are trained at."""

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from ..registry import ConfigError
from ..rng import Noise
from .clocks import Clock
from .gaussian_kernels import DiagonalKernel
from .local_kernels import local_kernel
from .process import Process

DEFECT, SHARE = 0.02, 0.99  # of the kernel's scale, for this share of states
LARGEST_DEFECT = 0.1  # of an increment that is given, beyond which a warning is due
HALF_STEP = 2.0**-25
Times = Literal["importance", "clock", "uniform"]


def defects(process: Process, u: Tensor, y: Tensor, increment: float) -> Tensor:
    """[B] how wrong the linearisation over an increment is, as a share of the kernel's own scale; the worst component.

    For an elementwise force |m₁ - m_ito|/√P₁ + |√(P₀/P₁) - 1|, orders 0, 1 and ito. Dense kernels, whose P₀ may be
    singular, are compared with P' of the Jacobian at their mean: |L⁻¹(m₁ - m_ito)| + ½ |L⁻¹ P' L⁻ᵀ - I|, per component.

    Args:
        u: [B] float64 times at which the increment begins.
        y: [B, *shape] states there.
    """
    if process.transition(u, u + increment, y) is not None:
        return torch.zeros(len(y), dtype=torch.float64)
    first, ito = (local_kernel(process, u, u + increment, y, order) for order in (1, "ito"))
    moved = first.solve(ito.mean - first.mean).double().abs().flatten(1)
    if isinstance(first, DiagonalKernel):
        zeroth = local_kernel(process, u, u + increment, y, 0)
        spread = (zeroth.scale / first.scale - 1).double().abs().flatten(1)
        return (moved + spread).amax(1)
    there = local_kernel(process, u, u + increment, first.mean, 1)
    ratio = torch.linalg.solve_triangular(first.lower, there.lower, upper=False)
    off = ratio @ ratio.mT - torch.eye(process.size, dtype=torch.float64)
    return moved.norm(dim=1) / math.sqrt(process.size) + 0.5 * off.flatten(1).norm(dim=1) / math.sqrt(process.size)


def defect(process: Process, u: Tensor, y: Tensor, increment: float) -> float:
    """The quantile of the defects that a share of 99 % of states stays below."""
    return float(torch.quantile(defects(process, u, y, increment), SHARE))


def choose_increment(process: Process, u: Tensor, y: Tensor) -> float:
    """The longest increment, up to U/2, whose defect is at most 2 % for 99 % of the states; by bisection of its log."""
    low, high = 1e-6 * process.clock.total, 0.5 * process.clock.total
    if defect(process, u, y, high) <= DEFECT:
        return high
    for _ in range(25):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if defect(process, u, y, middle) <= DEFECT else (low, middle)
    return low


def check_increment(process: Process, u: Tensor, y: Tensor, increment: float) -> float:
    """The defect of an increment, with a warning that names a better one if it is above 10 %."""
    wrong = defect(process, u, y, min(increment, 0.5 * process.clock.total))
    if wrong > LARGEST_DEFECT:
        advice = choose_increment(process, u, y)
        warnings.warn(
            f"model.increment: over {increment:g} the linearised force is wrong by {wrong:.3g} of the kernel's scale, "
            f"in 1 % of states by more, and scores are biased. An increment of {advice:.3g} keeps that below {DEFECT}; "
            "increment: null chooses it.",
            UserWarning,
            stacklevel=2,
        )
    return wrong


def check_settings(increment: float | None, steps: int, last: float) -> None:
    """
    Raises:
        ConfigError: unless the increment is None or in (0, last], and steps >= 1.
    """
    if increment is not None and not 0 < increment <= last:
        raise ConfigError(
            f"model.increment: a number in (0, U], U = {last:g} the end of the process's clock, or null is needed, "
            f"found {increment}."
        )
    if steps < 1:
        raise ConfigError(f"model.simulation_steps: at least 1 is needed, found {steps}.")


class TimesOfClock:
    """Law of the times u of training, from u(t_min) to U.

    "importance": density ∝ 1/(1 - e^{-u}) in u, hence ∝ β/(1 - e^{-u}) in t, under which the terms of a likelihood
    bound are of one size; F(u) = log(eᵘ - 1) up to a shift, so that u = log(1 + e^F). "clock" is uniform in u,
    "uniform" in t.

    Args:
        t_min: first time, > 0.
    Raises:
        ConfigError: unless 0 < t_min < 1.
    """

    def __init__(self, law: Times, clock: Clock, t_min: float) -> None:
        if not 0 < t_min < 1:
            raise ConfigError(f"model.t_min: 0 < t_min < 1 is needed, found {t_min}.")
        self.law, self.clock, self.t_min = law, clock, t_min
        self.first, self.last = float(clock(torch.tensor(t_min, dtype=torch.float64))), clock.total

    def quantile(self, share: Tensor) -> Tensor:
        """float64 u below which a share of the times lies."""
        if self.law == "uniform":
            return self.clock(self.t_min + (1 - self.t_min) * share)
        if self.law == "clock":
            return self.first + (self.last - self.first) * share
        low, high = (self._potential(torch.tensor(u, dtype=torch.float64)) for u in (self.first, self.last))
        return torch.logaddexp(low + (high - low) * share, torch.zeros_like(share)).clamp(self.first, self.last)

    def density(self, u: Tensor) -> Tensor:
        """float64 density at u, per unit of u."""
        if self.law == "uniform":
            return 1 / (self.clock.rate(self.clock.inverse(u)) * (1 - self.t_min))
        if self.law == "clock":
            return torch.full_like(u, 1 / (self.last - self.first))
        return 1 / (-torch.expm1(-u) * self.normalizer)

    @property
    def normalizer(self) -> float:
        """∫ du/(1 - e^{-u})."""
        low, high = (self._potential(torch.tensor(u, dtype=torch.float64)) for u in (self.first, self.last))
        return float(high - low)

    def sample(self, noise: Noise) -> Tensor:
        """[n] float64 u, one for each item of the noise."""
        return self.quantile(noise.uniform(dtype=torch.float64) + HALF_STEP)

    @staticmethod
    def _potential(u: Tensor) -> Tensor:
        """log(eᵘ - 1)."""
        return u + torch.log(-torch.expm1(-u))
