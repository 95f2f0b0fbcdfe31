"""Maps from files of the user's, FITS images and .npy or .npz stacks, as fields cut from them."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from ..hashing import digest, fingerprint_files
from ..registry import ConfigError, register
from ..rng import generator
from ..schema import near
from ..transforms import Transform
from ..types import Batch
from . import fits, folders
from .array_files import ArrayFile, find, open_npy, shown
from .dataset import SPLITS, Dataset, proposal
from .image_cache import Mapped, cached_rows
from .memory import Held

STACKS = (".npy", ".npz")
SOME = 64  # maps of a stack that are read together


@register(Dataset, "fields")
class FieldFiles(Held):
    """Fields [1, H, W] from maps in files: FITS images, or .npy and .npz arrays [N, H, W], [N, 1, H, W] or [H, W].

    Each map is averaged over blocks of `pool` x `pool` pixels, then cut into tiles of `crop` x `crop`, then apodised;
    values stay in the units of the files. The split follows a hash of each map's name (its path within the folder, and
    its number in a stack), so that all tiles of a map are in one split. Of FITS files the first image is read
    (`fits.read_image`). Simulations of one sky patch have names like WLconv_z1.00_0001r.fits: choose one redshift with
    `pattern: "WLconv_z1.00_*r.fits"`.

    Maps of the sky are not periodic: what treats them so sees a seam where opposite borders meet. `apodize` takes the
    seam away and makes the field fade towards its borders instead, which lowers the power by the mean of the squared
    window.

    Args:
        path: file, or folder that is searched with its sub-folders.
        pattern: of the names of files, with * and ?; matched to the name and to the path within the folder.
        array: which array of .npz files; null if they hold one.
        pool: side of the blocks that are averaged, a divisor of height and width.
        crop: side of the tiles in pixels after pooling; null for whole maps.
        tiles: "regular" ones side by side about the centre, or as many at "random" places, which may overlap.
        apodize: share a <= 0.5 of each side over which (x - mean) is multiplied by (1 - cos(π (i + ½)/(a n)))/2 towards
            either border, pixels i = 0 … and side n; 0 leaves the field as it is. The mean is the item's own.
        periodic: whether the maps wrap around at their borders.
        val, test: how many maps (an integer) or which fraction of them.
        seed: of the random places.
        cache: folder for the fields, which are then read from there; null to read the files whenever the data are used
            and to keep the fields in memory.
        transform: instead of one standardisation of all pixels.
    Raises:
        ConfigError: naming the file and the way out, if it cannot be read, if maps differ in shape or do not fit the
            options, or if a field is constant or holds NaN or infinity.
    """

    local = ("path", "cache")

    def __init__(
        self,
        path: str,
        pattern: str = "*",
        array: str | None = None,
        pool: int = 1,
        crop: int | None = None,
        tiles: Literal["regular", "random"] = "regular",
        apodize: float = 0.0,
        periodic: bool = False,
        val: int | float = 0.1,
        test: int | float = 0.1,
        seed: int = 0,
        cache: str | None = None,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        folders.check_shares(val, test, "maps")
        where = find(path, "data.path")
        files = _chosen(where, pattern)
        self.maps = Maps(files, where if where.is_dir() else None, array)
        self.cut = Cut(self.maps.shape, pool, crop, tiles, apodize, seed)
        self.shape, self.periodic = (1, *self.cut.shape), periodic
        self.transform = proposal(transform, {"name": "standardize_channels"})
        split = folders.assign(self.maps.names, val, test)
        folders.check_train(where, len(self.maps.names), split["train"], val, test, "map")
        self._files = fingerprint_files(files, where if where.is_dir() else None)
        self._options = {"array": array, **self.cut.options}
        self._shares = {"val": val, "test": test}
        read = self._read(None if cache is None else Path(os.path.expanduser(cache)))
        for name in SPLITS:
            first = torch.tensor(split[name], dtype=torch.int64) * self.cut.count
            rows = rearrange(first.reshape(-1, 1) + torch.arange(self.cut.count), "m t -> (m t)")
            self.hold(name, Fields(read, rows, self.shape))

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the files (`hashing.fingerprint_files`) and of the options that decide the items."""
        return digest({"files": self._files, "options": self._options, "splits": self._shares})

    def checks(self) -> list[str]:
        height, width = self.maps.shape
        return [
            f"{len(self.maps.names):,} maps of {height} x {width} pixels in {len(self.maps.files):,} files, "
            f"{self.cut.count} field{'s' * (self.cut.count > 1)} of each"
        ]

    def _read(self, cache: Path | None) -> Callable[[Tensor], Tensor]:
        if cache is None:
            return Rows(torch.cat([torch.from_numpy(block) for block in self._blocks({})]))
        source = {"what": "fields of maps", "files": self._files, "options": self._options}
        return cached_rows(cache, source, 4 * math.prod(self.shape), self._blocks)[0]

    def _blocks(self, notes: dict[str, Any]) -> Iterator[np.ndarray]:
        """The float32 numbers of the fields of every map in order, as bytes [n, 4 H W]."""
        for k, (where, values) in enumerate(self.maps):
            fields = self.cut(values, k)
            _check(where, fields)
            yield fields.reshape(len(fields), -1).view(np.uint8)


@dataclass(frozen=True)
class Rows:
    """Rows of bytes in memory."""

    rows: Tensor

    def __call__(self, chosen: Tensor) -> Tensor:
        return self.rows[chosen]


@dataclass(frozen=True)
class Fields:
    """Items of a split: rows of what `read` gives, which are the bytes of float32 numbers."""

    read: Rows | Mapped
    rows: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(self.read(self.rows[rows]).view(torch.float32).reshape(-1, *self.shape))


class Maps:
    """The maps of some files in order, with where each is found and its values [H, W]; headers are read at once.

    Attributes:
        names: of each map, by which it is assigned to a split.
        shape: height and width of all.
    Args:
        folder: to which names are relative; None for a single file, whose own name does not count.
        array: which array of .npz files.
    Raises:
        ConfigError: if a file cannot be read or holds no maps, or if the maps differ in shape.
    """

    def __init__(self, files: list[Path], folder: Path | None, array: str | None) -> None:
        self.files, self.array = files, array
        self.names: list[str] = []
        found: tuple[Path, tuple[int, int]] | None = None
        for file in files:
            count, shape = self._header(file)
            found = found or (file, shape)
            if shape != found[1]:
                raise ConfigError(
                    f"{file} holds maps of {shown(shape)} pixels, but {found[0]} of {shown(found[1])}. Fields need one "
                    "shape: choose files of one kind with data.pattern, or bring the maps to one size."
                )
            name = "" if folder is None else file.relative_to(folder).as_posix()
            self.names += [name] if file.suffix.lower() in fits.SUFFIXES else [f"{name}#{k}" for k in range(count)]
        self.shape = found[1]

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for file in self.files:
            if file.suffix.lower() in fits.SUFFIXES:
                yield str(file), fits.read_image(file)
                continue
            stack = self._stack(file).reshape(-1, *self.shape)
            for start in range(0, len(stack), SOME):
                for k, values in enumerate(np.array(stack[start : start + SOME]), start):
                    yield f"{file}, map {k}", values

    def _header(self, file: Path) -> tuple[int, tuple[int, int]]:
        """How many maps a file holds, and their shape."""
        if file.suffix.lower() in fits.SUFFIXES:
            return 1, fits.image_shape(file)
        shape = open_npy(file).shape if file.suffix.lower() == ".npy" else self._npz(file)[0]
        if not (len(shape) in (2, 3) or (len(shape) == 4 and shape[1] == 1)) or 0 in shape:
            raise ConfigError(
                f"{file} holds an array {shown(shape)}; maps are [height, width], [N, height, width] or "
                "[N, 1, height, width]. Save them so: numpy.save(path, x.reshape(-1, height, width))."
            )
        return math.prod(shape[:-2]), (shape[-2], shape[-1])

    def _stack(self, file: Path) -> np.ndarray:
        if file.suffix.lower() == ".npy":
            return open_npy(file)
        return self._npz(file)[1]()

    def _npz(self, file: Path) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
        """The shape of the chosen array, and what reads it."""
        arrays = ArrayFile(file)
        if self.array is None and len(arrays.shapes) != 1:
            known = ", ".join(f"'{name}' {shown(shape)}" for name, shape in arrays.shapes.items()) or "none"
            raise ConfigError(f"{file} holds the arrays {known}. Name the one of the maps: data.array=….")
        name = next(iter(arrays.shapes)) if self.array is None else arrays.choose(self.array)
        return arrays.shapes[name], lambda: arrays.read(name)


class Cut:
    """What makes fields of a map: pooling, then tiles, then a window.

    Attributes:
        shape: height and width of a field.
        count: fields of each map.
        options: what decides the fields, as plain data.
    Args:
        shape: height and width of the maps.
    Raises:
        ConfigError: if an option does not fit the maps.
    """

    def __init__(
        self, shape: tuple[int, int], pool: int, crop: int | None, tiles: str, apodize: float, seed: int
    ) -> None:
        if pool < 1 or any(side % pool for side in shape):
            common = math.gcd(*shape)
            fit = [str(k) for k in range(1, common + 1) if common % k == 0]
            raise ConfigError(
                f"data.pool: {pool} does not divide maps of {shown(shape)} pixels. Take one of {', '.join(fit[:12])}."
            )
        self.pooled = (shape[0] // pool, shape[1] // pool)
        if crop is not None and not 1 <= crop <= min(self.pooled):
            raise ConfigError(
                f"data.crop: tiles of 1 … {min(self.pooled)} pixels fit into maps of {shown(self.pooled)} (after "
                f"pooling), found {crop}."
            )
        if not 0 <= apodize <= 0.5:
            raise ConfigError(f"data.apodize: a share of the side in [0, 0.5] is needed, found {apodize:g}.")
        self.pool, self.crop, self.tiles, self.seed = pool, crop, tiles, seed
        self.shape = self.pooled if crop is None else (crop, crop)
        self.rows, self.columns = (big // small for big, small in zip(self.pooled, self.shape, strict=True))
        self.count = self.rows * self.columns
        self.window = np.outer(*(window(side, apodize) for side in self.shape)) if apodize else None
        self.options = {"pool": pool, "crop": crop, "tiles": tiles, "apodize": apodize}
        self.options |= {"seed": seed} if tiles == "random" else {}

    def __call__(self, values: np.ndarray, k: int) -> np.ndarray:
        """[count, H, W] float32 the fields of map k, [height, width]."""
        values = values.astype(np.float64)
        pooled = reduce(values, "(i p) (j q) -> i j", "mean", p=self.pool, q=self.pool)
        fields = self._regular(pooled) if self.tiles == "regular" else self._random(pooled, k)
        if self.window is not None:
            mean = fields.mean((1, 2), keepdims=True)
            fields = mean + self.window * (fields - mean)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, and is told
            return np.ascontiguousarray(fields.astype(np.float32))

    def _regular(self, values: np.ndarray) -> np.ndarray:
        height, width = self.shape
        top, left = ((big % small) // 2 for big, small in zip(self.pooled, self.shape, strict=True))
        inner = values[top : top + self.rows * height, left : left + self.columns * width]
        return rearrange(inner, "(i h) (j w) -> (i j) h w", h=height, w=width)

    def _random(self, values: np.ndarray, k: int) -> np.ndarray:
        height, width = self.shape
        source = generator("fields", self.seed, k)
        tops, lefts = (
            torch.randint(big - small + 1, (self.count,), generator=source).tolist()
            for big, small in zip(self.pooled, self.shape, strict=True)
        )
        return np.stack([values[i : i + height, j : j + width] for i, j in zip(tops, lefts, strict=True)])


def window(side: int, share: float) -> np.ndarray:
    """[side] Tukey's window: 1 but for cosine flanks over a share of the side at either end.

    Source: Harris 1978 (On the use of windows for harmonic analysis with the discrete Fourier transform).
    """
    place = np.arange(side) + 0.5
    depth = np.minimum(place, side - place) / (share * side)
    return (1 - np.cos(np.pi * depth.clip(max=1.0))) / 2


def _chosen(where: Path, pattern: str) -> list[Path]:
    """The file, or the files of a folder that match, in the order of their names."""
    suffixes = (*fits.SUFFIXES, *STACKS)
    if not where.is_dir():
        if where.suffix.lower() not in suffixes:
            raise ConfigError(f"data.path: {where} ends in none of {', '.join(suffixes)}, which is what can be read.")
        return [where]
    names = folders.find(where, suffixes, "maps")
    kept = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(Path(name).name, pattern)]
    if not kept:
        raise ConfigError(
            f"data.pattern: none of the {len(names):,} files of maps in {where} is like {pattern!r}; the first is "
            f"{names[0]}.{near(pattern, names)}"
        )
    return [where / name for name in kept]


def _check(where: str, fields: np.ndarray) -> None:
    """Raises ConfigError if a field holds NaN or infinity, or the same value everywhere."""
    flat = fields.reshape(len(fields), -1)
    bad = ~np.isfinite(flat).all(1)
    constant = flat.min(1) == flat.max(1)
    if not (bad | constant).any():
        return
    first = int((bad | constant).argmax())
    what = "NaN or infinity (as float32)" if bad[first] else f"the value {flat[first, 0]:g} everywhere"
    tile = f", tile {first}" if len(fields) > 1 else ""
    raise ConfigError(
        f"{where}{tile} holds {what}. Leave the file out (data.pattern), or fill or cut away what was not observed."
    )
