"""Filters, packets and trees: exact orthogonality at every size, numbers known beforehand, order of frequencies."""

import math

import pytest
import torch

from genmodels.registry import ConfigError
from genmodels.wavelet.filter_bank import Packets, analysis, split_matrix
from genmodels.wavelet.filters import LOW_PASS, WAVELETS, low_pass
from genmodels.wavelet.tree import Tree

SIZES = {1: [2, 4, 6, 12, 20], 2: [4, 12, 20], 3: [8, 24]}  # of axes, by depth
VANISHING = {n: (1 if n == "haar" else int("".join(filter(str.isdigit, n)))) for n in LOW_PASS}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def taps(name):
    """The low-pass filter in float64, and its mirror (-1)^k h[K-1-k]."""
    h = low_pass(name, 8)
    return h, h.flip(0) * (-1.0) ** torch.arange(len(h))


# ---- filters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOW_PASS)
def test_filters_are_orthonormal_to_their_double_shifts(name):
    h, _ = taps(name)
    products = [float(math.fsum((h[2 * n :] * h[: len(h) - 2 * n]).tolist())) for n in range(len(h) // 2)]
    assert abs(products[0] - 1) < 1e-15 and all(abs(p) < 1e-15 for p in products[1:])
    assert abs(math.fsum(h.tolist()) - math.sqrt(2)) < 1e-15


@pytest.mark.parametrize("name", LOW_PASS)
def test_high_pass_filters_have_their_vanishing_moments(name):
    """Σ k^p g[k] = 0 for p < N: rounding of N digits is all that is left; the moment N does not vanish."""
    h, g = taps(name)
    assert len(h) == 2 * VANISHING[name]
    place = (torch.arange(len(g)) - (len(g) - 1) / 2).double() / len(g)  # about the middle, of order 1
    moments = [abs(math.fsum((place**p * g).tolist())) for p in range(VANISHING[name] + 1)]
    assert max(moments[:-1]) < 4e-16
    assert moments[-1] > 1e6 * max(moments[:-1])


@pytest.mark.parametrize("name", [n for n in LOW_PASS if n != "haar"])
def test_filters_solve_daubechies_equation(name):
    """|H(ω)|² = 2 cos^{2N}(ω/2) Σ_{k<N} C(N-1+k, k) sin^{2k}(ω/2): the one half-band filter of its length."""
    h, _ = taps(name)
    order, omega = VANISHING[name], torch.linspace(0, math.pi, 33, dtype=torch.float64)
    response = (h * torch.exp(-1j * omega[:, None] * torch.arange(len(h)))).sum(1).abs().square()
    y = torch.sin(omega / 2).square()
    expected = 2 * (1 - y) ** order * sum(math.comb(order - 1 + k, k) * y**k for k in range(order))
    torch.testing.assert_close(response, expected, rtol=0, atol=3e-15)


def test_daubechies_filters_have_least_phase_and_symlets_nearly_linear_phase():
    """Energy of db comes first of all filters of one response; that of sym sits in the middle."""
    for name in LOW_PASS:
        h = taps(name)[0]
        centre = float((h.square() * torch.arange(len(h))).sum()) / (len(h) - 1)
        assert (centre < 0.4) == (name.startswith("db") and name != "db1")
        if name.startswith("sym"):
            assert abs(centre - 0.5) < 0.1


# ---- one matrix an axis --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAVELETS)
def test_packets_are_orthogonal_at_every_size_and_depth(name):
    for depth, sizes in SIZES.items():
        for size in sizes:
            a = analysis(size, name, depth)
            assert float((a @ a.T - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-14, (depth, size)


@pytest.mark.parametrize("name", WAVELETS)
@pytest.mark.parametrize(("size", "depth"), [((2, 6), 1), ((12, 20), 2), ((8, 24), 3), ((3, 5), 0)])
def test_fields_are_reconstructed_and_keep_their_energy(name, size, depth):
    packets, x = Packets(size, name, depth), draw(3, *size)
    c = packets(x)
    assert float((packets.inverse(c) - x).abs().max()) < 1e-12
    torch.testing.assert_close(c.square().sum((1, 2)), x.square().sum((1, 2)), rtol=1e-13, atol=0)
    narrow = packets.inverse(packets(x.float()))
    assert narrow.dtype == torch.float32 and float((narrow - x).abs().max()) < 2e-6
    torch.testing.assert_close(packets(x.float()), c.float(), rtol=0, atol=2e-6)


def test_rows_are_the_filters_wrapped_round():
    h, g = taps("db4")
    a = split_matrix(6, "db4")  # shorter than the filter
    for n in range(3):
        for row, f in ((a[n], h), (a[3 + n], g)):
            expected = torch.zeros(6, dtype=torch.float64)
            for k, value in enumerate(f):
                expected[(2 * n + k) % 6] += value
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-16)


def test_band_energies_of_a_field_known_beforehand():
    i = torch.arange(8, dtype=torch.float64)
    x = torch.sin(2 * math.pi * i / 8)[:, None] + 0.5 * torch.cos(4 * math.pi * i / 8)
    c = Packets((8, 8), "db4", 1)(x)
    (low, high_columns), (high_rows, high) = ((half[:, :4], half[:, 4:]) for half in (c[:4], c[4:]))
    energies = [float(part.square().sum()) for part in (low, high_columns, high_rows, high)]
    assert energies == pytest.approx([34.724113068, 4.9206244657, 0.3552624662, 0.0], abs=1e-9)
    assert sum(energies) == pytest.approx(40, abs=1e-12)
    found = float(low[0, 0]), float(high_columns[1, 2]), float(high_rows[0, 1])
    assert found == pytest.approx((1.0736116189, -0.5545620156, 0.0480809667), abs=1e-9)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["haar", "db4", "sym8", "shannon"])
def test_bands_are_in_order_of_frequency(name, depth):
    """The centroid of Σ_rows |FFT|² of band p lies in [p, p + 1] π/2^depth; ideal bands have no power beyond."""
    size, bands = 64, 2**depth
    power = torch.fft.rfft(analysis(size, name, depth)).abs().square().unflatten(0, (bands, -1)).sum(1)
    power[:, 1:-1] *= 2
    place = torch.arange(size // 2 + 1) * (2.0 / size) * bands  # in bands
    centroids = (power * place).sum(1) / power.sum(1)
    assert (centroids.diff() > 0).all()
    if name == "shannon":
        p = torch.arange(bands)[:, None]
        assert float((power * ((place < p) | (place > p + 1))).max()) < 1e-25
    if name != "haar":
        assert (centroids.floor() == torch.arange(bands)).all()


def test_the_ideal_filter_is_a_sinc_on_a_circle():
    """Rows of Shannon's low-pass half reproduce every wave below a quarter of the sampling rate."""
    i = torch.arange(16, dtype=torch.float64)
    a = split_matrix(16, "shannon")
    for k in range(4):
        wave = torch.cos(2 * math.pi * k * i / 16 + 0.3)
        assert float((a[8:] @ wave).abs().max()) < 1e-14
        torch.testing.assert_close(a[:8].T @ (a[:8] @ wave), wave, rtol=0, atol=1e-14)


def test_packets_are_differentiable():
    packets, x = Packets((4, 8), "db3", 2), draw(2, 4, 8).requires_grad_()
    assert torch.autograd.gradcheck(packets, (x,)) and torch.autograd.gradcheck(packets.inverse, (x,))


def test_matrices_stay_float64_wherever_a_model_goes():
    tree = Tree((8, 8), "db4")
    matrix, low = tree.levels[-1].packets.rows.clone(), tree.low_8.clone()
    moved = tree.float().to(torch.bfloat16).double()
    assert torch.equal(moved.levels[-1].packets.rows, matrix) and torch.equal(moved.low_8, low)
    assert matrix.dtype == torch.float64
    elsewhere = Tree((8, 8), "db4").float().to("meta")
    assert elsewhere.levels[-1].packets.rows.device.type == elsewhere.low_8.device.type == "meta"
    assert elsewhere.levels[-1].packets.rows.dtype == elsewhere.low_8.dtype == torch.float64
    assert not tree.state_dict()  # known from the constructor's arguments


# ---- trees ---------------------------------------------------------------------------------------------------------

TREES = [((8, 8), None, 1), ((16, 8), 2, (2, 1)), ((16, 16), None, 3), ((12, 20), 1, 2), ((6, 4), 0, 1)]


@pytest.mark.parametrize(("size", "octaves", "subdivisions"), TREES)
@pytest.mark.parametrize("name", ["haar", "db4", "shannon"])
def test_a_field_is_rebuilt_level_by_level(name, size, octaves, subdivisions):
    tree, x = Tree(size, name, octaves, subdivisions), draw(3, *size)
    fields = tree.decompose(x)
    assert torch.equal(fields[-1], x)
    y, energy = None, 0
    for k, (level, field) in enumerate(zip(tree.levels, fields, strict=True)):
        base = tree.base(k, y, len(x), x)
        torch.testing.assert_close(base, tree.given(k, field), rtol=0, atol=1e-12)
        z = level.detail(field)
        assert float(level.detail(base).abs().max()) < 1e-12
        y, energy = base + level.synthesize(z), energy + z.square().sum(1)
        torch.testing.assert_close(y, field, rtol=0, atol=1e-12)
        torch.testing.assert_close(y.square().sum((1, 2)), energy, rtol=1e-12, atol=0)  # level by level
    assert sum(level.dim for level in tree.levels) == size[0] * size[1]


@pytest.mark.parametrize(("size", "octaves", "subdivisions"), TREES)
def test_rings_part_the_bands_of_an_octave(size, octaves, subdivisions):
    tree = Tree(size, "db4", octaves, subdivisions)
    by_grid = {}
    for level in tree.levels:
        by_grid.setdefault(level.size, []).append(level)
    for (height, width), levels in by_grid.items():
        index = torch.cat([level.index for level in levels])
        rows, columns = index // width, index % width
        assert len(index.unique()) == len(index)
        if levels[0].conditional:  # all but the low quarter
            assert len(index) == height * width * 3 // 4 and ((rows >= height // 2) | (columns >= width // 2)).all()
            rings = 2 ** levels[0].packets.depth
            assert [level.ring for level in levels] == list(range(rings // 2, rings))
        else:
            assert len(index) == height * width


def test_the_tiles_of_a_ring_are_numbered_row_by_row():
    level = Tree((16, 8), "db4", 1, (2,)).levels[-2]  # ring 2 of 4: tiles (0,2) (1,2) (2,0) (2,1) (2,2) of 4 x 2
    z = level.synthesize(torch.eye(level.dim, dtype=torch.float64))
    c = level.packets(z)
    for tile, (p, r) in enumerate([(0, 2), (1, 2), (2, 0), (2, 1), (2, 2)]):
        power = c.square()[:, 4 * p : 4 * p + 4, 2 * r : 2 * r + 2].sum((1, 2))
        torch.testing.assert_close(power, (level.tile == tile).double(), rtol=0, atol=1e-12)


def test_levels_are_named_by_grid_and_band():
    assert [level.label for level in Tree((8, 8), "haar", 2, (2, 1)).levels] == [
        "2x2", "4x4", "8x8 band 2/4", "8x8 band 3/4",
    ]  # fmt: skip
    depths = [level.packets.depth for level in Tree((32, 32), "haar", None, 3).levels]
    assert depths == [0, 1, 1, 1, 2, 2, 3, 3, 3, 3]  # one number keeps tiles of 4 x 4 pixels
    depths = [level.packets.depth for level in Tree((8, 8), "haar", None, (3, 3, 3)).levels]
    assert depths == [0, 1, 2, 2, 3, 3, 3, 3]  # grids of 2 and 4 cannot be parted three times


@pytest.mark.parametrize("size", [(8, 8), (4, 16)])
@pytest.mark.parametrize("subdivisions", [1, 2])
def test_weights_and_traces_are_those_of_the_projection(size, subdivisions):
    for level in Tree(size, "db4", None, subdivisions).levels:
        eye = torch.eye(size[0] * size[1], dtype=torch.float64)[: level.size[0] * level.size[1]]
        eye = eye[:, : level.size[0] * level.size[1]].unflatten(1, level.size)
        g = level.detail(eye).T  # Ḡ, [dim, pixels]
        torch.testing.assert_close(level.weights().flatten(), (g.T @ g).diagonal(), rtol=0, atol=1e-12)
        for a, b in ((0, 0), (1, 0), (0, 1), (1, -1), (3, 2)):
            shifted = eye.roll((-a, -b), (1, 2)).flatten(1).T  # (T y)[i, k] = y[i + a, k + b]
            assert level.shift_trace(a, b) == pytest.approx(float((g @ shifted @ g.T).trace()), abs=1e-11)


def test_coarsening_keeps_constants_up_to_two():
    tree = Tree((8, 4), "db4")
    torch.testing.assert_close(tree.coarsen(torch.full((8, 4), 3.0)), torch.full((4, 2), 6.0))
    y = draw(2, 4, 2)
    torch.testing.assert_close(tree.coarsen(tree.refine(y)), y, rtol=0, atol=1e-14)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_sizes_and_names_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"12 points cannot be split 3 times.*multiple of 8"):
        analysis(12, "haar", 3)
    with pytest.raises(ConfigError, match=r"6 x 8 can be halved 1 times, not 2.*multiples of 4"):
        Tree((6, 8), octaves=2)
    with pytest.raises(ConfigError, match=r"no 'db44'.*db4"):
        Tree((8, 8), "db44")
    for subdivisions in (0, 6, (1, 1), (1, 1, 9)):
        with pytest.raises(ConfigError, match="one for each of the 3 octaves"):
            Tree((8, 8), "haar", 3, subdivisions)
