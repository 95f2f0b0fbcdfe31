"""Autoregressive layers: their inverse against the published one, gradients, graphs, starts, sizes, total mass."""

import pytest
import torch
from torch import Tensor

from genmodels.flows.bijection import Bijection, Chain, chain
from genmodels.flows.elementwise import transform_items
from genmodels.metrics.cost import count_evaluations
from genmodels.registry import Builder, ConfigError, build, resolve
from tests.contracts.test_flow import make as flow
from tests.contracts.test_flow import mass

GRAPH = [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 0, 0, 1]]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 3])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def move(module: torch.nn.Module, scale: float) -> None:
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.add_(scale * randn(*p.shape, seed=k + 1).to(p))


def make(count: int, num_classes: int | None = None, moved: float = 0.2, map: object = "rational_quadratic", **network):
    """A layer in float64, moved off its start."""
    torch.manual_seed(0)
    node = {"name": "autoregressive", "map": map, "network": {"name": "made", "hidden": 13, **network}}
    f = build(Bijection, node, shape=(count,), num_classes=num_classes, condition_shape=None).double().eval()
    move(f, moved)
    return f


def passes(f: Bijection, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The published inverse: D passes of the network, each of which finds one more component."""
    x = torch.zeros_like(z)
    for _ in range(z.shape[1]):
        x, log_det = transform_items(f.map, z, f.network(None, x, condition), inverse=True, scale=f.scale)
    return x, log_det


CASES = [
    (1, {}), (2, {}), (3, {}), (8, {}), (8, {"residual": False}), (5, {"order": "random"}), (5, {"order": "reverse"}),
    (5, {"adjacency": GRAPH}),
]  # fmt: skip


@pytest.mark.parametrize(("count", "arguments"), CASES)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_sweep_is_the_inverse_of_many_passes(count, arguments, num_classes):
    f, z = make(count, num_classes, **arguments), randn(7, count)
    condition = None if num_classes is None else LABELS
    for found, expected in zip(f.inverse(z, condition), passes(f, z, condition), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    wide, log_det = f.inverse(z, condition)
    narrow, narrow_log_det = f.float().inverse(z.float(), condition)
    assert narrow.dtype == torch.float32 and narrow_log_det.dtype == torch.float64
    # single precision against double, not against itself: rounding of the network included
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-4)
    torch.testing.assert_close(narrow_log_det, log_det, rtol=0, atol=1e-4 * count)


@pytest.mark.parametrize(("count", "arguments"), CASES)
def test_the_volume_is_that_of_the_jacobian_and_the_jacobian_follows_the_order(count, arguments):
    f, x = make(count, 3, **arguments), randn(1, count)
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v, LABELS[1:2])[0][0], x)[:, 0]
    torch.testing.assert_close(f(x, LABELS[1:2])[1][0], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-10)
    places = f.network.places
    assert torch.equal(jacobian[places][:, places].triu(1), torch.zeros(count, count).double())
    assert (jacobian.diag() > 0).all()


@pytest.mark.parametrize("map", ["rational_quadratic", {"name": "affine", "form": "exp"}])
def test_gradients_of_the_inverse_are_those_of_many_passes(map):
    f, z = make(5, 3, map=map), randn(7, 5).requires_grad_()
    inputs = [z, *f.parameters()]
    found, expected = (
        torch.autograd.grad((x.sin() + x).sum() + log_det.cos().sum(), inputs)
        for x, log_det in (f.inverse(z, LABELS), passes(f, z, LABELS))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_an_inverse_autoregressive_layer_samples_in_one_pass(monkeypatch):
    f = make(5, 3)
    of = {"name": "autoregressive", "network": {"name": "made", "hidden": 13}}
    g = build(Bijection, {"name": "inverse", "of": of}, shape=(5,), num_classes=3, condition_shape=None).double()
    g.of.load_state_dict(f.state_dict())
    z = randn(7, 5)
    x, log_det = g.inverse(z, LABELS)
    torch.testing.assert_close(g(x, LABELS), (z, -log_det), rtol=0, atol=1e-9)
    monkeypatch.setattr(type(g.of.network), "sweep", None)
    assert torch.equal(g.inverse(z, LABELS)[0], x), "no sweep was needed"


def test_an_inverse_counts_as_one_evaluation():
    f, z = make(5), randn(8, 5)
    with count_evaluations(f) as counted:
        f.inverse(z)
    assert counted.per_item(8) == 1


@pytest.mark.parametrize("network", [{}, {"order": "random"}, {"residual": False}])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_layers_start_as_the_identity_unless_the_map_does_not_ask_for_it(network, num_classes):
    x, labels = randn(7, 5), None if num_classes is None else LABELS
    z, log_det = make(5, num_classes, 0.0, **network)(x, labels)
    # parameters are made in float32
    torch.testing.assert_close(z, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(7).double(), rtol=0, atol=1e-5)
    other = make(5, num_classes, 0.0, {"name": "rational_quadratic", "identity": False}, **network)
    assert (other(x, labels)[0] - x).abs().max() > 1e-2
    assert other.network.head.weight.abs().max() > 0.1, "the network's own start"


def test_logits_are_divided_by_the_root_of_the_width_if_asked():
    node = {"name": "autoregressive", "network": {"name": "made", "hidden": 16}, "scale_logits": True}
    f = build(Bijection, node, shape=(3,), num_classes=None, condition_shape=None).double()
    plain = make(3, hidden=16)
    f.load_state_dict(plain.state_dict())
    assert (f.scale, plain.scale) == (0.25, 1.0)
    with torch.no_grad():  # widths and heights of 8 bins, parameter-major
        plain.network.head.weight[: 16 * 3] /= 4
        plain.network.head.bias[: 16 * 3] /= 4
    x = randn(7, 3)
    torch.testing.assert_close(f(x), plain(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(f.inverse(x), plain.inverse(x), rtol=0, atol=1e-10)


def test_what_does_not_fit_is_refused():
    sizes = {"num_classes": None, "condition_shape": None}
    with pytest.raises(ConfigError, match=r"'mlp' does not order.*Use `made`"):
        build(Bijection, {"name": "autoregressive", "network": "mlp"}, shape=(3,), **sizes)
    with pytest.raises(ConfigError, match=r"found items of shape \[3, 2, 2\]. Put `flatten` before it"):
        build(Bijection, "autoregressive", shape=(3, 2, 2), **sizes)


# RQ-NSF (AR) of the paper: dim, blocks, hidden, bins, trainable parameters
TABLES = [
    ("power", 6, 2, 256, 8, 3_004_722), ("gas", 8, 2, 256, 8, 3_128_392), ("hepmass", 21, 2, 256, 8, 3_934_392),
    ("miniboone", 43, 1, 64, 4, 439_622), ("bsds300", 63, 2, 512, 8, 18_311_642),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dim", "blocks", "hidden", "bins", "expected"), TABLES)
def test_published_models_have_their_numbers_of_parameters(name, dim, blocks, hidden, bins, expected):
    layer = {
        "name": "autoregressive",
        "map": {"name": "rational_quadratic", "bins": bins},
        "network": {"name": "made", "hidden": hidden, "blocks": blocks},
    }
    linear = [{"name": "permutation", "order": "reverse"}, {"name": "lu_linear"}]
    nodes = [{"name": "repeat", "count": 10, "layers": [*linear, layer]}, *linear]
    builders = tuple(Builder(Bijection, resolve(Bijection, node, "layers")) for node in nodes)
    with torch.device("meta"):
        flow = chain(builders, (dim,), num_classes=None, condition_shape=None)
    assert isinstance(flow, Chain)
    assert sum(p.numel() for p in flow.parameters() if p.requires_grad) == expected


PAPER = {
    "name": "autoregressive",
    "map": {"name": "rational_quadratic", "identity": False},
    "network": {"name": "made", "hidden": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("network", [{}, {"order": "reverse", "residual": False}])
def test_the_density_of_a_large_flow_integrates_to_one(noise, network):
    """Logits are not scaled, so that larger noise makes densities too sharp for the grid."""
    layer = {**PAPER, "network": {**PAPER["network"], **network}}
    layers = [{"name": "permutation"}, {"name": "lu_linear"}, layer] * 4
    assert abs(mass(flow(layers=layers, noise=noise), -8, 8, 800) - 1) < 2e-3


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("map", ["rational_quadratic", "affine"])
def test_the_density_integrates_to_one(noise, map):
    layer = {"name": "autoregressive", "map": map, "network": {"name": "made", "hidden": 8, "blocks": 1}}
    layers = [{"name": "lu_linear"}, layer, {"name": "permutation", "order": "reverse"}] * 2
    assert abs(mass(flow(layers=layers, noise=noise), -8, 8, 400) - 1) < 2e-3


@pytest.mark.slow
def test_a_flow_learns_a_bent_gaussian():
    """x2 = x1²/2 + 0.3 noise has log p = -1.6339 nats on average; small flows of other libraries reach -1.65."""
    layers = [{"name": "permutation", "order": "reverse"}, {"name": "lu_linear"}]
    layers = [*layers, {"name": "autoregressive", "network": {"name": "made", "hidden": 64}}] * 4
    made = flow((2,), layers, 0.0).float().train()
    optimizer = torch.optim.Adam(made.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        first, second = torch.randn(2, n, generator=generator)
        return torch.stack((first, 0.5 * first**2 + 0.3 * second), 1)

    for _ in range(600):
        optimizer.zero_grad()
        (-made.log_prob(draw(512)).mean()).backward()
        optimizer.step()
        schedule.step()
    # the mean over 100,000 points has a standard error of 0.003
    with torch.no_grad():
        assert made.eval().log_prob(draw(100_000)).mean() > -1.665
