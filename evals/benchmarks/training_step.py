"""Training steps of the same coupling NSF: ours, nflows and zuko, side by side in one process.

    python -m evals.benchmarks.training_step [--repeats 20] [--batch 4096] [--features 8] [--bins 8] [--layers 5]

A step is the loss, its gradient and Adam. All have conditioners of six linear layers of the same sizes. "paper": a
permutation and an LU layer before every coupling, and free splines for the components that it keeps; "LU": without the
free splines; "splines": couplings alone, which is what zuko has. Every round times each contender once, in turn;
medians over rounds are compared.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from genmodels.model import Model
from genmodels.registry import build, resolve
from genmodels.transforms import Identity
from genmodels.types import Batch

from .side_by_side import Medians, medians, report

BOUND = 3.0
BLOCKS = 2
KINDS = ("paper", "LU", "splines")
RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "training_step.json"


def ours(kind, features, bins, hidden, layers) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The model, and its mean loss on a batch."""
    steps = []
    for k in range(layers):
        steps += [{"name": "permutation"}, {"name": "lu_linear"}] if kind != "splines" else []
        steps.append(
            {
                "name": "coupling",
                "map": {"name": "rational_quadratic", "bins": bins, "bound": BOUND, "identity": False},
                "split": "alternating",
                "swap": k % 2 == 0,
                "unconditional": kind == "paper",
                "network": {"name": "residual_mlp", "hidden": hidden, "blocks": BLOCKS, "activation": "relu"},
            }
        )
    sizes = {"shape": (features,), "num_classes": None, "condition_shape": None}
    node = resolve(Model, {"name": "flow", "layers": steps}, "benchmark")
    flow = build(Model, node, **sizes, transform=Identity(), bin_width=None)
    return flow, lambda x: flow.loss(Batch(x)).value.mean()


def nflows(kind, features, bins, hidden, layers) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.utils.torchutils import create_alternating_binary_mask

    steps = []
    for k in range(layers):
        if kind != "splines":
            steps += [transforms.RandomPermutation(features), transforms.LULinear(features, identity_init=True)]
        steps.append(
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                create_alternating_binary_mask(features, even=k % 2 == 0),
                lambda a, b: ResidualNet(a, b, hidden_features=hidden, num_blocks=BLOCKS),
                num_bins=bins,
                tails="linear",
                tail_bound=BOUND,
                apply_unconditional_transform=kind == "paper",
            )
        )
    flow = Flow(transforms.CompositeTransform(steps), StandardNormal([features]))
    return flow, lambda x: -flow.log_prob(x).mean()


def zuko(kind, features, bins, hidden, layers) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    import zuko

    steps = [
        zuko.flows.GeneralCouplingTransform(
            features,
            mask=torch.arange(features) % 2 == k % 2,
            univariate=lambda *phi: zuko.transforms.MonotonicRQSTransform(*phi, bound=BOUND),
            shapes=[(bins,), (bins,), (bins - 1,)],
            hidden_features=[hidden] * (2 * BLOCKS + 1),
        )
        for k in range(layers)
    ]
    normal = zuko.distributions.DiagNormal
    base = zuko.lazy.UnconditionalDistribution(normal, torch.zeros(features), torch.ones(features), buffer=True)
    flow = zuko.flows.Flow(steps, base)
    return flow, lambda x: -flow().log_prob(x).mean()


def step(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), 5e-4)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(x).backward()
        optimizer.step()

    return train


def measure(widths: list[int], batch: int, features: int, bins: int, layers: int, repeats: int) -> Medians:
    """Median CPU milliseconds by kind and contender."""
    x = torch.randn(batch, features, generator=torch.Generator().manual_seed(0))
    makers = {"ours": (ours, KINDS), "nflows": (nflows, KINDS), "zuko": (zuko, ("splines",))}
    contenders = {name: {} for name in makers}
    for width in widths:
        for name, (make, kinds) in makers.items():
            for kind in kinds:
                torch.manual_seed(0)
                contenders[name][f"{kind}, width {width}"] = step(*make(kind, features, bins, width, layers), x)
    return medians(contenders, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 20), ("batch", 4096), ("features", 8), ("bins", 8), ("layers", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    given = parser.parse_args()
    torch.set_num_threads(1)
    report(measure(**vars(given)), vars(given), RESULT)


if __name__ == "__main__":
    main()
