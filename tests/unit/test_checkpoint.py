"""Checkpoints are written whole or not at all, and nothing damaged is ever read."""

import json
import os
import shutil

import pytest
import torch
from torch import nn

from genmodels import files
from genmodels.registry import build
from genmodels.training import checkpoint
from genmodels.training.checkpoint import CheckpointError
from genmodels.training.optim import Optimizer


def write(root, step, keep=10, value=None):
    sets = {"model": {"w": torch.full((3, 2), float(step if value is None else value))}, "optimizer": {}}
    return checkpoint.save(root, sets, {"step": step, "samples": 8 * step, "seconds": 0.5}, {"config": "{}"}, keep)


def weight(folder):
    return checkpoint.read_tensors(folder / "model.safetensors")[0]["w"]


def test_tensors_come_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "tied.a": base,
        "tied.b": base,  # the same tensor
        "view": base[1:3],  # a part of it
        "columns": base.t(),  # the same memory in another order
        "expanded": torch.tensor(2.5).expand(3, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "narrow": base.bfloat16(),
        "special": torch.tensor([torch.inf, -torch.inf, -0.0]),
    }
    checkpoint.write_tensors(tmp_path / "x.safetensors", tensors, {"config": "{}"})
    found, header = checkpoint.read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and header["config"] == "{}"
    assert json.loads(header["aliases"]) == {"tied.b": "tied.a"}
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    assert str(found["special"][2].item()) == "-0.0"


def test_keeps_the_newest_and_points_to_it(tmp_path):
    for step in (0, 4, 8, 12):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000008", "00000012", "latest"]
    assert (tmp_path / "latest").read_text() == "00000012"
    folder, state, problems = checkpoint.newest(tmp_path)
    assert (folder.name, state["step"], state["samples"], problems) == ("00000012", 12, 96, [])
    suffixes = {p.suffix for p in folder.iterdir()}
    assert suffixes == {".safetensors", ".json"}  # no pickle


def damage_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def damage_flipped(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage_missing(folder):
    (folder / "optimizer.safetensors").unlink()


def damage_folder(folder):
    (folder / "optimizer.safetensors").unlink()
    (folder / "optimizer.safetensors").mkdir()


def damage_no_state(folder):
    (folder / "state.json").unlink()


def damage_half_state(folder):
    path = folder / "state.json"
    path.write_text(path.read_text()[:40])


def damage_zeros(folder):
    (folder / "state.json").write_bytes(b"\0" * 100)


def damage_empty_state(folder):
    (folder / "state.json").write_text('{"format": 1}')


def damage_list_state(folder):
    (folder / "state.json").write_text("[]")


def damage_other_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("00000004"), folder)


def damage_edited_state(folder):
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"seconds"', '"second"'))


def damage_files_of_state(folder):
    """In the first format, whose states have no digest."""
    state = json.loads((folder / "state.json").read_text()) | {"format": 1, "files": {"model.safetensors": 5}}
    (folder / "state.json").write_text(json.dumps(state))


def damage_format(folder):
    state = json.loads((folder / "state.json").read_text()) | {"format": [2]}
    (folder / "state.json").write_text(json.dumps(state))


DAMAGES = {
    damage_edited_state: r"state\.json was altered after it was written",
    damage_files_of_state: r"model\.safetensors cannot be compared with what was written",
    damage_format: r"state\.json has checkpoint format None",
    damage_truncated: r"model\.safetensors has \d+ bytes, \d+ were written",
    damage_flipped: r"model\.safetensors was altered after it was written",
    damage_missing: r"optimizer\.safetensors is missing",
    damage_folder: r"optimizer\.safetensors is missing",
    damage_no_state: r"state\.json cannot be read",
    damage_half_state: r"state\.json cannot be read",
    damage_zeros: r"state\.json cannot be read",
    damage_empty_state: r"state\.json is incomplete",
    damage_list_state: r"state\.json has checkpoint format None",
    damage_other_step: r"00000008.state\.json describes step 4",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_falls_back_to_the_predecessor_and_says_why(tmp_path, damage):
    write(tmp_path, 4)
    write(tmp_path, 8)
    damage(tmp_path / "00000008")
    folder, state, problems = checkpoint.newest(tmp_path)
    assert folder.name == "00000004" and state["step"] == 4
    assert len(problems) == 1
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        checkpoint.read_state(tmp_path / "00000008")
    write(tmp_path, 8)  # training comes by again and replaces it
    assert checkpoint.newest(tmp_path)[1]["step"] == 8 and checkpoint.newest(tmp_path)[2] == []


def test_all_damaged_names_each_and_the_ways_out(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    for step in (4, 8):
        damage_flipped(write(root, step))
    before = sorted(root.rglob("*"))
    with pytest.raises(CheckpointError, match=r"(?s)every checkpoint of .*run is damaged.*00000008.*00000004.*--fresh"):
        checkpoint.newest(root)
    assert sorted(root.rglob("*")) == before


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / ".writing-12").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "absent") is None


STAGES = ("tensors", "half a file", "manifest", "before rename", "before latest")


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_save_leaves_a_sound_checkpoint(tmp_path, stage):
    write(tmp_path, 4)
    child = os.fork()
    if child == 0:  # the process dies without running any handler, as under SIGKILL or a power cut
        die = lambda *_, **__: os._exit(9)  # noqa: E731
        if stage == "half a file":
            checkpoint.save_file = lambda kept, path, metadata: path.write_bytes(b"\x10\0\0") and os._exit(9)
        elif stage == "before rename":
            type(tmp_path).rename = die
        elif stage == "before latest":
            files.sync, original = (lambda path: die() if path == tmp_path else original(path)), files.sync
        else:
            setattr(checkpoint, {"tensors": "save_file", "manifest": "write_text"}[stage], die)
        try:
            write(tmp_path, 8)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    done = stage == "before latest"
    folder, state, problems = checkpoint.newest(tmp_path)
    assert state["step"] == (8 if done else 4) and problems == []
    assert torch.equal(weight(folder), torch.full((3, 2), float(state["step"])))
    assert bool(list(tmp_path.glob(".writing-*"))) != done
    write(tmp_path, 12)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(["00000004", "00000008"] if done else ["00000004"]),
        "00000012",
        "latest",
    ]


def test_a_save_that_fails_raises_and_leaves_nothing_behind(tmp_path, monkeypatch):
    write(tmp_path, 4)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 8)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000004", "latest"]


def test_write_text_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    files.write_text(path, "π")
    assert path.read_bytes() == "π".encode()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        files.write_text(path, "new")
    assert path.read_bytes() == "π".encode() and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "node", [{"name": "adam", "weight_decay": 0.1}, {"name": "sgd"}, {"name": "sgd", "momentum": 0.0}]
)
def test_an_optimiser_continues_bit_for_bit(tmp_path, node):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        return model, build(Optimizer, node).over(model.parameters())

    def step(model, optimizer, k):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        (model[0](x) if k == 0 else model(x)).square().sum().backward()  # the last layer has no state after step 0
        optimizer.step()

    with torch.random.fork_rng():
        straight, resumed = make(), make()
    for k in range(6):
        step(*straight, k)
        step(*resumed, k)
        if k in (0, 2):
            tensors = {"model": resumed[0].state_dict(), "o": checkpoint.optimizer_tensors(*resumed)}
            for name, value in tensors.items():
                checkpoint.write_tensors(tmp_path / name, value, {})
            with torch.random.fork_rng():
                resumed = make()
            resumed[0].load_state_dict(checkpoint.read_tensors(tmp_path / "model")[0])
            checkpoint.load_optimizer(*resumed, checkpoint.read_tensors(tmp_path / "o")[0])
    for a, b in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)
