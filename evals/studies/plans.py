"""Studies as lists of ordinary runs: train and evaluate what is not there yet, publish what is asked for."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from genmodels.evaluation.evaluate import publish
from genmodels.evaluation.results import read

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Plan:
    """A run: its name, its configuration file, the protocol that scores it ("" for none), and overrides."""

    name: str
    config: str
    protocol: str
    overrides: tuple[str, ...] = ()


Studies = Mapping[str, Callable[[], Iterator[Plan]]]


def carry_out(plan: Plan, root: Path, threads: int) -> None:
    """Train a run to its end and evaluate it, in processes of their own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    train = ["train.py", f"configs/{plan.config}.yaml", f"name={plan.name}", *plan.overrides, "--root", str(root)]
    score = ["-m", "evals.evaluate", str(root / plan.name), "--protocol", plan.protocol]
    for command in (train, score) if plan.protocol else (train,):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{plan.name}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    print(plan.name, flush=True)


def carry_out_all(plans: Sequence[Plan], root: Path, jobs: int, published: bool) -> None:
    """Carry out a study, so many runs at a time; and publish their results if asked to."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(carry_out, plan, root, threads) for plan in plans]:
            future.result()
    for plan in plans if published else ():  # at the end, so that all are evaluated by the same clean commit
        for path in (root / plan.name / "eval" / plan.protocol).glob("*.json"):
            publish(path, read(path)[0])


def parser(description: str, studies: Studies, root: str) -> argparse.ArgumentParser:
    """The arguments that every study takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("studies", nargs="+", choices=studies)
    made.add_argument("--jobs", type=int, default=1, help="runs at a time")
    made.add_argument("--root", type=Path, default=Path(root))
    made.add_argument("--publish", action="store_true", help="copy the results to evals/results")
    return made


def main(description: str, studies: Studies, root: str) -> None:
    """The command of a study: carry out those of the given names."""
    given = parser(description, studies, root).parse_args()
    plans = [plan for study in given.studies for plan in studies[study]()]
    carry_out_all(plans, given.root, given.jobs, given.publish)
