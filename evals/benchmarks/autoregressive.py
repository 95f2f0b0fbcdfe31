"""One autoregressive layer: CPU time of ours, nflows and zuko in both directions, side by side in one process.

    python -m evals.benchmarks.autoregressive [--repeats 7] [--batch 512] [--hidden 256] [--bins 8]

Every round times each contender once, in turn, so that a busy machine slows all of them; medians over rounds are
compared. Each has a masked network of two residual blocks at its default start and splines on [-3, 3]. The inverse is
what sampling costs: one sweep through the network for us, D passes for the others (zuko's gives no log-determinant).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from genmodels.flows.bijection import Bijection
from genmodels.registry import build

from .side_by_side import Medians, Tasks, medians, report

BOUND = 3.0
FEATURES = (8, 32, 64)
RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "autoregressive.json"
Layer = tuple[Callable[[Tensor], object], Callable[[Tensor], object]]  # forward and inverse


def ours(features: int, hidden: int, bins: int) -> Layer:
    node = {
        "name": "autoregressive",
        "map": {"name": "rational_quadratic", "bins": bins, "bound": BOUND, "identity": False},
        "network": {"name": "made", "hidden": hidden, "blocks": 2},
    }
    layer = build(Bijection, node, shape=(features,), num_classes=None, condition_shape=None).eval()
    return layer, layer.inverse


def nflows(features: int, hidden: int, bins: int) -> Layer:
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Spline

    layer = Spline(features, hidden, num_bins=bins, tails="linear", tail_bound=BOUND, num_blocks=2).eval()
    return layer, layer.inverse


def zuko(features: int, hidden: int, bins: int) -> Layer:
    from functools import partial

    from zuko.flows import MaskedAutoregressiveTransform
    from zuko.transforms import MonotonicRQSTransform

    layer = MaskedAutoregressiveTransform(
        features,
        univariate=partial(MonotonicRQSTransform, bound=BOUND),
        shapes=((bins,), (bins,), (bins - 1,)),
        hidden_features=(hidden, hidden),  # of residual layers, the number of blocks
        residual=True,
    ).eval()
    return lambda x: layer().call_and_ladj(x), lambda z: layer().inv(z)


def tasks(layer: Layer, x: Tensor) -> Tasks:
    """What is timed: forward and inverse on the same numbers, without gradients."""

    def call(direction: Callable[[Tensor], object]) -> None:
        with torch.no_grad():
            direction(x)

    return {
        f"{name} D={x.shape[1]}": lambda f=f: call(f) for name, f in zip(("forward", "inverse"), layer, strict=True)
    }


def measure(batch: int, hidden: int, bins: int, repeats: int) -> Medians:
    """Median CPU milliseconds by task and contender."""
    found: Medians = {}
    for features in FEATURES:
        torch.manual_seed(0)
        x = torch.randn(batch, features)
        contenders = {f.__name__: tasks(f(features, hidden, bins), x) for f in (ours, nflows, zuko)}
        found |= medians(contenders, repeats, warm_up=1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 7), ("batch", 512), ("hidden", 256), ("bins", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.batch, given.hidden, given.bins, given.repeats)
    own = {f"D={d}": round(found[f"inverse D={d}"]["ours"] / found[f"forward D={d}"]["ours"], 2) for d in FEATURES}
    report(found, vars(given), RESULT, **{"ours, inverse over forward": own})


if __name__ == "__main__":
    main()
