"""The stationary Gaussian: closed forms of a Gaussian free field."""

import math

import pytest
import torch

from genmodels.registry import ConfigError
from genmodels.rng import generator
from genmodels.transforms import Affine, Identity
from genmodels.types import Batch
from genmodels.wavelet.stationary import StationaryGaussian

SHAPE = (1, 6, 8)


def free_field(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fields with the mean 0.3 and P(k) = 1/(0.5 + 4 - 2 cos k₁ - 2 cos k₂), and P."""
    k = [2 * math.pi * torch.arange(size, dtype=torch.float64) / size for size in SHAPE[1:]]
    power = 1 / (4.5 - 2 * k[0].cos()[:, None] - 2 * k[1].cos())
    white = torch.randn(n, *SHAPE[1:], generator=generator("free field"), dtype=torch.float64)
    return 0.3 + torch.fft.ifft2(torch.fft.fft2(white) * power.sqrt()).real.unsqueeze(1), power


def fitted(n: int = 4000, **options: bool) -> StationaryGaussian:
    model = StationaryGaussian(**options, shape=SHAPE, transform=Identity())
    model.prepare([Batch(x) for x in free_field(n)[0].split(500)], generator=generator("prepare"))
    return model


def test_log_prob_is_that_of_the_dense_gaussian():
    model = fitted(200)
    basis = torch.fft.ifft2(torch.fft.fft2(torch.eye(48, dtype=torch.float64).view(48, 6, 8)) * model.power).real
    dense = torch.distributions.MultivariateNormal(model.mean.expand(48), basis.reshape(48, 48))
    x = free_field(5)[0]
    torch.testing.assert_close(model.log_prob(x), dense.log_prob(x.flatten(1)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (3, 7), (1, 1)])
def test_numbers_that_are_fitted_are_the_mean_and_powers_that_may_differ(size):
    x = torch.randn(20, 1, *size, generator=generator("count"))
    model = StationaryGaussian(shape=(1, *size), transform=Identity())
    model.prepare([Batch(x)], generator=generator("prepare"))
    assert model.fitted_numbers() == 1 + len(model.power.log().mul(1e9).round().unique())
    side = max(size)
    tied = StationaryGaussian(isotropic=True, shape=(1, side, side), transform=Identity())
    x = torch.randn(20, 1, side, side, generator=generator("count"))
    tied.prepare([Batch(x)], generator=generator("prepare"))
    assert tied.fitted_numbers() == 1 + len(tied.power.log().mul(1e9).round().unique())


def test_power_and_mean_are_found_within_their_errors():
    model, (_, power) = fitted(), free_field(1)
    # |x̂|² has the relative deviation √2 where k = -k, and 1 elsewhere: at most 4.5 standard errors of 48 frequencies
    assert ((model.power / power - 1).abs() < 4.5 * math.sqrt(2 / 4000)).all()
    assert abs(float(model.mean) - 0.3) < 4 * math.sqrt(2 / 48 / 4000)  # P(0) = 2, over 48 sites


def test_samples_have_the_fitted_spectrum_and_depend_on_their_seed_alone():
    model = fitted()
    x = model.sample(3000)
    found = torch.fft.fft2((x.double() - model.mean).squeeze(1), norm="ortho").abs().square().mean(0)
    assert ((found / model.power - 1).abs() < 4.5 * math.sqrt(2 / 3000)).all()
    assert torch.equal(model.sample([7, 3], batch_size=1), x[[7, 3]])


def test_likelihood_counts_the_volume_of_the_transform():
    model = fitted(200)
    scaled = StationaryGaussian(shape=SHAPE, transform=Affine(loc=1.0, scale=2.0))
    x = free_field(200)[0]
    scaled.prepare([Batch(1 + 2 * x)], generator=generator("prepare"))
    torch.testing.assert_close(
        scaled.log_prob(1 + 2 * x[:3]), model.log_prob(x[:3]) - 48 * math.log(2), rtol=0, atol=1e-9
    )


def test_isotropic_power_has_the_symmetries_of_the_square():
    model = StationaryGaussian(isotropic=True, shape=(1, 6, 6), transform=Identity())
    x = torch.randn(50, 1, 6, 6, generator=generator("square"), dtype=torch.float64)
    model.prepare([Batch(x)], generator=generator("prepare"))
    plain = torch.fft.fft2((x - x.mean()).squeeze(1), norm="ortho").abs().square().mean(0)
    orbit = [plain[i, j] for i, j in ((1, 2), (1, 4), (5, 2), (5, 4), (2, 1), (2, 5), (4, 1), (4, 5))]
    for i, j in ((1, 2), (4, 5), (2, 5)):
        torch.testing.assert_close(model.power[i, j], torch.stack(orbit).mean())


def test_refusals():
    with pytest.raises(ConfigError, match=r"found items of shape \[3, 8, 8\]"):
        StationaryGaussian(shape=(3, 8, 8), transform=Identity())
    model = StationaryGaussian(shape=SHAPE, transform=Identity())
    with pytest.raises(ConfigError, match="48 of 48 frequencies have no power"):
        model.prepare([Batch(torch.ones(5, *SHAPE))], generator=generator("prepare"))
