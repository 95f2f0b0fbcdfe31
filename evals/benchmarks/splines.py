"""Rational-quadratic splines: CPU time and memory of ours, nflows and zuko on the same numbers, in one process.

    python -m evals.benchmarks.splines [--repeats 60] [--batch 4096] [--features 8] [--bins 8]

Every round times each contender once, in turn, so that a busy machine slows all of them; medians over rounds are
compared. The memory is what autograd keeps for the backward, every storage counted once, and the most that is allocated
beyond the inputs at any moment of forward and backward, as torch's profiler sees it. Each contender starts from raw
parameters in the layout it wants: bins last for nflows and zuko, batch last for ours (as our networks give them).
"""

import argparse
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from genmodels.flows.knots import Form
from genmodels.flows.splines import rational_quadratic

from .side_by_side import Medians, medians, report

BOUND = 3.0
RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "splines.json"
Spline = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def ours(x, raw, inverse):
    return rational_quadratic(x, raw, Form(BOUND), inverse=inverse)


def nflows(x, raw, inverse):
    from nflows.transforms.splines import unconstrained_rational_quadratic_spline

    bins = (raw.shape[-1] + 1) // 3
    return unconstrained_rational_quadratic_spline(
        x, *raw.split((bins, bins, bins - 1), -1), inverse=inverse, tail_bound=BOUND
    )


def zuko(x, raw, inverse):
    from zuko.transforms import MonotonicRQSTransform

    bins = (raw.shape[-1] + 1) // 3
    spline = MonotonicRQSTransform(*raw.split((bins, bins, bins - 1), -1), bound=BOUND)
    return (spline.inv if inverse else spline).call_and_ladj(x)


def tasks(spline: Spline, x: Tensor, raw: Tensor) -> dict[str, Callable[[], None]]:
    """What is timed: one closure per task."""
    inputs = (x.clone().requires_grad_(), raw.clone().requires_grad_())

    def backward(inverse):
        y, log_slope = spline(*inputs, inverse)
        torch.autograd.grad(y.sum() + log_slope.sum(), inputs)

    def forward(inverse):
        with torch.no_grad():
            spline(x, raw, inverse)

    return {
        "forward and backward": lambda: backward(False),
        "forward": lambda: forward(False),
        "inverse and backward": lambda: backward(True),
        "inverse": lambda: forward(True),
    }


def kept(spline: Spline, x: Tensor, raw: Tensor, inverse: bool) -> float:
    """Bytes that autograd keeps for the backward, per number mapped."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = spline(x.clone().requires_grad_(), raw.clone().requires_grad_(), inverse)
    return round(sum(found.values()) / out[0].numel(), 1)


def peak(spline: Spline, x: Tensor, raw: Tensor, inverse: bool) -> float:
    """Largest number of bytes allocated at once beyond the inputs, of forward and backward, per number mapped."""
    run = tasks(spline, x, raw)["inverse and backward" if inverse else "forward and backward"]
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return round(max(accumulate(changes)) / x.numel(), 1)


def measure(batch: int, features: int, bins: int, repeats: int) -> tuple[Medians, Medians, Medians]:
    """Median CPU milliseconds by task and contender; bytes kept and bytes at most, per number, by direction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(features, batch, generator=generator)
    raw = torch.randn(3 * bins - 1, features, batch, generator=generator)
    theirs = x.T.contiguous(), raw.permute(2, 1, 0).contiguous()
    inputs = {ours: (x, raw), nflows: theirs, zuko: theirs}
    times = medians({f.__name__: tasks(f, *given) for f, given in inputs.items()}, repeats, warm_up=5)
    directions = {"forward and backward": False, "inverse and backward": True}
    memory, most = (
        {
            task: {f.__name__: g(f, *given, inverse) for f, given in inputs.items()}
            for task, inverse in directions.items()
        }
        for g in (kept, peak)
    )
    return times, memory, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 60), ("batch", 4096), ("features", 8), ("bins", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    times, *memory = measure(given.batch, given.features, given.bins, given.repeats)
    found = dict(zip(("bytes kept per number", "bytes at most per number"), memory, strict=True))
    report(times, vars(given), RESULT, **found)
    for what, rows in found.items():
        for task, row in rows.items():
            print(f"{task:22}" + ", ".join(f"{name} {size:g}" for name, size in row.items()) + f" {what}")


if __name__ == "__main__":
    main()
