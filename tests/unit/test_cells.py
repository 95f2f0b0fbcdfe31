"""Cells by their formulas: guaranteed contraction and subhomogeneity, scales that see each other, lasting masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodels.networks.cells import Cell, ConvCell, MLPCell, Subhomogeneous, contracted
from genmodels.networks.multiscale import MultiscaleCell
from genmodels.networks.weight_norm import Conv2d
from genmodels.registry import ConfigError, build, names
from genmodels.rng import generator
from genmodels.solvers.fixed_point import Picard, RowMap

PLAIN = {"timed": False, "num_classes": None, "condition_shape": None}
SMALL = {
    "mlp_cell": {"hidden": 6},
    "subhomogeneous": {"hidden": 6},
    "conv_cell": {"channels": 4},
    "multiscale_cell": {"channels": [4, 6], "head": [3, 5], "expansion": 2, "dropout": 0.0},
}


def cell(name: str, **arguments: object) -> Cell:
    torch.manual_seed(0)
    facts = PLAIN | {key: arguments.pop(key) for key in tuple(arguments) if key in PLAIN}
    return build(Cell, {"name": name, **SMALL[name], **arguments}, in_shape=(2, 8, 8), **facts).double().eval()


def items(n: int = 3) -> Tensor:
    return torch.randn(n, 2, 8, 8, generator=generator("items"), dtype=torch.float64)


def states(of: Cell, n: int = 3, *key: object) -> Tensor:
    return torch.randn(n, *of.in_shape, generator=generator("states", *key), dtype=torch.float64)


@pytest.mark.parametrize("name", names(Cell))
def test_rows_of_a_cell_are_alone_and_its_guess_is_its_value_at_zero(name):
    made, x = cell(name), items()
    u, z = made.inject(None, x), states(cell(name))
    whole = made(None, z, u)
    assert whole.shape == z.shape and made.read(z).shape == (3, *made.out_shape)
    for i in range(3):
        one = made(None, z[i : i + 1], made.inject(None, x[i : i + 1]))
        torch.testing.assert_close(one[0], whole[i], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(made.guess(u), made(None, torch.zeros_like(z), u))


@pytest.mark.parametrize("name", names(Cell))
def test_injections_see_time_and_class(name):
    made = cell(name, timed=True, num_classes=3)
    x, z, t = items(), states(cell(name)), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    label = torch.tensor([0, 1, 2])
    base = made(None, z, made.inject(t, x, label))
    for other in (made.inject(t / 2, x, label), made.inject(t, x, (label + 1) % 3), made.inject(t, x + 1, label)):
        assert ((made(None, z, other) - base).flatten(1).abs().amax(1) > 1e-6).all()


def test_dense_cells_by_hand():
    x = items()
    for made, f in (
        (cell("mlp_cell", activation="tanh"), lambda y, u: torch.tanh(y + u)),
        (cell("subhomogeneous", shift=1.5), lambda y, u: torch.tanh(y) + 1.5 + F.softplus(u)),
    ):
        z, u = states(made), F.linear(x.flatten(1), made.entrance.weight, made.entrance.bias)
        w = made.weight if isinstance(made, MLPCell) else made.weight.abs()
        torch.testing.assert_close(made(None, z, made.inject(None, x)), f(z @ w.T, u))


def test_time_and_class_are_added_to_what_dense_cells_receive():
    made, x, t = cell("mlp_cell", timed=True, num_classes=3), items(), torch.tensor([0.1, 0.5, 0.9])
    u, label = F.linear(x.flatten(1), made.entrance.weight, made.entrance.bias), torch.tensor([0, 1, 2])
    torch.testing.assert_close(made.inject(t.double(), x, label)["u"], u + made.embeddings(t.double(), x, label))


def test_contraction_bounds_the_norm_exactly_and_leaves_smaller_ones_alone():
    w = torch.randn(7, 7, generator=generator("w"), dtype=torch.float64)
    norm = float(torch.linalg.svdvals(w)[0])
    assert float(torch.linalg.svdvals(contracted(w, 0.5))[0]) == pytest.approx(0.5, rel=1e-12)
    assert torch.equal(contracted(w, 1.1 * norm), w)
    nothing = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(contracted(nothing, 0.5).sum(), nothing)
    torch.testing.assert_close(grad, torch.ones_like(grad))
    made = cell("mlp_cell", hidden=20, activation="relu", contraction=0.9)
    with torch.no_grad():
        made.weight.mul_(10)
    u, (a, b) = made.inject(None, items()), (states(made, 3, k) for k in range(2))
    stretch = (made(None, a, u) - made(None, b, u)).norm(dim=1) / (a - b).norm(dim=1)
    assert (stretch <= 0.9).all()
    found = Picard(1e-10, 1e-10, 400).solve(RowMap(lambda z, u: made(None, z, u), u), 0 * a)
    assert found.converged.all()


def test_what_is_held_is_computed_once_and_with_its_graph(monkeypatch):
    from genmodels.networks import cells

    made, calls = cell("mlp_cell", contraction=0.5), []
    monkeypatch.setattr(cells, "contracted", lambda *given: calls.append(1) or contracted(*given))
    u, z = made.inject(None, items()), states(made)
    with made.held():
        with torch.no_grad():
            first = made(None, z, u)
        (grad,) = torch.autograd.grad(made(None, z, u).sum(), made.weight)
    assert len(calls) == 1
    torch.testing.assert_close(first, made(None, z, u))
    (expected,) = torch.autograd.grad(made(None, z, u).sum(), made.weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(("shift", "rate"), [(0.1, 0.7133), (1.2, 0.247), (2.0, 0.1706)])
@pytest.mark.parametrize("norm", [0.3, 2.0, 60.0])
def test_subhomogeneous_cells_contract_in_thompsons_metric_for_any_weights(shift, rate, norm):
    """Jacobians of log f(exp y) have rows of |.| sum below the rate; the iteration finds one point from everywhere."""
    made = cell("subhomogeneous", shift=shift, hidden=12)
    assert made.rate == pytest.approx(rate, abs=1e-4)
    with torch.no_grad():
        made.weight.mul_(norm / torch.linalg.matrix_norm(made.weight, 2))
    u = made.inject(None, items())
    f = RowMap(lambda z, u: made(None, z, u), u)
    for k in range(10):
        y = (states(made, 3, k) + torch.linspace(-4, 2, 3, dtype=torch.float64)[:, None]).requires_grad_()
        jacobian = torch.stack([torch.autograd.grad(f(y.exp()).log()[:, i].sum(), y)[0] for i in range(12)], 1)
        assert (jacobian.abs().sum(2) <= made.rate + 1e-12).all()
    a = y.detach().exp()
    ends = [Picard(1e-11, 1e-11, 300).solve(f, start) for start in (torch.zeros_like(a), 100 + a, a)]
    assert all(end.converged.all() for end in ends)
    for end in ends[1:]:
        torch.testing.assert_close(end.z, ends[0].z, rtol=1e-8, atol=1e-8)


def test_weights_of_both_signs_would_give_subhomogeneous_cells_several_fixed_points():
    """z = tanh(W z) + 2 with W = 2 [[1, -1], [-1, 1]] has three, as d = z_1 - z_2 = 2 tanh 2 d."""
    w = torch.tensor([[2.0, -2.0], [-2.0, 2.0]], dtype=torch.float64)
    starts = torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64)
    signed = Picard(1e-12, 1e-12, 100).solve(lambda z: torch.tanh(z @ w.T) + 2, starts)
    assert signed.converged.all() and (signed.z[0] - signed.z[1]).abs().min() > 1.9
    made = cell("subhomogeneous", hidden=2)
    with torch.no_grad():
        made.weight.copy_(w)
    u = made.inject(None, items(1))
    found = Picard(1e-12, 1e-12, 100).solve(lambda z: made(None, z, u), starts)
    assert found.converged.all()
    torch.testing.assert_close(found.z[0], found.z[1], rtol=1e-10, atol=0)


def test_subhomogeneous_cells_start_where_tanh_is_steep():
    made = cell("subhomogeneous", hidden=128)
    z = made.guess(made.inject(None, items()))
    assert 0.1 < (1 - torch.tanh(z @ made.matrix().T).square()).mean() < 0.9


def test_the_scales_see_each_other_and_the_item_enters_the_first():
    made = cell("multiscale_cell", channels=[4, 4, 4], head=[3, 3, 5])
    assert [tuple(part.shape[1:]) for part in made.split(states(made))] == [(4, 8, 8), (4, 4, 4), (4, 2, 2)]
    assert made.out_shape == (5, 2, 2)
    z, u = states(made).requires_grad_(), made.inject(None, items())
    out = made.split(made(None, z, u))
    for part in out:
        (grad,) = torch.autograd.grad(part.square().sum(), z, retain_graph=True)
        assert all(piece.abs().sum() > 0 for piece in made.split(grad))
    (grad,) = torch.autograd.grad(made.read(z).square().sum(), z)
    assert all(piece.abs().sum() > 0 for piece in made.split(grad))
    seen = []
    for block in made.blocks:
        block.register_forward_hook(lambda block, given, out: seen.append(given[1]))
    made(None, z, u)
    assert seen[0] is u["u"] and seen[1:] == [None, None]


def test_a_scale_receives_the_sum_of_what_the_others_send():
    """Ways that send a constant, whatever comes in, add it up; ways that send nothing leave the scales alone."""
    made = cell("multiscale_cell", channels=[4, 4, 4], head=[3, 3, 5])
    z, u = states(made), made.inject(None, items())
    inner = [
        block(part, u["u"] if i == 0 else None)
        for i, (block, part) in enumerate(zip(made.blocks, made.split(z), strict=True))
    ]
    for constant in (0.0, 0.7):
        for ways in made.ways:
            for norm in (m for way in ways for m in way.modules() if isinstance(m, nn.GroupNorm)):
                nn.init.zeros_(norm.weight)
                nn.init.constant_(norm.bias, constant)
        for part, own, after in zip(made.split(made(None, z, u)), inner, made.after, strict=True):
            torch.testing.assert_close(part, after(own + 2 * constant))


def test_ways_between_scales_by_their_formulas():
    """Nearest neighbours of norm(conv) on the way up, norm(conv(relu(norm(conv)))) two scales down."""
    made = cell("multiscale_cell", channels=[4, 6, 8], head=[3, 3, 5])
    large, _, small = made.split(states(made))
    norm = lambda h, of: F.group_norm(h, of.num_groups, of.weight, of.bias)  # noqa: E731
    conv, after, _ = made.ways[0][2]
    near = norm(F.conv2d(small, conv.weight, padding=1), after).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(made.ways[0][2](small), near)
    first, inside, _, second, last = made.ways[2][0]
    half = F.relu(norm(F.conv2d(large, first.weight, stride=2, padding=1), inside))
    torch.testing.assert_close(made.ways[2][0](large), norm(F.conv2d(half, second.weight, stride=2, padding=1), last))
    conv, _, last = made.after[2]
    torch.testing.assert_close(made.after[2](small), norm(F.relu(F.conv2d(small, conv.weight)), last))
    torch.testing.assert_close(made.ways[1][1](small), small)


def test_reading_adds_the_scales_on_the_way_down():
    made = cell("multiscale_cell")
    large, small = made.split(states(made))
    expected = made.downs[0](made.necks[0](large)) + made.necks[1](small)
    torch.testing.assert_close(made.read(states(made)), expected)


@pytest.mark.parametrize(("activation", "slope"), [("relu", 1.0), ("tanh", 1.0), ("silu", 1.0999), ("gelu", 1.1290)])
def test_activations_stretch_as_little_as_is_told(activation, slope):
    y = torch.linspace(-6, 6, 100_001, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(cell("mlp_cell", activation=activation).activation(y).sum(), y)
    assert found.abs().max().item() == pytest.approx(slope, abs=1e-4)


def test_blocks_by_their_formulas():
    made = cell("conv_cell", channels=8, groups=4, timed=True)
    z, u = states(made), made.inject(torch.tensor(0.3), items())
    several = cell("multiscale_cell", channels=[8], head=[3], groups=4)

    def parts(block):
        norm = lambda h, k: F.group_norm(h, 4, block.norms[k].weight, block.norms[k].bias)  # noqa: E731
        h = F.relu(norm(F.conv2d(z, block.first.weight, block.first.bias, padding=1), 0))
        return F.conv2d(h, block.second.weight, block.second.bias, padding=1), norm

    mask = torch.tensor([0.0, 2.0], dtype=torch.float64).repeat(4)[None, :, None, None].expand(3, -1, 1, 1)
    h, norm = parts(made.block)
    torch.testing.assert_close(made(None, z, u), norm(F.relu(h + u["u"] + u["shift"]), 1))
    torch.testing.assert_close(made(None, z, u | {"mask": mask}), norm(F.relu(mask * h + u["u"] + u["shift"]), 1))
    h, norm = parts(several.blocks[0])
    conv, after = several.after[0][0], several.after[0][2]
    for given, inside in (({}, h), ({"mask0": mask}, mask * h)):
        inner = norm(F.relu(z + norm(inside + u["u"], 1)), 2)
        expected = after(F.relu(F.conv2d(inner, conv.weight)))
        torch.testing.assert_close(several(None, z.flatten(1), {"u": u["u"]} | given), expected.flatten(1))


def test_ways_between_scales_and_necks_by_their_formulas():
    made = cell("multiscale_cell", channels=[4, 4, 4], head=[3, 3, 5], weight_norm=True)
    assert all(isinstance(block.first.gain, nn.Parameter) for block in made.blocks)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator("moved", *p.shape), dtype=torch.float64))
    of = lambda module, kind: [m for m in module.modules() if isinstance(m, kind)]  # noqa: E731
    for i, ways in enumerate(made.ways):
        for j, (way, h) in enumerate(zip(ways, made.split(states(made)), strict=True)):
            sent, steps = h, list(zip(of(way, nn.Conv2d), of(way, nn.GroupNorm), strict=True))
            for k, (conv, norm) in enumerate(steps):
                sent = norm(F.conv2d(F.relu(sent) if k else sent, conv.weight, stride=2 if i > j else 1, padding=1))
            expected = F.interpolate(sent, scale_factor=2 ** (j - i), mode="nearest") if i < j else sent
            assert len(steps) == (i - j if i >= j else 1)
            torch.testing.assert_close(way(h), expected)
    for neck, h in zip(made.necks, made.split(states(made)), strict=True):
        (conv,), (norm,) = of(neck, nn.Conv2d), of(neck, nn.GroupNorm)
        torch.testing.assert_close(neck(h), F.relu(norm(F.conv2d(h, conv.weight, conv.bias))))


SCALES = {"channels": [8, 8, 8], "head": [4, 4, 4], "groups": 4}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("conv_cell", {"channels": 8, "groups": 4}), ("multiscale_cell", SCALES | {"weight_norm": True})],
)
def test_convolutional_cells_start_out_as_contractions(name, arguments):
    made = cell(name, **arguments)
    u = made.inject(None, items(4))
    found = Picard(1e-5, 1e-5, 60).solve(RowMap(lambda z, u: made(None, z, u), u), 0 * states(made, 4))
    assert found.converged.all() and found.z.std(0).mean() > 0.5 * found.z.std()  # and hang on the item


@pytest.mark.parametrize("name", ["conv_cell", "multiscale_cell"])
def test_dropout_draws_one_mask_for_a_solve(name):
    made, x = cell(name, dropout=0.25), items(64)
    z = states(made, 64)
    assert torch.equal(made(None, z, made.inject(None, x)), made(None, z, made.inject(None, x)))  # in evaluation
    made.train()
    u = made.inject(None, x)
    masks = [value for key, value in u.items() if key.startswith("mask")]
    assert torch.equal(made(None, z, u), made(None, z, u))
    assert not torch.equal(made(None, z, u), made(None, z, made.inject(None, x)))
    for mask in masks:
        kept = mask > 0
        assert mask.unique().tolist() == [0.0, 1 / 0.75] and 0.6 < kept.double().mean() < 0.9  # 256 draws and more


def test_weight_normalisation_is_an_option():
    plain, normed = (cell("conv_cell", weight_norm=flag).block for flag in (False, True))
    assert plain.first.gain is None and isinstance(normed.first.gain, nn.Parameter)
    torch.testing.assert_close(normed.first.kernel(), plain.first.kernel())
    assert Conv2d(1, 3).gain is None and Conv2d(2, 3).gain is not None  # of one number it would be the sign


def test_impossible_cells_are_refused():
    for message, call in (
        ("hidden >= 1", lambda: MLPCell(0, in_shape=(3,), **PLAIN)),
        ("contraction", lambda: MLPCell(4, contraction=0.0, in_shape=(3,), **PLAIN)),
        ("no unique fixed point", lambda: Subhomogeneous(4, 0.0, in_shape=(3,), **PLAIN)),
        ("images", lambda: ConvCell(4, in_shape=(3,), **PLAIN)),
        ("odd kernel", lambda: ConvCell(4, kernel=2, in_shape=(1, 8, 8), **PLAIN)),
        ("dropout", lambda: ConvCell(4, dropout=1.0, in_shape=(1, 8, 8), **PLAIN)),
        ("halved 2 times", lambda: MultiscaleCell((4, 4, 4), (4, 4, 4), in_shape=(1, 6, 6), **PLAIN)),
        ("as many `head`", lambda: MultiscaleCell((4, 4), (4,), in_shape=(1, 8, 8), **PLAIN)),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
