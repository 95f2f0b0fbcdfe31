"""What a run says while it trains: a live bar on a terminal, one plain line per log interval elsewhere."""

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BAR = 12  # characters of the live bar


def duration(seconds: float) -> str:
    """2h11m, 3m05s, 12s."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def count(number: float) -> str:
    """3.2k, 41M, 812, 1.5T."""
    for limit, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit * 0.9995:  # what rounds to 1000 of the smaller unit is 1 of this one
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def memory() -> str:
    """Peak memory of this process: of the GPU if there is one, else resident."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, kilobytes elsewhere
    used = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    )
    return f"{used / 2**30:.1f}G"


class Console:
    """Progress of one run, on standard error and in a log file.

    Args:
        log: file that receives every line too; None for none.
        quiet: say nothing on standard error.
        clock: seconds; replaced in tests.
    """

    def __init__(self, log: Path | None, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.log, self.quiet, self.clock = log, quiet, clock
        self.bar = None
        self.begin(0, 0, 1, live=False)

    def begin(self, steps: int, start: int, world: int, *, live: bool = True) -> None:
        """Training starts: the clock of the ETA runs, and on a terminal the bar appears.

        Args:
            steps: steps of the whole run.
            start: the step it resumes from.
            world: number of processes.
        """
        self.steps, self.start, self.world, self.began = steps, start, world, self.clock()
        if live and not self.quiet and steps > start and sys.stderr.isatty():
            from rich.console import Console as Terminal
            from rich.live import Live

            self.step, self.told = start, ""
            self.bar = Live(get_renderable=self._line, console=Terminal(stderr=True), refresh_per_second=4)
            self.bar.start()

    def _line(self) -> Any:
        """The live line, cut at the edge of the terminal: what matters most stands first."""
        from rich.text import Text

        full = BAR * self.step // max(self.steps, 1)
        line = Text(f"step {self.step:,}/{self.steps:,} ", no_wrap=True, overflow="ellipsis")
        line.append("━" * full, "cyan").append("─" * (BAR - full), "bright_black")
        return line.append(f" eta {duration(self._left(self.step))}  {self.told}")

    def _left(self, step: int) -> float:
        """Seconds to the last step at the average speed so far, everything included."""
        done = step - self.start
        return (self.clock() - self.began) / done * (self.steps - step) if done > 0 else math.inf

    def say(self, text: str) -> None:
        """A line for the reader, also kept in the log file."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)
        self.note(text)

    def note(self, text: str) -> None:
        """A line for the log file alone."""
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def at(self, step: int, text: str) -> None:
        """A line about a step."""
        self.say(f"step {step:,}/{self.steps:,}  {text}")

    def advance(self, step: int) -> None:
        self.step = step

    def report(self, step: int, loss: float, spread: float, rate: float, extra: dict[str, float]) -> None:
        """One log interval.

        Args:
            loss: mean over the interval, with its standard error `spread`.
            rate: items per second.
            extra: what else to show by name.
        """
        first = [f"loss {loss:.4f}±{spread:.4f}", f"{count(rate)} items/s"]
        logs = [f"{name} {value:.4g}" for name, value in extra.items()]
        last = [f"mem {memory()}"] + ([f"{self.world} processes"] if self.world > 1 else [])
        line = "  ".join([*first, *logs, f"eta {duration(self._left(step))}", *last])
        if self.bar is None:
            self.at(step, line)
        else:
            self.step, self.told = step, "  ".join([*first, *last, *logs])
            self.note(f"step {step:,}/{self.steps:,}  {line}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            bar, self.bar = self.bar, None
            bar.stop()
