"""Latent ODE: one uncertain initial state for a whole series, an ODE through all of its times, a decoder at each."""

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
from ..solvers.base import Backprop, Controller, Fixed, Gradient, Solver, title
from ..solvers.fields import RowField
from ..solvers.runge_kutta import Tsit5
from ..solvers.step_size import PI
from ..types import Batch, Likelihood, Loss, Seeds, Shape
from .irregular import Series, Targets
from .ode_rnn import ODERNN, StateField
from .recurrent import Ode, Precision, SeriesEncoder, check_positive
from .regularization import Evolved, Regularizer, evolve
from .series_generator import SeriesGenerator

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Posterior(NamedTuple):
    """q(z₀ | series) = N(mean, std²), both [B, latent], and where each item's clock starts, [B] float64."""

    mean: Tensor
    std: Tensor
    start: Tensor


@register(Model, "latent_ode")
class LatentODE(SeriesGenerator):
    """z₀ ~ N(0, I), dz/dt = f(z), x(t) ~ N(g(z(t)), σ²): series as noisy views of trajectories told apart by z₀.

    An encoder reads what was observed backwards in time into q(z₀ | series). With w_k = log p(y | z_k) +
    β (log p(z_k) - log q(z_k | series)) for K draws, loss = -(logsumexp_k w_k - log K) / D + regularizers, D being the
    number of values asked for of an item, observed or not. At β = 1 and for any K this bounds -log p(y) from above.
    What is asked for is the target at target_times, or the series itself where the data have no such target.

    β = 0 up to the share `kl_wait` of training, then 1 - exp(-kl_rate (progress - kl_wait)): the schedule
    1 - 0.99^(e - 10) in epochs e of E is kl_wait = 10 / E with kl_rate = E log(1 / 0.99), about E / 99.5.

    Of data whose target is a class, the label is predicted from z₀, and class_weight times its cross-entropy joins the
    loss.

    Args:
        field: f, a network from [latent] to [latent].
        encoder: of the observations; `gated` or `gru` for one without an ODE.
        latent: size of z.
        units: width of the hidden layer between the encoder's state and q.
        decoder: g, from [latent] to [C]; null for a linear layer.
        classifier: from [latent] to logits; null for a linear layer.
        autonomous: whether f does not see the time.
        sigma: standard deviation σ of the observation noise, in data units.
        learn_sigma: whether σ is learned, for each channel, from there.
        draws: K.
        kl_wait: share of training without KL term.
        kl_rate: how fast the KL term comes in, per unit of progress.
        class_weight: of the cross-entropy.
        solver, controller, gradient: of the ODE. `fixed` divides the intervals between the times of each item.
        interpolate: whether step control passes over the times asked for and values there are interpolated in its
            steps, so that evaluations do not grow with their number; else steps end at each of them. Regularizer
            steer moves every time, and gradients other than backprop work, only without.
        regularizers: of the ODE in training.
        time_scale: time units of the data per unit of the model's clock; null to measure.
        precision: of all arithmetic.
    Source: Rubanova et al. 2019 (Latent ODEs for irregularly-sampled time series), section 3.2; its weights hold the
        analytic KL divergence, with which K > 1 draws give no bound; here those of Burda et al. 2016 (Importance
        weighted autoencoders), section 3.
    """

    def __init__(
        self,
        field: Callable[..., Network] = MLP,
        encoder: Callable[..., SeriesEncoder] = ODERNN,
        latent: int = 8,
        units: int = 64,
        decoder: Callable[..., Network] | None = None,
        classifier: Callable[..., Network] | None = None,
        autonomous: bool = True,
        sigma: float = 0.01,
        learn_sigma: bool = False,
        draws: int = 3,
        kl_wait: float = 1 / 30,
        kl_rate: float = 3.0,
        class_weight: float = 1.0,
        solver: Solver = Tsit5(),
        controller: Controller = PI(),
        gradient: Gradient = Backprop(),
        interpolate: bool = True,
        regularizers: tuple[Regularizer, ...] = (),
        time_scale: float | None = None,
        precision: Precision = "float32",
        *,
        shape: Shape,
        target_shape: Shape | None,
    ) -> None:
        super().__init__("latent_ode", time_scale, precision, shape, target_shape)
        check_positive("latent_ode", latent=latent, units=units, sigma=sigma, draws=draws, kl_rate=kl_rate)
        if not 0 <= kl_wait < 1 or class_weight < 0:
            raise ConfigError(
                f"latent_ode: 0 <= kl_wait < 1 and class_weight >= 0 are needed, found {kl_wait} and {class_weight}."
            )
        if interpolate and not isinstance(gradient, Backprop) and not isinstance(controller, Fixed):
            raise ConfigError(
                f"latent_ode: gradient '{title(gradient)}' does not differentiate what is interpolated between steps. "
                "Use interpolate: false, so that steps end at the times asked for, or gradient: backprop."
            )
        self.latent, self.draws = latent, draws
        self.kl_wait, self.kl_rate, self.class_weight = kl_wait, kl_rate, class_weight
        self.solver, self.controller, self.gradient = solver, controller, gradient
        self.regularizers, self.interpolate = tuple(regularizers), interpolate
        self.differentiates_twice = any(r.differentiates for r in self.regularizers)
        self.encoder = encoder(channels=shape[-1])
        self.head = nn.Sequential(nn.Linear(self.encoder.features + 1, units), nn.Tanh(), nn.Linear(units, 2 * latent))
        self.field = StateField(field, latent, not autonomous)
        self.decoder = _reader(decoder, latent, self.channels_out)
        self.classifier = None if self.classes is None else _reader(classifier, latent, self.classes)
        log_sigma = torch.full((self.channels_out,), math.log(sigma), dtype=self.dtype)
        if learn_sigma:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)
        if self.dtype == torch.float64:
            self.double()

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """Weight of the KL term at the present progress of training."""
        return -math.expm1(-self.kl_rate * max(0.0, self.progress - self.kl_wait))

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        series, wanted = self.series(batch, "loss"), self.wanted(batch, "loss")
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        posterior = self.posterior(series, wanted.times, evaluation=False)
        many = BatchNoise(len(batch) * self.draws, generator=generator, device=batch.x.device)
        charges = self.regularizers if self.training else ()
        ode = Ode(self.solver, self.controller, self.gradient, charges, self.progress, many)
        z, log_ratio = self._drawn(posterior, self.draws, noise)
        values, evolved = self._decoded(z, posterior.start, wanted.times, ode)
        log_p = self._log_likelihood(values, wanted)
        bound = (log_p + self.beta * log_ratio).logsumexp(1) - math.log(self.draws)
        value = evolved.penalty.reshape(len(batch), self.draws).mean(1) - bound / wanted.mask[:1].numel()
        squared = (values - wanted.values[:, None]).square().mean(1)[wanted.mask]
        logs = {
            **evolved.logs,
            "beta": torch.tensor(self.beta),
            "kl": -log_ratio.detach().mean(),
            "log_likelihood": log_p.detach().mean(),
            "squared_error": squared.detach().mean(),
        }
        if self.classes is not None:
            cross, accuracy = self._cross_entropy(z, self.labels(batch, "loss"))
            value, logs = value + self.class_weight * cross, logs | {"accuracy": accuracy}
        return Loss(value, logs)

    def _cross_entropy(self, z: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """[B] mean over the draws z [B, K, latent], and how often the mean logits are right."""
        logits = self.classifier(None, z.flatten(0, 1)).unflatten(0, z.shape[:2])
        cross = nn.functional.cross_entropy(logits.flatten(0, 1), label.repeat_interleave(z.shape[1]), reduction="none")
        return cross.reshape(z.shape[:2]).mean(1), (logits.mean(1).argmax(1) == label).to(cross.dtype).mean()

    def wanted(self, batch: Batch, where: str) -> Targets:
        """What the decoder is asked for: the target, or the observations where the target is a class or missing."""
        if self.classes is None and batch.target_times is not None:
            return self.targets(batch, where, known=True)
        mask = torch.ones_like(batch.x, dtype=torch.bool) if batch.mask is None else batch.mask
        own = batch.replace(target=batch.x, target_times=batch.times, target_mask=mask)
        return self.targets(own, where)

    # ---- the parts ---------------------------------------------------------------------------------------------------

    def posterior(self, series: Series, times: Tensor, *, evaluation: bool) -> Posterior:
        """q(z₀ | series) at the start of each item's clock: 0, or its first time of any kind if that is earlier.

        Args:
            times: [B, M] of what will be asked.
            evaluation: whether the encoder's own ODE has steps of each row's own.
        """
        first = series.times[:, 0]
        start = torch.cat((series.times, times, torch.zeros_like(first)[:, None]), 1).amin(1)
        ode = self.encoder.settings(evaluation)
        h = self.encoder.read(series.backwards(), ode).states[:, -1]
        h = self.encoder.carry(h, first, start, ode).h
        mean, raw = self.head(torch.cat((h, (first - start)[:, None].to(h)), 1)).chunk(2, 1)
        return Posterior(mean, nn.functional.softplus(raw), start)

    def decode(self, z: Tensor, start: Tensor, times: Tensor, ode: Ode) -> tuple[Tensor, Evolved]:
        """[N, M, C] means of x at times [N, M] of trajectories from z [N, latent] at start [N], and their solve.

        Every item has its own clock, without a union of times, unless all start and are asked at the same times, or the
        controller has one clock for the batch.
        """
        own = torch.cat((start[:, None], times), 1).T
        shared, moves = (bool(v) for v in torch.stack(((own == own[:, :1]).all(), (own[-1] > own[0]).any())).cpu())
        field, options = RowField(self.field), ode._asdict()
        if self.interpolate and moves and not isinstance(ode.controller, Fixed):
            one = getattr(ode.controller, "norm", "row") == "batch" and bool((start == start[0]).all())
            ends = torch.stack((own[0, 0], own[-1].max())) if shared or one else own[[0, -1]]
            evolved = evolve(field, z, ends, save="dense", **options)
            path = evolved.solution.dense(times.T)  # [M, N, latent]
        elif shared and moves:
            grid, places = own[:, 0].unique_consecutive(return_inverse=True)
            evolved = evolve(field, z, grid, save="all", **options)
            path = evolved.solution.path[places[1:]]
        else:
            evolved = evolve(field, z, own, save="all", **options)
            path = evolved.solution.path[1:]
        values = self.decoder(None, path.flatten(0, 1)).unflatten(0, path.shape[:2])
        return values.transpose(0, 1), evolved

    def _drawn(self, posterior: Posterior, draws: int, noise: Noise) -> tuple[Tensor, Tensor]:
        """K draws z₀ [B, K, latent] ~ q, and [B, K] float64 log p(z₀) - log q(z₀ | series)."""
        eps = noise.normal(draws, self.latent, dtype=self.dtype)
        std = posterior.std[:, None]
        z = posterior.mean[:, None] + std * eps
        ratio = 0.5 * (eps.square() - z.square()) + std.log()
        return z, ratio.sum(2, dtype=torch.float64)

    def _decoded(self, z: Tensor, start: Tensor, times: Tensor, ode: Ode) -> tuple[Tensor, Evolved]:
        """[B, K, M, C] for K draws z [B, K, latent] of each item."""
        start, times = (v.repeat_interleave(z.shape[1], 0) for v in (start, times))
        values, evolved = self.decode(z.flatten(0, 1), start, times, ode)
        return values.unflatten(0, z.shape[:2]), evolved

    def _log_likelihood(self, values: Tensor, wanted: Targets) -> Tensor:
        """[B, K] float64 Σ log N(y; values, σ²) over what counts, values [B, K, M, C]."""
        error = (wanted.values[:, None] - values) * (-self.log_sigma).exp()
        terms = torch.where(wanted.mask[:, None], -0.5 * error.square() - self.log_sigma - HALF_LOG_TWO_PI, 0.0)
        return terms.flatten(2).sum(2, dtype=torch.float64)

    def _evaluation(self, solver: Solver | None, controller: Controller | None) -> Ode:
        controller = self.controller.by_row() if controller is None else controller
        return Ode(self.solver if solver is None else solver, controller, self.gradient)

    # ---- answers -----------------------------------------------------------------------------------------------------

    def predict(
        self,
        batch: Batch,
        *,
        seeds: Seeds | None = None,
        draws: int = 8,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Tensor:
        """[B, M, C, 2] law of x at target_times, mean and log standard deviation; or [B, K] logits for classes.

        The law is that of the mixture over draws from q: its mean, and the spread of their means with σ added. Logits
        are the logarithm of the mean probability over draws.

        Args:
            seeds: [B], one for each item; 0 … B-1 if not given.
            draws: from q, for each item.
            solver, controller: of the ODE, if not those of training (whose steps are then each row's own).
        """
        check_positive("predict", draws=draws)
        series = self.series(batch, "predict")
        times = self.targets(batch.replace(target=None), "predict").times if self.classes is None else series.times
        posterior = self.posterior(series, times, evaluation=True)
        z, _ = self._drawn(posterior, draws, self._seeded(batch, seeds))
        if self.classes is not None:
            logits = self.classifier(None, z.flatten(0, 1)).unflatten(0, z.shape[:2])
            return logits.log_softmax(2).logsumexp(1) - math.log(draws)
        values, _ = self._decoded(z, posterior.start, times, self._evaluation(solver, controller))
        spread = values.var(1, correction=0) + (2 * self.log_sigma).exp()
        return torch.stack((values.mean(1), 0.5 * spread.log()), 3)

    def _seeded(self, batch: Batch, seeds: Seeds | None) -> SeedNoise:
        seeds = as_seeds(len(batch) if seeds is None else seeds)
        if len(seeds) != len(batch):
            raise ValueError(f"latent_ode: {len(batch)} items need as many seeds, found {len(seeds)}.")
        return SeedNoise(seeds, purpose="posterior", device=batch.x.device)

    def bound(
        self,
        batch: Batch,
        *,
        seeds: Seeds | None = None,
        draws: int = 1,
        solver: Solver | None = None,
        controller: Controller | None = None,
    ) -> Likelihood:
        """log (1/K Σ_k p(y | z_k) p(z_k) / q(z_k | series)) in nats, a lower bound of log p(y) that grows with K.

        y is what the loss asks for (see `wanted`), given the model's decoder alone: how the encoder came by q does not
        matter. Gradients flow if they are enabled.

        Args:
            seeds: [B], one for each item; 0 … B-1 if not given.
            draws: K; two or more give a standard error, to first order.
            solver, controller: of the ODE, as in `predict`.
        Source: Burda et al. 2016 (Importance weighted autoencoders), section 3.
        """
        check_positive("bound", draws=draws)
        wanted = self.wanted(batch, "bound")
        posterior = self.posterior(self.series(batch, "bound"), wanted.times, evaluation=True)
        z, log_ratio = self._drawn(posterior, draws, self._seeded(batch, seeds))
        values, _ = self._decoded(z, posterior.start, wanted.times, self._evaluation(solver, controller))
        terms = self._log_likelihood(values, wanted) + log_ratio
        value = terms.logsumexp(1) - math.log(draws)
        if draws == 1:
            return Likelihood(value, "bound")
        return Likelihood(value, "bound", (terms - value[:, None]).detach().exp().std(1) / math.sqrt(draws))

    def _sample(
        self, noise: Noise, grid: Tensor, mean: bool, solver: Solver | None, controller: Controller | None
    ) -> Tensor:
        z = noise.normal(self.latent, dtype=self.dtype)
        x, _ = self.decode(z, grid.new_zeros(len(grid)), grid, self._evaluation(solver, controller))
        return x if mean else x + self.log_sigma.exp() * noise.normal(*x.shape[1:], dtype=x.dtype)


class _Linear(nn.Linear):
    """A linear layer that is called like a network."""

    def forward(self, t: None, z: Tensor) -> Tensor:
        return super().forward(z)


def _reader(build: Callable[..., Network] | None, size: int, out: int) -> nn.Module:
    """A network from [size] to [out], linear if none is given."""
    if build is None:
        return _Linear(size, out)
    return build(in_shape=(size,), out_shape=(out,), timed=False, num_classes=None, condition_shape=None)
