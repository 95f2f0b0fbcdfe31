"""Log-mel spectrograms against independent implementations, and against what a sine must give."""

import math

import numpy as np
import pytest
import torch
from scipy import signal

from genmodels.data.mel import FLOOR, LogMel, mel_filters, to_hertz, to_mel
from genmodels.registry import ConfigError

SETTINGS = [(80, 1024, 22_050, 0.0, 8000.0), (20, 256, 8000, 0.0, 4000.0), (40, 512, 16_000, 60.0, 7600.0)]


def test_the_scale_is_linear_then_logarithmic_and_goes_back():
    assert to_mel(torch.tensor([0.0, 200.0, 1000.0, 6400.0])).tolist() == pytest.approx([0, 3, 15, 42])
    f = torch.linspace(0, 11_025, 500, dtype=torch.float64)
    torch.testing.assert_close(to_hertz(to_mel(f)), f, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(("bands", "window", "rate", "low", "high"), SETTINGS)
def test_filters_are_those_of_another_library(bands, window, rate, low, high):
    audio_utils = pytest.importorskip("transformers.audio_utils")
    reference = audio_utils.mel_filter_bank(window // 2 + 1, bands, low, high, rate, norm="slaney", mel_scale="slaney")
    found = mel_filters(bands, window, rate, low, high).numpy()
    np.testing.assert_allclose(found, reference.T, rtol=1e-9, atol=1e-12)


def test_filters_have_unit_area():
    filters = mel_filters(40, 16_384, 22_050, 0.0, 8000.0)  # fine bins, so that the sum is the integral
    torch.testing.assert_close(filters.sum(1) * 22_050 / 16_384, torch.ones(40).double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("padding", ["centre", "hop"])
@pytest.mark.parametrize(("bands", "window", "rate", "low", "high"), SETTINGS)
def test_spectrograms_are_those_of_numpy_and_scipy(bands, window, rate, low, high, padding):
    x = 0.3 * torch.randn(3, 8 * window + 77, generator=torch.Generator().manual_seed(0))
    hop = window // 4
    found = LogMel(bands, window, hop, low, high, padding, rate=rate)(x).numpy()
    pad = window // 2 if padding == "centre" else (window - hop) // 2
    padded = np.pad(x.double().numpy(), ((0, 0), (pad, pad)), mode="reflect")
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window, 1)[:, ::hop]
    hann = signal.get_window("hann", window)  # periodic
    spectrum = np.abs(np.fft.rfft(pieces * hann)).transpose(0, 2, 1)
    reference = np.log(np.maximum(mel_filters(bands, window, rate, low, high).numpy() @ spectrum, 1e-5))
    np.testing.assert_allclose(found, reference, atol=1e-4)  # float32 against float64: magnitudes add up to 1e3
    if padding == "centre":
        other = signal.ShortTimeFFT(hann, hop, rate).stft(padded, p0=2, p1=2 + spectrum.shape[2])
        np.testing.assert_allclose(np.abs(other), spectrum, atol=1e-9 * spectrum.max())


@pytest.mark.parametrize("hertz", [100.0, 440.0, 1000.0, 3000.0, 7500.0])
def test_a_sine_is_loudest_in_the_band_around_it(hertz):
    """Of amplitude a at a frequency of the transform it has |X| = a·window/4, and half that one bin beside."""
    rate, window, bands = 22_050, 1024, 80
    b = round(hertz * window / rate)
    t = torch.arange(16_000, dtype=torch.float64) / rate
    x = 0.5 * (2 * math.pi * b * rate / window * t).sin()
    found = LogMel(rate=rate)(x[None])[0, :, 10]
    filters = mel_filters(bands, window, rate, 0.0, 8000.0)
    expected = (0.5 * window / 4 * (filters[:, b] + 0.5 * (filters[:, b - 1] + filters[:, b + 1]))).clamp(min=FLOOR)
    heard = expected > 1e-3
    assert heard.sum() >= 1
    torch.testing.assert_close(found[heard], expected[heard].log(), atol=1e-4, rtol=0)  # Hann has no other leakage
    edges = to_hertz(torch.linspace(*to_mel(torch.tensor([0.0, 8000.0])).tolist(), bands + 2))
    loudest = int(found.argmax())
    assert edges[loudest] < b * rate / window < edges[loudest + 2]


def test_frames_are_counted_and_centred():
    assert LogMel(rate=22_050).shape(16_000) == (80, 63)  # WaveFlow's segments
    assert LogMel(padding="hop", rate=22_050).shape(16_384) == (80, 64)
    for padding in ("centre", "hop"):
        mel = LogMel(8, 64, 16, padding=padding, rate=8000)
        for samples in (33, 64, 100, 256):
            assert mel(torch.zeros(2, samples)).shape == (2, *mel.shape(samples))
    x = torch.zeros(1, 640)
    x[0, 320] = 1.0
    assert LogMel(8, 64, 16, rate=8000)(x)[0].sum(0).argmax() == 320 // 16


def test_silence_is_the_floor_and_rows_are_independent():
    mel = LogMel(8, 64, 16, rate=8000)
    assert mel(torch.zeros(1, 200)).unique().tolist() == pytest.approx([math.log(1e-5)])
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mel(x)[3:4], mel(x[3:4]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bands": 0}, "at least one band"),
        ({"window": 1023}, "an even window"),
        ({"hop": 0}, "a hop of 1"),
        ({"hop": 2000}, "a hop of 1"),
        ({"hop": 255, "padding": "hop"}, "even for padding: hop"),
        ({"high": 12_000.0}, r"high <= 11025 Hz \(half the sample rate\)"),
        ({"low": 9000.0}, "low < high"),
        (
            {"window": 128, "hop": 32},
            r"band \d+ of 80 \(\d+ in all\) lies between two frequencies of the transform, 172.3 Hz apart",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LogMel(**arguments, rate=22_050)


@pytest.mark.parametrize("samples", [0, 1, 512])
def test_too_short_a_sound_is_refused(samples):
    with pytest.raises(ConfigError, match=f"{samples} samples are too few for a window of 1024; more than 512"):
        LogMel(rate=22_050).shape(samples)
