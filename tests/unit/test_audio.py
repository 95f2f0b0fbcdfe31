"""Folders of recordings and synthesised notes: which items they give, how they are split, and what is refused."""

import math
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch

from genmodels.data import speech, tones, wav
from genmodels.data.audio import WavFolder
from genmodels.data.dataset import SPLITS, Dataset, context
from genmodels.data.external import External, from_tensors
from genmodels.data.mel import LogMel
from genmodels.data.tones import Tones, notes
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import generator
from tests.data_files import riff, write_sounds

MEL = {"name": "log_mel", "bands": 8, "window": 128, "hop": 32}


@pytest.fixture
def folder(tmp_path):
    return write_sounds(tmp_path / "sounds")


def read(path, **arguments) -> WavFolder:
    node = {"name": "wav_folder", "path": str(path), "segment": 500, "rate": 8000, "val": 3, "test": 3, **arguments}
    return build(Dataset, resolve(Dataset, node, "data"))


def everything(data, split):
    return data.take(split, torch.arange(data.size(split)))


def recordings(folder):
    return {p.name: wav.inspect(p).read() for p in sorted(folder.rglob("*.wav"))}


# ---- segments ----


@pytest.mark.parametrize("stride", [None, 125, 700])
def test_items_are_segments_at_every_stride(folder, stride):
    data = read(folder, segment=460, stride=stride)  # 000.wav is five segments long
    whole = recordings(folder)
    place = {}
    for name, x in whole.items():
        for start in range(0, len(x) - 459):
            place[x[start : start + 460].tobytes()] = (name, start)
    step = {"train": stride or 460, "val": 460, "test": 460}
    seen = {}
    for split in SPLITS:
        found = [place[x.numpy().tobytes()] for x in everything(data, split).x]
        names = {name for name, _ in found}
        expected = [(n, s) for n in names for s in range(0, len(whole[n]) - 459, step[split])]
        assert sorted(found) == sorted(expected) and found != sorted(found)  # all, once, in a random order
        seen[split] = names
    assert [len(seen[split]) for split in SPLITS] == [14, 3, 3] and set.union(*seen.values()) == set(whole)
    assert data.shape == (460,) and data.sample_rate == 8000 and data.bin_width is None and data.levels is None


def test_no_recording_is_in_two_splits_and_more_files_move_none(folder):
    def owners(data):
        return {s.path.name: split for split in SPLITS for s in data._held(split)[0].sounds}

    before = owners(read(folder, val=0.2, test=0.2))
    assert len(before) == 20 and set(before.values()) == set(SPLITS)
    shutil.copy(folder / "003.wav", folder / "more.wav")
    after = owners(read(folder, val=0.2, test=0.2))
    assert {name: after[name] for name in before} == before


def test_the_first_files_are_held_out_by_name(folder):
    data = read(folder, order="name", test=2, val=1)
    names = {s: [w.path.name for w in data._held(s)[0].sounds] for s in SPLITS}
    assert names["test"] == ["001.wav", "002.wav"] and names["val"] == ["000.wav"]  # deep/000.wav comes last
    assert len(names["train"]) == 17
    assert read(folder, order="name", val=0, test=0.1).size("val") == 0


def test_conditions_are_the_features_of_the_segment(folder):
    data = read(folder, condition=MEL)
    batch = everything(data, "val")
    assert data.condition_shape == (8, 16) and read(folder).condition_shape is None
    expected = LogMel(8, 128, 32, rate=8000)(batch.x)
    torch.testing.assert_close(batch.condition, expected, rtol=0, atol=1e-5)
    assert everything(read(folder), "val").condition is None


def test_conditions_of_a_file_are_those_of_its_segments_in_order(folder):
    data = read(folder, condition=MEL)
    x = torch.from_numpy(recordings(folder)["007.wav"])
    found = data.conditions_of(folder / "007.wav")
    assert found.shape == (4, 8, 16)  # 2307 samples
    torch.testing.assert_close(found[3], data.features(x[None, 1500:2000])[0], rtol=0, atol=1e-5)
    (folder / "short").write_bytes(riff(b"\0" * 998))
    with pytest.raises(ConfigError, match=r"short has 499 samples, but one segment is 500 \(0\.06 s\)"):
        data.conditions_of(folder / "short")
    (folder / "text").write_bytes(b"no")
    with pytest.raises(ConfigError, match="text cannot be read: it is no WAV file"):
        data.conditions_of(folder / "text")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        data.conditions_of(folder / "none.wav")
    with pytest.raises(ConfigError, match="makes no conditions from files"):
        read(folder).conditions_of(folder / "007.wav")


def test_workers_get_the_same(folder):
    data = read(folder, condition=MEL)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(everything(copy, "test").condition, everything(data, "test").condition)


def test_the_fingerprint_follows_contents_and_options(folder, tmp_path):
    first = read(folder)
    found = {first.fingerprint()}
    changed = [{"stride": 250}, {"order": "name"}, {"val": 4}, {"test": 4}, {"segment": 400}, {"condition": MEL}]
    for options in [*changed, {"condition": MEL | {"bands": 9}}]:
        found.add(read(folder, **options).fingerprint())
    assert len(found) == 8
    assert read(shutil.copytree(folder, tmp_path / "copy")).fingerprint() == first.fingerprint()
    content = bytearray((folder / "004.wav").read_bytes())
    content[-1] ^= 1
    (folder / "004.wav").write_bytes(content)
    assert read(folder).fingerprint() not in found


# ---- what is refused ----


def test_a_wrong_rate_names_file_rates_and_the_way_out(folder):
    for name in ("005.wav", "006.wav"):
        (folder / name).write_bytes(riff(b"\0" * 5000, rate=16_000))
    with pytest.raises(ConfigError) as error:
        read(folder)
    text = str(error.value)
    assert "005.wav has 16,000 samples a second, but 8,000 are needed" in text and "data.rate=16000" in text
    assert "ffmpeg -i 005.wav -ar 8000" in text and "sox 005.wav -r 8000" in text
    assert "1 more of 20 files cannot be used: 006.wav." in text


def test_short_files_are_refused_or_skipped(folder):
    (folder / "short.wav").write_bytes(riff(b"\0" * 998))
    with pytest.raises(ConfigError, match=r"short\.wav has 499 samples, fewer than a segment of 500.*data\.short=skip"):
        read(folder)
    skipped = read(folder, short="skip")
    (folder / "short.wav").unlink()
    assert skipped.fingerprint() == read(folder).fingerprint()
    with pytest.raises(ConfigError, match="all 20 files are shorter than a segment of 9,000"):
        read(folder, segment=9000, short="skip")


def test_damaged_files_are_named(folder):
    content = (folder / "004.wav").read_bytes()
    (folder / "004.wav").write_bytes(content[:-300])
    with pytest.raises(ConfigError, match=r"004\.wav is damaged: of 4,608 bytes of samples 4,308 are there"):
        read(folder)
    (folder / "004.wav").write_bytes(b"ID3" + content)
    with pytest.raises(ConfigError, match=r"004\.wav cannot be read: it is no WAV file"):
        read(folder)
    (folder / "004.wav").write_bytes(riff(struct.pack("<f", math.nan) * 600, 32, tag=3))
    with pytest.raises(ConfigError, match=r"004\.wav, sample 0, holds NaN"):
        for split in SPLITS:
            everything(read(folder), split)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": " "}, "must be named"),
        ({"path": "{folder}/none"}, "there is no folder"),
        ({"path": "{folder}/005.wav"}, "is a file. A folder of WAV files is needed"),
        ({"path": "{folder}/other"}, r"holds no WAV files.*found 1 \.flac"),
        ({"stride": 0}, "data.stride: must be at least 1"),
        ({"segment": 0}, "at least 1, found rate=8000 and segment=0"),
        ({"val": 1.0}, "data.val: a number of files"),
        ({"val": 10, "test": 10}, "holds 20 WAV files, and with data.val=10 and data.test=10 none is left"),
        ({"condition": "log_mel"}, "500 samples are too few for a window of 1024"),
        ({"condition": MEL | {"high": 5000.0}}, r"high <= 4000 Hz"),
    ],
)
def test_what_cannot_be_is_refused(folder, options, message):
    (folder / "other").mkdir()
    (folder / "other" / "a.flac").touch()
    options = {k: v.format(folder=folder) if k == "path" else v for k, v in options.items()}
    with pytest.raises(ConfigError, match=message):
        read(**{"path": folder} | options)


# ---- tones ----


def test_notes_have_their_harmonics_and_their_noise():
    """The least-squares fit of sines at multiples of one frequency leaves vibrato, decay and noise; between the
    harmonics there is noise alone."""
    x = notes(200, 4096, 8000, generator("t")).double()
    assert x.abs().max() < 1 and x.dtype == torch.float64 and 0.1 < x.std() < 0.3
    power = torch.fft.rfft(x * torch.hann_window(4096, dtype=x.dtype)).abs().square() / (4096 * 3 / 8)
    floor = power[:, 2:].median(1).values / math.log(2)  # |X|² of noise is exponential
    assert abs(floor.mean().sqrt() / 0.003 - 1) < 0.1
    peak = power.argmax(1) * 8000 / 4096
    assert peak.min() > 105 and peak.max() < 6 * 890


def test_higher_harmonics_are_multiples_that_decay_faster():
    """What is left of a note after its harmonics h·phase·exp(-h decay t), fitted by least squares, is the noise."""
    x = notes(5, 2048, 8000, generator("h")).double()
    u = torch.rand(5, 7 + 2 * tones.HARMONICS, 1, generator=generator("h"), dtype=torch.float64)
    t = torch.arange(2048, dtype=torch.float64) / 8000
    rate = 2 * math.pi * (4 + 3 * u[:, 1])
    wobble = tones.VIBRATO * u[:, 2] / rate * (rate * t + 2 * math.pi * u[:, 3]).sin()
    phase = 2 * math.pi * tones.LOWEST * (tones.HIGHEST / tones.LOWEST) ** u[:, 0] * (t + wobble)
    h = torch.arange(1, tones.HARMONICS + 1, dtype=torch.float64)[:, None]
    waves = (-4 * u[:, 5:6] * h * t).exp() * torch.stack(((h * phase[:, None]).sin(), (h * phase[:, None]).cos()))
    basis = waves.movedim(0, 1).flatten(1, 2).mT
    rest = x - (basis @ torch.linalg.lstsq(basis, x[..., None]).solution)[..., 0]
    assert (rest.std(1) / tones.NOISE - 1).abs().max() < 0.06  # 2048 samples: 1.6 % each


def test_pitches_fill_their_range():
    pitch = torch.fft.rfft(notes(400, 8000, 8000, generator("p")) * torch.hann_window(8000)).abs()
    lowest = (pitch > 0.05 * pitch.amax(1, keepdim=True)).double().argmax(1)  # the first harmonic, in hertz
    octave = (lowest.double() / 110).log2()
    assert octave.min() > -0.1 and octave.max() < 3.1
    # uniform on [0, 3]: mean 1.5, standard deviation 0.866; 4 standard errors of 400
    assert abs(octave.mean() - 1.5) < 4 * 0.866 / 20 and abs(octave.std() - 0.866) < 0.08


def test_no_harmonic_is_folded_back():
    """Notes above a quarter of the rate have one harmonic: all power lies around one frequency."""
    power = torch.fft.rfft(notes(300, 4000, 2000, generator("f")) * torch.hann_window(4000)).abs().square()
    f = torch.arange(power.shape[1]) * 2000 / 4000
    first = f[(power > 0.01 * power.amax(1, keepdim=True)).double().argmax(1)]
    high = first > 520
    apart = (f - f[power.argmax(1)][:, None]).abs() > 60  # vibrato reaches 9 Hz, its side bands a few times 7 Hz more
    assert high.sum() > 30 and ((power * apart).sum(1) / power.sum(1))[high].mean() < 0.02  # the noise of quiet notes


def test_tones_are_what_was_asked_for():
    data = Tones(size=30, segment=256, condition=None)
    assert [data.size(s) for s in SPLITS] == [30, 3, 3] and data.shape == (256,) and data.sample_rate == 8000
    assert torch.equal(data.all("train").x, Tones(size=30, segment=256).all("train").x)
    other = Tones(size=30, segment=256, seed=1)
    assert not torch.equal(other.all("train").x, data.all("train").x)
    prints = {
        d.fingerprint() for d in (data, other, Tones(size=30, segment=256, rate=16_000), Tones(size=31, segment=256))
    }
    assert len(prints) == 4
    node = {"name": "tones", "size": 10, "segment": 256, "condition": MEL}
    mel = build(Dataset, resolve(Dataset, node, "data"))
    assert mel.condition_shape == (8, 9) and mel.all("test").condition.shape == (1, 8, 9)
    assert mel.facts()["condition_shape"] == [8, 9] and mel.facts()["sample_rate"] == 8000
    for wrong in ({"size": 0}, {"rate": 1999}):
        with pytest.raises(ConfigError, match="size >= 1 and rate >= 2000"):
            Tones(**wrong)


# ---- the fact ----


def test_the_sample_rate_travels_with_facts_and_may_be_missing_from_old_ones():
    data = from_tensors(torch.zeros(20, 16), sample_rate=8000)
    facts = data.facts()
    assert facts["sample_rate"] == 8000 and context(facts)["sample_rate"] == 8000
    assert External.known_by(facts).sample_rate == 8000
    del facts["sample_rate"]
    assert context(facts)["sample_rate"] is None and External.known_by(facts).sample_rate is None
    assert from_tensors(torch.zeros(20, 16)).facts()["sample_rate"] is None
    for x, rate in ((torch.zeros(20, 16), 0), (torch.zeros(20, 1, 16), 8000)):
        with pytest.raises(ConfigError, match=f"sample_rate={rate} is for sound"):
            from_tensors(x, sample_rate=rate)


# ---- speech ----


def test_sentences_are_different_and_the_same_ones_always():
    assert len(set(speech.sentences(700))) == 700 and speech.sentences(20) == speech.sentences(700)[:20]
    for count in (0, 701):
        with pytest.raises(ConfigError, match=f"1 … 700 sentences are possible, found {count}"):
            speech.sentences(count)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_speech_becomes_a_data_set(tmp_path, capsys):
    assert speech.main([str(tmp_path / "a"), "--count", "4", "--voices", "en-gb, en-us"]) == 0
    assert "(4 files, 0." in capsys.readouterr().out
    data = WavFolder(str(tmp_path / "a"), val=1, test=1)
    x = everything(data, "train").x
    assert len(x) > 2 and 0.02 < x.std() < 0.5
    assert (x == 0).double().mean() < 0.05  # noise where the synthesiser is silent
    assert speech.main([str(tmp_path / "b"), "--count", "4", "--voices", "en-gb,en-us"]) == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names[:2] == ["0000-en-gb.wav", "0001-en-us.wav"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert speech.main([str(tmp_path / "c"), "--voices", "nobody"]) == 2
    assert "espeak-ng -v nobody failed" in capsys.readouterr().err


def test_a_missing_synthesiser_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speech, "PROGRAM", "no-such-program")
    assert speech.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "the speech synthesiser no-such-program is not installed" in err and "data.name=wav_folder" in err


def test_segments_are_spread_over_recordings(folder):
    """Any first n items of a split are a random subset: not those of the first file."""
    data = read(folder)
    first = data._held("train")[0].files[:14].numpy()
    assert len(np.unique(first)) >= 6
