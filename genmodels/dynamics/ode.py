"""Neural ODEs: predictions read from where, or along which, a learned vector field takes what it is given."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from ..model import Model
from ..networks.network import Network
from ..registry import ConfigError, register
from ..rng import BatchNoise, Noise
from ..solvers.base import Backprop, Controller, Gradient, Solver
from ..solvers.fields import RowField
from ..solvers.runge_kutta import Tsit5
from ..solvers.step_size import PI
from ..transforms import Transform
from ..types import Batch, Loss, Seeds, Shape
from .regularization import Evolved, Regularizer, evolve
from .supervised import Supervised


@register(Model, "neural_ode")
class NeuralODE(Supervised):
    """ŷ = head(z(T)) of dz/dt = f(t, z) from z(0) = [encoder(T(x)), 0].

    The loss of an item is the cross entropy of its class (integer targets) or the mean squared error (others), plus the
    penalty of the regularizers. With the readout "path" the head is applied to z at every target time instead; times
    are then those of the batch, from the last observation (0 without times) on.

    Args:
        network: the field f on states.
        encoder: network before the ODE; None starts at the item itself, in model space.
        latent: shape of what the encoder gives; None for that of the item in model space.
        augment: components (channels of images) of 0 that are appended to the state.
        readout: what the head reads: the state at the end, or that at every target time.
        head: a linear layer on the flattened state, or the state itself.
        end: T, where the readout is "end".
        solver, controller: of training, and, with error norms of each row's own, of predictions; a controller of None
            is pi with one clock for the batch.
        gradient: how the loss differentiates the solve.
        regularizers: penalties in training.
        precision: that the whole model computes in.
    Raises:
        ConfigError: if the data have no target, or sizes do not fit.
    Source: Chen et al. 2018 (Neural ODE), section 3; Dupont et al. 2019 (Augmented Neural ODEs) for `augment`; Pal et
        al. 2021 (Opening the Blackbox).
    """

    def __init__(
        self,
        network: Callable[..., Network],
        encoder: Callable[..., Network] | None = None,
        latent: tuple[int, ...] | None = None,
        augment: int = 0,
        readout: Literal["end", "path"] = "end",
        head: Literal["linear", "none"] = "linear",
        end: float = 1.0,
        solver: Solver = Tsit5(),
        controller: Controller | None = None,
        gradient: Gradient = Backprop(),
        regularizers: tuple[Regularizer, ...] = (),
        precision: Literal["float32", "float64"] = "float32",
        *,
        shape: Shape,
        target_shape: Shape | None,
        transform: Transform,
    ) -> None:
        super().__init__()
        if target_shape is None or (readout == "path" and len(target_shape) < 2):
            raise ConfigError(
                f"neural_ode: targets of shape {target_shape and list(target_shape)} cannot be read from the "
                f"{readout} of a solution. Set data.task to one with targets, and readout: path for series [M, *]."
            )
        if augment < 0 or not 0 < end < math.inf or (latent is not None and encoder is None):
            raise ConfigError(
                "neural_ode: augment >= 0, end > 0, and a `latent` only with an encoder are needed, found "
                f"augment={augment}, end={end}, latent={latent}."
            )
        self.shape, self.transform, self.readout, self.end, self.augment = (
            tuple(shape),
            transform,
            readout,
            end,
            augment,
        )
        self.solver, self.controller, self.gradient = solver, controller or PI(norm="batch"), gradient
        self.regularizers = tuple(regularizers)
        self.differentiates_twice = any(r.differentiates for r in self.regularizers)
        model_shape = transform.out_shape(self.shape)
        first, *rest = model_shape if latent is None else latent
        self.state_shape = (first + augment, *rest)
        self.target_shape = tuple(target_shape[1:] if readout == "path" else target_shape)
        plain = {"num_classes": None, "condition_shape": None}
        self.encoder = encoder and encoder(in_shape=model_shape, out_shape=(first, *rest), timed=False, **plain)
        self.network = network(in_shape=self.state_shape, out_shape=self.state_shape, timed=True, **plain)
        sizes = math.prod(self.state_shape), math.prod(self.target_shape)
        if head == "none" and sizes[0] != sizes[1]:
            raise ConfigError(
                f"neural_ode: head: none reads targets of shape {list(self.target_shape)} from states of as many "
                f"numbers, found states of shape {list(self.state_shape)}. Use head: linear."
            )
        self.head = nn.Linear(*sizes) if head == "linear" else nn.Identity()
        if precision == "float64":
            self.double()

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        self.check_target(batch)
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        how: dict[str, Any] = {"solver": self.solver, "controller": self.controller}
        if self.training:
            how |= {"regularizers": self.regularizers, "progress": self.progress, "noise": noise}
        else:
            how["controller"] = self.controller.by_row()
        out = self._evolve(batch, self._start(batch, noise), **how)
        value, logs = self.prediction_error(self._read(out), batch)
        return Loss(value + out.penalty.to(value.dtype), logs | out.logs)

    def predict(
        self,
        batch: Batch,
        *,
        seeds: Seeds | None = None,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Tensor:
        """[B, *target_shape] class logits, or values; rows do not depend on each other.

        Args:
            solver, controller: instead of those of training.
        """
        start = self._start(batch, None)
        how = {"solver": solver or self.solver, "controller": controller or self.controller.by_row()}
        return self._read(self._evolve(batch, start, **how))

    def velocity(self, t: Tensor, x: Tensor, *, condition: None = None) -> Tensor:
        """[B, *state_shape] dz/dt at (t, z)."""
        return self.network(t, x)

    def _start(self, batch: Batch, noise: Noise | None) -> Tensor:
        """[B, *state_shape] z(0)."""
        z = self.encoded(batch.x, noise)
        if not self.augment:
            return z
        return torch.cat((z, z.new_zeros(len(z), self.augment, *z.shape[2:])), 1)

    def _evolve(self, batch: Batch, z: Tensor, **how: Any) -> Evolved:
        path = self.readout == "path"
        field, ends = RowField(self.network), torch.tensor([0.0, self.end], dtype=torch.float64)
        if not path:
            return evolve(field, z, ends, gradient=self.gradient, **how)
        times, places = self._times(batch)
        evolved = evolve(field, z, times, gradient=self.gradient, save="all", **how)
        return evolved._replace(solution=replace(evolved.solution, path=evolved.solution.path[places]))

    def _times(self, batch: Batch) -> tuple[Tensor, Tensor | slice]:
        """[L] or, where rows differ, [L, B] times to solve over, and where the target times are among them."""
        if batch.target_times is None:
            raise ValueError("neural_ode: readout: path needs target_times, which the batch does not have.")
        asked = batch.target_times.double()
        first = torch.zeros_like(asked[:, :1]) if batch.times is None else batch.times[:, -1:].double()
        times = torch.cat((first, asked), 1).T
        if times.shape[1] > 0 and bool((times == times[:, :1]).all() & (times[:, 0].diff() >= 0).all()):
            distinct, places = torch.unique_consecutive(times[:, 0], return_inverse=True)
            if len(distinct) > 1:
                return distinct, places[1:]
        return times, slice(1, None)

    def _read(self, out: Evolved) -> Tensor:
        """[B, *target_shape], or [B, M, *target_shape] along the path."""
        if self.readout == "end":
            z = out.solution.x
            return self.head(z.flatten(1)).reshape(len(z), *self.target_shape)
        z = out.solution.path.transpose(0, 1)
        return self.head(z.flatten(2)).reshape(*z.shape[:2], *self.target_shape)
