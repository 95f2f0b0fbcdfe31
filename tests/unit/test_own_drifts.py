"""Diffusions of a user's own drift: from a function, from a class named in a configuration, and what is refused."""

import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from genmodels.config import Config
from genmodels.model import Model
from genmodels.networks.mlp import MLP
from genmodels.processes.clocks import Constant
from genmodels.processes.local_dsm import LocalDSM
from genmodels.processes.local_kernels import local_kernel
from genmodels.processes.process import GivenProcess, Process
from genmodels.registry import build
from genmodels.schema import MEMBERS
from genmodels.transforms import Identity
from genmodels.types import Batch

FACTS = {"num_classes": None, "condition_shape": None, "bin_width": None}
CODE = '''
import torch
from genmodels.processes.clocks import Clock, Constant
from genmodels.processes.process import Process
from genmodels.registry import register

@register(Process, "my_swirl")
class Swirl(Process):
    """A pull to the circle of radius 1 while it turns."""

    def __init__(self, turn: float = 0.5, clock: Clock = Constant(), *, shape: tuple[int, ...]) -> None:
        super().__init__(clock, shape=shape)
        self.turn = turn

    def force(self, u, y):
        return swirl(u, y, self.turn)

def swirl(u, y, turn):
    return y * (1 - y.square().sum(1, keepdim=True)) + turn * torch.stack((-y[:, 1], y[:, 0]), 1)
'''


def points(n: int) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def made(force, amplitude=0.5, increment: float | None = None, **options) -> LocalDSM:
    process = partial(GivenProcess, force, amplitude, clock=Constant(2.0), **options)
    network = partial(MLP, hidden=(4,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = {"increment": increment, "simulation_steps": 2, "shape": (2,), "transform": Identity(), **FACTS}
        return LocalDSM(network, process, **given).double()


def test_a_drift_is_named_in_a_configuration_after_imports(tmp_path, monkeypatch):
    (tmp_path / "my_drifts.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = dict(MEMBERS[Process])
    try:
        node = {"name": "local_dsm", "network": {"name": "mlp", "hidden": [4]}, "simulation_steps": 2}
        node |= {"process": {"name": "my_swirl", "turn": 0.3, "clock": {"name": "constant", "total": 2.0}}}
        tree = {"name": "try", "imports": ["my_drifts"], "data": "eight_gaussians", "model": node}
        found = Config(tree).tree["model"]
        model = build(Model, found, shape=(2,), transform=Identity(), **FACTS).double()
        swirl = sys.modules["my_drifts"].swirl
        other = GivenProcess(lambda u, y: swirl(u, y, 0.3), shape=(2,), clock=Constant(2.0))
        x, u = points(5), torch.linspace(0.1, 1.5, 5).double()
        one, two = (local_kernel(p, u, u + 0.02, x) for p in (model.process, other))
        torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=0)
        torch.testing.assert_close(one.covariance, two.covariance, rtol=0, atol=0)
        # ∂F/∂y and ½ ΔF by hand
        square = x.square().sum(1)[:, None, None]
        turn = 0.3 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
        exact = (1 - square) * torch.eye(2).double() - 2 * x[:, :, None] * x[:, None] + turn
        torch.testing.assert_close(model.process.jacobian(u, x), exact)
        torch.testing.assert_close(model.process.ito(u, x), -4 * x)
        assert found["process"]["turn"] == 0.3
        prepared = model.prepare([Batch(points(200))], generator=torch.Generator().manual_seed(0))
        assert 0 < prepared["increment"] < 0.2 and prepared["defect"] < 0.0201
    finally:
        MEMBERS[Process].clear()
        MEMBERS[Process].update(kept)
        sys.modules.pop("my_drifts", None)


def test_drifts_that_cannot_be_are_refused_in_training():
    g, batch = torch.Generator().manual_seed(0), Batch(points(8))
    for force, message in (
        (lambda u, y: y[:, :1], r"turned a state of shape \[8, 2\] into \[8, 1\]"),
        (lambda u, y: y.sum(), r"turned a state of shape \[8, 2\] into \[\]"),
        (lambda u, y: [y], r"turned a state of shape \[8, 2\] into list"),
        (lambda u, y: (y - 10).log(), r"not finite at u = 0, where the state has entries up to"),
        (lambda u, y: y / 0.0, "not finite at u = 0"),
    ):
        model = made(force, increment=0.05)
        with pytest.raises(ValueError, match=message):
            model.prepare([batch], generator=g)
        with pytest.raises(ValueError, match=message):
            model.loss(batch, generator=g)


def test_noise_that_cannot_be_is_refused():
    """Q = G Gᵀ is semidefinite by construction; what is left to be wrong is G."""
    nan = float("nan")
    for amplitude, options, message in (
        (-0.5, {}, "number > 0"),
        (nan, {}, "number > 0"),
        (torch.tensor([0.5, 0.1]), {}, r"found \[0\.5, 0\.1.*diagonal matrix"),
        (torch.tensor([0.5, 0.1]), {"structure": "elementwise"}, "structure is elementwise"),
        (torch.eye(3), {}, "matrix of 2 rows"),
        (torch.eye(2), {"structure": "elementwise"}, "structure is elementwise"),
        (torch.tensor([[1.0, 0.0], [0.0, nan]]), {}, "finite matrix of 2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            made(lambda u, y: -y, amplitude, **options)

    class Own(Process):
        structure = "elementwise"

        def force(self, u: Tensor, y: Tensor) -> Tensor:
            return -y

        def amplitude(self, u: Tensor) -> Tensor:
            return torch.tensor([1.0, 2.0])  # of each component, which would be taken for one of each row

    with pytest.raises(ValueError, match="amplitude of Own must be a finite number at every u"):
        LocalDSM(partial(MLP, hidden=(4,)), partial(Own, Constant()), shape=(2,), transform=Identity(), **FACTS)
    idle = made(lambda u, y: -y, torch.tensor([[1.0], [0.0]]), increment=0.05)  # noise that nothing spreads
    with pytest.raises(ValueError, match="noise does not reach every coordinate"):
        idle.loss(Batch(points(4)), generator=torch.Generator().manual_seed(0))


def test_times_of_own_drifts_are_times():
    model, x = made(lambda u, y: -y), points(3)
    for ask in (model.score, model.velocity):
        for t, message in (
            (torch.tensor(1), r"found torch\.int64.*Step k of T"),
            (torch.tensor([0, 1, 500]), r"found torch\.int64"),
            (torch.tensor([0.1, 0.2, 1.1]), "0 <= t <= 1 is needed, found t = 1.1"),
            (torch.tensor([0.1, -0.2, 0.9]), "0 <= t <= 1 is needed, found t = -0.2"),
            (torch.tensor(float("nan")), "found t = nan"),
        ):
            with pytest.raises(ValueError, match=message):
                ask(t, x)
    torch.testing.assert_close(model.score(torch.tensor(1.0), x), model.score(1.0, x))
    torch.testing.assert_close(model.process.drift(0.5, x), -2 * x)
    with pytest.raises(ValueError, match=r"found torch\.int64"):
        model.process.drift(torch.tensor(1), x)
