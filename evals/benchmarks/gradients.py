"""Ways of taking gradients through a solve: seconds and memory of a training step, all of them in one process.

    python -m evals.benchmarks.gradients [--repeats 10] [--threads 1] [--out evals/results/benchmarks/gradients.json]

A tanh network is solved from 0 to 1 by Dormand-Prince at rtol = atol = 1e-5 in float32, with one clock for the batch,
and the square of its end pulled back to the parameters. Beside ours stand torchdiffeq's odeint (backpropagation) and
its odeint_adjoint, with and without the seminorm, at the same tolerances; its error estimate is 2/3 of ours. Runs take
turns; the figure is the median of their times, and its ratio to our backpropagation.

Memory is the largest number of tensor elements that autograd holds at one time, in the forward or the backward pass,
graphs in reference cycles that wait for the garbage collector included. The error is that of the parameters' gradient
against backpropagation in float64 at 1e-9, relative to its norm.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from genmodels.rng import generator
from genmodels.solvers.adjoint import Adjoint, Interpolated
from genmodels.solvers.base import Backprop, Gradient, integrate
from genmodels.solvers.checkpoint import Checkpoint
from genmodels.solvers.runge_kutta import Dopri5
from genmodels.solvers.step_size import PI

SIZES = ((2, 64, 64), (16, 64, 128), (64, 128, 128))  # dimension, width, batch
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)
TOLERANCE = 1e-5
OURS: dict[str, Gradient] = {
    "backprop": Backprop(),
    "checkpoint": Checkpoint(),
    "adjoint": Adjoint(),
    "interpolated": Interpolated(),
}
THEIRS = ("torchdiffeq backprop", "torchdiffeq adjoint", "torchdiffeq seminorm")


class Field(nn.Module):
    """A tanh network with two hidden layers, which counts its calls; its large weights make the flow curved."""

    def __init__(self, dimension: int, width: int) -> None:
        super().__init__()
        layers = (nn.Linear(dimension, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.network, self.calls = nn.Sequential(*layers, nn.Linear(width, dimension)), 0
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                scale = 2 / p.shape[1] ** 0.5 if p.ndim == 2 else 0.1
                p.copy_(scale * torch.randn(p.shape, generator=generator("solvers", i)))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x)


class Held:
    """A tensor that a graph keeps; `alive` and `peak` count the elements of all of them."""

    alive = peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Held.alive += tensor.numel()
        Held.peak = max(Held.peak, Held.alive)

    def __del__(self) -> None:
        Held.alive -= self.tensor.numel()


def solve(name: str, field: Field, x: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """The end of the flow, with the gradients of this name."""
    if name in OURS:
        control = PI(tolerance, tolerance, norm="batch")
        return integrate(field, x, ENDS, solver=Dopri5(), controller=control, gradient=OURS[name]).x
    import torchdiffeq

    given = {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
    if name == "torchdiffeq backprop":
        return torchdiffeq.odeint(field, x, ENDS, **given)[-1]
    if name == "torchdiffeq seminorm":
        given["adjoint_options"] = {"norm": "seminorm"}
    return torchdiffeq.odeint_adjoint(field, x, ENDS, **given)[-1]


def step(name: str, field: Field, x: Tensor) -> Callable[[], None]:
    """A forward and a backward pass."""

    def run() -> None:
        field.zero_grad(set_to_none=True)
        solve(name, field, x).square().mean().backward()

    return run


def peak(run: Callable[[], None]) -> int:
    gc.collect()
    Held.alive = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        run()
    return Held.peak


def flat(field: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in field.parameters()])


def alternate(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each run; the runs take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def compare(size: tuple[int, int, int], repeats: int) -> list[dict]:
    """One row for each way of taking gradients."""
    dimension, width, batch = size
    field, x = Field(dimension, width), torch.randn(batch, dimension, generator=generator("solvers", "x"))
    double = Field(dimension, width).double()
    solve("backprop", double, x.double(), 1e-9).square().mean().backward()
    exact, rows = flat(double), []
    runs = {name: step(name, field, x) for name in (*OURS, *THEIRS)}
    seconds = alternate(runs, repeats)
    for name, run in runs.items():
        held = peak(run)
        error = float((flat(field) - exact).norm() / exact.norm())
        field.calls = 0
        end = solve(name, field, x)
        forward = field.calls
        end.square().mean().backward()
        rows.append(
            {
                "gradient": name,
                "dimension": dimension,
                "width": width,
                "batch": batch,
                "seconds": seconds[name],
                "ratio": seconds[name] / seconds["backprop"],
                "held": held,
                "held_ratio": held / rows[0]["held"] if rows else 1.0,
                "calls": forward,
                "calls_backward": field.calls - forward,
                "error": error,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("evals/results/benchmarks/gradients.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{'d x width x batch':<18}{'gradient':<22}{'ms':>8}{'ratio':>7}{'held':>10}{'ratio':>7}  calls     error")
    rows = []
    for size in SIZES:
        for row in compare(size, options.repeats):
            rows.append(row)
            print(line(row), flush=True)
    result = {
        "claim": "seconds and elements held by autograd of one training step, over those of backpropagation here",
        "environment": {
            "torch": torch.__version__,
            "torchdiffeq": version("torchdiffeq"),
            "threads": options.threads,
            "processor": platform.machine(),
        },
        "repeats": options.repeats,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def line(row: dict) -> str:
    size, calls = f"{row['dimension']} x {row['width']} x {row['batch']}", f"{row['calls']}+{row['calls_backward']}"
    return (
        f"{size:<18}{row['gradient']:<22}{1e3 * row['seconds']:>8.2f}{row['ratio']:>7.2f}{row['held']:>10}"
        f"{row['held_ratio']:>7.2f}  {calls:<9} {row['error']:.1e}"
    )


if __name__ == "__main__":
    main()
