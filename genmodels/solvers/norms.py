"""Norms of rows."""

import torch
from torch import Tensor


def rms(x: Tensor) -> Tensor:
    """[B] float64 root mean square of each row; its gradient at 0 is 0."""
    flat = x.flatten(1) if x.ndim > 1 else x[:, None]
    return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64) / max(flat.shape[1], 1) ** 0.5


def finite_rows(x: Tensor) -> Tensor:
    """[B] bool: whether every component of a row is finite."""
    flat = x.detach().flatten(1) if x.ndim > 1 else x.detach()[:, None]
    return torch.linalg.vector_norm(flat, ord=torch.inf, dim=1).isfinite() if flat.shape[1] else flat.isfinite().all(1)


def reached(path: Tensor) -> Tensor:
    """[L, B] bool: whether rows of a path [L, B, *shape] have a state at a time, where those that do not are nan."""
    return ~(path.flatten(2).isnan().any(2) if path.ndim > 2 else path.isnan())
