"""Autoregressive layers beside those of nflows, with its weights, and masked networks beside those of zuko."""

import math

import pytest
import torch
from torch import Tensor, nn

from genmodels.flows.bijection import Bijection
from genmodels.registry import build
from tests.unit.test_made import make, steering

SPLINE = {"name": "rational_quadratic", "identity": False}
SHIFT = math.log(math.expm1(1 - 1e-3))  # nflows has softplus(a), ours softplus(a + SHIFT)


def theirs(kind: str, dim: int, residual: bool) -> nn.Module:
    from nflows.transforms import autoregressive

    sizes = {"features": dim, "hidden_features": 19, "num_blocks": 2, "use_residual_blocks": residual}
    if kind == "spline":
        spline = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        return spline(num_bins=8, tails="linear", tail_bound=3.0, **sizes)
    return autoregressive.MaskedAffineAutoregressiveTransform(**sizes)


def ours(kind: str, dim: int, residual: bool, reference: nn.Module) -> Bijection:
    """Our layer with the weights of theirs: names and the order of output rows differ, masks and numbers do not."""
    network = {"name": "made", "hidden": 19, "residual": residual}
    map = SPLINE if kind == "spline" else {"name": "affine", "form": "softplus"}
    f = build(
        Bijection,
        {"name": "autoregressive", "map": map, "network": network},
        shape=(dim,),
        num_classes=None,
        condition_shape=None,
    ).to(next(reference.parameters()))
    state, made = {}, reference.autoregressive_net
    layers = [layer for block in made.blocks for layer in (block.linear_layers if residual else [block.linear])]
    for key, layer in [("first", made.initial_layer), *((f"layers.{i}", layer) for i, layer in enumerate(layers))]:
        state[f"network.{key}.weight"], state[f"network.{key}.bias"] = layer.weight, layer.bias
    for part in ("weight", "bias"):
        rows = getattr(made.final_layer, part).detach().unflatten(0, (dim, -1))  # theirs: P numbers per variable
        rows = rows.transpose(0, 1).clone()
        if kind == "affine":  # theirs: scale, shift
            rows = rows.flip(0)
            rows[1] -= SHIFT if part == "bias" else 0
        state[f"network.head.{part}"] = rows.flatten(0, 1)
    f.load_state_dict(state)
    return f


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["spline", "affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_equal_those_of_nflows(kind, dim, residual, dtype):
    torch.manual_seed(0)
    reference = theirs(kind, dim, residual).to(dtype)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1 * torch.randn_like(p))
    f, x = ours(kind, dim, residual, reference), 1.5 * torch.randn(64, dim, dtype=dtype)
    atol = 1e-5 if dtype == torch.float32 else 1e-10
    with torch.no_grad():
        for found, expected in ((f(x), reference(x)), (f.inverse(x), reference.inverse(x))):
            torch.testing.assert_close(found[0], expected[0], rtol=0, atol=atol)
            # their sum over components is float32 where ours is float64
            torch.testing.assert_close(found[1].to(dtype), expected[1], rtol=0, atol=3 * atol)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("residual", [True, False])
def test_a_graph_leaves_the_zeros_that_it_leaves_in_zuko(seed, residual):
    from zuko.nn import MaskedMLP

    def graph() -> Tensor:
        """A random acyclic one, on a random order."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(7, generator=generator)
        return (torch.rand(7, 7, generator=generator) < 0.4).tril(-1)[order][:, order]

    depends = graph()
    torch.manual_seed(seed)
    reference = MaskedMLP(depends.repeat(3, 1), [32, 32], activation=nn.Tanh, residual=residual).double()
    jacobian = torch.autograd.functional.jacobian(reference, torch.randn(7).double()).reshape(3, 7, 7)
    found = steering(make(7, hidden=32, residual=residual, adjacency=depends.int().tolist()))
    assert torch.equal(found, (jacobian != 0).any(0))
    assert torch.equal(found, depends)
