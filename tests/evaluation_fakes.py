"""Small data sets, models with known answers, and a run that exists in memory: what the evaluation tests share."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from genmodels.config import overlay
from genmodels.data.dataset import Dataset
from genmodels.data.memory import InMemory
from genmodels.evaluation.protocol import Protocol
from genmodels.hashing import digest
from genmodels.model import Model
from genmodels.networks.network import Network
from genmodels.registry import ConfigError
from genmodels.rng import SeedNoise, generator
from genmodels.types import Batch, Likelihood, Loss, NotApplicable

LEVELS, SHAPE = 5, (3,)


class Levels(InMemory):
    """Three components with the levels 0 … 4 and two classes; class 1 is brighter."""

    registered_name = "levels"
    shape, num_classes, bin_width, levels = SHAPE, 2, 1.0, LEVELS

    def __init__(self, sizes=(300, 20, 200)):
        for k, (split, size) in enumerate(zip(("train", "val", "test"), sizes, strict=True)):
            g = generator("levels", k)
            label = torch.randint(0, 2, (size,), generator=g)
            x = torch.randint(0, LEVELS - 1, (size, *SHAPE), generator=g) + label[:, None]
            self.hold(split, Batch(x.float(), condition=label))

    def baselines(self):
        return {"uniform": math.log2(LEVELS)}


class Points(InMemory):
    """Standard normal points of the plane, with their true density."""

    registered_name = "points"
    shape = (2,)

    def __init__(self, sizes=(300, 20, 200)):
        for split, size in zip(("train", "val", "test"), sizes, strict=True):
            self.hold(split, Batch(torch.randn(size, 2, generator=generator("points", split))))

    def log_prob(self, x):
        return -(x.double() ** 2).sum(1) / 2 - math.log(2 * math.pi)


class Classes(Points):
    """The sign of the first coordinate as target."""

    registered_name = "classes"
    target_shape = (2,)

    def __init__(self, sizes=(300, 20, 200)):
        super().__init__(sizes)
        for split in ("train", "val", "test"):
            items = self.all(split)
            self.hold(split, items.replace(target=(items.x[:, 0] > 0.5).long()))


class Series(Points):
    """Values of shape [4, 2] as target, a random half of them masked and NaN."""

    registered_name = "series"

    def __init__(self, sizes=(300, 20, 200)):
        super().__init__(sizes)
        for split in ("train", "val", "test"):
            items, g = self.all(split), generator("series", split)
            mask = torch.rand(len(items), 4, 2, generator=g) < 0.5
            target = torch.randn(len(items), 4, 2, generator=g) + torch.tensor([1.0, -2.0])
            self.hold(split, items.replace(target=target.where(mask, torch.nan), target_mask=mask))


class SharedStart(Points):
    """Random values of shape [4, 2] as target, of items that all start in one state."""

    registered_name = "shared_start"

    def __init__(self, sizes=(300, 20, 200)):
        super().__init__(sizes)
        for split in ("train", "val", "test"):
            items, g = self.all(split), generator("shared start", split)
            target = 2 * torch.randn(len(items), 4, 2, generator=g)
            self.hold(split, Batch(torch.ones(len(items), 1, 2), target=target))


class Glyphs(InMemory):
    """Pictures of 8x8 pixels with the levels of digits, and ten classes."""

    registered_name = "glyphs"
    shape, num_classes, bin_width, levels = (1, 8, 8), 10, 1.0, 17

    def __init__(self, sizes=(300, 20, 200)):
        for split, size in zip(("train", "val", "test"), sizes, strict=True):
            g = generator("glyphs", split)
            x = torch.randint(0, 17, (size, *self.shape), generator=g).float()
            self.hold(split, Batch(x, condition=torch.arange(size) % 10))


class Tap(Network):
    """A network that passes x through and is there to be counted."""

    def forward(self, t, x, condition=None):
        return x


class _Base(Model):
    def __init__(self, shape=SHAPE):
        super().__init__()
        self.shape = shape
        self.network = Tap()
        self.weight = nn.Parameter(torch.zeros(7))

    def loss(self, batch, *, generator=None):
        return Loss(torch.zeros(len(batch)), {})


class UniformLevels(_Base):
    """Every level equally likely: log2(levels) bits/dim exactly; and a denoiser whose answer changes most at t = 0."""

    def span(self):
        return 0.0, 1.0

    def label(self, t):
        return t

    def noised(self, t, x, noise):
        return (1 - t) * x.double() + t * noise.normal(*self.shape, dtype=torch.float64)

    def answer(self, t, x, *, condition=None):
        return t.sqrt() * x

    def sample(self, seeds, *, condition=None, passes: int = 3):
        x = SeedNoise(seeds).uniform(*self.shape)
        for _ in range(passes):
            x = self.network(None, x)
        return (LEVELS * x).floor()

    def likelihood(self, x, *, condition=None, seeds=None, as_density: bool = False):
        value = torch.full((len(x),), -math.prod(self.shape) * math.log(LEVELS), dtype=torch.float64)
        return Likelihood(value, "bound" if as_density else "pmf")

    def log_prob(self, x, *, condition=None, seeds=None):
        return self.likelihood(x).value


class Replay(_Base):
    """Returns the training item of the same number: a perfect memoriser. It needs class labels and records them."""

    conditional = True

    def __init__(self, dataset: Dataset):
        super().__init__(dataset.shape)
        self.dataset, self.conditions = dataset, []

    def sample(self, seeds, *, condition=None):
        self.conditions.append(condition)
        return self.dataset.take("train", seeds % self.dataset.size("train")).x

    def likelihood(self, x, *, condition=None, seeds=None):
        raise NotApplicable("it has no density")

    def log_prob(self, x, *, condition=None, seeds=None):
        raise NotApplicable("it has no density")


class Threshold(_Base):
    """Predicts the class of `Classes` from the first coordinate."""

    def __init__(self, at: float = 0.5):
        super().__init__((2,))
        self.at = at

    def predict(self, batch, *, seeds=None, sharpness: float = 1.0):
        score = sharpness * (self.network(None, batch.x)[:, 0] - self.at)
        return torch.stack([-score, score], 1)


class Broken(_Base):
    """Answers NaN."""

    def sample(self, seeds, *, condition=None):
        return torch.full((len(seeds), *self.shape), torch.nan)


class FakeConfig:
    def __init__(self, sections, seed=0, **extra):
        self.tree = {"name": "fake", "seed": seed, "data": {"name": "levels"}, "model": {"name": "fake"}, **extra}
        self.tree["train"] = {"steps": 12}
        self.tree |= {"sample": {}, "likelihood": {}, "predict": {}, "edit": {}} | sections
        self.protocols = ()

    @property
    def hash(self):
        return digest({k: v for k, v in self.tree.items() if k != "name"})

    def answer(self, section, overrides=None):
        unknown = set(overrides or {}) - set(self.tree[section])
        if unknown:
            raise ConfigError(f"{section}: unknown {unknown}")
        return overlay(self.tree[section], overrides or {})

    options = answer


class FakeRun:
    """The part of a run that the evaluator uses."""

    step, samples_seen = 12, 3400
    meta = {"commit": "abc", "dirty": False, "seconds": 1.5, "hardware": "a machine", "world_size": 1}  # noqa: RUF012

    def __init__(self, path: Path, model: Model, seed: int = 0, **sections: dict):
        self.path, self.name, self.model = path, path.name, model
        self.config = FakeConfig(sections, seed)

    def load(self, weights=None, device="cpu"):
        return self.model.to(device).eval()

    def facts(self):
        return {"shape": list(self.model.shape), "levels": LEVELS if self.model.shape == SHAPE else None}

    def weights_name(self, weights=None):
        return weights or "ema-0.999"

    def step_of(self, weights):
        return 6 if weights == "best" else self.step


class FakeProtocol(Protocol):
    """A protocol over a data set that is not registered."""

    def __init__(self, data: Dataset, metrics: list, **sections):
        tree = {"name": "fake", "version": 1, "dataset": "digits", "metrics": metrics, **sections}
        super().__init__(tree)
        self.dataset = data


def answers(dataset: Dataset, n: int, question: str, seed: int = 0) -> tuple[dict[str, Tensor], Batch | None]:
    """n plausible answers to a question as keyword arguments of Samples, and the items they answer."""
    g = generator("answers", seed)
    if question == "sample":
        noise = torch.randn(n, *dataset.shape, generator=g)
        return {"x": noise if dataset.levels is None else noise.abs().floor().clamp(max=dataset.levels - 1)}, None
    rows = torch.randint(0, dataset.size("test"), (n,), generator=g)
    batch = dataset.take("test", rows)
    if question == "edit":
        noise, target = torch.randn(2, n, *dataset.shape, generator=g), torch.randint(0, 2, (n,), generator=g)
        made = {"x": (batch.x + 4 * noise[0]).round().clamp(0, dataset.levels - 1)}
        made["reconstruction"] = batch.x + 0.1 * noise[1]
        made["condition"] = (batch.condition + 1 + target) % dataset.num_classes
        return made | {"stored": noise[1].flatten(1)[:, 0].abs().double()}, batch
    if question == "likelihood":
        return {"likelihood": torch.randn(n, generator=g, dtype=torch.float64) - 3}, batch
    shape = (n, 2) if batch.target.ndim == 1 else batch.target.shape
    return {"prediction": torch.randn(shape, generator=g)}, batch
