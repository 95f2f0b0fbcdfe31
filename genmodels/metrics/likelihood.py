"""Likelihood of test data: -log p in nats in the units of the data, and code lengths of discrete data.

One number is behind every metric here: -log p of an item in nats, in the units of its data set. Of discrete data it is
the code length -log(p·bin_width^D) of the item's cell, so that densities of dequantised items and probability masses
compare; bits per dimension are that number in another unit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..registry import register
from ..types import Batch, Estimate, Likelihood, NotApplicable, Samples, SupportsLogProb
from .metric import Metric, Subject

# From the most to the least that a value of the kind certifies; a stream is as good as its weakest part.
KINDS = ("pmf", "exact", "bound", "numerical", "stochastic")


def code_length(log_prob: Tensor, dims: int, bin_width: float | None) -> Tensor:
    """[B] float64 nats: -log(p·bin_width^D), the code length of discrete items whose cells have that width.

    A density p of dequantised data in its own units assigns p·bin_width^D to a cell, in expectation at most its mass.

    Args:
        log_prob: [B] nats, log density; log mass, or log density of continuous data, with bin_width None.
        dims: D, the number of components of an item.
    Source: Theis et al. 2016 (A note on the evaluation of generative models), section 3.1.
    """
    return -log_prob.double() - (0.0 if bin_width is None else dims * math.log(bin_width))


def bits_per_dim(log_prob: Tensor, dims: int, bin_width: float | None) -> Tensor:
    """[B] float64: `code_length` in bits per component."""
    return code_length(log_prob, dims, bin_width) / (dims * math.log(2))


def combine_draws(draws: Sequence[Likelihood], how: Literal["mean", "importance"] = "mean") -> Likelihood:
    """Several answers for the same items as one, on the CPU; its kind is the weakest of theirs.

    With ℓ_k the log p of draw k, "mean" is Σ_k ℓ_k/K, and "importance" log(Σ_k exp(ℓ_k)/K). For draws of the
    dequantisation noise or of a latent both are bounds in expectation, E[mean] ≤ E[importance] ≤ log P, and the second
    tends to log P as K grows. It needs E[exp ℓ] ≤ P, true of densities at independent points of the cell and of
    importance weights p(x, z)/q(z|x).

    The standard error of an item is its spread over draws, which covers all that is random in them (dequantisation,
    probes): sd(ℓ)/√K, or sd(e^ℓ)/(mean(e^ℓ) √K) to first order. A single draw keeps its own.

    Raises:
        ValueError: if there are no draws, or if the importance-weighted kind is stochastic or numerical.
    Source: Burda et al. 2016 (Importance Weighted Autoencoders), section 3.
    """
    if not draws:
        raise ValueError("combine_draws: at least one draw is needed.")
    kind = max((draw.kind for draw in draws), key=KINDS.index)
    if how == "importance" and kind in ("stochastic", "numerical"):
        raise ValueError(
            f"combine: importance averages exp(log p), which needs the density itself, but this one is {kind}: "
            f"{_WHY_NOT[kind]}, so that the average comes out too large and bounds nothing. Use combine: mean."
        )
    values = torch.stack([draw.value.detach().double().cpu() for draw in draws])
    if len(draws) == 1:
        return Likelihood(values[0], kind, None if draws[0].stderr is None else draws[0].stderr.detach().double().cpu())
    root = math.sqrt(len(draws))
    if how == "mean":
        return Likelihood(values.mean(0), kind, values.std(0) / root)
    value = values.logsumexp(0) - math.log(len(draws))
    return Likelihood(value, kind, (values - value).exp().std(0) / root)


_WHY_NOT = {
    "stochastic": "an unbiased estimate of log p is none of p (E e^noise > 1)",
    "numerical": "the solver's errors differ between draws and the largest ones decide the average",
}


def how_made(draws: int, how: str, options: Mapping[str, Any]) -> str:
    """How an evaluation made its likelihoods, in a few words: "iw-5", "5 draws, 2 probes", "elbo at 8 times".

    Empty for a single draw.

    Args:
        draws: passes of the protocol, combined as `how` says ("mean", "importance").
        options: of the model's `likelihood`, whose own `draws` and `probes` count.
    """
    own = int(options.get("draws", 1))
    mean = own * (1 if how == "importance" else draws)
    bound, count = options.get("method") == "elbo", int(options.get("probes", 1))
    probes = count if options.get("divergence") == "hutchinson" and not bound else 0
    words = [f"iw-{draws}" if how == "importance" and draws > 1 else ""]
    words += [f"{mean} draws" if mean > 1 else "", f"{probes} probe{'s' * (probes > 1)}" if probes else ""]
    words += [f"elbo at {count} time{'s' * (count > 1)}" if bound else ""]
    return ", ".join(word for word in words if word)


class _CodeLengths(Metric):
    """Means over items of a number that every item has.

    With b_i the number of item i and e_i the noise of its estimate (dequantisation, probes), independent between items,
    the spread of b_i + e_i over items holds both variances already: sd/√n is the standard error of the whole, and the
    items' own standard errors are never added to it. Their root mean square over √n is the part of it that more draws
    would remove; `detail` tells it as the noise of the draws.
    """

    requires = (SupportsLogProb,)

    def start(self, subject: Subject) -> None:
        self.dataset, self.dims = subject.dataset, math.prod(subject.dataset.shape)
        self.restart()

    def restart(self) -> None:
        self.lengths: list[Tensor] = []
        self.noise: list[Tensor | None] = []
        self.kind = KINDS[0]

    def update(self, samples: Samples, batch: Batch | None) -> None:
        log_p, kind, stderr = samples.likelihood
        width = self.dataset.bin_width
        # An exact density of the dequantised point still only bounds the mass of its cell.
        kind = "bound" if kind == "exact" and width is not None else kind
        self.lengths.append(code_length(log_p.detach().cpu(), self.dims, None if kind == "pmf" else width))
        self.noise.append(None if stderr is None else stderr.detach().double().cpu())
        self.kind = max(self.kind, kind, key=KINDS.index)

    def estimate(self, unit: str, nats: float, references: Mapping[str, float]) -> Estimate:
        """The mean of the items in a unit that holds so many nats; the standard error is over items."""
        if not self.lengths:
            raise ValueError(f"{self.registered_name}: no likelihoods were taken in.")
        items = torch.cat(self.lengths) / nats
        stderr = items.std().item() / math.sqrt(len(items)) if len(items) > 1 else None
        return Estimate(
            value=items.mean().item(),
            stderr=stderr,
            n=len(items),
            unit=unit,
            better="lower",
            kind=self.kind,
            references=references or None,
            items=items,
            detail=self._noise(nats),
        )

    def _noise(self, nats: float) -> str:
        if any(part is None for part in self.noise):
            return ""
        noise = torch.cat(self.noise)
        share = (noise.square().mean() / len(noise)).sqrt().item() / nats
        return f"noise of the draws {share:.2g}" if share > 0 and math.isfinite(share) else ""


@register(Metric, "bits_per_dim")
class BitsPerDim(_CodeLengths):
    """Mean code length of test items in bits per dimension, for data that declare the width of their levels.

    The density of a dequantised item bounds the code length (`bound`); a probability mass is the code length (`pmf`).
    References are exact code lengths of simple models of the same data.
    """

    def start(self, subject: Subject) -> None:
        if subject.dataset.bin_width is None:
            raise NotApplicable("the data are continuous (no bin_width), so a code length is not defined; use `nll`")
        super().start(subject)
        self.references = subject.dataset.baselines()

    def compute(self) -> dict[str, Estimate]:
        return {"bits_per_dim": self.estimate("bits/dim", self.dims * math.log(2), self.references)}


@register(Metric, "nll")
class NegativeLogLikelihood(_CodeLengths):
    """Mean -log p of test items in nats, and in nats per dimension.

    Of continuous data p is the density in the units of the data, and the reference that of their true law q, where it
    is known. Of discrete data the number is the code length, as in `bits_per_dim`, with the same references.

    Where q is known, `kl_per_dim` is KL(q | p) = E_q[log q(x) - log p(x)] in nats per dimension, from the same test
    items. Its standard error is that of the paired differences, together with that of the normaliser of q
    (`Dataset.log_prob_stderr`): where p is close to q it is far below that of either mean, which the entropy of single
    items decides. An estimate may be negative. It is of the kind of log p.
    """

    version = 2  # 2: code lengths of discrete data, nats_per_dim; numbers that only join them leave it as it is

    def start(self, subject: Subject) -> None:
        super().start(subject)
        discrete = self.dataset.bin_width is not None
        bits = self.dataset.baselines() if discrete else {}
        self.references = {name: value * self.dims * math.log(2) for name, value in bits.items()}

    def restart(self) -> None:
        super().restart()
        self.true: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        super().update(samples, batch)
        law = self.dataset.log_prob(batch.x) if self.dataset.bin_width is None else None
        if law is not None:
            self.true.append(law.double().cpu())

    def compute(self) -> dict[str, Estimate]:
        law = {"true law": -torch.cat(self.true).mean().item()} if self.true else {}
        nats = self.references | law
        per_dim = {name: value / self.dims for name, value in nats.items()}
        found = {
            "nll": self.estimate("nats", 1.0, nats),
            "nats_per_dim": self.estimate("nats/dim", self.dims, per_dim),
        }
        return found | ({"kl_per_dim": self._divergence()} if self.true else {})

    def _divergence(self) -> Estimate:
        items = (torch.cat(self.true) + torch.cat(self.lengths)) / self.dims
        chance = items.std().item() / math.sqrt(len(items)) if len(items) > 1 else None
        return Estimate(
            value=items.mean().item(),
            stderr=None if chance is None else math.hypot(chance, self.dataset.log_prob_stderr / self.dims),
            n=len(items),
            unit="nats/dim",
            better="lower",
            kind=self.kind,
            references={"true law": 0.0},
            items=items,
            detail=self._noise(self.dims),
        )
