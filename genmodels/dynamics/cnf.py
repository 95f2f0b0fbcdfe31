"""Continuous normalizing flows as a model: densities along ODEs, with step control, probes and penalties."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from ..distributions import Distribution
from ..flows.bijection import Bijection
from ..flows.continuous import Continuous, Divergence, Solving
from ..flows.flow import NormalizingFlow
from ..model import Model
from ..networks.encoders import ConditionEncoder
from ..registry import ConfigError, register
from ..rng import BatchNoise, SeedNoise, as_seeds
from ..solvers.base import Backprop, Controller, Gradient, Solver
from ..solvers.divergence import ProbeLaw, mean_over_probes
from ..solvers.runge_kutta import Tsit5
from ..solvers.step_size import PI
from ..transforms import Transform
from ..types import Batch, Condition, Likelihood, Loss, NotApplicable, Seeds, Shape
from .regularization import Regularizer


@register(Model, "cnf")
class ContinuousFlow(NormalizingFlow):
    """A flow with layers that are solutions of ODEs (`continuous`), alone or among other bijections.

    log p(x) = log p_base(z) + ∫₀¹ div v dt + log|det ∂T/∂x|, with z where dx/dt = v(t, x) takes T(x) from t = 0 (data)
    to t = 1 (base). The loss is -log p(x)/D plus the penalty of the regularizers, with Hutchinson's estimate of the
    divergence for items of many components; its probes are drawn anew for each item and layer, and kept during a solve.

    Args:
        layers, base, conditional, encoder: as for `flow`.
        solver, controller: of training, and, with error norms of each row's own, of answers; a controller of None is
            pi with one clock for the batch.
        gradient: how the loss differentiates the solve.
        regularizers: penalties in training.
        divergence: of training; auto is exact for up to 10 components.
        law: of the probes.
        precision: that the whole model computes in.
    Raises:
        ConfigError: if no layer is continuous.
    Source: Chen et al. 2018 (Neural ODE), section 4; Grathwohl et al. 2019 (FFJORD).
    """

    differentiates_twice: ClassVar[bool] = True

    def __init__(
        self,
        layers: tuple[Callable[..., Bijection], ...],
        base: Callable[..., Distribution] | None = None,
        conditional: bool = False,
        encoder: Callable[..., ConditionEncoder] | None = None,
        solver: Solver = Tsit5(),
        controller: Controller | None = None,
        gradient: Gradient = Backprop(),
        regularizers: tuple[Regularizer, ...] = (),
        divergence: Literal["auto", "exact", "hutchinson"] = "auto",
        law: ProbeLaw = "rademacher",
        precision: Literal["float32", "float64"] = "float32",
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        bin_width: float | None,
    ) -> None:
        facts = {"num_classes": num_classes, "condition_shape": condition_shape, "bin_width": bin_width}
        super().__init__(layers, base, conditional, encoder, shape=shape, transform=transform, **facts)
        self.solver, self.controller, self.gradient = solver, controller or PI(norm="batch"), gradient
        self.regularizers, self.divergence, self.law = tuple(regularizers), divergence, law
        if not self.blocks:
            raise ConfigError("cnf: none of the layers is `continuous`. Add one, or use the model `flow`.")
        if precision == "float64":
            self.double()

    @property
    def blocks(self) -> list[Continuous]:
        """The continuous layers."""
        return [layer for layer in self.layers.modules() if isinstance(layer, Continuous)]

    # ---- training ----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        noise = lambda n: BatchNoise(n, generator=generator, device=batch.x.device)  # noqa: E731
        if self.training:
            how = {
                "gradient": self.gradient,
                "regularizers": self.regularizers,
                "progress": self.progress,
                "wide": False,
            }
            solving = self._solving(self.solver, self.controller, self.divergence, noise=noise, **how)
        else:
            solving = self._solving(None, None, self.divergence, noise=noise)
        with self._pass(solving):
            found = super().loss(batch, generator=generator)
        value = found.value if solving.penalty is None else found.value + solving.penalty.to(found.value.dtype)
        return Loss(value, found.logs | solving.logs)

    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform, then let layers that need it start from the first items."""
        noise = lambda n: BatchNoise(n, generator=generator, device=self.device)  # noqa: E731
        with self._pass(self._solving(None, None, self.divergence, noise=noise)):
            return super().prepare(batches, generator=generator)

    # ---- answers -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        seeds: Seeds,
        *,
        condition: Condition | None = None,
        solver: Solver | None = None,
        controller: Controller | None = None,
        batch_size: int = 512,
    ) -> Tensor:
        """[n, *shape] items in data units; item i depends on seed i (and condition i) alone.

        Args:
            seeds: n, or n seeds.
            condition: [n, *] one per seed, for conditional flows.
            solver, controller: instead of those of training.
            batch_size: how many are drawn at once.
        Raises:
            ValueError: if the flow is conditional and there is not one condition per seed, or the other way round.
        """
        seeds = as_seeds(seeds)
        condition = self._checked(condition, len(seeds), "sample")
        if batch_size < 1:
            raise ValueError(f"sample: batch_size must be at least 1, found {batch_size}.")
        drawn = []
        for rows in torch.arange(len(seeds)).split(batch_size):  # one empty part if there are no seeds
            z = self.base.sample(SeedNoise(seeds[rows], device=self.device), dtype=self.dtype)
            own = None if condition is None else _rows(condition, rows)
            drawn.append(self.decode(z, condition=own, solver=solver, controller=controller))
        return torch.cat(drawn)

    def likelihood(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        seeds: Seeds | None = None,
        draws: int = 1,
        divergence: Literal["exact", "hutchinson"] = "exact",
        probes: int = 1,
        solver: Solver | None = None,
        controller: Controller | None = None,
        batch_size: int = 512,
    ) -> Likelihood:
        """log p(x) in nats to the solver's tolerance; for discrete data a bound E_u[log p(x + u)].

        Args:
            x: [B, *shape] in data units; gradients flow to it.
            condition: [B, *] for conditional flows.
            seeds: [B] for the dequantisation noise u and the probes; 0 … B-1 if not given.
            draws: how many values of u the bound is averaged over, each with probes of its own.
            divergence: exact costs a derivative for each component, hutchinson one for each probe.
            probes: how many, for hutchinson; two or more give a standard error.
            solver, controller: instead of those of training.
            batch_size: how many are scored at once.
        Returns:
            kind numerical (bound for discrete data) for the exact divergence, stochastic for hutchinson.
        Raises:
            NotApplicable: if the transform to model space has no volume.
            ValueError: if conditions, seeds or counts do not fit.
        """
        self.check_items(x, "likelihood")
        condition = self._checked(condition, len(x), "likelihood")
        if not self.transform.volume:
            raise NotApplicable("the transform to model space has no log-determinant, so data have no density.")
        seeds = as_seeds(len(x) if seeds is None else seeds)
        if len(seeds) != len(x) or min(draws, probes, batch_size) < 1:
            raise ValueError(
                f"likelihood: one seed per item, and draws, probes and batch_size of at least 1 are needed, found "
                f"{len(seeds)} seeds for {len(x)} items, draws={draws}, probes={probes}, batch_size={batch_size}."
            )
        draws = 1 if self.bin_width is None and divergence == "exact" else draws
        solving = lambda: self._solving(solver, controller, divergence, probes=probes)  # noqa: E731
        wanted = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        with torch.set_grad_enabled(wanted):
            parts = [
                self._values(
                    x[rows], None if condition is None else _rows(condition, rows), seeds[rows], draws, solving
                )
                for rows in torch.arange(len(x)).split(batch_size)
            ]
        return mean_over_probes(torch.cat(parts, 2), divergence, "numerical" if self.bin_width is None else "bound")

    def _values(
        self, x: Tensor, condition: Condition | None, seeds: Tensor, draws: int, solving: Callable[[], Solving]
    ) -> Tensor:
        """[draws, P, B] one value for each draw and probe."""
        noise = None if self.bin_width is None else SeedNoise(seeds, purpose="dequantise", device=x.device)
        probe_noise = SeedNoise(seeds, purpose="probe", device=x.device)  # its draws go on from layer to layer
        values = []
        for _ in range(draws):
            with self._pass(solving()) as how:
                how.noise = lambda n: probe_noise
                value = self._log_prob(x, condition, noise)
            values.append(value[None] if how.spread is None else value + how.spread)
        return torch.stack(values)

    def log_prob(
        self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None, **options: Any
    ) -> Tensor:
        """[B] nats: the value of `likelihood`, with its options."""
        return self.likelihood(x, condition=condition, seeds=seeds, **options).value

    def encode(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Tensor:
        """[B, *latent shape] latent of x; discrete data are placed in the middle of their cells."""
        with self._pass(self._solving(solver, controller, "none")):
            return super().encode(x, condition=condition)

    def decode(
        self,
        z: Tensor,
        *,
        condition: Condition | None = None,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Tensor:
        """[B, *shape] item in data units of a latent: decode(encode(x)) = x to the solver's tolerance."""
        with self._pass(self._solving(solver, controller, "none")):
            return super().decode(z, condition=condition)

    def velocity(self, t: Tensor, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *shape] dx/dt of the flow, in model space per unit time from t = 0 (data) to 1 (base).

        Raises:
            NotApplicable: if the flow is not one continuous layer alone.
        """
        if len(self.layers.bijections) != 1 or not isinstance(self.layers.bijections[0], Continuous):
            raise NotApplicable("a velocity at every time has a flow of one continuous layer, and this one has others.")
        condition = self._encoded(self._checked(condition, len(x), "velocity"))
        return self.layers.bijections[0].velocity(condition)(t, x.to(self.dtype))

    # ---- how layers are solved ---------------------------------------------------------------------------------------

    def _solving(
        self, solver: Solver | None, controller: Controller | None, divergence: Divergence, **more: Any
    ) -> Solving:
        """With a solver and a controller of one's own, or those of training with each row's own error norms."""
        return Solving(
            solver or self.solver,
            controller or self.controller.by_row(),
            divergence=divergence,
            law=self.law,
            **more,
        )

    @contextmanager
    def _pass(self, solving: Solving) -> Iterator[Solving]:
        """One pass through the layers, solved like this."""
        for block in self.blocks:
            block.solving = solving
        try:
            yield solving
        finally:
            for block in self.blocks:
                block.solving = None


def _rows(condition: Condition, rows: Tensor) -> Condition:
    return condition[rows] if isinstance(condition, Tensor) else {key: value[rows] for key, value in condition.items()}
