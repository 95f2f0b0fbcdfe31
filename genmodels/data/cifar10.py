"""CIFAR-10 from the files of its authors, which hold pickles: they are read without running anything they ask for."""

import hashlib
import io
import os
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..hashing import digest
from ..registry import ConfigError, register
from ..transforms import Transform
from ..types import Batch
from .dataset import SPLITS, Dataset, centred, proposal
from .memory import InMemory

HOME = "the CIFAR-10 page of the University of Toronto (the 'python version')"
FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
Checksum = Literal["error", "warn", "ignore"]


class AlteredData(UserWarning):
    """Files are not the ones that were published."""


@register(Dataset, "cifar10")
class CIFAR10(InMemory):
    """60,000 colour photographs of 32x32 pixels in ten classes, from the archive or its unpacked folder.

    Splits: of the 50,000 training images the last `val` (in the order of the files) are "val" and the others "train";
    the 10,000 test images are "test". Levels are kept in bytes. With b bits a level x becomes floor(x / 2^(8-b)), one
    of 2^b. The proposed transform adds uniform dequantisation noise and maps [0, 2^b) to [-1, 1); for classification it
    maps [0, 2^b - 1] to [-1, 1] without noise.

    Args:
        path: cifar-10-python.tar.gz, the folder cifar-10-batches-py, or a folder that holds either; ~ is the home
            folder.
        task: "generate" gives labels as condition, "classify" as target.
        labels: give the labels as condition.
        flip: give every training image mirrored as well.
        bits: of each level, 1 … 8.
        val: how many training images are held out.
        checksum: what to do if a file is not the published one (by its MD5): "error", "warn", or "ignore" to not look.
        transform: instead of the proposed one.
    Raises:
        ConfigError: if files are missing, cut short, altered, or hold anything but arrays and plain containers.
    Source: Krizhevsky 2009 (Learning multiple layers of features from tiny images), section 3.
    """

    local = ("path",)
    shape = (3, 32, 32)
    bin_width = 1.0

    def __init__(
        self,
        path: str,
        task: Literal["generate", "classify"] = "generate",
        labels: bool = True,
        flip: bool = False,
        bits: int = 8,
        val: int = 5000,
        checksum: Checksum = "error",
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        if not 1 <= bits <= 8:
            raise ConfigError(f"data.bits: 1 … 8 are possible, found {bits}.")
        classify = task == "classify"
        self.levels = 2**bits
        self.num_classes = 10 if labels and not classify else None
        self.target_shape = (10,) if classify else None
        self.transform = proposal(transform, centred(self.levels, noise=not classify))
        place = locate(Path(os.path.expanduser(path)))
        files = read_members(place)
        batches = {name: batch(f"{place}: {name}", files[name]) for name in MD5}
        if checksum != "ignore":
            _compare(place, files, checksum)
        x, y = (torch.cat([batches[name][k] for name in MD5 if name != "test_batch"]) for k in (0, 1))
        if not 0 <= val < len(x):
            raise ConfigError(f"data.val: 0 … {len(x) - 1:,} of the {len(x):,} training images, found {val:,}.")
        first = len(x) - val
        parts = {"train": (x[:first], y[:first]), "val": (x[first:], y[first:]), "test": batches["test_batch"]}
        for split in SPLITS:
            images, classes = parts[split]
            given = {"target": classes} if classify else {"condition": classes} if labels else {}
            self.hold(split, Batch(images // 2 ** (8 - bits), **given), mirrored=flip and split == "train")
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self._digest = digest({"files": sums, "options": [task, labels, flip, bits, val]})

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the files' checksums and of every argument that decides the items."""
        return self._digest


def locate(path: Path) -> Path:
    """The archive, or the folder of the batches, that a path means.

    Raises:
        ConfigError: if there is neither, or if it is another version of the data.
    """
    inside = [path / FOLDER, path / ARCHIVE] if path.is_dir() else []
    found = next((p for p in inside if p.exists()), path)
    if found.is_dir() and not any((found / name).exists() for name in MD5):
        holds = sorted(p.name for p in found.iterdir())[:5]
        other = " Those look like the binary or MATLAB version." if _is_other_version(holds) else ""
        raise ConfigError(
            f"data.path: {found} holds neither {ARCHIVE} nor {FOLDER} nor their data_batch_1 …; it holds "
            f"{', '.join(holds) or 'nothing'}.{other} Get {ARCHIVE} from {HOME} and name the file or its folder."
        )
    if not found.exists():
        raise ConfigError(
            f"data.path: there is no {found}. Get {ARCHIVE} from {HOME} and give its path, or that of the unpacked "
            f"folder {FOLDER}; nothing is downloaded."
        )
    return found


def _is_other_version(names: list[str]) -> bool:
    return any(name.endswith((".bin", ".mat")) for name in names)


def read_members(place: Path) -> dict[str, bytes]:
    """The bytes of the six batches, by name, from the archive or the folder.

    Raises:
        ConfigError: if the archive is cut short or is none, or if batches are missing.
    """
    if place.is_dir():
        files, seen = {name: (place / name).read_bytes() for name in MD5 if (place / name).is_file()}, []
    else:
        files, seen = _unpacked(place)
    missing = [name for name in MD5 if name not in files]
    if missing:
        holds = f"; it holds {', '.join(seen[:8]) or 'nothing'}" if seen else ""
        other = " It looks like the binary or MATLAB version." if _is_other_version(seen) else ""
        raise ConfigError(
            f"data.path: {place} lacks {', '.join(missing)}{holds}.{other} Get {ARCHIVE} from {HOME} again."
        )
    return files


def _unpacked(archive: Path) -> tuple[dict[str, bytes], list[str]]:
    """The batches of an archive, and the names of all its files."""
    files: dict[str, bytes] = {}
    seen: list[str] = []
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if member.isfile():
                    seen.append(member.name)
                    name = Path(member.name).name
                    if name in MD5:
                        files[name] = tar.extractfile(member).read()
    except (EOFError, zlib.error, tarfile.TarError, OSError) as error:
        if isinstance(error, PermissionError):
            raise ConfigError(f"data.path: {archive} cannot be read: {error.strerror}.") from error
        raise ConfigError(_broken(archive, seen, error)) from error
    return files, seen


def _broken(archive: Path, seen: list[str], error: Exception) -> str:
    size = archive.stat().st_size
    if not seen and not isinstance(error, EOFError):
        return (
            f"data.path: {archive} is no tar archive that can be opened ({error}). Get {ARCHIVE} from {HOME}, or name "
            f"the unpacked folder {FOLDER}."
        )
    where = f"in {seen[-1]}" if seen else "at its beginning"
    return (
        f"data.path: {archive} is cut short or damaged {where} ({size:,} bytes; {error}). The complete file has "
        f"170,498,071 bytes; get it from {HOME} again."
    )


class ForbiddenPickle(Exception):
    """A pickle asks for something that is neither an array of bytes nor a plain container."""


class PickledBytes:
    """Stands in for a pickled array, so that a pickle reaches none of numpy's own code; `array` is read from it."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, column_major, data = state
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if column_major else "C")


class PickledType:
    """Stands in for the type of a pickled array, which must be uint8; its state says nothing more."""

    def __init__(self, code: bytes | str, *flags: Any) -> None:
        if code not in (b"u1", "u1"):
            raise ForbiddenPickle(f"an array of the type {code!r}")

    def __setstate__(self, state: tuple) -> None:
        pass


def _reconstruct(*arguments: Any) -> PickledBytes:
    return PickledBytes()


class ByteArrayUnpickler(pickle.Unpickler):
    """Reads arrays of bytes and plain containers; anything else that a pickle asks for is refused by its name."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return _reconstruct
            if name == "dtype":
                return PickledType
            if name == "ndarray":
                return None  # only ever the first argument of _reconstruct
        raise ForbiddenPickle(f"{module}.{name}")


def batch(where: str, content: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, 3, 32, 32] uint8 and labels [N] int64 of a pickled batch.

    Raises:
        ConfigError: naming the file, if it is cut short, asks for more than arrays, or holds other shapes.
    """
    try:
        found = ByteArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except ForbiddenPickle as error:
        raise ConfigError(
            f"{where} asks for {error}, which the published file does not. Only arrays of bytes and plain containers "
            f"are read; nothing of it was run. Do not trust this file; get {ARCHIVE} from {HOME}."
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise ConfigError(
            f"{where} is cut short or damaged ({len(content):,} bytes; {type(error).__name__}: {error}). "
            f"Get {ARCHIVE} from {HOME} again."
        ) from error
    return _checked(where, found)


def _compare(place: Path, files: dict[str, bytes], checksum: Checksum) -> None:
    """An error or a warning if readable files are not the published ones."""
    altered = [name for name in MD5 if hashlib.md5(files[name], usedforsecurity=False).hexdigest() != MD5[name]]
    if not altered:
        return
    message = (
        f"{place}: {', '.join(altered)} can be read, but {'is' if len(altered) == 1 else 'are'} altered: the MD5 is "
        f"not that of the published file, so that results are not comparable. Get {ARCHIVE} from {HOME}"
    )
    if checksum == "error":
        raise ConfigError(f"{message}, or accept what is there with data.checksum=warn.")
    warnings.warn(f"{message}.", AlteredData, stacklevel=4)


def _checked(where: str, found: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(found, dict) or not {b"data", b"labels"} <= found.keys():
        shown = f"the keys {sorted(map(repr, found))}" if isinstance(found, dict) else type(found).__name__
        other = " It looks like CIFAR-100." if isinstance(found, dict) and b"fine_labels" in found else ""
        raise ConfigError(f"{where}: a dictionary with b'data' and b'labels' is needed, found {shown}.{other}")
    images, labels = getattr(found[b"data"], "array", None), found[b"labels"]
    if images is None or images.ndim != 2 or images.shape[1] != 3072:
        shown = "no array" if images is None else f"the shape {list(images.shape)}"
        raise ConfigError(f"{where}: b'data' must be an array of bytes [N, 3072] (3 x 32 x 32), found {shown}.")
    if not isinstance(labels, list) or len(labels) != len(images) or not all(k in range(10) for k in labels):
        shown = f"{len(labels):,} values" if isinstance(labels, list) else type(labels).__name__
        raise ConfigError(
            f"{where}: b'labels' must be a list of {len(images):,} integers 0 … 9, one for each image, found {shown}"
            f"{', some of them others' if isinstance(labels, list) and len(labels) == len(images) else ''}."
        )
    return torch.from_numpy(images.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels, dtype=torch.int64)
