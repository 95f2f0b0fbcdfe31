"""The video transformer: what attends to what, by Jacobians; its equality with one written out token by token."""

import pytest
import torch
from torch import Tensor, nn

from genmodels.networks.dit import attended
from genmodels.networks.video_dit import ALONG, AxisAttention, VideoDiT, places_of
from genmodels.registry import ConfigError
from tests.contracts.test_network import LABELS, TIMES, make, randn

VIDEO = (2, 3, 4, 6)  # 3 frames of 2 x 3 patches


def reached(f: nn.Module, frames: int, places: int) -> Tensor:
    """[T, N, T, N] whether the token of a frame and place in changes that out."""
    h = randn(1, frames * places, 12)
    slopes = torch.autograd.functional.jacobian(lambda h: f(h, frames), h)
    change = slopes.abs().sum((0, 2, 3, 5)) > 1e-9
    return change.reshape(frames, places, frames, places)


def test_attention_in_space_mixes_no_frames_and_in_time_no_places():
    same_frame = torch.eye(3, dtype=torch.bool)[:, None, :, None].expand(3, 4, 3, 4)
    same_place = torch.eye(4, dtype=torch.bool)[None, :, None, :].expand(3, 4, 3, 4)
    for axis, expected in {"space": same_frame, "time": same_place}.items():
        assert torch.equal(reached(AxisAttention(12, 3, 0.0, axis).double(), 3, 4), expected)


@pytest.mark.parametrize("off", ["space", "time"])
def test_without_one_attention_the_network_mixes_along_the_other_axis_alone(off):
    """Through patches, positions, two blocks and the head: the Jacobian of the whole network."""
    network, x = make("video_dit", VIDEO, depth=2), randn(1, *VIDEO)
    with torch.no_grad():
        for block in network.blocks:
            getattr(block, off).merge.weight.zero_()
    slopes = torch.autograd.functional.jacobian(lambda x: network(TIMES[2], x, LABELS[:1]), x)
    slopes = slopes.reshape(2, 3, 2, 2, 3, 2, 2, 3, 2, 2, 3, 2)  # c t (i p) (j q) twice
    mixed = slopes.abs().sum((0, 3, 5, 6, 9, 11)) > 1e-12  # [t, i, j, t, i, j]
    mixed = mixed.reshape(3, 6, 3, 6)
    kept = torch.eye(3).bool()[:, None, :, None] if off == "time" else torch.eye(6).bool()[None, :, None, :]
    assert torch.equal(mixed, kept.expand(3, 6, 3, 6))


def test_both_attentions_together_reach_everything():
    network, x = make("video_dit", VIDEO), randn(1, *VIDEO).requires_grad_()
    out = network(TIMES[2], x, LABELS[:1])
    slope = torch.autograd.grad(out[0, 0, 0, 0, 0], x)[0]
    assert (slope != 0).all()


@pytest.mark.parametrize("axis", [1, 2])
def test_without_positions_frames_and_rows_are_exchangeable(axis):
    """f(P x) = P f(x) for any order of the frames (or rows of patches) once the sines are gone, and not with them."""
    network, x = make("video_dit", (2, 3, 6, 4), patch=1), randn(2, 2, 3, 6, 4)
    order = torch.tensor([2, 0, 1]) if axis == 1 else torch.tensor([2, 0, 1, 5, 3, 4])

    def moved(x: Tensor) -> Tensor:
        return x.index_select(axis + 1, order)

    def error() -> float:
        change = network(TIMES[1], moved(x), LABELS[:2]) - moved(network(TIMES[1], x, LABELS[:2]))
        return change.detach().abs().max().item()

    assert error() > 1e-2
    network.positions.zero_()
    assert error() < 1e-12


def test_the_transformer_equals_one_written_out_token_by_token():
    network, x = make("video_dit", VIDEO), randn(3, *VIDEO)
    t, labels = TIMES[1:4], LABELS[:3]
    c = nn.functional.silu(network.embeddings(t, x, labels))
    h = torch.zeros(3, 3, 6, 24).double()  # [B, T, N, width]
    for frame in range(3):
        for i in range(2):
            for j in range(3):
                patch = x[:, :, frame, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
                place = network.positions[6 * frame + 3 * i + j]
                h[:, frame, 3 * i + j] = network.enter(patch) + place
    norm = nn.LayerNorm(24, eps=1e-6, elementwise_affine=False)
    block = network.blocks[0]
    m = nn.functional.linear(c, block.modulation.weight, block.modulation.bias).split(24, 1)
    b1, s1, g1, b2, s2, g2, b3, s3, g3 = (v[:, None, None] for v in m)
    y = norm(h) * (1 + s1) + b1
    space = [block.space.merge(attended(block.space.qkv(y[:, frame]), 3, 0.0)) for frame in range(3)]
    h = h + g1 * torch.stack(space, 1)
    y = norm(h) * (1 + s2) + b2
    time = [block.time.merge(attended(block.time.qkv(y[:, :, place]), 3, 0.0)) for place in range(6)]
    h = h + g2 * torch.stack(time, 2)
    h = h + g3 * block.second(nn.functional.gelu(block.first(norm(h) * (1 + s3) + b3)))
    b, s = (v[:, None, None] for v in network.modulation(c)[0:2])
    out = network.leave(norm(h) * (1 + s.squeeze(1)) + b.squeeze(1))
    expected = torch.zeros_like(x)
    for frame in range(3):
        for k in range(6):
            i, j = divmod(k, 3)
            values = out[:, frame, k].reshape(3, 2, 2, 2)
            expected[:, :, frame, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = values
    torch.testing.assert_close(network(t, x, labels), expected, rtol=0, atol=1e-12)


def test_it_starts_at_zero_and_its_blocks_at_the_identity():
    fresh, x = make("video_dit", VIDEO, moved=False), randn(5, *VIDEO)
    assert torch.equal(fresh(TIMES, x, LABELS), torch.zeros_like(x))
    h = randn(2, 18, 24)
    assert torch.equal(fresh.blocks[0](h, randn(2, 24, seed=1), None, 3), h)


def test_positions_tell_frames_rows_and_columns_apart():
    table = places_of(3, 4, 5, 24).reshape(3, 4, 5, 24)
    flat = table.reshape(60, 24)
    assert (torch.cdist(flat, flat) + 10 * torch.eye(60)).min() > 0.5
    frame, row, column = table.split(8, 3)
    torch.testing.assert_close(frame[:, 0, 0, 0], torch.arange(3.0).sin())
    torch.testing.assert_close(row[0, :, 0, 4], torch.arange(4.0).cos())
    torch.testing.assert_close(column[0, 0, :, 0], torch.arange(5.0).sin())
    assert (frame == frame[:, :1, :1]).all() and (row == row[:1, :, :1]).all() and (column == column[:1, :1]).all()


@pytest.mark.parametrize("number", range(4))
def test_layers_are_told_with_their_axes_and_taps(number):
    """What a tap reads of the values are the values: without them the layer's output is its bias."""
    network, x = make("video_dit", VIDEO, depth=2), randn(2, *VIDEO)
    layer = network.attention()[number]
    axis = ("space", "time")[number % 2]
    assert (layer.name, layer.over, set(layer.taps)) == (f"blocks.{number // 2}.{axis}", axis, {"q", "k", "v"})
    whole, shapes = network(TIMES[1], x, LABELS[:2]), []

    def without_values(module: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
        shapes.append(tuple(out.shape))
        i, n = layer.taps["v"].part
        return torch.cat([torch.zeros_like(part) if k == i else part for k, part in enumerate(out.chunk(n, 2))], 2)

    handle = layer.taps["v"].module.register_forward_hook(without_values)
    changed = network(TIMES[1], x, LABELS[:2])
    handle.remove()
    assert shapes == [(2, 18, 72)]  # [B, tokens, features], whichever tokens attend to each other
    with torch.no_grad():
        getattr(network.blocks[number // 2], axis).merge.weight.zero_()
    torch.testing.assert_close(changed, network(TIMES[1], x, LABELS[:2]), rtol=0, atol=1e-12)
    assert (changed - whole).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((1, 8, 9), {}, r"videos \[C, T, H, W\] of one size are needed, found items of shape \[1, 8, 9\].*Use dit"),
        ((1, 2, 8, 9), {"patch": 2}, r"do not tile frames of 8x9. Use one of: 1\."),
        (VIDEO, {"width": 24, "heads": 5}, "multiple of 12 and of heads = 5"),
        (VIDEO, {"width": 16, "heads": 4}, "multiple of 12"),
        (VIDEO, {"depth": 0}, "depth >= 1.*found depth=0"),
        (VIDEO, {"dropout": 1.0}, "dropout < 1.*dropout=1.0"),
    ],
)
def test_impossible_transformers_are_refused(shape, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make("video_dit", shape, **arguments)


def test_images_are_refused_by_their_networks_and_videos_by_those():
    with pytest.raises(ConfigError, match=r"dit: images \[C, H, W\]"):
        make("dit", VIDEO)
    with pytest.raises(ConfigError, match=r"unet: images \[C, H, W\]"):
        make("unet", VIDEO)


def test_an_untimed_unconditional_transformer_has_scales_of_its_own():
    network = make("video_dit", timed=False, num_classes=None)
    assert isinstance(network, VideoDiT) and network.constant is not None
    assert make("video_dit").constant is None and set(ALONG) == {"space", "time"}
