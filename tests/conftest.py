"""One thread per process: the tensors of tests are small, and threads that wait for one another cost more."""

import gc
import os
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from types import ModuleType

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the subprocesses that tests start
torch.set_num_threads(1)

# Bytecode of tests and of the package is kept, whatever the environment says: else every process compiles it again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What is imported and collected stays until the end: the collector need not walk through it again and again.
gc.disable()


# machines are shared: a slow example is no fault; examples are new in every run
settings.register_profile("repository", deadline=None, max_examples=30)
settings.load_profile("repository")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture
def fakes() -> Iterator[ModuleType]:
    """Data sets and models of a few numbers, registered while a test runs, with nothing remembered of another one."""
    from .unit.fakes import restored

    with restored():
        from . import training_fakes

        training_fakes.register_all()
        yield training_fakes
        training_fakes.register_all()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow_for("rk4-*", "heun")` puts the parameters of these ids under the marker `slow`."""
    patterns: dict[str, list[str]] = {}
    found: dict[str, set[str]] = {}
    for item in items:
        if (mark := item.get_closest_marker("slow_for")) is None:
            continue
        name, parameters = item.nodeid.partition("[")[::2]
        patterns[name] = list(mark.args)
        met = {pattern for pattern in mark.args if fnmatchcase(parameters.removesuffix("]"), pattern)}
        found.setdefault(name, set()).update(met)
        if met:
            item.add_marker(pytest.mark.slow)
    if any("::" in argument for argument in config.args):  # not all parameters are here
        return
    if idle := [f"{name}[{p}]" for name, of in patterns.items() for p in of if p not in found[name]]:
        raise pytest.UsageError(f"slow_for: there is no {', '.join(idle)}")
