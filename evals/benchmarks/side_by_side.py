"""Ours beside others: the same tasks by turns in one process, and the medians as a table and a file."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Tasks = Mapping[str, Callable[[], Any]]  # by name
Medians = dict[str, dict[str, float]]  # task -> contender -> milliseconds


def medians(contenders: Mapping[str, Tasks], repeats: int, warm_up: int = 2) -> Medians:
    """Median CPU milliseconds of every task of every contender that has it; they take turns, so that noise meets all.

    The first contender has every task.
    """
    times = {
        task: {name: [] for name, own in contenders.items() if task in own} for task in next(iter(contenders.values()))
    }
    for round_ in range(-warm_up, repeats):
        for task, row in times.items():
            for name, seconds in row.items():
                began = time.process_time()
                contenders[name][task]()
                if round_ >= 0:
                    seconds.append(time.process_time() - began)
    return {task: {n: 1e3 * statistics.median(s) for n, s in row.items()} for task, row in times.items()}


def report(found: Medians, size: Mapping[str, int], path: Path, **more: Any) -> None:
    """Print times and ratios to "ours", and write them to a JSON file.

    Args:
        size: what was measured: batch, repeats, …
        more: further facts for the file.
    """
    others = [name for name in dict.fromkeys(n for row in found.values() for n in row) if name != "ours"]
    ratios = {task: {n: round(row[n] / row["ours"], 2) for n in others if n in row} for task, row in found.items()}
    result = {
        "what": "median CPU milliseconds of one call, one thread, float32",
        "size": dict(size),
        **more,
        "milliseconds": {task: {n: round(t, 3) for n, t in row.items()} for task, row in found.items()},
        "ratio to ours": ratios,
        "environment": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "processor": platform.machine(),
        },
    }
    heads = (
        "".join(f"{name:>11}" for name in ("ours", *others)) + "  ms" + "".join(f"{n + '/ours':>16}" for n in others)
    )
    wide = max(22, *(len(task) + 1 for task in found))
    print(f"{'':{wide}}{heads}")
    for task, row in found.items():
        times = "".join(f"{row[name]:11.2f}" if name in row else f"{'':11}" for name in ("ours", *others))
        rows = "".join(f"{ratios[task][name]:16.2f}" if name in row else f"{'':16}" for name in others)
        print(f"{task:{wide}}{times}    {rows}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")
