"""Training steps of the FFJORD of the plane: ours, and its usual formulation over torchdiffeq, side by side.

    python -m evals.benchmarks.ffjord [--repeats 15] [--batch 100] [--hidden 64] [--layers 3] [--trained 400]

A step is the loss, its gradient and Adam (of rate 0, so that every round meets the same weights), with configuration
and data of configs/toy2d/ffjord.yaml. All have the same concatsquash field with the same weights, dopri5, tolerances
of 1e-5 and the exact trace. Over torchdiffeq that trace is taken by autograd, a component at a time, the state is the
pair of points and log-densities, and the end of the flow is learnt as a time; gradients are those of `odeint_adjoint`
(the published choice) or of backpropagation through `odeint`. "ours, vjp" takes vector-Jacobian products as well, and
"ours, tsit5" has another solver; "ours" carries tangents forward.

Weights are those of the start, and those after --trained steps of training by ours, which take more evaluations.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from genmodels.config import load
from genmodels.dynamics.cnf import ContinuousFlow
from genmodels.networks.concat_mlp import ConcatMLP
from genmodels.solvers.runge_kutta import Dopri5, Tsit5
from genmodels.solvers.step_size import PI
from genmodels.types import Batch

from .side_by_side import medians, report

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "toy2d" / "ffjord.yaml"
RESULT = ROOT / "evals" / "results" / "benchmarks" / "ffjord.json"
TOLERANCE = 1e-5


class Reference(nn.Module):
    """FFJORD as it is usually written: the field, its trace by autograd, and odeint over the pair of both."""

    def __init__(self, network: ConcatMLP, root: Tensor, adjoint: bool) -> None:
        super().__init__()
        self.layers, self.adjoint, self.calls = nn.ModuleList(), adjoint, 0
        clocks = [p.split(network.clock.sizes) for p in (network.clock.weight, network.clock.bias, network.clock.shift)]
        for k, layer in enumerate((*network.layers, network.head)):
            linear = nn.Linear(layer.in_features, layer.out_features)
            gate, shift = nn.Linear(1, layer.out_features), nn.Linear(1, layer.out_features, bias=False)
            with torch.no_grad():
                for own, given in (
                    (linear.weight, layer.weight),
                    (linear.bias, layer.bias),
                    (gate.weight, clocks[0][k][:, None]),
                    (gate.bias, clocks[1][k]),
                    (shift.weight, clocks[2][k][:, None]),
                ):
                    own.copy_(given)
            self.layers.append(nn.ModuleList((linear, gate, shift)))
        self.root = nn.Parameter(root.detach().clone())

    def field(self, t: Tensor, x: Tensor) -> Tensor:
        time = t.reshape(1, 1)
        for k, (linear, gate, shift) in enumerate(self.layers):
            x = linear(x) * torch.sigmoid(gate(time)) + shift(time)
            x = torch.tanh(x) if k + 1 < len(self.layers) else x
        return x

    def forward(self, t: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.calls += 1
        with torch.enable_grad():
            x = states[0].requires_grad_(True)
            v = self.field(t.requires_grad_(True), x)
            columns = [torch.autograd.grad(v[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
            return v, -sum(columns).reshape(-1, 1)

    def loss(self, x: Tensor) -> Tensor:
        from torchdiffeq import odeint, odeint_adjoint

        solve = odeint_adjoint if self.adjoint else odeint
        times = torch.stack((torch.zeros_like(self.root), self.root.square()))
        z, change = solve(self, (x, torch.zeros_like(x[:, :1])), times, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
        log_base = -0.5 * (z[-1].square() + torch.tensor(2 * torch.pi).log()).sum(1, keepdim=True)
        return -(log_base - change[-1]).mean() / x.shape[1]


def ours(batch: int, hidden: int, layers: int) -> tuple[ContinuousFlow, Callable[[int], Tensor]]:
    """The model of the configuration with a network of this size, and batches in model space by their number."""
    config = load([CONFIG], [f"model.layers[0].network.hidden={[hidden] * layers}"])
    data = config.dataset()
    torch.manual_seed(0)
    model = config.model(data.facts())
    model.transform.fit(list(data.batches("train", 4096)))
    take = lambda k: data.take("train", torch.arange(k * batch, (k + 1) * batch) % data.size("train")).x  # noqa: E731
    return model.train(), take


def step(parameters: nn.Module, loss: Callable[[], Tensor], rate: float = 0.0) -> Callable[[], Tensor]:
    optimizer = torch.optim.Adam(parameters.parameters(), rate, weight_decay=1e-5 if rate else 0.0)

    def take() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return take


def fit(model: ContinuousFlow, take: Callable[[int], Tensor], steps: int) -> None:
    batches = iter(range(steps))
    train = step(model, lambda: model.loss(Batch(take(next(batches)))).value.mean(), 1e-3)
    for _ in range(steps):
        train()


def with_solver(model: ContinuousFlow, solver: Dopri5 | Tsit5, pushes: bool = True) -> ContinuousFlow:
    own = deepcopy(model)
    own.solver, own.controller = solver, PI(TOLERANCE, TOLERANCE, exponents=(1.0, 0.0), norm="batch")
    if not pushes:
        own.blocks[0].network.checkpointing = True  # which hides the way of carrying tangents forward …
        own.blocks[0].network.recompute = lambda block, *inputs: block(*inputs)  # … and recomputes nothing here
    return own


def contenders(model: ContinuousFlow, x: Tensor, task: str) -> tuple[dict[str, Callable], dict[str, int]]:
    """The step of each, after a check that all have one loss; and the evaluations of the field in one."""
    inside = model.transform(x)[0]
    volume = model.transform(x)[1].mean() / x.shape[1]
    own = {
        "ours": with_solver(model, Dopri5()),
        "ours, vjp": with_solver(model, Dopri5(), pushes=False),
        "ours, tsit5": with_solver(model, Tsit5()),
    }
    block = model.blocks[0]
    others = {
        "backprop": Reference(block.network, block.root, adjoint=False),
        "adjoint": Reference(block.network, block.root, adjoint=True),
    }
    steps = {name: step(m, lambda m=m: m.loss(Batch(x)).value.mean()) for name, m in own.items()}
    steps |= {name: step(m, lambda m=m: m.loss(inside)) for name, m in others.items()}
    losses = {name: float(take()) - (float(volume) if name in others else 0.0) for name, take in steps.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    nfe = {name: round(float(m.loss(Batch(x)).logs["nfe"])) for name, m in own.items()}
    return steps, nfe | {name: m.calls for name, m in others.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 15), ("batch", 100), ("hidden", 64), ("layers", 3), ("trained", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, take = ours(args.batch, args.hidden, args.layers)
    steps, evaluations = {}, {}
    for task in ("at the start", f"after {args.trained} steps"):
        if not task.startswith("at"):
            fit(model, take, args.trained)
        found, evaluations[task] = contenders(model, take(0), task)
        for name, each in found.items():
            steps.setdefault(name, {})[task] = each
    size = {key: value for key, value in vars(args).items()}
    report(medians(steps, args.repeats), size, RESULT, **{"evaluations, backward ones of adjoint too": evaluations})
    print(evaluations)


if __name__ == "__main__":
    main()
