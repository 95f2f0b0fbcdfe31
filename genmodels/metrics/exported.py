"""Any network as feature extractor, from a program that torch.export wrote."""

from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.dataset import Dataset
from ..registry import register
from .features import FeatureExtractor
from .image_features import exact
from .weights import checksum


@register(FeatureExtractor, "exported")
class Exported(FeatureExtractor):
    """A network of your own, as a program of torch.export.

    `torch.export.save(torch.export.export(network, …), path)` writes one. It takes items [B, *shape] in float32 and
    gives one tensor [B, …], which is flattened. The batch axis must be dynamic. It runs on the evaluator's device,
    without autocast or TF32.

    Args:
        path: the program (.pt2); a checksum of it enters the identity.
        size: resize images to size x size first (antialiased bilinear); null leaves items as they are.
        range: the two numbers that the lowest and the highest level of discrete data become; null keeps data units.
    Raises:
        ValueError: if there is no such file, if it is no exported program, or if it does not take such items.
    """

    label, costly = "exported", True
    local: ClassVar[tuple[str, ...]] = ("path",)
    chunk: ClassVar[int] = 64

    def __init__(self, path: str, size: int | None = None, range: tuple[float, float] | None = None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"exported.size: must be at least 1, found {size}.")
        self.path, self.size, self.range = path, size, range
        self.scale, self.shift = 1.0, 0.0

    @cached_property
    def file(self) -> Path:
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise ValueError(f"features 'exported': there is no file {self.path}; torch.export.save writes one.")
        return file

    @property
    def identity(self) -> str:
        span = "data units" if self.range is None else f"{self.range[0]:g}..{self.range[1]:g}"
        return f"exported:{checksum(self.file)[:12]}:{self.size or 'as is'}:{span}"

    def start(self, dataset: Dataset, device: torch.device) -> None:
        self.device = torch.device(device)
        if self.size is not None and len(dataset.shape) != 3:
            raise ValueError(f"features 'exported': items of shape {list(dataset.shape)} are no images; omit `size`.")
        if self.range is not None:
            if dataset.levels is None or dataset.bin_width is None or dataset.levels < 2:
                raise ValueError("features 'exported': the data have no levels to map to `range`; omit it.")
            self.shift = self.range[0]
            self.scale = (self.range[1] - self.range[0]) / ((dataset.levels - 1) * dataset.bin_width)
        self.network = self._load()
        for n in (1, 3):
            self._try(torch.zeros(n, *dataset.shape))

    def _load(self) -> nn.Module:
        try:
            program = torch.export.load(self.file)
            if self.device.type != "cpu":
                program = torch.export.passes.move_to_device_pass(program, self.device)
        except Exception as error:
            raise ValueError(f"features 'exported': {self.path} is no program of torch.export: {error}") from error
        return program.module()

    def _try(self, x: Tensor) -> None:
        advice = "Export it for such items, in float32, with a dynamic batch axis."
        try:
            out = self(x)
        except Exception as error:
            shape = list(self._prepare(x).shape)
            raise ValueError(f"features 'exported': {self.path} fails on items {shape}: {error} {advice}") from error
        if len(out) != len(x):
            raise ValueError(f"features 'exported': {self.path} gives {len(out)} rows for {len(x)} items. {advice}")

    def _prepare(self, x: Tensor) -> Tensor:
        x = x.to(self.device, torch.float32) * self.scale + self.shift
        if self.size is None:
            return x
        return F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad(), exact(self.device):
            return torch.cat([self.network(self._prepare(part)).flatten(1) for part in x.split(self.chunk)])
