"""Fields of the lattice φ⁴ model as a data set: equilibrium draws, and their density where its normaliser is wanted."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..registry import register
from ..transforms import Transform
from ..types import Estimate
from .dataset import SPLITS, Dataset, Split
from .image_cache import cached_rows
from .phi4_lattice import (
    NODES,
    THINNING,
    WALKERS,
    Mixing,
    binder,
    bonds_on_the_way,
    chains,
    check_lattice,
    energy,
    log_normalizer,
    mixing,
    virial,
)
from .simulated_fields import SimulatedFields

LENGTH = 40  # items that a chain gives at most
TOGETHER = 2**14  # sites of chains that are moved together before chains are made longer: fewer cost hardly less


@register(Dataset, "phi4")
class Phi4(SimulatedFields):
    """Equilibrium fields [1, L, L] of the φ⁴ model: p ∝ exp(-Σ_i (φ_i⁴ - φ_i²) + β Σ_⟨ij⟩ φ_i φ_j), on a torus.

    β = 0.5 is disordered, 0.68 nearly critical, 0.76 ordered (with either sign). Fields are drawn by Metropolis updates
    and by cluster updates of the signs (`phi4_lattice`), when an item is first asked for. The splits come from
    different chains. The autocorrelation times of m² and |m| are measured first; a chain gives its first item after 15
    times the longer one, then up to 39 more that are 3 times the longer one apart. Without a cache that is done in
    every process that uses items, which takes minutes at 64².

    Args:
        size: L, sites along a side, even.
        beta: coupling β >= 0.
        count: training items; a fifth as many validate.
        reference: test items.
        seed: of all draws.
        normalizer: find log Z when the density is first asked for, by thermodynamic integration in β: `log_prob` then
            has values, to a constant whose standard error `checks` tells.
        cache: folder in which fields and normaliser are kept; null to simulate whenever they are used.
        transform: instead of standardisation.
    Raises:
        ConfigError: if the side is odd, or nothing is left to draw.
    Source: Kaupužs et al. 2016 (Corrections to finite-size scaling in the φ⁴ model on square lattices).
    """

    local = ("cache",)

    def __init__(
        self,
        size: int = 32,
        beta: float = 0.68,
        count: int = 5000,
        reference: int = 5000,
        seed: int = 0,
        normalizer: bool = False,
        cache: str | None = None,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        check_lattice(size, beta, "data 'phi4'")
        self.plan((size, size), count, reference, transform)
        self.beta, self.seed, self.normalizer = float(beta), seed, normalizer
        self.cache = None if cache is None else Path(os.path.expanduser(cache))

    @property
    def mixing(self) -> Mixing:
        """The autocorrelation times in sweeps, and the sweeps before and between the items of a chain."""
        return self._drawn[1]

    @property
    def recipe(self) -> dict[str, Any]:
        return {"beta": self.beta, "seed": self.seed}

    def draw(self, split: Split) -> Tensor:
        ends = np.cumsum([0, *self.counts.values()])
        k = SPLITS.index(split)
        return self._drawn[0][ends[k] : ends[k + 1]]

    def log_prob(self, x: Tensor) -> Tensor | None:
        """[B] float64 -E(x) - log Z in nats; None without `normalizer`.

        log Z is the same for all fields, and uncertain by `log_prob_stderr`.
        """
        if not self.normalizer:
            return None
        return -energy(x.double(), self.beta) - self.log_z[0] * math.prod(self.shape)

    @property
    def log_prob_stderr(self) -> float:
        """N times the standard error of `log_z` in nats; 0 without `normalizer`."""
        return self.log_z[1] * math.prod(self.shape) if self.normalizer else 0.0

    @cached_property
    def log_z(self) -> tuple[float, float]:
        """(log Z)/N and its standard error in nats/site."""
        _, side, _ = self.shape
        if self.cache is None:
            return log_normalizer(self.beta, _bonds(side, self.beta, self.seed))
        source = self._source | {"what": "bonds of the φ⁴ model"}
        made = lambda _: iter([_bonds(side, self.beta, self.seed).numpy().view(np.uint8)])  # noqa: E731
        rows, _ = cached_rows(self.cache, source, 8 * WALKERS, made)
        bonds = rows(torch.arange(NODES)).view(torch.float64)
        return log_normalizer(self.beta, bonds)

    def floor(self, split: Split = "test") -> Estimate | None:
        """(E + log Z)/N of the items of a split in nats/site: the negative log-likelihood of the law itself.

        Its expectation is the entropy of a site. The error holds that of log Z. None without `normalizer`.
        """
        if not self.normalizer:
            return None
        each = -self.log_prob(self.all(split).x) / math.prod(self.shape)
        error = math.hypot(float(each.std()) / math.sqrt(len(each)), self.log_prob_stderr / math.prod(self.shape))
        return Estimate(float(each.mean()), error, n=len(each), unit="nats/site", better="none", kind="stochastic")

    def checks(self) -> list[str]:
        x = self.all("train").x.double()
        square, identity = x.square().flatten(1).mean(1), virial(x, self.beta)
        root, (cumulant, error) = math.sqrt(len(x)), binder(x)
        mix = self.mixing
        lines = [
            f"⟨φ²⟩ = {float(square.mean()):.4f} ± {float(square.std()) / root:.4f}, Binder's U₄ = {cumulant:.4f} ± "
            f"{error:.4f}",
            f"virial identity 4⟨φ⁴⟩ - 2⟨φ²⟩ - 2β⟨bond⟩ = {float(identity.mean()):.4f} ± "
            f"{float(identity.std()) / root:.4f}; 1 is exact",
            f"autocorrelation times {mix.square:.1f} sweeps of m², {mix.absolute:.1f} of |m|; items of a chain lie "
            f"{mix.thinning} sweeps apart ({THINNING} times the longer) after {mix.burn_in}; splits share no chain",
        ]
        if self.normalizer:
            floor = self.floor()
            lines.append(
                f"log Z/N = {self.log_z[0]:.5f} ± {self.log_z[1]:.5f}; no model's likelihood costs less than "
                f"{floor.value:.4f} ± {floor.stderr:.4f} nats/site"
            )
        return lines

    @property
    def _source(self) -> dict[str, Any]:
        """What a cache is known by."""
        return {"version": self.version, "size": self.shape[1], **self.recipe}

    @cached_property
    def _drawn(self) -> tuple[Tensor, Mixing]:
        """[train + val + test, L, L] float32 all fields, and how they were drawn."""
        _, side, _ = self.shape
        counts = tuple(self.counts.items())
        if self.cache is None:
            return _simulated(side, self.beta, counts, self.seed)

        def blocks(notes: dict[str, Any]) -> Iterator[np.ndarray]:
            mix = mixing(side, self.beta, self.seed)
            notes["mixing"] = mix._asdict()
            for group in simulate(side, self.beta, counts, self.seed, mix):
                yield group.flatten(1).numpy().view(np.uint8)

        source = self._source | {"what": "fields of the φ⁴ model", "counts": self.counts}
        rows, notes = cached_rows(self.cache, source, 4 * side**2, blocks)
        fields = rows(torch.arange(sum(self.counts.values()))).view(torch.float32)
        return fields.reshape(-1, side, side), Mixing(**notes["mixing"])


def simulate(size: int, beta: float, counts: tuple[tuple[Split, int], ...], seed: int, mix: Mixing) -> Iterator[Tensor]:
    """The fields [n, L, L] float32 of one split after another, with a line on a terminal that counts them."""
    done, total = 0, sum(n for _, n in counts)
    for split, n in counts:
        lattices = max(-(-n // LENGTH), min(n, TOGETHER // size**2), 1)
        for group in chains(size, beta, n, -(-n // lattices), mix.burn_in, mix.thinning, seed, split):
            yield group.float()
            done += len(group)
            if sys.stderr.isatty():
                end = "\n" if done == total else ""
                print(f"\rsimulating fields {done:,}/{total:,}", end=end, file=sys.stderr, flush=True)


@lru_cache(maxsize=2)
def _simulated(size: int, beta: float, counts: tuple[tuple[Split, int], ...], seed: int) -> tuple[Tensor, Mixing]:
    """All fields, kept for those who ask again, and how they were drawn."""
    mix = mixing(size, beta, seed)
    return torch.cat(list(simulate(size, beta, counts, seed, mix))), mix


@lru_cache(maxsize=4)
def _bonds(size: int, beta: float, seed: int) -> Tensor:
    return bonds_on_the_way(size, beta, seed)
