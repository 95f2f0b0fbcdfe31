"""The processes of one training run: how they find each other, and how they part."""

import os
from typing import Any

import torch

from ..registry import ConfigError


def join() -> Any:
    """Accelerate's view of this process among those of a launcher; its own mixed precision is off.

    Raises:
        ConfigError: if a launcher started several processes that do not find each other: they would train one run each.
    """
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.accelerator.current_accelerator()
    # Accelerate takes several processes on the CPU for strangers unless it is told that the CPU is meant.
    cpu = launched > 1 and (device is None or device.type == "mps")
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[AutocastKwargs(enabled=False)])
    if accelerator.num_processes < launched:
        raise ConfigError(
            f"{launched} processes were started, but each finds {accelerator.num_processes}. Start them with torchrun "
            "or accelerate launch, and train before anything else in the process uses Accelerate."
        )
    return accelerator


def leave() -> None:
    """Part in good order, at the end of a command."""
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
