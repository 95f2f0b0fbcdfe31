"""What every registered monotone map must do: increase, invert, measure its slope, and learn, wherever it is run."""

import math

import pytest
import torch

from genmodels.flows.monotone import Affine, Monotone
from genmodels.registry import build, names, resolve

VARIANTS = {  # beside the defaults; every value of an option that changes the formula
    "rational_quadratic": [
        {"tails": "bounded"},
        {"tails": "circular"},
        {"parametrization": "bounded"},
        {"tails": "circular", "parametrization": "bounded", "bins": 3},
        {"bins": 1},
        {"identity": False},
    ],
    "quadratic_spline": [{"tails": "bounded"}, {"bins": 3}],
    "affine": [{"form": "exp"}, {"form": "softplus"}, {"form": "glow"}],
    "logistic_mixture": [{"components": 1}, {"identity": False}],
}
CASES = [(name, more) for name in names(Monotone) for more in ({}, *VARIANTS.get(name, ()))]
IDS = [" ".join((name, *map(str, more.values()))) for name, more in CASES]
# how far zero parameters are from the identity at most, as |y - x| <= share·|x|; the others are exact
NEAR = {"sigmoid": 0.12, "glow": 0.12}


def make(name, more):
    return build(Monotone, resolve(Monotone, {"name": name, **more}, "test"))


def draw(*shape, seed=0, spread=1.0, dtype=torch.float64):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bounded(map):
    return getattr(map, "tails", getattr(getattr(map, "form", None), "tails", None)) == "bounded"


def points(map, *shape, seed=0, dtype=torch.float64):
    """Inputs in and, where it is defined there, outside the interval that splines act on."""
    reach = 3.0 if bounded(map) else 5.0
    return reach * (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 1)


def parameters(map, *shape, seed=1, spread=1.0, dtype=torch.float64):
    return draw(map.parameters, *shape, seed=seed, spread=spread, dtype=dtype)


@pytest.fixture(params=CASES, ids=IDS)
def map(request):
    return make(*request.param)


def test_it_increases(map):
    x = points(map, 400).sort()[0]
    for seed in range(5):
        y, log_slope = map(x, parameters(map, 1, seed=seed, spread=2.0))
        assert (y.diff() > 0).all()
        assert log_slope.isfinite().all()


@pytest.mark.parametrize("inverse", [False, True])
def test_log_slope_is_that_of_autograd(map, inverse):
    x = points(map, 3, 50).requires_grad_()
    y, log_slope = map(x, parameters(map, 3, 50), inverse=inverse, scale=0.6)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope.expand(3, 50), slope.log(), rtol=0, atol=1e-10)


def test_inverse_undoes_it(map):
    x, raw = points(map, 3, 200), parameters(map, 3, 200, spread=2.0)
    y, log_slope = map(x, raw, scale=0.6)
    back, back_log_slope = map(y, raw, inverse=True, scale=0.6)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back_log_slope, -log_slope, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_parameters_are_the_identity(map, dtype):
    if not map.identity:
        pytest.skip("it does not say so")
    x = points(map, 1000, dtype=dtype)
    for inverse in (False, True):
        y, log_slope = map(x, torch.zeros(map.parameters, 1, dtype=dtype), inverse=inverse)
        near = NEAR.get(getattr(map, "form", None) if isinstance(getattr(map, "form", None), str) else None, 0.0)
        atol = 1e-6 if dtype == torch.float32 else 1e-13
        assert ((y - x).abs() <= near / (1 - near) * x.abs() + 3 * atol).all()
        torch.testing.assert_close(log_slope, 0 * log_slope, rtol=0, atol=near / (1 - near) + 3 * atol)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.slow_for("logistic_mixture 1-True", "logistic_mixture False-True")
def test_gradients_are_those_of_finite_differences(map, inverse):
    """Of both outputs, to the input and to every raw parameter, through the inverse too; and those of the gradients."""
    x, raw = points(map, 6, seed=3).requires_grad_(), parameters(map, 6, seed=4).requires_grad_()

    def f(x, raw):
        return map(x, raw, inverse=inverse, scale=0.6)

    assert torch.autograd.gradcheck(f, (x, raw), fast_mode=True, atol=1e-6)
    assert torch.autograd.gradgradcheck(f, (x, raw), fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_reach_every_parameter(map, inverse):
    x, raw = points(map, 300, seed=3), parameters(map, 1, seed=4, spread=0.3).requires_grad_()
    y, log_slope = map(x, raw, inverse=inverse)
    if (map.parameters == 2 and not isinstance(map, Affine)) or getattr(map, "components", None) == 1:
        pytest.skip("the logits of one share do nothing")
    for out in (y, y + log_slope):
        (gradient,) = torch.autograd.grad((out * draw(300)).sum(), raw, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient.abs() > 1e-8).all()


def test_the_scale_matters_only_to_logits_of_shares(map):
    x, raw = points(map, 50), parameters(map, 50)
    same = torch.equal(map(x, raw)[0], map(x, raw, scale=0.3)[0])
    logits = getattr(map, "bins", getattr(getattr(map, "form", None), "bins", None)) or hasattr(map, "floor")
    assert same == (not logits or map.parameters == 2)  # one bin has nothing to share


@pytest.mark.parametrize(
    ("name", "more", "logits"),
    [
        ("rational_quadratic", {"identity": False}, 16),
        ("rational_quadratic", {"parametrization": "bounded", "identity": False}, 16),
        ("linear_spline", {}, 8),
        ("quadratic_spline", {}, 15),  # widths and slopes at knots: the published couplings divide both
        ("quadratic_spline", {"tails": "bounded"}, 17),
    ],
)
def test_the_scale_is_a_factor_on_logits(name, more, logits):
    map = make(name, more)
    x, raw = points(map, 50), parameters(map, 50)
    scaled = torch.cat((0.3 * raw[:logits], raw[logits:]))
    for inverse in (False, True):
        torch.testing.assert_close(map(x, raw, inverse=inverse, scale=0.3), map(x, scaled, inverse=inverse))


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_single_precision_is_near_double(map, spread):
    """Errors of rounding are magnified by the slope: 200 ulp of the interval times 1 + slope."""
    x, raw = points(map, 2000, dtype=torch.float32), parameters(map, 2000, spread=spread, dtype=torch.float32)
    for inverse in (False, True):
        if inverse and spread > 1:
            continue  # there the conditioning of the inverse decides, which the next test measures
        y, log_slope = map(x, raw, inverse=inverse)
        exact, exact_log_slope = map(x.double(), raw.double(), inverse=inverse)
        assert y.dtype == log_slope.dtype == torch.float32
        limit = 200 * torch.finfo(torch.float32).eps * (5 + exact.abs()) * (1 + exact_log_slope.exp())
        assert ((y - exact).abs() < limit).all()


def test_hard_parameters_and_far_inputs_stay_finite_in_single_precision(map):
    far = [] if bounded(map) else [-1e6, -1e3, 1e3, 1e6]
    x = torch.cat((points(map, 2000, dtype=torch.float32), torch.tensor([0.0, 3.0, -3.0, *far]))).requires_grad_()
    raw = parameters(map, len(x), spread=6.0, dtype=torch.float32).requires_grad_()
    for inverse in (False, True):
        y, log_slope = map(x, raw, inverse=inverse)
        for value in (y, log_slope, *torch.autograd.grad(y.sum() + log_slope.sum(), (x, raw))):
            assert value.isfinite().all()
    if far:
        y, _ = map(map(x, raw)[0], raw, inverse=True)
        again, _ = map(y, raw)
        torch.testing.assert_close(again, map(x, raw)[0], rtol=1e-2, atol=3e-2)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_single_precision(map, low):
    x, raw = points(map, 3, 9).to(low), parameters(map, 3, 9).to(low)
    for inverse in (False, True):
        y, log_slope = map(x, raw, inverse=inverse)
        single, single_log_slope = map(x.float(), raw.float(), inverse=inverse)
        assert (y.dtype, log_slope.dtype) == (low, torch.float32)
        assert torch.equal(y, single.to(low)) and torch.equal(log_slope, single_log_slope)


def test_an_empty_batch_and_a_nan(map):
    for inverse in (False, True):
        y, log_slope = map(torch.zeros(3, 0), torch.zeros(map.parameters, 3, 0), inverse=inverse)
        assert y.shape == log_slope.shape == (3, 0)
        y, _ = map(torch.tensor([math.nan, 0.5]), parameters(map, 2, dtype=torch.float32), inverse=inverse)
        assert y.isnan().tolist() == [True, False]


@pytest.mark.parametrize("inverse", [False, True])
def test_under_vmap(map, inverse):
    x, raw = points(map, 5, 4), parameters(map, 5, 4)

    def loss(x, raw):
        y, log_slope = map(x, raw, inverse=inverse)
        return (y**2 - log_slope).sum()

    each = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, 1))(x, raw)
    x.requires_grad_(), raw.requires_grad_()
    gx, graw = torch.autograd.grad(loss(x, raw), (x, raw))
    torch.testing.assert_close(each, (gx, graw.movedim(1, 0)), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("inverse", [False, True])
def test_compiles_to_one_graph(map, inverse):
    def f(x, raw):
        return map(x, raw, inverse=inverse)

    torch._dynamo.reset()
    x, raw = points(map, 3, 64).requires_grad_(), parameters(map, 3, 64).requires_grad_()
    outs = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        y, log_slope = g(x, raw)
        outs.append((y, log_slope, *torch.autograd.grad((y * log_slope).sum(), (x, raw))))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-9, atol=1e-9)
