"""Diffusion of items together with auxiliary variables: critically damped Langevin dynamics and all its relatives."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor

from ..diffusion.checks import at_least_one, one_each, one_of
from ..diffusion.model_space import root_mean_square
from ..model import Model
from ..networks.network import Network
from ..registry import ConfigError, register
from ..rng import BatchNoise, Noise, SeedNoise, as_seeds
from ..score_model import ScoreModel
from ..solvers.base import Controller, Fixed, Solver, integrate
from ..solvers.divergence import by_probe, mean_over_probes, transport
from ..solvers.fields import RowField
from ..solvers.runge_kutta import Dopri5, Heun
from ..solvers.step_size import PI
from ..transforms import Transform
from ..types import Batch, Condition, Likelihood, Loss, Seeds, Shape, sum_items
from .joint_sampling import Rule, reverse
from .joint_score import JointScore, Parametrization, apply
from .linear import CriticallyDamped, LinearDiffusion

LAW_CELLS = 1024  # of the tabulated law of importance-sampled times
HALF_STEP = 2.0**-25  # uniform draws are multiples of 2^-24: their midpoints never reach 0 or 1


@register(Model, "multivariate_diffusion")
class MultivariateDiffusion(ScoreModel):
    """A score of u = (T(x), v_1 … v_k) under a linear diffusion, and the equations back from noise that it defines.

    loss = |n̂(t, u_t) - n|²/(r D) with u_t = mean x + L ε, L Lᵀ the covariance given the item, and n = -C⁻¹ Gᵀ L⁻ᵀ ε of
    unit variance: denoising score matching in the r noised variables (see `JointScore`). Only x is data; the auxiliary
    variables begin as N(0, spread), are integrated out in training ("hybrid") and dropped from samples.

    Args:
        network: the network to train, for items with the variables along their first axis.
        diffusion: of the variables.
        prediction: "mixed" adds the score of Gaussian data to the network's, "noise" leaves all of it to the network.
        kernel: "hybrid" conditions on x alone, "full" on the auxiliary variables at t = 0 too: the same minimiser with
            a target of larger variance.
        weighting: "whitened" weighs |n̂ - n|² alike at all times, "likelihood" by ½ β C Cᵀ, which bounds likelihoods.
        times: "uniform", "quadratic", squares of even times, as sampling takes them, or "importance", the law
            ∝ β tr(C Cᵀ) under which the weight "likelihood" varies least.
        t_min: first time, where the ODE ends; given the item u has no density at 0.
        conditional: whether the network sees the conditions of the data (labels, embeddings), if there are any.
        condition_dropout: share of items whose condition is hidden in training, item by item; 0 gives up guidance and
            unconditional answers.
        sigma_data: root mean square of T(x); null to measure it.
    Raises:
        ConfigError: if t_min or sigma_data is out of its range, or noise at t_min is below what float64 resolves.
    Source: Singhal et al. 2023 (Where to diffuse, how to diffuse, and how to get back); Dockhorn et al. 2022
        (Critically-damped Langevin diffusion), section 3.
    """

    def __init__(
        self,
        network: Callable[..., Network],
        diffusion: LinearDiffusion = CriticallyDamped(),
        prediction: Parametrization = "mixed",
        kernel: Literal["hybrid", "full"] = "hybrid",
        weighting: Literal["whitened", "likelihood"] = "whitened",
        times: Literal["quadratic", "uniform", "importance"] = "quadratic",
        t_min: float = 1e-3,
        conditional: bool = True,
        condition_dropout: float = 0.1,
        sigma_data: float | None = None,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        bin_width: float | None,
    ) -> None:
        facts = {"num_classes": num_classes, "condition_shape": condition_shape, "bin_width": bin_width}
        super().__init__(conditional, condition_dropout, shape=shape, transform=transform, **facts)
        _check_settings(diffusion, t_min, sigma_data)
        self.kernel, self.weighting, self.times, self.t_min = kernel, weighting, times, t_min
        self.measures, self.diffusion = sigma_data is None, diffusion
        self.joint_shape = (diffusion.size, *self.model_shape)
        channels, *rest = self.model_shape
        sizes = {"in_shape": (diffusion.size * channels, *rest), "out_shape": (diffusion.noises * channels, *rest)}
        built = network(**sizes, timed=True, **self.conditions.keywords)
        self.joint = JointScore(built, diffusion, prediction, 1.0 if sigma_data is None else sigma_data)
        edges, mass = self._time_law()
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("mass", mass, persistent=False)

    @property
    def network(self) -> Network:
        return self.joint.network

    def _time_law(self) -> tuple[Tensor, Tensor]:
        """[K + 1] edges of cells of times, finer near t_min, and [K] their probabilities, ∝ ∫ β tr(C Cᵀ) dt."""
        edges = torch.logspace(math.log10(self.t_min), 0, LAW_CELLS + 1, dtype=torch.float64)
        middle = (edges[1:] + edges[:-1]) / 2
        scale = self.joint.coefficients(middle).scale
        mass = self.diffusion.clock.rate(middle) * scale.square().sum((-2, -1)) * edges.diff()
        return edges, mass / mass.sum()

    # ---- training ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform, then measure the root mean square of the data in model space if it was not given."""
        self.transform.fit(batches)
        if self.measures:
            self.joint.sigma_data.fill_(root_mean_square(self, self._to_model_space, batches, generator))
        return {"sigma_data": self.joint.sigma_data.clone()}

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        self.check_items(batch.x, "loss")
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        x, _ = self._to_model_space(batch.x, noise)
        condition = self.conditions.drop(batch.condition, noise)
        t, density = self._draw_times(noise)
        c = self.joint.coefficients(t)
        u, wanted = self._noised(x, t, c, noise)
        error = self.joint.answer(t, u, condition, c) - wanted
        squared = error.square().flatten(1).mean(1)
        value = squared
        if self.weighting == "likelihood":
            nats = 0.5 * apply(c.scale, error).square().flatten(1).sum(1) / math.prod(self.model_shape)
            value = (self.diffusion.clock.rate(t) / density).to(error.dtype) * nats
        return Loss(value, {"squared_error": squared.detach().mean()})

    def _draw_times(self, noise: Noise) -> tuple[Tensor, Tensor]:
        """[B] times and their density, float64."""
        u, span = noise.uniform(dtype=torch.float64) + HALF_STEP, 1 - self.t_min
        if self.times == "uniform":
            return self.t_min + span * u, torch.full_like(u, 1 / span)
        if self.times == "quadratic":
            return self.t_min + span * u.square(), 1 / (2 * span * u)
        ends = self.mass.cumsum(0)
        cell = torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1)
        mass, low = self.mass[cell], self.edges[cell]
        width = self.edges[cell + 1] - low
        inside = ((u - ends[cell] + mass) / mass).clamp(0, 1)
        return low + width * inside, mass / width

    def _noised(self, x: Tensor, t: Tensor, c: Any, noise: Noise) -> tuple[Tensor, Tensor]:
        """[B, n, *shape] u_t and [B, r, *shape] n for items x [B, *shape]."""
        d, eps = self.diffusion, noise.normal(*self.joint_shape, dtype=x.dtype)
        start = x[:, None]
        mean, covariance = c.mean, c.covariance
        if self.kernel == "full" and d.size > 1:
            v = d.spread**0.5 * noise.normal(d.size - 1, *self.model_shape, dtype=x.dtype)
            start, (mean, covariance) = torch.cat((start, v), 1), d.transition(torch.zeros_like(t), t)
        root = torch.linalg.cholesky(covariance)
        towards = torch.linalg.solve_triangular(root, d.factor.to(root).expand(len(x), -1, -1), upper=False).mT
        whiten = -torch.linalg.solve_triangular(c.scale, towards, upper=False)
        return apply(mean, start) + apply(root, eps), apply(whiten, eps)

    # ---- samples and latents -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        seeds: Seeds,
        *,
        condition: Condition | None = None,
        method: Literal["ode"] | Rule = "ode",
        num_steps: int = 50,
        solver: Solver = Heun(),
        controller: Controller = Fixed(),
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """[n, *shape] items in data units; item i depends on seed i (and condition i) alone.

        Args:
            seeds: n, or n seeds.
            condition: [n, *] one per seed; None draws unconditionally.
            method: the ODE, or the reverse-time SDE by Euler and Maruyama's method or by splitting.
            num_steps: from t = 1 to t_min, shorter towards t_min as the squares of even steps.
            solver, controller: of the ODE; "pi" chooses the steps of each item by its tolerances.
            guidance: 1 is off; other values double the cost (0, which ignores the condition, does not).
            interval: noise levels (low, high) of σ/α of the item within which guidance acts.
            batch_size: how many are drawn at once.
        Raises:
            ValueError: if the conditions do not fit, guidance meets a model without conditions, or "splitting" meets a
                diffusion that does not come to rest.
        """
        seeds, joint = as_seeds(seeds), self._guided(guidance, interval)
        condition = self.conditions.checked(condition, len(seeds), "sample", guidance=guidance)
        at_least_one("sample", batch_size=batch_size, num_steps=num_steps)
        one_of("sample", "method", method, ("ode", *get_args(Rule)))
        root, drawn = torch.linalg.cholesky(self.prior_covariance()), []
        for rows in torch.arange(len(seeds)).split(batch_size):  # one empty part if there are no seeds
            noise, given = SeedNoise(seeds[rows], device=self.device), None if condition is None else condition[rows]
            u = apply(root, noise.normal(*self.joint_shape, dtype=self.dtype))
            if method == "ode":
                u = self._solve(joint, u, given, True, num_steps, solver, controller)
            else:
                u = reverse(joint, u, self._grid(num_steps, Fixed()).flip(0), method, noise, given)
            drawn.append(self.transform.inverse(u[:, 0]))
        return torch.cat(drawn)

    def encode(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        num_steps: int = 50,
        solver: Solver = Dopri5(),
        controller: Controller = PI(),
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """[B, n, *model_shape] where the ODE takes x, with auxiliary variables 0, at t = 1.

        Discrete data are placed in the middle of their cells.
        """
        self.check_items(x, "encode")
        y = self._to_model_space(x, None)[0][:, None]
        u = torch.cat((y, y.new_zeros(len(y), self.diffusion.size - 1, *self.model_shape)), 1)
        given = self.conditions.checked(condition, len(x), "encode", guidance=guidance)
        joint = self._guided(guidance, interval)
        return self._solve(joint, u, given, False, num_steps, solver, controller)

    def decode(
        self,
        z: Tensor,
        *,
        condition: Condition | None = None,
        num_steps: int = 50,
        solver: Solver = Dopri5(),
        controller: Controller = PI(),
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """[B, *shape] item in data units that the ODE makes of a latent: decode(encode(x)) = x to its tolerance."""
        self.check_items(z, "decode", self.joint_shape)
        given = self.conditions.checked(condition, len(z), "decode", guidance=guidance)
        joint = self._guided(guidance, interval)
        u = self._solve(joint, z.to(self.dtype), given, True, num_steps, solver, controller)
        return self.transform.inverse(u[:, 0])

    def _guided(self, scale: float, interval: tuple[float, float] | None) -> JointScore:
        if scale == 1 and interval is not None:
            raise ValueError("interval was given, and guidance = 1 is off. Give guidance another value.")
        if scale == 1:
            return self.joint
        self.conditions.check_guidance(scale)
        return self.joint.guided(scale, self.conditions.null, interval)

    def _solve(
        self,
        joint: JointScore,
        u: Tensor,
        condition: Tensor | None,
        to_data: bool,
        num_steps: int,
        solver: Solver,
        controller: Controller,
    ) -> Tensor:
        times = self._grid(num_steps, controller)
        times = times.flip(0) if to_data else times
        first, last = torch.linalg.inv(joint.frame(times[0])), joint.frame(times[-1])
        field = RowField(joint.turned_velocity, condition)
        return apply(last, integrate(field, apply(first, u), times.log(), solver=solver, controller=controller).x)

    def _grid(self, num_steps: int, controller: Controller) -> Tensor:
        """Times from t_min to 1, as the squares of even steps; step control is given the ends alone."""
        at_least_one("multivariate_diffusion", num_steps=num_steps)
        steps = num_steps if isinstance(controller, Fixed) else 1
        even = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=self.device)
        return self.t_min + (1 - self.t_min) * even.square()

    def prior_covariance(self) -> Tensor:
        """[n, n] Σ: sampling starts from N(0, Σ), the law at t = 1 of Gaussian data; near the law at rest, if any."""
        one = torch.ones((), dtype=torch.float64, device=self.device)
        return self.diffusion.marginal(one, self.joint.sigma_data**2)

    def velocity(self, t: Tensor, u: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, n, *shape] du/dt of the probability-flow ODE of item and auxiliary variables, per unit time."""
        return self.joint.velocity(t, u, self.conditions.checked(condition, len(u), "velocity"))

    # ---- likelihood --------------------------------------------------------------------------------------------------

    def likelihood(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        seeds: Seeds | None = None,
        divergence: Literal["exact", "hutchinson"] = "exact",
        probes: int = 1,
        draws: int = 1,
        num_steps: int = 50,
        solver: Solver = Dopri5(),
        controller: Controller = PI(),
        batch_size: int = 256,
    ) -> Likelihood:
        """log p(x) ≥ E_v [log p(T(x), v) - log q(v | x)] + log|det ∂T/∂x| in nats, p by the ODE from t_min to 1.

        q is the law of the auxiliary variables at t_min given x if the data were Gaussian, and nearly theirs for any
        data, as t_min is small: the gap is the divergence of q from the model's own law of v given x. For discrete data
        the noise of dequantisation is averaged over too.

        Args:
            x: [B, *shape] in data units.
            condition: [B, *]; None scores unconditionally.
            seeds: [B] for auxiliary variables, dequantisation and probes; 0 … B-1 if not given.
            divergence: exact costs a backward pass for each component and variable, hutchinson one for each probe.
            probes: how many, for hutchinson.
            draws: of v and the noise of dequantisation, averaged over; two or more give a standard error.
            num_steps: of the controller "fixed".
            solver, controller: of the ODE.
            batch_size: how many are scored at once.
        Returns:
            kind bound; without auxiliary variables numerical or stochastic.
        Raises:
            NotApplicable: if the transform to model space has no volume.
            ValueError: if conditions, seeds or counts do not fit.
        Source: Dockhorn et al. 2022 (Critically-damped Langevin diffusion), for q without x.
        """
        self.check_items(x, "likelihood")
        self._check_volume()
        condition = self.conditions.checked(condition, len(x), "likelihood")
        at_least_one("likelihood", draws=draws, probes=probes, batch_size=batch_size)
        seeds, times = one_each(seeds, len(x)), self._grid(num_steps, controller)
        ode = {"solver": solver, "controller": controller, "divergence": divergence, "probes": probes}
        with self._gradients(x):
            parts = [
                self._draws(x[rows], None if condition is None else condition[rows], seeds[rows], draws, times, ode)
                for rows in torch.arange(len(x)).split(batch_size)
            ]
        values = torch.cat(parts, 2)
        if self.diffusion.size == 1:
            return mean_over_probes(values, divergence)
        each = values.mean(1) if draws > 1 else values[0]
        stderr = each.std(0) / math.sqrt(len(each)) if len(each) > 1 else None
        return Likelihood(values.mean((0, 1)), "bound", stderr)

    def _draws(
        self, x: Tensor, condition: Tensor | None, seeds: Tensor, count: int, times: Tensor, ode: dict[str, Any]
    ) -> Tensor:
        """[count, P, B] values for as many draws of auxiliary variables and the dequantisation noise."""
        noise = [SeedNoise(seeds, purpose=p, device=x.device) for p in ("dequantise", "auxiliary", "probe")]
        return torch.stack([self._log_prob(x, condition, *noise, times, ode) for _ in range(count)])

    def _log_prob(
        self, x: Tensor, condition: Tensor | None, cell: Noise, auxiliary: Noise, probe: Noise, times: Tensor, ode: dict
    ) -> Tensor:
        """[P, B] one value for each probe; P = 1 for the exact divergence."""
        y, log_volume = self._to_model_space(x, None if self.bin_width is None else cell)
        u, log_q = self._beside(y, auxiliary)
        start = apply(torch.linalg.inv(self.joint.frame(times[0])), u)
        moved = transport(RowField(self.joint.turned_velocity, condition), start, times.log(), noise=probe, **ode)
        end = apply(self.joint.frame(times[-1]), moved.z.double()).flatten(2)
        log_prior = normal_log_prob(end, torch.linalg.cholesky(self.prior_covariance()))
        return by_probe(log_prior - log_q + log_volume + moved.log_det, len(x))

    def _beside(self, y: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """[B, n, *shape] items with auxiliary variables of their law given x at t_min if data were Gaussian, and its
        log-density [B] float64."""
        first = torch.tensor(self.t_min, dtype=torch.float64, device=y.device)
        joint = self.diffusion.marginal(first, self.joint.sigma_data**2)
        slope = joint[1:, :1] / joint[0, 0]
        root = torch.linalg.cholesky(joint[1:, 1:] - slope @ joint[:1, 1:])
        z = noise.normal(len(root), *self.model_shape, dtype=self.dtype)
        apart = apply(root, z)
        v = slope.to(y.dtype).reshape(-1, *(1,) * (y.ndim - 1)) * y[:, None] + apart
        return torch.cat((y[:, None], v), 1), normal_log_prob(apart.double().flatten(2), root)


def normal_log_prob(u: Tensor, root: Tensor) -> Tensor:
    """[B] float64 Σ log N(u; 0, L Lᵀ) over the columns of u [B, n, D], for L [n, n]."""
    whitened = torch.linalg.solve_triangular(root.to(u), u, upper=False)
    normalizer = root.diagonal().log().sum() + 0.5 * len(root) * math.log(2 * math.pi)
    return -0.5 * sum_items(whitened.square()) - u.shape[2] * normalizer.double()


def _check_settings(diffusion: LinearDiffusion, t_min: float, sigma_data: float | None) -> None:
    if not 0 < t_min < 0.1:
        raise ConfigError(f"model.t_min: 0 < t_min < 0.1 is needed, found {t_min}.")
    if sigma_data is not None and not sigma_data > 0:
        raise ConfigError(f"model.sigma_data: a number > 0, or null to measure it, is needed, found {sigma_data}.")
    covariance = diffusion.marginal(torch.tensor(t_min, dtype=torch.float64), 0.0)
    if int(torch.linalg.cholesky_ex(covariance).info) or not bool(covariance.isfinite().all()):
        raise ConfigError(
            f"model.t_min: at {t_min:g} the noise of {diffusion.registered_name} is below what float64 resolves: its "
            "covariance given the item is singular. Raise t_min, the total of the clock or the coupling."
        )
