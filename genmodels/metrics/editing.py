"""How well a model edits: whether an edit is what was asked for, how much it keeps, and what its method loses."""

import dataclasses
import math
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..registry import register
from ..types import Batch, Estimate, NotApplicable, Samples, SupportsEdit
from . import lpips
from .features import DigitsFeatures, FeatureExtractor
from .metric import Metric, Subject
from .picture_errors import mse, psnr, ssim

REMEMBERED = 5000  # training items that references are made of
CLOSEST = 20 * math.log10(2**24)  # decibels at which two pictures in float32 are the same


class Edits(Metric):
    """Values of single edits, and their means over items."""

    requires = (SupportsEdit,)
    units: ClassVar[dict[str, tuple[str, str]]]

    def restart(self) -> None:
        self.kept: list[dict[str, Tensor]] = []
        self.known: list[dict[str, Tensor]] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        finite = samples.x.flatten(1).isfinite().all(1)
        found, against = self.values(samples, batch)
        self.kept.append({name: torch.where(finite, v.detach().double().cpu(), math.nan) for name, v in found.items()})
        self.known.append(against)

    @abstractmethod
    def values(self, samples: Samples, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """[B] values of each edit by the name of their estimate, and [B] by name what the first is read against."""

    def compute(self) -> dict[str, Estimate]:
        if not self.kept:
            raise ValueError(f"{self.registered_name}: no edits were taken in.")
        against = {name: torch.cat([part[name] for part in self.known]).mean().item() for name in self.known[0]}
        found = {}
        for number, name in enumerate(self.kept[0]):
            items = torch.cat([part[name] for part in self.kept])
            stderr = items.std().item() / math.sqrt(len(items)) if len(items) > 1 else None
            unit, better = self.units[name]
            references = against if number == 0 else None
            found[name] = Estimate(
                items.mean().item(), stderr, len(items), unit, better, "plug-in", references, items, detail=self.detail
            )
        return found

    @property
    def detail(self) -> str:
        """How the numbers were made, in a few words."""
        return "" if self.features is None else f"features {self.features.label}"


@register(Metric, "edit_success")
class EditSuccess(Edits):
    """Share of edits that a fixed classifier takes for the class that was asked for.

    References: what the classifier scores on the items before they are edited ("real items"), and the share of those
    that it takes for the target already ("unedited items").

    Args:
        features: of a classifier with fixed weights.
    Raises:
        NotApplicable: if they are those of no classifier, or of one for other classes than the data have.
    """

    units: ClassVar[dict[str, tuple[str, str]]] = {"edit_success": ("share", "higher")}

    def __init__(self, features: FeatureExtractor = DigitsFeatures()) -> None:
        self.features = features

    def start(self, subject: Subject) -> None:
        told, there = self.features.classes, subject.dataset.num_classes
        if told is None or told != there:
            raise NotApplicable(
                f"features '{self.features.label}' tell {told or 'no'} classes apart, the data have {there or 'none'}"
            )
        self.restart()

    def values(self, samples: Samples, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found, before = self.features.classify(samples.x).cpu(), self.features.classify(batch.x).cpu()
        own, target = batch.condition.cpu(), samples.condition.cpu()
        against = {"real items": (before == own).double(), "unedited items": (before == target).double()}
        return {"edit_success": (found == target).double()}, against


@register(Metric, "edit_distance")
class EditDistance(Edits):
    """How far an edit is from its item: root mean square over the item's entries, in data units; and in features.

    The distance in features is Euclidean. References for the former: the same distance to training items of the target
    class, of the nearest one and in the mean. An edit that keeps what it need not change is closer than both.

    Args:
        features: null for no distance in features.
    """

    units: ClassVar[dict[str, tuple[str, str]]] = {
        "edit_distance": ("data units", "lower"),
        "edit_feature_distance": ("feature units", "lower"),
    }

    def __init__(self, features: FeatureExtractor | None = None) -> None:
        self.features = features

    def start(self, subject: Subject) -> None:
        if subject.dataset.num_classes is None:
            raise NotApplicable("edits go from class to class, and the data have none")
        size = subject.dataset.size("train")
        self.train = subject.dataset.take("train", torch.arange(size)[:: max(1, -(-size // REMEMBERED))])
        self.restart()

    def values(self, samples: Samples, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x, y = batch.x.cpu(), samples.x.cpu()
        found = {"edit_distance": mse(x, y).sqrt()}
        if self.features is not None:
            before, after = self.features(batch.x).cpu(), samples.features[self.features.identity]
            found["edit_feature_distance"] = (after.double() - before.double()).square().sum(1).sqrt()
        between = torch.cdist(x.flatten(1).double(), self.train.x.flatten(1).double()) / math.sqrt(x[0].numel())
        other = samples.condition.cpu()[:, None] != self.train.condition[None]
        near = between.masked_fill(other, math.inf).amin(1)
        mean = between.masked_fill(other, 0.0).sum(1) / (~other).sum(1)
        return found, {"nearest of the class": near, "of the class": mean}


@register(Metric, "reconstruction")
class Reconstruction(Edits):
    """What a method makes of an item under the item's own class: mean squared error, and for pictures PSNR and SSIM.

    Nothing is shared and guidance is equal both ways, so that an exact flow would return the item. Reconstructions are
    not rounded to levels; a PSNR above 144.5 dB, where float32 no longer tells pictures apart, counts as that. With
    `lpips` also LPIPS, whose weights are the user's (see `genmodels.metrics.lpips.files`).

    Args:
        lpips: backbone; null for none. Pictures must have 31 pixels or more a side (alex), or 16 (vgg).
        lpips_backbone: file of the backbone's weights; null for its published name in $GENMODELS_WEIGHTS.
        lpips_linear: file of the linear layers' weights; likewise.
    Raises:
        ValueError: if weights are missing, damaged, or those of another network.
    """

    local: ClassVar[tuple[str, ...]] = ("lpips_backbone", "lpips_linear")
    units: ClassVar[dict[str, tuple[str, str]]] = {
        "reconstruction_mse": ("squared data units", "lower"),
        "reconstruction_psnr": ("dB", "higher"),
        "reconstruction_ssim": ("1", "higher"),
        "reconstruction_lpips": ("1", "lower"),
    }

    def __init__(
        self,
        lpips: Literal["alex", "vgg"] | None = None,
        lpips_backbone: str | None = None,
        lpips_linear: str | None = None,
    ) -> None:
        self.lpips, self.lpips_backbone, self.lpips_linear = lpips, lpips_backbone, lpips_linear

    @property
    def fingerprint(self) -> str:
        return "" if self.lpips is None else f"lpips-{self.lpips}:{self._files().identity}"

    @property
    def detail(self) -> str:
        return ""

    def _files(self) -> lpips.Files:
        return lpips.files(self.lpips, self.lpips_backbone, self.lpips_linear)

    def start(self, subject: Subject) -> None:
        if subject.dataset.num_classes is None:
            raise NotApplicable("edits go from class to class, and the data have none")
        self.peak = peak(subject.dataset)
        self.distance = None if self.lpips is None else lpips.load(self.lpips, self._files())
        if self.lpips is not None and self.peak is None:
            raise NotApplicable("LPIPS needs pictures with levels, so that black and white are known")
        self.restart()

    @torch.no_grad()
    def values(self, samples: Samples, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if samples.reconstruction is None:
            raise NotApplicable("reconstructions were not asked for: edit.reconstruct is false")
        x, y = batch.x.cpu(), samples.reconstruction.cpu()
        found = {"reconstruction_mse": mse(x, y)}
        if self.peak is not None:
            found["reconstruction_psnr"] = psnr(x, y, self.peak).clamp(max=CLOSEST)
        if self.peak is not None and x.ndim > 3 and min(x.shape[-2:]) >= 3:
            found["reconstruction_ssim"] = ssim(x, y, self.peak)
        if self.distance is not None:
            found["reconstruction_lpips"] = self.distance(x, y, self.peak)
        return found, {}


def peak(dataset: Dataset) -> float | None:
    """Largest less smallest value of discrete data; None for data without levels."""
    if dataset.levels is None or dataset.bin_width is None:
        return None
    return (dataset.levels - 1) * dataset.bin_width


@register(Metric, "edit_memory")
class EditMemory(Edits):
    """Bytes of attention features that an edit keeps from the inversion, per item; 0 for methods that share none."""

    units: ClassVar[dict[str, tuple[str, str]]] = {"edit_memory": ("bytes", "none")}

    def start(self, subject: Subject) -> None:
        if subject.dataset.num_classes is None:
            raise NotApplicable("edits go from class to class, and the data have none")
        self.restart()

    def values(self, samples: Samples, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"edit_memory": torch.full((len(samples.x),), samples.stored, dtype=torch.float64)}, {}

    def compute(self) -> dict[str, Estimate]:
        """A count of a whole batch shared out evenly: it has no spread over items."""
        (found,) = super().compute().values()
        return {"edit_memory": dataclasses.replace(found, stderr=None, items=None, kind="count")}
