"""Classification of multivariate series: problems of the UEA archive in its .ts files, which users bring."""

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..hashing import digest
from ..registry import ConfigError, register
from ..rng import generator
from ..types import Batch
from .dataset import SPLITS, Dataset, Split
from .memory import InMemory
from .padded import rescaled, scales, stack, thinned
from .trajectories import item_noise

HOME = "the UEA & UCR time series classification archive (the multivariate problems in .ts format)"
UNKNOWN = ("?", "NaN", "nan")
POOLED = 0.15  # share of the pooled series that validates, and that tests


class Problem(NamedTuple):
    """What a .ts file holds.

    Args:
        classes: names of the classes, in the order of the header.
        series: [C, L_i] float64 values of each item, NaN where unknown.
        labels: the place of each item's class in `classes`.
    """

    classes: list[str]
    series: list[Tensor]
    labels: list[int]


@register(Dataset, "uea")
class UEA(InMemory):
    """Series [L, C] of a problem of the UEA archive, to be classified.

    Files: <path>/<problem>/<problem>_TRAIN.ts and _TEST.ts, or both in <path> itself. Time counts steps, over those of
    the longest series: 0 … 1. Shorter series are padded at the end by repeating their last time, unseen; values marked
    ? are unseen, too. Each channel is standardised by the training items.

    Splits: "archive" keeps the archive's test file, and of every class of its training file takes a share `val` for
    "val", drawn at random. "pooled" takes both files together and of every class 15 % for "val" and 15 % for "test", as
    Kidger et al. 2020 did; the draw is not theirs.

    Args:
        path: the folder of the archive, or of the problem; ~ is the home folder.
        problem: as its files are called: CharacterTrajectories.
        missing: share of the steps of each series that is lost, all channels at once, the same whenever it is taken;
            one step at least is left.
        split: of which files the splits are.
        val: share of the training file's items that is held out, by class.
        seed: of the draw of splits and of what is missing.
    Raises:
        ConfigError: if files are missing or malformed, naming file and line.
    Source: Bagnall et al. 2018 (The UEA multivariate time series classification archive); Kidger et al. 2020 (Neural
        controlled differential equations), section 4.1.
    """

    local = ("path",)
    unit_of_time = "the longest series"

    def __init__(
        self,
        path: str,
        problem: str,
        missing: float = 0.0,
        split: Literal["archive", "pooled"] = "archive",
        val: float = 0.15,
        seed: int = 0,
    ) -> None:
        for name, share in (("missing", missing), ("val", val)):
            if not 0 <= share < 1:
                raise ConfigError(f"data.{name}: a share in [0, 1) is needed, found {share:g}.")
        train_at, test_at = locate(Path(os.path.expanduser(path)), problem)
        contents = [place.read_bytes() for place in (train_at, test_at)]
        train, test = (parse(place, content) for place, content in zip((train_at, test_at), contents, strict=True))
        _check_pair(train_at, train, test_at, test)
        labels = torch.tensor(train.labels + [train.classes.index(test.classes[k]) for k in test.labels])
        x, times, mask = stack([_item(values) for values in train.series + test.series])
        longest = max(1, x.shape[1] - 1)
        whole = Batch(x, times=times / longest, mask=mask, target=labels)
        rows = _splits(labels, len(train.labels), split, val, seed)
        fitted = whole[rows["train"]]
        offset, scale = scales(fitted.x, fitted.mask, "standard")
        self.shape, self.target_shape = tuple(x.shape[1:]), (len(train.classes),)
        for name in SPLITS:
            items = whole[rows[name]]
            kept = items.mask
            if missing:
                kept = thinned(kept, missing, item_noise(len(items), f"uea {problem}", name, seed))
            self.hold(name, items.replace(x=rescaled(items.x, kept, offset, scale), mask=kept))
        sums = [hashlib.sha256(content).hexdigest() for content in contents]
        self._digest = digest({"files": sums, "options": [missing, split, val, seed]})

    def fingerprint(self) -> str:
        """12 hexadecimal digits of both files' contents and of every argument that decides the items."""
        return self._digest


def _item(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values [L, C], steps [L] and mask [L, C] of a series [C, L] with NaN where values are unknown."""
    values = values.T
    seen = ~values.isnan()
    return values.nan_to_num(0.0).float(), torch.arange(len(values), dtype=torch.float64), seen


def _splits(labels: Tensor, n_train: int, split: str, val: float, seed: int) -> dict[Split, Tensor]:
    """The rows of each split, the first `n_train` being those of the training file; every class gives its share."""
    pooled = split == "pooled"
    drawn: dict[Split, list[Tensor]] = {name: [] for name in SPLITS}
    if not pooled:
        drawn["test"].append(torch.arange(n_train, len(labels)))
    mine = labels if pooled else labels[:n_train]
    for label in mine.unique().tolist():
        rows = torch.where(mine == label)[0]
        rows = rows[torch.randperm(len(rows), generator=generator("uea", seed, label))]
        n_val = round((POOLED if pooled else val) * len(rows))
        n_test = round(POOLED * len(rows)) if pooled else 0
        for name, part in zip(SPLITS, rows.split([len(rows) - n_val - n_test, n_val, n_test]), strict=True):
            drawn[name].append(part)
    return {name: torch.cat(parts).sort().values for name, parts in drawn.items()}


def locate(folder: Path, problem: str) -> tuple[Path, Path]:
    """The two files of a problem.

    Raises:
        ConfigError: naming what is missing, and where it must lie.
    """
    names = [f"{problem}_{part}.ts" for part in ("TRAIN", "TEST")]
    for place in (folder / problem, folder):
        found = [place / name for name in names]
        if all(file.is_file() for file in found):
            return found[0], found[1]
    problems = sorted(file.stem[:-6] for way in ("*", "*/*") for file in folder.glob(f"{way}_TRAIN.ts"))
    holds = f"It holds {', '.join(problems[:8])}{', …' if len(problems) > 8 else ''}. " if problems else ""
    raise ConfigError(
        f"data.path: {folder / problem} lacks {' or '.join(names)}, or is no folder. {holds}Get the problem from "
        f"{HOME} and put both files there; nothing is downloaded."
    )


def parse(place: Path, content: bytes) -> Problem:
    """The items of a .ts file: a header of lines @name value, @data, and a line an item, channel:channel:…:class.

    Raises:
        ConfigError: naming file and line, of what is no such file or no classification.
    """
    lines = _lines(content.decode("utf-8", "replace"))
    classes = _header(place, lines)
    problem = Problem(classes, [], [])
    for number, line in lines:
        where = f"{place}, line {number}"
        *channels, label = line.split(":")
        if label.strip() not in classes:
            raise ConfigError(f"{where}: the class '{label.strip()[:40]}' is none of {', '.join(classes)}.")
        values = _values(channels, where)
        if problem.series and len(values) != len(problem.series[0]):
            raise ConfigError(
                f"{where}: {len(values)} channels, where the series before have {len(problem.series[0])}."
            )
        problem.series.append(values)
        problem.labels.append(classes.index(label.strip()))
    if not problem.series:
        raise ConfigError(f"{place} holds no series behind @data. Get it from {HOME} again.")
    return problem


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines but for blank ones and comments (#)."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _header(place: Path, lines: Iterator[tuple[int, str]]) -> list[str]:
    """The names of the classes; the lines up to @data are used up."""
    classes: list[str] = []
    for number, line in lines:
        where = f"{place}, line {number}"
        if not line.startswith("@"):
            raise ConfigError(f"{where}: a line @name value is needed before @data, found '{line[:40]}'.")
        key, *values = line[1:].split()
        key, flag = key.lower(), values[0].lower() if values else ""
        if key == "timestamps" and flag == "true":
            raise ConfigError(f"{where}: series with times of their own (@timeStamps true) are not read.")
        if key in ("classlabel", "targetlabel"):
            if key == "targetlabel" or flag != "true" or len(values) < 3:
                raise ConfigError(f"{where}: '@classLabel true' with two classes at least is needed, found '{line}'.")
            classes = values[1:]
        if key == "data":
            break
    else:
        raise ConfigError(f"{place} has no line @data: it is no .ts file, or cut short. Get it from {HOME} again.")
    if not classes:
        raise ConfigError(f"{place} has no line @classLabel: it is no problem of classification.")
    return classes


def _values(channels: list[str], where: str) -> Tensor:
    """[C, L] float64 of the texts of the channels, NaN where a value is unknown."""
    if not channels:
        raise ConfigError(f"{where}: values and a class are needed, separated by ':'.")
    rows = []
    for channel in channels:
        try:
            values = [math.nan if text.strip() in UNKNOWN else float(text) for text in channel.split(",")]
        except ValueError as error:
            raise ConfigError(f"{where}: channel {len(rows)} holds what is no number ({error}).") from None
        if any(math.isinf(value) for value in values):
            raise ConfigError(f"{where}: channel {len(rows)} holds an infinite value.")
        rows.append(values)
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise ConfigError(f"{where}: the channels have different lengths ({lengths}); they must share their times.")
    values = torch.tensor(rows, dtype=torch.float64)
    if values.isnan().all():
        raise ConfigError(f"{where}: every value is unknown. Remove the item.")
    return values


def _check_pair(train_at: Path, train: Problem, test_at: Path, test: Problem) -> None:
    """Raises ConfigError if the two files are not of one problem."""
    for what, a, b in (
        ("classes", sorted(train.classes), sorted(test.classes)),
        ("channels", len(train.series[0]), len(test.series[0])),
    ):
        if a != b:
            raise ConfigError(f"{train_at} has the {what} {a}, but {test_at} {b}: they are not of one problem.")
