"""Scenes for several processes: each runs in every process of `play`, and returns what the test looks at.

`python -m tests.two_processes <folder> <scene> …`; results go to `<folder>/<scene>-<rank>`. It splits itself in two,
which costs one start of Python where a launcher costs three; the commands under a launcher are among the slow tests.
"""

import copy
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from genmodels.config import load
from genmodels.model import Model
from genmodels.registry import ConfigError, build, register, resolve
from genmodels.training import processes
from genmodels.training.run import Run
from genmodels.transforms import Identity
from genmodels.types import Batch, NotApplicable
from tests.replica_fakes import Careless, Experts, Memoryless

ROOT = Path(__file__).parents[1]
LIMIT = 60  # seconds that one command may take; longer is a hang


def variables() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(*words: str | Path, limit: float = LIMIT) -> subprocess.CompletedProcess:
    """A command in two processes under torchrun, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*command, *map(str, words)], env=variables(), capture_output=True, text=True, timeout=limit)


def play(folder: Path, *scenes: str) -> dict[str, list[Any]]:
    """What each of two processes returned in each scene."""
    words = [sys.executable, "-m", "tests.two_processes", str(folder), *scenes]
    done = subprocess.run(words, env=variables(), capture_output=True, text=True, timeout=LIMIT * len(scenes))
    assert done.returncode == 0, done.stderr
    return {scene: [pickle.loads((folder / f"{scene}-{rank}").read_bytes()) for rank in (0, 1)] for scene in scenes}


def failure(function: Any) -> tuple[str, str, int]:
    """Type, message and origin of the error that a function raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "raised_by", 0)
    raise AssertionError("nothing was raised")


# ---- working and failing together ---


class Stubborn(Exception):
    """An error that pickle cannot rebuild."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} is not {right}")


def fail_on(*ranks: int, error: Any = None) -> None:
    with processes.together():
        if processes.rank() in ranks:
            raise error or ConfigError(f"rank {processes.rank()} fails")


def nested() -> None:
    with processes.together():
        try:
            fail_on(1)
        except ConfigError:  # all processes have it, so all may go on
            fail_on(0)


def taking(items: int, bad: int) -> list[int]:
    """Process 0 fails while it takes the results, the other one may already be ahead."""
    seen = []
    with processes.together():
        for result in processes.in_order(range(items), lambda k: k * k):
            if result == bad:
                raise ConfigError(f"process 0 does not like {result}")
            seen.append(result)
    return seen


def work(k: int) -> int:
    if k == 5:
        raise ConfigError("item 5 is bad")
    return k


def helpers(folder: Path) -> dict[str, Any]:
    me = processes.rank()
    tensors = [torch.full((2, 3), me + 0.1), torch.tensor(me), torch.tensor([me == 0]), torch.full((2,), me + 1j)]
    tensors.append(torch.arange(6.0).reshape(2, 3).T + me)
    processes.copy_from_main(tensors)
    return {
        "world": (me, processes.world(), processes.main()),
        "by_main": processes.by_main(lambda: {"by": processes.rank()}),
        "by_main fails": failure(lambda: processes.by_main(lambda: fail_on_main(me))),
        "by_main cannot travel": failure(lambda: processes.by_main(lambda: lambda: 0))[2],
        "one fails": failure(lambda: fail_on(1)),
        "both fail": failure(lambda: fail_on(0, 1)),
        "stubborn": failure(lambda: fail_on(1, error=Stubborn(1, 2))),
        "nested": failure(nested),
        "in order": [list(processes.in_order(range(n), lambda k: (k, processes.rank()))) for n in range(6)],
        "work fails": failure(lambda: list(processes.in_order(range(9), work))),
        "taking": taking(7, -1),
        "taking fails": [failure(lambda n=n: taking(n, 4)) for n in (3, 4, 7)],
        "tensors": tensors,
    }


def fail_on_main(rank: int) -> None:
    raise ConfigError(f"only rank {rank} was asked")


# ---- replicas ---


def pairs() -> dict[str, tuple[Model, Batch]]:
    """Models with eight items each, in double precision."""
    from tests import training_fakes
    from tests.contracts import families

    plane, series = families.Plane(), families.Series("classify")
    shapes = {"shape": series.shape, "target_shape": series.target_shape}
    rows = torch.arange(8)
    points = plane.take("train", rows)
    labelled = Batch(points.x, target=rows % 3)
    sides = torch.tensor([[1.0, 2.0], [-1.0, 0.5]]).repeat(4, 1) * torch.linspace(0.5, 2, 8)[:, None]  # one side a rank
    models = {
        "score matching": (training_fakes.Twice(shape=(2,)), points),
        "continuous flow": (made("cnf", layers=[{"name": "continuous", "network": FIELD}], **FIXED, **PLANE), points),
        "equilibrium": (made("deq", cell=CELL, **SKIP, shape=(2,), target_shape=(3,), transform=Identity()), labelled),
        "controlled equation": (
            made("neural_cde", field=FIELD, hidden=4, **FIXED, **shapes),
            series.take("train", rows),
        ),
        "shared steps": (shared_steps(), Batch(points.x)),
        "own backward pass": (Memoryless(shape=(2,)), points),
        "experts": (Experts(shape=(2,)), Batch(sides)),
    }
    return {name: (model.double(), batch.replace(x=batch.x.double())) for name, (model, batch) in models.items()}


FIELD = {"name": "concat_mlp", "hidden": [4], "time": "none"}
PLANE = {"shape": (2,), "transform": Identity(), "num_classes": None, "condition_shape": None, "bin_width": None}
FIXED = {"controller": {"name": "fixed", "steps": 4}}  # steps that do not depend on who shares a batch
CELL = {"name": "mlp_cell", "hidden": 5, "activation": "tanh", "contraction": 0.7}
SKIP = {
    "start": "predictor",
    "skip": 1.0,
    "solver": {"name": "anderson", "rtol": 1e-12, "atol": 1e-12},
    "gradient": {"name": "implicit", "rtol": 1e-12},
}


def made(name: str, **given: Any) -> Model:
    """A registered model: what of the arguments is a fact of the data is handed over as it is."""
    facts = {key: given.pop(key) for key in (*PLANE, "target_shape") if key in given}
    return build(Model, resolve(Model, {"name": name, **given}, "test"), **facts)


def shared_steps() -> Model:
    """A flow whose steps pass through one network: its gradients add up before they are exchanged."""
    network = {"name": "residual_mlp", "hidden": 8, "blocks": 1}
    shared = {"name": "shared", "of": network, "embedding": 3, "inject": ["add", "gate"]}
    layers = [{"name": "repeat", "count": 3, "layers": ["permutation", {"name": "coupling", "network": shared}]}]
    sizes = {"shape": (2,), "num_classes": None, "condition_shape": None, "bin_width": None}
    node = resolve(Model, {"name": "flow", "layers": layers}, "test")
    model = build(Model, node, transform=Identity(), **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # zero heads would leave no gradient behind them
    return model


def gradients(folder: Path) -> dict[str, Any]:
    """Two gradient steps of every model: of this process with the others, and of one process on all items."""
    accelerator, outcome = processes.join(), {}
    torch.manual_seed(0)
    for name, (model, batch) in pairs().items():
        alone = copy.deepcopy(model)
        wrapped = processes.replicate(accelerator, model)
        mine = batch[torch.arange(processes.rank(), 8, processes.world())]
        for _ in range(2):
            for module, items in ((wrapped, mine), (alone, batch)):
                module.zero_grad(set_to_none=True)
                module(items, generator=None).value.mean().backward()
        own, expected = ([p.grad for p in m.parameters()] for m in (model, alone))
        outcome[name] = list(zip(own, expected, strict=True))
    model, batch = Careless(shape=(2,)).double(), pairs()["experts"][1]
    wrapped = processes.replicate(accelerator, model)
    wrapped(batch[torch.arange(processes.rank(), 8, 2)], generator=None).value.mean().backward()
    outcome["careless"] = failure(lambda: processes.require_gradients(model))
    return outcome


# ---- training ---


@contextmanager
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def trained(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    """What a process saw in each micro-batch of a run, and what it holds at the end."""
    from genmodels.training import loop
    from tests import training_fakes

    seen: list[Tensor] = []
    kept: list[loop.Trainer] = []

    class Kept(loop.Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.append(self)

    training_fakes.Regression.fault = lambda batch: seen.append(batch.x.clone())
    original, loop.Trainer = loop.Trainer, Kept
    try:
        run = loop.train(training_fakes.config(name=name, **changes), root=root, quiet=True)
    finally:
        loop.Trainer, training_fakes.Regression.fault = original, None
    model = kept[0].watch.model
    averages = run.load("ema-0.9").state_dict()
    optimizer = run.restore()[0]["optimizer"]
    own = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return {
        "seen": seen,
        "model": own,
        "averages": [average.tensors for average in kept[0].watch.averages.values()],
        "saved": run.load("model").state_dict(),
        "ema": averages,
        "optimizer": optimizer,
    }


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"train": {"accumulate": 2}},
    "hole": {"data": {"name": "t_line", "nan_at": 11}},  # one item is NaN: it is with one process, in one step
}


def training(folder: Path) -> dict[str, Any]:
    root = folder / f"trained-{processes.world()}"
    with doubles():
        return {name: trained(root, name, **changes) for name, changes in RUNS.items()}


def replicas(folder: Path) -> dict[str, Any]:
    """What every process holds after training: running statistics, unused parameters; failures of one or of all."""
    from genmodels.training.loop import train
    from tests import training_fakes

    for name, model in (("experts", Experts), ("careless", Careless)):
        register(Model, f"t_{name}")(model)
    root = folder / "replicas"
    changes: dict[str, Any] = {"model": {"name": "t_experts"}}
    bad = {"data": {"name": "t_line", "nan_at": 0, "items": 8}, "train": {"steps": 30}}

    def fails(name: str, **changes: Any) -> tuple[str, str, int]:
        return failure(lambda: train(training_fakes.config(name=name, **changes), root=root, quiet=True))

    outcome = {
        "statistics": trained(root, "statistics"),
        "experts": trained(root, "experts", **changes),
        "careless": fails("careless", model={"name": "t_careless"}),
        "exhausted": fails("exhausted", **bad),
    }
    (root / "blocked").write_text("a file where the run needs a folder")
    outcome["blocked"] = fails("blocked")
    save, Run.save = Run.save, refuse
    try:
        outcome["full"] = fails("full")
    finally:
        Run.save = save
    return outcome


def refuse(*arguments: Any) -> None:
    raise OSError("no space left")


# ---- sampling and evaluation ---

TINY = {
    "flow": ["configs/digits/nsf.yaml", "model.layers.1.count=1"],
    "diffusion": [
        "configs/digits/flow_matching.yaml",
        "model.network.width=16",
        "model.network.depth=1",
        "sample.num_steps=3",
        "likelihood={divergence: hutchinson, controller: fixed, num_steps: 2}",
    ],
}
PROTOCOL = {
    "name": "small",
    "version": 1,
    "dataset": {"name": "digits"},
    "sample": {"num_items": 130, "blocks": 2, "batch_size": 33},
    "likelihood": {"num_items": 20, "draws": 2, "batch_size": 7},
    "metrics": [
        {"name": "frechet", "features": "pixels"},
        {"name": "authenticity"},
        {"name": "bits_per_dim"},
        {"name": "accuracy"},
    ],
}


def make_runs(folder: Path) -> None:
    """Untrained runs to draw from and to score, and the protocol, for `sampling` and `evaluation`."""
    from genmodels.training.loop import train

    for name, (path, *changes) in TINY.items():
        quiet = ["train.steps=1", "train.batch_size=16", "train.eval_every=0", "train.sample_every=0"]
        train(load([ROOT / path], [*changes, *quiet, f"name={name}"]), root=folder / "runs", quiet=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(PROTOCOL))


def said(command: Any, *words: str | Path) -> str:
    """What the inside of a command prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        command.__wrapped__([str(word) for word in words])
    return out.getvalue()


def sampling(folder: Path) -> dict[str, Any]:
    from genmodels.commands import sample
    from genmodels.sampling import default_batch_size

    out = folder / f"samples-{processes.world()}"
    return {
        name: said(sample, folder / "runs" / name, "--seeds", "3-40", "--npz", "--out", out / name) for name in TINY
    } | {
        "bad": failure(lambda: said(sample, folder / "runs" / "flow", "--seeds", "0-9", "--condition", "77")),
        "size": default_batch_size(400),
    }


def evaluation(folder: Path) -> dict[str, Any]:
    """Results of both runs, and of models that refuse or fail on the second batch, which the second process has."""
    from genmodels.evaluation.evaluate import evaluate, main
    from genmodels.evaluation.results import read
    from tests import evaluation_fakes as fakes

    class Refuses(fakes.UniformLevels):
        def sample(self, seeds: Tensor, *, condition: Any = None) -> Tensor:
            if seeds[0] == 50:
                raise NotApplicable("it draws nothing beyond seed 50")
            return super().sample(seeds)

    class Fails(fakes.UniformLevels):
        def sample(self, seeds: Tensor, *, condition: Any = None) -> Tensor:
            return super().sample(seeds)[: 49 if seeds[0] == 50 else 50]

    protocol = fakes.FakeProtocol(
        fakes.Levels(), ["frechet", "bits_per_dim"], sample={"num_items": 200, "batch_size": 50}
    )
    run = fakes.FakeRun(folder / f"refuses-{processes.world()}", Refuses())
    fails = fakes.FakeRun(folder / "fails", Fails())
    words = [folder / "runs" / name for name in TINY] + ["--protocol", folder / "small.yaml"]
    words = said(main, *words, "--device", "cpu")
    return {
        "said": words,
        "results": {name: read(next((folder / "runs" / name).glob("eval/small/*.json"))) for name in TINY},
        "refuses": evaluate(run, protocol, device="cpu"),
        "fails": failure(lambda: evaluate(fails, protocol, device="cpu")),
    }


def split(count: int) -> None:
    """Goes on in `count` processes with the variables that a launcher sets; the one that began ends with their status.

    Once one has failed the others, which may wait for it, are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    os.environ["LOCAL_WORLD_SIZE"] = str(count)
    running, status = set(), 0
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return
        running.add(pid)
    while running:
        pid, ended = os.wait()
        running.discard(pid)
        if ended and not status:
            status = 1
            for other in running:
                os.kill(other, signal.SIGKILL)
    sys.exit(status)


def main() -> None:
    import accelerate.utils  # noqa: F401 - once for all, as the others
    import sklearn.datasets  # noqa: F401
    import torch._dynamo

    from genmodels.evaluation import evaluate  # noqa: F401
    from genmodels.training import loop  # noqa: F401
    from tests import evaluation_fakes, training_fakes  # noqa: F401

    folder, *scenes = sys.argv[1:]
    torch.set_num_threads(1)
    split(2)
    processes.join()
    for scene in scenes:
        outcome = globals()[scene](Path(folder))
        Path(folder, f"{scene}-{processes.rank()}").write_bytes(pickle.dumps(outcome))
    processes.leave()


if __name__ == "__main__":
    main()
