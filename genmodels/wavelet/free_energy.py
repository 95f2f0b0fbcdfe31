"""log Z of conditional energies, by chains on the path from a Gaussian whose log Z is known.

U_λ = (1 - λ) U_0 + λ Ē with U_0(ζ) = ½ Σ ζ²/s² and log Z_0 = ½ Σ log 2πs². The widths s are those of the chains' moves,
1/√(mean curvature) by tiles: the mean curvature of each coefficient is then the same all along the path, and one step
size serves all of it.
"""

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..registry import ConfigError
from ..rng import Noise
from ..types import sum_items
from .chains import Kernel, Potential, State, advance, begin, record
from .conditional import Conditional
from .tuning import draw, line_law, start

Method = Literal["integration", "annealing"]


class Normalizer(NamedTuple):
    """log Z of a law for each of B conditionings, in nats.

    Args:
        value: [B] float64.
        stderr: [B] float64, from its particles; None for a single one.
    """

    value: Tensor
    stderr: Tensor | None


class Bridge(NamedTuple):
    """The energies U_λ = U_0 + λ (Ē - U_0) between a Gaussian and a potential.

    Args:
        target: Ē, of ζ [B, dim].
        scale: [B, dim] widths s of the Gaussian.
    """

    target: Potential
    scale: Tensor

    def reference(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """U_0 [B] float64 and its gradient [B, dim]."""
        scale = self.scale.to(z)
        return 0.5 * sum_items((z / scale).square()), z / scale.square()

    def at(self, share: Tensor) -> Potential:
        """U_λ as a potential of chains, for λ [B] of each."""

        def of(z: Tensor) -> tuple[Tensor, Tensor]:
            (low, low_gradient), (energy, gradient) = self.reference(z), self.target(z)
            part = share.to(z).unsqueeze(1)
            return low + share * (energy - low), low_gradient + part * (gradient - low_gradient)

        return of

    def work(self, state: State, share: Tensor) -> Tensor:
        """[B] float64 Ē - U_0 = dU_λ/dλ where chains of U_λ are; λ > 0."""
        return (state.energy - self.reference(state.z)[0]) / share

    def moved(self, state: State, old: Tensor, new: Tensor) -> State:
        """The state of chains of U_old, old > 0, as one of U_new, without an evaluation of the target."""
        energy, gradient = self.reference(state.z)
        ratio = new / old
        return state._replace(
            energy=energy + ratio * (state.energy - energy),
            gradient=gradient + ratio.to(gradient).unsqueeze(1) * (state.gradient - gradient),
        )


class _Particles(Noise):
    """The noise of P chains for each item, item by item, all from the item's own stream."""

    def __init__(self, noise: Noise, count: int) -> None:
        super().__init__(noise.n * count, noise.device)
        self.noise, self.count = noise, count

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.noise.normal(self.count, *shape, dtype=dtype).flatten(0, 1)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.noise.uniform(self.count, *shape, dtype=dtype).flatten(0, 1)


def log_normalizer(
    conditional: Conditional,
    kernel: Kernel,
    base: Tensor,
    noise: Noise,
    *,
    method: Method = "integration",
    nodes: int = 12,
    burn: int = 20,
    record: int = 40,
    particles: int = 2,
) -> Normalizer:
    """log Z = log ∫ exp(-Ē(base/σ + Ḡᵀ ζ)) dζ of a level, for each base; that of x̄ = σ ζ is dim · log σ more.

    "integration" is log Z_0 - ∫_0^1 E_λ[Ē - U_0] dλ by Gauss-Legendre nodes, the chains carried from one to the next:
    half of them up from draws of U_0, half down from draws of e^{-Ē} that are as good as samples of the model. Chains
    that lag behind λ err to opposite sides on the two ways, so that the mean of the ways is better than either. Half
    their difference is the standard error: it holds all autocorrelation, and the hysteresis too.

    "annealing" is importance sampling from law to law, log Z_0 + log mean_p exp(-Σ_t (λ_t - λ_{t-1}) (Ē - U_0)). Its Z
    is unbiased however badly chains mix, so that log Z comes out too small on average: by half the square of its
    standard error (the spread of weights) where that is small, and by more, with an error that is itself too small,
    where few particles carry the weight. Take more particles until log Z no longer rises.

    Both cost nodes · (burn + record) transitions a particle. A single coefficient is a quadrature without error.

    Args:
        base: [B, H, W] known part of fields, in data units.
        noise: of B items; with `SeedNoise` the value of item i depends on seed i and base i alone.
        nodes, burn, record: values of λ and transitions at each; annealing takes as many steps in λ as transitions.
        particles: independent chains for every base; a single one goes up.
    Raises:
        ValueError: if a count is below 1.
        ConfigError: if an energy on the way is not finite.
        ValueError: if a number is out of its range, or if chains from the law itself leave what is finite.
    Source: Gelman & Meng 1998; Neal 2001 (Annealed importance sampling).
    """
    if min(nodes, burn + 1, record, particles) < 1:
        raise ValueError(
            "log Z: nodes, record and particles of at least 1 and burn of at least 0 are needed, found "
            f"nodes={nodes}, burn={burn}, record={record}, particles={particles}."
        )
    level = conditional.level
    if level.dim == 1:
        value = torch.full((len(base),), line_law(conditional, base).log_normalizer, dtype=torch.float64)
        return Normalizer(value.to(base.device), torch.zeros_like(value, device=base.device) if particles > 1 else None)
    base, noise = base.repeat_interleave(particles, 0), _Particles(noise, particles)
    scale = conditional.scale_given(base)
    bridge = Bridge(conditional.potential(base), scale)
    chain = {"step_size": conditional.step_size, "scale": scale, "noise": noise}
    if method == "integration":
        down = torch.arange(len(base), device=base.device) % particles % 2 == 1
        z = start(scale, noise)
        if particles > 1:
            z = torch.where(down[:, None], draw(conditional, kernel, base, noise)[0], z)
        drop = _integrate(bridge, kernel, z, down, nodes, burn, record, level.label, chain)
    else:
        z = start(scale, noise)
        drop = _anneal(bridge, kernel, z, nodes * (burn + record), level.label, chain)
    if not drop.isfinite().all():
        raise ConfigError(f"log Z of {level.label}: energies on the way to it are not finite. Regularise the fit.")
    known = 0.5 * level.dim * math.log(2 * math.pi) + scale.double().log().sum(1)
    values = (known - drop).unflatten(0, (-1, particles))
    return _both_ways(values) if method == "integration" else _log_mean(values)


def _integrate(
    bridge: Bridge,
    kernel: Kernel,
    z: Tensor,
    down: Tensor,
    nodes: int,
    burn: int,
    steps: int,
    where: str,
    chain: dict,
) -> Tensor:
    """[n] ∫_0^1 E_λ[Ē - U_0] dλ by chains from z, at e^{-Ē} where they go `down` and at U_0 where they go up."""
    places, weights = (torch.from_numpy(a).to(z.device) / 2 for a in np.polynomial.legendre.leggauss(nodes))
    total, state, last = 0.0, None, None
    for place, weight in zip(places.tolist(), weights.tolist(), strict=True):  # as many nodes are above 1/2 as below
        share = torch.where(down, 0.5 - place, 0.5 + place)
        potential = bridge.at(share)
        state = begin(potential, z, where=where) if state is None else bridge.moved(state, last, share)
        state = advance(kernel, potential, state, burn, **chain)
        observe = lambda s, share=share: bridge.work(s, share)  # noqa: E731
        state, work = record(kernel, potential, state, steps, observe=observe, **chain)
        total, last = total + weight * work.mean(0), share
    return total


def _anneal(bridge: Bridge, kernel: Kernel, z: Tensor, steps: int, where: str, chain: dict) -> Tensor:
    """[n] Σ_t (Ē - U_0)/T before each of T transitions, of which the last is not needed: minus log weights."""
    shares = torch.arange(1, steps + 1, dtype=torch.float64, device=z.device).div(steps).unsqueeze(1).expand(-1, len(z))
    state = begin(bridge.at(shares[0]), z, where=where)
    total = bridge.work(state, shares[0])
    for share, following in pairwise(shares):
        state = advance(kernel, bridge.at(share), state, 1, **chain)
        total = total + bridge.work(state, share)
        state = bridge.moved(state, share, following)
    return total / steps


def _both_ways(values: Tensor) -> Normalizer:
    """Of log Z by particles [B, P], every second of which went down."""
    if values.shape[1] == 1:
        return Normalizer(values[:, 0], None)
    up, down = values[:, ::2].mean(1), values[:, 1::2].mean(1)
    return Normalizer((up + down) / 2, (up - down).abs() / 2)


def _log_mean(values: Tensor) -> Normalizer:
    """Of log weights by particles [B, P]."""
    count = values.shape[1]
    value = values.logsumexp(1) - math.log(count)
    spread = (values - value[:, None]).exp().std(1) / math.sqrt(count) if count > 1 else None
    return Normalizer(value, spread)
