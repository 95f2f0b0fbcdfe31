"""Spectrograms: what a model of sound is told of it, and what people look at."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import ConfigError, kind, register
from ..types import Shape

FLOOR = 1e-5  # least magnitude of a band
LINEAR, STEP = 1000.0, math.log(6.4) / 27  # the Slaney scale: linear up to 1 kHz, then logarithmic


def to_mel(hertz: Tensor) -> Tensor:
    """Frequencies on the Slaney mel scale: 3f/200 below 1 kHz, 15 + 27 log(f/1000)/log 6.4 above.

    Source: Slaney 1998 (Auditory Toolbox).
    """
    return torch.where(hertz < LINEAR, 3 * hertz / 200, 15 + (hertz.clamp(min=LINEAR) / LINEAR).log() / STEP)


def to_hertz(mel: Tensor) -> Tensor:
    """The inverse of `to_mel`."""
    return torch.where(mel < 15, 200 * mel / 3, LINEAR * ((mel.clamp(min=15) - 15) * STEP).exp())


def mel_filters(bands: int, window: int, rate: int, low: float, high: float) -> Tensor:
    """[bands, window//2 + 1] float64: triangles over the frequencies of a Fourier transform.

    With f_0 … f_{bands+1} evenly spaced on the mel scale from low to high, band k rises from f_k to f_{k+1}, falls to
    f_{k+2}, and has area 1 over frequency in hertz.
    """
    edges = to_mel(torch.tensor([low, high], dtype=torch.float64))
    f = to_hertz(torch.linspace(*edges.tolist(), bands + 2, dtype=torch.float64))[:, None]
    bins = torch.arange(window // 2 + 1, dtype=torch.float64) * rate / window
    rise, fall = (bins - f[:-2]) / (f[1:-1] - f[:-2]), (f[2:] - bins) / (f[2:] - f[1:-1])
    return torch.minimum(rise, fall).clamp(min=0) * 2 / (f[2:] - f[:-2])


def magnitudes(x: Tensor, window: int, hop: int, pad: int) -> Tensor:
    """[B, window//2 + 1, frames]: |Fourier transform| of pieces of x [B, T], under a periodic Hann window.

    x is mirrored at both ends by `pad` samples; frame k begins at sample k·hop of what results.
    """
    hann = torch.hann_window(window, dtype=x.dtype, device=x.device)
    padded = F.pad(x[:, None], (pad, pad), mode="reflect")[:, 0]
    return torch.stft(padded, window, hop, window=hann, center=False, return_complex=True).abs()


@kind
class AudioFeatures(ABC):
    """What is computed from a piece of sound and given to a model as its condition."""

    @abstractmethod
    def shape(self, samples: int) -> Shape:
        """Of the features of so many samples.

        Raises:
            ConfigError: if these are too few.
        """

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[B, *shape] features of amplitudes x [B, T] in [-1, 1]; row i depends on item i alone."""


@register(AudioFeatures, "log_mel")
class LogMel(AudioFeatures):
    """Log-mel spectrogram [bands, frames]: log max(M |STFT x|, 1e-5).

    M are triangular filters on the Slaney mel scale of unit area, the transform has a periodic Hann window, and sound
    is mirrored at its ends. The defaults at 22,050 Hz are those of the vocoders WaveGlow, WaveFlow and NanoFlow.

    Args:
        bands: number of filters.
        window: samples that a frame sees, even; the length of its Fourier transform as well.
        hop: samples between frames.
        low: where the first filter begins, in hertz.
        high: where the last one ends; null for 8000 Hz, or half the sample rate if that is less.
        padding: "centre" mirrors window/2 samples, so that frame k is centred at sample k·hop and T samples have
            1 + T//hop frames; "hop" mirrors (window - hop)/2, and T = n·hop samples have n frames.
    Raises:
        ConfigError: if the numbers do not go together, or a filter lies between two frequencies of the transform.
    Source: Prenger et al. 2019 (WaveGlow), section 3.
    """

    def __init__(
        self,
        bands: int = 80,
        window: int = 1024,
        hop: int = 256,
        low: float = 0.0,
        high: float | None = None,
        padding: Literal["centre", "hop"] = "centre",
        *,
        rate: int,
    ) -> None:
        high = min(8000.0, rate / 2) if high is None else high
        if bands < 1 or window < 2 or window % 2 or not 1 <= hop <= window or (padding == "hop" and hop % 2):
            raise ConfigError(
                f"log_mel: at least one band, an even window and a hop of 1 … window (even for padding: hop) are "
                f"needed, found bands={bands}, window={window}, hop={hop}."
            )
        if not 0 <= low < high <= rate / 2:
            raise ConfigError(
                f"log_mel: 0 <= low < high <= {rate / 2:g} Hz (half the sample rate) is needed, found low={low:g} and "
                f"high={high:g}."
            )
        self.bands, self.window, self.hop = bands, window, hop
        self.pad = window // 2 if padding == "centre" else (window - hop) // 2
        filters = mel_filters(bands, window, rate, low, high)
        empty = (filters.sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ConfigError(
                f"log_mel: band {empty[0]} of {bands} ({len(empty)} in all) lies between two frequencies of the "
                f"transform, {rate / window:.1f} Hz apart. Use fewer bands or a longer window."
            )
        self.filters = filters.float()

    def shape(self, samples: int) -> Shape:
        frames = 1 + (samples + 2 * self.pad - self.window) // self.hop
        if samples <= self.pad or frames < 1:
            raise ConfigError(
                f"log_mel: {samples} samples are too few for a window of {self.window}; more than {self.pad} are "
                "needed. Lower its window, or raise data.segment."
            )
        return (self.bands, frames)

    def __call__(self, x: Tensor) -> Tensor:
        spectrum = magnitudes(x, self.window, self.hop, self.pad)
        return (self.filters.to(spectrum) @ spectrum).clamp(min=FLOOR).log()
