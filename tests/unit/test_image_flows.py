"""Image flows: the order of channels, what is done after a level, 1x1 convolutions, convolutional conditioners, and the
published CIFAR-10 model."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from genmodels.config import dotlist, overlay, read
from genmodels.flows.bijection import Bijection
from genmodels.flows.linear import Conv1x1
from genmodels.model import Model
from genmodels.networks.network import Network
from genmodels.registry import ConfigError, build
from genmodels.rng import BatchNoise
from genmodels.transforms import Affine, Transform
from genmodels.types import Batch

CONFIGS = Path(__file__).parents[2] / "configs"
CIFAR = CONFIGS / "cifar10" / "nsf.yaml"
RESNET = {"name": "resnet", "width": 8, "blocks": 1}
STEP = [
    {"name": "act_norm"},
    {"name": "conv1x1"},
    {"name": "coupling", "map": {"name": "rational_quadratic", "bins": 3}, "network": RESNET},
]
RAMP = torch.arange(16.0).reshape(1, 1, 4, 4)


def bijection(node, shape, **sizes):
    torch.manual_seed(0)
    return build(Bijection, node, shape=shape, **{"num_classes": None, "condition_shape": None, **sizes}).double()


def move(module, scale=0.2):
    """Every parameter off its start, so that no term is zero by initialisation."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, dtype=p.dtype, generator=g))
    return module


def items(n, *shape, seed=2):
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- squeezing and levels -------------------------------------------------------------------------------------------


def test_squeezed_channels_are_ordered_as_in_the_paper():
    f = bijection("squeeze", (1, 4, 4))
    z, log_det = f(RAMP)
    expected = [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]
    assert f.out_shape == (4, 2, 2) and z[0].flatten(1).tolist() == expected and log_det.item() == 0
    x = items(1, 3, 4, 6)
    z = bijection("squeeze", (3, 4, 6))(x)[0]
    for c, a, b in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2)).tolist():
        assert torch.equal(z[:, 4 * c + 2 * a + b], x[:, c, a::2, b::2])


def test_the_first_half_of_a_level_is_done_and_the_rest_goes_on():
    f = bijection({"name": "multiscale", "levels": [["squeeze"], ["squeeze"]]}, (1, 4, 4))
    z, _ = f(RAMP)
    assert f.out_shape == (16,)
    assert z[0].tolist() == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    assert torch.equal(f.inverse(z)[0], RAMP)
    # of five numbers three are done; the rest is reversed in a level of its own
    reverse = {"name": "permutation", "order": "reverse"}
    odd = bijection({"name": "multiscale", "levels": [["act_norm"], [reverse], [reverse]]}, (5,))
    assert odd(torch.arange(5.0)[None])[0].tolist() == [[0, 1, 2, 4, 3]]


def test_later_levels_start_from_what_reaches_them():
    f = bijection({"name": "multiscale", "levels": [["squeeze", "act_norm"], ["act_norm"]]}, (1, 4, 4))
    x = 3 * items(40, 1, 4, 4) + 5
    f.initialize(x)
    z = f(x)[0].reshape(40, 4, 4).movedim(1, 0).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std(1), torch.ones(4).double(), rtol=0, atol=1e-12)
    assert f.levels[1].bijections[0].log_scale.abs().max() < 1e-12, "the first level left nothing to normalise"
    g = bijection({"name": "multiscale", "levels": [["squeeze"], ["act_norm"]]}, (1, 4, 4))
    g.initialize(x)
    rest = g(x)[0][:, 8:].reshape(40, 2, 4).movedim(1, 0).flatten(1)
    torch.testing.assert_close(rest.std(1), torch.ones(2).double(), rtol=0, atol=1e-12)


def test_shapes_that_cannot_be_squeezed_or_split_are_refused():
    with pytest.raises(ConfigError, match="even height and width are needed, found 4x7"):
        bijection("squeeze", (3, 4, 7))
    with pytest.raises(ConfigError, match="even height and width are needed, found 3x8"):
        bijection("squeeze", (3, 3, 8))
    with pytest.raises(ConfigError, match=r"images \[C, H, W\]"):
        bijection("squeeze", (6,))
    with pytest.raises(ConfigError, match=r"levels\[1\]: it leaves items of shape \[1\]"):
        bijection({"name": "multiscale", "levels": [["act_norm"], ["act_norm"], ["act_norm"]]}, (2,))
    for levels in ([], [["squeeze"], []]):
        with pytest.raises(ConfigError, match="at least one layer"):
            bijection({"name": "multiscale", "levels": levels}, (1, 4, 4))


@pytest.mark.parametrize("multiscale", [False, True])
def test_the_log_det_of_an_image_flow_is_that_of_its_jacobian(multiscale):
    level = [{"name": "squeeze"}, *STEP, {"name": "conv1x1", "start": "orthogonal"}]
    node = {"name": "multiscale", "levels": [level, level]} if multiscale else {"name": "repeat", "layers": level}
    f, x = bijection({"count": 2, **node} if not multiscale else node, (3, 8, 8)), items(1, 3, 8, 8)
    move(f, 0.1)
    z, log_det = f(x)
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v)[0].flatten(), x, vectorize=True).reshape(192, 192)
    assert abs(log_det.item() - torch.linalg.slogdet(jacobian)[1].item()) < 1e-10
    assert abs(log_det.item()) > 1
    torch.testing.assert_close(f.inverse(z)[0], x, rtol=0, atol=1e-9)


# ---- 1x1 convolutions -----------------------------------------------------------------------------------------------


def test_conv1x1_starts_as_a_permutation_or_as_an_orthogonal_matrix():
    x = items(3, 12, 2, 2)
    plain = bijection("conv1x1", (12, 2, 2))
    assert not torch.equal(plain.order, torch.arange(12))
    torch.testing.assert_close(plain(x)[0], x[:, plain.order], rtol=0, atol=1e-6)  # its diagonal is a float32 number
    f = bijection({"name": "conv1x1", "start": "orthogonal"}, (12, 2, 2))
    z, log_det = f(x)
    # parameters were rounded to float32: 1e-7 each
    torch.testing.assert_close(z.square().sum(1), x.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(log_det, torch.zeros(3).double(), rtol=0, atol=1e-5)
    assert (f.weight().abs() > 0.01).double().mean() > 0.8, "every channel is mixed with every other"


@pytest.mark.parametrize("reflect", [False, True])
def test_conv1x1_reproduces_the_matrix_it_is_factorised_from(reflect):
    f = bijection("conv1x1", (7, 3, 2))
    w = items(7, 7)
    w[0] *= -1 if (torch.linalg.det(w) < 0) != reflect else 1
    f._factorise(w)
    torch.testing.assert_close(f.weight(), w, rtol=0, atol=1e-10)
    x = items(4, 7, 3, 2, seed=3)
    z, log_det = f(x)
    torch.testing.assert_close(z, torch.einsum("ij,bjhw->bihw", w, x), rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det, 6 * torch.linalg.slogdet(w)[1].expand(4), rtol=0, atol=1e-10)
    torch.testing.assert_close(f.inverse(z)[0], x, rtol=0, atol=1e-9)


def test_conv1x1_is_permutation_and_lu_linear_in_one():
    f, lu = move(bijection("conv1x1", (5, 2, 3))), bijection("lu_linear", (5, 2, 3))
    lu.load_state_dict({key: value for key, value in f.state_dict().items() if key not in ("order", "sign")})
    x = items(4, 5, 2, 3)
    torch.testing.assert_close(f(x), lu(x[:, f.order]), rtol=0, atol=1e-12)
    other = bijection({"name": "conv1x1", "start": "orthogonal"}, (5, 2, 3))
    other.load_state_dict(f.state_dict())
    assert torch.equal(other(x)[0], f(x)[0]), "permutation and signs travel with the parameters"


def test_conv1x1_on_many_channels_comes_back_in_single_precision():
    f = bijection({"name": "conv1x1", "start": "orthogonal"}, (192, 4, 4)).float()
    move(f, 0.005)
    x = items(4, 192, 4, 4).float()
    torch.testing.assert_close(f.inverse(f(x)[0])[0], x, rtol=0, atol=1e-3)


# ---- convolutional conditioners -------------------------------------------------------------------------------------


def network(in_shape=(3, 4, 6), out_shape=(5, 4, 6), timed=False, num_classes=None, condition_shape=None, **more):
    torch.manual_seed(0)
    sizes = {"in_shape": in_shape, "out_shape": out_shape, "timed": timed, "num_classes": num_classes}
    return build(Network, {"name": "resnet", "width": 8, **more}, **sizes, condition_shape=condition_shape).double()


def test_the_residual_network_equals_one_written_out():
    f = move(network(blocks=2, batch_norm=True, num_classes=3)).eval()
    for k, norm in enumerate(m for m in f.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.copy_(items(8, seed=k))
        norm.running_var.copy_(items(8, seed=k + 50).square())
    x, labels = items(4, 3, 4, 6), torch.tensor([0, 2, 1, 0])

    def normalised(h, norm):
        def per_channel(v):
            return v.reshape(1, 8, 1, 1)

        unit = (h - per_channel(norm.running_mean)) / (per_channel(norm.running_var) + 1e-3).sqrt()
        return (unit * per_channel(norm.weight) + per_channel(norm.bias)).clamp(min=0)

    e = f.embeddings.condition.table(labels)
    h = torch.einsum("ij,bjhw->bihw", f.first.weight[..., 0, 0], x) + (f.first.bias + e)[:, :, None, None]
    for block in f.blocks:
        change = nn.functional.conv2d(normalised(h, block.norms[0]), block.first.weight, block.first.bias, padding=1)
        change = nn.functional.conv2d(
            normalised(change, block.norms[1]), block.second.weight, block.second.bias, padding=1
        )
        gate = 1 / (1 + (-(e @ block.gate.weight.T + block.gate.bias)).exp())
        h = h + change * gate[:, :, None, None]
    expected = torch.einsum("ij,bjhw->bihw", f.head.weight[..., 0, 0], h) + f.head.bias[:, None, None]
    torch.testing.assert_close(f(None, x, labels), expected, rtol=0, atol=1e-12)


def test_blocks_start_near_zero_and_the_head_does_where_asked():
    f = network(blocks=2)
    for block in f.blocks:
        for p in block.second.parameters():
            assert 0.5e-3 < p.abs().max() <= 1e-3
    assert f.head.weight.abs().max() > 0.1 and f.width == 8
    assert network(zero_init=True)(None, items(2, 3, 4, 6)).abs().max() == 0
    # a coupling finds head and width: it starts as the identity and scales its logits
    coupling = bijection({"name": "coupling", "network": {**RESNET, "batch_norm": True}}, (4, 4, 4)).eval()
    x = items(2, 4, 4, 4)
    torch.testing.assert_close(coupling(x)[0], x, rtol=0, atol=1e-12)
    assert coupling.scale == 8**-0.5


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "more", "message"),
    [
        ((6,), (5,), {}, "Use mlp or residual_mlp for vectors"),
        ((3, 4, 6), (5, 4, 4), {}, r"found items of shape \[3, 4, 6\] in and \[5, 4, 4\] out"),
        ((3, 4, 6), (5, 4, 6), {"width": 0}, "width >= 1"),
        ((3, 4, 6), (5, 4, 6), {"dropout": 1.0}, "0 <= dropout < 1"),
    ],
)
def test_impossible_residual_networks_are_refused(in_shape, out_shape, more, message):
    with pytest.raises(ConfigError, match=message):
        network(in_shape, out_shape, **more)


def trained_flow(**more):
    """A small image flow with batch norms and dropout, after a few steps of training."""
    layers = [{"name": "squeeze"}, *STEP, *STEP]
    for k in (3, 6):
        spline = {**layers[k]["map"], "identity": False}
        layers[k] = {**layers[k], "map": spline, "network": {**RESNET, "batch_norm": True, "dropout": 0.2}}
    torch.manual_seed(0)
    node = {"name": "flow", "layers": layers, **more}
    sizes = {"num_classes": None, "condition_shape": None, "bin_width": None, "transform": Affine(0.0, 2.0)}
    flow = build(Model, node, shape=(1, 4, 4), **sizes).double()
    batch = Batch(3 * items(64, 1, 4, 4) + 1)
    flow.prepare([batch], generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        flow.train().loss(batch).value.mean().backward()
        optimizer.step()
    return flow, batch.x


def test_a_flow_with_batch_norms_is_one_map_in_eval_mode():
    flow, x = trained_flow()
    training = flow.log_prob(x)
    flow.eval()
    norms = [m for m in flow.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4 and all(n.running_mean.abs().max() > 0 for n in norms)
    whole = flow.log_prob(x)
    assert (whole - training).abs().max() > 1e-3, "training normalises by the batch"
    torch.testing.assert_close(torch.cat([flow.log_prob(row[None]) for row in x[:5]]), whole[:5], rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, rtol=0, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.encode(v).flatten(), x[:1]).reshape(16, 16)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(flow.encode(x[:1])).sum()
    assert abs((normal + torch.linalg.slogdet(jacobian)[1] - whole[0]).item()) < 1e-9
    drawn = flow.sample([7, 3, 9])
    torch.testing.assert_close(flow.sample([3])[0], drawn[1], rtol=0, atol=1e-10)


# ---- the published model --------------------------------------------------------------------------------------------

LAYERS = "model.layers[0].layers[1].layers"
FIVE_BITS = ["data.bits=5", "data.transform.parts[0].levels=32", "data.transform.parts[1].loc=16"]
FIVE_BITS += ["data.transform.parts[1].scale=32", f"{LAYERS}[2].map.bins=2", f"{LAYERS}[2].network.width=64"]


def cifar(overrides=()):
    """The model of the configuration, and its transform."""
    tree = overlay(read(CIFAR), dotlist(overrides))
    transform = build(Transform, tree["data"]["transform"])
    sizes = {"shape": (3, 32, 32), "num_classes": 10, "condition_shape": None, "bin_width": 1.0}
    torch.manual_seed(0)
    return build(Model, tree["model"], transform=transform, **sizes), transform


def count(width, outputs, steps=7, blocks=3, channels=(12, 48, 192)):
    """Trainable numbers of the paper's model by hand; `outputs` is what the network gives for each number.

    Per step, with C channels: 2C (ActNorm); the triangles, diagonal and bias of a 1x1 convolution, C² + C; the network
    of the half that is kept: 1x1 in, per block two 3x3 with two batch norms (scale and shift), 1x1 out. One more 1x1
    convolution closes each level. Permutations, running averages and signs are not trained.
    """
    total = 0
    for c in channels:
        block = 2 * (9 * width**2 + width) + 2 * 2 * width
        network = (c // 2 + 1) * width + blocks * block + (width + 1) * outputs * (c // 2)
        total += steps * (2 * c + c**2 + c + network) + c**2 + c
    return total


@pytest.mark.parametrize(
    ("bits", "coupling", "published", "by_hand"),
    [
        (8, "spline", 11_835_054, count(96, 3 * 4 - 1)),
        (5, "spline", 5_333_538, count(64, 3 * 2 - 1)),
        (8, "affine", 11_065_068, count(96, 2)),
        (5, "affine", 5_161_548, count(64, 2)),
    ],
)
def test_the_cifar_model_has_the_published_number_of_parameters(bits, coupling, published, by_hand):
    overrides = FIVE_BITS if bits == 5 else []
    if coupling == "affine":
        width = 64 if bits == 5 else 96
        net = f"{{name: resnet, width: {width}, blocks: 3, batch_norm: true, dropout: 0.2}}"
        overrides = [f"{LAYERS}[2]={{name: coupling, map: affine, swap: true, network: {net}}}"]
    model, _ = cifar(overrides)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published == by_hand
    assert model.layers.out_shape == (192, 4, 4)
    halves = [m for m in model.modules() if hasattr(m, "kept")]
    assert len(halves) == 21 and all((m.transformed < m.shape[0] // 2).all() for m in halves), "the first half moves"
    assert sum(isinstance(m, Conv1x1) for m in model.modules()) == 3 * (7 + 1), "one more closes each level"


@pytest.mark.parametrize(
    ("coupling", "published", "outputs"), [("spline", 15_553_554, 3 * 8 - 1), ("affine", 14_270_244, 2)]
)
def test_the_model_of_64x64_pixels_has_the_published_number_of_parameters(coupling, published, outputs):
    """Half of each level's channels goes on, of which a squeeze makes four times as many: 12, 24, 48, 96."""
    path = CONFIGS / "images" / "nsf_64.yaml"
    changed = [f"model.layers[0].levels[{k}][1].layers[2].map={{name: affine}}" for k in range(4)]
    tree = overlay(read(path), dotlist(changed if coupling == "affine" else []))
    transform = build(Transform, tree["data"]["transform"])
    sizes = {"num_classes": None, "condition_shape": None, "bin_width": 1.0}
    with torch.device("meta"):
        model = build(Model, tree["model"], shape=(3, 64, 64), transform=transform, **sizes)
    by_hand = count(96, outputs, channels=(12, 24, 48, 96))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published == by_hand
    multiscale = model.layers.bijections[0]
    assert [level.out_shape for level in multiscale.levels] == [(12, 32, 32), (24, 16, 16), (48, 8, 8), (96, 4, 4)]
    assert multiscale.done == [(6, 32, 32), (12, 16, 16), (24, 8, 8), (96, 4, 4)] and multiscale.first
    assert f"{15_553_554:,} parameters" in path.read_text()


@pytest.mark.parametrize("bits", [8, 5])
def test_the_cifar_transform_is_that_of_the_paper_and_counts(bits):
    small = [f"{LAYERS}[2].network.width=2", "model.layers[0].layers[1].count=1"]
    model, transform = cifar([*(FIVE_BITS if bits == 5 else []), *small])
    x = torch.randint(0, 2**bits, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).double()
    u = BatchNoise(2, generator=torch.Generator().manual_seed(3)).uniform(3, 32, 32, dtype=torch.float64)
    y, log_det = transform(x, BatchNoise(2, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(y, (x + u) / 2**bits - 0.5, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        log_det, torch.full((2,), -3072 * bits * math.log(2), dtype=torch.float64), rtol=1e-12, atol=0
    )
    # bits per dimension: the model's own code length, and `bits` for the volume of a level
    model = model.eval()
    loss = model.loss(Batch(x), generator=torch.Generator().manual_seed(3))
    z, inner = model.layers(y.float())
    own = -(model.base.log_prob(z) + inner).mean().item() / (3072 * math.log(2))
    assert abs(loss.logs["bits_per_dim"].item() - (own + bits)) < 1e-4
    assert torch.equal(transform.inverse(y), x)
    assert model.sample(2).shape == (2, 3, 32, 32)
