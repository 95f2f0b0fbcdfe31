"""The training loop: short enough to read, and to edit.

Data order and randomness are functions of (seed, step), so that a run which was interrupted continues as if it had not
been.
"""

import time
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
from ..registry import ConfigError
from ..rng import fold, generator
from ..types import Batch
from . import processes
from .checkpoint import DISK_FULL
from .console import Console, duration
from .guard import PATIENCE, FiniteGuard, TrainingFailed
from .interruption import Stop, first_of, time_limit
from .run import Run, provenance
from .state import Origin, TrainingState
from .watch import Interval, Watch, mean_logs


def train(
    config: Config,
    *,
    root: str | Path = "runs",
    fresh: bool = False,
    dataset: Dataset | None = None,
    quiet: bool = False,
    stop: Stop | None = None,
) -> Run:
    """Train a configuration, or continue the run of its name.

    A run that is asked to stop, by `stop` or by `train.max_hours`, saves a checkpoint after the step it is in and
    returns; `run.step` says how far it came.

    Args:
        root: folder of runs.
        fresh: set an existing run of that name aside and start again.
        dataset: used instead of the configured one (which may be `external`).
        quiet: say nothing on the console.
        stop: asked after every step for a reason to stop; None for none.
    Raises:
        RunConflict: if a run of that name has another configuration; nothing is touched.
        ConfigError: if the batch does not divide over processes, or exceeds the data; if the data have changed since
            the run began; if another process trains it, or its folder cannot be written.
        CheckpointError: if every checkpoint of the run is damaged; DiskFull if there is no space for another.
        TrainingFailed: after 20 steps in a row whose loss or gradient was not finite; the last checkpoint is kept.
    """
    began = time.monotonic()
    existing = Run.check(config, root, fresh=fresh)  # by every process, before anything is loaded or made
    accelerator = processes.join()
    main, s = accelerator.is_main_process, config.train
    dataset = config.dataset() if dataset is None else dataset
    if s.steps:
        check_batch(s.batch_size, accelerator.num_processes, s.accumulate, dataset.size("train"))
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the caller's random state is not the run's
        torch.manual_seed(fold(config.seed, "init"))
        model = config.model(dataset.facts())
        check_compile(config, model)
        begun = existing is not None and existing.has_checkpoint()
        origin = Origin.of(config.init_from, model) if config.init_from and not begun else None
        accelerator.wait_for_everyone()  # all have checked
        if main:
            Run.create(config, root, fresh=fresh)
        accelerator.wait_for_everyone()
        run = Run.create(config, root)
        console = Console(run.path / "log.txt" if main else None, quiet=quiet or not main)
        limit = first_of(stop or (lambda: None), time_limit(s.max_hours, began))
        try:
            with run.locked() if main else nullcontext():
                Trainer(accelerator, run, dataset, model, console, limit, origin).run_all()
        except KeyboardInterrupt:
            console.close()
            console.say(f"interrupted. {run.saved()} The same command goes on from there.")
            raise
        except TrainingFailed as error:
            console.note(f"error: {error}")
            raise
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise run.disk_full(error) from error
        finally:
            console.close()
    return run


def check_compile(config: Config, model: Model) -> None:
    """Raises ConfigError if the networks of a model cannot be compiled for training."""
    if config.train.compile and model.differentiates_twice:
        raise ConfigError(
            f"train.compile: the loss of '{config.tree['model']['name']}' differentiates its network twice, and "
            "compiled code can be differentiated once. Set train.compile=false."
        )


class Trainer:
    """One process of a training run."""

    def __init__(
        self,
        accelerator: Any,
        run: Run,
        dataset: Dataset,
        model: Model,
        console: Console,
        stop: Stop,
        origin: Origin | None = None,
    ) -> None:
        self.accelerator, self.run, self.dataset, self.console, self.stop = accelerator, run, dataset, console, stop
        self.config, self.settings = run.config, run.config.train
        self.seed, self.rank, self.world = self.config.seed, accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process
        self.model = model.to(accelerator.device)
        set_autocast(model, torch.bfloat16 if self.settings.precision == "bf16" else None)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self.settings.optimizer.over(self.parameters) if self.parameters else None
        self.state = TrainingState(run, dataset, model, self.optimizer, main=self.main, world=self.world)
        told = run.adopt() if self.main else []
        if self.main and not run.has_checkpoint():
            told += self.state.prepare(origin)
        accelerator.wait_for_everyone()
        for line in told + self.state.restore():
            console.say(line)
        self.start = self.state.step
        if self.main:
            run.rewind(self.start)
        # Replicas are wrapped after the weights are loaded; a model without parameters has nothing to synchronise.
        self.wrapped = accelerator.prepare_model(model) if self.parameters else model
        self.guard = FiniteGuard(model)
        self.watch = Watch(accelerator, run, dataset, model, self.state.averages, console)

    def run_all(self) -> None:
        """From the restored step to the last one, or to the one after which it is asked to stop."""
        s, state = self.settings, self.state
        self._begin()
        began, before, interval = time.monotonic(), state.seconds, Interval()
        place = (self.rank, self.world, s.accumulate, s.workers, self.model.device.type == "cuda")
        reason = None
        for step, batches in stream(self.dataset, self.seed, s.batch_size, self.start, s.steps, *place):
            done = step + 1  # step counts from 0; `done` optimiser steps are behind us after it
            interval.add(*self.step(step, batches), s.batch_size)
            state.step, state.seconds = done, before + time.monotonic() - began
            self.console.advance(done)
            if _due(done, s.log_every, s.steps):
                self.watch.report(done, interval, state.seconds)
                interval = Interval()
            if _due(done, s.eval_every, s.steps):
                self._validate()
            if _due(done, s.sample_every, s.steps):
                self.watch.grid(done)
            reason = self._asked()
            if _due(done, s.save_every, s.steps) or done == s.steps or reason:
                state.save()
            if reason and done < s.steps:
                break
            interval.resume()
        if s.steps == 0 and not self.run.meta.get("finished"):  # fitted wholly in `prepare`: looked at once
            if s.eval_every:
                self._validate()
            if s.sample_every:
                self.watch.grid(0)
        self._finish(reason if state.step < s.steps else None)

    def _begin(self) -> None:
        self.watch.greet(self.start)
        s, meta = self.settings, self.run.meta
        if self.main and 0 < self.start < s.steps:  # the code may have changed since the run began
            facts = provenance()
            again = {key: facts[key] for key in ("started", "commit", "dirty", "diff", "hardware")}
            continued = {"step": self.start, "steps": s.steps, "world_size": self.world, **again}
            self.run.record(continued=[*meta.get("continued", []), continued], finished=None, stopped=None)
        self.console.begin(s.steps, self.start, self.world)

    def _validate(self) -> None:
        loss = self.watch.validate(self.state.step, self.state.seconds)
        if loss is not None and self.main and self.parameters and self.state.consider(loss):
            self.run.record(best={"step": self.state.step, "val/loss": loss})

    def _asked(self) -> str | None:
        """Why training should stop: the first reason of any process, the same on all of them."""
        mine = self.stop()
        if self.world == 1:
            return mine
        votes = torch.tensor([mine is not None], dtype=torch.long, device=self.model.device)
        if not self.accelerator.reduce(votes, "sum").item():
            return None
        from accelerate.utils import gather_object

        return next(reason for reason in gather_object([mine]) if reason is not None)

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
            for average in self.state.averages.values():
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

    def _finish(self, reason: str | None) -> None:
        """What is recorded and said at the end, or where training stops for a reason."""
        self.accelerator.wait_for_everyone()
        state, steps = self.state, self.settings.steps
        if self.main:
            ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            facts = {"seconds": round(state.seconds, 1), "steps": state.step}
            self.run.record(**facts, finished=None if reason else ended, stopped=reason)
        self.console.close()
        if reason:
            self.console.say(
                f"stopped by {reason} at step {state.step:,}/{steps:,}, which is saved. Go on with: "
                f"python train.py {self.run.path}"
            )
        else:
            self.console.say(f"done: {self.run.path} at step {steps:,} after {duration(state.seconds)}")


def _due(done: int, every: int, steps: int) -> bool:
    """At every multiple of the cadence and after the last step; never for a cadence of 0."""
    return every > 0 and (done % every == 0 or done == steps)
