"""Does a model copy its training data? Nearest neighbours tell."""

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import register
from ..types import Batch, Estimate, Samples, SupportsSample
from .features import FeatureExtractor, Pixels
from .metric import Metric, Subject
from .neighbours import block_size, blocks, float64_device, nearest, radii

SIGNIFICANT = 3.0  # standard errors


def authentic(distance: Tensor, index: Tensor, gaps: Tensor) -> Tensor:
    """[N] bool: the training item nearest to a sample has another training item nearer than the sample.

    Args:
        distance, index: [N] from a sample to its nearest training item, and the number of that item.
        gaps: [M] `radii(train, 1)`.
    Source: Alaa et al. 2022 (How faithful is your synthetic data?), section 2; as share of samples, Stein et al. 2023.
    """
    return gaps[index] < distance


def nearest_counts(x: Tensor, pool: Tensor) -> Tensor:
    """[M] how many rows of x have that row of the pool as their nearest; ties share their vote."""
    votes = torch.zeros(len(pool), dtype=torch.float64, device=pool.device)
    for part in x.split(block_size(x.shape[1])[0]):
        least = nearest(part, pool)[0][:, None]
        tied = [block.within(least, inclusive=True) for block in blocks(part, pool)]
        share = 1 / sum(block.sum(1) for block in tied).double()
        votes += torch.cat([share @ block.double() for block in tied])
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


def share_below(x: Tensor, y: Tensor) -> Share:
    """P(x < y) + ½ P(x = y) over all pairs of x [n] and y [m] (Mann-Whitney), with its standard error.

    Var ≈ Var_i(share of y above x_i)/n + Var_j(share of x below y_j)/m, whatever the laws; where they are one it is
    about (1/n + 1/m)/12.
    """

    def below(a: Tensor, b: Tensor) -> Tensor:  # [len(b)] share of a below each b
        ordered = a.sort().values
        count = torch.searchsorted(ordered, b) + torch.searchsorted(ordered, b, right=True)
        return count.double() / (2 * len(a))

    of_x, of_y = 1 - below(y, x), below(x, y)
    variance = of_x.var(correction=0) / len(x) + of_y.var(correction=0) / len(y)
    return Share(of_y.mean().item(), variance.sqrt().item())


def _keys(x: Tensor) -> list[bytes]:
    """One key per item, equal for equal items (adding 0 turns -0 into 0)."""
    return [row.tobytes() for row in (x.flatten(1).double().cpu() + 0.0).numpy()]


@register(Metric, "authenticity")
class Authenticity(Metric):
    """Four signs of copying, each beside what fresh data (the test set) would show.

    memorised: how much nearer samples lie to training than to test items (`memorised_share`), 0 to 1; blurred or
    averaged samples, near to both, do not raise it. authenticity: share of samples farther from their nearest training
    item than that is from its own nearest. nearer: the chance that a sample lies nearer to its nearest training item
    than a test item does to its own; ½ for fresh data. Averages raise it, too, so it describes and flags nothing.
    copies: share of samples equal to a training item. A model whose `memorised` exceeds a limit, or whose copies exceed
    those of the test set, by more than 3 standard errors, is flagged.

    Args:
        features: the space of the distances.
        limit: memorised share from which a model is flagged.
    Source: Alaa et al. 2022 (How faithful is your synthetic data?), for authenticity; Meehan et al. 2020 (A
    non-parametric test to detect data-copying), without its cells, for nearer.
    """

    requires = (SupportsSample,)
    splits = ("train", "test")

    def __init__(self, features: FeatureExtractor = Pixels(), limit: float = 0.2) -> None:
        self.features, self.limit = features, limit

    def start(self, subject: Subject) -> None:
        data, self.device = subject.dataset, float64_device(subject.device)
        self.train = subject.features(self.features, "train").to(self.device)
        if len(self.train) < 2:
            raise ValueError(f"authenticity: at least 2 training items are needed, found {len(self.train)}.")
        self.test = subject.features(self.features, "test").to(self.device) if data.size("test") else None
        self.gaps = radii(self.train, 1)
        items = [key for batch in data.batches("train", subject.batch_size) for key in _keys(batch.x)]
        self.keys = set(items)
        self.own_copies = sum(count for count in Counter(items).values() if count > 1) / len(items)
        self.fresh = self.fresh_copies = None
        if self.test is not None:
            self.pool = torch.cat([self.train, self.test])
            self.fresh_distance, index = nearest(self.test, self.train)
            self.fresh = _binomial(authentic(self.fresh_distance, index, self.gaps)).value
            items = [key for batch in data.batches("test", subject.batch_size) for key in _keys(batch.x)]
            self.fresh_copies = sum(key in self.keys for key in items) / len(items)
        self.restart()

    def restart(self) -> None:
        self.hits: list[Tensor] = []
        self.distance: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.votes: Tensor | float = 0.0

    def update(self, samples: Samples, batch: Batch | None) -> None:
        z = samples.features[self.features.identity].to(self.device)
        distance, index = nearest(z, self.train)
        self.hits.append(authentic(distance, index, self.gaps))
        self.distance.append(distance)
        self.copies.append(torch.tensor([key in self.keys for key in _keys(samples.x)], dtype=torch.bool))
        if self.test is not None:
            self.votes = self.votes + nearest_counts(z, self.pool)

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
            nearer = share_below(torch.cat(self.distance), self.fresh_distance)
            out["nearer"] = Estimate(*nearer, n, "share", "none", "plug-in", {"fresh data": 0.5})
        fresh = None if self.fresh is None else {"test set": self.fresh}
        out["authenticity"] = Estimate(*share, n, "share", "none", "plug-in", fresh)
        fresh = None if self.fresh_copies is None else {"test set": self.fresh_copies}
        flags = ("overlap_suspected",) if self._too_many(copied.value, n) else ()
        out["copies"] = Estimate(*copied, n, "share", "none", "plug-in", fresh, flags=flags)
        return out

    def _too_many(self, share: float, n: int) -> bool:
        """Two-proportion test of the copies among samples against those among test items; without those, against the
        training items that have a twin."""
        fresh, m = (self.own_copies, len(self.train)) if self.test is None else (self.fresh_copies, len(self.test))
        pooled = (share * n + fresh * m) / (n + m)
        stderr = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
        return share - fresh > SIGNIFICANT * stderr > 0
