"""A run goes on: more steps, other cadences, other weights to start from, data from Python; and it stops when asked."""

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genmodels.hashing import digest
from genmodels.registry import ConfigError
from genmodels.training import checkpoint
from genmodels.training.checkpoint import NewerFormat
from genmodels.training.console import Console
from genmodels.training.interruption import first_of, signals, time_limit
from genmodels.training.loop import Trainer, train
from genmodels.training.run import Run, RunConflict
from genmodels.training.state import TrainingState
from genmodels.training.step import Step
from genmodels.training.watch import Interval, Watch


def restate(folder: Path, changes: dict) -> None:
    """The state of a checkpoint as if it had been written with these changes."""
    state = json.loads((folder / "state.json").read_text()) | changes
    state["digest"] = digest({key: value for key, value in state.items() if key != "digest"})
    (folder / "state.json").write_text(json.dumps(state))


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


# ---- more steps, other cadences ---


def test_a_finished_run_goes_on_to_more_steps(fakes, tmp_path):
    """Under a rule that does not look at the number of steps, bit for bit the run that had them from the start."""
    longer = {"train": {"steps": 15}}
    straight = train(fakes.config(**fakes.RICH).replace({"train": {"learning_rate": "constant", **longer["train"]}}))
    short = fakes.config(**fakes.RICH).replace({"train": {"learning_rate": "constant"}})
    train(short, root=tmp_path, quiet=True)
    run = train(short.replace(longer), root=tmp_path, quiet=True)
    assert run.step == 15 and fakes.digests(run) == fakes.digests(straight)
    assert Run.open(run.path).config.train.steps == 15  # the folder says what it is now
    assert [c["steps"] for c in run.meta["continued"]] == [15] and run.meta["finished"] and run.meta["steps"] == 15
    before = fakes.contents(run.path)
    with pytest.raises(RunConflict, match=r"(?s)train\.steps: 15 -> 10.*at step 15 already"):
        train(short, root=tmp_path, quiet=True)
    assert fakes.contents(run.path) == before


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


def test_a_rule_that_looks_at_the_number_of_steps_is_told(fakes, tmp_path, capsys):
    train(fakes.config(train={"learning_rate": "one_cycle"}), root=tmp_path, quiet=True)
    train(fakes.config(train={"learning_rate": "one_cycle", "steps": 12}), root=tmp_path)
    text = capsys.readouterr().err
    assert lines(text, "train.steps: 10 -> 12")
    assert lines(text, "warning: the learning rate of 'one_cycle' depends on the number of steps")
    train(fakes.config(train={"learning_rate": "constant"}, name="c"), root=tmp_path, quiet=True)
    train(fakes.config(train={"learning_rate": "constant", "steps": 12}, name="c"), root=tmp_path)
    assert "depends on the number of steps" not in capsys.readouterr().err


def test_what_only_watches_may_change(fakes, tmp_path, capsys):
    straight = train(fakes.config(**fakes.RICH), root=tmp_path / "a", quiet=True)
    fakes.stop_at(6)
    with pytest.raises(fakes.Stop):
        train(fakes.config(**fakes.RICH), root=tmp_path / "b", quiet=True)
    fakes.Regression.fault = None
    other = fakes.config(**fakes.RICH).replace({"train": {"log_every": 3, "save_every": 2, "keep": 4}})
    assert other.hash == straight.config.hash
    run = train(other, root=tmp_path / "b")
    assert lines(capsys.readouterr().err, "train.save_every: 4 -> 2")
    assert fakes.digests(run) == fakes.digests(straight)
    assert checkpoint.steps_in(run.checkpoints) == [4, 6, 8, 10] and Run.open(run.path).config.train.keep == 4


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"train": {"optimizer": {"name": "sgd", "lr": 0.1}}}, r'train\.optimizer\.name: "adam" -> "sgd"'),
        ({"train": {"optimizer": {"name": "adam", "lr": 0.1}}}, r"train\.optimizer\.lr: 0\.001 -> 0\.1"),
        ({"train": {"precision": "bf16"}}, r'train\.precision: "float32" -> "bf16"'),
        ({"train": {"steps": 20, "batch_size": 4}}, r"train\.batch_size: 8 -> 4"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"init_from": "runs/other"}, r'init_from: null -> "runs/other"'),
    ],
)
def test_what_decides_the_numbers_may_not(fakes, tmp_path, change, line):
    train(fakes.config(), root=tmp_path, quiet=True)
    before = fakes.contents(tmp_path)
    with pytest.raises(RunConflict, match=rf"(?s){line}.*name=r-2.*--fresh"):
        train(fakes.config(**change), root=tmp_path, quiet=True)
    assert fakes.contents(tmp_path) == before


# ---- the best weights ---


def test_the_weights_of_the_lowest_validation_loss_stay(fakes, tmp_path):
    """A learning rate that blows up after the first steps: the best weights are those of the lowest line in the log."""
    sgd = {"name": "sgd", "lr": 0.3, "momentum": 0.9}
    config = fakes.config(
        train={"optimizer": sgd, "steps": 30, "eval_every": 1, "save_every": 1, "keep": 50, "ema": []}
    )
    run = train(config, root=tmp_path, quiet=True)
    losses = {line["step"]: line["val/loss"] for line in run.metrics() if "val/loss" in line}
    best = min(losses, key=losses.get)
    assert 1 < best < 30 and losses[30] > 2 * losses[best]
    then = checkpoint.read_tensors(checkpoint.folder_of(run.checkpoints, best) / "model.safetensors")[0]
    found = run.load("best").state_dict()
    assert all(torch.equal(found[name], value) for name, value in then.items())
    assert run.step_of("best") == best and run.step_of("model") == 30
    assert run.state["best"] == {"step": best, "loss": losses[best]}
    assert run.meta["best"] == {"step": best, "val/loss": losses[best]}


def test_the_best_weights_are_those_that_were_validated(fakes, tmp_path):
    """With an average, its weights; and a stop between two validations loses nothing."""
    config = fakes.config(**fakes.RICH).replace({"train": {"eval_every": 2, "save_every": 1, "keep": 20}})
    straight = train(config, root=tmp_path / "a", quiet=True)
    best = straight.step_of("best")
    then = checkpoint.read_tensors(checkpoint.folder_of(straight.checkpoints, best) / "ema-0.9.safetensors")[0]
    assert all(torch.equal(straight.load("best").state_dict()[name], value) for name, value in then.items())
    for at in (4, 5, 6):
        fakes.stop_at(at)
        with pytest.raises(fakes.Stop):
            train(config, root=tmp_path / str(at), quiet=True)
        fakes.Regression.fault = None
        assert fakes.digests(train(config, root=tmp_path / str(at), quiet=True)) == fakes.digests(straight)


# ---- formats ---


def as_format_1(folder: Path) -> None:
    """A checkpoint as the first version of this package wrote it."""
    state = json.loads((folder / "state.json").read_text())
    (folder / "best.safetensors").unlink(missing_ok=True)
    files = {name: facts for name, facts in state["files"].items() if name != "best.safetensors"}
    old = {"format": 1, **{key: state[key] for key in ("step", "samples", "seconds")}, "files": files}
    (folder / "state.json").write_text(json.dumps(old))


def test_a_run_of_the_first_format_goes_on(fakes, tmp_path):
    config = fakes.config(**fakes.RICH)
    straight = train(config, root=tmp_path / "a", quiet=True)
    fakes.stop_at(10)
    with pytest.raises(fakes.Stop):
        train(config, root=tmp_path / "b", quiet=True)
    fakes.Regression.fault = None
    old = tmp_path / "b" / "r"
    for step in (4, 8):
        as_format_1(checkpoint.folder_of(old / "checkpoints", step))
    assert Run.open(old).step == 8 and Run.open(old).weights_names() == ["ema-0.9", "model"]
    run = train(config, root=tmp_path / "b", quiet=True)
    new, expected = fakes.digests(run), fakes.digests(straight)
    assert {k: v for k, v in new.items() if k != "best.safetensors"} == {
        k: v for k, v in expected.items() if k != "best.safetensors"
    }
    assert run.state["format"] == checkpoint.FORMAT == 2 and run.state["best"]["step"] == 10


def test_a_run_of_a_newer_format_is_left_alone(fakes, tmp_path):
    run = train(fakes.config(), root=tmp_path, quiet=True)
    path = run.checkpoints / "00000010" / "state.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    before = fakes.contents(tmp_path)
    with pytest.raises(NewerFormat, match=r"format 3: a newer version of genmodels wrote it.*up to 2\. Upgrade"):
        train(fakes.config(), root=tmp_path, quiet=True)
    with pytest.raises(NewerFormat):
        Run.open(run.path).load()
    assert {k: v for k, v in fakes.contents(tmp_path).items() if not k.endswith("log.txt")} == {
        k: v for k, v in before.items() if not k.endswith("log.txt")
    }


# ---- other weights to start from ---


def test_a_run_starts_from_the_weights_of_another(fakes, tmp_path, capsys):
    source = train(fakes.config(name="source"), root=tmp_path, quiet=True)
    for weights, name in (("", "ema-0.9"), ("@model", "model"), ("@best", "best")):
        config = fakes.config(name=f"from{weights[1:]}", init_from=f"{source.path}{weights}", train={"steps": 1})
        run = train(config, root=tmp_path)
        first = checkpoint.read_tensors(run.checkpoints / "00000000" / "model.safetensors")[0]
        expected = source.load(name).state_dict()
        assert all(torch.equal(first[key], value) for key, value in expected.items())
        assert lines(capsys.readouterr().err, f"started from {source.path} ({name}): 5 tensors loaded")[0].endswith(
            "5 tensors loaded"
        )
        assert run.meta["init_from"]["config_hash"] == source.config.hash and run.meta["init_from"]["step"] == 10
    assert train(config, root=tmp_path).step == 1  # goes on without its source …
    source.path.rename(tmp_path / "gone")
    assert train(config.replace({"train": {"steps": 3}}), root=tmp_path, quiet=True).step == 3
    with pytest.raises(ConfigError, match=r"init_from: .*source is no run"):
        train(fakes.config(name="new", init_from=str(source.path)), root=tmp_path, quiet=True)
    assert not (tmp_path / "new").exists()


def test_what_does_not_fit_starts_afresh_and_is_listed(fakes, tmp_path, capsys):
    source = train(fakes.config(name="source", model="t_wide"), root=tmp_path, quiet=True)
    run = train(fakes.config(init_from=f"{source.path}@model", train={"steps": 1}), root=tmp_path)
    said = lines(capsys.readouterr().err, "started from")[0]
    assert (
        "3 tensors loaded; 1 of another shape, fresh here: goal [3] -> [2]; 1 only here, fresh: network.bias; " in said
    )
    assert said.endswith("1 only there, not used: extra")
    first = checkpoint.read_tensors(run.checkpoints / "00000000" / "model.safetensors")[0]
    fresh = train(fakes.config(name="fresh", train={"steps": 1}), root=tmp_path, quiet=True)
    unloaded = checkpoint.read_tensors(fresh.checkpoints / "00000000" / "model.safetensors")[0]
    assert torch.equal(first["network.weight"], source.load("model").state_dict()["network.weight"])
    assert torch.equal(first["network.bias"], unloaded["network.bias"])
    assert run.meta["init_from"]["unused"] == ["extra"] and run.meta["init_from"]["reshaped"] == ["goal [3] -> [2]"]


def test_nothing_that_fits_is_an_error(fakes, tmp_path):
    source = train(fakes.config(name="source", model="t_fitted"), root=tmp_path, quiet=True)
    (source.path / "config.yaml").rename(source.path / "config")
    with pytest.raises(ConfigError, match=r"init_from: .*source is no run"):
        train(fakes.config(init_from=str(source.path)), root=tmp_path, quiet=True)
    (source.path / "config").rename(source.path / "config.yaml")
    squares = {"data": "t_squares", "model": {"name": "t_classy"}, "init_from": str(source.path)}
    with pytest.raises(ConfigError, match=r"nothing of .*source \(ema-0\.9\) fits.*There: mean; here: level"):
        train(fakes.config(**squares), root=tmp_path, quiet=True)
    with pytest.raises(ConfigError, match=r"init_from: .* has no weights 'ema-1'"):
        train(fakes.config(init_from=f"{source.path}@ema-1"), root=tmp_path, quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# ---- data ---


def test_data_that_changed_are_refused(fakes, tmp_path):
    fakes.stop_at(6)
    with pytest.raises(fakes.Stop):
        train(fakes.config(), root=tmp_path, quiet=True)
    fakes.Regression.fault = None
    other = fakes.Line(items=56)
    before = fakes.contents(tmp_path)
    with pytest.raises(ConfigError, match=r"data have changed .*56 training items now, 48 then.*init_from=.*r\."):
        train(fakes.config(train={"keep": 5, "steps": 12}), root=tmp_path, quiet=True, dataset=other)
    assert fakes.contents(tmp_path) == before  # not even what is free to change
    assert train(fakes.config(), root=tmp_path, quiet=True, dataset=fakes.Line()).step == 10
    data = Run.open(tmp_path / "r").meta["data"]
    assert data == {
        "name": "t_line",
        "fingerprint": other.__class__().fingerprint(),
        "items": {"train": 48, "val": 16, "test": 16},
    }


def test_workers_load_the_same_data(fakes, tmp_path):
    """Two processes that load ahead change no bit; what goes wrong there is told as if it were here."""
    config = fakes.config(**fakes.RICH).replace({"train": {"accumulate": 2}})
    straight = train(config, root=tmp_path / "a", quiet=True)
    ahead = train(config.replace({"train": {"workers": 2}}), root=tmp_path / "b", quiet=True)
    assert fakes.digests(ahead) == fakes.digests(straight) and fakes.said(ahead) == fakes.said(straight)
    broken = fakes.Line()
    broken.take = fakes.fail_on_item(broken.take, 17)
    with pytest.raises(ConfigError, match=r"^item 17 is broken$"):
        train(config.replace({"name": "c", "train": {"workers": 2, "accumulate": 1}}), root=tmp_path, dataset=broken)


# ---- stopping ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns(fakes, tmp_path, capsys, number):
    config = fakes.config(**fakes.RICH)
    straight = train(config, root=tmp_path / "a", quiet=True)
    seen = iter(range(1, 100))
    fakes.Regression.fault = lambda batch: os.kill(os.getpid(), number) if next(seen) == 6 else None
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with signals() as stop:
        run = train(config, root=tmp_path / "b", stop=stop)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    fakes.Regression.fault = None
    name = signal.Signals(number).name
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped by {name} at step 6/10, which is saved. Go on with: python train.py {run.path}"
    assert run.step == 6 and run.meta["stopped"] == name and run.meta["finished"] is None
    run = train(config, root=tmp_path / "b", quiet=True)
    assert fakes.digests(run) == fakes.digests(straight)
    assert run.meta["stopped"] is None and run.meta["finished"]


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == "SIGINT"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    with signals() as stop:
        assert stop() is None


def test_a_time_limit_saves_and_returns(fakes, tmp_path, capsys):
    config = fakes.config(train={"max_hours": 1e-9})
    for step in range(1, 11):  # every call has time for one step
        run = train(config, root=tmp_path)
        assert run.step == step
        text = capsys.readouterr().err
        assert ("stopped by train.max_hours=1e-09 at step" in text) == (step < 10)
    straight = train(fakes.config(), root=tmp_path / "a", quiet=True)
    assert fakes.digests(run) == fakes.digests(straight) and "done: " in text


def test_the_limit_counts_from_the_beginning():
    now = iter([0.0, 3599.0, 3600.0])
    limit = time_limit(1.0, 0.0, clock=lambda: next(now))
    assert [limit(), limit(), limit()] == [None, None, "train.max_hours=1"]
    assert time_limit(None, 0.0)() is None
    assert first_of(lambda: None, lambda: "b", lambda: "c")() == "b" and first_of()() is None
    with pytest.raises(ConfigError, match=r"train\.max_hours: must be above 0"):
        from genmodels.config import Train

        Train(max_hours=0.0)


# ---- averages that were not tracked ---


def test_an_average_is_made_after_training(fakes, tmp_path):
    """From two tracked profiles and their snapshots, the one that a third run tracked all along."""
    power = [{"name": "power", "std": std} for std in (0.05, 0.1)]
    cadence = {"steps": 200, "snapshot_every": 10, "log_every": 0, "eval_every": 0, "save_every": 70}
    config = fakes.config(**fakes.RICH).replace({"train": {**cadence, "ema": power}})
    run = train(config, root=tmp_path / "a", quiet=True)
    direct = train(
        config.replace({"train": {"ema": [{"name": "power", "std": 0.07}]}}), root=tmp_path / "b", quiet=True
    )
    assert run.weights_names() == ["ema-0.05", "ema-0.1", "model"] and run.weights_name("ema-0.07") == "ema-0.07"
    assert checkpoint.steps_in(run.path / "snapshots") == list(range(10, 201, 10))
    expected, found, start = (
        direct.load().state_dict(),
        run.load("ema-0.07").state_dict(),
        run.load("model").state_dict(),
    )
    for name in ("goal", "network.weight", "network.bias"):
        moved = (expected[name] - start[name]).norm()
        assert (found[name] - expected[name]).norm() < 0.02 * moved, name
    with pytest.raises(ConfigError, match=r"std 0\.01 .* is not made.*can be had"):
        run.load("ema-0.01")
    with pytest.raises(ConfigError, match=r"no weights 'ema-0\.2'.*Track two profiles"):
        train(fakes.config(name="e"), root=tmp_path, quiet=True).load("ema-0.2")
    fakes.stop_at(155)  # after the checkpoint of step 140 and the snapshot of step 150
    with pytest.raises(fakes.Stop):
        train(config, root=tmp_path / "c", quiet=True)
    fakes.Regression.fault = None
    assert checkpoint.steps_in(tmp_path / "c" / "r" / "snapshots")[-1] == 150
    resumed = train(config, root=tmp_path / "c", quiet=True)
    again = resumed.load("ema-0.07").state_dict()
    assert fakes.digests(resumed) == fakes.digests(run) and all(torch.equal(again[n], v) for n, v in found.items())


# ---- TensorBoard ---


def test_tensorboard_shows_what_the_log_says(fakes, tmp_path, monkeypatch):
    """Every number of the log once, also after an interruption, and the grids."""
    import sys

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = fakes.config(**fakes.RICH).replace({"train": {"tensorboard": True, "sample_every": 5, "log_every": 1}})
    fakes.stop_at(8)  # after the checkpoint of step 4: the steps 5 to 7 come again
    with pytest.raises(fakes.Stop):
        train(config, root=tmp_path, quiet=True)
    fakes.Regression.fault = None
    run = train(config, root=tmp_path, quiet=True)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    for key in ("train/loss", "train/first", "val/loss"):
        logged = {line["step"]: line[key] for line in run.metrics() if key in line}
        shown = events.Scalars(key)
        assert len(shown) == len(logged) and {e.step: e.value for e in shown} == pytest.approx(logged, rel=1e-6)
    assert [e.step for e in events.Images("samples")] == [5, 10]
    plain = train(config.replace({"train": {"tensorboard": False}}), root=tmp_path / "plain", quiet=True)
    assert fakes.digests(plain) == fakes.digests(run) and not (plain.path / "tensorboard").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"train\.tensorboard: .*pip install 'genmodels\[track\]'"):
        train(config.replace({"name": "without"}), root=tmp_path, quiet=True)
    assert not (tmp_path / "without").exists()


def test_another_number_of_processes_is_told(fakes, tmp_path, capsys):
    fakes.stop_at(6)
    with pytest.raises(fakes.Stop):
        train(fakes.config(), root=tmp_path, quiet=True)
    fakes.Regression.fault = None
    restate(tmp_path / "r" / "checkpoints" / "00000004", {"world_size": 2})
    run = train(fakes.config(), root=tmp_path)
    assert lines(capsys.readouterr().err, "1 process goes on where 2 stopped: the data stay the same, the noise of the")
    assert run.step == 10 and run.state["world_size"] == 1 and run.meta["continued"][-1]["world_size"] == 1


# ---- several processes, seen from one ---


class Ranked:
    """What a step and the watch ask of accelerate, on process `rank` of `world`; the others answer with `other`."""

    device, is_main_process = torch.device("cpu"), True

    def __init__(self, rank: int, world: int, other: float = 0.0) -> None:
        self.process_index, self.num_processes, self.other = rank, world, other

    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    def reduce(self, x: torch.Tensor, how: str) -> torch.Tensor:
        return x + self.other if how == "sum" else (x + self.other * (self.num_processes - 1)) / self.num_processes


def test_processes_draw_noise_and_dropout_of_their_own(fakes):
    """And each of them the same again."""
    config = fakes.config(model={"noise": 1.0, "dropout": 0.5})
    x = fakes.Line().all("train")[:8]

    def losses(rank: int, noise: float, dropout: float) -> torch.Tensor:
        changed = config.replace({"model": {"noise": noise, "dropout": dropout}})
        torch.manual_seed(0)
        step = Step(changed, changed.model(fakes.Line().facts()), Ranked(rank, 1))
        step.start({})
        return step(3, [x]).loss

    for noise, dropout in ((1.0, 0.0), (0.0, 0.5)):
        assert losses(0, noise, dropout) == losses(0, noise, dropout) != losses(1, noise, dropout)


def test_a_step_leaves_a_trace_in_the_versions_of_weights(fakes):
    """Caches of what follows from weights go by them, and torch's fused kernels do not count."""
    config = fakes.config()
    step = Step(config, config.model(fakes.Line().facts()), Ranked(0, 1))
    step.start({})
    before = [p._version for p in step.parameters]
    step(0, [fakes.Line().all("train")[:8]])
    assert all(p._version > v for p, v in zip(step.parameters, before, strict=True))


def test_a_stop_of_one_process_is_the_stop_of_all(fakes, monkeypatch):
    """A process without a reason of its own learns that of another one; without any, nobody stops."""
    trainer = object.__new__(Trainer)
    trainer.stop = lambda: None
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, "SIGTERM"])
    for other, expected in ((1, "SIGTERM"), (0, None)):
        accelerator = Ranked(0, 2, other)
        trainer.step = SimpleNamespace(world=2, model=fakes.Fitted(shape=(2,)), accelerator=accelerator)
        assert trainer._asked() == expected


def test_the_logged_loss_is_the_mean_over_processes(fakes, tmp_path, monkeypatch):
    run = Run.create(fakes.config(), tmp_path)
    model = run.config.model(fakes.Line().facts())
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: mine * 2)
    watch = Watch(Ranked(0, 2, other=5.0), run, fakes.Line(), model, {}, Console(None, quiet=True))
    interval = Interval()
    for loss in (1.0, 3.0):
        interval.add(torch.tensor(loss, dtype=torch.float64), {}, 8)
    watch.report(2, interval, 1.5)
    (line,) = run.metrics()
    assert line["train/loss"] == 3.5 and line["seconds"] == 1.5  # (1 + 5)/2 and (3 + 5)/2


# ---- what a resumed run remembers ---


def test_the_best_weights_survive_worse_ones_after_a_resume(fakes, tmp_path):
    config = fakes.config(train={"eval_every": 2, "save_every": 2})
    fakes.stop_at(7)
    with pytest.raises(fakes.Stop):
        train(config, root=tmp_path, quiet=True)
    fakes.Regression.fault = None
    run = Run.open(tmp_path / "r")
    restate(run.folder_of(6), {"best": {"step": 4, "loss": -1.0}})  # better than any to come
    kept = Run.open(run.path).load("best").state_dict()
    run = train(config, root=tmp_path, quiet=True)
    assert run.state["best"] == {"step": 4, "loss": -1.0} and run.step_of("best") == 4
    assert all(torch.equal(run.load("best").state_dict()[name], value) for name, value in kept.items())


def test_a_loss_that_is_not_finite_is_never_the_best(fakes, tmp_path):
    run = Run.create(fakes.config(), tmp_path)
    state = TrainingState(run, fakes.Line(), run.config.model(fakes.Line().facts()), None, main=True, world=1)
    assert [state.consider(loss) for loss in (math.nan, 2.0, math.nan, -math.inf, 3.0, 1.0)] == [0, 1, 0, 0, 0, 1]
    assert state.best.loss == 1.0


def test_seconds_go_on_counting(fakes, tmp_path):
    fakes.stop_at(9)
    with pytest.raises(fakes.Stop):
        train(fakes.config(), root=tmp_path, quiet=True)
    fakes.Regression.fault = None
    restate(tmp_path / "r" / "checkpoints" / "00000008", {"seconds": 5000.0})
    run = train(fakes.config(), root=tmp_path, quiet=True)
    assert 5000 < run.state["seconds"] < 5100 and 5000 < run.metrics()[-1]["seconds"] < 5100


def test_a_finished_run_that_is_started_again_is_left_as_it_is(fakes, tmp_path, capsys):
    run = train(fakes.config(), root=tmp_path, quiet=True)
    before = {k: v for k, v in fakes.contents(run.path).items() if k != "log.txt"}
    capsys.readouterr()
    train(fakes.config(), root=tmp_path)
    assert capsys.readouterr().err == f"{run.path} is finished at step 10; more train.steps would go on\n"
    assert {k: v for k, v in fakes.contents(run.path).items() if k != "log.txt"} == before


def test_fewer_checkpoints_are_kept_from_the_start(fakes, tmp_path):
    """Before the next is written, which may need their space; a damaged newer one does not stand for a sound one."""
    fakes.stop_at(10)
    with pytest.raises(fakes.Stop):
        train(fakes.config(train={"save_every": 2, "keep": 9}), root=tmp_path, quiet=True)
    root = tmp_path / "r" / "checkpoints"
    (root / "00000008" / "model.safetensors").write_bytes(b"")
    (root / "00000006" / "model.safetensors").write_bytes(b"")
    fakes.stop_at(1)
    with pytest.raises(fakes.Stop):
        train(fakes.config(train={"save_every": 5, "keep": 2}), root=tmp_path, quiet=True)
    fakes.Regression.fault = None
    assert checkpoint.steps_in(root) == [2, 4, 6, 8]
    fakes.stop_at(2)  # the step after that of the checkpoint at step 5
    with pytest.raises(fakes.Stop):
        train(fakes.config(train={"save_every": 5, "keep": 2}), root=tmp_path, quiet=True)
    fakes.Regression.fault = None
    assert checkpoint.steps_in(root) == [4, 5, 6, 8] and Run.open(tmp_path / "r").state["step"] == 5
