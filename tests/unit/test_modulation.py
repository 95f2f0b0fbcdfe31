"""Networks that can be told which of several steps they serve: what biases and gates do, and new last layers."""

import torch
from torch import nn

from genmodels.networks.network import Modulation
from tests.unit.test_shared import RESIDUAL, TRUNKS, every, move, network, randn


@every
def test_zeros_modulate_nothing_and_leave_no_trace(name):
    node, shape = TRUNKS[name]
    g, x = move(network(node, shape)), randn(5, *shape)
    zeros = [Modulation(torch.zeros(s.bias).double(), torch.zeros(s.gate).double()) for s in g.sites]
    plain = g.features(None, x)
    for given in (zeros, [Modulation()] * len(zeros)):
        assert torch.equal(g.features(None, x, None, given), plain)
    assert torch.equal(g.finish(g.head, plain), g(None, x))


@every
def test_each_bias_and_gate_counts_and_gates_multiply_the_branch(name):
    node, shape = TRUNKS[name]
    g, x = move(network(node, shape)), randn(5, *shape)
    told = [Modulation(randn(s.bias, seed=1), randn(s.gate, seed=2)) for s in g.sites]
    whole = g.features(None, x, None, told)
    for i in range(len(told)):
        for one in (told[i]._replace(bias=None), told[i]._replace(gate=None)):
            other = g.features(None, x, None, [*told[:i], one, *told[i + 1 :]])
            assert (other - whole).abs().amax() > 1e-3
    closed = g.features(None, x, None, [Modulation(None, -torch.ones(s.gate).double()) for s in g.sites])
    # 1 + γ = 0: no branch is left, which of a residual network leaves what enters the first block
    assert torch.equal(closed, torch.zeros_like(closed) if name == "mlp" else g.first(x))


def test_modulated_residual_blocks_written_out():
    g, x = move(network(RESIDUAL, (3,))), randn(5, 3)
    told = [Modulation(randn(12, seed=i), randn(12, seed=9 + i)) for i in range(2)]
    h = g.first(x)
    for block, (bias, gate) in zip(g.blocks, told, strict=True):
        change = nn.functional.silu(nn.functional.silu(h) @ block.first.weight.T + block.first.bias + bias)
        h = h + (change @ block.second.weight.T + block.second.bias) * (1 + gate)
    torch.testing.assert_close(g.features(None, x, None, told), h, rtol=0, atol=1e-12)


@every
def test_a_new_head_starts_as_the_first_one(name):
    node, shape = TRUNKS[name]
    assert all((p == 0).all() for p in network({**node, "zero_init": True}, shape).new_head().parameters())
    g = network(node, shape)
    first, other = g.head.weight, g.new_head().weight
    assert other.shape == first.shape and other.abs().max() > 0 and not torch.equal(other.double(), first)
