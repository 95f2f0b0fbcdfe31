"""Normalizing flows as models, and the networks inside them: densities, units, samples, latents, training."""

import copy
import math

import pytest
import torch
from torch import nn

from genmodels.model import Model
from genmodels.networks.network import Network, networks, set_autocast
from genmodels.registry import build, resolve
from genmodels.rng import BatchNoise
from genmodels.transforms import Affine, Compose, Dequantize, Identity, Logit, Standardize
from genmodels.types import (
    Batch,
    NotApplicable,
    SupportsEncode,
    SupportsLogProb,
    SupportsPredict,
    SupportsSample,
    SupportsScore,
    SupportsVelocity,
)

NETWORK = {"name": "residual_mlp", "hidden": 16, "blocks": 1}
SPLINE = {"name": "coupling", "map": {"name": "rational_quadratic", "bins": 5}, "network": NETWORK}
BLOCK = [{"name": "act_norm"}, {"name": "permutation"}, {"name": "lu_linear"}, SPLINE]


def make(
    shape=(2,),
    layers=BLOCK * 2,
    noise=0.1,
    transform=None,
    bin_width=None,
    num_classes=None,
    condition_shape=None,
    **more,
):
    """A flow in float64 with its parameters moved off the identity by Gaussian noise."""
    torch.manual_seed(3)
    flow = build(
        Model,
        resolve(Model, {"name": "flow", "layers": layers, **more}, "test"),
        shape=shape,
        num_classes=num_classes,
        condition_shape=condition_shape,
        transform=transform or Identity(),
        bin_width=bin_width,
    ).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return flow.eval()


def items(n, *shape, seed=0):
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def digits(n, seed=0):
    return torch.randint(0, 17, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed)).float()


def integer_flow(**more):
    transform = Compose((Dequantize(17), Logit(0.0, 17.0, 0.05)))
    return make((1, 4, 4), [{"name": "flatten"}, *BLOCK], transform=transform, bin_width=1.0, **more)


# ---- density --------------------------------------------------------------------------------------------------------


def mass(flow, low, high, n):
    """∫ p over a square of the plane by the midpoint rule."""
    ticks = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    points = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        total = sum(flow.log_prob(part).exp().sum() for part in points.split(40_000))
    return total.item() * ((high - low) / n) ** 2


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("map", ["rational_quadratic", "affine"])
def test_the_density_integrates_to_one(noise, map):
    coupling = {"name": "coupling", "map": map, "network": NETWORK}
    layers = [{"name": "permutation"}, {"name": "lu_linear"}, coupling] * 2
    assert abs(mass(make(layers=layers, noise=noise), -8, 8, 400) - 1) < 2e-3


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
@pytest.mark.parametrize("conditional", [False, True])
def test_log_prob_is_the_change_of_variables(shape, conditional):
    sizes = {"num_classes": 3, "conditional": True} if conditional else {}
    flow, x = make(shape, transform=Affine(0.5, 2.0), **sizes), items(3, *shape)
    condition = torch.tensor([0, 1, 2]) if conditional else None
    n = math.prod(shape)
    expected = []
    for i, row in enumerate(x):
        given = None if condition is None else condition[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, c=given: flow.encode(v[None], condition=c).flatten(), row
        )
        z = flow.encode(row[None], condition=given).flatten()
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
        expected.append(normal + torch.linalg.slogdet(jacobian.reshape(n, n))[1])
    likelihood = flow.likelihood(x, condition=condition)
    assert likelihood.kind == "exact"
    torch.testing.assert_close(likelihood.value, torch.stack(expected), rtol=0, atol=1e-10)


def test_the_identity_flow_has_the_density_of_its_base_in_data_units():
    flow = make((3,), noise=0.0, transform=Affine(1.0, 2.0))
    x = items(8, 3)
    expected = torch.distributions.Normal(1.0, 2.0).log_prob(x).sum(1)
    # the diagonal of U starts at a float32 number
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-5)
    other = make((3,), noise=0.0, base={"name": "box", "low": -8.0, "high": 8.0})
    torch.testing.assert_close(other.log_prob(x), torch.full((8,), -3 * math.log(16.0)).double(), rtol=0, atol=1e-5)


def test_gradients_flow_to_the_data():
    flow, x = make((3,)), items(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(flow.log_prob, (x,))


def test_single_and_double_precision_agree():
    flow, x = make((4,)), items(64, 4)
    exact = flow.log_prob(x)
    single = copy.deepcopy(flow).float()
    for given in (x, x.float()):
        found = single.log_prob(given)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    assert single.sample(2).dtype == torch.float32
    assert flow.sample(2).dtype == torch.float64
    torch.testing.assert_close(single.sample(8).double(), flow.sample(8), rtol=0, atol=1e-4)


# ---- discrete data --------------------------------------------------------------------------------------------------


def test_bits_per_dim_of_the_uniform_law_is_log2_of_the_levels():
    """On levels 1/3 apart, dequantised and mapped to a uniform base, whatever the spacing."""
    transform = Dequantize(12, bin_width=1 / 3)
    identity = {"name": "permutation", "order": "reverse"}
    base = {"name": "box", "low": 0.0, "high": 4.0}
    flow = make((5,), [identity], transform=transform, bin_width=1 / 3, base=base)
    x = torch.randint(0, 12, (16, 5)).double() / 3
    loss = flow.loss(Batch(x), generator=torch.Generator().manual_seed(0))
    assert abs(loss.logs["bits_per_dim"].item() - math.log2(12)) < 1e-12
    assert abs(loss.logs["nll"].item() - 5 * math.log(4.0)) < 1e-12
    torch.testing.assert_close(loss.value, torch.full((16,), math.log(4.0)).double())


def test_the_likelihood_of_discrete_data_is_a_bound_keyed_by_seeds():
    flow, x = integer_flow(), digits(6)
    seeds = torch.tensor([5, 9, 2, 7, 1, 3])
    whole = flow.likelihood(x, seeds=seeds)
    assert whole.kind == "bound"
    order = torch.tensor([3, 0, 5])
    torch.testing.assert_close(flow.log_prob(x[order], seeds=seeds[order]), whole.value[order], rtol=0, atol=1e-9)
    assert ((flow.log_prob(x, seeds=seeds + 100) - whole.value).abs() > 1e-6).all()
    # the noise changes with the draw, and the value is their mean
    two, four = flow.log_prob(x, seeds=seeds, draws=2), flow.log_prob(x, seeds=seeds, draws=4)
    assert ((two - whole.value).abs() > 1e-6).all() and ((four - two).abs() > 1e-6).all()


def test_draws_are_averaged_in_nats():
    transform = Compose((Dequantize(17), Affine(8.5, 8.5)))
    flow = make((3,), [{"name": "permutation"}], transform=transform, bin_width=1.0)
    x = torch.tensor([[3.0, 8.0, 16.0]])

    def log_mean(v):  # E_u of -((v + u - 8.5)/8.5)²/2, u ~ U[0, 1)
        a = (v - 8.5) / 8.5
        return -((a + 1 / 8.5) ** 3 - a**3) * 8.5 / 6

    expected = sum(map(log_mean, x[0].tolist())) - 3 * (0.5 * math.log(2 * math.pi) + math.log(8.5))
    # one value of u per component spreads by 0.06; the mean of 4000 by 0.001
    assert abs(flow.log_prob(x, draws=4000).item() - expected) < 0.006


def test_the_loss_agrees_with_the_likelihood():
    flow, x = make((3,), transform=Affine(1.0, 2.0)), items(8, 3)
    loss = flow(Batch(x), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss.value, -flow.log_prob(x) / 3, rtol=0, atol=1e-12)
    assert abs(loss.logs["nll"] + flow.log_prob(x).mean()) < 1e-12 and "bits_per_dim" not in loss.logs
    discrete, y = integer_flow(), digits(4)
    values = [discrete.loss(Batch(y), generator=torch.Generator().manual_seed(s)).value for s in (1, 1, 2)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


# ---- samples and latents --------------------------------------------------------------------------------------------


def test_samples_depend_on_their_seed_alone():
    flow = make((4,), num_classes=3, conditional=True)
    seeds, labels = torch.tensor([4, 0, 9, 7, 2]), torch.tensor([0, 1, 2, 0, 1])
    whole = flow.sample(seeds, condition=labels)
    assert whole.shape == (5, 4) and not whole.requires_grad
    torch.testing.assert_close(flow.sample(seeds, condition=labels, batch_size=2), whole, rtol=0, atol=1e-12)
    for i in range(5):
        alone = flow.sample([int(seeds[i])], condition=labels[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-12)
    assert (flow.sample(seeds, condition=(labels + 1) % 3) - whole).abs().max() > 1e-3
    assert flow.sample(0, condition=labels[:0]).shape == (0, 4)


def test_samples_follow_the_density():
    """E[log p(sample)] is minus the entropy, which the grid knows."""
    flow = make((2,))
    ticks = -8 + 16 * (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    log_p = flow.log_prob(torch.cartesian_prod(ticks, ticks)).detach()
    entropy = -(log_p * log_p.exp()).sum().item() * (16 / 400) ** 2
    found = -flow.log_prob(flow.sample(8000, batch_size=2000)).detach()
    assert abs(found.mean().item() - entropy) < 4 * found.std().item() / 8000**0.5 + 2e-3


def test_latents_decode_to_the_data():
    flow, x = make((2, 2, 3), transform=Affine(0.5, 2.0)), items(8, 2, 2, 3)
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-9)
    discrete, y = integer_flow(), digits(16)
    z = discrete.encode(y)
    assert z.shape == (16, 16)
    assert torch.equal(discrete.decode(z), y.double())
    assert torch.equal(discrete.encode(y), z)


def test_capabilities_are_discovered():
    flow = make()
    every = (SupportsSample, SupportsLogProb, SupportsEncode, SupportsPredict, SupportsVelocity, SupportsScore)
    assert [c for c in every if isinstance(flow, c)] == [SupportsSample, SupportsLogProb, SupportsEncode]


# ---- preparation and state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_prepare_fits_the_transform_and_starts_act_norm(discrete):
    if discrete:
        layers = [{"name": "flatten"}, {"name": "act_norm"}]
        flow = make((1, 4, 4), layers, 0.0, transform=Dequantize(17), bin_width=1.0)
        batches = [Batch(digits(40, seed=s)) for s in range(3)]
    else:
        flow = make((3,), [{"name": "act_norm"}], 0.0, transform=Standardize(shape=(3,)))
        batches = [Batch(2 * items(n, 3, seed=n) + 5) for n in (1, 60)]  # a first batch too small on its own
    logs = flow.train().prepare(batches, generator=torch.Generator().manual_seed(0))
    assert flow.training and logs["nll"].isfinite()
    x = torch.cat([batch.x for batch in batches])
    noise = BatchNoise(len(x), generator=torch.Generator().manual_seed(0))
    y, _ = flow.transform(x.double(), noise)
    z, _ = flow.layers(y)
    torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.std(0), torch.ones_like(z[0]), rtol=0, atol=1e-6)
    if not discrete:
        torch.testing.assert_close(flow.transform.mean, x.mean(0), rtol=0, atol=1e-10)


def test_prepare_measures_the_map_without_dropout():
    layers = [{**SPLINE, "network": {**NETWORK, "dropout": 0.5}}, {"name": "act_norm"}]
    found = []
    for seed in (1, 2):
        flow = make((4,), layers, 0.3).train()
        flow.layers.bijections[1].load_state_dict(
            make((4,), [{"name": "act_norm"}], 0.0).layers.bijections[0].state_dict()
        )
        torch.manual_seed(seed)
        flow.prepare([Batch(items(64, 4))], generator=torch.Generator().manual_seed(0))
        found.append(flow.layers.bijections[1].log_scale)
    assert torch.equal(*found)


def test_state_and_copies_reproduce_the_model():
    flow, x = make((4,)), items(8, 4)
    flow.prepare([Batch(3 * x + 1)], generator=torch.Generator().manual_seed(0))
    other = make((4,), noise=0.3)
    other.load_state_dict(flow.state_dict(), strict=True)
    for twin in (other, copy.deepcopy(flow)):
        assert torch.equal(twin.log_prob(x), flow.log_prob(x))
        twin.prepare([Batch(x)], generator=torch.Generator().manual_seed(0))
        assert torch.equal(twin.log_prob(x), flow.log_prob(x))


def test_a_condition_is_asked_for_exactly_where_it_is_used():
    flow, x = make((4,), num_classes=3), items(2, 4)
    labels = torch.tensor([0, 1])
    assert flow.loss(Batch(x, condition=labels)).value.shape == (2,)
    with pytest.raises(ValueError, match="unconditional flow"):
        flow.log_prob(x, condition=labels)
    conditional = make((4,), num_classes=3, conditional=True)
    assert conditional.conditional
    with pytest.raises(ValueError, match="no condition was given"):
        conditional.sample(2)
    with pytest.raises(ValueError, match="one condition per item"):
        conditional.sample(3, condition=labels)
    with pytest.raises(ValueError, match="conditional: false"):
        make((4,), conditional=True)


def test_errors_name_what_was_found():
    flow = make((4,))
    with pytest.raises(ValueError, match=r"\[B, 4\]"):
        flow.log_prob(items(4))
    with pytest.raises(ValueError, match="at least one layer"):
        make((4,), layers=[])
    with pytest.raises(ValueError, match="one seed per item"):
        integer_flow().log_prob(digits(3), seeds=[1, 2])

    class Latent(Identity):
        volume = False

    with pytest.raises(NotApplicable, match="no density"):
        make((4,), transform=Latent()).log_prob(items(2, 4))


def test_it_learns_a_gaussian():
    """A linear flow reaches the entropy of correlated Gaussian data, at no cost to anything but two numbers."""
    root = torch.tensor([[1.0, 0.0], [0.8, 0.5]])
    flow = make((2,), [{"name": "lu_linear"}], 0.0).float()
    x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) @ root.T + 1
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        flow.loss(Batch(x)).value.mean().backward()
        optimizer.step()
    covariance = torch.cov(x.T, correction=0).double()
    best = 0.5 * torch.logdet(covariance) + 1 + math.log(2 * math.pi)
    assert 0 <= -flow.log_prob(x).mean().item() - best.item() < 1e-3


def test_layers_run_under_vmap():
    flow, x = make((4,)), items(6, 5, 4)
    together = torch.func.vmap(lambda rows: flow.layers(rows))(x)
    alone = [flow.layers(rows) for rows in x]
    torch.testing.assert_close(together, tuple(map(torch.stack, zip(*alone, strict=True))), rtol=0, atol=1e-12)


# ---- networks -------------------------------------------------------------------------------------------------------

DENSE = ["mlp", "residual_mlp"]


def network(name, in_shape=(3,), out_shape=(5,), timed=False, num_classes=None, condition_shape=None, **more):
    torch.manual_seed(0)
    sizes = {"in_shape": in_shape, "out_shape": out_shape, "timed": timed}
    node = resolve(Network, {"name": name, **more}, "test")
    return build(Network, node, **sizes, num_classes=num_classes, condition_shape=condition_shape).double()


@pytest.mark.parametrize("name", DENSE)
def test_dense_networks_end_in_their_head_with_the_batch_innermost(name):
    f, x = network(name, (3, 2, 4), (6, 4)), items(7, 3, 2, 4)
    out = f(None, x)
    h = f.features(None, x)
    assert h.shape == (7, f.width) and isinstance(f.head, nn.Linear)
    torch.testing.assert_close(out, nn.functional.linear(h, f.head.weight, f.head.bias).reshape(7, 6, 4))
    assert out.movedim(0, -1).is_contiguous()
    assert f(None, items(0, 3, 2, 4)).shape == (0, 6, 4)
    assert network(name, zero_init=True)(None, items(2, 3)).abs().max() == 0


@pytest.mark.parametrize("name", DENSE)
def test_dense_networks_use_time_and_condition_row_by_row(name):
    f, x = network(name, timed=True, num_classes=3), items(4, 3)
    t, labels = torch.tensor([0.1, 0.4, 0.4, 0.9], dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    out = f(t, x, labels)
    rows = torch.cat([f(t[i], x[i : i + 1], labels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(out, rows, rtol=0, atol=1e-12)
    for other in (f(t + 0.05, x, labels), f(t, x, (labels + 1) % 3), f(t, x, None)):
        assert ((other - out).abs().amax(1) > 1e-5).all()
    torch.testing.assert_close(f(t, x, None), f(t, x, torch.full((4,), 3)))
    out.sum().backward()
    g = network(name, timed=True, condition_shape=(2, 2))
    g(t, x, items(4, 2, 2)).square().sum().backward()
    assert all(p.grad is not None for p in g.parameters())


@pytest.mark.parametrize("name", DENSE)
def test_dense_networks_refuse_what_they_were_not_built_for(name):
    f = network(name)
    with pytest.raises(ValueError, match="without time"):
        f(torch.tensor(0.5), items(2, 3))
    with pytest.raises(ValueError, match="with time"):
        network(name, timed=True)(None, items(2, 3))
    with pytest.raises(ValueError, match=r"built for \[B, 3\]"):
        f(None, items(2, 4))
    with pytest.raises(ValueError, match="a condition was given"):
        f(None, items(2, 3), torch.tensor([0, 1]))


def test_a_coupling_calls_its_network_once_and_autocast_stays_inside():
    flow = make((4,), [SPLINE], noise=0.3).float()
    (conditioner,) = networks(flow)
    seen = []
    conditioner.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x = items(8, 4).float()
    exact = flow.log_prob(x)
    flow.sample(4)
    assert seen == [torch.float32] * 2
    set_autocast(flow, torch.bfloat16)
    low = flow.log_prob(x)
    z, _ = flow.layers(x)
    assert seen[2:] == [torch.bfloat16] * 2 and z.dtype == torch.float32
    assert torch.equal(z[:, :2], x[:, :2])  # the kept part never passed through bfloat16
    assert 0 < (low - exact).abs().max() < 0.2


def test_a_flow_that_takes_nothing_from_the_data_looks_at_none_of_them():
    """Passes over the first items cost as much as steps of training; nothing but norms has a use for them."""
    batches, generator = [Batch(items(64, 4))], torch.Generator().manual_seed(0)
    for layer, passes in (([], 0), ([{"name": "act_norm"}], 2)):  # to start the layers, and to score the start
        flow, calls = make((4,), layers=[*layer, SPLINE]), []
        flow.layers.bijections[-1].network.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        flow.prepare(batches, generator=generator)
        assert len(calls) == passes
