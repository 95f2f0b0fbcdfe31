"""What warm starts save while an equilibrium network draws: the same samples with and without them.

    python -m evals.studies.warm_start [--root runs/warm_start] [--publish]

It trains configs/digits/flow_matching_equilibrium.yaml, if it is not there, and draws the first 500 seeds by Heun's
method with more and more steps, once with every search starting anew and once where the evaluation before ended. With
`--publish` it writes evals/results/warm_start.md. An evaluation is one of the cell; FD-digits is that of 500 samples.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genmodels.config import load
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import Protocol, tree_of
from genmodels.files import write_text
from genmodels.model import Model
from genmodels.training.loop import train
from genmodels.training.run import Run

from .plans import ROOT

RESULTS = ROOT / "evals" / "results"
CONFIG = ROOT / "configs" / "digits" / "flow_matching_equilibrium.yaml"
STEPS, DRAWN = (5, 10, 25), 500
COMPARED = 100  # samples whose difference is measured
Row = dict[str, Any]


def rows(run: Run) -> list[Row]:
    """What both ways cost and are worth, by the number of steps."""
    samples = {
        "name": "warm_start",
        "metrics": [{"name": "frechet", "features": "digits"}],
        "sample": {"num_items": DRAWN},
    }
    protocol, model, found = Protocol(tree_of("digits_demo") | samples), run.load(), []
    for steps in STEPS:
        row: Row = {"steps": steps, "difference": difference(model, run.config.options("sample"), steps)}
        for way, warm in (("cold", False), ("warm", True)):
            result = evaluate(run, protocol, overrides={"sample": {"num_steps": steps, "warm_start": warm}})
            cost, fd = result["cost"]["sample"], result["metrics"][0]
            row[way] = {
                "nfe": cost["nfe"],
                "ms": 1e3 * cost["seconds_per_item"],
                "fd": fd["value"],
                "err": fd["stderr"],
            }
        found.append(row)
    return found


def difference(model: Model, options: dict[str, Any], steps: int) -> float:
    """Root mean square of the difference between samples of both ways, over that between samples of other classes."""
    condition = torch.arange(COMPARED) % 10
    drawn: list[Tensor] = []
    with torch.no_grad():
        for warm in (False, True):
            given = options | {"num_steps": steps, "warm_start": warm}
            drawn.append(model.sample(COMPARED, condition=condition, **given))
    cold, warm = drawn
    return ((warm - cold).square().mean() / (cold - cold.roll(3, 0)).square().mean()).sqrt().item()


def table(found: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| steps | velocities | evaluations each, cold | warm | warm/cold | ms a sample, cold | warm | FD-digits, cold "
        "| warm | difference |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in found:
        cold, warm, velocities = r["cold"], r["warm"], 2 * r["steps"]
        lines.append(
            f"| {r['steps']} | {velocities} | {cold['nfe'] / velocities:.2f} | {warm['nfe'] / velocities:.2f} | "
            f"{warm['nfe'] / cold['nfe']:.2f} | {cold['ms']:.3g} | {warm['ms']:.3g} | "
            f"{cold['fd']:.3g} ± {cold['err']:.1g} | {warm['fd']:.3g} ± {warm['err']:.1g} | {r['difference']:.1g} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/warm_start"))
    parser.add_argument("--publish", action="store_true", help="copy the results to evals/results")
    given = parser.parse_args()
    text = table(rows(train(load([CONFIG]), root=given.root)))
    print(text)
    if given.publish:
        write_text(RESULTS / "warm_start.md", text)


if __name__ == "__main__":
    main()
