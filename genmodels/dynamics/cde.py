"""Neural controlled differential equations: a hidden state driven by a path through irregular observations."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..model import Model
from ..networks.network import Network
from ..registry import ConfigError, register
from ..rng import BatchNoise
from ..solvers.base import Backprop, Controller, Fixed, Gradient, Solver
from ..solvers.fields import RowField
from ..solvers.landing import Landing
from ..solvers.paths import Control, Hermite, Path
from ..solvers.runge_kutta import Tsit5
from ..solvers.step_size import PI
from ..types import Batch, Loss, Shape, expand_like
from .regularization import Evolved, Regularizer, evolve


class Clock(NamedTuple):
    """The parameters of a path that each row is at, at the whole times of one clock for all rows.

    A controlled equation does not mind how fast its path is walked: between the times k and k + 1 every row goes from
    the parameter grid[:, k] to grid[:, k + 1], and stands still where these are the same.

    Args:
        grid: [B, L] float64 non-decreasing parameters.
        piece: [B, L - 1] the piece of the path that each interval lies in, where none holds a knot; None otherwise.
    """

    grid: Tensor
    piece: Tensor | None


@register(Model, "neural_cde")
class NeuralCDE(Model):
    """dz = tanh(F(z)) dX along a path X through the observations; from z, class logits or values at given times.

    z(t_0) is a function of X(t_0), so that the level of the path counts. A class is read from the state at the last
    observation of each series, values from the states at `target_times`, by one linear layer. After its last
    observation a path rests, and with it the state: the model fills in, classifies and filters, and does not forecast.

    Steps land on the observations where the control has kinks there, and on a fixed grid. A kinked control under step
    control costs at least a step for each observation, a smooth one only as many as its tolerance needs. With the
    controller fixed every interval between observations is divided into `steps`.

    Args:
        field: network F from hidden to hidden × channels; with a final tanh, which keeps long series from exploding.
        hidden: size of z.
        control: the path through the observations.
        start: network from X(t_0) to z(t_0), null for a linear layer.
        head_scale: factor on the first weights of the last layer of F: how strongly an untrained state moves.
        standardize: measure mean and standard deviation of the observed values, and the span of times, before training.
            Without it times and values enter as they are.
        land: whether steps land on observations: always, never, or auto.
        solver, controller, gradient: of the equation in training, and, with steps of each row's own, in predictions. A
            controller of null is pi with one clock for the batch.
        regularizers: penalties on how the equation is solved, in training.
        precision: of parameters and states.
    Source: Kidger et al. 2020 (Neural controlled differential equations for irregular time series), section 3.
    """

    def __init__(
        self,
        field: Callable[..., Network],
        hidden: int = 32,
        control: Control = Hermite(),
        start: Callable[..., Network] | None = None,
        head_scale: float = 1.0,
        standardize: bool = True,
        land: Literal["auto", "always", "never"] = "auto",
        solver: Solver = Tsit5(),
        controller: Controller | None = None,
        gradient: Gradient = Backprop(),
        regularizers: tuple[Regularizer, ...] = (),
        precision: Literal["float32", "float64"] = "float32",
        *,
        shape: Shape,
        target_shape: Shape | None,
    ) -> None:
        super().__init__()
        if len(shape) != 2 or not target_shape or len(target_shape) > 2:
            raise ConfigError(
                "neural_cde: series [L, C] with class labels, or values at target times, are needed; the data have "
                f"items of shape {list(shape)} and targets of shape {target_shape and list(target_shape)}."
            )
        self.shape, self.target_shape = tuple(shape), tuple(target_shape)
        self.control, self.standardize, self.land = control, standardize, land
        self.solver, self.controller, self.gradient = solver, controller or PI(norm="batch"), gradient
        self.regularizers, self.precision = tuple(regularizers), precision
        self.differentiates_twice = any(r.differentiates for r in self.regularizers)
        values = shape[1]
        plain = {"timed": False, "num_classes": None, "condition_shape": None}
        channels = control.channels(values)
        self.field = field(in_shape=(hidden,), out_shape=(hidden, channels), **plain)
        _scale_head(self.field, head_scale)
        self.start = start(in_shape=(channels,), out_shape=(hidden,), **plain) if start else None
        self.linear_start = None if start else nn.Linear(channels, hidden)
        self.readout = nn.Linear(hidden, self.target_shape[-1])
        for name, size in (("loc", values), ("scale", values), ("per_count", values)):
            self.register_buffer(name, torch.zeros(size) if name == "loc" else torch.ones(size))
        self.register_buffer("origin", torch.zeros((), dtype=torch.float64))
        self.register_buffer("span", torch.ones((), dtype=torch.float64))
        if precision == "float64":
            self.double()

    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        if not self.standardize:
            return {}
        values = self.shape[1]
        count, total, square = (torch.zeros(values, dtype=torch.float64, device=self.device) for _ in range(3))
        items, first, last = 0, torch.inf, -torch.inf
        for batch in batches:
            x, times, mask = self._observations(batch, "prepare")
            x = torch.where(mask, x, 0.0).double()
            count, total, square = count + mask.sum((0, 1)), total + x.sum((0, 1)), square + x.square().sum((0, 1))
            seen = times[mask.any(2)]
            first, last = min(first, float(seen.min())), max(last, float(seen.max()))
            items += len(batch)
        mean = total / count.clamp(min=1)
        spread = (square / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        # a channel that is constant but for rounding has no scale of its own
        spread = torch.where(spread > 1e-6 * mean.abs(), spread, 1.0)
        self.loc.copy_(mean)
        self.scale.copy_(spread)
        self.per_count.copy_(items / count.clamp(min=1))
        self.origin.fill_(first)
        self.span.fill_(last - first if last > first else 1.0)
        return {"span": self.span.clone()}

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        if batch.target is None:
            raise ValueError("neural_cde: a batch without targets has no loss.")
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        answer, evolved = self._answer(
            batch,
            self.solver,
            self.controller,
            gradient=self.gradient,
            regularizers=self.regularizers if self.training else (),
            progress=self.progress,
            noise=noise,
        )
        value, logs = _error(answer, batch)
        return Loss(value + evolved.penalty, {**logs, **evolved.logs})

    def predict(
        self,
        batch: Batch,
        *,
        seeds: object = None,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Tensor:
        """[B, classes] logits, or [B, M, *] values at `target_times`; nothing is random.

        Args:
            solver, controller: what the answer may cost; None for those of training, with steps of each row's own.
        """
        controller = controller or self.controller.by_row()
        return self._answer(batch, solver or self.solver, controller, gradient=Backprop())[0]

    # ---- the equation ------------------------------------------------------------------------------------------------

    def _answer(self, batch: Batch, solver: Solver, controller: Controller, **options: Any) -> tuple[Tensor, Evolved]:
        x, times, mask = self._observations(batch, "neural_cde")
        x = (x - self.loc) / self.scale
        path = self.control.path((times - self.origin) / self.span, x, mask, per_count=self.per_count)
        asked = self._asked(batch, path)
        clock = self._clock(path, asked, controller)
        length = clock.grid.shape[1]
        evolved = evolve(
            RowField(self._slope, clock, path),
            self._initial(path.value(path.knots[:, 0])),
            torch.arange(length, dtype=torch.float64, device=x.device),
            solver=Landing(solver) if length > 2 else solver,
            controller=controller,
            save="last" if asked is None else "all",
            **options,
        )
        if asked is None:
            return self.readout(evolved.solution.x), evolved
        place = torch.searchsorted(clock.grid, asked)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return self.readout(evolved.solution.path[place, rows]), evolved

    def _observations(self, batch: Batch, where: str) -> tuple[Tensor, Tensor, Tensor]:
        """Values, times and mask [B, L, C] of a batch."""
        x = batch.x
        if x.ndim != 3 or x.shape[2] != self.shape[1] or batch.times is None:
            found = "no times" if batch.times is None else f"times {list(batch.times.shape)}"
            raise ValueError(
                f"{where}: this model was built for series x [B, L, {self.shape[1]}] with times [B, L], found x "
                f"{list(x.shape)} and {found}."
            )
        mask = torch.ones_like(x, dtype=torch.bool) if batch.mask is None else batch.mask
        if mask.shape not in (x.shape, x.shape[:2]):
            raise ValueError(f"{where}: mask has shape {list(mask.shape)}, but the values have {list(x.shape)}.")
        return x.to(self.loc.dtype), batch.times, expand_like(mask, x).expand_as(x)

    def _asked(self, batch: Batch, path: Path) -> Tensor | None:
        """[B, M] the parameters of the path at the target times; None for an answer about the whole series."""
        if len(self.target_shape) == 1:
            return None
        if batch.target_times is None:
            raise ValueError("neural_cde: this model answers with values at times; the batch has no target_times.")
        return path.parameter((batch.target_times.to(torch.float64) - self.origin) / self.span)

    def _clock(self, path: Path, asked: Tensor | None, controller: Controller) -> Clock:
        land = self.land == "always"
        if self.land == "auto":
            land = self.control.kinks or isinstance(controller, Fixed)
        if land and asked is None:
            grid = path.knots
        else:
            ends = path.knots if land else path.knots[:, :1]
            grid = torch.cat((ends, path.knots[:, -1:] if asked is None else asked), 1).sort(1).values
        return Clock(grid, path.locate((grid[:, 1:] + grid[:, :-1]) / 2) if land else None)

    def columns(self, z: Tensor) -> Tensor:
        """[B, hidden, channels] f(z): how the state answers to each channel of the path."""
        return self.field(None, z).tanh()

    def _initial(self, x: Tensor) -> Tensor:
        return self.linear_start(x) if self.start is None else self.start(None, x)

    def _slope(self, t: Tensor, z: Tensor, clock: Clock, path: Path) -> Tensor:
        """[B, hidden] dz/dt by the common clock: tanh(F(z)) dX/ds · ds/dt."""
        rows = torch.arange(len(z), device=z.device)
        k = t.floor().clamp(0, clock.grid.shape[1] - 2).to(torch.int64).expand(len(z))
        start, end = clock.grid[rows, k], clock.grid[rows, k + 1]
        s = torch.minimum(start + (t - k) * (end - start), end)
        dx = path.derivative(s, None if clock.piece is None else clock.piece[rows, k])
        return torch.einsum("bhc,bc->bh", self.columns(z), dx * (end - start)[:, None].to(dx.dtype))


def _scale_head(network: Network, scale: float) -> None:
    head = getattr(network, "head", None)
    if scale == 1:
        return
    if scale <= 0 or not isinstance(head, nn.Module):
        found = f"found {scale}" if scale <= 0 else f"and network '{network.registered_name}' has none"
        raise ConfigError(f"model.head_scale: a factor above 0 on the weights of a last layer is needed, {found}.")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(scale)


def _error(answer: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """[B] the cross-entropy of class labels, or the mean squared error of values where they count."""
    target = batch.target
    if not target.is_floating_point():
        hits = (answer.argmax(1) == target).to(answer.dtype)
        return nn.functional.cross_entropy(answer, target, reduction="none"), {"accuracy": hits.mean()}
    if target.shape != answer.shape:
        raise ValueError(
            f"neural_cde: target has shape {list(target.shape)}, but target_times ask for {list(answer.shape)}."
        )
    mask = torch.ones_like(answer, dtype=torch.bool) if batch.target_mask is None else batch.target_mask
    mask = expand_like(mask, answer).expand_as(answer)
    square = torch.where(mask, answer - target, 0.0).square().flatten(1).sum(1)
    value = square / mask.flatten(1).sum(1).clamp(min=1)
    return value, {"squared_error": value.detach().mean()}
