"""A run on disk: the only code that knows its layout.

runs/<name>/
  config.yaml    fully resolved; `python train.py runs/<name>/config.yaml` is the same run
  meta.json      hash, commit, versions, devices, parameters, times
  metrics.jsonl  one line per log: {"step", "samples", "seconds", "train/loss", "val/loss", …}
  log.txt        what the console said
  checkpoints/   see `checkpoint`; the format of their state is that of the run
  snapshots/     averages of the weights by step, see `posthoc`
  samples/       grids by step
  eval/          results by protocol
"""

import fcntl
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ..config import Config, diff, read
from ..data.dataset import Dataset
from ..data.external import External
from ..files import write_text
from ..hashing import canonical
from ..model import Model
from ..networks.network import set_autocast
from ..registry import ConfigError
from . import checkpoint, posthoc
from .checkpoint import CheckpointError, Tensors
from .disk import writing
from .ema import PowerProfile
from .posthoc import Snapshots


class RunConflict(ConfigError):
    """A run of this name exists with another configuration."""


class CheckpointWarning(UserWarning):
    """A newer checkpoint is damaged, and an older one is used."""


class Run:
    """A training run: `Run.create` to train, `Run.open` to use what was trained.

    Example: `model = Run.open("runs/try").load(); x = model.sample(16)`
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self._verified: tuple[Path, dict[str, Any], list[str]] | None = None
        self._seen: list[int] = []  # the newest step on disk when it was verified: another process may train this run
        self._warned = False

    @property
    def name(self) -> str:
        return self.path.name

    # ---- making and finding ----------------------------------------------------------------------------------------

    @classmethod
    def check(cls, config: Config, root: str | Path = "runs", *, fresh: bool = False) -> "Run | None":
        """The existing run that would go on under a configuration, None if there is none; changes nothing.

        The configurations must agree but for their name, what is free to change (`config.FREE`), and the number of
        steps, which may be any that the run has not passed.

        Raises:
            RunConflict: if the existing run has another configuration, or is beyond its last step.
            ConfigError: if the name is no plain folder name, or if there is something else in its place.
        """
        if not config.name or Path(config.name).name != config.name or config.name.startswith("."):
            raise ConfigError(f"name: a plain folder name is needed, found {config.name!r}.")
        path = Path(root) / config.name
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file where the run needs a folder. Choose another name (name=…).")
        if fresh or not path.exists():
            return None
        if not (path / "config.yaml").exists():
            found = sorted(p.name for p in path.iterdir() if not p.name.startswith(".config.yaml."))
            if found:
                shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
                raise ConfigError(
                    f"{path} is no run (it has no config.yaml) but holds {shown}. Choose another name (name=…), or set "
                    "that folder aside with --fresh. Nothing was changed."
                )
            return None
        old = cls.open(path)
        changes = diff(old.config.core, config.core)
        steps = [change for change in changes if change.startswith("train.steps:")]
        written = [s for s in checkpoint.steps_in(old.checkpoints) if (old.folder_of(s) / "state.json").is_file()]
        reached = max(written, default=0)
        if changes == steps and (not steps or config.train.steps >= reached):
            return cls(path, config)
        free, aside = _next(path, "-", 2).name, _next(path, ".old-", 1)
        listed, late = "\n  ".join(changes), f" The run is at step {reached:,} already." if changes == steps else ""
        raise RunConflict(
            f"{path} exists with another configuration:\n  {listed}\n{late[1:]}{late and ' '}"
            f"Choose another name (name={free}), or start again with --fresh (the old run is kept as {aside}). "
            "Nothing was changed."
        )

    @classmethod
    def create(cls, config: Config, root: str | Path = "runs", *, fresh: bool = False) -> "Run":
        """The run of a configuration: a new folder, or the existing one that can go on under it (see `adopt`).

        Args:
            fresh: set an existing run aside as `<name>.old-<k>` and start again.
        Raises:
            RunConflict, ConfigError: what `check` raises, or if the folder cannot be written, or if the run that would
                be set aside is being trained; nothing is touched then.
        """
        existing = cls.check(config, root, fresh=fresh)
        if existing is not None:
            return existing
        path = Path(root) / config.name
        with writing(f"{path} cannot be made", "Choose another folder with --root, or make that one writable."):
            if path.exists() and fresh:
                with cls(path, config).locked():
                    path.rename(_next(path, ".old-", 1))
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config)
            run._write_config()
        return run

    def adopt(self) -> list[str]:
        """Put this object's configuration in the place of the one on disk, and heed it; lines on what changed.

        For the process that holds the lock, once the run is restored.
        """
        checkpoint.prune(self.checkpoints, self.config.train.keep, self._verify()[1]["step"])
        changes = diff(_unnamed(read(self.path / "config.yaml")), _unnamed(self.config.tree))
        if changes:
            self._write_config()
        return changes

    def _write_config(self) -> None:
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.config.tree)))

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """An existing run.

        Raises:
            ConfigError: if there is none at that path, naming the runs beside it, or if its configuration is unusable.
        """
        path = Path(path)
        path = path.parent if path.name == "config.yaml" else path
        file = path / "config.yaml"
        if not file.is_file():
            near = sorted(p.parent.name for p in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
            raise ConfigError(f"{path} is no run (it has no config.yaml). Runs beside it: {', '.join(near) or 'none'}.")
        tree = read(file)
        try:
            return cls(path, Config(tree))
        except ConfigError as error:
            newer = " If a newer version of genmodels wrote this run, upgrade." if "Key '" in str(error) else ""
            raise ConfigError(f"{file}: {error}{newer}") from error

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def folder_of(self, step: int) -> Path:
        return checkpoint.folder_of(self.checkpoints, step)

    @property
    def state(self) -> dict[str, Any]:
        """Step, samples seen and seconds of the newest sound checkpoint."""
        return self._newest()[1]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def samples_seen(self) -> int:
        return self.state["samples"]

    def _newest(self) -> tuple[Path, dict[str, Any]]:
        """Folder and state of the newest sound checkpoint; a CheckpointWarning once if a newer one is damaged."""
        verified = self._verify()
        for problem in self.problems() if not self._warned else ():
            warnings.warn(problem, CheckpointWarning, stacklevel=3)
        self._warned = True
        return verified

    def _verify(self) -> tuple[Path, dict[str, Any]]:
        """The same in silence; files are read and compared with their checksums once."""
        newest = checkpoint.steps_in(self.checkpoints)[-1:]
        if self._verified is None or newest != self._seen:
            self._verified, self._seen, self._warned = checkpoint.newest(self.checkpoints), newest, False
        if self._verified is None:
            raise CheckpointError(
                f"{self.path} has no checkpoint yet. Train it: python train.py {self.path}/config.yaml"
            )
        return self._verified[:2]

    def problems(self) -> list[str]:
        """What is wrong with checkpoints that are newer than the one in use, and which that is."""
        _, state, problems = self._verified or (None, {}, [])
        return [f"{problem} The checkpoint of step {state['step']:,} is used instead." for problem in problems]

    def saved(self) -> str:
        """A sentence on the newest checkpoint."""
        steps = checkpoint.steps_in(self.checkpoints)
        if not steps:
            return f"Nothing is saved yet in {self.path}."
        return f"Step {steps[-1]:,} is saved in {checkpoint.folder_of(self.checkpoints, steps[-1])}."

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second training of this run out while the block runs; the lock goes with the process.

        Raises:
            ConfigError: if another process is training it, or if the folder cannot be written.
        """
        with writing(f"{self.path} is read-only", "Make it writable, or train elsewhere (--root, name=…)."):
            file = (self.path / ".lock").open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.path} is being trained by another process. Wait for it, or choose another name (name=…)."
                ) from None
            for leftover in self.path.glob(".*.????????"):  # of a process that was killed while it replaced a file
                leftover.unlink(missing_ok=True)
            yield

    def has_checkpoint(self) -> bool:
        return bool(checkpoint.steps_in(self.checkpoints))

    @property
    def snapshots(self) -> Snapshots:
        return Snapshots(self.path / "snapshots")

    def header(self, facts: dict[str, Any]) -> dict[str, str]:
        """What every file of weights says of itself: enough to rebuild the model."""
        return {"config": canonical(self.config.tree), "facts": canonical(facts)}

    def save(self, sets: dict[str, Tensors], state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write a checkpoint."""
        checkpoint.save(self.checkpoints, sets, state, self.header(facts), self.config.train.keep)
        self._verified = None

    def restore(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Every set of tensors of the newest sound checkpoint, and its state; `problems` says if that is not the last.

        Raises:
            CheckpointError: if there is none, or if all are damaged.
        """
        folder, state = self._verify()
        return {p.stem: checkpoint.read_tensors(p)[0] for p in _tensor_files(folder, state)}, state

    def weights_names(self) -> list[str]:
        """`model`, the averages, and `best` if there was validation: what the newest checkpoint holds."""
        return [p.stem for p in _tensor_files(*self._newest()) if p.stem != "optimizer"]

    def weights_name(self, weights: str | None = None) -> str:
        """The weights meant by a name; None means the first configured average, or the raw weights if there is none.

        Raises:
            ConfigError: if the run has no weights of that name, and none from which they can be put together.
        """
        averages = [average.label for average in self.config.train.ema]
        chosen = weights or (averages[0] if averages else "model")
        if chosen in self.weights_names():
            return chosen
        profile = PowerProfile.of_label(chosen)
        if profile is not None and self.snapshots.listed():
            return profile.label
        hint = "" if profile is None else f" Others can be combined from snapshots. {posthoc.HOW_TO_TRACK}"
        raise ConfigError(f"{self.path} has no weights '{chosen}'. It has: {', '.join(self.weights_names())}.{hint}")

    def step_of(self, weights: str) -> int:
        """The step after which weights of that name were taken."""
        return self.state["best"]["step"] if weights == "best" else self.step

    def tensors(self, weights: str | None = None) -> Tensors:
        """The tensors of some weights, at the newest sound checkpoint; see `load`."""
        name = self.weights_name(weights)
        folder = self._newest()[0]
        if name in self.weights_names():
            return checkpoint.read_tensors(folder / f"{name}.safetensors")[0]
        rules = [rule for rule in self.config.train.ema if isinstance(rule, PowerProfile)]
        also = [(rule.std, self.step, folder / f"{rule.label}.safetensors") for rule in rules]
        return self.snapshots.reconstruct(PowerProfile.of_label(name).std, self.step, also if self.step else ())[0]

    def dataset(self) -> Dataset:
        """The configured data set; of data that were given from Python what the run knows of them, without items."""
        if self.config.tree["data"]["name"] != External.registered_name:
            return self.config.dataset()
        return External.known_by(self.facts())

    def facts(self) -> dict[str, Any]:
        """Of the data that the newest checkpoint was trained on."""
        return json.loads(checkpoint.read_header(self._newest()[0] / "model.safetensors")["facts"])

    def load(self, weights: str | None = None, device: torch.device | str = "cpu") -> Model:
        """The trained model in eval mode with frozen parameters, at the newest sound checkpoint.

        Args:
            weights: "model", "ema-0.999", "best" (lowest validation loss), …; None for the first average if there is
                one. "ema-<std>" of a power-function average that was not kept is put together from snapshots.
        """
        tensors, path = self.tensors(weights), self._newest()[0] / "model.safetensors"
        with torch.random.fork_rng(devices=[]):  # fresh parameters, overwritten below, leave the caller's state alone
            model = self.config.model(self.facts())
        checkpoint.load_weights(model, tensors, path)
        set_autocast(model, torch.bfloat16 if self.config.train.precision == "bf16" else None)
        return model.to(device).eval().requires_grad_(False)

    # ---- what is said ----------------------------------------------------------------------------------------------

    @property
    def meta(self) -> dict[str, Any]:
        """What meta.json says; nothing if it is missing or unreadable."""
        try:
            found = json.loads((self.path / "meta.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def record(self, **facts: Any) -> None:
        """Add facts to meta.json."""
        write_text(self.path / "meta.json", json.dumps({**self.meta, **facts}, indent=1) + "\n")

    def log(self, step: int, **values: Any) -> None:
        """Append a line to metrics.jsonl; numbers that are not finite become null, which is what JSON has for them."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a line that a crash cut short is left out."""
        path = self.path / "metrics.jsonl"
        lines = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and isinstance(found.get("step"), int):
                lines.append(found)
        return lines

    def rewind(self, step: int) -> None:
        """Forget what came after a step, so that a resumed run logs and keeps nothing twice: lines of metrics.jsonl
        (those that a crash cut short as well) and snapshots."""
        path = self.path / "metrics.jsonl"
        kept = "".join(json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step)
        if path.exists() and path.read_bytes() != kept.encode():
            write_text(path, kept)
        self.snapshots.rewind(step)

    def folder(self, name: str) -> Path:
        """A folder of the run, made if missing."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def _tensor_files(folder: Path, state: dict[str, Any]) -> list[Path]:
    """The tensor files that were written with a checkpoint; anything else in its folder was never verified."""
    return [folder / name for name in sorted(state["files"]) if name.endswith(".safetensors")]


def _next(path: Path, separator: str, first: int) -> Path:
    """The first path `<path><separator><k>`, k = first, first + 1, …, that is free."""
    return next(p for k in count(first) if not (p := path.with_name(f"{path.name}{separator}{k}")).exists())


def _unnamed(tree: dict) -> dict:
    return {key: value for key, value in tree.items() if key != "name"}
