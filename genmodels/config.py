"""From YAML files and overrides to one resolved, hashed configuration.

Files are merged in order (each after the files of its `base:`), then command-line overrides; components are checked
against the registry and every default is filled in, so that the result says everything about a run.
"""

import copy
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from . import registry
from .data.dataset import Dataset, context
from .hashing import canonical, digest
from .model import Model
from .networks.network import check_charges
from .registry import ConfigError
from .schema import convert, near
from .training.ema import Average, PowerProfile
from .training.optim import Adam, Constant, LearningRate, Optimizer


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
        snapshot_every: steps between snapshots of the averages that are kept for good, from which any power-function
            average is put together after training; 0 for none.
        eval_items: validation items per evaluation of the loss.
        keep: how many checkpoints to keep (at least 2, so that a damaged one has a predecessor).
        max_hours: stop with a checkpoint after so many hours of one process; null for no limit.
        workers: processes that load data ahead of the training step; 0 loads between steps.
        compile: compile the networks (a loss that differentiates them twice cannot be).
        gradient_checkpointing: keep less of the forward pass and compute it again in the backward one.
        tensorboard: also write losses and samples to `<run>/tensorboard` (needs the extra `track`).
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
    snapshot_every: int = 0
    eval_items: int = 512
    keep: int = 2
    max_hours: float | None = None
    workers: int = 0
    compile: bool = False
    gradient_checkpointing: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        cadences = [(f"{what}_every", 0) for what in ("log", "sample", "eval", "save", "snapshot")]
        sizes = [("steps", 0), ("batch_size", 1), ("accumulate", 1), ("keep", 2), ("eval_items", 1), ("workers", 0)]
        for name, least in cadences + sizes:
            if getattr(self, name) < least:
                raise ConfigError(f"train.{name}: must be at least {least}, found {getattr(self, name)}.")
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"train.clip: must be above 0, or null for none, found {self.clip}.")
        if self.max_hours is not None and self.max_hours <= 0:
            raise ConfigError(f"train.max_hours: must be above 0, or null for no limit, found {self.max_hours}.")
        if self.snapshot_every and not any(isinstance(average, PowerProfile) for average in self.ema):
            raise ConfigError(
                "train.snapshot_every: snapshots are of power-function averages, and train.ema has none. Add two "
                "(train.ema=[{name: power, std: 0.05}, {name: power, std: 0.1}]), or set it to 0."
            )
        labels = [average.label for average in self.ema]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ConfigError(f"train.ema: two averages are called '{twice}' and would share a file. Change one value.")


@dataclass(frozen=True)
class Eval:
    """The `eval:` section: the protocols that `evals.evaluate` runs if none is named."""

    protocols: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sections:
    """The top level of a configuration file.

    Args:
        init_from: a run to start from instead of random weights, `runs/x` or `runs/x@<weights>`: what fits by name and
            shape is loaded, the rest starts afresh.
    """

    data: Dataset
    model: Model
    name: str = ""
    seed: int = 0
    init_from: str | None = None
    imports: tuple[str, ...] = ()
    train: Train = field(default_factory=Train)
    sample: dict[str, Any] = field(default_factory=dict)
    likelihood: dict[str, Any] = field(default_factory=dict)
    predict: dict[str, Any] = field(default_factory=dict)
    edit: dict[str, Any] = field(default_factory=dict)
    eval: Eval = field(default_factory=Eval)


Answer = Literal["sample", "likelihood", "predict", "edit"]
ANSWERS: tuple[str, ...] = get_args(Answer)  # sections that hold the keyword arguments of the model's method so named

# How a run is watched, kept and executed, not what it computes (but for rounding): free to change when it goes on.
FREE = frozenset(
    f"train.{key}"
    for key in (
        "log_every sample_every eval_every save_every snapshot_every eval_items keep max_hours workers compile "
        "gradient_checkpointing tensorboard"
    ).split()
) | {"eval.protocols"}
OUTSIDE = frozenset(("name", "edit"))  # of which the numbers of a run know nothing; results of edits carry their own

_ABSENT = object()


class Config:
    """A resolved configuration: `tree` is plain data; sections are read as typed objects.

    Args:
        tree: nested dictionaries and lists as in a configuration file, resolved or not.
    Raises:
        ConfigError: naming the first key that does not fit.
    """

    def __init__(self, tree: dict) -> None:
        import_code(tree)
        self.tree = registry.validate(Sections, tree, "")
        for section in ANSWERS:
            self.tree[section] = self.answer(section)
        self.train  # noqa: B018  (its own checks run now, not at the first step)

    @property
    def name(self) -> str:
        return self.tree["name"]

    @property
    def seed(self) -> int:
        return self.tree["seed"]

    @property
    def init_from(self) -> str | None:
        return self.tree["init_from"]

    @cached_property
    def train(self) -> Train:
        return Train(**registry.values(Train, self.tree["train"]))

    @property
    def protocols(self) -> tuple[str, ...]:
        return tuple(self.tree["eval"]["protocols"])

    def dataset(self) -> Dataset:
        """The dataset of the `data:` section."""
        return registry.build(Dataset, self.tree["data"])

    def model(self, facts: dict[str, Any]) -> Model:
        """A freshly initialised model for a data set's `facts()` (parameters come from torch's global generator)."""
        model = registry.build(Model, self.tree["model"], **context(facts))
        check_charges(model, model.collects)
        return model

    def options(self, section: Answer, overrides: dict | None = None) -> dict[str, Any]:
        """The keyword arguments of the model's method of that name, components built."""
        method = _method(self.tree, section)
        return registry.values(method, self.answer(section, overrides)) if method else {}

    def answer(self, section: Answer, overrides: dict | None = None) -> dict:
        """The section with overrides applied, resolved; ConfigError if a key does not fit or the method is missing."""
        node, method = overlay(self.tree[section], overrides or {}, section), _method(self.tree, section)
        if method is None and node:
            raise ConfigError(f"{section}: model '{self.tree['model']['name']}' has no such method to configure.")
        return registry.validate(method, node, section) if method else {}

    @cached_property
    def core(self) -> dict[str, Any]:
        """What decides the numbers of a run: everything but its name, how it edits, and what is free to change."""
        tree = {key: value for key, value in self.tree.items() if key not in OUTSIDE}
        for section, _, key in (path.partition(".") for path in FREE):
            tree[section] = {k: v for k, v in tree[section].items() if k != key}
        return tree

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of `core`."""
        return digest(self.core)

    def replace(self, overrides: dict) -> "Config":
        return Config(overlay(self.tree, overrides))

    def save(self, path: Path) -> None:
        """Write the resolved configuration as a file that loads to the same hash."""
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(self.tree)), encoding="utf-8")


def import_code(tree: dict) -> None:
    """Import the modules of `imports:`, which register components from outside genmodels."""
    for module in convert(tuple[str, ...], tree.get("imports") or (), "imports"):
        try:
            importlib.import_module(module)
        except Exception as error:
            absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
            hint = " Run from the folder that holds it, or add that folder to PYTHONPATH." if absent else ""
            raise ConfigError(f"imports: cannot import '{module}': {type(error).__name__}: {error}.{hint}") from error


def _method(tree: dict, section: Answer) -> Callable | None:
    return getattr(registry.member(Model, tree["model"]["name"], "model"), section, None)


def components_of(tree: dict) -> Iterator[tuple[type, type]]:
    """(kind, class) of every component that a configuration stands on, resolved; how it would edit is no part."""
    yield from registry.components(Sections, tree)
    for section in (section for section in ANSWERS if section not in OUTSIDE):
        if method := _method(tree, section):
            yield from registry.components(method, tree[section])


def overlay(old: Any, new: Any, where: str = "") -> Any:
    """`new` laid over `old`: mappings merge, list items are reached by index, and a node that changes its `name` is
    replaced whole, so that arguments of the old component do not leak into the new one."""
    if isinstance(old, (list, tuple)) and isinstance(new, dict) and new and all(str(i).isdigit() for i in new):
        given = {int(i): value for i, value in new.items()}
        if max(given) >= len(old):
            raise ConfigError(f"{where}[{max(given)}]: there are only {len(old)} items, counted from 0.")
        return [overlay(item, given[i], f"{where}[{i}]") if i in given else item for i, item in enumerate(old)]
    if where and isinstance(old, str) and isinstance(new, dict):
        old = {"name": old}  # a bare string is a node
    if where and isinstance(new, str) and isinstance(old, dict) and "name" in old:
        new = {"name": new}
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if where and "name" in new and new["name"] != old.get("name", new["name"]):
        return new
    merged = {k: overlay(old[k], v, f"{where}.{k}".lstrip(".")) if k in old else v for k, v in new.items()}
    return {**old, **merged}


def read(path: str | Path, seen: tuple[Path, ...] = ()) -> dict:
    """A YAML file merged over the files of its `base:` (paths relative to the file that names them)."""
    path = Path(path).resolve()
    if path in seen:
        raise ConfigError(f"base: {' -> '.join(map(str, (*seen, path)))} is a circle.")
    if not path.is_file():
        named = f" (named by {seen[-1]})" if seen else ""
        hint = near(path.name, (p.name for p in path.parent.glob("*.y*ml")))
        raise ConfigError(f"{path}: there is no such file{named}.{hint}")
    try:
        tree = copy.deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except Exception as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a mapping is needed at the top level, found {type(tree).__name__}.")
    merged: dict = {}
    base = tree.pop("base", None) or ()
    for parent in convert(tuple[str, ...], [base] if isinstance(base, str) else base, f"{path}: base"):
        merged = overlay(merged, read(path.parent / parent, (*seen, path)))
    return overlay(merged, tree)


@lru_cache(maxsize=512)
def _parsed(text: str) -> Any:
    """YAML as plain data; bases and the configuration of a run are read many times, and parsing takes milliseconds."""
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def dotlist(overrides: Iterable[str]) -> dict:
    """`["train.steps=500", "model.layers[0].bins=16"]` as a tree; list items are mappings of their index."""
    out: dict = {}
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"'{item}' is neither a configuration file nor an override key=value.")
        try:
            node = OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False)
        except (OmegaConfBaseException, ValueError, YAMLError) as error:
            raise ConfigError(f"override '{item}': {error}") from None
        out = overlay(out, node)
    return out


def load(files: str | Path | Iterable[str | Path], overrides: Iterable[str] = (), *, blank: bool = False) -> Config:
    """The configuration of some files and overrides, later ones over earlier ones; interpolations are resolved.

    Args:
        blank: let what a file leaves to the user ("???") be an empty text: to look at a configuration, not to train it.
    """
    files = [files] if isinstance(files, str | Path) else list(files)
    tree: dict = {}
    for path in files:
        tree = overlay(tree, read(path))
    tree = overlay(tree, dotlist(overrides))
    tree = _blanked(tree) if blank else tree
    tree = _interpolated(tree) if _interpolates(tree) else tree
    if not tree.get("name") and files:
        tree["name"] = "-".join((Path(files[-1]).resolve().parent.name, Path(files[-1]).stem))
    return Config(tree)


def _interpolates(tree: Any) -> bool:
    """Whether a text holds what looks like an interpolation; OmegaConf takes milliseconds for a tree without any."""
    if isinstance(tree, dict | list):
        return any(map(_interpolates, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, str) and "${" in tree


def _interpolated(tree: dict) -> dict:
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "configuration"
        raise ConfigError(f"{where}: {str(error).splitlines()[0]} (it must be in a file or an override)") from None


def _blanked(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _blanked(value) for key, value in tree.items()}
    return [_blanked(item) for item in tree] if isinstance(tree, list) else "" if tree == MISSING else tree


def diff(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `key: old -> new` where two trees differ; there are none exactly if their hashes agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys(), key=str)
        return [x for k in keys for x in diff(old.get(k, _ABSENT), new.get(k, _ABSENT), f"{path}.{k}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in diff(a, b, f"{path}[{i}]")]
    was, now = ("(absent)" if tree is _ABSENT else canonical(tree) for tree in (old, new))
    return [] if was == now else [f"{path}: {was} -> {now}"]
