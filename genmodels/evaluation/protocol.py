"""A protocol: which data, which questions, which metrics; frozen in a YAML file and named by a hash."""

import difflib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from .. import registry
from ..config import read
from ..data.dataset import Dataset
from ..hashing import digest
from ..metrics.metric import Metric
from ..registry import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / "evals" / "protocols"


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
        draws: passes with fresh randomness (dequantisation, probes), averaged per item before anything else.
        batch_size: items per call.
    """

    split: Literal["train", "val", "test"] = "test"
    num_items: int | None = None
    draws: int = 1
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

    split: Literal["train", "val", "test"] = "test"
    num_items: int | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        _at_least("predict", {"num_items": self.num_items, "batch_size": self.batch_size})


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


class Protocol:
    """A resolved protocol.

    Attributes:
        tree: everything it says, with every default filled in, as plain data.
    Args:
        tree: nested dictionaries and lists as in a protocol file.
    Raises:
        ConfigError: naming the first key that does not fit.
    """

    def __init__(self, tree: dict) -> None:
        registry_imports(tree)
        self.tree = registry.validate(Sections, tree, "")
        if not self.tree["metrics"]:
            raise ConfigError("metrics: at least one is needed.")
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise ConfigError(f"name: a plain folder name is needed, found {self.name!r}.")
        self.sample, self.likelihood, self.predict  # noqa: B018  (their own checks run now, not in the middle)

    @classmethod
    def load(cls, name: str | Path) -> "Protocol":
        """The protocol of that name in evals/protocols, or of that file.

        Raises:
            ConfigError: if there is none, naming those that there are.
        """
        if Path(name).suffix in (".yaml", ".yml"):
            return cls(read(name))
        known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ConfigError(
                f"no protocol is called '{name}'.{hint} Known: {', '.join(known) or 'none'} (in {FOLDER})."
            )
        found = cls(read(FOLDER / f"{name}.yaml"))
        if found.name != name:
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
    def hash(self) -> str:
        """12 hexadecimal digits of everything that decides a number: the file's contents (but its description),
        versions and fingerprints of the metrics, and the data. Results under different hashes never share a table."""
        facts = {key: value for key, value in self.tree.items() if key not in ("description", "imports")}
        parts = [[metric.version, metric.fingerprint] for metric in self.metrics()]
        return digest({"protocol": facts, "metrics": parts, "data": self.data_fingerprint})


def registry_imports(tree: dict) -> None:
    """Register the outside code that `imports:` names."""
    import importlib

    for module in tree.get("imports") or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"imports: cannot import '{module}': {error}.") from error
