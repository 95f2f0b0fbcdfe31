"""Latent SDE: series as noisy views of a diffusion, inferred by a controlled one whose cost is the KL divergence."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..model import Model
from ..networks.mlp import MLP
from ..networks.network import Network
from ..registry import ConfigError, register
from ..rng import BatchNoise, Noise, SeedNoise, as_seeds
from ..solvers.base import Backprop, Controller, Fixed, Gradient, Solver
from ..solvers.brownian import path_seeds
from ..solvers.stochastic import Milstein, RowSDE
from ..types import Batch, Likelihood, Loss, Seeds, Shape
from .irregular import Series, Targets
from .recurrent import GRU, Precision, SeriesEncoder, check_positive
from .regularization import Evolved, Regularizer
from .sde import StochasticModel, called, check_solver, distinct, paths_of
from .series_generator import SeriesGenerator

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Elementwise(nn.Module):
    """g_i(z_i) = low + (high - low) sigmoid(Σ_k v_ik tanh(w_ik z_i + b_ik) + c_i): truly diagonal, and bounded."""

    def __init__(self, size: int, hidden: int, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.weight, self.bias = (nn.Parameter(torch.randn(size, hidden)) for _ in range(2))
        self.out = nn.Parameter(torch.randn(size, hidden) * hidden**-0.5)
        self.shift = nn.Parameter(torch.zeros(size))

    def forward(self, z: Tensor) -> Tensor:
        features = torch.tanh(torch.addcmul(self.bias, z[..., None], self.weight))
        return self.low + (self.high - self.low) * torch.sigmoid((features * self.out).sum(-1) + self.shift)


def controlled(
    drift: Callable[..., Tensor], diffusion: Callable[..., Tensor], control: Callable[..., Tensor], *arguments: Tensor
) -> RowSDE:
    """dz = (h + g u) dt + g dW beside the prior dz = h dt + g dW, with the state [z, ∫ ½ |u|² dt] of shape [B, D + 1].

    The last component is the KL divergence of the controlled path from the prior, in expectation (Girsanov): with a
    posterior drift f, u = (f - h)/g.

    Args:
        drift: h(t, z).
        diffusion: g(t, z), component by component.
        control: u(t, z, *arguments), whose arguments have a row for every item.
    """

    def f(t: Tensor, y: Tensor, *arguments: Tensor) -> Tensor:
        z = y[:, :-1]
        u = control(t, z, *arguments)
        return torch.cat((drift(t, z) + diffusion(t, z) * u, 0.5 * u.square().sum(1, keepdim=True)), 1)

    def g(t: Tensor, y: Tensor, *arguments: Tensor) -> Tensor:
        return torch.cat((diffusion(t, y[:, :-1]), torch.zeros_like(y[:, -1:])), 1)

    return RowSDE(f, g, *arguments)


class Drawn(NamedTuple):
    """Paths from the posterior.

    Args:
        values: [N, M, C] decoded at the times asked for.
        kl: [N] KL divergence of the initial state, and along the path.
        evolved: the solve.
    """

    values: Tensor
    kl: Tensor
    evolved: Evolved


@register(Model, "latent_sde")
class LatentSDE(SeriesGenerator, StochasticModel):
    """z₀ ~ N(m, s²), dz = h(z) dt + g(z) dW, x(t) ~ N(d(z(t)), σ²), inferred by dz = (h + g u) dt + g dW.

    An encoder reads the observations backwards in time. What it made of those from t on tells the control u(z, c(t)),
    and the whole q(z₀); after the last observation u = 0, so that forecasts follow the prior. With one path for each
    item, loss = (β (KL(q(z₀) | p(z₀)) + ∫ ½ |u|² dt) - log p(y | path)) / D + regularizers, D being the number of
    values asked for of an item; at β = 1 the first part bounds -log p(y) D⁻¹ from above. What is asked for is the
    target at target_times, or the series itself where the data have no target.

    β rises linearly from 0 to 1 over the share `kl_warmup` of training. g_i is a network of z_i alone, between two
    bounds, so that noise is diagonal and u stays finite. The steps end at every time that is observed or asked for.

    Args:
        drift: h, a network from [latent] to [latent].
        control: u, a network from [latent + features of the encoder] to [latent].
        encoder: of the observations.
        latent: size of z.
        hidden: width of the networks g_i.
        bounds: of g, per unit of the square root of the model's time.
        decoder: d, from [latent] to [C]; null for a linear layer.
        sigma: standard deviation σ of the observation noise, in data units.
        learn_sigma: whether σ is learned, for each channel, from there.
        kl_warmup: share of training.
        solver, controller, gradient: of the equations, in the sense of Itô; `fixed` divides every interval between two
            times into its steps.
        regularizers: of the solve, in training.
        tolerance: length of the last level of the Brownian tree, as a share of the time.
        time_scale: time units of the data per unit of the model's clock; null to measure.
        precision: of all arithmetic.
    Raises:
        ConfigError: if the targets are classes, or a number is out of its range.
    Source: Li et al. 2020 (Scalable gradients for stochastic differential equations), section 5; there f is a network
        and the path's divergence ∫ ½ |(f - h)/g|² dt.
    """

    def __init__(
        self,
        drift: Callable[..., Network] = MLP,
        control: Callable[..., Network] = MLP,
        encoder: Callable[..., SeriesEncoder] = GRU,
        latent: int = 4,
        hidden: int = 16,
        bounds: tuple[float, float] = (0.02, 1.0),
        decoder: Callable[..., Network] | None = None,
        sigma: float = 0.1,
        learn_sigma: bool = False,
        kl_warmup: float = 0.2,
        solver: Solver = Milstein(),
        controller: Controller = Fixed(),
        gradient: Gradient = Backprop(),
        regularizers: tuple[Regularizer, ...] = (),
        tolerance: float = 2**-14,
        time_scale: float | None = None,
        precision: Precision = "float32",
        *,
        shape: Shape,
        target_shape: Shape | None,
    ) -> None:
        super().__init__("latent_sde", time_scale, precision, shape, target_shape)
        check_positive("latent_sde", latent=latent, hidden=hidden, sigma=sigma)
        low, high = bounds
        if self.classes is not None or not 0 < low < high or not 0 <= kl_warmup <= 1:
            raise ConfigError(
                "latent_sde: targets that are values, bounds 0 < low < high and 0 <= kl_warmup <= 1 are needed, found "
                f"{'classes' if self.classes else 'values'}, {list(bounds)} and {kl_warmup}."
            )
        self.latent, self.kl_warmup, self.tolerance = latent, kl_warmup, tolerance
        self.solver, self.controller, self.gradient = solver, controller, gradient
        self.regularizers = tuple(regularizers)
        self.encoder = encoder(channels=shape[-1])
        plain = {"timed": False, "num_classes": None, "condition_shape": None}
        self.drift = drift(in_shape=(latent,), out_shape=(latent,), **plain)
        self.control = control(in_shape=(latent + self.encoder.features,), out_shape=(latent,), **plain)
        self.diffusion = Elementwise(latent, hidden, low, high)
        self.head = nn.Linear(self.encoder.features, 2 * latent)
        self.prior_mean, self.prior_log_std = (nn.Parameter(torch.zeros(latent)) for _ in range(2))
        sizes = {"in_shape": (latent,), "out_shape": (self.channels_out,), **plain}
        self.decoder = nn.Linear(latent, self.channels_out) if decoder is None else decoder(**sizes)
        log_sigma = torch.full((self.channels_out,), math.log(sigma))
        self.log_sigma = nn.Parameter(log_sigma, requires_grad=learn_sigma)
        check_solver(solver, self.prior())
        if self.dtype == torch.float64:
            self.double()

    # ---- the parts ---------------------------------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """Weight of the KL divergences at the present progress of training."""
        return min(1.0, self.progress / self.kl_warmup) if self.kl_warmup else 1.0

    def h(self, t: Tensor, z: Tensor) -> Tensor:
        """[B, latent] drift of the prior."""
        return self.drift(None, z)

    def g(self, t: Tensor, z: Tensor) -> Tensor:
        """[B, latent] diffusion of prior and posterior."""
        return self.diffusion(z)

    def u(self, t: Tensor, z: Tensor, states: Tensor, times: Tensor, length: Tensor) -> Tensor:
        """[B, latent] control at time t, from the state of the encoder after the observations later than t.

        Args:
            states: [B, L + 1, F] of the encoder after its first 0 … L observations, read backwards.
            times: [B, L] of the observations, forwards.
            length: [B] number of observations.
        """
        places = torch.searchsorted(times, t.expand(len(z))[:, None].contiguous(), right=True)[:, 0]
        left = (length - places).clamp(min=0)
        context = states[torch.arange(len(z), device=z.device), left]
        return torch.where(left[:, None] > 0, self.control(None, torch.cat((z, context), 1)), 0.0)

    def prior(self) -> RowSDE:
        return RowSDE(self.h, self.g)

    def wanted(self, batch: Batch, where: str) -> Targets:
        """What the decoder is asked for: the target, or the observations where there is none."""
        if batch.target_times is not None:
            return self.targets(batch, where, known=True)
        mask = torch.ones_like(batch.x, dtype=torch.bool) if batch.mask is None else batch.mask
        return self.targets(batch.replace(target=batch.x, target_times=batch.times, target_mask=mask), where)

    def _draw(
        self,
        series: Series,
        times: Tensor,
        draws: int,
        eps: Tensor,
        solve: Callable[[RowSDE, Tensor, Tensor], Evolved],
        evaluation: bool,
    ) -> Drawn:
        """Paths [B * draws] from the posterior, at times [B, M], from eps [B * draws, latent] normal."""
        reading = self.encoder.read(series.backwards(), self.encoder.settings(evaluation))
        whole = reading.states[torch.arange(len(eps) // draws, device=eps.device), series.length]
        mean, log_std = self.head(whole).repeat_interleave(draws, 0).chunk(2, 1)
        z = mean + log_std.exp() * eps
        kl = _normal_kl(mean, log_std, self.prior_mean, self.prior_log_std)
        start = torch.minimum(series.times[:, :1], times[:, :1]).clamp(max=0.0)
        grid, order = torch.cat((start, series.times, times), 1).sort(dim=1, stable=True)
        asked = order.argsort(1)[:, 1 + series.times.shape[1] :]
        grid = grid.repeat_interleave(draws, 0)
        context = [v.repeat_interleave(draws, 0) for v in (reading.states, series.times, series.length)]
        knots, places = distinct(grid)
        posterior = controlled(self.h, self.g, self.u, *context)
        evolved = solve(posterior, torch.cat((z, torch.zeros_like(z[:, :1])), 1), knots)
        path = evolved.solution.path.transpose(0, 1)  # [N, K, latent + 1]
        there = places[asked].repeat_interleave(draws, 0)
        states = path[torch.arange(len(path), device=path.device)[:, None], there, :-1]
        penalty = evolved.penalty + reading.penalty.repeat_interleave(draws, 0)
        logs = {**reading.logs, **evolved.logs}
        evolved = evolved._replace(penalty=penalty, logs=logs)
        return Drawn(self._decode(states), kl + evolved.solution.x[:, -1].double(), evolved)

    def _decode(self, z: Tensor) -> Tensor:
        """[N, M, C] from states [N, M, latent]."""
        return called(self.decoder, None, z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def _log_likelihood(self, values: Tensor, wanted: Targets) -> Tensor:
        """[B, K] float64 Σ log N(y; values, σ²) over what counts, values [B * K, M, C]."""
        values = values.unflatten(0, (len(wanted.times), -1))
        error = (wanted.values[:, None] - values) * (-self.log_sigma).exp()
        terms = torch.where(wanted.mask[:, None], -0.5 * error.square() - self.log_sigma - HALF_LOG_TWO_PI, 0.0)
        return terms.flatten(2).sum(2, dtype=torch.float64)

    # ---- training ----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        series, wanted = self.series(batch, "loss"), self.wanted(batch, "loss")
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        eps = noise.normal(self.latent, dtype=self.dtype)
        solve: Callable[..., Evolved] = lambda sde, y, times: self.train_solve(  # noqa: E731
            sde, y, times, noise, save="all", seminorm=_states
        )
        drawn = self._draw(series, wanted.times, 1, eps, solve, evaluation=False)
        log_p = self._log_likelihood(drawn.values, wanted)[:, 0]
        value = (self.beta * drawn.kl - log_p) / wanted.mask[:1].numel() + drawn.evolved.penalty
        logs = {
            **drawn.evolved.logs,
            "beta": torch.tensor(self.beta),
            "kl": drawn.kl.detach().mean(),
            "log_likelihood": log_p.detach().mean(),
            "squared_error": (drawn.values - wanted.values).square()[wanted.mask].detach().mean(),
        }
        return Loss(value, logs)

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _posterior(
        self,
        batch: Batch,
        times: Tensor,
        seeds: Seeds | None,
        draws: int,
        solver: Solver | None,
        controller: Controller | None,
        where: str,
    ) -> Drawn:
        """Paths [B * draws] that depend, item by item, on its seed."""
        keys = paths_of(seeds, len(batch), draws, where)
        seeds = as_seeds(len(batch) if seeds is None else seeds)
        eps = SeedNoise(seeds, purpose="posterior", device=batch.x.device).normal(draws, self.latent, dtype=self.dtype)
        solve: Callable[..., Evolved] = lambda sde, y, knots: self.solve(  # noqa: E731
            sde, y, knots, keys, solver, controller, save="all", seminorm=_states
        )
        return self._draw(self.series(batch, where), times, draws, eps.flatten(0, 1), solve, evaluation=True)

    def predict(
        self,
        batch: Batch,
        *,
        seeds: Seeds | None = None,
        draws: int = 8,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Tensor:
        """[B, M, C, 2] law of x at target_times, mean and log standard deviation, of a mixture over posterior paths.

        Args:
            seeds: [B], one for each item; 0 … B-1 if not given.
            draws: paths for each item.
            solver, controller: of the equation, if not those of training (whose steps are then each row's own).
        """
        times = self.targets(batch.replace(target=None), "predict").times
        drawn = self._posterior(batch, times, seeds, draws, solver, controller, "predict")
        values = drawn.values.unflatten(0, (len(batch), draws))
        spread = values.var(1, correction=0) + (2 * self.log_sigma).exp()
        return torch.stack((values.mean(1), 0.5 * spread.log()), 3)

    def bound(
        self,
        batch: Batch,
        *,
        seeds: Seeds | None = None,
        draws: int = 1,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Likelihood:
        """log p(y | path) - KL(q(z₀) | p(z₀)) - ∫ ½ |u|² dt in nats, a bound of log p(y), the mean over draws.

        y is what the loss asks for (see `wanted`). The bound holds up to the error of the solver's steps. Gradients
        flow if they are enabled.

        Args:
            seeds, draws, solver, controller: as in `predict`; two draws or more give a standard error.
        """
        wanted = self.wanted(batch, "bound")
        drawn = self._posterior(batch, wanted.times, seeds, draws, solver, controller, "bound")
        terms = self._log_likelihood(drawn.values, wanted) - drawn.kl.unflatten(0, (len(batch), draws))
        stderr = terms.detach().std(1) / math.sqrt(draws) if draws > 1 else None
        return Likelihood(terms.mean(1), "bound", stderr)

    def _sample(
        self, noise: Noise, grid: Tensor, mean: bool, solver: Solver | None, controller: Controller | None
    ) -> Tensor:
        z = self.prior_mean + self.prior_log_std.exp() * noise.normal(self.latent, dtype=self.dtype)
        keys = path_seeds(noise)
        knots, places = distinct(torch.cat((torch.zeros_like(grid[:, :1]), grid), 1))
        path = self.solve(self.prior(), z, knots, keys, solver, controller, save="all").solution.path
        x = self._decode(path[places[1:]].transpose(0, 1))
        return x if mean else x + self.log_sigma.exp() * noise.normal(*x.shape[1:], dtype=x.dtype)


def _normal_kl(mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_log_std: Tensor) -> Tensor:
    """[N] float64 KL(N(mean, std²) | N(prior_mean, prior_std²)) of diagonal normals [N, D]."""
    scaled = ((mean - prior_mean) * (-prior_log_std).exp()).square()
    ratio = log_std - prior_log_std
    return 0.5 * (scaled + (2 * ratio).exp() - 1 - 2 * ratio).sum(1, dtype=torch.float64)


def _states(y: Tensor) -> Tensor:
    """[B, latent] without the path's KL, on which nothing else depends."""
    return y[:, :-1]
