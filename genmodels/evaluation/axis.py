"""Linear and logarithmic axes with round ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

WIDE = 15.0  # ratio of the largest to the smallest value from which a scale is logarithmic
ZERO, GAP = 0.035, 0.1  # where on a logarithmic scale a value of 0 lies, and where the others begin, as shares of it


@dataclass(frozen=True)
class Axis:
    """A scale from low … high to start … end.

    Args:
        log: whether it is logarithmic; low must be positive then.
        zero: where a value of 0 lies on a logarithmic scale, outside start … end.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    zero: float | None = None

    def __call__(self, value: float) -> float:
        """Where a value lies; outside values are moved to the nearest end."""
        if value == 0 and self.zero is not None:
            return self.zero
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, self._inside(value)))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def _inside(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on the axis, at most about that many."""
        found = _log_ticks(self.low, self.high, most) if self.log else []
        found = found if len(found) > 1 else _linear_ticks(self.low, self.high, most)
        return found if self.zero is None else [0.0, *found]


def fit(values: Sequence[float], start: float, end: float, log: bool | None = None, margin: float = 0.06) -> Axis:
    """The axis that holds the values with some room.

    Args:
        log: None for logarithmic where all values are positive and spread widely; on a scale that is asked to be so,
            values of 0 lie before all others, behind a gap.
    """
    low, high = min(values), max(values)
    if log and low == 0 < high:
        rest = fit([v for v in values if v > 0], start + GAP * (end - start), end, True, margin)
        return replace(rest, zero=start + ZERO * (end - start))
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


def labels(ticks: Sequence[float]) -> list[str]:
    """Ticks in few characters, but as many digits as tell them apart.

    >>> labels([0.0, 0.25, 2000.0, 3e6]), labels([1234.52, 1234.54])
    (['0', '0.25', '2k', '3M'], ['1.23452k', '1.23454k'])
    """
    steps = [b - a for a, b in pairwise(ticks) if b > a]
    return [tick(value, min(steps, default=0.0)) for value in ticks]


def tick(value: float, step: float = 0.0) -> str:
    """A tick in few characters, with the digits that multiples of a step need.

    >>> tick(0.25), tick(2000.0), tick(0.0), tick(5e-05), tick(3e6), tick(4e30)
    ('0.25', '2k', '0', '5e-05', '3M', '4e+30')
    """
    if abs(value) <= min(1e-12, step / 1e6 if step else 1e-12):
        return "0"
    digits = 4 if abs(value) < 1e3 else 3
    if step:  # one digit more than the ratio, for steps of 2.5
        digits = min(max(digits, math.floor(math.log10(abs(value))) - math.floor(math.log10(step)) + 2), 12)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"
