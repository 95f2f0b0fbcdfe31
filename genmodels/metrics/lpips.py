"""LPIPS, the distance of pictures in features of AlexNet or VGG16; its weights are the user's files."""

from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .weights import checksum, find, fit, read

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
EPSILON = 1e-10  # beside norms of features, as published: a place without features has distance 0 from another
OTHERWISE = "Without weights leave LPIPS out (`lpips: null`): MSE, PSNR and SSIM need none."
Backbone = Literal["alex", "vgg"]
VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Layout(NamedTuple):
    """What a backbone is.

    Args:
        channels: of the features that are compared.
        ends: how many modules of `features` lead to each of them.
        smallest: side of pictures that reach the last.
        files: names of the weights of the backbone, and where each comes from.
        linear: the same of the published weights of channels.
    """

    channels: tuple[int, ...]
    ends: tuple[int, ...]
    smallest: int
    files: dict[str, str]
    linear: dict[str, str]


def _linear(name: str) -> dict[str, str]:
    origin = f"the file {name}.pth in lpips/weights/v0.1 of the project PerceptualSimilarity"
    renamed = {f"lpips-{name}.pth": "the next one, renamed", f"lpips-{name}.safetensors": "its tensors"}
    return renamed | {f"{name}.pth": origin}


LAYOUTS = {
    "alex": Layout(
        (64, 192, 384, 256, 256),
        (2, 5, 8, 10, 12),
        31,
        {"alexnet-owt-7be5be79.pth": "torchvision's AlexNet", "alexnet.safetensors": "the same tensors"},
        _linear("alex"),
    ),
    "vgg": Layout(
        (64, 128, 256, 512, 512),
        (4, 9, 16, 23, 30),
        16,
        {"vgg16-397923af.pth": "torchvision's VGG16", "vgg16.safetensors": "the same tensors"},
        _linear("vgg"),
    ),
}


def alexnet() -> nn.Sequential:
    """The convolutions of AlexNet, numbered as in torchvision's `features`."""
    conv, relu = nn.Conv2d, nn.ReLU
    return nn.Sequential(
        *(conv(3, 64, 11, stride=4, padding=2), relu(), nn.MaxPool2d(3, 2)),
        *(conv(64, 192, 5, padding=2), relu(), nn.MaxPool2d(3, 2)),
        *(conv(192, 384, 3, padding=1), relu()),
        *(conv(384, 256, 3, padding=1), relu()),
        *(conv(256, 256, 3, padding=1), relu()),
    )


def vgg16() -> nn.Sequential:
    """The convolutions of VGG16, numbered as in torchvision's `features`."""
    modules: list[nn.Module] = []
    inputs = 3
    for k, block in enumerate(VGG):
        modules += [nn.MaxPool2d(2)] * (k > 0)
        for outputs in block:
            modules += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*modules)


class Lpips(nn.Module):
    """d(x, y) = Σ_l mean over places of Σ_c w_lc (φ̂_lc(x) - φ̂_lc(y))², φ̂_l the features of layer l with unit length.

    The features follow the last ReLU of each of five blocks; grey pictures become three equal channels. Weights w are
    those of the published linear layers.

    Args:
        network: alex (what the paper recommends for distances) or vgg.
    Source: Zhang et al. 2018 (LPIPS), section 3 and equation 1.
    """

    def __init__(self, network: Backbone = "alex") -> None:
        super().__init__()
        self.layout = LAYOUTS[network]
        self.features = (alexnet if network == "alex" else vgg16)()
        self.weights = nn.ParameterList(torch.ones(1, c, 1, 1) for c in self.layout.channels)

    def forward(self, x: Tensor, y: Tensor, peak: float) -> Tensor:
        """[B] float64 distances of pictures [B, 1 or 3, H, W]; of videos [B, T, 1 or 3, H, W] their means over frames.

        Args:
            peak: the value of white; black is 0.
        Raises:
            ValueError: if the shapes differ, or there are other channels, or too few pixels.
        """
        side = self.layout.smallest
        if x.shape != y.shape or x.ndim not in (4, 5) or x.shape[-3] not in (1, 3) or min(x.shape[-2:]) < side:
            raise ValueError(
                f"LPIPS: pictures [B, 1 or 3, H, W] of equal shape, with sides of {side} pixels or more, are needed; "
                f"found {list(x.shape)} and {list(y.shape)}."
            )
        pairs = zip(self._unit(x, peak), self._unit(y, peak), self.weights, strict=True)
        found = sum((w.double() * (a - b).double().square()).sum(1).mean((1, 2)) for a, b, w in pairs)
        return found.reshape(len(x), -1).mean(1)

    def _unit(self, x: Tensor, peak: float) -> list[Tensor]:
        """Features of five layers, of unit length at every place."""
        x = x.reshape(-1, *x.shape[-3:]).to(self.weights[0].dtype).expand(-1, 3, -1, -1)
        shift, scale = (x.new_tensor(of)[:, None, None] for of in (SHIFT, SCALE))
        h, found = (2 * x / peak - 1 - shift) / scale, []
        for number, module in enumerate(self.features, 1):
            h = module(h)
            if number in self.layout.ends:
                found.append(h / (h.square().sum(1, keepdim=True).sqrt() + EPSILON))
        return found


class Files(NamedTuple):
    """The two files of weights."""

    backbone: Path
    linear: Path

    @property
    def identity(self) -> str:
        """The first digits of their SHA-256."""
        return "+".join(checksum(path)[:12] for path in self)


def files(network: Backbone = "alex", backbone: str | None = None, linear: str | None = None) -> Files:
    """Where the weights lie: as given, or under their published names in $GENMODELS_WEIGHTS or the cache.

    Raises:
        ValueError: if one is missing, saying what it is called, where it comes from, and what to set.
    """
    layout, where = LAYOUTS[network], f"LPIPS '{network}'"
    said = "the state of the classifier, of which keys `features.*` are read"
    return Files(
        find(backbone, layout.files, where, said, "lpips_backbone", OTHERWISE),
        find(linear, layout.linear, where, "keys `lin0.model.1.weight` …", "lpips_linear", OTHERWISE),
    )


@lru_cache(maxsize=2)
def load(network: Backbone, places: Files) -> Lpips:
    """The distance with the weights of files, in eval mode and float32, on the CPU.

    Raises:
        ValueError: if a file cannot be read, or naming the first key that is missing, or of another shape.
    """
    with torch.device("meta"):
        found = Lpips(network)
    where = [f"LPIPS '{network}': {path}" for path in places]
    state = {key: value for key, value in read(places.backbone).items() if key.startswith("features.")}
    wanted = {f"features.{key}": value for key, value in found.features.state_dict().items()}
    kept = fit(state, wanted, where[0])
    names = {f"lin{k}.model.1.weight": f"weights.{k}" for k in range(len(found.weights))}
    lines = fit(read(places.linear), {key: found.get_parameter(own) for key, own in names.items()}, where[1])
    kept |= {own: lines[key] for key, own in names.items()}
    found.load_state_dict(kept, assign=True)
    return found.float().eval().requires_grad_(False)
