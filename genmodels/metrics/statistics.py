"""Means and covariances from a stream, in float64."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 8192  # vectors that are taken to float64 at a time


class Gaussian(NamedTuple):
    """Mean [D] and covariance [D, D] (divisor n - 1), float64, with the number of vectors that they rest on.

    Args:
        n: None if unknown.
        thin: [D, n - 1] F with F Fᵀ = covariance, where n <= D; None otherwise, or where the vectors are not at hand.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None
    thin: Tensor | None = None


class Moments:
    """Count, sum and sum of outer products of vectors, about a fixed shift.

    All three only add up: streams over several processes that use one shift are merged by `merge`, an all-reduce.

    Args:
        shift: [D] point near the mean; None takes the mean of the first batch. Without one, the covariance of features
            whose mean is large against their spread loses its digits.
    """

    def __init__(self, shift: Tensor | None = None) -> None:
        self.n = 0
        self.shift = None if shift is None else shift.double()
        self.total = self.outer = None

    def update(self, x: Tensor) -> None:
        """Take in the rows of [B, D].

        Raises:
            ValueError: if x is no matrix, or has another width than before.
        """
        if x.ndim != 2 or (self.shift is not None and x.shape[1] != len(self.shift)):
            width = "D" if self.shift is None else len(self.shift)
            raise ValueError(f"moments: x has shape {list(x.shape)}, but [B, {width}] is needed.")
        if len(x) == 0:
            return
        x = x.double()
        if self.shift is None:
            self.shift = x.mean(0)
        centred = x - self.shift.to(x.device)
        if self.total is None:
            self.total = centred.new_zeros(x.shape[1])
            self.outer = centred.new_zeros(x.shape[1], x.shape[1])
        self.n += len(x)
        self.total += centred.sum(0)
        self.outer += centred.T @ centred

    def merge(self, other: "Moments") -> None:
        """Add what another stream took in about the same shift.

        Raises:
            ValueError: if the shifts differ.
        """
        if other.n == 0:
            return
        if self.shift is None:
            self.shift = other.shift
        if not torch.equal(self.shift, other.shift):
            raise ValueError("moments: only streams about the same shift can be merged; give both the same `shift`.")
        if self.total is None:
            self.total, self.outer = torch.zeros_like(other.total), torch.zeros_like(other.outer)
        self.n += other.n
        self.total += other.total
        self.outer += other.outer

    def gaussian(self) -> Gaussian:
        """Mean and covariance of everything taken in.

        Raises:
            ValueError: if that were fewer than two vectors.
        """
        if self.n < 2:
            raise ValueError(f"moments: a covariance needs at least 2 vectors, found {self.n}.")
        offset = self.total / self.n
        covariance = (self.outer - self.n * torch.outer(offset, offset)) / (self.n - 1)
        return Gaussian(self.shift.to(offset) + offset, covariance, self.n)


def gaussian(x: Tensor, device: torch.device | str | None = None) -> Gaussian:
    """Mean and covariance of the rows of [N, D], and their thin root if N <= D.

    Args:
        device: where to compute and leave them; None for that of x.
    """
    moments = Moments()
    for rows in x.split(ROWS):
        moments.update(rows.to(device or x.device))
    found = moments.gaussian()
    if found.n > len(found.mean):
        return found
    return found._replace(thin=_thin(x.to(found.mean) - found.mean))


def _thin(centred: Tensor) -> Tensor:
    """[D, N - 1] F with F Fᵀ = Xᵀ X/(N - 1) for X [N, D] whose columns add up to 0.

    A reflection that takes the vector of ones to the first axis turns the first row of X into that sum: it is dropped,
    and with it the direction in which X has no rank.
    """
    n = len(centred)
    normal = centred.new_full((n,), 1 / math.sqrt(n))
    normal[0] += 1
    reflected = centred - torch.outer(normal, normal @ centred) * (2 / normal.square().sum())
    return reflected[1:].T / math.sqrt(n - 1)
