"""The stationary Gaussian with the power spectrum of the data: the baseline of every model of fields."""

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor

from ..model import Model
from ..registry import ConfigError, register
from ..rng import SeedNoise, as_seeds
from ..transforms import Transform
from ..types import Batch, Condition, Likelihood, Loss, Seeds, Shape


@register(Model, "stationary_gaussian")
class StationaryGaussian(Model):
    """x = m + F⁻¹ √P F w with white noise w: a mean and a power P for each frequency, and nothing else.

    log p(x) = -½ Σ_k [|x̂_k|²/P_k + log 2πP_k] of the unitary Fourier transform x̂ of x - m. P is the mean of |x̂_k|²
    over the training data, in closed form in `prepare` (`train.steps: 0`); fields are periodic.

    Args:
        isotropic: average P also over k with its axes exchanged and reflected; both sizes must be equal.
    Raises:
        ConfigError: if items are no fields [1, H, W], or the sizes differ and isotropy is asked.
    """

    def __init__(self, isotropic: bool = False, *, shape: Shape, transform: Transform) -> None:
        super().__init__()
        if len(shape) != 3 or shape[0] != 1 or (isotropic and shape[1] != shape[2]):
            raise ConfigError(
                "stationary_gaussian: fields [1, H, W] of one channel are needed (square ones if isotropic), found "
                f"items of shape {list(shape)}."
            )
        self.shape, self.transform, self.isotropic = tuple(shape), transform, isotropic
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("power", torch.ones(shape[1:], dtype=torch.float64))

    def fitted_numbers(self) -> int:
        """The mean, and a power for each class of frequencies that are tied: k and -k, or all of a symmetry."""
        height, width = self.power.shape
        if self.isotropic:
            side = height // 2 + 1
            return 1 + side * (side + 1) // 2
        alone = math.prod(2 - n % 2 for n in (height, width))  # frequencies that are their own negatives
        return 1 + (height * width + alone) // 2

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Set the mean and the power spectrum; logs the likelihood of the fit.

        Raises:
            ConfigError: if some frequency has no power, as of constant fields.
        """
        self.transform.fit(batches)
        n, total, power = 0, 0.0, torch.zeros_like(self.power)
        for batch in batches:
            y = self.transform(batch.x.to(self.device).double())[0].squeeze(1)
            n, total = n + len(y), total + y.mean((1, 2)).sum()
        mean = total / n
        for batch in batches:
            y = self.transform(batch.x.to(self.device).double())[0].squeeze(1)
            power += torch.fft.fft2(y - mean, norm="ortho").abs().square().sum(0)
        power /= n
        if self.isotropic:
            turned = power.flip(0, 1).roll((1, 1), (0, 1))  # k -> -k is the same of real fields
            power = (power + turned + power.flip(0).roll(1, 0) + power.flip(1).roll(1, 1)) / 4
            power = (power + power.T) / 2
        if not power.min() > 1e-14 * power.max():
            raise ConfigError(
                f"stationary_gaussian: {int((power <= 1e-14 * power.max()).sum())} of {power.numel()} frequencies have "
                "no power in the training fields. Constant or filtered fields have no density: add noise, or pool them."
            )
        self.mean.copy_(mean)
        self.power.copy_(power)
        values = [-self.log_prob(batch.x.to(self.device)).sum() for batch in batches]
        return {"nll": sum(values) / n}

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        return Loss(-self.log_prob(batch.x), {})

    @torch.no_grad()
    def sample(self, seeds: Seeds, *, condition: Condition | None = None, batch_size: int = 512) -> Tensor:
        """[n, 1, H, W] items in data units; item i depends on seed i alone."""
        seeds = as_seeds(seeds)
        drawn = []
        for rows in torch.arange(len(seeds)).split(batch_size):
            white = SeedNoise(seeds[rows], device=self.device).normal(*self.shape, dtype=torch.float64)
            y = torch.fft.ifft2(torch.fft.fft2(white) * self.power.sqrt()).real + self.mean
            drawn.append(self.transform.inverse(y).float())
        return torch.cat(drawn)

    def likelihood(self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None) -> Likelihood:
        """log p(x) in nats, exact.

        Raises:
            ValueError: if x is [B, *] of another shape than the model's.
        """
        self.check_items(x, "likelihood")
        y, log_det = self.transform(x.double())
        spectrum = torch.fft.fft2(y.squeeze(1) - self.mean, norm="ortho").abs().square()
        density = -0.5 * (spectrum / self.power + (2 * math.pi * self.power).log())
        return Likelihood(density.sum((1, 2)) + log_det, "exact")

    def log_prob(self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None) -> Tensor:
        """[B] nats: the value of `likelihood`."""
        return self.likelihood(x).value
