"""The five tables on which density estimators are compared: the published files, prepared as published."""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..hashing import digest
from ..registry import ConfigError, register
from ..transforms import Transform
from ..types import Batch
from .dataset import SPLITS, Dataset, Split, proposal
from .memory import InMemory
from .partition import held_out
from .tabular import open_tables

Name = Literal["power", "gas", "hepmass", "miniboone", "bsds300"]
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # train, val and test, [N, D] each
HOME = "data.tar.gz of the Zenodo record 1161203"
VERSION = 1  # of what is done to the files; part of every fingerprint
ASIDE = ("", "Time", "Meth", "Eth")  # columns of GAS that are no sensor; "" is an index that pandas wrote
PICKLE = (
    "It holds the pickle, which is not read because reading a pickle can run code. Convert it once, where you trust "
    "it, with a pandas that reads it (below 2.0): pandas.read_pickle('ethylene_CO.pickle').to_csv('ethylene_CO.csv', "
    "index=False)."
)


class OtherRows(UserWarning):
    """Files hold other numbers of rows than those that were published."""


@dataclass(frozen=True)
class Published:
    """What is known of a published table.

    Attributes:
        files: any of them will do.
        dims: numbers a row.
        sizes: rows for training, validation and test.
        gaussian: mean test log-likelihood, in nats, of a Gaussian fitted to the training rows.
    """

    files: tuple[str, ...]
    dims: int
    sizes: tuple[int, int, int]
    gaussian: float


TABLES: dict[str, Published] = {
    "power": Published(("data.npy", "POWER.npy"), 6, (1_659_917, 184_435, 204_928), -7.74),
    "gas": Published(("ethylene_CO.npy", "ethylene_CO.csv", "GAS.npy"), 8, (852_174, 94_685, 105_206), -3.58),
    "hepmass": Published(("1000_train.csv", "HEPMASS.npy"), 21, (315_123, 35_013, 174_987), -27.93),
    "miniboone": Published(("data.npy", "MINIBOONE.npy"), 43, (29_556, 3_284, 3_648), -37.24),
    "bsds300": Published(("BSDS300.hdf5", "bsds300.hdf5", "BSDS300.npy"), 63, (1_000_000, 50_000, 250_000), 96.67),
}


def split(x: np.ndarray) -> Parts:
    """The last int(N/10) rows test, the last int of a tenth of the others validate."""
    n_val, n_test = held_out(len(x), 0.1, 0.1, "data 'uci'")
    first = len(x) - n_val - n_test
    return x[:first], x[first : first + n_val], x[first + n_val :]


def standardised(parts: Parts) -> Parts:
    """Minus the mean and over the standard deviation (over N) of the training and validation rows together."""
    seen = np.concatenate(parts[:2])
    mean, std = seen.mean(0), seen.std(0)
    return tuple((part - mean) / std for part in parts)


def power(data: np.ndarray) -> Parts:
    """POWER from [N, 8]: rows shuffled, columns 1 and 3 dropped, noise as wide as the meters' steps, standardised.

    The columns left are active power, voltage, three sub-meterings and the time of day; the noise is uniform on [0, 1)
    times 0.001, 0.01, 1, 1, 1 and 0. Order and noise come from numpy's RandomState(42), in this sequence: the order,
    the noise of the voltage, of the power, of the sub-meterings.
    """
    rng, n = np.random.RandomState(42), len(data)
    x = data[rng.permutation(n)][:, [0, 2, 4, 5, 6, 7]].astype(np.float64)  # the draws of shuffling the rows in place
    x[:, 1:2] += 0.01 * rng.rand(n, 1)
    x[:, 0:1] += 0.001 * rng.rand(n, 1)
    x[:, 2:5] += rng.rand(n, 3)
    return standardised(split(x))


def gas(sensors: np.ndarray) -> Parts:
    """GAS from the sensors [N, S]: correlated ones dropped, standardised over all rows, split.

    While any two sensors correlate by more than 0.98 (not less than -0.98), the first that does so is dropped. Mean and
    standard deviation (over N - 1) are those of all rows, the test rows among them.
    """
    kept = list(range(sensors.shape[1]))
    with np.errstate(invalid="ignore"):  # a constant column correlates with nothing
        close = np.corrcoef(sensors, rowvar=False) > 0.98
    while (many := close[np.ix_(kept, kept)].sum(1) > 1).any():
        kept.pop(int(many.argmax()))
    x = sensors[:, kept]
    return split((x - x.mean(0)) / x.std(0, ddof=1))


def hepmass(train: np.ndarray, test: np.ndarray) -> Parts:
    """HEPMASS from the signal rows of both files [N, F]: standardised, features with a frequent least value dropped.

    Mean and standard deviation (over N - 1) are those of the training file; a feature goes if its smallest value occurs
    more than 5 times there. (Only the smallest value is counted, though other values may occur more often.) The last
    int(N/10) rows of the training file validate.
    """
    mean, std = train.mean(0), train.std(0, ddof=1)
    train, test = (train - mean) / std, (test - mean) / std
    kept = (train == train.min(0)).sum(0) <= 5
    train, test = train[:, kept], test[:, kept]
    n_val, _ = held_out(len(train), 0.1, 0.0, "data 'uci'")
    return train[: len(train) - n_val], train[len(train) - n_val :], test


def miniboone(data: np.ndarray) -> Parts:
    """MINIBOONE from [N, 43], from which outliers and features with a frequent least value are gone already."""
    return standardised(split(data))


def bsds300(train: np.ndarray, val: np.ndarray, test: np.ndarray) -> Parts:
    """BSDS300 as it is stored: 8x8 patches minus their means, without the last pixel (minus the sum of the others)."""
    return train, val, test


PREPARE: dict[str, Callable[..., Parts]] = {f.__name__: f for f in (power, gas, hepmass, miniboone, bsds300)}


@register(Dataset, "uci")
class UCI(InMemory):
    """The published tables POWER, GAS, HEPMASS, MINIBOONE and BSDS300 with their splits and their preparation.

    Read are the files of the archive that came with the paper (data.tar.gz), each in a folder named after its table:
    power/data.npy, hepmass/1000_train.csv and 1000_test.csv, miniboone/data.npy, BSDS300/BSDS300.hdf5. Of
    gas/ethylene_CO.pickle, which is not read, an export is: ethylene_CO.csv with the names of the columns, or
    ethylene_CO.npy of the sensors alone, without the columns Time, Meth and Eth. (The pickle has a quarter as many rows
    as the original measurements, so that those do not give the same ones.) One array <TABLE>.npy of the prepared rows
    in the order train, validation, test is read as well; its fingerprint is its own.

    What is done to the rows is said at the functions of the same names in `genmodels/data/uci.py`. The first four are
    standardised as published, and the proposed transform leaves them alone; for BSDS300 it standardises. Likelihoods
    are per prepared row, in nats, as in the papers. The fingerprint covers every number that is read.

    Args:
        table: which of them.
        path: the file, its folder, or the folder that holds one folder for each table; ~ is the home folder.
        transform: instead of the proposed one.
    Raises:
        ConfigError: if files are missing, damaged or of another width, with the way out. Other numbers of rows than the
            published ones are a warning (`OtherRows`).
    Source: Papamakarios et al. 2017 (MAF), appendix D.2.
    """

    local = ("path",)

    def __init__(self, table: Name, path: str, transform: Callable[..., Transform] | None = None) -> None:
        known = TABLES[table]
        place = locate(table, Path(os.path.expanduser(path)))
        found = read(table, place)
        with np.errstate(divide="ignore", invalid="ignore"):  # told below
            parts = (
                _prepared(table, place, found[0]) if place.name == f"{table.upper()}.npy" else PREPARE[table](*found)
            )
        sizes = tuple(len(part) for part in parts)
        if parts[0].shape[1] != known.dims:
            raise ConfigError(
                f"data.path: {place} gives rows of {parts[0].shape[1]} numbers, but '{table}' has {known.dims}. "
                f"Name the published file, from {HOME}.{_width_hint(table, found[0].shape[1])}"
            )
        still = np.flatnonzero(~np.isfinite(parts[0]).all(0) | (np.ptp(parts[0], axis=0) == 0))
        if len(still):
            raise ConfigError(
                f"data.path: {place}: column {still[0]} of the prepared rows of '{table}' (counted from 0) has one "
                "value in all rows, or values that are not finite; the published table has neither. Name the file of "
                f"{HOME}."
            )
        if sizes != known.sizes:
            warnings.warn(
                f"data.path: {place} gives {_listed(sizes)} rows for training, validation and test, but the published "
                f"'{table}' has {_listed(known.sizes)}: results are not comparable with those of papers.",
                OtherRows,
                stacklevel=2,
            )
        self.shape, self.table = (known.dims,), table
        self.transform = proposal(transform, {"name": "standardize" if table == "bsds300" else "identity"})
        for name, part in zip(SPLITS, parts, strict=True):
            self.hold(name, Batch(torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32))))
        # of what was read: the last bits of means and deviations need not be the same everywhere
        self._digest = digest({"table": table, "version": VERSION, "read": [_checksum(array) for array in found]})

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the name of the table and of every number that was read of the files."""
        return self._digest

    def checks(self) -> list[str]:
        """The Gaussian of the published tables of results: it differs if the rows were prepared in another way."""
        published, found = TABLES[self.table].gaussian, gaussian_log_likelihood(self)
        if found is None:
            return [f"no Gaussian fits the training rows: their covariance is singular (published {published} nats)"]
        return [
            f"a Gaussian fitted to the training rows gives {found:.2f} nats a test row, published {published} "
            f"(difference {found - published:+.2f})"
        ]


def gaussian_log_likelihood(dataset: Dataset, batch_size: int = 65_536) -> float | None:
    """Mean log N(x; m, S) of the test split, in nats, with mean and covariance of the training split.

    -(D log 2π + log|S| + tr S⁻¹ T)/2 with T the mean of (x - m)(x - m)ᵀ over the test split: two passes over the
    training split and one over the test split, in float64 and in the units of the data. None if S is singular.
    """
    n, dims = dataset.size("train"), math.prod(dataset.shape)
    total = sum(x.sum(0) for x in _rows(dataset, "train", batch_size))
    mean = total / n

    def spread(split: Split) -> Tensor:
        parts = (x - mean for x in _rows(dataset, split, batch_size))
        return sum(part.T @ part for part in parts)

    covariance = spread("train") / (n - 1)
    root, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return None
    log_volume = 2 * root.diagonal().log().sum()
    squares = torch.cholesky_solve(spread("test") / dataset.size("test"), root).trace()
    return -0.5 * (dims * math.log(2 * math.pi) + log_volume + squares).item()


def _rows(dataset: Dataset, split: Split, batch_size: int) -> Iterator[Tensor]:
    """[B, D] float64 items of a split, flattened."""
    return (batch.x.flatten(1).double() for batch in dataset.batches(split, batch_size))


def locate(table: str, path: Path) -> Path:
    """The file that a path means: itself, or the first of the published names in it or in a folder of the table's name.

    Raises:
        ConfigError: if there is none, saying where it was looked for.
    """
    if path.is_file():
        return path
    folders = [path, *(path / part for part in (table, table.upper(), f"data/{table}", f"data/{table.upper()}"))]
    for folder in folders:
        for name in TABLES[table].files:
            if (folder / name).is_file():
                return folder / name
    advice = PICKLE if any((folder / "ethylene_CO.pickle").is_file() for folder in folders) and table == "gas" else ""
    names = " or ".join(TABLES[table].files)
    raise ConfigError(
        f"data.path: found no {names} of '{table}' in {path} or in folders {table}, {table.upper()} and "
        f"data/{table} of it. {advice or f'Unpack {HOME} and name its folder; nothing is downloaded.'}"
    )


def read(table: str, place: Path) -> tuple[np.ndarray, ...]:
    """The arrays that a table's preparation takes, float64 (BSDS300: float32), or the one array of prepared rows.

    Raises:
        ConfigError: if a file is damaged, of another kind, or lacks an array.
    """
    if place.suffix.lower() == ".csv" and table == "hepmass":
        train, names = _signal(place.with_name("1000_train.csv"), None)
        return train, _signal(place.with_name("1000_test.csv"), names)[0]
    if place.suffix.lower() in (".pickle", ".pkl"):
        raise ConfigError(f"data.path: {place}: {PICKLE}")
    tables = open_tables(place, None, None, None)
    if table == "bsds300" and place.name != "BSDS300.npy":
        if len(tables) < len(SPLITS):
            raise ConfigError(
                f"{place} needs the arrays train, validation and test; it holds those of: {', '.join(tables)}."
            )
        return tuple(tables[name].read(list(range(tables[name].width))).astype(np.float32) for name in SPLITS)
    one = tables["train"]
    names = one.names or ["sensor"] * one.width
    x = one.read([k for k, name in enumerate(names) if table != "gas" or name not in ASIDE])
    if table == "power" and place.name != "POWER.npy" and x.shape[1] != 8:
        raise ConfigError(
            f"data.path: {place} has {x.shape[1]} columns, but the published data.npy of POWER has 8. Rows that are "
            "prepared already are read from a file that is called POWER.npy."
        )
    return (x,)


def _signal(path: Path, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """The features [N, F] float64 of the rows with the label 1 in a file of HEPMASS, and the names of its columns.

    Args:
        names: of the columns to read, which the file must begin with (the published test file has one more at the end);
            None for all.
    """
    if not path.is_file():
        raise ConfigError(f"data.path: there is no {path}; HEPMASS is read from 1000_train.csv and 1000_test.csv.")
    try:
        with path.open(encoding="utf-8") as file:
            header = [name.strip() for name in file.readline().split(",")]
        wanted = header if names is None else names
        if header[: len(wanted)] != wanted:
            raise ConfigError(
                f"{path} has the columns {', '.join(header)}, but 1000_train.csv has {', '.join(wanted)}."
            )
        # fields beyond those asked for may be there or not
        x = np.loadtxt(
            path, delimiter=",", comments=None, skiprows=1, usecols=range(len(wanted)), ndmin=2, encoding="utf-8"
        )
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as the published file: {error}. Get it again from {HOME}.") from error
    return x[x[:, 0] == 1][:, 1:], wanted


def _prepared(table: str, place: Path, x: np.ndarray) -> Parts:
    """The splits of prepared rows that follow each other: by the rule, or by the published sizes if there is none."""
    if table in ("power", "gas", "miniboone"):
        return split(x)
    sizes = TABLES[table].sizes
    if len(x) != sum(sizes):
        raise ConfigError(
            f"data.path: {place} has {len(x):,} rows, but the splits of '{table}' add up to {sum(sizes):,} "
            f"({_listed(sizes)}). Name the published files, from {HOME}."
        )
    return tuple(np.split(x, np.cumsum(sizes[:2])))


def _width_hint(table: str, width: int) -> str:
    return f" ({width} columns were read: those of an .npy must be the sensors alone.)" if table == "gas" else ""


def _listed(sizes: tuple[int, ...]) -> str:
    return " / ".join(f"{size:,}" for size in sizes)


def _checksum(array: np.ndarray) -> list:
    return [list(array.shape), str(array.dtype), hashlib.sha256(np.ascontiguousarray(array)).hexdigest()]
