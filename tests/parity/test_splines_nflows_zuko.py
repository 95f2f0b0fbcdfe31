"""Our splines and couplings against the independent implementations of nflows and zuko, in double precision."""

import pytest
import torch

from genmodels.flows.bijection import Bijection
from genmodels.flows.splines import bounded, durkan, rational_quadratic
from genmodels.registry import build, resolve

nflows_splines = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
zuko_transforms = pytest.importorskip("zuko.transforms")


def draw(*shape, seed=0, spread=1.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(raw, bins):
    """Our [3K-1, D, N] as widths, heights and derivatives with the bins last, [N, D, ·]."""
    return [part.permute(2, 1, 0) for part in raw.split((bins, bins, bins - 1))]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("bins", [2, 8, 20])
@pytest.mark.parametrize("bound", [1.0, 3.0])
def test_raw_parameters_mean_the_same_as_in_nflows(bins, bound, inverse):
    raw = draw(3 * bins - 1, 3, 200, seed=bins, spread=2.0).requires_grad_()
    x = draw(3, 200, seed=1, spread=bound).requires_grad_()
    ours = rational_quadratic(x, durkan(raw, bound, identity=False), bound, inverse=inverse)
    theirs = nflows_splines.unconstrained_rational_quadratic_spline(
        x.T, *split(raw, bins), inverse=inverse, tail_bound=bound
    )
    torch.testing.assert_close(ours, tuple(part.T for part in theirs), rtol=0, atol=1e-9)
    weights = draw(2, 3, 200, seed=2)
    grads = [
        torch.autograd.grad((weights[0] * y).sum() + (weights[1] * log_slope).sum(), (x, raw))
        for y, log_slope in (ours, [part.T for part in theirs])
    ]
    # theirs differentiates the square root of the inverse, which costs digits at small discriminants
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("bins", [2, 8, 20])
@pytest.mark.parametrize("bound", [1.0, 5.0])
def test_bounded_parameters_mean_the_same_as_in_zuko(bins, bound):
    raw = draw(3 * bins - 1, 3, 200, seed=bins, spread=3.0).requires_grad_()
    x = draw(3, 200, seed=1, spread=bound).requires_grad_()
    knots = bounded(raw, bound)
    y, log_slope = rational_quadratic(x, knots, bound)
    reference = zuko_transforms.MonotonicRQSTransform(*split(raw, bins), bound=bound)
    expected, expected_log_slope = reference.call_and_ladj(x.T)
    torch.testing.assert_close((y, log_slope), (expected.T, expected_log_slope.T), rtol=0, atol=1e-9)
    back, _ = rational_quadratic(x, knots, bound, inverse=True)
    torch.testing.assert_close(back, reference.inv(x.T).T, rtol=0, atol=1e-8)
    weights = draw(2, 3, 200, seed=2)
    ours = torch.autograd.grad((weights[0] * y).sum() + (weights[1] * log_slope).sum(), (x, raw))
    theirs = torch.autograd.grad((weights[0] * expected.T).sum() + (weights[1] * expected_log_slope.T).sum(), (x, raw))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("unconditional", [False, True])
def test_a_coupling_in_the_papers_form_is_that_of_nflows(unconditional):
    """The same conditioner gives the same map: masks, order of parameters, scaling of logits, order of operations."""
    couplings = pytest.importorskip("nflows.transforms.coupling")
    torch.manual_seed(0)
    layer = {
        "name": "coupling",
        "map": {"name": "rational_quadratic", "bins": 6, "identity": False},
        "split": "alternating",
    }
    layer |= {"unconditional": unconditional, "network": {"name": "residual_mlp", "hidden": 10}}
    node = resolve(Bijection, layer, "test")
    ours = build(Bijection, node, shape=(5,), num_classes=None, condition_shape=None).double()

    class Conditioner(torch.nn.Module):
        """Ours, with the parameters of each component next to one another, as theirs are."""

        hidden_features = 10

        def forward(self, inputs, context=None):
            out = ours.network(None, inputs)
            return out.unflatten(1, (17, -1)).transpose(1, 2).flatten(1)

    theirs = couplings.PiecewiseRationalQuadraticCouplingTransform(
        mask=torch.tensor([-1, 1, -1, 1, -1]),
        transform_net_create_fn=lambda inputs, outputs: Conditioner(),
        num_bins=6,
        tails="linear",
        tail_bound=3.0,
        apply_unconditional_transform=unconditional,
    ).double()
    if unconditional:
        own = theirs.unconditional_transform
        raw = draw(17, 3, seed=4)
        with torch.no_grad():
            widths, heights, derivatives = raw.T.split((6, 6, 5), 1)
            own.unnormalized_widths.copy_(widths)
            own.unnormalized_heights.copy_(heights)
            own.unnormalized_derivatives.copy_(derivatives)
            ours.own.raw.copy_(raw[..., None])
    x = draw(50, 5, spread=2.0)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.inverse(x), theirs.inverse(x), rtol=0, atol=1e-9)


def test_a_permuted_lu_layer_is_that_of_nflows():
    transforms = pytest.importorskip("nflows.transforms")
    theirs = transforms.LULinear(4, identity_init=False).double()
    ours = build(Bijection, resolve(Bijection, "lu_linear", ""), shape=(4,), num_classes=None, condition_shape=None)
    state = {
        "lower": theirs.lower_entries,
        "upper": theirs.upper_entries,
        "diagonal": theirs.unconstrained_upper_diag,
        "bias": theirs.bias,
    }
    ours = ours.double()
    ours.load_state_dict(state)
    x = draw(20, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.inverse(x)[0], theirs.inverse(x)[0], rtol=0, atol=1e-10)
