"""The Fréchet distance between Gaussians fitted to features, as a metric."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..registry import register
from ..rng import generator
from ..types import Batch, Estimate, Samples
from .bures import SIZES, bias_constant, extrapolated_distance, frechet_distance, influence, standard_error
from .features import FeatureExtractor, Pixels
from .metric import FeatureMetric, Metric, Subject
from .neighbours import float64_device
from .reference import checksum, read_statistics
from .statistics import Gaussian, gaussian


@register(Metric, "frechet")
class Frechet(FeatureMetric):
    """Fréchet distance between drawn samples and a split of the data, in the space of an extractor.

    It is called FD-<extractor>; FID only where the extractor is the network of that name with its published weights.

    It falls with the number of samples even for a perfect sampler (`bias_constant`), so numbers compare only at equal
    sample sizes; the reference "floor" is what a perfect sampler would score at these. A value below the floor is no
    sign of copies: a Gaussian fitted to the training set scores there, because it has that very mean and covariance.

    The standard error is that of the drawn samples, with the reference held fixed; its per-item values are
    value + `influence`, so that the difference of two models on the same seeds has a paired standard error.

    Args:
        features: the extractor.
        reference: the split that samples are compared with.
        allow_few: accept fewer samples than twice the number of features, where the covariance is poorly known.
        statistics: a .npz file with the `mu` and `sigma` of the reference, from `python -m evals.reference` or another
            tool; no split is read then. Its checksum is part of the protocol's hash.
        extrapolate: also report "<name>-infinity", the limit for ever more samples (`extrapolated_distance`). It takes
            36 distances instead of one, and 8 times as many samples.
    Source: Heusel et al. 2017 (TTUR), equation 6; Chong & Forsyth 2020 for the bias and its removal.
    """

    local: ClassVar[tuple[str, ...]] = ("statistics",)

    def __init__(
        self,
        features: FeatureExtractor = Pixels(),
        reference: Literal["train", "val", "test"] = "train",
        allow_few: bool = False,
        statistics: str | None = None,
        extrapolate: bool = False,
    ) -> None:
        self.features, self.reference, self.allow_few, self.extrapolate = features, reference, allow_few, extrapolate
        self.label = features.frechet_name + ("" if reference == "train" else f"-{reference}")
        self.file = None if statistics is None else Path(statistics).expanduser()
        self.other: Literal["train", "test"] = "train" if reference == "test" else "test"
        self.splits = (reference, self.other) if self.file is None else ()

    @property
    def fingerprint(self) -> str:
        return super().fingerprint if self.file is None else f"{super().fingerprint} {checksum(self.file)}"

    def start(self, subject: Subject) -> None:
        self.device = float64_device(subject.device)
        self.known = {}
        if self.file is None:
            self._read_splits(subject)
        else:
            self.target = self._from_file()
        self.constant = bias_constant(self.target.covariance)
        if subject.drawn is not None:  # told before they are drawn
            self._check_enough(subject.drawn, len(self.target.mean), "the sample")
        self.restart()

    def _read_splits(self, subject: Subject) -> None:
        data = subject.dataset
        real = subject.features(self.features, self.reference)
        self._check_enough(len(real), real.shape[1], f"the split '{self.reference}'")
        self.target = gaussian(real, self.device)
        if data.size(self.other) >= 2:
            other = gaussian(subject.features(self.features, self.other), self.device)
            self.known[f"{self.other} set"] = frechet_distance(other, self.target)
        if data.levels is not None and data.bin_width is not None and not self.features.costly:
            noise = uniform_noise(data, len(real)).split(subject.batch_size)
            found = torch.cat([self.features(x).cpu() for x in noise])
            self.known["uniform noise"] = frechet_distance(gaussian(found, self.device), self.target)

    def _from_file(self) -> Gaussian:
        target, facts = read_statistics(self.file)
        for key, here in (("extractor_id", self.features.identity), ("split", self.reference)):
            if facts.get(key, here) != here:
                raise ValueError(
                    f"{self.label}: {self.file} holds statistics with {key} '{facts[key]}', but the metric asks for "
                    f"'{here}'. Name another file, or make one with `python -m evals.reference`."
                )
        if target.n is not None:
            self._check_enough(target.n, len(target.mean), str(self.file))
        return Gaussian(*(part.to(self.device) for part in target[:2]), target.n)

    def update(self, samples: Samples, batch: Batch | None) -> None:
        super().update(samples, batch)
        if self.kept[-1].shape[1] != len(self.target.mean):
            raise ValueError(
                f"{self.label}: {self.file} holds the statistics of {len(self.target.mean)} features, but the "
                f"extractor '{self.features.identity}' gives {self.kept[-1].shape[1]}. They are of another extractor."
            )

    def compute(self) -> dict[str, Estimate]:
        z = self.drawn()
        self._check_enough(len(z), z.shape[1], "the sample")
        drawn = gaussian(z, self.device)
        moves = influence(z, drawn, self.target)
        share = None if self.target.n is None else self.constant / self.target.n  # of the floor, by the reference
        detail = "" if self.file is None else f"statistics {checksum(self.file)[:12]}"
        floor = None if share is None else self.constant / len(z) + share
        value = frechet_distance(drawn, self.target)
        found = {self.label: self._estimate(value, moves, "plug-in", floor, detail)}
        if self.extrapolate:
            self._check_enough(len(z) // SIZES, z.shape[1], f"the smallest of {SIZES} sizes of subsets")
            limit = extrapolated_distance(z, self.target)
            found[f"{self.label}-infinity"] = self._estimate(limit, moves, "extrapolated", share, detail)
        return found

    def _estimate(self, value: float, moves: Tensor, kind: str, floor: float | None, detail: str) -> Estimate:
        references = self.known if floor is None else {"floor": floor, **self.known}
        items, stderr, unit = value + moves, standard_error(moves), "squared feature units"
        return Estimate(value, stderr, len(moves), unit, "lower", kind, references, items=items, detail=detail)

    def _check_enough(self, n: int, width: int, what: str) -> None:
        least = 2 if self.allow_few else 2 * width
        if n < least:
            raise ValueError(
                f"{self.label}: {what} has {n} items for {width} features; at least {least} are needed for a usable "
                "covariance. Draw more, choose an extractor with fewer features, or set allow_few: true."
            )


def uniform_noise(dataset: Dataset, n: int) -> Tensor:
    """[n, *shape] items of independent, uniformly drawn levels: always the same ones."""
    levels = torch.randint(0, dataset.levels, (n, *dataset.shape), generator=generator("uniform noise"))
    return levels * dataset.bin_width
