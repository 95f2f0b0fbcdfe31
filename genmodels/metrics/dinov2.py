"""DINOv2 as feature extractor: the class token of a vision transformer, prepared as in its authors' own loader."""

import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..hashing import digest
from ..registry import register
from .features import FeatureExtractor
from .image_features import ImageFeatures
from .weights import checksum

SIDE, PATCH = 224, 14
OFFSET = 0.1  # what the authors' loader adds to the number of patches before it divides
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {384: "s14", 768: "b14", 1024: "l14", 1536: "g14"}


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """[1, 1 + side², D] from position embeddings [1, 1 + n², D]: the class token's, then bicubic of the others.

    The source coordinate of output i is (i + ½) n / (side + 0.1) - ½, without antialiasing: the rule of the authors'
    loader. Loaders that divide n by side itself give other features.
    """
    grid = rearrange(positions[:, 1:].float(), "1 (h w) d -> 1 d h w", h=round((positions.shape[1] - 1) ** 0.5))
    if grid.shape[-1] != side:
        factor = (side + OFFSET) / grid.shape[-1]
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), rearrange(grid, "1 d h w -> 1 (h w) d")], 1)


def resize(x: Tensor, how: Literal["torch", "pil"]) -> Tensor:
    """[B, 3, 224, 224] from images of 0 … 255: antialiased bicubic in float32, or Pillow's on 8-bit images."""
    if how == "torch":
        return F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    from PIL import Image

    images = rearrange(x, "b c h w -> b h w c").byte().cpu().numpy()
    sized = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]
    return rearrange(torch.from_numpy(np.stack(sized)), "b h w c -> b c h w").to(x.device, torch.float32)


@lru_cache(maxsize=1)
def load_network(path: Path, sha256: str) -> nn.Module:
    """The transformer of a folder in eval mode and float32, its position embeddings resized for 224x224 pixels.

    Args:
        sha256: of the weights; others are another network.
    Raises:
        ValueError: if transformers is not installed, or the folder cannot be loaded.
    """
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise ValueError(
            f"features 'dinov2' needs the package transformers ({error}): pip install 'genmodels[hub]'. Without it use "
            "`features: inception`, or `features: pixels`."
        ) from error
    try:
        model, found = Dinov2Model.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(f"features 'dinov2': {path} cannot be loaded as Dinov2Model: {error}") from error
    wrong = {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys and kind.endswith("_keys")}
    if wrong:  # transformers would fill the gaps at random
        kind, keys = next(iter(wrong.items()))
        raise ValueError(
            f"features 'dinov2': {path}: weights and configuration do not fit: {kind.replace('_', ' ')}, the first is "
            f"'{keys[0]}' (of {len(keys)})."
        )
    model = model.float().eval().requires_grad_(False)
    # a grid of the image's own size is taken as it is, so that the rule above is the only one
    positions = resize_positions(model.embeddings.position_embeddings, SIDE // PATCH)
    model.embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)
    return model


@register(FeatureExtractor, "dinov2")
class Dinov2(ImageFeatures):
    """The class token of a DINOv2 transformer from a folder on this machine.

    It is layer-normed and sees 224x224 pixels. Grey images become three equal channels. The Fréchet distance over it is
    called FD-dinov2-l14 for 1024 features, -b14 for 768, and so on.

    Args:
        path: folder written by transformers' `Dinov2Model.save_pretrained`: config.json and model.safetensors.
        resize: "torch" for antialiased bicubic in float32, "pil" for Pillow's on 8-bit images (slower).
    Raises:
        ValueError: if the folder or the package transformers is missing, or if it holds another model.
    Source: Oquab et al. 2024 (DINOv2); Stein et al. 2023 (Exposing flaws of generative model evaluation metrics).
    """

    local: ClassVar[tuple[str, ...]] = ("path",)

    def __init__(self, path: str, resize: Literal["torch", "pil"] = "torch") -> None:
        self.path, self.resize = path, resize

    @cached_property
    def folder(self) -> Path:
        folder = Path(self.path).expanduser()
        missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"features 'dinov2': {self.path} lacks {' and '.join(missing)}. A folder written by transformers' "
                "Dinov2Model.save_pretrained is needed (the published models are called dinov2-small, -base, -large "
                "and -giant); nothing is downloaded. Give its `path`, or use `features: digits` or `features: pixels`."
            )
        return folder

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.folder / "config.json").read_bytes())
        except ValueError as error:
            raise ValueError(f"features 'dinov2': {self.folder / 'config.json'} is not JSON: {error}.") from None
        if config.get("model_type") != "dinov2" or config.get("patch_size", PATCH) != PATCH:
            raise ValueError(
                f"features 'dinov2': {self.folder / 'config.json'} describes the model {config.get('model_type')!r} "
                f"with patches of {config.get('patch_size')}; 'dinov2' with patches of {PATCH} is needed."
            )
        return config

    @property
    def sha256(self) -> str:
        return checksum(self.folder / "model.safetensors")

    @property
    def label(self) -> str:
        width = self.config.get("hidden_size", 768)
        return f"dinov2-{SIZES.get(width, width)}"

    @property
    def identity(self) -> str:
        # what the weights do not say
        facts = [self.config.get(key) for key in ("num_attention_heads", "hidden_act", "layer_norm_eps")]
        return f"dinov2:{self.sha256[:12]}:{digest(facts)[:6]}:hub-positions:{self.resize}-bicubic-{SIDE}"

    def load(self) -> nn.Module:
        return load_network(self.folder, self.sha256)

    def embed(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=images.device).reshape(3, 1, 1) for v in (MEAN, STD))
        return self.network((resize(images, self.resize) / 255 - mean) / std).pooler_output
