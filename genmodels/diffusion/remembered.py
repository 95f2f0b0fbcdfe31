"""What a denoiser and its path say of the times of a grid, formed once for all steps that ask for it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser
from .parametrization import conversion
from .schedules import Scales, Schedule

Pair = tuple[float, float]


class Shares(NamedTuple):
    """What x̂, ε̂ and the velocity have of x_t and of the network's answer p, at one time."""

    clean: Pair
    eps: Pair
    velocity: Pair


class _Level(NamedTuple):
    scales: Scales
    log_snr: Tensor
    shares: Shares


class Remembered(Schedule):
    """The schedule of a denoiser, which keeps what it has said of single times: steps ask for the same few again.

    Times of a grid are worked out together, others when they are first asked for. Only times of the shape [] on the
    CPU are kept: several have to be worked out anyway, and to read one on a device would wait for it.

    Args:
        times: [L] float64 of the grid.
    """

    def __init__(self, denoiser: Denoiser, times: Tensor) -> None:
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.t_min, self.t_max, self.ready = self.schedule.t_min, self.schedule.t_max, self.schedule.ready
        self.known: dict[float, _Level] = {}
        # a denoiser that finds its estimates in a way of its own is asked for them
        own = type(denoiser).predict is not Denoiser.predict or type(denoiser).velocity is not Denoiser.velocity
        self.tells = not own
        if times.ndim == 1 and times.device.type == "cpu":
            self._learn(times)

    def shares(self, t: Tensor) -> Shares | None:
        """Those of a single time at which the answer determines x̂ and ε̂, if they follow from it alone; else None."""
        level = self._level(t) if self.tells else None
        return None if level is None or not all(map(math.isfinite, level.shares.clean + level.shares.eps)) else level[2]

    def _level(self, t: Tensor) -> _Level | None:
        if t.ndim or t.device.type != "cpu" or not t.is_floating_point():
            return None
        key = t.item()
        if key not in self.known:
            self._learn(t.detach().double().reshape(1))
        return self.known[key]

    @torch.no_grad()
    def _learn(self, times: Tensor) -> None:
        scales, log_snr = self.schedule(times), self.schedule.log_snr(times)
        c = conversion(self.denoiser.prediction, scales, self.denoiser.sigma_data.to(times.device))
        rates = [scales.dalpha * c[k] + scales.dsigma * c[k + 2] for k in (0, 1)]
        numbers = zip(*(v.expand_as(times).tolist() for v in (*c, *rates)), strict=True)
        parts = zip(*(v.unbind() for v in (*scales, log_snr)), strict=True)
        for t, n, v in zip(times.tolist(), numbers, parts, strict=True):
            self.known[t] = _Level(Scales(*v[:4]), v[4], Shares(n[:2], n[2:4], n[4:]))

    def __call__(self, t: Tensor) -> Scales:
        level = self._level(t)
        return self.schedule(t) if level is None else level.scales

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self._level(t)
        return self.schedule.scales(t) if level is None else level.scales[:2]

    def log_snr(self, t: Tensor) -> Tensor:
        level = self._level(t)
        return self.schedule.log_snr(t) if level is None else level.log_snr

    def drift(self, t: Tensor) -> Tensor:
        return self.schedule.drift(t)

    def squared_diffusion(self, t: Tensor) -> Tensor:
        return self.schedule.squared_diffusion(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return self.schedule.time(log_snr)
