"""Our solvers against torchdiffeq: seconds for the same integration, both sides in one process.

    python -m evals.benchmarks.solvers [--repeats 20] [--threads 1] [--out evals/results/benchmarks/solvers.json]

Fixed steps: the same method on the same grid (their "rk4" is the 3/8 rule, ours is called rk38), hence the same
evaluations. Adaptive: dopri5 at equal rtol and atol. Their error norm is over the batch, ours of each row, and ours is
1.5 times theirs, so evaluations differ and are printed with the largest error of each side against a tight solution.
Runs of the two sides alternate; the figure is the median of their times.
"""

import argparse
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
from genmodels.solvers.base import Fixed, integrate
from genmodels.solvers.fields import RowField
from genmodels.solvers.runge_kutta import RK38, Dopri5
from genmodels.solvers.step_size import PI

SIZES = ((2, 64, 1), (2, 64, 64), (64, 128, 128), (784, 256, 64))  # dimension, width, batch
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


class Counted:
    """A field that counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.calls = network, 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x)


def network(dimension: int, width: int) -> nn.Sequential:
    """A tanh network with two hidden layers; weights of variance 4 / inputs make the flow curved."""
    layers = [nn.Linear(dimension, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dimension)]
    out = nn.Sequential(*layers)
    with torch.no_grad():
        for i, p in enumerate(out.parameters()):
            scale = 2 / p.shape[1] ** 0.5 if p.ndim == 2 else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=generator("solvers", i)))
    return out


def alternate(runs: tuple[Callable[[], Tensor], ...], repeats: int) -> list[float]:
    """Median seconds of each run; the runs take turns, so that a busy machine slows both."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(repeats):
        for run, seconds in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def trained(run: Callable[[], Tensor], net: nn.Module) -> Callable[[], Tensor]:
    """The run and the backward pass through it."""

    def step() -> Tensor:
        net.zero_grad(set_to_none=True)
        out = run()
        out.square().sum().backward()
        return out.detach()

    return step


def compare(case: str, size: tuple[int, int, int], tolerance: float | None, gradient: bool, repeats: int) -> dict:
    """One row: seconds, evaluations and errors of both sides."""
    from torchdiffeq import odeint

    dimension, width, batch = size
    net = network(dimension, width)
    x = torch.randn(batch, dimension, generator=generator("solvers", "x"))
    field = Counted(net)
    if tolerance is None:
        times = torch.linspace(0, 1, 21, dtype=torch.float64)
        ours = lambda: integrate(field, x, times, solver=RK38(), controller=Fixed()).x  # noqa: E731
        theirs = lambda: odeint(field, x, times, method="rk4")[-1]  # noqa: E731
    else:
        control, narrowed = PI(tolerance, tolerance), RowField(field)
        ours = lambda: integrate(narrowed, x, ENDS, solver=Dopri5(), controller=control).x  # noqa: E731
        theirs = lambda: odeint(field, x, ENDS, method="dopri5", rtol=tolerance, atol=tolerance)[-1]  # noqa: E731
    runs, calls, errors = (ours, theirs), [], []
    if gradient:
        runs = tuple(trained(run, net) for run in runs)
    with torch.set_grad_enabled(gradient):
        seconds = alternate(runs, repeats)
        exact = truth(net, x)
        for run in runs:
            field.calls = 0
            errors.append(float((run().double() - exact).abs().max()))
            calls.append(field.calls)
    return {
        "case": case,
        "dimension": dimension,
        "width": width,
        "batch": batch,
        "gradient": gradient,
        "tolerance": tolerance,
        "seconds": dict(zip(("genmodels", "torchdiffeq"), seconds, strict=True)),
        "calls": dict(zip(("genmodels", "torchdiffeq"), calls, strict=True)),
        "error": dict(zip(("genmodels", "torchdiffeq"), errors, strict=True)),
        "ratio": seconds[1] / seconds[0],
        "ratio_per_call": seconds[1] / calls[1] / (seconds[0] / calls[0]),
    }


@torch.no_grad()
def truth(net: nn.Module, x: Tensor) -> Tensor:
    """The end of the flow in float64 at a tolerance of 1e-10."""
    double = network(x.shape[1], net[0].out_features).double()
    return integrate(lambda t, y: double(y), x.double(), ENDS, solver=Dopri5(), controller=PI(1e-10, 1e-10)).x


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("evals/results/benchmarks/solvers.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(
        f"{'case':<18}{'d x width x batch':<20}{'pass':<10}{'ours ms':>9}{'theirs ms':>10}{'ratio':>7}"
        f"{'per call':>9}  calls        largest error"
    )
    rows = []
    for case, tolerance in (("rk38, 20 steps", None), ("dopri5, 1e-3", 1e-3), ("dopri5, 1e-5", 1e-5)):
        for size in SIZES:
            for gradient in (False, True):
                row = compare(case, size, tolerance, gradient, options.repeats)
                rows.append(row)
                print(line(row), flush=True)
    result = {
        "claim": "seconds of torchdiffeq over seconds of genmodels, same integration, same process",
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
    size = f"{row['dimension']} x {row['width']} x {row['batch']}"
    ours, theirs = (1e3 * row["seconds"][side] for side in ("genmodels", "torchdiffeq"))
    calls = "{genmodels}/{torchdiffeq}".format(**row["calls"])
    error = "{genmodels:.1e}/{torchdiffeq:.1e}".format(**row["error"])
    return (
        f"{row['case']:<18}{size:<20}{'gradient' if row['gradient'] else 'forward':<10}{ours:>9.2f}{theirs:>10.2f}"
        f"{row['ratio']:>7.2f}{row['ratio_per_call']:>9.2f}  {calls:<12} {error}"
    )


if __name__ == "__main__":
    main()
