"""Data sets and models of a few numbers, for the tests of the trainer; importing this module registers them.

Tests import it inside `tests.unit.fakes.restored()` and call `register_all`, so that no other test meets its members.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genmodels.config import Config, overlay
from genmodels.data.dataset import Dataset
from genmodels.data.memory import InMemory
from genmodels.model import Model
from genmodels.networks.network import Network
from genmodels.registry import ConfigError, register
from genmodels.rng import SeedNoise, generator
from genmodels.training.checkpoint import read_tensors
from genmodels.types import Batch, Loss, NotApplicable

ROOT = Path(__file__).resolve().parents[1]


class Line(InMemory):
    """Points of the plane; item `nan_at` of the training split holds NaN (and is not checked)."""

    shape = (2,)

    def __init__(self, items: int = 48, val: int = 16, nan_at: int = -1) -> None:
        for split, n in (("train", items), ("val", val), ("test", 16)):
            x = torch.randn(n, 2, generator=generator("line", split)) * torch.tensor([1.0, 0.1]) + 1.0
            self.hold(split, Batch(x))
        if nan_at >= 0:
            self.all("train").x[nan_at] = torch.nan


class Squares(InMemory):
    """Integer images 4x4 with the levels 0 … 4 in three classes; every pixel of class c is near c."""

    shape, num_classes, bin_width, levels = (1, 4, 4), 3, 1.0, 5

    def __init__(self, items: int = 30) -> None:
        for split in ("train", "val", "test"):
            label = torch.arange(items) % 3
            jitter = torch.randint(0, 3, (items, *self.shape), generator=generator("squares", split))
            self.hold(split, Batch((label.reshape(-1, 1, 1, 1) + jitter).float(), condition=label))


class Recorder(Network):
    """x W + b; notes the type of its product."""

    seen: ClassVar[list[torch.dtype]] = []

    def __init__(self, *, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size) / 2)
        self.bias = nn.Parameter(torch.randn(size))

    def forward(self, t: Tensor | None, x: Tensor, condition: Tensor | None = None) -> Tensor:
        product = x @ self.weight
        self.seen.append(product.dtype)
        return product + self.bias


class Regression(Model):
    """Squared distance between network(x) and a vector, with a running mean of x."""

    fault: ClassVar[Callable[["Regression", Batch], None] | None] = None  # called before every training loss
    losses: ClassVar[list[torch.dtype]] = []

    def __init__(self, noise: float = 0.0, dropout: float = 0.0, *, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.noise = shape, noise
        self.network = Recorder(size=shape[0])
        self.dropout = nn.Dropout(dropout)
        self.goal = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Batch, *, generator: torch.Generator | None = None) -> Loss:
        if self.training and Regression.fault is not None:
            Regression.fault(batch)
        x = batch.x
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=generator, device=x.device)
        if self.training:
            self.mean.lerp_(x.mean(0).detach(), 0.1)
            self.count += 1
        value = (self.dropout(self.network(None, x)) - self.goal - 3).square().sum(1)
        self.losses.append(value.dtype)
        return Loss(value, {"first": x[:, 0].mean().detach()})

    def sample(self, seeds: Any, *, condition: Tensor | None = None, num_steps: int = 1) -> Tensor:
        return SeedNoise(seeds).normal(*self.shape) * num_steps + self.goal.detach()


class Wide(Regression):
    """A goal of another size, no bias, and something more: what only partly fits `Regression`."""

    def __init__(self, *, shape: tuple[int, ...]) -> None:
        super().__init__(shape=shape)
        self.goal = nn.Parameter(torch.zeros(3))
        self.extra = nn.Parameter(torch.zeros(1))
        del self.network.bias

    def loss(self, batch: Batch, *, generator: torch.Generator | None = None) -> Loss:
        value = (batch.x @ self.network.weight).square().sum(1) + self.goal.square().sum() + self.extra
        return Loss(value.square(), {})


class Fitted(Model):
    """The mean of the data, fitted in `prepare`; no parameters."""

    fits: ClassVar[int] = 0

    def __init__(self, *, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape))

    def prepare(self, batches: Any, *, generator: torch.Generator) -> dict[str, Tensor]:
        Fitted.fits += 1
        self.mean.copy_(torch.cat([batch.x for batch in batches]).mean(0))
        return {"norm": self.mean.norm()}

    def loss(self, batch: Batch, *, generator: torch.Generator | None = None) -> Loss:
        return Loss((batch.x - self.mean).square().sum(1), {})

    def sample(self, seeds: Any, *, condition: Tensor | None = None) -> Tensor:
        return self.mean + SeedNoise(seeds).normal(*self.shape)


class Classy(Model):
    """Draws images of the class it is given; knows its seeds."""

    conditional = True

    def __init__(self, *, shape: tuple[int, ...], num_classes: int | None) -> None:
        super().__init__()
        self.shape = shape
        self.level = nn.Parameter(torch.zeros(num_classes))

    def loss(self, batch: Batch, *, generator: torch.Generator | None = None) -> Loss:
        return Loss((batch.x.flatten(1).mean(1) - self.level[batch.condition]).square(), {})

    def sample(self, seeds: Any, *, condition: Tensor | None = None, contrast: float = 1.0) -> Tensor:
        noise = SeedNoise(seeds).uniform(*self.shape)
        return (condition.reshape(-1, 1, 1, 1) + contrast * noise).floor()


class Refuses(Regression):
    """Has `sample`, but cannot answer."""

    def sample(self, seeds: Any, *, condition: Tensor | None = None) -> Tensor:
        raise NotApplicable("its decoder is missing")


class Twice(Model):
    """A loss that differentiates its network, as implicit score matching does."""

    differentiates_twice = True

    def __init__(self, *, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.ones(shape))

    def loss(self, batch: Batch, *, generator: torch.Generator | None = None) -> Loss:
        x = batch.x.detach().requires_grad_()
        energy = (self.weight * x.square()).sum()
        (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return Loss((slope - 1).square().sum(1), {})


MEMBERS = [
    (Dataset, "t_line", Line),
    (Dataset, "t_squares", Squares),
    (Model, "t_regression", Regression),
    (Model, "t_wide", Wide),
    (Model, "t_fitted", Fitted),
    (Model, "t_classy", Classy),
    (Model, "t_refuses", Refuses),
    (Model, "t_twice", Twice),
]


def register_all() -> None:
    """Register the fakes; clear what they remember."""
    for base, name, cls in MEMBERS:
        register(base, name)(cls)
    Regression.fault, Fitted.fits = None, 0
    Regression.losses.clear()
    Recorder.seen.clear()


register_all()


def tree(**changes: Any) -> dict[str, Any]:
    """A small configuration: ten steps, a checkpoint every fourth."""
    base = {
        "name": "r",
        "imports": ["tests.training_fakes"],
        "data": "t_line",
        "model": {"name": "t_regression"},
        "train": {
            "steps": 10,
            "batch_size": 8,
            "log_every": 2,
            "eval_every": 5,
            "save_every": 4,
            "ema": [{"name": "constant", "value": 0.9}],
        },
    }
    return overlay(base, changes)


def config(**changes: Any) -> Config:
    return Config(tree(**changes))


RICH: dict[str, Any] = {"model": {"noise": 0.3, "dropout": 0.25}, "train": {"learning_rate": "one_cycle", "clip": 0.5}}


class Stop(Exception):
    """What tests raise in the middle of training."""


def stop_at(step: int, error: type[BaseException] = Stop) -> None:
    """Raise in the loss of the given step (from 1) of this process."""
    seen = iter(range(1, 10**6))

    def fault(batch: Batch) -> None:
        if next(seen) == step:
            raise error

    Regression.fault = fault


def fail_on_item(take: Callable[..., Batch], item: int) -> Callable[..., Batch]:
    """`take`, but an error where it is asked for an item."""

    def taken(split: str, indices: Tensor) -> Batch:
        if split == "train" and (indices == item).any():
            raise ConfigError(f"item {item} is broken")
        return take(split, indices)

    return taken


def digests(run: Any) -> dict[str, str]:
    """SHA-256 of the tensors in every file of the newest checkpoint: equal exactly if all bits are.

    (The order of the texts in a safetensors header is not reproducible, so that the files themselves may differ.)
    """
    folder = max(p for p in run.checkpoints.iterdir() if p.name.isdigit())
    out = {}
    for path in folder.glob("*.safetensors"):
        tensors, _ = read_tensors(path)
        text = "".join(f"{k} {v.dtype} {v.numpy().tobytes().hex()}" for k, v in sorted(tensors.items()))
        out[path.name] = hashlib.sha256(text.encode()).hexdigest()
    return out


def said(run: Any) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "items_per_second")} for line in lines]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
