"""Our packets against PyWavelets in periodization mode, which decimates at the other phase."""

import numpy as np
import pytest
import torch

from genmodels.wavelet.filter_bank import Packets
from genmodels.wavelet.filters import LOW_PASS, low_pass

pywt = pytest.importorskip("pywt")

POLISHED = 1e-11  # the published tables of long symlets have 12 digits; ours are exact


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(name):
    """PyWavelets' wavelet with our filter, which is its own but for the last digits of its table."""
    h = low_pass(name, 8)
    assert np.abs(h.numpy() - pywt.Wavelet(name).rec_lo).max() < POLISHED
    high = [(-1) ** k * value for k, value in enumerate(h.flip(0).tolist())]
    wavelet = pywt.Wavelet(name, filter_bank=[h.flip(0).tolist(), high[::-1], h.tolist(), high])
    signs = np.sign(np.dot(high, pywt.Wavelet(name).rec_hi))
    assert np.abs(signs * np.array(high) - pywt.Wavelet(name).rec_hi).max() < POLISHED
    return wavelet


@pytest.mark.parametrize("name", LOW_PASS)
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 2)])
def test_one_octave_is_dwt2_of_the_field_rolled_by_half_a_filter(name, size):
    """bank(x rolled by K/2 - 1) = [[cA, cV], [cH, cD]]: cH is high along axis 0, cV along axis 1."""
    x, shift = draw(3, *size), len(low_pass(name, 8)) // 2 - 1
    c = Packets(size, name, 1)(x.roll((shift, shift), (1, 2))).numpy()
    low, (rows, columns, both) = pywt.dwt2(x.numpy(), exact(name), mode="periodization", axes=(1, 2))
    theirs = np.block([[low, columns], [rows, both]])
    np.testing.assert_allclose(c, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["haar", "db2", "db4", "sym4"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_packets_are_those_of_wavelet_packet_2d_in_order_of_frequency(name, depth):
    """Tile by tile; a phase of K/2 - 1 at every depth is (2^M - 1)(K/2 - 1) of the field."""
    size, shift = (32, 16), len(low_pass(name, 8)) // 2 - 1
    x, moved = draw(*size), (2**depth - 1) * shift
    tree = pywt.WaveletPacket2D(x.numpy(), exact(name), mode="periodization", maxlevel=depth)
    theirs = tree.get_level(depth, order="freq")
    ours = Packets(size, name, depth)(x.roll((moved, moved), (0, 1)))
    height, width = (n >> depth for n in size)
    for p, row in enumerate(theirs):
        for r, node in enumerate(row):
            tile = ours[p * height : (p + 1) * height, r * width : (r + 1) * width].numpy()
            np.testing.assert_allclose(tile, node.data, rtol=0, atol=1e-13, err_msg=f"{p}, {r}")
