"""A look before training: configuration, model table, one loss, memory, operations, speed; nothing is written."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from ..config import Config
from ..metrics.cost import inference_parameters, num_parameters
from ..model import Model
from .console import count, duration
from .measure import SOME, Memory, TimedStep, affordable, first_batch, flops_of, memory_of, timed_step
from .run import Run, RunConflict

TIMED, LONGEST = 2, 5.0  # steps, and seconds of one; of larger batches a part is timed


def dry_run(config: Config, root: Path) -> str:
    """What `train` would do, as text; costs are measured on a few steps from fresh weights.

    Raises:
        ConfigError: if `train` would refuse the batch size or the name.
    """
    status = _status(config, root)
    with torch.random.fork_rng():
        step = timed_step(config)
        batch = first_batch(step)[:SOME]
        loss = step.forward(0, 0, batch).value.mean().item()
        costs = _costs(step) if config.train.steps else ["steps      none: the model is fitted before training"]
    sizes = " / ".join(f"{step.dataset.size(split):,}" for split in ("train", "val", "test"))
    return "\n".join(
        [
            OmegaConf.to_yaml(OmegaConf.create(config.tree)).rstrip(),
            "",
            f"run        {root / config.name} (hash {config.hash}): {status}; nothing is written now"
            f"{', but for data.cache' if config.tree['data'].get('cache') else ''}",
            f"data       {sizes} items of {step.dataset.shape}",
            *(f"           {line}" for line in step.dataset.checks()),
            f"model      {_parameters(step.model)}",
            *_table(step.model),
            f"loss       {loss:.4f} at initialisation, of {len(batch)} items",
            *costs,
        ]
    )


def _parameters(model: Model) -> str:
    trained, folded = num_parameters(model), inference_parameters(model)
    return f"{trained:,} parameters" + ("" if folded == trained else f" in training, {folded:,} at inference")


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


def _costs(step: TimedStep) -> list[str]:
    """Memory, operations, speed, and what they come to for the whole run."""
    s, device = step.settings, step.model.device
    items = affordable(step, LONGEST)
    rate = TIMED / step.run(2, 2 + TIMED, items) * items / s.batch_size
    part = "" if items == s.batch_size else f" (timed on batches of {items}, and scaled)"
    forward, both = flops_of(step)
    total = count(float(both) * s.batch_size * s.steps)
    return [
        *_memory(memory_of(step), device.type, s.gradient_checkpointing),
        f"operations {count(forward)}FLOP an item for the loss, {count(both)}FLOP with its gradient (matrix products, "
        "convolutions, attention)",
        f"           {count(both * s.batch_size * rate)}FLOP/s here, {total}FLOP in all",
        f"speed      {rate:.3g} steps/s = {count(rate * s.batch_size)} items/s on {device}{part}",
        f"           {s.steps:,} steps in about {duration(s.steps / rate)} ({s.steps / rate / 3600:,.2f} hours), "
        "without samples, validation and checkpoints",
    ]


def _memory(m: Memory, device: str, again: bool) -> list[str]:
    held = {"weights": m.weights, "gradients": m.gradients, "optimiser": m.optimizer, "averages": m.averages}
    parts = ", ".join(f"{name} {count(size)}B" for name, size in {**held, "kept for backward": m.saved}.items())
    more = ", without those of the one block that is computed again" if again else ""
    return [
        f"memory     {count(m.peak)}B {'at most' if device == 'cuda' else f'in tensors{more}'}",
        f"           {parts}",
    ]


def _table(model: Model) -> list[str]:
    children = list(model.named_children())
    width = max([len(name) for name, _ in children] + [5])
    return [
        f"  {name:<{width}}  {type(child).__name__:<20} {sum(p.numel() for p in child.parameters()):>12,}"
        for name, child in children
    ]
