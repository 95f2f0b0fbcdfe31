"""Interrupted = uninterrupted bit for bit, whatever was killed or damaged."""

import os
import random

import numpy as np
import pytest
import torch

from genmodels.training import checkpoint
from genmodels.training.checkpoint import CheckpointError
from genmodels.training.loop import train
from genmodels.training.run import Run

# ---- interrupted = uninterrupted ---


@pytest.mark.parametrize("at", [1, 3, 5, 6, 10])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.slow_for("adam-[16]", "sgd-[356]")
def test_interrupted_is_uninterrupted_bit_for_bit(fakes, tmp_path, at, optimizer):
    config = fakes.config(**fakes.RICH).replace({"train": {"optimizer": {"name": optimizer, "lr": 0.01}}})
    straight = train(config, root=tmp_path / "a", quiet=True)
    fakes.stop_at(at)
    with pytest.raises(fakes.Stop):
        train(config, root=tmp_path / "b", quiet=True)
    fakes.Regression.fault = None
    run = Run.open(tmp_path / "b" / "r")
    saved = run.step
    assert saved == (at - 1) // 4 * 4  # whatever stops it leaves a run that loads
    assert run.load().shape == (2,)
    resumed = train(config, root=tmp_path / "b", quiet=True)
    assert fakes.digests(resumed) == fakes.digests(straight)  # weights, averages and optimiser
    assert [c["step"] for c in resumed.meta.get("continued", [])] == ([saved] if saved else [])
    assert set(fakes.digests(straight)) == {f"{x}.safetensors" for x in ("model", "ema-0.9", "best", "optimizer")}
    assert fakes.said(resumed) == fakes.said(straight)


def test_a_finished_run_is_left_alone(fakes, tmp_path):
    config = fakes.config(train={"sample_every": 5})
    run = train(config, root=tmp_path, quiet=True)
    before = fakes.digests(run), fakes.said(run)
    again = train(config, root=tmp_path, quiet=True)
    assert (fakes.digests(again), fakes.said(again)) == before and again.step == 10
    assert sorted(p.name for p in (run.path / "samples").iterdir()) == ["00000005.png", "00000010.png"]
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["00000008", "00000010", "latest"]


def test_the_last_step_is_saved_whatever_the_cadence(fakes, tmp_path):
    run = train(fakes.config(train={"save_every": 0, "log_every": 0, "eval_every": 0}), root=tmp_path, quiet=True)
    assert run.step == 10 and run.metrics() == []


def test_nobodys_random_state_changes(fakes, tmp_path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    threads, environment = torch.get_num_threads(), dict(os.environ)
    train(fakes.config(**fakes.RICH), root=tmp_path, quiet=True)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()) == before
    assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32
    assert dict(os.environ) == environment


def test_the_callers_random_state_does_not_matter(fakes, tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        train(fakes.config(**fakes.RICH), root=tmp_path / str(seed), quiet=True)
    one, two = (Run.open(tmp_path / str(seed) / "r") for seed in (1, 2))
    assert fakes.digests(one) == fakes.digests(two)
    assert fakes.digests(train(fakes.config(seed=1, **fakes.RICH), root=tmp_path / "3", quiet=True)) != fakes.digests(
        one
    )


# ---- damaged checkpoints ---


@pytest.mark.parametrize("name", ["model.safetensors", "ema-0.9.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_costs_steps_but_no_bit(fakes, tmp_path, capsys, name):
    straight = train(fakes.config(**fakes.RICH), root=tmp_path / "a", quiet=True)
    fakes.stop_at(10)
    with pytest.raises(fakes.Stop):
        train(fakes.config(**fakes.RICH), root=tmp_path / "b", quiet=True)
    fakes.Regression.fault = None
    broken = tmp_path / "b" / "r" / "checkpoints" / "00000008" / name
    broken.write_bytes(broken.read_bytes()[:-3])
    capsys.readouterr()
    resumed = train(fakes.config(**fakes.RICH), root=tmp_path / "b")
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if str(broken) in line]
    assert len(lines) == 1 and lines[0].startswith("warning: ") and "step 4 is used instead" in lines[0]
    assert "continuing at step 4" in text and "UserWarning" not in text and "warnings.warn" not in text
    assert lines[0] in (resumed.path / "log.txt").read_text()
    assert fakes.digests(resumed) == fakes.digests(straight) and fakes.said(resumed) == fakes.said(straight)


def test_when_all_are_damaged_nothing_is_overwritten(fakes, tmp_path):
    run = train(fakes.config(), root=tmp_path, quiet=True)
    for folder in run.checkpoints.glob("0*"):
        (folder / "model.safetensors").unlink()
    before = fakes.contents(run.checkpoints)
    with pytest.raises(CheckpointError, match=r"(?s)every checkpoint of .*00000010.*00000008.*--fresh"):
        train(fakes.config(), root=tmp_path, quiet=True)
    assert fakes.contents(run.checkpoints) == before
    assert train(fakes.config(), root=tmp_path, quiet=True, fresh=True).step == 10
    assert fakes.contents(tmp_path / "r.old-1" / "checkpoints") == before


def test_a_run_killed_before_checkpoint_0_starts_again(fakes, tmp_path, monkeypatch):
    straight = train(fakes.config(), root=tmp_path / "a", quiet=True)

    def die(*_, **__):
        raise fakes.Stop

    monkeypatch.setattr(checkpoint, "save_file", die)
    with pytest.raises(fakes.Stop):
        train(fakes.config(), root=tmp_path / "b", quiet=True)
    monkeypatch.undo()
    assert not Run.open(tmp_path / "b" / "r").has_checkpoint()
    assert fakes.digests(train(fakes.config(), root=tmp_path / "b", quiet=True)) == fakes.digests(straight)


def test_a_killed_save_is_made_up_for(fakes, tmp_path):
    straight = train(fakes.config(**fakes.RICH), root=tmp_path / "a", quiet=True)
    child = os.fork()
    if child == 0:
        original = checkpoint.write_text

        def write_text(path, text):
            if path.name == "state.json" and '"step": 8' in text:
                os._exit(9)  # the tensors of step 8 are written, their manifest is not
            original(path, text)

        checkpoint.write_text = write_text
        try:
            train(fakes.config(**fakes.RICH), root=tmp_path / "b", quiet=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    run = Run.open(tmp_path / "b" / "r")
    assert run.step == 4 and list(run.checkpoints.glob(".writing-*"))
    resumed = train(fakes.config(**fakes.RICH), root=tmp_path / "b", quiet=True)
    assert fakes.digests(resumed) == fakes.digests(straight) and fakes.said(resumed) == fakes.said(straight)
    assert not list(run.checkpoints.glob(".writing-*"))
