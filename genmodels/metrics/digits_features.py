"""The feature extractor of FD-digits: a small classifier of 8x8 digits with fixed, verified weights."""

import functools
import hashlib
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from ..types import Shape

WEIGHTS = Path(__file__).with_name("digits_features.safetensors")
SHA256 = "005c43e768e9c239e5f255a96a99e6c8b6f774084878b50281ec71a793334797"
ITEM: Shape = (1, 8, 8)


class DigitsNetwork(nn.Module):
    """Three convolutions and two linear layers with SiLU between them; the features are the 64 last hidden activations.

    Input: [B, 1, 8, 8] levels 0 … 16, mapped to [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.SiLU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """[B, 64] from levels [B, 1, 8, 8]."""
        return self.body(x / 8 - 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 10] class logits from levels [B, 1, 8, 8]."""
        return self.head(self.features(x))


@functools.cache
def load_network(path: Path = WEIGHTS) -> DigitsNetwork:
    """The trained network in eval mode and float32 on the CPU.

    Raises:
        ValueError: if the file is missing, or if its SHA-256 is not the one that this version was released with.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: reinstall genmodels; distances under other weights are not comparable.")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} has the SHA-256 {found[:12]}…, expected {SHA256[:12]}…: distances under other weights are not "
            "comparable. Restore the file from the release."
        )
    network = DigitsNetwork()
    network.load_state_dict(load(data))
    return network.eval().requires_grad_(False)


def identity() -> str:
    """The extractor's name with the first 12 digits of its weights' checksum."""
    return f"digits-cnn-v1:{SHA256[:12]}"


def accuracy(network: DigitsNetwork, x: Tensor, labels: Tensor) -> float:
    """Share of the items [B, 1, 8, 8] whose largest logit is that of their label."""
    with torch.no_grad():
        return (network(x).argmax(1) == labels).double().mean().item()
