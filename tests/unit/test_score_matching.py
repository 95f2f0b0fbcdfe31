"""Closed-form score matching: laws with known parameters, standard errors, and data that tell nothing."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from genmodels.registry import ConfigError
from genmodels.rng import BatchNoise, generator
from genmodels.transforms import Identity
from genmodels.types import Batch, sum_items
from genmodels.wavelet.bands import Bands
from genmodels.wavelet.conditional import Conditional
from genmodels.wavelet.cslc import CSLC
from genmodels.wavelet.potential import Potential
from genmodels.wavelet.score_matching import FitWarning, Gram, Sandwich
from genmodels.wavelet.terms import Quadratic, Term
from genmodels.wavelet.tree import Tree

MASS, TRUTH = 0.5, torch.tensor([4.5, -1.0, 0.0], dtype=torch.float64)  # m² + 4κ, -κ, and no diagonal neighbours


def spectrum(size):
    """P(k) = 1/(m² + 4 - 2 cos k₁ - 2 cos k₂) of the Gaussian free field."""
    k = 2 * torch.pi * torch.arange(size, dtype=torch.float64) / size
    return 1 / (MASS + 4 - 2 * k.cos()[:, None] - 2 * k.cos())


def free_fields(count, size, *keys):
    """[count, L, L] float64, exact: white noise filtered by √P."""
    white = BatchNoise(count, generator=generator("free field", *keys)).normal(size, size, dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(white) * spectrum(size).sqrt()).real


def population(size):
    """[L², L, L] fields whose second moments are exactly those of the law: √(L² covariance), row by row."""
    eye = size * torch.eye(size**2, dtype=torch.float64).unflatten(1, (size, size))
    return torch.fft.ifft2(torch.fft.fft2(eye) * spectrum(size).sqrt()).real


def conditional(level, *terms, u=None):
    """In data units, unless fields are given whose range potentials take."""
    found = Conditional(level, terms)
    for term in found.terms if u is not None else ():
        term.fit(u)
    return found


def fitted(found, u, regularization=0.0, errors=True):
    gram = Gram(found)
    gram.update(u)
    gram.solve(regularization)
    if errors:
        sandwich = Sandwich(gram)
        sandwich.update(u)
        sandwich.finish()
    return gram


NEAR = partial(Quadratic, reach=1, own=True)


# ---- laws that are known -------------------------------------------------------------------------------------------


def test_the_population_of_free_fields_gives_the_matrix_and_the_parameters_of_the_law():
    assert [float(spectrum(16)[a]) for a in ((0, 0), (1, 0), (8, 8))] == pytest.approx(
        [2, 1.5331757735, 0.1176470588], abs=1e-10
    )
    found = conditional(Tree((16, 16), octaves=0).levels[0], NEAR)
    gram = fitted(found, population(16), errors=False)
    matrix, right = gram.h / gram.n, gram.g / gram.n
    assert matrix.diagonal().tolist() == pytest.approx([80.957, 487.381, 422.958], abs=1e-3)
    assert right.tolist() == pytest.approx([256, 0, 0], abs=1e-9)
    torch.testing.assert_close(found.theta, TRUTH, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("wavelet", "subdivisions"), [("haar", 1), ("db4", 1), ("db4", 2), ("shannon", 3)])
def test_rings_of_the_finest_octave_know_the_law_too(wavelet, subdivisions):
    """The conditional law of details has the same energy, whatever the coarse field's own law is."""
    for level in Tree((16, 16), wavelet, 1, subdivisions).levels[1:]:
        if level.ring < 2**level.packets.depth - 1:
            continue  # without the finest ring the field is another
        found = conditional(level, NEAR)
        fitted(found, population(16), errors=False)
        torch.testing.assert_close(found.theta, TRUTH, rtol=0, atol=1e-10)


def test_5000_free_fields_give_the_law_within_the_errors_reported():
    """From the detail coefficients of db4 alone; errors .007, .005, .004 are expected."""
    found = conditional(Tree((16, 16), "db4", 1).levels[-1], NEAR)
    fitted(found, free_fields(5000, 16))
    assert ((found.theta - TRUTH).abs() < 4 * found.errors).all()
    ratio = found.errors / torch.tensor([0.007, 0.005, 0.004], dtype=torch.float64)
    assert (ratio > 0.7).all() and (ratio < 1.3).all()


def test_standard_errors_are_those_of_repeated_draws():
    """60 fits of 300 fields: z² is 1 on average, to 4 errors of the mean of 60."""
    level, z = Tree((8, 8), "haar", 1).levels[-1], []
    for k in range(60):
        found = conditional(level, NEAR)
        fitted(found, free_fields(300, 8, k))
        z.append((found.theta - TRUTH) / found.errors)
    z = torch.stack(z)
    assert (z.mean(0).abs() < 4 / math.sqrt(60)).all()
    assert ((z.square().mean(0) - 1).abs() < 4 * math.sqrt(2 / 60)).all()


class Quartic(Term):
    """Σ u⁴."""

    def __init__(self, *, level):
        super().__init__(level)
        self.names, self.weights = ["quartic"], level.weights()

    def features(self, u):
        return sum_items(u**4)[:, None]

    def gradients(self, u):
        return 4 * u[:, None] ** 3

    def laplacians(self, u):
        return sum_items(12 * self.weights * u.square())[:, None]

    energy = hessian = laplacian = diagonal = None


@pytest.fixture(scope="module")
def phi4():
    """[10000, 16, 16] fields in equilibrium at β = 0.68, from chains of 20 each."""
    from genmodels.data.phi4_lattice import chains

    return torch.cat(list(chains(16, 0.68, 10_000, 20, 100, 20, "score matching")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subdivisions", "errors"),
    [(1, (0.012, 0.004, 0.002, 0.003)), (2, (0.028, 0.011, 0.006, 0.003)), (3, (0.06, 0.034, 0.016, 0.003))],
)
def test_the_couplings_of_a_phi4_lattice_are_found_from_its_finest_ring(phi4, subdivisions, errors):
    """E = Σ φ⁴ - φ² - β Σ_<ij> φ φ: (-2, -β, 0, 1) of ½Σφ², bonds, diagonals and Σφ⁴; narrower rings tell less."""
    found = conditional(Tree((16, 16), "db4", 1, subdivisions).levels[-1], NEAR, Quartic)
    fitted(found, phi4)
    truth = torch.tensor([-2.0, -0.68, 0.0, 1.0], dtype=torch.float64)
    assert ((found.theta - truth).abs() < 4 * found.errors).all()
    ratio = found.errors / torch.tensor(errors, dtype=torch.float64)
    assert (ratio > 0.6).all() and (ratio < 1.5).all()


# ---- the solution --------------------------------------------------------------------------------------------------

TERMS = (partial(Quadratic, reach=2), Potential, partial(Bands, reach=0, below=1))


def test_the_loss_is_the_quadratic_form_and_least_at_the_solution():
    """ℓ(θ̂ + δ) - ℓ(θ̂) = ½ δᵀ H δ without regularisation."""
    u = free_fields(200, 8, "loss")
    found = conditional(Tree((8, 8), "db4", 1).levels[-1], *TERMS, u=u)
    gram = fitted(found, u)
    best, least = found.theta.clone(), float(found.loss(u).mean())
    matrix, right = gram.h / gram.n, gram.g / gram.n
    assert least == pytest.approx(float(0.5 * best @ matrix @ best - right @ best), rel=1e-9)
    for k in range(len(best)):
        delta = torch.zeros_like(best)
        delta[k] = 0.3
        found.theta.copy_(best + delta)
        rise = float(found.loss(u).mean()) - least
        assert rise == pytest.approx(float(0.5 * delta @ matrix @ delta), rel=1e-6) and rise > 0


@pytest.mark.parametrize("regularization", [0.0, 1e-3])
def test_the_condition_number_and_the_solution_are_those_of_dense_algebra(regularization):
    u = free_fields(100, 8, "condition")
    found = conditional(Tree((8, 8), "db4", 1).levels[-1], *TERMS, u=u)
    gram = fitted(found, u, regularization)
    h, g = (gram.h / gram.n).numpy(), (gram.g / gram.n).numpy()
    root = np.diag(h) ** -0.5
    normal = root[:, None] * h * root + regularization * np.eye(len(h))
    assert float(found.condition) == pytest.approx(np.linalg.cond(normal), rel=1e-6)
    np.testing.assert_allclose(found.theta.numpy(), root * np.linalg.solve(normal, root * g), rtol=1e-7)
    rows = found.gradients(u).numpy()
    residual = np.einsum("bmd,bnd,n->bm", rows, rows, found.theta.numpy()) - found.laplacians(u).numpy()
    bread = root[:, None] * np.linalg.inv(normal) * root
    covariance = bread @ (residual.T @ residual) @ bread / len(u) ** 2
    np.testing.assert_allclose(found.errors.numpy(), np.sqrt(np.diag(covariance)), rtol=1e-6)


def test_sums_of_parts_add_up():
    """Batches, and the pieces in which a batch is taken, change nothing."""
    u = free_fields(50, 8, "parts")
    found = conditional(Tree((8, 8), "db4", 1).levels[-1], *TERMS, u=u)
    whole, parts = Gram(found), Gram(found)
    whole.update(u)
    found.rows = lambda: 7
    for part in u.split(20):
        parts.update(part)
    assert whole.n == parts.n == 50
    torch.testing.assert_close(parts.h, whole.h, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(parts.g, whole.g, rtol=1e-12, atol=1e-9)


# ---- data and settings that tell nothing ---------------------------------------------------------------------------


def test_features_that_cannot_be_told_apart_are_named():
    """Bands at all shifts are what pixels at even shifts are."""
    u = free_fields(300, 8, "singular")
    found = conditional(
        Tree((8, 8), "haar", 1).levels[-1], partial(Quadratic, reach=2, own=True), partial(Bands, own=True)
    )
    with pytest.raises(ConfigError, match=r"8x8: the Gram matrix is singular: 300 fields.*'shift.*or a regularization"):
        fitted(found, u)
    with pytest.warns(FitWarning, match="singular.*the regularization 1e-06 decides"):
        fitted(found, u, 1e-6)
    assert found.theta.isfinite().all() and found.condition < 1e8


def test_features_that_never_vary_are_named():
    u = free_fields(20, 8, "still").abs()  # no field in the lower half of the basis
    found = conditional(Tree((8, 8), "haar", 1).levels[-1], Potential)
    found.terms[0].interval.copy_(torch.tensor([-10.0, 10.0]))
    with pytest.raises(ConfigError, match=r"give no information on 'potential 1/15', 'potential 2/15'.* more: their"):
        fitted(found, u)


def model(shape=(1, 8, 8), **given):
    terms = (partial(Quadratic, reach=1), partial(Potential, even=True))
    return CSLC(terms, given.pop("wavelet", "haar"), periodic=True, shape=shape, transform=Identity(), **given)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((40, 1, 8, 8), 2.5), "the training fields do not vary: all pixels are 2.5"),
        (
            torch.randn(40, 1, 1, 1, generator=generator("flat")).expand(-1, 1, 8, 8),
            "8x8: the training fields are empty from 1 to 4.24 cycles per side",
        ),
        (torch.where(torch.arange(40).reshape(-1, 1, 1, 1) == 3, math.nan, 0.0).expand(-1, 1, 8, 8), "1 of 40 .* NaN"),
    ],
    ids=["constant", "flat", "nan"],
)
def test_fields_that_are_no_samples_are_refused(x, message):
    with pytest.raises(ConfigError, match=message):
        model().prepare([Batch(x)], generator=generator("refused"))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"6 x 12 can be halved 1 times, not 2.*crop or pool"):
        model((1, 6, 12), octaves=2)
    with pytest.raises(ConfigError, match=r"boundary 'symmetric' is not offered.*'periodic'.*seam"):
        model(boundary="symmetric")
    with pytest.raises(ConfigError, match=r"one channel, found \[3, 8, 8\]"):
        model((3, 8, 8))
    with pytest.raises(ConfigError, match="regularization >= 0 is needed, found -1"):
        model(regularization=-1.0)
    with pytest.raises(ValueError, match=r"not fitted yet. Call prepare"):
        model().sample(2)
