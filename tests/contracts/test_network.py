"""The contract of every registered Network: shapes, gradients, rows, time and condition, precision, errors."""

import math

import pytest
import torch
from torch import Tensor, nn

from genmodels.networks.dit import Block, DiT, positions
from genmodels.networks.embeddings import ConditionEmbedding
from genmodels.networks.network import Network, networks, set_autocast
from genmodels.networks.shared import Scope
from genmodels.registry import ConfigError, build, names

NETWORKS = names(Network)
every = pytest.mark.parametrize("name", NETWORKS)
SMALL = {
    "mlp": {"hidden": (24, 24)},
    "concat_mlp": {"hidden": (24, 24)},
    "concat_conv": {"hidden": (12, 12)},
    "residual_mlp": {"hidden": 24},
    "made": {"hidden": 24},
    "wavenet2d": {"channels": 12, "layers": 3},
    "dit": {"width": 24, "depth": 2, "heads": 3},
    "video_dit": {"patch": 2, "width": 24, "depth": 1, "heads": 3},
    "unet": {"channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2},
    "glow": {"width": 24},
    "conv_encoder": {"width": 8, "halvings": 2},
    "conv_decoder": {"width": 8, "halvings": 2},
    "diffusers_unet": {
        "block_out_channels": (8, 16), "layers_per_block": 1, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8, "norm_num_groups": 2,
    },
    "equilibrium": {
        "cell": {"name": "mlp_cell", "hidden": 24, "activation": "tanh", "contraction": 0.3},
        "solver": {"name": "picard", "rtol": 3e-7, "atol": 3e-7}, "gradient": "unrolled",
    },
    "shared": {"of": {"name": "residual_mlp", "hidden": 24}, "embedding": 4, "inject": ("concat", "add", "gate")},
    "diffusers_dit": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2},
}  # fmt: skip
IMAGE = (3, 8, 12)
SQUARE = {"diffusers_dit"}  # of the networks for images, those that take no others
VECTORS = {"made"}  # those for vectors, whose last number steers nothing
VIDEOS = {"video_dit"}  # those for videos [C, T, H, W]
LABELS_ONLY = {"diffusers_dit"}  # those without vectors as conditions
LABELS = torch.tensor([0, 1, 2, 3, 1])  # of 3 classes; 3 is "none"
TIMES = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0], dtype=torch.float64)


def image(name: str, channels: int = 3) -> tuple[int, ...]:
    """The shape of images (or videos) that a network is tested on: neither square nor small, where it can be."""
    if name in VIDEOS:
        return (channels, 3, 4, 6)
    if name in VECTORS:
        return (4 << channels // 2,)  # so that what comes out is a multiple of what goes in
    return (channels, 8, 8) if name in SQUARE else (channels, *IMAGE[1:])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(
    name: str,
    in_shape: tuple[int, ...] | None = None,
    out_shape: tuple[int, ...] | None = None,
    timed: bool = True,
    num_classes: int | None = 3,
    condition_shape: tuple[int, ...] | None = None,
    moved: bool = True,
    **arguments: object,
) -> Network:
    """A network in float64, moved off its initialisation, where zeros would hide what depends on what."""
    in_shape = in_shape or image(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(
            Network, {"name": name, **SMALL.get(name, {}), **arguments}, in_shape=in_shape,
            out_shape=out_shape or in_shape, timed=timed, num_classes=num_classes, condition_shape=condition_shape,
            scope=Scope(),
        ).double()  # fmt: skip
    if moved:
        with torch.no_grad():
            for k, p in enumerate(network.parameters()):
                p.add_(0.1 * randn(*p.shape, seed=k))
    return network.eval()


@every
@pytest.mark.parametrize(("before", "after", "small"), [(3, 3, False), (3, 5, False), (1, 2, True)])
def test_shapes_are_those_it_was_told(name, before, after, small):
    plain = small and name not in VECTORS | VIDEOS
    in_shape, out_shape = ((c, 4, 4) if plain else image(name, c) for c in (before, after))
    network, x = make(name, in_shape, out_shape), randn(5, *in_shape)
    assert network(TIMES, x, LABELS).shape == (5, *out_shape)
    assert network(TIMES[2], x, LABELS).shape == (5, *out_shape)
    assert network(TIMES[:0], x[:0], LABELS[:0]).shape == (0, *out_shape)
    torch.testing.assert_close(network(TIMES[2], x, LABELS), network(TIMES[2].expand(5), x, LABELS))


@every
@pytest.mark.parametrize(
    ("timed", "num_classes", "condition_shape"),
    [(True, 3, None), (True, None, (2, 4)), (True, None, None), (False, None, None)],
)
def test_gradients_reach_every_parameter(name, timed, num_classes, condition_shape):
    if condition_shape is not None and name in LABELS_ONLY:
        pytest.skip("takes labels alone")
    network = make(name, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
    condition = LABELS if num_classes else None if condition_shape is None else randn(5, *condition_shape, seed=3)
    x = randn(5, *image(name)).requires_grad_()
    network(TIMES if timed else None, x, condition).square().sum().backward()
    silent = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    seen = x.grad[:, :-1] if name in VECTORS else x.grad
    assert (seen.abs() > 0).all(), "every pixel counts"


@every
def test_derivatives_are_right(name):
    shape = (1, 4, 4) if name in SQUARE else image(name) if name in VECTORS else (1, 2, 4)
    shape = (1, 2, 2, 4) if name in VIDEOS else shape
    network, x = make(name, in_shape=shape), randn(2, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: network(TIMES[1:3], x, LABELS[:2]), (x,))


@every
def test_rows_do_not_see_each_other(name):
    network, x = make(name), randn(5, *image(name))
    whole = network(TIMES, x, LABELS)
    for i in range(5):
        alone = network(TIMES[i], x[i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-11)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(network(TIMES[order], x[order], LABELS[order]), whole[order], rtol=0, atol=1e-11)


@every
def test_time_and_condition_change_every_row(name):
    network, x = make(name), randn(5, *image(name))
    whole = network(TIMES, x, LABELS)
    assert ((network(TIMES + 0.01, x, LABELS) - whole).abs().flatten(1).amax(1) > 1e-4).all()
    assert ((network(TIMES, x, (LABELS + 1) % 4) - whole).abs().flatten(1).amax(1) > 1e-4).all()
    if name in LABELS_ONLY:
        return
    vectors = make(name, num_classes=None, condition_shape=(2, 4))
    c = randn(5, 2, 4, seed=1)
    change = vectors(TIMES, x, c + 0.1) - vectors(TIMES, x, c)
    assert (change.abs().flatten(1).amax(1) > 1e-4).all()


@every
def test_no_condition_is_the_label_beyond_the_last_or_the_vector_zero(name):
    network, x = make(name), randn(5, *image(name))
    torch.testing.assert_close(network(TIMES, x, None), network(TIMES, x, torch.full((5,), 3)), rtol=0, atol=0)
    if name in LABELS_ONLY:
        return
    vectors = make(name, num_classes=None, condition_shape=(2, 4))
    torch.testing.assert_close(vectors(TIMES, x), vectors(TIMES, x, torch.zeros(5, 2, 4).double()), rtol=0, atol=0)


@every
def test_autocast_stays_inside_and_is_close(name):
    network, x = make(name).float(), randn(5, *image(name)).float()
    wide = network(TIMES, x, LABELS)
    set_autocast(network, torch.bfloat16)
    low = network(TIMES, x, LABELS)
    assert low.dtype == torch.float32 and networks(network) == [network]
    error = (low - wide).norm() / wide.norm()
    assert 0 < error < 0.03  # bfloat16 carries 8 bits: each rounding is up to 0.4 %
    low.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())
    set_autocast(network, None)
    assert torch.equal(network(TIMES, x, LABELS), wide)


@every
def test_single_and_double_precision_agree(name):
    network, x = make(name), randn(5, *image(name))
    wide = network(TIMES, x, LABELS)
    narrow = network.float()(TIMES, x.float(), LABELS)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4 * wide.abs().max().item())


@every
def test_what_does_not_fit_is_refused(name):
    network, x = make(name), randn(5, *image(name))
    with pytest.raises(
        ValueError, match=rf"x has shape \[5, 3, 12, 7\].*built for \[B, {', '.join(map(str, x.shape[1:]))}\]"
    ):
        network(TIMES, x.new_zeros(5, 3, 12, 7), LABELS)
    with pytest.raises(ValueError, match="timed=False"):
        network(None, x, LABELS)
    with pytest.raises(ValueError, match="timed=True"):
        make(name, timed=False)(TIMES, x, LABELS)
    with pytest.raises(ValueError, match="without num_classes"):
        make(name, num_classes=None)(TIMES, x, LABELS)


@every
def test_state_loads_strictly_and_gives_the_same(name):
    network, x = make(name), randn(5, *image(name))
    other = make(name, moved=False)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(TIMES, x, LABELS), network(TIMES, x, LABELS))


# ---- the transformer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((1, 8, 9), {"patch": 2}, r"do not tile 8x9. Use one of: 1\."),
        ((1, 8, 12), {"patch": 3}, r"Use one of: 1, 2, 4\."),
        ((8,), {}, "Use mlp or residual_mlp"),
        (IMAGE, {"width": 24, "heads": 5}, "multiple of 4 and of heads = 5"),
        (IMAGE, {"width": 6, "heads": 3}, "multiple of 4"),
    ],
)
def test_impossible_transformers_are_refused(shape, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make("dit", shape, **arguments)


def test_the_transformer_starts_at_zero_and_its_blocks_at_the_identity():
    fresh, x = make("dit", moved=False), randn(5, *IMAGE)
    assert torch.equal(fresh(TIMES, x, LABELS), torch.zeros_like(x))
    h = randn(2, 6, 24)
    assert torch.equal(fresh.blocks[0](h, randn(2, 24, seed=1)), h)


def test_attention_is_that_of_the_formula():
    block, h = Block(12, 3, 24, 0.0).double(), randn(2, 5, 12)
    q, k, v = (y.reshape(2, 5, 3, 4) for y in block.qkv(h).split(12, 2))
    rows = []
    for b in range(2):
        heads = []
        for i in range(3):
            weights = (q[b, :, i] @ k[b, :, i].T / math.sqrt(4)).softmax(1)
            heads.append(weights @ v[b, :, i])
        rows.append(torch.cat(heads, 1))
    torch.testing.assert_close(block.attend(h), block.merge(torch.stack(rows)), rtol=0, atol=1e-12)


def test_the_transformer_equals_one_written_out_patch_by_patch():
    """Patches cut by slices, library layer norms, sequential sums: the same output on a non-square image."""
    network, x = make("dit", (2, 4, 6), depth=1), randn(3, 2, 4, 6)
    t, labels = TIMES[1:4], LABELS[:3]
    c = nn.functional.silu(network.embeddings(t, x, labels))
    tokens = []
    for i in range(2):
        for j in range(3):
            patch = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
            tokens.append(network.enter(patch) + network.positions[3 * i + j])
    h = torch.stack(tokens, 1)
    norm = nn.LayerNorm(24, eps=1e-6, elementwise_affine=False)
    block = network.blocks[0]
    b1, s1, g1, b2, s2, g2 = nn.functional.linear(c, block.modulation.weight, block.modulation.bias)[:, None].split(
        24, 2
    )
    h = h + g1 * block.attend(norm(h) * (1 + s1) + b1)
    h = h + g2 * block.second(nn.functional.gelu(block.first(norm(h) * (1 + s2) + b2)))
    b, s = nn.functional.linear(c, network.modulation.weight, network.modulation.bias)[:, None].split(24, 2)
    out = network.leave(norm(h) * (1 + s) + b)
    expected = torch.zeros_like(x)
    for k in range(6):
        i, j = divmod(k, 3)
        expected[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = out[:, k].reshape(3, 2, 2, 2)
    torch.testing.assert_close(network(t, x, labels), expected, rtol=0, atol=1e-12)


def test_positions_tell_every_patch_apart():
    table = positions(4, 6, 24)
    assert table.shape == (24, 24) and (torch.cdist(table, table) + 10 * torch.eye(24)).min() > 0.5
    rows, columns = table.reshape(4, 6, 24).split(12, 2)
    assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
    torch.testing.assert_close(columns[0, :, 0], torch.arange(6.0).sin())
    torch.testing.assert_close(columns[0, :, 6], torch.arange(6.0).cos())


def test_an_untimed_unconditional_transformer_has_scales_of_its_own():
    network = make("dit", timed=False, num_classes=None)
    assert isinstance(network, DiT) and network.constant is not None
    assert make("dit").constant is None


def test_dropout_acts_in_training_alone():
    network, x = make("dit", dropout=0.5), randn(5, *IMAGE)
    assert torch.equal(network(TIMES, x, LABELS), network(TIMES, x, LABELS))
    network.train()
    assert not torch.equal(network(TIMES, x, LABELS), network(TIMES, x, LABELS))


def test_embeddings_of_nothing_are_zero():
    none = ConditionEmbedding(7, num_classes=None, condition_shape=None)
    assert torch.equal(none(None, 2, torch.zeros(2)), torch.zeros(2, 7))


def test_conditions_of_another_kind_or_size_are_refused():
    labels = ConditionEmbedding(7, num_classes=4, condition_shape=None)
    vectors = ConditionEmbedding(7, num_classes=None, condition_shape=(2, 3))
    like, kind = torch.zeros(5), r"integers of shape \[5\], are needed, found float32 of shape \[5\]"
    for wrong, said in ((torch.zeros(5), kind), (LABELS.new_zeros(5, 1), r"found int64 of shape \[5, 1\]")):
        with pytest.raises(ValueError, match=said):
            labels(wrong, 5, like)
    for wrong in (torch.zeros(5, 5), torch.zeros(5), torch.zeros(5, 3, 3)):
        with pytest.raises(ValueError, match=r"vectors of shape \[5, 2, 3\] are needed, found float32 of shape"):
            vectors(wrong, 5, like)
    x = torch.randn(5, 6)
    assert torch.equal(vectors(x, 5, like), vectors(x.reshape(5, 2, 3), 5, like))  # any shape of as many numbers
