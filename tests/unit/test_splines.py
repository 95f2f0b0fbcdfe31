"""Rational-quadratic splines against numbers computed to 40 digits, their own derivatives, and hard parameters."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels.flows.knots import FLOOR, Form, knots
from genmodels.flows.splines import rational_quadratic

BOUND = 3.0


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


DURKAN, SOFT, PAPER = Form(BOUND), Form(BOUND, parametrization="bounded"), Form(BOUND, identity=False)
FORMS = {
    form.tails + ("" if form.floor else ", softly limited"): form
    for form in (DURKAN, Form(BOUND, "bounded"), Form(BOUND, "circular"), SOFT, Form(BOUND, "circular", "bounded"))
}
every_form = pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))


def draw(*shape, seed=0, dtype=torch.float64, spread=1.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def points(form, *shape, seed=0):
    """Uniform on the interval, and for those that are defined there also outside."""
    reach = form.bound if form.tails == "bounded" else 1.5 * form.bound
    return reach * (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)


# ---- exact numbers --------------------------------------------------------------------------------------------------


def raw_of(widths, heights, derivatives, bound):
    """Raw parameters in the paper's form that give these knots."""
    shares = torch.stack((widths, heights)) / (2 * bound)
    logits = ((shares - FLOOR) / (1 - len(widths) * FLOOR)).log()
    return torch.cat((*logits, (derivatives - FLOOR).expm1().log()))[:, None]


EXPLICIT = raw_of(wide(0.5, 1.5), wide(1.2, 0.8), wide(0.7), 1.0)
UNIT = Form(1.0, identity=False)
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
    out = rational_quadratic(wide(x), EXPLICIT, UNIT)
    torch.testing.assert_close(out, (wide(y), wide(log_slope)), rtol=0, atol=1e-10)
    back = rational_quadratic(out[0], EXPLICIT, UNIT, inverse=True)
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
    out = rational_quadratic(wide(y), EXPLICIT, UNIT, inverse=True)
    torch.testing.assert_close(out, (wide(x), wide(log_slope)), rtol=0, atol=1e-10)


def test_knots_of_raw_parameters():
    widths, heights, derivatives = knots(RAW, PAPER)
    lefts = wide(-3, -1.60812582883, -0.575444991263, 1.12326554386, 3)
    bottoms = wide(-3, -2.21451902811, -0.638837110537, 0.652309747928, 3)
    torch.testing.assert_close(widths, lefts.diff(), rtol=0, atol=3e-11)
    torch.testing.assert_close(heights, bottoms.diff(), rtol=0, atol=3e-11)
    torch.testing.assert_close(
        derivatives, wide(1, 0.855355244469, 0.645396660074, 0.97507698418, 1), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_raw_parameters(dtype):
    x = wide(-4, -3, -2.5, -1, 0, 0.5, 1.7, 2.999, 3)
    y = wide(-4, -3, -2.67467880714, -1.20610660142, -0.256399433684, 0.11036060923, 1.32375600139, 2.99899964193, 3)
    log_slope = wide(
        0, 0, -0.766668065324, 0.666750238817, -0.366698257002, -0.245750897108, 0.278486604825, 0.00071584381646, 0
    )
    atol = 1e-10 if dtype == torch.float64 else 2e-6
    found = rational_quadratic(x.to(dtype), RAW.to(dtype)[:, None], PAPER)
    assert found[0].dtype == found[1].dtype == dtype
    torch.testing.assert_close(found, (y.to(dtype), log_slope.to(dtype)), rtol=0, atol=atol)


def test_inverse_of_raw_parameters():
    y = wide(-2.9, -1, 0, 1.3, 2.5)
    x = wide(-2.88629277577, -0.886995051511, 0.355998925825, 1.681968806, 2.56312639648)
    log_slope = wide(0.253068482638, -0.516792556492, 0.285826977441, -0.272931748909, -0.240984486781)
    found = rational_quadratic(y, RAW[:, None], PAPER, inverse=True)
    torch.testing.assert_close(found, (x, log_slope), rtol=0, atol=1e-10)


def test_gradients_of_raw_parameters():
    raw = RAW.clone().requires_grad_()
    y, log_slope = rational_quadratic(wide(0.5)[0], raw, PAPER)
    torch.testing.assert_close(torch.autograd.grad(y, raw, retain_graph=True)[0], GRADIENT, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(log_slope, raw)[0], SLOPE_GRADIENT, rtol=0, atol=1e-9)


def test_zero_parameters_in_the_papers_form_are_no_identity():
    y, log_slope = rational_quadratic(wide(0.3, 0.375), torch.zeros(23, 1).double(), PAPER)
    torch.testing.assert_close(y, wide(0.287094676269, 0.375), rtol=0, atol=1e-10)
    torch.testing.assert_close(log_slope, wide(0.144329206002, 0.165967704657), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bound", [1.0, 3.0, 5.0, 8.0, 64.0])
@pytest.mark.parametrize("bins", [1, 2, 8, 32, 128])
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_parameters_are_the_identity(bound, bins, form, dtype):
    form = replace(form, bound=bound)
    inside = torch.cat((torch.linspace(-bound, bound, 1001, dtype=dtype), torch.tensor([-bound, bound], dtype=dtype)))
    outside = torch.tensor([-2 * bound, 2 * bound, 1e6, -1e6], dtype=dtype)
    x = inside if form.tails == "bounded" else torch.cat((inside, outside))
    raw = torch.zeros(form.parameters(bins), 1, dtype=dtype)
    for inverse in (False, True):
        y, log_slope = rational_quadratic(x, raw, form, inverse=inverse)
        eps = 1e-6 if dtype == torch.float32 else 1e-14
        # a circular spline measures from the nearest multiple of 2 bound, which is as exact as x
        rtol = 2 * torch.finfo(dtype).eps if form.tails == "circular" else 0
        torch.testing.assert_close(y, x, rtol=rtol, atol=eps * bound)
        # the widths carry relative errors of bins·rounding
        torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=3 * eps * max(1, bins / 8))


# ---- calculus -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@every_form
def test_log_slope_is_that_of_autograd(inverse, form):
    x = points(form, 3, 50).requires_grad_()
    y, log_slope = rational_quadratic(x, draw(form.parameters(5), 3, 50, seed=1), form, inverse=inverse)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [1, 3])
@every_form
@pytest.mark.slow_for("linear-3-True", "bounded-1-*", "circular*-3-*")
def test_first_and_second_gradients_are_those_of_finite_differences(inverse, bins, form):
    x = points(form, 2, 2, seed=3).requires_grad_()
    form = replace(form, scale=0.7)
    raw = draw(form.parameters(bins), 2, 2, seed=4).requires_grad_()

    def f(x, raw):
        return rational_quadratic(x, raw, form, inverse=inverse)

    assert torch.autograd.gradcheck(f, (x, raw))
    assert torch.autograd.gradgradcheck(f, (x, raw), fast_mode=True)


@every_form
def test_either_output_may_go_without_a_gradient(form):
    x, raw = points(form, 5).requires_grad_(), draw(form.parameters(3), 5, seed=1).requires_grad_()
    y, log_slope = rational_quadratic(x, raw, form)
    both = torch.autograd.grad(y.sum() + log_slope.sum(), (x, raw), retain_graph=True)
    apart = [torch.autograd.grad(out.sum(), (x, raw), retain_graph=True) for out in (y, log_slope)]
    torch.testing.assert_close(both, tuple(map(torch.add, *apart)), rtol=0, atol=1e-12)


@every_form
def test_gradients_of_parameters_that_are_shared_add_up(form):
    x = points(form, 2, 7).requires_grad_()
    shared = draw(form.parameters(3), 2, 1, seed=1).requires_grad_()
    each = shared.detach().expand(-1, 2, 7).clone().requires_grad_()
    for inverse in (False, True):
        pair = []
        for raw in (shared, each):
            y, log_slope = rational_quadratic(x, raw, form, inverse=inverse)
            pair.append(torch.autograd.grad((y * draw(2, 7, seed=2)).sum() + (log_slope**2).sum(), (x, raw)))
        torch.testing.assert_close(pair[0][0], pair[1][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(pair[0][1], pair[1][1].sum(-1, keepdim=True), rtol=0, atol=1e-12)


def test_many_numbers_are_mapped_as_few_are():
    """Sums of bins are formed another way for many numbers."""
    x, raw = points(DURKAN, 2000), draw(23, 2000, seed=1)
    for inverse in (False, True):
        together = rational_quadratic(x, raw, DURKAN, inverse=inverse)
        apart = [rational_quadratic(x[i : i + 50], raw[:, i : i + 50], DURKAN, inverse=inverse) for i in (0, 700)]
        for i, some in zip((0, 700), apart, strict=True):
            torch.testing.assert_close(tuple(v[i : i + 50] for v in together), some, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bins=st.integers(1, 20),
    spread=st.floats(0.1, 3.0),
    bound=st.floats(0.1, 50.0),
    tails=st.sampled_from(["linear", "bounded", "circular"]),
)
def test_it_is_an_increasing_bijection_of_the_interval(seed, bins, spread, bound, tails):
    form = Form(bound, tails)
    raw = spread * draw(form.parameters(bins), 1, seed=seed)
    x = torch.linspace(-bound, bound, 401, dtype=torch.float64) * (1 if tails == "bounded" else 1.1)
    y, log_slope = rational_quadratic(x, raw, form)
    back, back_log_slope = rational_quadratic(y, raw, form, inverse=True)
    assert (y.diff() > -1e-14 * bound).all()
    assert ((y.abs() <= bound * (1 + 1e-14)) == (x.abs() <= bound)).all()
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8 * bound)
    torch.testing.assert_close(back_log_slope, -log_slope, rtol=0, atol=1e-6)


# ---- tails ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tails", ["bounded", "circular"])
def test_the_slope_at_the_ends_is_a_parameter_of_its_own(tails):
    form, raw = Form(BOUND, tails), draw(Form(BOUND, tails).parameters(4), 1, seed=2)
    _, log_slope = rational_quadratic(wide(-BOUND, BOUND), raw, form)
    ends = knots(raw, form).derivatives[[0, -1], 0].log()
    torch.testing.assert_close(log_slope, ends, rtol=0, atol=1e-12)
    assert ends.abs().min() > 0.05
    assert (ends[0] == ends[1]) == (tails == "circular")


def test_a_circular_spline_turns_with_its_input():
    """f(x + 2Bn) = f(x) + 2Bn, with value and slope continuous where the ends meet."""
    form, raw = Form(BOUND, "circular"), draw(12, 1, seed=3)
    x = points(Form(BOUND, "bounded"), 100)
    y, log_slope = rational_quadratic(x, raw, form)
    for turns in (-2, 1, 7):
        further, same = rational_quadratic(x + turns * 2 * BOUND, raw, form)
        torch.testing.assert_close(further, y + turns * 2 * BOUND, rtol=0, atol=1e-12)
        torch.testing.assert_close(same, log_slope, rtol=0, atol=1e-12)
    near = rational_quadratic(wide(-1e-9, 1e-9) + BOUND, raw, form)
    torch.testing.assert_close(near[0][0], near[0][1], rtol=0, atol=1e-8)
    torch.testing.assert_close(near[1][0], near[1][1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("inverse", [False, True])
def test_inputs_outside_a_bounded_spline_are_refused(inverse):
    form, raw = Form(BOUND, "bounded"), draw(10, 2, 3)
    x = torch.zeros(2, 3, dtype=torch.float64)
    x[0, 1], x[1, 2], x[1, 0] = math.nan, -3.25, BOUND  # NaN, and the ends, are let through
    with pytest.raises(
        ValueError, match=r"element \(1, 2\) \(the last axis counts items\) is -3.25, outside \[-3, 3\].*Raise bound"
    ):
        rational_quadratic(x, raw, form, inverse=inverse)
    x[1, 2] = -BOUND
    y, _ = rational_quadratic(x, raw, form, inverse=inverse)
    assert y.isnan().sum() == 1 and y[0, 1].isnan()
    torch.testing.assert_close((y[1, 0], y[1, 2]), (x[1, 0], x[1, 2]), rtol=1e-15, atol=0)
    x[1, 2] = 4.0  # under vmap nothing can be read
    hidden, _ = torch.func.vmap(lambda x, raw: rational_quadratic(x, raw, form, inverse=inverse), (0, 1))(x, raw)
    assert hidden.isnan().sum() == 2 and hidden[1, 2].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_bounded_spline_leaves_what_the_next_one_takes(dtype):
    form = Form(0.1, "bounded")  # in bfloat16 the bound rounds up
    x = torch.linspace(-1, 1, 3001, dtype=dtype) * torch.tensor(0.1, dtype=dtype)
    raw = draw(form.parameters(8), 3001, dtype=torch.float32, spread=3.0).to(dtype)
    for inverse in (False, True):
        y, _ = rational_quadratic(x, raw, form, inverse=inverse)
        rational_quadratic(y, raw, form, inverse=inverse)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_nan_stays_nan_and_spoils_nothing_else(inverse):
    x = wide(0.1, math.nan, 5.0, math.inf, -math.inf)
    raw = draw(8, 5)
    y, log_slope = rational_quadratic(x, raw, DURKAN, inverse=inverse)
    assert y[1].isnan() and log_slope[1].isnan()
    assert torch.equal(y[2:], x[2:]) and (log_slope[2:] == 0).all()
    clean, _ = rational_quadratic(x[:1], raw[:, :1], DURKAN, inverse=inverse)
    assert torch.equal(y[:1], clean)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_single_precision(low):
    x, raw = draw(3, 9).to(low), draw(14, 3, 9, seed=1).to(low)
    y, log_slope = rational_quadratic(x, raw, DURKAN)
    single, single_log_slope = rational_quadratic(x.float(), raw.float(), DURKAN)
    assert (y.dtype, log_slope.dtype) == (low, torch.float32)
    assert torch.equal(y, single.to(low)) and torch.equal(log_slope, single_log_slope)


@pytest.mark.parametrize("inverse", [False, True])
@every_form
def test_an_empty_batch(inverse, form):
    p = form.parameters(5)
    x, raw = draw(3, 0).requires_grad_(), draw(p, 3, 0).requires_grad_()
    y, log_slope = rational_quadratic(x, raw, form, inverse=inverse)
    gx, graw = torch.autograd.grad(y.sum() + log_slope.sum(), (x, raw))
    assert y.shape == log_slope.shape == gx.shape == (3, 0) and graw.shape == (p, 3, 0)


@pytest.mark.parametrize("inverse", [False, True])
@every_form
def test_under_vmap_and_functional_gradients(inverse, form):
    x, raw = points(form, 5, 3, 4), draw(5, form.parameters(5), 3, 4, seed=1)

    def f(x, raw):
        return rational_quadratic(x, raw, form, inverse=inverse)

    together = torch.func.vmap(f)(x, raw)
    alone = [f(*pair) for pair in zip(x, raw, strict=True)]
    torch.testing.assert_close(together, tuple(map(torch.stack, zip(*alone, strict=True))), rtol=0, atol=1e-13)
    diagonal = torch.func.vmap(torch.func.jacrev(lambda x, raw: f(x, raw)[0]))(x, raw)
    slopes = diagonal.flatten(3).flatten(1, 2).diagonal(dim1=1, dim2=2).reshape(5, 3, 4)
    torch.testing.assert_close(slopes.log(), together[1], rtol=0, atol=1e-12)

    def loss(x, raw):
        y, log_slope = f(x, raw)
        return (y**2 - log_slope).sum()

    each = torch.func.vmap(torch.func.grad(loss, (0, 1)))(x, raw)
    x.requires_grad_(), raw.requires_grad_()
    torch.testing.assert_close(each, torch.autograd.grad(loss(x, raw.movedim(0, 1)), (x, raw)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("form", "backend"),
    [
        (DURKAN, "aot_eager"),
        *(pytest.param(form, "aot_eager", marks=pytest.mark.slow) for form in list(FORMS.values())[1:]),
        *(pytest.param(form, "inductor", marks=pytest.mark.slow) for form in FORMS.values()),
    ],
)
@pytest.mark.slow_for("*-True")
def test_compiles_to_one_graph(inverse, form, backend):
    def f(x, raw):
        return rational_quadratic(x, raw, form, inverse=inverse)

    torch._dynamo.reset()
    x, raw = points(form, 3, 64).requires_grad_(), draw(form.parameters(5), 3, 64, seed=1).requires_grad_()
    outs = []
    for g in (f, torch.compile(f, fullgraph=True, backend=backend)):
        y, log_slope = g(x, raw)
        outs.append((y, log_slope, *torch.autograd.grad((y * log_slope).sum(), (x, raw))))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-9, atol=1e-9)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="linear tails need 3K-1 raw parameters"):
        rational_quadratic(torch.zeros(1), torch.zeros(12, 1), DURKAN)
    with pytest.raises(ValueError, match=r"bounded tails need 3K\+1 raw"):
        rational_quadratic(torch.zeros(1), torch.zeros(1, 1), Form(BOUND, "bounded"))
    with pytest.raises(ValueError, match="at most 1000 bins"):
        rational_quadratic(torch.zeros(1), torch.zeros(3 * 1001 - 1, 1), DURKAN)
