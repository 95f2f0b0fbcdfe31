"""What a run says while it trains: a live bar on a terminal, one plain line per log interval elsewhere."""

import math
import resource
import sys
import time
from pathlib import Path

import torch


def duration(seconds: float) -> str:
    """2h11m, 3m05s, 12s."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def count(number: float) -> str:
    """3.2k, 41M, 812."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def memory() -> str:
    """Peak memory of this process: of the GPU if there is one, else resident."""
    used = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return f"{used / 2**30:.1f}G"


class Console:
    """Progress of one run; silent on every process but the main one.

    Args:
        log: file that receives every plain line too; None for none.
        steps: steps of the whole run.
        start: the step it resumes from.
        world: number of processes.
        main: False silences it.
    """

    def __init__(self, log: Path | None, steps: int, start: int, world: int, main: bool) -> None:
        self.log, self.steps, self.start, self.world, self.main = log, steps, start, world, main
        self.began = time.monotonic()
        self.bar, self.task = None, None
        if main and sys.stderr.isatty() and steps > start:
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.completed:,}/{task.total:,}"), BarColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Terminal(stderr=True))
            self.task = self.bar.add_task("starting", total=steps, completed=start)
            self.bar.start()

    def say(self, text: str) -> None:
        """A line for the reader, also kept in the log file."""
        if not self.main:
            return
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(text + "\n")

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def report(self, step: int, loss: float, spread: float, rate: float, extra: dict[str, float]) -> None:
        """One log interval: mean loss with its standard error, items per second, ETA and memory."""
        done = step - self.start
        left = (time.monotonic() - self.began) / max(done, 1) * (self.steps - step)
        parts = [f"loss {loss:.4f}±{spread:.4f}", f"{count(rate)} items/s"]
        parts += [f"{name} {value:.4g}" for name, value in extra.items()]
        parts += [f"eta {duration(left)}", f"mem {memory()}"] + ([f"{self.world} processes"] if self.world > 1 else [])
        text = "  ".join(parts)
        if self.bar is not None:
            self.bar.update(self.task, description=text, completed=step)
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(f"step {step:,}/{self.steps:,}  {text}\n")
        else:
            self.say(f"step {step:,}/{self.steps:,}  {text}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
