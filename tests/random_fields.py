"""Gaussian fields with known spectra, and a data set that holds given fields: what tests of fields share."""

import math

import torch

from genmodels.data.memory import InMemory
from genmodels.rng import generator
from genmodels.types import Batch


def free_spectrum(size, mass=0.5):
    """[L, L] spectrum 1/(m² + 4 - 2cos k₁ - 2cos k₂) of the free field on a lattice."""
    k = 2 * math.pi * torch.fft.fftfreq(size, dtype=torch.float64)
    return 1 / (mass + 4 - 2 * k.cos()[:, None] - 2 * k.cos())


def smooth_spectrum(size, width):
    """[L, L] spectrum e^(-k² width²), of a field that is smooth on the scale of pixels."""
    k = 2 * math.pi * torch.fft.fftfreq(size, dtype=torch.float64)
    return torch.exp(-(k.square()[:, None] + k.square()) * width**2)


def gaussian_fields(n, spectrum, *key):
    """[n, L, L] float64 normal fields of a spectrum."""
    white = torch.randn(n, *spectrum.shape, generator=generator("fields", *key), dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(white) * spectrum.sqrt()).real


class HeldFields(InMemory):
    """Given training and test fields [N, H, W]."""

    registered_name = "held_fields"

    def __init__(self, train, test):
        self.shape = (1, *test.shape[1:])
        for split, x in (("train", train), ("val", test[:1]), ("test", test)):
            self.hold(split, Batch(x[:, None]))
