"""What a data set is to the rest of the package: items by index, and facts about them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..hashing import canonical, digest
from ..registry import Builder, ConfigError, build, kind, resolve
from ..transforms import Transform
from ..types import Batch, Shape

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
PROBED = 256  # items of each split that a fingerprint reads


@kind
class Dataset(ABC):
    """Items in the data set's own units, in three fixed splits, with the facts that a model is built from.

    Attributes:
        shape: shape of one item x, without the batch axis.
        num_classes: number of labels if conditions are class labels.
        condition_shape: shape of one condition if conditions are embeddings (mel spectrograms, vectors).
        target_shape: shape of one target, of class logits for a classifier.
        bin_width: spacing of the levels of discrete data (1 for integers); None for continuous data. Bits/dim are
            reported only where it is given.
        levels: number of levels of discrete data, so that uniform noise has log2(levels) bits/dim.
        sample_rate: samples a second of items [T] that are sound, amplitudes in [-1, 1]; None for anything else.
        frame_rate: frames a second of items [C, T, H, W] that are videos; None for anything else.
        periodic: whether items [C, H, W] are fields, which wrap around at their borders (True) or not (False); None for
            anything else.
        transform: configuration node of the proposed map from data space to model space, e.g.
            `{"name": "standardize"}`; the model owns the transform built from it and, if needed, fits it.
        log_prob_stderr: standard error in nats of `log_prob`, where that is known up to an error that all items share
            (an estimated normaliser).
        unit_of_time: what `Batch.times` counts, where there are times.
        local: names of the constructor's arguments that only say where something lies on this machine: paths, caches.
            They are no part of a protocol, which takes them from the run or the command line; what lies there enters
            its hash by `fingerprint`, which must therefore not depend on them.
    """

    shape: Shape
    num_classes: int | None = None
    condition_shape: Shape | None = None
    target_shape: Shape | None = None
    bin_width: float | None = None
    levels: int | None = None
    sample_rate: int | None = None
    frame_rate: float | None = None
    periodic: bool | None = None
    log_prob_stderr: float = 0.0
    unit_of_time: ClassVar[str | None] = None
    local: ClassVar[tuple[str, ...]] = ()
    transform: dict[str, Any] | str = "identity"

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of items of a split."""

    @abstractmethod
    def take(self, split: Split, indices: Tensor) -> Batch:
        """The items of a split at the indices [B] int64, in that order."""

    def facts(self) -> dict[str, Any]:
        """Plain data from which models are built; kept in every checkpoint, so that a model loads without its data."""
        return {
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "condition_shape": _plain(self.condition_shape),
            "target_shape": _plain(self.target_shape),
            "bin_width": self.bin_width,
            "levels": self.levels,
            "sample_rate": self.sample_rate,
            "periodic": self.periodic,
            "transform": resolve(Transform, self.transform, "data.transform"),
        }

    def fingerprint(self) -> str:
        """12 hexadecimal digits that change with the contents or the splits; kept in every run and protocol.

        Made from the sizes of the splits and evenly spaced items of each, with all that belongs to them: integers
        and levels enter exactly; of other numbers only mean and root mean square of each component, to some digits,
        because the last bits of simulated data differ between machines. Data sets that are read from files answer with
        a checksum of their contents instead, which is the same wherever the files lie.
        """
        facts: dict[str, Any] = {"shape": list(self.shape), "levels": self.levels, "bin_width": self.bin_width}
        for split in SPLITS:
            size = self.size(split)
            rows = torch.arange(0, size, max(1, size // PROBED))[:PROBED]
            facts[split] = [size, self._contents(self.take(split, rows)) if size else ""]
        return digest(facts)

    def _contents(self, batch: Batch) -> str:
        parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
        condition = parts.pop("condition")
        named = condition if isinstance(condition, Mapping) else {"": condition}
        parts |= {f"condition {name}": value for name, value in named.items()}
        return digest({name: self._summary(name, v) for name, v in sorted(parts.items()) if v is not None})

    def _summary(self, name: str, values: Tensor) -> str:
        """What changes with values [N, *]: integers and levels enter exactly, others by each component's moments."""
        if name == "x" and self.levels is not None and self.bin_width is not None:
            values = (values.double() / self.bin_width).round().short()
        if not values.is_floating_point():
            return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
        flat = values.double().flatten(1).nan_to_num() if values.ndim > 1 else values.double()[:, None].nan_to_num()
        size = flat.square().mean(0).sqrt()
        ratio = flat.mean(0) / size.clamp(min=torch.finfo(size.dtype).tiny)
        # adding 0 turns -0 into 0, which has another text
        return canonical(
            [[f"{s:.3e}", f"{round(r, 3) + 0.0}"] for s, r in zip(size.tolist(), ratio.tolist(), strict=True)]
        )

    def log_prob(self, x: Tensor) -> Tensor | None:
        """[B] exact log density of the law the data were drawn from, where it is known; None otherwise."""
        return None

    def conditions_of(self, path: Path) -> Tensor:
        """[N, *condition_shape] conditions made from a file of the user's.

        Raises:
            ConfigError: if no condition can be made from that file, or from files at all.
        """
        raise ConfigError(f"data '{self.registered_name}' makes no conditions from files, so that {path} is of no use.")

    def baselines(self) -> dict[str, float]:
        """Exact bits/dim of simple models on the test split by name, to read a model's number against."""
        return {}

    def checks(self) -> list[str]:
        """What the data say of themselves beside published numbers, a line each (shown by `--dry-run`)."""
        return []

    def batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """One pass over a split in order."""
        for rows in torch.arange(self.size(split)).split(batch_size):
            yield self.take(split, rows)


def proposal(given: Builder | None, default: dict[str, Any]) -> dict[str, Any]:
    """The transform node of a data set: the configured one, or the data set's own proposal."""
    return default if given is None else given.node


def centred(levels: int, noise: bool = True, bin_width: float = 1.0) -> dict[str, Any]:
    """The transform node that maps the levels 0, bin_width, … to [-1, 1], spread by uniform noise first unless they are
    to stay as they are (for a classifier)."""
    half = (levels if noise else levels - 1) * bin_width / 2
    affine = {"name": "affine", "loc": half, "scale": half}
    dequantize = {"name": "dequantize", "levels": levels, "bin_width": bin_width}
    return {"name": "compose", "parts": [dequantize, affine]} if noise else affine


def context(facts: dict[str, Any]) -> dict[str, Any]:
    """What constructors of models may ask for by keyword, from the facts of a data set."""
    shapes = {key: None if facts[key] is None else tuple(facts[key]) for key in _SHAPES}
    transform = build(Transform, facts["transform"], shape=shapes["shape"])
    return {"sample_rate": None, "periodic": None, **facts, **shapes, "transform": transform}


_SHAPES = ("shape", "condition_shape", "target_shape")


def _plain(shape: Shape | None) -> list[int] | None:
    return None if shape is None else list(shape)


def check_finite(name: str, split: str, x: Tensor) -> None:
    """Raises ValueError naming the first item of a split that holds NaN or infinity."""
    bad = ~x.flatten(1).isfinite().all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"data '{name}', split '{split}': item {first} holds NaN or infinity ({int(bad.sum())} of {len(x)} items "
            "do). Remove or mask those values before training."
        )
