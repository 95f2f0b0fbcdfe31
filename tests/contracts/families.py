"""Fakes of the model families to come, each as small as its idea allows.

They are no models to use: they hold the interfaces to account. Each travels configuration, training, sampling or
prediction, and evaluation in `test_families.py`.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from genmodels.data.dataset import Dataset
from genmodels.data.memory import InMemory
from genmodels.model import Model
from genmodels.registry import kind, register
from genmodels.rng import BatchNoise, Noise, SeedNoise, generator
from genmodels.solvers.base import Solver, integrate
from genmodels.solvers.runge_kutta import RK4, Euler
from genmodels.transforms import Transform
from genmodels.types import Batch, Likelihood, Loss, Shape, sum_items

SPLITS = {"train": 24, "val": 8, "test": 8}

# ---- data ----------------------------------------------------------------------------------------------------------


@register(Dataset, "fake_series")
class Series(InMemory):
    """Sines of two frequencies seen at irregular times with gaps; to be forecast, or told apart by frequency."""

    shape = (6, 1)
    unit_of_time = "seconds"

    def __init__(self, task: Literal["forecast", "classify"] = "forecast") -> None:
        self.target_shape = (4, 1) if task == "forecast" else (2,)
        for split, n in SPLITS.items():
            noise = BatchNoise(n, generator=generator("series", split))
            label = torch.arange(n) % 2
            times = noise.uniform(6).double().sort(1).values
            ahead = 1 + noise.uniform(4).double().sort(1).values
            rate, phase = 3.0 + 3.0 * label[:, None], noise.uniform(1)
            x, later = (torch.sin(rate * s + phase).float().unsqueeze(2) for s in (times, ahead))
            mask = noise.uniform(6, 1) < 0.8
            seen = {"times": times, "mask": mask}
            if task == "forecast":
                seen |= {"target_times": ahead, "target": later, "target_mask": noise.uniform(4, 1) < 0.9}
            self.hold(split, Batch(x * mask, **{"target": label, **seen}))


@register(Dataset, "fake_binary")
class Binary(InMemory):
    """Strings of 6 bits in which a bit tends to repeat the one before it."""

    shape, levels, bin_width = (6,), 2, 1.0

    def __init__(self) -> None:
        for split, n in SPLITS.items():
            flips = BatchNoise(n, generator=generator("binary", split)).uniform(6) < 0.3
            self.hold(split, Batch((flips.long().cumsum(1) % 2).float()))


@register(Dataset, "fake_speech")
class Speech(InMemory):
    """16 samples of sound with loudness and pitch given as a "mel spectrogram" of 4 bands and 2 frames."""

    shape, condition_shape = (16,), (4, 2)

    def __init__(self) -> None:
        for split, n in SPLITS.items():
            noise = BatchNoise(n, generator=generator("speech", split))
            mel = noise.normal(4, 2)
            wave = torch.sin(torch.arange(16) * (1 + mel[:, 0, :1].abs())) + 0.1 * noise.normal(16)
            self.hold(split, Batch(wave, condition=mel))


@register(Dataset, "fake_plane")
class Plane(InMemory):
    """Correlated Gaussian points of the plane, N(m, A Aᵀ)."""

    shape = (2,)
    mean, root = torch.tensor([1.0, -0.5]), torch.tensor([[1.0, 0.0], [0.8, 0.5]])

    def __init__(self) -> None:
        for split, n in SPLITS.items():
            self.hold(
                split, Batch(self.mean + BatchNoise(n, generator=generator("plane", split)).normal(2) @ self.root.T)
            )


# ---- predictors ----------------------------------------------------------------------------------------------------


def masked_error(prediction: Tensor, batch: Batch) -> Tensor:
    """[B] mean squared error where the target counts."""
    error = (prediction - batch.target) ** 2 * batch.target_mask
    return error.flatten(1).sum(1) / batch.target_mask.flatten(1).sum(1).clamp(min=1)


@register(Model, "fake_latent_ode")
class LatentODE(Model):
    """A recurrent encoder of what was seen, an ODE to the times asked for, a linear decoder."""

    def __init__(self, latent: int = 3, solver: Solver = RK4(), *, shape: Shape, target_shape: Shape) -> None:
        super().__init__()
        self.shape, self.solver = shape, solver
        self.encoder = nn.GRU(2 * shape[-1] + 1, latent, batch_first=True)
        self.field, self.decoder = nn.Linear(latent, latent), nn.Linear(latent, target_shape[-1])

    def predict(self, batch: Batch, *, seeds: object = None, num_steps: int = 4) -> Tensor:
        steps = batch.times.diff(dim=1, prepend=batch.times[:, :1]).to(batch.x)
        _, h = self.encoder(torch.cat((batch.x * batch.mask, batch.mask.to(batch.x), steps.unsqueeze(2)), 2))
        z, out, grid = h[0], [], torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        gaps = batch.target_times.diff(dim=1, prepend=batch.times[:, -1:]).to(batch.x)
        for gap in gaps.unbind(1):  # each row has its own clock: unit time times the row's gap
            z = integrate(lambda t, z, gap=gap: gap[:, None] * self.field(z).tanh(), z, grid, solver=self.solver).x
            out.append(self.decoder(z))
        return torch.stack(out, 1)

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        return Loss(masked_error(self.predict(batch), batch), {})


@register(Model, "fake_cde")
class NeuralCDE(Model):
    """dz = f(z) dX along the linear interpolation of time and the observations; logits from the last state."""

    def __init__(self, latent: int = 4, *, shape: Shape, target_shape: Shape) -> None:
        super().__init__()
        self.shape, self.channels = shape, shape[-1] + 1
        self.start, self.field = nn.Linear(self.channels, latent), nn.Linear(latent, latent * self.channels)
        self.head = nn.Linear(latent, target_shape[0])

    def predict(self, batch: Batch, *, seeds: object = None) -> Tensor:
        path = torch.cat((batch.times.to(batch.x).unsqueeze(2), batch.x * batch.mask), 2)
        z, unit = self.start(path[:, 0]), torch.tensor([0.0, 1.0], dtype=torch.float64)
        for step in path.diff(dim=1).unbind(1):

            def field(t: Tensor, z: Tensor, step: Tensor = step) -> Tensor:
                return torch.einsum("bhc,bc->bh", self.field(z).tanh().view(len(z), -1, self.channels), step)

            z = integrate(field, z, unit, solver=RK4()).x
        return self.head(z)

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        value = nn.functional.cross_entropy(self.predict(batch), batch.target, reduction="none")
        return Loss(value, {})


@register(Model, "fake_sde")
class NeuralSDE(Model):
    """dz = f(z) dt + σ dW from a linear encoding; the forecast is random, row i by seed i."""

    def __init__(self, latent: int = 3, sigma: float = 0.3, *, shape: Shape, target_shape: Shape) -> None:
        super().__init__()
        self.shape, self.sigma, self.latent, self.out = shape, sigma, latent, target_shape
        self.encoder, self.field = nn.Linear(math.prod(shape), latent), nn.Linear(latent, latent)
        self.decoder = nn.Linear(latent, math.prod(target_shape))

    def _run(self, batch: Batch, noise: Noise, steps: int) -> Tensor:
        z, h = self.encoder((batch.x * batch.mask).flatten(1)), 1 / steps
        for _ in range(steps):
            dw = noise.normal(self.latent, dtype=z.dtype).to(z.device) * h**0.5
            z = z + self.field(z).tanh() * h + self.sigma * dw
        return self.decoder(z).view(-1, *self.out)

    def predict(self, batch: Batch, *, seeds: object = None, num_steps: int = 5) -> Tensor:
        return self._run(batch, SeedNoise(len(batch) if seeds is None else seeds), num_steps)

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        return Loss(masked_error(self._run(batch, noise, 5), batch), {})


@register(Model, "fake_deq")
class DEQ(Model):
    """Logits from z* = tanh(W z* + U x): fixed-point iteration forwards, the implicit function theorem backwards."""

    def __init__(self, width: int = 8, *, shape: Shape, target_shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.inject, self.recur = nn.Linear(math.prod(shape), width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, target_shape[0])
        nn.init.orthogonal_(self.recur.weight, 0.5)  # a contraction: the fixed point exists and is unique

    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recur(z) + self.inject(x.flatten(1)))

    def equilibrium(self, x: Tensor, tolerance: float, max_iterations: int) -> tuple[Tensor, int]:
        with torch.no_grad():
            z, calls = torch.zeros(len(x), self.recur.in_features, dtype=x.dtype, device=x.device), 0
            while calls < max_iterations:
                z, old, calls = self.cell(z, x), z, calls + 1
                if (z - old).abs().amax() < tolerance:
                    break
        if torch.is_grad_enabled():
            z = self.cell(z, x)
            inside = z.detach().requires_grad_()
            again = self.cell(inside, x.detach())

            def implicit(g: Tensor) -> Tensor:  # u = g + Jᵀu by Neumann series
                u = g
                for _ in range(200):
                    u = g + torch.autograd.grad(again, inside, u, retain_graph=True)[0]
                return u

            if z.requires_grad:
                z.register_hook(implicit)
        return z, calls

    def predict(
        self, batch: Batch, *, seeds: object = None, tolerance: float = 1e-6, max_iterations: int = 50
    ) -> Tensor:
        return self.head(self.equilibrium(batch.x, tolerance, max_iterations)[0])

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        z, calls = self.equilibrium(batch.x, 1e-6, 50)
        value = nn.functional.cross_entropy(self.head(z), batch.target, reduction="none")
        return Loss(value, {"iterations": torch.tensor(float(calls))})


# ---- densities -----------------------------------------------------------------------------------------------------


@register(Model, "fake_cnf")
class CNF(Model):
    """-log p by an ODE whose divergence is taken by autograd inside the loss."""

    differentiates_twice = True

    def __init__(self, width: int = 8, solver: Solver = Euler(), *, shape: Shape, transform: Transform) -> None:
        super().__init__()
        self.shape, self.solver, self.transform = shape, solver, transform
        self.net = nn.Sequential(nn.Linear(shape[0] + 1, width), nn.Tanh(), nn.Linear(width, shape[0]))

    def velocity(self, t: Tensor, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        return self.net(torch.cat((x, t.to(x).expand(len(x))[:, None]), 1))

    def _joint(self, t: Tensor, state: Tensor) -> Tensor:
        with torch.enable_grad():  # a loss must also work where the caller switched gradients off (validation)
            x = state[:, :-1] if state.requires_grad else state[:, :-1].detach().requires_grad_()
            v = self.velocity(t, x)
            columns = (torch.autograd.grad(v[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1]))
            return torch.cat((v, sum(columns)[:, None]), 1)

    def likelihood(
        self, x: Tensor, *, condition: object = None, seeds: object = None, num_steps: int = 8
    ) -> Likelihood:
        y, log_det = self.transform(x)
        grid = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        end = integrate(self._joint, torch.cat((y, torch.zeros_like(y[:, :1])), 1), grid, solver=self.solver).x
        z = end[:, :-1]
        return Likelihood(sum_items(-0.5 * (z**2 + math.log(2 * math.pi))) + end[:, -1] + log_det, "numerical")

    def log_prob(self, x: Tensor, *, condition: object = None, seeds: object = None, num_steps: int = 8) -> Tensor:
        return self.likelihood(x, num_steps=num_steps).value

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        return Loss(-self.log_prob(batch.x), {})

    @torch.no_grad()
    def sample(self, seeds: object, *, condition: object = None, num_steps: int = 8) -> Tensor:
        z = SeedNoise(seeds).normal(*self.shape)
        grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return self.transform.inverse(integrate(self.velocity, z, grid, solver=self.solver).x)


@register(Model, "fake_closed_form")
class ClosedForm(Model):
    """A Gaussian fitted wholly in `prepare`: no parameters, no optimiser, `train.steps: 0`."""

    def __init__(self, *, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("root", torch.eye(shape[0], dtype=torch.float64))

    def prepare(self, batches: object, *, generator: Generator) -> dict[str, Tensor]:
        x = torch.cat([batch.x for batch in batches]).double()
        self.mean.copy_(x.mean(0))
        self.root.copy_(torch.linalg.cholesky(x.T.cov()))
        return {"log_det": self.root.diagonal().log().sum()}

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        return Loss(-self.log_prob(batch.x), {})

    def likelihood(self, x: Tensor, *, condition: object = None, seeds: object = None) -> Likelihood:
        normal = torch.distributions.MultivariateNormal(self.mean, scale_tril=self.root, validate_args=False)
        return Likelihood(normal.log_prob(x.double()), "exact")

    def log_prob(self, x: Tensor, *, condition: object = None, seeds: object = None) -> Tensor:
        return self.likelihood(x).value

    def score(self, t: Tensor, x: Tensor, *, condition: object = None) -> Tensor:
        return -torch.cholesky_solve((x.double() - self.mean).T, self.root).T.to(x)

    def sample(self, seeds: object, *, condition: object = None) -> Tensor:
        return (self.mean + SeedNoise(seeds).normal(*self.shape, dtype=torch.float64) @ self.root.T).float()


@register(Model, "fake_audio_flow")
class AudioFlow(Model):
    """x = m(mel) + e^{s(mel)} z over a waveform: a flow whose condition is an embedding."""

    conditional = True

    def __init__(self, *, shape: Shape, condition_shape: Shape) -> None:
        super().__init__()
        self.shape, self.net = shape, nn.Linear(math.prod(condition_shape), 2 * shape[0])

    def parts(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(mel.flatten(1)).chunk(2, 1)

    def likelihood(self, x: Tensor, *, condition: Tensor, seeds: object = None) -> Likelihood:
        mean, log_scale = self.parts(condition)
        z = (x - mean) * (-log_scale).exp()
        return Likelihood(sum_items(-0.5 * (z**2 + math.log(2 * math.pi)) - log_scale), "exact")

    def log_prob(self, x: Tensor, *, condition: Tensor, seeds: object = None) -> Tensor:
        return self.likelihood(x, condition=condition).value

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        return Loss(-self.log_prob(batch.x, condition=batch.condition), {})

    @torch.no_grad()
    def sample(self, seeds: object, *, condition: Tensor, temperature: float = 1.0) -> Tensor:
        mean, log_scale = self.parts(condition)
        return mean + log_scale.exp() * temperature * SeedNoise(seeds).normal(*self.shape)


@register(Model, "fake_nade")
class NADE(Model):
    """P(x) = Π P(x_i | x_<i) over bits: a probability mass, so nothing is dequantised."""

    def __init__(self, *, shape: Shape) -> None:
        super().__init__()
        self.shape, d = shape, shape[0]
        self.weight, self.bias = nn.Parameter(torch.zeros(d, d)), nn.Parameter(torch.zeros(d))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.tril(-1).T + self.bias

    def likelihood(self, x: Tensor, *, condition: object = None, seeds: object = None) -> Likelihood:
        log_p = -nn.functional.binary_cross_entropy_with_logits(self.logits(x), x, reduction="none")
        return Likelihood(sum_items(log_p), "pmf")

    def log_prob(self, x: Tensor, *, condition: object = None, seeds: object = None) -> Tensor:
        return self.likelihood(x).value

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        return Loss(-self.log_prob(batch.x), {})

    @torch.no_grad()
    def sample(self, seeds: object, *, condition: object = None) -> Tensor:
        u = SeedNoise(seeds).uniform(*self.shape)
        x = torch.zeros_like(u)
        for i in range(self.shape[0]):
            x[:, i] = (u[:, i] < self.logits(x)[:, i].sigmoid()).float()
        return x


@register(Model, "fake_vae")
class VAE(Model):
    """Linear Gaussian VAE: p(z) = N(0, I), p(x|z) = N(W z + b, I), q(z|x) = N(A x + c, e^{2s}); the ELBO is a bound."""

    def __init__(self, latent: int = 2, *, shape: Shape) -> None:
        super().__init__()
        self.shape, self.latent = shape, latent
        self.decoder, self.encoder = nn.Linear(latent, shape[0]), nn.Linear(shape[0], latent)
        self.log_std = nn.Parameter(torch.zeros(latent))

    def elbo(self, x: Tensor, noise: Noise) -> Tensor:
        loc, std = self.encoder(x), self.log_std.exp()
        mean = self.decoder(loc + std * noise.normal(self.latent, dtype=x.dtype).to(x.device))
        kl = 0.5 * (loc**2 + std**2 - 1 - 2 * self.log_std)
        return sum_items(-0.5 * ((x - mean) ** 2 + math.log(2 * math.pi))) - sum_items(kl)

    def likelihood(self, x: Tensor, *, condition: object = None, seeds: object = None) -> Likelihood:
        return Likelihood(self.elbo(x, SeedNoise(len(x) if seeds is None else seeds)), "bound")

    def log_prob(self, x: Tensor, *, condition: object = None, seeds: object = None) -> Tensor:
        return self.likelihood(x, seeds=seeds).value

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        return Loss(-self.elbo(batch.x, BatchNoise(len(batch), generator=generator, device=batch.x.device)), {})

    @torch.no_grad()
    def sample(self, seeds: object, *, condition: object = None) -> Tensor:
        noise = SeedNoise(seeds)
        mean = self.decoder(noise.normal(self.latent))
        return mean + noise.normal(*self.shape)


# ---- a score model with a process and prior of its own -------------------------------------------------------------


@kind
class Process(ABC):
    """dy = f(y) dt + dW with a stationary law: a kind that arrives with a family."""

    @abstractmethod
    def drift(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def prior(self, noise: Noise, shape: Shape) -> Tensor: ...


@register(Process, "fake_logistic")
class Logistic(Process):
    """Langevin process of the logistic law of scale a: f = -tanh(y/2a)/(2a)."""

    def __init__(self, scale: float = 0.5) -> None:
        self.scale = scale

    def drift(self, y: Tensor) -> Tensor:
        return -torch.tanh(y / (2 * self.scale)) / (2 * self.scale)

    def prior(self, noise: Noise, shape: Shape) -> Tensor:
        u = noise.uniform(*shape).clamp(1e-6, 1 - 1e-6)
        return self.scale * (u.log() - (-u).log1p())


@register(Model, "fake_local_dsm")
class LocalDSM(Model):
    """Denoising over the last increment δ of a nonlinear process; samples by its reverse SDE from its own prior."""

    def __init__(self, process: Process, delta: float = 0.05, horizon: float = 2.0, *, shape: Shape) -> None:
        super().__init__()
        self.shape, self.process, self.delta, self.horizon = shape, process, delta, horizon
        self.net = nn.Sequential(nn.Linear(shape[0] + 1, 16), nn.Tanh(), nn.Linear(16, shape[0]))

    def score(self, t: Tensor, x: Tensor, *, condition: object = None) -> Tensor:
        return self.net(torch.cat((x, t.to(x).expand(len(x))[:, None]), 1))

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        y, t, steps = batch.x, noise.uniform()[:, None] * self.horizon, 8
        for _ in range(steps):
            h = t / steps
            y = y + self.process.drift(y) * h + h.sqrt() * noise.normal(*self.shape)
        z, root = noise.normal(*self.shape), self.delta**0.5
        end = y + self.process.drift(y) * self.delta + root * z
        error = root * self.score(t.squeeze(1) + self.delta, end) + z
        return Loss((error**2).mean(1), {})

    @torch.no_grad()
    def sample(self, seeds: object, *, condition: object = None, num_steps: int = 20) -> Tensor:
        noise, h = SeedNoise(seeds), self.horizon / num_steps
        y = self.process.prior(noise, self.shape)
        for k in range(num_steps, 0, -1):
            t = torch.tensor(k * h)
            y = y + (self.score(t, y) - self.process.drift(y)) * h + h**0.5 * noise.normal(*self.shape)
        return y


# ---- an editor over a transformer that diffusers made --------------------------------------------------------------


class FluxEditor:
    """Velocity, encode and decode over a stock transformer: an `Editor` is no `Model`, and needs none of it."""

    def __init__(self, transformer: nn.Module, solver: Solver, num_steps: int) -> None:
        self.transformer, self.solver = transformer, solver
        self.grid = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)

    def velocity(self, t: Tensor, x: Tensor, *, condition: dict[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in condition.items()}
        return self.transformer(hidden_states=x, timestep=t.to(x).expand(len(x)), return_dict=False, **inputs)[0]

    def _run(self, x: Tensor, grid: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return integrate(lambda t, x: self.velocity(t, x, condition=condition), x, grid, solver=self.solver).x

    def encode(self, x: Tensor, *, condition: dict[str, Tensor]) -> Tensor:
        return self._run(x, self.grid, condition)

    def decode(self, z: Tensor, *, condition: dict[str, Tensor]) -> Tensor:
        return self._run(z, self.grid.flip(0), condition)
