"""U-Nets: CPU time of one training step of ours and of diffusers' with the same layers, side by side in one process.

    python -m evals.benchmarks.networks [--repeats 20] [--batch 4] [--side 32] [--channels 32]

The network of the CIFAR-10 recipe (channels times 1-2-2-2, attention at half the resolution), by default at a quarter
of its channels, where our layer for the sines of times is wider than theirs. Every round times each contender once, in
turn, so that a busy machine slows all of them; medians over rounds are compared.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from genmodels.networks.unet import UNet

from .side_by_side import Medians, medians, report

RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "networks.json"


def ours(side: int, channels: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    shape = (3, side, side)
    net = UNet(
        channels, (1, 2, 2, 2), 2, (side // 2,), head_channels=channels // 2, groups=channels // 4, modulation="shift",
        resample="convolution", in_shape=shape, out_shape=shape, timed=True, num_classes=None, condition_shape=None,
    )  # fmt: skip
    return net, lambda t, x: net(t, x)


def diffusers(side: int, channels: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=side,
        block_out_channels=tuple(channels * m for m in (1, 2, 2, 2)),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=channels // 2,
        norm_num_groups=channels // 4,
    )
    return net, lambda t, x: net(x, 1000 * t).sample


def tasks(net: nn.Module, call: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor) -> dict[str, Callable]:
    """What is timed: one closure per task."""

    def backward() -> None:
        net.zero_grad(set_to_none=True)
        call(t, x).square().mean().backward()

    def forward() -> None:
        with torch.no_grad():
            call(t, x)

    return {"forward and backward": backward, "forward": forward}


def measure(batch: int, side: int, channels: int, repeats: int) -> tuple[Medians, dict[str, int]]:
    """Median CPU milliseconds by task and contender, and the parameters of each."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, 3, side, side, generator=generator), torch.rand(batch, generator=generator)
    built = {"ours": ours(side, channels), "diffusers": diffusers(side, channels)}
    contenders = {name: tasks(*pair, t, x) for name, pair in built.items()}
    return medians(contenders, repeats), {
        name: sum(p.numel() for p in net.parameters()) for name, (net, _) in built.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 20), ("batch", 4), ("side", 32), ("channels", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, parameters = measure(given.batch, given.side, given.channels, given.repeats)
    report(found, vars(given), RESULT, parameters=parameters)


if __name__ == "__main__":
    main()
