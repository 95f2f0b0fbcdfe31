"""Deep equilibrium models: predictions read from fixed points."""

import math
from collections.abc import Callable
from typing import Literal

from torch import Generator, Tensor, nn

from ..model import Model
from ..networks.cells import Cell
from ..networks.equilibrium import EquilibriumLayer, Settled, Start
from ..networks.network import Network
from ..registry import ConfigError, register
from ..rng import BatchNoise, Noise
from ..solvers.equilibrium import EquilibriumGradient, Implicit
from ..solvers.fixed_point import Anderson, FixedPoint
from ..transforms import Transform
from ..types import Batch, Loss, Seeds, Shape
from .supervised import Supervised


@register(Model, "deq")
class DEQ(Supervised):
    """ŷ = head(read(z*)) with z* = f(z*, u), u = inject(encoder(T(x))).

    The loss of an item is the cross entropy of its class (integer targets) or the mean squared error (others), and the
    terms of `EquilibriumLayer`. With the solver `anderson` or `broyden` it is a DEQ, with `infinite_time` a continuous
    one; with start "predictor" a Skip DEQ, with "first" a Skip Reg DEQ.

    Args:
        cell: f.
        encoder: a network before the cell; None for the item itself, in model space.
        latent: shape of what the encoder gives.
        solver: of training and, by default, of predictions.
        gradient, start, predictor, skip, jacobian, pretraining, depth: see `EquilibriumLayer`.
        precision: that the whole model computes in.
    Raises:
        ConfigError: if the data have no target, or an encoder has no `latent` shape.
    Source: Bai et al. 2019 (Deep equilibrium models); Pal et al. 2022 (Continuous deep equilibrium models), section 3.
    """

    def __init__(
        self,
        cell: Callable[..., Cell],
        encoder: Callable[..., Network] | None = None,
        latent: tuple[int, ...] | None = None,
        solver: FixedPoint = Anderson(),
        gradient: EquilibriumGradient = Implicit(),
        start: Start = "zero",
        predictor: Callable[..., Network] | None = None,
        skip: float = 0.0,
        jacobian: float = 0.0,
        pretraining: float = 0.0,
        depth: int = 5,
        precision: Literal["float32", "float64"] = "float32",
        *,
        shape: Shape,
        target_shape: Shape | None,
        transform: Transform,
    ) -> None:
        super().__init__()
        if target_shape is None:
            raise ConfigError("deq: the data have no target. Set data.task to one with targets.")
        if (latent is None) != (encoder is None):
            raise ConfigError(
                f"deq: an encoder and its latent shape go together, found {'an' if encoder else 'no'} encoder and "
                f"latent: {latent and list(latent)}. Set both, or both to null."
            )
        self.shape, self.transform, self.target_shape = tuple(shape), transform, tuple(target_shape)
        model_shape, plain = transform.out_shape(self.shape), {"num_classes": None, "condition_shape": None}
        self.encoder = encoder and encoder(in_shape=model_shape, out_shape=latent, timed=False, **plain)
        made = cell(in_shape=model_shape if latent is None else latent, timed=False, **plain)
        self.layer = EquilibriumLayer(made, solver, gradient, start, predictor, skip, jacobian, pretraining, depth)
        images = len(made.out_shape) == 3
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if images else nn.Flatten()
        self.head = nn.Linear(made.out_shape[0] if images else math.prod(made.out_shape), math.prod(target_shape))
        if precision == "float64":
            self.double()

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        self.check_target(batch)
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        settled = self.settle(batch, noise=noise, progress=self.progress)
        value, logs = self.prediction_error(self._read(settled), batch)
        return Loss(value + settled.penalty.to(value.dtype), logs | settled.logs)

    def predict(
        self,
        batch: Batch,
        *,
        seeds: Seeds | None = None,
        solver: FixedPoint | None = None,
        iterations: int | None = None,
    ) -> Tensor:
        """[B, *target_shape] class logits, or values; rows do not depend on each other.

        Args:
            solver: instead of that of training.
            iterations: moves of the solver away from the start at most; 0 reads the start alone, without a search.
        Raises:
            ValueError: if iterations is negative.
        """
        if iterations is not None and iterations < 0:
            raise ValueError(f"predict: iterations must be at least 0, found {iterations}.")
        return self._read(self.settle(batch, solver=solver, limit=iterations))

    def settle(self, batch: Batch, *, noise: Noise | None = None, **how: object) -> Settled:
        """The states of a batch, with what `EquilibriumLayer` takes."""
        return self.layer(self.layer.cell.inject(None, self.encoded(batch.x, noise)), noise=noise, **how)

    def _read(self, settled: Settled) -> Tensor:
        h = self.pool(self.layer.cell.read(settled.found.z))
        return self.head(h).reshape(len(h), *self.target_shape)
