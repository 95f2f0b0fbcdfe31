"""Without a launcher there is one process, and helping it costs nothing; what a launcher says is understood."""

import sys
import warnings

import pytest
import torch

from genmodels.registry import ConfigError
from genmodels.training import processes

LAUNCHER = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", *processes.SIZES, *LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_works_alone():
    assert (processes.rank(), processes.world(), processes.main()) == (0, 1, True)
    assert processes.by_main(lambda: "done") == "done"
    seen = processes.in_order(iter_once := [1, 2, 3], str)
    assert next(seen) == "1" and list(seen) == ["2", "3"] and iter_once == [1, 2, 3]
    tensor = torch.ones(2)
    processes.copy_from_main([tensor])
    assert torch.equal(tensor, torch.ones(2))
    processes.leave()


def test_one_process_fails_as_it_did():
    error = ConfigError("no")
    with pytest.raises(ConfigError) as caught, processes.together():
        raise error
    assert caught.value is error and not processes.ended_together(error) and not processes.told_elsewhere(error)
    assert not processes.left_alone(RuntimeError("Connection closed by peer"))


def test_helping_one_process_imports_no_launcher(environment):
    for name in [name for name in sys.modules if name.startswith("accelerate")]:
        environment.delitem(sys.modules, name)
    processes.by_main(lambda: None)
    assert processes.place("cpu") == torch.device("cpu")
    assert "accelerate" not in sys.modules


@pytest.mark.parametrize("name", processes.SIZES)
def test_every_launcher_says_how_many_there_are(environment, name):
    assert processes.launched() == 1
    environment.setenv(name, "3")
    assert processes.launched() == 3


def test_a_launcher_that_starts_one_of_several_is_found_out(environment):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processes.place("cpu")
        environment.setenv("ACCELERATE_MIXED_PRECISION", "no")
        processes.place("cpu")  # one process was asked for: no address to meet at
    for name, value in LAUNCHER.items():
        environment.setenv(name, value)
    with pytest.warns(UserWarning, match="started this one alone.*torchrun --nproc-per-node"):
        processes.place("cpu")
    environment.setenv("WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processes.place("cpu")


def test_devices(environment):
    with pytest.raises(ConfigError, match="--device: "):
        processes.place("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device: cuda was asked for, and torch finds no CUDA device"):
            processes.place("cuda")
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--device: cpu:0 names one device for 2 processes; say cpu"):
        processes.place("cpu:0")
