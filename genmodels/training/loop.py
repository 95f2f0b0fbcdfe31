"""The training loop: short enough to read, and to edit.

Data order and randomness are functions of (seed, step), so that a run which was interrupted continues as if it had not
been.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data.dataset import Dataset
from ..data.stream import check_batch, stream
from ..model import Model
from ..networks.network import set_autocast
from ..rng import fold, generator
from ..types import Batch
from . import checkpoint, processes
from .console import Console, duration
from .ema import WeightAverage
from .guard import PATIENCE, FiniteGuard, TrainingFailed, check_weights
from .run import Run, provenance
from .watch import Interval, Watch, mean_logs, size


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
        CheckpointError: if every checkpoint of the run is damaged.
        TrainingFailed: after 20 steps in a row whose loss or gradient was not finite; the last checkpoint is kept.
    """
    Run.check(config, root, fresh=fresh)  # by every process, before anything is loaded or made
    accelerator = processes.join()
    main = accelerator.is_main_process
    dataset = config.dataset() if dataset is None else dataset
    if config.train.steps:
        s = config.train
        check_batch(s.batch_size, accelerator.num_processes, s.accumulate, dataset.size("train"))
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the caller's random state is not the run's
        torch.manual_seed(fold(config.seed, "init"))
        model = config.model(dataset.facts())
        accelerator.wait_for_everyone()  # all have checked
        if main:
            Run.create(config, root, fresh=fresh)
        accelerator.wait_for_everyone()
        run = Run.create(config, root)
        console = Console(run.path / "log.txt" if main else None, quiet=quiet or not main)
        try:
            with run.locked() if main else nullcontext():
                Trainer(accelerator, run, dataset, model, console).run_all()
        except KeyboardInterrupt:
            console.close()
            console.say(f"interrupted. {run.saved()} The same command goes on from there.")
            raise
        except TrainingFailed as error:
            console.note(f"error: {error}")
            raise
        finally:
            console.close()
    return run


class Trainer:
    """One process of a training run."""

    def __init__(self, accelerator: Any, run: Run, dataset: Dataset, model: Model, console: Console) -> None:
        self.accelerator, self.run, self.dataset, self.console = accelerator, run, dataset, console
        self.config, self.settings = run.config, run.config.train
        self.seed, self.rank, self.world = self.config.seed, accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process
        self.model = model.to(accelerator.device)
        set_autocast(model, torch.bfloat16 if self.settings.precision == "bf16" else None)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self.settings.optimizer.over(self.parameters) if self.parameters else None
        if self.main and not run.has_checkpoint():
            self._prepare()
        accelerator.wait_for_everyone()
        self._restore()
        # Replicas are wrapped after the weights are loaded; a model without parameters has nothing to synchronise.
        self.wrapped = accelerator.prepare_model(model) if self.parameters else model
        self.guard = FiniteGuard(model)
        self.watch = Watch(accelerator, run, dataset, model, self.averages, console)

    def _prepare(self) -> None:
        """Fit what is fitted from data, on one process; the result is checkpoint 0."""
        self.run.record(**provenance(), config_hash=self.config.hash, world_size=self.world, **size(self.model))
        passes = _Passes(self.dataset, self.settings.batch_size, self.model.device)
        logs = self.model.prepare(passes, generator=generator(self.seed, "prepare"))
        self.run.rewind(-1)
        if logs:
            values = {f"prepare/{name}": float(value) for name, value in logs.items()}
            self.run.log(0, samples=0, seconds=0.0, **values)
        self.averages = {rule.label: WeightAverage(rule, self.model) for rule in self.settings.ema}
        self.seconds = 0.0
        self.save(0)

    def _restore(self) -> None:
        """Load the newest sound checkpoint, on every process."""
        sets, state = self.run.restore()
        for problem in self.run.problems():
            self.console.say(f"warning: {problem}")
        checkpoint.load_weights(self.model, sets["model"], self.run.checkpoints)
        self.averages = {rule.label: WeightAverage(rule, self.model) for rule in self.settings.ema}
        for label, average in self.averages.items():
            average.load(sets[label])
        if self.optimizer is not None:
            checkpoint.load_optimizer(self.model, self.optimizer, sets["optimizer"])
        self.start, self.seconds = state["step"], state["seconds"]
        if self.main:
            self.run.rewind(self.start)

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after `step` optimiser steps."""
        check_weights(self.model, step)
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
        self.watch.greet(self.start)
        if self.main and 0 < self.start < s.steps:  # the code may have changed since the run began
            facts = provenance()
            again = {key: facts[key] for key in ("started", "commit", "dirty", "diff", "hardware")}
            self.run.record(continued=[*self.run.meta.get("continued", []), {"step": self.start, **again}])
        self.console.begin(s.steps, self.start, self.world)
        began, before, interval = time.monotonic(), self.seconds, Interval()
        parts = stream(self.dataset, self.seed, s.batch_size, self.start, s.steps, self.rank, self.world, s.accumulate)
        for step, batches in parts:  # step counts from 0; `done` optimiser steps are behind us after it
            done = step + 1
            interval.add(*self.step(step, batches), s.batch_size)
            self.seconds = before + time.monotonic() - began
            self.console.advance(done)
            if _due(done, s.log_every, s.steps):
                self.watch.report(done, interval, self.seconds)
                interval = Interval()
            if _due(done, s.eval_every, s.steps):
                self.watch.validate(done, self.seconds)
            if _due(done, s.sample_every, s.steps):
                self.watch.grid(done)
            if _due(done, s.save_every, s.steps) or done == s.steps:
                self.save(done)
            interval.resume()
        if s.steps == 0 and "finished" not in self.run.meta:  # fitted wholly in `prepare`: looked at once
            if s.eval_every:
                self.watch.validate(0, self.seconds)
            if s.sample_every:
                self.watch.grid(0)
        self._finish()

    def step(self, step: int, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """One optimiser step over the micro-batches; its mean loss and logs on this process."""
        torch.manual_seed(fold(self.seed, "step", step, self.rank))  # dropout; losses draw from their own generator
        self.wrapped.train()
        mean, logs = torch.zeros((), dtype=torch.float64, device=self.model.device), []
        for part, batch in enumerate(batches):
            last = part == len(batches) - 1  # replicas exchange gradients once a step
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                g = generator(self.seed, "loss", step, self.rank, part, device=self.model.device)
                loss = self.wrapped(batch.to(self.model.device), generator=g)
                value = loss.value.mean() / len(batches)
                if self.parameters:
                    value.backward()
            mean = mean + value.detach().double()
            logs.append(loss.logs)
        norm = self._update(step, mean)
        return mean, mean_logs(logs) | ({"grad_norm": norm} if self.parameters else {})

    def _update(self, step: int, loss: Tensor) -> Tensor:
        """Clip, step and average, unless loss or gradient is not finite; the norm of the gradient."""
        s = self.settings
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros_like(loss)
        good = self.accelerator.reduce((loss.isfinite() & norm.isfinite()).long(), "sum")
        if good.item() < self.world:  # the same on every process, so that replicas never part
            self._skip(step, loss)
        else:
            if self.optimizer is not None:
                if s.clip is not None:
                    torch.nn.utils.clip_grads_with_norm_(self.parameters, s.clip, norm)
                for group in self.optimizer.param_groups:
                    group["lr"] = s.optimizer.lr * s.learning_rate.factor(step, s.steps)
                self.optimizer.step()
            for average in self.averages.values():
                average.update(self.model, step + 1)
            self.guard.passed()
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _skip(self, step: int, loss: Tensor) -> None:
        what = self.guard.failed(loss)
        self.console.at(step + 1, f"{what}; the step is skipped")
        if self.guard.exhausted:
            raise TrainingFailed(
                f"{PATIENCE} steps in a row were not finite, last at step {step + 1}: {what}. The weights were not "
                f"touched. {self.run.saved()} Lower train.optimizer.lr or train.clip, or look at the data."
            )

    def _finish(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.main:
            finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self.run.record(finished=finished, seconds=round(self.seconds, 1), steps=self.settings.steps)
        self.console.close()
        self.console.say(f"done: {self.run.path} at step {self.settings.steps:,} after {duration(self.seconds)}")


class _Passes:
    """The training data in a fixed order; each iteration is a new pass."""

    def __init__(self, dataset: Dataset, batch_size: int, device: torch.device) -> None:
        self.dataset, self.batch_size, self.device = dataset, batch_size, device

    def __iter__(self) -> Iterator[Batch]:
        return (batch.to(self.device) for batch in self.dataset.batches("train", self.batch_size))


def _due(done: int, every: int, steps: int) -> bool:
    """At every multiple of the cadence and after the last step; never for a cadence of 0."""
    return every > 0 and (done % every == 0 or done == steps)
