"""Statistics of reference data in files that other tools read too, and a cache for features that are costly."""

import math
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import Dataset, Split
from ..files import new_file
from ..hashing import digest, sha256
from ..registry import ConfigError
from .bures import factor
from .features import FeatureExtractor
from .statistics import Gaussian, gaussian

SCHEMA = "genmodels.statistics/1"
BULKY = ("features", "ids", "arr_0", "mu_s", "sigma_s")  # what such files hold beside the statistics that are read
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)  # what damaged .npz files raise


class ReferenceWarning(UserWarning):
    """A file of statistics or features is of less use than it could be."""


class Statistics(NamedTuple):
    """The Gaussian of a file, and what else the file says: strings and integers by name."""

    gaussian: Gaussian
    facts: dict[str, str | int]


def checksum(path: Path) -> str:
    """64 hexadecimal digits: the SHA-256 of a file of statistics.

    Raises:
        ConfigError: if there is no such file.
    """
    if not path.is_file():
        raise ConfigError(
            f"statistics: there is no file {path}. Make it with `python -m evals.reference … --out {path}`, or say "
            "where it is."
        )
    return sha256(path)


def read_statistics(path: Path | str) -> Statistics:
    """Mean and covariance from a .npz file with `mu` [D] and `sigma` [D, D].

    Files of pytorch-fid, clean-fid, EDM and guided-diffusion are read, whose number of vectors is unknown; nothing is
    unpickled.

    Raises:
        ConfigError: if there is no such file.
        ValueError: if it is damaged, lacks a key, or holds what is no mean and covariance, naming the file.
    """
    path = Path(path)
    checksum(path)
    try:
        arrays = _arrays(path, but=BULKY)
    except UNREADABLE as error:
        raise ValueError(f"statistics: {path} is no readable .npz file of plain arrays: {error}.") from error
    missing = [key for key in ("mu", "sigma") if key not in arrays]
    if missing:
        raise ValueError(
            f"statistics: {path} has no '{missing[0]}'; a .npz file with the arrays 'mu' and 'sigma' is needed, "
            f"found {', '.join(sorted(arrays)) or 'nothing'}."
        )
    facts = {key: value.item() for key, value in arrays.items() if value.ndim == 0 and value.dtype.kind in "iufU"}
    n = facts.get("n")
    if isinstance(n, str) or (n is not None and n != int(n)):
        raise ValueError(f"statistics: {path}: n must be a whole number, found {n!r}. Make the file again.")
    return Statistics(_checked(path, arrays["mu"], arrays["sigma"], None if n is None else int(n)), facts)


def _arrays(path: Path, but: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name, without some of them; raises one of UNREADABLE if it is none."""
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array")
    with file:
        return {key: file[key] for key in file.files if key not in but}


def _checked(path: Path, mean: np.ndarray, covariance: np.ndarray, n: int | None) -> Gaussian:
    def refuse(what: str) -> ValueError:
        return ValueError(f"statistics: {path}: {what}. Make the file again.")

    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise refuse(f"mu must be [D] and sigma [D, D], found {list(mean.shape)} and {list(covariance.shape)}")
    if {mean.dtype.kind, covariance.dtype.kind} != {"f"}:
        raise refuse(f"mu and sigma must be floating-point numbers, found {mean.dtype} and {covariance.dtype}")
    if n is not None and n < 2:
        raise refuse(f"n must be at least 2, found {n}")
    coarse = max(float(np.finfo(a.dtype).eps) for a in (mean, covariance))
    m, s = (torch.from_numpy(a.astype(np.float64)) for a in (mean, covariance))
    if not (m.isfinite().all() and s.isfinite().all()):
        raise refuse("mu or sigma holds NaN or infinity")
    if (s - s.T).abs().max() > math.sqrt(coarse) * s.abs().max():
        raise refuse(f"sigma is not symmetric (by up to {(s - s.T).abs().max().item():.1e})")
    s = (s + s.T) / 2
    try:
        factor(s)
    except ValueError as error:
        stored = "" if coarse < 1e-15 else f" (stored as {covariance.dtype}, which may be too coarse)"
        raise refuse(f"sigma is no covariance{stored}: {str(error).split(': ', 1)[1].split(',')[0]}") from error
    if coarse > 1e-15:
        warnings.warn(
            f"{path} does not hold float64 (mu {mean.dtype}, sigma {covariance.dtype}); where sigma is singular, "
            f"distances to it may be off by {coarse**0.5:.0e} of its trace. Store float64.",
            ReferenceWarning,
            stacklevel=3,
        )
    return Gaussian(m, s, n)


def write_statistics(path: Path | str, found: Gaussian, facts: Mapping[str, str | int]) -> None:
    """Write a .npz file with `mu` and `sigma` in float64 as other tools read them, `n`, and further facts.

    The file appears whole or not at all, and equal contents give equal bytes.
    """
    arrays = {"mu": found.mean.cpu().numpy(), "sigma": found.covariance.cpu().numpy()}
    known = {} if found.n is None else {"n": found.n}
    said = {key: np.array(value) for key, value in {**facts, **known, "genmodels_schema": SCHEMA}.items()}
    with new_file(Path(path)) as file:
        np.savez(file, **arrays, **said)


def cache_folder() -> Path:
    """Where features are kept: $GENMODELS_CACHE/features, or ~/.cache/genmodels/features."""
    root = os.environ.get("GENMODELS_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "genmodels") / "features"


def _place(extractor: FeatureExtractor, dataset: Dataset, split: Split) -> tuple[Path, dict[str, str]]:
    """Where the features of a split are kept, and what they are made from."""
    source = {"fingerprint": dataset.fingerprint(), "split": split, "extractor_id": extractor.identity}
    name = re.sub(r"[^\w.-]+", "-", f"{dataset.registered_name}-{split}-{extractor.label}")
    return cache_folder() / f"{name}-{digest(source)}.npz", source


def kept_features(extractor: FeatureExtractor, dataset: Dataset, split: Split) -> Tensor | None:
    """[N, D] float32 features of a split that `keep_features` has kept; None if there are none.

    A damaged file is a warning and counts for none.
    """
    path, source = _place(extractor, dataset, split)
    return _cached(path, source, dataset.size(split)) if path.is_file() else None


def keep_features(extractor: FeatureExtractor, dataset: Dataset, split: Split, features: Tensor) -> Tensor:
    """Keep the features [N, D] of a split on disk; what is kept: float32 on the CPU.

    One file for each contents of the data set (`Dataset.fingerprint`), split and identity of the extractor; it is also
    a file of statistics. Several processes may write at once: the last one stays, whole. Where nothing can be written
    there is a warning and no error.
    """
    path, source = _place(extractor, dataset, split)
    features = features.float().cpu()
    if len(features) >= 2 and features.isfinite().all():
        _keep(path, features, source | {"dataset": dataset.registered_name})
    return features


def _cached(path: Path, source: Mapping[str, str], size: int) -> Tensor | None:
    """The features of a sound file; a warning and None for another."""
    try:
        arrays = _arrays(path)
    except UNREADABLE:
        arrays = {}
    features, ids = arrays.get("features"), arrays.get("ids")
    same = all(key in arrays and str(arrays[key]) == value for key, value in source.items())
    if same and features is not None and features.dtype == np.float32 and features.ndim == 2:
        if len(features) == size and np.array_equal(ids, np.arange(size)):
            return torch.from_numpy(features)
    warnings.warn(f"{path} is damaged or not what its name says; it is made again.", ReferenceWarning, stacklevel=3)
    return None


def _keep(path: Path, features: Tensor, facts: Mapping[str, str]) -> None:
    found = gaussian(features)
    said: dict[str, Any] = {key: np.array(value) for key, value in {**facts, "n": found.n}.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            np.savez(
                file,
                mu=found.mean.numpy(),
                sigma=found.covariance.numpy(),
                features=features.numpy(),
                ids=np.arange(len(features)),
                **said,
            )
    except OSError as error:
        warnings.warn(
            f"features are not kept in {path.parent} ({error.strerror or error}); they will be computed again. Set "
            "GENMODELS_CACHE to a folder with room.",
            ReferenceWarning,
            stacklevel=3,
        )
