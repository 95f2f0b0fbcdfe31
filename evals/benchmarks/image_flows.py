"""The CIFAR-10 neural spline flow of the paper: CPU time of ours and of the same model in nflows, side by side.

    python -m evals.benchmarks.image_flows [--repeats 15] [--batch 8]

Ours is built from configs/cifar10/nsf.yaml; both have 11,835,054 parameters. Every round times each side once, in
turn, so that a busy machine slows both; medians over rounds are compared. The step with gradients runs in training
mode, the rest in eval mode. Most of the time goes into 3x3 convolutions, which torch does for both.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import genmodels  # noqa: F401  (registers the components)
from genmodels.config import read
from genmodels.flows.bijection import Bijection, chain
from genmodels.registry import Builder

from .side_by_side import Medians, medians, report

RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "image_flows.json"
CONFIG = Path(__file__).parents[2] / "configs" / "cifar10" / "nsf.yaml"
SHAPE = (3, 32, 32)


def ours() -> nn.Module:
    layers = tuple(Builder(Bijection, node) for node in read(CONFIG)["model"]["layers"])
    return chain(layers, SHAPE, num_classes=None, condition_shape=None)


def nflows(levels: int = 3, steps: int = 7, width: int = 96, blocks: int = 3, bins: int = 4) -> nn.Module:
    """The flow of the paper's image experiments from the parts of nflows."""
    from nflows import transforms
    from nflows.nn.nets import ConvResidualNet
    from nflows.utils import create_mid_split_binary_mask

    def network(inputs: int, outputs: int) -> nn.Module:
        return ConvResidualNet(inputs, outputs, width, num_blocks=blocks, use_batch_norm=True, dropout_probability=0.2)

    parts, channels = [], SHAPE[0]
    for _ in range(levels):
        channels *= 4
        parts.append(transforms.SqueezeTransform())
        for _ in range(steps):
            mask = create_mid_split_binary_mask(channels)
            coupling = transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask, network, num_bins=bins, tails="linear", tail_bound=3.0
            )
            parts += [transforms.ActNorm(channels), transforms.OneByOneConvolution(channels), coupling]
        parts.append(transforms.OneByOneConvolution(channels))
    return transforms.CompositeTransform(parts)


def tasks(flow: nn.Module, x: Tensor) -> dict[str, Callable[[], None]]:
    """What is timed: one closure per task."""
    with torch.no_grad():
        z, _ = flow.eval()(x)

    def backward() -> None:
        flow.train().zero_grad()
        z, log_det = flow(x)
        (0.5 * z.square().sum() - log_det.sum()).backward()

    def forward() -> None:
        with torch.no_grad():
            flow.eval()(x)

    def inverse() -> None:
        with torch.no_grad():
            flow.eval().inverse(z)

    return {"forward and backward": backward, "forward": forward, "inverse": inverse}


def measure(batch: int, repeats: int) -> tuple[Medians, dict[str, int]]:
    """Median CPU milliseconds by task and side, and the parameters of each side."""
    torch.manual_seed(0)
    x = torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(0)) - 0.5
    flows = {"ours": ours(), "nflows": nflows()}
    flows["ours"].initialize(x)
    flows["nflows"].train()(x)  # its ActNorm starts from the first batch
    contenders = {name: tasks(flow, x) for name, flow in flows.items()}
    return medians(contenders, repeats), {
        name: sum(p.numel() for p in flow.parameters()) for name, flow in flows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 15), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, parameters = measure(given.batch, given.repeats)
    report(found, vars(given), RESULT, parameters=parameters)


if __name__ == "__main__":
    main()
