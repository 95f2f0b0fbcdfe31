"""Scenes for several processes: each runs in every process of `play`, and returns what the test looks at.

`python -m tests.two_processes <folder> <scene> …` under a launcher; results go to `<folder>/<scene>-<rank>`.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from genmodels.registry import ConfigError
from genmodels.training import processes

ROOT = Path(__file__).parents[1]
LIMIT = 60  # seconds; longer is a hang


def launch(*words: str | Path, world: int = 2, **environment: str) -> subprocess.CompletedProcess:
    """A command under torchrun, one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([*command, *map(str, words)], env=variables, capture_output=True, text=True, timeout=LIMIT)


def play(folder: Path, *scenes: str) -> dict[str, list[Any]]:
    """What each of two processes returned in each scene."""
    done = launch("-m", "tests.two_processes", folder, *scenes)
    assert done.returncode == 0, done.stderr
    return {scene: [pickle.loads((folder / f"{scene}-{rank}").read_bytes()) for rank in (0, 1)] for scene in scenes}


def failure(function: Any) -> tuple[str, str, int]:
    """Type, message and origin of the error that a function raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), error.raised_by
    raise AssertionError("nothing was raised")


# ---- working and failing together ---


class Stubborn(Exception):
    """An error that pickle cannot rebuild."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} is not {right}")


def fail_on(*ranks: int, error: Any = None) -> None:
    with processes.together():
        if processes.rank() in ranks:
            raise error or ConfigError(f"rank {processes.rank()} fails")


def nested() -> None:
    with processes.together():
        try:
            fail_on(1)
        except ConfigError:  # all processes have it, so all may go on
            fail_on(0)


def taking(items: int, bad: int) -> list[int]:
    """Process 0 fails while it takes the results, the other one may already be ahead."""
    seen = []
    with processes.together():
        for result in processes.in_order(range(items), lambda k: k * k):
            if result == bad:
                raise ConfigError(f"process 0 does not like {result}")
            seen.append(result)
    return seen


def work(k: int) -> int:
    if k == 5:
        raise ConfigError("item 5 is bad")
    return k


def helpers(folder: Path) -> dict[str, Any]:
    me = processes.rank()
    tensors = [torch.full((2, 3), me + 0.1), torch.tensor(me), torch.tensor([me == 0]), torch.full((2,), me + 1j)]
    tensors.append(torch.arange(6.0).reshape(2, 3).T + me)
    processes.copy_from_main(tensors)
    return {
        "world": (me, processes.world(), processes.main()),
        "by_main": processes.by_main(lambda: {"by": processes.rank()}),
        "by_main fails": failure(lambda: processes.by_main(lambda: fail_on_main(me))),
        "by_main cannot travel": failure(lambda: processes.by_main(lambda: lambda: 0))[2],
        "one fails": failure(lambda: fail_on(1)),
        "both fail": failure(lambda: fail_on(0, 1)),
        "stubborn": failure(lambda: fail_on(1, error=Stubborn(1, 2))),
        "nested": failure(nested),
        "in order": [list(processes.in_order(range(n), lambda k: (k, processes.rank()))) for n in range(6)],
        "work fails": failure(lambda: list(processes.in_order(range(9), work))),
        "taking": taking(7, -1),
        "taking fails": [failure(lambda n=n: taking(n, 4)) for n in (3, 4, 7)],
        "tensors": tensors,
    }


def fail_on_main(rank: int) -> None:
    raise ConfigError(f"only rank {rank} was asked")


def main() -> None:
    folder, *scenes = sys.argv[1:]
    processes.join()
    for scene in scenes:
        outcome = globals()[scene](Path(folder))
        Path(folder, f"{scene}-{processes.rank()}").write_bytes(pickle.dumps(outcome))
    processes.leave()


if __name__ == "__main__":
    main()
