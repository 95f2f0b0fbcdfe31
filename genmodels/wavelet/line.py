"""Laws e^{-E} on a line, normalised and sampled by quadrature: no chain is needed where a field is a single number."""

import torch
from torch import Tensor

from ..distributions import inverse_cdf
from ..registry import ConfigError
from ..rng import Noise
from ..types import Shape

BEYOND = 20.0  # nats that both ends of a grid must be above the least energy: a share of about 1e-9 is left out
TOLERANCE = 1e-3  # nats of log Z
HALF_STEP = 2.0**-25  # uniform draws are multiples of 2^-24: their midpoints never reach 0 or 1


class LineLaw:
    """p(x) = e^{-E(x)}/Z by the trapezoidal rule on a grid, in float64.

    The rule converges faster than any power of the spacing h for smooth energies that rise at both ends, with
    h^{k+1} where E has a jump in its derivative of order k. Draws invert its distribution function, made linear between
    nodes, whose error is at most h² max|p'|/8.

    Args:
        grid: [N] rising, N >= 5; spacings may differ.
        energy: [N] at its nodes; +inf is allowed.
        where: what messages call the law.
    Attributes:
        log_normalizer: log Z.
        error: the distance of log Z from that of every other node, which bounds its error where the rule converges.
    Raises:
        ConfigError: if the energy does not rise by 20 nats to both ends, is NaN or -inf, or the grid is too coarse.
    Source: Trefethen & Weideman 2014.
    """

    def __init__(self, grid: Tensor, energy: Tensor, *, where: str = "line") -> None:
        grid, energy = (torch.as_tensor(v).detach().double() for v in (grid, energy))
        if grid.ndim != 1 or grid.shape != energy.shape or len(grid) < 5 or not (grid.diff() > 0).all():
            raise ConfigError(
                f"{where}: a rising grid of at least 5 nodes and an energy at each are needed, found shapes "
                f"{list(grid.shape)} and {list(energy.shape)}."
            )
        self.least = energy.min()
        if not self.least.isfinite():
            raise ConfigError(f"{where}: the least energy on the grid is {float(self.least)}. Regularise its fit.")
        rise = float((energy[[0, -1]] - self.least).min())
        if rise < BEYOND:
            raise ConfigError(
                f"{where}: at an end of [{float(grid[0]):.4g}, {float(grid[-1]):.4g}] the energy is {rise:.3g} nats "
                f"above its least value; {BEYOND:g} are needed for a law on a line. Widen the grid, or, if the energy "
                "falls there, give it tails that rise."
            )
        self.grid, self.density = grid, (self.least - energy).exp()
        mass = _cells(self.grid, self.density)
        self.log_normalizer = float(mass.sum().log() - self.least)
        coarse = _cells(grid[::2], self.density[::2]).sum().log() - self.least
        self.error = abs(float(coarse) - self.log_normalizer)
        if not self.error < TOLERANCE:
            raise ConfigError(
                f"{where}: log Z differs by {self.error:.3g} nats between {len(grid)} nodes and half of them. Take "
                "more nodes; of a fitted energy, whose law is then far narrower or rougher than the range of the data, "
                "look for outliers, take more fields, or a basis of fewer functions."
            )
        self.density = self.density / mass.sum()
        self.ends = (mass / mass.sum()).cumsum(0)

    def quantile(self, u: Tensor) -> Tensor:
        """[*] float64 where the distribution function is u."""
        return inverse_cdf(self.grid, self.ends, u.double())

    def sample(self, noise: Noise, shape: Shape = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, *shape] independent draws; row i is a function of row i of the noise alone."""
        return self.quantile(noise.uniform(*shape, dtype=torch.float64) + HALF_STEP).to(dtype)

    def mean(self, values: Tensor) -> Tensor:
        """[*] float64 expectation of a function given at the nodes, [*, N]."""
        return _cells(self.grid, self.density * values.double()).sum(-1)


def _cells(grid: Tensor, values: Tensor) -> Tensor:
    """[*, N - 1] integral over each cell by the trapezoidal rule."""
    return grid.diff() * (values[..., 1:] + values[..., :-1]) / 2
