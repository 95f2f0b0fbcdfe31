"""The commands as a user meets them: what they answer, and what they leave alone."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genmodels import commands
from genmodels.commands import plots, sample, train
from genmodels.training.run import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(fakes, tmp_path, monkeypatch):
    """An empty folder with lab/small.yaml and lab/classy.yaml, where commands are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GENMODELS_DEBUG", raising=False)
    classy = {"data": "t_squares", "model": {"name": "t_classy"}, "sample": {"contrast": 0.5}}
    for name, tree in (("small", fakes.tree()), ("classy", fakes.tree() | classy)):
        tree.pop("name")
        Path("lab").mkdir(exist_ok=True)
        Path("lab", f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


@pytest.fixture
def answer(here, capsys):
    """Run a command; its status, what it printed, and what it said."""

    def run(command, *words):
        capsys.readouterr()
        status = command(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


# ---- train ---


def test_train_continues_and_names_itself_after_its_file(answer, here):
    status, out, err = answer(train, "lab/small.yaml")
    assert (status, out) == (0, "") and "runs/lab-small: new run" in err and "done: runs/lab-small at step 10" in err
    assert answer(train, "lab/small.yaml")[2].startswith("runs/lab-small is finished at step 10")


def test_files_options_and_overrides_in_any_order(answer, here):
    words = ("train.steps=2", "--root", "else", "lab/small.yaml", "model.noise=0.5", "--fresh", "name=mine")
    assert answer(train, *words)[0] == 0
    config = Run.open("else/mine").config
    assert (config.train.steps, config.tree["model"]["noise"]) == (2, 0.5)


def test_an_item_of_a_list_is_overridden_by_its_index(answer, here):
    assert answer(train, "lab/small.yaml", "train.steps=1", "train.ema[0].value=0.25")[0] == 0
    assert Run.open("runs/lab-small").weights_names() == ["best", "ema-0.25", "model"]
    status, _, err = answer(train, "lab/small.yaml", "train.ema[3].value=0.25")
    assert status == 2 and "train.ema[3]: there are only 1 items" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no configuration file was given. Try: python train.py configs/"),
        (("train.steps=3",), "no configuration file was given"),
        (("lab/smal.yaml",), "smal.yaml: there is no such file. Did you mean 'small.yaml'?"),
        (("lab/small.yaml", "train.steps"), "'train.steps' is neither a configuration file nor an override key=value"),
        (("lab/small.yaml", "train.stepz=3"), "train: Key 'stepz' not in 'Train'. Did you mean: 'steps'?"),
        (("lab/small.yaml", "train.steps=many"), "train.steps: int is needed, found 'many'"),
        (("lab/small.yaml", "model.name=t_regresion"), "Did you mean 't_regression'?"),
        (("lab/small.yaml", "sample.num_stepz=3"), "sample: Key 'num_stepz' not in 'Regression.sample'. Did you mean"),
        (("lab/small.yaml", "train.batch_size=1000"), "a batch of 1000 items was asked of a training split of 48"),
        (("lab/small.yaml", "name=a/b"), "name: a plain folder name is needed, found 'a/b'"),
        (("--list", "nonsense"), "there is no kind 'nonsense'"),
        (("--describe", "model.t_regresion"), "Did you mean 't_regression'?"),
        (("--describe", "modle.x"), "there is no kind 'modle'. Did you mean 'model'?"),
    ],
)
def test_mistakes_are_one_message_and_status_2(answer, here, words, message):
    status, out, err = answer(train, *words)
    assert status == 2 and out == "" and err.startswith("error: ") and message in err
    assert sorted(p.name for p in here.iterdir()) == ["lab"]


def test_lists_and_descriptions(answer):
    status, out, _ = answer(train, "--list")
    assert status == 0 and "t_regression" in out and out.splitlines()[0].startswith("audio_features:")
    assert "Squared distance" in answer(train, "--list", "model")[1]
    out = answer(train, "--describe", "learning_rate.one_cycle")[1]
    assert "rise" in out and "Smith & Topin" in out
    out = answer(train, "lab/small.yaml", "train.learning_rate=one_cycle", "--cite")[1]
    assert out.startswith("@misc{genmodels,") and "\n% learning_rate.one_cycle\n@misc{smith2018super,\n" in out


def test_dry_run_leaves_no_trace(answer, here):
    status, out, _ = answer(train, "lab/small.yaml", "--dry-run", "train.accumulate=2")
    assert status == 0 and "run        runs/lab-small" in out and "accumulate: 2" in out and "steps/s" in out
    assert sorted(p.name for p in here.iterdir()) == ["lab"]


def test_a_changed_configuration_stops_and_touches_nothing(answer, here, fakes):
    answer(train, "lab/small.yaml")
    before = fakes.contents(here)
    status, _, err = answer(train, "lab/small.yaml", "train.batch_size=4", "seed=3")
    assert status == 2 and "seed: 0 -> 3" in err and "train.batch_size: 8 -> 4" in err
    assert "name=lab-small-2" in err and "--fresh" in err and fakes.contents(here) == before
    assert answer(train, "lab/small.yaml", "seed=3", "name=lab-small-2")[0] == 0
    assert answer(train, "lab/small.yaml", "seed=3", "--fresh")[0] == 0
    assert fakes.contents(here / "runs" / "lab-small.old-1") == {
        k.removeprefix("runs/lab-small/"): v for k, v in before.items() if k.startswith("runs/lab-small/")
    }


def test_a_run_continues_where_it_is(answer, here, fakes):
    answer(train, "lab/small.yaml", "--root", "deep/runs")
    for word in ("deep/runs/lab-small", "deep/runs/lab-small/config.yaml"):
        assert "deep/runs/lab-small is finished at step 10" in answer(train, word)[2]
    shutil.move("deep/runs/lab-small", "deep/runs/renamed")
    assert "deep/runs/renamed is finished at step 10" in answer(train, "deep/runs/renamed")[2]
    assert answer(train, "deep/runs/renamed", "seed=1", "name=beside")[0] == 0
    assert sorted(p.name for p in Path("deep/runs").iterdir()) == ["beside", "renamed"] and not Path("runs").exists()


def test_interrupted_is_status_130(answer, here, fakes):
    seen = iter(range(100))

    def fault(batch):
        if next(seen) == 6:
            raise KeyboardInterrupt

    fakes.Regression.fault = fault
    status, _, err = answer(train, "lab/small.yaml")
    assert status == 130 and "interrupted. Step 4 is saved in runs/lab-small/checkpoints/00000004" in err


def test_unexpected_errors_say_how_to_see_more(answer, here, fakes, monkeypatch):
    def fault(batch):
        raise ValueError("the matrix is singular")

    fakes.Regression.fault = fault
    status, _, err = answer(train, "lab/small.yaml")
    assert status == 2 and "error: the matrix is singular\n(ValueError; set GENMODELS_DEBUG=1" in err
    assert "GENMODELS_DEBUG" not in answer(train, "lab/none.yaml")[2]  # an expected mistake
    monkeypatch.setenv("GENMODELS_DEBUG", "1")
    with pytest.raises(ValueError, match="singular"):
        train(["lab/small.yaml"])


def test_a_damaged_checkpoint_is_one_clean_line(answer, here):
    answer(train, "lab/small.yaml")
    path = Path("runs/lab-small/checkpoints/00000010/ema-0.9.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    status, _, err = answer(sample, "runs/lab-small", "--seeds", "0-3")
    assert status == 0 and err.count("\n") == 1
    assert re.fullmatch(r"warning: .*00000010.ema-0\.9\.safetensors has .* The checkpoint of step 8 is used.*\n", err)
    assert "warning: " in answer(train, "lab/small.yaml")[2] and answer(sample, "runs/lab-small")[2] == ""


def test_profile_is_told(answer, here, monkeypatch):
    asked = []
    fake = types.SimpleNamespace(profile=lambda config, root: asked.append((config.name, root)) or "all in one step")
    monkeypatch.setitem(sys.modules, "genmodels.training.profile", fake)
    status, out, _ = answer(train, "lab/small.yaml", "--profile", "--root", "there")
    assert (status, out, asked) == (0, "all in one step\n", [("lab-small", Path("there"))])
    assert not Path("there").exists()


def test_one_front(capsys):
    assert commands.main([]) == 2
    verbs = "train|sample|evaluate|leaderboard|compare|concavity|reference|export|import|plots"
    assert verbs in capsys.readouterr().err
    assert commands.main(["tarin"]) == 2 and "there is no verb 'tarin'" in capsys.readouterr().err
    assert commands.main(["--help"]) == 0
    help_ = capsys.readouterr().out
    assert all(f"\n  {verb} " in help_ for verb in ("train", "sample", "evaluate", "leaderboard", "plots"))
    assert commands.main(["train", "--list", "average"]) == 0 and "constant" in capsys.readouterr().out
    told = ((train, "Train a configuration"), (sample, "Draw samples of a run"), (plots, "Draw the training curves"))
    for command, word in told:
        with pytest.raises(SystemExit) as caught:
            command(["--help"])
        assert caught.value.code == 0 and word in capsys.readouterr().out


# ---- sample ---


@pytest.fixture
def classy(answer):
    assert answer(train, "lab/classy.yaml", "train.steps=1", "name=c")[0] == 0


def test_samples_are_a_picture_that_knows_its_seeds(answer, classy):
    status, out, _ = answer(sample, "runs/c")
    path = Path(out.split()[0])
    assert status == 0 and path == Path("runs/c/samples/00000001-ema-0.9-seeds0-23.png") and "(24 samples in" in out
    with Image.open(path) as image:
        text = image.text
    assert json.loads(text["seeds"]) == list(range(24)) and json.loads(text["condition"]) == [i // 8 for i in range(24)]
    assert json.loads(text["sample"]) == {"contrast": 0.5} and (text["weights"], text["step"]) == ("ema-0.9", "1")


def arrays(out):
    with np.load(next(line.split()[0] for line in out.splitlines() if ".npz" in line)) as found:
        return found["arr_0"], json.loads(str(found["notes"]))


def test_item_i_is_a_function_of_seed_i(answer, classy):
    x, notes = arrays(answer(sample, "runs/c", "--npz", "--seeds", "0-40")[1])
    some, few = arrays(answer(sample, "runs/c", "--npz", "--seeds", "33,5,12-14")[1])
    rows = [33, 5, 12, 13, 14]
    assert np.array_equal(some, x[rows]) and few["seeds"] == rows
    assert few["condition"] == [notes["condition"][r] for r in rows]  # the class, too


def test_options_weights_and_classes(answer, classy):
    words = ("--npz", "--seeds", "0-7", "--condition", "2", "--weights", "model", "--out", "new/folder/x.png")
    out = answer(sample, "runs/c", "sample.contrast=0.0", *words)[1]
    x, notes = arrays(out)
    assert (x == 2).all() and (notes["condition"], notes["weights"]) == ([2] * 8, "model")
    assert notes["sample"] == {"contrast": 0.0} and Path("new/folder/x.png").exists()
    names = set()
    for extra in ((), ("sample.contrast=0.7",), ("--condition", "1"), ("--weights", "model"), ("--seeds", "0-7")):
        names.add(answer(sample, "runs/c", *extra)[1].split()[0])
    assert len(names) == 5  # no answer overwrites another
    long = ",".join(str(k) for k in range(0, 300, 2))
    assert answer(sample, "runs/c", "--seeds", long)[0] == 0


def test_points_are_scattered(answer):
    answer(train, "lab/small.yaml", "train.steps=1")
    status, out, _ = answer(sample, "runs/lab-small", "sample.num_steps=2", "--seeds", "0-9")
    with Image.open(out.split()[0]) as image:
        assert status == 0 and image.size == (960, 480) and json.loads(image.text["seeds"]) == list(range(10))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runs/nothing",), "runs/nothing is no run (it has no config.yaml). Runs beside it: c."),
        (("runs/c", "--seeds", "5-3"), "--seeds: '5-3' is no seed and no range like 0-63"),
        (("runs/c", "--condition", "3"), "--condition: class 3 is out of range; there are 0 … 2"),
        (("runs/c", "sample.contrasts=3"), "sample: Key 'contrasts' not in 'Classy.sample'. Did you mean: 'contrast'?"),
        (("runs/c", "train.steps=3"), "only overrides of sample.* apply here, found train.steps=3"),
        (("runs/c", "contrast"), "'contrast' is neither a configuration file nor an override key=value"),
        (("runs/c", "--weights", "ema-1"), "has no weights 'ema-1'. It has: best, ema-0.9, model."),
        (("runs/c", "--device", "abacus"), "--device: "),
    ],
)
def test_mistakes_in_sampling(answer, classy, here, fakes, words, message):
    before = fakes.contents(here)
    status, out, err = answer(sample, *words)
    assert status == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert fakes.contents(here) == before


def test_a_class_for_a_model_without(answer):
    answer(train, "lab/small.yaml", "train.steps=1")
    status, _, err = answer(sample, "runs/lab-small", "--condition", "0")
    assert status == 2 and "--condition: this model takes no class label" in err
    assert answer(train, "lab/small.yaml", "train.steps=1", "model.name=t_twice", "name=t")[0] == 0
    assert "Twice does not draw samples" in answer(sample, "runs/t")[2]
    assert answer(train, "lab/small.yaml", "train.steps=1", "model.name=t_refuses", "name=n")[0] == 0
    assert "error: its decoder is missing" in answer(sample, "runs/n")[2]


# ---- processes of their own ---


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_on_a_terminal_there_is_one_live_line(here):
    """What a reader sees on a terminal of 80 columns: plain lines stay, one line moves and never wraps."""
    child, terminal = pty.fork()
    if child == 0:
        words = [
            "lab/small.yaml",
            "train.steps=100",
            "train.log_every=50",
            "train.eval_every=50",
            "train.save_every=100",
        ]
        os.execve(
            sys.executable,
            [sys.executable, str(ROOT / "train.py"), *words],
            environment() | {"TERM": "xterm", "COLUMNS": "80"},
        )
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    frames = [line.strip() for line in re.split(r"[\r\n]+", text)]
    assert status == 0, text
    live = [line for line in frames if "━" in line or "─" in line]
    assert (
        live
        and all(len(line) <= 80 for line in live)
        and live[-1].startswith("step 100/100 ━━━━━━━━━━━━ eta 0s  loss ")
    )
    assert "step 100/100  val loss" in text and frames[-2].startswith("done: runs/lab-small at step 100")
    assert "step 50/100  loss" not in text  # intervals are told in place …
    assert "step 50/100  loss" in Path("runs/lab-small/log.txt").read_text()  # … and kept


def test_the_package_is_a_command(here):
    words = [sys.executable, "-m", "genmodels", "train", "lab/smal.yaml"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Did you mean 'small.yaml'?" in done.stderr


def test_a_reader_who_left_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "train.py", "--list"]
    done = subprocess.run(words, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def launched(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*command, str(ROOT / "train.py"), *words]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_two_processes_are_one_run(here, fakes):
    """Same data, and for a loss that draws nothing the same weights up to rounding; a conflict does not hang."""
    words = ["lab/small.yaml", "train.accumulate=2", "train.sample_every=5"]
    done = launched(*words, "name=two")
    assert done.returncode == 0, done.stderr
    assert train([*words, "name=one"]) == 0
    assert "2 processes" in done.stderr and done.stderr.count("done: runs/two at step 10") == 1
    one, two = Run.open("runs/one"), Run.open("runs/two")
    assert two.meta["world_size"] == 2
    for name in one.weights_names():
        expected, found = one.load(name).state_dict(), two.load(name).state_dict()
        for key in ("goal", "network.weight", "network.bias"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
    for a, b in zip(fakes.said(one), fakes.said(two), strict=True):
        assert a.keys() == b.keys() and all(b[k] == pytest.approx(a[k], rel=1e-4, abs=1e-6) for k in a)
    before = fakes.contents(here / "runs")
    done = launched(*words, "name=two", "seed=4")
    assert done.returncode != 0 and "[process 0] error: runs/two exists with another configuration" in done.stderr
    assert fakes.contents(here / "runs") == before
    done = launched(*words, "name=two")
    assert done.returncode == 0 and "runs/two is finished at step 10" in done.stderr
