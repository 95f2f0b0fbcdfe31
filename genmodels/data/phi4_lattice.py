"""The φ⁴ model on a periodic square lattice: its energy, and Markov chains that draw from exp(-E) at any coupling.

E(φ) = Σ_i (φ_i⁴ - φ_i²) - β Σ_⟨ij⟩ φ_i φ_j, over nearest neighbours: (β/2) Σ_⟨ij⟩ (φ_i - φ_j)² + Σ_i (φ_i⁴ - (1 + 2β)
φ_i²). Fields are [B, L, L] or [B, 1, L, L]; on a lattice of 2 x 2 every pair of neighbours counts twice.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Generator, Tensor

from ..autocorrelation import WINDOW, autocorrelation_time
from ..registry import ConfigError
from ..rng import generator

WIDTH = 1.5  # of the proposals: φ' uniform on φ ± 1.5, of which 0.4 are accepted at every coupling of interest
HITS = 2  # proposals of each site in a sweep
GROUP = 2**17  # sites of the lattices that are moved together: what fits into a cache
NODES, WALKERS = 8, 256  # of the integral that gives log Z: values of β, and chains that go from one to the next
BURN_IN, THINNING = 15, 3  # sweeps before the first item and between two of one chain, in autocorrelation times


def neighbours(phi: Tensor) -> Tensor:
    """The sum of the four neighbours of every site."""
    return phi.roll(1, -1) + phi.roll(-1, -1) + phi.roll(1, -2) + phi.roll(-1, -2)


def bond(phi: Tensor) -> Tensor:
    """[B] the mean over sites of φ (φ_right + φ_down), which is -dE/dβ for each site."""
    return (phi * (phi.roll(-1, -1) + phi.roll(-1, -2))).flatten(1).mean(1)


def energy(phi: Tensor, beta: float) -> Tensor:
    """[B] E(φ)."""
    square = phi.square()
    return (square * (square - 1)).flatten(1).sum(1) - beta * bond(phi) * phi[0].numel()


def force(phi: Tensor, beta: float) -> Tensor:
    """-∇E, of the shape of φ: β Σ_neighbours φ_j - 4 φ³ + 2 φ."""
    return beta * neighbours(phi) - 4 * phi**3 + 2 * phi


def virial(phi: Tensor, beta: float) -> Tensor:
    """[B] (φ · ∇E)/N = 4 φ⁴ - 2 φ² - 2 β bond, means over sites: its expectation is 1 (integration by parts)."""
    square = phi.square().flatten(1)
    return 4 * square.square().mean(1) - 2 * square.mean(1) - 2 * beta * bond(phi)


def binder(phi: Tensor) -> tuple[float, float]:
    """Binder's cumulant U = 1 - ⟨m⁴⟩/(3 ⟨m²⟩²) of the mean m of each field, and its standard error.

    The error is that of the linearised ratio, fields being independent.
    """
    square = phi.double().flatten(1).mean(1).square()
    second, fourth = square.mean(), square.square().mean()
    linear = square.square() / (3 * second**2) - 2 * fourth * square / (3 * second**3)
    return float(1 - fourth / (3 * second**2)), float(linear.std()) / math.sqrt(len(square))


def check_lattice(size: int, beta: float, where: str) -> None:
    """Raises ConfigError unless the lattice has an even side, which a chessboard on a torus needs, and β >= 0."""
    if size < 2 or size % 2:
        raise ConfigError(
            f"{where}: size must be even and at least 2 (sites are updated like the squares of a chessboard, which "
            f"meet on an odd torus), found {size}. Take {size + 1 if size > 0 else 2}."
        )
    if not 0 <= beta < math.inf:
        raise ConfigError(f"{where}: beta must be at least 0, found {beta:g}.")


# ---- one sweep ----


def colours(phi: Tensor) -> tuple[Tensor, Tensor]:
    """The black and the white sites [B, L, L/2] of the chessboard: row i has columns 2j + i mod 2 and the others."""
    rows = rearrange(phi, "b (i a) (j c) -> a c b i j", a=2, c=2)
    pack = lambda even, odd: rearrange(torch.stack((even, odd)), "a b i j -> b (i a) j")  # noqa: E731
    return pack(rows[0, 0], rows[1, 1]), pack(rows[0, 1], rows[1, 0])


def whole(black: Tensor, white: Tensor) -> Tensor:
    """[B, L, L]: the inverse of `colours`."""
    even, odd = rearrange(black, "b (i a) j -> a b i j", a=2)
    other_even, other_odd = rearrange(white, "b (i a) j -> a b i j", a=2)
    rows = torch.stack((torch.stack((even, other_even)), torch.stack((other_odd, odd))))
    return rearrange(rows, "a c b i j -> b (i a) (j c)")


def _around(other: Tensor, black: bool) -> Tensor:
    """The sum of the four neighbours of the sites of one colour, all of which have the other one."""
    beside = other.clone()
    # the second horizontal neighbour lies one column further to the left in even rows of black sites, else right
    first, second = (0, 1) if black else (1, 0)
    beside[:, first::2] += other[:, first::2].roll(1, 2)
    beside[:, second::2] += other[:, second::2].roll(-1, 2)
    return beside + other.roll(1, 1) + other.roll(-1, 1)


def metropolis(phi: Tensor, beta: float, source: Generator) -> Tensor:
    """φ [B, L, L] float64 after `HITS` proposals φ_i' uniform on φ_i ± `WIDTH` at every site, one colour at a time.

    Source: Metropolis et al. 1953 (Equation of State Calculations by Fast Computing Machines).
    """
    parts = list(colours(phi))
    for k in (0, 1):
        x, field = parts[k], beta * _around(parts[1 - k], black=k == 0)
        old = x.square()
        for _ in range(HITS):
            step, level = torch.rand(2, *x.shape, generator=source)  # multiples of 2^-24: rounding of no consequence
            step = (2 * WIDTH) * step.double() - WIDTH
            new = (x + step).square()
            rise = new * (new - 1) - old * (old - 1) - field * step
            taken = level < (-rise).exp()
            x, old = torch.where(taken, x + step, x), torch.where(taken, new, old)
        parts[k] = x
    return whole(*parts)


def swendsen_wang(phi: Tensor, beta: float, source: Generator) -> Tensor:
    """φ [B, L, L] with new signs: of clusters joined with probability 1 - exp(-2 β φ_i φ_j) if > 0, each ± at random.

    The signs of φ at fixed |φ| are an Ising model with couplings β |φ_i φ_j|.

    Source: Swendsen & Wang 1987 (Nonuniversal critical dynamics in Monte Carlo simulations); Brower & Tamayo 1989
        (Embedded dynamics for φ⁴ theory).
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    products = phi[..., None] * torch.stack((phi.roll(-1, 2), phi.roll(-1, 1)), -1)
    u = torch.rand(products.shape, generator=source)
    joined = rearrange((u < -torch.expm1(-2 * beta * products)).numpy(), "b i j k -> (b i j) k")
    sites = np.arange(phi.numel(), dtype=np.int32).reshape(phi.shape)
    other = np.stack((np.roll(sites, -1, 2), np.roll(sites, -1, 1)), -1).reshape(-1, 2)[joined]
    right, down = rearrange(joined.view(np.int8), "n k -> k n")
    ends = np.zeros(len(joined) + 1, np.int32)  # the graph in compressed rows: each site, and those it is joined to
    np.cumsum(right + down, out=ends[1:])
    graph = csr_array((np.ones(len(other)), other, ends), shape=(len(joined), len(joined)))
    count, labels = connected_components(graph, directed=False)
    signs = 1 - 2 * torch.randint(2, (count,), generator=source).double()
    return phi.abs() * signs[torch.from_numpy(labels).long()].reshape(phi.shape)


# ---- chains ----


class Mixing(NamedTuple):
    """How fast the chains forget, in sweeps, and what follows.

    Args:
        square, absolute: integrated autocorrelation time ½ + Σ_t ρ(t) of m² and of |m|.
        burn_in: sweeps before the first item, `BURN_IN` times the longer one.
        thinning: sweeps between two items of one chain, `THINNING` times the longer one.
    """

    square: float
    absolute: float
    burn_in: int
    thinning: int


def start(count: int, size: int, source: Generator) -> Tensor:
    """[B, L, L] float64 independent N(0, 1) sites."""
    return torch.randn(count, size, size, generator=source, dtype=torch.float64)


def sweep(phi: Tensor, beta: float, source: Generator) -> Tensor:
    """φ after `metropolis` and `swendsen_wang`; exp(-E) is stationary."""
    return swendsen_wang(metropolis(phi, beta, source), beta, source)


def sweeps_to_forget(series: Tensor) -> float:
    """½ + Σ_{0 < t <= W} ρ(t) of chains [T, C] that have one law at all times, in steps; W is the least W >= 5 τ(W).

    That is half of `autocorrelation_time`. It is infinite if no W is in the first half of the series.
    """
    found = autocorrelation_time(series, window=WINDOW / 2)
    return float(found.tau) / 2 if found.window < len(series) // 2 else math.inf


@lru_cache(maxsize=64)
def mixing(size: int, beta: float, seed: int = 0, chains: int = 64) -> Mixing:
    """The autocorrelation times in chains of their own, from the later half of at least `2 BURN_IN` of them."""
    source = generator("phi4 mixing", size, repr(beta), seed)
    phi, means = start(chains, size, source), []
    while True:
        for _ in range(max(64, len(means))):
            phi = sweep(phi, beta, source)
            means.append(phi.mean((1, 2)))
        m = torch.stack(means[len(means) // 2 :])
        square, absolute = sweeps_to_forget(m.square()), sweeps_to_forget(m.abs())
        longest = max(square, absolute)
        if 2 * BURN_IN * longest <= len(means):
            return Mixing(square, absolute, math.ceil(BURN_IN * longest), math.ceil(THINNING * longest))


def chains(
    size: int, beta: float, count: int, length: int, burn_in: int, thinning: int, *keys: int | str
) -> Iterator[Tensor]:
    """`count` fields of exp(-E), float64, in groups [B, L, L] of chains that move together.

    In a group every chain gives its first field before any gives its second, and up to `length` of them.

    Args:
        burn_in, thinning: sweeps before the first field of a chain and between two.
        keys: of the random numbers.
    """
    together = max(1, GROUP // size**2)
    left = -(-count // length)
    for group in range(-(-left // together)):
        source = generator("phi4", size, repr(beta), group, *keys)
        lattices = min(together, left)
        left, wanted = left - lattices, min(count, lattices * length)
        count -= wanted
        phi, given = start(lattices, size, source), []
        for k in range(-(-wanted // lattices)):
            for _ in range(thinning if k else burn_in):
                phi = sweep(phi, beta, source)
            given.append(phi)
        yield torch.cat(given)[:wanted]


# ---- normaliser ----


def site_normalizer() -> float:
    """log ∫ exp(φ² - φ⁴) dφ, which is log Z/N at β = 0."""
    # the trapezoidal rule is exact to rounding for what is smooth and 0 at both ends
    t = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    return float((t.square() - t**4).logsumexp(0)) + math.log(12 / 2400)


def bonds_on_the_way(
    size: int, beta: float, seed: int = 0, chains: int = WALKERS, burn_in: int = 40, sweeps: int = 80
) -> Tensor:
    """[NODES, chains] float64 means of `bond` over sweeps at the Gauss-Legendre nodes of (0, β), chains carried along.

    Args:
        burn_in, sweeps: which are not counted, and which are, at each node.
    """
    source = generator("phi4 normalizer", size, repr(beta), seed)
    phi, found = start(chains, size, source), []
    for place in (np.polynomial.legendre.leggauss(NODES)[0] + 1) / 2:
        total = torch.zeros(chains, dtype=torch.float64)
        for k in range(burn_in + sweeps):
            phi = sweep(phi, beta * float(place), source)
            total += bond(phi) if k >= burn_in else 0
        found.append(total / sweeps)
    return torch.stack(found)


def log_normalizer(beta: float, bonds: Tensor) -> tuple[float, float]:
    """(log Z)/N = (log Z(0))/N + ∫_0^β ⟨bond⟩ dβ', and its standard error, from the means of `bonds_on_the_way`.

    The weighted sum over nodes is formed for each chain, so that what a chain carries from node to node is in the
    error; that of the quadrature is not.
    """
    weights = torch.from_numpy(np.polynomial.legendre.leggauss(len(bonds))[1]) * (beta / 2)
    each = weights @ bonds
    return site_normalizer() + float(each.mean()), float(each.std()) / math.sqrt(len(each))
