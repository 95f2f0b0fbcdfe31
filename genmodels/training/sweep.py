"""Training the runs of a grid, each in a process of its own: in parallel, and restartable."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..registry import ConfigError
from . import checkpoint
from .console import duration
from .grid import Plan
from .run import Run

POLL = 0.05  # seconds between looks at the processes
ERROR = re.compile(r"(\[process \d+\] )?error: ")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def step_of(run: Run) -> int | None:
    """The newest step that is saved, None if there is none."""
    return max(checkpoint.steps_in(run.checkpoints), default=None)


def finished(run: Run | None, steps: int) -> bool:
    """Whether a run was trained to the end, and has its last checkpoint."""
    return (
        run is not None and run.meta.get("steps") == steps and bool(run.meta.get("finished")) and step_of(run) == steps
    )


def listing(plans: Sequence[Plan], root: Path, *, fresh: bool = False) -> str:
    """The runs of a sweep with their overrides and what training them would do.

    Raises:
        ConfigError: what `Run.check` raises.
    """
    rows = []
    for plan in plans:
        run = Run.check(plan.config, root, fresh=fresh)
        step = None if run is None else step_of(run)
        status = "new" if run is None else "starts again" if step is None else f"continues at step {step:,}"
        status = "finished" if finished(run, plan.config.train.steps) else status
        rows.append((str(root / plan.name), " ".join(plan.overrides), status))
    widths = [max(len(row[k]) for row in rows) for k in range(2)]
    lines = [f"{name:<{widths[0]}}  {overrides:<{widths[1]}}  {status}" for name, overrides, status in rows]
    return "\n".join([*lines, f"{len(rows)} runs; nothing is written now"])


@dataclass
class Child:
    """A process that trains a run; its output goes to a file without a name until it ends."""

    plan: Plan
    slot: int
    process: subprocess.Popen
    output: IO[bytes]
    began: float


class Sweep:
    """Trains the runs of a grid, some at a time; those that are finished are skipped, begun ones go on.

    Args:
        plans: from `grid`.
        words: configuration files and overrides, as given, that all runs share.
        root: folder of runs.
        jobs: processes at a time. The threads of this process are divided among them, and they take turns on the GPUs.
        fresh: set existing runs aside and start again.
        say: where a line about each run goes.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        words: Sequence[str],
        root: Path,
        *,
        jobs: int = 1,
        fresh: bool = False,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        if jobs < 1:
            raise ConfigError(f"--jobs: at least 1 process is needed, found {jobs}.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("--sweep starts processes of its own; start it without a launcher, with --jobs N.")
        self.plans, self.words, self.root, self.jobs = list(plans), list(words), root, jobs
        self.fresh, self.say = fresh, say
        self.stops, self.told = 0, 0  # signals that came, and that were acted upon
        self.running: list[Child] = []
        self.status: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        for plan in self.plans:  # all of them, before any starts
            if finished(Run.check(plan.config, root, fresh=fresh), plan.config.train.steps):
                self.status[plan.name] = "finished before"

    def run(self) -> int:
        """Train; prints the table of runs. Exit status: 1 if any failed.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM, when the processes have ended. A second one kills them.
        """
        waiting = deque(plan for plan in self.plans if plan.name not in self.status)
        done = len(self.plans) - len(waiting)
        self.say(
            f"{len(self.plans)} runs in {self.root}: {len(waiting)} to train"
            f"{f', {done} finished before' if done else ''}; {self.jobs} at a time, "
            f"{_threads(self.jobs)} thread{'s' if _threads(self.jobs) > 1 else ''} each"
        )
        with self._signals():
            try:
                while self.running or (waiting and not self.stops):
                    while waiting and len(self.running) < self.jobs and not self.stops:
                        self._start(waiting.popleft())
                    time.sleep(POLL)
                    self._stop()
                    for child in [child for child in self.running if child.process.poll() is not None]:
                        self._end(child)
            finally:
                for child in self.running:  # only an error of this process leads here with any
                    child.process.terminate()
        return self._conclude()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and a closed terminal are counted, and acted upon between looks."""

        def count(number: int, frame: Any) -> None:
            self.stops += 1

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kept = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _start(self, plan: Plan) -> None:
        slot = min(set(range(self.jobs)) - {child.slot for child in self.running})
        output = tempfile.TemporaryFile()
        process = subprocess.Popen(
            self._command(plan),
            env=_environment(slot, self.jobs),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
        self.running.append(Child(plan, slot, process, output, time.monotonic()))
        self.say(f"{self._place(plan)} started  {self.root / plan.name}")

    def _command(self, plan: Plan) -> list[str]:
        own = [*plan.overrides, f"name={plan.name}", "--root", str(self.root), *["--fresh"] * self.fresh]
        # -P: the search path is that of this process (see `_environment`), without the current folder before it
        return [sys.executable, "-P", "-m", "genmodels", "train", *self.words, *own]

    def _place(self, plan: Plan) -> str:
        width = len(str(len(self.plans)))
        return f"[{self.plans.index(plan) + 1:>{width}}/{len(self.plans)}]"

    def _stop(self) -> None:
        """What has been asked for by signals, once each."""
        if self.stops and not self.told:
            self.told = 1
            self.say(f"stopping {len(self.running)} runs; once more to kill them")
            for child in self.running:
                child.process.terminate()
        elif self.stops > 1 and self.told < 2:
            self.told = 2
            for child in self.running:
                with suppress(ProcessLookupError, PermissionError):  # it has just ended
                    os.killpg(child.process.pid, signal.SIGKILL)

    def _end(self, child: Child) -> None:
        """A process ended: keep what it said, and say how it went."""
        self.running.remove(child)
        plan, code = child.plan, child.process.returncode
        child.output.seek(0)
        said = child.output.read().decode(errors="replace").splitlines()
        child.output.close()
        path = self.root / plan.name
        _keep(said, path)
        run = Run(path, plan.config)
        if finished(run, plan.config.train.steps):
            status = "done"
        elif self.stops and not any(map(ERROR.match, said)):
            status = "interrupted"
        elif code == 0:
            status = "not finished"  # a limit of its own: the same command goes on
        else:
            status, self.errors[plan.name] = "failed", _error(said, code)
        self.status[plan.name] = status
        told = self.errors.get(plan.name, f"step {step_of(run) or 0:,}/{plan.config.train.steps:,}")
        self.say(f"{self._place(plan)} {status:<8} {path}  {told}  ({duration(time.monotonic() - child.began)})")

    def _conclude(self) -> int:
        print(self.table(), flush=True)
        counts = Counter(self.status.get(plan.name, "not started") for plan in self.plans)
        open_ = [f"{n} {status}" for status, n in counts.items() if status not in ("done", "finished before")]
        again = f"The same command{' without --fresh' if self.fresh else ''} skips what is finished and goes on."
        if open_:
            self.say(f"{', '.join(open_)}. {again}")
        if self.stops:
            raise KeyboardInterrupt
        return 1 if self.errors else 0

    def table(self) -> str:
        """The runs with their last losses, as text."""
        rows = []
        for plan in self.plans:
            run = Run(self.root / plan.name, plan.config)
            lines = run.metrics()
            status = self.status.get(plan.name, "not started")
            seconds = max((line.get("seconds") or 0.0 for line in lines), default=0.0)
            losses = [_last(lines, key) for key in ("train/loss", "val/loss")]
            rows.append((plan.name, f"{step_of(run) or 0:,}", *losses, status, f"{seconds:.1f}"))
        return _table(("run", "steps", "train loss", "val loss", "status", "seconds"), rows)


def _threads(jobs: int) -> int:
    """Threads of each of several processes, that together have those of this one."""
    return max(1, torch.get_num_threads() // jobs)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """That of this process with its search path, a share of its threads, and one of its GPUs."""
    out = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    out["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
    out["OMP_NUM_THREADS"] = str(_threads(jobs))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = list(map(str, range(torch.cuda.device_count()))) if visible is None else visible.split(",")
    if any(devices):
        out["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return out


def _keep(said: list[str], path: Path) -> None:
    """Append to the log of a run what its process said and did not write there itself: warnings and errors."""
    if not (path / "config.yaml").is_file():
        return
    log = path / "log.txt"
    known = set(log.read_text(encoding="utf-8").splitlines()) if log.exists() else set()
    with log.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in said if line not in known)


def _error(said: list[str], code: int) -> str:
    """The last line of a process that tells of an error; else how it ended."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{' (was the memory used up?)' if name == 'SIGKILL' else ''}"
    told = list(filter(ERROR.match, said)) or [line for line in said if line.strip()]
    return told[-1] if told else f"ended with status {code}"


def _last(lines: list[dict[str, Any]], key: str) -> str:
    found = [line[key] for line in lines if line.get(key) is not None]
    return f"{found[-1]:.4f}" if found else "–"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich.console import Console as Terminal
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, justify="left" if head in ("run", "status") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    terminal = Terminal(width=10_000, highlight=False, color_system=None)  # a narrow terminal wraps, and cuts nothing
    with terminal.capture() as capture:
        terminal.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
