"""A training step of a latent ODE on irregular series: ours against torchdiffeq on the union of all times.

    python -m evals.benchmarks.series [--batch 32] [--points 20] [--repeats 5] [--threads 1]
        [--out evals/results/benchmarks/series.json]

Every series has times of its own. The reference formulation solves the whole batch through the union of all times and
picks each item's out of it; ours gives every row its own times. Both have the same encoder, field and decoder, the same
K draws of the initial state and the same loss; both integrate by dopri5 at equal tolerances ("adaptive": their error
norm is over the batch, and they interpolate), or by one step of the 3/8 rule for each interval ("fixed": of the union
there, of the item here). Step times alternate; the figure is the median. Errors are the largest against a tight solve.
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
from torch import Tensor

from genmodels.dynamics.latent_ode import LatentODE
from genmodels.dynamics.recurrent import GRU, Ode
from genmodels.networks.mlp import MLP
from genmodels.rng import generator
from genmodels.solvers.base import Backprop, Controller, Fixed, Solver
from genmodels.solvers.runge_kutta import RK38, Dopri5
from genmodels.solvers.step_size import PI
from genmodels.types import Batch

RTOL, ATOL = 1e-3, 1e-4  # of the reference implementation's decoder


def data(batch: int, points: int) -> Batch:
    """Sines of several rates at irregular times in 0 … 1, 60 % of them seen, all of them asked for."""
    g = generator("series benchmark")
    times = torch.rand(batch, points, generator=g, dtype=torch.float64).sort(1).values
    rate, phase = (torch.rand(batch, 1, generator=g) for _ in range(2))
    y = torch.sin(4 * (1 + rate) * times + 6 * phase).float()[..., None]
    mask = torch.rand(batch, points, 1, generator=g) < 0.6
    mask[:, 0] = True
    return Batch(y * mask, times=times, mask=mask, target=y, target_times=times)


def model(points: int, solver: Solver, controller: Controller) -> LatentODE:
    """The sizes of a small published model: latent 20, a field with two layers of 50, a recurrent encoder of 40."""
    torch.manual_seed(0)
    made = LatentODE(
        lambda **sizes: MLP((50, 50), "tanh", **sizes),
        lambda **context: GRU(40, **context),
        latent=20,
        units=50,
        sigma=0.1,
        draws=3,
        solver=solver,
        controller=controller,
        time_scale=1.0,
        shape=(points, 1),
        target_shape=(points, 1),
    )
    with torch.no_grad():  # as if trained a while: a field that bends
        for p in made.field.parameters():
            p.mul_(1.5)
    return made


class Union:
    """The model with its decoder solved by torchdiffeq through the union of all times."""

    def __init__(self, made: LatentODE, **options: object) -> None:
        self.made, self.options, self.calls = made, options, 0

    def field(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        return self.made.field(t, z)

    def decode(self, z: Tensor, start: Tensor, times: Tensor, ode: Ode) -> Tensor:
        from torchdiffeq import odeint

        grid, places = torch.cat((start.min()[None], times.flatten())).unique(return_inverse=True)
        path = odeint(self.field, z, grid, **self.options)
        rows = torch.arange(len(z))[:, None].expand_as(times)
        return self.made.decoder(None, path[places[1:].reshape(times.shape), rows])


def step(made: LatentODE, batch: Batch, decode: Callable[..., Tensor]) -> Tensor:
    """Gradients of the loss, all in one call: the encoder, K trajectories of each item, the evidence bound."""
    made.zero_grad(set_to_none=True)
    value = loss(made, batch, decode)
    value.backward()
    return value.detach()


def loss(made: LatentODE, batch: Batch, decode: Callable[..., Tensor]) -> Tensor:
    wanted, series = made.targets(batch, "benchmark"), made.series(batch, "benchmark")
    mean, std, start = made.posterior(series, wanted.times, evaluation=False)
    eps = torch.randn(len(batch), made.draws, made.latent, generator=generator("eps"))
    z = mean[:, None] + std[:, None] * eps
    begin, times = (v.repeat_interleave(made.draws, 0) for v in (start, wanted.times))
    ode = Ode(made.solver, made.controller, made.gradient)
    x = decode(z.flatten(0, 1), begin, times, ode).unflatten(0, z.shape[:2])
    log_p = -0.5 * ((wanted.values[:, None] - x) / 0.1).square().flatten(2).sum(2)
    ratio = (0.5 * (eps.square() - z.square()) + std[:, None].log()).sum(2)
    return -(log_p + ratio).logsumexp(1).mean()


def compare(case: str, batch: Batch, solver: Solver, controller: Controller, theirs: dict, repeats: int) -> dict:
    """One row: seconds, evaluations and errors of both sides."""
    made = model(batch.x.shape[1], solver, controller)
    union = Union(made, **theirs)
    nfe: list[Tensor] = []

    def own(*arguments: object) -> Tensor:
        values, evolved = made.decode(*arguments)
        nfe.append(evolved.logs["nfe"])
        return values

    sides = {"genmodels": own, "torchdiffeq": union.decode}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(-1, repeats):
        for name, decode in sides.items():
            began = time.perf_counter()
            step(made, batch, decode)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - began)
    union.calls = 0
    with torch.no_grad():
        losses = {name: float(loss(made, batch, decode)) for name, decode in sides.items()}
        tight = Ode(Dopri5(), PI(1e-6, 1e-6), Backprop())
        exact = float(loss(made, batch, lambda z, start, times, ode: made.decode(z, start, times, tight)[0]))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "case": case,
        "seconds": medians,
        "ratio": medians["torchdiffeq"] / medians["genmodels"],
        "evaluations of an item": {"genmodels": float(nfe[-1]), "torchdiffeq": union.calls},
        "relative error of the loss": {name: abs(value / exact - 1) for name, value in losses.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("batch", 32), ("points", 20), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("evals/results/benchmarks/series.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    batch = data(options.batch, options.points)
    adaptive = {"method": "dopri5", "rtol": RTOL, "atol": ATOL}
    rows = [
        compare("adaptive", batch, Dopri5(), PI(RTOL, ATOL), adaptive, options.repeats),
        compare("fixed", batch, RK38(), Fixed(), {"method": "rk4"}, options.repeats),
    ]
    for row in rows:
        ours, theirs = (1e3 * row["seconds"][side] for side in ("genmodels", "torchdiffeq"))
        print(f"{row['case']:<10}ours {ours:8.1f} ms  torchdiffeq {theirs:8.1f} ms  ratio {row['ratio']:.2f}")
        print(f"{'':<10}{row['evaluations of an item']}  {row['relative error of the loss']}")
    result = {
        "claim": "seconds of a training step through the union of times over ours with times of each item's own",
        "size": {name: getattr(options, name) for name in ("batch", "points", "repeats")},
        "environment": {
            "torch": torch.__version__,
            "torchdiffeq": version("torchdiffeq"),
            "threads": options.threads,
            "processor": platform.machine(),
        },
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
