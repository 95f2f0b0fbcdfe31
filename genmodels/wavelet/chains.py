"""Markov chains that leave e^{-E} invariant, a batch at once: MALA, Hamiltonian Monte Carlo, and their step size."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register
from ..rng import Noise
from ..types import expand_like, sum_items

Potential = Callable[[Tensor], tuple[Tensor, Tensor]]  # z [B, *] -> E [B], and its gradient [B, *]; items independent

BLOCK = 16  # torch's CPU generator fills whole blocks of so many normals alike, however many are asked for at once
BUFFER = 2**14  # normals drawn at once for an item
COLLAPSED = 0.05  # an acceptance below which a chain hardly moves
SETTLED = 0.5  # times the target, an acceptance that is not that of the adapted step at rest
FLOOR, CEILING = 1e-4, 1e4  # steps, in units of the scale, between which the scale has to do with the energy
ESCAPED = 1e2  # times as far out as anything that the chain began with or can reach in a step
ADVICE = (
    "The energy may be too stiff for its scale, or not normalisable: fit it with a larger ridge or fewer knots, check "
    "that it rises beyond the data, or give scales (standard deviations of the items) that fit it."
)


class State(NamedTuple):
    """Where the chains of a batch are.

    Args:
        z: [B, *shape].
        energy: [B] float64 at z.
        gradient: [B, *shape] at z: the next transition begins with it.
        transitions: how many were made.
        accepted: [B] int64, how many of them moved.
        failed: [B] int64, how many were refused because their proposal, or its energy, was not finite.
        probability: [B] float64, that of accepting the last proposal.
    """

    z: Tensor
    energy: Tensor
    gradient: Tensor
    transitions: int
    accepted: Tensor
    failed: Tensor
    probability: Tensor

    @property
    def acceptance(self) -> Tensor:
        """[B] float64 share of the transitions that moved; NaN before the first."""
        return self.accepted.double() / self.transitions if self.transitions else torch.full_like(self.energy, math.nan)


class Proposal(NamedTuple):
    """An end of a trajectory; log_ratio [B] float64 is the log of what it is accepted by, -inf if it is not finite."""

    z: Tensor
    energy: Tensor
    gradient: Tensor
    log_ratio: Tensor
    finite: Tensor


@kind
class Kernel(ABC):
    """A transition of a Markov chain that leaves e^{-E} invariant, for a batch of chains.

    A step h is measured in units of the scale s, which broadcasts to z: the chain is that of z/s with the mass 1, so
    that s should be near the standard deviation of each coefficient.

    Attributes:
        evaluations: of the potential, in each transition.
        target: mean acceptance that the step size is adapted to.
        jitter: every step is multiplied by a draw of its own, uniform on 1 ± jitter.
    """

    evaluations: int
    target: float
    jitter: float

    @abstractmethod
    def propose(
        self, potential: Potential, state: State, momentum: Tensor, step_size: Tensor, scale: float | Tensor
    ) -> Proposal:
        """Where momenta [B, *shape] of N(0, I) take the chains, by steps [] or [B]."""

    @torch.no_grad()
    def move(
        self,
        potential: Potential,
        state: State,
        momentum: Tensor,
        log_uniform: Tensor,
        step_size: Tensor,
        scale: float | Tensor,
    ) -> State:
        """One transition: a proposal is taken where log_uniform [B] is at most its log ratio."""
        new = self.propose(potential, state, momentum, step_size, scale)
        taken = log_uniform <= new.log_ratio
        at = expand_like(taken, new.z)
        return State(
            torch.where(at, new.z, state.z),
            torch.where(taken, new.energy, state.energy),
            torch.where(at, new.gradient, state.gradient),
            state.transitions + 1,
            state.accepted + taken,
            state.failed + ~new.finite,
            new.log_ratio.clamp(max=0).exp(),
        )


@register(Kernel, "hmc")
class HMC(Kernel):
    """Hamiltonian Monte Carlo: leapfrog steps from a fresh momentum, accepted or refused as a whole.

    With w = z/s and p ~ N(0, I), leapfrog times:  p ← p - h/2 s∇E,  w ← w + h p,  p ← p - h/2 s∇E;  then
    log α = E(z) - E(z') + (|p|² - |p'|²)/2. The gradient at the end of a transition is that at the start of the next.

    Args:
        leapfrog: steps of a trajectory, each an evaluation of the potential.
        target: mean acceptance; 0.651 is best in many dimensions, and more costs little.
        jitter: h is uniform on 1 ± jitter times the step size, anew in every transition of every chain. Without it a
            mode whose period, or half of it, is the length h · leapfrog comes back to where it was, or its mirror.
    Raises:
        ConfigError: unless leapfrog >= 1, 0 < target < 1 and 0 <= jitter < 1.
    Source: Neal 2011 (MCMC using Hamiltonian dynamics), sections 5.3.2 and 5.4.2; Beskos et al. 2013.
    """

    def __init__(self, leapfrog: int = 5, target: float = 0.7, jitter: float = 0.2) -> None:
        if leapfrog < 1 or not 0 < target < 1 or not 0 <= jitter < 1:
            raise ConfigError(
                f"{self.registered_name}: leapfrog >= 1, a target between 0 and 1 and a jitter from 0 to below 1 are "
                f"needed, found leapfrog={leapfrog}, target={target} and jitter={jitter}."
            )
        self.evaluations, self.target, self.jitter = leapfrog, target, jitter

    def propose(
        self, potential: Potential, state: State, momentum: Tensor, step_size: Tensor, scale: float | Tensor
    ) -> Proposal:
        length = expand_like(step_size.to(state.z), state.z) * scale
        z, energy, gradient = state.z, state.energy, state.gradient
        finite = torch.ones_like(energy, dtype=torch.bool)
        p = momentum - 0.5 * length * gradient
        for k in range(self.evaluations):
            there = z + length * p
            finite = finite & _finite(there)
            z = torch.where(expand_like(finite, z), there, state.z)  # a potential is never asked where z is not finite
            energy, gradient = _evaluate(potential, z)
            p = p - (1.0 if k + 1 < self.evaluations else 0.5) * length * gradient
        ratio = state.energy - energy + 0.5 * sum_items((momentum - p) * (momentum + p))
        finite = finite & ratio.isfinite()  # p, and with it the ratio, is finite only if the gradient is
        return Proposal(z, energy, gradient, torch.where(finite, ratio, -math.inf), finite)


@register(Kernel, "mala")
class MALA(HMC):
    """Metropolis-adjusted Langevin: HMC with one leapfrog step, which is one step of a Langevin diffusion.

    z' = z - ε s² ∇E + √(2ε) s ξ with ε = h²/2, and log α = E(z) - E(z') + |ξ|²/2 - |z - z' + ε s² ∇E(z')|²/(4ε s²). On
    N(0, I) with s = 1, log α = -ε/4 (|z'|² - |z|²), and the mean acceptance 2 Φ(-½ √(ε³ d/2)) in many dimensions d.

    Args:
        target: mean acceptance; 0.574 is best in many dimensions.
    Raises:
        ConfigError: unless 0 < target < 1.
    Source: Roberts & Tweedie 1996; Roberts & Rosenthal 1998.
    """

    def __init__(self, target: float = 0.574) -> None:
        super().__init__(1, target, 0.0)


def _finite(z: Tensor) -> Tensor:
    """[B] whether every component is."""
    return z.flatten(1).isfinite().all(1)


def _evaluate(potential: Potential, z: Tensor) -> tuple[Tensor, Tensor]:
    energy, gradient = potential(z)
    if energy.shape != z.shape[:1] or gradient.shape != z.shape:
        raise ValueError(
            f"chain: a potential of z {list(z.shape)} must give energies {list(z.shape[:1])} and gradients "
            f"{list(z.shape)}, found {list(energy.shape)} and {list(gradient.shape)}."
        )
    return energy.double(), gradient.to(z.dtype)


@torch.no_grad()
def begin(potential: Potential, z: Tensor, *, where: str = "chain") -> State:
    """Chains at z [B, *shape], for one evaluation of the potential.

    Raises:
        ValueError: if z, its energy or its gradient is not finite.
    """
    fine = _finite(z)
    if fine.all():
        energy, gradient = _evaluate(potential, z)
        fine = energy.isfinite() & _finite(gradient)
    if not fine.all():
        raise ValueError(
            f"{where}: {int((~fine).sum())} of {len(z)} chains start where the energy, or its gradient, is not finite "
            f"(the first is item {int((~fine).nonzero()[0])}). Start them at data, or at draws no wider than the data. "
            f"{ADVICE}"
        )
    none = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return State(z, energy, gradient, 0, none, none, torch.full_like(energy, math.nan))


def restart(state: State) -> State:
    """The same places, with nothing counted."""
    none = torch.zeros_like(state.accepted)
    return state._replace(transitions=0, accepted=none, failed=none)


def walk(
    kernel: Kernel,
    potential: Potential,
    state: State,
    steps: int,
    *,
    step_size: float | Tensor,
    scale: float | Tensor,
    noise: Noise,
) -> Iterator[State]:
    """The states after each of `steps` transitions.

    With `SeedNoise`, chain i depends on its start, its potential and seed i alone, at any batch size. On any noise the
    draws of many transitions are made at once, in chunks whose length is a function of the item's shape alone. Rows
    are padded to blocks in which torch's CPU generator works, so that with `SeedNoise` neither that length matters nor
    whether a chain is advanced in one call or in several with the same noise.

    Args:
        step_size: [] or [B], in units of the scale.
        scale: broadcasts to z [B, *shape]; z moves by scale · step_size · N(0, I) and drifts by half its square.
    """
    z = state.z
    step_size = torch.as_tensor(step_size, dtype=torch.float64, device=z.device)
    scale = torch.as_tensor(scale, dtype=z.dtype, device=z.device)
    size = z.shape[1:].numel()
    width = BLOCK * -(-(size + 4) // BLOCK)
    chunk = max(1, BUFFER // width)
    for first in range(0, steps, chunk):
        draws = noise.normal(min(chunk, steps - first), width)
        for row in draws.unbind(1):
            # half the square of two standard normals is a standard exponential, as -log u is
            log_uniform, other = -0.5 * row[:, size : size + 4].double().square().unflatten(1, (2, 2)).sum(2).T
            step = step_size * (1 + kernel.jitter * (2 * other.exp() - 1))
            momentum = row[:, :size].reshape(z.shape).to(z.dtype)
            state = kernel.move(potential, state, momentum, log_uniform, step, scale)
            yield state


def advance(
    kernel: Kernel,
    potential: Potential,
    state: State,
    steps: int,
    *,
    step_size: float | Tensor,
    scale: float | Tensor,
    noise: Noise,
) -> State:
    """The state after `steps` transitions; see `walk`."""
    last = state
    for last in walk(kernel, potential, state, steps, step_size=step_size, scale=scale, noise=noise):  # noqa: B007
        pass
    return last


def record(
    kernel: Kernel,
    potential: Potential,
    state: State,
    steps: int,
    *,
    observe: Callable[[State], Tensor],
    step_size: float | Tensor,
    scale: float | Tensor,
    noise: Noise,
) -> tuple[State, Tensor]:
    """The state after `steps` >= 1 transitions, and [steps, B, *] what `observe` sees of each; see `walk`."""
    last, seen = state, []
    for last in walk(kernel, potential, state, steps, step_size=step_size, scale=scale, noise=noise):
        seen.append(observe(last))
    return last, torch.stack(seen)


class Adapted(NamedTuple):
    """A step size that is no longer changed.

    Args:
        step_size: [] float64, in units of the scale.
        acceptance: mean share of accepted transitions with it, over all chains.
        state: after them; its counts are of them alone.
    """

    step_size: Tensor
    acceptance: float
    state: State


def adapt(
    kernel: Kernel,
    potential: Potential,
    state: State,
    *,
    scale: float | Tensor,
    noise: Noise,
    steps: int = 200,
    measured: int = 50,
    where: str = "chain",
) -> Adapted:
    """The step size with which the batch has the kernel's target acceptance, by Robbins-Monro steps; then frozen.

    With a_t the mean over the batch of the probability of acceptance in transition t, h begins as d^{-1/4} and doubles
    or halves until a first crosses the target; from then on log h_{t+1} = log h_t + (a_t - target)/√t, t counted anew.
    What is returned is the mean of log h over the second half. It depends on the whole batch: adapt once, and sample
    with what was found.

    Args:
        steps: transitions during which the step changes.
        measured: transitions after them, with the frozen step.
        where: what messages call the chains (a band of a level, say).
    Raises:
        ConfigError: if chains collapse (they accept less than 0.05, or by steps below 1e-4 of the scale alone), escape,
            accept steps of any length, or accept less than half the target once the step is frozen.
    Source: Robbins & Monro 1951; Andrieu & Thoms 2008.
    """
    scale = torch.as_tensor(scale, dtype=state.z.dtype, device=state.z.device)
    start, log_step, late = state.z, -0.25 * math.log(max(1, state.z.shape[1:].numel())), []
    side, since = 0.0, 0
    for t in range(1, steps + 1):
        state = advance(kernel, potential, state, 1, step_size=math.exp(log_step), scale=scale, noise=noise)
        excess = float(state.probability.mean()) - kernel.target
        if since or excess * side < 0:
            since += 1
            log_step += excess / math.sqrt(since)
        else:
            side = excess
            log_step += math.copysign(math.log(2), excess)
        late += [log_step] if 2 * t > steps else []
    log_mean = sum(late) / len(late) if late else log_step
    step_size = torch.tensor(math.exp(log_mean), dtype=torch.float64, device=state.z.device)
    state = advance(kernel, potential, restart(state), measured, step_size=step_size, scale=scale, noise=noise)
    found = Adapted(step_size, float(state.acceptance.mean()), state)
    _check(kernel, found, start, scale, where)
    return found


def _check(kernel: Kernel, found: Adapted, start: Tensor, scale: Tensor, where: str) -> None:
    """Raises ConfigError, saying what happened, if the chains do not sample a law of about the given scale."""
    step, state = float(found.step_size), found.state
    rates = f"step size {step:.3g} of the scale, acceptance {found.acceptance:.3g} for {kernel.target:.3g}"
    failed = int(state.failed.sum())
    if failed:
        rates += f", {failed} of {state.transitions * len(state.z)} proposals not finite"
    reach = ESCAPED * max(float(start.abs().max()), float(scale.abs().max()) * max(step, 1.0))
    farthest = float(state.z.abs().max())
    if not found.acceptance >= COLLAPSED or step < FLOOR:
        raise ConfigError(f"{where}: the chains have collapsed ({rates}). {ADVICE}")
    if farthest > reach or step > CEILING:
        raise ConfigError(f"{where}: the chains have escaped ({rates}; the farthest is at {farthest:.3g}). {ADVICE}")
    if found.acceptance < SETTLED * kernel.target:  # where chains fall for ever into a well without a floor, for one
        raise ConfigError(f"{where}: the chains have not settled ({rates}). Adapt for more steps. {ADVICE}")
