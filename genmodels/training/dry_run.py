"""A look before training: configuration, model table, one loss, speed and memory; nothing is written."""

import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from ..config import Config
from ..data.stream import indices
from ..networks.network import set_autocast
from ..rng import fold, generator
from .console import count, duration, memory

TIMED_STEPS = 3


def dry_run(config: Config, root: Path) -> str:
    """What `train` would do, as text."""
    dataset, s = config.dataset(), config.train
    with torch.random.fork_rng():
        torch.manual_seed(fold(config.seed, "init"))
        model = config.model(dataset.facts())
        set_autocast(model, torch.bfloat16 if s.precision == "bf16" else None)
        rows = indices(config.seed, 0, s.batch_size, dataset.size("train"))
        batch = dataset.take("train", rows)
        model.prepare([batch], generator=generator(config.seed, "prepare"))
        losses, seconds = [], []
        for step in range(TIMED_STEPS + 1):  # the first one warms up
            began = time.perf_counter()
            loss = model(batch, generator=generator(config.seed, "loss", step, 0, 0)).value.mean()
            if loss.requires_grad:
                loss.backward()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
    rate = TIMED_STEPS / sum(seconds[1:])
    rows_of_table = [(name or type(child).__name__, child) for name, child in model.named_children()]
    width = max([len(name) for name, _ in rows_of_table] + [5])
    table = [
        f"  {name:<{width}}  {type(child).__name__:<20} {sum(p.numel() for p in child.parameters()):>12,}"
        for name, child in rows_of_table
    ]
    total = sum(p.numel() for p in model.parameters())
    return "\n".join(
        [
            OmegaConf.to_yaml(OmegaConf.create(config.tree)).rstrip(),
            "",
            f"run        {root / config.name} (hash {config.hash}); not written",
            f"data       {dataset.size('train'):,} / {dataset.size('val'):,} / {dataset.size('test'):,} items of {dataset.shape}",
            f"model      {total:,} parameters",
            *table,
            f"loss       {losses[0]:.4f} at initialisation, batch of {s.batch_size}",
            f"speed      {rate:.1f} steps/s = {count(rate * s.batch_size)} items/s without the optimiser, on {model.device}; "
            f"{s.steps:,} steps in about {duration(s.steps / rate)}",
            f"memory     {memory()} at most in this process",
        ]
    )
