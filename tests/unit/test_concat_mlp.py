"""Fields that see the time in every layer: against their formulas written out, and against plain layers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genmodels.networks.network import Network
from genmodels.registry import ConfigError, build

T = torch.tensor(0.7, dtype=torch.float64)
TIMES = torch.tensor([0.0, 0.3, 1.0, -2.0, 0.7], dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(name: str, shape: tuple[int, ...], out: tuple[int, ...] | None = None, timed: bool = True, **arguments):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        facts = {"in_shape": shape, "out_shape": out or shape, "num_classes": None, "condition_shape": None}
        return build(Network, {"name": name, **arguments}, timed=timed, **facts).double()


def clock(net, k: int) -> list[Tensor | None]:
    """What layer k has of shift, gate's weight and gate's bias."""
    parts = (net.clock.shift, net.clock.weight, net.clock.bias)
    return [None if p is None else p.split(net.clock.sizes)[k] for p in parts]


@pytest.mark.parametrize("t", [T, TIMES], ids=["shared", "rows"])
@pytest.mark.parametrize("time", ["concat", "squash"])
def test_layers_are_those_of_the_formula(time, t):
    net, x = make("concat_mlp", (3,), hidden=(5, 4), activation="tanh", time=time, final=True), randn(5, 3)
    h, column = x, t.expand(5)[:, None]
    for k, layer in enumerate((*net.layers, net.head)):
        shift, weight, bias = clock(net, k)
        if time == "concat":  # one more input
            h = torch.tanh(
                F.linear(torch.cat((h, column), 1), torch.cat((layer.weight, shift[:, None]), 1), layer.bias)
            )
        else:
            gate = torch.sigmoid(column * weight + bias)
            h = torch.tanh((h @ layer.weight.T + layer.bias) * gate + column * shift)
    torch.testing.assert_close(net(t, x), h, rtol=0, atol=1e-14)


def test_the_field_of_the_paper_for_mnist():
    """tanh(W₂ [tanh(W₁ [x; t]); t]) with 784-100-784."""
    net = make("concat_mlp", (1, 28, 28), hidden=(100,), final=True)
    assert sum(p.numel() for p in net.parameters()) == 785 * 100 + 100 + 101 * 784 + 784
    x, (first, last) = randn(2, 1, 28, 28), (net.layers[0], net.head)
    h = torch.tanh(x.flatten(1) @ first.weight.T + 0.7 * clock(net, 0)[0] + first.bias)
    out = torch.tanh(h @ last.weight.T + 0.7 * clock(net, 1)[0] + last.bias)
    torch.testing.assert_close(net(T, x).flatten(1), out, rtol=0, atol=1e-14)


@pytest.mark.parametrize("t", [T, TIMES], ids=["shared", "rows"])
@pytest.mark.parametrize("time", ["concat", "squash"])
def test_convolutions_are_those_of_the_formula(time, t):
    net = make("concat_conv", (2, 5, 4), (3, 5, 4), hidden=(6,), activation="gelu", time=time)
    x, planes = randn(5, 2, 5, 4), t.expand(5)[:, None, None, None].expand(5, 1, 5, 4)
    h = x
    for k, layer in enumerate((net.layers[0], net.head)):
        if time == "concat":
            h = F.conv2d(torch.cat((h, planes), 1), layer.weight, layer.bias, padding=1)
        else:
            shift, weight, bias = (p[None, :, None, None] for p in clock(net, k))
            h = F.conv2d(h, layer.weight, layer.bias, padding=1)
            h = h * torch.sigmoid(planes[:, :1] * weight + bias) + planes[:, :1] * shift
        h = F.gelu(h) if k == 0 else h
    torch.testing.assert_close(net(t, x), h, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["concat_mlp", "concat_conv"])
def test_without_time_the_field_is_autonomous(name):
    shape = (2, 4, 4)
    for net in (make(name, shape, hidden=(6,), time="none"), make(name, shape, hidden=(6,), timed=False)):
        x, given = randn(5, *shape), net.timed
        assert torch.equal(net(TIMES if given else None, x), net(T if given else None, x))
        assert not [key for key, _ in net.named_parameters() if "clock" in key]


def test_no_hidden_layer_is_a_linear_field():
    net, x = make("concat_mlp", (3,), hidden=(), time="none"), randn(5, 3)
    torch.testing.assert_close(net(T, x), x @ net.head.weight.T + net.head.bias)


def test_batch_norms_act_on_every_hidden_layer_and_keep_the_averages_of_what_they_saw():
    net, x = make("concat_conv", (2, 5, 4), hidden=(6, 6), norm=True), 3 + randn(5, 2, 5, 4)
    net.train()
    seen = []
    net.norms[1].register_forward_hook(lambda module, given, out: seen.append(out))
    net(T, x)
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert all((n.running_mean != 0).any() for n in net.norms) and len(net.norms) == 2
    net.eval()
    torch.testing.assert_close(net(T, x)[:1], net(T, x[:1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "said"),
    [
        ("concat_mlp", (3,), {"hidden": (4, 0)}, r"found hidden=\[4, 0\]"),
        ("concat_conv", (1, 4, 4), {"hidden": (0,)}, r"found hidden=\[0\]"),
        ("concat_conv", (1, 4, 4), {"kernel": 4}, "odd kernel"),
        ("concat_conv", (4,), {}, "images"),
    ],
)
def test_impossible_fields_are_refused(name, shape, arguments, said):
    with pytest.raises(ConfigError, match=said):
        make(name, shape, **arguments)


PUSHED = [("concat_mlp", (3,), "tanh"), ("concat_conv", (2, 3, 2), "softplus")]
PUSHED += [("concat_mlp", (3,), a) for a in ("softplus", "gelu", "silu", "relu")]


@pytest.mark.parametrize("time", ["concat", "squash", "none"])
@pytest.mark.parametrize(("name", "shape", "activation"), PUSHED)
def test_tangents_are_carried_as_autograd_does(name, shape, activation, time):
    for final in (False, True):
        net, x = make(name, shape, hidden=(6, 5), activation=activation, time=time, final=final), randn(5, *shape)
        assert net.pushes
        tangents = randn(4, 5, *shape, seed=1)
        for t in (T, TIMES):
            expected = [torch.func.jvp(partial(net, t), (x,), (v,))[1] for v in tangents]
            out, moved = net.push(t, x, tangents)
            torch.testing.assert_close(out, net(t, x), rtol=0, atol=1e-14)
            torch.testing.assert_close(moved, torch.stack(expected), rtol=0, atol=1e-13)
            shared = net.push(t, x, tangents[:, :1])[1]
            torch.testing.assert_close(shared, net.push(t, x, tangents[:, :1].expand(-1, 5, *shape))[1])


def test_a_conditional_field_carries_tangents_too_and_what_cannot_says_so():
    facts = {"in_shape": (3,), "out_shape": (3,), "timed": True, "num_classes": 4, "condition_shape": None}
    net, x, labels = build(Network, "concat_mlp", **facts).double(), randn(5, 3), torch.arange(5) % 4
    tangents = randn(2, 5, 3, seed=1)
    expected = torch.stack([torch.func.jvp(lambda y: net(T, y, labels), (x,), (v,))[1] for v in tangents])
    torch.testing.assert_close(net.push(T, x, tangents, labels)[1], expected)
    net.autocast = torch.bfloat16
    assert not net.pushes and not make("concat_conv", (2, 4, 4), norm=True).pushes


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu", "silu", "relu"])
@pytest.mark.slow_for("silu-*", "softplus-*")
def test_gradients_of_carried_tangents_are_right(activation, final):
    """The backward pass by hand against autograd through vector-Jacobian products, and against differences."""
    net = make("concat_mlp", (3,), hidden=(6, 5), activation=activation, time="squash", final=final)
    x, tangents = randn(5, 3).requires_grad_(), randn(4, 5, 3, seed=1)
    weights = randn(5, 3, seed=2), randn(4, 5, 3, seed=3)
    wanted = (x, *net.parameters())
    out, moved = net.push(T, x, tangents)
    found = torch.autograd.grad((out * weights[0]).sum() + (moved * weights[1]).sum(), wanted)
    jvp = torch.stack([torch.func.jvp(partial(net, T), (x,), (v,))[1] for v in tangents])
    expected = torch.autograd.grad((net(T, x) * weights[0]).sum() + (jvp * weights[1]).sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    if activation != "relu":
        assert torch.autograd.gradcheck(lambda x: net.push(TIMES, x, tangents[:, :1]), (x,))
        assert torch.autograd.gradcheck(lambda x: net.push(T, x, tangents[:, :1]), (x,))


def test_carried_tangents_have_no_second_derivative_and_say_so():
    net, x = make("concat_mlp", (3,)), randn(5, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="no second one"):
        torch.autograd.grad(net.push(T, x, randn(1, 5, 3))[1].sum(), x, create_graph=True)
