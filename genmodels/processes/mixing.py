"""Whether a diffusion reaches its prior: spectral gaps, and the distance of its last law from the prior."""

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from ..rng import BatchNoise
from .local_kernels import Order, simulate
from .priors import Prior
from .process import Langevin, Process

LEFT = 0.03  # the share of the slowest mode that may be left at the end, and the excess of a distance over chance
DIRECTIONS = 32


class Mixing(NamedTuple):
    """How near the end of a process is to its prior.

    Args:
        gap: spectral gap per unit of u; None where it is not known, 0 where there is none.
        left: e^{-gap U}, the share of the slowest mode that is left at the end; None without a gap.
        distance: largest Kolmogorov-Smirnov distance between end and prior, over components and random directions.
        chance: what that distance stays below in 99 of 100 cases if the laws are the same.
    """

    gap: float | None
    left: float | None
    distance: float
    chance: float


def spectral_gap(prior: Prior, cells: int = 2000) -> float | None:
    """The gap of ½ (∂² + (log π)' ∂), per unit of u, of one component; None for laws of whole items.

    In closed form where the prior knows it, else the second eigenvalue of its finite-volume matrix, symmetric in √π, on
    the prior's interval: with π at the faces of cells, its error is O(h²).
    """
    from scipy.linalg import eigh_tridiagonal

    closed = prior.gap()
    if closed is not None or prior.structure != "elementwise":
        return closed
    low, high = prior.interval()
    h = (high - low) / cells
    points = low + h / 2 * torch.arange(1, 2 * cells, dtype=torch.float64)  # centre, face, centre, …
    log = prior.log_density(points).numpy()
    centre, face = log[::2], log[1::2]
    off = np.exp(face - 0.5 * (centre[1:] + centre[:-1])) / (2 * h * h)
    diagonal = np.zeros(cells)
    diagonal[:-1] -= np.exp(face - centre[:-1]) / (2 * h * h)
    diagonal[1:] -= np.exp(face - centre[1:]) / (2 * h * h)
    return float(
        -eigh_tridiagonal(diagonal, off, select="i", select_range=(cells - 2, cells - 2), eigvals_only=True)[0]
    )


def needed(gap: float, left: float) -> float:
    """The U after which a share `left` of the slowest mode is left: log(1/left)/gap."""
    return math.log(1 / left) / gap


def largest_distance(x: Tensor, y: Tensor, generator: Generator | None = None) -> float:
    """The largest Kolmogorov-Smirnov distance of [n, *shape] and [m, *shape] over components and random directions."""
    x, y = (v.double().flatten(1) for v in (x, y))
    if x.shape[1] > 1:
        directions = torch.randn(x.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64).to(x.device)
        directions = directions / directions.norm(dim=0)
        x, y = torch.cat((x, x @ directions), 1), torch.cat((y, y @ directions), 1)
    both = torch.cat((x, y))
    steps = torch.cat((torch.full_like(x, 1 / len(x)), torch.full_like(y, -1 / len(y))))
    order = both.argsort(0)
    # between equal values the difference of the two step functions is no distance
    gaps = steps.gather(0, order).cumsum(0).abs()
    ordered = both.gather(0, order)
    last = torch.cat((ordered[1:] > ordered[:-1], torch.ones_like(ordered[:1], dtype=torch.bool)))
    return float((gaps * last).max())


def measure(
    process: Process, x: Tensor, *, steps: int = 50, order: Order = "ito", generator: Generator | None = None
) -> Mixing:
    """The end of the process from items x [n, *shape] in model space, against as many draws of its prior.

    Raises:
        ValueError: if the process has no prior, or its force is not finite on the way.
    """
    if process.prior is None:
        raise ValueError("mixing: the process has no prior to be compared with.")
    noise = BatchNoise(len(x), generator=generator, device=x.device)
    zero, total = (torch.tensor(u, dtype=torch.float64, device=x.device) for u in (0.0, process.clock.total))
    end = simulate(process, x, zero, total, steps, noise, order)
    wanted = process.prior.sample(noise, process.shape, dtype=x.dtype)
    gap = spectral_gap(process.prior) if isinstance(process, Langevin) else None
    count = process.size + DIRECTIONS * (process.size > 1)
    # Massey's bound with a Bonferroni correction: P(distance > c) <= 2 exp(-n c²) for two samples of n, each of count
    chance = math.sqrt(math.log(2 * count / 0.01) / len(x))
    left = math.exp(-gap * process.clock.total) if gap else None
    return Mixing(gap, left, largest_distance(end, wanted, generator), chance)


def warn_unmixed(process: Process, found: Mixing) -> None:
    """Warns if the end of a process is not its prior, with the clock under which it would be."""
    slow = found.left is not None and found.left > LEFT
    far = found.distance > found.chance + LEFT
    if not (slow or far):
        return
    total, prior = process.clock.total, getattr(process.prior, "registered_name", type(process.prior).__name__)
    parts = [f"the process does not reach its prior '{prior}' by the end of its clock, U = {total:.4g}"]
    if found.left is not None:
        parts.append(
            f"its spectral gap is {found.gap:.4g}, so that e^(-gap U) = {found.left:.3g} of its slowest mode is left"
        )
    elif found.gap == 0:
        parts.append("it has no spectral gap, and tails fill slower than exponentially")
    parts.append(
        f"data that have run through it differ from the prior by {found.distance:.3g} in Kolmogorov-Smirnov distance "
        f"(chance: {found.chance:.3g})"
    )
    wanted = needed(found.gap, 0.01) if found.gap else 2 * total
    aim = "For 0.01" if found.gap else "For twice the time"
    advice = (
        f"{aim} set the clock's {process.clock.advice(wanted)} (U = {wanted:.4g}), or choose a prior that mixes faster"
    )
    warnings.warn(f"{'; '.join(parts)}. Samples will start from the wrong law. {advice}.", UserWarning, stacklevel=2)
