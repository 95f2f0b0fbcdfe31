"""The CIFAR-10 neural spline flow of the paper: CPU time of ours and of the same model in nflows, side by side.

    python -m evals.benchmarks.image_flows [--repeats 15] [--batch 8]

Ours is built from configs/cifar10/nsf.yaml; both have 11,835,054 parameters. Every round times each side once, in
turn, so that a busy machine slows both; medians over rounds are compared. The step with gradients runs in training
mode, the rest in eval mode. Most of the time goes into 3x3 convolutions, which torch does for both.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import genmodels  # noqa: F401  (registers the components)
from genmodels.config import read
from genmodels.flows.bijection import Bijection, chain
from genmodels.registry import Builder

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


def measure(batch: int, repeats: int) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Median CPU milliseconds by task and side, and the parameters of each side."""
    torch.manual_seed(0)
    x = torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(0)) - 0.5
    flows = {"ours": ours(), "nflows": nflows()}
    flows["ours"].initialize(x)
    flows["nflows"].train()(x)  # its ActNorm starts from the first batch
    contenders = {name: tasks(flow, x) for name, flow in flows.items()}
    times = {task: {name: [] for name in contenders} for task in contenders["ours"]}
    for round_ in range(-2, repeats):  # the first two warm up
        for task, row in times.items():
            for name, seconds in row.items():
                began = time.process_time()
                contenders[name][task]()
                if round_ >= 0:
                    seconds.append(time.process_time() - began)
    sizes = {name: sum(p.numel() for p in flow.parameters()) for name, flow in flows.items()}
    return {task: {n: 1e3 * statistics.median(s) for n, s in row.items()} for task, row in times.items()}, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 15), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    medians, sizes = measure(given.batch, given.repeats)
    result = {
        "what": "median CPU milliseconds of one call, one thread, float32",
        "size": vars(given),
        "parameters": sizes,
        "milliseconds": {task: {n: round(t, 1) for n, t in row.items()} for task, row in medians.items()},
        "ratio to ours": {task: {"nflows": round(row["nflows"] / row["ours"], 2)} for task, row in medians.items()},
        "environment": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "processor": platform.machine(),
        },
    }
    print(f"{'':22}{'ours':>9}{'nflows':>9}  ms   nflows/ours")
    for task, row in medians.items():
        print(f"{task:22}{row['ours']:9.1f}{row['nflows']:9.1f}  {row['nflows'] / row['ours']:13.2f}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
