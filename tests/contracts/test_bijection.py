"""What every registered bijection must do, on vectors and on images: invert, measure volume, and learn."""

import pytest
import torch

from genmodels.flows.bijection import Bijection, Chain
from genmodels.registry import ConfigError, build, names, resolve

NETWORK = {"name": "residual_mlp", "hidden": 16, "blocks": 1}
ARGUMENTS = {  # what has no default; anything else is built as it is
    "autoregressive": {"network": {"name": "made", "hidden": 8, "blocks": 1}},
    "repeat": {"layers": [{"name": "permutation"}, {"name": "coupling", "network": NETWORK}], "count": 2},
    "nflows": {"transform": "PiecewiseRationalQuadraticCDF", "arguments": {"tails": "linear", "tail_bound": 3.0}},
    "zuko": {"flow": "NSF", "arguments": {"transforms": 1, "passes": 2, "bins": 4, "hidden_features": [16]}},
    "inverse": {"of": {"name": "coupling", "network": NETWORK}},
    "fold": {"height": 3},
    "continuous": {  # weak enough for the bounds on rounding below to hold for its solver
        "network": {"name": "concat_mlp", "hidden": [8]},
        "end": 0.05,
        "controller": {"name": "fixed", "steps": 6},
    },
    "row_autoregressive": {"network": {"name": "wavenet2d", "channels": 6, "layers": 3, "height_cycle": 2}},
    "multiscale": {
        "levels": [[{"name": "permutation"}, {"name": "coupling", "network": NETWORK}], [{"name": "elementwise"}]]
    },
}
SHAPES = [(2,), (5,), (3, 2, 4), (4, 3)]
IMAGES = {  # what does not work on every shape
    "squeeze": [(1, 4, 4), (3, 2, 4)],
    "autoregressive": [(5,), (2,)],
    "fold": [(12,), (3,)],
    "row_autoregressive": [(1, 3, 4), (2, 4, 3)],
}
VECTORS = {"row_autoregressive": (2, 12)}  # conditions, where (2, 3) does not fit


def usual(name, shape):
    """The shape, or the first of those on which the bijection works."""
    return IMAGES[name][0] if name in IMAGES else shape


def make(name, shape, num_classes=None, condition_shape=None, scale=0.3, **more):
    """The bijection in float64 with every parameter moved off its start, so that no term is zero by initialisation."""
    cls_arguments = ARGUMENTS.get(name, {})
    try:
        node = resolve(Bijection, {"name": name, **cls_arguments, **more}, "test")
    except ConfigError:
        node = resolve(Bijection, {"name": name, **cls_arguments, "network": NETWORK, **more}, "test")
    torch.manual_seed(1)
    made = build(Bijection, node, shape=shape, num_classes=num_classes, condition_shape=condition_shape).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return made.eval()


def items(n, shape, seed=2, spread=1.5):
    return spread * torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CASES = [(name, shape) for name in names(Bijection) for shape in IMAGES.get(name, SHAPES)]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_inverse_undoes_forward(name, shape):
    f, x = make(name, shape), items(64, shape)
    z, log_det = f(x)
    back, back_log_det = f.inverse(z)
    assert z.shape == (64, *f.out_shape)
    assert back.shape == x.shape
    assert log_det.shape == back_log_det.shape == (64,)
    assert log_det.dtype == back_log_det.dtype == torch.float64
    error = (back - x).abs().flatten(1).amax(1)
    for k in (error > 1e-10).nonzero().flatten().tolist():
        # z itself is rounded: no inverse can be nearer than that, magnified by the slope of the inverse map there
        assert error[k] < rounding(f, x[k], z[k])
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=1e-9)


def rounding(f, x, z):
    """u |J⁻¹|_∞ |z|_∞ with J the Jacobian at x, u = 2⁻⁵²."""
    n = x.numel()
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v[None])[0][0].flatten(), x).reshape(n, n)
    return 2**-52 * torch.linalg.inv(jacobian).abs().sum(1).max() * z.abs().max()


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_log_det_is_that_of_the_jacobian(name, shape):
    f, x = make(name, shape), items(3, shape)
    n = x[0].numel()
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda v: f(v[None])[0][0].flatten(), row).reshape(n, n) for row in x]
    )
    torch.testing.assert_close(f(x)[1], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_gradients_reach_every_parameter(name, shape):
    f, x = make(name, shape), items(64, shape).requires_grad_()
    for z, log_det in (f(x), f.inverse(f(x)[0].detach().requires_grad_())):
        f.zero_grad()
        ((z * items(1, z.shape[1:], seed=4)).sum() + log_det.sum()).backward()
        for key, parameter in f.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", names(Bijection))
@pytest.mark.parametrize("kind", ["labels", "vectors"])
def test_the_condition_matters_where_there_is_a_network(name, kind):
    vectors = VECTORS.get(name, (2, 3))
    sizes = {"num_classes": 3} if kind == "labels" else {"condition_shape": vectors}
    shape = usual(name, (5,))
    f, x = make(name, shape, **sizes), items(4, shape)
    labels = torch.tensor([0, 1, 2, 0])
    condition = labels if kind == "labels" else items(4, vectors, seed=5)
    given, other = f(x, condition), f(x, (labels + 1) % 3 if kind == "labels" else condition + 1)
    learns = any("network" in key or "hyper" in key for key, _ in f.named_modules())
    assert ((given[0] - other[0]).flatten(1).abs().amax(1) > 1e-6).all() == learns
    torch.testing.assert_close(f.inverse(given[0], condition)[0], x, rtol=0, atol=1e-10)
    rows = [f(x[i : i + 1], condition[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(given, tuple(map(torch.cat, zip(*rows, strict=True))), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_items_do_not_see_their_batch(name, shape):
    f, x = make(name, shape), items(6, shape)
    whole, alone = f(x), [f(row[None]) for row in x]
    torch.testing.assert_close(whole, tuple(map(torch.cat, zip(*alone, strict=True))), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_an_empty_batch_stays_empty(name, shape):
    f = make(name, shape)
    z, log_det = f(items(0, shape))
    x, _ = f.inverse(z)
    assert (z.shape, x.shape, log_det.shape) == ((0, *f.out_shape), (0, *shape), (0,))


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("far", [1e6, -1e6])
def test_far_out_items_stay_finite_and_come_back(name, shape, far):
    f = make(name, shape)
    x = (far + items(4, shape)).requires_grad_()
    z, log_det = f(x)
    back, _ = f.inverse(z)
    (gradient,) = torch.autograd.grad(log_det.sum() + z.sum(), x)
    assert log_det.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(back, x, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_single_precision_agrees_with_double(name, shape):
    f, x = make(name, shape), items(64, shape)
    z, log_det = f(x)
    single_z, single_log_det = f.float()(x.float())
    assert single_z.dtype == torch.float32
    assert single_log_det.dtype == torch.float64
    torch.testing.assert_close(single_z.double(), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single_log_det, log_det, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", names(Bijection))
def test_a_chain_of_it_adds_log_dets_and_reverses_the_order(name):
    shape = usual(name, (4,))
    first, x = make(name, shape), items(16, shape)
    second = make("act_norm" if name == "fold" else name, first.out_shape, scale=0.2)  # what is folded stays so
    both = Chain([first, second])
    y, one = first(x)
    z, two = second(y)
    torch.testing.assert_close(both(x), (z, one + two), rtol=0, atol=1e-12)
    torch.testing.assert_close(both.inverse(z), (x, -one - two), rtol=0, atol=1e-9)


@pytest.mark.parametrize("split", ["half", "alternating"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", [n for n in names(Bijection) if n.endswith("coupling")])
def test_a_coupling_keeps_one_part_and_transforms_the_other(name, split, swap):
    f, x = make(name, (5,), split=split, swap=swap), items(8, (5,))
    first = torch.tensor([0, 1] if split == "half" else [0, 2, 4])
    second = torch.tensor([2, 3, 4] if split == "half" else [1, 3])
    kept, changed = (second, first) if swap else (first, second)
    z, _ = f(x)
    assert torch.equal(z[:, kept], x[:, kept])
    assert ((z - x)[:, changed].abs() > 1e-6).any(0).all()


def test_a_free_spline_on_the_kept_part_comes_after_the_network_has_seen_it():
    f, x = make("coupling", (5,), unconditional=True, scale=0.4), items(8, (5,))
    plain = make("coupling", (5,), scale=0.4)
    plain.load_state_dict({k: v for k, v in f.state_dict().items() if not k.startswith("own")})
    z, log_det = f(x)
    expected, expected_log_det = plain(x)
    own, more = f.own(x[:, :2])
    assert (own - x[:, :2]).abs().max() > 1e-3
    torch.testing.assert_close(z, torch.cat((own, expected[:, 2:]), 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, expected_log_det + more, rtol=0, atol=1e-12)
    torch.testing.assert_close(f.inverse(z)[0], x, rtol=0, atol=1e-10)


BOUNDED = {"map": {"name": "rational_quadratic", "parametrization": "bounded"}}
STARTS = [("lu_linear", {}), ("act_norm", {}), *((n, m) for n in ("coupling", "elementwise") for m in ({}, BOUNDED))]


@pytest.mark.parametrize(("name", "more"), STARTS)
def test_layers_start_as_the_identity(name, more):
    f, x = make(name, (3, 2, 4), scale=0.0, **more), items(16, (3, 2, 4))
    z, log_det = f(x)
    # parameters are made in float32; only the diagonal of U starts at a number that has no exact form there
    tolerance = 1e-6 if name == "lu_linear" else 1e-12
    torch.testing.assert_close(z, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(log_det, torch.zeros(16, dtype=torch.float64), rtol=0, atol=24 * tolerance)


def test_lu_linear_reproduces_a_worked_example():
    f = make("lu_linear", (3,), scale=0.0)
    given = {
        "lower": [0.1, -0.2, 0.3],
        "upper": [0.5, -0.4, 0.25],
        "diagonal": [0.0, 1.0, -1.0],
        "bias": [0.1, 0.2, 0.3],
    }
    f.load_state_dict({key: torch.tensor(value, dtype=torch.float64) for key, value in given.items()})
    lower, upper = f.factors()
    w = [[0.69414718, 0.5, -0.4], [0.06941472, 1.36426169, 0.21], [-0.13882944, 0.29427851, 0.46926169]]
    torch.testing.assert_close(lower @ upper, torch.tensor(w, dtype=torch.float64), rtol=0, atol=1e-8)
    z, log_det = f(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64))
    expected = torch.tensor([[-0.40585282, -2.35410866, -0.1927556]], dtype=torch.float64)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-8)
    assert abs(log_det.item() + 1.2493254520480346) < 1e-12
    # single precision parameters, double precision log-determinant
    assert abs(f.float()(torch.zeros(1, 3))[1].item() + 1.2493254520480346) < 1e-6


def test_lu_linear_on_images_acts_on_the_channels_of_each_pixel():
    f, x = make("lu_linear", (3, 2, 4)), items(5, (3, 2, 4))
    lower, upper = f.factors()
    expected = torch.einsum("ij,bjhw->bihw", lower @ upper, x) + f.bias[:, None, None]
    z, log_det = f(x)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, 8 * torch.linalg.slogdet(lower @ upper)[1].expand(5), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(4,), (3, 2, 4)])
def test_act_norm_normalises_its_first_batch_and_no_other(shape):
    f = make("act_norm", shape, scale=0.0)
    x = items(32, shape) * 3 + 5
    x[:, 1] = 0.7 + 1e-9 * x[:, 1]  # a channel that is constant up to rounding in float32
    f.initialize(x)
    z = f(x)[0].movedim(1, 0).flatten(1)
    varying = [0, *range(2, shape[0])]
    torch.testing.assert_close(z.mean(1), torch.zeros_like(z[:, 0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std(1)[varying], torch.ones_like(z[varying, 0]), rtol=0, atol=1e-12)
    assert f.log_scale[1].item() == 0
    state = {key: value.clone() for key, value in f.state_dict().items()}
    f.initialize(items(32, shape, seed=9))
    restored = make("act_norm", shape, scale=0.0)
    restored.load_state_dict(state)
    restored.initialize(items(32, shape, seed=9))
    for g in (f, restored):
        assert all(torch.equal(value, g.state_dict()[key]) for key, value in state.items())


def test_act_norm_refuses_a_batch_of_one():
    with pytest.raises(ValueError, match="at least two items"):
        make("act_norm", (4,)).initialize(items(1, (4,)))


def test_errors_name_the_way_out():
    with pytest.raises(ConfigError, match="flatten"):
        make("coupling", (1, 8, 8))
    with pytest.raises(ValueError, match="bound > 0"):
        make("elementwise", (3,), map={"name": "rational_quadratic", "bound": 0.0})
    with pytest.raises(ValueError, match="at most 1000 bins"):
        make("elementwise", (3,), map={"name": "rational_quadratic", "bins": 1001})
    with pytest.raises(ConfigError, match="leaves a part empty"):
        make("coupling", (4,), mask=[0, 1, 2, 3])
    with pytest.raises(ConfigError, match="different places of 0 … 3"):
        make("coupling", (4,), mask=[1, 4])
    with pytest.raises(ValueError, match="count of at least 1"):
        make("repeat", (3,), count=0)


def test_a_permutation_keeps_its_order_in_a_checkpoint():
    f, other, x = make("permutation", (16,)), make("permutation", (16,), order="reverse"), items(2, (16,))
    assert torch.equal(other(x)[0], x.flip(1))
    other.load_state_dict(f.state_dict())
    assert torch.equal(other(x)[0], f(x)[0])
    assert not torch.equal(f(x)[0], x)
