"""log Z by chains against closed forms and quadratures, likelihoods of Gaussian conditionals, and the whole energy."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from genmodels.rng import SeedNoise
from genmodels.transforms import Affine, Identity, Logit
from genmodels.types import Batch, SupportsLogProb
from genmodels.wavelet import scoring
from genmodels.wavelet.bases import BSpline
from genmodels.wavelet.chains import MALA, begin
from genmodels.wavelet.conditional import Conditional
from genmodels.wavelet.cslc import CSLC
from genmodels.wavelet.free_energy import Bridge, Normalizer, _log_mean, log_normalizer
from genmodels.wavelet.potential import Potential
from genmodels.wavelet.terms import Quadratic, Term
from genmodels.wavelet.tree import Tree
from genmodels.wavelet.tuning import Tuning

BETA = 0.68
pytestmark = pytest.mark.filterwarnings("ignore::genmodels.wavelet.score_matching.FitWarning")  # chains are kept short
LOG_Z_2X2 = 5.57312709  # of the φ⁴ model at β = 0.68, by quadrature
OWN = partial(Quadratic, reach=1, own=True)
QUICK = Tuning(starts=4, adapt=24, record=20, least=20)


class Quartic(Term):
    """Σ u² and Σ u⁴, for φ⁴ energies that are exact."""

    def __init__(self, *, level):
        super().__init__(level)
        self.names = ["square", "fourth"]

    def features(self, u):
        return torch.stack([u.square().sum((1, 2)), u.pow(4).sum((1, 2))], 1).double()

    def gradients(self, u):
        return torch.stack([2 * u, 4 * u**3], 1)

    def laplacians(self, u):
        w = self.level.weights().to(u)
        return torch.stack([2 * w.sum().expand(len(u)), 12 * (w * u.square()).sum((1, 2))], 1).double()

    def energy(self, theta, u):
        a, b = theta.to(u)
        return (a * u.square() + b * u.pow(4)).sum((1, 2)).double(), 2 * a * u + 4 * b * u**3

    def hessian(self, theta, u, v):
        a, b = theta.to(u)
        return (2 * a + 12 * b * u.square()) * v

    def laplacian(self, theta, u):
        return self.laplacians(u) @ theta.to(u).double()

    def diagonal(self, theta, u):
        eye = torch.eye(self.level.dim, dtype=torch.float64)
        fields = self.level.synthesize(eye)
        return (fields.square() * (2 * theta[0] + 12 * theta[1] * u.square().mean(0))).sum((1, 2))


def phi4_conditional(level, step_size=0.7, width=0.6, num_steps=40):
    """The φ⁴ energy itself, of the coefficients of a level."""
    c = Conditional(level, (partial(Quadratic, reach=1), Quartic))
    c.theta.copy_(torch.tensor([-BETA * (2 if level.size[0] == 2 else 1)] + [0.0] * (len(c.theta) - 3) + [-1.0, 1.0]))
    c.scale.fill_(width)
    c.step_size.fill_(step_size)
    c.num_steps.fill_(num_steps)
    return c


def gaussian_conditional(wavelet="db4", size=8):
    """κ = 1, m² = 1/2, of the details of the finest octave."""
    c = Conditional(Tree((size, size), wavelet).levels[-1], (OWN,))
    c.theta.copy_(torch.tensor([4.5, -1.0, 0.0]))
    c.unit.fill_(0.56)
    c.theta.mul_(c.unit.square())
    c.set_scale(torch.zeros(1, size, size, dtype=torch.float64))
    c.step_size.fill_(0.8)
    c.num_steps.fill_(30)
    return c


def precision(c):
    """Dense [N, N] of a quadratic energy in units u."""
    n = math.prod(c.level.size)
    eye = torch.eye(n, dtype=torch.float64).reshape(n, *c.level.size)
    return c.energy(eye)[1].reshape(n, n)


def synthesis(level):
    """[dim, N] Ḡ."""
    return level.synthesize(torch.eye(level.dim, dtype=torch.float64)).flatten(1)


def gaussian_normalizer(c, base):
    """Exact log Z for each base: ½ d log 2π - ½ logdet H + ½ bᵀ H⁻¹ b - ½ u₀ᵀ K u₀."""
    k, g, u = precision(c), synthesis(c.level), (base.double() / c.unit).flatten(1)
    h, b = g @ k @ g.T, u @ k @ g.T
    quadratic = (b @ torch.linalg.inv(h) * b).sum(1) - (u @ k * u).sum(1)
    return 0.5 * (len(g) * math.log(2 * math.pi) - torch.linalg.slogdet(h)[1] + quadratic)


def within(found, exact, errors, k=4.5):
    """Whether means agree within k standard errors, themselves from the spread over independent items."""
    difference = found - exact
    spread = difference.std() / math.sqrt(len(difference))
    assert abs(difference.mean()) < k * spread, (difference.mean(), spread)
    # of 1 or few degrees of freedom an item, but their mean square is unbiased
    assert errors.square().mean().sqrt() == pytest.approx(float(difference.square().mean().sqrt()), rel=0.4)


def spectrum(size):
    k = 2 * math.pi * torch.arange(size).double() / size
    return 1 / (0.5 + 4 - 2 * torch.cos(k)[:, None] - 2 * torch.cos(k))


def gaussian_fields(n, size, seed):
    g = torch.Generator().manual_seed(seed)
    white = torch.randn(n, size, size, generator=g, dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(white) * spectrum(size).sqrt()).real.unsqueeze(1)


def covariance(size):
    """[N, N] of the Gaussian field."""
    eye = torch.eye(size * size, dtype=torch.float64).reshape(-1, size, size)
    return torch.fft.ifft2(torch.fft.fft2(eye) * spectrum(size)).real.flatten(1)


def fit(x, terms, free_energy=None, transform=None, **options):
    model = CSLC(
        terms, free_energy=free_energy, tuning=options.pop("tuning", QUICK), periodic=True, shape=tuple(x.shape[1:]),
        transform=Identity() if transform is None else transform, **options,
    )  # fmt: skip
    model.prepare([Batch(part) for part in x.split(500)], generator=torch.Generator().manual_seed(0))
    return model


# ---- log Z of a conditional ----


@pytest.mark.parametrize("method, particles", [("integration", 2), ("annealing", 4)])
def test_log_z_of_a_gaussian_is_half_a_log_determinant(method, particles):
    c = gaussian_conditional()
    base = 0.5 * Tree((8, 8)).given(3, gaussian_fields(40, 8, 1).squeeze(1))
    options = {"method": method, "nodes": 6, "burn": 8, "record": 16, "particles": particles}
    found = log_normalizer(c, MALA(), base.float(), SeedNoise(40), **options)
    within(found.value, gaussian_normalizer(c, base), found.stderr)


def test_log_z_does_not_depend_on_the_scale_of_each_item():
    """Half of it, of which the reference's log-determinant knows: 48 log 2 = 33 nats."""
    c = gaussian_conditional()
    base = 0.5 * Tree((8, 8)).given(3, gaussian_fields(40, 8, 1).squeeze(1))
    c.stiffness.copy_(c.laplacian(base / c.unit)[0] / c.level.dim / 4)
    torch.testing.assert_close(c.scale_given(base), c.scale.expand(40, -1) / 2)
    options = {"nodes": 8, "burn": 16, "record": 16, "particles": 2}
    found = log_normalizer(c, MALA(), base.float(), SeedNoise(40), **options)
    within(found.value, gaussian_normalizer(c, base), found.stderr)


@pytest.mark.parametrize("method", ["integration", "annealing"])
def test_log_z_of_an_item_has_its_own_scale(method):
    """Of φ⁴ given fields of unlike size: it is the same alone and among others."""
    level = Tree((4, 4), "haar").levels[-1]
    c, base = phi4_conditional(level), torch.tensor([0.2, 1.0, 2.5]).reshape(3, 1, 1).expand(3, 4, 4)
    c.stiffness.fill_(4.0)
    assert (c.scale_given(base)[:, 0].diff() < -0.02).all()
    options = {"method": method, "nodes": 4, "burn": 4, "record": 8}
    every = log_normalizer(c, MALA(), base, SeedNoise([5, 6, 7]), **options).value
    for i in range(3):
        own = log_normalizer(c, MALA(), base[i : i + 1], SeedNoise([5 + i]), **options).value
        torch.testing.assert_close(own, every[i : i + 1], rtol=0, atol=1e-4)  # of float32


@pytest.mark.parametrize("method", ["integration", "annealing"])
def test_log_z_of_phi4_on_four_sites(method):
    level = Tree((2, 2), "haar", octaves=0).levels[0]
    c, base = phi4_conditional(level), torch.zeros(32, 2, 2)
    found = log_normalizer(c, MALA(), base, SeedNoise(32), method=method, nodes=5, particles=4)
    within(found.value, torch.tensor(LOG_Z_2X2, dtype=torch.float64), found.stderr)


def test_log_z_of_three_details_given_the_mean():
    level = Tree((2, 2), "haar").levels[1]
    c, means = phi4_conditional(level), torch.tensor([0.0, 1.0, 2.0])
    base = (means / 2).reshape(3, 1, 1).expand(3, 2, 2)
    t = torch.linspace(-4, 4, 49, dtype=torch.float64)
    z = torch.cartesian_prod(t, t, t)
    exact = torch.stack([c.potential(b.double().expand(len(z), 2, 2))(z)[0].neg().logsumexp(0) for b in base])
    exact += 3 * math.log(float(t[1] - t[0]))
    assert (exact.max() - exact.min()) > 1  # the mean matters
    found = log_normalizer(c, MALA(), base.repeat_interleave(16, 0), SeedNoise(48), nodes=5, burn=8, record=20)
    for rows, value in zip(torch.arange(48).split(16), exact, strict=True):
        within(found.value[rows], value, found.stderr[rows])


@pytest.mark.parametrize("method", ["integration", "annealing"])
def test_a_constant_of_the_energy_comes_off_log_z(method):
    c, base = gaussian_conditional(), torch.zeros(2, 8, 8, dtype=torch.float64)
    options = {"method": method, "nodes": 3, "burn": 1, "record": 2}
    found, energy = log_normalizer(c, MALA(), base, SeedNoise(2), **options), c.at(torch.float64)
    c.at = lambda dtype: lambda u: (energy(u)[0] + 7, energy(u)[1])
    more = log_normalizer(c, MALA(), base, SeedNoise(2), **options)
    torch.testing.assert_close(found.value - more.value, torch.full((2,), 7.0, dtype=torch.float64))


def test_weights_are_averaged_not_their_logarithms():
    found = _log_mean(torch.tensor([[1.0, 3.0]], dtype=torch.float64).log())
    assert float(found.value) == pytest.approx(math.log(2))
    assert float(found.stderr) == pytest.approx(0.5)  # √2/√2 of a mean of 2


def test_a_change_of_lambda_needs_no_evaluation():
    c = gaussian_conditional()
    base = torch.zeros(3, 8, 8, dtype=torch.float64)
    bridge = Bridge(c.potential(base), c.scale)
    z = torch.randn(3, c.level.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    old, new = (torch.tensor(v, dtype=torch.float64) for v in ([0.1, 0.5, 0.9], [0.2, 0.3, 1.0]))
    moved, made = bridge.moved(begin(bridge.at(old), z), old, new), begin(bridge.at(new), z)
    torch.testing.assert_close(moved.energy, made.energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(moved.gradient, made.gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.energy[2], bridge.target(z)[0][2], rtol=1e-12, atol=0)
    work = bridge.target(z)[0] - 0.5 * (z / c.scale).square().sum(1)
    torch.testing.assert_close(bridge.work(moved, new), work, rtol=1e-11, atol=0)


@pytest.mark.parametrize("method", ["integration", "annealing"])
def test_an_item_depends_on_its_own_seed_and_base_alone(method):
    c, base = gaussian_conditional(), gaussian_fields(4, 8, 1).squeeze(1)
    options = {"method": method, "nodes": 3, "burn": 2, "record": 4}
    whole = log_normalizer(c, MALA(), base, SeedNoise([3, 4, 5, 6]), **options).value
    one = log_normalizer(c, MALA(), base[2:3], SeedNoise([5]), **options).value
    other = log_normalizer(c, MALA(), base[2:3], SeedNoise([7]), **options).value
    torch.testing.assert_close(whole[2:3], one, rtol=0, atol=1e-8)
    assert abs(one - other) > 1e-3


def test_chains_that_lag_behind_own_up_to_it():
    """A Gaussian much too wide and steps much too short: both ways err by many nats, and their difference says so."""
    c = gaussian_conditional("haar", 4)
    c.scale.mul_(3)
    c.step_size.fill_(0.08)
    c.num_steps.fill_(300)  # those that go down begin in equilibrium
    base = torch.zeros(6, 4, 4)
    found = log_normalizer(c, MALA(), base, SeedNoise(6), nodes=6, burn=0, record=5)
    errors = found.value - gaussian_normalizer(c, base)
    assert found.stderr.mean() > 2
    assert errors.square().mean() < found.stderr.square().mean()
    up = log_normalizer(c, MALA(), base, SeedNoise(6), nodes=6, burn=0, record=5, particles=1)
    assert up.stderr is None
    assert errors.abs().mean() < 0.5 * (up.value - gaussian_normalizer(c, base)).abs().mean()


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="nodes=0"):
        log_normalizer(gaussian_conditional(), MALA(), torch.zeros(1, 8, 8), SeedNoise(1), nodes=0)


# ---- likelihood ----


@pytest.fixture(scope="module")
def gaussian_model():
    x = 3 * gaussian_fields(600, 8, 0) + 1
    return fit(x, (OWN,), (OWN,), Affine(loc=1.0, scale=2.0)), x


def gaussian_log_prob(model, x):
    """Of the model: conditionals of a quadratic energy are normal laws in closed form."""
    fields, total = model.fields(x)
    for k, (c, y) in enumerate(zip(model.conditionals, fields, strict=True)):
        g, matrix = synthesis(c.level), precision(c) / c.unit.square()
        base = model.tree.given(k, y).flatten(1)
        h = g @ matrix @ g.T
        law = MultivariateNormal(-base @ matrix @ g.T @ torch.linalg.inv(h), precision_matrix=(h + h.T) / 2)
        total = total + law.log_prob(c.level.detail(y))
    return total


def test_variances_of_levels_add_up(gaussian_model, monkeypatch):
    model, x = gaussian_model
    levels = len(model.conditionals)

    def told(conditional, kernel, base, noise, **options):
        k = list(model.conditionals).index(conditional)
        return Normalizer(torch.full((len(base),), 10.0**k).double(), torch.full((len(base),), 1.0 + k).double())

    monkeypatch.setattr(scoring, "log_normalizer", told)
    found = model.likelihood(x[:3].float())
    torch.testing.assert_close(found.stderr, torch.full((3,), sum((1 + k) ** 2 for k in range(levels)) ** 0.5).double())
    monkeypatch.setattr(scoring, "log_normalizer", lambda *given, **options: told(*given)._replace(value=0.0))
    parts = model.likelihood(x[:3].float()).value - found.value
    torch.testing.assert_close(parts, torch.full((3,), sum(10.0**k for k in range(levels))).double())


def test_likelihood_is_that_of_gaussian_conditionals(gaussian_model):
    model, x = gaussian_model
    assert isinstance(model, SupportsLogProb)
    found = model.likelihood(x[:32].float(), nodes=6, burn=4, record=10)
    assert found.kind == "stochastic"
    within(found.value, gaussian_log_prob(model, x[:32]), found.stderr)
    again = model.log_prob(x[30:32].float(), seeds=[30, 31], nodes=6, burn=4, record=10)
    torch.testing.assert_close(again, found.value[30:], rtol=0, atol=0.02)


def test_likelihood_refuses_what_it_cannot_score(gaussian_model):
    model, x = gaussian_model
    for options, told in (
        ({"condition": torch.zeros(1)}, "no condition"),
        ({"seeds": [1, 2]}, "2 seeds for 1 items"),
        ({"method": "guessing"}, "guessing"),
        ({"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=told):
            model.likelihood(x[:1], **options)
    fresh = CSLC((OWN,), periodic=True, shape=(1, 8, 8), transform=Identity())
    with pytest.raises(ValueError, match="not fitted"):
        fresh.likelihood(x[:1])
    with pytest.raises(ValueError, match="not fitted"):
        fresh.energy(x[:1])
    fresh.fitted.fill_(1)
    with pytest.raises(ValueError, match="free_energy"):
        fresh.energy_gradient(x[:1])


# ---- the energy of the whole field ----


@pytest.mark.parametrize("subdivisions", [1, (2, 1)])
def test_regression_finds_the_free_energies_of_a_gaussian(subdivisions):
    """With the true conditional energies E[∇Φ̃ · ∇Ē] = E[ΔΦ̃], so that θ̃ solves tr(PK_a C K_b P) θ̃_b = tr(P K_a P)."""
    terms = (OWN,)
    model = fit(gaussian_fields(1500, 8, 0), terms, terms, subdivisions=subdivisions, octaves=2)
    size, top = 8, torch.eye(64, dtype=torch.float64).reshape(64, 8, 8)
    true = torch.linalg.inv(covariance(size))
    for k in range(len(model.conditionals) - 1, 0, -1):
        lower = model.tree.lower(k, top).flatten(1)  # [64, N_{k-1}]: what becomes of each pixel
        c, f = model.conditionals[k], model.free_energies[k - 1]
        # the true energy of the whole field given to the finest level, whose regression is then exact
        if k == len(model.conditionals) - 1:
            model.conditionals[k].theta.copy_(torch.tensor([4.5, -1.0, 0.0]) * c.unit.square())
            assert torch.allclose(precision(c) / c.unit.square(), true, atol=1e-9)
            model._fit_free_energies([Batch(gaussian_fields(1500, 8, 0))])
            p = f.level.detail(torch.eye(math.prod(f.level.size), dtype=torch.float64).unflatten(1, f.level.size))
            basis = f.gradients(torch.eye(len(p), dtype=torch.float64).unflatten(1, f.level.size))  # [N, M, dim]
            known = lower.T @ covariance(size) @ lower / f.unit.square()
            h = torch.einsum("nap,nm,mbp->ab", basis, known, basis)
            g = torch.einsum("nap,np->a", basis, p)
            exact = torch.linalg.solve(h, g)
            assert ((f.theta - exact).abs() < 4 * f.errors + 1e-6).all()
            assert (f.errors < 0.05 * exact[0]).all()
        top = model.tree.lower(k, top)


@pytest.mark.parametrize("subdivisions", [1, (2, 2, 1)])
def test_gradients_of_the_whole_energy(subdivisions):
    """Random parameters: central differences, through a transform that is not affine."""
    squash = Logit(-5.0, 5.0)
    terms = (OWN, partial(Potential, basis=BSpline(6)))
    model = CSLC(terms, "db2", None, subdivisions, free_energy=terms, periodic=True, shape=(1, 8, 8), transform=squash)
    source = torch.Generator().manual_seed(0)
    for c in (*model.conditionals, *model.free_energies):
        c.theta.copy_(torch.randn(len(c.theta), generator=source))
        c.unit.fill_(1.3)
    model.fitted.fill_(1)
    x = torch.randn(2, 1, 8, 8, generator=source, dtype=torch.float64)
    way = torch.randn(2, 1, 8, 8, generator=source, dtype=torch.float64)
    slope = (model.energy_gradient(x) * way).sum((1, 2, 3))
    numeric = (model.energy(x + 1e-5 * way) - model.energy(x - 1e-5 * way)) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-6)


def test_lifting_is_the_adjoint_of_lowering():
    tree, source = Tree((8, 12), "db2", 2, (2, 1)), torch.Generator().manual_seed(0)
    for k in range(1, len(tree.levels)):
        y = torch.randn(tree.levels[k].size, generator=source, dtype=torch.float64)
        z = torch.randn(tree.levels[k - 1].size, generator=source, dtype=torch.float64)
        torch.testing.assert_close((tree.lower(k, y) * z).sum(), (y * tree.lift(k, z)).sum())
        known = tree.known(k)
        assert known.dim + tree.levels[k].dim == sum(level.dim for level in tree.levels[: k + 1])


def test_whole_energy_of_a_gaussian_is_its_log_density(gaussian_model):
    model, x = gaussian_model
    y = (x[:200] - 1) / 3
    true = 0.5 * (y.flatten(1) @ torch.linalg.inv(covariance(8)) * y.flatten(1)).sum(1)
    assert (model.energy(x[:200]) - true).std() < 0.12 * true.std()
    slope = (y.flatten(1) @ torch.linalg.inv(covariance(8)) / 3).reshape(x[:200].shape)
    assert (model.energy_gradient(x[:200]) - slope).norm() < 0.08 * slope.norm()
    for name, exact in (("shift 0,0", 4.5 / 9), ("shift 1,0", -1 / 9), ("shift 1,1", 0.0)):
        value, error = model.couplings()[name]
        assert abs(value - exact) < 4 * error < 0.04
    mine, given, net = (model.couplings(-2, part) for part in ("conditional", "free_energy", "net"))
    for name, (value, error) in net.items():
        assert value == pytest.approx(mine[name][0] - given[name][0], abs=1e-12)
        assert error == pytest.approx(mine[name][1] + given[name][1])


def phi4_fields(n, size, sweeps, seed):
    """A checkerboard Metropolis chain of each field from an ordered start, as many of one sign as of the other."""
    g = np.random.default_rng(seed)
    sign = np.float32(0.7) * (-1) ** np.arange(n).reshape(n, 1, 1)
    phi = (sign + 0.5 * g.standard_normal((n, size, size))).astype(np.float32)
    parity = np.add.outer(np.arange(size), np.arange(size)) % 2
    for step in range(2 * sweeps):
        around = sum(np.roll(phi, d, a) for d in (1, -1) for a in (1, 2))
        new = phi + 3 * g.random(phi.shape, np.float32) - 1.5
        before, after = phi * phi, new * new
        rise = (after - before) * (after + before - 1) - BETA * around * (new - phi)
        phi = np.where((g.random(phi.shape, np.float32) < np.exp(-rise.clip(0))) & (parity == step % 2), new, phi)
    return torch.from_numpy(phi).double().unsqueeze(1)


def test_couplings_and_potential_of_phi4_are_read_back():
    x = phi4_fields(1200, 8, 40, 0)
    terms = (partial(Quadratic, reach=1), partial(Potential, basis=BSpline(8), even=True))
    model = fit(x, terms, terms, wavelet="haar")
    value, error = model.couplings()["shift 1,0"]
    assert abs(value + BETA) < 4 * error < 0.08
    t = torch.tensor([0.0, 0.4, 0.7, 1.0, 1.4], dtype=torch.float64)
    v = (model.potential_at(t) + model.potential_at(-t)) / 2  # the mean of the fields is not quite 0
    torch.testing.assert_close(v - v[0], t**4 - t**2, rtol=0, atol=0.08)
    square = x.square()
    bonds = (x * (x.roll(1, 2) + x.roll(1, 3))).sum((1, 2, 3))
    true = (square * (square - 1)).sum((1, 2, 3)) - BETA * bonds
    assert (model.energy(x[:400]) - true[:400]).std() < 0.1 * true.std()


def test_readings_are_in_units_of_the_data():
    """y = 2 (x - 1) - 0.3 at the finest level, and twice that of `coarsen`'s values on the next grid."""
    terms = (OWN, partial(Potential, basis=BSpline(6)))
    model = CSLC(terms, periodic=True, shape=(1, 8, 8), transform=Affine(loc=1.0, scale=0.5))
    model.mean.fill_(0.3)
    t = torch.linspace(0.8, 1.4, 5, dtype=torch.float64)
    for level, factor in ((-1, 1), (-2, 2)):
        c = model.conditionals[level]
        c.unit.fill_(1.7)
        c.theta.copy_(torch.arange(len(c.theta)))
        c.errors.copy_(c.theta / 10)
        u = factor * (2 * (t - 1) - 0.3) / 1.7
        torch.testing.assert_close(model.potential_at(t, level), c.terms[1].shape(c.parts()[1][1], u)[0])
        value, error = model.couplings(level)["shift 1,0"]
        assert value == pytest.approx((factor * 2 / 1.7) ** 2)
        assert error == pytest.approx(value / 10)


def test_readings_refuse_what_is_not_there(gaussian_model):
    model, _ = gaussian_model
    with pytest.raises(ValueError, match="no term 'potential'"):
        model.potential_at(torch.zeros(1))
    with pytest.raises(ValueError, match="from -4 to 3"):
        model.couplings(4)
    with pytest.raises(
        ValueError, match=r"finest level, 8x8, has no free energy.*Take a level from -4 to -2, or the p"
    ):
        model.couplings(-1, "free_energy")
    assert model.couplings(-1, "net") == model.couplings()
    with pytest.raises(ValueError, match="no quadratic term"):
        CSLC((partial(Potential, basis=BSpline(6)),), periodic=True, shape=(1, 8, 8), transform=Identity()).couplings()
    with pytest.raises(ValueError, match="affine"):
        CSLC((OWN,), periodic=True, shape=(1, 8, 8), transform=Logit(-9.0, 9.0)).couplings()


# ---- long runs ----


@pytest.mark.slow
@pytest.mark.parametrize("method", ["integration", "annealing"])
def test_log_z_of_phi4_on_64_sites(method):
    """1.2248 ± 0.0003 a site by integration over β, at the transition."""
    level = Tree((8, 8), octaves=0).levels[0]
    c = phi4_conditional(level, 0.6, 0.35, 1000)
    options = {"nodes": 16, "burn": 100, "record": 200, "particles": 4}
    found = log_normalizer(c, MALA(), torch.zeros(48, 8, 8), SeedNoise(48), method=method, **options)
    if method == "annealing":  # its Z is unbiased, log Z of few particles is not: all items are of one law
        pooled = _log_mean(found.value[None])
        assert abs(float(pooled.value) / 64 - 1.2248) < 4 * float(pooled.stderr) / 64 < 0.025
        assert found.value.mean() < pooled.value - 0.2
        return
    error = 4 * max(0.0003, float(found.value.std()) / math.sqrt(48) / 64)
    assert abs(found.value.mean() / 64 - 1.2248) < error < 0.015
    assert 0.5 < found.stderr.square().mean().sqrt() / found.value.std() < 1.5
