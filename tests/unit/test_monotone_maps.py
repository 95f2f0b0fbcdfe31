"""Linear and quadratic splines, mixtures of logistics, and affine maps against independent implementations."""

import math

import pytest
import torch

from genmodels.flows.mixture_map import FLOOR, LogisticMixture
from genmodels.flows.monotone import Affine, Monotone, RationalQuadratic
from genmodels.flows.piecewise import LinearSpline, QuadraticSpline
from genmodels.registry import ConfigError, build, names, resolve

BOUND = 3.0


def draw(*shape, seed=0, spread=1.0, dtype=torch.float64):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(outs, inputs):
    weights = draw(2, *outs[0].shape, seed=9)
    return torch.autograd.grad((weights[0] * outs[0]).sum() + (weights[1] * outs[1]).sum(), inputs)


# ---- splines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [2, 8, 20])
def test_the_linear_spline_is_that_of_nflows(bins, inverse):
    theirs = pytest.importorskip("nflows.transforms.splines.linear")
    raw, x = draw(bins, 300, spread=2.0).requires_grad_(), (1.5 * draw(300, seed=1)).requires_grad_()
    torch.set_default_dtype(torch.float64)  # theirs makes its grid of knots in the default type
    try:
        expected = theirs.unconstrained_linear_spline(x, raw.T, inverse=inverse, tail_bound=BOUND)
    finally:
        torch.set_default_dtype(torch.float32)
    ours = LinearSpline(bins, BOUND, floor=0.0)(x, raw, inverse=inverse)
    if inverse:  # theirs raises the last knot by 1e-6 before it takes slopes from it
        clear = (expected[0] < BOUND * (1 - 2 / bins)) | (expected[0] > BOUND)
        ours, expected = [[part.where(clear, 0.0) for part in pair] for pair in (ours, expected)]
    torch.testing.assert_close(tuple(ours), tuple(expected), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(ours, (x, raw)), gradients(expected, (x, raw)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [3, 8, 20])
def test_the_quadratic_spline_is_that_of_nflows(bins, inverse):
    theirs = pytest.importorskip("nflows.transforms.splines.quadratic")
    map = QuadraticSpline(bins, BOUND, "bounded")
    raw = draw(map.parameters, 300, spread=2.0).requires_grad_()
    x = draw(300, seed=1, spread=0.5).requires_grad_()
    edges = {"left": -BOUND, "right": BOUND, "bottom": -BOUND, "top": BOUND}
    expected = theirs.quadratic_spline(x, *raw.T.split((bins, bins + 1), -1), inverse=inverse, **edges)
    ours = map(x, raw, inverse=inverse)
    # theirs subtracts nearly equal numbers in its root, and divides by a difference of slopes
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 if not inverse else 1e-8)
    rtol = 1e-9 if not inverse else 1e-5
    torch.testing.assert_close(gradients(ours, (x, raw)), gradients(expected, (x, raw)), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("bins", [3, 8])
def test_linear_tails_join_the_quadratic_spline_with_slope_one(bins):
    """(Those of nflows 0.14 do not: it halves the outermost widths twice where it sets the outermost slopes.)"""
    map, x = QuadraticSpline(bins, BOUND), torch.tensor([-BOUND, BOUND], dtype=torch.float64)
    raw = draw(map.parameters, 1, spread=2.0)
    y, log_slope = map(x, raw)
    torch.testing.assert_close((y, log_slope), (x, torch.zeros_like(x)), rtol=0, atol=1e-12)
    _, near = map(x * (1 - 1e-9), raw)
    torch.testing.assert_close(near, torch.zeros_like(x), rtol=0, atol=1e-5)
    # inside, it is the bounded one with those slopes at its ends
    _, slopes = map._knots(raw, 1.0)
    raw_slopes = ((slopes - FLOOR) / (1 - FLOOR) * 50 - FLOOR).expm1().log()  # any multiple has the same shape
    free, inside = QuadraticSpline(bins, BOUND, "bounded"), torch.linspace(-BOUND, BOUND, 101, dtype=torch.float64)
    same = free(inside, torch.cat((raw[:bins], raw_slopes)))
    torch.testing.assert_close(map(inside, raw), same, rtol=0, atol=1e-10)


def test_two_equal_slopes_make_a_straight_bin():
    """Where the published inverse divides zero by zero."""
    map = QuadraticSpline(4, BOUND)
    y = torch.linspace(-BOUND, BOUND, 41).requires_grad_()
    raw = torch.zeros(map.parameters, 1).requires_grad_()
    x, log_slope = map(y, raw, inverse=True)
    torch.testing.assert_close((x, log_slope), (y, torch.zeros(41)), rtol=0, atol=2e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(x.sum() + log_slope.sum(), (y, raw)))


@pytest.mark.parametrize("spread", [6.0, 20.0])
@pytest.mark.parametrize("map", [LinearSpline(32), QuadraticSpline(32), QuadraticSpline(32, tails="bounded")])
def test_hard_parameters_of_splines(map, spread):
    x = torch.linspace(-BOUND, BOUND, 20_001)
    y, _ = map(x, draw(map.parameters, 1, spread=spread, dtype=torch.float32))
    assert y.diff().min() > -8 * torch.finfo(torch.float32).eps * BOUND
    assert y[0] == -BOUND and y[-1] <= BOUND


# ---- mixtures of logistics ------------------------------------------------------------------------------------------


def test_a_mixture_is_the_logit_of_its_distribution_function():
    from torch.distributions import AffineTransform, Categorical, SigmoidTransform, TransformedDistribution, Uniform

    k, n = 5, 60
    raw, x = draw(3 * k, n).requires_grad_(), (2 * draw(n, seed=1)).requires_grad_()
    log_s = raw[2 * k :] / (1 + raw[2 * k :].abs() / math.log(1e3))
    unit = Uniform(torch.zeros(n, k, dtype=torch.float64), 1, validate_args=False)
    inner = [SigmoidTransform().inv, AffineTransform(raw[k : 2 * k].T, log_s.T.exp())]
    laws = TransformedDistribution(unit, inner, validate_args=False)
    weights = Categorical(logits=raw[:k].T).probs
    cdf = (weights * laws.cdf(x[:, None])).sum(-1)
    expected = FLOOR * x + (1 - FLOOR) * cdf.logit()
    slope = torch.autograd.grad(expected.sum(), x, create_graph=True)[0]
    ours = LogisticMixture(k, identity=False)(x, raw)
    torch.testing.assert_close(ours, (expected, slope.log()), rtol=0, atol=1e-10)
    wanted, found = gradients((expected, slope.log()), (x, raw)), gradients(ours, (x, raw))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 6.0, 20.0])
def test_the_inverse_of_a_mixture_is_exact_to_rounding(spread, dtype):
    """|f(f⁻¹(y)) - y| within 8 ulp of what is rounded: y, the point times the slope, z_k, and log π_k."""
    map, n = LogisticMixture(), 5_000
    raw = draw(map.parameters, n, spread=spread, dtype=dtype)
    y = torch.cat((draw(n - 4, seed=1, spread=10.0, dtype=dtype), torch.tensor([-1e6, -1e3, 1e3, 1e6], dtype=dtype)))
    x, log_slope = map(y, raw, inverse=True)
    again, same = map(x, raw)
    log_pi, centre, log_s = map._law(raw)
    terms = (
        1
        + log_pi.abs().amax(0)
        + y.abs()
        + x.abs() * (-log_slope).exp()
        + ((x.abs() + centre.abs()) * (-log_s).exp()).amax(0)
    )
    assert ((again - y).abs() < 8 * torch.finfo(dtype).eps * terms).all()
    torch.testing.assert_close(same, -log_slope, rtol=0, atol=1e-6)


def test_the_slope_of_a_mixture_is_at_least_its_floor():
    raw = torch.tensor([0.0, 0.0, -60.0, 60.0, -20.0, -20.0])[:, None]  # two narrow components far apart
    x = torch.linspace(-80, 80, 4001).requires_grad_()
    map = LogisticMixture(2, identity=False)
    y, log_slope = map(x, raw)
    assert log_slope.min() >= math.log(FLOOR) - 1e-6
    assert log_slope.min() < math.log(FLOOR) + 1e-3
    back, _ = map(y.detach().requires_grad_(), raw, inverse=True)
    # y is rounded to half an ulp, which the slope of 1e-3 magnifies
    torch.testing.assert_close(
        back, x, rtol=0, atol=1e3 * torch.finfo(torch.float32).eps * float(y.detach().abs().max())
    )


def test_equal_components_of_a_mixture_part():
    """From zero parameters: without their gains all components would have the same gradients for ever."""
    x = draw(200)
    raw = torch.zeros(12, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((LogisticMixture(4)(x, raw)[0] * x**2).sum(), raw)
    for part in gradient[4:].unflatten(0, (2, 4))[..., 0]:
        assert part.diff().abs().min() > 0.1 * part.abs().max() / 4


# ---- affine maps ----------------------------------------------------------------------------------------------------

FORMS = {
    "sigmoid": lambda x, t, a: x * (torch.sigmoid(a + 2) + 1e-3) + t,
    "exp": lambda x, t, a: x * a.exp() + t,
    "glow": lambda x, t, a: (x + t) * torch.sigmoid(a + 2),
    "softplus": lambda x, t, a: x * (torch.nn.functional.softplus(a + math.log(math.expm1(0.999))) + 1e-3) + t,
}


@pytest.mark.parametrize("form", FORMS)
def test_affine_maps(form):
    x, raw = draw(50), draw(2, 50, seed=1)
    y, log_slope = Affine(form)(x, raw)
    torch.testing.assert_close(y, FORMS[form](x, *raw), rtol=0, atol=1e-12)
    slope = FORMS[form](x + 1, *raw) - FORMS[form](x, *raw)
    torch.testing.assert_close(log_slope, slope.log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_affine_maps_far_from_zero(form):
    """Logarithms of scales, not of numbers that underflow."""
    raw = torch.tensor([[0.0, 0.0], [-80.0, 80.0]])
    _, log_slope = Affine(form)(torch.ones(2), raw)
    assert log_slope.isfinite().all()


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "arguments", "problem"),
    [
        (RationalQuadratic, {"bins": 0}, "at least 1 bin and a bound > 0 are needed, found bins=0"),
        (RationalQuadratic, {"bound": 0.0}, "bound=0.0"),
        (RationalQuadratic, {"bins": 1001}, "at most 1000 bins"),
        (LinearSpline, {"bins": 0}, "linear_spline: at least 1 bin"),
        (LinearSpline, {"bins": 8, "floor": 0.2}, "at most 5 bins leave room for the floor 0.2"),
        (LinearSpline, {"floor": -0.1}, "which must be at least 0"),
        (QuadraticSpline, {"bins": 2}, "quadratic_spline: at least 3 bins"),
        (QuadraticSpline, {"bins": 0, "tails": "bounded"}, "at least 1 bin"),
        (QuadraticSpline, {"bound": math.inf}, "bound=inf"),
        (LogisticMixture, {"components": 0}, "at least one component"),
    ],
)
def test_wrong_arguments_are_refused(cls, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        cls(**arguments)


@pytest.mark.parametrize("name", ["rational_quadratic", "quadratic_spline"])
def test_unknown_tails_are_refused(name):
    with pytest.raises(ConfigError, match="tails"):
        build(Monotone, resolve(Monotone, {"name": name, "tails": "open"}, "test"))


@pytest.mark.parametrize("name", names(Monotone))
def test_wrong_numbers_of_parameters_are_refused(name):
    map = build(Monotone, resolve(Monotone, name, "test"))
    for wrong in (map.parameters - 1, map.parameters + 1):
        with pytest.raises(ValueError, match=f"found {wrong}"):
            map(torch.zeros(3), torch.zeros(wrong, 3))
