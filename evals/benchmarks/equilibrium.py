"""Fixed points and their gradients, beside torchdeq: time, evaluations, and whether both find the same.

    python -m evals.benchmarks.equilibrium [--repeats 30] [--out evals/results/benchmarks/equilibrium.json]

The layer is z = tanh(W z + x) with a random W of spectral norm 0.9, in float32. Both search with the same method until
|f(z) - z| <= 1e-3 |f(z)|: ours for each row, torchdeq for the rows together. Gradients are those of the implicit
function, their linear systems solved by the same method (ours also by GMRES) to 1e-3. Agreement is measured in float64
at 1e-10. torchdeq is no dependency of this package: `pip install --no-deps torchdeq`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genmodels.registry import build
from genmodels.rng import generator
from genmodels.solvers.equilibrium import Implicit, equilibrium
from genmodels.solvers.fixed_point import FixedPoint, RowMap

from .side_by_side import medians, report

SIZES = ((64, 32), (64, 256), (512, 64))  # components, rows
METHODS = {"picard": "fixed_point_iter", "anderson": "anderson", "broyden": "broyden"}
LINEAR = {"picard": "neumann", "anderson": "anderson", "broyden": "broyden"}


class Layer:
    """tanh(W z + x), which counts the rows that pass through it."""

    def __init__(self, components: int, rows: int, dtype: torch.dtype = torch.float32) -> None:
        w = torch.randn(components, components, generator=generator("equilibrium", "w"), dtype=torch.float64)
        self.w = (0.9 * w / torch.linalg.matrix_norm(w, 2)).to(dtype).requires_grad_()
        self.x = torch.randn(rows, components, generator=generator("equilibrium", "x"), dtype=torch.float64).to(dtype)
        self.start, self.rows = torch.zeros_like(self.x), 0

    def __call__(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        self.rows += len(z)
        return torch.tanh(z @ self.w.T + (self.x if x is None else x))


def ours(layer: Layer, method: str, tolerance: float, linear: str | None = None) -> Tensor:
    """Its fixed points, with a graph if gradients are on."""
    most = {"max_iterations": 200}
    solver = build(FixedPoint, {"name": method, "rtol": tolerance, "atol": 0.0, **most})
    gradient = Implicit(linear or LINEAR[method], tolerance, **most)
    return equilibrium(RowMap(layer, layer.x), layer.start, solver=solver, gradient=gradient).z


def theirs(layer: Layer, method: str, tolerance: float) -> Tensor:
    """The same by torchdeq."""
    from torchdeq import get_deq

    name = METHODS[method]
    stop = {"f_stop_mode": "rel", "b_stop_mode": "rel", "f_tol": tolerance, "b_tol": tolerance}
    deq = get_deq(f_solver=name, b_solver=name, f_max_iter=200, b_max_iter=200, ift=True, **stop)
    deq.train(torch.is_grad_enabled())
    return deq(layer, layer.start)[0][-1]


def trained(solve: Callable[..., Tensor], layer: Layer, *given: Any) -> Tensor:
    """The gradient of the weights."""
    (grad,) = torch.autograd.grad(solve(layer, *given).square().sum(), layer.w)
    return grad


def evaluations(solve: Callable[..., Tensor], layer: Layer, *given: Any) -> float:
    """Of the layer, for each row."""
    layer.rows = 0
    with torch.no_grad():
        solve(layer, *given)
    return layer.rows / len(layer.x)


def agreement(components: int, rows: int, method: str) -> dict[str, float]:
    """Largest differences of fixed points and of gradients relative to their size, in float64."""
    layer = Layer(components, rows, torch.float64)
    with torch.no_grad():
        points = [solve(layer, method, 1e-10) for solve in (ours, theirs)]
    slopes = [trained(solve, layer, method, 1e-10) for solve in (ours, theirs)]
    return {name: float((a - b).norm() / b.norm()) for name, (a, b) in {"point": points, "gradient": slopes}.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("evals/results/benchmarks/equilibrium.json"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    contenders: dict[str, dict[str, Callable[[], Any]]] = {"ours": {}, "torchdeq": {}, "GMRES": {}}
    counts, same = {}, {}
    for components, rows in SIZES:
        layer = Layer(components, rows)
        for method in METHODS:
            task = f"{components} x {rows} {method}"
            counts[task] = {
                name: evaluations(f, layer, method, 1e-3) for name, f in (("ours", ours), ("torchdeq", theirs))
            }
            same[task] = agreement(components, rows, method)
            for name, f in (("ours", ours), ("torchdeq", theirs)):
                contenders[name][task] = lambda f=f, layer=layer, method=method: _without(f, layer, method)
                contenders[name][f"{task}, trained"] = lambda f=f, layer=layer, m=method: trained(f, layer, m, 1e-3)
            contenders["GMRES"][f"{task}, trained"] = lambda layer=layer, m=method: trained(
                ours, layer, m, 1e-3, "gmres"
            )
    found = medians(contenders, given.repeats)
    report(found, {"repeats": given.repeats}, given.out, evaluations=counts, relative_differences=same)


def _without(solve: Callable[..., Tensor], layer: Layer, method: str) -> None:
    with torch.no_grad():
        solve(layer, method, 1e-3)


if __name__ == "__main__":
    main()
