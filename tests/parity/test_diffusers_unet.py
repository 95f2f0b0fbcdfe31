"""Our U-Net and that of diffusers with the same weights: the same function, whole and block by block."""

import pytest
import torch
from torch import Tensor, nn

from genmodels.networks.unet import Attention, Residual, Step, Style, UNet, normalization

SIZES = {"in_shape": (3, 8, 12), "out_shape": (2, 8, 12), "timed": True, "num_classes": None, "condition_shape": None}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(module: nn.Module) -> nn.Module:
    """In float64, with parameters off their initial values and no two alike."""
    module.double().eval()
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.add_(0.1 * randn(*p.shape, seed=k))
    return module


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


def copy_residual(ours: Residual, theirs: nn.Module) -> None:
    pairs = {"norm_first": "norm1", "first": "conv1", "norm_second": "norm2", "second": "conv2"}
    for name, twin in pairs.items():
        copy(getattr(ours, name), getattr(theirs, twin))
    if ours.embed is not None:
        copy(ours.embed, theirs.time_emb_proj)
    if theirs.conv_shortcut is not None:
        copy(ours.skip, theirs.conv_shortcut)


def copy_attention(ours: Attention, theirs: nn.Module) -> None:
    copy(ours.norm, theirs.group_norm)
    copy(ours.merge, theirs.to_out[0])
    layers = (theirs.to_q, theirs.to_k, theirs.to_v)
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([layer.weight for layer in layers]))
        ours.qkv.bias.copy_(torch.cat([layer.bias for layer in layers]))


def their_steps(blocks: nn.ModuleList, change: str) -> list[tuple[nn.Module, nn.Module | None]]:
    """(residual, attention) in the order of evaluation; a change of resolution is (module, None)."""
    out = []
    for block in blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        out += zip(block.resnets, attentions, strict=True)
        out += [(module, None) for module in getattr(block, change) or []]
    return out


def copy_network(ours: UNet, theirs: nn.Module) -> None:
    pairs = list(zip(ours.down, their_steps(theirs.down_blocks, "downsamplers"), strict=True))
    pairs += zip(ours.up, their_steps(theirs.up_blocks, "upsamplers"), strict=True)
    middle = zip(theirs.mid_block.resnets, [*theirs.mid_block.attentions, None], strict=True)
    pairs += zip(ours.middle, middle, strict=True)
    for step, (module, attention) in pairs:
        if isinstance(step, Step):
            copy_residual(step.residual, module)
            assert (step.attention is None) == (attention is None)
            if attention is not None:
                copy_attention(step.attention, attention)
        elif isinstance(step, Residual):
            copy_residual(step, module)
        else:
            copy(step.conv, module.conv)
    copy(ours.enter, theirs.conv_in)
    copy(ours.norm, theirs.conv_norm_out)
    copy(ours.head, theirs.conv_out)
    copy(ours.embeddings.time.net[0], theirs.time_embedding.linear_1)
    copy(ours.embeddings.time.net[2], theirs.time_embedding.linear_2)


def both(modulation: str, resample: str) -> tuple[UNet, nn.Module]:
    from diffusers import UNet2DModel

    block = resample == "block"
    theirs = UNet2DModel(
        sample_size=(8, 12),
        in_channels=3,
        out_channels=2,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D" if block else "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D" if block else "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_type="resnet" if block else "conv",
        upsample_type="resnet" if block else "conv",
        attention_head_dim=8,
        norm_num_groups=4,
        attn_norm_num_groups=4,
        resnet_time_scale_shift="default" if modulation == "shift" else modulation,
    )
    ours = UNet(
        16, (1, 2, 2), 2, (6,), head_channels=8, groups=4, modulation=modulation, resample=resample, **SIZES
    )  # fmt: skip
    # their sines of timesteps as ours of times: the same frequencies, but for those that have no counterpart
    half = 8
    ours.embeddings.time.frequency = 1e4 ** -(torch.arange(half, dtype=torch.float64) / half) / (2 * torch.pi)
    ours.embeddings.time.net[0] = nn.Linear(2 * half, 64)
    moved(theirs), ours.double().eval()
    copy_network(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("modulation", ["shift", "scale_shift"])
@pytest.mark.parametrize("resample", ["convolution", "block"])
def test_the_whole_network_is_that_of_diffusers(modulation, resample):
    ours, theirs = both(modulation, resample)
    x = randn(4, 3, 8, 12, seed=100)
    # at t = 0 their float32 sines are exact; elsewhere they are a few times 1e-7 off
    for t, tolerance in ((torch.zeros(4), 1e-10), (torch.tensor([1.0, 3.0, 40.0, 0.5]), 1e-5)):
        expected = theirs(x, t).sample
        torch.testing.assert_close(ours(t, x), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    ours.float(), theirs.float()
    expected = theirs(x.float(), t).sample
    torch.testing.assert_close(ours(t, x.float()), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("before", [12, 16])
@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("modulation", ["shift", "scale_shift"])
@pytest.mark.parametrize("scale", [1.0, 0.5**0.5])
def test_a_residual_block_is_that_of_diffusers(before, resample, modulation, scale):
    from diffusers.models.resnet import ResnetBlock2D

    theirs = moved(
        ResnetBlock2D(
            in_channels=before,
            out_channels=16,
            temb_channels=24,
            groups=2,
            eps=1e-5,
            time_embedding_norm="default" if modulation == "shift" else modulation,
            output_scale_factor=1 / scale,
            up=resample == "up",
            down=resample == "down",
        )
    )
    ours = Residual(before, 16, Style(2, 0.0, modulation, 24, scale), resample).double()
    copy_residual(ours, theirs)
    x, e = randn(3, before, 4, 6), randn(3, 24, seed=1)
    expected = theirs(x, e)
    assert expected.shape[2:] == {None: (4, 6), "down": (2, 3), "up": (8, 12)}[resample]
    torch.testing.assert_close(ours(x, nn.functional.silu(e)), expected, rtol=0, atol=1e-10)


def test_attention_is_that_of_diffusers():
    from diffusers.models.attention_processor import Attention as Theirs

    options = {"residual_connection": True, "bias": True, "_from_deprecated_attn_block": True}
    theirs = moved(
        Theirs(12, heads=3, dim_head=4, rescale_output_factor=2**0.5, eps=1e-5, norm_num_groups=3, **options)
    )
    ours = Attention(12, 3, Style(3, 0.0, "shift", None, 0.5**0.5)).double()
    copy_attention(ours, theirs)
    x = randn(2, 12, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


def test_the_network_of_the_flow_matching_recipe_has_the_parameters_of_ddpm():
    """35,746,307, counted layer by layer here, and by the constructor of diffusers."""
    from diffusers import UNet2DModel

    ours = UNet(
        128, (1, 2, 2, 2), 2, (16,), head_channels=64, modulation="shift", resample="convolution",
        **SIZES | {"in_shape": (3, 32, 32), "out_shape": (3, 32, 32)},
    )  # fmt: skip
    with torch.device("meta"):
        theirs = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=64,
        )

    def conv(a: int, b: int, side: int = 3) -> int:
        return (a * side**2 + 1) * b

    def block(a: int, b: int) -> int:
        """Two norms, two convolutions, a layer for e, and a 1x1 convolution where channels change."""
        return 2 * a + conv(a, b) + (512 + 1) * b + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    attention = 2 * 256 + 4 * (256 + 1) * 256
    down = [(128, 128)] * 2 + [(128, 256)] + [(256, 256)] * 5
    up = [(512, 256)] * 8 + [(384, 256)] + [(384, 128)] + [(256, 128)] * 2
    total = (
        conv(3, 128)
        + (128 + 1) * 512 + (512 + 1) * 512
        + sum(block(*pair) for pair in down) + 2 * attention
        + conv(128, 128) + 2 * conv(256, 256)
        + 2 * block(256, 256) + attention
        + sum(block(*pair) for pair in up) + 3 * attention
        + 3 * conv(256, 256)
        + 2 * 128 + conv(128, 3)
    )  # fmt: skip
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in (("ours", ours), ("theirs", theirs))}
    assert total == 35_746_307 and count == {"ours": total, "theirs": total}


@pytest.mark.parametrize(
    ("channels", "groups", "expected"), [(128, 32, 32), (24, 32, 6), (20, 4, 4), (6, 32, 1), (3, 8, 1)]
)
def test_groups_divide_the_channels_and_hold_four(channels, groups, expected):
    assert normalization(channels, groups).num_groups == expected
