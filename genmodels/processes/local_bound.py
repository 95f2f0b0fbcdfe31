"""Bounds on the likelihood of a diffusion with any drift, from paths that are simulated from an item."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..rng import Noise
from ..solvers.divergence import draw_probes
from ..types import sum_items
from .increments import HALF_STEP, TimesOfClock
from .local_kernels import Order, local_kernel, simulate
from .local_score import implicit_rate, reverse_kernel
from .path_targets import Silence, simulate_path
from .process import Langevin, Process


class Bound:
    """log p(x) >= E[log π(y_U) + r(u, y_u)/q(u) + decoder], for one random u of density q on [u₀, U].

    implicit: r = -½ sᵀQs - ∇·(Q s) + ∇·F. local: with y_u = m + L z from a kernel of the last increment, r =
    -½ |s - g|²_Q + ½ |g|²_Q + ∇·F with its score g = -L⁻ᵀ z; here (s - s(m))·Q g in place of s·Q g, which has the same
    mean and bounded variance. path: r = -½ sᵀQs + (s - s(c))·Q τ + ∇·F with the target τ of `simulate_path`, whose mean
    given the item is 0, and the end c of the path without noise. decoder: log p(x | y₀) - log q(y₀ | x), with q the
    kernel from x to u₀ and p the reverse kernel from there.

    In a Langevin process E log π(y_U) - E log π(y₀) is the integral of E[½ |p|² + ½ ∇·p], p = ∇ log π (Dynkin). With
    d = s - p the bound of paths is then E[log π(y₀) + (-½ |d|² - p·d + (d - d(c))·τ)/q(u) + decoder], which scatters
    little where the score is near the prior's.

    The means are over paths of the process, which are simulated by K steps: the bound holds up to their error.

    Args:
        process, score: the diffusion and its learnt score.
        times: q.
        steps, order: of the simulation.
        exact: whether kernels from the item itself are exact.
        rates: r and ρ of `simulate_path`; whatever they are, the mean is the same.
    Source: Singhal, Goldstein & Ranganath 2024 (Automated denoising score matching for nonlinear diffusions).
    """

    def __init__(
        self,
        process: Process,
        score: nn.Module,
        times: TimesOfClock,
        steps: int,
        order: Order,
        exact: bool,
        rates: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        self.process, self.score, self.times = process, score, times
        self.steps, self.order, self.exact, self.rates = steps, order, exact, rates

    def __call__(
        self,
        x: Tensor,
        increment: Tensor,
        condition: Tensor | None,
        noise: Noise,
        method: Literal["local", "path", "implicit"],
        share: tuple[int, int] = (0, 1),
        probes: int | None = None,
    ) -> Tensor:
        """[B] float64 one draw of the bound for items x in model space.

        Args:
            share: (k, n) for the k-th of n draws, whose u are stratified over [u₀, U].
            probes: for Hutchinson's estimate of the divergence; None for its exact value.
        """
        zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        k, n = share
        u = self.times.quantile((k + noise.uniform(dtype=torch.float64) + HALF_STEP) / n)
        relative = method == "path" and isinstance(self.process, Langevin)
        end, steps = (self.times.first, 1) if relative else (self.times.last, self.steps)
        last = simulate(self.process, x, zero, zero + end, steps, noise, self.order)
        if method == "implicit":
            y = simulate(self.process, x, zero, u, self.steps, noise, self.order)
            drawn = None if probes is None else draw_probes(noise, probes, self.process.shape, dtype=x.dtype)
            rate = self.implicit(u, y, condition, drawn)
        elif method == "path":
            rate = self.path(u, x, condition, noise, relative)
        else:
            start = zero if self.exact else (u - increment).clamp(min=0)
            y = simulate(self.process, x, zero, start, self.steps, noise, self.order)
            rate = self.local(start, u, y, noise.normal(*self.process.shape, dtype=x.dtype), condition)
        z = noise.normal(*self.process.shape, dtype=x.dtype)
        return self.process.prior.log_prob(last) + rate / self.times.density(u) + self.decoder(x, z, condition)

    def implicit(self, u: Tensor, y: Tensor, condition: Tensor | None, probes: Tensor | None = None) -> Tensor:
        """[B] float64 r at u in states y."""
        energy, divergence = implicit_rate(self.process, self.score, u, y, condition, probes)
        return self.process.divergence(u, y) - energy - divergence

    def local(self, start: Tensor, u: Tensor, y: Tensor, z: Tensor, condition: Tensor | None) -> Tensor:
        """[B] float64 r at u in the state that the kernel from y at `start` makes of z."""
        kernel = local_kernel(self.process, start, u, y, self.order)
        e = self.process.noised(u, kernel.solve_transposed(z))
        there, middle = kernel.sample(z), kernel.mean
        at = self.process.noised(u, self.score(u, there, condition))
        control = self.process.noised(u, self.score(u, middle, condition))
        return self.process.divergence(u, there) - sum_items(0.5 * at.square() + (at - control) * e)

    def path(self, u: Tensor, x: Tensor, condition: Tensor | None, noise: Noise, relative: bool = False) -> Tensor:
        """[B] float64 r at the ends of paths from items x to u; or what stands for it beside log π(y₀).

        Raises:
            ConfigError: if the force is not elementwise.
            ValueError: if a path lost the order of states, so that there is no target.
        """
        drawn = simulate_path(self.process, x, u, self.steps, self.rates[0], noise, self.rates[1])
        if not bool(drawn.kept.all()):
            raise ValueError(
                f"likelihood: {int((~drawn.kept).sum())} of {len(x)} paths took steps too long for the force (T' below "
                f"0.1), so that noise has no target. Raise simulation_steps above {self.steps}, or use method: local."
            )
        still = simulate_path(self.process, x, u, self.steps, self.rates[0], Silence(len(x), device=x.device)).state
        e = self.process.noised(u, drawn.target)
        at, control = self.score(u, drawn.state, condition), self.score(u, still, condition)
        if relative:  # G = 1
            rest = self.process.prior.score(drawn.state)
            at, control = at - rest, control - self.process.prior.score(still)
            return -sum_items(0.5 * at.square() + rest * at - (at - control) * drawn.target)
        at, control = self.process.noised(u, at), self.process.noised(u, control)
        return self.process.divergence(u, drawn.state) - sum_items(0.5 * at.square() - (at - control) * e)

    def decoder(self, x: Tensor, z: Tensor, condition: Tensor | None) -> Tensor:
        """[B] float64 log p(x | y₀) - log q(y₀ | x) at y₀ = m + L z."""
        zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        first = zero + self.times.first
        forward = local_kernel(self.process, zero, first, x, self.order)
        y = forward.sample(z)
        backward = reverse_kernel(self.process, first, zero, y, self.score(first, y, condition))
        return backward.log_prob(x) - forward.log_prob(y)
