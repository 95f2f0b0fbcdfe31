"""Precision, recall, density and coverage: time and memory of ours and of the `prdc` package on the same features.

    python -m evals.benchmarks.prdc [--items 10000] [--features 64 2048] [--repeats 3]

Every measurement is a process of its own, the two sides by turns; memory is the peak of the process less what it held
before the call. Times are CPU seconds, since the package spreads its distances over eight threads.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "prdc.json"
K = 5


def features(items: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32, as networks give them: standard normal, the fakes a little wider and moved."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(items, width, generator=generator)
    return real, 1.02 * torch.randn(items, width, generator=generator) + 0.02


def ours(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    from genmodels.metrics.prdc import precision_recall_density_coverage

    return precision_recall_density_coverage(real=real, fake=fake, k=K)


def theirs(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    import prdc

    with contextlib.redirect_stdout(sys.stderr):
        return {name: float(v) for name, v in prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=K).items()}


SIDES = {"ours": ours, "prdc": theirs}


def peak() -> float:
    """MiB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(side: str, items: int, width: int) -> dict[str, Any]:
    """One call, after another one of few items that imports and allocates what there is to."""
    torch.set_num_threads(1)
    SIDES[side](*features(100, width))
    real, fake = features(items, width)
    before, began, wall = peak(), time.process_time(), time.perf_counter()
    values = SIDES[side](real, fake)
    seconds, wall = time.process_time() - began, time.perf_counter() - wall
    return {"values": values, "CPU seconds": seconds, "wall seconds": wall, "MiB": peak() - before}


def in_a_process(side: str, items: int, width: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "evals.benchmarks.prdc", "--side", side, "--items", str(items)]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--features", str(width)], env=os.environ | one_thread, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def compare(items: int, width: int, repeats: int) -> dict[str, Any]:
    """Medians of both sides, their ratio to ours, and the largest difference of the four numbers."""
    runs = [{side: in_a_process(side, items, width) for side in SIDES} for _ in range(repeats)]
    table = {
        what: {side: round(statistics.median(run[side][what] for run in runs), 2) for side in SIDES}
        for what in ("CPU seconds", "wall seconds", "MiB")
    }
    ratios = {what: round(row["prdc"] / row["ours"], 2) for what, row in table.items()}
    values = {side: runs[0][side]["values"] for side in SIDES}
    difference = max(abs(values["ours"][name] - values["prdc"][name]) for name in values["ours"])
    return {**table, "ratio to ours": ratios, "values": values, "largest difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--features", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="measure only this side, once, in this process")
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measure(given.side, given.items, given.features[0])))
        return
    found = {f"{width} features": compare(given.items, width, given.repeats) for width in given.features}
    result = {
        "what": f"precision, recall, density and coverage, as many real as fake items, k = {K}, float32",
        "size": {"items": given.items, "repeats": given.repeats},
        **found,
        "environment": {
            "torch": torch.__version__,
            "threads": 1,
            "python": platform.python_version(),
            "processor": platform.machine(),
        },
    }
    for name, row in found.items():
        print(name, json.dumps({key: row[key] for key in row if key != "values"}, indent=1))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
