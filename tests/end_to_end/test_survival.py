"""What a run survives: full disks, folders that may not be written, two trainings at once, kill -9 at any moment."""

import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from genmodels.config import Config
from genmodels.evaluation.results import read
from genmodels.registry import ConfigError
from genmodels.training import checkpoint
from genmodels.training.disk import DiskFull
from genmodels.training.loop import train
from genmodels.training.run import Run

# ---- disks ---


@pytest.mark.parametrize("what", ["tensors", "state", "log"])
def test_a_full_disk_leaves_the_last_checkpoint(fakes, tmp_path, monkeypatch, what):
    """Writes of more than some bytes fail as on a full disk, in the middle of a file."""
    straight = train(fakes.config(**fakes.RICH), root=tmp_path / "a", quiet=True)
    train(fakes.config(name="other", train={"steps": 1}), root=tmp_path / "b", quiet=True)
    full = OSError(28, "No space left on device", "somewhere")

    def fail(*_, **__):
        raise full

    original = {"tensors": checkpoint.save_file, "state": checkpoint.write_text, "log": Run.log}

    def until(step):
        def patched(*args, **kwargs):
            late = any(f'"step": {step}' in str(a) or (isinstance(a, int) and a >= step) for a in args)
            return fail() if late else original[what](*args, **kwargs)

        return patched

    if what == "tensors":
        calls = iter(range(100))
        monkeypatch.setattr(
            checkpoint, "save_file", lambda *a, **k: fail() if next(calls) >= 9 else original["tensors"](*a, **k)
        )
    elif what == "state":
        monkeypatch.setattr(checkpoint, "write_text", until(8))
    else:
        monkeypatch.setattr(Run, "log", until(6))
    with pytest.raises(DiskFull) as caught:
        train(fakes.config(**fakes.RICH), root=tmp_path / "b", quiet=True)
    text = str(caught.value)
    assert "No space left on device (writing somewhere" in text and "Step 4 is saved in" in text
    assert "train.keep" in text and "other (" in text and "The same command goes on from there." in text
    run = Run.open(tmp_path / "b" / "r")
    assert run.step == 4 and not list(run.checkpoints.glob(".writing-*"))
    monkeypatch.undo()
    assert fakes.digests(train(fakes.config(**fakes.RICH), root=tmp_path / "b", quiet=True)) == fakes.digests(straight)


def test_a_file_that_may_not_grow_is_a_full_disk(fakes, tmp_path):
    """The kernel's own refusal, in a process whose files may not exceed some bytes."""
    run = train(fakes.config(train={"steps": 4}), root=tmp_path, quiet=True)
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
            try:
                train(fakes.config(), root=tmp_path, quiet=True)
            except DiskFull as error:
                os._exit(7 if "File too large" in str(error) and "Step 4 is saved" in str(error) else 8)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert Run.open(run.path).step == 4
    assert train(fakes.config(), root=tmp_path, quiet=True).step == 10


@pytest.mark.parametrize("of_root", [False, True])
def test_a_folder_that_may_not_be_written_is_told(fakes, of_root):
    """As another user, for whom permissions hold."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        if not of_root:
            train(fakes.config(), root=root, quiet=True)
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        child = os.fork()
        if child == 0:
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                try:
                    train(fakes.config(train={"steps": 12}), root=root, quiet=True)
                except ConfigError as error:
                    told = "cannot be made: Permission denied" if of_root else "r is read-only: Permission denied"
                    os._exit(7 if told in str(error) and "--root" in str(error) else 8)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)


def test_a_run_that_is_being_trained_is_not_set_aside(fakes, tmp_path):
    run = train(fakes.config(), root=tmp_path, quiet=True)
    with run.locked(), pytest.raises(ConfigError, match="is being trained by another process"):
        train(fakes.config(seed=1), root=tmp_path, quiet=True, fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


# ---- kill -9 ---


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(fakes, tmp_path):
    """20 kills of the command itself: while it starts, trains, validates, snapshots and saves (every step)."""
    root = Path(__file__).resolve().parents[2]
    words = [str(root / "configs/toy2d/nsf.yaml"), "name=k", "train.steps=150", "train.batch_size=64"]
    words += ["train.save_every=1", "train.eval_every=7", "train.sample_every=0", "train.log_every=0"]
    words += ["train.ema=[{name: power, std: 0.05}, {name: power, std: 0.1}]", "train.snapshot_every=10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder):
        command = [sys.executable, str(root / "train.py"), *words, "--root", str(tmp_path / folder)]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    process = start("straight")
    assert process.wait(300) == 0, process.stderr.read()
    moments, rng, in_save = [], random.Random(0), 0
    checkpoints = tmp_path / "killed" / "k" / "checkpoints"
    while len(moments) < 20:
        before = max(checkpoint.steps_in(checkpoints), default=-1)
        process, began = start("killed"), time.monotonic()
        if len(moments) % 4:  # wait until it trains, then strike within a few steps
            while process.poll() is None and max(checkpoint.steps_in(checkpoints), default=-1) <= max(before, 0):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.15))
        else:  # anywhere from the first instruction on
            time.sleep(rng.uniform(0, 5))
        process.kill()
        assert process.wait(60) == -9, f"ended by itself after {len(moments)} kills"
        in_save += bool(list(checkpoints.glob(".writing-*")))
        moments.append(round(time.monotonic() - began, 3))
    process = start("killed")
    assert process.wait(300) == 0, process.stderr.read()
    straight, killed = (Run.open(tmp_path / folder / "k") for folder in ("straight", "killed"))
    assert in_save >= 1, f"no kill met a save: {moments}"
    assert killed.step == 150 and fakes.digests(killed) == fakes.digests(straight)
    assert killed.state["best"] == straight.state["best"] and math.isfinite(straight.state["best"]["loss"])
    names = {str(p.relative_to(straight.path)) for p in straight.path.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(killed.path)) for p in killed.path.rglob("*") if p.is_file()}
    for run in (straight, killed):
        steps = [line["step"] for line in run.metrics() if "val/loss" in line]
        assert steps == [*range(7, 150, 7), 150]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in killed.metrics()] == [
        {k: v for k, v in line.items() if k != "seconds"} for line in straight.metrics()
    ]


# ---- evaluations ---


@pytest.mark.slow
def test_killed_at_random_moments_an_evaluation_leaves_a_whole_result(tmp_path):
    """The one before, or the new one; never a part of one, nor the files of two for one."""
    tree = {"name": "r", "data": "eight_gaussians", "model": {"name": "flow", "layers": ["lu_linear"]}}
    run = train(Config({**tree, "train": {"steps": 1, "batch_size": 8}}), root=tmp_path, quiet=True)
    sample = {"num_items": 500, "blocks": 2, "batch_size": 100}
    protocol = {
        "name": "p",
        "version": 1,
        "dataset": "eight_gaussians",
        "sample": sample,
        "metrics": ["frechet", "nll"],
    }
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(protocol))
    command = [sys.executable, "-m", "evals.evaluate", str(run.path), "--protocol", str(file)]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds, path = time.monotonic() - began, run.path / "eval" / "p" / "00000001-model.json"
    found, (items, grid) = read(path)
    assert len(items["nll"].ids) == run.dataset().size("test") and grid
    moments = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.3, 1.0) * seconds)  # importing takes a part of the time
        process.kill()
        process.wait()
        again, (values, picture) = read(path)
        assert [m["value"] for m in again["metrics"]] == [m["value"] for m in found["metrics"]]
        assert np.array_equal(values["nll"].values, items["nll"].values) and picture == grid
