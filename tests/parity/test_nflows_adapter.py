"""Transforms of nflows as bijections: what they compute, what they are told, how they start, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

from genmodels.config import load
from genmodels.flows.bijection import Bijection, Inverse, chain
from genmodels.flows.nflows import NflowsBijection
from genmodels.registry import ConfigError, build, resolve
from genmodels.training.loop import train
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
        {"name": "spline_coupling", "network": NETWORK},
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


# ---- starts from data ----


def mixed():
    """Both kinds of data-dependent layer, dropout, and an ActNorm that forward never passes."""
    torch.manual_seed(0)
    inner = nflows.MaskedAffineAutoregressiveTransform(3, 8, dropout_probability=0.5)
    layers = [nflows.ActNorm(3), inner, nflows.BatchNorm(3), nflows.InverseTransform(nflows.ActNorm(3))]
    return NflowsBijection.of(nflows.CompositeTransform(layers).double(), (3,))


def test_the_start_is_that_of_nflows_and_happens_once():
    f, x = mixed(), 3 + 2 * items(200, (3,))
    f.initialize(x)
    assert f.training
    f.eval()
    first, inner, norm, _ = f.transform._transforms
    y = x * first.scale + first.shift
    torch.testing.assert_close(y.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.std(0), torch.ones(3).double(), rtol=0, atol=1e-12)
    y = inner(y)[0]  # without dropout
    torch.testing.assert_close(norm.running_mean, y.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, y.var(0), rtol=1e-12, atol=0)
    assert norm.momentum == 0.1 and not any(m.training for m in f.modules())
    before = copy.deepcopy(f.state_dict())
    f.initialize(items(50, (3,), seed=9))
    assert all(torch.equal(before[k], v) for k, v in f.state_dict().items())
    other = mixed()
    other.load_state_dict(before)
    other.initialize(items(50, (3,), seed=9))  # nor after a restart
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_nothing_starts_by_surprise():
    """nflows sets an ActNorm from the first training batch: different on every replica."""
    f = mixed().train()
    x = 3 + items(20, (3,))
    before = copy.deepcopy(f.state_dict())
    f(x)
    after = f.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"transform._transforms.2.running_mean", "transform._transforms.2.running_var"}
    f.initialize(x)
    assert f.training and f.transform._transforms[1].autoregressive_net.blocks[0].dropout.training
    assert not any(m.training for m in f.modules() if isinstance(m, nflows.ActNorm))
    last = f.transform._transforms[3]._transform
    f.eval()
    f.train()
    f.transform._transforms[3].inverse(x)  # the direction in which this one is passed forwards
    assert last.initialized and torch.equal(last.shift, torch.zeros(3).double())


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("bad", ["constant", "single"])
def test_a_start_from_data_without_spread_is_refused(bad):
    f = make({"transform": "ActNorm"}, (3,), noise=0.0)
    x = items(1, (3,)) if bad == "single" else items(8, (3,)).index_fill(1, torch.tensor([1]), 2.0)
    with pytest.raises(ValueError, match=r"log_scale is not finite after its start from \d items.*`act_norm`"):
        f.initialize(x)


def test_batch_norm_sees_its_batch_in_training_only():
    f, x = make({"transform": "BatchNorm"}, (3,), noise=0.0), 2 + items(64, (3,))
    f.initialize(x)
    f.train()
    z, _ = f(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"BatchNorm has no inverse here\..*only available in eval mode"):
        f.inverse(z)
    f.eval()
    torch.testing.assert_close(f(x[:1])[0], f(x)[0][:1], rtol=0, atol=1e-12)


# ---- what it refuses ----


def given(transform, network=None, /, **arguments):
    return {"transform": transform, "arguments": arguments, **({"network": network} if network else {})}


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (given("LULiner"), r"nflows\.transforms has no transform 'LULiner'\. Did you mean 'LULinear'\?"),
        (given("Transform"), "has no transform 'Transform'"),
        (given("InverseNotAvailable"), "has no transform 'InverseNotAvailable'"),
        (given("os.system"), "has no transform 'os.system'"),
        (given("LULinear", feature=3), r"LULinear has no argument 'feature'\. Did you mean 'features'\?"),
        (given("Tanh", scale=3), r"Tanh has no argument 'scale'\. It has: none\."),
        (given("MaskedAffineAutoregressiveTransform"), r"needs arguments\.hidden_features"),
        (given("AffineCouplingTransform"), "AffineCouplingTransform needs network"),
        (given("LULinear", NETWORK), r"LULinear has no conditioner\. Drop network\."),
        (given("SVDLinear", num_householder=3), r"SVDLinear\(num_householder=3\) is refused by nflows"),
        (given("PointwiseAffineTransform", scale=-1.0), "Scale must be strictly positive"),
        (given("MultiscaleCompositeTransform", num_transforms=2), r"put together in Python; NflowsBijection\.of"),
        (given("NaiveLinear"), "could be trained, but not inverted.*Use LULinear, QRLinear or SVDLinear"),
        (
            given("MaskedAffineAutoregressiveTransform", hidden_features=4, activation="system"),
            "activation must be one",
        ),
        (given("InverseTransform", transform={"transform": "Tan"}), r"nflows\.transform: nflows.*Did you mean 'Tanh'"),
    ],
)
def test_what_cannot_be_built_is_named(node, message):
    with pytest.raises(ConfigError, match=message):
        make(node, VECTOR)


@pytest.mark.parametrize(
    ("node", "shape", "message"),
    [
        (given("MaskedAffineAutoregressiveTransform", hidden_features=4), IMAGE, r"\(4, 2, 4\).*Put `flatten` before"),
        (given("SqueezeTransform"), (4, 3, 4), "Input image size not compatible"),
        (given("SqueezeTransform"), VECTOR, r"does not take items of shape \(5,\).*4 dimensions"),
        (given("ActNorm"), (4, 3), "2D or a 4D tensor"),
        (given("GatedLinearUnit"), VECTOR, "GatedLinearUnit does not take items"),
    ],
)
def test_shapes_that_do_not_fit_are_named(node, shape, message):
    with pytest.raises(ValueError, match=message):
        make(node, shape)


def test_a_map_whose_volume_is_not_per_item_is_refused():
    """The gated unit of nflows gives one log-determinant per number."""
    with pytest.raises(ValueError, match=r"no bijection of items of shape \(5,\).*log-determinants of shape \(10,\)"):
        NflowsBijection.of(nflows.GatedLinearUnit(), VECTOR, condition_shape=(5,))


def test_values_outside_the_domain_are_named():
    spline = make(given("PiecewiseRationalQuadraticCDF"), VECTOR)
    with pytest.raises(
        ValueError,
        match=r"RationalQuadraticCDF takes values in \[0, 1\], found values from 0 to 2\.5\. A spline with",
    ):
        spline(torch.tensor([[0.0, 0.5, 1.0, 2.5, 0.1]]).double())
    tanh = make(
        given("CompositeTransform", transforms=[{"transform": "ReversePermutation"}, {"transform": "Tanh"}]), VECTOR
    )
    with pytest.raises(ValueError, match=r"nflows: Tanh takes values in \(-1, 1\).*found values from -1\.5 to 0\.1\.$"):
        tanh.inverse(torch.tensor([[0.0, -1.5, 0.1, 0.0, 0.1]]).double())
    with pytest.raises(ValueError, match=r"Sigmoid takes values in \[0, 1\], found values from -0\.25 to"):
        make(given("Logit"), VECTOR)(torch.full((1, 5), -0.25))


def test_a_failed_check_of_nflows_is_explained():
    class Checks(nflows.IdentityTransform):
        def forward(self, inputs, context=None):
            assert (inputs < 1).all()
            return super().forward(inputs, context)

    with pytest.raises(ValueError, match="nflows: Checks failed a check of its own, in a spline by rounding"):
        NflowsBijection.of(Checks(), VECTOR)(torch.ones(1, 5))


# ---- precision, caches ----


def test_cached_weights_are_those_that_were_loaded():
    cached, other, x = (
        make(given("LULinear", using_cache=True), VECTOR),
        make(given("LULinear"), VECTOR, noise=0.7),
        items(4, VECTOR),
    )
    before = cached(x)[0]
    assert cached.transform.cache.weight is not None
    cached.load_state_dict(other.state_dict())
    torch.testing.assert_close(cached(x)[0], other(x)[0], rtol=0, atol=1e-12)
    assert not torch.equal(cached(x)[0], before)
    single = cached.float()(x.float())[0]
    torch.testing.assert_close(single.double(), other(x)[0], rtol=1e-4, atol=1e-4)


def test_what_nflows_does_not_register_follows_the_dtype():
    f = NflowsBijection.of(nflows.Sigmoid(temperature=0.5), VECTOR)
    assert f.double().transform.temperature.dtype == torch.float64
    assert f.float().transform.temperature.dtype == torch.float32
    assert f.to("meta").transform.temperature.device.type == "meta"
    slope = NflowsBijection.of(nflows.LeakyReLU(), VECTOR).to("meta").transform.log_negative_slope
    assert slope.device.type == "cpu"  # nflows multiplies it by a mask that it makes on the CPU, wherever x is


@pytest.mark.parametrize("shape", [VECTOR, IMAGE])
def test_a_coupling_transforms_the_odd_places_unless_told_otherwise(shape):
    f, x = make(COUPLING, shape), items(4, shape)
    moved = ((f(x)[0] - x).abs() > 1e-6).flatten(2).any(2) if len(shape) > 1 else (f(x)[0] - x).abs() > 1e-6
    assert moved.any(0).tolist() == [i % 2 == 1 for i in range(shape[0])]


# ---- training ----

CONFIG = """
name: nf
data: moons
model:
  name: flow
  layers:
    - {name: nflows, transform: ActNorm}
    - {name: nflows, transform: MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
       arguments: {hidden_features: 16, num_bins: 4, num_blocks: 1, tails: linear, tail_bound: 3.0}}
    - {name: permutation, order: reverse}
    - name: nflows
      transform: PiecewiseRationalQuadraticCouplingTransform
      arguments: {tails: linear, tail_bound: 3.0}
      network: {name: residual_mlp, hidden: 16, blocks: 1}
    - lu_linear
train: {steps: 60, batch_size: 128, optimizer: {name: adam, lr: 2.0e-2}, eval_every: 60, log_every: 50}
"""


def test_a_configuration_of_both_kinds_trains(tmp_path):
    (tmp_path / "flow.yaml").write_text(CONFIG)
    config = load(tmp_path / "flow.yaml")
    first = config.tree["model"]["layers"][0]
    assert first == {"name": "nflows", "transform": "ActNorm", "arguments": None, "network": None}
    run = train(config, root=tmp_path, quiet=True)
    losses = [line["val/loss"] for line in run.metrics() if "val/loss" in line]
    start = next(line["prepare/nll"] for line in run.metrics() if "prepare/nll" in line)
    assert losses[-1] * 2 < start - 0.3  # nats per point
    model = run.load()
    x = model.sample(16)
    assert x.shape == (16, 2)
    torch.testing.assert_close(model.decode(model.encode(x)), x, rtol=0, atol=1e-3)
    assert bool(model.layers.bijections[0].transform.initialized)


def test_it_is_a_module_like_any_other():
    f = make(COUPLING, VECTOR)
    assert isinstance(f, nn.Module) and sum(p.numel() for p in f.parameters()) > 0
    z, log_det = f(items(4, VECTOR))
    (z.square().sum() - log_det.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in f.parameters())
    # nflows divides the logits of splines by the root of the conditioner's width
    assert f.transform.transform_net.hidden_features == 12 and log_det.isfinite().all()
