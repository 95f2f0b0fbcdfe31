"""Several processes do what one does: they fail together, and no number depends on how many there are."""

import fcntl
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genmodels.commands import sample
from tests import two_processes
from tests.two_processes import ROOT, launch, variables
from tests.unit.fakes import restored

SCENES = ("helpers", "gradients", "training", "replicas", "sampling", "evaluation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the scenes are played, shared by the workers of one test session."""
    own = tmp_path_factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "scenes"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="module")
def outcomes(folder):
    """What two processes returned in every scene, and what one did; played by the first worker that needs it."""
    file = folder / "outcomes"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            two_processes.make_runs(folder)
            played = two_processes.play(folder, *SCENES)
            with restored():
                from tests import training_fakes

                training_fakes.register_all()
                alone = {name: getattr(two_processes, name)(folder) for name in ("training", "sampling", "evaluation")}
                training_fakes.register_all()
            file.write_bytes(pickle.dumps((played, alone)))
    return pickle.loads(file.read_bytes())


@pytest.fixture(scope="module")
def played(outcomes):
    return outcomes[0]


@pytest.fixture(scope="module")
def alone(outcomes):
    return outcomes[1]


# ---- working and failing together ---


def test_processes_know_one_another(played):
    first, second = played["helpers"]
    assert first["world"] == (0, 2, True) and second["world"] == (1, 2, False)


def test_what_the_first_process_does_all_get(played):
    first, second = played["helpers"]
    assert first["by_main"] == second["by_main"] == {"by": 0}
    assert first["by_main fails"] == second["by_main fails"] == ("ConfigError", "only rank 0 was asked", 0)
    assert first["by_main cannot travel"] == second["by_main cannot travel"] == 0


def test_the_error_of_one_is_raised_by_all(played):
    first, second = played["helpers"]
    assert first["one fails"] == second["one fails"] == ("ConfigError", "rank 1 fails", 1)
    assert first["both fail"] == second["both fail"] == ("ConfigError", "rank 0 fails", 0)
    assert first["nested"] == second["nested"] == ("ConfigError", "rank 0 fails", 0)
    assert second["stubborn"] == ("Stubborn", "1 is not 2", 1)
    assert first["stubborn"] == ("RuntimeError", "Stubborn: 1 is not 2", 1)


def test_work_is_shared_and_seen_in_order_by_the_first_process(played):
    first, second = played["helpers"]
    assert first["in order"] == [[(k, k % 2) for k in range(n)] for n in range(6)]
    assert second["in order"] == [[]] * 6
    assert first["taking"] == [k * k for k in range(7)] and second["taking"] == []


def test_work_that_fails_on_one_process_fails_on_all(played):
    first, second = played["helpers"]
    assert first["work fails"] == second["work fails"] == ("ConfigError", "item 5 is bad", 1)
    assert first["taking fails"] == second["taking fails"] == [("ConfigError", "process 0 does not like 4", 0)] * 3


def test_tensors_become_those_of_the_first_process_bit_for_bit(played):
    first, second = (outcome["tensors"] for outcome in played["helpers"])
    for mine, other in zip(first, second, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)
    assert first[0][0, 0] == torch.tensor(0.1) and torch.equal(first[4], torch.arange(6.0).reshape(2, 3).T)


# ---- replicas ---

INNER = ["score matching", "continuous flow", "controlled equation", "shared steps", "own backward pass", "experts"]


@pytest.mark.parametrize("name", INNER)
def test_gradients_are_those_of_one_process(played, name):
    """Double precision: shares are summed in another order, which moves the last bits and nothing else."""
    for outcome in played["gradients"]:
        for own, expected in outcome[name]:
            assert (own is None) == (expected is None)
            if own is not None:
                torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_gradients_through_an_equilibrium(played):
    """Each process stops its own iteration, within 1e-6 of the fixed point: gradients agree as well as that."""
    for outcome in played["gradients"]:
        for own, expected in outcome["equilibrium"]:
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def test_an_expert_without_items_gets_no_gradient(played):
    for outcome in played["gradients"]:
        assert [own is None for own, _ in outcome["experts"]] == [False] * 4 + [True] * 2


def test_a_parameter_without_gradient_must_be_announced(played):
    first, second = (outcome["careless"] for outcome in played["gradients"])
    assert first == second and first[0] == "ConfigError" and first[2] == 0
    assert "Careless left these parameters without gradient: experts.1.weight, experts.1.bias, experts.2" in first[1]
    assert "`unused_parameters = True` on the class Careless" in first[1]


# ---- training ---


@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_every_step_sees_the_same_items(played, alone, name):
    one = alone["training"][name]["seen"]
    two = [outcome[name]["seen"] for outcome in played["training"]]
    assert len(one) == len(two[0]) == len(two[1]) == (20 if name == "accumulated" else 10)
    for whole, first, second in zip(one, *two, strict=True):
        assert torch.equal(whole[0::2], first) and torch.equal(whole[1::2], second)


@pytest.mark.parametrize("name", ["plain", "accumulated", "hole"])
def test_two_processes_end_where_one_does(played, alone, name):
    """Without noise only the order of summation differs: double precision leaves twelve digits after ten steps."""
    one, (first, second) = alone["training"][name], (outcome[name] for outcome in played["training"])
    parameters = ["goal", "network.weight", "network.bias"]
    for part in ("model", "saved", "ema", "optimizer"):
        keys = parameters if part != "optimizer" else list(one[part])
        assert keys and one[part].keys() == first[part].keys()
        for key in keys:
            torch.testing.assert_close(first[part][key], one[part][key], rtol=1e-12, atol=1e-13)
    for key in parameters:
        assert torch.equal(first["model"][key], second["model"][key]), key


@pytest.mark.parametrize("name", ["statistics", "experts"])
def test_processes_hold_the_same_bits(played, name):
    """Parameters and running statistics; what is saved is what all of them hold."""
    first, second = (outcome[name] for outcome in played["replicas"])
    assert first["model"].keys() == second["model"].keys() == first["saved"].keys()
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]) and torch.equal(value, first["saved"][key]), key
    assert [own.keys() for own in first["averages"]] == [own.keys() for own in second["averages"]]
    for own, other in zip(first["averages"], second["averages"], strict=True):
        assert all(torch.equal(value, other[key]) for key, value in own.items())


def test_running_statistics_are_of_the_share_of_the_first_process(played):
    first = played["replicas"][0]["statistics"]
    mean = torch.zeros(2)
    for part in first["seen"]:
        mean = mean.lerp(part.mean(0), 0.1)
    torch.testing.assert_close(first["model"]["mean"], mean)
    assert first["model"]["count"] == 10


def test_failures_of_training_are_told_once(played):
    first, second = played["replicas"]
    for name, kind, words in [
        ("careless", "ConfigError", "Careless left these parameters without gradient"),
        ("exhausted", "TrainingFailed", "20 steps in a row were not finite"),
        ("blocked", "ConfigError", "blocked is a file where the run needs a folder"),
        ("full", "OSError", "no space left"),
    ]:
        assert first[name] == second[name] and first[name][0] == kind and first[name][2] == 0, name
        assert words in first[name][1]


# ---- sampling and evaluation ---


@pytest.mark.parametrize("name", list(two_processes.TINY))
def test_samples_do_not_depend_on_how_many_draw_them(played, alone, folder, name):
    pixels, arrays = [], []
    for world in (1, 2):
        stem = folder / f"samples-{world}" / name
        with Image.open(stem.with_suffix(".png")) as image:
            pixels.append((image.text, np.asarray(image)))
        with np.load(stem.with_suffix(".npz")) as found:
            arrays.append(found["arr_0"])
    assert pixels[0][0] == pixels[1][0] and np.array_equal(pixels[0][1], pixels[1][1])
    assert arrays[0].shape == (38, 1, 8, 8) and np.array_equal(*arrays)
    assert len(np.unique(arrays[0])) > 10
    first, second = (outcome[name] for outcome in played["sampling"])
    assert "38 samples" in first and first.count("\n") == 2 == alone["sampling"][name].count("\n") and second == ""


def test_batches_are_not_cut_by_the_number_of_processes(played):
    """Where that moved no bits in the tests above, it may on other machines."""
    assert [outcome["size"] for outcome in played["sampling"]] == [100, 100]


def test_a_request_that_fails_does_so_on_both(played):
    first, second = (outcome["bad"] for outcome in played["sampling"])
    assert first == second == ("ConfigError", "--condition: class 77 is out of range; there are 0 … 9.", 0)


def numbers(result):
    """What must not depend on the number of processes: all but the clock and the number itself."""
    clocks = ("seconds", "seconds_per_item", "peak_memory")
    cost = {question: bill | dict.fromkeys(clocks) for question, bill in result["cost"].items()}
    environment = result["environment"] | {"world_size": None}
    rest = ("id", "created_utc", "seconds", "cost", "environment", "run")
    return {key: value for key, value in result.items() if key not in rest} | {
        "cost": cost,
        "environment": environment,
    }


def test_scores_do_not_depend_on_how_many_processes_answer(played, alone):
    one, (first, second) = alone["evaluation"], played["evaluation"]
    for name in two_processes.TINY:
        (result, (items, grid)), (expected, (same, picture)) = first["results"][name], one["results"][name]
        assert grid == picture and grid.startswith(b"\x89PNG")
        assert (result["environment"]["world_size"], expected["environment"]["world_size"]) == (2, 1)
        assert numbers(result) == numbers(expected)
        assert len(result["metrics"]) >= 5 and list(result["not_applicable"]) == ["accuracy"]
        assert result["cost"]["sample"]["items"] == 260 and result["cost"]["sample"]["seconds"] > 0
        assert items.keys() == same.keys() != set()
        for key in items:
            assert np.array_equal(items[key].ids, same[key].ids) and np.array_equal(items[key].values, same[key].values)
    assert second["said"] == "" and first["said"].count("written to") == 2


def test_a_refusal_of_one_process_is_everyones(played, alone):
    one, (first, second) = alone["evaluation"]["refuses"], (outcome["refuses"] for outcome in played["evaluation"])
    assert first == second and numbers(first) == numbers(one)
    assert first["not_applicable"] == {"frechet": "it draws nothing beyond seed 50"}
    assert {row["name"] for row in first["metrics"]} >= {"bits_per_dim"} and list(first["cost"]) == ["likelihood"]


def test_a_wrong_answer_of_one_process_ends_both(played):
    first, second = (outcome["fails"] for outcome in played["evaluation"])
    assert first == second and first[0] == "ValueError" and first[2] == 1
    assert "answered 50 seeds with shape [49, 3]" in first[1]


# ---- commands ---


def words_of(done):
    """Lines that our commands print to standard error; the launcher has lines of its own."""
    lines = done.stderr.splitlines()
    return [line for line in lines if line.startswith(("error:", "warning:", "[process", "done:"))]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_processes.make_runs(tmp_path)
    tree = {"imports": ["tests.training_fakes"], "data": "t_line", "model": "t_regression"}
    Path("line.yaml").write_text(yaml.safe_dump(tree | {"train": {"steps": 10, "batch_size": 8}}))
    return tmp_path


@pytest.mark.slow
def test_samples_and_scores_under_a_launcher(lab):
    """The commands as they are typed: the files of one process, one voice, and a mistake told once."""
    done = launch(ROOT / "sample.py", "runs/diffusion", "--seeds", "0-9", "--out", "two", "--npz")
    assert done.returncode == 0 and done.stdout.count("10 samples in") == 1 and words_of(done) == []
    assert sample(["runs/diffusion", "--seeds", "0-9", "--out", "one", "--npz"]) == 0
    with np.load("one.npz") as one, np.load("two.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"])
    done = launch("-m", "evals.evaluate", "runs/flow", "--protocol", "small.yaml", "--device", "cpu")
    assert done.returncode == 0 and done.stdout.count("written to") == 1 and words_of(done) == []
    for command in (("sample.py", "runs/none"), ("-m", "evals.evaluate", "runs/flow", "--protocol", "none")):
        done = launch(*(ROOT / word if word == "sample.py" else word for word in command))
        assert done.returncode != 0 and [line[:18] for line in words_of(done)] == ["[process 0] error:"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ValueError", "KeyError"])
def test_a_process_that_crashes_ends_all(lab, kind):
    """Within the limit of `launch`; an expected error is told by who met it, a bug with its traceback."""
    Path("crash.py").write_text(
        "import os, sys\n"
        "from tests import training_fakes\n"
        "from genmodels.commands import train\n"
        f"if os.environ['RANK'] == '1': training_fakes.stop_at(4, {kind})\n"
        "sys.exit(train(['line.yaml', 'name=crash', 'train.save_every=2']))\n"
    )
    done = launch("crash.py")
    assert done.returncode != 0 and "done:" not in done.stderr
    if kind == "ValueError":
        assert sum("[process 1] error:" in line for line in words_of(done)) == 1
        assert "[rank" not in done.stderr  # no traceback of ours
    else:
        assert f"[rank1]: {kind}" in done.stderr and "[rank0]" not in done.stderr
    assert (lab / "runs/crash/checkpoints/00000002/state.json").is_file()  # what was saved before is kept


@pytest.mark.slow
def test_accelerate_that_starts_one_process_of_two_is_found_out(lab):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += [str(ROOT / "sample.py"), "runs/flow", "--seeds", "0-1", "--out", "x"]
    done = subprocess.run(command, env=variables(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert sum("accelerate launch was asked for several processes" in line for line in words_of(done)) == 1
