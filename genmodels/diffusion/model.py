"""Diffusion and flow matching as one model: any path, prediction, weighting and law of times."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Generator, Tensor

from ..dynamics.regularization import Evolved, Regularizer, evolve
from ..model import Model
from ..networks.equilibrium import charges, warm
from ..networks.network import Network
from ..registry import register
from ..rng import BatchNoise, SeedNoise, as_seeds
from ..score_model import ScoreModel
from ..solvers.base import Controller, Fixed, Solver
from ..solvers.fields import RowField
from ..solvers.runge_kutta import Dopri5, Heun, Tsit5
from ..solvers.step_size import PI
from ..transforms import Transform
from ..types import Batch, Condition, Loss, Seeds, Shape, expand_like
from .checks import at_least_one, check_settings
from .couplings import Coupling, Independent
from .denoiser import Denoising, denoiser_of
from .editable import Editable
from .grids import Even, TimeGrid
from .model_space import InModelSpace, root_mean_square
from .parametrization import Target, target
from .reverse import Diffusivity, OfPath
from .samplers import Guidance, Sampler
from .schedules import Linear, Schedule
from .scoring import Scored
from .time_condition import TimeCondition
from .times import LogitNormal, TimeLaw
from .weightings import Uniform, Weighting


@register(Model, "diffusion")
class DiffusionModel(Denoising, Editable, Scored, ScoreModel):
    """A denoiser of x_t = α(t) T(x) + σ(t) ε, and the ODE between noise (t = 1) and data (t = 0) that it defines.

    loss = w(t) |p̂(t, x_t) - p|²/D with ε ~ N(0, I), t from the law of times, and p what the network predicts. The
    schedule "linear" with the prediction "velocity" is flow matching (rectified flow), "vp" with "eps" is score-based
    diffusion, and "edm" with "edm" and the times "log_normal" is EDM.

    The model's law is that of the ODE run from N(0, σ(t_max)²) at t_max to t_min, where times end at which the schedule
    or the prediction is singular: "vp" and "cosine" begin at 1e-5, "edm" at σ = 0.002, x, score and edm at σ/α = 1e-3,
    and eps, score and edm end at α/σ = 1e-3. So its likelihood is that of items with noise of this size.

    Args:
        network: the network to train, built for items of the data's shape.
        schedule: the path.
        prediction: what the network predicts; "edm" also scales its input and its time.
        times, time_condition: law of times in training; what the network sees of them (null: t, or log_snr for edm).
        weighting: on the squared error.
        coupling: which noise of a batch meets which item; all but "independent" give up scores and what needs them.
        conditional: whether the network sees the conditions of the data (labels, embeddings), if there are any.
        condition_dropout: share of items whose condition is hidden in training, item by item; 0 gives up guidance and
            unconditional answers.
        sigma_data: root mean square of T(x), for the prediction and the weighting "edm"; null to measure it.
        regularizers: penalties in training on the ODE from noise to data, for samples that take fewer evaluations.
        regularized_items: for how many items of a batch, under their conditions, that ODE is then solved.
        solver, controller: of that solve; a controller of null is pi at 1e-3 with one clock for all.
    Raises:
        ConfigError: if a number is out of its range, or if the network would be fed inputs of a very large scale.
    Source: Lipman et al. 2023 (Flow Matching); Song et al. 2021 (Score-based generative modeling through SDEs),
        section 4.3 and appendix D; Karras et al. 2022 (EDM).
    """

    collects = True

    def __init__(
        self,
        network: Callable[..., Network],
        schedule: Schedule = Linear(),
        prediction: Target = "velocity",
        times: TimeLaw = LogitNormal(),
        weighting: Weighting = Uniform(),
        coupling: Coupling = Independent(),
        conditional: bool = True,
        condition_dropout: float = 0.1,
        sigma_data: float | None = None,
        regularizers: tuple[Regularizer, ...] = (),
        regularized_items: int = 16,
        solver: Solver = Tsit5(),
        controller: Controller | None = None,
        time_condition: TimeCondition | None = None,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        bin_width: float | None,
    ) -> None:
        facts = {"num_classes": num_classes, "condition_shape": condition_shape, "bin_width": bin_width}
        super().__init__(conditional, condition_dropout, shape=shape, transform=transform, **facts)
        check_settings(schedule, prediction, sigma_data, regularized_items)
        self.regularizers, self.regularized_items = tuple(regularizers), regularized_items
        self.solver, self.controller = solver, controller or PI(1e-3, 1e-3, norm="batch")
        self.differentiates_twice = any(r.differentiates for r in self.regularizers)
        self.times, self.weighting = times, weighting
        self.coupling, self.measures = coupling, sigma_data is None
        sizes = {"in_shape": self.model_shape, "out_shape": self.model_shape, "timed": True}
        built = network(**sizes, **self.conditions.keywords)
        self.denoiser = denoiser_of(built, schedule, prediction, sigma_data or 1.0, time_condition)

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def network(self) -> Network:
        return self.denoiser.network

    # ---- training ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform, measure the data's root mean square in model space if it was not given, find the path."""
        self.transform.fit(batches)
        if self.measures:
            self.denoiser.sigma_data.fill_(root_mean_square(self, self._to_model_space, batches, generator))
        found = self.denoiser.fit_path(InModelSpace(self.transform, batches, generator), generator=generator)
        return {"sigma_data": self.denoiser.sigma_data.clone(), **found}

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        self.check_items(batch.x, "loss")
        denoiser, noise = self.denoiser, BatchNoise(len(batch), generator=generator, device=batch.x.device)
        x, _ = self._to_model_space(batch.x, noise)
        span = (denoiser.t_min, denoiser.t_max)
        t = self.times.sample(noise, self.schedule, span)
        scales, eps = self.schedule(t), noise.normal(*self.model_shape, dtype=x.dtype)
        condition = self.conditions.drop(batch.condition, noise)
        eps = self.coupling(x, eps, batch.condition if self.conditional else None, noise)
        alpha, sigma = (expand_like(c, x).to(x.dtype) for c in (scales.alpha, scales.sigma))
        wanted = target(denoiser.prediction, x, eps, scales, denoiser.sigma_data)
        error = (denoiser.answer(t, alpha * x + sigma * eps, condition) - wanted).square()
        density = self.times.density(t, self.schedule, span)
        error = error.reshape(len(batch), math.prod(self.model_shape)).mean(1)
        value = self.weighting.loss(error, denoiser.prediction, scales, density, denoiser.sigma_data)
        charged, logs = charges(self.denoiser)
        value, logs = value + charged, {"squared_error": error.detach().mean()} | logs
        if self.training and self.regularizers:
            solved = self._regularized(len(batch), condition, generator)
            value, logs = value + solved.penalty.mean().to(value.dtype), logs | solved.logs
            charges(self.denoiser)  # on the path of the solve nothing is charged
        return Loss(value, logs)

    def _regularized(self, rows: int, condition: Tensor | None, generator: Generator | None) -> Evolved:
        """A solve from noise to data under the first conditions of a batch, for its mean penalty alone."""
        noise = BatchNoise(min(rows, self.regularized_items), generator=generator, device=self.device)
        return evolve(
            RowField(self.denoiser.velocity, None if condition is None else condition[: noise.n]),
            self.prior_scale() * noise.normal(*self.model_shape, dtype=self.dtype),
            self._grid(1, self.controller).flip(0),
            solver=self.solver,
            controller=self.controller,
            gradient=None,
            regularizers=self.regularizers,
            progress=self.progress,
            noise=noise,
        )

    # ---- samples and latents -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        seeds: Seeds,
        *,
        condition: Condition | None = None,
        num_steps: int = 50,
        solver: Solver = Heun(),
        controller: Controller = Fixed(),
        grid: TimeGrid = Even(),
        denoise: bool = False,
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        guide: str | None = None,
        guide_scale: float | None = None,
        diffusivity: Diffusivity = OfPath(),
        schedule: Schedule | None = None,
        warm_start: bool = False,
        batch_size: int = 256,
    ) -> Tensor:
        """[n, *shape] items in data units; item i depends on seed i (and condition i) alone.

        Args:
            seeds: n, or n seeds.
            condition: [n, *] one per seed; None draws unconditionally.
            num_steps: of as many evaluations as the solver has stages; without meaning under step control.
            solver: of the ODE, of the SDE, or for denoisers; Brownian paths of items depend on their seeds alone.
            controller: "pi" chooses the steps of each item by its tolerances.
            grid: of the times of the steps.
            denoise: whether the last step goes from t_min to σ = 0 (x̂), where the path has noise at t_min.
            guidance: 1 is off; other values double the cost (0, which ignores the condition, does not).
            interval: noise levels (low, high) of σ/α within which guidance acts.
            guide: the run of a weaker model to guide by in place of no condition (`runs/small`, or with `:weights`).
            guide_scale: of the guide, so that `guidance` away from no condition acts on the model before; null for one.
            diffusivity: e(t) of the SDE.
            schedule: the path to be sampled on, at whose times the grid lies; null for that of training.
            warm_start: whether equilibrium networks start their searches at the states of the evaluation before.
            batch_size: how many are drawn at once.
        Raises:
            ValueError: if the conditions do not fit, there are too few steps for the solver, guidance meets a model
                without conditions, the path cannot stand in for that of training, or `warm_start` meets step control,
                under which rows do not stay together, or no equilibrium network.
            NotApplicable: if the solver adds noise, and items and noise were coupled in training.
        """
        seeds = as_seeds(seeds)
        guided = Guidance(guidance, interval, guide, guide_scale)
        condition = self.conditions.checked(condition, len(seeds), "sample", guidance=guided.away)
        at_least_one("sample", batch_size=batch_size, num_steps=num_steps)
        if warm_start and not isinstance(controller, Fixed):
            raise ValueError("sample: warm_start needs steps that all rows share. Use controller: fixed.")
        sampler = Sampler(self, num_steps, solver, controller, grid, guided, denoise, diffusivity, schedule)
        drawn = []
        for rows in torch.arange(len(seeds)).split(batch_size):  # one empty part if there are no seeds
            noise = SeedNoise(seeds[rows], device=self.device)
            z = sampler.scale * noise.normal(*self.model_shape, dtype=self.dtype)
            path = sampler.path(noise, self.model_shape, self.dtype)
            with warm(self.denoiser) if warm_start else nullcontext():
                x = sampler.solve(z, None if condition is None else condition[rows], True, path)
            drawn.append(self.transform.inverse(x))
        return torch.cat(drawn)

    def encode(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        num_steps: int = 50,
        solver: Solver = Dopri5(),
        controller: Controller = PI(),
        grid: TimeGrid = Even(),
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        guide: str | None = None,
        guide_scale: float | None = None,
    ) -> Tensor:
        """[B, *model_shape] where the ODE takes x at t_max; of law N(0, σ(t_max)²) for items of the model's law.

        Discrete data are placed in the middle of their cells. Gradients flow through the solver's steps.
        """
        self.check_items(x, "encode")
        y, _ = self._to_model_space(x, None)
        guided = Guidance(guidance, interval, guide, guide_scale)
        condition = self.conditions.checked(condition, len(x), "encode", guidance=guided.away)
        return Sampler(self, num_steps, solver, controller, grid, guided).solve(y, condition, False)

    def decode(
        self,
        z: Tensor,
        *,
        condition: Condition | None = None,
        num_steps: int = 50,
        solver: Solver = Dopri5(),
        controller: Controller = PI(),
        grid: TimeGrid = Even(),
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        guide: str | None = None,
        guide_scale: float | None = None,
    ) -> Tensor:
        """[B, *shape] item in data units that the ODE makes of a latent: decode(encode(x)) = x to its tolerance."""
        self.check_items(z, "decode", self.model_shape)
        guided = Guidance(guidance, interval, guide, guide_scale)
        condition = self.conditions.checked(condition, len(z), "decode", guidance=guided.away)
        sampler = Sampler(self, num_steps, solver, controller, grid, guided)
        return self.transform.inverse(sampler.solve(z.to(self.dtype), condition, True))

    def _grid(self, num_steps: int, controller: Controller) -> Tensor:
        """Evenly spaced times from t_min to t_max; step control, which lands on every one, is given the ends alone."""
        at_least_one("diffusion", num_steps=num_steps)
        steps = num_steps if isinstance(controller, Fixed) else 1
        return torch.linspace(self.denoiser.t_min, self.denoiser.t_max, steps + 1, dtype=torch.float64)

    def prior_scale(self) -> float:
        """σ(t_max): the standard deviation of the noise that sampling starts from."""
        return float(self.schedule.scales(torch.tensor(self.denoiser.t_max, dtype=torch.float64))[1])

    def velocity(self, t: Tensor, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *shape] dx/dt of the probability-flow ODE, in model space per unit time."""
        return self.denoiser.velocity(t, x, self.conditions.checked(condition, len(x), "velocity"))

    def score(self, t: Tensor, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *shape] ∇ log p_t(x), in model space; NotApplicable if noise and items were coupled in training."""
        self.check_independent("score")
        return self.denoiser.score(t, x, self.conditions.checked(condition, len(x), "score"))
