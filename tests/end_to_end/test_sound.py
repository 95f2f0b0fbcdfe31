"""A small model of sound from its configuration to files that people listen to."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from genmodels.commands import sample
from genmodels.config import Config
from genmodels.evaluation.evaluate import evaluate, result_path
from genmodels.evaluation.protocol import Protocol
from genmodels.evaluation.results import read
from genmodels.training.loop import train
from genmodels.training.run import Run

MEL = {"name": "log_mel", "bands": 8, "window": 128, "hop": 32}
TONES = {"name": "tones", "size": 64, "segment": 256, "condition": MEL}
TREE = {
    "name": "hum",
    "imports": ["tests.contracts.families"],
    "data": TONES,
    "model": {"name": "fake_audio_flow"},
    "train": {"steps": 4, "batch_size": 8, "eval_every": 2, "sample_every": 2, "tensorboard": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(Config(TREE), root=folder, quiet=True)
    return folder / "hum"


def heard(folder: Path) -> dict[int, np.ndarray]:
    return {int(p.stem): wavfile.read(p)[1] / 2**15 for p in folder.glob("*.wav")}


def same(found: np.ndarray, x: torch.Tensor) -> bool:
    """To the rounding of 16 bits, after clipping."""
    return bool(np.abs(found - x.double().clamp(-1, 1 - 2**-15).numpy()).max() <= 2**-16)


def test_training_writes_sounds_and_their_picture(folder):
    names = sorted(p.name for p in (folder / "samples").iterdir())
    assert names == ["00000002", "00000002.png", "00000004", "00000004.png"]
    run = Run.open(folder)
    data, found = run.dataset(), heard(folder / "samples" / "00000004")
    x = run.load().sample(range(8), condition=data.take("val", torch.arange(8) % data.size("val")).condition)
    assert sorted(found) == list(range(8)) and all(same(found[k], x[k]) for k in found)
    assert wavfile.read(folder / "samples" / "00000004" / "003.wav")[0] == 8000
    assert any((folder / "tensorboard").iterdir())


@pytest.mark.parametrize("chosen", [None, "test", "train:5", "clip"])
def test_samples_are_given_what_was_asked_for(folder, chosen, tmp_path, capsys):
    run = Run.open(folder)
    data = run.dataset()
    seeds = torch.tensor([3, 12])
    rows = {None: ("val", seeds % 6), "test": ("test", seeds % 6), "train:5": ("train", torch.tensor([5, 5]))}
    given = data.take(*rows[chosen]).condition if chosen in rows else None
    words = [] if chosen is None else ["--condition", chosen]
    if chosen == "clip":
        levels = (data.take("test", torch.arange(3)).x.reshape(-1) * 2**15).round()
        wavfile.write(tmp_path / "clip.wav", 8000, levels.numpy().astype(np.int16))
        given, words = data.conditions_of(tmp_path / "clip.wav")[[0, 0]], ["--condition", str(tmp_path / "clip.wav")]
    assert sample([str(folder), "--seeds", "3,12", *words]) == 0
    path = Path(capsys.readouterr().out.split()[0])
    found, x = heard(path.with_suffix("")), run.load().sample(seeds, condition=given)
    assert sorted(found) == [3, 12] and same(found[3], x[0]) and same(found[12], x[1])
    with Image.open(path) as image:
        assert json.loads(image.text["seeds"]) == [3, 12] and image.text.get("given") == (words or [None, None])[1]


def test_different_conditions_do_not_overwrite_each_other(folder, capsys):
    paths = set()
    for words in ([], ["--condition", "test"], ["--condition", "test:1"], ["--condition", "train"]):
        assert sample([str(folder), "--seeds", "0", *words]) == 0
        paths.add(capsys.readouterr().out.split()[0])
    assert len(paths) == 4


def test_clipping_is_said_where_the_samples_are_named(folder, capsys):
    assert sample([str(folder), "--seeds", "0-2", "sample.temperature=9.0"]) == 0
    assert "amplitudes in 3 of 3 files were beyond [-1, 1] and are clipped)" in capsys.readouterr().out


def test_results_carry_a_picture_of_sounds(folder):
    run = Run.open(folder)
    tree = {"name": "hum", "version": 1, "dataset": TONES, "metrics": ["nll", "sliced_wasserstein"]}
    protocol = Protocol(tree | {"sample": {"num_items": 12, "labels": "test-items"}})
    result = evaluate(run, protocol, device="cpu")
    _, beside = read(result_path(run.path, result))
    assert beside.grid is not None and beside.grid.startswith(b"\x89PNG") and len(beside.grid) < 200_000
    assert {row["name"] for row in result["metrics"]} >= {"nll", "nats_per_dim"}


def test_checkpoints_from_before_the_fact_load(folder, monkeypatch):
    facts = Run.facts
    monkeypatch.setattr(Run, "facts", lambda run: {k: v for k, v in facts(run).items() if k != "sample_rate"})
    assert "sample_rate" not in Run.open(folder).facts()
    assert Run.open(folder).load().shape == (256,)
