"""From YAML files and overrides to one resolved, hashed configuration.

Files are merged in order (each after the files of its `base:`), then command-line overrides; components are checked
against the registry and every default is filled in, so that the result says everything about a run.
"""

import dataclasses
import difflib
import hashlib
import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import registry
from .data.dataset import Dataset
from .model import Model
from .registry import ConfigError
from .training.ema import Average
from .training.optim import Adam, Constant, LearningRate, Optimizer
from .types import SupportsLogProb, SupportsPredict, SupportsSample


@dataclass(frozen=True)
class Train:
    """The `train:` section.

    Args:
        steps: optimiser steps; 0 for a model that is fitted wholly in `prepare`.
        batch_size: items per step over all processes.
        accumulate: micro-batches per step (batch_size must be divisible by processes times this).
        learning_rate: factor on the optimiser's lr as a function of the step.
        clip: largest gradient norm; null for none.
        precision: bf16 autocasts the network calls and nothing else.
        ema: averages of the weights to keep beside them.
        log_every, sample_every, eval_every, save_every: cadences in steps; 0 for never.
        eval_items: validation items per evaluation of the loss.
        keep: how many checkpoints to keep (at least 2, so that a damaged one has a predecessor).
    """

    steps: int = 10_000
    batch_size: int = 128
    accumulate: int = 1
    optimizer: Optimizer = Adam()
    learning_rate: LearningRate = Constant()
    clip: float | None = 1.0
    precision: Literal["float32", "bf16"] = "float32"
    ema: tuple[Average, ...] = ()
    log_every: int = 100
    sample_every: int = 0
    eval_every: int = 0
    save_every: int = 1000
    eval_items: int = 512
    keep: int = 2

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("accumulate", 1), ("keep", 2), ("eval_items", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"train.{name}: must be at least {least}, found {getattr(self, name)}.")


@dataclass(frozen=True)
class Eval:
    """The `eval:` section: the protocols that `evals.evaluate` runs if none is named."""

    protocols: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sections:
    """The top level of a configuration file."""

    data: Dataset
    model: Model
    name: str = ""
    seed: int = 0
    imports: tuple[str, ...] = ()
    train: Train = field(default_factory=Train)
    sample: dict[str, Any] = field(default_factory=dict)
    likelihood: dict[str, Any] = field(default_factory=dict)
    predict: dict[str, Any] = field(default_factory=dict)
    eval: Eval = field(default_factory=Eval)


ANSWERS = {"sample": SupportsSample, "likelihood": SupportsLogProb, "predict": SupportsPredict}


class Config:
    """A resolved configuration: `tree` is plain data; sections are read as typed objects.

    Args:
        tree: nested dictionaries and lists as in a configuration file, resolved or not.
    Raises:
        ConfigError: naming the first key that does not fit.
    """

    def __init__(self, tree: dict) -> None:
        for module in tree.get("imports") or ():
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ConfigError(f"imports: cannot import '{module}': {error}.") from error
        self.tree = registry.validate(Sections, tree, "")
        model = registry.member(Model, self.tree["model"]["name"], "model")
        for section, capability in ANSWERS.items():
            method = getattr(model, section, None)
            if method is None and self.tree[section]:
                raise ConfigError(
                    f"{section}: {model.__name__} has no method `{section}`, so there is nothing to configure."
                )
            if method is not None and issubclass(model, capability):
                self.tree[section] = registry.validate(method, self.tree[section], section)
        self.train  # noqa: B018  (its own checks run now, not at the first step)

    @property
    def name(self) -> str:
        return self.tree["name"]

    @property
    def seed(self) -> int:
        return self.tree["seed"]

    @cached_property
    def train(self) -> Train:
        return Train(**registry.values(Train, self.tree["train"]))

    @property
    def protocols(self) -> tuple[str, ...]:
        return tuple(self.tree["eval"]["protocols"])

    def dataset(self) -> Dataset:
        """The dataset of the `data:` section."""
        return registry.build(Dataset, self.tree["data"])

    def model(self, dataset: Dataset) -> Model:
        """A freshly initialised model for a dataset (parameters come from torch's global generator)."""
        return registry.build(Model, self.tree["model"], **dataset.context())

    def options(
        self, section: Literal["sample", "likelihood", "predict"], overrides: dict | None = None
    ) -> dict[str, Any]:
        """The keyword arguments of the model's method of that name, components built."""
        node = self.answer(section, overrides)
        method = getattr(registry.member(Model, self.tree["model"]["name"], "model"), section, None)
        return registry.values(method, node) if method is not None else {}

    def answer(self, section: Literal["sample", "likelihood", "predict"], overrides: dict | None = None) -> dict:
        """The section with overrides applied, resolved."""
        method = getattr(registry.member(Model, self.tree["model"]["name"], "model"), section, None)
        return (
            registry.validate(method, overlay(self.tree[section], overrides or {}, (section,)), section)
            if method
            else {}
        )

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of everything but the run's name."""
        return digest({key: value for key, value in self.tree.items() if key != "name"})

    def replace(self, overrides: dict) -> "Config":
        return Config(overlay(self.tree, overrides))

    def save(self, path: Path) -> None:
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(self.tree)))


def canonical(tree: Any) -> str:
    """JSON with sorted keys, no spaces and shortest float form: equal trees give equal text."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(tree: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(tree).encode()).hexdigest()[:12]


def overlay(old: Any, new: Any, path: tuple = ()) -> Any:
    """`new` laid over `old`: mappings merge, list items are reached by index, and a node that changes its `name` is
    replaced whole, so that arguments of the old component do not leak into the new one."""
    if isinstance(old, (list, tuple)) and isinstance(new, dict) and new and all(str(i).isdigit() for i in new):
        bad = [i for i in new if int(i) >= len(old)]
        if bad:
            raise ConfigError(f"{'.'.join(map(str, path))}[{bad[0]}]: the list has only {len(old)} items.")
        merged = {int(i): value for i, value in new.items()}
        return [overlay(item, merged[i], (*path, i)) if i in merged else item for i, item in enumerate(old)]
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if path and "name" in new and new["name"] != old.get("name", new["name"]):
        return new
    return {**old, **{k: overlay(old[k], v, (*path, k)) if k in old else v for k, v in new.items()}}


def read(path: str | Path, seen: tuple[Path, ...] = ()) -> dict:
    """A YAML file merged over the files of its `base:` (paths relative to the file that names them)."""
    path = Path(path).resolve()
    if path in seen:
        raise ConfigError(f"base: {' -> '.join(map(str, (*seen, path)))} is a circle.")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.4)
        named = f" (named by {seen[-1]})" if seen else ""
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: there is no such file{named}.{hint}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a mapping is needed at the top level, found {type(tree).__name__}.")
    merged: dict = {}
    for parent in tree.pop("base", None) or ():
        merged = overlay(merged, read(path.parent / parent, (*seen, path)))
    return overlay(merged, tree)


def dotlist(overrides: Iterable[str]) -> dict:
    """`["train.steps=500", "model.layers[0].bins=16"]` as a tree; list items are mappings of their index."""
    out: dict = {}
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"'{item}' is neither a configuration file nor an override key=value.")
        try:
            node = OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False)
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"override '{item}': {error}") from None
        out = overlay(out, node)
    return out


def load(files: Iterable[str | Path], overrides: Iterable[str] = ()) -> Config:
    """The configuration of some files and overrides, later ones over earlier ones; interpolations are resolved."""
    files = list(files)
    tree: dict = {}
    for path in files:
        tree = overlay(tree, read(path))
    tree = overlay(tree, dotlist(overrides))
    try:
        tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    if not tree.get("name") and files:
        tree["name"] = "-".join((Path(files[-1]).parent.name, Path(files[-1]).stem))
    return Config(tree)


def diff(old: dict, new: dict, path: str = "") -> list[str]:
    """Lines `key: old -> new` where two trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in diff(old.get(k), new.get(k), f"{path}.{k}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in diff(a, b, f"{path}[{i}]")]
    return [] if old == new else [f"{path}: {canonical(old)} -> {canonical(new)}"]


def section_names() -> list[str]:
    """The keys of the top level, for `--describe`."""
    return [f.name for f in dataclasses.fields(Sections)]
