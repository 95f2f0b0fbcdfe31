"""The training loop: short enough to read, and to edit.

Data order and randomness are functions of (seed, step), so that a run which was interrupted continues as if it had not
been.
"""

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from ..config import Config
from ..data.dataset import Dataset
from ..data.stream import check_batch, stream
from ..rng import fold
from ..types import Batch
from . import disk, processes, tracking
from .console import Console, duration
from .guard import PATIENCE, TrainingFailed
from .interruption import Stop, first_of, time_limit
from .provenance import provenance
from .run import Run
from .state import Origin, TrainingState
from .step import Step
from .watch import Interval, Watch


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
    accelerator = processes.join()
    main, s = accelerator.is_main_process, config.train
    with processes.together():  # before anything is loaded or made
        existing = Run.check(config, root, fresh=fresh)
        dataset = config.dataset() if dataset is None else dataset
        if s.tensorboard:
            tracking.check()
        if s.steps:
            check_batch(s.batch_size, accelerator.num_processes, s.accumulate, dataset.size("train"))
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the caller's random state is not the run's
        with processes.together():
            torch.manual_seed(fold(config.seed, "init"))
            model = config.model(dataset.facts())
            step = Step(config, model, accelerator)
            begun = existing is not None and existing.has_checkpoint()
            origin = Origin.of(config.init_from, model) if config.init_from and not begun else None
        processes.by_main(lambda: _created(config, root, fresh))
        run = Run.create(config, root)
        console = Console(run.path / "log.txt" if main else None, quiet=quiet or not main)
        limit = first_of(stop or (lambda: None), time_limit(s.max_hours, began))
        try:
            with ExitStack() as stack:
                processes.by_main(lambda: stack.enter_context(run.locked()))
                Trainer(step, run, dataset, console, limit, origin).run_all()
        except KeyboardInterrupt:
            console.close()
            console.say(f"interrupted. {run.saved()} The same command goes on from there.")
            raise
        except TrainingFailed as error:
            console.note(f"error: {error}")
            raise
        except OSError as error:
            if error.errno not in disk.FULL or processes.told_elsewhere(error):
                raise
            raise disk.full(error, run.path, run.saved()) from error
        finally:
            console.close()
    return run


def _created(config: Config, root: str | Path, fresh: bool) -> None:
    """Make the folder of a run, with a word on space if there is none."""
    try:
        Run.create(config, root, fresh=fresh)
    except OSError as error:
        if error.errno not in disk.FULL:
            raise
        raise disk.full(error, Path(root) / config.name, "Nothing is saved yet.") from error


class Trainer:
    """One process of a training run: steps, and between them what is looked at, said and kept."""

    def __init__(
        self, step: Step, run: Run, dataset: Dataset, console: Console, stop: Stop, origin: Origin | None = None
    ) -> None:
        self.step, self.run, self.dataset, self.console, self.stop = step, run, dataset, console, stop
        self.settings, self.main = run.config.train, step.accelerator.is_main_process
        self.state = TrainingState(run, dataset, step.model, step.optimizer, main=self.main, world=step.world)
        told = processes.by_main(lambda: [] if run.has_checkpoint() else self.state.prepare(origin))
        with processes.together():
            told = told + self.state.restore()
        for line in processes.by_main(run.adopt) + told:
            console.say(line)
        self.start = self.state.step
        step.start(self.state.averages)
        self.watch = Watch(step.accelerator, run, dataset, step.model, self.state.averages, console)

    def run_all(self) -> None:
        """From the restored step to the last one, or to the one after which it is asked to stop."""
        s, state = self.settings, self.state
        if state.step >= s.steps and self.run.meta.get("finished"):
            self.console.say(f"{self.run.path} is finished at step {state.step:,}; more train.steps would go on")
            return
        self._begin()
        began, before, interval, reason = time.monotonic(), state.seconds, Interval(), None
        for step, batches in self._batches():
            done = step + 1  # step counts from 0; `done` optimiser steps are behind us after it
            outcome = self.step(step, batches)
            interval.add(outcome.loss, outcome.logs, s.batch_size)
            state.step, state.seconds = done, before + time.monotonic() - began
            self.console.advance(done)
            if outcome.problem:
                self._skipped(outcome.problem)
            if _due(done, s.log_every, s.steps):
                self.watch.report(done, interval, state.seconds)
                interval = Interval()
            if _due(done, s.eval_every, s.steps):
                self._validate()
            if _due(done, s.sample_every, s.steps):
                self.watch.grid(done)
            reason = self._asked()
            if _due(done, s.snapshot_every, s.steps):
                self._keep(state.snapshot)
            if _due(done, s.save_every, s.steps) or done == s.steps or reason:
                self._keep(state.save)
            if reason and done < s.steps:
                break
            interval.resume()
        if s.steps == 0:  # fitted wholly in `prepare`: looked at once
            if s.eval_every:
                self._validate()
            if s.sample_every:
                self.watch.grid(0)
        self._finish(reason if state.step < s.steps else None)

    def _batches(self) -> Iterator[tuple[int, list[Batch]]]:
        s, pin = self.settings, self.step.model.device.type == "cuda"
        place = (self.step.rank, self.step.world, s.accumulate, s.workers, pin)
        return stream(self.dataset, self.run.config.seed, s.batch_size, self.start, s.steps, *place)

    def _begin(self) -> None:
        self.watch.greet(self.start)
        s, meta = self.settings, self.run.meta
        if self.main and 0 < self.start < s.steps:  # the code may have changed since the run began
            facts = provenance()
            again = {key: facts[key] for key in ("started", "commit", "dirty", "diff", "hardware")}
            continued = {"step": self.start, "steps": s.steps, "world_size": self.step.world, **again}
            self.run.record(continued=[*meta.get("continued", []), continued], finished=None, stopped=None)
        self.console.begin(s.steps, self.start, self.step.world)

    def _validate(self) -> None:
        loss = self.watch.validate(self.state.step, self.state.seconds)
        if loss is not None and self.main and self.step.parameters and self.state.consider(loss):
            self.run.record(best={"step": self.state.step, "val/loss": loss})

    def _launcher(self) -> str:
        world = self.step.world
        return "python" if world == 1 else f"torchrun --nproc-per-node {world}"

    def _keep(self, write: Callable[[], None]) -> None:
        with processes.together():
            write()

    def _skipped(self, problem: str) -> None:
        self.console.at(self.state.step, f"{problem}; the step is skipped")
        if self.step.guard.exhausted:
            with processes.together():
                raise TrainingFailed(
                    f"{PATIENCE} steps in a row were not finite, last at step {self.state.step}: {problem}. "
                    f"The weights were not touched. {self.run.saved()} "
                    "Lower train.optimizer.lr or train.clip, or look at the data."
                )

    def _asked(self) -> str | None:
        """Why training should stop: the first reason of any process, the same on all of them."""
        mine = self.stop()
        if self.step.world == 1:
            return mine
        votes = torch.tensor([mine is not None], dtype=torch.long, device=self.step.model.device)
        if not self.step.accelerator.reduce(votes, "sum").item():
            return None
        from accelerate.utils import gather_object

        return next(reason for reason in gather_object([mine]) if reason is not None)

    def _finish(self, reason: str | None) -> None:
        """What is recorded and said at the end, or where training stops for a reason."""
        self.step.accelerator.wait_for_everyone()
        self.watch.close()
        state, steps = self.state, self.settings.steps
        if self.main:
            ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            facts = {"seconds": round(state.seconds, 1), "steps": state.step}
            self.run.record(**facts, finished=None if reason else ended, stopped=reason)
        self.console.close()
        if reason:
            self.console.say(
                f"stopped by {reason} at step {state.step:,}/{steps:,}, which is saved. Go on with: "
                f"{self._launcher()} train.py {shlex.quote(str(self.run.path))}"
            )
        else:
            self.console.say(f"done: {self.run.path} at step {steps:,} after {duration(state.seconds)}")


def _due(done: int, every: int, steps: int) -> bool:
    """At every multiple of the cadence and after the last step; never for a cadence of 0."""
    return every > 0 and (done % every == 0 or done == steps)
