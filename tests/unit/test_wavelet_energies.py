"""Energies of fields: exact derivatives of every term against autograd, their symmetries, their tails, their bases."""

from functools import partial

import pytest
import torch

from genmodels.registry import ConfigError, build, names
from genmodels.wavelet.bands import Bands
from genmodels.wavelet.bases import Basis, BSpline, Sigmoid
from genmodels.wavelet.conditional import Conditional, smallest_eigenvalue
from genmodels.wavelet.potential import Potential
from genmodels.wavelet.terms import Quadratic, Term
from genmodels.wavelet.tree import Tree

# arguments of the variants of a term; one without a line is tested with its defaults
ARGUMENTS = {
    "quadratic": [{}, {"own": True, "symmetry": "inversion", "reach": 2}],
    "potential": [
        {},
        {"even": True, "basis": {"name": "b_spline", "count": 7}},
        {"warp": True, "basis": {"name": "b_spline", "count": 5}},
        {"basis": {"name": "sigmoid", "count": 5, "extent": 0.8}},
    ],
    "bands": [{"reach": 1}, {"reach": 2, "own": True, "neighbours": True, "below": 2}],
}
TREES = {"whole": (6, 4, "db2", 0, 1), "octaves": (8, 4, "db4", 2, 1), "rings": (8, 4, "db2", 1, (2,))}
LEVELS = [(t, k) for t, count in (("whole", 1), ("octaves", 3), ("rings", 3)) for k in range(count)]
CASES = [(name, given) for name in names(Term) for given in ARGUMENTS.get(name, [{}])]
SQUARE = Tree((8, 8), "db4", 1, (2,)).levels[-1]
every = pytest.mark.parametrize(("name", "given"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
at = pytest.mark.parametrize(("tree", "k"), LEVELS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level_of(tree, k):
    height, width, wavelet, octaves, subdivisions = TREES[tree]
    return Tree((height, width), wavelet, octaves, subdivisions).levels[k]


def term_of(name, given, level, u):
    """Fitted on fields u, so that some of their values are beyond its interval."""
    term = build(Term, {"name": name, **given}, level=level)
    term.fit(u)
    return term


def differentiated(energy, x):
    """Gradients, shaped like x [B, …], and Hessians [B, n, n] of energies [B], by autograd."""
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(energy(leaf).sum(), leaf, create_graph=True)[0]
    n = x[0].numel()
    probes = torch.eye(n, dtype=x.dtype).reshape(n, 1, *x.shape[1:]).expand(n, *x.shape)
    rows = torch.autograd.grad(gradient, leaf, probes, is_grads_batched=True)[0]
    return gradient.detach(), rows.flatten(2).transpose(0, 1)


@every
@at
def test_derivatives_are_those_of_the_features(name, given, tree, k):
    """Gradients, Laplacians, Hessians and diagonals of a term, each against autograd of what it is derived from."""
    level = level_of(tree, k)
    u = 1.5 * draw(3, *level.size) + 0.1
    term = term_of(name, given, level, u)
    theta = draw(len(term), seed=1)

    found, hessian = differentiated(lambda x: term.energy(theta, x)[0], u)
    torch.testing.assert_close(term.energy(theta, u)[1], found, rtol=1e-10, atol=1e-10)
    v = draw(3, *level.size, seed=2)
    product = torch.einsum("bij,bj->bi", hessian, v.flatten(1))
    torch.testing.assert_close(term.hessian(theta, u, v).flatten(1), product, rtol=1e-10, atol=1e-9)

    g = level.detail(torch.eye(u[0].numel(), dtype=torch.float64).unflatten(1, level.size)).T
    blocks = g @ hessian @ g.T
    traces = blocks.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(term.laplacian(theta, u), traces, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(term.diagonal(theta, u), blocks.diagonal(dim1=1, dim2=2).mean(0), rtol=1e-10, atol=1e-9)


@every
@at
def test_features_add_up_to_the_energy(name, given, tree, k):
    """Σ θ_k Φ_k, its gradient and Laplacian are those of `energy`; the names are as many."""
    level = level_of(tree, k)
    u = 1.5 * draw(4, *level.size, seed=3)
    term = term_of(name, given, level, u)
    theta = draw(len(term), seed=1)
    assert len(set(term.names)) == len(term)
    energy, gradient = term.energy(theta, u)
    features, gradients, laplacians = term.features(u), term.gradients(u), term.laplacians(u)
    assert features.shape == laplacians.shape == (4, len(term)) and gradients.shape == (4, len(term), *level.size)
    torch.testing.assert_close(features @ theta, energy, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(torch.einsum("bmhw,m->bhw", gradients, theta), gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(laplacians @ theta, term.laplacian(theta, u), rtol=1e-10, atol=1e-9)


@every
@at
def test_float32_fields_get_energies_in_float64(name, given, tree, k):
    level = level_of(tree, k)
    u = 1.5 * draw(4, *level.size, seed=3)
    term = term_of(name, given, level, u)
    theta = draw(len(term), seed=1)
    narrow, wide = term.energy(theta, u.float()), term.energy(theta, u)
    assert narrow[0].dtype == torch.float64 and narrow[1].dtype == torch.float32
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@every
@at
def test_features_are_stationary(name, given, tree, k):
    """Terms of pixels are the same of any shift of a field; those of packets of shifts by 2^M pixels."""
    level = level_of(tree, k)
    u = draw(3, *level.size, seed=4)
    term = term_of(name, given, level, u)
    step = 2**level.packets.depth if name == "bands" else 1
    features = term.features(u)
    for shift in ((step, 0), (-step, 2 * step), (3 * step, step)):
        torch.testing.assert_close(term.features(u.roll(shift, (1, 2))), features, rtol=1e-10, atol=1e-10)


def test_quadratic_and_potential_have_the_symmetries_of_the_lattice():
    level = SQUARE
    u = draw(3, 8, 8)
    for term in (Quadratic(2, level=level), Potential(level=level)):
        features = term.features(u)
        for same in (u.flip(1), u.flip(2), u.transpose(1, 2), u.rot90(1, (1, 2))):
            torch.testing.assert_close(term.features(same), features, rtol=1e-10, atol=1e-10)
    turned = Quadratic(2, "inversion", level=level)
    torch.testing.assert_close(turned.features(u.flip((1, 2))), turned.features(u), rtol=1e-10, atol=1e-10)
    assert (turned.features(u.flip(1)) - turned.features(u)).abs().max() > 1


# ---- quadratic terms -----------------------------------------------------------------------------------------------


def test_neighbours_count_as_bonds():
    """The orbit of (1, 0) is Σ_<ij> u_i u_j, every bond once."""
    level = SQUARE
    u = draw(5, 8, 8)
    bonds = (u * (u.roll(1, 1) + u.roll(1, 2))).sum((1, 2))
    diagonals = (u * (u.roll((1, 1), (1, 2)) + u.roll((1, -1), (1, 2)))).sum((1, 2))
    term = Quadratic(2, own=True, level=level)
    assert term.names[:3] == ["shift 0,0", "shift 1,0", "shift 1,1"]
    expected = torch.stack([0.5 * u.square().sum((1, 2)), bonds, diagonals], 1)
    torch.testing.assert_close(term.features(u)[:, :3], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "reach", "orbits"), [(32, 3, 9), (16, 3, 9), (8, 3, 9), (4, 3, 4), (2, 3, 1)])
def test_reach_ends_at_half_of_the_grid(size, reach, orbits):
    """9 orbits within 3; where all shifts are in reach their sum, (Σ u)², has no detail and one orbit goes."""
    assert len(Quadratic(reach, level=Tree((size, size), "haar", 1).levels[-1])) == orbits
    assert len(Quadratic(3, level=Tree((1, 1), "haar", 0).levels[0])) == 0


def test_bands_are_the_sums_of_their_definition():
    """Rolls of tiles, by hand, at one octave."""
    level = Tree((8, 8), "db4", 1).levels[-1]
    u = draw(3, 8, 8)
    c = level.packets(u)
    z = {"0,0": c[:, :4, :4], "0,1": c[:, :4, 4:], "1,0": c[:, 4:, :4], "1,1": c[:, 4:, 4:]}
    term = Bands(1, own=True, level=level)
    for name, feature in zip(term.names, term.features(u).T, strict=True):
        _, first, _, second, _, shift = name.split(" ")
        a, b = map(int, shift.split(","))
        sum_ = (z[first] * z[second].roll((a, b), (1, 2))).sum((1, 2))
        torch.testing.assert_close(
            feature, 0.5 * sum_ if (first, a, b) == (second, 0, 0) else sum_, rtol=1e-10, atol=1e-10
        )
    pairs = {tuple(name.split(" ")[1:4:2]) for name in term.names}
    assert ("0,0", "0,0") not in pairs and len(pairs) == 9


def test_without_their_sum_powers_of_bands_enter_as_differences():
    """And all other features stay: a potential, which holds ½ Σ u², can stand beside them."""
    level, u = Tree((8, 8), "db4", 1).levels[-1], draw(3, 8, 8)
    full, less = Bands(1, own=True, level=level), Bands(1, level=level)
    values, power = (dict(zip(term.names, term.features(u).T, strict=True)) for term in (full, less))
    marked = {name.split(" less ")[0]: name for name in less.names if " less " in name}
    assert set(marked) == {f"band {band} with {band} at 0,0" for band in ("1,0", "1,1")}
    for name, difference in marked.items():
        expected = values[name] - values["band 0,1 with 0,1 at 0,0"]
        torch.testing.assert_close(power[difference], expected, rtol=1e-12, atol=1e-12)
    rest = set(power) - set(marked.values())
    assert rest == set(values) - set(marked) - {"band 0,1 with 0,1 at 0,0"}
    assert all(torch.equal(power[name], values[name]) for name in rest)


@pytest.mark.parametrize(("size", "reach", "count"), [(64, 4, 639 - 30), (128, 6, 1299 - 30)])
def test_bands_count_as_published(size, reach, count):
    """Parameters of one octave without the 30 of the potential: 6 pairs of S shifts, 3 tiles with (S + 1)/2."""
    level = Tree((size, size), "haar", 1).levels[-1]
    assert len(Bands(reach, own=True, level=level)) == count
    assert len(Bands(reach, level=level)) == count - 1


def test_shifts_that_are_the_same_modulo_the_tile_count_once():
    """Tiles of 4 x 4 and a window of 5 x 5: 16 shifts, 10 of a tile with itself (four are their own inverse)."""
    level = Tree((8, 8), "haar", 1).levels[-1]
    assert len(Bands(2, own=True, level=level)) == 6 * 16 + 3 * 10 == len(Bands(9, own=True, level=level))


def test_bands_that_are_no_neighbours_do_not_interact():
    level = Tree((32, 32), "haar", 1, 2).levels[-1]  # ring 3: 7 tiles over 5
    assert level.ring == 3
    count = lambda **given: len(Bands(0, own=True, level=level, **given))  # noqa: E731
    assert count() == 7 * 6 // 2 + 7 * 5 + 7
    assert count(below=2) == 7 * 6 // 2 + 7 * (5 + 3) + 7 and count(below=0) == 7 * 6 // 2 + 7
    # along the ring 6 pairs and (2,3)-(3,2); with the ring below those of bands that differ by at most 1 in both
    inside = [(0, 3), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1), (3, 0)]
    below = [(0, 2), (1, 2), (2, 2), (2, 1), (2, 0)]
    near = lambda a, b: max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1  # noqa: E731
    pairs = sum(near(a, b) for i, a in enumerate(inside) for b in inside[i + 1 :])
    assert pairs == 7
    assert count(neighbours=True) == 7 + pairs + sum(near(a, b) for a in inside for b in below)


def test_bands_need_a_window():
    with pytest.raises(ConfigError, match="reach >= 0 and below >= 0 are needed, found -1 and 1"):
        Bands(-1, level=SQUARE)
    with pytest.raises(ConfigError, match="reach >= 1, or own: true"):
        Quadratic(0, level=SQUARE)


# ---- potentials ----------------------------------------------------------------------------------------------------


def potential(**given):
    """On the interval [-2, 3] of a pixel alone ([-3, 3] if even), with the centre 0.7, and parameters."""
    term = Potential(**given, level=Tree((1, 1), "haar", 0).levels[0])
    term.interval.copy_(torch.tensor([-3.0 if given.get("even") else -2.0, 3.0]))
    term.centre.fill_(0.7)
    return term, draw(len(term), seed=5)


@pytest.mark.parametrize(
    "given", [{}, {"even": True}, {"warp": True}, {"basis": Sigmoid(9)}], ids=["plain", "even", "warp", "sigmoid"]
)
def test_tails_are_parabolas_with_the_slope_at_the_end_and_their_own_curvature(given):
    """v is C¹ at the ends of the interval; curvatures beyond are the last parameters."""
    term, theta = potential(**given)
    curvatures = theta[-1:].repeat(2) if given.get("even") else theta[-2:]
    for end, out, curvature in zip(term.interval.tolist(), (-1.0, 1.0), curvatures.tolist(), strict=True):
        edge, eps = torch.tensor(end, dtype=torch.float64), 1e-7
        inside, outside = (term.shape(theta, edge + sign * out * eps) for sign in (-1, 1))
        steepest = max(float(part.abs()) for part in (*inside[1:], *outside[1:]))
        for a, b in zip(inside[:2], outside[:2], strict=True):
            assert float((a - b).abs()) < 3 * eps * steepest  # no more than the derivative gives
        assert float(outside[2]) == curvature
        v, slope, _ = term.shape(theta, edge)
        far = term.shape(theta, edge + 4 * out)
        assert float(far[0]) == pytest.approx(float(v + 4 * out * slope + 0.5 * curvature * 16), rel=1e-9)
        assert float(far[1]) == pytest.approx(float(slope + curvature * 4 * out), rel=1e-9)


@pytest.mark.parametrize(
    ("given", "ends"), [({}, (0.001, 0.999)), ({"even": True}, (None, 0.998)), ({"warp": True}, (0.001, 0.999))]
)
def test_the_interval_leaves_out_a_thousandth_of_the_pixels_at_either_end(given, ends):
    term = Potential(**given, level=Tree((1, 1), "haar", 0).levels[0])
    u = draw(100_000).exp().reshape(-1, 1, 1)
    term.fit(u)
    low, high = (None if q is None else float(u.flatten().quantile(q)) for q in ends)
    assert term.interval.tolist() == pytest.approx([-high if low is None else low, high])
    assert float(term.centre) == (pytest.approx(float(u.median())) if given.get("warp") else 0.0)
    term.fit(u[:1000])  # thirty of few pixels
    assert int((u[:1000] > term.interval[1]).sum()) == (60 if given.get("even") else 30)


def test_even_potentials_are_even():
    for basis in (BSpline(8), BSpline(9), Sigmoid(8), Sigmoid(9)):
        term, theta = potential(even=True, basis=basis)
        u = torch.linspace(-4, 4, 41, dtype=torch.float64)
        v, slope, curvature = term.shape(theta, u)
        torch.testing.assert_close(v - v[0], v.flip(0) - v[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(slope, -slope.flip(0), rtol=0, atol=1e-11)
        torch.testing.assert_close(curvature, curvature.flip(0), rtol=0, atol=1e-10)


def test_a_warped_potential_is_one_of_asinh():
    term, theta = potential(warp=True)
    u = torch.linspace(-2, 3, 11, dtype=torch.float64)
    low, high = term.interval - term.centre
    assert float(term.centre) == pytest.approx(0.7)
    start, end = torch.asinh(low), torch.asinh(high)
    s = 2 * (torch.asinh(u - term.centre) - start) / (end - start) - 1
    expected = term.basis.derivatives(s, 0) @ theta[:-2]
    torch.testing.assert_close(term.shape(theta, u)[0], expected, rtol=0, atol=1e-12)


def test_without_its_invisible_direction_a_potential_spans_all_but_lines():
    """15 of 16 splines, and the line, span the 16; two more parameters are of the tails."""
    level = level_of("octaves", 2)
    term = Potential(level=level)
    assert len(term) == 15 + 2 and len(Potential(level=level_of("octaves", 0))) == 16 + 2
    line = torch.ones(1, 16, dtype=torch.float64)
    assert torch.linalg.matrix_rank(torch.cat([term.expansion, line])) == 16


# ---- bases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "basis",
    [BSpline(4), BSpline(5), BSpline(16), Sigmoid(2, 0.5), Sigmoid(24)],
    ids=lambda b: f"{b.registered_name}{b.count}",
)
def test_bases_have_their_derivatives_and_are_antisymmetric(basis):
    s = torch.linspace(-0.999, 0.999, 53, dtype=torch.float64)
    for order in (0, 1):
        jacobian = torch.autograd.functional.jacobian(lambda x, n=order: basis.derivatives(x, n).sum(0), s).T
        torch.testing.assert_close(jacobian, basis.derivatives(s, order + 1), rtol=1e-10, atol=1e-10)
    constant = basis.derivatives(s, 0) + basis.derivatives(-s, 0).flip(-1)
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), rtol=0, atol=1e-12)
    b = draw(basis.count)
    for order, value in enumerate(basis.combine(b, s)):
        torch.testing.assert_close(value, basis.derivatives(s, order) @ b, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("count", [4, 5, 12])
def test_splines_are_a_partition_of_unity_with_local_support(count):
    basis, s = BSpline(count), torch.linspace(-1, 1, 101, dtype=torch.float64)
    slopes = basis.derivatives(s, 1)
    torch.testing.assert_close(slopes.sum(1), torch.ones(101, dtype=torch.float64), rtol=0, atol=1e-14)
    assert float(slopes.min()) >= 0 and int((slopes > 0).sum(1).max()) <= 4
    # knots at s of degree 1: Greville's abscissae give the identity
    h = 2 / (count - 3)
    centres = -1 + h * (torch.arange(count).double() - 1)
    torch.testing.assert_close(slopes @ centres, s, rtol=0, atol=1e-13)


def test_every_basis_is_registered_and_says_whether_it_spans_a_line():
    for name in names(Basis):
        basis, s = build(Basis, name), torch.linspace(-1, 1, 201, dtype=torch.float64)
        columns = torch.cat([basis.derivatives(s, 0), torch.ones(201, 1, dtype=torch.float64)], 1)
        rest = s[:, None] - columns @ torch.linalg.lstsq(columns, s[:, None], driver="gelsd").solution
        assert (float(rest.abs().max()) < 1e-10) == basis.spans_linear


def test_bases_need_their_counts():
    with pytest.raises(ConfigError, match="count >= 4"):
        BSpline(3)
    with pytest.raises(ConfigError, match="extent > 0"):
        Sigmoid(4, 0.0)


# ---- a level's energy ----------------------------------------------------------------------------------------------


def conditional(level, *terms, unit=0.7):
    found = Conditional(level, terms)
    found.unit.fill_(unit)
    found.theta.copy_(draw(len(found.theta), seed=7))
    return found


@at
def test_the_energy_of_coefficients_has_the_derivatives_it_says(tree, k):
    """ζ -> Ē, its gradient, Hessian, Laplacian and the loss ½ |∇Ē|² - ΔĒ, against autograd."""
    level = level_of(tree, k)
    c = conditional(level, partial(Quadratic, reach=1), Potential, partial(Bands, reach=1))
    for term in c.terms:
        term.fit(draw(9, *level.size))
    z, base = draw(2, level.dim, seed=8), 0.3 * draw(2, *level.size, seed=9)
    base = base - level.synthesize(level.detail(base))
    potential = c.potential(base)
    energy, gradient = potential(z)
    u = base / c.unit + level.synthesize(z)
    torch.testing.assert_close(energy, c.features(u) @ c.theta, rtol=1e-9, atol=1e-9)
    found, blocks = differentiated(lambda x: potential(x)[0], z)
    torch.testing.assert_close(gradient, found, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c.hessian(u, z), torch.einsum("bij,bj->bi", blocks, z), rtol=1e-9, atol=1e-8)
    trace = blocks.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(c.laplacian(u), trace, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(c.loss(u), 0.5 * gradient.square().sum(1) - trace, rtol=1e-9, atol=1e-7)


def test_the_guard_makes_curvature_at_infinity_what_is_asked():
    level = level_of("octaves", 2)
    c = conditional(level, partial(Quadratic, reach=1, own=True), Potential)
    assert c.guard(0.5) == pytest.approx(0.5, abs=1e-9)
    lowest = smallest_eigenvalue(c.at_infinity, level.dim, c.theta.device)
    assert lowest == pytest.approx(0.5, abs=1e-9) and c.held[-2:].any() and not c.held[:-2].any()
    c.theta[0] += 100  # strongly convex by itself
    before = c.theta.clone()
    assert c.guard(0.5) > 50 and torch.equal(c.theta, before) and not c.held.any()
    alone = conditional(level, partial(Quadratic, reach=1, own=True))
    alone.theta[0] -= 100
    with pytest.raises(ConfigError, match=r"8x4: the fitted energy cannot be normalised: its curvature is -\d"):
        alone.guard(0.5)


def test_the_smallest_eigenvalue_by_lanczos_is_that_of_the_dense_matrix(monkeypatch):
    matrix = draw(60, 60)
    matrix = matrix + matrix.T
    product = lambda v: v @ matrix  # noqa: E731
    dense = smallest_eigenvalue(product, 60, torch.device("cpu"))
    monkeypatch.setattr("genmodels.wavelet.conditional.DENSE", 10)
    assert smallest_eigenvalue(product, 60, torch.device("cpu")) == pytest.approx(dense, abs=1e-3)
    assert dense == pytest.approx(float(torch.linalg.eigvalsh(matrix)[0]), abs=1e-10)


def test_scales_are_of_tiles_and_one_where_curvature_is_negative():
    level = Tree((8, 8), "db4", 1, (2,)).levels[-1]
    c = conditional(level, partial(Bands, reach=0, below=0, own=True))
    c.theta.zero_()
    own = [i for i, name in enumerate(c.names) if name.split(" ")[1] == name.split(" ")[3]]
    curvature = torch.tensor([4.0, -1.0, 0.25, 1.0, 9.0, 16.0, 2.0], dtype=torch.float64)
    c.theta[own] = curvature
    c.set_scale(draw(2, 8, 8))
    expected = torch.where(curvature > 0, curvature.abs().rsqrt(), 1.0)[level.tile]
    torch.testing.assert_close(c.scale, expected, rtol=1e-12, atol=0)
