"""Stopping in good order: signals and a time limit become a request that the loop honours between two steps."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Stop = Callable[[], str | None]  # why training should stop now, None while it should not


@contextmanager
def signals() -> Iterator[Stop]:
    """SIGTERM and SIGINT ask training to stop after the step it is in; a second SIGINT interrupts at once.

    For the commands: a library does not touch the handlers of its host. Outside the main thread nothing is caught.
    """
    asked: list[str] = []

    def remember(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and name in asked:
            raise KeyboardInterrupt
        asked.append(name)

    caught = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, remember) for number in caught}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def time_limit(hours: float | None, began: float, clock: Callable[[], float] = time.monotonic) -> Stop:
    """Asks to stop once so many hours have passed since `began`; never for None.

    Args:
        began: seconds, on the clock.
        clock: replaced in tests.
    """
    end = math.inf if hours is None else began + hours * 3600
    return lambda: f"train.max_hours={hours:g}" if clock() >= end else None


def first_of(*stops: Stop) -> Stop:
    """The first reason that any of them has."""
    return lambda: next((reason for stop in stops if (reason := stop())), None)
