"""Sweeps: which runs a grid has and what they are called; that they are ordinary, isolated and restartable."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from genmodels import commands
from genmodels.config import load
from genmodels.registry import ConfigError
from genmodels.training import grid as grids
from genmodels.training import sweep as sweeps
from genmodels.training.grid import axes, grid, split_values
from genmodels.training.run import Run
from genmodels.training.sweep import Sweep, finished

ROOT = Path(__file__).parents[2]

# A model in a module of its own, so that a child can be stopped in the middle: it waits at step 5 while `hold` exists.
LAB = """
import time
from pathlib import Path
from genmodels.model import Model
from genmodels.registry import register
from tests import training_fakes

@register(Model, "t_slow")
class Slow(training_fakes.Regression):
    def __init__(self, noise: float = 0.0, dropout: float = 0.0, *, shape: tuple[int, ...]) -> None:
        super().__init__(noise, dropout, shape=shape)

    def loss(self, batch, *, generator=None):
        if self.training and int(self.count) == 5:
            while Path("hold").exists():
                time.sleep(0.01)
        return super().loss(batch, generator=generator)
"""


@pytest.fixture
def here(fakes, tmp_path, monkeypatch):
    """An empty folder with small.yaml, where commands are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    tree = fakes.tree(name="s", model={"noise": 0.3, "dropout": 0.25})
    Path("small.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def names(*words, overrides=()):
    return [plan.name for plan in grid(["small.yaml"], overrides, words)]


# ---- the grid ---


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", ["1", "2"]),
        ("1", ["1"]),
        (" 1 , 2 ", ["1", "2"]),
        ("[64,64],[128,128]", ["[64,64]", "[128,128]"]),
        ("[[1,2],[3]],{a: 1, b: [2,3]}", ["[[1,2],[3]]", "{a: 1, b: [2,3]}"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("[\"a]\",'b,'],2", ["[\"a]\",'b,']", "2"]),
        ("don't,can't", ["don't", "can't"]),
        ("${oc.env:X,1},2", ["${oc.env:X,1}", "2"]),
        ("null,-1", ["null", "-1"]),
    ],
)
def test_values_are_cut_at_commas_of_their_own(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed"], "'seed' is no key=value,value"),
        (["=1,2"], "'=1,2' is no key=value,value"),
        (["seed=1,,2"], "'1,,2' has an empty value"),
        (["seed="], "has an empty value"),
        (["a=[1,2"], "] is missing in '[1,2'"),
        (["a='x,y"], "' is missing in"),
        (["seed=1,2,1"], "seed=…: 1 is given twice"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["a[0].b=1", "a.0.b=2"], "a.0.b is given twice"),
        (["name=a,b"], "every run is named by its overrides"),
        (["root=a,b"], "--root FOLDER"),
    ],
)
def test_axes_that_are_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        axes(words)
    assert message in str(caught.value)


def test_the_grid_is_every_combination_and_names_say_which(here):
    plans = grid(["small.yaml"], ["train.steps=3"], ["seed=0,1", "model.noise=0.1,0.2"])
    assert [p.name for p in plans] == [
        "s-seed0-noise0.1",
        "s-seed0-noise0.2",
        "s-seed1-noise0.1",
        "s-seed1-noise0.2",
    ]
    tree = plans[2].config.tree
    assert (tree["seed"], tree["model"]["noise"], tree["train"]["steps"]) == (1, 0.1, 3)
    assert plans[2].overrides == ("seed=1", "model.noise=0.1")
    assert names("seed=1", "model.noise=0.1", overrides=["name=mine"]) == ["mine-seed1-noise0.1"]


def test_names_are_short_and_tell_keys_apart(here):
    assert names("train.optimizer.lr=1e-3,1e-2") == ["s-lr1e-3", "s-lr1e-2"]
    assert names("train.optimizer.name=adam,sgd") == ["s-optimizeradam", "s-optimizersgd"]
    assert names("model.name=t_regression,t_twice", overrides=["model=t_regression"]) == [
        "s-modelt_regression",
        "s-modelt_twice",
    ]
    assert names("train.ema[0].value=0.5,0.25") == ["s-value0.5", "s-value0.25"]
    assert grids._labels(["a.lr", "b.lr", "b.size", "c[0]", "seed"]) == {
        "a.lr": "a.lr",
        "b.lr": "b.lr",
        "b.size": "size",
        "c[0]": "c.0",
        "seed": "seed",
    }
    assert grids._labels(["a", "a.name"]) == {"a": "a", "a.name": "name"}
    assert grids._suffix("c.0", "32") == "-c.0_32"  # not the item 32 of c.03


def test_values_that_cannot_be_shown_end_in_a_digest():
    shown = [grids._suffix("k", value) for value in ("[64,64]", "[64, 64]", "a/b", "a b", "'x,y'", "[[1],[2]]", "ä")]
    assert shown[:2] == ["-k64_64", "-k64_64"]
    assert len({text for text in shown[2:]}) == 5
    for text in [*shown, grids._suffix("k", "x" * 300), grids._suffix("k", "../../etc")]:
        assert grids.PLAIN.fullmatch(text) and len(text) <= 30 and ".." not in text
    assert grids._suffix("k", "x" * 300) != grids._suffix("k", "x" * 299 + "y")


def test_names_differ_on_every_file_system_and_do_not_depend_on_the_rest_of_the_grid():
    points = [("a=A",), ("a=a",), ("a=b",)]
    found = grids._names(["s"] * 3, ["-aA", "-aa", "-ab"], points)
    assert len({name.lower() for name in found}) == 3 and found[2] == "s-ab"
    long = grids._names(["s"] * 2, ["-" + "x" * 300, "-" + "x" * 301], [("a=1",), ("a=2",)])
    assert len(set(long)) == 2 and all(len(name) == grids.LONGEST_NAME for name in long)
    few = [plan.name for plan in grid([str(ROOT / "configs/toy2d/nsf.yaml")], [], ["seed=1"])]
    more = [plan.name for plan in grid([str(ROOT / "configs/toy2d/nsf.yaml")], [], ["seed=0,1,2"])]
    assert few == more[1:2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.stepz=1,2"], "'stepz' not in 'Train'. Did you mean: 'steps'?"),
        (["train.steps=1,many"], "train.steps: int is needed, found 'many'. (in the run with train.steps=many)"),
        (["model.noise=1,1.0"], "'model.noise=1' and 'model.noise=1.0' are the same configuration"),
        (["seed=1,2"], "seed is given as an override and in --sweep"),
    ],
)
def test_mistakes_are_told_before_anything_starts(here, capsys, words, message):
    status = commands.train(["small.yaml", "seed=0", "--sweep", *words])
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("error: ") and message in err
    assert sorted(p.name for p in here.iterdir()) == ["small.yaml"]


def test_options_that_do_not_go_together(here, capsys):
    for words, message in (
        (["--jobs", "2"], "--jobs: is for --sweep"),
        (["--sweep", "seed=1,2", "--jobs", "0"], "--jobs: at least 1 process is needed, found 0"),
        (["--sweep", "seed=1,2", "--cite"], "--cite is for one configuration"),
    ):
        assert commands.train(["small.yaml", *words]) == 2 and message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_not_under_a_launcher(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without a launcher"):
        Sweep(grid(["small.yaml"], [], ["seed=1,2"]), ["small.yaml"], Path("runs"))


def test_a_dry_run_lists_and_writes_nothing(here, fakes, capsys):
    assert commands.train(["small.yaml", "name=s-seed1", "seed=1"]) == 0
    assert commands.train(["small.yaml", "name=s-seed2", "seed=2", "train.steps=10"]) == 0
    (Path("runs") / "s-seed2" / "meta.json").write_text("{}")  # not known to have finished
    before = fakes.contents(here)
    capsys.readouterr()
    assert commands.train(["--sweep", "seed=1,2,3", "small.yaml", "--dry-run"]) == 0  # a file among the axes
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["runs/s-seed1", "seed=1", "finished"],
        ["runs/s-seed2", "seed=2", "continues at step 10"],
        ["runs/s-seed3", "seed=3", "new"],
        ["3", "runs;", "nothing is written now"],
    ]
    assert commands.train(["small.yaml", "--sweep", "seed=1", "--fresh", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("new")
    assert fakes.contents(here) == before


def test_a_run_of_another_configuration_stops_the_sweep(here, fakes, capsys):
    assert commands.train(["small.yaml", "name=s-seed2", "seed=7"]) == 0
    before = fakes.contents(here)
    assert commands.train(["small.yaml", "--sweep", "seed=1,2"]) == 2
    assert "seed: 7 -> 2" in capsys.readouterr().err and fakes.contents(here) == before


# ---- processes ---


def test_threads_and_devices_are_shared(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("RANK", "0")
    found = [sweeps._environment(slot, 4) for slot in range(4)]
    assert [e["OMP_NUM_THREADS"] for e in found] == ["1"] * 4 and sweeps._threads(2) == 3
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["0", "1", "2", "0"] and "RANK" not in found[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a")
    assert [sweeps._environment(s, 4)["CUDA_VISIBLE_DEVICES"] for s in range(3)] == ["5", "GPU-a", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweeps._environment(0, 4)["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "CUDA_VISIBLE_DEVICES" not in sweeps._environment(0, 4)


def test_the_error_that_is_told():
    assert sweeps._error(["a", "error: x", "(ValueError; …)"], 2) == "error: x"
    assert sweeps._error(["Traceback", "KeyError: 3", ""], 1) == "KeyError: 3"
    assert sweeps._error([], 3) == "ended with status 3"
    assert sweeps._error(["x"], -signal.SIGKILL) == "killed by SIGKILL (was the memory used up?)"


def test_finished_means_to_the_last_step_with_its_checkpoint(here):
    commands.train(["small.yaml"])
    run = Run.open("runs/s")
    assert finished(run, 10) and not finished(run, 20) and not finished(None, 10)
    meta = run.meta
    (run.path / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "finished"}))
    assert not finished(run, 10)
    (run.path / "meta.json").write_text(json.dumps(meta))
    run.record(steps=5)  # of an earlier, shorter training
    assert not finished(run, 10)
    run.record(steps=10)
    assert finished(run, 10)
    (run.checkpoints / "00000010").rename(run.checkpoints / "lost")
    assert not finished(run, 10)


STUB = """
import sys, time
name, = (word.removeprefix("name=") for word in sys.argv if word.startswith("name="))
open(f"{name}.began", "w").close()
time.sleep(0.3)
open(f"{name}.ended", "w").close()
if "seed1" in name:
    print("error: the second is bad\\nand so on")
    sys.exit(2)
"""


def test_so_many_at_a_time_and_a_failure_is_the_status_of_all(here, monkeypatch, capsys):
    command = Sweep._command
    monkeypatch.setattr(Sweep, "_command", lambda self, plan: [sys.executable, "-c", STUB, *command(self, plan)])
    plans, lines = grid(["small.yaml"], [], ["seed=0,1,2,3,4"]), []
    assert Sweep(plans, ["small.yaml", "train.clip=2"], Path("runs"), jobs=2, say=lines.append).run() == 1
    (failed,) = (line for line in lines if line.startswith("[2/5] failed "))
    assert "runs/s-seed1  error: the second is bad  (" in failed and sum("failed" in line for line in lines) == 2
    assert sum("not finished" in line for line in lines) == 5 and not Path("runs").exists()  # 4 and the summary
    assert lines[-1].startswith("4 not finished, 1 failed. ") or lines[-1].startswith("1 failed, 4 not finished. ")
    began, ended = ({k: Path(f"s-seed{k}.{what}").stat().st_mtime for k in range(5)} for what in ("began", "ended"))
    together = [sum(began[k] <= began[j] < ended[k] for k in range(5)) for j in range(5)]
    assert max(together) == 2
    assert len(capsys.readouterr().out.splitlines()) == 6


TRAP = """
import signal, sys, time
name, = (word.removeprefix("name=") for word in sys.argv if word.startswith("name="))
def save(*of):
    open(f"{name}.saved", "w").close()
    sys.exit(0) if "seed0" in name else None
signal.signal(signal.SIGTERM, save)
open(f"{name}.ready", "w").close()
time.sleep(60)
"""


def test_processes_may_save_when_asked_to_stop_and_are_killed_when_asked_twice(here, monkeypatch, capsys):
    command = Sweep._command
    monkeypatch.setattr(Sweep, "_command", lambda self, plan: [sys.executable, "-c", TRAP, *command(self, plan)])
    plans, lines = grid(["small.yaml"], [], ["seed=0,1,2"]), []
    sweep = Sweep(plans, ["small.yaml"], Path("runs"), jobs=2, fresh=True, say=lines.append)

    def disturb():
        await_(lambda: Path("s-seed0.ready").exists() and Path("s-seed1.ready").exists())
        os.kill(os.getpid(), signal.SIGINT)
        await_(lambda: Path("s-seed1.saved").exists() and any("interrupted" in line for line in lines))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=disturb)
    thread.start()
    before, began = signal.getsignal(signal.SIGINT), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    thread.join()
    assert time.monotonic() - began < 40  # the second would go on for a minute
    assert Path("s-seed0.saved").exists() and not Path("s-seed2.ready").exists()
    assert [sweep.status[f"s-seed{k}"] for k in (0, 1)] == ["interrupted", "interrupted"]
    assert lines[-1].startswith("2 interrupted, 1 not started. The same command without --fresh skips ")
    assert capsys.readouterr().out.splitlines()[-1].split()[-3:-1] == ["not", "started"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_is_trained_by_a_command_that_can_be_repeated(here):
    (plan,) = grid(["small.yaml"], ["train.clip=2"], ["model.noise=0.5"])
    words = Sweep([plan], ["small.yaml", "train.clip=2"], Path("deep/runs"), fresh=True)._command(plan)
    given = words[words.index("train") + 1 :]
    assert given[-3:] == ["--root", "deep/runs", "--fresh"] and load(given[:1], given[1:-3]).tree == plan.config.tree


def await_(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_killed_child_and_a_stopped_sweep_are_told_and_the_same_command_starts_them_again(here, monkeypatch, capsys):
    """Children that do nothing: that trained ones end as if neither had happened is the slow test below."""
    command, code = Sweep._command, [TRAP]
    monkeypatch.setattr(Sweep, "_command", lambda self, plan: [sys.executable, "-c", *code, *command(self, plan)])
    plans, lines, pids = grid(["small.yaml"], [], ["seed=0,1"]), [], []
    sweep = Sweep(plans, ["small.yaml"], Path("runs"), jobs=2, say=lines.append)

    def disturb():
        await_(lambda: Path("s-seed0.ready").exists() and Path("s-seed1.ready").exists())
        pids.extend(child.process.pid for child in sweep.running)
        os.kill(pids[1], signal.SIGKILL)
        await_(lambda: any("failed" in line for line in lines))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=disturb)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    thread.join()
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert Path("s-seed0.saved").exists() and not Path("s-seed1.saved").exists()
    assert any("s-seed1  killed by SIGKILL" in line for line in lines)
    assert "stopping 1 runs; once more to kill them" in lines
    assert lines[-1] == "1 interrupted, 1 failed. The same command skips what is finished and goes on."
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]] == ["s-seed0", "s-seed1"]
    lines.clear()
    code[:] = ["import sys; print('error: again'); sys.exit(2)"]
    assert Sweep(plans, ["small.yaml"], Path("runs"), jobs=2, say=lines.append).run() == 1
    assert lines[0].startswith("2 runs in runs: 2 to train; ")
    assert {lines[1], lines[2]} == {"[1/2] started  runs/s-seed0", "[2/2] started  runs/s-seed1"}


@pytest.mark.slow
def test_a_sweep_whose_child_was_killed_and_that_was_stopped_ends_as_if_not(here, fakes, capsys, monkeypatch):
    """SIGTERM ends the children; killed or stopped, the same sweep again ends bit-identical to runs without it."""
    Path("slow_lab.py").write_text(LAB)
    tree = yaml.safe_load(Path("small.yaml").read_text())
    tree |= {"imports": ["tests.training_fakes", "slow_lab"], "model": {**tree["model"], "name": "t_slow"}}
    Path("slow.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.syspath_prepend(str(here))
    plans, lines, pids = grid(["slow.yaml"], [], ["seed=0,1"]), [], []

    def sweep():
        return Sweep(plans, ["slow.yaml"], Path("runs"), jobs=2, say=lines.append)

    first = sweep()

    def disturb():
        try:
            await_(lambda: all(Path(f"runs/s-seed{k}/checkpoints/00000004").is_dir() for k in (0, 1)))
            pids.extend(child.process.pid for child in first.running)
            os.kill(pids[0], signal.SIGKILL)
            await_(lambda: any("failed" in line for line in lines))
            os.kill(os.getpid(), signal.SIGTERM)
            await_(lambda: "stopping 1 runs; once more to kill them" in lines)
        finally:
            Path("hold").unlink()

    Path("hold").touch()
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            first.run()
    finally:
        thread.join()
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert any("killed by SIGKILL" in line for line in lines)
    assert lines[-1] == "1 failed, 1 interrupted. The same command skips what is finished and goes on."
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]] == ["s-seed0", "s-seed1"]

    lines.clear()
    assert sweep().run() == 0
    assert lines[0] == f"2 runs in runs: 2 to train; 2 at a time, {sweeps._threads(2)} thread each"
    assert {lines[1], lines[2]} == {"[1/2] started  runs/s-seed0", "[2/2] started  runs/s-seed1"}
    heads, *rows = capsys.readouterr().out.splitlines()
    assert heads.split() == ["run", "steps", "train", "loss", "val", "loss", "status", "seconds"]
    for seed, row in enumerate(rows):
        swept = Run.open(f"runs/s-seed{seed}")
        assert "continuing at step" in (swept.path / "log.txt").read_text()
        assert commands.train(["slow.yaml", f"seed={seed}", f"name=s-seed{seed}", "--root", "alone"]) == 0
        alone = Run.open(f"alone/s-seed{seed}")
        assert fakes.digests(swept) == fakes.digests(alone) and fakes.said(swept) == fakes.said(alone)
        assert swept.config.hash == alone.config.hash
        train, val = (next(x[k] for x in alone.metrics()[::-1] if k in x) for k in ("train/loss", "val/loss"))
        assert row.split()[:5] == [f"s-seed{seed}", "10", f"{train:.4f}", f"{val:.4f}", "done"]
    lines.clear()
    assert sweep().run() == 0 and lines == [
        f"2 runs in runs: 0 to train, 2 finished before; 2 at a time, {sweeps._threads(2)} thread each"
    ]


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_finished_ones_are_skipped(here, fakes, capsys):
    assert commands.train(["small.yaml", "name=s-batch_size8"]) == 0
    before = fakes.contents(here / "runs")
    words = ["small.yaml", "--sweep", "train.batch_size=1000,8,4", "--jobs", "2"]  # the first fails
    capsys.readouterr()
    assert commands.train(words) == 1
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert " failed " in rows["s-batch_size1000"] and " finished before " in rows["s-batch_size8"]
    assert " done " in rows["s-batch_size4"] and " 10 " in rows["s-batch_size4"]
    assert "a batch of 1000 items was asked of a training split of 48" in err and "1 failed" in err
    assert {k: v for k, v in fakes.contents(here / "runs").items() if k in before} == before
    assert Run.open("runs/s-batch_size4").load().shape == (2,)  # an ordinary run


def test_what_a_process_says_last_is_kept_in_the_log_of_its_run(tmp_path):
    sweeps._keep(["error: x"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "config.yaml").touch()
    (tmp_path / "log.txt").write_text("step 1\n")
    sweeps._keep(["step 1", "warning: odd", "error: x"], tmp_path)
    assert (tmp_path / "log.txt").read_text() == "step 1\nwarning: odd\nerror: x\n"


def test_a_value_out_of_range_names_its_run(here):
    with pytest.raises(
        ConfigError, match=r"lr must be above 0, found -1\.0\. \(in the run with train\.optimizer\.lr=-1\)"
    ):
        grid(["small.yaml"], [], ["train.optimizer.lr=1e-3,-1"])
