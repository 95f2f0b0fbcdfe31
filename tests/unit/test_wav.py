"""WAV files of every kind that people have: what is read, what is written, what is refused."""

import io
import struct
import wave

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from genmodels.data import wav
from genmodels.registry import ConfigError
from tests.data_files import riff

# the levels that decide scale and sign, in units of the least one
LEVELS = {
    bits: np.array([-(2 ** (bits - 1)), -1, 0, 1, 2 ** (bits - 2), 2 ** (bits - 1) - 1]) for bits in (8, 16, 24, 32)
}


def packed(levels: np.ndarray, bits: int) -> bytes:
    if bits == 8:
        return (levels + 128).astype(np.uint8).tobytes()
    return b"".join(int(v).to_bytes(bits // 8, "little", signed=True) for v in levels.ravel())


@pytest.fixture
def file(tmp_path):
    def make(content: bytes):
        path = tmp_path / "a.wav"
        path.write_bytes(content)
        return path

    return make


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("tag", [1, 0xFFFF])  # plain, and as an extension
def test_integers_are_divided_by_half_their_range(file, bits, tag):
    path = file(riff(packed(LEVELS[bits], bits), bits, tag=tag, LIST=b"odd"))
    found = wav.inspect(path)
    assert (found.rate, found.channels, found.bits, found.frames, found.real) == (8000, 1, bits, 6, False)
    expected = (LEVELS[bits] / 2 ** (bits - 1)).astype(np.float32)
    assert found.read().dtype == np.float32 and np.array_equal(found.read(), expected)
    assert found.read()[0] == -1 and abs(found.read()).max() <= 1


@pytest.mark.parametrize("tag", [3, 0xFFFE + 3])
def test_floats_are_taken_as_they_are(file, tag):
    x = np.array([-1.5, -0.1, 0.0, 1e-9, 0.75], dtype="<f4")
    found = wav.inspect(file(riff(x.tobytes(), 32, tag=tag, fact=struct.pack("<I", 5))))
    assert found.real and np.array_equal(found.read(), x)


@pytest.mark.parametrize("bits", LEVELS)
def test_channels_are_averaged(file, bits):
    left, right = LEVELS[bits], LEVELS[bits][::-1] // 2
    found = wav.inspect(
        file(
            riff(
                packed(
                    np.stack([left, right], 1),
                    bits,
                ),
                bits,
                channels=2,
            )
        )
    )
    assert found.frames == 6
    np.testing.assert_allclose(found.read(), (left + right) / 2**bits, rtol=0, atol=2**-24)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_scipy_reads_the_same(file, dtype):
    random = np.random.default_rng(0)
    x = (
        random.normal(size=(90, 2)).astype("f4")
        if dtype == "float32"
        else random.integers(0, 256, (90, 2)).astype(dtype)
    )
    buffer = io.BytesIO()
    wavfile.write(buffer, 22_050, x)
    found = wav.inspect(file(buffer.getvalue()))
    scale, middle = {"uint8": (128, 128), "int16": (2**15, 0), "int32": (2**31, 0), "float32": (1, 0)}[dtype]
    np.testing.assert_allclose(found.read(), ((x - middle * 1.0) / scale).mean(1), rtol=1e-6, atol=1e-7)
    assert found.rate == 22_050


def test_24_bits_as_scipy_and_the_standard_library_write_and_read_them(file):
    levels = np.random.default_rng(0).integers(-(2**23), 2**23, 50)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as out:
        out.setparams((1, 3, 44_100, 0, "NONE", ""))
        out.writeframes(packed(levels, 24))
    path = file(buffer.getvalue())
    assert np.array_equal(wav.inspect(path).read(), (levels / 2**23).astype("f4"))
    assert np.array_equal(wavfile.read(path)[1] // 256, levels)


@pytest.mark.parametrize("bits", LEVELS)
def test_a_part_is_a_part(file, bits):
    levels = np.random.default_rng(1).integers(LEVELS[bits][0], LEVELS[bits][-1], (40, 2))
    found = wav.inspect(file(riff(packed(levels, bits), bits, channels=2)))
    assert np.array_equal(found.read(7, 20), found.read()[7:27]) and len(found.read(40, 0)) == 0


@pytest.mark.parametrize("length", [0x7FFFF000, 0xFFFFFFFF])
def test_what_was_written_into_a_pipe_ends_with_the_file(file, length):
    content = riff(packed(LEVELS[16], 16))
    found = wav.inspect(file(content[:40] + struct.pack("<I", length) + content[44:]))
    assert found.frames == 6 and found.read()[0] == -1


GOOD = riff(b"\0" * 100)
BAD = {
    "it is no WAV file (it begins with b'OggS')": b"OggS" + GOOD[4:],
    "is damaged: of 100 bytes of samples 99 are there": GOOD[:-1],
    "is damaged: it ends before its 'data' chunk": GOOD[:36],
    "is damaged: it ends before its 'fmt' chunk": GOOD[:12],
    "its header is damaged": GOOD[:30],
    "it holds 8-bit mu-law samples": riff(b"\0" * 9, 8, tag=7),
    "it holds 64-bit float samples": riff(b"\0" * 16, 64, tag=3),
    "it holds 12-bit integer samples": riff(b"\0" * 16, 12),
    "its header contradicts itself (0 channels of 16 bits in 0 bytes)": riff(b"", channels=0),
    "its header contradicts itself (1 channels of 16 bits in 4 bytes)": GOOD[:32] + b"\4" + GOOD[33:],
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_read_is_named(file, message):
    with pytest.raises(ConfigError) as error:
        wav.inspect(file(BAD[message]))
    assert message in str(error.value) and "a.wav" in str(error.value)
    assert ("ffmpeg -i a.wav" in str(error.value)) != ("Copy it again" in str(error.value))


def test_numbers_that_are_none_and_files_that_shrink_are_named(file):
    x = np.array([0, 0, 0, np.nan, 0], dtype="<f4")
    path = file(riff(x.tobytes(), 32, tag=3))
    found = wav.inspect(path)
    assert np.array_equal(found.read(0, 3), x[:3])
    with pytest.raises(ConfigError, match="sample 3, holds NaN or infinity"):
        found.read(2, 2)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConfigError, match="has become shorter"):
        found.read(4)


def test_written_amplitudes_come_back_to_half_a_level(tmp_path):
    x = torch.rand(999, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert wav.write(tmp_path / "x.wav", x, 22_050) == 0
    rate, levels = wavfile.read(tmp_path / "x.wav")
    assert rate == 22_050 and levels.dtype == np.int16
    back = wav.inspect(tmp_path / "x.wav").read()
    assert np.array_equal(back, levels / np.float32(2**15))
    inside = x < 1 - 2**-15  # the largest level is 1 - 2^-15
    assert abs(back - x.numpy())[inside].max() <= 2**-16


def test_what_does_not_fit_is_clipped_and_counted(tmp_path):
    x = torch.tensor([1.0, -1.0, 1.001, -7.0, torch.nan, torch.inf, -torch.inf, 0.25])
    with np.errstate(invalid="raise"):  # what a NaN becomes as an integer is not defined
        assert wav.write(tmp_path / "x.wav", x, 8000) == 5
    assert wavfile.read(tmp_path / "x.wav")[1].tolist() == [32767, -32768, 32767, -32768, 0, 32767, -32768, 8192]
