"""Does a model copy its training data? Nearest neighbours tell."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import register
from ..types import Batch, Estimate, Samples, SupportsSample
from .features import FeatureExtractor, Pixels
from .metric import Metric, Subject

CHUNK = 2**24  # distances held at once
SIGNIFICANT = 3.0  # standard errors


def distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, M] float64 Euclidean distances; from differences, so that copies are at exactly 0."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _chunks(x: Tensor, width: int) -> tuple[Tensor, ...]:
    return x.split(max(1, CHUNK // max(width, 1)))


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [N] from each row of x to the nearest row of y, and its index [N]."""
    found = [distances(part, y).min(1) for part in _chunks(x, len(y))]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def nearest_other(y: Tensor) -> Tensor:
    """[M] distance from each row of y to the nearest other row."""
    found, start = [], 0
    for part in _chunks(y, len(y)):
        d = distances(part, y)
        d[torch.arange(len(part)), torch.arange(start, start + len(part))] = math.inf
        found.append(d.min(1).values)
        start += len(part)
    return torch.cat(found)


def authentic(x: Tensor, train: Tensor, gaps: Tensor) -> Tensor:
    """[N] bool: the training item nearest to x has another training item nearer than x.

    Args:
        gaps: `nearest_other(train)`.
    Source: Alaa et al. 2022 (How faithful is your synthetic data?), section 2; as share of samples, Stein et al. 2023.
    """
    d, index = nearest(x, train)
    return gaps[index] < d


def nearest_counts(x: Tensor, pool: Tensor) -> Tensor:
    """[M] how many rows of x have that row of the pool as their nearest; ties share their vote."""
    votes = torch.zeros(len(pool), dtype=torch.float64)
    for part in _chunks(x, len(pool)):
        d = distances(part, pool)
        tied = (d == d.min(1, keepdim=True).values).double()
        votes += (tied / tied.sum(1, keepdim=True)).sum(0)
    return votes


class Share(NamedTuple):
    value: float
    stderr: float


def memorised_share(votes: Tensor, num_train: int) -> Share:
    """(s - p)/(1 - p): s the share of samples nearest to a training item, p the share of such items in the pool.

    0 in expectation if the sampler does not tell training from test items, 1 if it only produces neighbours of training
    items. The standard error is exact for the null hypothesis that which items were trained on is random:
    Var s = p(1 - p) M/(M - 1) Σⱼ (cⱼ - c̄)²/n² (sampling without replacement).

    Args:
        votes: [M] of `nearest_counts`, training items first.
    """
    total, n = len(votes), votes.sum()
    p = num_train / total
    variance = p * (1 - p) * total / (total - 1) * (votes - votes.mean()).square().sum() / n**2
    value = (votes[:num_train].sum() / n - p) / (1 - p)
    return Share(value.item(), variance.sqrt().item() / (1 - p))


def _binomial(hits: Tensor) -> Share:
    p = hits.double().mean().item()
    return Share(p, math.sqrt(p * (1 - p) / len(hits)))


def _keys(x: Tensor) -> list[bytes]:
    """One key per item, equal for equal items (adding 0 turns -0 into 0)."""
    return [row.tobytes() for row in (x.flatten(1).double().cpu() + 0.0).numpy()]


@register(Metric, "authenticity")
class Authenticity(Metric):
    """Three signs of copying, each beside what fresh data (the test set) would show.

    memorised: how much nearer samples lie to training than to test items (`memorised_share`), 0 to 1; blurred or
    averaged samples, near to both, do not raise it. authenticity: share of samples farther from their nearest training
    item than that is from its own nearest. copies: share of samples equal to a training item. A model whose `memorised`
    exceeds a limit, or whose copies exceed those of the test set, by more than 3 standard errors, is flagged.

    Args:
        features: the space of the distances.
        limit: memorised share from which a model is flagged.
    """

    requires = (SupportsSample,)
    splits = ("train", "test")

    def __init__(self, features: FeatureExtractor = Pixels(), limit: float = 0.2) -> None:
        self.features, self.limit = features, limit

    def start(self, subject: Subject) -> None:
        data = subject.dataset
        self.train = subject.features(self.features, "train")
        if len(self.train) < 2:
            raise ValueError(f"authenticity: at least 2 training items are needed, found {len(self.train)}.")
        self.test = subject.features(self.features, "test") if data.size("test") else None
        self.gaps = nearest_other(self.train)
        self.keys = {key for batch in data.batches("train", subject.batch_size) for key in _keys(batch.x)}
        self.fresh = self.fresh_copies = None
        if self.test is not None:
            self.fresh = _binomial(authentic(self.test, self.train, self.gaps)).value
            items = [key for batch in data.batches("test", subject.batch_size) for key in _keys(batch.x)]
            self.fresh_copies = sum(key in self.keys for key in items) / len(items)
        self.restart()

    def restart(self) -> None:
        pool = len(self.train) + (0 if self.test is None else len(self.test))
        self.hits: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.votes = torch.zeros(pool, dtype=torch.float64)

    def update(self, samples: Samples, batch: Batch | None) -> None:
        z = samples.features[self.features.identity]
        self.hits.append(authentic(z, self.train, self.gaps))
        self.copies.append(torch.tensor([key in self.keys for key in _keys(samples.x)], dtype=torch.bool))
        if self.test is not None:
            self.votes += nearest_counts(z, torch.cat([self.train, self.test]))

    def compute(self) -> dict[str, Estimate]:
        if not self.hits:
            raise ValueError("authenticity: no samples were taken in.")
        share, copied = _binomial(torch.cat(self.hits)), _binomial(torch.cat(self.copies))
        n = sum(map(len, self.hits))
        out = {}
        if self.test is not None:
            m = memorised_share(self.votes, len(self.train))
            flags = ("overlap_suspected",) if m.value - SIGNIFICANT * m.stderr > self.limit else ()
            out["memorised"] = Estimate(*m, n, "share", "lower", "plug-in", {"fresh data": 0.0}, flags=flags)
        fresh = None if self.fresh is None else {"test set": self.fresh}
        out["authenticity"] = Estimate(*share, n, "share", "none", "plug-in", fresh)
        fresh = None if self.fresh_copies is None else {"test set": self.fresh_copies}
        flags = ("overlap_suspected",) if self._too_many(copied.value, n) else ()
        out["copies"] = Estimate(*copied, n, "share", "none", "plug-in", fresh, flags=flags)
        return out

    def _too_many(self, share: float, n: int) -> bool:
        """Two-proportion test of the copies among samples against those among test items."""
        if self.test is None:
            return False
        pooled = (share * n + self.fresh_copies * len(self.test)) / (n + len(self.test))
        stderr = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / len(self.test)))
        return share - self.fresh_copies > SIGNIFICANT * stderr > 0
