"""Regularizers of the ODE between noise and data of a diffusion model."""

import pytest
import torch

from genmodels.dynamics.regularization import evolve
from genmodels.model import Model
from genmodels.networks.network import set_compile
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import BatchNoise, SeedNoise, generator
from genmodels.solvers.base import integrate
from genmodels.solvers.runge_kutta import Tsit5
from genmodels.solvers.step_size import PI
from genmodels.transforms import Identity
from genmodels.types import Batch
from tests.oracles import MIXTURE


def make(hidden=8, num_classes=None, seed=0, **node):
    network = {"name": "residual_mlp", "hidden": hidden, "blocks": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(
            Model, resolve(Model, {"name": "diffusion", "network": network, **node}, "test"), shape=(2,),
            num_classes=num_classes, condition_shape=None, transform=Identity(), bin_width=None,
        )  # fmt: skip


REGULARIZERS = [
    {"name": "error_estimate", "per_step": "steps", "coefficient": 2.0},
    {"name": "stiffness", "coefficient": 2.0},
    {"name": "local", "coefficient": 2.0},
    {"name": "kinetic_jacobian", "coefficient": 2.0},
    {"name": "taylor", "coefficient": 2.0},
]


@pytest.mark.parametrize("node", REGULARIZERS, ids=lambda n: n["name"])
def test_the_mean_penalty_is_added_to_the_loss_of_every_item_in_training_alone(node):
    plain, model = (make(num_classes=3, regularizers=r, regularized_items=5) for r in ([], [node]))
    batch = Batch(torch.randn(9, 2, generator=generator("x")), condition=torch.arange(9) % 3)
    bare, loss = (m.train().loss(batch, generator=generator("loss")) for m in (plain, model))
    added = (loss.value - bare.value).detach()
    expected = 2.0 * loss.logs[node["name"]].float()
    assert expected > 0
    torch.testing.assert_close(added, expected.expand(9), rtol=1e-4, atol=1e-5)
    loss.value.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    still = model.eval().loss(batch, generator=generator("loss"))
    torch.testing.assert_close(still.value, bare.value, rtol=0, atol=0)
    assert set(still.logs) == {"squared_error"}


def test_the_solve_that_is_charged_goes_from_noise_to_data(monkeypatch):
    given = []

    def seen(field, x, times, **options):
        given.append((x, times))
        return evolve(field, x, times, **options)

    monkeypatch.setattr("genmodels.diffusion.model.evolve", seen)
    edm = {"schedule": "edm", "prediction": "edm", "times": "log_normal", "sigma_data": 1.0}
    model = make(regularizers=["local"], regularized_items=500, **edm).train()
    model.loss(Batch(torch.randn(500, 2, generator=generator("x"))), generator=generator("loss"))
    ((x, times),) = given
    assert times[0] == model.denoiser.t_max and times[-1] == model.denoiser.t_min and len(x) == 500
    assert float(x.std()) == pytest.approx(float(model.prior_scale()), rel=0.1) and float(x.std()) > 10


def test_networks_that_a_penalty_differentiates_are_not_compiled():
    for name, twice in (("taylor", True), ("kinetic_jacobian", True), ("local", False)):
        model = make(regularizers=[name])
        assert model.differentiates_twice is twice
        if twice:
            with pytest.raises(ConfigError, match="differentiates its network"):
                set_compile(model)


def test_no_items_are_refused():
    with pytest.raises(ConfigError, match="regularized_items: at least 1 is needed, found 0"):
        make(regularized_items=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "node",
    [
        {"name": "error_estimate", "per_step": "steps", "coefficient": 0.1},
        {"name": "local", "quantity": "steps", "pick": "step", "coefficient": 0.1},
    ],
    ids=lambda n: n["name"],
)
def test_regularized_flow_matching_draws_with_fewer_evaluations(node):
    """At one tolerance, at least a fifth fewer; the squared error of the velocity stays within two per cent."""
    costs, errors = [], []
    for regularizers in ([], [node]):
        model = make(64, seed=1, regularizers=regularizers).train()
        optimizer, g = torch.optim.Adam(model.parameters(), lr=2e-3), generator("training")
        for step in range(400):
            model.progress = step / 400
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
            batch = Batch(MIXTURE.sample(BatchNoise(256, generator=g)).float())
            optimizer.zero_grad()
            model.loss(batch, generator=g).value.mean().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            start, ends = SeedNoise(256).normal(2), torch.tensor([1.0, 0.0], dtype=torch.float64)
            solved = integrate(model.denoiser, start, ends, solver=Tsit5(), controller=PI(rtol=1e-4, atol=1e-4))
            fresh = Batch(MIXTURE.sample(BatchNoise(20_000, generator=generator("test"))).float())
            errors.append(float(model.loss(fresh, generator=generator("loss")).value.mean()))
        costs.append(float(solved.nfe.double().mean()))
    assert costs[1] < 0.8 * costs[0]
    assert errors[1] < 1.02 * errors[0]
