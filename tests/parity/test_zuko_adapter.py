"""Transforms of zuko as bijections: what they compute, their direction, conditions, and what they refuse."""

import copy
import math
import pickle
import sys

import pytest
import torch

from genmodels.flows.bijection import Bijection
from genmodels.flows.zuko import ZukoBijection
from genmodels.model import Model
from genmodels.registry import ConfigError, build, resolve
from genmodels.transforms import Identity
from tests.oracles import jacobian_log_det

zuko = pytest.importorskip("zuko")

D = 3
HIDDEN = {"hidden_features": [8]}
# arguments, and how far the way back is off in float64: zuko inverts some maps by bisection, and solves CNF's equation
FLOWS = {
    "NSF": ({"transforms": 2, "bins": 4, **HIDDEN}, 1e-9),
    "MAF": ({"transforms": 2, "randperm": True, **HIDDEN}, 1e-9),
    "NICE": ({"transforms": 2, **HIDDEN}, 1e-9),
    "RealNVP": ({"transforms": 2, **HIDDEN}, 1e-9),
    "NCSF": ({"transforms": 2, "bins": 4, **HIDDEN}, 1e-9),
    "NAF": ({"transforms": 2, "signal": 4, **HIDDEN}, 1e-4),
    "UNAF": ({"transforms": 1, "signal": 4, **HIDDEN}, 1e-4),
    "SOSPF": ({"transforms": 2, "degree": 2, "polynomials": 2, **HIDDEN}, 1e-4),
    "BPF": ({"transforms": 2, "degree": 4, **HIDDEN}, 1e-4),
    "GF": ({"transforms": 2, "components": 4}, 1e-4),
    "CNF": ({"hidden_features": [8]}, 1e-3),
    "MaskedAutoregressiveTransform": ({"order": [2, 0, 1], "activation": "Tanh", **HIDDEN}, 1e-9),
    "GeneralCouplingTransform": (
        {"mask": [1, 0, 0], "univariate": "MonotonicRQSTransform", "shapes": [[4], [4], [3]], **HIDDEN},
        1e-9,
    ),
    "ElementWiseTransform": ({}, 1e-9),
}
every = pytest.mark.parametrize("flow", FLOWS)


def make(flow, shape=(D,), num_classes=None, condition_shape=None, **arguments):
    torch.manual_seed(0)
    node = resolve(Bijection, {"name": "zuko", "flow": flow, "arguments": {**FLOWS[flow][0], **arguments}}, "test")
    made = build(Bijection, node, shape=shape, num_classes=num_classes, condition_shape=condition_shape)
    return made.double()


def items(n, shape=(D,), seed=1):
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)


@every
@pytest.mark.slow_for("CNF")
def test_it_computes_what_zuko_computes_from_data_to_latent(flow):
    f, x = make(flow), items(5)
    torch.manual_seed(0)
    theirs = getattr(zuko.flows, flow)(D, **{k: _arguments(k, v) for k, v in FLOWS[flow][0].items()}).double()
    transform = theirs.transform if hasattr(theirs, "base") else theirs
    z, log_det = f(x)
    expected, expected_log_det = transform().call_and_ladj(x)
    assert torch.equal(z, expected) and torch.equal(log_det, expected_log_det)
    if hasattr(theirs, "base"):  # zuko's own density of x is that of the latent and the volume of this direction
        torch.testing.assert_close(theirs().log_prob(x), theirs.base().log_prob(z) + log_det)
    back, back_log_det = f.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=FLOWS[flow][1])
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=100 * FLOWS[flow][1])
    # CNF's volume comes from its solver
    torch.testing.assert_close(
        log_det, jacobian_log_det(lambda v: f(v)[0], x), rtol=0, atol=1e-3 if flow == "CNF" else 1e-8
    )


def _arguments(key, value):
    if key == "activation":
        return getattr(torch.nn, value)
    if key == "univariate":
        return getattr(zuko.transforms, value)
    return torch.tensor(value) if key in ("order", "mask") else value


@pytest.mark.parametrize("flow", ["NSF", "NICE", "GF", "CNF"])
@pytest.mark.parametrize("kind", ["labels", "vectors"])
def test_conditions_arrive_as_context(flow, kind):
    sizes = {"num_classes": 3} if kind == "labels" else {"condition_shape": (2, 2)}
    f, x = make(flow, **sizes), items(4)
    condition = torch.tensor([0, 1, 2, 3]) if kind == "labels" else items(4, (2, 2), seed=5)
    width = 3 if kind == "labels" else 4
    context = torch.eye(4, 3, dtype=torch.float64) if kind == "labels" else condition.reshape(4, width)
    z, log_det = f(x, condition)
    expected, expected_log_det = f.transform(context).call_and_ladj(x)
    torch.testing.assert_close((z, log_det), (expected, expected_log_det), rtol=0, atol=1e-12)
    torch.testing.assert_close(f.inverse(z, condition)[0], x, rtol=0, atol=1e-3)
    zeros = f.transform(torch.zeros(4, width, dtype=torch.float64)).call_and_ladj(x)
    torch.testing.assert_close(f(x), zeros, rtol=0, atol=1e-12)


def test_any_batch_any_shape_and_copies():
    f, x = make("NSF", shape=(3, 2, 2)), items(6, (3, 2, 2))
    z, log_det = f(x)
    assert z.shape == x.shape and log_det.dtype == torch.float64
    torch.testing.assert_close(f(x[2:3])[0], z[2:3], rtol=0, atol=1e-12)
    empty, none = f(x[:0])
    assert empty.shape == (0, 3, 2, 2) and none.shape == (0,)
    for twin in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert torch.equal(twin(x)[0], z)
    other = make("NSF", shape=(3, 2, 2), slope=1e-3)
    other.load_state_dict(f.state_dict())
    assert torch.equal(other(x)[0], z)
    single, single_log_det = f.float()(x.float())
    assert single.dtype == torch.float32 and single_log_det.dtype == torch.float64


def test_a_flow_of_ours_takes_any_flow_of_theirs():
    """Density, samples and training of a layer that was built in Python."""
    torch.manual_seed(0)
    theirs = zuko.flows.NSF(2, transforms=2, hidden_features=[16]).double()
    layers = (lambda shape, **_: ZukoBijection.of(theirs, shape),)
    from genmodels.flows.flow import NormalizingFlow

    facts = {"num_classes": None, "condition_shape": None, "transform": Identity(), "bin_width": None}
    flow = NormalizingFlow(layers, shape=(2,), **facts)
    x = items(16, (2,))
    torch.testing.assert_close(flow.log_prob(x), theirs().log_prob(x), rtol=0, atol=1e-10)
    assert flow.sample(3).shape == (3, 2)
    flow.log_prob(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in theirs.parameters())


def test_circular_flows_refuse_what_is_outside_their_circle():
    f = make("NCSF")
    with pytest.raises(ValueError, match=r"circular on \[-3.14159, 3.14159\], found values from 0 to 4"):
        f(torch.tensor([[0.0, 4.0, 1.0]], dtype=torch.float64))
    box = {"name": "box", "low": -math.pi, "high": math.pi}
    layer = {"name": "zuko", "flow": "NCSF", "arguments": FLOWS["NCSF"][0]}
    node = resolve(Model, {"name": "flow", "layers": [layer], "base": box}, "test")
    facts = {"num_classes": None, "condition_shape": None, "transform": Identity(), "bin_width": None}
    flow = build(Model, node, shape=(1,), **facts)
    x = torch.linspace(-math.pi, math.pi, 4001)[:, None]
    density = flow.log_prob(x).exp().detach()
    assert abs(torch.trapezoid(density, x[:, 0].double()).item() - 1) < 1e-3


@pytest.mark.parametrize(
    ("node", "error", "message"),
    [
        ({"flow": "NSFF"}, ConfigError, "zuko.flows has no flow 'NSFF'.*NSF"),
        ({"flow": "GMM"}, ConfigError, "has no flow 'GMM'"),
        ({"flow": "NSF", "arguments": {"binz": 3}}, ConfigError, "NSF.binz=3. for 3 features is refused.*binz"),
        ({"flow": "CNF", "arguments": {"exact": False}}, ConfigError, "exact=False estimates the volume"),
        ({"flow": "MAF", "arguments": {"activation": "relux"}}, ConfigError, "activation must be a name in torch.nn"),
        ({"flow": "MAF", "arguments": {"order": [0, 1]}}, Exception, "zuko: MA"),
        ({"flow": "NSF", "arguments": {"features": 2}}, ValueError, "does not take 3 features"),
    ],
)
def test_mistakes_are_named(node, error, message):
    with pytest.raises(error, match=message):
        build(
            Bijection,
            resolve(Bijection, {"name": "zuko", **node}, "test"),
            shape=(D,),
            num_classes=None,
            condition_shape=None,
        )


def test_what_is_built_must_be_a_flow_and_take_the_condition():
    with pytest.raises(ConfigError, match="a flow or a LazyTransform is needed, found Linear"):
        ZukoBijection.of(torch.nn.Linear(2, 2), (2,))
    with pytest.raises(ValueError, match="with a context of 3"):
        ZukoBijection.of(zuko.flows.MAF(2), (2,), num_classes=3)
    with pytest.raises(ValueError, match="with a context of 0"):
        ZukoBijection.of(zuko.flows.MAF(2, context=3), (2,))


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ConfigError, match=r"the package zuko is not installed.*pip install zuko"):
        make("NSF")
