"""Variational autoencoders whose prior and posterior are flows."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..distributions import StandardNormal
from ..model import Model
from ..networks.network import Network
from ..registry import register
from ..rng import BatchNoise, Noise, SeedNoise, as_seeds
from ..transforms import Transform
from ..types import Batch, Condition, Likelihood, Loss, Seeds, Shape, sum_items
from .bijection import Bijection, Chain, chain
from .observations import HALF_LOG_TWO_PI, GaussianMixture, ObservationModel, check_draws, uniforms

FIRST_WEIGHT = 0.5  # of the KL divergence at the first step


class LatentLaw(nn.Module):
    """The law of a latent z whose image under a chain of layers, or whose preimage, is Gaussian.

    Args:
        layers: from z to the Gaussian variable; none is the Gaussian itself.
        latent: size of z.
    """

    def __init__(self, layers: tuple[Callable[..., Bijection], ...], latent: int, **conditions: Any) -> None:
        super().__init__()
        self.layers: Chain | None = chain(layers, (latent,), **conditions) if layers else None

    def forward_layers(self, z: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        return (z, z.new_zeros(len(z), dtype=torch.float64)) if self.layers is None else self.layers(z, condition)

    def invert_layers(self, z: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.layers is None:
            return z, z.new_zeros(len(z), dtype=torch.float64)
        return self.layers.inverse(z, condition)

    def initialize(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """Let the layers set what depends on data from their inputs z [B, latent]; returns what they make of it."""
        if self.layers is not None:
            self.layers.initialize(z, condition)
        return self.forward_layers(z, condition)[0]


class Prior(LatentLaw):
    """p(z) = N(f(z); 0, I) |det ∂f/∂z|: one pass of the layers f scores, their inverse samples."""

    def __init__(self, layers: tuple[Callable[..., Bijection], ...], latent: int, **conditions: Any) -> None:
        super().__init__(layers, latent, **conditions)
        self.base = StandardNormal(shape=(latent,))

    def log_prob(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """[B] float64."""
        base, log_det = self.forward_layers(z, condition)
        return self.base.log_prob(base) + log_det

    def sample(self, eps: Tensor, condition: Tensor | None) -> Tensor:
        """[B, latent] made of standard normal eps [B, latent]."""
        return self.invert_layers(eps, condition)[0]


class Posterior(LatentLaw):
    """q(z|c) is the law of f(w; c), w ~ N(m(c), diag s(c)²), with m and log s linear in the context c.

    log q(z|c) = log N(w; m, s²) - log|det ∂f/∂w|: one pass of the layers f samples and scores the sample, so that an
    autoregressive f is an inverse-autoregressive posterior.

    Source: Kingma et al. 2016 (Improved variational inference with inverse autoregressive flow), section 3; Durkan et
        al. 2019 (Neural Spline Flows), section 5.2.
    """

    def __init__(self, layers: tuple[Callable[..., Bijection], ...], latent: int, context: int) -> None:
        super().__init__(layers, latent, num_classes=None, condition_shape=(context,))
        self.head = nn.Linear(context, 2 * latent)

    def gaussian(self, eps: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """w = m + s eps and log s, both [B, latent]."""
        mean, log_std = self.head(context).to(eps.dtype).chunk(2, 1)
        return mean + log_std.exp() * eps, log_std

    def sample(self, eps: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, latent] made of standard normal eps [B, latent], and log q(z|context) [B] float64."""
        w, log_std = self.gaussian(eps, context)
        z, log_det = self.forward_layers(w, context)
        return z, sum_items(-0.5 * eps.square() - log_std - HALF_LOG_TWO_PI) - log_det

    def log_prob(self, z: Tensor, context: Tensor) -> Tensor:
        """[B] float64, by the inverse of the layers."""
        mean, log_std = self.head(context).to(z.dtype).chunk(2, 1)
        w, log_det = self.invert_layers(z, context)
        return sum_items(-0.5 * ((w - mean) * (-log_std).exp()).square() - log_std - HALF_LOG_TWO_PI) + log_det


@register(Model, "vae")
class VAE(ObservationModel):
    """A latent z under a prior p(z), a decoder for p(x|z), and an encoder whose context steers a posterior q(z|x).

    loss = -(log p(x|z) + m (log p(z) - log q(z|x)))/D, z ~ q(z|x), one sample; m rises linearly from 1/2 to 1 over the
    first share `warm_up` of training. With m = 1 the sum is the evidence lower bound (ELBO) of log p(x).

    p(x|z) is a product of Bernoulli laws for data of two levels, and N(decoder(z), s² I) of T(x) with one learned s for
    all other data, where discrete ones are dequantised by T. Without layers, prior and posterior are Gaussian.

    Args:
        encoder: from items, in model space and not dequantised if they have two levels, to the context.
        decoder: from the latent to logits, or to means in model space.
        latent: size of z.
        context: size of what the encoder tells the posterior.
        prior: layers from z to N(0, I), which the condition steers. They score in one pass.
        posterior: layers from a Gaussian to z, which the context steers. They sample in one pass.
        conditional: whether encoder, prior and decoder see the condition of the data (labels, embeddings).
        warm_up: share of the training steps over which m rises; 0 for m = 1.
    Raises:
        ValueError: if a size or share is out of its range, or if a conditional model meets data without conditions.
    Source: Kingma & Welling 2014 (Auto-encoding variational Bayes), section 2; Durkan et al. 2019 (Neural Spline
        Flows), section 5.2, for flows as prior and posterior.
    """

    def __init__(
        self,
        encoder: Callable[..., Network],
        decoder: Callable[..., Network],
        latent: int = 32,
        context: int = 64,
        prior: tuple[Callable[..., Bijection], ...] = (),
        posterior: tuple[Callable[..., Bijection], ...] = (),
        conditional: bool = False,
        warm_up: float = 0.1,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        levels: int | None,
        bin_width: float | None,
    ) -> None:
        sizes = {"shape": shape, "num_classes": num_classes, "condition_shape": condition_shape}
        super().__init__(
            None, GaussianMixture(1), conditional, **sizes, transform=transform, levels=levels, bin_width=bin_width
        )
        if latent < 1 or context < 1 or not 0 <= warm_up <= 1:
            raise ValueError(
                f"vae: latent >= 1, context >= 1 and 0 <= warm_up <= 1 are needed, found {latent}, {context} and "
                f"{warm_up}."
            )
        self.latent, self.warm_up = latent, warm_up
        built = {"timed": False, **self.conditions}
        self.encoder = encoder(in_shape=transform.out_shape(self.shape), out_shape=(context,), **built)
        self.decoder = decoder(in_shape=(latent,), out_shape=self.observed_shape, **built)
        self.prior = Prior(prior, latent, **self.conditions)
        self.posterior = Posterior(posterior, latent, context)
        self.log_scale = None if self.binary else nn.Parameter(torch.zeros(()))

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def kl_weight(self) -> float:
        """m at the present progress of training; 1 outside it."""
        rise = 1.0 if self.warm_up == 0 else min(1.0, self.progress / self.warm_up)
        return FIRST_WEIGHT + (1 - FIRST_WEIGHT) * rise

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        self.check_items(batch.x, "loss")
        condition = self.checked(batch.condition if self.conditional else None, len(batch), "loss")
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        reconstruction, kl = self._terms(batch.x, condition, noise)
        elbo = (reconstruction - kl).detach()
        logs = {"elbo": elbo.mean(), "reconstruction": reconstruction.detach().mean(), "kl": kl.detach().mean()}
        logs["kl_weight"] = torch.tensor(self.kl_weight)
        return Loss((self.kl_weight * kl - reconstruction) / self.dims, logs | self.code_lengths(elbo))

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform, then let the layers set what depends on data (ActNorm) from the first batch."""
        self.transform.fit(batches)
        batch = next(iter(batches), None)
        if batch is None:
            raise ValueError("vae: there are no training items to start from.")
        training = self.training
        self.eval()  # dropout would measure another map than the one that is used
        condition = self.checked(batch.condition if self.conditional else None, len(batch), "prepare")
        noise, x = BatchNoise(len(batch), generator=generator, device=self.device), batch.x.to(self.device)
        y = self._encoder_input(self.observed(x, noise if self.dequantised else None)[0], x)
        self.encoder.initialize(y, condition)
        context = self.encoder(None, y, condition)
        w = self.posterior.gaussian(noise.normal(self.latent, dtype=self.dtype), context)[0]
        z = self.posterior.initialize(w, context)
        self.prior.initialize(z, condition)
        self.decoder.initialize(z, condition)
        self.train(training)
        return {}

    # ---- one draw of the latent --------------------------------------------------------------------------------------

    def _encoder_input(self, observed: Tensor, x: Tensor) -> Tensor:
        """[B, *model shape]; two levels enter where the transform puts the middles of their cells."""
        return self.transform(x.to(self.dtype), None)[0].to(self.dtype) if self.binary else observed

    def _context(self, observed: Tensor, x: Tensor, condition: Tensor | None) -> Tensor:
        """[B, context]."""
        return self.encoder(None, self._encoder_input(observed, x), condition)

    def _terms(self, x: Tensor, condition: Tensor | None, noise: Noise) -> tuple[Tensor, Tensor]:
        """[B] float64 log p(x|z) in data units and log q(z|x) - log p(z), for one z ~ q(z|x) per item."""
        observed, volume = self.observed(x, noise if self.dequantised else None)
        context = self._context(observed, x, condition)
        return self._weigh(observed, volume, context, condition, noise.normal(self.latent, dtype=self.dtype))

    def _weigh(
        self, observed: Tensor, volume: Tensor, context: Tensor, condition: Tensor | None, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        z, log_q = self.posterior.sample(eps, context)
        log_p = sum_items(self.observation.log_prob(observed, self._raw(z, condition)))
        return log_p + volume, log_q - self.prior.log_prob(z, condition)

    def _raw(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """[P, B, *observed_shape] parameters of p(x|z)."""
        out = self.decoder(None, z, condition).to(z.dtype)
        return out[None] if self.log_scale is None else torch.stack((out, self.log_scale.expand_as(out)))

    # ---- likelihood --------------------------------------------------------------------------------------------------

    def likelihood(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        seeds: Seeds | None = None,
        draws: int = 1,
        batch_size: int = 4096,
    ) -> Likelihood:
        """log (1/K Σ_k p(x|z_k) p(z_k)/q(z_k|x)) in nats, z_k ~ q(z|x): a bound that grows with K towards log p(x).

        K = 1 is the ELBO. Where data are dequantised, every draw has its own dequantisation noise too. Gradients flow
        if they are enabled, and need the memory of every draw.

        Args:
            x: [B, *shape] in data units.
            condition: [B, *] for conditional models.
            seeds: [B] for the draws; 0 … B-1 if not given.
            draws: K; two or more give a standard error, to first order.
            batch_size: how many pairs of item and draw are weighed at once.
        Raises:
            NotApplicable: if the transform to model space has no volume.
        Source: Burda et al. 2016 (Importance Weighted Autoencoders), section 3.
        """
        self.check_scored(x, "likelihood")
        condition = self.checked(condition, len(x), "likelihood")
        seeds = as_seeds(len(x) if seeds is None else seeds)
        check_draws(len(x), seeds, draws, batch_size)
        noise = SeedNoise(seeds, purpose="posterior", device=x.device)
        found = []
        for part in torch.arange(draws).split(max(1, batch_size // max(1, len(x)))):
            reconstruction, kl = self._terms_of_draws(x, condition, noise, len(part))
            found.append((reconstruction - kl).reshape(len(part), len(x)))
        values = torch.cat(found)
        value = values.logsumexp(0) - math.log(draws)
        if draws == 1:
            return Likelihood(value, "bound")
        stderr = (values - value).detach().exp().std(0) / math.sqrt(draws)
        return Likelihood(value, "bound", stderr)

    def _terms_of_draws(self, x: Tensor, condition: Tensor | None, noise: Noise, draws: int) -> tuple[Tensor, Tensor]:
        """As `_terms`, [draws·B], draw by draw; an encoder whose input does not change is called once."""
        observations, eps = [], []
        for _ in range(draws):  # draw by draw, so that item i sees the same numbers however many draws are at once
            observations.append(self.observed(x, noise if self.dequantised else None))
            eps.append(noise.normal(self.latent, dtype=self.dtype))
        observed, volume = (torch.cat(parts) for parts in zip(*observations, strict=True))
        given = None if condition is None else condition.repeat(draws, *(1,) * (condition.ndim - 1))
        if self.dequantised:
            context = self._context(observed, x, given)
        else:
            context = self._context(observations[0][0], x, condition).repeat(draws, 1)
        return self._weigh(observed, volume, context, given, torch.cat(eps))

    def log_prob(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        seeds: Seeds | None = None,
        draws: int = 1,
        batch_size: int = 4096,
    ) -> Tensor:
        """[B] nats: the value of `likelihood`."""
        return self.likelihood(x, condition=condition, seeds=seeds, draws=draws, batch_size=batch_size).value

    # ---- samples -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, seeds: Seeds, *, condition: Condition | None = None, mean: bool = False, batch_size: int = 512
    ) -> Tensor:
        """[n, *shape] items in data units; item i depends on seed i (and condition i) alone.

        Args:
            seeds: n, or n seeds.
            condition: [n, *] one per seed, for conditional models.
            mean: give the mean of p(x|z) instead of a draw from it, which is no sample of the model.
            batch_size: how many are drawn at once.
        Raises:
            ValueError: if the model is conditional and there is not one condition per seed, or the other way round.
        """
        seeds = as_seeds(seeds)
        condition = self.checked(condition, len(seeds), "sample")
        if batch_size < 1:
            raise ValueError(f"sample: batch_size must be at least 1, found {batch_size}.")
        drawn = []
        for rows in torch.arange(len(seeds)).split(batch_size):  # one empty part if there are no seeds
            noise, given = SeedNoise(seeds[rows], device=self.device), None if condition is None else condition[rows]
            z = self.prior.sample(noise.normal(self.latent, dtype=self.dtype), given)
            drawn.append(self._decoded(z, given, None if mean else noise))
        return torch.cat(drawn)

    @torch.no_grad()
    def posterior_sample(self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None) -> Tensor:
        """[B, latent] z ~ q(z|x), one for each item x [B, *shape], from its seed (0 … B-1 if not given)."""
        self.check_items(x, "posterior_sample")
        condition = self.checked(condition, len(x), "posterior_sample")
        noise = SeedNoise(len(x) if seeds is None else seeds, purpose="posterior", device=x.device)
        observed, _ = self.observed(x, noise if self.dequantised else None)
        eps = noise.normal(self.latent, dtype=self.dtype)
        return self.posterior.sample(eps, self._context(observed, x, condition))[0]

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None) -> Tensor:
        """[B, *shape] the mean of p(x|z) for z ~ q(z|x), in data units, not rounded to levels of binary data."""
        z = self.posterior_sample(x, condition=condition, seeds=seeds)
        return self._decoded(z, self.checked(condition, len(x), "reconstruct"), None)

    def _decoded(self, z: Tensor, condition: Tensor | None, noise: Noise | None) -> Tensor:
        """A draw from p(x|z), or its mean without noise."""
        raw = self._raw(z, condition)
        if noise is None:
            return self.in_data_units(self.observation.mean(raw))
        return self.in_data_units(self.observation.sample(raw, uniforms(noise, *self.observed_shape)))
