"""What the arguments of a diffusion model must be."""

import math

import torch
from torch import Tensor

from ..registry import ConfigError
from ..rng import as_seeds
from ..types import Seeds
from .parametrization import Target
from .schedules import Schedule

LARGEST_INPUT = 5.0  # standard deviation beyond which a network should not be fed x_t as it is
STATED, DIFFERENCED = 1e-6, 1e-4  # relative disagreement with automatic differentiation, and with differences


def check_settings(schedule: Schedule, prediction: Target, sigma_data: float | None, regularized_items: int) -> None:
    """Raises ConfigError if a number is out of its range, or if the network would be fed inputs of a large scale.

    Schedules that are not of this package are looked at by `check_schedule`.
    """
    if not type(schedule).__module__.startswith("genmodels."):
        check_schedule(schedule)
    if regularized_items < 1:
        raise ConfigError(f"model.regularized_items: at least 1 is needed, found {regularized_items}.")
    if sigma_data is not None and not sigma_data > 0:
        raise ConfigError(f"model.sigma_data: a number > 0, or null to measure it, is needed, found {sigma_data}.")
    if not schedule.ready:
        return
    largest = float(schedule.scales(torch.tensor(schedule.t_max))[1])
    if prediction != "edm" and largest > LARGEST_INPUT:
        raise ConfigError(
            f"model.prediction: with this schedule the network would be fed noise of standard deviation {largest:g}. "
            "Use prediction: edm, which scales its inputs to 1, or a schedule that ends near 1."
        )


def check_schedule(schedule: Schedule, n: int = 64) -> None:
    """Whether what a schedule states fits together, at n times between its ends.

    Scales are finite and not negative, the log-SNR falls strictly (so that g² = -σ² dλ/dt > 0), derivatives are those
    of the scales (by automatic differentiation, or by differences if the scales do not support it), `log_snr`, `drift`
    and `squared_diffusion` are those of the scales: dσ²/dt = 2 f σ² + g². And `time` inverts `log_snr`.

    Raises:
        ConfigError: with the first figures that do not.
    """
    name = type(schedule).__qualname__
    if not 0 <= schedule.t_min < schedule.t_max <= 1:
        raise ConfigError(
            f"schedule {name}: 0 <= t_min < t_max <= 1 is needed, found {schedule.t_min} and {schedule.t_max}."
        )
    u = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.sin(math.pi / 2 * u).square()
    stated, derived = schedule(t), Schedule.__call__(schedule, t)
    for label, values in zip(("alpha", "sigma", "dalpha", "dsigma"), stated, strict=True):
        _hold(name, label, t, values, values.isfinite(), "a finite number")
    for label, values in (("alpha", stated.alpha), ("sigma", stated.sigma)):
        _hold(name, label, t, values, values > 0, "a number > 0 between the ends")
    log_snr = Schedule.log_snr(schedule, t)
    fall = torch.cat((log_snr.diff() < 0, torch.tensor([True])))
    _hold(name, "log-SNR", t, log_snr, fall, "one that falls with every step of time")
    h = 1e-4 * torch.minimum(t - schedule.t_min, schedule.t_max - t)
    later, before = schedule.scales(t + h), schedule.scales(t - h)
    for k, label in enumerate(("alpha", "sigma")):
        _equal(name, label, t, stated[k], schedule.scales(t)[k], STATED)
        slope = (later[k] - before[k]) / (2 * h)
        _equal(name, f"d{label}", t, stated[k + 2], slope, DIFFERENCED)
        if _close(derived[k + 2], slope, DIFFERENCED).all():  # else the scales cut the graph
            _equal(name, f"d{label}", t, stated[k + 2], derived[k + 2], STATED)
    _equal(name, "log_snr", t, schedule.log_snr(t), log_snr, STATED)
    _equal(name, "drift", t, schedule.drift(t), Schedule.drift(schedule, t), STATED)
    _equal(name, "squared_diffusion", t, schedule.squared_diffusion(t), Schedule.squared_diffusion(schedule, t), STATED)
    _equal(name, "time(log_snr)", t, schedule.time(log_snr), t, STATED)


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> Tensor:
    return (found - wanted).abs() <= tolerance * (wanted.abs() + wanted.abs().median())


def _equal(name: str, label: str, t: Tensor, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    close = _close(found, wanted, tolerance)
    k = int((~close).int().argmax())
    _hold(name, label, t, found, close, f"{float(wanted[k]):.6g}, which its scales imply,")


def _hold(name: str, label: str, t: Tensor, values: Tensor, good: Tensor, needed: str) -> None:
    if not good.all():
        k = int((~good).int().argmax())
        raise ConfigError(
            f"schedule {name}: {label} at t = {float(t[k]):.4g} must be {needed} but is {float(values[k]):.6g}. "
            "Mend it, or leave it to the base class, which derives it from `scales`."
        )


def one_each(seeds: Seeds | None, n: int) -> Tensor:
    """[n] the seeds, or 0 … n - 1."""
    found = as_seeds(n if seeds is None else seeds)
    if len(found) != n:
        raise ValueError(f"likelihood: one seed per item is needed, found {len(found)} for {n} items.")
    return found


def one_of(where: str, name: str, value: str, words: tuple[str, ...]) -> None:
    """Raises ValueError unless an option is one of a few words: configurations are checked before, calls are not."""
    if value not in words:
        raise ValueError(f"{where}: {name} is one of {', '.join(words)}, found {value!r}.")


def at_least_one(where: str, **counts: int) -> None:
    """Raises ValueError if a count is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{where}: {name} must be at least 1, found {count}.")
