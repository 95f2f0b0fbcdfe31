"""The processes of one command: how they find each other, share work, fail together, and part.

Without a launcher there is one process, and everything here does nothing at no cost. With several, `join` comes first;
then every process must reach `together`, `by_main` and `in_order` in the same order. What one process raises there is
raised by all, so that none waits for a process which has given up, and only the one that failed needs to say why.
"""

import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..model import Model
from ..registry import ConfigError

S, T = TypeVar("S"), TypeVar("T")
WAIT = timedelta(days=1)  # how long one may work while the others wait; a process that ends is noticed at once
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun, accelerate, and MPI

GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")

_group: Any = None  # of all processes, for Python objects: on the CPU whatever the devices are


class Left(RuntimeError):
    """Another process has ended without a word to this one."""


# ---- finding each other, and parting -----------------------------------------------------------------------------


def launched() -> int:
    """How many processes a launcher says that there are."""
    return next((int(os.environ[name]) for name in SIZES if name in os.environ), 1)


def join(device: str | None = None) -> Any:
    """Accelerate's view of this process among those of a launcher; its own mixed precision is off.

    Args:
        device: "cpu" to leave GPUs alone.
    Raises:
        ConfigError: if a launcher started several processes that do not find each other: they would each do all.
    """
    global _group
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs

    _warn_if_alone()
    number, found = launched(), torch.accelerator.current_accelerator()
    # Accelerate takes several processes on the CPU for strangers unless it is told that the CPU is meant.
    cpu = device == "cpu" or (number > 1 and (found is None or found.type == "mps"))
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[AutocastKwargs(enabled=False)])
    if accelerator.num_processes < number:
        raise ConfigError(
            f"{number} processes were started, but each finds {accelerator.num_processes}. Start them with torchrun or "
            "accelerate launch, and train before anything else in the process uses Accelerate."
        )
    if accelerator.num_processes > 1 and _group is None:
        _group = torch.distributed.new_group(backend="gloo", timeout=WAIT)
    return accelerator


def place(name: str | None = None) -> torch.device:
    """Where this process computes: joined to the others of a launcher with a GPU of its own, or alone.

    Args:
        name: of a device; None for a GPU if there is one.
    Raises:
        ConfigError: if there is no such device, or if several processes were told to share one GPU.
    """
    _warn_if_alone()
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device: {name} was asked for, and torch finds no CUDA device here.")
    if launched() == 1:
        return device
    if device.index is not None:
        raise ConfigError(f"--device: {name} names one device for {launched()} processes; say {device.type}.")
    found = join(device.type).device
    return device if found.type == "cpu" else found  # Accelerate numbers the CPU by process


def leave() -> None:
    """Part in good order, at the end of a command that every process has reached, whether well or with an error."""
    global _group
    if _group is not None:
        with suppress(RuntimeError):  # a launcher kills the rest once one has ended: let the first finish its sentence
            torch.distributed.barrier(group=_group)
        torch.distributed.destroy_process_group()
        _group = None


def _warn_if_alone() -> None:
    """Accelerate gives an address to meet at if several processes are wanted; on the CPU it then starts one only."""
    meeting = all(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"))
    if meeting and not any(name in os.environ for name in ("RANK", "LOCAL_RANK", *SIZES)):
        warnings.warn(
            "accelerate launch was asked for several processes and started this one alone. For several processes on "
            "the CPU use torchrun --nproc-per-node <number>.",
            stacklevel=3,
        )


def rank() -> int:
    """The number of this process; 0 is the one that writes and speaks."""
    return torch.distributed.get_rank() if _group is not None else 0


def world() -> int:
    """How many processes have joined."""
    return torch.distributed.get_world_size() if _group is not None else 1


def main() -> bool:
    return rank() == 0


# ---- failing together ----------------------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes enter and leave together: what one of them raises inside, all raise.

    If several fail, the error of the first by rank is raised. Blocks may be nested; what reaches the outer block from
    an inner one is known to all already. The error's attribute `raised_by` is the rank of the process that failed.

    Raises:
        Left: if another process has ended.
    """
    if world() == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        if hasattr(error, "raised_by"):
            raise
        mine = error
    first = _exchange(mine)
    if first is not None:
        raise first


def _exchange(mine: Exception | None) -> Exception | None:
    """The first of the errors of all processes."""
    if mine is not None:
        mine.raised_by = rank()
    told: list[Exception | None] = [None] * world()
    try:
        torch.distributed.all_gather_object(told, _portable(mine), group=_group)
    except RuntimeError as error:
        if mine is not None:
            return mine
        raise Left("another process has ended") from error
    first = next((error for error in told if error is not None), None)
    return mine if first is not None and first.raised_by == rank() else first


def _portable(error: Exception | None) -> Exception | None:
    """An error that survives the way to another process; its words do in any case."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        words = RuntimeError(f"{type(error).__name__}: {error}")
        words.raised_by = error.raised_by
        return words
    return error


def told_elsewhere(error: BaseException) -> bool:
    """Whether another process says why all of them end."""
    return getattr(error, "raised_by", rank()) != rank()


def left_alone(error: BaseException) -> bool:
    """Whether this process ends because another one was gone when gradients or objects were to be exchanged."""
    gone = world() > 1 and isinstance(error, RuntimeError) and any(words in str(error) for words in GONE)
    return gone or isinstance(error, Left)


def ended_together(error: BaseException) -> bool:
    """Whether all processes end with this error, and can part in good order."""
    return hasattr(error, "raised_by")


# ---- sharing work --------------------------------------------------------------------------------------------------


def by_main(function: Callable[[], T]) -> T:
    """Process 0 does it for all; everyone gets its result (which travels by pickle), or its error."""
    if world() == 1:
        return function()
    told: list[Any] = [None]
    with together():
        if main():
            told = [function()]
            pickle.dumps(told)  # what cannot travel fails here, where it is told
    torch.distributed.broadcast_object_list(told, src=0, group=_group)
    return told[0]


def in_order(items: Sequence[S], work: Callable[[S], T]) -> Iterator[T]:
    """The results of work on items, in their order, on process 0; on the others there are none to see.

    Item k is worked on by process k mod world, one item of each at a time: memory stays that of `world` results.
    Every process must run through to the end; the loop that takes the results may fail inside `together`.
    """
    if world() == 1:
        yield from map(work, items)
        return
    for first in range(0, len(items), world()):
        with together():
            mine = [work(item) for item in items[first + rank() : first + rank() + 1]]
        found: list[Any] | None = [None] * world() if main() else None
        torch.distributed.gather_object(mine, found, dst=0, group=_group)
        yield from (result for each in found or () for result in each)


# ---- replicas ------------------------------------------------------------------------------------------------------


def replicate(accelerator: Any, model: Model) -> nn.Module:
    """The model behind a wrapper whose backward pass averages gradients over processes; of one process, itself.

    Buffers are left alone: see `copy_from_main`.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator.ddp_handler = DistributedDataParallelKwargs(
        find_unused_parameters=model.unused_parameters, broadcast_buffers=False
    )
    with warnings.catch_warnings():  # torch 2.13 gives the second option a new name, which Accelerate does not know yet
        warnings.simplefilter("ignore", FutureWarning)
        return accelerator.prepare_model(model)


def require_gradients(model: Model) -> None:
    """After a backward pass of replicas that wait for every gradient: without all of them nothing was averaged.

    Raises:
        ConfigError: on all processes, naming the parameters that have none on one of them.
    """
    with together():
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if missing:
            some = ", ".join(missing[:4]) + (f", … ({len(missing) - 4} more)" if len(missing) > 4 else "")
            raise ConfigError(
                f"the loss of {type(model).__name__} left these parameters without gradient: {some}. Several processes "
                f"must be told: set `unused_parameters = True` on the class {type(model).__name__}, or freeze the "
                "parameters that are not trained (requires_grad_(False)), or train with one process."
            )


@torch.no_grad()
def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors of one device by those of process 0, bit for bit, in one message."""
    tensors = list(tensors)
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors])
    torch.distributed.broadcast(flat, src=0)
    parts = flat.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
