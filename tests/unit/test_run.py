"""A run on disk: what is made, what is refused, and what survives."""

import json
import warnings

import pytest
import torch

from genmodels.registry import ConfigError
from genmodels.training import checkpoint
from genmodels.training.checkpoint import CheckpointError
from genmodels.training.provenance import provenance
from genmodels.training.run import CheckpointWarning, Run, RunConflict


def fill(run, steps=(0, 4), keep_config=None):
    """Checkpoints in which the model's goal is the step, the average's the step + 0.5."""
    facts = run.config.dataset().facts()
    with torch.random.fork_rng():
        model = run.config.model(facts)
    for step in steps:
        sets = {}
        for name, shift in (("model", 0.0), ("ema-0.9", 0.5)):
            sets[name] = {k: v.clone() for k, v in model.state_dict().items()}
            sets[name]["goal"] = torch.full((2,), step + shift)
        sets["optimizer"] = {}
        run.save(sets, {"step": step, "samples": 8 * step, "seconds": 1.0}, facts)
    return run


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---- making and finding ---


def test_create_writes_a_configuration_that_opens_as_the_same_run(fakes, tmp_path):
    run = Run.create(fakes.config(), tmp_path)
    assert sorted(p.name for p in run.path.iterdir()) == ["config.yaml"] and run.name == "r"
    assert Run.open(run.path).config.hash == Run.open(run.path / "config.yaml").config.hash == run.config.hash
    assert Run.create(fakes.config(), tmp_path).path == run.path  # the same configuration: the same run
    assert Run.check(fakes.config(name="new"), tmp_path) is None


def test_another_configuration_stops_with_the_diff_and_touches_nothing(fakes, tmp_path):
    fill(Run.create(fakes.config(), tmp_path))
    (tmp_path / "r-2").mkdir()
    (tmp_path / "r.old-1").mkdir()
    before = fakes.contents(tmp_path)
    other = fakes.config(train={"batch_size": 4}, model={"noise": 0.5})
    for attempt in (Run.check, Run.create):
        with pytest.raises(RunConflict) as caught:
            attempt(other, tmp_path)
        text = str(caught.value)
        assert "model.noise: 0.0 -> 0.5" in text and "train.batch_size: 8 -> 4" in text
        assert "name=r-3" in text and "--fresh" in text and "r.old-2" in text  # both ways out, and they are free
    assert fakes.contents(tmp_path) == before


def test_fresh_sets_the_old_run_aside(fakes, tmp_path):
    old = fill(Run.create(fakes.config(), tmp_path))
    before = fakes.contents(old.path)
    for k in (1, 2):
        new = Run.create(fakes.config(seed=k), tmp_path, fresh=True)
        assert sorted(p.name for p in new.path.iterdir()) == ["config.yaml"] and new.config.seed == k
    assert {k: v for k, v in fakes.contents(tmp_path / "r.old-1").items() if k != ".lock"} == before
    assert Run.open(tmp_path / "r.old-2").config.seed == 1


def test_a_folder_of_something_else_is_refused(fakes, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").write_text("years of work")
    before = fakes.contents(tmp_path)
    with pytest.raises(ConfigError, match=r"no run .* but holds thesis\.tex.*name=.*--fresh"):
        Run.create(fakes.config(), tmp_path)
    (tmp_path / "f").write_text("")
    with pytest.raises(ConfigError, match="is a file where the run needs a folder"):
        Run.create(fakes.config(name="f"), tmp_path)
    (tmp_path / "f").unlink()
    assert fakes.contents(tmp_path) == before


def test_a_run_killed_while_it_was_made_is_made(fakes, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".config.yaml.0123abcd").write_text("half")
    assert Run.open(Run.create(fakes.config(), tmp_path).path).config.hash == fakes.config().hash


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "/tmp/x"])
def test_a_name_is_a_plain_folder_name(fakes, tmp_path, name):
    with pytest.raises(ConfigError, match="a plain folder name is needed"):
        Run.create(fakes.config(name=name), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_open_says_what_is_there_instead(fakes, tmp_path):
    Run.create(fakes.config(), tmp_path)
    Run.create(fakes.config(name="s"), tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.yaml\)\. Runs beside it: r, s\."):
        Run.open(tmp_path / "t")
    (tmp_path / "r" / "config.yaml").write_text("model: {name: [")
    with pytest.raises(ConfigError, match=r"r.config\.yaml: not readable as YAML"):
        Run.open(tmp_path / "r")
    (tmp_path / "s" / "config.yaml").write_text("data: t_line\nmodel: t_regressio\n")
    with pytest.raises(ConfigError, match=r"s.config\.yaml: model\.name: no Model .* Did you mean 't_regression'"):
        Run.open(tmp_path / "s")


# ---- checkpoints ---


def test_load_gives_the_average_unless_told_otherwise(fakes, tmp_path):
    run = fill(Run.create(fakes.config(train={"precision": "bf16"}), tmp_path))
    state = torch.random.get_rng_state()
    run = Run.open(run.path)
    assert run.load().goal.tolist() == [4.5, 4.5] and run.load("model").goal.tolist() == [4.0, 4.0]
    assert torch.equal(torch.random.get_rng_state(), state)
    model = run.load()
    assert not model.training and model.network.autocast == torch.bfloat16 and model.shape == (2,)
    assert (run.step, run.samples_seen, run.weights_names()) == (4, 32, ["ema-0.9", "model"])
    with pytest.raises(ConfigError, match=r"no weights 'ema-1'\. It has: ema-0\.9, model\."):
        run.load("ema-1")


def test_a_damaged_checkpoint_is_one_warning_and_the_older_one(fakes, tmp_path):
    run = fill(Run.create(fakes.config(), tmp_path))
    flip(run.checkpoints / "00000004" / "model.safetensors")
    run = Run.open(run.path)
    with pytest.warns(CheckpointWarning, match=r"00000004.*altered.*The checkpoint of step 0 is used") as caught:
        assert run.load("model").goal.tolist() == [0.0, 0.0] and run.step == 0
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sets, state = Run.open(run.path).restore()  # the trainer says it on the console instead
    assert state["step"] == 0 and set(sets) == {"model", "ema-0.9", "optimizer"}


def test_checksums_are_compared_once(fakes, tmp_path, monkeypatch):
    run = Run.open(fill(Run.create(fakes.config(), tmp_path)).path)
    calls, original = [], checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda path: calls.append(path.name) or original(path))
    run.load()
    run.load("model")
    assert run.step == 4 and sorted(calls) == ["ema-0.9.safetensors", "model.safetensors", "optimizer.safetensors"]
    fill(Run.open(run.path), steps=(8,))  # another process goes on training
    assert run.step == 8 and run.load("model").goal.tolist() == [8.0, 8.0]


def test_a_file_that_was_not_written_with_the_checkpoint_is_not_read(fakes, tmp_path):
    run = fill(Run.create(fakes.config(), tmp_path))
    (run.checkpoints / "00000004" / "stray.safetensors").write_bytes(b"garbage")
    assert set(run.restore()[0]) == {"model", "ema-0.9", "optimizer"}
    assert Run.open(run.path).weights_names() == ["ema-0.9", "model"]


def test_without_a_checkpoint_the_way_to_one_is_named(fakes, tmp_path):
    run = Run.create(fakes.config(), tmp_path)
    assert not run.has_checkpoint() and "Nothing is saved yet" in run.saved()
    with pytest.raises(CheckpointError, match=r"no checkpoint yet\. Train it: python train\.py .*r.config\.yaml"):
        run.load()
    assert "Step 4 is saved in" in fill(run).saved()


# ---- what is said ---


def test_metrics_survive_a_torn_line(fakes, tmp_path):
    run = Run.create(fakes.config(), tmp_path)
    for step in (2, 4, 6):
        run.log(step, **{"train/loss": 0.1 * step, "name": "x"})
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"step": 8, "train/lo', b"\0\0\0\0", b"\xff\xfe", b"[1]\n", b'{"loss": 1}\n'):
        path.write_bytes(whole + torn)
        assert [line["step"] for line in run.metrics()] == [2, 4, 6]
        run.rewind(6)
        assert path.read_bytes() == whole  # bit for bit, the tear gone
        run.log(8, a=1)
        assert [line["step"] for line in run.metrics()] == [2, 4, 6, 8]
    path.write_bytes(b'{"st')
    run.rewind(6)
    assert path.read_bytes() == b""


def test_rewind_cuts_what_came_after(fakes, tmp_path):
    run = Run.create(fakes.config(), tmp_path)
    run.rewind(3)
    assert not (run.path / "metrics.jsonl").exists()
    for step in (2, 4, 6):
        run.log(step)
    run.rewind(4)
    assert [line["step"] for line in run.metrics()] == [2, 4]


def test_numbers_that_are_not_finite_are_null(fakes, tmp_path):
    run = Run.create(fakes.config(), tmp_path)
    run.log(1, a=float("nan"), b=float("inf"), c=1.5)
    text = (run.path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": 1.5}


def test_meta_grows_and_survives_damage(fakes, tmp_path):
    run = Run.create(fakes.config(), tmp_path)
    assert run.meta == {}
    run.record(a=1, b=2)
    run.record(b=3)
    assert run.meta == {"a": 1, "b": 3}
    (run.path / "meta.json").write_text("{")
    run.record(c=1)
    assert run.meta == {"c": 1}


def test_provenance_names_versions_machine_and_command():
    facts = provenance()
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"]
    assert {"commit", "dirty", "diff", "hardware", "threads", "argv", "started"} <= facts.keys()
    json.dumps(facts)
