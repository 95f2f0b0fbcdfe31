"""Sound as a data set: segments of the WAV files in a folder, with what a model is told of each."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..hashing import digest, fingerprint_files
from ..registry import ConfigError, register
from ..rng import generator
from ..transforms import Transform
from ..types import Batch
from .dataset import SPLITS, Dataset, proposal
from .folders import assign, check_shares, check_train, cut, find
from .mel import AudioFeatures
from .memory import Held
from .wav import Wav, inspect

SUFFIXES = (".wav", ".wave")


class Audio(Held):
    """Items that are sound, one row of amplitudes in [-1, 1] each.

    16-bit amplitudes lie on levels 2^-15 apart, but are taken as continuous (`bin_width` is None): published
    log-likelihoods of waveforms are densities of the amplitudes per sample, without dequantisation. A density of such
    data has no least upper bound (digital silence is one point), so that numbers compare only between models of like
    smoothness.
    """

    features: AudioFeatures | None = None

    def describe(
        self,
        rate: int,
        segment: int,
        condition: Callable[..., AudioFeatures] | None,
        transform: Callable[..., Transform] | None,
    ) -> None:
        """Set what is known before any sample is.

        Raises:
            ConfigError: if the numbers are out of range, or a segment is too short for the features.
        """
        if rate < 1 or segment < 1:
            raise ConfigError(f"data: rate and segment must be at least 1, found rate={rate} and segment={segment}.")
        self.sample_rate, self.shape = rate, (segment,)
        self.transform = proposal(transform, {"name": "identity"})
        if condition is not None:
            self.features = condition(rate=rate)
            self.condition_shape = self.features.shape(segment)

    def batch(self, x: Tensor) -> Batch:
        """Amplitudes [B, segment] with their features."""
        return Batch(x, condition=None if self.features is None else self.features(x))

    def conditions_of(self, path: Path) -> Tensor:
        """[N, *condition_shape]: the features of the N segments that follow each other in a WAV file."""
        if self.features is None:
            return super().conditions_of(path)
        sound = _checked(path, self.sample_rate)
        (segment,), count = self.shape, sound.frames // self.shape[0]
        if not count:
            raise ConfigError(
                f"{path} has {sound.frames:,} samples, but one segment is {segment:,} ({segment / sound.rate:.2f} s). "
                "Choose a longer file."
            )
        return self.features(torch.from_numpy(sound.read(0, count * segment)).reshape(count, segment))


@dataclass(frozen=True)
class Segments:
    """The segments of some files: item i begins at sample `starts[i]` of file `files[i]`."""

    data: Audio
    sounds: Sequence[Wav]
    files: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: Tensor) -> Batch:
        (length,) = self.data.shape
        x = torch.empty(len(rows), length)
        for row, file, start in zip(x, self.files[rows].tolist(), self.starts[rows].tolist(), strict=True):
            row.copy_(torch.from_numpy(self.sounds[file].read(start, length)))
        return self.data.batch(x)


@register(Dataset, "wav_folder")
class WavFolder(Audio):
    """Segments of the WAV files in a folder and its sub-folders, as amplitudes [segment] in [-1, 1].

    Integers of 8, 16, 24 and 32 bits and 32-bit floats are read; channels are averaged. Nothing is resampled: every
    file must have the stated rate. Files are split whole, so that no recording is in two splits. Segment k of a file
    begins at sample k·stride (k·segment in the validation and test splits); what is left at its end is not used.
    Inside a split segments are in a fixed random order. Only headers are read at the start; samples are read when they
    are asked for. The proposed transform is the identity, as published.

    Args:
        path: the folder; ~ is the home folder.
        segment: samples of an item.
        rate: samples a second.
        condition: features of each item that are its condition, e.g. `log_mel`; null for none.
        stride: samples between the beginnings of training segments; null for segment, so that they do not overlap.
        val, test: how many files (an integer) or which fraction of them.
        order: what decides the split. "hash" of each file's path within the folder: with fractions, adding files moves
            no other. "name": the first files in the order of their names test, the last validate.
        short: what becomes of files shorter than a segment: "error" refuses, "skip" leaves them out.
        transform: instead of the proposed one.
    Raises:
        ConfigError: if the folder or its files cannot be used, naming the file and the way out.
    """

    local = ("path",)

    def __init__(
        self,
        path: str,
        segment: int = 16_000,
        rate: int = 22_050,
        condition: Callable[..., AudioFeatures] | None = None,
        stride: int | None = None,
        val: int | float = 0.05,
        test: int | float = 0.05,
        order: Literal["hash", "name"] = "hash",
        short: Literal["error", "skip"] = "error",
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        check_shares(val, test, "files")
        if not path.strip():
            raise ConfigError("data.path: the folder of WAV files must be named, found an empty text.")
        if stride is not None and stride < 1:
            raise ConfigError(f"data.stride: must be at least 1, or null for the length of a segment, found {stride}.")
        self.describe(rate, segment, condition, transform)
        self.folder = Path(os.path.expanduser(path))
        names = find(self.folder, SUFFIXES, "WAV files")
        sounds = _sounds([self.folder / name for name in names], rate, segment, short)
        names = [sound.path.relative_to(self.folder).as_posix() for sound in sounds]
        split = assign(names, val, test) if order == "hash" else cut(np.arange(len(names)) / len(names), val, test)
        check_train(self.folder, len(names), split["train"], val, test, "WAV file")
        for name in SPLITS:
            step = stride if name == "train" and stride is not None else segment
            files, starts = _cut([sounds[i].frames for i in split[name]], segment, step)
            mixed = torch.randperm(len(files), generator=generator("wav_folder", name))
            self.hold(name, Segments(self, [sounds[i] for i in split[name]], files[mixed], starts[mixed]))
        node = None if condition is None else condition.node
        options = [segment, rate, node, stride, val, test, order]
        self._digest = digest([fingerprint_files([sound.path for sound in sounds], self.folder), options])

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the files that are used, by `fingerprint_files`, and of what decides the items."""
        return self._digest


def _cut(frames: Sequence[int], segment: int, step: int) -> tuple[Tensor, Tensor]:
    """File and first sample, [N] int64 each, of the segments that begin at every step-th sample of each file."""
    starts = [torch.arange(0, n - segment + 1, step) for n in frames]
    counts = torch.tensor([len(each) for each in starts], dtype=torch.int64)
    return torch.arange(len(frames)).repeat_interleave(counts), torch.cat([torch.empty(0, dtype=torch.int64), *starts])


def _checked(path: Path, rate: int) -> Wav:
    """A file of the rate that is needed.

    Raises:
        ConfigError: if it cannot be read, or has another rate.
    """
    try:
        sound = inspect(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    if sound.rate != rate:
        raise ConfigError(
            f"{path} has {sound.rate:,} samples a second, but {rate:,} are needed. Convert it "
            f"(ffmpeg -i {path.name} -ar {rate} converted.wav, or sox {path.name} -r {rate} converted.wav), or set "
            f"data.rate={sound.rate} if all files have that rate."
        )
    return sound


def _sounds(paths: Sequence[Path], rate: int, segment: int, short: str) -> list[Wav]:
    """The files that can be used, after a look at all headers.

    Raises:
        ConfigError: naming files that cannot be read, have another rate, or are too short.
    """
    sounds, problems = [], []
    for path in paths:
        try:
            sound = _checked(path, rate)
        except ConfigError as error:
            problems.append((path, str(error)))
            continue
        if sound.frames >= segment:
            sounds.append(sound)
        elif short == "error":
            problems.append((path, _too_short(sound, segment)))
    if problems:
        (_, error), *more = problems
        names = ", ".join(path.name for path, _ in more[:3]) + (", …" if len(more) > 3 else "")
        rest = f" {len(more):,} more of {len(paths):,} files cannot be used: {names}." if more else ""
        raise ConfigError(f"{error}{rest}")
    if not sounds:
        raise ConfigError(f"data: all {len(paths)} files are shorter than a segment of {segment:,} samples. Lower it.")
    return sounds


def _too_short(sound: Wav, segment: int) -> str:
    return (
        f"{sound.path} has {sound.frames:,} samples, fewer than a segment of {segment:,}. Lower data.segment, leave "
        "such files out with data.short=skip, or remove them."
    )
