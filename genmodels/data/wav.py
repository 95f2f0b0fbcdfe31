"""WAV files: what their headers say, any part of their samples as numbers in [-1, 1], and writing in 16 bits."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from ..files import new_file
from ..registry import ConfigError

INTEGERS, REALS, EXTENSIBLE = 1, 3, 0xFFFE
OTHERS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "IMA ADPCM", 0x50: "MPEG", 0x55: "MP3"}
READABLE = {(INTEGERS, 8), (INTEGERS, 16), (INTEGERS, 24), (INTEGERS, 32), (REALS, 32)}
ENDLESS = 0x7FFFF000  # lengths from here on mean "to the end of the file": what was written into a pipe says so


@dataclass(frozen=True, slots=True)
class Wav:
    """Where the samples of a file lie, and what they are.

    Attributes:
        rate: samples a second of each channel.
        real: 32-bit float numbers instead of integers.
        start: bytes before the first sample.
        frames: samples of each channel.
    """

    path: Path
    rate: int
    channels: int
    bits: int
    real: bool
    start: int
    frames: int

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """[count] float32: the mean of the channels, from a sample on; integers of b bits are divided by 2^(b-1).

        Float samples are taken as they are, also beyond [-1, 1].

        Raises:
            ConfigError: if the file is shorter than it was, or if float samples are NaN or infinite.
        """
        count = self.frames - first if count is None else count
        width = self.channels * self.bits // 8
        raw = np.fromfile(self.path, np.uint8, count * width, offset=self.start + first * width)
        if len(raw) < count * width:
            raise ConfigError(f"{self.path} has become shorter since it was looked at. Start again.")
        x = _amplitudes(raw, self.bits, self.real).reshape(count, self.channels)
        if self.real and not np.isfinite(x).all():
            place = first + int(np.argmin(np.isfinite(x).all(1)))
            raise ConfigError(f"{self.path}, sample {place}, holds NaN or infinity. Mend the file, or remove it.")
        return x[:, 0] if self.channels == 1 else x.mean(1, dtype=np.float64).astype(np.float32)


def inspect(path: Path) -> Wav:
    """What the header of a file says.

    Raises:
        ConfigError: if the file is no WAV file, is cut short, or holds samples of another kind.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            raise _unreadable(path, f"it is no WAV file (it begins with {head[:4]!r})")
        channels, rate, bits, tag = _format(path, file)
        length = _skip_to(path, file, b"data")
        start, rest = file.tell(), os.fstat(file.fileno()).st_size - file.tell()
    if length > rest and length < ENDLESS:
        raise ConfigError(f"{path} is damaged: of {length:,} bytes of samples {rest:,} are there. Copy it again.")
    frames = min(length, rest) // (channels * bits // 8)
    return Wav(path, rate, channels, bits, tag == REALS, start, frames)


def write(path: Path, x: Tensor, rate: int) -> int:
    """Write amplitudes x [T] as 16-bit PCM: round(2^15 x), clipped; NaN becomes silence.

    Returns:
        How many amplitudes were NaN or beyond [-1, 1].
    """
    from scipy.io import wavfile

    beyond = int((~(x.abs() <= 1)).sum())  # NaN counts
    levels = (x.double().nan_to_num(0.0) * 2**15).round().clamp(-(2**15), 2**15 - 1)
    with new_file(path) as file:
        wavfile.write(file, rate, levels.numpy().astype(np.int16))
    return beyond


def _format(path: Path, file: BinaryIO) -> tuple[int, int, int, int]:
    """Channels, samples a second, bits and format of the samples, from the `fmt ` chunk."""
    length = _skip_to(path, file, b"fmt ")
    body = file.read(length + length % 2)
    if length < 16 or len(body) < length:
        raise _unreadable(path, "its header is damaged")
    tag, channels, rate, _, width, bits = struct.unpack("<HHIIHH", body[:16])
    if tag == EXTENSIBLE and length >= 26:
        tag = struct.unpack("<H", body[24:26])[0]  # the format is the beginning of a GUID
    if (tag, bits) not in READABLE:
        kind = {INTEGERS: "integer", REALS: "float"}.get(tag, OTHERS.get(tag, f"format-{tag}"))
        raise _unreadable(
            path, f"it holds {bits}-bit {kind} samples; integers of 8 to 32 bits and 32-bit floats can be"
        )
    if not channels or not rate or width != channels * bits // 8:
        raise _unreadable(path, f"its header contradicts itself ({channels} channels of {bits} bits in {width} bytes)")
    return channels, rate, bits, tag


def _skip_to(path: Path, file: BinaryIO, name: bytes) -> int:
    """Pass over chunks to the contents of one; its length in bytes."""
    while len(head := file.read(8)) == 8:
        found, length = struct.unpack("<4sI", head)
        if found == name:
            return length
        file.seek(length + length % 2, os.SEEK_CUR)
    raise ConfigError(f"{path} is damaged: it ends before its '{name.decode().strip()}' chunk. Copy it again.")


def _amplitudes(raw: np.ndarray, bits: int, real: bool) -> np.ndarray:
    """Bytes as float32."""
    if real:
        return raw.view("<f4").astype(np.float32)
    if bits == 8:  # the only unsigned ones
        return (raw.astype(np.float32) - 128) / 128
    if bits == 24:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = raw.reshape(-1, 3)
        raw, bits = wide.reshape(-1), 32
    return (raw.view(f"<i{bits // 8}") / np.float64(2 ** (bits - 1))).astype(np.float32)


def _unreadable(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read: {why}. Convert it, for example: ffmpeg -i {path.name} -c:a pcm_s16le converted.wav"
    )
