"""Transforms of nflows as bijections: how they start from data, what they refuse, precision, caches and training."""

import copy

import pytest
import torch
from torch import nn

from genmodels.config import load
from genmodels.flows.nflows import NflowsBijection
from genmodels.registry import ConfigError
from genmodels.training.loop import train
from tests.parity.test_nflows_adapter import COUPLING, IMAGE, NETWORK, VECTOR, items, make

nflows = pytest.importorskip("nflows.transforms")
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.triangular_solve", "ignore:torch.qr", "ignore:Inputs to the softmax"
)


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
