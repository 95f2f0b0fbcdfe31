"""Counting floating-point operations, where torch's own counter misses some."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention, two for a multiply-add; the rest is free.

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, count = kwargs or {}, flop_registry.get(func._overloadpacket)
        if count is None and func is not torch.ops.prim.device.default:  # in inference mode operations come composed
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=out)
        return out


@contextmanager
def count_operations() -> Iterator[Operations]:
    """Count the operations of a block.

    Attention is computed by its formula meanwhile, and layers of transformers without their fused path: the kernels
    behind both are unknown to torch's table of counts. Unlike `FlopCounterMode` it has no hooks on modules, and so
    lets a block differentiate with respect to leaves, as likelihoods along a field do.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), Operations() as counted:
            yield counted
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
