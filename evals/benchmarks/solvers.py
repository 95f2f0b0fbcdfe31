"""Our solvers against torchdiffeq and torchode: time per step, evaluations, and what a batch does to its rows.

    python -m evals.benchmarks.solvers [--repeats 15] [--threads 1] [--out evals/results/benchmarks/solvers.json]

Time: the same integrations of tanh networks with Dopri5 in one process, by turns; the figure is the least CPU time of a
solve, over its attempted steps. The solvers' own share is that less six evaluations of the field. Ours come as one
clock for the batch (norm="batch", as torchdiffeq's) and as steps of each row's own (norm="row", as torchode's). Fixed
steps are Kutta's 3/8 rule on the same grid ("rk4" of torchdiffeq).
Evaluations: of our default (Tsit5 under PI) and of Dopri5 against torchdiffeq's dopri5 at equal tolerances.
Rows: the error of one fast oscillator among 256, with its batch and alone.
torchode is measured where it can be imported (it needs torchtyping and typeguard 2.13); else its columns are empty.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genmodels.rng import generator
from genmodels.solvers.base import Fixed, integrate
from genmodels.solvers.fields import RowField
from genmodels.solvers.runge_kutta import RK38, Dopri5, Tsit5
from genmodels.solvers.step_size import PI

SIZES = ((2, 16, 1), (2, 64, 64), (64, 128, 128))  # dimension, width, batch
TOLERANCE, END = 1e-6, 4.0
Run = Callable[[], tuple[Tensor, float]]  # a solve: its end, and the steps that it attempted


class Counted:
    """A field that counts its calls."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
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


def least(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least CPU seconds of each run; the runs take turns, so that a busy machine meets all."""
    times = dict.fromkeys(runs, math.inf)
    for round_ in range(repeats + 2):
        for name, run in runs.items():
            began = time.process_time()
            run()
            spent = time.process_time() - began
            times[name] = min(times[name], spent) if round_ > 1 else math.inf
    return times


def contenders(net: nn.Module, x: Tensor) -> dict[str, Run]:
    """Adaptive Dopri5 of every side."""
    from torchdiffeq import odeint

    field = Counted(net)
    ends = torch.tensor([0.0, END], dtype=torch.float64)

    def ours(norm: str) -> Run:
        control = PI(TOLERANCE, TOLERANCE, norm=norm)

        def run() -> tuple[Tensor, float]:
            out = integrate(field, x, ends, solver=Dopri5(), controller=control)
            return out.x, float((out.steps + out.rejected).max())

        return run

    def theirs() -> tuple[Tensor, float]:
        field.calls = 0
        out = odeint(field, x, ends, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)[-1]
        return out, (field.calls - 2) / 6

    runs = {"batch": ours("batch"), "row": ours("row"), "torchdiffeq": theirs}
    return runs | ({"torchode": torchode(field, x)} if installed("torchode") else {})


def torchode(field: Counted, x: Tensor) -> Run:
    """Its Dopri5 under its own integral controller, with gradients stopped at the controller as ours are."""
    import torchode as to

    term = to.ODETerm(field)
    control = to.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
    solver = to.AutoDiffAdjoint(to.Dopri5(term=term), control, backprop_through_step_size_control=False)
    zero = torch.zeros(len(x))
    problem = to.InitialValueProblem(y0=x, t_start=zero, t_end=zero + END)

    def run() -> tuple[Tensor, float]:
        out = solver.solve(problem)
        return out.ys[:, -1], float(out.stats["n_steps"].max())

    return run


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def speed(size: tuple[int, int, int], gradient: bool, repeats: int) -> dict[str, Any]:
    """One row: microseconds per attempted step of every side, and of its own share."""
    dimension, width, batch = size
    net, x = network(dimension, width), torch.randn(size[2], dimension, generator=generator("solvers", "x"))
    runs = contenders(net, x)

    def whole(run: Run) -> Callable[[], None]:
        def step() -> None:
            net.zero_grad(set_to_none=True)
            out = run()[0]
            if gradient:
                out.square().sum().backward()

        return step

    def evaluations() -> None:
        for _ in range(60):
            net(x)

    with torch.set_grad_enabled(gradient):
        steps = {name: run()[1] for name, run in runs.items()}
        seconds = least({name: whole(run) for name, run in runs.items()} | {"field": evaluations}, repeats)
    field = 1e6 * seconds.pop("field") / 60
    each = {name: 1e6 * seconds[name] / steps[name] for name in runs}
    own = {} if gradient else {name: value - 6 * field for name, value in each.items()}
    return {
        "dimension": dimension,
        "width": width,
        "batch": batch,
        "gradient": gradient,
        "field": round(field, 1),
        "steps": steps,
        "microseconds per step": {name: round(value, 1) for name, value in each.items()},
        "own share": {name: round(value, 1) for name, value in own.items()},
        "ratio to batch": {name: round(value / each["batch"], 2) for name, value in each.items()},
        "ratio of own share": {name: round(value / own["batch"], 2) for name, value in own.items()},
    }


def grids(size: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """One row: the same fixed grid of 20 steps, in milliseconds."""
    from torchdiffeq import odeint

    dimension, width, batch = size
    net, x = network(dimension, width), torch.randn(batch, dimension, generator=generator("solvers", "x"))
    times, field = torch.linspace(0, 1, 21, dtype=torch.float64), Counted(net)
    with torch.no_grad():
        seconds = least(
            {
                "genmodels": lambda: integrate(field, x, times, solver=RK38(), controller=Fixed()),
                "torchdiffeq": lambda: odeint(field, x, times, method="rk4"),
            },
            repeats,
        )
    milliseconds = {name: round(1e3 * value, 2) for name, value in seconds.items()}
    ratio = round(seconds["torchdiffeq"] / seconds["genmodels"], 2)
    return {"dimension": dimension, "width": width, "batch": batch, "milliseconds": milliseconds, "ratio": ratio}


def van_der_pol(mu: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack((x[:, 1], mu * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0]), 1)


def costs(mu: float, rtol: float, atol: float) -> dict[str, Any]:
    """One row: evaluations and errors on van der Pol's oscillator from (2, 0) to t = 10, in float64."""
    from torchdiffeq import odeint

    field, x = Counted(van_der_pol(mu)), torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    ends, control = torch.tensor([0.0, 10.0], dtype=torch.float64), PI(rtol, atol)
    exact = integrate(field, x, ends, solver=Tsit5(), controller=PI(1e-12, 1e-12), max_steps=1_000_000).x
    runs = {
        "tsit5": lambda: integrate(field, x, ends, solver=Tsit5(), controller=control).x,
        "dopri5": lambda: integrate(field, x, ends, solver=Dopri5(), controller=control).x,
        "torchdiffeq": lambda: odeint(field, x, ends, method="dopri5", rtol=rtol, atol=atol)[-1],
    }
    calls, errors = {}, {}
    for name, run in runs.items():
        field.calls = 0
        errors[name] = float((run() - exact).abs().max())
        calls[name] = field.calls
    return {"mu": mu, "rtol": rtol, "atol": atol, "evaluations": calls, "error": errors}


def hiding(tolerance: float) -> dict[str, Any]:
    """The error of an oscillator of frequency 20 among 255 of 0.1, from (1, 0) to t = 5, by its surroundings."""
    from torchdiffeq import odeint

    w = torch.full((256, 1), 0.1, dtype=torch.float64)
    w[0] = 20.0
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(256, 2).contiguous()
    field = RowField(lambda t, x, w: torch.cat((x[:, 1:], -w.square() * x[:, :1]), 1), w)
    one, ends = field.select(torch.tensor([0])), torch.tensor([0.0, 5.0], dtype=torch.float64)
    exact = torch.tensor([math.cos(100.0), -20 * math.sin(100.0)], dtype=torch.float64)
    control, theirs = PI(tolerance, tolerance), {"method": "dopri5", "rtol": tolerance, "atol": tolerance}
    found = {
        "row in its batch": integrate(field, x, ends, solver=Dopri5(), controller=control).x[0],
        "row alone": integrate(one, x[:1], ends, solver=Dopri5(), controller=control).x[0],
        "torchdiffeq in its batch": odeint(field, x, ends, **theirs)[-1][0],
        "torchdiffeq alone": odeint(one, x[:1], ends, **theirs)[-1][0],
    }
    return {"tolerance": tolerance, "error": {name: float((end - exact).norm()) for name, end in found.items()}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("evals/results/benchmarks/solvers.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = {
        "claim": "CPU time of a Dopri5 step, evaluations of a solve, and error of a row, of genmodels and others",
        "environment": {
            "torch": torch.__version__,
            "torchdiffeq": installed("torchdiffeq"),
            "torchode": installed("torchode"),
            "threads": options.threads,
            "processor": platform.machine(),
        },
        "repeats": options.repeats,
        "tolerance": TOLERANCE,
        "speed": [],
    }
    for size in SIZES:
        for gradient in (False, True):
            row = speed(size, gradient, options.repeats)
            result["speed"].append(row)
            print(line(row), flush=True)
    result["grids"] = [grids(size, options.repeats) for size in SIZES]
    tolerances = ((1e-3, 1e-6), (1e-6, 1e-6), (1e-8, 1e-8))
    result["evaluations"] = [costs(mu, *each) for mu in (1.0, 5.0, 10.0, 50.0) for each in tolerances]
    result["rows"] = [hiding(tolerance) for tolerance in (1e-4, 1e-6)]
    for part in ("grids", "evaluations", "rows"):
        for row in result[part]:
            print(part, *(f"{key}: {value}" for key, value in row.items()), sep="  ")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    size = f"{row['dimension']} x {row['width']} x {row['batch']}"
    each = "  ".join(
        f"{name} {value:.0f} µs ({row['ratio to batch'][name]:.2f})"
        for name, value in row["microseconds per step"].items()
    )
    own = "  ".join(f"{name} {value:.0f}" for name, value in row["own share"].items())
    return (
        f"{size:<16}{'gradient' if row['gradient'] else 'forward':<9} field {row['field']:.0f} µs  {each}  own: {own}"
    )


if __name__ == "__main__":
    main()
