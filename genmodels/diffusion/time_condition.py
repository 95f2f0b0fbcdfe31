"""What a network is told of the time: a label. The scales of the path, targets and solvers keep the time itself."""

from abc import ABC, abstractmethod
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register
from .parametrization import SMALLEST_RATIO
from .schedules import Schedule


@kind
class TimeCondition(ABC):
    """The label that a network sees in place of the time t.

    What a network can learn depends on it (two times of one label get one answer at equal x_t), and so does how fast
    its answer changes with t. α, σ, what the answer means and the steps of solvers depend on t alone.
    """

    @abstractmethod
    def __call__(self, t: Tensor, schedule: Schedule) -> Tensor:
        """The label, in the shape of t."""

    def domain(self, schedule: Schedule) -> tuple[float, float]:
        """First and last time of a path that have a finite label.

        Raises:
            ConfigError: if the label does not fit the path.
        """
        return schedule.t_min, schedule.t_max


@register(TimeCondition, "identity")
class Identity(TimeCondition):
    """The time itself."""

    def __call__(self, t: Tensor, schedule: Schedule) -> Tensor:
        return t


@register(TimeCondition, "shared")
class Shared(TimeCondition):
    """E-TSDM: times below t̃ share the left edge of their interval, f(t) = max{tᵢ : tᵢ <= t}; later ones are their own.

    Where σ grows like √t, the derivative of the exact noise ε̂(x, t) by t is infinite at t = 0. Within an interval the
    shared answer does not change with t at all; it jumps at the n edges, and there is the regression averaged over the
    interval, off by at most σ(t̃) K Δt + B max(σ(tᵢ) - σ(tᵢ₋₁)) with B the largest score and K its Lipschitz constant
    in t.

    Edges are decimal fractions, rounded once to the precision of the times that they are compared with: t = 0.06 begins
    an interval of t̃ = 0.1 and n = 5 in every precision, which 3 t̃/n or, in float32, ⌊50 t⌋ would miss.

    Args:
        intervals: n, of equal length.
        until: t̃, a time of the path.
        edges: the n + 1 edges 0 = t₀ < … < tₙ = t̃, in place of `intervals` and `until`.
        first: what the first interval is told in place of 0; the first step of a chain, t = 1/T, where that is told.
    Raises:
        ConfigError: if there is no interval, if the edges do not increase from 0, if `first` is not within the first
            interval, or if t̃ is no time of the path.
    Source: Yang et al. 2024 (Lipschitz Singularities in Diffusion Models).
    """

    def __init__(
        self, intervals: int = 5, until: float = 0.1, edges: tuple[float, ...] | None = None, first: float = 0.0
    ) -> None:
        if edges is None:
            if intervals < 1:
                raise ConfigError(f"shared.intervals: at least 1 is needed, found {intervals}.")
            step = Fraction(repr(float(until))) / intervals
            edges = tuple(float(i * step) for i in range(intervals + 1))
        if len(edges) < 2 or edges[0] != 0 or any(low >= high for low, high in pairwise(edges)):
            raise ConfigError(
                f"shared: edges 0 = t₀ < t₁ < … < t̃ are needed, found {list(edges)}. Begin at 0 and let them increase: "
                "t̃ (`until`) must be positive."
            )
        if not 0 <= first < edges[1]:
            raise ConfigError(f"shared.first: a time from 0 to before {edges[1]:g} is needed, found {first}.")
        self.edges, self.first = tuple(float(edge) for edge in edges), float(first)

    def __call__(self, t: Tensor, schedule: Schedule) -> Tensor:
        edges = torch.tensor(self.edges, dtype=torch.float64).to(t)
        index = torch.bucketize(t.detach().contiguous(), edges[1:-1], right=True)
        told = torch.tensor((self.first, *self.edges[1:]), dtype=torch.float64).to(t)
        return torch.where(t < edges[-1], told[index], t)

    def domain(self, schedule: Schedule) -> tuple[float, float]:
        if not schedule.t_min < self.edges[-1] <= schedule.t_max:
            raise ConfigError(
                f"shared: t̃ = {self.edges[-1]:g} is no time of this path, which runs from {schedule.t_min:g} to "
                f"{schedule.t_max:g}. Choose `until` (or the last edge) between them."
            )
        return super().domain(schedule)


@register(TimeCondition, "log_snr")
class LogSNR(TimeCondition):
    """EDM's label c_noise = log(σ/α)/4, which is -1/8 of the log-SNR 2 log(α/σ).

    As a function of it ε̂ has a bounded derivative on any path, which towards the data vanishes if their density is
    smooth; as a function of t it need not, for the label itself changes like log t. The label is infinite where a scale
    is 0, so it is used where σ/α lies between 1e-3 and 1e3.

    Args:
        factor: of log(σ/α).
    Raises:
        ConfigError: unless factor > 0.
    Source: Karras et al. 2022 (EDM), table 1.
    """

    def __init__(self, factor: float = 0.25) -> None:
        if not factor > 0:
            raise ConfigError(f"log_snr.factor: a number > 0 is needed, found {factor}.")
        self.factor = factor

    def __call__(self, t: Tensor, schedule: Schedule) -> Tensor:
        return -self.factor / 2 * schedule.log_snr(t)

    def domain(self, schedule: Schedule) -> tuple[float, float]:
        limit = -2 * torch.tensor(SMALLEST_RATIO, dtype=torch.float64).log()
        return float(schedule.time(limit)), float(schedule.time(-limit))


@register(TimeCondition, "discrete")
class Discrete(TimeCondition):
    """The time counted in steps, T t: what networks of discrete-time models were trained to see.

    After k noising steps the time is t = k/T. The paper counts steps from 1: the label k = T t is 0 for the clean item.
    Code of such chains counts them from 0: with `first: 0` the label is T t - 1, which at the steps of the schedule
    "discrete" is the index into its table of ᾱ, and -1 for the clean item, which networks of such chains have never
    seen. Networks of diffusers have a scale and an offset of time of their own for this: use one of the two, not both.

    Frequencies inside such networks are made for 0 … T; those of this package are made for about 0 … 1.

    Args:
        steps: T.
        whole: whether to round down to the step that has begun.
        first: the label after the first noising step, 1 or 0.
    Raises:
        ConfigError: unless steps >= 1.
    Source: Ho et al. 2020 (Denoising diffusion probabilistic models), section 2.
    """

    def __init__(self, steps: int = 1000, whole: bool = False, first: Literal[0, 1] = 1) -> None:
        if steps < 1:
            raise ConfigError(f"discrete.steps: at least 1 is needed, found {steps}.")
        self.steps, self.whole, self.first = steps, whole, first

    def __call__(self, t: Tensor, schedule: Schedule) -> Tensor:
        if not self.whole:
            return self.steps * t + (self.first - 1)
        # the product may round to just below a step: the beginning of that step, in the precision of t, decides
        index = (self.steps * t.detach()).round()
        begins = (index.double() / self.steps).to(t)
        return torch.where(begins <= t, index, index - 1) + (self.first - 1)


@register(TimeCondition, "remap")
class Remap(TimeCondition):
    """Another clock: L(t^p), where L is linear between given points.

    A clock in which σ grows linearly (p = 1/2 for "vp", whose σ is √(β_min t) at first) takes the singularity of ε̂ out
    of a network, without sharing anything.

    Args:
        power: p.
        points: [t^p, label] in increasing order of both; the first and the last piece go on beyond.
    Raises:
        ConfigError: unless power > 0, and there are two points or more that increase.
    Source: Yang et al. 2024 (Lipschitz Singularities in Diffusion Models), where a change of clock is an alternative.
    """

    def __init__(self, power: float = 0.5, points: tuple[tuple[float, float], ...] = ((0.0, 0.0), (1.0, 1.0))) -> None:
        if not power > 0:
            raise ConfigError(f"remap.power: a number > 0 is needed, found {power}.")
        if len(points) < 2 or any(a >= c or b >= d for (a, b), (c, d) in pairwise(points)):
            raise ConfigError(
                f"remap.points: two points [t^p, label] or more that increase in both are needed, found {points}."
            )
        self.power, self.points = power, tuple((float(a), float(b)) for a, b in points)

    def __call__(self, t: Tensor, schedule: Schedule) -> Tensor:
        clock = t**self.power
        at, label = torch.tensor(self.points, dtype=torch.float64).to(t).T.contiguous()
        index = torch.bucketize(clock.detach().contiguous(), at[1:-1], right=True)
        slope = label.diff() / at.diff()
        return label[index] + slope[index] * (clock - at[index])
