"""The contract of every registered Distribution."""

import math

import pytest
import torch

from genmodels.distributions import Distribution, GaussianMixture
from genmodels.registry import build, names, resolve
from genmodels.rng import BatchNoise, SeedNoise, generator
from tests.oracles import grid

ARGUMENTS = {
    "box": {"low": -1.5, "high": 2.0},
    "gaussian_mixture": {
        "means": [[0.5, -1.0], [-0.7, 0.6]],
        "covariances": [[0.5, 0.2, 0.2, 0.4], [0.3, 0.0, 0.0, 0.2]],
        "weights": [1.0, 3.0],
    },
    "glow_prior": {"top": [1, 1, 1]},
}


def make(name: str, shape: tuple[int, ...] = (2,)) -> Distribution:
    law = build(Distribution, resolve(Distribution, {"name": name, **ARGUMENTS.get(name, {})}, "base"), shape=shape)
    g = generator("parameters")
    for p in law.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return law


@pytest.mark.parametrize("name", names(Distribution))
def test_density_integrates_to_one(name):
    # midpoints on [-8, 8]²: the smooth laws converge spectrally, and 0.02 divides the box's sides exactly
    points, area = grid(-8.0, 8.0, 800)
    assert float(make(name).log_prob(points).detach().exp().sum() * area) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", names(Distribution))
def test_samples_have_the_moments_of_the_density(name):
    points, area = grid(-8.0, 8.0, 800)
    law = make(name)
    p = law.log_prob(points).exp().detach() * area
    x = law.sample(BatchNoise(40_000, generator=generator("moments")), dtype=torch.float64).detach()
    for degree in (1, 2):
        for i, j in ((0, 0), (1, 1), (0, 1)):

            def moment(v, i=i, j=j, degree=degree):
                return v[:, i] if degree == 1 else v[:, i] * v[:, j]

            drawn = moment(x)
            # 4.5 standard errors: one false alarm in 10^5 draws of the seed, which is fixed
            assert abs(drawn.mean() - (p * moment(points)).sum()) < 4.5 * drawn.std() / len(x) ** 0.5


@pytest.mark.parametrize("name", names(Distribution))
def test_a_sample_depends_on_its_own_seed_alone(name):
    law = make(name)
    together = law.sample(SeedNoise([3, 7, 11, 40]))
    for seed, item in zip([3, 7, 11, 40], together, strict=True):
        assert torch.equal(law.sample(SeedNoise([seed]))[0], item)
    assert len(together.unique(dim=0)) == 4


@pytest.mark.parametrize("name", names(Distribution))
def test_dtypes_and_batch_independence(name):
    law = make(name)
    x = law.sample(SeedNoise(6)).detach()
    assert x.dtype == torch.float32 and law.sample(SeedNoise(6), dtype=torch.float64).dtype == torch.float64
    single, double = law.log_prob(x), law.log_prob(x.double())
    assert single.dtype == double.dtype == torch.float64 and single.shape == (6,)
    torch.testing.assert_close(single, double, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat([law.log_prob(row[None]) for row in x]), single, rtol=1e-6, atol=1e-6)
    assert law.log_prob(x[:0]).shape == (0,)


@pytest.mark.parametrize("name", names(Distribution))
def test_any_shape_and_the_error_for_a_wrong_one(name):
    shape = (3, 2, 4)
    if name == "gaussian_mixture":
        law = GaussianMixture.from_tensors(torch.ones(2), torch.zeros(2, 24), torch.ones(2, 24), shape=shape)
    else:
        law = make(name, shape)
    assert law.sample(SeedNoise(5)).shape == (5, *shape) and law.log_prob(torch.zeros(5, *shape)).shape == (5,)
    with pytest.raises(ValueError, match=r"x has shape \[3, 2, 4\], but the law is of \[B, 3, 2, 4\]"):
        law.log_prob(torch.zeros(shape))


@pytest.mark.parametrize("name", names(Distribution))
def test_gradients_reach_every_parameter_and_agree_with_differences(name):
    law = make(name).double()
    x = torch.tensor([[0.3, -0.8], [1.1, 0.4]], dtype=torch.float64, requires_grad=True)
    parameters = list(law.parameters())
    if parameters or name != "box":  # the density of a box is constant
        assert torch.autograd.gradcheck(lambda x, *p: law.log_prob(x), (x, *parameters))
    for key, p in law.named_parameters():
        if name == "glow_prior" and key == "head.weight":
            continue  # it is given zeros
        (gradient,) = torch.autograd.grad(law.sample(SeedNoise(3), dtype=torch.float64).sum(), p)
        assert gradient.abs().min() > 0


@pytest.mark.parametrize("name", names(Distribution))
def test_far_points_are_improbable_not_nan(name):
    values = make(name).log_prob(torch.tensor([[1e6, -1e6], [-1e6, 0.0]]))
    assert not values.isnan().any() and (values < -1e6).all() and not (values == math.inf).any()
