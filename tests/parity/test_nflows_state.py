"""Weights of nflows in our flows and back: the same density, and clear words where they do not fit."""

import copy
import re

import pytest
import torch
from torch import nn

from genmodels.flows.nflows_state import export_nflows, load_nflows
from genmodels.model import Model
from genmodels.registry import build, resolve
from genmodels.transforms import Identity

T = pytest.importorskip("nflows.transforms")
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ConvResidualNet, ResidualNet

D, HIDDEN, BINS = 5, 12, 4
NETWORK = {"name": "residual_mlp", "hidden": HIDDEN, "blocks": 2, "activation": "relu"}
SPLINE = {"name": "rational_quadratic", "bins": BINS, "identity": False}
LINEAR = [{"name": "permutation"}, {"name": "lu_linear"}]


def net(inputs, outputs):
    return ResidualNet(inputs, outputs, hidden_features=HIDDEN, num_blocks=2)


def conv(inputs, outputs):
    return ConvResidualNet(inputs, outputs, hidden_channels=HIDDEN, num_blocks=1, use_batch_norm=True)


def linear():
    return T.CompositeTransform([T.RandomPermutation(D), T.LULinear(D, identity_init=True)])


def spline(step, unconditional=True):
    return T.PiecewiseRationalQuadraticCouplingTransform(
        mask=[(i + step + 1) % 2 for i in range(D)],
        transform_net_create_fn=net,
        num_bins=BINS,
        tails="linear",
        tail_bound=3.0,
        apply_unconditional_transform=unconditional,
    )


def steps(*of):
    """The paper's flow: a linear layer before each of these and after the last."""
    return T.CompositeTransform([*(T.CompositeTransform([linear(), layer]) for layer in of), linear()])


def their(transform, shape=(D,)):
    """A flow of nflows in eval mode, its weights moved off their start."""
    torch.manual_seed(0)
    flow = Flow(
        transform() if callable(transform) and not isinstance(transform, nn.Module) else transform,
        StandardNormal(shape),
    ).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in flow.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            if isinstance(module, T.ActNorm):
                module.initialized.fill_(True)
    return flow.eval()


def ours(layers, shape=(D,), **more):
    torch.manual_seed(1)
    sizes = {"num_classes": None, "condition_shape": None, "transform": Identity(), "bin_width": None, **more}
    node = resolve(Model, {"name": "flow", "layers": layers}, "test")
    return build(Model, node, shape=shape, **sizes).double().eval()


def items(n=64, shape=(D,)):
    return 1.5 * torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def coupling(swap, **more):
    return {
        "name": "coupling",
        "network": NETWORK,
        "map": SPLINE,
        "split": "alternating",
        "swap": swap,
        "unconditional": True,
        **more,
    }


def paper(**more):
    return [step for k in range(5) for step in (*LINEAR, coupling(k % 2 == 0, **more))] + LINEAR


MADE = {"name": "made", "hidden": HIDDEN, "blocks": 2}


def masked_spline():
    return T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        D, HIDDEN, num_blocks=2, num_bins=BINS, tails="linear", tail_bound=3.0
    )


def masked(**more):
    layer = {"name": "autoregressive", "network": MADE, "map": SPLINE, **more}
    return [step for _ in range(5) for step in (*LINEAR, layer)] + LINEAR


IMAGE = (2, 4, 4)
CONV = {"name": "resnet", "width": HIDDEN, "blocks": 1, "batch_norm": True}


def image_flow():
    def level(channels, shape):
        shape_of = [T.ActNorm(channels), T.OneByOneConvolution(channels)]
        mask = [int(i >= channels // 2) for i in range(channels)]
        shape_of.append(
            T.PiecewiseRationalQuadraticCouplingTransform(mask, conv, num_bins=BINS, tails="linear", tail_bound=3.0)
        )
        return T.CompositeTransform([T.SqueezeTransform(), *shape_of])

    levels = T.MultiscaleCompositeTransform(num_transforms=2)
    after = levels.add_transform(level(8, IMAGE), (8, 2, 2))
    levels.add_transform(level(16, after), (16, 1, 1))
    return levels


IMAGE_LEVEL = [
    {"name": "squeeze"},
    {"name": "act_norm"},
    {"name": "conv1x1"},
    {"name": "coupling", "network": CONV, "map": SPLINE},
]
SIGMOID = {"name": "affine", "form": "sigmoid"}
CASES = {
    "paper": (lambda: steps(*map(spline, range(5))), paper(), (D,)),
    # the pairs as they are repeated in a configuration file
    "repeated": (
        lambda: steps(*map(spline, range(4))),
        [{"name": "repeat", "count": 2, "layers": [*LINEAR, coupling(True), *LINEAR, coupling(False)]}, *LINEAR],
        (D,),
    ),
    # our splines start as the identity, so that their raw derivatives mean something else
    "identity": (
        lambda: steps(*map(spline, range(5))),
        paper(map={**SPLINE, "identity": True}),
        (D,),
    ),
    "mask": (
        lambda: T.CompositeTransform([T.AffineCouplingTransform([0, 1, 1, 0, 1], net), T.ReversePermutation(D)]),
        [
            {"name": "coupling", "network": NETWORK, "map": SIGMOID, "mask": [1, 2, 4]},
            {"name": "permutation", "order": "reverse"},
        ],
        (D,),
    ),
    "free": (
        lambda: T.CompositeTransform(
            [
                T.InverseTransform(T.PiecewiseRationalQuadraticCDF([D], num_bins=BINS, tails="linear", tail_bound=3.0)),
                T.ActNorm(D),
            ]
        ),
        [{"name": "inverse", "of": {"name": "elementwise", "map": SPLINE}}, {"name": "act_norm"}],
        (D,),
    ),
    "autoregressive": (lambda: steps(*(masked_spline() for _ in range(5))), masked(), (D,)),
    "autoregressive, identity": (
        lambda: steps(*(masked_spline() for _ in range(5))),
        masked(map={**SPLINE, "identity": True}),
        (D,),
    ),
    "maf": (
        lambda: steps(*(T.MaskedAffineAutoregressiveTransform(D, HIDDEN, num_blocks=2) for _ in range(5))),
        masked(map={"name": "affine", "form": "softplus"}),
        (D,),
    ),
    "maf of plain layers": (
        lambda: T.MaskedAffineAutoregressiveTransform(D, HIDDEN, num_blocks=3, use_residual_blocks=False),
        masked(map={"name": "affine", "form": "softplus"}, network={**MADE, "residual": False, "blocks": 3})[2:3],
        (D,),
    ),
    "image": (image_flow, [{"name": "multiscale", "levels": [IMAGE_LEVEL, IMAGE_LEVEL]}], IMAGE),
}
every = pytest.mark.parametrize("case", CASES)


def pair(case):
    transform, layers, shape = CASES[case]
    width = (torch.Size(shape).numel(),) if case == "image" else shape
    return their(transform, width), ours(layers, shape), items(shape=shape)


@every
def test_their_weights_give_their_density(case):
    theirs, flow, x = pair(case)
    expected = theirs.log_prob(x)
    assert (flow.log_prob(x) - expected).abs().max() > 1e-3
    load_nflows(flow, theirs.state_dict())
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-10)
    z, _ = theirs._transform(x)
    torch.testing.assert_close(flow.encode(x).flatten(1), z.flatten(1), rtol=0, atol=1e-10)
    # float32 sums some tens of numbers of size 1
    single = flow.float().log_prob(x.float())
    torch.testing.assert_close(
        single, theirs.float().log_prob(x.float()).double(), rtol=0, atol=1e-5 * len(x[0].flatten())
    )


@every
def test_our_weights_give_our_density_there(case):
    theirs, flow, x = pair(case)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.load_state_dict(export_nflows(flow, like=theirs.state_dict()), strict=True)
    torch.testing.assert_close(theirs.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-10)
    again = ours(CASES[case][1], CASES[case][2])
    load_nflows(again, theirs._transform.state_dict())  # of the transform alone
    for key, value in flow.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=1e-12, msg=key)


def test_an_export_without_a_model_names_one_transform_a_layer():
    flow, x = ours(paper()), items()
    layers = [layer for k in range(5) for layer in (T.RandomPermutation(D), T.LULinear(D), spline(k))]
    theirs = their(T.CompositeTransform([*layers, T.RandomPermutation(D), T.LULinear(D)]))
    theirs.load_state_dict(export_nflows(flow), strict=True)
    torch.testing.assert_close(theirs.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-10)
    again = ours(paper())
    load_nflows(again, theirs.state_dict())  # the tenth of 17 transforms comes after the second
    torch.testing.assert_close(again.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-10)


def test_an_export_shares_no_memory():
    flow = ours(paper())
    state = export_nflows(flow)
    before = copy.deepcopy(flow.state_dict())
    for value in state.values():
        value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_read_from_files(suffix, tmp_path):
    theirs, flow, x = pair("paper")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(theirs.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(theirs.state_dict(), path)
    load_nflows(flow, path)
    torch.testing.assert_close(flow.log_prob(x), theirs.log_prob(x), rtol=0, atol=1e-10)


def test_files_without_weights_are_refused(tmp_path):
    flow = ours(paper())
    torch.save(their(lambda: steps(spline(0))), tmp_path / "model.pt")  # code, which is not run
    torch.save({"epoch": 3, "model": {}}, tmp_path / "more.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for name, message in [
        ("model.pt", "cannot be read as weights"),
        ("bad.safetensors", "cannot be read as weights"),
        ("none.pt", "cannot be read as weights (FileNotFoundError"),
        ("more.pt", "holds a dict with epoch, model, a state dict of tensors is needed"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            load_nflows(flow, tmp_path / name)
    with pytest.raises(ValueError, match="state holds a dict with epoch, model, a state dict of tensors is needed"):
        load_nflows(flow, {"epoch": 3, "model": {}})
    with pytest.raises(ValueError, match="state holds a list, a state dict of tensors is needed"):
        load_nflows(flow, [1])


def refused(flow, state, *messages):
    before = copy.deepcopy(flow.state_dict())
    with pytest.raises(ValueError) as error:
        load_nflows(flow, state)
    for message in messages:
        assert message in str(error.value), str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())


def test_differences_are_listed_layer_by_layer_and_nothing_is_changed():
    theirs, flow, _ = pair("paper")
    state = theirs.state_dict()
    second = "_transform._transforms.1._transforms.1."
    name = "layers.bijections.5 (coupling) <- _transform._transforms.1._transforms.1.: "
    widened = {**state, f"{second}transform_net.final_layer.weight": torch.zeros(22, 64)}
    refused(flow, widened, f"{name}transform_net.final_layer.weight has shape [22, 64] in the state, [22, 12] here")
    refused(
        flow,
        {
            **{k: v for k, v in state.items() if k != f"{second}transform_net.blocks.1.linear_layers.0.bias"},
            f"{second}transform_net.blocks.0.context_layer.bias": torch.zeros(3),
        },
        f"{name}transform_net.blocks.1.linear_layers.0.bias [12] is missing",
        f"{name}transform_net.blocks.0.context_layer.bias [3] is unexpected",
    )
    mask = {**state, f"{second}transform_features": torch.tensor([0, 3])}
    refused(flow, mask, "transform_features differs: [0, 3] in the state, [1, 3] here")
    order = {
        **state,
        "_transform._transforms.0._transforms.0._transforms.0._permutation": torch.tensor([0, 1, 2, 2, 4]),
    }
    refused(flow, order, "(permutation) <- ", "_permutation is no order of 0 … 4")
    refused(
        ours(paper()[:-2]), state, "the flow has 15 layers with weights, the state dict 17", "nothing <- _permutation"
    )
    refused(flow, {**state, "_distribution.mean": torch.zeros(5)}, "the state dict 18")
    refused(ours(paper(unconditional=False)), state, "unconditional_transform.unnormalized_widths [2, 4] is unexpected")
    with pytest.raises(ValueError, match=r"`like` has other tensors"):
        export_nflows(ours(paper(unconditional=False)), like=state)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            {"name": "coupling", "network": {"name": "mlp"}},
            "residual_mlp, resnet and made have a counterpart, found mlp",
        ),
        (
            {
                "name": "coupling",
                "network": NETWORK,
                "map": {"name": "rational_quadratic", "parametrization": "bounded"},
            },
            "have a counterpart there, found rational_quadratic",
        ),
        (
            {"name": "coupling", "network": NETWORK, "map": {"name": "rational_quadratic", "tails": "circular"}},
            "have a counterpart there, found rational_quadratic",
        ),
        (
            {"name": "coupling", "network": NETWORK, "map": {"name": "affine", "form": "exp"}},
            "form: sigmoid, found exp",
        ),
        ({"name": "coupling", "network": NETWORK, "scale_logits": False}, "scale_logits: true, found false"),
        ({"name": "autoregressive", "scale_logits": True}, "scale_logits: false, found true"),
        ({"name": "autoregressive", "map": {"name": "affine", "form": "sigmoid"}}, "form: softplus, found sigmoid"),
        ({"name": "conv1x1"}, "OneByOneConvolution takes images"),
        ({"name": "nflows", "transform": "Tanh"}, "layers.bijections.0 (nflows) has no counterpart"),
    ],
)
def test_layers_without_a_counterpart_are_named(layer, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        export_nflows(ours([layer]))


def test_another_order_of_the_variables_is_exported_in_the_masks_but_not_loaded():
    layer = {"name": "autoregressive", "map": SPLINE, "network": {**MADE, "order": "random"}}
    flow, theirs, x = ours([layer]), their(masked_spline), items()
    refused(flow, theirs.state_dict(), "initial_layer.mask differs")
    theirs.load_state_dict(export_nflows(flow, like=theirs.state_dict()))
    torch.testing.assert_close(theirs.log_prob(x), flow.log_prob(x), rtol=0, atol=1e-10)


def test_networks_with_conditions_are_refused():
    torch.manual_seed(0)
    node = resolve(Model, {"name": "flow", "layers": [coupling(True)], "conditional": True}, "test")
    sizes = {"condition_shape": None, "transform": Identity(), "bin_width": None}
    flow = build(Model, node, shape=(D,), num_classes=3, **sizes)
    with pytest.raises(ValueError, match="built in another way there"):
        export_nflows(flow)


def test_the_example_of_the_documentation():
    network = {"name": "residual_mlp", "hidden": 64, "activation": "relu"}
    flow = ours([{"name": "lu_linear"}, {"name": "coupling", "network": network}])
    net = lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=64)  # noqa: E731
    mask = [0, 0, 1, 1, 1]
    spline = T.PiecewiseRationalQuadraticCouplingTransform(mask, net, num_bins=8, tails="linear", tail_bound=3.0)
    theirs = Flow(T.CompositeTransform([T.LULinear(D), spline]), StandardNormal([D])).double()
    load_nflows(flow, theirs.state_dict())
    theirs.load_state_dict(export_nflows(flow))
    torch.testing.assert_close(flow.log_prob(items()), theirs.log_prob(items()), rtol=0, atol=1e-10)
