"""A protocol: which data, which questions, which metrics; frozen in a YAML file and named by a hash."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from omegaconf import MISSING

from .. import registry
from ..config import import_code, overlay, read
from ..data.dataset import Dataset
from ..hashing import digest
from ..metrics.metric import Metric
from ..registry import ConfigError
from ..schema import near
from ..types import SupportsEdit

FOLDER = Path(__file__).resolve().parents[2] / "evals" / "protocols"
SUFFIXES = (".yaml", ".yml")


def _at_least(section: str, values: dict[str, int | None]) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{section}.{name}: must be at least 1, found {value}.")


@dataclass(frozen=True)
class Sampling:
    """The `sample:` section: what is drawn.

    Args:
        num_items: samples per block; block b has the seeds b·num_items … (b+1)·num_items - 1.
        blocks: independent sets of samples; with more than one, estimates are means over blocks.
        labels: what conditional models are given: "train-marginal" the condition of training items in a fixed random
            order, "test-items" that of test items in order; seed i takes item i mod N.
        batch_size: seeds per call.
    """

    num_items: int = 1000
    blocks: int = 1
    labels: Literal["train-marginal", "test-items"] = "train-marginal"
    batch_size: int = 256

    def __post_init__(self) -> None:
        _at_least("sample", {"num_items": self.num_items, "blocks": self.blocks, "batch_size": self.batch_size})


@dataclass(frozen=True)
class Scoring:
    """The `likelihood:` section: which items are scored.

    Args:
        split: of the protocol's data.
        num_items: the first so many; null for all.
        draws: passes with fresh randomness (dequantisation, probes), combined per item before anything else.
        combine: "mean" of log p, or the log of the mean of p ("importance"), a tighter bound for exact densities.
        batch_size: items per call.
    """

    split: Literal["train", "val", "test"] = "test"
    num_items: int | None = None
    draws: int = 1
    combine: Literal["mean", "importance"] = "mean"
    batch_size: int = 256

    def __post_init__(self) -> None:
        _at_least("likelihood", {"num_items": self.num_items, "draws": self.draws, "batch_size": self.batch_size})


@dataclass(frozen=True)
class Predicting:
    """The `predict:` section: which items are predicted.

    Args:
        split: of the protocol's data.
        num_items: the first so many; null for all.
        batch_size: items per call.
    """

    section: ClassVar[str] = "predict"
    split: Literal["train", "val", "test"] = "test"
    num_items: int | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        _at_least(self.section, {"num_items": self.num_items, "batch_size": self.batch_size})


@dataclass(frozen=True)
class Editing(Predicting):
    """The `edit:` section: which items are edited.

    Item i of class c is turned into one of class (c + 1 + i mod (K - 1)) mod K of K: of each pair about equally many.

    Arguments are those of `predict:`.
    """

    section: ClassVar[str] = "edit"


@dataclass(frozen=True)
class Sections:
    """The top level of a protocol file; the first estimate of the first metric ranks its leaderboard."""

    name: str
    version: int
    dataset: Dataset
    metrics: tuple[Metric, ...]
    description: str = ""
    imports: tuple[str, ...] = ()
    sample: Sampling = field(default_factory=Sampling)
    likelihood: Scoring = field(default_factory=Scoring)
    predict: Predicting = field(default_factory=Predicting)
    edit: Editing = field(default_factory=Editing)


class Protocol:
    """A resolved protocol.

    Attributes:
        tree: everything it says, with every default filled in, as plain data.
    Args:
        tree: nested dictionaries and lists as in a protocol file.
        places: where the data lie on this machine: arguments of the data set that it calls `local`. They are no part
            of the hash, which has the contents.
    Raises:
        ConfigError: naming the first key that does not fit.
    """

    def __init__(self, tree: dict, places: dict[str, Any] | None = None) -> None:
        import_code(tree)
        self.tree = registry.validate(Sections, _placed(tree, places or {}), "")
        if not self.tree["metrics"]:
            raise ConfigError("metrics: at least one is needed.")
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise ConfigError(f"name: a plain folder name is needed, found {self.name!r}.")
        self.sample, self.likelihood, self.predict, self.edit  # noqa: B018  (their own checks run now, not in the middle)

    @classmethod
    def load(cls, name: str | Path, places: dict[str, Any] | None = None) -> "Protocol":
        """The protocol of that name in evals/protocols, or of that file; `places` as in the constructor.

        Raises:
            ConfigError: if there is none, naming those that there are, or if a key does not fit, naming both.
        """
        tree, file = tree_of(name), Path(name).suffix in SUFFIXES
        try:
            found = cls(tree, places)
        except ConfigError as error:
            raise ConfigError(f"{error} (in the protocol {name})") from error.__cause__
        if not file and found.name != name:
            raise ConfigError(f"{FOLDER / name}.yaml: calls itself '{found.name}'; file name and `name:` must agree.")
        return found

    @property
    def name(self) -> str:
        return self.tree["name"]

    @property
    def version(self) -> int:
        return self.tree["version"]

    @cached_property
    def sample(self) -> Sampling:
        return Sampling(**self.tree["sample"])

    @cached_property
    def likelihood(self) -> Scoring:
        return Scoring(**self.tree["likelihood"])

    @cached_property
    def predict(self) -> Predicting:
        return Predicting(**self.tree["predict"])

    @cached_property
    def edit(self) -> Editing:
        return Editing(**self.tree["edit"])

    @cached_property
    def dataset(self) -> Dataset:
        """The data of the protocol, whatever the run was trained on."""
        return registry.build(Dataset, self.tree["dataset"])

    def metrics(self) -> list[Metric]:
        """Fresh metrics, in the order of the file."""
        return [registry.build(Metric, node) for node in self.tree["metrics"]]

    @cached_property
    def data_fingerprint(self) -> str:
        """12 hexadecimal digits that change with the data set's contents or splits."""
        return self.dataset.fingerprint()

    @cached_property
    def portable(self) -> dict[str, Any]:
        """`tree` without what only says where things lie on this machine, and without a question that is younger than
        published results and that no metric asks."""
        tree = registry.portable(Sections, self.tree)
        kinds = [registry.member(Metric, node["name"], "metrics") for node in self.tree["metrics"]]
        edits = any(SupportsEdit in kind.requires for kind in kinds)
        return tree if edits else {key: value for key, value in tree.items() if key != "edit"}

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of everything that decides a number: the file's contents (but its description),
        versions and fingerprints of the metrics, and the data. Results under different hashes never share a table."""
        facts = {key: value for key, value in self.portable.items() if key not in ("description", "imports")}
        parts = [[metric.version, metric.fingerprint] for metric in self.metrics()]
        return digest({"protocol": facts, "metrics": parts, "data": self.data_fingerprint})


def tree_of(name: str | Path) -> dict[str, Any]:
    """What the protocol file of a name, or that file, says; not checked yet.

    Raises:
        ConfigError: if there is none, naming those that there are.
    """
    if Path(name).suffix in SUFFIXES:
        return read(name)
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in known:
        raise ConfigError(
            f"no protocol is called '{name}'.{near(name, known)} Known: {', '.join(known) or 'none'} (in {FOLDER})."
        )
    return read(FOLDER / f"{name}.yaml")


def _placed(tree: dict, places: dict[str, Any]) -> dict:
    """The tree with the places of the data set filled in.

    Raises:
        ConfigError: if a place is no such argument of the data set, or if one is missing still.
    """
    node = tree.get("dataset")
    node = {"name": node} if isinstance(node, str) else node
    if not isinstance(node, dict) or "name" not in node:
        return tree
    cls = registry.member(Dataset, node["name"], "dataset")
    local = getattr(cls, "local", ())
    wrong = next((key for key in places if key not in local), None)
    if wrong is not None:
        known = ", ".join(local) or "none"
        raise ConfigError(f"--data {wrong}: '{node['name']}' has no such place. Its places: {known}.")
    node = overlay(copy.deepcopy(node), places)
    missing = [key for key in local if node.get(key) == MISSING]
    if missing:
        raise ConfigError(
            f"protocol '{tree.get('name')}': where are its data? Add --data {missing[0]}=<path>, or evaluate a run "
            f"that was trained on {node['name']}."
        )
    return {**tree, "dataset": node}
