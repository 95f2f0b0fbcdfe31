"""What extractors over 8-bit RGB images share: levels to bytes, chunks, and exact float32."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..data.dataset import Dataset
from ..types import Shape
from .features import FeatureExtractor


class ImageFeatures(FeatureExtractor):
    """An extractor that reads images as files hold them: three channels of integers 0 … 255.

    Other numbers of levels are spread over 0 … 255 and rounded; grey images become three equal channels. Arithmetic is
    float32, without autocast or TF32, in chunks.

    Attributes:
        chunk: images that pass the network at once.
    """

    costly: ClassVar[bool] = True
    chunk: ClassVar[int] = 32
    network: nn.Module
    shape: Shape | None = None

    @abstractmethod
    def load(self) -> nn.Module:
        """The network, ready to be moved to a device."""

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """[B, D] features of images [B, 3, H, W] with integers 0 … 255 in float32."""

    def start(self, dataset: Dataset, device: torch.device) -> None:
        where, shape = f"features '{self.registered_name}'", list(dataset.shape)
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                f"{where}: items have shape {shape}; images [1, H, W] or [3, H, W] are needed. Use `features: pixels` "
                "for other data."
            )
        if dataset.levels is None or dataset.bin_width is None or dataset.levels < 2:
            raise ValueError(
                f"{where}: the data have no levels, so that there is no scale from black to white. Use `features: "
                "pixels` for continuous data."
            )
        self.shape = tuple(shape)
        self.scale = 255 / ((dataset.levels - 1) * dataset.bin_width)
        self.network, self.device = self.load().to(device), torch.device(device)

    def __call__(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            ready = "it was never started" if self.shape is None else f"it was started for {list(self.shape)}"
            raise ValueError(
                f"features '{self.registered_name}': items have shape {list(x.shape[1:])}, but {ready}; call `start` "
                "with their data set first."
            )
        with torch.no_grad(), exact(self.device):
            return torch.cat([self.embed(self._bytes(part)) for part in x.split(self.chunk)])

    def _bytes(self, x: Tensor) -> Tensor:
        x = (x.to(self.device, torch.float64) * self.scale + 0.5).floor().clamp(0, 255).float()
        return x.expand(-1, 3, -1, -1)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Float32 arithmetic as it is written: neither autocast nor TF32, and what was set before afterwards."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
