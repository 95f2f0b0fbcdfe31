"""What goes wrong on a user's machine ends in one clear message, and nothing is lost."""

import errno
import multiprocessing

import pytest
import torch

from genmodels import commands
from genmodels.config import Config
from genmodels.networks.dit import DiT
from genmodels.registry import ConfigError
from genmodels.solvers.base import Fixed, integrate
from genmodels.training import checkpoint, disk
from genmodels.training.checkpoint import CheckpointError
from genmodels.training.loop import train
from genmodels.training.optim import Adam
from genmodels.training.run import Run

TINY = {
    "name": "tiny",
    "data": "eight_gaussians",
    "model": {"name": "diffusion", "network": {"name": "mlp", "hidden": [8]}},
    "train": {"steps": 2, "batch_size": 16},
}


@pytest.fixture
def run(tmp_path):
    return train(Config(TINY), root=tmp_path, quiet=True)


def test_a_solver_that_fails_is_one_message(run, capsys, monkeypatch):
    monkeypatch.setitem(integrate.__kwdefaults__, "max_steps", 3)
    controller = "sample.controller={name: pi, rtol: 1e-4, atol: 1e-4}"
    assert commands.sample([str(run.path), "--seeds", "0-1", "sample.solver=dopri5", controller]) == 2
    said = capsys.readouterr().err
    assert "max_steps_reached in step 4" in said and "Raise max_steps" in said
    assert "Traceback" not in said


def test_weights_of_another_model_are_named(run):
    tensors, _ = checkpoint.read_tensors(run.checkpoints / "00000002" / "model.safetensors")
    model = load_model(run)
    missing = {k: v for k, v in tensors.items() if not k.endswith("head.bias")}
    with pytest.raises(CheckpointError, match=r"does not fit.*head\.bias"):
        checkpoint.load_weights(model, missing, run.checkpoints)


def load_model(run: Run) -> torch.nn.Module:
    return run.config.model(run.config.dataset().facts())


def test_a_failed_write_is_an_error_of_the_disk(tmp_path):
    """The writer of tensors wraps the error in a text; its number decides whether space is wanting."""
    path = tmp_path / "no" / "such" / "folder.safetensors"
    with pytest.raises(OSError) as caught:
        checkpoint.write_tensors(path, {"a": torch.zeros(2)}, {})
    assert caught.value.errno == errno.ENOENT and caught.value.filename == str(path)
    assert errno.ENOENT not in disk.FULL and errno.ENOSPC in disk.FULL


def hold(path, started, done) -> None:
    with Run.open(path).locked():
        started.set()
        done.wait(60)


def test_a_run_is_trained_by_one_process_at_a_time(run):
    context = multiprocessing.get_context("spawn")
    started, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(run.path, started, done))
    other.start()
    assert started.wait(60)
    with pytest.raises(ConfigError, match="being trained by another process"):
        train(Config(TINY), root=run.path.parent, quiet=True)
    done.set()
    other.join(60)
    assert train(Config(TINY), root=run.path.parent, quiet=True).step == 2


def test_numbers_out_of_range_are_refused_before_a_folder_exists(tmp_path):
    for bad in ({"betas": [2, 3]}, {"eps": 0}, {"weight_decay": -1}):
        with pytest.raises(ConfigError, match="adam"):
            train(Config({**TINY, "train": {"optimizer": {"name": "adam", **bad}}}), root=tmp_path)
    for bad in ({"depth": 0}, {"expansion": -1.0}, {"dropout": 1.5}):
        with pytest.raises(ConfigError, match="dit"):
            DiT(**bad, in_shape=(1, 4, 4), out_shape=(1, 4, 4), timed=True, num_classes=None, condition_shape=None)
    assert list(tmp_path.iterdir()) == []
    assert Adam().betas == (0.9, 0.999)


def test_likelihood_of_a_loaded_model_builds_no_graph_unless_asked(run):
    model, grid = run.load().double(), {"controller": Fixed(), "num_steps": 10}
    x = torch.tensor([[0.3, -1.2], [2.0, 0.5], [-1.0, -1.0]], dtype=torch.float64)
    assert not model.log_prob(x, **grid).requires_grad
    x.requires_grad_()
    (slope,) = torch.autograd.grad(model.log_prob(x, **grid).sum(), x)
    h = 1e-5
    with torch.no_grad():
        for i in range(2):
            e = h * torch.eye(2, dtype=torch.float64)[i]
            finite = (model.log_prob(x + e, **grid) - model.log_prob(x - e, **grid)) / (2 * h)
            torch.testing.assert_close(slope[:, i], finite, rtol=1e-5, atol=1e-6)


def test_an_empty_list_of_seeds_is_malformed(run, capsys):
    assert commands.sample([str(run.path), "--seeds", ""]) == 2
    assert "--seeds" in capsys.readouterr().err
