"""What is special about the U-Net: where it starts, what it refuses, and its place in a coupling."""

import pytest
import torch
from torch import Tensor

from genmodels.flows.bijection import Bijection
from genmodels.networks.unet import Attention, Residual, Step, UNet
from genmodels.registry import ConfigError, build
from tests.contracts.test_network import LABELS, TIMES, make, randn

IMAGE = (3, 8, 12)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((3, 28, 28), {"multipliers": (1, 2, 2, 2)},
         r"halve the image 3 times, but 28x28 is not divisible by 8\. Use at most 3 multipliers .* multiples of 8\."),
        ((3, 8, 9), {"multipliers": (1, 2)}, "Use at most 1 multiplier for images of this size"),
        ((3, 8, 12), {"attention": (16,)}, "no level has the resolution 16; those of this network are 12, 6"),
        ((3, 8, 12), {"heads": 3}, "heads: a divisor of the 16 channels at attention is needed, found 3"),
        ((3, 8, 12), {"head_channels": 5}, "head_channels: a divisor of the 16 channels"),
        ((3, 8, 12), {"blocks": 0, "dropout": 1.0}, r"blocks=0, multipliers=\[1, 2\], dropout=1\.0"),
        ((3, 8, 12), {"multipliers": ()}, r"multipliers=\[\]"),
        ((12,), {}, "Use mlp or residual_mlp"),
    ],
)  # fmt: skip
def test_impossible_networks_are_refused(shape, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make("unet", shape, **arguments)


def test_the_deepest_network_that_a_message_proposes_can_be_built():
    for side, levels in ((28, 3), (12, 3), (8, 4), (7, 1)):
        multipliers = (1,) * levels
        assert make("unet", (1, side, side), multipliers=multipliers, num_classes=None).in_shape == (1, side, side)
        with pytest.raises(ConfigError, match=f"Use at most {levels} multiplier"):
            make("unet", (1, side, side), multipliers=(1,) * 5)


@pytest.mark.parametrize("resample", ["block", "convolution"])
def test_it_starts_at_zero_and_its_blocks_at_their_inputs(resample):
    fresh, x = make("unet", moved=False, resample=resample, attention=(12,)), randn(5, *IMAGE)
    assert torch.equal(fresh(TIMES, x, LABELS), torch.zeros_like(x))
    h, e = randn(2, 16, 4, 6), randn(2, 32, seed=1)
    assert torch.equal(fresh.middle[0](h, e), h)
    assert all(not p.any() for m in fresh.modules() if isinstance(m, Residual) for p in m.second.parameters())
    assert all(not p.any() for m in fresh.modules() if isinstance(m, Attention) for p in m.merge.parameters())


def test_attention_acts_where_it_is_asked_for_and_at_the_bottom():
    def attending(**arguments: object) -> list[list[bool]]:
        network = make("unet", (3, 8, 8), blocks=2, multipliers=(1, 1, 1), **arguments)
        ways = (network.down, network.middle, network.up)
        return [[s.attention is not None for s in way if isinstance(s, Step)] for way in ways]

    assert attending() == [[False] * 6, [True, False], [False] * 9]
    assert attending(attention=(4,)) == [
        [False, False, True, True, False, False],
        [True, False],
        [False] * 3 + [True] * 3 + [False] * 3,
    ]
    assert make("unet", (3, 8, 8), heads=2, head_channels=8).middle[0].attention.heads == 2  # 16 channels of 8


def test_dropout_acts_in_training_alone():
    network, x = make("unet", dropout=0.5), randn(5, *IMAGE)
    assert torch.equal(network(TIMES, x, LABELS), network(TIMES, x, LABELS))
    network.train()
    assert not torch.equal(network(TIMES, x, LABELS), network(TIMES, x, LABELS))


def test_skip_scale_halves_the_variance_that_blocks_add():
    """Blocks at their start pass their input on: scaled, it is divided by √2 in each, three times in all."""
    plain, scaled = (make("unet", moved=False, multipliers=(1,), skip_scale=s) for s in (False, True))
    h, e = randn(2, 8, 8, 12), randn(2, 32, seed=1)
    for step in (plain.down[0], plain.middle[0], scaled.down[0], scaled.middle[0]):
        h = step(h, e)
    torch.testing.assert_close(h, randn(2, 8, 8, 12) / 2**1.5, rtol=1e-12, atol=0)


def test_every_level_sees_the_whole_image():
    """One pixel changes the output at the far corner: through the bottom level, beyond convolutions."""
    network, x = make("unet", (1, 16, 16), multipliers=(1, 1, 1), num_classes=None), randn(1, 1, 16, 16)
    other = x.clone()
    other[0, 0, 0, 0] += 1

    def change(net: UNet) -> Tensor:
        return (net(TIMES[0], other) - net(TIMES[0], x))[0, 0, -1, -1].abs()

    assert change(network) > 1e-6


@pytest.mark.parametrize("map", ["rational_quadratic", "affine"])
def test_it_conditions_a_coupling_that_starts_as_it_should(map):
    network = {"name": "unet", "channels": 8, "multipliers": [1, 2], "blocks": 1, "heads": 2}
    node = {"name": "coupling", "map": map, "network": network}
    layer = build(Bijection, node, shape=(5, 4, 8), num_classes=None, condition_shape=None).double()
    x = randn(3, 5, 4, 8)
    z, log_det = layer(x)
    if map == "rational_quadratic":
        assert layer.network.out_shape == (23 * 3, 4, 8) and layer.scale == 8**-0.5
        torch.testing.assert_close(z, x, rtol=0, atol=1e-6)
    with torch.no_grad():
        for k, p in enumerate(layer.parameters()):
            p.add_(0.1 * randn(*p.shape, seed=k))
    z, log_det = layer(x)
    back, inverse_log_det = layer.inverse(z)
    assert (z - x).abs().max() > 1e-2
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)
