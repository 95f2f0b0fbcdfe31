"""What a path says of the times of a grid, formed once for all steps that ask for it."""

from typing import NamedTuple

from torch import Tensor

from .schedules import Scales, Schedule


class _Level(NamedTuple):
    scales: Scales
    log_snr: Tensor


class Remembered(Schedule):
    """A schedule that keeps what it has said of single times: the steps of a solver ask for the same few again.

    Times of a grid are worked out together, others when they are first asked for. Only times of the shape [] on the
    CPU are kept: several have to be worked out anyway, and to read one on a device would wait for it.

    Args:
        schedule: the path.
        times: [L] float64.
    """

    def __init__(self, schedule: Schedule, times: Tensor) -> None:
        self.schedule, self.t_min, self.t_max, self.ready = schedule, schedule.t_min, schedule.t_max, schedule.ready
        self.known: dict[float, _Level] = {}
        if times.ndim == 1 and times.device.type == "cpu":
            values = zip(*(v.unbind() for v in (*schedule(times), schedule.log_snr(times))), strict=True)
            self.known = {t: _Level(Scales(*v[:4]), v[4]) for t, v in zip(times.tolist(), values, strict=True)}

    @staticmethod
    def key(t: Tensor) -> float | None:
        """The number that a time is known by, if it is one that can be kept."""
        return t.item() if t.ndim == 0 and t.device.type == "cpu" and t.is_floating_point() else None

    def _level(self, t: Tensor) -> _Level | None:
        key = self.key(t)
        if key is not None and key not in self.known:
            self.known[key] = _Level(self.schedule(t), self.schedule.log_snr(t))
        return None if key is None else self.known[key]

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
