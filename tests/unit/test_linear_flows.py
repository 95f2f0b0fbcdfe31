"""Linear bijections: kept inverses, Householder products, the published 1x1 convolution, batch norm, permutations."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from genmodels.flows.bijection import Bijection
from genmodels.flows.householder import reflected
from genmodels.registry import ConfigError, build, resolve

LINEAR = ["lu_linear", "conv1x1", "glow_conv1x1", "householder", "qr_linear", "svd_linear"]
every = pytest.mark.parametrize("name", LINEAR)


def make(name, shape=(5,), dtype=torch.float64, scale=0.3, **arguments):
    torch.manual_seed(0)
    node = resolve(Bijection, {"name": name, **arguments}, "test")
    f = build(Bijection, node, shape=shape, num_classes=None, condition_shape=None).to(dtype)
    with torch.no_grad():
        for p in f.parameters():
            p.add_(scale * torch.randn_like(p))
    return f.eval()


def items(n, *shape, seed=2):
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- inverses that are kept -----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)])
def test_the_kept_inverse_is_that_of_the_weight_and_is_made_once(name, shape, monkeypatch):
    f, z = make(name, shape), items(7, *shape)
    expected = torch.einsum("ij,bj...->bi...", torch.linalg.inv(f.weight()), z - _bias(f, z))
    solved, log_det = f.inverse(z)  # with gradients: by substitution
    torch.testing.assert_close(solved, expected, rtol=0, atol=1e-10)
    assert solved.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(f.inverse(z), (solved, log_det), rtol=0, atol=1e-10)
        monkeypatch.setattr(type(f), "solve", None)
        torch.testing.assert_close(f.inverse(z)[0], solved, rtol=0, atol=1e-10)


def _bias(f, like):
    return 0 if f.bias is None else f.bias.reshape(-1, *(1,) * (like.ndim - 2))


def _step(f):
    optimizer = torch.optim.Adam(f.parameters(), 0.1)
    f(items(4, 5).to(next(f.parameters())))[0].square().sum().backward()
    optimizer.step()


def _fused_step(f):
    for p in f.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(f.parameters(), 0.1, fused=True).step()


@torch.no_grad()
def _average(f):
    for p in f.parameters():
        p.copy_(0.9 * p)


def _behind_the_back(f):
    for p in f.parameters():
        p.data.mul_(0.9)  # changes no version


def _load(f):
    f.load_state_dict({k: v + 0.1 if v.is_floating_point() else v.flip(0) for k, v in f.state_dict().items()})


def _assign(f):
    f.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in f.state_dict().items()}, assign=True)


def _replace(f):
    for name, p in list(f.named_parameters()):
        setattr(f, name, nn.Parameter(p.detach() * 0.9))


CHANGES = [_step, _fused_step, _average, _behind_the_back, _load, _assign, _replace]


@every
@pytest.mark.parametrize("change", CHANGES)
def test_the_kept_inverse_follows_every_change_of_the_parameters(name, change):
    f, z = make(name), items(7, 5)
    with torch.no_grad():
        before = f.inverse(z)[0]
    change(f)
    fresh = f.inverse(z)[0].detach()
    with torch.no_grad():
        assert (f.inverse(z)[0] - before).abs().max() > 1e-3 or (name == "householder" and change != _load)
        torch.testing.assert_close(f.inverse(z)[0], fresh, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["conv1x1", "glow_conv1x1"])
@pytest.mark.parametrize("buffer", ["order", "sign"])
def test_the_kept_inverse_follows_permutations_and_signs(name, buffer):
    f, z = make(name), items(7, 5)
    with torch.no_grad():
        before = f.inverse(z)[0]
        getattr(f, buffer).copy_(f.order.roll(1) if buffer == "order" else -f.sign)
        assert (f.inverse(z)[0] - before).abs().max() > 1e-3
        torch.testing.assert_close(f(f.inverse(z)[0])[0], z, rtol=0, atol=1e-10)


@every
def test_the_kept_inverse_follows_its_parameters_into_copies_files_and_other_types(name):
    f, z = make(name), items(7, 5)
    with torch.no_grad():
        before = f.inverse(z)[0]
        for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
            assert "_kept" not in other.__dict__
            _average(other)
            if name != "householder":  # whose map does not change with the length of its vectors
                assert (other.inverse(z)[0] - before).abs().max() > 1e-3
            assert torch.equal(f.inverse(z)[0], before)
        single = f.float().inverse(z.float())[0]
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), before, rtol=0, atol=1e-5)
        assert f.double().inverse(z)[0].dtype == torch.float64
        assert not any("kept" in key for key in f.state_dict())


@every
def test_parameters_that_are_put_in_for_one_call_are_those_used(name):
    f, z = make(name), items(7, 5)
    other = {k: p.detach() + 0.1 for k, p in f.named_parameters()}
    with torch.no_grad():
        before = f.inverse(z)[0]
        swapped = _called(f, other, z)
        assert (swapped - before).abs().max() > 1e-3
        assert torch.equal(f.inverse(z)[0], before)
    stacked = {k: torch.stack((p.detach(), other[k])) for k, p in f.named_parameters()}
    with torch.no_grad():
        both = torch.vmap(lambda p: _called(f, p, z))(stacked)
    torch.testing.assert_close(both, torch.stack((before, swapped)), rtol=0, atol=1e-10)


class _Inverse(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, z):
        return self.f.inverse(z)[0]


def _called(f, parameters, z):
    return torch.func.functional_call(_Inverse(f), {f"f.{k}": p for k, p in parameters.items()}, (z,))


@pytest.mark.slow
def test_the_inverse_compiles_to_one_graph_without_gradients():
    """Comparing the kept numbers would break it."""
    f, z = make("conv1x1"), items(7, 5)
    with torch.no_grad():
        expected = f.inverse(z)
        found = torch.compile(f.inverse, fullgraph=True, backend="eager")(z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["lu_linear", "conv1x1", "qr_linear"])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_in_single_precision_the_product_is_no_worse_than_substitution(name, spread):
    """The error of x = W⁻¹ (z - b) in units of u |W⁻¹| |z - b|, u = 2⁻²⁴, over condition numbers of 2 to 3000.

    A sum of 32 roundings stays near √32 units, and so does the product. Substitution loses more where W is far from
    orthogonal (spread 2); with a spread of 0.3 both are at the level of single roundings, whose largest depends on the
    processor, so that only the bound of the product itself says something.
    """
    f = make(name, (32,), torch.float32, scale=spread / math.sqrt(32) if name != "qr_linear" else 0.3 * spread)
    z = items(64, 32).float()
    with torch.no_grad():
        x = f.inverse(z)[0].double()
        solved = f.solve(z - f.bias).double()
        wide = copy.deepcopy(f).double()
        rows = z.double() - wide.bias
        inverse = wide.solve(torch.eye(32, dtype=torch.float64)).mT
    exact, unit = rows @ inverse.mT, 2**-24 * (rows.abs() @ inverse.abs().mT)
    product, substitution = (((y - exact).abs() / unit).max() for y in (x, solved))
    assert product < 5.5 and (spread < 1 or product < substitution)


# ---- Householder reflections ----------------------------------------------------------------------------------------


def one_by_one(vectors):
    q = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    for v in vectors:
        q = q - torch.outer(v, v @ q) * 2 / v.dot(v)
    return q


@pytest.mark.parametrize(("n", "c"), [(1, 1), (1, 3), (2, 3), (10, 5), (64, 32), (101, 8)])
def test_the_product_of_reflections_is_that_of_one_after_another(n, c):
    v = items(n, c).requires_grad_()
    q, weights = reflected(v), items(c, c, seed=5)
    torch.testing.assert_close(q, one_by_one(v), rtol=0, atol=1e-13)
    # every unit reflection rounds once: n c u = 1e-13 at the largest size
    torch.testing.assert_close(q.mT @ q, torch.eye(c, dtype=torch.float64), rtol=0, atol=1e-13)
    assert abs(torch.linalg.det(q).item() - (-1) ** n) < 1e-12
    (ours,) = torch.autograd.grad((q * weights).sum(), v, retain_graph=True)
    (theirs,) = torch.autograd.grad((one_by_one(v) * weights).sum(), v)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_reflections_stay_orthogonal_in_single_precision_and_at_any_length_of_their_vectors():
    v = items(40, 16).float()
    for scaled in (v, 1e6 * v, 1e-6 * v, v[:1] + 1e-3 * v):  # the last nearly parallel
        q = reflected(scaled)
        assert (q.mT @ q - torch.eye(16)).abs().max() < 40**2 * 2**-24  # of parallel vectors all n² products count


@pytest.mark.parametrize("name", ["householder", "qr_linear", "svd_linear"])
def test_reflections_start_as_the_identity_where_they_come_in_pairs(name):
    x = items(8, 6)
    for n in (2, 10, 20):
        z, log_det = make(name, (6,), scale=0, reflections=n)(x)
        torch.testing.assert_close(z, x, rtol=0, atol=1e-12)
        assert log_det.abs().max() == 0
    z, _ = make(name, (6,), scale=0, reflections=3)(x)
    torch.testing.assert_close(z.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
    if name == "householder":
        assert make(name, (6,), reflections=3).inverse(z)[1].abs().max() == 0


def test_qr_and_svd_products_have_the_volume_they_say():
    for name in ("qr_linear", "svd_linear"):
        f = make(name, (6, 2, 2), reflections=4)
        expected = 4 * torch.linalg.slogdet(f.weight())[1]
        torch.testing.assert_close(f(items(1, 6, 2, 2))[1][0], expected, rtol=0, atol=1e-12)
    singular = torch.linalg.svdvals(f.weight())
    torch.testing.assert_close(singular, f.log_diagonal.exp().sort(descending=True)[0], rtol=0, atol=1e-12)
    q, r = make("qr_linear", (6,)).factors()
    assert torch.equal(r, r.triu()) and (r.diagonal() > 0).all()
    torch.testing.assert_close(q.mT @ q, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["householder", "qr_linear", "svd_linear"])
def test_no_reflections_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}.reflections: at least one is needed, found 0"):
        make(name, reflections=0)


# ---- the published 1x1 convolution ----------------------------------------------------------------------------------


def test_the_published_convolution_has_its_structure_and_number_of_parameters():
    assert sum(p.numel() for p in make("glow_conv1x1", (12, 2, 2)).parameters()) == 300  # 2 · 12² + 12
    assert sum(p.numel() for p in make("conv1x1", (12, 2, 2)).parameters()) == 12**2 + 12
    f, x = make("glow_conv1x1", (7, 2, 3)), items(3, 7, 2, 3)
    eye = torch.eye(7, dtype=torch.float64)
    p = eye[f.order]
    s = torch.diag(f.sign * f.log_diagonal.exp())
    w = p @ (f.lower.tril(-1) + eye) @ (f.upper.triu(1) + s)
    z, log_det = f(x)
    torch.testing.assert_close(z, torch.einsum("ij,bjhw->bihw", w, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, 6 * torch.linalg.slogdet(w)[1].expand(3), rtol=0, atol=1e-11)
    z.sum().backward()
    assert f.lower.grad.triu().abs().max() == 0 and f.upper.grad.tril().abs().max() == 0
    assert not torch.equal(f.order, torch.arange(7)) and set(f.sign.tolist()) == {-1.0, 1.0}


def test_the_published_convolution_starts_at_a_rotation():
    w = make("glow_conv1x1", (16,), scale=0).weight()
    # parameters were rounded to float32, and products of triangles of an orthogonal matrix stay of its size
    torch.testing.assert_close(w.mT @ w, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (w.abs() > 0.01).double().mean() > 0.8, "every channel is mixed with every other"


# ---- batch norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3)])
def test_batch_norm_normalises_by_its_batch_in_training(shape):
    f, x = make("batch_norm", shape).train(), 3 * items(16, *shape) + 5
    channels = x.movedim(1, 0).flatten(1)
    mean, variance = channels.mean(1), channels.var(1)
    z, log_det = f(x)
    out = z.movedim(1, 0).flatten(1)
    torch.testing.assert_close(out.mean(1), f.shift.flatten(), rtol=0, atol=1e-12)
    factor = f.log_scale.flatten().exp() * (variance + 1e-5).rsqrt()
    torch.testing.assert_close(out.std(1), factor * variance.sqrt(), rtol=0, atol=1e-12)
    expected = factor.log().sum() * math.prod(shape[1:])
    torch.testing.assert_close(log_det, expected.expand(16), rtol=0, atol=1e-12)
    # running averages: nine parts of the start (0 and 1), one of the batch
    torch.testing.assert_close(f.mean.flatten(), 0.1 * mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(f.variance.flatten(), 0.9 + 0.1 * variance, rtol=0, atol=1e-12)
    z, log_det = f.eval()(x)
    torch.testing.assert_close(f.inverse(z), (x, -log_det), rtol=0, atol=1e-11)
    assert torch.equal(f(x[:1])[0], z[:1]), "one item is its own batch in eval mode"


def test_gradients_flow_through_the_statistics_of_the_batch():
    f, x = make("batch_norm", (3,), scale=0).train(), items(8, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(f(x)[1].sum(), x)
    # of -n/2 Σ log(v + eps), v = Σ (x - m)²/(n - 1)
    expected = -8 * (x - x.mean(0)) / 7 / (x.var(0) + 1e-5)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda v: f(v)[0], (x,))


def test_batch_norm_is_nearly_the_identity_before_it_has_seen_data():
    f, x = make("batch_norm", (8,), scale=0), items(5, 8)
    z, log_det = f(x)
    torch.testing.assert_close(z, x, rtol=1e-5, atol=0)
    assert log_det.abs().max() < 8e-5


def test_batch_norm_starts_from_its_first_batch_and_no_other():
    f, x = make("batch_norm", (3, 2, 2), scale=0), 3 * items(32, 3, 2, 2) + 1
    f.initialize(x)
    z = f(x)[0].movedim(1, 0).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.var(1), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)
    again = copy.deepcopy(f)
    again.initialize(items(32, 3, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), f.state_dict().values(), strict=True))


def test_batch_norm_refuses_what_it_cannot_do():
    f = make("batch_norm").train()
    with pytest.raises(ValueError, match=r"at least two items .* found 1. Use a larger train.batch_size"):
        f(items(1, 5))
    with pytest.raises(ValueError, match="at least two items"):
        f.eval().initialize(items(1, 5))
    with pytest.raises(ValueError, match=r"cannot be inverted. Call .eval\(\) first"):
        f.train().inverse(items(4, 5))
    for wrong in ({"momentum": 0.0}, {"momentum": 1.5}, {"eps": 0.0}):
        with pytest.raises(ConfigError, match="0 < momentum <= 1 and eps > 0"):
            make("batch_norm", **wrong)


# ---- no layer waits for its device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LINEAR, "permutation", "act_norm", "batch_norm"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_reads_a_value_in_forward(name, training):
    """The meta device has no values to read."""
    f = make(name, (4, 2, 2), torch.float32).to("meta").train(training)
    z, log_det = f(torch.empty(6, 4, 2, 2, device="meta"))
    assert z.shape == (6, 4, 2, 2) and log_det.shape == (6,)
    if not (training and name == "batch_norm"):
        with torch.no_grad():
            assert f.inverse(z)[0].shape == (6, 4, 2, 2)


# ---- permutations ---------------------------------------------------------------------------------------------------


def test_an_order_may_be_given():
    f, x = make("permutation", (4,), order=(2, 0, 3, 1)), items(3, 4)
    assert torch.equal(f(x)[0], x[:, [2, 0, 3, 1]]) and torch.equal(f.inverse(f(x)[0])[0], x)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 2, 2), (1, 2, 3, 4), (0, 1, 2, -1), (0, 1, 2, 3, 4), ()])
def test_orders_that_are_none_are_refused(order):
    with pytest.raises(ConfigError, match=r"permutation.order: a list that holds each of 0 … 3 once"):
        make("permutation", (4,), order=order)


def test_other_words_for_an_order_are_refused():
    with pytest.raises(ConfigError, match="order"):
        make("permutation", (4,), order="revers")
