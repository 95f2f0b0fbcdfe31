"""A run on disk: the only code that knows its layout.

runs/<name>/
  config.yaml    fully resolved; `python train.py runs/<name>/config.yaml` is the same run
  meta.json      hash, commit, versions, devices, parameters, times
  metrics.jsonl  one line per log: {"step", "samples", "seconds", "train/loss", "val/loss", …}
  log.txt        what the console said
  checkpoints/   see `checkpoint`
  samples/       grids by step
  eval/          results by protocol
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ..config import Config, canonical, diff
from ..model import Model
from ..networks.network import set_autocast
from ..registry import ConfigError
from . import checkpoint
from .checkpoint import CheckpointError, Tensors, write_text


class RunConflict(ConfigError):
    """A run of this name exists with another configuration."""


class Run:
    """A training run: `Run.create` to train, `Run.open` to use what was trained.

    Example: `model = Run.open("runs/try").load(); x = model.sample(16)`
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config

    @property
    def name(self) -> str:
        return self.path.name

    # ---- making and finding ----------------------------------------------------------------------------------------

    @classmethod
    def create(cls, config: Config, root: str | Path = "runs", *, fresh: bool = False) -> "Run":
        """The run of a configuration: a new folder, or the existing one if its configuration is the same.

        Args:
            fresh: set an existing run aside as `<name>.old-<k>` and start again.
        Raises:
            RunConflict: if the existing run has another configuration; nothing is touched.
            ConfigError: if the name is empty or no plain folder name.
        """
        if not config.name or Path(config.name).name != config.name or config.name.startswith("."):
            raise ConfigError(f"name: a plain folder name is needed, found {config.name!r}.")
        path = Path(root) / config.name
        if path.exists() and fresh:
            k = next(k for k in range(1, 10_000) if not path.with_name(f"{path.name}.old-{k}").exists())
            path.rename(path.with_name(f"{path.name}.old-{k}"))
        if (path / "config.yaml").exists():
            old = cls.open(path)
            if old.config.hash != config.hash:
                changes = "\n  ".join(diff(_unnamed(old.config.tree), _unnamed(config.tree)))
                raise RunConflict(
                    f"{path} exists with another configuration:\n  {changes}\n"
                    f"Choose another name (name={config.name}-2), or start again with --fresh (the old run is kept as "
                    f"{path}.old-1). Nothing was changed."
                )
            return old
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.tree)))
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """An existing run.

        Raises:
            ConfigError: if there is none at that path, naming the runs beside it.
        """
        path = Path(path)
        path = path.parent if path.name == "config.yaml" else path
        file = path / "config.yaml"
        if not file.is_file():
            near = sorted(p.parent.name for p in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
            raise ConfigError(f"{path} is no run (it has no config.yaml). Runs beside it: {', '.join(near) or 'none'}.")
        return cls(path, Config(OmegaConf.to_container(OmegaConf.load(file))))

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @cached_property
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
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            raise CheckpointError(
                f"{self.path} has no checkpoint yet. Train it: python train.py {self.path}/config.yaml"
            )
        folder, state, problems = found
        for problem in problems:
            warnings.warn(f"{problem} Falling back to step {state['step']}.", stacklevel=3)
        return folder, state

    def has_checkpoint(self) -> bool:
        return bool(checkpoint.steps_in(self.checkpoints))

    def save(self, sets: dict[str, Tensors], state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write a checkpoint; the header of each file is enough to rebuild the model."""
        header = {"config": canonical(self.config.tree), "facts": canonical(facts)}
        checkpoint.save(self.checkpoints, sets, state, header, self.config.train.keep)
        self.__dict__.pop("state", None)

    def restore(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Every set of tensors of the newest sound checkpoint, and its state; log lines after it are cut.

        Raises:
            CheckpointError: if there is none, or if all are damaged.
        """
        folder, state = self._newest()
        sets = {p.stem: checkpoint.read_tensors(p)[0] for p in sorted(folder.glob("*.safetensors"))}
        return sets, state

    def weights_names(self) -> list[str]:
        """`model` and the averages that the newest checkpoint holds."""
        folder, _ = self._newest()
        return sorted(p.stem for p in folder.glob("*.safetensors") if p.stem != "optimizer")

    def weights_name(self, weights: str | None = None) -> str:
        """The weights meant by a name; None means the first configured average, or the raw weights if there is none.

        Raises:
            ConfigError: if the run has no weights of that name.
        """
        averages = [average.label for average in self.config.train.ema]
        chosen = weights or (averages[0] if averages else "model")
        if chosen not in self.weights_names():
            raise ConfigError(f"{self.path} has no weights '{chosen}'. It has: {', '.join(self.weights_names())}.")
        return chosen

    def load(self, weights: str | None = None, device: torch.device | str = "cpu") -> Model:
        """The trained model in eval mode, at the newest sound checkpoint.

        Args:
            weights: "model", "ema-0.999", …; None for the first average if there is one.
        """
        folder, _ = self._newest()
        tensors, header = checkpoint.read_tensors(folder / f"{self.weights_name(weights)}.safetensors")
        with torch.random.fork_rng():  # the fresh parameters are overwritten; the caller's random state is not theirs
            model = self.config.model(json.loads(header["facts"]))
        model.load_state_dict(tensors)
        set_autocast(model, torch.bfloat16 if self.config.train.precision == "bf16" else None)
        return model.to(device).eval()

    # ---- what is said ----------------------------------------------------------------------------------------------

    @property
    def meta(self) -> dict[str, Any]:
        path = self.path / "meta.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def record(self, **facts: Any) -> None:
        """Add facts to meta.json."""
        write_text(self.path / "meta.json", json.dumps({**self.meta, **facts}, indent=1) + "\n")

    def log(self, step: int, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a line that a crash cut short is left out."""
        path = self.path / "metrics.jsonl"
        lines = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines

    def rewind(self, step: int) -> None:
        """Cut metrics.jsonl after a step, so that a resumed run logs no step twice."""
        lines = self.metrics()
        if lines:
            kept = [json.dumps(line) for line in lines if line["step"] <= step]
            write_text(self.path / "metrics.jsonl", "".join(line + "\n" for line in kept))

    def folder(self, name: str) -> Path:
        """A folder of the run, made if missing."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def _unnamed(tree: dict) -> dict:
    return {key: value for key, value in tree.items() if key != "name"}


def provenance() -> dict[str, Any]:
    """Commit and state of the source tree, versions, machine and command of this process."""
    source = Path(__file__).parent
    commit = _git(source, "rev-parse", "HEAD")
    changes = _git(source, "status", "--porcelain") if commit else None
    packages = {name: _version(name) for name in ("torch", "numpy", "accelerate", "omegaconf", "safetensors")}
    return {
        "commit": commit,
        "dirty": bool(changes) if changes is not None else None,
        "diff": hashlib.sha256((_git(source, "diff", "HEAD") or "").encode()).hexdigest()[:12] if changes else None,
        "versions": {"python": platform.python_version(), **packages},
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
        "argv": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if _has_git() else None
    return done.stdout.strip() if done is not None and done.returncode == 0 else None


def _has_git() -> bool:
    return any((Path(p) / "git").exists() for p in os.environ.get("PATH", "").split(os.pathsep))


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
