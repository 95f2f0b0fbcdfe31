"""Local denoising score matching: score models of diffusions with any drift, ending in any prior."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from ..diffusion.checks import at_least_one, one_each, one_of
from ..model import Model
from ..networks.network import Network
from ..registry import register
from ..rng import BatchNoise, Noise, SeedNoise, as_seeds
from ..score_model import ScoreModel
from ..solvers.base import Controller, Fixed, Solver, integrate
from ..solvers.divergence import by_probe, mean_over_probes, transport
from ..solvers.fields import RowField
from ..solvers.runge_kutta import Dopri5
from ..solvers.step_size import PI
from ..transforms import Transform
from ..types import Batch, Condition, Likelihood, Loss, NotApplicable, Seeds, Shape, expand_like
from .increments import Times, TimesOfClock, check_increment, check_settings, choose_increment
from .local_bound import Bound
from .local_kernels import Order, simulate
from .local_objective import Divergence, Objective, Target, Variance, Weight, chosen_objective, is_exact
from .local_score import LocalScore, flow_velocity
from .mixing import measure, warn_unmixed
from .path_targets import measured_rates
from .prior_sampling import Spacing, reverse_grid, reverse_sample
from .process import Langevin, Process

PREPARED = 1024  # items that the increment and the mixing are measured on


@register(Model, "local_dsm")
class LocalDSM(ScoreModel):
    """The score of a diffusion with any drift, learnt from its Gaussian kernels over short increments.

    At a time u of the process the state y_s at u - δ is simulated from an item, and y_u = m + L z drawn from the local
    kernel N(m, L Lᵀ). The score of the state's law is E[-L⁻ᵀ z | y_u] for any δ, up to the error of the kernel, so that

        whitened    δ |Gᵀ (s(u, y_u) + L⁻ᵀ z)|²/D,      likelihood    ½ |Gᵀ (s(u, y_u) + L⁻ᵀ z)|²/(D q(u)),

    q the law of u, are least at the score of components that noise reaches; the second is the bound's, in nats per
    dimension. Processes whose kernel is exact over any increment start from the item itself (δ = u), and weigh it by
    |Lᵀ s(u, y_u) + z|²/D: ordinary denoising score matching. Where the force acts on components one by one,
    `simulate_path` has a target τ of smaller variance, from the noise of the whole path (objective "path"):

        whitened    s̄² |s(u, y_u) - τ|²/D,      likelihood    ½ |Gᵀ (s(u, y_u) - τ)|²/(D q(u)).

    The model's law is that of the probability-flow ODE dy/du = F - Q s/2, run from the process's prior at u = U to
    u(t_min). So its likelihood is that of items with noise of this size.

    Args:
        network: ε of s = -ε/s̄(u).
        process: the diffusion, whose time is put on 0 (data) to 1 (noise) by its clock.
        objective: "path" or "local"; "global", which insists on exact kernels; "ism", implicit score matching at
            simulated states, ½ sᵀQs + ∇·(Q s), which differentiates the network once more. "auto" is "path" for
            elementwise forces whose kernels are not exact, and "local" for all others and with variates to control.
        order: of the kernels; see `local_kernels`.
        increment: δ in units of u; null for the longest whose linearisation is good to 2 % for 99 % of states.
        simulation_steps: K, steps of the same kernel from an item to y_s; for "path" those of `simulate_path`.
        variance: of "local": "control" subtracts the score at m, a second evaluation, and "antithetic" pairs z with
            -z; both keep the variance of gradients bounded as δ → 0.
        weight: see above; "whitened" weighs |s - ∇log q|² for "local" by δ Q, δ the increment or u if that is less, and
            otherwise as the simple loss of DDPM does.
        times: law of u, see `TimesOfClock`.
        divergence: of the objective "ism"; exact costs a backward pass for each component.
        t_min: first time, > 0.
        residual: s = ∇ log π - e^{-λu} ε/s̄, which begins as the score of the prior instead of 0; see `LocalScore`.
        length: ℓ of `LocalScore`, the scale of the finest detail of the data in model space.
        conditional: whether the network sees the conditions of the data (labels, embeddings), if there are any.
        condition_dropout: share of items whose condition is hidden in training; 0 gives up guidance.
    Raises:
        ConfigError: if a number is out of its range, or the objective does not fit the process.
    Source: Singhal, Goldstein & Ranganath 2024 (Automated denoising score matching for nonlinear diffusions).
    """

    def __init__(
        self,
        network: Callable[..., Network],
        process: Callable[..., Process] = Langevin,
        objective: Target = "auto",
        order: Order = "ito",
        increment: float | None = None,
        simulation_steps: int = 50,
        variance: Variance = "plain",
        weight: Weight = "whitened",
        times: Times = "importance",
        divergence: Divergence = "hutchinson",
        t_min: float = 1e-3,
        residual: bool = False,
        length: float | None = None,
        conditional: bool = True,
        condition_dropout: float = 0.1,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        bin_width: float | None,
    ) -> None:
        facts = {"num_classes": num_classes, "condition_shape": condition_shape, "bin_width": bin_width}
        super().__init__(conditional, condition_dropout, shape=shape, transform=transform, **facts)
        self.process = process(shape=self.model_shape)
        self.process.check_noise()
        sizes = {"in_shape": self.model_shape, "out_shape": self.model_shape, "timed": True}
        built = network(**sizes, **self.conditions.keywords)
        self.score_network = LocalScore(built, self.process, residual, length)
        self.times = TimesOfClock(times, self.process.clock, t_min)
        self.exact = is_exact(self.process)
        self.objective = chosen_objective(objective, self.process, self.exact, variance)
        self.order, self.steps, self.chooses = order, simulation_steps, increment is None
        self.differentiates_twice = self.objective == "ism"
        check_settings(increment, simulation_steps, self.times.last)
        kept = (self.score_network, self.times, simulation_steps, order, self.exact)
        self.training_objective = Objective(*kept, variance, weight, divergence)
        # δ before `prepare` has chosen one; a buffer, so that a checkpoint knows it
        self.register_buffer("increment", torch.tensor(0.02 if increment is None else increment, dtype=torch.float64))
        self.register_buffer("rates", torch.full((2,), 0.5, dtype=torch.float64))  # r and ρ of paths, likewise

    @property
    def network(self) -> Network:
        return self.score_network.network

    # ---- training ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform, choose or check the increment, and measure how near the process comes to its prior.

        Raises:
            ValueError: if the data are empty, or the force is not finite where they go.
        """
        self.transform.fit(batches)
        found, count = [], 0
        for batch in batches:
            noise = BatchNoise(len(batch), generator=generator, device=self.device)
            found.append(self._to_model_space(batch.x.to(self.device), noise)[0])
            count += len(batch)
            if count >= PREPARED:
                break
        if not count:
            raise ValueError("local_dsm: the training data are empty.")
        x = torch.cat(found)[:PREPARED]
        logs = self._prepare_increment(x, generator)
        if self.process.prior is not None:
            mixing = measure(self.process, x, steps=self.steps, order=self.order, generator=generator)
            warn_unmixed(self.process, mixing)
            logs["prior_distance"] = torch.tensor(mixing.distance)
        return logs

    def _prepare_increment(self, x: Tensor, generator: Generator) -> dict[str, Tensor]:
        logs = {}
        if self.objective == "path":
            self.rates.copy_(measured_rates(self.process, x, self.times, self.steps, generator))
            logs = {"relaxation": self.rates[0].clone(), "forgetting": self.rates[1].clone()}
        if self.exact or self.objective not in ("local", "path"):  # a bound by local kernels takes the increment too
            return logs
        noise = BatchNoise(len(x), generator=generator, device=x.device)
        u = self.times.sample(noise).clamp(max=0.5 * self.times.last)
        y = simulate(self.process, x, torch.zeros_like(u), u, self.steps, noise, self.order)
        if self.chooses:
            self.increment.fill_(choose_increment(self.process, u, y))
        wrong = check_increment(self.process, u, y, float(self.increment))
        return {**logs, "increment": self.increment.clone(), "defect": torch.tensor(wrong)}

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        self.check_items(batch.x, "loss")
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        x, _ = self._to_model_space(batch.x, noise)
        u = self.times.sample(noise)
        condition = self.conditions.drop(batch.condition, noise)
        logs = {}
        if self.objective == "ism":
            value = self.training_objective.implicit(x, u, condition, noise)
        elif self.objective == "path":
            value, logs["lost"] = self.training_objective.path(x, u, tuple(self.rates), condition, noise)
        else:
            value = self.training_objective.local(x, u, self.increment, condition, noise)
        value = value.to(x.dtype) / math.prod(self.model_shape)
        return Loss(value, {self.objective: value.detach().mean(), **logs})

    # ---- scores, samples and latents ---------------------------------------------------------------------------------

    def score(self, t: Tensor, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *shape] ∇ log p_t(x), in model space; t from 0 to 1."""
        return self.score_network(self._clock(t), x, self.conditions.checked(condition, len(x), "score"))

    def velocity(self, t: Tensor, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *shape] dx/dt of the probability-flow ODE, in model space per unit of t."""
        return self._field(self.score_network)(t, x, self.conditions.checked(condition, len(x), "velocity"))

    def _clock(self, t: Tensor) -> Tensor:
        return self.process.clock(t).to(self.device)

    def _field(self, score: nn.Module) -> Callable[..., Tensor]:
        def velocity(t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
            u = self._clock(t)
            rate = expand_like(self.process.clock.rate(self.process.clock.inverse(u)), x).to(x.dtype)
            return rate * flow_velocity(self.process, u, x, score(u, x, condition))

        return velocity

    def _guided(self, scale: float) -> nn.Module:
        if scale == 1:
            return self.score_network
        self.conditions.check_guidance(scale)
        return self.score_network.guided(scale, self.conditions.null)

    def _prior(self, where: str) -> Any:
        if self.process.prior is None:
            raise NotApplicable(
                f"{where}: {type(self.process).__name__} has no prior that could be sampled or whose density is known; "
                "its scores and velocities are all that this model gives."
            )
        return self.process.prior

    @torch.no_grad()
    def sample(
        self,
        seeds: Seeds,
        *,
        condition: Condition | None = None,
        num_steps: int = 100,
        solver: Solver | None = None,
        controller: Controller = Fixed(),
        spacing: Spacing = "quadratic",
        guidance: float = 1.0,
        batch_size: int = 256,
    ) -> Tensor:
        """[n, *shape] items in data units from the prior; item i depends on seed i (and condition i) alone.

        Args:
            num_steps: steps from u = U to u(t_min); without meaning under step control.
            solver: null takes the exponential step of the reverse SDE (see `reverse_kernel`), a solver of SDEs such as
                euler_maruyama integrates that SDE, and a solver of ODEs the probability-flow ODE.
            controller: of a solver.
            spacing: of the steps: even in u ("clock"), in t ("time") or in √u ("quadratic").
            guidance: 1 is off; other values double the cost.
        Raises:
            NotApplicable: if the process has no prior.
        Source: Anderson 1982 (Reverse-time diffusion equation models).
        """
        prior, seeds = self._prior("sample"), as_seeds(seeds)
        condition = self.conditions.checked(condition, len(seeds), "sample", guidance=guidance)
        at_least_one("sample", batch_size=batch_size, num_steps=num_steps)
        score = self._guided(guidance)
        drawn = []
        for rows in torch.arange(len(seeds)).split(batch_size):  # one empty part if there are no seeds
            noise = SeedNoise(seeds[rows], device=self.device)
            z = prior.sample(noise, self.model_shape, dtype=self.dtype)
            given = None if condition is None else condition[rows]
            grid = reverse_grid(self.process.clock, self.times.first, self._steps(num_steps, controller), spacing)
            field = RowField(self._field(score), given)
            y = reverse_sample(self.process, score, field, z, grid.to(z.device), given, noise, solver, controller)
            drawn.append(self.transform.inverse(y))
        return torch.cat(drawn)

    @staticmethod
    def _steps(num_steps: int, controller: Controller) -> int:
        """Step control lands on every time of a grid, and is given the ends alone."""
        at_least_one("local_dsm", num_steps=num_steps)
        return num_steps if isinstance(controller, Fixed) else 1

    def encode(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        num_steps: int = 50,
        solver: Solver = Dopri5(),
        controller: Controller = PI(),
        guidance: float = 1.0,
    ) -> Tensor:
        """[B, *model_shape] where the ODE takes x at u = U, a draw of the prior for items of the model's law.

        Discrete data are placed in the middle of their cells. Gradients flow through the solver's steps.
        """
        self.check_items(x, "encode")
        y = self._to_model_space(x, None)[0]
        condition = self.conditions.checked(condition, len(x), "encode", guidance=guidance)
        field, times = RowField(self._field(self._guided(guidance)), condition), self._grid(num_steps, controller)
        return integrate(field, y, times, solver=solver, controller=controller).x

    def decode(
        self,
        z: Tensor,
        *,
        condition: Condition | None = None,
        num_steps: int = 50,
        solver: Solver = Dopri5(),
        controller: Controller = PI(),
        guidance: float = 1.0,
    ) -> Tensor:
        """[B, *shape] item in data units that the ODE makes of a latent: decode(encode(x)) = x to its tolerance."""
        self.check_items(z, "decode", self.model_shape)
        condition = self.conditions.checked(condition, len(z), "decode", guidance=guidance)
        field, times = RowField(self._field(self._guided(guidance)), condition), self._grid(num_steps, controller)
        y = integrate(field, z.to(self.dtype), times.flip(0), solver=solver, controller=controller).x
        return self.transform.inverse(y)

    def _grid(self, num_steps: int, controller: Controller) -> Tensor:
        """Times from t_min to 1."""
        grid = reverse_grid(self.process.clock, self.times.first, self._steps(num_steps, controller), "quadratic")
        return self.process.clock.inverse(grid.flip(0))

    # ---- likelihood --------------------------------------------------------------------------------------------------

    def likelihood(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        seeds: Seeds | None = None,
        method: Literal["ode", "local", "path", "implicit"] = "ode",
        divergence: Divergence = "exact",
        probes: int = 1,
        draws: int = 1,
        num_steps: int = 50,
        solver: Solver = Dopri5(),
        controller: Controller = PI(),
        batch_size: int = 256,
    ) -> Likelihood:
        """log p(x) in nats: by the probability-flow ODE, or a bound of the reverse SDE's.

        ode: log π(y_U) + ∫ ∇·(F - Q s/2) du + log|det ∂T/∂x| along the ODE from T(x), placed at t_min. local, path,
        implicit: the bounds of `Bound`, unbiased estimates for simulated paths, which also hold for x itself.

        Args:
            seeds: [B] for dequantisation noise, probes and paths; 0 … B-1 if not given.
            method: local needs first derivatives of the force alone, path an elementwise force, implicit the
                divergence of the network.
                Both bounds are off by the error of `simulation_steps` long steps, local more than path.
            divergence, probes: of the methods ode and implicit.
            draws: how many values of all that is random are averaged over; of a bound, two or more give a standard
                error.
            num_steps: of the controller "fixed"; without meaning under step control.
            solver, controller: of the ODE.
        Returns:
            kind numerical for the exact divergence, stochastic for hutchinson, bound for the bounds.
        Raises:
            NotApplicable: if the process has no prior, or the transform to model space no volume.
            ValueError: if conditions, seeds or counts do not fit.
        Source: Song et al. 2021 (Score-based generative modeling through SDEs), section 4.3.
        """
        self.check_items(x, "likelihood")
        self._prior("likelihood")
        self._check_volume()
        condition = self.conditions.checked(condition, len(x), "likelihood")
        at_least_one("likelihood", draws=draws, probes=probes, batch_size=batch_size)
        one_of("likelihood", "method", method, ("ode", "local", "path", "implicit"))
        seeds = one_each(seeds, len(x))
        ode = {"solver": solver, "controller": controller, "divergence": divergence, "probes": probes}
        kept = (self.score_network, self.times, self.steps, self.order, self.exact, tuple(self.rates))
        bound = Bound(self.process, *kept)
        drawn = None if divergence == "exact" else probes
        with self._gradients(x):
            parts = []
            for rows in torch.arange(len(x)).split(batch_size):
                given = None if condition is None else condition[rows]
                noise = [SeedNoise(seeds[rows], purpose=p, device=x.device) for p in ("dequantise", "probe")]
                scored = []
                for k in range(draws):
                    y, volume = self._to_model_space(x[rows], None if self.bin_width is None else noise[0])
                    if method == "ode":
                        value = self._by_flow(y, given, noise[1], self._grid(num_steps, controller), ode)
                    else:
                        value = bound(y, self.increment, given, noise[1], method, (k, draws), drawn)[None]
                    scored.append(value + volume)
                parts.append(torch.stack(scored))
        found = torch.cat(parts, 2)
        if method == "ode":
            return mean_over_probes(found, divergence)
        stderr = (found[:, 0].var(0) / draws).sqrt() if draws > 1 else None
        return Likelihood(found[:, 0].mean(0), "bound", stderr)

    def _by_flow(self, y: Tensor, condition: Tensor | None, noise: Noise, times: Tensor, ode: dict[str, Any]) -> Tensor:
        """[P, B] log-density of y in model space at t_min, one value for each probe."""
        moved = transport(RowField(self._field(self.score_network), condition), y, times, noise=noise, **ode)
        return by_probe(self.process.prior.log_prob(moved.z) + moved.log_det, len(y))
