"""A look before training: configuration, model table, one loss, speed and memory; nothing is written."""

import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from ..config import Config
from ..data.stream import check_batch, indices
from ..model import Model
from ..networks.network import set_autocast
from ..rng import fold, generator
from ..types import Batch
from .console import count, duration, memory
from .run import Run, RunConflict

TIMED_STEPS = 3


def dry_run(config: Config, root: Path) -> str:
    """What `train` would do, as text.

    Raises:
        ConfigError: if `train` would refuse the batch size or the name.
    """
    dataset, s = config.dataset(), config.train
    size = dataset.size("train")
    if s.steps:
        check_batch(s.batch_size, 1, s.accumulate, size)
    status = _status(config, root)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(config.seed, "init"))
        model = config.model(dataset.facts()).to("cuda" if torch.cuda.is_available() else "cpu")
        set_autocast(model, torch.bfloat16 if s.precision == "bf16" else None)
        rows = indices(config.seed, 0, min(s.batch_size, size), size)
        batch = dataset.take("train", rows).to(model.device)
        model.prepare([batch], generator=generator(config.seed, "prepare"))
        loss, rate = _measure(model, batch, config.seed)
    return "\n".join(
        [
            OmegaConf.to_yaml(OmegaConf.create(config.tree)).rstrip(),
            "",
            f"run        {root / config.name} (hash {config.hash}): {status}; nothing is written now",
            f"data       {size:,} / {dataset.size('val'):,} / {dataset.size('test'):,} items of {dataset.shape}",
            f"model      {sum(p.numel() for p in model.parameters()):,} parameters",
            *_table(model),
            f"loss       {loss:.4f} at initialisation, batch of {len(batch)}",
            f"speed      {rate:.1f} steps/s = {count(rate * len(batch))} items/s without the optimiser, "
            f"on {model.device}; {s.steps:,} steps in about {duration(s.steps / rate)}",
            f"memory     {memory()} at most in this process",
        ]
    )


def _status(config: Config, root: Path) -> str:
    try:
        run = Run.check(config, root)
    except RunConflict:
        return "exists with another configuration, train would refuse"
    if run is None:
        return "new"
    return (
        f"exists, train would continue at step {run.step:,}" if run.has_checkpoint() else "exists without a checkpoint"
    )


def _measure(model: Model, batch: Batch, seed: int) -> tuple[float, float]:
    """The first loss, and steps per second after a warm-up step."""
    losses, seconds = [], []
    for step in range(TIMED_STEPS + 1):
        began = time.perf_counter()
        g = generator(seed, "loss", step, 0, 0, device=model.device)
        loss = model(batch, generator=g).value.mean()
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return losses[0], TIMED_STEPS / sum(seconds[1:])


def _table(model: Model) -> list[str]:
    children = list(model.named_children())
    width = max([len(name) for name, _ in children] + [5])
    return [
        f"  {name:<{width}}  {type(child).__name__:<20} {sum(p.numel() for p in child.parameters()):>12,}"
        for name, child in children
    ]
