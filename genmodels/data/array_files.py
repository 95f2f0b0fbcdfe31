"""Arrays in the user's .npy, .npz and HDF5 files, checked before they are read; nothing is ever unpickled."""

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy

from ..registry import ConfigError
from ..schema import near

HDF5 = (".h5", ".hdf5")
SUFFIXES = (".npy", ".npz", *HDF5)


def find(path: str, what: str) -> Path:
    """The file or folder of a path, `~` expanded.

    Args:
        what: the key that names it, for the error.
    Raises:
        ConfigError: if there is none, with the nearest name beside it.
    """
    found = Path(path).expanduser()
    if not path or not found.exists():
        beside = [p.name for p in found.parent.iterdir()] if path and found.parent.is_dir() else []
        raise ConfigError(f"{what}: there is no file {path!r} (looked in {Path.cwd()}).{near(found.name, beside)}")
    return found


def shown(shape: tuple[int, ...]) -> str:
    """`[1000, 3, 32, 32]`."""
    return f"[{', '.join(map(str, shape))}]"


def check_numbers(dtype: np.dtype, where: str) -> None:
    """Raises ConfigError unless an array holds whole or real numbers."""
    if dtype.kind not in "biuf":
        what = "Python objects (reading them could run code)" if dtype.hasobject else f"values of type {dtype}"
        raise ConfigError(
            f"{where} holds {what}, not numbers. Save the numbers alone: numpy.save(path, x.astype('float32'))."
        )


def open_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory read-only: only what is touched is read.

    Raises:
        ConfigError: if the file is none, is shorter than its header says, holds no numbers, or is empty.
    """
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    with path.open("rb") as file:
        try:
            shape, _, dtype = readers[npy.read_magic(file)](file)
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{path} is no readable .npy file ({error}). Write it with numpy.save(path, x)."
            ) from None
        start = file.tell()
    check_numbers(dtype, str(path))
    expected, size = start + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if size < expected:
        raise ConfigError(
            f"{path} is truncated: its header says {shown(shape)} {dtype}, which takes {expected:,} bytes, but it has "
            f"{size:,}. Copy or write it again."
        )
    if 0 in shape:
        raise ConfigError(f"{path} is empty: its array has shape {shown(shape)}.")
    return np.load(path, mmap_mode="r", allow_pickle=False)


class ArrayFile:
    """The arrays of a file by name; that of a .npy file has the name "".

    Attributes:
        shapes: shape of every array of numbers in the file.
    Args:
        path: .npy, .npz, .h5 or .hdf5.
    Raises:
        ConfigError: if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.suffix = path, path.suffix.lower()
        if self.suffix == ".npy":
            array = open_npy(path)
            self.shapes, self._read = {"": array.shape}, lambda name: array
        elif self.suffix == ".npz":
            self.shapes, self._read = self._opened(self._npz)
        else:
            self.shapes, self._read = self._opened(self._hdf5)

    def where(self, name: str) -> str:
        return f"{self.path}, array '{name}'" if name else str(self.path)

    def read(self, name: str) -> np.ndarray:
        """The array of that name.

        Raises:
            ConfigError: if it holds no numbers, or if the file is damaged.
        """
        array = self._opened(lambda: self._read(name), self.where(name))
        check_numbers(array.dtype, self.where(name))
        return array

    def choose(self, name: str) -> str:
        """The name itself, if there is such an array; ConfigError with the nearest one if not."""
        if name not in self.shapes:
            known = ", ".join(f"'{n}' {shown(s)}" for n, s in self.shapes.items() if n) or "one array without a name"
            raise ConfigError(f"{self.path}: no array is called '{name}'.{near(name, self.shapes)} It holds {known}.")
        return name

    def _npz(self) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
        shapes = {}
        with zipfile.ZipFile(self.path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
                    shapes[entry.removesuffix(".npy")] = read(file)[0]

        def read_one(name: str) -> np.ndarray:
            with np.load(self.path, allow_pickle=False) as arrays:
                return arrays[name]

        return shapes, read_one

    def _hdf5(self) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
        try:
            import h5py
        except ImportError:
            raise ConfigError(
                f"{self.path}: h5py is needed to read HDF5 files and is not installed: pip install 'genmodels[data]'."
            ) from None
        shapes: dict[str, tuple[int, ...]] = {}

        def note(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset) and node.shape is not None:
                shapes[name] = node.shape

        with h5py.File(self.path, "r") as file:
            file.visititems(note)

        def read_one(name: str) -> np.ndarray:
            with h5py.File(self.path, "r") as file:
                check_numbers(file[name].dtype, self.where(name))
                return file[name][...]

        return shapes, read_one

    def _opened(self, read: Callable[[], Any], where: str = "") -> Any:
        """What `read` returns; what it raises on a damaged file as an error that names the file."""
        try:
            return read()
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            self._damaged(where or str(self.path), error)

    def _damaged(self, where: str, error: Exception) -> NoReturn:
        if "Object arrays" in str(error):
            check_numbers(np.dtype(object), where)
        kind = "an .npz archive" if self.suffix == ".npz" else "an HDF5 file"
        raise ConfigError(
            f"{where} is not readable as {kind}: {error}. It may be truncated ({self.path.stat().st_size:,} bytes "
            "found): copy or write it again."
        ) from None
