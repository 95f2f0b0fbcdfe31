"""Image flows and their parts against those of nflows, in double precision."""

import pytest
import torch

import genmodels  # noqa: F401
from genmodels.flows.bijection import Bijection
from genmodels.networks.network import Network
from genmodels.registry import build

transforms = pytest.importorskip("nflows.transforms")
resnet = pytest.importorskip("nflows.nn.nets.resnet")

WIDTH, BINS, BLOCKS, DROPOUT = 6, 3, 2, 0.25
NETWORK = {"name": "resnet", "width": WIDTH, "blocks": BLOCKS, "batch_norm": True, "dropout": DROPOUT}
SPLINE = {
    "name": "coupling",
    "map": {"name": "rational_quadratic", "bins": BINS, "identity": False},
    "swap": True,
    "network": NETWORK,
}
AFFINE = {**SPLINE, "map": {"name": "affine", "identity": False}}


def items(n, *shape, seed=0, spread=1.5):
    return spread * torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bijection(node, shape):
    torch.manual_seed(1)
    return build(Bijection, node, shape=shape, num_classes=None, condition_shape=None).double()


def move(module):
    """Every parameter off its start, and running statistics away from those of a standard normal."""
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.add_(items(*p.shape, seed=k, spread=0.05))  # more would make W of 48 channels ill-conditioned
        for k, m in enumerate(module.modules()):
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.copy_(items(len(m.running_mean), seed=k))
                m.running_var.copy_(items(len(m.running_var), seed=k + 100).square() + 0.1)
    return module


def agree(ours, theirs, x):
    z, log_det = ours(x)
    expected, expected_log_det = theirs(x)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(log_det, expected_log_det, rtol=0, atol=1e-8)
    torch.testing.assert_close(ours.inverse(z), theirs.inverse(z), rtol=0, atol=1e-8)


# ---- their parameters in our modules --------------------------------------------------------------------------------


def load_conv(ours, theirs):
    state = {"lower": theirs.lower_entries, "upper": theirs.upper_entries, "bias": theirs.bias}
    state |= {"diagonal": theirs.unconstrained_upper_diag, "order": theirs.permutation._permutation}
    ours.load_state_dict({**state, "sign": torch.ones_like(theirs.bias)})


def load_norm(ours, theirs):
    shape = ours.shift.shape
    state = {"log_scale": theirs.log_scale.reshape(shape), "shift": theirs.shift.reshape(shape)}
    ours.load_state_dict({**state, "initialized": theirs.initialized})


def load_network(ours, theirs, parameters=1):
    """Their network has the parameters of one number next to one another, ours all first ones, all second ones, …"""
    pairs = [(ours.first, theirs.initial_layer)]
    for a, b in zip(ours.blocks, theirs.blocks, strict=True):
        pairs += [(a.first, b.conv_layers[0]), (a.second, b.conv_layers[1])]
        pairs += zip(a.norms, getattr(b, "batch_norm_layers", ()), strict=False)
    for a, b in pairs:
        a.load_state_dict(b.state_dict())
    head = theirs.final_layer.state_dict().items()
    ours.head.load_state_dict({k: v.unflatten(0, (-1, parameters)).transpose(0, 1).flatten(0, 1) for k, v in head})


def load_coupling(ours, theirs):
    affine = isinstance(theirs, transforms.AffineCouplingTransform)
    load_network(ours.network, theirs.transform_net, 1 if affine else 3 * BINS - 1)


LOADERS = {
    transforms.ActNorm: load_norm,
    transforms.OneByOneConvolution: load_conv,
    transforms.AffineCouplingTransform: load_coupling,
    transforms.PiecewiseRationalQuadraticCouplingTransform: load_coupling,
}


def load(ours, theirs):
    """The layers with parameters come in the same order on both sides."""
    known = {"act_norm", "conv1x1", "coupling"}
    mine = [m for m in ours.modules() if getattr(m, "registered_name", None) in known]
    for a, b in zip(mine, [m for m in theirs.modules() if type(m) in LOADERS], strict=True):
        LOADERS[type(b)](a, b)


# ---- parts ----------------------------------------------------------------------------------------------------------


def their_network(inputs, outputs):
    return resnet.ConvResidualNet(
        inputs, outputs, WIDTH, num_blocks=BLOCKS, dropout_probability=DROPOUT, use_batch_norm=True
    )


def test_squeezing():
    agree(bijection("squeeze", (3, 4, 6)), transforms.SqueezeTransform(), items(2, 3, 4, 6))


def test_one_by_one_convolution():
    theirs = move(transforms.OneByOneConvolution(5).double())
    ours = bijection("conv1x1", (5, 2, 3))
    load_conv(ours, theirs)
    agree(ours, theirs, items(4, 5, 2, 3))


def test_act_norm_and_its_start_from_data():
    x = 3 * items(20, 4, 2, 3) + 2
    theirs, ours = transforms.ActNorm(4).double().train(), bijection("act_norm", (4, 2, 3))
    theirs(x)
    ours.initialize(x)
    agree(ours, theirs, x)
    load_norm(ours, move(theirs))
    agree(ours, theirs, x)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_residual_network(batch_norm, training):
    theirs = resnet.ConvResidualNet(
        3, 5, WIDTH, num_blocks=BLOCKS, dropout_probability=DROPOUT, use_batch_norm=batch_norm
    ).double()
    sizes = {"in_shape": (3, 4, 6), "out_shape": (5, 4, 6), "num_classes": None, "condition_shape": None}
    ours = build(Network, {**NETWORK, "batch_norm": batch_norm}, timed=False, **sizes).double()
    load_network(ours, move(theirs))
    out, grads = [], []
    for net in (theirs.train(training), lambda x: ours.train(training)(None, x)):
        x = items(4, 3, 4, 6).requires_grad_()
        torch.manual_seed(7)  # the same features are dropped
        out.append(net(x))
        grads.append(torch.autograd.grad(out[-1].square().sum(), x)[0])
    torch.testing.assert_close(out[1], out[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-8)
    if batch_norm:  # running averages move alike
        statistics = [[v for k, v in net.state_dict().items() if "running_" in k] for net in (theirs, ours)]
        torch.testing.assert_close(*statistics, rtol=0, atol=1e-10)


# ---- whole flows ----------------------------------------------------------------------------------------------------


def their_level(channels, affine, steps=2):
    mask = [1] * (channels // 2) + [0] * (channels // 2)
    parts = [transforms.SqueezeTransform()]
    for _ in range(steps):
        spline = {"num_bins": BINS, "tails": "linear", "tail_bound": 3.0}
        coupling = (
            transforms.AffineCouplingTransform(mask, their_network)
            if affine
            else transforms.PiecewiseRationalQuadraticCouplingTransform(mask, their_network, **spline)
        )
        parts += [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels), coupling]
    return transforms.CompositeTransform([*parts, transforms.OneByOneConvolution(channels)])


def our_level(affine, steps=2):
    step = [{"name": "act_norm"}, {"name": "conv1x1"}, AFFINE if affine else SPLINE]
    return [{"name": "squeeze"}, {"name": "repeat", "count": steps, "layers": step}, {"name": "conv1x1"}]


@pytest.mark.parametrize("affine", [False, True])
def test_the_papers_cifar_flow(affine):
    """Levels one after another, nothing factored out."""
    theirs = transforms.CompositeTransform([their_level(12, affine), their_level(48, affine)]).double()
    ours = bijection({"name": "repeat", "count": 2, "layers": our_level(affine)}, (3, 8, 8))
    load(ours, move(theirs))
    agree(ours.eval(), theirs.eval(), items(3, 3, 8, 8))


@pytest.mark.parametrize("affine", [False, True])
def test_the_papers_multi_scale_flow(affine):
    theirs = transforms.MultiscaleCompositeTransform(3)
    shape = (12, 4, 4)
    for _ in range(3):
        following = theirs.add_transform(their_level(shape[0], affine, 1), shape)
        shape = following and (4 * following[0], following[1] // 2, following[2] // 2)
    theirs = theirs.double()
    ours = bijection({"name": "multiscale", "levels": [our_level(affine, 1)] * 3}, (3, 8, 8))
    load(ours, move(theirs))
    agree(ours.eval(), theirs.eval(), items(3, 3, 8, 8))
    assert ours.out_shape == (192,)
