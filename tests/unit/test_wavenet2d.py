"""The network of WaveFlow against its formula written out, its receptive field, its cached rows, and its parameters."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genmodels.networks.encoders import ConditionEncoder
from genmodels.networks.network import Modulation, Network
from genmodels.networks.weight_norm import Conv2d, fold_weight_norm
from genmodels.registry import ConfigError, build


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(shape=(1, 5, 9), out=2, bands=None, condition_shape=None, timed=False, num_classes=None, **arguments):
    """The network in float64, every parameter moved off its start."""
    condition_shape = (bands, *shape[1:]) if bands else condition_shape
    arguments = {"name": "wavenet2d", "channels": 4, "layers": 3, **arguments}
    sizes = {"num_classes": num_classes, "condition_shape": condition_shape}
    torch.manual_seed(0)
    network = build(Network, arguments, in_shape=shape, out_shape=(out, *shape[1:]), timed=timed, **sizes).double()
    with torch.no_grad():
        for k, p in enumerate(network.parameters()):
            p.add_(0.2 * randn(*p.shape, seed=k))
    return network


def told(network, gates=True, seed=50):
    """Modulation for every site, as a step of NanoFlow gives it."""
    return [
        Modulation(randn(s.bias, seed=seed + i), randn(s.gate, seed=seed + 90 + i) if gates and s.gate else None)
        for i, s in enumerate(network.sites)
    ]


# ---- the formula -----------------------------------------------------------------------------------------------------


def written_out(network, x, c, modulation):
    """One item [C, H, W] pixel by pixel in numpy: gates, residuals, skips, the head."""
    get = lambda t: t.detach().numpy()  # noqa: E731
    height, width = x.shape[1:]
    h = np.einsum("oc,chw->ohw", get(network.first.kernel())[..., 0, 0], x) + get(network.first.bias)[:, None, None]
    channels, total = network.width, 0.0
    for layer, site in zip(network.layers, modulation, strict=True):
        w, b = get(layer.gated.kernel()), get(layer.gated.bias)
        down, across = layer.dilation
        k = w.shape[-1]
        a = np.zeros((2 * channels, height, width))
        for i in range(height):
            for j in range(width):
                for p in range(k):
                    for q in range(k):
                        row, column = i - (k - 1 - p) * down, j + (q - k // 2) * across
                        if row >= 0 and 0 <= column < width:
                            a[:, i, j] += w[:, :, p, q] @ h[:, row, column]
        a += b[:, None, None] + get(site.bias)[:, None, None] if site.bias is not None else b[:, None, None]
        if c is not None:
            a += np.einsum("oc,chw->ohw", get(layer.condition.kernel())[..., 0, 0], c)
            a += get(layer.condition.bias)[:, None, None]
        y = np.tanh(a[:channels]) / (1 + np.exp(-a[channels:]))
        out = np.einsum("oc,chw->ohw", get(layer.out.kernel())[..., 0, 0], y) + get(layer.out.bias)[:, None, None]
        if len(out) == channels:
            total = total + out
            continue
        change, skip = out[:channels], out[channels:]
        total = total + skip
        gated = site.gate is not None
        h = h + change * (1 + get(site.gate))[:, None, None] if gated else (h + change) * np.sqrt(0.5)
    out = np.einsum("oc,chw->ohw", get(network.head.conv.weight)[..., 0, 0], total)
    return (out + get(network.head.conv.bias)[:, None, None]) * np.exp(3 * get(network.head.scale))


@pytest.mark.parametrize("modulated", ["no", "bias", "bias and gate"])
@pytest.mark.parametrize("arguments", [{}, {"kernel": 5, "layers": 2}, {"height_cycle": 2, "last_residual": True}])
def test_the_network_is_its_formula(arguments, modulated):
    network = make(bands=3, **arguments)
    x, c = randn(1, 5, 9), randn(3, 5, 9, seed=1)
    modulation = None if modulated == "no" else told(network, "gate" in modulated)
    out = network.finish(network.head, network.features(None, x[None], c[None], modulation))
    expected = written_out(network, x.numpy(), c.numpy(), modulation or [Modulation()] * len(network.layers))
    # sums of some hundred products of numbers of order 1, in another order
    np.testing.assert_allclose(out[0].detach().numpy(), expected, rtol=0, atol=1e-12)


def reach(network, shape):
    """[H, W, H, W] whether an output pixel depends on an input pixel."""
    f = lambda x: network(None, x[None])[0].sum(0)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(f, randn(*shape))
    return jacobian.abs().sum(2) > 0


@pytest.mark.parametrize(
    ("arguments", "above", "beside"),
    [
        ({"layers": 1}, 2, 1),
        ({"layers": 3}, 6, 7),  # 2 rows a layer; 1 + 2 + 4 columns
        ({"layers": 2, "kernel": 5}, 8, 6),
        ({"layers": 3, "height_cycle": 2}, 8, 7),  # 2 (1 + 2 + 1) rows
        ({"layers": 2, "kernel": 1}, 0, 0),
    ],
)
def test_the_receptive_field_is_causal_in_rows_and_centred_in_columns(arguments, above, beside):
    shape = (1, 11, 17)
    seen = reach(make(shape, **arguments), shape)
    rows, columns = torch.arange(11), torch.arange(17)
    down = rows[:, None] - rows[None]
    across = (columns[:, None] - columns[None]).abs()
    field = ((down >= 0) & (down <= above))[:, None, :, None] & (across <= beside)[None, :, None, :]
    assert torch.equal(seen & ~field, torch.zeros_like(seen)), "nothing outside"
    # with dilations there may be holes, but the corners of the field are reached
    for i in (above, 10):
        assert seen[i, 8, i - above, 8 - beside] and seen[i, 8, i - above, 8 + beside] and seen[i, 8, i, 8]


def test_the_paper_sees_the_whole_signal_above():
    """8 layers of kernel 3: 255 columns on either side, 16 rows above, of which a fold of 16 rows has 15."""
    shape = (1, 18, 601)
    network = make(shape, channels=1, layers=8)
    x = randn(1, *shape).requires_grad_()
    network(None, x)[0, :, 17, 300].sum().backward()
    rows, columns = x.grad[0, 0].nonzero().unbind(1)
    assert (rows.min(), columns.min(), columns.max()) == (17 - 16, 300 - 255, 300 + 255)


# ---- rows ------------------------------------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"kernel": 5},
    {"kernel": 1},
    {"height_cycle": 3},
    {"height_cycle": 2, "kernel": 5, "weight_norm": False},
    {"last_residual": True},
]


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 7, 6), (3, 20, 5)])
def test_cached_rows_are_those_of_the_whole(arguments, modulated, shape):
    network = make(shape, bands=2, **arguments)
    x, c = randn(3, *shape), randn(3, 2, *shape[1:], seed=1)
    modulation, head = (told(network), network.new_head().double()) if modulated else (None, network.head)
    whole = network.finish(head, network.features(None, x, c, modulation))
    rows = network.rows(c, x, modulation, head) if modulated else network.rows(c, x)
    parts = torch.cat([rows(row) for row in x.split(1, 2)], 2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [{"num_classes": 3}, {"condition_shape": (4,)}, {"bands": 2}])
def test_cached_rows_know_every_kind_of_condition(sizes):
    network, x = make(**sizes), randn(2, 1, 5, 9)
    c = randn(2, *sizes["condition_shape"]) if "condition_shape" in sizes else randn(2, 2, 5, 9)
    c = torch.tensor([0, 2]) if "num_classes" in sizes else c
    for given in (c, None):
        rows = network.rows(given, x)
        torch.testing.assert_close(torch.cat([rows(r) for r in x.split(1, 2)], 2), network(None, x, given))
    assert not torch.allclose(network(None, x, c), network(None, x, None), atol=1e-6)


def test_all_rows_cost_as_much_arithmetic_as_one_call():
    network, x = make((1, 16, 12), bands=3, channels=8), randn(2, 1, 16, 12)
    c = randn(2, 3, 16, 12)

    def flops(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    def by_rows():
        rows = network.rows(c, x)
        return [rows(row) for row in x.split(1, 2)]

    assert flops(by_rows) == flops(lambda: network(None, x, c)) > 0


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_weight_normalisation_is_gain_times_direction():
    torch.manual_seed(0)
    conv = Conv2d(3, 5, 3).double()
    torch.testing.assert_close(conv.kernel(), conv.weight)  # the gain starts at the norms
    kernel = conv.kernel().detach().clone()
    with torch.no_grad():
        conv.weight.mul_(torch.arange(1, 6)[:, None, None, None])
    torch.testing.assert_close(conv.kernel(), kernel)
    with torch.no_grad():
        conv.gain.fill_(2.0)
    torch.testing.assert_close(conv.kernel().flatten(1).norm(dim=1), torch.full((5,), 2.0, dtype=torch.float64))
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 5, 3).double())
    reference.parametrizations.weight.original0.data.copy_(conv.gain.data)
    reference.parametrizations.weight.original1.data.copy_(conv.weight.data)
    torch.testing.assert_close(reference.weight, conv.kernel())


def test_folding_keeps_the_function_and_fits_a_plain_network():
    network, x, c = make(bands=3), randn(2, 1, 5, 9), randn(2, 3, 5, 9)
    before = network(None, x, c)
    plain = make(bands=3, weight_norm=False)
    fold_weight_norm(network)
    torch.testing.assert_close(network(None, x, c), before, rtol=0, atol=1e-12)
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(plain(None, x, c), before, rtol=0, atol=1e-12)


def test_the_start_is_that_of_the_paper():
    torch.manual_seed(0)
    sizes = {"in_shape": (1, 16, 50), "out_shape": (2, 16, 50), "timed": False, "num_classes": None}
    network = build(Network, {"name": "wavenet2d"}, **sizes, condition_shape=(80, 16, 50))
    head = network.head
    for p in (head.conv.weight, head.conv.bias):
        assert 0 < p.abs().max() <= 1e-3
    assert head.scale.abs().max() == 0
    for layer in network.layers:  # Kaiming: variance 2/fan-in; 4000 numbers or more, so 10 % is 4.5 deviations
        for conv, fan in ((layer.gated, 64 * 9), (layer.condition, 80), (layer.out, 64)):
            assert conv.kernel().var().item() == pytest.approx(2 / fan, rel=0.1)


def test_no_parameter_is_dead_unless_asked_for():
    network, x, c = make(bands=3), randn(2, 1, 5, 9), randn(2, 3, 5, 9)
    network(None, x, c).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())
    assert network.layers[-1].out.out_channels == network.width and network.sites[-1].gate == 0
    published = make(bands=3, last_residual=True)
    assert published.layers[-1].out.out_channels == 2 * network.width and published.sites[-1].gate == network.width
    published(None, x, c).square().sum().backward()
    assert published.layers[-1].out.weight.grad[: network.width].abs().max() == 0


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": 2}, "odd kernel"),
        ({"layers": 0}, "at least 1"),
        ({"channels": 0}, "at least 1"),
        ({"height_cycle": 0}, "at least 1"),
        ({"shape": (4, 3)}, "images"),
    ],
)
def test_impossible_networks_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        make(**change)


def test_a_map_of_another_shape_is_refused():
    network, x = make(bands=3), randn(2, 1, 5, 9)
    for wrong in (randn(2, 4, 5, 9), randn(2, 3, 5, 8), randn(2, 3, 9, 5)):
        with pytest.raises(ValueError, match=r"built for \[B, 3, 5, 9\]"):
            network(None, x, wrong)
        with pytest.raises(ValueError, match=r"built for \[B, 3, 5, 9\]"):
            network.rows(wrong, x)


# ---- spectrograms ----------------------------------------------------------------------------------------------------


def upsampler(length, mel, **arguments):
    torch.manual_seed(0)
    node = {"name": "mel_upsampler", **arguments}
    return build(ConditionEncoder, node, shape=(length,), num_classes=None, condition_shape=mel).double()


def spread(c, kernel, bias, stride, slope):
    """The transposed convolution of [bands, frames] written as a sum of shifted kernels, and the rectifier."""
    bands, frames = c.shape
    out = np.zeros((bands + 2, (frames - 1) * stride + kernel.shape[1]))
    for b in range(bands):
        for f in range(frames):
            out[b : b + 3, f * stride : f * stride + kernel.shape[1]] += c[b, f] * kernel
    side = stride // 2
    out = out[1:-1, side : out.shape[1] - side] + bias
    return np.where(out > 0, out, slope * out)


@pytest.mark.parametrize(("strides", "length"), [((4, 2), 23), ((3,), 9), ((2, 2, 2), 24)])
def test_upsampling_is_a_sum_of_shifted_kernels(strides, length):
    frames = -(-length // int(np.prod(strides)))
    encoder = upsampler(length, (5, frames), strides=strides, slope=0.3)
    mel = randn(2, 5, frames)
    assert encoder.out_shape == (5, length)
    out = encoder(mel)
    for item, c in zip(out, mel.numpy(), strict=True):
        for layer, stride in zip(encoder.layers, strides, strict=True):
            c = spread(c, layer.kernel()[0, 0].detach().numpy(), layer.bias.item(), stride, 0.3)
        np.testing.assert_allclose(item.detach().numpy(), c[:, :length], rtol=0, atol=1e-12)


def test_the_published_upsampler_has_194_parameters():
    encoder = upsampler(16000, (80, 63), weight_norm=False)
    assert sum(p.numel() for p in encoder.parameters()) == 194
    assert encoder(randn(1, 80, 63)).shape == (1, 80, 16000)


def test_spectrograms_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"62 frames of 256 samples .* 15872 samples, too few for items of 16000"):
        upsampler(16000, (80, 62))
    with pytest.raises(ConfigError, match="conditions of shape none"):
        upsampler(16000, None)
    with pytest.raises(ConfigError, match=r"\[bands, frames\] are needed"):
        upsampler(16000, (80,))
    with pytest.raises(ConfigError, match="stride"):
        upsampler(16, (2, 2), strides=(0,))
    encoder = upsampler(8, (5, 2), strides=(4,))
    for wrong in (randn(2, 4, 2), randn(2, 5, 3), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"\[B, 5, 2\] are needed"):
            encoder(wrong)
