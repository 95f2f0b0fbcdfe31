"""Where shared features are kept: on their device, in memory of the host, or in files."""

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Hashable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..registry import ConfigError


class Shelf(ABC):
    """Tensors by key; what is put under a key that is taken replaces it.

    Attributes:
        bytes: of all its tensors.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor | Path] = {}
        self._sizes: dict[Hashable, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: Hashable, feature: Tensor) -> None:
        """Keep a copy.

        Raises:
            OSError: if it does not fit; nothing of it is left behind.
        """
        self._kept[key] = self.copy(key, feature)
        self._sizes[key] = feature.nbytes

    @abstractmethod
    def copy(self, key: Hashable, feature: Tensor) -> Tensor | Path:
        """What is kept of a feature."""

    def get(self, key: Hashable) -> Tensor:
        """The tensor, on whatever device it is kept; it must not be changed."""
        return self._kept[key]

    def expect(self, more: int) -> None:
        """Raises OSError if so many bytes are known not to fit any more."""

    def settle(self) -> None:
        """Wait for copies that are under way."""

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._sizes.clear()


class Device(Shelf):
    """Features stay where they were computed."""

    def copy(self, key: Hashable, feature: Tensor) -> Tensor:
        return feature.clone(memory_format=torch.contiguous_format)


class Host(Shelf):
    """Features in memory of the host: pinned if they come from a GPU, so that copies run beside its computations."""

    def __init__(self) -> None:
        super().__init__()
        self._devices: set[torch.device] = set()

    def copy(self, key: Hashable, feature: Tensor) -> Tensor:
        pinned = feature.is_cuda
        kept = torch.empty(feature.shape, dtype=feature.dtype, device="cpu", pin_memory=pinned)
        if pinned:
            self._devices.add(feature.device)
        return kept.copy_(feature, non_blocking=pinned)

    def settle(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)


class Disk(Shelf):
    """Features in files of a temporary folder, one for each, which `clear` and the end of the process remove.

    Args:
        folder: in which the temporary one is made; None for the system's.
    Raises:
        ConfigError: if there is no such folder.
    """

    def __init__(self, folder: str | None) -> None:
        super().__init__()
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(
                f"edit.method.share.folder: there is no folder {folder}. Create it, or give null for a temporary one."
            )
        self._folder = folder
        self._made: tempfile.TemporaryDirectory[str] | None = None

    def copy(self, key: Hashable, feature: Tensor) -> Path:
        path = self._place() / f"{len(self) if key not in self else self._kept[key].stem}.safetensors"
        self.expect(feature.nbytes)
        try:
            save_file({"feature": feature.contiguous()}, path)
        except Exception as error:
            path.unlink(missing_ok=True)
            raise OSError(f"sharing: a feature of {feature.nbytes} bytes could not be written: {error}") from error
        return path

    def get(self, key: Hashable) -> Tensor:
        return load_file(self._kept[key])["feature"]

    def expect(self, more: int) -> None:
        place = self._place()
        free = shutil.disk_usage(place).free
        if more > free:
            raise OSError(
                f"sharing: at least {more} more bytes are needed for features in {place.parent}, {free} are free. "
                "Choose another folder (edit.method.share.folder), fewer steps or blocks, evaluations: mid or "
                "precision: half."
            )

    def clear(self) -> None:
        super().clear()
        if self._made is not None:
            self._made.cleanup()
            self._made = None

    def _place(self) -> Path:
        if self._made is None:
            self._made = tempfile.TemporaryDirectory(prefix="features-", dir=self._folder)
        return Path(self._made.name)
