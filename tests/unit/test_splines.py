"""Rational-quadratic splines against numbers computed to 40 digits, their own derivatives, and hard parameters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels.flows.splines import Knots, bounded, durkan, rational_quadratic

BOUND = 3.0


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


def paper(raw, bound=BOUND):
    return durkan(raw, bound, identity=False)


def draw(*shape, seed=0, dtype=torch.float64, spread=1.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- exact numbers --------------------------------------------------------------------------------------------------

EXPLICIT = Knots(wide(0.5, 1.5)[:, None], wide(1.2, 0.8)[:, None], wide(0.7)[:, None])
RAW = wide(0.1, -0.2, 0.3, 0.4, -0.5, 0.2, 0, 0.6, 0.3, -0.1, 0.5)
GRADIENT = wide(
    -0.425867981, -0.3154907599, -0.1469128875, 0.8882716285, 0.3611419648, 0.7272506093, 0.1683672576, -1.256759832, 0,
    0.07633470579, -0.1382796578,
)  # fmt: skip
SLOPE_GRADIENT = wide(
    0.1511744523, 0.1119927887, -1.014716118, 0.7515488772, -0.1799451698, -0.3623650729, 1.082895408, -0.5405851654, 0,
    -0.2047350202, -0.06884706246,
)  # fmt: skip


@pytest.mark.parametrize(
    ("x", "y", "log_slope"),
    [
        (-1, -1, 0),
        (-0.75, -0.372307692308, 1.26542965893),
        (-0.5, 0.2, math.log(0.7)),
        (0, 0.454945054945, -0.885025183708),
        (0.25, 0.556626506024, -0.888566183859),
        (0.9, 0.909777547853, -0.203818255344),
        (1.5, 1.5, 0),
    ],
)
def test_explicit_knots(x, y, log_slope):
    out = rational_quadratic(wide(x), EXPLICIT, 1.0)
    torch.testing.assert_close(out, (wide(y), wide(log_slope)), rtol=0, atol=1e-10)
    back = rational_quadratic(out[0], EXPLICIT, 1.0, inverse=True)
    torch.testing.assert_close(back, (wide(x), wide(-log_slope)), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("y", "x", "log_slope"),
    [
        (-0.9, -0.929538753132, -0.627537563711),
        (0, -0.631001252221, -0.895344704891),
        (0.6, 0.353461689766, 0.846136020424),
        (0.99, 0.989888684077, 0.0221211824376),
    ],
)
def test_inverse_of_explicit_knots(y, x, log_slope):
    out = rational_quadratic(wide(y), EXPLICIT, 1.0, inverse=True)
    torch.testing.assert_close(out, (wide(x), wide(log_slope)), rtol=0, atol=1e-10)


def test_knots_of_raw_parameters():
    widths, heights, derivatives = paper(RAW)
    lefts = wide(-3, -1.60812582883, -0.575444991263, 1.12326554386, 3)
    bottoms = wide(-3, -2.21451902811, -0.638837110537, 0.652309747928, 3)
    torch.testing.assert_close(widths, lefts.diff(), rtol=0, atol=3e-11)
    torch.testing.assert_close(heights, bottoms.diff(), rtol=0, atol=3e-11)
    torch.testing.assert_close(derivatives, wide(0.855355244469, 0.645396660074, 0.97507698418), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_raw_parameters(dtype):
    x = wide(-4, -3, -2.5, -1, 0, 0.5, 1.7, 2.999, 3)
    y = wide(-4, -3, -2.67467880714, -1.20610660142, -0.256399433684, 0.11036060923, 1.32375600139, 2.99899964193, 3)
    log_slope = wide(
        0, 0, -0.766668065324, 0.666750238817, -0.366698257002, -0.245750897108, 0.278486604825, 0.00071584381646, 0
    )
    atol = 1e-10 if dtype == torch.float64 else 2e-6
    found = rational_quadratic(x.to(dtype), paper(RAW.to(dtype)[:, None]), BOUND)
    assert found[0].dtype == found[1].dtype == dtype
    torch.testing.assert_close(found, (y.to(dtype), log_slope.to(dtype)), rtol=0, atol=atol)


def test_inverse_of_raw_parameters():
    y = wide(-2.9, -1, 0, 1.3, 2.5)
    x = wide(-2.88629277577, -0.886995051511, 0.355998925825, 1.681968806, 2.56312639648)
    log_slope = wide(0.253068482638, -0.516792556492, 0.285826977441, -0.272931748909, -0.240984486781)
    found = rational_quadratic(y, paper(RAW[:, None]), BOUND, inverse=True)
    torch.testing.assert_close(found, (x, log_slope), rtol=0, atol=1e-10)


def test_gradients_of_raw_parameters():
    raw = RAW.clone().requires_grad_()
    y, log_slope = rational_quadratic(wide(0.5)[0], paper(raw), BOUND)
    torch.testing.assert_close(torch.autograd.grad(y, raw, retain_graph=True)[0], GRADIENT, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(log_slope, raw)[0], SLOPE_GRADIENT, rtol=0, atol=1e-9)


def test_zero_parameters_in_the_papers_form_are_no_identity():
    y, log_slope = rational_quadratic(wide(0.3, 0.375), paper(torch.zeros(23, 1).double()), BOUND)
    torch.testing.assert_close(y, wide(0.287094676269, 0.375), rtol=0, atol=1e-10)
    torch.testing.assert_close(log_slope, wide(0.144329206002, 0.165967704657), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bound", [1.0, 3.0, 5.0, 8.0, 64.0])
@pytest.mark.parametrize("bins", [1, 2, 8, 32, 128])
@pytest.mark.parametrize("knots", [durkan, bounded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_parameters_are_the_identity(bound, bins, knots, dtype):
    inside = torch.linspace(-bound, bound, 1001, dtype=dtype)
    x = torch.cat((inside, torch.tensor([-bound, bound, -2 * bound, 2 * bound, 1e6, -1e6], dtype=dtype)))
    raw = torch.zeros(3 * bins - 1, 1, dtype=dtype)
    for inverse in (False, True):
        y, log_slope = rational_quadratic(x, knots(raw, bound), bound, inverse=inverse)
        eps = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(y, x, rtol=0, atol=eps * bound)
        # the widths carry relative errors of bins·rounding
        torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=3 * eps * max(1, bins / 8))


# ---- calculus -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("knots", [durkan, bounded])
def test_log_slope_is_that_of_autograd(inverse, knots):
    x = (2 * draw(3, 50)).requires_grad_()
    y, log_slope = rational_quadratic(x, knots(draw(14, 3, 50, seed=1), BOUND), BOUND, inverse=inverse)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [1, 2, 5])
def test_first_and_second_gradients_are_those_of_finite_differences(inverse, bins):
    x = (2 * draw(2, 4, seed=3)).requires_grad_()  # some inside, some outside
    raw = draw(3 * bins - 1, 2, 4, seed=4).requires_grad_()

    def f(x, raw):
        return rational_quadratic(x, durkan(raw, BOUND), BOUND, inverse=inverse)

    assert torch.autograd.gradcheck(f, (x, raw))
    assert torch.autograd.gradgradcheck(f, (x, raw))


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_the_knots_themselves(inverse):
    """Nothing is hidden by the sums being fixed; points outside depend on no knot."""
    x = (2.5 * draw(2, 6, seed=5)).requires_grad_()
    knots = [part.detach().requires_grad_() for part in durkan(draw(11, 2, 6, seed=6), BOUND)]
    assert (x.abs() > BOUND).any()
    assert torch.autograd.gradcheck(
        lambda x, *parts: rational_quadratic(x, Knots(*parts), BOUND, inverse=inverse), (x, *knots)
    )


def test_gradients_of_knots_that_are_shared_add_up():
    x = (1.5 * draw(2, 7)).requires_grad_()
    shared = draw(8, 2, 1, seed=1).requires_grad_()
    each = shared.detach().expand(8, 2, 7).clone().requires_grad_()
    for inverse in (False, True):
        pair = []
        for raw in (shared, each):
            y, log_slope = rational_quadratic(x, durkan(raw, BOUND), BOUND, inverse=inverse)
            pair.append(torch.autograd.grad((y * draw(2, 7, seed=2)).sum() + (log_slope**2).sum(), (x, raw)))
        torch.testing.assert_close(pair[0][0], pair[1][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(pair[0][1], pair[1][1].sum(-1, keepdim=True), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bins=st.integers(1, 20), spread=st.floats(0.1, 3.0), bound=st.floats(0.1, 50.0))
def test_it_is_an_increasing_bijection_of_the_interval(seed, bins, spread, bound):
    knots = durkan(spread * draw(3 * bins - 1, 1, seed=seed), bound)
    x = torch.linspace(-1.1 * bound, 1.1 * bound, 401, dtype=torch.float64)
    y, log_slope = rational_quadratic(x, knots, bound)
    back, back_log_slope = rational_quadratic(y, knots, bound, inverse=True)
    assert (y.diff() > -1e-14 * bound).all()
    assert ((y.abs() <= bound * (1 + 1e-14)) == (x.abs() <= bound)).all()
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8 * bound)
    torch.testing.assert_close(back_log_slope, -log_slope, rtol=0, atol=1e-6)


# ---- hard parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("spread", [6.0, 20.0])
@pytest.mark.parametrize("bins", [8, 32, pytest.param(64, marks=pytest.mark.slow)])
def test_extreme_parameters_stay_finite_in_single_precision(spread, bins, inverse):
    n = 20_000
    raw = (spread * draw(3 * bins - 1, n, seed=bins, dtype=torch.float32)).requires_grad_()
    x = BOUND * 1.05 * (2 * torch.rand(n, generator=torch.Generator().manual_seed(1)) - 1)
    knots = durkan(raw.detach(), BOUND)
    edges = (knots.heights if inverse else knots.widths).cumsum(0)[: bins - 1] - BOUND
    x[: bins - 1] = edges.diagonal()  # points on knots, and on the ends
    x[-2:] = torch.tensor([-BOUND, BOUND])
    x.requires_grad_()
    y, log_slope = rational_quadratic(x, durkan(raw, BOUND), BOUND, inverse=inverse)
    gradients = torch.autograd.grad(y.sum() + log_slope.sum(), (x, raw))
    for value in (y, log_slope, *gradients):
        assert value.isfinite().all()
    eps = torch.finfo(torch.float32).eps
    if inverse:
        back, _ = rational_quadratic(y.detach(), knots, BOUND)
        assert (back - x).abs().max() < 1e-2 * BOUND
    else:  # rounding of the point and of the knots, magnified by the slope
        exact, slope = rational_quadratic(x.double(), durkan(raw.double(), BOUND), BOUND)
        assert ((y - exact).abs() < 20 * eps * BOUND * (1 + slope.exp())).all()


def test_the_discriminant_survives_rounding_at_the_upper_end_of_a_bin():
    """There the root of b² - 4ac is h times the end slope, which may be far below b: rounding can leave it negative."""
    knots = durkan(draw(23, 50_000, dtype=torch.float32, spread=20.0), BOUND)
    top = knots.heights[:4].sum(0) - BOUND
    y = torch.nextafter(top, top - 1)
    x, log_slope = rational_quadratic(y, knots, BOUND, inverse=True)
    assert x.isfinite().all() and log_slope.isfinite().all()
    back, _ = rational_quadratic(x, knots, BOUND)
    assert (back - y).abs().max() < 1e-2 * BOUND


@pytest.mark.parametrize("spread", [6.0, 20.0])
@pytest.mark.parametrize("bins", [8, 32, 64])
def test_extreme_parameters_do_not_decrease(spread, bins):
    knots = durkan(spread * draw(3 * bins - 1, 1, seed=bins, dtype=torch.float32), BOUND)
    x = torch.linspace(-1.05 * BOUND, 1.05 * BOUND, 50_000)
    y, _ = rational_quadratic(x, knots, BOUND)
    assert y.diff().min() > -8 * torch.finfo(torch.float32).eps * BOUND


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_nan_stays_nan_and_spoils_nothing_else(inverse):
    x = wide(0.1, math.nan, 5.0, math.inf, -math.inf)
    raw = draw(8, 5)
    y, log_slope = rational_quadratic(x, durkan(raw, BOUND), BOUND, inverse=inverse)
    assert y[1].isnan() and log_slope[1].isnan()
    assert torch.equal(y[2:], x[2:]) and (log_slope[2:] == 0).all()
    clean, _ = rational_quadratic(x[:1], durkan(raw[:, :1], BOUND), BOUND, inverse=inverse)
    assert torch.equal(y[:1], clean)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_single_precision(low):
    x, raw = draw(3, 9).to(low), draw(14, 3, 9, seed=1).to(low)
    y, log_slope = rational_quadratic(x, durkan(raw, BOUND), BOUND)
    single, single_log_slope = rational_quadratic(x.float(), durkan(raw.float(), BOUND), BOUND)
    assert (y.dtype, log_slope.dtype) == (low, torch.float32)
    assert torch.equal(y, single.to(low)) and torch.equal(log_slope, single_log_slope)


@pytest.mark.parametrize("inverse", [False, True])
def test_an_empty_batch(inverse):
    x, raw = draw(3, 0).requires_grad_(), draw(14, 3, 0).requires_grad_()
    y, log_slope = rational_quadratic(x, durkan(raw, BOUND), BOUND, inverse=inverse)
    gx, graw = torch.autograd.grad(y.sum() + log_slope.sum(), (x, raw))
    assert y.shape == log_slope.shape == gx.shape == (3, 0) and graw.shape == (14, 3, 0)


@pytest.mark.parametrize("inverse", [False, True])
def test_under_vmap_and_functional_gradients(inverse):
    x, raw = 2 * draw(5, 3, 4), draw(5, 14, 3, 4, seed=1)

    def f(x, raw):
        return rational_quadratic(x, durkan(raw, BOUND), BOUND, inverse=inverse)

    together = torch.func.vmap(f)(x, raw)
    alone = [f(*pair) for pair in zip(x, raw, strict=True)]
    torch.testing.assert_close(together, tuple(map(torch.stack, zip(*alone, strict=True))), rtol=0, atol=1e-13)
    diagonal = torch.func.vmap(torch.func.jacrev(lambda x, raw: f(x, raw)[0]))(x, raw)
    slopes = diagonal.flatten(3).flatten(1, 2).diagonal(dim1=1, dim2=2).reshape(5, 3, 4)
    torch.testing.assert_close(slopes.log(), together[1], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("inverse", [False, True])
def test_compiles_to_one_graph(inverse):
    def f(x, raw):
        return rational_quadratic(x, durkan(raw, BOUND), BOUND, inverse=inverse)

    x, raw = (2 * draw(3, 64)).requires_grad_(), draw(14, 3, 64, seed=1).requires_grad_()
    outs = []
    for g in (f, torch.compile(f, fullgraph=True)):
        y, log_slope = g(x, raw)
        outs.append((y, log_slope, *torch.autograd.grad((y * log_slope).sum(), (x, raw))))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-9, atol=1e-9)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="3K-1 raw parameters"):
        durkan(torch.zeros(12, 1), BOUND)
    with pytest.raises(ValueError, match="at most 1000 bins"):
        durkan(torch.zeros(3 * 1001 - 1, 1), BOUND)
