"""Training objectives of the score of a diffusion with any drift."""

from typing import Literal

import torch
from torch import Tensor

from ..registry import ConfigError
from ..rng import Noise
from ..solvers.divergence import draw_probes
from ..types import expand_like
from .increments import TimesOfClock
from .local_kernels import Order, local_kernel, simulate
from .local_score import LocalScore, implicit_rate
from .path_targets import check_structure, simulate_path
from .process import Process

Variance = Literal["plain", "control", "antithetic"]
Weight = Literal["whitened", "likelihood"]
Target = Literal["auto", "path", "local", "global", "ism"]
Divergence = Literal["exact", "hutchinson"]


class Objective:
    """Values whose mean over items, times and paths is least where the network is the score of the process's law.

    Args:
        score: s, with its process.
        times: law q of u.
        steps, order: of simulated paths, and the order of the kernels.
        exact: whether kernels from the item itself are exact, so that increments begin there.
        variance, weight, divergence: as in `LocalDSM`.
    """

    def __init__(
        self,
        score: LocalScore,
        times: TimesOfClock,
        steps: int,
        order: Order,
        exact: bool,
        variance: Variance,
        weight: Weight,
        divergence: Divergence,
    ) -> None:
        self.score, self.process, self.times = score, score.process, times
        self.steps, self.order, self.exact = steps, order, exact
        self.variance, self.weight, self.divergence = variance, weight, divergence

    def _path(self, x: Tensor, end: Tensor, noise: Noise) -> Tensor:
        return simulate(self.process, x, torch.zeros_like(end), end, self.steps, noise, self.order)

    def local(self, x: Tensor, u: Tensor, increment: Tensor, condition: Tensor | None, noise: Noise) -> Tensor:
        """[B] of paths simulated from x to u - δ (or 0), and the kernel from there to u."""
        with torch.no_grad():
            start = torch.zeros_like(u) if self.exact else (u - increment).clamp(min=0)
            y = self._path(x, start, noise)
            z = noise.normal(*x.shape[1:], dtype=x.dtype)
        return self.denoising(start, u, y, z, condition)

    def path(
        self, x: Tensor, u: Tensor, rates: tuple[Tensor, Tensor], condition: Tensor | None, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """[B] |s̄ (s - τ)|², or ½ |Gᵀ (s - τ)|² over q, with τ the target of a path from x to u.

        Where the path lost the order of states the value is 0: the share of such items is [] the second.

        Args:
            rates: r and ρ of `simulate_path`.
        """
        with torch.no_grad():
            state, target, kept = simulate_path(self.process, x, u, self.steps, rates[0], noise, rates[1])
            target = torch.where(expand_like(kept, target), target, 0.0)
        apart = torch.where(expand_like(kept, target), self.score(u, state, condition) - target, 0.0)
        if self.weight == "likelihood":
            value = 0.5 * self.process.noised(u, apart).square().sum(1) / self.times.density(u)
        else:
            value = (expand_like(self.score.scale(u), apart).to(apart.dtype) * apart).flatten(1).square().sum(1)
        return value, (~kept).double().mean()

    def denoising(self, start: Tensor, u: Tensor, y: Tensor, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """[B] c |A s + e|² at m + L z: A = Gᵀ, e = Gᵀ L⁻ᵀ z, c = ½/q or D; of exact kernels A = Lᵀ, e = z, c = 1.

        A and c may not depend on the state y_s, as the L of a local kernel does: |Lᵀ s + z|² of all states that lead to
        one and the same y is least at a mean of their scores weighed by P, which is off the score by O(D).

        "control" subtracts 2 (A s(m))·e, whose mean is 0 since m does not depend on z; "antithetic" takes the mean with
        -z in place of z.
        """
        kernel = local_kernel(self.process, start, u, y, self.order)
        likely = self.weight == "likelihood"
        noised = likely or not self.exact

        def a(v: Tensor) -> Tensor:
            return self.process.noised(u, v) if noised else kernel.root_transposed(v).flatten(1)

        e = a(kernel.solve_transposed(z)) if noised else z.flatten(1)
        if self.variance == "plain":
            (there,) = self._scores(u, [kernel.sample(z)], condition)
            total = (a(there) + e).square().sum(1)
        elif self.variance == "control":
            there, middle = self._scores(u, [kernel.sample(z), kernel.mean], condition)
            total = (a(there) + e).square().sum(1) - 2 * (a(middle) * e).sum(1)
        else:
            there, mirrored = self._scores(u, [kernel.sample(z), kernel.sample(-z)], condition)
            total = 0.5 * ((a(there) + e).square() + (a(mirrored) - e).square()).sum(1)
        if likely:
            return 0.5 * total / self.times.density(u)
        return (u - start) * total if noised else total

    def _scores(self, u: Tensor, states: list[Tensor], condition: Tensor | None) -> tuple[Tensor, ...]:
        """The score at several states of each item, from one call of the network."""
        n = len(states)
        condition = None if condition is None else torch.cat([condition] * n)
        return self.score(torch.cat([u] * n), torch.cat(states), condition).chunk(n)

    def implicit(self, x: Tensor, u: Tensor, condition: Tensor | None, noise: Noise) -> Tensor:
        """[B] ½ sᵀQs + ∇·(Q s) at simulated states, over q; or times 2 s̄²/g², to weigh as the whitened loss does."""
        with torch.no_grad():
            y = self._path(x, u, noise)
            probes = None if self.divergence == "exact" else draw_probes(noise, 1, tuple(x.shape[1:]), dtype=x.dtype)
        energy, divergence = implicit_rate(self.process, self.score, u, y, condition, probes)
        if self.weight == "likelihood":
            return (energy + divergence) / self.times.density(u)
        return 2 * (self.score.scale(u) / self.score.strength(u)).square() * (energy + divergence)


def is_exact(process: Process) -> bool:
    """Whether the process knows its kernel over long increments from any state."""
    zero = torch.zeros(1, dtype=torch.float64)
    return process.transition(zero, zero + process.clock.total, torch.zeros(1, *process.shape)) is not None


def chosen_objective(objective: Target, process: Process, exact: bool, variance: Variance) -> str:
    """The objective itself, or for "auto" the one of least variance that the process allows.

    Args:
        exact: whether the process knows its kernels over long increments.
    Raises:
        ConfigError: if it does not fit the process, or has no variates to control.
    """
    if objective == "auto":
        objective = "path" if process.structure == "elementwise" and not exact and variance == "plain" else "local"
    if objective == "global" and not exact:
        raise ConfigError(
            f"model.objective: global needs kernels that are exact from the data on, which {type(process).__name__} "
            "does not have. Use objective: local."
        )
    if objective == "path":
        check_structure(process, "model.objective")
    if objective in ("path", "ism") and variance != "plain":
        raise ConfigError(
            f"model.variance: only the objective local has variates to control, found objective {objective}. Use "
            "variance: plain."
        )
    return objective
