"""The contract of every registered Transform, and the units of likelihood: nats in data units, bits per dimension."""

import math

import numpy as np
import pytest
import torch

from genmodels.distributions import Box
from genmodels.registry import build, names, resolve
from genmodels.rng import BatchNoise, Noise, SeedNoise, generator
from genmodels.transforms import Affine, Compose, Dequantize, Logit, Standardize, Transform
from genmodels.types import Batch
from tests.autoencoders import tiny
from tests.oracles import gaussian, jacobian_log_det

SHAPE = (3, 2, 4)
LEVELS = 17
# items are whole levels 0 … 16, so that every transform below can be tested on the same data
EXAMPLES = {
    "affine": {"loc": 8.5, "scale": 3.0},
    "dequantize": {"levels": LEVELS},
    "logit": {"low": -1.0, "high": 18.0, "alpha": 0.01},
    "log_shift": {"shift": 2.0},
    "compose": {
        "parts": [{"name": "dequantize", "levels": LEVELS}, {"name": "logit", "low": 0, "high": 17}, "standardize"]
    },
}


def make(name: str, shape: tuple[int, ...] = SHAPE) -> Transform:
    given = {"path": tiny(), "high": LEVELS - 1} if name == "latent" else EXAMPLES.get(name, {})
    return build(Transform, resolve(Transform, {"name": name, **given}, "data.transform"), shape=shape)


def items(n: int = 6, dtype: torch.dtype = torch.float64, key: str = "items") -> torch.Tensor:
    return torch.randint(LEVELS, (n, *SHAPE), generator=generator(key)).to(dtype)


def fitted(name: str) -> Transform:
    transform = make(name)
    transform.fit([Batch(items(50, key="fit")), Batch(items(30, key="more"))])
    return transform


@pytest.mark.parametrize("name", names(Transform))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_undoes_forward(name, dtype):
    transform, x = fitted(name), items(dtype=dtype)
    for noise in (None, SeedNoise(6)):
        y, _ = transform(x, noise)
        assert y.shape == (len(x), *transform.out_shape(SHAPE)) and y.dtype == dtype
        assert transform.inverse(y).shape == x.shape and transform.inverse(y).dtype == dtype
        if transform.volume:
            torch.testing.assert_close(transform.inverse(y), x, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", names(Transform))
def test_log_det_is_that_of_the_jacobian(name):
    transform, x = fitted(name), items(3)
    if not transform.volume:
        pytest.skip("no log-determinant: the latent space of an encoder")
    _, log_det = transform(x)
    torch.testing.assert_close(log_det, jacobian_log_det(lambda v: transform(v)[0], x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", names(Transform))
def test_float32_agrees_with_float64_and_items_do_not_see_each_other(name):
    transform, x = fitted(name), items(dtype=torch.float32)
    (y, log_det), (exact, exact_log_det) = transform(x), transform(x.double())
    assert log_det.shape == (6,) and log_det.dtype == exact_log_det.dtype == torch.float64
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, exact_log_det, rtol=1e-5, atol=1e-4)
    rows = [transform(row[None]) for row in x]
    torch.testing.assert_close(torch.cat([row for row, _ in rows]), y)
    torch.testing.assert_close(torch.cat([row for _, row in rows]), log_det)
    y, log_det = transform(x[:0])
    assert y.shape == (0, *transform.out_shape(SHAPE)) and log_det.shape == (0,)
    assert transform.inverse(y).shape == (0, *SHAPE)


@pytest.mark.parametrize("name", names(Transform))
def test_state_is_in_buffers_and_far_values_stay_finite(name):
    transform, other = fitted(name), make(name)
    other.load_state_dict(transform.state_dict())
    x = items()
    assert torch.equal(transform(x)[0], other(x)[0])
    assert list(transform.parameters()) == []
    far = torch.tensor([1e6, -1e6]).reshape(2, *[1 for _ in SHAPE]).expand(2, *transform.out_shape(SHAPE))
    assert transform.inverse(far).isfinite().all()


# ---- Standardize ----


def test_standardize_fits_mean_and_deviation_in_any_batches():
    g = generator("columns")
    # large offsets beside small spreads: a one-pass sum of squares about 0 would lose all digits in the second column
    x = torch.randn(500, 3, generator=g, dtype=torch.float64) * torch.tensor([2.0, 1e-3, 5.0]) + torch.tensor(
        [1.0, 1e4, 0]
    )
    for sizes in ([500], [1, 99, 400], [250, 250]):
        transform = Standardize(shape=(3,))
        transform.fit(Batch(part) for part in x.split(sizes))
        torch.testing.assert_close(transform.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(transform.std, x.std(0, correction=0), rtol=1e-7, atol=0)
    y, log_det = transform(x)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(log_det, -transform.std.log().sum().expand(500))


def test_standardize_leaves_constant_columns_alone():
    x = torch.randn(64, 3, generator=generator("constant"))
    x[:, 1], x[:, 2] = 0.1, -3e7
    transform = Standardize(shape=(3,))
    transform.fit([Batch(x[:10]), Batch(x[10:])])
    y, log_det = transform(x)
    assert transform.std[1:].tolist() == [1.0, 1.0]
    assert y[:, 1:].abs().max() < 1e-6 and log_det.isfinite().all()


def test_standardize_without_data_says_so():
    with pytest.raises(ValueError, match="no training items"):
        Standardize(shape=(3,)).fit([])


def test_compose_fits_each_part_to_what_reaches_it():
    x = items(80)
    transform = Compose((Affine(8.0, 4.0), Standardize(shape=SHAPE)))
    transform.fit([Batch(x[:30]), Batch(x[30:])])
    torch.testing.assert_close(transform.parts[1].mean, ((x - 8) / 4).mean(0))
    torch.testing.assert_close(transform(x)[0].std(0, correction=0), torch.ones(SHAPE).double())


@pytest.mark.parametrize("name", names(Transform))
def test_the_shape_changes_only_without_volume(name):
    transform = make(name)
    assert not transform.volume or transform.out_shape(SHAPE) == SHAPE


def test_compose_builds_each_part_for_the_shape_that_reaches_it():
    node = {"name": "compose", "parts": [{"name": "latent", "path": tiny(), "high": 16.0}, "standardize"]}
    transform, x = build(Transform, node, shape=SHAPE), items(40, torch.float32)
    assert transform.out_shape(SHAPE) == (2, 1, 2) == tuple(transform.parts[1].mean.shape)
    transform.fit([Batch(x)])
    y, _ = transform(x)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(2, 1, 2), rtol=1e-4, atol=0)
    torch.testing.assert_close(transform.inverse(y), transform.parts[0].inverse(transform.parts[0](x)[0]))


def test_compose_with_a_part_without_volume_has_none():
    class Lossy(Affine):
        volume = False

    assert not Compose((Affine(), Lossy())).volume and Compose((Affine(),)).volume


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "affine", "scale": 0.0}, "scale must be > 0"),
        ({"name": "dequantize", "levels": 1}, "at least 2 levels"),
        ({"name": "dequantize", "levels": 4, "bin_width": -1.0}, "bin width > 0"),
        ({"name": "logit", "low": 1.0, "high": 1.0}, "low < high"),
        ({"name": "logit", "low": 0.0, "high": 1.0, "alpha": 0.5}, "alpha < 0.5"),
    ],
)
def test_impossible_arguments_are_refused(node, message):
    with pytest.raises(ValueError, match=message):
        build(Transform, resolve(Transform, node, "data.transform"))


# ---- units ----


class Given(Noise):
    """A source whose uniforms are given."""

    def __init__(self, u: torch.Tensor) -> None:
        super().__init__(len(u), "cpu")
        self.u = u

    def normal(self, *shape, dtype=torch.float32):
        raise AssertionError("only uniform noise is expected")

    def uniform(self, *shape, dtype=torch.float32):
        return self.u.reshape(self.n, *shape).to(dtype)


def bits_per_dim(log_prob: torch.Tensor, dims: int, bin_width: float = 1.0) -> torch.Tensor:
    """-log2 of the mass of a bin of that width, per dimension, from a density in data units."""
    return -log_prob / (dims * math.log(2)) - math.log2(bin_width)


@pytest.mark.parametrize(
    ("levels", "bin_width"), [(2, 1.0), (17, 1.0), (256, 1.0), (256, 1 / 255), (9, 1 / 3), (5, 4.0)]
)
def test_uniform_data_on_any_grid_cost_log2_of_the_number_of_levels(levels, bin_width):
    span = levels * bin_width
    for scale in (1.0, span, span / 2):  # in data units, on [0, 1), on [0, 2): the model's units do not matter
        transform = Compose((Dequantize(levels, bin_width), Affine(0.0, scale)))
        x = torch.randint(levels, (5, 3, 2), generator=generator("grid")).double() * bin_width
        y, log_det = transform(x, SeedNoise(5))
        log_prob = Box(0.0, span / scale, shape=(3, 2)).log_prob(y) + log_det
        expected = torch.full((5,), math.log2(levels), dtype=torch.float64)
        torch.testing.assert_close(bits_per_dim(log_prob, 6, bin_width), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(transform.inverse(y), x, rtol=0, atol=1e-12)


def test_seven_bits_is_the_log_det_of_centred_bytes():
    y, log_det = Affine(128.0, 128.0)(torch.full((1, 3, 32, 32), 255.0))
    assert float(log_det) == pytest.approx(-3 * 32 * 32 * math.log(128), rel=1e-14)
    assert float(bits_per_dim(log_det, 3 * 32 * 32)) == pytest.approx(7.0, rel=1e-14)
    assert float(y.max()) == 127 / 128


def test_the_dequantisation_bound_on_a_gaussian():
    """p = N(1.3, 0.6²) on the level 1: exact mass, uniform bound and its importance-weighted tightening at K = 2."""
    law = gaussian(torch.full((1,), 1.3, dtype=torch.float64), torch.full((1,), 0.36, dtype=torch.float64))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, w = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)
    y, log_det = Dequantize(3)(torch.ones(60, 1, dtype=torch.float64), Given(u))
    bits = bits_per_dim(law.log_prob(y) + log_det, 1)
    mass = 0.5 * (math.erf(0.7 / 0.6 / 2**0.5) - math.erf(-0.3 / 0.6 / 2**0.5))
    assert -math.log2(float(w @ (-bits * math.log(2)).exp())) == pytest.approx(-math.log2(mass), abs=1e-12)
    assert -math.log2(mass) == pytest.approx(0.811498, abs=1e-6)
    analytic = ((1 / 12 + 0.2**2) / (2 * 0.36) + 0.5 * math.log(2 * math.pi * 0.36)) / math.log(2)
    assert float(w @ bits) == pytest.approx(analytic, abs=1e-12) and analytic == pytest.approx(0.835911, abs=1e-6)
    p = (-bits * math.log(2)).exp()
    pairs = -((p[:, None] + p) / 2).log2()
    assert float(w @ pairs @ w) == pytest.approx(0.822887, abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1e-6, [28.373937, 22.033260, 7.325800, 99.494585]),
        (0.05, [11.229193, 11.078703, 7.477791, 11.335486]),
    ],
)
def test_bits_of_a_standard_normal_in_logit_space(alpha, expected):
    transform = Compose((Dequantize(256), Logit(0.0, 256.0, alpha)))
    x = torch.tensor([[0.0], [1.0], [128.0], [255.0]], dtype=torch.float64)
    y, log_det = transform(x, Given(torch.tensor([0.5, 0.25, 0.75, 0.999], dtype=torch.float64)))
    law = gaussian(torch.zeros(1), torch.ones(1))
    bits = bits_per_dim(law.log_prob(y) + log_det, 1)
    torch.testing.assert_close(bits, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_two_parametrisations_of_one_density_have_equal_bits():
    x = items()
    one = torch.ones(24, dtype=torch.float64)
    law, twin = gaussian(0.4 * one, 0.09 * one), gaussian(-0.2 * one, 0.36 * one)  # one law, on [0, 1) and on [-1, 1)
    values = []
    for parameters, model in (((0.0, 17.0), law), ((8.5, 8.5), twin)):
        y, log_det = Compose((Dequantize(LEVELS), Affine(*parameters)))(x, SeedNoise(6))
        values.append(bits_per_dim(model.log_prob(y.flatten(1)) + log_det, 24))
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)


def test_logit_keeps_its_digits_at_both_ends_in_float32():
    x = torch.tensor([[0.0], [1e-3], [16.999], [17.0], [8.5]])
    y, log_det = Logit(0.0, 17.0, 1e-6)(x)
    exact, exact_log_det = Logit(0.0, 17.0, 1e-6)(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, exact_log_det, rtol=0, atol=1e-5)


def test_the_largest_noise_stays_in_its_bin():
    x = torch.arange(256.0)[:, None]
    transform = Dequantize(256)
    for u in (0.0, 0.5, 1 - 2**-24):
        assert torch.equal(transform.inverse(transform(x, Given(torch.full((256,), u)))[0]), x)
    y = transform(x, BatchNoise(256, generator=generator("u")))[0] - x
    assert 0 <= y.min() and y.max() < 1 and abs(float(y.mean()) - 0.5) < 4.5 * 12**-0.5 / 16
