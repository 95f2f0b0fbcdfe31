"""Statistics of a set of fields: means of numbers of each item, smooth functions of them, and how far two sets are."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...rng import generator

Norm = Callable[[Tensor], Tensor]
DRAWS = 1024  # of a difference that is noise alone: its mean norm is known to 2.4 % or better
AT_ONCE = 128
ROUNDING = 1e-12  # relative: statistics of levels may be equal but for the order of their sums


class Summary(NamedTuple):
    """Statistics [V] float64 of N items, and what each item adds to them.

    Args:
        value: the statistics.
        influence: [N, V], with mean 0: to first order in 1/√N the value is off by the mean of N independent ones.
    """

    value: Tensor
    influence: Tensor

    @property
    def stderr(self) -> Tensor:
        """[V] standard errors of the values, for independent items; NaN for one item."""
        n = len(self.influence)
        return self.influence.std(0) / math.sqrt(n) if n > 1 else torch.full_like(self.value, torch.nan)


def summarize(items: Tensor, of: Callable[[Tensor], Tensor] | None = None, curved: int | None = None) -> Summary:
    """A smooth function of the means of [N, K] numbers of each item, with its influences by the delta method.

    Args:
        of: takes means to statistics by differentiable operations; None for the means themselves.
        curved: how many of the means it takes, the first ones; those after them are statistics as they are. None for
            all.
    Raises:
        ValueError: if there are no items.
    """
    if not len(items):
        raise ValueError("statistics of fields: at least one item is needed, found none.")
    items = items.double()
    means = items.mean(0)
    centred = items - means
    if of is None or curved == 0:
        return Summary(means, centred)
    curved = items.shape[1] if curved is None else curved
    head = means[:curved]
    jacobian = torch.autograd.functional.jacobian(of, head)
    influence = torch.cat([centred[:, :curved] @ jacobian.T, centred[:, curved:]], 1)
    return Summary(torch.cat([of(head), means[curved:]]), influence)


class Distance(NamedTuple):
    """A norm of the difference of two summaries.

    Args:
        value: the norm.
        influence: [N] float64 of each item of the first set on it, with mean 0.
    """

    value: float
    influence: Tensor

    @property
    def stderr(self) -> float | None:
        """Standard error that the first set of items brings; the second is held fixed. None for one item."""
        n = len(self.influence)
        return self.influence.std().item() / math.sqrt(n) if n > 1 else None


def distance(norm: Norm, x: Summary, reference: Summary) -> Distance:
    """|x - reference| and its influences, by the gradient of the norm at that difference.

    Args:
        norm: takes [*, V] differences to [*]; a (semi)norm: convex, and scaled as its argument is.
    """
    difference = x.value - reference.value
    equal = difference.abs() <= ROUNDING * torch.maximum(x.value.abs(), reference.value.abs())
    difference = difference.masked_fill(equal, 0.0).requires_grad_()
    with torch.enable_grad():
        value = norm(difference)
        (gradient,) = torch.autograd.grad(value, difference)
    influence = x.influence @ gradient
    return Distance(value.item(), influence - influence.mean())


def unit_noise(norms: dict[str, Norm], reference: Summary) -> dict[str, float]:
    """The mean of each norm for a difference that is normal noise with the covariance of the items' influences.

    The statistics of n items of the reference's own law are off those of its m items by √(1/n + 1/m) times that: a
    perfect sampler's distance.
    """
    influence, source = reference.influence, generator("noise of fields")
    found = dict.fromkeys(norms, 0.0)
    for size in [AT_ONCE] * (DRAWS // AT_ONCE):
        weights = torch.randn(size, len(influence), generator=source, dtype=torch.float64)
        noise = weights @ influence / math.sqrt(max(1, len(influence) - 1))
        for name, norm in norms.items():
            found[name] += norm(noise).sum().item() / DRAWS
    return found


def rms(scale: Tensor | float = 1.0, part: slice | Tensor = slice(None)) -> Norm:
    """√(mean over statistics of (difference/scale)²) of the chosen ones."""
    return lambda d: torch.linalg.vector_norm(_chosen(d, part) / scale, dim=-1) / math.sqrt(_chosen(d, part).shape[-1])


def weighted(weights: Tensor | float = 1.0, part: slice | Tensor = slice(None)) -> Norm:
    """Σ weight |difference| of the chosen ones."""
    return lambda d: (_chosen(d, part).abs() * weights).sum(-1)


def _chosen(d: Tensor, part: slice | Tensor) -> Tensor:
    return d[..., part]


def checked(x: Tensor, what: str) -> Tensor:
    """Fields [N, H, W] in float64; items [N, 1, H, W] lose the axis of their one channel.

    Raises:
        ValueError: if they are no such fields.
    """
    if x.ndim == 4 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 3 or not math.prod(x.shape[1:]):
        raise ValueError(f"{what}: fields [N, H, W] or [N, 1, H, W] are needed, found {list(x.shape)}.")
    return x.double()
