"""What an answer costs: parameters, evaluations of networks, memory."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..networks.network import networks


class Evaluations:
    """Rows that passed through each outermost network of a model."""

    def __init__(self, count: int) -> None:
        self.rows = [0] * count

    def per_item(self, items: int) -> float:
        """Evaluations on the path of one item: rows over items, of the network that was used most.

        Guidance doubles it, Heun's method costs two per step, rejected steps count; coupling layers with a network each
        are passed once.
        """
        return max(self.rows, default=0) / items


@contextmanager
def count_evaluations(model: nn.Module) -> Iterator[Evaluations]:
    """Count the forward evaluations of a model's networks inside the block; backward passes are not counted.

    An evaluation row by row or in a sweep, which computes every number once, is one (see `Network.passed`).
    """
    found = networks(model)
    counted = Evaluations(len(found))

    def add(k: int, items: int) -> None:
        counted.rows[k] += items

    def counter(k: int) -> Any:
        return lambda module, inputs, output: add(k, output.shape[0])

    handles = [network.register_forward_hook(counter(k)) for k, network in enumerate(found)]
    for k, network in enumerate(found):
        network.passed = partial(add, k)
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()
        for network in found:
            del network.passed


def num_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, tied ones counted once, with those that are fitted in closed form unless only what an
    optimiser trains is asked for.

    A module that fits buffers from data in `prepare` says by `fitted_numbers() -> int` how many free numbers they are.
    """
    storages = {
        (id(p) if p.is_meta else p.untyped_storage().data_ptr(), p.storage_offset(), p.shape): p.numel()
        for p in model.parameters()
        if p.numel() and (p.requires_grad or not trainable)
    }
    fitted = 0 if trainable else sum(m.fitted_numbers() for m in model.modules() if hasattr(m, "fitted_numbers"))
    return sum(storages.values()) + fitted


def inference_parameters(model: nn.Module) -> int:
    """Number of parameters once all that can be folded for inference is folded, without folding it.

    A module that can says so in `foldable() -> (parameters, numbers)`: which it can do without, and how many numbers it
    keeps in their place (see `shared.fold_embeddings`).
    """
    dropped: dict[int, int] = {}
    kept = 0
    for module in model.modules():
        if hasattr(module, "foldable"):
            parameters, numbers = module.foldable()
            dropped |= {id(p): p.numel() for p in parameters}
            kept += numbers
    return num_parameters(model) - sum(dropped.values()) + kept


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, where the system lets a process do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Most bytes since `reset_peak_memory`: allocated by tensors on a GPU, resident of the whole process on a CPU.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
