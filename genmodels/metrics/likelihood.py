"""Likelihood of test data as bits per dimension (discrete data) or nats (continuous data)."""

import math

import torch
from torch import Tensor

from ..registry import register
from ..types import Batch, Estimate, NotApplicable, Samples, SupportsLogProb
from .metric import Metric, Subject

# From the most to the least that a value of the kind certifies; a stream is as good as its weakest part.
KINDS = ("pmf", "exact", "bound", "numerical", "stochastic")


def bits_per_dim(log_prob: Tensor, dims: int, bin_width: float | None) -> Tensor:
    """[B] float64: -log p/(D ln 2) - log2(bin_width), the code length of discrete data per component.

    A density p of dequantised data in its own units assigns p·bin_width^D to a cell, in expectation at most its mass.

    Args:
        log_prob: [B] nats, log density, or log mass with bin_width None.
        dims: D, the number of components of an item.
    Source: Theis et al. 2016 (A note on the evaluation of generative models), section 3.1.
    """
    return -log_prob.double() / (dims * math.log(2)) - (0.0 if bin_width is None else math.log2(bin_width))


class _PerItem(Metric):
    """The mean over items of a number that every item has."""

    requires = (SupportsLogProb,)

    def restart(self) -> None:
        self.values: list[Tensor] = []
        self.kind = KINDS[0]

    def take(self, values: Tensor, kind: str) -> None:
        """Keep the numbers [B] of some items."""
        self.values.append(values.detach().double().cpu())
        self.kind = max(self.kind, kind, key=KINDS.index)

    def estimate(self, unit: str, references: dict[str, float]) -> Estimate:
        """Their mean; the standard error is over items."""
        if not self.values:
            raise ValueError(f"{self.registered_name}: no likelihoods were taken in.")
        items = torch.cat(self.values)
        stderr = items.std().item() / math.sqrt(len(items)) if len(items) > 1 else None
        return Estimate(items.mean().item(), stderr, len(items), unit, "lower", self.kind, references or None, items)


@register(Metric, "bits_per_dim")
class BitsPerDim(_PerItem):
    """Mean code length of test items in bits per dimension, for data that declare the width of their levels.

    The density of a dequantised item bounds the code length (`bound`); a probability mass is the code length (`pmf`).
    References are exact code lengths of simple models of the same data.
    """

    def start(self, subject: Subject) -> None:
        self.bin_width, self.dims = subject.dataset.bin_width, math.prod(subject.dataset.shape)
        if self.bin_width is None:
            raise NotApplicable("the data are continuous (no bin_width), so a code length is not defined; use `nll`")
        self.references = subject.dataset.baselines()
        self.restart()

    def update(self, samples: Samples, batch: Batch | None) -> None:
        log_p, kind, _ = samples.likelihood
        width = None if kind == "pmf" else self.bin_width
        # An exact density of the dequantised point still only bounds the mass of its cell.
        self.take(bits_per_dim(log_p, self.dims, width), "bound" if kind == "exact" else kind)

    def compute(self) -> dict[str, Estimate]:
        return {"bits_per_dim": self.estimate("bits/dim", self.references)}


@register(Metric, "nll")
class NegativeLogLikelihood(_PerItem):
    """Mean -log p of test items in nats, for continuous data; the reference is that of the true law, where known."""

    def start(self, subject: Subject) -> None:
        self.dataset = subject.dataset
        if self.dataset.bin_width is not None:
            raise NotApplicable(
                "the data are discrete; a density in nats depends on the dequantisation: use `bits_per_dim`"
            )
        self.restart()

    def restart(self) -> None:
        super().restart()
        self.true: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        log_p, kind, _ = samples.likelihood
        self.take(-log_p, kind)
        law = self.dataset.log_prob(batch.x)
        if law is not None:
            self.true.append(law.double().cpu())

    def compute(self) -> dict[str, Estimate]:
        entropy = {"true law": -torch.cat(self.true).mean().item()} if self.true else {}
        return {"nll": self.estimate("nats", entropy)}
