"""Transforms of nflows as bijections: what they compute, their shapes, and the conditions that reach them."""

import copy
import pickle

import pytest
import torch

from genmodels.flows.bijection import Bijection, Inverse, chain
from genmodels.flows.nflows import NflowsBijection
from genmodels.registry import build, resolve
from tests.oracles import jacobian_log_det

nflows = pytest.importorskip("nflows.transforms")

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.triangular_solve", "ignore:torch.qr", "ignore:Inputs to the softmax"
)
NETWORK = {"name": "residual_mlp", "hidden": 12, "blocks": 1}
LINEAR = {"tails": "linear", "tail_bound": 3.0}
VECTOR, IMAGE = (5,), (4, 2, 4)


def case(transform, shape=VECTOR, /, network=None, inside=None, tolerance=1e-10, volume=1e-10, **arguments):
    """`inside`: the open interval that inputs are drawn from; tolerances: of the way back and of the log-determinant,
    in float64, which nflows does not use everywhere."""
    given = {"transform": transform, "arguments": arguments, **({"network": NETWORK} if network else {})}
    return pytest.param(given, shape, inside, tolerance, volume, id=f"{transform}-{len(shape)}")


# the knots of linear splines are float32 numbers, so that the way back may be that of the neighbouring bin
SPLINES = {"Linear": 5e-4, "Quadratic": 1e-10, "Cubic": 1e-8, "RationalQuadratic": 1e-10}
CASES = [
    case("IdentityTransform"),
    case("PointwiseAffineTransform", shift=[0.5, 1.0, -2.0, 0.0, 0.25], scale=[2.0, 1.0, 0.5, 4.0, 1.5]),
    case("PointwiseAffineTransform", IMAGE, shift=0.5, scale=2.0),
    case("Permutation", permutation=[3, 0, 4, 1, 2]),
    case("RandomPermutation", IMAGE),
    case("ReversePermutation"),
    case("LULinear", identity_init=False),
    case("QRLinear", num_householder=3),
    case("SVDLinear", num_householder=4, identity_init=False),
    case("HouseholderSequence", num_transforms=3),
    case("OneByOneConvolution", IMAGE),
    case("ActNorm"),
    case("ActNorm", IMAGE),
    case("BatchNorm"),
    case("SqueezeTransform", IMAGE),
    case("Tanh"),
    case("LogTanh"),
    # the logarithm of its slope is a float32 number
    case("LeakyReLU", IMAGE, negative_slope=0.1, volume=1e-5),
    case("Sigmoid", temperature=0.5, learn_temperature=True),
    case("Sigmoid"),
    case("Logit", inside=(0.01, 0.99)),
    case("AdditiveCouplingTransform", network=True),
    case("AffineCouplingTransform", network=True),
    case("AffineCouplingTransform", network=True, mask=[1, 1, 0, 0, 1]),
    case("PiecewiseRationalQuadraticCouplingTransform", network=True, apply_unconditional_transform=True, **LINEAR),
    case(
        "PiecewiseRationalQuadraticCouplingTransform",
        IMAGE,
        network=True,
        apply_unconditional_transform=True,
        **LINEAR,
    ),
    case("MaskedAffineAutoregressiveTransform", hidden_features=8, activation="tanh"),
    case("MaskedPiecewiseRationalQuadraticAutoregressiveTransform", hidden_features=8, **LINEAR),
    case("MaskedPiecewiseQuadraticAutoregressiveTransform", hidden_features=8, **LINEAR),
    *(case(f"Piecewise{kind}CDF", inside=(0.0, 1.0), tolerance=far) for kind, far in SPLINES.items()),
    *(case(f"Piecewise{kind}CDF", IMAGE, tolerance=far, **LINEAR) for kind, far in SPLINES.items()),
    *(
        case(f"Piecewise{kind}CouplingTransform", network=True, tolerance=far, **LINEAR)
        for kind, far in SPLINES.items()
    ),
    case(
        "MaskedPiecewiseLinearAutoregressiveTransform", inside=(0.0, 1.0), hidden_features=8, num_bins=4, tolerance=1e-5
    ),
    case(
        "MaskedPiecewiseCubicAutoregressiveTransform", inside=(0.0, 1.0), hidden_features=8, num_bins=4, tolerance=1e-6
    ),
    case("InverseTransform", transform={"transform": "Tanh"}, inside=(-0.9, 0.9)),
    case("CompositeTransform", transforms=[{"transform": "LULinear"}, {"transform": "Tanh"}]),
    case(
        "CompositeCDFTransform",
        squashing_transform={"transform": "Sigmoid"},
        cdf_transform={"transform": "PiecewiseRationalQuadraticCDF"},
    ),
]
every = pytest.mark.parametrize(("given", "shape", "inside", "tolerance", "volume"), CASES)


def make(given, shape, num_classes=None, condition_shape=None, noise=0.3):
    """The bijection in float64 and eval mode, its parameters moved off their start."""
    node = resolve(Bijection, {"name": "nflows", **given}, "test")
    torch.manual_seed(0)
    made = build(Bijection, node, shape=shape, num_classes=num_classes, condition_shape=condition_shape).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
        for layer in made.modules():
            if isinstance(layer, nflows.BatchNorm):
                layer.running_var.fill_(1.7)
    return made.eval()


def items(n, shape, inside=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    if inside is None:
        return 1.5 * torch.randn(n, *shape, generator=g, dtype=torch.float64)
    return inside[0] + (inside[1] - inside[0]) * torch.rand(n, *shape, generator=g, dtype=torch.float64)


@every
def test_it_inverts_measures_volume_and_computes_what_nflows_computes(given, shape, inside, tolerance, volume):
    f, x = make(given, shape), items(16, shape, inside)
    z, log_det = f(x)
    assert z.shape == (16, *f.out_shape) and log_det.shape == (16,) and log_det.dtype == torch.float64
    back, back_log_det = f.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=10 * tolerance + volume)
    expected, expected_log_det = f.transform(x)
    assert torch.equal(z, expected) and torch.equal(log_det, expected_log_det.double())
    volumes = jacobian_log_det(lambda v: f(v.reshape(-1, *shape))[0], x[:3])
    torch.testing.assert_close(log_det[:3], volumes, rtol=0, atol=volume)


@every
def test_its_state_loads_into_another(given, shape, inside, tolerance, volume):
    first, x = make(given, shape), items(4, shape, inside)
    torch.manual_seed(7)
    other = make(given, shape, noise=0.5)
    other.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first(x), other(x), strict=True))
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert all(torch.equal(a, b) for a, b in zip(first(x), copied(x), strict=True))


@every
def test_empty_batches_stay_empty(given, shape, inside, tolerance, volume):
    f = make(given, shape)
    z, log_det = f(items(0, shape))
    x, _ = f.inverse(z)
    assert (z.shape, x.shape, log_det.shape) == ((0, *f.out_shape), (0, *shape), (0,))


def test_every_transform_is_covered():
    """What is left out has a reason: abstract or old names, and those of the tests below."""
    named = {c.values[0]["transform"] for c in CASES}
    left = {n for n, c in vars(nflows).items() if isinstance(c, type) and issubclass(c, nflows.Transform)} - named
    assert left == {
        "AffineScalarTransform",
        "AffineTransform",
        "GatedLinearUnit",
        "MultiscaleCompositeTransform",
        "NaiveLinear",
        "Transform",
    }


# ---- shapes ----


def test_shapes_that_change_are_measured():
    squeeze = make({"transform": "SqueezeTransform"}, (3, 4, 6))
    assert squeeze.out_shape == (12, 2, 3)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    z, _ = make({"transform": "SqueezeTransform"}, (1, 4, 4))(x)
    assert z[0].flatten(1).tolist() == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]


def multiscale():
    torch.manual_seed(0)
    whole = nflows.MultiscaleCompositeTransform(2)
    rest = whole.add_transform(
        nflows.CompositeTransform([nflows.SqueezeTransform(), nflows.OneByOneConvolution(8)]), (8, 2, 2)
    )
    whole.add_transform(nflows.ActNorm(4), rest)
    return whole.double()


def test_a_multiscale_transform_flattens_and_comes_back():
    f, x = NflowsBijection.of(multiscale(), (2, 4, 4)).eval(), items(8, (2, 4, 4))
    f.initialize(x)
    assert f.out_shape == (32,) and f.shape == (2, 4, 4)
    z, log_det = f(x)
    torch.testing.assert_close(f.inverse(z)[0], x, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        log_det[:2], jacobian_log_det(lambda v: f(v.reshape(-1, 2, 4, 4))[0], x[:2]), rtol=0, atol=1e-10
    )


def test_layers_of_both_kinds_follow_one_another_through_changes_of_shape():
    nodes = [
        {"name": "nflows", "transform": "SqueezeTransform"},
        {"name": "nflows", "transform": "OneByOneConvolution"},
        "act_norm",
        "flatten",
        {"name": "nflows", "transform": "MaskedAffineAutoregressiveTransform", "arguments": {"hidden_features": 40}},
        {"name": "coupling", "network": NETWORK},
    ]
    layers = [lambda node=resolve(Bijection, node, ""), **context: build(Bijection, node, **context) for node in nodes]
    torch.manual_seed(0)
    f = chain(tuple(layers), (2, 4, 4), num_classes=None, condition_shape=None).double()
    x = items(4, (2, 4, 4))
    f.initialize(x)
    z, log_det = f(x)
    assert f.out_shape == (32,)
    torch.testing.assert_close(f.inverse(z)[0], x, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        log_det[:1], jacobian_log_det(lambda v: f(v.reshape(-1, 2, 4, 4))[0], x[:1]), rtol=0, atol=1e-9
    )


def test_our_inverse_turns_it_round():
    node = {"transform": "MaskedAffineAutoregressiveTransform", "arguments": {"hidden_features": 8}}
    f, x = make(node, VECTOR), items(8, VECTOR)
    turned = Inverse(lambda **_: f, shape=VECTOR, num_classes=None, condition_shape=None)
    torch.testing.assert_close(turned(f(x)[0])[0], x, rtol=0, atol=1e-10)


# ---- conditions ----

AUTOREGRESSIVE = {"transform": "MaskedAffineAutoregressiveTransform", "arguments": {"hidden_features": 16}}
COUPLING = {"transform": "AffineCouplingTransform", "network": NETWORK}


@pytest.mark.parametrize("given", [AUTOREGRESSIVE, COUPLING], ids=["autoregressive", "coupling"])
def test_labels_are_one_hot_contexts(given):
    f, x = make(given, VECTOR, num_classes=3), items(4, VECTOR)
    labels = torch.tensor([0, 2, 1, 3])  # 3 is "none"
    context = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]]).double()
    z, log_det = f(x, labels)
    expected, expected_log_det = f.transform(x, context)
    assert torch.equal(z, expected) and torch.equal(log_det, expected_log_det)
    torch.testing.assert_close(f.inverse(z, labels)[0], x, rtol=0, atol=1e-10)
    assert ((f(x, (labels + 1) % 3)[0] - z).abs().amax(1) > 1e-6).all()
    assert torch.equal(f(x)[0], f(x, torch.full((4,), 3))[0])


@pytest.mark.parametrize("given", [AUTOREGRESSIVE, COUPLING], ids=["autoregressive", "coupling"])
def test_vectors_are_flattened_contexts(given):
    f, x, condition = make(given, VECTOR, condition_shape=(2, 3)), items(4, VECTOR), items(4, (2, 3), seed=2)
    z, log_det = f(x, condition)
    assert torch.equal(z, f.transform(x, condition.flatten(1))[0])
    assert torch.equal(log_det, f.transform(x, condition.flatten(1))[1])
    assert ((f(x, condition + 1)[0] - z).abs().amax(1) > 1e-6).all()


def test_transforms_without_a_context_ignore_conditions():
    f, x = make({"transform": "LULinear"}, VECTOR, num_classes=3), items(4, VECTOR)
    assert torch.equal(f(x, torch.tensor([0, 1, 2, 0]))[0], f(x)[0])
    refused = {"transform": "MaskedAffineAutoregressiveTransform"}
    refused["arguments"] = {"hidden_features": 16, "context_features": None}
    f = make(refused, VECTOR, num_classes=3)
    assert torch.equal(f(x, torch.tensor([0, 1, 2, 0]))[0], f(x)[0])


def test_a_python_transform_is_given_a_context_where_it_is_told_of_one():
    torch.manual_seed(0)
    inner = nflows.MaskedAffineAutoregressiveTransform(5, 16, context_features=3).double()
    f, x, labels = NflowsBijection.of(inner, VECTOR, num_classes=3), items(4, VECTOR), torch.tensor([0, 1, 2, 0])
    assert torch.equal(f(x, labels)[0], inner(x, torch.eye(3, dtype=torch.float64)[labels])[0])
