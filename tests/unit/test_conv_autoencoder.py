"""Convolutional encoders and decoders: equal to ones written out, sizes that meet again, and what sees what."""

import pytest
import torch
import torch.nn.functional as F

from genmodels.networks.network import Network
from genmodels.registry import ConfigError, build

IMAGES = [(1, 28, 28), (1, 8, 8), (3, 32, 32), (2, 7, 5), (1, 3, 1), (1, 1, 1)]


def network(name, in_shape, out_shape, num_classes=None, **more):
    torch.manual_seed(0)
    conditions = {"timed": False, "num_classes": num_classes, "condition_shape": None}
    node = {"name": name, "width": 4, **more}
    return build(Network, node, in_shape=in_shape, out_shape=out_shape, **conditions).double().eval()


def items(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gate(block, e):
    return 1 if block.gate is None else 1 / (1 + (-(e @ block.gate.weight.T + block.gate.bias)).exp())[..., None, None]


def strided(h, conv):
    """The convolution at every place, of which every second one is kept."""
    return F.conv2d(h, conv.weight, conv.bias, padding=1)[..., ::2, ::2]


def spread(h, conv, size):
    """Zeros between the pixels, then a plain convolution with the kernel turned round and its channels swapped."""
    wide = h.new_zeros(*h.shape[:2], *size)
    wide[..., ::2, ::2] = h
    return F.conv2d(wide, conv.weight.transpose(0, 1).flip(2, 3), conv.bias, padding=1)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_encoder_equals_one_written_out(num_classes):
    f = network("conv_encoder", (2, 7, 5), (6,), num_classes, halvings=2, blocks=1)
    x, labels = items(4, 2, 7, 5), torch.tensor([0, 2, 1, 3]) if num_classes else None
    e = f.embeddings.condition.table(labels) if num_classes else None
    h = torch.einsum("ij,bjhw->bihw", f.first.weight[..., 0, 0], x) + f.first.bias[:, None, None]
    h = h if e is None else h + e[..., None, None]
    for k, block in enumerate(f.blocks):
        inner = F.conv2d(h.clamp(min=0), block.first.weight, block.first.bias, padding=1).clamp(min=0)
        if k % 2 == 0:
            h = h + gate(block, e) * F.conv2d(inner, block.second.weight, block.second.bias, padding=1)
        else:
            h = strided(h, block.shortcut) + gate(block, e) * strided(inner, block.second)
    assert len(f.blocks) == 4 and h.shape == (4, 16, 2, 2)
    expected = h.clamp(min=0).reshape(4, 64) @ f.head.weight.T + f.head.bias
    torch.testing.assert_close(f(None, x, labels), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_decoder_equals_one_written_out(num_classes):
    f = network("conv_decoder", (6,), (2, 7, 6), num_classes, halvings=2, blocks=1)
    z, labels = items(4, 6), torch.tensor([0, 2, 1, 3]) if num_classes else None
    e = f.embeddings.condition.table(labels) if num_classes else None
    h = (z @ f.first.weight.T + f.first.bias).reshape(4, 16, 2, 2)
    h = h if e is None else h + (e @ f.enter.weight.T)[..., None, None]
    for k, block in enumerate(f.blocks):
        inner = F.conv2d(h.clamp(min=0), block.first.weight, block.first.bias, padding=1).clamp(min=0)
        if k % 2 == 0:
            h = h + gate(block, e) * F.conv2d(inner, block.second.weight, block.second.bias, padding=1)
        else:
            size = [(4, 3), (7, 6)][k // 2]
            h = spread(h, block.shortcut, size) + gate(block, e) * spread(inner, block.second, size)
    expected = torch.einsum("ij,bjhw->bihw", f.head.weight[..., 0, 0], h.clamp(min=0)) + f.head.bias[:, None, None]
    torch.testing.assert_close(f(None, z, labels), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", IMAGES)
def test_every_pixel_steers_the_vector_and_every_number_of_a_vector_every_pixel(shape):
    encoder, decoder = network("conv_encoder", shape, (3,), width=8), network("conv_decoder", (3,), shape, width=8)
    assert encoder.sizes == decoder.sizes and encoder.coarsest == decoder.coarsest
    x, z = items(1, *shape), items(1, 3)
    code = torch.func.jacrev(lambda v: encoder(None, v)[0])(x)
    assert code.shape == (3, 1, *shape) and (code != 0).all()
    change = decoder(None, z + 0.1 * torch.eye(3).double()) - decoder(None, z)
    assert change.shape == (3, *shape) and (change != 0).all()


def test_sizes_are_halved_upwards_until_one_pixel_is_left():
    assert network("conv_encoder", (1, 28, 28), (3,)).sizes == [(28, 28), (14, 14), (7, 7), (4, 4)]
    assert network("conv_encoder", (1, 5, 1), (3,), halvings=9).sizes == [(5, 1), (3, 1), (2, 1), (1, 1)]
    assert network("conv_decoder", (3,), (1, 32, 32), halvings=2).coarsest == (16, 8, 8)


def count(width, blocks, outward):
    """Weights and biases of the levels of three halvings: 3x3 within a level, and two ways out of it."""
    total = 0
    for c in (width, 2 * width, 4 * width):
        here, out = (c, 2 * c) if not outward else (2 * c, c)
        total += blocks * 2 * (9 * here**2 + here) + (9 * here**2 + here) + 2 * (9 * here * out + out)
    return total


@pytest.mark.parametrize(("width", "blocks"), [(16, 1), (4, 2)])
def test_numbers_of_parameters_by_hand(width, blocks):
    ends = width * 8 * 4 * 4  # what the coarsest level of 28x28 holds
    encoder = network("conv_encoder", (1, 28, 28), (64,), width=width, blocks=blocks)
    decoder = network("conv_decoder", (32,), (1, 28, 28), width=width, blocks=blocks)
    numbers = [sum(p.numel() for p in f.parameters()) for f in (encoder, decoder)]
    assert numbers[0] == 2 * width + count(width, blocks, outward=False) + (ends + 1) * 64
    assert numbers[1] == (32 + 1) * ends + count(width, blocks, outward=True) + width + 1


def test_an_autoencoder_learns_images_through_a_few_numbers():
    """Bars at one of eight places, through two numbers: below the code length of pixels by themselves.

    A pixel is on in one of eight bars: log 8 - 7/8 log 7 = 0.377 nats, which a decoder that hears nothing stays at.
    """
    x = torch.eye(8)[:, None, None, :].expand(8, 1, 8, 8).contiguous()
    encoder = network("conv_encoder", (1, 8, 8), (2,), width=8).float()
    decoder = network("conv_decoder", (2,), (1, 8, 8), width=8).float()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(decoder(None, encoder(None, x)), x)
        loss.backward()
        optimizer.step()
    assert loss < 0.25


def test_dropout_acts_in_training_alone():
    f, x = network("conv_encoder", (1, 8, 8), (3,), dropout=0.5), items(2, 1, 8, 8)
    assert torch.equal(f(None, x), f(None, x))
    assert not torch.equal(f.train()(None, x), f(None, x))


@pytest.mark.parametrize("name", ["conv_encoder", "conv_decoder"])
@pytest.mark.parametrize(
    ("image", "more", "message"),
    [
        ((64,), {}, r"images \[C, H, W\] are needed on one side, found items of shape \[64\]. Use mlp"),
        ((1, 8, 8), {"width": 0}, "width >= 1"),
        ((1, 8, 8), {"halvings": -1}, "found width=4, halvings=-1"),
        ((1, 8, 8), {"blocks": -1}, "blocks >= 0"),
        ((1, 8, 8), {"dropout": 1.0}, "0 <= dropout < 1"),
    ],
)
def test_impossible_networks_are_refused(name, image, more, message):
    shapes = (image, (3,)) if name == "conv_encoder" else ((3,), image)
    with pytest.raises(ConfigError, match=message):
        network(name, *shapes, **more)
