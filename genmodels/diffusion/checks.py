"""What the arguments of a diffusion model must be."""

import torch
from torch import Tensor

from ..registry import ConfigError
from ..rng import as_seeds
from ..types import Seeds
from .parametrization import Target
from .schedules import Schedule

LARGEST_INPUT = 5.0  # standard deviation beyond which a network should not be fed x_t as it is


def check_settings(
    schedule: Schedule, prediction: Target, dropout: float, sigma_data: float | None, regularized_items: int
) -> None:
    """Raises ConfigError if a number is out of its range, or if the network would be fed inputs of a large scale."""
    if regularized_items < 1:
        raise ConfigError(f"model.regularized_items: at least 1 is needed, found {regularized_items}.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.condition_dropout: 0 <= condition_dropout < 1 is needed, found {dropout}.")
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


def one_each(seeds: Seeds | None, n: int) -> Tensor:
    """[n] the seeds, or 0 … n - 1."""
    found = as_seeds(n if seeds is None else seeds)
    if len(found) != n:
        raise ValueError(f"likelihood: one seed per item is needed, found {len(found)} for {n} items.")
    return found


def at_least_one(where: str, **counts: int) -> None:
    """Raises ValueError if a count is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{where}: {name} must be at least 1, found {count}.")
