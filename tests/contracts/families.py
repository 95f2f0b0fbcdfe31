"""Fakes of model families, mostly of those to come, each as small as its idea allows.

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


# ---- densities -----------------------------------------------------------------------------------------------------


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


# ---- a score model with a process and prior of its own -------------------------------------------------------------


@kind
class Relaxation(ABC):
    """dy = f(y) dt + dW with a stationary law: a kind that arrives with a family."""

    @abstractmethod
    def drift(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def prior(self, noise: Noise, shape: Shape) -> Tensor: ...


@register(Relaxation, "fake_logistic")
class Logistic(Relaxation):
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

    def __init__(self, process: Relaxation, delta: float = 0.05, horizon: float = 2.0, *, shape: Shape) -> None:
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
    """Velocity, encode and decode over a stock transformer: what has these capabilities need be no `Model`."""

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
