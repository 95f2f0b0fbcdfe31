"""ODE-RNN: a hidden state that moves by an ODE between observations and is updated by gates at each."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from ..model import Model
from ..networks.mlp import MLP
from ..networks.network import Network
from ..registry import register
from ..rng import BatchNoise
from ..solvers.base import Backprop, Controller, Fixed, Gradient, Solver
from ..solvers.fields import RowField
from ..solvers.runge_kutta import Euler
from ..types import Batch, Seeds, Shape
from .irregular import Series
from .recurrent import Carried, Ode, Precision, Recurrent, SeriesEncoder, check_positive
from .regularization import Regularizer, evolve

UNIT = (0.0, 1.0)


@register(SeriesEncoder, "gated")
class Gated(SeriesEncoder):
    """A recurrent cell with a state of two halves (μ, s), an uncertain hidden state, and gates of two layers.

    u, r = sigmoid(net(μ, s, x, mask)) and (μ', s') = net(r μ, r s, x, mask) give μ ← (1 - u) μ' + u μ and
    s ← (1 - u) |s'| + u s.

    Args:
        hidden: size of μ and of s.
        units: width of the hidden layer of the three networks.
        gap: whether the time since the observation before is an input.
    Source: Rubanova et al. 2019 (Latent ODEs for irregularly-sampled time series), section 3.2.
    """

    keeps_time = False

    def __init__(self, hidden: int = 32, units: int = 64, gap: bool = True, *, channels: int) -> None:
        super().__init__()
        check_positive("gated", hidden=hidden, units=units)
        self.hidden, self.features, self.gap = hidden, 2 * hidden, gap
        size = 2 * hidden + 2 * channels + gap
        self.keep, self.reset, self.propose = (
            nn.Sequential(nn.Linear(size, units), nn.Tanh(), nn.Linear(units, out))
            for out in (hidden, hidden, 2 * hidden)
        )

    def inputs(self, series: Series) -> Tensor:
        parts = [series.x, series.mask.to(series.x)]
        return torch.cat(parts + [series.gaps[..., None].to(series.x)] * self.gap, 2)

    def update(self, h: Tensor, inputs: Tensor) -> Tensor:
        told = torch.cat((h, inputs), 1)
        keep, reset = (gate(told).sigmoid().repeat(1, 2) for gate in (self.keep, self.reset))
        mean, std = self.propose(torch.cat((reset * h, inputs), 1)).chunk(2, 1)
        return (1 - keep) * torch.cat((mean, std.abs()), 1) + keep * h


class StateField(nn.Module):
    """dz/dt = f(t, z) or f(z) of a hidden state, by a network from [size] to [size]."""

    def __init__(self, build: Callable[..., Network], size: int, timed: bool) -> None:
        super().__init__()
        sizes = {"in_shape": (size,), "out_shape": (size,), "num_classes": None, "condition_shape": None}
        self.network, self.timed = build(**sizes, timed=timed), timed

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.network(t if self.timed else None, z)

    def in_unit_time(self, u: Tensor, z: Tensor, start: Tensor, gap: Tensor) -> Tensor:
        """dz/du = gap f(start + u gap, z): each row's interval as 0 … 1; 0 where the interval is empty."""
        return gap[:, None].to(z) * self(start + u * gap, z)


@register(SeriesEncoder, "ode_rnn")
class ODERNN(Gated):
    """The cell `gated`, whose μ moves between observations by dμ/dt = f(μ); s stays.

    Intervals are solved for all items at once, each in a unit of time of its own: controller `fixed` divides every
    interval into equal steps (one of `euler` by default).

    Args:
        field: f, a network from [hidden] to [hidden].
        hidden: size of μ and of s.
        units: width of the hidden layer of the gates.
        autonomous: whether f does not see the time.
        solver, controller, gradient: of the ODE.
    Source: Rubanova et al. 2019 (Latent ODEs for irregularly-sampled time series), section 3.1 and algorithm 1.
    """

    keeps_time = True

    def __init__(
        self,
        field: Callable[..., Network] = MLP,
        hidden: int = 32,
        units: int = 64,
        autonomous: bool = True,
        solver: Solver = Euler(),
        controller: Controller = Fixed(),
        gradient: Gradient = Backprop(),
        *,
        channels: int,
    ) -> None:
        super().__init__(hidden, units, False, channels=channels)
        self.field = StateField(field, hidden, not autonomous)
        self.solver, self.controller, self.gradient = solver, controller, gradient

    def settings(self, evaluation: bool) -> Ode:
        return Ode(self.solver, self.controller.by_row() if evaluation else self.controller, self.gradient)

    def carry(self, h: Tensor, t: Tensor, s: Tensor, ode: Ode | None) -> Carried:
        ode = self.settings(evaluation=True) if ode is None else ode
        mean, std = h.chunk(2, 1)
        field = RowField(self.field.in_unit_time, t, s - t)
        found = evolve(field, mean, torch.tensor(UNIT, dtype=torch.float64, device=h.device), **ode._asdict())
        return Carried(torch.cat((found.solution.x, std), 1), found.penalty, found.logs)


@register(Model, "ode_rnn")
class ODERNNModel(Recurrent):
    """An ODE-RNN that classifies series or forecasts values: see `recurrent` for what is read off when.

    Args:
        field: of the hidden state between observations, a network from [hidden] to [hidden].
        hidden: size of the state that moves, and of the one beside it that does not.
        units: width of the hidden layers of gates and readout.
        autonomous: whether the field does not see the time.
        solver, controller, gradient: of the ODE; `euler` with `fixed` is one step for each interval.
        regularizers: of the ODE in training, the mean over the intervals.
        time_scale: time units of the data per unit of the model's clock; null to measure.
        precision: of all arithmetic.
    Source: Rubanova et al. 2019 (Latent ODEs for irregularly-sampled time series), section 3.1.
    """

    def __init__(
        self,
        field: Callable[..., Network] = MLP,
        hidden: int = 32,
        units: int = 64,
        autonomous: bool = True,
        solver: Solver = Euler(),
        controller: Controller = Fixed(),
        gradient: Gradient = Backprop(),
        regularizers: tuple[Regularizer, ...] = (),
        time_scale: float | None = None,
        precision: Precision = "float32",
        *,
        shape: Shape,
        target_shape: Shape | None,
    ) -> None:
        super().__init__("ode_rnn", time_scale, precision, shape, target_shape)
        self.regularizers = tuple(regularizers)
        self.differentiates_twice = any(r.differentiates for r in self.regularizers)
        made = ODERNN(field, hidden, units, autonomous, solver, controller, gradient, channels=shape[-1])
        self.build(made, units)

    def how(self, batch: Batch, generator: Generator | None) -> Ode:
        charges = self.regularizers if self.training else ()
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device) if charges else None
        own = self.encoder.settings(evaluation=False)
        return own._replace(regularizers=charges, progress=self.progress, noise=noise)

    def predict(
        self,
        batch: Batch,
        *,
        seeds: Seeds | None = None,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Tensor:
        """[B, K] class logits, or [B, M, C] values at target_times.

        Args:
            solver, controller: of the ODE, if not those of training (whose steps are then each row's own).
        """
        own = self.encoder.settings(evaluation=True)
        ode = own._replace(solver=solver or own.solver, controller=controller or own.controller)
        return self.answer(batch, ode, "predict")[0]
