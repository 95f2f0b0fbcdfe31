"""Linear and logarithmic axes with round ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDE = 15.0  # ratio of the largest to the smallest value from which a scale is logarithmic


@dataclass(frozen=True)
class Axis:
    """A scale from low … high to start … end.

    Args:
        log: whether it is logarithmic; low must be positive then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """Where a value lies; outside values are moved to the nearest end."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, self._inside(value)))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def _inside(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on the axis, at most about that many."""
        found = _log_ticks(self.low, self.high, most) if self.log else []
        return found if len(found) > 1 else _linear_ticks(self.low, self.high, most)


def fit(values: Sequence[float], start: float, end: float, log: bool | None = None, margin: float = 0.06) -> Axis:
    """The axis that holds the values with some room.

    Args:
        log: None for logarithmic where all values are positive and spread widely.
    """
    low, high = min(values), max(values)
    log = low > 0 and high / low > WIDE if log is None else log
    if log:
        room = max((high / low) ** margin, 1.25 if low == high else 1.05)
        return Axis(low / room, high * room, start, end, True)
    room = margin * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room, start, end, False)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**k for k in range(first, last + 1) for f in factors if low <= f * 10.0**k <= high]
        if len(found) <= most + 1:
            return found
    return found[:: math.ceil(len(found) / most)]


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(f * power for f in (1, 2, 2.5, 5, 10, 20) if (high - low) / (f * power) <= most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick(value: float) -> str:
    """A tick in few characters.

    >>> tick(0.25), tick(2000.0), tick(0.0), tick(5e-05), tick(3e6)
    ('0.25', '2k', '0', '5e-05', '3M')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"
