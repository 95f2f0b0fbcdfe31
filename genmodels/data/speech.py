"""Spoken sentences from a speech synthesiser, as WAV files: `python -m evals.speech FOLDER`."""

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..commands import guarded
from ..registry import ConfigError
from ..rng import generator
from . import wav

PROGRAM = "espeak-ng"
VOICES = ("en-gb", "en-us", "en-gb-scotland", "en-gb+f2", "en-us+f4", "en-us+m3")
SPEEDS = (140, 160, 180)  # words a minute
PITCHES = (40, 50, 60)
NOISE = 5e-4  # standard deviation; a synthesiser's silence is exactly 0, where no density is finite

WHO = ("The old sailor", "A quiet student", "My youngest cousin", "The village baker", "Our neighbour")
WHO += ("The tall doctor", "A careful driver", "The new teacher", "Her grandmother", "The night guard")
DID = ("opened a wooden box", "counted the silver coins", "heard a distant bell", "carried three heavy books")
DID += ("painted the garden gate", "wrote a very long letter", "watched the river rise", "fixed a broken clock")
DID += ("found a path through the hills", "asked for warm bread and milk")
WHEN = ("before the sun came up", "while it was raining", "on the last day of winter", "without saying a word")
WHEN += ("as soon as the train had left", "and smiled at the children", "long after everyone slept")


def sentences(count: int) -> list[str]:
    """So many different sentences, the same ones always; neighbours differ in every part.

    Raises:
        ConfigError: if more are asked for than there are.
    """
    every = [f"{who} {did} {when}." for who, did, when in itertools.product(WHO, DID, WHEN)]
    if not 1 <= count <= len(every):
        raise ConfigError(f"--count: 1 … {len(every)} sentences are possible, found {count}.")
    return [every[k * 289 % len(every)] for k in range(count)]  # 289 is coprime to 700: all come once


def synthesise(folder: Path, count: int, voices: Sequence[str] = VOICES) -> Iterator[Path]:
    """Speak sentences into `<folder>/<number>-<voice>.wav`: 16-bit mono at the synthesiser's rate, 22,050 Hz.

    Sentence k has voice k mod voices, with one of three speeds and of three pitches, and faint white noise on it.

    Raises:
        ConfigError: if the synthesiser is not installed, or knows no such voice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        for k, text in enumerate(sentences(count)):
            voice, speed = voices[k % len(voices)], SPEEDS[k // len(voices) % len(SPEEDS)]
            pitch = PITCHES[k // (len(voices) * len(SPEEDS)) % len(PITCHES)]
            spoken = Path(place) / "spoken.wav"
            _speak([PROGRAM, "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(spoken), text])
            sound = wav.inspect(spoken)
            x = torch.from_numpy(sound.read())
            x += NOISE * torch.randn(len(x), generator=generator("speech", k))
            path = folder / f"{k:04}-{voice}.wav"
            wav.write(path, x, sound.rate)
            yield path


def _speak(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"the speech synthesiser {PROGRAM} is not installed. Install the package of that name with your system's "
            "package manager, or use recordings of your own: data.name=wav_folder data.path=FOLDER."
        ) from None
    if done.returncode or not Path(command[command.index("-w") + 1]).is_file():
        said = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
        raise ConfigError(f"{' '.join(command[:3])} failed: {said}. `{PROGRAM} --voices` lists the voices.")


@guarded
def main(argv: Sequence[str]) -> None:
    """Make WAV files of spoken sentences, to train models of sound on."""
    parser = argparse.ArgumentParser("evals.speech", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where to write them")
    parser.add_argument("--count", type=int, default=150, help="how many sentences (default: 150)")
    parser.add_argument("--voices", default=",".join(VOICES), help=f"of {PROGRAM} (default: {','.join(VOICES)})")
    given = parser.parse_args(list(argv))
    paths = list(synthesise(given.folder, given.count, [voice.strip() for voice in given.voices.split(",")]))
    sounds = [wav.inspect(path) for path in paths]
    minutes = sum(sound.frames for sound in sounds) / sounds[0].rate / 60
    print(f"{given.folder}  ({len(paths)} files, {minutes:.1f} minutes at {sounds[0].rate:,} samples a second)")


if __name__ == "__main__":
    sys.exit(main())
