"""Targets of score matching from whole paths: noise of every step of a simulated path, carried to its end.

A path is a chain of steps y' = T(y, z). Where T increases with each component of y at fixed z, and z is normal, there
are two answers for the score of y':

    carried     ∇ log q'(y') = E[ τ/T' - T''/T'² | y' ],   from any target τ of the score of y (change of variables),
    drawn       ∇ log q'(y') = E[ -z/M | y' ],             M = ∂y'/∂z,

and so has each of their means (1 - γ) carried + γ drawn, if γ does not depend on the path. From the first step (γ = 1)
on, this gives targets whose regression on the state is the score of the chain's law, whatever the length of its steps.
γ = 1 throughout is the target of a local kernel. Otherwise it is that of an integration by parts in the noise of all
steps, of variance near 1/(1 - e^{-u}) instead of one over the length of a step: as if the kernel from the item were
known, which it is if the force is affine.

Steps split the force in -r y, which is solved with the noise, exactly, and the rest n = F + r y, which moves the state
by the midpoint rule: half a step of the first, a step of the second, half a step of the first. This is of weak order 2,
and at rest it has the law N(0, g²/2r) without an error if n = 0.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError
from ..rng import BatchNoise, Noise
from ..types import expand_like
from .increments import TimesOfClock
from .local_kernels import phi1
from .process import Process, checked

FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)  # of r, tried for ρ
MANY = 0.01  # of paths that lost the order of states: more is worth a warning
LEAST = 0.1  # of T': below it a step is far longer than the force allows, and 1/T' amplifies what is carried


class Path(NamedTuple):
    """The end of simulated paths.

    Args:
        state: [B, *shape] y_u.
        target: [B, *shape] τ with E[τ | y_u] = ∇ log q(y_u), and given the start as well.
        kept: [B] whether every step kept the order of states (see `moved`), without which τ is not to be used.
    """

    state: Tensor
    target: Tensor
    kept: Tensor


class Silence(Noise):
    """No noise: 0 for normal draws."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self.n, *shape, dtype=dtype, device=self.device)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((self.n, *shape), 0.5, dtype=dtype, device=self.device)


def check_structure(process: Process, where: str) -> None:
    """
    Raises:
        ConfigError: unless each component of the force depends on its own component alone.
    """
    if process.structure != "elementwise":
        raise ConfigError(
            f"{where}: targets from paths need a force of one component at a time (structure elementwise), which "
            f"{type(process).__name__} does not have. Use local kernels (objective: local, method local)."
        )


def simulate_path(
    process: Process,
    y: Tensor,
    end: Tensor,
    steps: int,
    rate: Tensor | float,
    noise: Noise,
    forgetting: Tensor | float | None = None,
) -> Path:
    """Paths from states y at u = 0 to u = end, and targets of the score there.

    Args:
        y: [B, *shape] float states at u = 0.
        end: [B] float64, > 0.
        steps: K, of length u/K.
        rate: r >= 0, of the split.
        noise: one row per item.
        forgetting: ρ >= 0 of γ_k = (1 - e^{-2ρd})/(1 - e^{-2ρu_k}) for noise over a span d that ends at u_k; r if not
            given. The larger, the more weight has the noise of late steps. Under ρ = r an affine force of slope -r
            has the target -(y_u - E y_u)/Var y_u of its exact kernel, to rounding, whatever the noise.
    Raises:
        ConfigError: if the force is not elementwise.
        ValueError: if the force has another shape than the state, or is not finite.
    Source: Mirafzali et al. 2025 (A Malliavin calculus approach to score functions in diffusion generative models) has
        such a target for the process itself; the recursion for a chain is derived above.
    """
    check_structure(process, "simulate_path")
    rate, forgetting = (
        torch.as_tensor(v, dtype=torch.float64, device=end.device)
        for v in (rate, rate if forgetting is None else forgetting)
    )
    whole = end / steps
    starts = whole * torch.arange(steps, dtype=torch.float64, device=end.device)[:, None]
    noised = _noised(process, end, steps, rate, forgetting, y)
    target, kept = torch.zeros_like(y), torch.ones(len(y), dtype=torch.bool, device=y.device)
    for k, (decay, scale, carried, drawn) in enumerate(noised):
        if k:
            there, slope, bend, ordered = moved(process, starts[k - 1], y, whole, rate)
            kept = kept & ordered.flatten(1).all(1)
            alive = expand_like(kept, y)  # the others stay where they are, so that none runs to infinity
            y = torch.where(alive, there, y)
            target = torch.where(alive, (target - bend / slope) / slope, 0.0)
        z = noise.normal(*y.shape[1:], dtype=y.dtype)
        y, target = torch.addcmul(decay * y, scale, z), torch.addcmul(carried * target, drawn, z)
    return Path(y, target, kept)


def _noised(
    process: Process, end: Tensor, steps: int, rate: Tensor, forgetting: Tensor, y: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Of each noised span: e^{-rd} and M of the state, (1 - γ)/e^{-rd} and -γ/M of the target; like y."""
    whole = end / steps
    spans = whole.expand(steps + 1, -1).clone()
    spans[0], spans[-1] = 0.5 * whole, 0.5 * whole
    ends = spans.cumsum(0)
    ends[-1] = end
    q = process.covariance_rate((ends - 0.5 * spans).flatten())
    q = q.reshape(ends.shape) if q.ndim else q
    decay, scale = torch.exp(-rate * spans), (q * spans * phi1(-2 * rate * spans)).sqrt()
    share = spans * phi1(-2 * forgetting * spans) / (ends * phi1(-2 * forgetting * ends))
    kinds = torch.stack((decay, scale, (1 - share) / decay, -share / scale), 1).to(y.dtype)
    for row in kinds:
        yield tuple(expand_like(v, y) for v in row)


def moved(process: Process, u: Tensor, y: Tensor, span: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, *shape] T, T' and T'' of the midpoint rule T = y + d n(y + d n(y)/2), n = F + r y, and if it keeps order.

    That is whether T' >= 0.1 and the same for the half step within it.
    """
    d, r = (expand_like(v, y).to(y.dtype) for v in (span, rate))
    f, first, second = process.force_derivatives(u, y)
    f, first = checked(process, u, y, f) + r * y, first + r
    half = 0.5 * d
    middle, grown = y + half * f, 1 + half * first
    n, slope, bend = process.force_derivatives(u + 0.5 * span, middle)
    n, slope = n + r * middle, slope + r
    slope_there, bend_there = 1 + d * slope * grown, d * (bend * grown.square() + slope * half * second)
    return y + d * n, slope_there, bend_there, (slope_there >= LEAST) & (grown >= LEAST)


@torch.no_grad()
def measured_rates(process: Process, x: Tensor, times: TimesOfClock, steps: int, generator: torch.Generator) -> Tensor:
    """[2] r = -E ∂F/∂y, at least 0, over ends of paths, and of some ρ that under which E (1 - e^{-u}) |τ|² is least.

    Both are numbers of the process and the data, not of a path, so that targets stay what they are.

    Args:
        x: [n, *shape] many items in model space.
        times: law of u.
    Raises:
        ConfigError: if the force is not elementwise.
    """
    end = times.sample(BatchNoise(len(x), generator=generator, device=x.device))
    state, rate = generator.get_state(), 0.0

    def paths(rate: float, forgetting: float) -> Path:
        same = torch.Generator(generator.device)  # the same noise for all, so that they are compared alike
        same.set_state(state)
        noise = BatchNoise(len(x), generator=same, device=x.device)
        return simulate_path(process, x, end, steps, rate, noise, forgetting)

    for _ in range(2):  # the law of the ends hardly depends on r
        state_there, _, kept = paths(rate, rate)
        if kept.any():
            rate = max(0.0, -float(process.jacobian(end[kept], state_there[kept]).double().mean()))
    weight = expand_like(-torch.expm1(-end), x)

    def size(forgetting: float) -> float:
        found = paths(rate, forgetting)
        return float((weight * found.target.double().square()).flatten(1).mean(1)[found.kept].mean())

    tried = [max(rate, 0.1 / process.clock.total) * factor for factor in FACTORS]
    best = min(tried, key=size)
    lost = 1 - float(paths(rate, best).kept.double().mean())
    if lost > MANY:
        warnings.warn(
            f"model.simulation_steps: {100 * lost:.3g} % of paths are left out, whose {steps} steps were too long for "
            f"the force: a step turned the order of states (T' < {LEAST}), where a target from its noise is of no use. "
            "Take more steps, or objective: local.",
            UserWarning,
            stacklevel=3,
        )
    return torch.tensor([rate, best], dtype=torch.float64)
