"""Maps from items to the vectors that metrics compare, and the rounding that comes before them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..data.dataset import Dataset, Split
from ..registry import kind, register
from ..rng import generator
from ..types import NotApplicable
from .digits_features import ITEM, DigitsNetwork, identity, load_network


@kind
class FeatureExtractor(ABC):
    """A fixed map from items in data units to feature vectors.

    Attributes:
        label: how its numbers are called, short and stable: the Fréchet distance over it is "FD-<label>".
        identity: name, version and checksum of whatever the features depend on (weights, preparation, seeds), the same
            on every machine; numbers under different identities are not comparable, and their hashes differ.
        costly: whether features of whole splits are worth keeping on disk.
        local: names of constructor arguments that only say where something lies on this machine; what lies there
            enters by the identity.
        classes: how many classes `classify` tells apart; None if it is no classifier.
    """

    label: str
    identity: str
    costly: ClassVar[bool] = False
    local: ClassVar[tuple[str, ...]] = ()
    classes: ClassVar[int | None] = None

    @property
    def frechet_name(self) -> str:
        """What the Fréchet distance over these features is called."""
        return f"FD-{self.label}"

    @property
    def kernel_name(self) -> str:
        """What the kernel distance over these features is called."""
        return f"KID-{self.label}"

    def start(self, dataset: Dataset, device: torch.device) -> None:
        """Be ready for items of a data set on a device; called before the first item, and again for another model.

        Raises:
            ValueError: if such items cannot be read.
        """

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[B, D] features of x [B, *shape] in data units; row i depends on item i alone."""

    def classify(self, x: Tensor) -> Tensor:
        """[B] int64 the class that each item x [B, *shape] in data units is taken for.

        Raises:
            NotApplicable: if the extractor is no classifier.
        """
        raise NotApplicable(
            f"features '{self.label}' are those of no classifier; `features: digits` are, for 8x8 digits"
        )


@register(FeatureExtractor, "pixels")
class Pixels(FeatureExtractor):
    """The item itself, flattened, in float64 and divided by a scale.

    Args:
        scale: data units per feature unit, > 0.
    """

    label = "pixels"

    def __init__(self, scale: float = 1.0) -> None:
        if scale <= 0:
            raise ValueError(f"pixels: scale must be > 0, found {scale}.")
        self.scale = scale
        self.identity = f"pixels-v1:{scale:g}"

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1).double() / self.scale


@register(FeatureExtractor, "random_projection")
class RandomProjection(FeatureExtractor):
    """The flattened item under a fixed Gaussian matrix, in float64.

    G x / (scale √dims) with G_ij ~ N(0, 1), which keeps lengths on average: E |features|² = |x|² / scale².

    Args:
        dims: number of features.
        seed: of the matrix.
        scale: data units per feature unit, > 0.
    Source: Johnson & Lindenstrauss 1984.
    """

    label = "random-projection"

    def __init__(self, dims: int = 64, seed: int = 0, scale: float = 1.0) -> None:
        if dims < 1 or scale <= 0:
            raise ValueError(f"random_projection: dims >= 1 and scale > 0 are needed, found {dims} and {scale}.")
        self.dims, self.seed, self.scale = dims, seed, scale
        self.identity = f"random-projection-v1:{dims}:{seed}:{scale:g}"

    def __call__(self, x: Tensor) -> Tensor:
        x = x.flatten(1).double() / self.scale
        return x @ self.matrix(x.shape[1]).to(x.device)

    def matrix(self, size: int) -> Tensor:
        """[size, dims] float64, the same on every call."""
        g = generator("random projection", self.seed)
        return torch.randn(size, self.dims, generator=g, dtype=torch.float64) / math.sqrt(self.dims)


@register(FeatureExtractor, "digits")
class DigitsFeatures(FeatureExtractor):
    """64 features of 8x8 digits from a classifier with fixed weights, and its classes.

    Computed in float32 on the CPU, so that they do not depend on the evaluator's device.

    Raises:
        ValueError: if the weights are missing or altered, or if items are not [1, 8, 8].
    """

    label = "digits"
    identity = identity()
    classes = 10

    def __call__(self, x: Tensor) -> Tensor:
        return self._read(x, DigitsNetwork.features)

    def classify(self, x: Tensor) -> Tensor:
        return self._read(x, DigitsNetwork.forward).argmax(1)

    def _read(self, x: Tensor, layer: Callable[[DigitsNetwork, Tensor], Tensor]) -> Tensor:
        if tuple(x.shape[1:]) != ITEM:
            raise ValueError(
                f"features 'digits': items have shape {list(x.shape[1:])}, but the extractor was made for 8x8 images "
                f"{list(ITEM)}. Use `features: pixels` for other data."
            )
        with torch.no_grad():
            return layer(load_network(), x.float().cpu())


def to_levels(x: Tensor, dataset: Dataset) -> Tensor:
    """Items rounded to the nearest level of discrete data, halves up, clamped to its range; continuous data unchanged.

    Every model is scored on what it would write into a file, whatever its arithmetic.
    """
    if dataset.levels is None or dataset.bin_width is None:
        return x
    return (x / dataset.bin_width + 0.5).floor().clamp(0, dataset.levels - 1) * dataset.bin_width


def features_of(extractor: FeatureExtractor, dataset: Dataset, split: Split, batch_size: int) -> Tensor:
    """[N, D] features of a whole split, on the CPU."""
    return torch.cat([extractor(batch.x).cpu() for batch in dataset.batches(split, batch_size)])
