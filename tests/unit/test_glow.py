"""Glow: its networks and their start from data, priors of the levels, and the published numbers of parameters."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from genmodels.config import dotlist, overlay, read
from genmodels.distributions import Distribution
from genmodels.flows.bijection import Bijection
from genmodels.model import Model
from genmodels.networks.network import Modulation, Network
from genmodels.registry import ConfigError, build
from genmodels.transforms import Affine, Transform
from genmodels.types import Batch

CIFAR = Path(__file__).parents[2] / "configs" / "cifar10" / "glow.yaml"
GLOW = {"name": "glow", "width": 6}
COUPLING = {"name": "coupling", "map": {"name": "affine", "form": "glow"}, "network": GLOW}
STEP = [{"name": "act_norm"}, {"name": "glow_conv1x1"}, COUPLING]
LEVELS = {"name": "multiscale", "levels": [["squeeze", *STEP], ["squeeze", *STEP]]}
PRIOR = {"name": "zero_conv"}


def bijection(node, shape):
    torch.manual_seed(0)
    return build(Bijection, node, shape=shape, num_classes=None, condition_shape=None).double()


def network(name="glow", in_shape=(3, 4, 6), out_shape=(4, 4, 6), num_classes=None, **more):
    torch.manual_seed(0)
    sizes = {"in_shape": in_shape, "out_shape": out_shape, "timed": False, "condition_shape": None}
    width = {"width": 6} if name == "glow" else {}
    return build(Network, {"name": name, **width, **more}, num_classes=num_classes, **sizes).double()


def move(module, scale=0.2):
    """Every parameter off its start, so that no term is zero by initialisation."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, dtype=p.dtype, generator=g))
    return module


def items(n, *shape, seed=2):
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def size(module):
    return sum(p.numel() for p in module.parameters())


def columns(v):
    return v.reshape(-1, 1, 1)


# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "kernels"), [("small", (3, 1)), ("large", (3,) * 6)])
def test_the_network_equals_one_written_out(form, kernels):
    f, x, labels = move(network(form=form, num_classes=3)), items(5, 3, 4, 6), torch.tensor([0, 2, 1, 3, 0])
    assert [layer.weight.shape[-1] for layer in f.layers] == list(kernels) and f.sites == ((6, 6),) * len(kernels)
    gates, biases = items(len(kernels), 6, seed=3), items(len(kernels), 6, seed=4)
    h, extra = x, f.embeddings.condition.table(labels)[..., None, None]
    for j, layer in enumerate(f.layers):
        norm = F.conv2d(h, layer.weight, padding=kernels[j] // 2) * columns(layer.log_scale.exp())
        norm = norm + columns(layer.shift) + columns(biases[j]) + extra
        h, extra = (norm * columns(gates[j].exp())).clamp(min=0), 0
    told = [Modulation(b, g) for b, g in zip(biases, gates, strict=True)]
    features = f.features(None, x, labels, told)
    torch.testing.assert_close(features, h, rtol=0, atol=1e-12)
    out = F.conv2d(h, f.head.weight, f.head.bias, padding=(1 if form == "small" else 0))
    torch.testing.assert_close(f.finish(f.head, features), out * columns((3 * f.head.logs).exp()), rtol=0, atol=1e-11)
    # zero gates and biases, each alone or none at all, are the plain network
    zero = torch.zeros(6, dtype=torch.float64)
    for nothing in (Modulation(zero, zero), Modulation(None, zero), Modulation(zero, None)):
        plain = f.features(None, x, labels, [nothing] * len(kernels))
        torch.testing.assert_close(f.finish(f.head, plain), f(None, x, labels), rtol=0, atol=1e-12)


def test_networks_start_at_zero_with_narrow_weights():
    f = network(in_shape=(64, 4, 4), out_shape=(8, 4, 4), width=256)
    assert f(None, items(2, 64, 4, 4)).abs().max() == 0
    assert abs(f.layers[0].weight.std().item() - 0.05) < 5e-4  # of 147,456 numbers: 0.05/√(2n) = 1e-4
    head = f.new_head()
    assert head is not f.head and all(p.abs().max() == 0 for p in head.parameters())
    assert network("zero_conv")(None, items(2, 3, 4, 6)).abs().max() == 0


@pytest.mark.parametrize("form", ["small", "large"])
def test_hidden_layers_are_normalised_by_their_first_batch_and_no_other(form):
    f, x = network(form=form), 3 * items(32, 3, 4, 6) + 5
    f.initialize(x)
    h = x
    for layer in f.layers:
        norm = F.conv2d(h, layer.weight * columns(layer.log_scale.exp())[..., None], layer.shift, padding="same")
        norm = norm.movedim(1, 0).flatten(1)
        torch.testing.assert_close(norm.mean(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-11)
        torch.testing.assert_close(norm.std(1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-11)
        h = layer(h)
    state = copy.deepcopy(f.state_dict())
    other = network(form=form)
    other.load_state_dict(state)
    for g in (f, other):
        g.initialize(items(32, 3, 4, 6, seed=9))
        assert all(torch.equal(value, g.state_dict()[key]) for key, value in state.items())


def test_hidden_channels_that_do_not_vary_keep_their_scale():
    f, x = network(), items(8, 3, 4, 6)
    with torch.no_grad():
        f.layers[0].weight[2] = 0
    f.initialize(x)
    assert f.layers[0].log_scale[2] == 0 and f.layers[0].log_scale.abs().min() == 0
    assert all(v.isfinite().all() for v in f.state_dict().values())


def glow_flow(seed=0):
    torch.manual_seed(seed)
    sizes = {"num_classes": None, "condition_shape": None, "bin_width": None, "transform": Affine(0.0, 2.0)}
    node = {"name": "flow", "layers": [{"name": "multiscale", "prior": GLOW, "levels": LEVELS["levels"]}]}
    return build(Model, node, shape=(1, 4, 4), **sizes).double()


def test_the_start_from_data_travels_in_a_checkpoint_and_is_made_nowhere_else():
    """One process prepares, all others load what it saved; no forward pass, in training neither, starts anything."""
    one, two, batch = glow_flow(0), glow_flow(1), Batch(5 * items(64, 1, 4, 4) + 2)
    fresh = copy.deepcopy(two.state_dict())
    two.train().loss(batch)
    assert all(torch.equal(value, fresh[key]) for key, value in two.state_dict().items())
    one.prepare([batch], generator=torch.Generator().manual_seed(0))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.log_prob(batch.x), two.log_prob(batch.x))
    flags = [value for key, value in two.state_dict().items() if key.endswith("initialized")]
    assert len(flags) == 8 and all(flags), "two act_norms and six hidden layers"
    two.prepare([Batch(items(64, 1, 4, 4))], generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(value, one.state_dict()[key]) for key, value in two.state_dict().items())


def test_a_flow_starts_its_networks_from_what_reaches_them():
    flow = glow_flow()
    flow.prepare([Batch(5 * items(64, 1, 4, 4) + 2)], generator=torch.Generator().manual_seed(0))
    seen = []
    hidden = [m for m in flow.modules() if hasattr(m, "log_scale") and hasattr(m, "weight")]
    for layer in hidden:
        layer.register_forward_hook(lambda m, args, out: seen.append(_normalised(m, args[0])))
    flow.log_prob(5 * items(64, 1, 4, 4) + 2)
    assert len(seen) == len(hidden) == 6, "two layers each in two couplings and a prior"
    for norm in seen:
        assert norm.mean(1).abs().max() < 1e-10 and (norm.std(1) - 1).abs().max() < 1e-10


def _normalised(layer, h):
    norm = F.conv2d(h, layer.weight * columns(layer.log_scale.exp())[..., None], layer.shift, padding="same")
    return norm.detach().movedim(1, 0).flatten(1)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("glow", {"in_shape": (6,)}, "Use mlp or residual_mlp for vectors"),
        ("glow", {"out_shape": (3, 4, 4)}, r"found items of shape \[3, 4, 6\] in and \[3, 4, 4\] out"),
        ("glow", {"width": 0}, "width >= 1 is needed, found width=0"),
        ("zero_conv", {"in_shape": (6,)}, "Use mlp or residual_mlp for vectors"),
        ("zero_conv", {"kernel": 2}, "an odd kernel is needed, found kernel=2"),
    ],
)
def test_impossible_networks_are_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        network(name, **arguments)


def test_a_start_from_one_item_is_refused():
    with pytest.raises(ValueError, match="at least two items are needed to measure a scale, found 1"):
        network().initialize(items(1, 3, 4, 6))


# ---- levels ---------------------------------------------------------------------------------------------------------


def test_either_half_of_a_level_may_be_done():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    levels = [["squeeze"], ["squeeze"]]
    f = bijection({"name": "multiscale", "levels": levels, "done": "second"}, (1, 4, 4))
    z, _ = f(x)
    assert z[0].tolist() == [4, 6, 12, 14, 5, 7, 13, 15, 0, 2, 8, 10, 1, 3, 9, 11]
    assert torch.equal(f.inverse(z)[0], x)
    # of five numbers three are done: the last ones
    odd = bijection({"name": "multiscale", "levels": [["act_norm"], ["act_norm"]], "done": "second"}, (5,))
    assert odd(torch.arange(5.0)[None])[0].tolist() == [[2, 3, 4, 0, 1]]
    assert odd(torch.zeros(0, 5))[0].shape == odd.inverse(torch.zeros(0, 5))[0].shape == (0, 5)


@pytest.mark.parametrize("done", ["first", "second"])
@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize("form", ["small", "large"])
def test_the_log_det_of_glow_is_that_of_its_jacobian(done, prior, form):
    network = {**GLOW, "form": form}
    levels = [["squeeze", *STEP[:2], {**COUPLING, "network": network}] for _ in range(2)]
    f = move(bijection({**LEVELS, "levels": levels, "done": done, "prior": prior}, (3, 8, 8)), 0.1)
    x = items(1, 3, 8, 8)
    z, log_det = f(x)
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v)[0].flatten(), x, vectorize=True).reshape(192, 192)
    assert abs(log_det.item() - torch.linalg.slogdet(jacobian)[1].item()) < 1e-10
    assert abs(log_det.item()) > 1
    back, back_log_det = f.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=1e-9)


@pytest.mark.parametrize("done", ["first", "second"])
def test_a_prior_scores_what_is_done_given_what_goes_on(done):
    """log N(z; 0, I) + log_det of the prior is log N(h; m, exp(s)²)."""
    node = {"name": "multiscale", "levels": [["act_norm"], ["act_norm"]], "done": done, "prior": PRIOR}
    f, x = move(bijection(node, (5, 2, 3)), 0.15), items(4, 5, 2, 3)
    z, log_det = f(x)
    y, outer = f.levels[0](x)
    h, rest = (y[:, :3], y[:, 3:]) if done == "first" else (y[:, 2:], y[:, :2])
    mean, log_std = f.priors[0](None, rest).split(3, 1)
    top, inner = f.levels[1](rest)
    normal = torch.distributions.Normal
    expected = normal(mean, log_std.exp()).log_prob(h).flatten(1).sum(1)
    expected = expected + normal(0.0, 1.0).log_prob(top).flatten(1).sum(1) + outer + inner
    torch.testing.assert_close(normal(0.0, 1.0).log_prob(z).sum(1) + log_det, expected, rtol=0, atol=1e-11)
    assert (mean.abs() > 0.01).double().mean() > 0.9


def test_a_prior_starts_without_effect_whatever_network_gives_it():
    for prior, shape in (({"name": "residual_mlp", "hidden": 8}, (5,)), (PRIOR, (4, 2, 2)), (GLOW, (4, 2, 2))):
        plain = {"name": "multiscale", "levels": [["act_norm"], ["act_norm"]]}
        x = items(3, *shape)
        given = bijection({**plain, "prior": prior}, shape)
        torch.testing.assert_close(given(x), bijection(plain, shape)(x), rtol=0, atol=0)
        assert len(given.priors) == 1


def test_the_law_of_the_last_level():
    torch.manual_seed(0)
    law = move(build(Distribution, {"name": "glow_prior", "top": [2, 1, 3]}, shape=(10,)).double(), 0.4)
    x = items(5, 10)
    mean, log_std = (law.head.bias * (3 * law.head.logs).exp()).repeat_interleave(3).chunk(2)
    normal = torch.distributions.Normal
    expected = normal(0.0, 1.0).log_prob(x[:, :4]).sum(1) + normal(mean, log_std.exp()).log_prob(x[:, 4:]).sum(1)
    torch.testing.assert_close(law.log_prob(x), expected, rtol=0, atol=1e-12)
    whole = build(Distribution, "glow_prior", shape=(2, 1, 3)).double()
    whole.load_state_dict(law.state_dict())
    first = normal(0.0, 1.0).log_prob(x[:, :4]).sum(1)
    torch.testing.assert_close(whole.log_prob(x[:, 4:].reshape(5, 2, 1, 3)) + first, expected, rtol=0, atol=1e-12)
    assert size(build(Distribution, {"name": "glow_prior", "top": [48, 4, 4]}, shape=(3072,))) == 83_136


@pytest.mark.parametrize(("top", "shape"), [(None, (6,)), ((2, 2, 2), (7,)), ((0, 1, 1), (3,))])
def test_last_levels_that_there_are_not_are_refused(top, shape):
    with pytest.raises(ConfigError, match=r"Set top to what the last level of `multiscale` leaves"):
        build(Distribution, {"name": "glow_prior", "top": top}, shape=shape)


# ---- published numbers of parameters --------------------------------------------------------------------------------


def glow(width, form):
    """The model of the configuration on a device without memory."""
    changes = []
    for k in range(3):
        place = f"model.layers[0].levels[{k}][1].layers[2].network"
        changes += [f"{place}.width={width}", f"{place}.form={form}"]
    tree = overlay(read(CIFAR), dotlist(changes))
    sizes = {"shape": (3, 32, 32), "num_classes": 10, "condition_shape": None, "bin_width": 1.0}
    with torch.device("meta"):
        return build(Model, tree["model"], transform=build(Transform, tree["data"]["transform"]), **sizes)


def by_hand(width, form):
    """Per step 2C (ActNorm), 2C² + C (1x1 convolution) and a network; priors of two levels and of the last.

    Hidden convolutions have a scale and a shift per channel; last ones a weight, a bias and a scale.
    """
    total = sum(9 * a * b + 2 * b for a, b in ((6, 12), (12, 24), (96, 96)))
    for c in (12, 24, 48):
        if form == "small":
            network = 9 * c // 2 * width + width**2 + 4 * width + 9 * width * c + 2 * c
        else:
            network = 9 * c // 2 * width + 5 * 9 * width**2 + 12 * width + width * c + 2 * c
        total += 32 * (2 * c + 2 * c**2 + c + network)
    return total


@pytest.mark.parametrize(
    ("width", "form", "published"),
    [(512, "small", 44_235_312), (256, "small", 15_972_912), (256, "large", 287_488_560)],
)
@pytest.mark.slow_for("256-large-*", "512-small-*")
def test_glow_has_the_published_number_of_parameters(width, form, published):
    model = glow(width, form)
    assert size(model) == published == by_hand(width, form)
    assert model.layers.out_shape == (3072,) and model.layers.bijections[0].levels[-1].out_shape == (48, 4, 4)


def test_the_parts_of_nanoflow_have_the_published_sizes():
    """Estimators with 1, 2 and 4 channels of embeddings, one projection per step, and what a step has besides."""
    estimators = []
    for c, extra, side in ((6, 1, 16), (12, 2, 8), (24, 4, 4)):
        sizes = {"in_shape": (c + extra, side, side), "out_shape": (2 * c, side, side)}
        f = network(**sizes, width=256, form="large")
        estimators.append(size(f) - size(f.head))
        if c == 6:
            assert size(f.new_head()) == 3096 and sum(site.gate for site in f.sites) == 6 * 256
    assert estimators == [2_968_320, 2_984_448, 3_016_704]
    assert size(bijection("act_norm", (12, 16, 16))) == 24 and size(bijection("glow_conv1x1", (12, 16, 16))) == 300
    priors = [network("zero_conv", (c, 4, 4), (2 * c, 4, 4)) for c in (6, 12)]
    assert sum(map(size, priors)) == 3312
    assert math.prod((1, 16, 16)) + math.prod((2, 8, 8)) + math.prod((4, 4, 4)) == 448  # of embeddings, per step
