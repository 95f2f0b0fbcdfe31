"""Likelihoods of a model of conditional energies: each conditional divided by its own Z."""

import torch
from torch import Tensor

from ..rng import SeedNoise, as_seeds
from ..types import Condition, Likelihood, NotApplicable, Seeds
from .free_energy import Method, log_normalizer


class Scored:
    """The part of `CSLC` that scores items."""

    @torch.no_grad()
    def likelihood(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        seeds: Seeds | None = None,
        method: Method = "integration",
        nodes: int = 12,
        burn: int = 20,
        record: int = 40,
        particles: int = 2,
        batch_size: int = 256,
    ) -> Likelihood:
        """log p(x) = log|det ∂T/∂x| - Σ_j [Ē_j(x_{j-1}) + log Z_j(x_j) + d_j log σ_j] in nats.

        The wavelet transform has the determinant 1, and d_j coefficients x̄_j = σ_j ζ_j are drawn at a level. Energies
        are exact, and each log Z_j(x_j) is estimated by chains, for every item anew (see `log_normalizer`): by
        integration without bias but for equilibration, by annealing with a log p too large by half its squared
        standard error. A coarsest level of a single pixel is a quadrature. No gradients flow.

        Args:
            x: [B, 1, H, W] in data units.
            seeds: [B] for the chains, and for dequantisation noise; 0 … B-1 if not given.
            method: integration over, or annealing along, the path from a Gaussian to each conditional law.
            nodes, burn, record: stations on the path and transitions at each, burnt and recorded; annealing makes as
                many transitions, each at a station of its own.
            particles: chains of every item and level; two or more give standard errors.
            batch_size: how many are scored at once.
        Returns:
            kind stochastic.
        Raises:
            NotApplicable: if the transform to model space has no volume.
            ValueError: if the model is not fitted, or items, seeds or counts do not fit.
            ConfigError: if an energy on the way is not finite.
        """
        self.check_items(x, "likelihood")
        if condition is not None:
            raise ValueError("likelihood: this model takes no condition.")
        if not self.transform.volume:
            raise NotApplicable("the transform to model space has no log-determinant, so data have no density.")
        if self.still:
            raise NotApplicable("the mean of the training fields never varies, so that their law has no density.")
        if not self.fitted:
            raise ValueError("likelihood: the model is not fitted yet. Call prepare, or load weights.")
        seeds = as_seeds(len(x) if seeds is None else seeds)
        if len(seeds) != len(x) or batch_size < 1 or method not in ("integration", "annealing"):
            raise ValueError(
                f"likelihood: one seed per item, batch_size >= 1 and the method integration or annealing are needed, "
                f"found {len(seeds)} seeds for {len(x)} items, batch_size={batch_size} and method={method!r}."
            )
        options = {"method": method, "nodes": nodes, "burn": burn, "record": record, "particles": particles}
        if not len(x):
            return Likelihood(torch.empty(0, dtype=torch.float64, device=self.device), "stochastic")
        parts = [self._scored(x[rows], seeds[rows], options) for rows in torch.arange(len(x)).split(batch_size)]
        values, variances = (torch.cat(part) for part in zip(*parts, strict=True))
        return Likelihood(values, "stochastic", variances.sqrt() if particles > 1 else None)

    def log_prob(
        self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None, **options: object
    ) -> Tensor:
        """[B] nats: the value of `likelihood`."""
        return self.likelihood(x, condition=condition, seeds=seeds, **options).value

    def _scored(self, x: Tensor, seeds: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        """[B] log p and [B] the variance of its estimate."""
        noise = SeedNoise(seeds, purpose="dequantise", device=self.device)
        fields, value = self.fields(x.to(self.device).double(), noise)
        variance = torch.zeros_like(value)
        for k, (conditional, y) in enumerate(zip(self.conditionals, fields, strict=True)):
            level = conditional.level
            base = self.tree.base(k, fields[k - 1] if k else None, len(y), y).float()  # as chains of samples are
            noise = SeedNoise(seeds, purpose=f"log Z {k}", device=self.device)
            found = log_normalizer(conditional, self.kernel, base, noise, **options)
            energy = conditional.energy(y / conditional.unit)[0]
            value = value - energy - found.value - level.dim * conditional.unit.log()
            variance = variance + (0 if found.stderr is None else found.stderr.square())
        return value, variance
