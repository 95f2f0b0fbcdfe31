"""What a checkpoint holds of a training run: weights, their averages, the best so far, the optimiser, the clock."""

import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.dataset import SPLITS, Dataset
from ..data.stream import Passes
from ..metrics.cost import inference_parameters, num_parameters
from ..model import Model
from ..registry import ConfigError
from ..rng import generator
from . import checkpoint
from .checkpoint import CheckpointError, Tensors
from .ema import WeightAverage
from .guard import check_weights
from .provenance import provenance
from .run import Run


class Best(NamedTuple):
    """The weights with the lowest validation loss so far: of the first average, or the raw ones if there is none."""

    step: int
    loss: float
    tensors: Tensors


class TrainingState:
    """Everything that goes on from step to step, made from a run or restored from it.

    Attributes:
        step: optimiser steps behind it.
        seconds: of training, with what `prepare` took, over all processes that took part one after another.
        averages: by label.
        best: None before the first validation.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        model: Model,
        optimizer: torch.optim.Optimizer | None,
        *,
        main: bool,
        world: int,
    ) -> None:
        self.run, self.dataset, self.model, self.optimizer = run, dataset, model, optimizer
        self.main, self.world = main, world
        self.settings = run.config.train
        self.averages: dict[str, WeightAverage] = {}
        self.step, self.seconds, self.best = 0, 0.0, None

    @cached_property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def prepare(self, origin: "Origin | None") -> list[str]:
        """Fit what is fitted from data, put the weights of an origin over it, and save it all as checkpoint 0.

        For one process; lines to tell.
        """
        config = self.run.config
        counts = {split: self.dataset.size(split) for split in SPLITS}
        data = {"name": config.tree["data"]["name"], "fingerprint": self.fingerprint, "items": counts}
        facts = {**provenance(), "config_hash": config.hash, "world_size": self.world, "data": data}
        self.run.record(**facts, **size(self.model))
        passes = Passes(self.dataset, self.settings.batch_size, self.model.device)
        began = time.monotonic()
        logs = self.model.prepare(passes, generator=generator(config.seed, "prepare"))
        self.seconds = time.monotonic() - began
        told = [f"prepared: {path}" for path in self.model.portray(self.run.path / "prepare")]
        told += [] if origin is None else [self._start_from(origin)]
        self.run.rewind(-1)
        if logs:
            values = {f"prepare/{name}": float(value) for name, value in logs.items()}
            self.run.log(0, samples=0, seconds=self.seconds, **values)
        self.averages = {rule.label: WeightAverage(rule, self.model) for rule in self.settings.ema}
        self.save()
        return told

    def _start_from(self, origin: "Origin") -> str:
        """Load what fits, record it, and say it."""
        found = checkpoint.load_matching(self.model, origin.tensors)
        self.run.record(init_from={**origin.facts, **found._asdict(), "loaded": len(found.loaded)})
        rest = [
            ("of another shape, fresh here", found.reshaped),
            ("only here, fresh", found.missing),
            ("only there, not used", found.unused),
        ]
        parts = [f"{len(found.loaded)} tensors loaded", *(f"{len(x)} {what}: {_some(x)}" for what, x in rest if x)]
        return f"started from {origin.facts['run']} ({origin.facts['weights']}): {'; '.join(parts)}"

    def restore(self) -> list[str]:
        """Load the newest sound checkpoint; lines to tell.

        Raises:
            CheckpointError: if there is none, or if it does not fit the model.
            ConfigError: if the data are not those that the run was trained on.
        """
        sets, state = self.run.restore()
        self._check_data(state["data"])
        checkpoint.load_weights(self.model, sets["model"], self.run.checkpoints)
        self.averages = {rule.label: WeightAverage(rule, self.model) for rule in self.settings.ema}
        for label, average in self.averages.items():
            average.load(sets[label])
        if self.optimizer is not None:
            checkpoint.load_optimizer(self.model, self.optimizer, sets["optimizer"])
        if state["best"] is not None:
            self.best = Best(state["best"]["step"], state["best"]["loss"], sets["best"])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.main:  # what a killed process did after its last checkpoint comes again
            self.run.rewind(self.step)
        told = [f"warning: {problem}" for problem in self.run.problems()]
        if state["world_size"] not in (None, self.world) and self.step:
            told.append(
                f"{self.world} process{'es go' if self.world > 1 else ' goes'} on where {state['world_size']} stopped: "
                "the data stay the same, the noise of the steps to come is another."
            )
        return told + self._check_rate(state["steps"])

    def _check_rate(self, planned: int | None) -> list[str]:
        """A warning if the steps behind would have had another learning rate in a run of the steps now asked for."""
        rule, steps = self.settings.learning_rate, self.settings.steps
        past = {0, self.step // 2, self.step - 1} if planned not in (None, steps) and self.step else ()
        if all(rule.factor(k, planned) == rule.factor(k, steps) for k in past):
            return []
        return [
            f"warning: the learning rate of '{rule.registered_name}' depends on the number of steps. It follows "
            f"{steps:,} steps from here on; the {self.step:,} behind followed {planned:,}."
        ]

    def _check_data(self, before: str | None) -> None:
        """Raises ConfigError if the data are others than before (None: not known)."""
        now = self.fingerprint
        if before in (None, now):
            return
        raise ConfigError(
            f"{self.run.path}: its data have changed since training began (fingerprint {before}, now {now}; "
            f"{self.dataset.size('train'):,} training items now, {self._items_before()}). Put the old data back, "
            f"or train on the new from these weights: name=… init_from={self.run.path}. Nothing was changed."
        )

    def _items_before(self) -> str:
        items = self.run.meta.get("data", {}).get("items", {}).get("train")
        same = " then as well" if items == self.dataset.size("train") else " then"
        return f"{items:,}{same}" if isinstance(items, int) else "an unknown number then"

    def consider(self, loss: float) -> bool:
        """Keep the weights that were just validated if their loss is the lowest so far; whether it is."""
        if not math.isfinite(loss) or (self.best is not None and loss >= self.best.loss):
            return False
        first = next(iter(self.averages.values()), None)
        tensors = self.model.state_dict() if first is None else first.tensors
        self.best = Best(self.step, loss, checkpoint.copies(tensors))
        return True

    def snapshot(self) -> None:
        """Keep the power-function averages for good, on the main process."""
        if self.main:
            self.run.snapshots.write(self.step, self.averages, self.run.header(self.dataset.facts()))

    def save(self) -> None:
        """Write a checkpoint of the state after `step` optimiser steps, on the main process."""
        check_weights(self.model, self.step)
        if not self.main:
            return
        sets: dict[str, Tensors] = {"model": self.model.state_dict()}
        sets |= {label: average.tensors for label, average in self.averages.items()}
        if self.best is not None:
            sets["best"] = self.best.tensors
        if self.optimizer is not None:
            sets["optimizer"] = checkpoint.optimizer_tensors(self.model, self.optimizer)
        state: dict[str, Any] = {
            "step": self.step,
            "samples": self.step * self.settings.batch_size,
            "seconds": round(self.seconds, 3),
            "steps": self.settings.steps,
            "world_size": self.world,
            "data": self.fingerprint,
            "best": None if self.best is None else {"step": self.best.step, "loss": self.best.loss},
        }
        self.run.save(sets, state, self.dataset.facts())


class Origin(NamedTuple):
    """The weights that a run starts from, and where they are from."""

    tensors: Tensors
    facts: dict[str, Any]

    @classmethod
    def of(cls, source: str, model: Model) -> "Origin":
        """What `init_from` means: `runs/x`, or `runs/x@best` for other weights than the default ones.

        Raises:
            ConfigError: if there is no such run, if it has no such weights, or if nothing of them fits the model.
        """
        path, _, weights = source.partition("@")
        try:
            run = Run.open(Path(path).expanduser())
            name = run.weights_name(weights or None)
        except (ConfigError, CheckpointError) as error:
            raise ConfigError(f"init_from: {error}") from None
        tensors, own = run.tensors(name), model.state_dict()
        if not any(key in own and own[key].shape == value.shape for key, value in tensors.items()):
            raise ConfigError(
                f"init_from: nothing of {run.path} ({name}) fits this model: no tensor has the same name and shape. "
                f"There: {_some(list(tensors))}; here: {_some(list(own))}."
            )
        facts = {"run": str(run.path), "weights": name, "step": run.step_of(name), "config_hash": run.config.hash}
        return cls(tensors, facts)


def size(model: Model) -> dict[str, int]:
    """Numbers of parameters, and the one at inference where it is another."""
    trained, folded = num_parameters(model), inference_parameters(model)
    return {
        "parameters": trained,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **({} if folded == trained else {"inference_parameters": folded}),
    }


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names) - most} more)" if len(names) > most else "")
