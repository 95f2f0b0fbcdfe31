"""What it takes to fit a wavelet model of fields: closed form, chains and samples, beside the training of a U-Net.

    python -m evals.benchmarks.field_fit [--count 10000] [--reach 8] [--device cuda]

On lognormal maps of 64², wall-clock and CPU seconds, with as many threads as there are: the closed-form fit of the
energies (units, Gram matrices and standard errors, in passes over all maps), then `prepare` as a whole (the fit once
more, and the tuning of the chains), samples, and steps of the flow-matching U-Net of configs/phi4_64 in bfloat16 on a
GPU and float32 elsewhere, from which an epoch over as many maps follows.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from genmodels.config import load
from genmodels.rng import generator
from genmodels.training.provenance import provenance
from genmodels.types import Batch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "evals" / "results" / "benchmarks"
SAMPLES, WARM_UP = 125, 2
STEPS = {"cuda": 50, "cpu": 3}  # of the U-Net


def timed(work: Callable[[], Any], device: str) -> dict[str, float]:
    """Wall-clock and CPU seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"wall": round(time.perf_counter() - wall, 2), "cpu": round(time.process_time() - cpu, 2)}


def unet_steps(x: torch.Tensor, device: str) -> Callable[[int], None]:
    """Some steps of Adam on batches of 64 maps, warmed up."""
    config = load(ROOT / "configs" / "phi4_64" / "flow_matching.yaml", ["data.cache=null"])
    model = config.model({**config.dataset().facts()}).to(device)
    model.prepare([Batch(x.to(device))], generator=generator("unet"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch = Batch(x[: config.train.batch_size].to(device))

    def steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model.loss(batch).value.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    steps(WARM_UP)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--reach", type=int, default=8, help="of the quadratic energies, in pixels")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    changes = [f"data.count={given.count}", "data.reference=1", f"model.energy[0].reach={given.reach}"]
    config = load(ROOT / "configs" / "lognormal_64" / "cslc.yaml", changes)
    data = config.dataset()
    model = config.model(data.facts()).to(given.device)
    batches = [Batch(part.x.to(given.device)) for part in data.batches("train", 500)]
    seconds = {"fit": timed(lambda: model.fit(batches), given.device)}
    seconds["prepare"] = timed(lambda: model.prepare(batches, generator=generator("prepare")), given.device)
    seconds[f"{SAMPLES} samples"] = timed(lambda: model.sample(SAMPLES), given.device)
    steps, count = unet_steps(data.all("train").x[:256], given.device), STEPS[given.device]
    unet = seconds[f"{count} steps of the U-Net"] = timed(lambda: steps(count), given.device)
    epoch = unet["wall"] / count * given.count / 64
    facts = provenance()
    result = {
        "what": f"seconds, {given.count:,} lognormal maps of 64x64",
        "seconds": seconds,
        "epochs of the U-Net in the time of": {k: round(seconds[k]["wall"] / epoch, 3) for k in ("fit", "prepare")},
        "parameters fitted": sum(len(c.theta) for c in model.conditionals),
        "environment": {
            "hardware": facts["hardware"],
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    path = RESULTS / ("field_fit.json" if given.device == "cpu" else "field_fit_gpu.json")
    path.write_text(text + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
