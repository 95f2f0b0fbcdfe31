"""MADE: what depends on what, the sweep against the one-pass network, and its cost."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genmodels.networks.made import MADE
from genmodels.networks.network import Modulation, Network, set_gradient_checkpointing
from genmodels.registry import ConfigError, build

GRAPH = ((0, 0, 0, 0, 0), (1, 1, 0, 0, 0), (0, 0, 0, 0, 0), (1, 0, 1, 0, 0), (0, 1, 0, 0, 1))  # ranks 0 1 0 1 2
COUPLING = ((0, 0, 0, 0), (0, 0, 0, 0), (1, 1, 0, 0), (1, 1, 0, 0))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(
    count: int, each: int = 3, num_classes: int | None = None, condition_shape: tuple | None = None,
    timed: bool = False, moved: float = 0.3, **arguments: object,
) -> MADE:  # fmt: skip
    """In float64, moved off its start, where second layers are nearly zero; tanh has no dead units."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(
            Network, {"name": "made", "hidden": 11, "activation": "tanh", **arguments}, in_shape=(count,),
            out_shape=(each * count,), timed=timed, num_classes=num_classes, condition_shape=condition_shape,
        ).double()  # fmt: skip
    with torch.no_grad():
        for k, p in enumerate(network.parameters()):
            p.add_(moved * randn(*p.shape, seed=k + 1))
    return network.eval()


def steering(network: Network, condition: Tensor | None = None, modulation=None) -> Tensor:
    """[D, D] bool: whether any output of variable i moves with variable j, at one point."""
    count = network.in_shape[0]
    x = randn(1, count, seed=9)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: network.finish(network.head, network.features(None, v, condition, modulation))[0], x
    )
    return (jacobian.reshape(-1, count, count) != 0).any(0)


def modulation(network: Network) -> list[Modulation]:
    return [Modulation(randn(s.bias, seed=i), randn(s.gate, seed=50 + i)) for i, s in enumerate(network.sites)]


def test_masks_are_those_of_the_worked_example():
    network = make(3, each=1, hidden=4)
    rows = lambda mask: ["".join(str(int(v)) for v in row) for row in mask]  # noqa: E731
    assert rows(network.input_mask) == ["100", "110", "100", "110"]
    assert rows(network.hidden_mask) == ["1010", "1111", "1010", "1111"]
    assert rows(network.output_mask) == ["0000", "1010", "1111"]
    assert rows(make(3, each=2, hidden=4).output_mask) == 2 * ["0000", "1010", "1111"], "parameter-major"


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", ["none", "labels", "vectors"])
def test_a_variable_is_steered_by_all_before_it_and_by_nothing_else(count, residual, kind):
    """11 units are no multiple of D - 1 or D; every dependency that is allowed exists."""
    sizes = {"none": {}, "labels": {"num_classes": 3}, "vectors": {"condition_shape": (2,)}}[kind]
    condition = {"none": None, "labels": torch.tensor([1]), "vectors": randn(1, 2)}[kind]
    network = make(count, residual=residual, **sizes)
    expected = torch.ones(count, count).tril(-1).bool()
    assert torch.equal(steering(network, condition), expected)
    assert torch.equal(steering(network, condition, modulation(network)), expected)


@pytest.mark.parametrize("order", ["reverse", "random", (2, 0, 4, 1, 3)])
def test_an_order_says_who_comes_first(order):
    network = make(5, order=order)
    order = [4, 3, 2, 1, 0] if order == "reverse" else network.order.tolist()
    assert sorted(order) == list(range(5))
    found = steering(network)
    for k, place in enumerate(order):
        assert set(found[place].nonzero().flatten().tolist()) == set(order[:k])


def test_a_graph_says_who_steers_whom_and_its_diagonal_nothing():
    network = make(5, adjacency=GRAPH)
    assert torch.equal(steering(network), torch.tensor(GRAPH).bool() & ~torch.eye(5).bool())
    assert network.sizes == [2, 2, 1] and network.places.tolist() == [0, 2, 1, 3, 4]
    assert make(4, adjacency=COUPLING).sizes == [2, 2], "a coupling is found in two steps"


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_every_variable_hears_of_the_condition(count, residual):
    network, x = make(count, residual=residual, condition_shape=(2,)), randn(1, count)
    jacobian = torch.autograd.functional.jacobian(lambda c: network(None, x, c)[0], randn(1, 2))
    assert (jacobian.reshape(3, count, 2).abs() > 1e-6).all()


CASES = [
    (1, {}), (2, {}), (3, {}), (8, {}), (8, {"residual": False}), (8, {"blocks": 0}),
    (8, {"residual": False, "blocks": 0}), (5, {"order": "random"}), (5, {"adjacency": GRAPH}),
    (4, {"adjacency": COUPLING, "residual": False}),
    (40, {"hidden": 64}),
]  # fmt: skip


def swept(network: Network, x: Tensor, *given: object) -> Tensor:
    """[B, P·D]: the outputs of the sweep, fed with x."""
    sweep = network.sweep(*given)
    out = x.new_zeros(network.out_shape[0] // x.shape[1], x.shape[1], len(x))
    for places in sweep.places.split(sweep.sizes):
        out[:, places] = sweep.parameters()
        sweep.feed(x.mT[places])
    return out.flatten(0, 1).mT


@pytest.mark.parametrize(("count", "arguments"), CASES)
@pytest.mark.parametrize("kind", ["none", "labels", "modulated"])
def test_the_sweep_gives_what_one_pass_gives(count, arguments, kind):
    network, x = make(count, num_classes=3 if kind == "labels" else None, **arguments), randn(7, count)
    condition = torch.tensor([0, 1, 2, 3, 1, 0, 2]) if kind == "labels" else None
    told = modulation(network) if kind == "modulated" else None
    head = network.new_head().double() if kind == "modulated" else network.head
    expected = network.finish(head, network.features(None, x, condition, told))
    torch.testing.assert_close(swept(network, x, condition, x, told, head), expected, rtol=0, atol=1e-12)


def test_modulation_of_one_kind_alone_and_of_nothing():
    network, x = make(5), randn(7, 5)
    nothing, zero = [Modulation()] * 2, [Modulation(torch.zeros(11), torch.zeros(11))] * 2
    for given in (nothing, zero):
        assert torch.equal(network.features(None, x, None, given), network.features(None, x))
    one = [Modulation(gate=torch.full((11,), -1.0)), Modulation(bias=randn(11))]
    torch.testing.assert_close(
        swept(network, x, None, x, one), network.finish(network.head, network.features(None, x, None, one))
    )
    half = network.features(None, x, None, [one[0], Modulation(gate=torch.full((11,), -1.0))])
    first = nn.functional.linear(x, network.first.weight * network.input_mask, network.first.bias)
    torch.testing.assert_close(half, first, rtol=0, atol=0)  # gates of -1 switch the blocks off


@pytest.mark.parametrize("residual", [True, False])
def test_features_equal_the_formula_written_out(residual):
    network, x, labels = make(5, num_classes=3, residual=residual), randn(7, 5), torch.tensor([0, 1, 2, 3, 1, 0, 2])
    told, act = modulation(network), torch.tanh
    first, *layers = [
        lambda h, k=k, m=m: h @ (k.weight * m).T + k.bias
        for k, m in [(network.first, network.input_mask), *((k, network.hidden_mask) for k in network.layers)]
    ]
    e = network.embeddings.condition.table(labels)
    h = first(x) + e
    if residual:
        for i, (bias, gate) in enumerate(told):
            change = layers[2 * i + 1](act(layers[2 * i](act(h)) + bias))
            h = h + change * torch.sigmoid(network.gates[i](e)) * (1 + gate)
    else:
        h = act(h + told[0].bias) * (1 + told[0].gate)
        for layer, (bias, gate) in zip(layers, told[1:], strict=True):
            h = act(layer(h) + bias) * (1 + gate)
    torch.testing.assert_close(network.features(None, x, labels, told), h, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("count", "hidden"), [(16, 48), (64, 128)])
@pytest.mark.parametrize("condition_shape", [None, (3,)])
def test_the_sweep_multiplies_no_more_than_a_dense_pass(count, hidden, condition_shape):
    network, x = make(count, 23, hidden=hidden, condition_shape=condition_shape), randn(5, count)
    condition = None if condition_shape is None else randn(5, 3)
    with FlopCounterMode(display=False) as dense:
        network(None, x, condition)
    with FlopCounterMode(display=False) as sweep:
        swept(network, x, condition, x)
    # half of the masked weights are zeros; the gates are dense in both
    assert (
        0.4 * dense.get_total_flops()
        < sweep.get_total_flops()
        < (0.65 if condition is None else 0.75) * dense.get_total_flops()
    )


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("residual", [True, False])
def test_dropout_acts_on_the_sweep_where_it_acts_on_one_pass(residual):
    network, x = make(6, residual=residual, dropout=0.5), randn(7, 6)
    assert torch.equal(swept(network, x, None, x), swept(network, x, None, x))
    network.train()
    assert not torch.equal(swept(network, x, None, x), swept(network, x, None, x))
    network.dropout = Doubling()
    torch.testing.assert_close(swept(network, x, None, x), network(None, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("residual", [True, False])
def test_gradients_through_the_sweep_are_those_of_one_pass(checkpointing, residual):
    network, x = make(6, residual=residual, num_classes=2).train(), randn(7, 6).requires_grad_()
    set_gradient_checkpointing(network, checkpointing)
    labels, weight = torch.tensor([0, 1, 2, 0, 1, 2, 0]), randn(7, 18, seed=4)
    inputs = [x, *network.parameters()]
    expected = torch.autograd.grad((weight * network(None, x, labels)).sum(), inputs)
    found = torch.autograd.grad((weight * swept(network, x, labels, x)).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def both(network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return network(None, x), swept(network, x, None, x)


def test_second_layers_of_blocks_start_near_zero():
    network = make(5, moved=0.0)
    assert all(0 < p.abs().max() <= 1e-3 for layer in network.layers[1::2] for p in layer.parameters())
    assert all(layer.weight.abs().max() > 0.1 for layer in [*network.layers[::2], network.first, network.head])


def test_a_drawn_order_is_part_of_the_state_and_no_other_is():
    network, x = make(16, order="random", hidden=20), randn(7, 16)
    other = make(16, order="random", hidden=20)
    torch.manual_seed(5)
    other._structure(other._depends("random", None))
    assert not torch.equal(other.order, network.order)
    other.load_state_dict(network.state_dict())
    for found, expected in zip(both(other, x), both(network, x), strict=True):
        assert torch.equal(found, expected)
    for order in ("natural", "reverse", tuple(range(16))):
        assert "order" not in make(16, order=order, hidden=20).state_dict()


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"blocks": -1}, "blocks=-1"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"hidden": 3}, "4 different sets.*found hidden=3. Raise it to 4"),
        ({"order": (0, 1)}, "must name 5 variables, found 2"),
        ({"order": (0, 1, 2, 3, 3)}, r"every place 0 … 4 .*found \[0, 1, 2, 3, 3\]"),
        ({"order": "reverse", "adjacency": GRAPH}, "found both"),
        ({"adjacency": COUPLING}, "5 rows of 5 numbers"),
        ({"adjacency": ((0, 0, 2, 0, 0), *GRAPH[1:])}, "numbers 0 or 1"),
        (
            {"adjacency": (GRAPH[0], (0, 0, 0, 1, 0), GRAPH[2], (0, 1, 0, 0, 0), GRAPH[4])},
            "variable 1 depends on 3 depends on 1",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(5, **arguments)


def test_a_longer_cycle_is_named_without_what_leads_to_it():
    rows = [[0] * 5 for _ in range(5)]
    for i, j in ((0, 2), (2, 4), (4, 3), (3, 2), (1, 0)):
        rows[i][j] = 1
    with pytest.raises(ConfigError, match=r"variable 2 depends on 4 depends on 3 depends on 2\. Remove"):
        make(5, adjacency=tuple(map(tuple, rows)))


@pytest.mark.parametrize(("in_shape", "out_shape"), [((3, 2, 2), (6, 2, 2)), ((4,), (4, 2)), ((4,), (6,)), ((), (2,))])
def test_items_that_are_no_vectors_are_to_be_flattened(in_shape, out_shape):
    with pytest.raises(ConfigError, match="ut `flatten` before"):
        MADE(in_shape=in_shape, out_shape=out_shape, timed=False, num_classes=None, condition_shape=None)
    network = make(4)
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\].*\[B, 4\]"):
        network.sweep(None, randn(2, 3))
