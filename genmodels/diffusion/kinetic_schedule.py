"""The kinetic-optimal path as a schedule that is found from the training data."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor

from ..registry import ConfigError, register
from . import kinetic_plot
from .kinetic import Energy, energy, kinetic_path
from .schedules import Linear, Schedule, Trigonometric, VariancePreserving
from .separation import NODES, Curve, Separation, at_least, default_ratios, of_covariance, of_items, warn_of
from .tabulated import Table, knots_of

Estimator = Literal["in_sample", "leave_one_out", "gaussian"]
DATA_END = 1e-3  # the first time of the energies that are compared: that of vp grows without end below it
STANDARD: dict[str, Callable[[], Schedule]] = {
    "linear": Linear,
    "trigonometric": Trigonometric,
    "vp": VariancePreserving,
}


@register(Schedule, "kinetic_optimal")
class KineticOptimal(Table):
    """The path between N(0, I) and the training data whose marginal velocity has the least kinetic energy.

    The straight chord in the plane that `kinetic.kinetic_path` describes, for the separation λ(s) of the items in model
    space, found before training. λ, its standard errors and the knots are buffers: checkpoints hold them, and all that
    comes after uses the same path. It is the linear path until it is found.

    Args:
        estimator: of λ. in_sample takes the items for the whole law, so that λ = 1 where they are remembered;
            leave_one_out asks for each item without it, a lower bound for the law that they come from, or for the best
            linear denoiser if that is better; gaussian takes that alone, for which mean and covariance are enough.
        floor: of γ, above 0 and at most 1; it bounds the derivatives of α and σ where γ is 0.
        queries: noised items at which λ is estimated, for each of which all items are compared.
        count: knots of the path.
        precision: in which items are compared.
    Raises:
        ConfigError: if a number is out of its range; from `fit`, if there are too few items, or none that differ.
    Source: Shaul et al. 2023 (On kinetic optimal probability paths for generative models), theorem 3.1 and section 3.1.
    """

    separation: Tensor
    moments: Tensor

    def __init__(
        self,
        estimator: Estimator = "in_sample",
        floor: float = 0.05,
        queries: int = 1000,
        count: int = 257,
        precision: Literal["float32", "float64"] = "float64",
    ) -> None:
        if queries < 2:
            raise ConfigError(f"kinetic_optimal: at least 2 queries are needed, found {queries}.")
        kinetic_path(_Apart(), floor, count)  # refuses what it cannot use, before any training
        t = torch.linspace(0, 1, count, dtype=torch.float64)
        super().__init__(knots_of(t, 1 - t, t, -torch.ones_like(t), torch.ones_like(t)))
        self.estimator, self.floor, self.queries, self.count = estimator, floor, queries, count
        self.precision = {"float32": torch.float32, "float64": torch.float64}[precision]
        self.register_buffer("separation", torch.zeros(4, NODES, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(2, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], *, generator: Generator) -> dict[str, Tensor]:
        try:
            data = self._estimate(batches, generator)
        except ValueError as error:
            raise ConfigError(f"schedule kinetic_optimal: {error}") from None
        ratios = data.ratios if isinstance(data, Curve) else default_ratios(len(data.variances))
        nothing = torch.zeros_like(ratios)
        rows = (data.values, data.stderr, data.inner) if isinstance(data, Curve) else (data(ratios), nothing, nothing)
        found = kinetic_path(data, self.floor, self.count)
        self.separation.copy_(torch.stack((ratios, *rows)))
        self.moments.copy_(torch.tensor((data.mean_square, data.variance), dtype=torch.float64))
        self.knots.copy_(found.knots)
        energies = self.energies()
        logs = {f"kinetic_energy_{name}": torch.tensor(value.marginal) for name, value in energies.items()}
        return logs | {"kinetic_angle": torch.tensor(found.angle), "kinetic_floored": torch.tensor(found.floored)}

    def _estimate(self, batches: Iterable[Tensor], generator: Generator) -> Separation:
        if self.estimator == "gaussian":
            return of_covariance(batches)
        curve = of_items(
            batches,
            queries=self.queries,
            leave_one_out=self.estimator == "leave_one_out",
            dtype=self.precision,
            generator=generator,
        )
        if self.estimator == "in_sample":
            warn_of(curve, "schedule kinetic_optimal")
            return curve
        # away from its neighbours an item is missed by more than the best linear denoiser misses it
        return at_least(curve, of_covariance(batches))

    @property
    def fitted(self) -> bool:
        return bool(self.moments[0] > 0)

    def curve(self) -> Curve:
        """λ as it was found.

        Raises:
            ValueError: before that.
        """
        if not self.fitted:
            raise ValueError("kinetic_optimal: the separation is not known before `fit`, which training begins with.")
        rows, (mean_square, variance) = self.separation.double().cpu(), self.moments.tolist()
        return Curve(*rows, mean_square, variance)

    def energies(self) -> dict[str, Energy]:
        """E and E_c of this path and of the standard ones for λ as it was found, from t = 1e-3 to 1."""
        data = self.curve()
        paths: dict[str, Schedule] = {"kinetic_optimal": Table(self.knots.cpu())}
        paths |= {name: make() for name, make in STANDARD.items()}
        return {name: energy(path, data, (DATA_END, 1.0)) for name, path in paths.items()}

    def portray(self, folder: Path) -> list[Path]:
        if not self.fitted:
            return []
        return kinetic_plot.write(folder, self.curve(), Table(self.knots.cpu()), self.energies())


class _Apart(Separation):
    """Items that are told apart under any noise: λ = 1."""

    mean_square, variance, span = 1.0, 1.0, (0.05, 1000.0)

    def residual(self, s: Tensor) -> Tensor:
        return torch.zeros_like(s, dtype=torch.float64)
