"""Laws on a line by quadrature: normalisers of closed form, draws of the law, errors that are what they say."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from genmodels.distributions import inverse_cdf
from genmodels.registry import ConfigError
from genmodels.rng import SeedNoise, generator
from genmodels.wavelet.line import LineLaw


def even(width: float, n: int) -> torch.Tensor:
    return torch.linspace(-width, width, n, dtype=torch.float64)


def single(x, beta):
    """Of one site of a φ⁴ lattice: φ⁴ - (1 + 2β) φ²."""
    return x**4 - (1 + 2 * beta) * x**2


@pytest.mark.parametrize(
    ("beta", "z", "second", "fourth"),
    [
        (0.5, 5.3651602378, 0.8327454871, 1.0827454871),
        (0.68, 7.4345956111, 0.9828513927, 1.4097646433),
        (0.76, 8.7510727536, 1.0556358859, 1.5801012163),
    ],
)
def test_one_site_of_phi4(beta, z, second, fourth):
    grid = even(4.0, 401)
    law = LineLaw(grid, single(grid, beta))
    assert math.exp(law.log_normalizer) == pytest.approx(z, abs=1e-9)
    assert law.mean(torch.stack((grid**2, grid**4))).tolist() == pytest.approx([second, fourth], abs=1e-9)
    assert law.error < 1e-9


def test_a_normal_law_far_from_zero_energy_on_a_grid_of_any_spacing():
    """log Z = log √(2π σ²) - 700, where e^{700} would overflow in float32 and e^{1000} in float64."""
    for shift in (700.0, -1000.0):
        u = torch.linspace(-1, 1, 4000, dtype=torch.float64)
        grid = 3 + 4 * u + 2 * u**3
        law = LineLaw(grid, (grid - 3) ** 2 / (2 * 0.49) + shift)
        assert law.log_normalizer == pytest.approx(math.log(0.7 * math.sqrt(2 * math.pi)) - shift, abs=3e-6)
        assert abs(law.log_normalizer - math.log(0.7 * math.sqrt(2 * math.pi)) + shift) < law.error
        p = torch.tensor([1e-4, 0.1, 0.5, 0.9, 0.9999], dtype=torch.float64)
        np.testing.assert_allclose(law.quantile(p), stats.norm(3, 0.7).ppf(p), atol=1e-4)


def test_its_distribution_function_is_as_exact_as_stated():
    """At most h² max|p'|/8 within cells, beside the error of cells, for an asymmetric double well."""
    energy = lambda x: 2 * (x**2 - 1) ** 2 + 0.3 * x  # noqa: E731
    grid = even(3.0, 301)
    law = LineLaw(grid, energy(grid))
    mass = quad(lambda x: math.exp(-energy(x)), -3, 3, epsabs=1e-12, limit=200)[0]
    assert law.log_normalizer == pytest.approx(math.log(mass), abs=1e-9)
    x = [-1.2345, -0.5, 0.111, 0.987, 1.3]
    exact = [quad(lambda v: math.exp(-energy(v)), -3, b, epsabs=1e-12, limit=200)[0] / mass for b in x]
    slope = float((law.density.diff() / grid.diff()).abs().max())
    bound = 0.02**2 * slope / 8 + 0.02**2 * slope / 12
    assert np.abs(law.quantile(torch.tensor(exact)).numpy() - x) @ law_at(law, x) < 5 * bound
    np.testing.assert_allclose(law.quantile(torch.tensor(exact)), x, atol=1e-3)


def law_at(law, x):
    return np.interp(x, law.grid, law.density)


def test_the_error_falls_with_the_order_of_the_kink():
    """A jump in the slope of the energy, at a node of every grid: h², so that half the spacing leaves a quarter."""
    exact = math.log(2.0)
    found = [LineLaw(even(24.0, n), even(24.0, n).abs()) for n in (961, 1921)]
    errors = [law.log_normalizer - exact for law in found]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01) and 0 < errors[0] < found[0].error
    assert found[0].error == pytest.approx(3 * errors[0], rel=0.01)


def test_draws_are_of_the_law_and_of_their_seeds():
    grid = even(4.0, 2001)
    law = LineLaw(grid, single(grid, 0.68))
    x = law.sample(SeedNoise(4000, purpose=str(generator("line").initial_seed())), (1,), dtype=torch.float64)[:, 0]
    assert stats.kstest(x.numpy(), lambda v: np.interp(v, grid, np.append(0.0, law.ends))).pvalue > 0.01
    assert float((x**2).mean()) == pytest.approx(0.9828513927, abs=4 * math.sqrt((1.40976 - 0.98285**2) / 4000))
    few = law.sample(SeedNoise([7, 3]), (2,))
    assert few.shape == (2, 2) and few.dtype == torch.float32
    assert torch.equal(few[1], law.sample(SeedNoise([3]), (2,))[0])


def test_draws_are_halfway_between_the_values_that_uniform_draws_take():
    """Of a symmetric law the least and the greatest are each other's mirror, and not at the ends of the grid."""

    class Ends(SeedNoise):
        def uniform(self, *shape, dtype=torch.float32):
            return torch.tensor([0.0, 1 - 2.0**-24], dtype=dtype)

    grid = even(8.0, 1601)
    low, high = LineLaw(grid, grid**2 / 2).sample(Ends(2), dtype=torch.float64).tolist()
    assert low == pytest.approx(-high, abs=1e-6) and low == pytest.approx(stats.norm.ppf(2.0**-25), abs=2e-3)


def test_a_table_of_two_cells_is_inverted():
    edges, ends = (torch.tensor(v, dtype=torch.float64) for v in ([0.0, 1.0, 3.0], [0.25, 1.0]))
    u = torch.tensor([[0.0, 0.125, 0.25], [0.625, 0.8125, 1.0]], dtype=torch.float64)
    assert inverse_cdf(edges, ends, u).tolist() == [[0.0, 0.5, 1.0], [2.0, 2.5, 3.0]]


def test_walls_are_allowed():
    grid = torch.linspace(-1, 2, 3001, dtype=torch.float64)
    inside = (grid > 0) & (grid < 1)
    law = LineLaw(grid, torch.where(inside, 0.0, math.inf))
    assert law.log_normalizer == pytest.approx(0, abs=1.5e-3)
    drawn = law.quantile(torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1])
    np.testing.assert_allclose(drawn, np.linspace(0, 1, 11)[1:-1], atol=1e-3)


@pytest.mark.parametrize(
    ("grid", "energy", "message"),
    [
        (even(2, 400), lambda x: x**2, r"at an end of \[-2, 2\] the energy is 4 nats above .*Widen the grid"),
        (even(9, 400), lambda x: -(x**2), "x0: at an end .*is 0 nats above .*tails that rise"),
        (even(9, 13), lambda x: 4 * x**2, "x0: log Z differs by .* between 13 nodes and half of them. Take more"),
        (even(9, 400), lambda x: x**2 * math.nan, "x0: the least energy on the grid is nan. Regularise"),
        (even(9, 400).flip(0), lambda x: x**2, r"x0: a rising grid .* shapes \[400\] and \[400\]"),
        (even(9, 400), lambda x: (x**2)[1:], r"x0: a rising grid .* shapes \[400\] and \[399\]"),
    ],
)
def test_what_is_no_law_is_refused(grid, energy, message):
    with pytest.raises(ConfigError, match=message):
        LineLaw(grid, energy(grid), where="x0")
