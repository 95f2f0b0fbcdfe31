"""Where the steps of a sampler begin and end, between data and noise."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register
from .schedules import Schedule
from .times import Span

# EDM's levels; where a path has no noise, or nothing else, at its end, spacings in σ/α or its logarithm reach for these
LEAST, MOST = 0.002, 80.0


@kind
class TimeGrid(ABC):
    """Times of the steps of a sampler, by any measure of noise."""

    @abstractmethod
    def nodes(self, count: int, schedule: Schedule, span: Span) -> Tensor:
        """[count] float64 rising times from the first to the last of the span, count >= 2."""

    def times(self, num_steps: int, schedule: Schedule, span: Span, denoised: bool = False) -> Tensor:
        """[num_steps + 1] float64 rising times; [num_steps] if the last step, to σ = 0, is not on the grid.

        Raises:
            ValueError: if there is no step on the grid.
        """
        count = num_steps + (not denoised)
        if count < 2:
            least = "2, the last of which goes to σ = 0," if denoised else "1"
            raise ValueError(f"num_steps must be at least {least} found {num_steps}.")
        return self.nodes(count, schedule, span)


def _even(count: int) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


def _pinned(times: Tensor, span: Span) -> Tensor:
    """The times with the very ends of the span as theirs."""
    ends = times.new_tensor(span)
    return torch.cat((ends[:1], times[1:-1].clamp(*span), ends[1:]))


def _levels(schedule: Schedule, span: Span) -> tuple[float, float]:
    """σ/α at both ends of a span, EDM's where it is 0 or infinite."""
    alpha, sigma = schedule.scales(torch.tensor(span, dtype=torch.float64))
    low, high = (sigma / alpha).tolist()
    return (low if low > 0 else LEAST), (high if math.isfinite(high) else MOST)


def _at_levels(levels: Tensor, schedule: Schedule, span: Span) -> Tensor:
    return _pinned(schedule.time(-2 * levels.log()), span)


@register(TimeGrid, "even")
class Even(TimeGrid):
    """Steps of one length in t, whatever it means on the path."""

    def nodes(self, count: int, schedule: Schedule, span: Span) -> Tensor:
        return torch.linspace(*span, count, dtype=torch.float64)


@register(TimeGrid, "quadratic")
class Quadratic(TimeGrid):
    """t_i = (√t_min + i/n (√t_max - √t_min))²: shorter steps near the data.

    Source: Song et al. 2021 (Denoising diffusion implicit models), appendix D.
    """

    def nodes(self, count: int, schedule: Schedule, span: Span) -> Tensor:
        low, high = (math.sqrt(end) for end in span)
        return _pinned((low + (high - low) * _even(count)).square(), span)


@register(TimeGrid, "karras")
class Karras(TimeGrid):
    """Noise levels r = σ/α evenly spaced in r^{1/ρ}, whatever the path.

    Where the path has r = 0 or infinite at an end, the level next to it is found as if that end had 0.002 or 80.

    Args:
        rho: ρ; larger values take shorter steps at low noise, 1 even ones.
    Raises:
        ConfigError: unless rho > 0.
    Source: Karras et al. 2022 (EDM), equation 5.
    """

    def __init__(self, rho: float = 7.0) -> None:
        if not rho > 0:
            raise ConfigError(f"karras: rho > 0 is needed, found {rho}.")
        self.rho = rho

    def nodes(self, count: int, schedule: Schedule, span: Span) -> Tensor:
        low, high = (level ** (1 / self.rho) for level in _levels(schedule, span))
        return _at_levels((low + (high - low) * _even(count)) ** self.rho, schedule, span)


@register(TimeGrid, "log_snr")
class LogSNR(TimeGrid):
    """Steps of one length in log(α²/σ²), the time in which exponential solvers integrate.

    Where it is infinite at an end of the path, it is taken as if σ/α were 0.002 or 80 there.

    Source: Lu et al. 2022 (DPM-Solver++).
    """

    def nodes(self, count: int, schedule: Schedule, span: Span) -> Tensor:
        low, high = (math.log(level) for level in _levels(schedule, span))
        return _at_levels((low + (high - low) * _even(count)).exp(), schedule, span)


@register(TimeGrid, "shifted")
class Shifted(TimeGrid):
    """Even steps in f = σ/(α + σ), moved to more noise: f' = s f/(1 + (s - 1) f), which takes 2 log s off the log-SNR.

    f counts from 0 to 1 between the ends of the times; on the linear path f = t. With the resolutions m and n of the
    images s = √(m/n) keeps what they show; FLUX has s = e^μ, μ linear in the number of tokens.

    Args:
        shift: s; 1 for none.
    Raises:
        ConfigError: unless shift > 0.
    Source: Esser et al. 2024 (Scaling rectified flow transformers), equation 23.
    """

    def __init__(self, shift: float = 3.0) -> None:
        if not shift > 0:
            raise ConfigError(f"shifted: shift > 0 is needed, found {shift}.")
        self.shift = shift

    def nodes(self, count: int, schedule: Schedule, span: Span) -> Tensor:
        alpha, sigma = schedule.scales(torch.tensor(span, dtype=torch.float64))
        low, high = (sigma / (alpha + sigma)).tolist()
        even = _even(count)
        share = low + (high - low) * self.shift * even / (1 + (self.shift - 1) * even)
        return _at_levels(share / (1 - share), schedule, span)


@register(TimeGrid, "discrete")
class Discrete(TimeGrid):
    """The indices that samplers of discrete chains take; index i of N is the time (i + 1)/N, and the last node t_min.

    Of n nodes, "leading" has i = ⌊N/n⌋ k, "linspace" the nearest to (N - 1) k/(n - 1) and "trailing" those to
    N - 1 - N k/n, for k = 0 … n - 1. "leading" starts below t_max. Indices beyond the ends of the path fall on them.

    Args:
        spacing: which of them.
        count: N.
        offset: added to the indices of "leading".
    Raises:
        ConfigError: if count < 2, or offset is not from 0 to count - 1.
        ValueError: if more nodes are asked for than there are indices.
    Source: Lin et al. 2024 (Common diffusion noise schedules and sample steps are flawed); von Platen et al. 2022
        (Diffusers), class DDIMScheduler.
    """

    def __init__(
        self, spacing: Literal["leading", "linspace", "trailing"] = "trailing", count: int = 1000, offset: int = 0
    ) -> None:
        if count < 2 or not 0 <= offset < count:
            raise ConfigError(f"discrete: count >= 2 and 0 <= offset < count are needed, found {count} and {offset}.")
        self.spacing, self.count, self.offset = spacing, count, offset

    def indices(self, count: int) -> Tensor:
        """[count] int64, rising."""
        if not 1 <= count <= self.count:
            raise ValueError(f"discrete: {count} steps were asked for, and there are {self.count} indices.")
        if self.spacing == "leading":
            found = torch.arange(count) * (self.count // count) + self.offset
            if int(found[-1]) >= self.count:
                raise ValueError(
                    f"discrete: with the offset {self.offset} the last of {count} indices is {int(found[-1])}, beyond "
                    f"{self.count - 1}. Lower the offset or num_steps."
                )
            return found
        if self.spacing == "linspace":
            return torch.linspace(0, self.count - 1, count, dtype=torch.float64).round().long()
        steps = torch.arange(count, dtype=torch.float64) * (self.count / count)
        return (self.count - steps).round().long().flip(0) - 1

    def nodes(self, count: int, schedule: Schedule, span: Span) -> Tensor:
        return torch.unique_consecutive(((self.indices(count) + 1).double() / self.count).clamp(*span))

    def times(self, num_steps: int, schedule: Schedule, span: Span, denoised: bool = False) -> Tensor:
        if denoised:
            return super().times(num_steps, schedule, span, True)
        times = self.nodes(num_steps, schedule, span)
        return torch.unique_consecutive(torch.cat((times.new_tensor(span[:1]), times)))
