"""Data given from Python: what stands for them in a configuration, and how tensors become a data set."""

from dataclasses import fields
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..types import Batch, Shape
from .dataset import Dataset, Split
from .memory import InMemory
from .partition import Order, check_levels, off_levels, partition, proposal_for

Array = Tensor | np.ndarray


@register(Dataset, "external")
class External(Dataset):
    """Stands for data that were given from Python: `train(config, dataset=from_tensors(x))` with `data: external`.

    The configuration of such a run says how, not on what it was trained. Whoever asks for items gets a ConfigError.
    """

    @property
    def shape(self) -> Shape:
        self._absent()

    @classmethod
    def known_by(cls, facts: dict[str, Any]) -> Dataset:
        """What a trained run still knows of such data: shapes and classes, no items."""
        names = ("shape", "condition_shape", "target_shape")
        shapes = {name: None if facts[name] is None else tuple(facts[name]) for name in names}
        known = type("Known", (cls,), shapes)()
        known.num_classes, known.bin_width = facts["num_classes"], facts["bin_width"]
        known.sample_rate, known.periodic = facts.get("sample_rate"), facts.get("periodic")
        return known

    def size(self, split: Split) -> int:
        self._absent()

    def take(self, split: Split, indices: Tensor) -> Batch:
        self._absent()

    def facts(self) -> dict[str, Any]:
        self._absent()

    def fingerprint(self) -> str:
        self._absent()

    def _absent(self) -> NoReturn:
        raise ConfigError(
            "data 'external': this run's data were given from Python: pass them again: train(config, dataset=…), with "
            "`genmodels.data.external.from_tensors(x)` or a data set of your own. What is trained can be sampled from "
            "without them: Run.open(folder).load().sample(16)."
        )


class Given(InMemory):
    """Tensors as a data set; made by `from_tensors`."""

    registered_name = "external"

    def __init__(self, splits: dict[Split, Batch], facts: dict[str, Any]) -> None:
        vars(self).update(facts)
        for split, items in splits.items():
            self.hold(split, items)

    def fingerprint(self) -> str:
        return self.checksum()


def from_tensors(
    x: Array,
    *,
    condition: Array | None = None,
    target: Array | None = None,
    val: float | Batch = 0.1,
    test: float | Batch = 0.1,
    order: Order = "shuffled",
    seed: int = 0,
    num_classes: int | None = None,
    levels: int | None = None,
    bin_width: float = 1.0,
    sample_rate: int | None = None,
    periodic: bool | None = None,
    transform: dict[str, Any] | str | None = None,
) -> InMemory:
    """A data set of tensors or arrays, to be passed as `train(config, dataset=…)`; nothing is shared with them.

    Whole numbers as condition or target are class labels, real ones vectors. Continuous data propose standardisation,
    discrete ones dequantisation.

    Args:
        x: [N, *shape] items.
        condition: [N] labels, or [N, *condition_shape].
        target: [N] labels, or [N, *target_shape] (real [N] is taken as [N, 1]).
        val, test: share of the items, number of items if at least 1, or a batch of items of their own.
        order: "shuffled" cuts splits from the items in random order, "file" from their end: n_test = int(test·N) last
            ones, before them n_val = int(val·(N - n_test)).
        seed: of the shuffle.
        num_classes: of the labels (of the condition, if both are labels); None for the largest + 1.
        levels: number of levels 0, bin_width, … of discrete data; None for continuous data.
        bin_width: spacing of the levels.
        sample_rate: samples a second, if x [N, T] holds sound with amplitudes in [-1, 1].
        periodic: whether x [N, C, H, W] holds fields that wrap around at their borders; None if it holds no fields.
        transform: node of the transform instead of the proposed one.
    Raises:
        ConfigError: naming the argument and the first item that does not fit.

    >>> points = from_tensors(torch.rand(100, 2), condition=torch.arange(100) % 3, val=0, test=20)
    >>> points.size("train"), points.size("test"), points.num_classes
    (80, 20, 3)
    """
    check_levels(levels, bin_width, "from_tensors")
    items = _checked(Batch(x, condition, target), "", levels, bin_width)
    if sample_rate is not None and (sample_rate < 1 or items.x.ndim != 2):
        raise ConfigError(
            f"from_tensors: sample_rate={sample_rate} is for sound: a number of at least 1, and x of shape [N, T]; "
            f"found {list(items.x.shape)}."
        )
    own = {split: given for split, given in (("val", val), ("test", test)) if isinstance(given, Batch)}
    if periodic is not None and items.x.ndim != 4:
        raise ConfigError(
            f"from_tensors: periodic={periodic} is for fields: x of shape [N, C, H, W]; found {list(items.x.shape)}."
        )
    parts = {split: _checked(given, f"{split}.", levels, bin_width) for split, given in own.items()}
    for split, part in parts.items():
        _check_alike(split, part, items)
    cut = {"val": 0.0 if "val" in own else val, "test": 0.0 if "test" in own else test}
    order = "file" if not any(cut.values()) else order
    rows = partition(len(items), **cut, order=order, seed=seed, where="from_tensors")
    splits = {split: parts[split] if split in parts else items[rows[split]] for split in rows}
    facts = {"shape": tuple(items.x.shape[1:]), "levels": levels, "bin_width": None if levels is None else bin_width}
    facts |= {"sample_rate": sample_rate, "periodic": periodic}
    facts |= _facts([items, *parts.values()], num_classes)
    return Given(splits, {**facts, "transform": transform or proposal_for(levels, bin_width)})


def _checked(given: Batch, prefix: str, levels: int | None, bin_width: float) -> Batch:
    """A copy of items in the types that models take, with every number looked at."""
    extra = [
        f.name
        for f in fields(given)
        if f.name not in ("x", "condition", "target") and getattr(given, f.name) is not None
    ]
    if extra:
        raise ConfigError(f"from_tensors: {prefix}{extra[0]} is given; only x, condition and target are taken.")
    x = _tensor(given.x, f"{prefix}x")
    if x.ndim < 2 or 0 in x.shape:
        advice = " For one number an item, give x.reshape(-1, 1)." if x.ndim == 1 else ""
        raise ConfigError(f"from_tensors: {prefix}x has shape {list(x.shape)}; [N, *shape] is needed.{advice}")
    x = _floats(x, f"{prefix}x")
    if levels is not None and (bad := off_levels(x, levels, bin_width)).any():
        raise ConfigError(
            f"from_tensors: {prefix}x, item {int(bad.nonzero()[0])} holds a value that is none of the {levels} "
            f"levels k·{bin_width:g}, k = 0 … {levels - 1} ({int(bad.sum()):,} of {len(x):,} items do). Correct levels "
            "and bin_width, or leave both out for continuous data."
        )
    return Batch(
        x, _aside(given.condition, f"{prefix}condition", len(x)), _aside(given.target, f"{prefix}target", len(x))
    )


def _tensor(value: Any, name: str) -> Tensor:
    """The value as a tensor of numbers on the CPU."""
    try:
        if isinstance(value, Tensor):
            found = value.detach().cpu()
        else:
            array = np.asarray(value)
            found = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))  # torch knows one byte order
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"from_tensors: {name} must be a tensor or an array of numbers, found {type(value).__name__}."
        ) from None
    if found.is_complex():
        raise ConfigError(
            f"from_tensors: {name} is {found.dtype}; real numbers are needed. Give torch.view_as_real(x)."
        )
    return found


def _floats(value: Tensor, name: str) -> Tensor:
    """A float32 copy; ConfigError naming the first item that holds what float32 cannot."""
    out = value.to(torch.float32, copy=True)
    bad = ~out.reshape(len(out), -1).isfinite().all(1)
    if bad.any():
        raise ConfigError(
            f"from_tensors: {name}, item {int(bad.nonzero()[0])} holds NaN, infinity or a number beyond float32 "
            f"(3.4e38); {int(bad.sum()):,} of {len(bad):,} items do. Remove or mask them."
        )
    return out


def _aside(value: Array | None, name: str, n: int) -> Tensor | None:
    """Labels [N] int64, or vectors [N, *] float32."""
    if value is None:
        return None
    found = _tensor(value, name)
    if found.ndim == 0 or len(found) != n or 0 in found.shape:
        raise ConfigError(f"from_tensors: {name} has shape {list(found.shape)}, but there are {n:,} items in x.")
    if found.is_floating_point():
        return _floats(found.reshape(n, -1) if found.ndim == 1 else found, name)
    if found.ndim > 1:
        raise ConfigError(
            f"from_tensors: {name} holds whole numbers of shape {list(found.shape)}; labels are [N]. Give vectors as "
            f"real numbers: {name}.float()."
        )
    labels = found.to(torch.int64, copy=True)
    if (labels < 0).any():
        first = int((labels < 0).nonzero()[0])
        raise ConfigError(
            f"from_tensors: {name}, item {first} is the label {int(labels[first])}; labels count from 0. Renumber "
            f"them, or give real values: {name}.float()."
        )
    return labels


def _check_alike(split: str, part: Batch, items: Batch) -> None:
    """Raises ConfigError unless the items of a split are of the kind of the training items."""
    for name in ("x", "condition", "target"):
        found, needed = (_kind(getattr(batch, name)) for batch in (part, items))
        if found != needed:
            raise ConfigError(f"from_tensors: {split}.{name} is {found}, but {name} is {needed}; they must agree.")


def _kind(value: Tensor | None) -> str:
    if value is None:
        return "not given"
    return f"[N, {', '.join(map(str, value.shape[1:]))}] real" if value.is_floating_point() else "[N] labels"


def _facts(parts: list[Batch], num_classes: int | None) -> dict[str, Any]:
    """What the conditions and targets are: labels of how many classes, or vectors of what shape."""
    condition, target = ([getattr(part, name) for part in parts] for name in ("condition", "target"))
    found: dict[str, Any] = {}
    for name, values in (("condition", condition), ("target", target)):
        if values[0] is None:
            continue
        if values[0].is_floating_point():
            found[f"{name}_shape"] = tuple(values[0].shape[1:])
            continue
        classes = 1 + max(int(labels.max()) for labels in values)
        if num_classes is not None and classes > num_classes:
            raise ConfigError(
                f"from_tensors: {name} holds the label {classes - 1}, but num_classes={num_classes} allows 0 … "
                f"{num_classes - 1}."
            )
        classes, num_classes = num_classes or classes, None
        found |= {"num_classes": classes} if name == "condition" else {"target_shape": (classes,)}
    if num_classes is not None:
        raise ConfigError(f"from_tensors: num_classes={num_classes} is given, but no labels as condition or target.")
    return found
