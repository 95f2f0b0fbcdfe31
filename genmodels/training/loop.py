"""The training loop: one function that is short enough to edit.

Data order and randomness are functions of (seed, step), so that a run which was interrupted continues as if it had not been.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..data.dataset import Dataset
from ..data.stream import indices, share, stream
from ..model import Model
from ..networks.network import set_autocast
from ..rng import fold, generator
from ..sampling import default_seeds, draw, request, write_picture
from ..types import Batch, SupportsSample
from . import checkpoint
from .console import Console, count, duration
from .ema import WeightAverage, evaluating
from .run import Run, provenance

BAD_STEPS = 20


class TrainingFailed(RuntimeError):
    """Training stopped because its numbers were not finite."""


def train(
    config: Config,
    *,
    root: str | Path = "runs",
    fresh: bool = False,
    dataset: Dataset | None = None,
    quiet: bool = False,
) -> Run:
    """Train a configuration, or continue the run of its name.

    Args:
        root: folder of runs.
        fresh: set an existing run of that name aside and start again.
        dataset: used instead of the configured one, whose facts it must share.
        quiet: say nothing on the console.
    Raises:
        RunConflict: if a run of that name has another configuration; nothing is touched.
        ConfigError: if the batch does not divide over processes, or exceeds the data.
        TrainingFailed: after 20 steps in a row whose loss or gradient was not finite; the last checkpoint is kept.
    """
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs

    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[AutocastKwargs(enabled=False)])
    dataset = config.dataset() if dataset is None else dataset
    _check_batch(config, accelerator.num_processes, dataset)
    with torch.random.fork_rng():  # the caller's random state is not the run's
        torch.manual_seed(fold(config.seed, "init"))
        model = config.model(dataset.facts())
        if accelerator.is_main_process:
            Run.create(config, root, fresh=fresh)
        accelerator.wait_for_everyone()
        trainer = Trainer(accelerator, Run.create(config, root), dataset, model, quiet)
        try:
            trainer.run_all()
        finally:
            trainer.console.close()
    return trainer.run


def _check_batch(config: Config, world: int, dataset: Dataset) -> None:
    rows = indices(config.seed, 0, config.train.batch_size, dataset.size("train")) if config.train.steps else None
    if rows is not None:
        share(rows, 0, world, 0, config.train.accumulate)


@dataclass
class Tally:
    """Sums since the last log line; they stay on the device, so that no step waits for the console."""

    loss: list[Tensor] = field(default_factory=list)
    logs: dict[str, list[Tensor]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    items: int = 0

    def add(self, loss: Tensor, logs: dict[str, Tensor], items: int) -> None:
        self.loss.append(loss)
        for name, value in logs.items():
            self.logs.setdefault(name, []).append(value.detach().double())
        self.items += items


class Trainer:
    """The state of one training process."""

    def __init__(self, accelerator: Any, run: Run, dataset: Dataset, model: Model, quiet: bool) -> None:
        self.accelerator, self.run, self.dataset = accelerator, run, dataset
        self.config, self.settings = run.config, run.config.train
        self.seed, self.rank, self.world = self.config.seed, accelerator.process_index, accelerator.num_processes
        self.model = model.to(accelerator.device)
        set_autocast(model, torch.bfloat16 if self.settings.precision == "bf16" else None)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self.settings.optimizer.over(self.parameters) if self.parameters else None
        self.averages = {rule.label: WeightAverage(rule, model) for rule in self.settings.ema}
        self.main = accelerator.is_main_process
        self.seconds, self.bad_steps = 0.0, 0
        self.start = self._begin()
        # Replicas are wrapped after the weights are loaded; a model without parameters has nothing to synchronise.
        self.wrapped = accelerator.prepare_model(self.model) if self.parameters else self.model
        log = run.path / "log.txt" if self.main else None
        self.console = Console(log, self.settings.steps, self.start, self.world, self.main and not quiet)

    def _begin(self) -> int:
        """Load the newest checkpoint, or fit what is fitted from data and write checkpoint 0."""
        if self.main and not self.run.has_checkpoint():
            g = generator(self.seed, "prepare")
            logs = self.model.prepare(_Passes(self.dataset, self.settings.batch_size, self.model.device), generator=g)
            self.averages = {rule.label: WeightAverage(rule, self.model) for rule in self.settings.ema}
            self.save(0)
            self.run.record(**provenance(), config_hash=self.config.hash, world_size=self.world, **_size(self.model))
            if logs:
                self.run.log(0, samples=0, seconds=0.0, **{f"prepare/{k}": float(v) for k, v in logs.items()})
        self.accelerator.wait_for_everyone()
        sets, state = self.run.restore()
        self.model.load_state_dict(sets["model"])
        for label, average in self.averages.items():
            average.load(sets[label])
        if self.optimizer is not None:
            checkpoint.load_optimizer(self.model, self.optimizer, sets.get("optimizer", {}))
        self.seconds = state["seconds"]
        if self.main:
            self.run.rewind(state["step"])
        return state["step"]

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after `step` optimiser steps."""
        if not self.main:
            return
        sets = {"model": self.model.state_dict()}
        sets |= {label: average.tensors for label, average in self.averages.items()}
        if self.optimizer is not None:
            sets["optimizer"] = checkpoint.optimizer_tensors(self.model, self.optimizer)
        state = {"step": step, "samples": step * self.settings.batch_size, "seconds": round(self.seconds, 3)}
        self.run.save(sets, state, self.dataset.facts())

    def run_all(self) -> None:
        """From the restored step to the last one."""
        s = self.settings
        self._greet()
        tally, began, before = Tally(), time.monotonic(), self.seconds
        parts = stream(self.dataset, self.seed, s.batch_size, self.start, s.steps, self.rank, self.world, s.accumulate)
        for step, batches in parts:  # step counts from 0; `done` optimiser steps are behind us after it
            done = step + 1
            loss, logs = self.step(step, batches)
            tally.add(loss, logs, s.batch_size)
            self.seconds = before + time.monotonic() - began
            self.console.advance(done)
            if _due(done, s.log_every, s.steps):
                self.report(done, tally)
                tally = Tally()
            if _due(done, s.eval_every, s.steps):
                self.validate(done)
            if _due(done, s.sample_every, s.steps):
                self.grid(done)
            if _due(done, s.save_every, s.steps):
                self.save(done)
        if self.start == 0 == s.steps and s.sample_every:
            self.grid(0)
        self.accelerator.wait_for_everyone()
        if self.main:
            finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self.run.record(finished=finished, seconds=round(self.seconds, 1), steps=s.steps)
        self.console.say(f"done: {self.run.path} at step {s.steps:,} after {duration(self.seconds)} of training")

    def step(self, step: int, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """One optimiser step over the micro-batches; skipped if its loss or gradient is not finite."""
        torch.manual_seed(fold(self.seed, "step", step, self.rank))  # dropout; losses draw from their own generator
        self.wrapped.train()
        mean, logs = torch.zeros((), dtype=torch.float64, device=self.model.device), {}
        for part, batch in enumerate(batches):
            last = part == len(batches) - 1
            with self.accelerator.no_sync(self.wrapped) if not last else nullcontext():
                g = generator(self.seed, "loss", step, self.rank, part, device=self.model.device)
                loss = self.wrapped(batch.to(self.model.device), generator=g)
                value = loss.value.mean() / len(batches)
                if self.parameters:
                    value.backward()
            mean, logs = mean + value.detach().double(), loss.logs
        if self.optimizer is not None:
            self._update(step, mean)
        return mean, logs

    def _update(self, step: int, loss: Tensor) -> None:
        s = self.settings
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else loss.new_zeros(())
        good = self.accelerator.reduce((loss.isfinite() & norm.isfinite()).double(), "mean")
        if good.item() == 1:  # the same on every rank, so that ranks never part
            if s.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, s.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = s.optimizer.lr * s.learning_rate.factor(step, s.steps)
            self.optimizer.step()
            for average in self.averages.values():
                average.update(self.model, step + 1)
            self.bad_steps = 0
        else:
            self._skip(step, loss)
        self.optimizer.zero_grad(set_to_none=True)

    def _skip(self, step: int, loss: Tensor) -> None:
        """Say which tensor is not finite; give up after too many such steps in a row."""
        self.bad_steps += 1
        bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        what = f"the gradient of {bad[0]}" if bad else f"the loss ({loss.item()})"
        self.console.say(f"step {step + 1}: {what} is not finite on some process; the step is skipped.")
        if self.bad_steps >= BAD_STEPS:
            raise TrainingFailed(
                f"{BAD_STEPS} steps in a row were not finite, last at step {step + 1} ({what}). The last good checkpoint is "
                f"{self.run.checkpoints}/{(self.run.checkpoints / 'latest').read_text()}. Lower train.optimizer.lr or "
                "train.clip, or look at the data."
            )

    # ---- what is said on the way -----------------------------------------------------------------------------------

    def report(self, done: int, tally: Tally) -> None:
        """Mean loss with its standard error over the steps of the interval."""
        local = torch.stack(tally.loss)
        losses = self.accelerator.reduce(local, "mean")
        spread = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
        extra = {name: torch.stack(v).mean().item() for name, v in tally.logs.items()}
        rate = tally.items / max(time.monotonic() - tally.began, 1e-9)
        self.console.report(done, losses.mean().item(), spread, rate, extra)
        if self.main:
            values = {
                "train/loss": losses.mean().item(),
                "train/loss_stderr": spread,
                "items_per_second": round(rate, 1),
            }
            values |= {f"train/{name}": value for name, value in extra.items()}
            self._log(done, values)

    def _log(self, done: int, values: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.run.log(done, samples=done * self.settings.batch_size, seconds=round(self.seconds, 3), **finite)

    @torch.no_grad()
    def validate(self, done: int) -> None:
        """Loss on fixed validation items with fixed noise, under the first average of the weights."""
        items = min(self.settings.eval_items, self.dataset.size("val"))
        if items == 0:
            return
        total = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        with self._best_weights():
            for k, rows in enumerate(torch.arange(items).split(max(1, self.settings.batch_size // self.world))):
                if k % self.world != self.rank:
                    continue
                batch = self.dataset.take("val", rows).to(self.model.device)
                g = generator(self.seed, "validate", k, device=self.model.device)
                value = self.model.loss(batch, generator=g).value.double().mean()
                total += torch.stack((value * len(rows), value.new_tensor(float(len(rows)))))
        total = self.accelerator.reduce(total, "sum")
        loss = (total[0] / total[1]).item()
        self.console.say(f"step {done:,}/{self.settings.steps:,}  val loss {loss:.4f}")
        if self.main:
            self._log(done, {"val/loss": loss})

    def grid(self, done: int) -> None:
        """Samples of fixed seeds under the first average of the weights."""
        if self.main and isinstance(self.model, SupportsSample):
            seeds = default_seeds(self.model, self.dataset)
            with self._best_weights():
                x, condition = draw(self.model, self.dataset, seeds, self.config.options("sample"))
            weights = next(iter(self.averages), "model")
            notes = request(seeds, condition, self.config.answer("sample"), weights, done)
            path = write_picture(self.run.folder("samples") / f"{done:08d}", x, self.dataset, notes)
            self.console.say(f"step {done:,}/{self.settings.steps:,}  samples in {path}")
        self.accelerator.wait_for_everyone()

    def _best_weights(self) -> Any:
        average = next(iter(self.averages.values()), None)
        return average.applied(self.model) if average else evaluating(self.model)

    def _greet(self) -> None:
        size = _size(self.model)
        going = f"continuing at step {self.start:,}" if self.start else "new run"
        self.console.say(
            f"{self.run.path}: {going}, {self.config.tree['model']['name']} with {count(size['parameters'])} parameters on "
            f"{self.config.tree['data']['name']} ({self.dataset.size('train'):,} items), "
            f"{self.model.device}, {self.world} process{'es' if self.world > 1 else ''}"
        )


def _due(done: int, every: int, steps: int) -> bool:
    """At every multiple of the cadence and after the last step; never for a cadence of 0."""
    return every > 0 and (done % every == 0 or done == steps)


def _size(model: nn.Module) -> dict[str, int]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


class _Passes:
    """The training data in a fixed order; each iteration is a new pass."""

    def __init__(self, dataset: Dataset, batch_size: int, device: torch.device) -> None:
        self.dataset, self.batch_size, self.device = dataset, batch_size, device

    def __iter__(self) -> Iterator[Batch]:
        return (batch.to(self.device) for batch in self.dataset.batches("train", self.batch_size))
