"""WaveFlow's inverse: row by row with cached rows, beside full passes for every row, and beside the forward pass.

    python -m evals.benchmarks.waveflow [--repeats 5] [--batch 4]

The flows are those of configs/audio/waveflow.yaml and nanoflow.yaml at several heights of the fold. "ours" is the
inverse of the library, "passes" runs each network over all rows once for every row that it finds, "forward" is the way
from data to latent. Every round times each once, in turn; medians of CPU time over rounds are compared.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import genmodels  # noqa: F401  (registers the components)
from genmodels.config import read
from genmodels.flows.bijection import Bijection, Chain, chain
from genmodels.flows.waveflow import RowAutoregressive
from genmodels.registry import Builder

from .side_by_side import Medians, medians, report

RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "waveflow.json"
CONFIGS = Path(__file__).parents[2] / "configs" / "audio"
LENGTH = 1024


def flow(name: str, height: int) -> Chain:
    """The steps of a configuration for folded signals, with weights moved off their start."""
    _, *layers = read(CONFIGS / f"{name}.yaml")["model"]["layers"]
    shape = (1, height, LENGTH // height)
    torch.manual_seed(0)
    built = chain(tuple(Builder(Bijection, node) for node in layers), shape, num_classes=None, condition_shape=None)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return built.eval()


def passes(step: Bijection, z: Tensor) -> Tensor:
    """The inverse by as many passes over all rows as there are rows."""
    if isinstance(step, Chain):
        for part in reversed(step.bijections):
            z = passes(part, z)
        return z
    assert isinstance(step, RowAutoregressive)
    z = z.flip(2) if step.reverse else z
    x = torch.zeros_like(z)
    for _ in range(z.shape[2]):
        shifted = torch.nn.functional.pad(x[:, :, :-1], (0, 0, 1, 0))
        shift, log_scale = step.network(None, shifted).chunk(2, 1)
        x = (z - shift) * (-log_scale).exp()
    return x.flip(2) if step.reverse else x


def measure(batch: int, repeats: int, heights: tuple[int, ...] = (8, 16, 32)) -> tuple[Medians, float]:
    """Median CPU milliseconds by task and way, and the largest difference between the two inverses."""
    contenders: dict[str, dict[str, Callable[[], object]]] = {"ours": {}, "passes": {}, "forward": {}}
    worst = 0.0
    for name in ("waveflow", "nanoflow"):
        for height in heights:
            f = flow(name, height)
            x = torch.randn(batch, 1, height, LENGTH // height, generator=torch.Generator().manual_seed(0))
            z, _ = f(x)
            worst = max(worst, (passes(f, z) - f.inverse(z)[0]).abs().max().item())
            task = f"{name}, {height} rows"
            contenders["ours"][task] = lambda f=f, z=z: f.inverse(z)
            contenders["passes"][task] = lambda f=f, z=z: passes(f, z)
            contenders["forward"][task] = lambda f=f, x=x: f(x)
    return medians(contenders, repeats, warm_up=1), worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 5), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found, worst = measure(given.batch, given.repeats)
    report(found, {**vars(given), "samples": LENGTH}, RESULT, largest_difference=worst)


if __name__ == "__main__":
    main()
