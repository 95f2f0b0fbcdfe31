"""Two days in intensive care: the records of the PhysioNet Challenge 2012, which users bring."""

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
from ..rng import fold
from ..types import Batch
from .dataset import SPLITS, Dataset
from .memory import InMemory
from .padded import rescaled, scales, stack, thinned
from .partition import held_out
from .trajectories import item_noise

HOME = "the page of the PhysioNet Challenge 2012 (set-a.tar.gz, unpacked, and Outcomes-a.txt)"
STATICS = ("Age", "Gender", "Height", "ICUType")
VARIABLES = (
    *("Albumin", "ALP", "ALT", "AST", "Bilirubin", "BUN", "Cholesterol", "Creatinine", "DiasABP", "FiO2", "GCS"),
    *("Glucose", "HCO3", "HCT", "HR", "K", "Lactate", "Mg", "MAP", "MechVent", "Na", "NIDiasABP", "NIMAP"),
    *("NISysABP", "PaCO2", "PaO2", "pH", "Platelets", "RespRate", "SaO2", "SysABP", "Temp", "TroponinI"),
    *("TroponinT", "Urine", "WBC", "Weight"),
)
COLUMNS = VARIABLES + STATICS
PLACE = {name: k for k, name in enumerate(COLUMNS)}
HOURS = 48.0
HEADER = "Time,Parameter,Value"
DEATH = "In-hospital_death"


class Record(NamedTuple):
    """The lines of one file: minutes since admission, columns and values; those of unknown value (-1) are left out."""

    name: str
    minutes: list[int]
    columns: list[int]
    values: list[float]

    @property
    def measured(self) -> bool:
        """Whether anything but the general descriptors is there."""
        described = (*STATICS, "Weight")
        return any(COLUMNS[k] not in described for k in self.columns)


@register(Dataset, "physionet")
class PhysioNet(InMemory):
    """Records of the first 48 hours of 4,000 stays in intensive care (set A): 37 variables at irregular times.

    Files: <path>/set-a/132539.txt … with lines `Time,Parameter,Value`, and <path>/Outcomes-a.txt. Times are rounded to
    multiples of `quantise` hours, and values of a variable that fall together are averaged; time is in units of 48
    hours, from 0 to 1. The value -1 means unknown and is left out, and so are records without any measurement, which
    `checks` counts. The variables are the 36 measured ones and the weight; `statics` adds age, gender, height and type
    of unit, seen once, at time 0: the 41 columns of Rubanova et al. 2019, who scale by least and greatest value.

    Splits: records in the order of a hash of their numbers; the first fifth is "test", of the others the first tenth
    "val". Scales are those of the training items. Series are padded at the end by repeating the last time, unseen.

    Args:
        path: the folder that holds set-a; ~ is the home folder.
        task: "interpolate" asks for every observed value, "mortality" for death in hospital (class 1).
        sets: "a", or "ab" for the 4,000 records of <path>/set-b as well (with Outcomes-b.txt for mortality).
        quantise: hours; null leaves the minutes as they are.
        statics: with the four columns that do not change.
        scale: "minmax" maps each variable's observed range to [0, 1], "standard" subtracts means and divides by
            standard deviations.
        dropped: share of each record's times that is not given (but asked for, to interpolate), fixed by the seed.
        seed: of which times are dropped.
    Raises:
        ConfigError: if files are missing or malformed, naming file and line.
    Source: Silva et al. 2012 (Predicting in-hospital mortality of ICU patients); Rubanova et al. 2019 (Latent ODEs for
        irregularly-sampled time series), section 4.
    """

    local = ("path",)
    unit_of_time = "48 hours"

    def __init__(
        self,
        path: str,
        task: Literal["interpolate", "mortality"] = "interpolate",
        sets: Literal["a", "ab"] = "a",
        quantise: float | None = 0.016,
        statics: bool = False,
        scale: Literal["minmax", "standard"] = "minmax",
        dropped: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= dropped < 1:
            raise ConfigError(f"data.dropped: a share in [0, 1) is needed, found {dropped:g}.")
        if quantise is not None and not quantise > 0:
            raise ConfigError(f"data.quantise: hours above 0 are needed, or null, found {quantise:g}.")
        folder, found = Path(os.path.expanduser(path)), hashlib.sha256()
        records = [record for which in sets for record in read_set(folder, which, found)]
        kept = [record for record in records if record.measured]
        self.left_out = len(records) - len(kept)
        kept.sort(key=lambda record: (fold("physionet", record.name), record.name))
        labels = read_outcomes(folder, sets, kept, found) if task == "mortality" else None
        width = len(COLUMNS if statics else VARIABLES)
        whole = _batch(stack([series(record, width, quantise) for record in kept]), labels)
        n_val, n_test = held_out(len(kept), 0.1, 0.2, "data 'physionet'")
        rows = {"train": slice(n_val + n_test, None), "val": slice(n_test, n_val + n_test), "test": slice(0, n_test)}
        train = whole[rows["train"]]
        offset, size = scales(train.x, train.mask, scale)
        self.shape = tuple(whole.x.shape[1:])
        self.target_shape = (2,) if labels is not None else self.shape
        for split in SPLITS:
            items = whole[rows[split]]
            x = rescaled(items.x, items.mask, offset, size)
            if labels is None:
                items = items.replace(target=x, target_times=items.times, target_mask=items.mask)
            mask = thinned(items.mask, dropped, item_noise(len(x), "physionet", split, seed)) if dropped else items.mask
            self.hold(split, items.replace(x=torch.where(mask, x, 0.0) if dropped else x, mask=mask))
        options = [task, sets, quantise, statics, scale, dropped, seed]
        self._digest = digest({"files": found.hexdigest(), "options": options})

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the files' contents and of every argument that decides the items."""
        return self._digest

    def checks(self) -> list[str]:
        """How many records there are, and how many have nothing to learn from."""
        total = sum(self.size(split) for split in SPLITS)
        return [f"{total:,} records; {self.left_out:,} more hold no measurement and are left out."]


def _batch(stacked: tuple[Tensor, Tensor, Tensor], labels: Tensor | None) -> Batch:
    x, times, mask = stacked
    return Batch(x, times=times, mask=mask, target=labels)


def series(record: Record, width: int, quantise: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values [L, width], times [L] in units of 48 hours and mask [L, width] of a record, means where values meet."""
    minutes = torch.tensor(record.minutes, dtype=torch.float64)
    columns, values = torch.tensor(record.columns), torch.tensor(record.values, dtype=torch.float64)
    chosen = columns < width
    minutes, columns, values = minutes[chosen], columns[chosen], values[chosen]
    unit = 1 / 60 if quantise is None else quantise
    slots, row = (minutes / 60 / unit).round().unique(return_inverse=True)
    place, size = row * width + columns, len(slots) * width
    count = torch.zeros(size, dtype=torch.float64).index_add(0, place, torch.ones_like(values))
    total = torch.zeros(size, dtype=torch.float64).index_add(0, place, values)
    mean = total / count.clamp(min=1)
    return mean.float().reshape(-1, width), slots * unit / HOURS, (count > 0).reshape(-1, width)


def read_set(folder: Path, which: str, found: "hashlib._Hash") -> Iterator[Record]:
    """The records of set-<which>, in the order of their names; their contents enter `found`.

    Raises:
        ConfigError: if the folder is missing or empty, and as `parse`.
    """
    place = folder / f"set-{which}"
    if not place.is_dir():
        raise ConfigError(
            f"data.path: {folder} has no folder set-{which}. The records lie in <path>/set-{which}/132539.txt and so "
            f"on; get them from {HOME} and name the folder that holds set-{which}; nothing is downloaded."
        )
    files = sorted(place.glob("*.txt"))
    if not files:
        raise ConfigError(f"data.path: {place} holds no .txt files. Unpack set-{which} there; get it from {HOME}.")
    for file in files:
        content = file.read_bytes()
        found.update(f"{file.name} {len(content)} ".encode() + content)
        yield parse(file, content)


def parse(place: Path, content: bytes) -> Record:
    """The record in a file.

    Raises:
        ConfigError: naming file and line, if a line has another form, a variable is unknown, or the record another
            number than the file.
    """
    lines = content.decode("utf-8", "replace").splitlines()
    if not lines or lines[0].strip() != HEADER:
        raise ConfigError(f"{place}, line 1: '{HEADER}' is needed, found '{lines[0] if lines else ''}'.")
    record = Record(place.stem, [], [], [])
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            minutes, name, value = _fields(line)
        except ValueError:
            raise ConfigError(
                f"{place}, line {number}: '{line}' is not of the form {HEADER} with a time 00:00 … 48:00 and a number. "
                f"Get the file from {HOME} again."
            ) from None
        if name in PLACE:
            if value != -1:
                record.minutes.append(minutes)
                record.columns.append(PLACE[name])
                record.values.append(value)
        elif name != "RecordID":
            raise ConfigError(f"{place}, line {number}: unknown variable '{name}'. Known: {', '.join(COLUMNS)}.")
        elif not (place.stem.isdigit() and value == int(place.stem)):
            raise ConfigError(f"{place}, line {number}: RecordID is {value:g}, but the file is called {place.name}.")
    return record


def _fields(line: str) -> tuple[int, str, float]:
    """Minutes, variable and value of a line; ValueError if it has another form."""
    time, name, text = line.split(",")
    hours, minutes = map(int, time.split(":"))
    value, when = float(text), 60 * hours + minutes
    if not (0 <= when <= 60 * HOURS and 0 <= minutes < 60 and math.isfinite(value)):
        raise ValueError
    return when, name.strip(), value


def read_outcomes(folder: Path, sets: str, records: list[Record], found: "hashlib._Hash") -> Tensor:
    """[N] int64, 1 for the records whose patient died in hospital; the contents enter `found`.

    Raises:
        ConfigError: if a file is missing, has no such column or another form, or lacks a record.
    """
    deaths: dict[str, int] = {}
    for which in sets:
        place = folder / f"Outcomes-{which}.txt"
        if not place.is_file():
            raise ConfigError(
                f"data.path: {folder} has no {place.name}, in which mortality stands. Get it from {HOME} and put it "
                f"beside set-{which}, or set data.task=interpolate."
            )
        content = place.read_bytes()
        found.update(content)
        deaths |= _deaths(place, content.decode("utf-8", "replace").splitlines())
    missing = [record.name for record in records if record.name not in deaths]
    if missing:
        raise ConfigError(
            f"{folder}: the outcomes of {len(missing):,} records are missing, of {missing[0]} for one. Get sets and "
            f"outcomes from {HOME} again."
        )
    return torch.tensor([deaths[record.name] for record in records])


def _deaths(place: Path, lines: list[str]) -> dict[str, int]:
    """Whether the patient died, by the number of the record."""
    names = [name.strip() for name in lines[0].split(",")] if lines else []
    if "RecordID" not in names or DEATH not in names:
        raise ConfigError(f"{place}, line 1: columns RecordID and {DEATH} are needed, found {', '.join(names)}.")
    deaths, key, column = {}, names.index("RecordID"), names.index(DEATH)
    for number, line in enumerate(lines[1:], 2):
        fields = [field.strip() for field in line.split(",")]
        if not line.strip():
            continue
        if len(fields) != len(names) or fields[column] not in ("0", "1"):
            raise ConfigError(f"{place}, line {number}: {len(names)} fields with {DEATH} 0 or 1 are needed: '{line}'.")
        deaths[fields[key]] = int(fields[column])
    return deaths
