"""The evidence bound: tight for exact scores, below for others, in data units, and for discrete data."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from genmodels.diffusion import elbo
from genmodels.diffusion.schedules import Schedule, VariancePreserving
from genmodels.distributions import GaussianMixture
from genmodels.networks.network import Network
from genmodels.registry import build, names
from genmodels.rng import SeedNoise
from genmodels.transforms import Affine, Compose, Dequantize, Logit, Standardize
from genmodels.types import expand_like
from tests.contracts.test_denoiser import LINE, exact, randn
from tests.oracles import MIXTURE, SCHEDULES
from tests.unit.test_diffusion import TIGHT, Oracle, hermite, make, oracle, wide


def bound(denoiser, x: torch.Tensor, nodes: int = 400) -> tuple[torch.Tensor, tuple[float, float]]:
    """The bound at items [B, 1] with its expectations by quadrature, and the ends of the path.

    Errors of a Gaussian's denoiser are affine in ε: three Gauss-Hermite nodes are exact. Over the log-SNR the integrand
    is smooth.
    """
    z, w = hermite(3)
    ends = elbo.span(denoiser)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    u, du = torch.tensor(points / 2 + 0.5), torch.tensor(weights / 2)
    total = []
    for item in x:
        eps = z.repeat(nodes)[:, None]
        y = item.expand(len(eps), 1)
        losses = elbo.diffusion_loss(denoiser, u.repeat_interleave(3), y, eps, None, ends)
        loss = (losses.reshape(nodes, 3) @ w) @ du
        clean, width = elbo.decode(denoiser, y[:3], z[:, None], None, ends[0])
        decoded = elbo.log_normal(y[:3] - clean, width)[:, 0] @ w
        total.append(decoded - loss - elbo.prior_divergence(denoiser, item[None], ends[1])[0])
    return torch.stack(total), ends


def test_tight_for_a_gaussian_but_for_the_prior():
    """N(1.5, .5²) under vp: log p(2) = log p(1) = -.72579135, and the prior costs KL differences of 8e-5 and 2e-5."""
    x = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    found, _ = bound(exact(LINE, VariancePreserving(), "eps"), x)
    expected = torch.tensor([-0.72587233, -0.72580755], dtype=torch.float64)  # for the prior N(0, 1), 4e-9 from ours
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-8)


@pytest.mark.parametrize("name", names(Schedule))
def test_tight_on_every_path(name):
    """log p(x) less KL(q(x_T | x) ‖ N(0, σ²)) - KL(q(x_T | x) ‖ q(x_T)); the decoder costs (r²/V)²/4, r = σ/α at t_0.

    That is 4e-8 for ve, which begins at r = .01, and less for the others.
    """
    denoiser, x = (
        exact(LINE, build(Schedule, SCHEDULES.get(name, name)), "edm"),
        torch.tensor([[2.0], [0.7], [1.5]], dtype=torch.float64),
    )
    found, ends = bound(denoiser, x)
    alpha, sigma = (c.item() for c in denoiser.schedule.scales(torch.tensor(ends[1], dtype=torch.float64)))
    given = torch.distributions.Normal(alpha * x[:, 0], sigma)
    whole = torch.distributions.Normal(alpha * 1.5, math.sqrt(alpha**2 / 4 + sigma**2))
    kl = torch.distributions.kl_divergence
    mismatch = kl(given, torch.distributions.Normal(0.0, sigma)) - kl(given, whole)
    expected = torch.distributions.Normal(1.5, 0.5).log_prob(x[:, 0]) - mismatch
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=2e-7)
    assert mismatch.min() < 1e-2


@pytest.mark.parametrize(("prediction", "schedule"), [("velocity", "linear"), ("eps", "vp"), ("edm", "edm")])
def test_estimates_are_unbiased_with_the_stated_error(prediction, schedule):
    """Mixture data with the exact score: log p(x) to within the standard error, which is of the right size."""
    model, x = oracle(MIXTURE, prediction, schedule), MIXTURE.sample(SeedNoise(48), dtype=torch.float64)
    found = model.likelihood(x, method="elbo", probes=24, draws=12)
    assert found.kind == "bound" and found.value.dtype == torch.float64
    last = torch.tensor(elbo.span(model.denoiser)[1], dtype=torch.float64)
    alpha, sigma = model.schedule.scales(last)
    # what is left of the data at t_1: E_q(x_T|x)[log q(x_T) - log N(x_T; 0, σ²)] to first order is tiny
    z = (found.value - MIXTURE.log_prob(x)) / found.stderr
    assert (alpha / sigma).square() * x.square().sum(1).max() < 1e-2
    # the mean of 48 t-variables with 11 degrees of freedom: standard deviation 1.1/√48; that of their squares .25
    assert abs(z.mean()) < 4 * 1.11 / 48**0.5
    assert 0.5 < z.square().mean() < 2.4
    assert model.likelihood(x[:2], method="elbo").stderr is None


def test_the_prior_is_charged_for_what_it_neglects():
    """A path that ends at α² = .58: log p(2) less KL(q(x_T | x) ‖ N(0, σ²)) - KL(q(x_T | x) ‖ q(x_T))."""
    model = oracle(LINE, "velocity", {"name": "vp", "beta_max": 1.0})
    alpha, sigma = (c.item() for c in model.schedule.scales(torch.tensor(1.0, dtype=torch.float64)))
    x = torch.full((32, 1), 2.0, dtype=torch.float64)
    kl, given = torch.distributions.kl_divergence, torch.distributions.Normal(2 * alpha, sigma)
    whole = torch.distributions.Normal(1.5 * alpha, math.sqrt(alpha**2 / 4 + sigma**2))
    mismatch = kl(given, torch.distributions.Normal(0.0, sigma)) - kl(given, whole)
    found = model.log_prob(x, method="elbo", probes=24, draws=4)
    assert mismatch > 2 and abs(found.mean() + 0.72579135 + mismatch) < 4.5 * found.std() / 32**0.5 < 1


class Shifted(Network):
    """Another network's ε̂ with a constant added."""

    def __init__(self, network: Network, shift: float) -> None:
        super().__init__()
        self.network, self.shift = network, shift

    def forward(self, t, x, condition=None):
        return self.network(t, x, condition) + self.shift


def test_a_wrong_score_costs_what_the_theory_says():
    """ε̂ off by c in each of D numbers: on average over the data the bound falls by c²/2 · D (1 + λ_0 - λ_1)."""
    law, shift = MIXTURE, 0.3
    model = oracle(law, "eps", "vp")
    x = law.sample(SeedNoise(400), dtype=torch.float64)
    options = {"method": "elbo", "probes": 8, "seeds": range(400)}
    right = model.log_prob(x, **options)
    model.denoiser.network = wide(Shifted(model.denoiser.network, shift))
    wrong = model.log_prob(x, **options)
    ends = model.schedule.log_snr(torch.tensor(elbo.span(model.denoiser), dtype=torch.float64))
    expected = 0.5 * shift**2 * 2 * (1 + ends[0] - ends[1])
    gap, stderr = (right - wrong).mean(), (right - wrong).std() / 20
    assert abs(gap - expected) < 4 * stderr and stderr < 0.2 * expected
    # and it lies below the log-density, by more than chance
    below = law.log_prob(x) - wrong
    assert below.mean() > 4 * below.std() / 20


def test_the_bound_is_below_the_density_of_a_mixture():
    """Averages over the data with a network that believes in another mixture, under the ODE's exact solution too."""
    other = GaussianMixture(((-0.3,), (0.5,)), ((0.1,), (0.1,)), (0.5, 0.5), shape=(1,))
    truth = GaussianMixture(((-1.0,), (1.0,)), ((0.09,), (0.25,)), (0.3, 0.7), shape=(1,))
    model = oracle(other)
    x = truth.sample(SeedNoise(400), dtype=torch.float64)
    found = model.likelihood(x, method="elbo", probes=16).value
    torch.testing.assert_close(model.log_prob(x[:4], controller=TIGHT), other.log_prob(x[:4]), rtol=0, atol=1e-6)
    gap = truth.log_prob(x) - found
    divergence = truth.log_prob(x) - other.log_prob(x)
    # with the exact score of the other law the bound is that law's log-density
    assert abs((gap - divergence).mean()) < 4 * (gap - divergence).std() / 20
    assert gap.mean() > 4 * gap.std() / 20


# ---- data units and discrete data ------------------------------------------------------------------------------------


def test_data_units_and_dequantisation_are_those_of_other_likelihoods():
    model, x = oracle(MIXTURE), randn(5, 2)
    plain = model.log_prob(x, method="elbo", probes=3)
    model.transform = Affine(1.0, 2.0)
    torch.testing.assert_close(model.log_prob(1 + 2 * x, method="elbo", probes=3), plain - 2 * math.log(2))
    # levels are scored at x + u, u of the stream for it, with the same draws of the path
    model.transform, model.bin_width = Compose((Dequantize(9, bin_width=0.5), Affine(2.0, 1.0))), 0.5
    levels = torch.tensor([[0.0, 4.0], [1.5, 2.0], [2.5, 0.5]], dtype=torch.float64)
    found = model.log_prob(levels, method="elbo", probes=3, seeds=[4, 9, 2])
    u = SeedNoise([4, 9, 2], purpose="dequantise").uniform(2, dtype=torch.float64)
    model.transform, model.bin_width = Affine(2.0, 1.0), None
    moved = model.log_prob(levels + 0.5 * u, method="elbo", probes=3, seeds=[4, 9, 2])
    torch.testing.assert_close(found, moved)


class Points(Network):
    """E[ε - x | x_t] on the linear path for items on three points."""

    where, weights = torch.tensor([-1.0, 0.0, 1.0]).double(), torch.tensor([0.2, 0.5, 0.3]).double()

    def forward(self, t, x, condition=None):
        t = expand_like(t.double(), x)
        logits = self.weights.log() - (x - (1 - t) * self.where).square() / (2 * t**2)
        clean = (logits.softmax(-1) * self.where).sum(-1, keepdim=True)
        return (x - (1 - t) * clean) / t - clean


def test_the_discretized_decoder_gives_the_mass_of_levels():
    """Levels 0, 2, 4 learnt as they are: the bound is log P(x) - log(bin_width), but for 5e-7 of the prior."""
    model = make((1,), transform=Affine(2.0, 2.0), bin_width=2.0, moved=0.0)
    model.denoiser.network = wide(Points())
    x = torch.tensor([[0.0], [2.0], [4.0]], dtype=torch.float64)
    found = model.likelihood(x, method="elbo", decoder="discretized", probes=40, draws=16)
    gap = found.value + math.log(2) - Points.weights.log()
    assert (gap.abs() < 4.5 * found.stderr).all() and found.stderr.max() < 0.4
    # the integral of the losses by quadrature: all of -log P(x), because the decoder is sure of the level
    (z, w), ends = hermite(80), elbo.span(model.denoiser)
    nodes, weights = np.polynomial.legendre.leggauss(300)
    u = torch.tensor(nodes / 2 + 0.5).repeat_interleave(80)
    for level, mass in zip(Points.where, Points.weights, strict=True):
        y = level.expand(len(u), 1)
        losses = elbo.diffusion_loss(model.denoiser, u, y, z.repeat(300)[:, None], None, ends)
        total = (losses.reshape(300, 80) @ w) @ torch.tensor(weights / 2)
        assert abs(total.item() + mass.log().item()) < 2e-3


def test_cells_of_a_partition_have_the_whole_mass():
    """Whatever transform follows the levels: affine, standardised or logistic, and whatever the decoder."""
    x = torch.arange(5, dtype=torch.float64)[:, None]
    standardize = Standardize(shape=(1,))
    standardize.mean.fill_(1.3), standardize.std.fill_(0.7)
    for rest in (Affine(2.5, 2.5), standardize, Logit(0.0, 5.0, 0.05)):
        model = make((1,), transform=Compose((Dequantize(5), rest)), bin_width=1.0)
        low, high = elbo.cell(model, x)
        torch.testing.assert_close(low[1:], high[:-1], rtol=1e-12, atol=1e-12)
        for mean, width in ((0.1, 1e-3), (-3.0, 0.5), (0.4, 20.0)):
            mass = elbo.log_mass((low - mean) / width, (high - mean) / width).exp().sum()
            assert abs(mass.item() - 1) < 1e-10
    model = make((1,), transform=Affine(0.0, 2.0), bin_width=1.0)
    low, high = elbo.cell(model, x)
    torch.testing.assert_close(low, (x - 0.5) / 2)
    torch.testing.assert_close(high, (x + 0.5) / 2)
    with pytest.raises(ValueError, match="decoder discretized needs data with a bin_width"):
        make((1,)).likelihood(x, method="elbo", decoder="discretized")


def test_masses_keep_their_digits_in_the_tails():
    for low, high in ((-0.3, 0.4), (8.0, 8.1), (-30.2, -30.0), (12.0, 40.0)):
        a = min(abs(low), abs(high)) if low * high > 0 else 0.0
        rest = quad(lambda z, a=a: math.exp(-(z**2 - a**2) / 2), low, min(high, 15.0), epsabs=0, epsrel=1e-11)[0]
        expected = math.log(rest) - a**2 / 2 - 0.5 * math.log(2 * math.pi)
        pair = [torch.tensor(end, dtype=torch.float64) for end in (low, high)]
        assert abs(elbo.log_mass(*pair).item() - expected) < 1e-9 * max(1, abs(expected))
        assert elbo.log_mass(-pair[1], -pair[0]) == elbo.log_mass(*pair)


# ---- use -------------------------------------------------------------------------------------------------------------


def test_bounds_depend_on_their_seed_alone():
    transform = Compose((Dequantize(17), Affine(8.5, 8.5)))
    model = make((1, 2, 2), transform=transform, num_classes=3, bin_width=1.0, moved=0.1)
    x, seeds = torch.randint(0, 17, (5, 1, 2, 2), generator=torch.Generator().manual_seed(1)).double(), [5, 9, 2, 7, 1]
    labels = torch.tensor([0, 1, 2, 0, 1])
    options = {"method": "elbo", "probes": 2, "draws": 2}
    whole = model.likelihood(x, condition=labels, seeds=seeds, **options)
    parts = model.likelihood(x, condition=labels, seeds=seeds, batch_size=2, **options)
    torch.testing.assert_close(parts.value, whole.value)
    torch.testing.assert_close(parts.stderr, whole.stderr)
    one = model.log_prob(x[3:4], condition=labels[3:4], seeds=[7], **options)
    torch.testing.assert_close(one, whole.value[3:4])
    assert (model.log_prob(x, condition=(labels + 1) % 3, seeds=seeds, **options) - whole.value).abs().min() > 1e-6
    half = model.float().log_prob(x.float(), condition=labels, seeds=seeds, **options)
    torch.testing.assert_close(half, whole.value, rtol=1e-4, atol=1e-3)


def test_gradients_flow_through_the_bound():
    model, x = make((2,), moved=0.1), randn(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.log_prob(x, method="elbo", probes=2), (x,))
    model.log_prob(x, method="elbo").sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    discrete = make((1,), transform=Compose((Dequantize(3), Affine(1.5, 1.5))), bin_width=1.0)
    discrete.log_prob(
        torch.tensor([[0.0], [1.0], [2.0]]).double(), method="elbo", decoder="discretized"
    ).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discrete.parameters())


def test_likelihood_of_the_ode_with_the_exact_end():
    """Under vp log p(2) by the ODE is -.72579285 if what is left of the data at t = 1 is not neglected."""
    model, x = oracle(LINE, "eps", "vp"), torch.tensor([[2.0]], dtype=torch.float64)
    z, found = model.encode(x, controller=TIGHT), model.log_prob(x, controller=TIGHT)
    alpha, sigma = model.schedule.scales(torch.tensor(model.denoiser.t_max, dtype=torch.float64))
    used = torch.distributions.Normal(0.0, model.prior_scale()).log_prob(z).sum()
    whole = torch.distributions.Normal(alpha * 1.5, (alpha**2 / 4 + sigma**2).sqrt()).log_prob(z).sum()
    assert abs((found - used + whole).item() + 0.72579285) < 1e-6
    assert isinstance(model.denoiser.network, Oracle)


def test_words_that_mean_nothing_are_refused():
    """From a configuration they are found before; in Python another way of scoring or sampling would be taken."""
    for model, ask in (
        (make((2,)), lambda m: m.likelihood(randn(2, 2), method="flow")),
        (make((2,)), lambda m: m.likelihood(randn(2, 2), decoder="discretized")),
    ):
        with pytest.raises(ValueError, match=r"method is one of ode, elbo|decoder discretized is of the method elbo"):
            ask(model)
