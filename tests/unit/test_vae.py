"""Variational autoencoders against laws that are known in closed form, or by quadrature."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from genmodels.flows.bijection import Bijection
from genmodels.flows.vae import VAE
from genmodels.model import Model
from genmodels.networks.network import Network
from genmodels.registry import build, resolve
from genmodels.rng import generator
from genmodels.transforms import Affine, Compose, Dequantize, Identity
from genmodels.types import Batch, SupportsEncode

MLP = {"name": "mlp", "hidden": [16]}
COUPLING = {"name": "coupling", "map": {"name": "rational_quadratic", "bins": 4}, "network": MLP}
FLOW = [{"name": "repeat", "count": 2, "layers": [{"name": "permutation"}, COUPLING]}]


class Same(Network):
    """x."""

    def __init__(self, *, in_shape, out_shape, **rest):
        super().__init__()
        self.in_shape = in_shape

    def forward(self, t, x, condition=None):
        return x


class Linear(Same):
    """W x + b."""

    def __init__(self, *, in_shape, out_shape, **rest):
        super().__init__(in_shape=in_shape, out_shape=out_shape)
        self.linear = nn.Linear(*in_shape, *out_shape)

    def forward(self, t, x, condition=None):
        return self.linear(x)


class Matrix(Bijection):
    """z = A x with a buffer A."""

    def __init__(self, *, shape, **rest):
        super().__init__()
        self.shape = shape
        self.register_buffer("a", torch.eye(*shape))

    def forward(self, x, condition=None):
        return x @ self.a.T, torch.linalg.slogdet(self.a)[1].double().expand(len(x))

    def inverse(self, z, condition=None):
        return torch.linalg.solve(self.a, z.T).T, -torch.linalg.slogdet(self.a)[1].double().expand(len(z))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def facts(shape, **changes):
    given = {"shape": shape, "num_classes": None, "condition_shape": None, "transform": Identity(), "levels": None}
    return {**given, "bin_width": None, **changes}


def vae(shape, *, noise=0.3, latent=2, prior=(), posterior=(), sizes=None, **more):
    """A model of the registry in float64, its parameters moved off their start."""
    torch.manual_seed(5)
    node = {"encoder": MLP, "decoder": MLP, "latent": latent, "context": 6, "prior": prior, "posterior": posterior}
    model = build(Model, resolve(Model, {"name": "vae", **node, **more}, "test"), **facts(shape, **(sizes or {})))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.double().eval()


def linear_gaussian(rotated):
    """A model p(z) = N(0, S), p(x|z) = N(W z + b, s² I) of y = (x - 1)/2, with its exact posterior, and p(x)."""
    layers = (Matrix,) if rotated else ()
    model = VAE(Same, Linear, 2, 4, layers, layers, **facts((4,), transform=Affine(1.0, 2.0))).double()
    w, b, s = normal(4, 2, seed=1), normal(4, seed=2), 0.7
    f = torch.eye(2).double()
    if not rotated:  # the posterior is diagonal where the columns of W are orthogonal
        w = torch.linalg.qr(w)[0] * torch.tensor([2.0, 0.5], dtype=torch.float64)
    else:
        f = normal(2, 2, seed=3)
        model.prior.layers.bijections[0].a = f
    s_inverse = f.T @ f
    covariance = torch.linalg.inv(s_inverse + w.T @ w / s**2)
    gain = covariance @ w.T / s**2
    root = torch.linalg.cholesky(covariance) if rotated else torch.eye(2).double()
    std = torch.ones(2).double() if rotated else covariance.diagonal().sqrt()
    if rotated:
        model.posterior.layers.bijections[0].a = root
    gain = torch.linalg.solve(root, gain)
    with torch.no_grad():
        model.decoder.linear.weight.copy_(w)
        model.decoder.linear.bias.copy_(b)
        model.log_scale.fill_(math.log(s))
        model.posterior.head.weight.copy_(torch.cat((gain, torch.zeros_like(gain))))
        model.posterior.head.bias.copy_(torch.cat((-gain @ b, std.log())))
    of_y = w @ torch.linalg.inv(s_inverse) @ w.T + s**2 * torch.eye(4).double()
    return model, torch.distributions.MultivariateNormal(1 + 2 * b, 4 * of_y)


@pytest.mark.parametrize("rotated", [False, True], ids=["diagonal", "linear layers"])
@pytest.mark.parametrize("draws", [1, 3, 40])
def test_with_the_exact_posterior_every_bound_is_the_likelihood(rotated, draws):
    """log p(x, z) - log q(z|x) is then log p(x) for every z: there is no noise, and one draw is as good as many."""
    model, law = linear_gaussian(rotated)
    x = 3 * normal(6, 4)
    found = model.likelihood(x, draws=draws)
    assert found.kind == "bound"
    torch.testing.assert_close(found.value, law.log_prob(x), rtol=0, atol=1e-10)
    if draws > 1:
        assert found.stderr.max() < 1e-10


def test_samples_have_the_moments_of_the_linear_gaussian_law():
    model, law = linear_gaussian(True)
    x = model.sample(4000)
    error = (law.covariance_matrix.diagonal() / 4000).sqrt()
    assert ((x.mean(0) - law.mean).abs() < 4.5 * error).all()  # 4 numbers: 4.5 standard errors happen once in 4e4
    spread = (law.covariance_matrix.diagonal().outer(law.covariance_matrix.diagonal()) * 2 / 4000).sqrt()
    assert ((x.T.cov() - law.covariance_matrix).abs() < 4.5 * spread).all()


def test_the_divergence_of_gaussians_is_that_of_the_closed_form():
    model, x = vae((5,), latent=3), normal(2, 5, seed=4)
    c = model.encoder(None, x)
    mean, log_std = model.posterior.head(c).chunk(2, 1)
    exact = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(1)
    for k in range(2):
        terms = model._terms(x[k : k + 1].expand(40_000, 5), None, generator_noise(40_000))[1]
        assert abs(terms.mean() - exact[k]) < 4 * terms.std() / 200


def generator_noise(n):
    from genmodels.rng import BatchNoise

    return BatchNoise(n, generator=generator("vae test"))


def curved():
    """A model of three bits with one latent number, a decoder that bends, and a posterior that does not fit it."""
    model = vae((3,), noise=0.1, latent=1, sizes=TWO)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(11)))
    return model


def by_quadrature(model, x):
    """[B] log ∫ N(z; 0, 1) p(x|z) dz for a latent of one number, by the midpoint rule on [-9, 9]."""
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    log_p = torch.stack([model.observation.log_prob(row.expand(len(z), -1), model._raw(z, None)).sum(1) for row in x])
    return (log_p - 0.5 * z[:, 0] ** 2 - 0.5 * math.log(2 * math.pi)).logsumexp(1) + math.log(18 / 4000)


BITS = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
TWO = {"levels": 2, "bin_width": 1.0}


def test_the_importance_weighted_bound_rises_to_the_likelihood_found_by_quadrature():
    model = curved()
    exact = by_quadrature(model, BITS)
    assert abs(exact.logsumexp(0)) < 1e-9  # the 8 strings have the mass 1
    x = BITS.repeat(300, 1)  # 300 independent bounds of each string
    with torch.no_grad():
        means = [model.likelihood(x, draws=k).value.reshape(300, 8) for k in (1, 4, 32)]
        many = model.likelihood(BITS, draws=4000)
    gaps = [(exact - m.mean(0)) for m in means]
    assert (gaps[0] > gaps[1]).all() and (gaps[1] > gaps[2]).all() and (gaps[2] > -0.01).all()
    assert gaps[0].min() > 0.02  # the bound of one draw is loose here
    assert ((many.value - exact).abs() < 4 * many.stderr).all() and many.stderr.max() < 0.1


def test_samples_of_bits_have_the_mass_found_by_quadrature():
    model, n = curved(), 4000
    x = model.sample(n)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    counts = (x.long() @ torch.tensor([4, 2, 1])).bincount(minlength=8)
    expected = n * by_quadrature(model, BITS).exp()
    assert expected.min() > 5
    # chi-square with 7 degrees of freedom exceeds its 1 - 1e-4 quantile once in 10 000 seeds
    assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.ppf(1 - 1e-4, 7)
    means = model.sample(n, mean=True)
    assert 0 < means.min() < means.max() < 1
    # a draw differs from its mean by at most 1/2 in standard deviation
    assert ((x - means).mean(0).abs() < 4.5 * 0.5 / math.sqrt(n)).all()


def test_dequantised_data_get_a_bound_on_their_mass():
    """One number of three levels: E[1/K Σ w_k] is the mass of the cell under N(b, w² + s²)."""
    transform = Compose((Dequantize(3), Affine(1.5, 1.5)))
    model = VAE(Same, Linear, 1, 1, **facts((1,), transform=transform, levels=3, bin_width=1.0)).double()
    w, b, s = 0.6, 0.2, 0.4
    with torch.no_grad():
        model.decoder.linear.weight.fill_(w)
        model.decoder.linear.bias.fill_(b)
        model.log_scale.fill_(math.log(s))
        model.posterior.head.weight.copy_(torch.tensor([[0.8], [0.0]]))
        model.posterior.head.bias.copy_(torch.tensor([0.0, -0.3]))
        x = torch.arange(3, dtype=torch.float64)[:, None]
        found = model.likelihood(x, draws=4000)
        one = model.likelihood(x.repeat(500, 1)).value.reshape(500, 3).mean(0)
    law = stats.norm(1.5 + 1.5 * b, 1.5 * math.hypot(w, s))
    exact = torch.tensor(law.cdf([1, 2, 3]) - law.cdf([0, 1, 2])).log()
    assert ((found.value - exact).abs() < 4 * found.stderr).all() and found.stderr.max() < 0.06
    assert (one < exact).all()


def test_the_width_of_the_cells_of_two_levels_enters_as_a_density():
    one = vae((3,), sizes=TWO)
    wide = vae((3,), sizes={"levels": 2, "bin_width": 4.0, "transform": Affine(0.0, 4.0)})
    torch.testing.assert_close(wide.log_prob(4 * BITS), one.log_prob(BITS) - 3 * math.log(4), rtol=0, atol=1e-12)
    assert set(wide.sample(50).unique().tolist()) == {0.0, 4.0}


# ---- flows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), FLOW], ids=["gaussian", "flow"])
def test_the_posterior_has_the_mass_one_and_scores_its_own_samples(layers):
    posterior = vae((5,), posterior=layers, noise=0.1).posterior
    c = 0.3 * normal(1, 6, seed=7)
    n, low, high = 500, -8, 8
    ticks = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    points = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        mass = posterior.log_prob(points, c.expand(n * n, 6)).exp().sum() * ((high - low) / n) ** 2
        z, log_q = posterior.sample(normal(64, 2, seed=8), normal(64, 6, seed=9))
        again = posterior.log_prob(z, normal(64, 6, seed=9))
    assert abs(mass - 1) < 2e-3  # what the midpoint rule leaves of splines with 4 bins
    torch.testing.assert_close(again, log_q, rtol=0, atol=1e-9)


def test_the_flow_samples_forward_in_the_posterior_and_scores_forward_in_the_prior():
    """So that autoregressive layers take one pass for each in training."""
    model, calls = vae((5,), prior=FLOW, posterior=FLOW), []
    for law in (model.prior, model.posterior):
        law.layers.inverse = lambda *a: calls.append("inverse")
    model.loss(Batch(normal(4, 5)), generator=generator("x")).value.sum().backward()
    assert calls == []


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 0.5), (0.05, 0.75), (0.1, 1.0), (0.5, 1.0), (1.0, 1.0)])
def test_the_weight_of_the_divergence_rises_over_the_first_tenth(progress, weight):
    model, batch = vae((5,), noise=0.1, prior=FLOW), Batch(normal(8, 5))
    model.progress = progress
    value, logs = model.loss(batch, generator=generator("x"))
    assert model.kl_weight == pytest.approx(weight, abs=1e-12)
    expected = (weight * logs["kl"] - logs["reconstruction"]) / 5
    torch.testing.assert_close(value.mean(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logs["elbo"], logs["reconstruction"] - logs["kl"], rtol=0, atol=1e-12)
    assert vae((5,), warm_up=0.0).kl_weight == 1.0


@pytest.mark.parametrize("sizes", [{}, TWO], ids=["normal", "bernoulli"])
def test_gradients_reach_every_parameter(sizes):
    more = {"num_classes": 3}
    model = vae((5,), prior=FLOW, posterior=FLOW, conditional=True, sizes={**sizes, **more})
    x = (normal(32, 5) > 0).double()
    model.loss(Batch(x, condition=torch.arange(32) % 4), generator=generator("x")).value.mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_the_condition_reaches_encoder_prior_and_decoder():
    model = vae((5,), prior=FLOW, conditional=True, sizes={"num_classes": 3})
    x, one, two = normal(4, 5), torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    z = normal(4, 2)
    assert (model.encoder(None, x, one) - model.encoder(None, x, two)).abs().min() > 1e-6
    assert (model.prior.log_prob(z, one) - model.prior.log_prob(z, two)).abs().min() > 1e-6
    assert (model._raw(z, one) - model._raw(z, two))[0].abs().min() > 1e-6
    mixed = torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(model.log_prob(x, condition=mixed)[1::2], model.log_prob(x, condition=two)[1::2])


def test_draws_are_those_of_the_seeds_however_many_are_weighed_at_once():
    sizes = {"transform": Dequantize(4), "levels": 4, "bin_width": 1.0, "num_classes": 3}
    model = vae((3, 4), posterior=FLOW, conditional=True, sizes=sizes)
    x, c, seeds = (4 * torch.rand(5, 3, 4)).floor().double(), torch.tensor([0, 2, 1, 1, 0]), [3, 1, 4, 15, 9]
    whole = model.likelihood(x, condition=c, seeds=seeds, draws=7).value
    parts = model.likelihood(x, condition=c, seeds=seeds, draws=7, batch_size=1).value
    alone = model.likelihood(x[3:4], condition=c[3:4], seeds=[15], draws=7).value
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone, whole[3:4], rtol=0, atol=1e-10)
    z = model.posterior_sample(x, condition=c, seeds=seeds)
    assert z.shape == (5, 2)
    torch.testing.assert_close(model.posterior_sample(x[3:4], condition=c[3:4], seeds=[15]), z[3:4])


def test_a_reconstruction_is_the_mean_given_a_draw_of_the_posterior():
    model, _ = linear_gaussian(False)
    x = 3 * normal(6, 4)
    z = model.posterior_sample(x)
    expected = 1 + 2 * (z @ model.decoder.linear.weight.T + model.decoder.linear.bias)
    torch.testing.assert_close(model.reconstruct(x), expected.detach(), rtol=0, atol=1e-12)
    assert not isinstance(model, SupportsEncode)  # nothing of it inverts the decoder


def test_act_norm_in_a_prior_starts_from_the_latents_of_the_first_batch():
    model = vae((5,), prior=["act_norm"], noise=0.0)
    batch = Batch(normal(64, 5))
    model.prepare([batch], generator=generator("x"))
    layer = model.prior.layers.bijections[0]
    assert layer.initialized and layer.log_scale.abs().max() > 1e-6


def test_errors_name_the_way_out():
    for change in ({"latent": 0}, {"context": 0}, {"warm_up": 1.5}):
        with pytest.raises(ValueError, match="latent >= 1, context >= 1 and 0 <= warm_up <= 1"):
            vae((3,), **change)
    with pytest.raises(ValueError, match="Set conditional: false"):
        vae((3,), conditional=True)
    model = vae((3,), sizes=TWO)
    with pytest.raises(ValueError, match=r"0 and 1, found values from 0 to 0\.5"):
        model.likelihood(BITS / 2)
    with pytest.raises(ValueError, match="one seed per item"):
        model.likelihood(BITS, seeds=3)
    with pytest.raises(ValueError, match="draws=0"):
        model.likelihood(BITS, draws=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.sample(2, batch_size=0)
    with pytest.raises(ValueError, match="unconditional model"):
        model.sample(2, condition=torch.zeros(2).long())
    with pytest.raises(ValueError, match="there are no training items"):
        model.prepare([], generator=generator("x"))
