"""The trace term of the Fréchet distance: CPU time and error of ours, scipy's sqrtm and torch's eigvals, side by side.

    python -m evals.benchmarks.frechet [--repeats 3] [--features 2048] [--many 6000] [--few 1000]

Every contender starts from what it is made for: means and covariances, and for "few, features at hand" ours from the
centred features. The truth is the SVD of the product of square roots for many vectors, and of the matrix of inner
products of centred features for few; neither is the route of ours that is timed.
"""

import argparse
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from genmodels.metrics.bures import factor, frechet_distance
from genmodels.metrics.statistics import Gaussian, gaussian

from .side_by_side import Tasks, medians, report

RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "frechet.json"
Pair = tuple[Gaussian, Gaussian]


def with_sqrtm(first: Gaussian, second: Gaussian) -> float:
    from scipy.linalg import sqrtm

    return distance(first, second, sqrtm((first.covariance @ second.covariance).numpy()).trace().real)


def with_eigvals(first: Gaussian, second: Gaussian) -> float:
    return distance(first, second, torch.linalg.eigvals(first.covariance @ second.covariance).sqrt().real.sum().item())


def distance(first: Gaussian, second: Gaussian, root: float) -> float:
    mean = (first.mean - second.mean).square().sum()
    return (mean + first.covariance.trace() + second.covariance.trace()).item() - 2 * root


CONTENDERS: dict[str, Callable[[Gaussian, Gaussian], float]] = {
    "ours": frechet_distance,
    "sqrtm": with_sqrtm,
    "eigvals": with_eigvals,
}


def tasks(name: str, pairs: Mapping[str, Pair], found: dict[str, dict[str, float]]) -> Tasks:
    """One closure per task; each leaves its last answer in `found`."""

    def task(what: str) -> Callable[[], None]:
        def run() -> None:
            found.setdefault(what, {})[name] = CONTENDERS[name](*pairs[what])

        return run

    return {what: task(what) for what in pairs}


def true_distance(x: Tensor, y: Tensor) -> float:
    first, second = gaussian(x), gaussian(y)
    if len(x) > x.shape[1]:
        root = torch.linalg.svdvals(factor(first.covariance).T @ factor(second.covariance)).sum()
    else:
        inner = (x - first.mean) @ (y - second.mean).T
        root = torch.linalg.svdvals(inner).sum() / math.sqrt((len(x) - 1) * (len(y) - 1))
    return distance(first, second, root.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 3), ("features", 2048), ("many", 6000), ("few", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    from threadpoolctl import threadpool_limits

    g = torch.Generator().manual_seed(0)
    draws = {
        n: [scale * torch.randn(n, given.features, dtype=torch.float64, generator=g) for scale in (1.0, 1.1)]
        for n in (given.many, given.few)
    }
    many, few = (tuple(gaussian(x) for x in draws[n]) for n in (given.many, given.few))
    pairs = {"many": many, "few, features at hand": few, "few": tuple(side._replace(thin=None) for side in few)}
    truth = {what: true_distance(*draws[given.many if what == "many" else given.few]) for what in pairs}
    answers: dict[str, dict[str, float]] = {}
    load = os.getloadavg()[0]
    with threadpool_limits(1):
        found = medians({name: tasks(name, pairs, answers) for name in CONTENDERS}, given.repeats, warm_up=0)
    errors = {what: {name: abs(value - truth[what]) for name, value in row.items()} for what, row in answers.items()}
    for what, row in errors.items():
        print(f"{what:22}" + "".join(f"{name} off by {error:.1e}   " for name, error in row.items()))
    more = {"true distance": truth, "absolute error of the distance": errors, "load average before": load}
    report(found, vars(given), RESULT, what="median CPU milliseconds of one call, one thread, float64", **more)


if __name__ == "__main__":
    main()
