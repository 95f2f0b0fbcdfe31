"""NADE and MADE as models: masses that add up, laws against direct evaluation, samples, and training on any order."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import distributions as D

from genmodels.flows.observations import Bernoulli, GaussianMixture, LogisticMixture, Observation, uniforms
from genmodels.model import Model
from genmodels.registry import build, names, resolve
from genmodels.rng import BatchNoise, generator
from genmodels.transforms import Affine, Compose, Dequantize, Identity
from genmodels.types import Batch

NETWORK = {"name": "made", "hidden": 32, "blocks": 1}
BINARY = {  # every kind of model of bits
    "nade": {"name": "nade"},
    "nade random": {"name": "nade", "order": "random"},
    "nade any": {"name": "nade", "order": "any"},
    "nade relu": {"name": "nade", "activation": "relu", "rescale": True},
    "made": {"name": "made", "network": {**NETWORK, "order": "random"}},
    "made any": {"name": "made", "network": NETWORK, "order": "any"},
}
ANY = [name for name in BINARY if name.endswith("any")]


def facts(shape, **changes):
    given = {"shape": shape, "num_classes": None, "condition_shape": None, "transform": Identity(), "levels": None}
    return {**given, "bin_width": None, **changes}


def make(arguments, shape, noise=0.5, **sizes):
    """A model in float64 with its parameters moved off their start."""
    torch.manual_seed(3)
    arguments = {"hidden": 12, **arguments} if arguments["name"] == "nade" else arguments
    model = build(Model, resolve(Model, arguments, "test"), **facts(shape, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.double().eval()


def bits(name, d, **sizes):
    return make(BINARY[name], (d,), noise=1.0, levels=2, bin_width=1.0, **sizes)


def strings(d):
    """[2^d, d] every string of bits, in the order of the numbers that they are."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * d)


# ---- masses and densities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BINARY)
def test_the_masses_of_all_strings_add_up_to_one(name):
    model, x = bits(name, 8), strings(8)
    with torch.no_grad():
        found = model.likelihood(x)
    assert found.kind == "pmf"
    assert abs(found.value.exp().sum() - 1) < 1e-12
    assert found.value.std() > 0.5  # and they are not all alike


@pytest.mark.parametrize("name", ANY)
def test_a_mixture_of_orders_is_the_mean_of_their_laws_and_a_law(name):
    model, x = bits(name, 8), strings(8)
    with torch.no_grad():
        each = [model._log_prob(x, None, model.some_order(k)) for k in range(5)]
        found = model.log_prob(x, orders=5)
    assert abs(found.exp().sum() - 1) < 1e-12
    torch.testing.assert_close(found, torch.stack(each).exp().mean(0).log(), rtol=0, atol=1e-10)
    assert (each[0] - each[1]).abs().max() > 0.1  # orders do not agree before training
    torch.testing.assert_close(model.log_prob(x[:3]).detach(), each[0][:3], rtol=0, atol=1e-12)


REAL = {
    "nade": {"name": "nade", "activation": "relu"},
    "nade any": {"name": "nade", "order": "any"},
    "made": {"name": "made", "network": NETWORK},
    "made any": {"name": "made", "network": NETWORK, "order": "any"},
}


LAWS = [(name, "gaussian_mixture", d) for name in REAL for d in (1, 2)] + [("nade", "logistic_mixture", 2)]


@pytest.mark.parametrize(("name", "law", "d"), LAWS)
def test_densities_integrate_to_one(name, law, d):
    observation = {"name": law, "components": 3}
    model = make({**REAL[name], "observation": observation}, (d,), noise=0.03, transform=Affine(0.5, 2.0))
    n, half = 300, 45.0  # logistic tails fall like e^{-x/s}
    ticks = -half + 2 * half * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    points = torch.cartesian_prod(*[ticks] * d).reshape(-1, d)
    with torch.no_grad():
        found = [model.likelihood(part, orders=2 if model.any_order else 1) for part in points.split(30_000)]
    assert found[0].kind == "exact"
    # a midpoint rule at 0.3 of densities no narrower than 0.5, cut where less than 1e-4 is left
    assert abs(sum(part.value.exp().sum() for part in found) * (2 * half / n) ** d - 1) < 2e-3


def test_dequantised_levels_get_a_bound_on_their_mass():
    transform = Compose((Dequantize(4), Affine(2.0, 2.0)))
    model = make({"name": "nade"}, (2,), transform=transform, levels=4, bin_width=1.0)
    x = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
    with torch.no_grad():
        found = model.likelihood(x, draws=200)
        u = (torch.cartesian_prod(torch.arange(64), torch.arange(64)).double() + 0.5) / 64
        exact = torch.stack([model._log_prob((row + u - 2) / 2, None, None).exp().mean().log() for row in x])
    assert found.kind == "bound"
    assert (found.value < exact - 2 * math.log(2) + 0.05).all()  # 0.05: what chance leaves of 200 draws
    assert (exact - 2 * math.log(2)).exp().sum() < 1


# ---- laws against direct evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nade", "nade random", "nade any", "nade relu"])
def test_nade_is_each_law_evaluated_by_itself(name):
    model, x = bits(name, 6), strings(6)[::5]
    act = torch.relu if "relu" in name else torch.sigmoid
    order = (model.some_order(0) if model.any_order else model.order).tolist()
    total = 0.0
    for i, place in enumerate(order):
        before = order[:i]
        a = model.bias + x[:, before] @ model.weight[before]
        a = a if model.known is None else a + model.known[before].sum(0)
        a = a if model.factor is None else a * model.factor[place]
        logit = model.output_bias[place] + act(a) @ model.output[place].T
        total = total + D.Bernoulli(logits=logit[:, 0]).log_prob(x[:, place])
    torch.testing.assert_close(model.log_prob(x), total, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", BINARY)
def test_the_law_of_a_number_depends_on_those_before_it_alone(name):
    model = bits(name, 5)
    order = model.some_order(3)
    first = order if model.any_order else model.order if "nade" in name else model.network.order
    x = torch.rand(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    jacobian = torch.autograd.functional.jacobian(lambda v: model.raw(v, None, order)[0, 0], x)[:, 0]
    before = torch.zeros(5, 5, dtype=torch.bool)
    for i, place in enumerate(first.tolist()):
        before[place, first[:i]] = True
    assert torch.equal(jacobian != 0, before)


def test_orders_of_their_own_are_those_of_each_item_alone():
    model, x = bits("nade any", 5), strings(5)[::3]
    orders = torch.rand(len(x), 5, generator=torch.Generator().manual_seed(1)).argsort(1)
    alone = [model.raw(x[i : i + 1], None, orders[i]) for i in range(len(x))]
    torch.testing.assert_close(model.raw(x, None, orders), torch.cat(alone, 1), rtol=0, atol=1e-12)


def test_the_weights_of_made_belong_to_the_numbers_in_every_order():
    """It is then the network that has this order itself, with the same weights."""
    model, x = bits("made any", 6), strings(6)[::5]
    for k in range(3):
        order = model.some_order(k)
        other = make({"name": "made", "network": {**NETWORK, "order": order.tolist()}}, (6,), levels=2, bin_width=1.0)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.raw(x, None, order), other.raw(x, None, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 4])
def test_mixtures_are_those_of_torch_and_scipy(k):
    g = torch.Generator().manual_seed(k)
    x = 3 * torch.randn(50, dtype=torch.float64, generator=g)
    law = GaussianMixture(k)
    raw = torch.randn(law.parameters, 50, dtype=torch.float64, generator=g)
    log_w = raw[:k].T if k > 1 else torch.zeros(50, 1).double()
    start = torch.linspace(-1.5, 1.5, k).double() if k > 1 else 0.0
    means, scales = raw[-2 * k : -k].T + start, raw[-k:].T.exp()
    weights = D.Categorical(logits=log_w)
    expected = D.MixtureSameFamily(weights, D.Normal(means, scales))
    torch.testing.assert_close(law.log_prob(x, raw), expected.log_prob(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(law.mean(raw), expected.mean, rtol=0, atol=1e-12)
    density = (weights.probs.numpy() * stats.logistic.pdf(x[:, None].numpy(), means.numpy(), scales.numpy())).sum(1)
    torch.testing.assert_close(LogisticMixture(k).log_prob(x, raw).exp(), torch.tensor(density), rtol=1e-10, atol=0)
    logit = raw[:1]
    torch.testing.assert_close(
        Bernoulli().log_prob((x > 0).double(), logit),
        D.Bernoulli(logits=logit[0]).log_prob((x > 0).double()),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("law", [GaussianMixture(3), LogisticMixture(3), LogisticMixture(1)])
def test_draws_of_a_mixture_follow_its_distribution_function(law):
    n = 4000
    raw = torch.tensor([0.3, -0.5, 1.0, -2.0, 0.4, 1.0, -0.7, 0.2, -0.1], dtype=torch.float64)[-law.parameters :, None]
    u = uniforms(BatchNoise(n, generator=generator("draws")))
    x = law.sample(raw.expand(-1, n), u)
    log_w, means, log_s = (part[:, 0].numpy() for part in law._parts(raw))
    family = stats.norm if isinstance(law, GaussianMixture) else stats.logistic
    cdf = lambda v: sum(  # noqa: E731
        math.exp(w) * family.cdf(v, m, math.exp(s)) for w, m, s in zip(log_w, means, log_s, strict=True)
    )
    assert stats.kstest(x.numpy(), cdf).pvalue > 1e-4  # one seed in 10 000 fails


@pytest.mark.parametrize("law", [GaussianMixture(2), LogisticMixture(2)])
@pytest.mark.parametrize("extreme", [0.0, 1 - 2.0**-24])
def test_the_least_and_the_largest_uniform_number_give_finite_draws(law, extreme):
    class Ends(BatchNoise):
        def uniform(self, *shape, dtype=torch.float32):
            return torch.full((self.n, *shape), extreme, dtype=dtype)

    u = uniforms(Ends(3), 2)
    assert u.shape == (2, 3, 2) and 0 < u.min() and u.max() < 1
    assert law.sample(torch.zeros(law.parameters, 3, 2), u).isfinite().all()


def test_a_draw_above_the_rounded_sum_of_the_weights_is_of_the_last_component():
    law = GaussianMixture(6)
    weights = torch.zeros(6).log_softmax(0).exp().cumsum(0)
    u = torch.tensor([1 - 2.0**-25, 0.5], dtype=torch.float64)[:, None]
    assert weights[-1] < u[0]
    assert law.sample(torch.zeros(law.parameters, 1), u).item() == pytest.approx(1.5, abs=1e-6)  # the last start


def test_every_observation_has_extreme_values_that_stay_finite():
    for name in names(Observation):
        law = build(Observation, resolve(Observation, {"name": name}, "test"))
        raw = torch.zeros(law.parameters, 4, requires_grad=True)
        x = torch.tensor([0.0, 1.0, 0.0, 1.0]) if law.binary else torch.tensor([-1e4, 1e4, 0.0, 1.0])
        shifted = raw + (torch.tensor([-200.0, 200.0, 0.0, 0.0]) if law.binary else 0.0)
        value = law.log_prob(x, shifted)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), raw)[0].isfinite().all()


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BINARY)
def test_samples_have_the_frequencies_of_the_masses(name):
    model, n, orders = bits(name, 4), 4000, 3 if name in ANY else 1
    x = model.sample(n, orders=orders)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    counts = (x.long() @ torch.tensor([8, 4, 2, 1])).bincount(minlength=16).double()
    expected = n * model.log_prob(strings(4), orders=orders).exp().detach()
    rare = expected < 5  # one cell for all of them
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 1], expected[expected > 1]
    # chi-square exceeds its 1 - 1e-4 quantile once in 10 000 seeds
    assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.ppf(1 - 1e-4, len(counts) - 1)


@pytest.mark.parametrize("name", REAL)
def test_real_samples_have_the_moments_of_the_density(name):
    observation = {"name": "gaussian_mixture", "components": 2}
    model = make({**REAL[name], "observation": observation}, (2,), noise=0.03, transform=Affine(0.5, 2.0))
    ticks = -45 + 0.3 * (torch.arange(300, dtype=torch.float64) + 0.5)
    points = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        p = model.log_prob(points).exp() * 0.09
        x = model.sample(4000)
    mean = p @ points
    covariance = (points - mean).T @ (p[:, None] * (points - mean))
    std = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 4.5 * std / 4000**0.5).all()
    assert abs(x.T.corrcoef()[0, 1] - covariance[0, 1] / std.prod()) < 0.08  # 4.5 standard errors, kurtosis and all
    assert (x.std(0) / std - 1).abs().max() < 0.1


@pytest.mark.parametrize("name", ["nade any", "made"])
def test_labels_steer_every_law(name):
    model = make({**BINARY[name], "conditional": True}, (4,), levels=2, bin_width=1.0, num_classes=3)
    x = strings(4)
    one, two = (model.raw(x, torch.full((16,), c), model.some_order(1)) for c in (0, 2))
    assert ((one - two).abs().amax((0, 1)) > 1e-3).all()
    with torch.no_grad():
        masses = [model.log_prob(x, condition=torch.full((16,), c)).exp().sum() for c in range(3)]
    assert all(abs(mass - 1) < 1e-12 for mass in masses)


# ---- training on any order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANY)
def test_the_loss_is_unbiased_for_the_mean_over_all_orders(name):
    """Six orders of three bits, each as likely as another."""
    model, x = bits(name, 3), torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    with torch.no_grad():
        every = [-model._log_prob(x, None, torch.tensor(o)) / 3 for o in itertools.permutations(range(3))]
        exact = torch.cat(every)
        if name == "nade any":  # an order for each item
            values = model.loss(Batch(x.expand(6000, 3)), generator=generator("any")).value
        else:  # one for a batch
            values = torch.cat([model.loss(Batch(x), generator=generator("any", k)).value for k in range(600)])
    assert exact.std() > 0.01
    nearest = (values[:, None] - exact).abs().min(1)
    assert nearest.values.max() < 1e-12  # every loss is that of some order
    counts = nearest.indices.bincount(minlength=6).double()
    expected = len(values) / 6
    assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.ppf(1 - 1e-4, 5)
    assert abs(values.mean() - exact.mean()) < 4 * values.std() / len(values) ** 0.5


def test_fixed_orders_are_trained_without_noise():
    model, x = bits("nade", 5), strings(5)
    value, logs = model.loss(Batch(x), generator=generator("a"))
    torch.testing.assert_close(value, -model.log_prob(x) / 5, rtol=0, atol=1e-12)
    assert logs["bits_per_dim"].item() == pytest.approx(value.mean().item() / math.log(2), abs=1e-12)


def test_logged_code_lengths_are_those_of_levels_whatever_their_width():
    """-log2 of the mass of a level is -log2 of its density less log2 of its width."""
    model, x = make(BINARY["nade"], (5,), levels=2, bin_width=0.25), strings(5)
    _, logs = model.loss(Batch(x * 0.25), generator=generator("a"))
    expected = -model.log_prob(x * 0.25).mean().item() / (5 * math.log(2))
    assert logs["bits_per_dim"].item() == pytest.approx(expected, abs=1e-12)


def test_a_random_order_travels_with_a_checkpoint():
    one, two = bits("nade random", 12), make(BINARY["nade"] | {"order": "random"}, (12,), levels=2, bin_width=1.0)
    torch.manual_seed(8)
    two.order = torch.randperm(12)
    assert not torch.equal(one.order, two.order)
    two.load_state_dict(one.state_dict())
    x = (torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    assert torch.equal(one.log_prob(x), two.log_prob(x))
    listed = make({"name": "nade", "order": [2, 0, 1]}, (3,), levels=2, bin_width=1.0)
    assert listed.order.tolist() == [2, 0, 1] and "order" not in listed.state_dict()


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_way_out():
    two = {"levels": 2, "bin_width": 1.0}
    with pytest.raises(ValueError, match="at least one hidden unit"):
        make({"name": "nade", "hidden": 0}, (3,), **two)
    with pytest.raises(ValueError, match=r"places 0 … 2 once, found \[0, 0, 1\]"):
        make({"name": "nade", "order": [0, 0, 1]}, (3,), **two)
    with pytest.raises(ValueError, match="is for data of more than two levels or none, and these have 2 levels"):
        make({"name": "nade", "observation": "gaussian_mixture"}, (3,), **two)
    with pytest.raises(ValueError, match="is for data of two levels, and these are continuous"):
        make({"name": "made", "network": NETWORK, "observation": "bernoulli"}, (3,))
    with pytest.raises(ValueError, match="components must be at least 1"):
        make({"name": "nade", "observation": {"name": "gaussian_mixture", "components": 0}}, (3,))
    with pytest.raises(ValueError, match="masked network `made` is needed, found 'mlp'"):
        make({"name": "made", "network": "mlp"}, (3,), **two)
    with pytest.raises(ValueError, match="needs a network of the natural order"):
        make({"name": "made", "network": {**NETWORK, "order": "reverse"}, "order": "any"}, (3,), **two)
    with pytest.raises(ValueError, match="Set conditional: false"):
        make({"name": "nade", "conditional": True}, (3,), **two)
    model = bits("nade", 3)
    with pytest.raises(ValueError, match=r"has one order\. Train it with order: any"):
        model.likelihood(strings(3), orders=2)
    with pytest.raises(ValueError, match="has one order"):
        model.sample(2, orders=2)
    with pytest.raises(ValueError, match="needs at least 1"):
        bits("made any", 3).likelihood(strings(3), orders=0)
    with pytest.raises(ValueError, match="found values from 0 to 2"):
        model.likelihood(2 * strings(3))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.sample(2, batch_size=0)
