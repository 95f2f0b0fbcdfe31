"""Neural SDEs: laws against exact ones, what a prediction depends on, regularizers' access, and mistakes."""

import math

import pytest
import torch

from genmodels.dynamics.sde import NeuralSDE, NeuralSDEForecast, distinct
from genmodels.model import Model
from genmodels.registry import ConfigError, build
from genmodels.rng import BatchNoise, generator
from genmodels.solvers.base import Fixed, Solver
from genmodels.solvers.step_size import PI
from genmodels.transforms import Identity
from genmodels.types import Batch

TANH = {"name": "mlp", "hidden": [8], "activation": "tanh"}
STEPS = {"name": "fixed", "steps": 8}


def classifier(**arguments: object) -> NeuralSDE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        node = {"name": "neural_sde", "controller": STEPS, "drift": TANH, "hidden": 4, "precision": "float64"}
        facts = {"shape": (2,), "target_shape": (3,), "transform": Identity(), "num_classes": None}
        return build(Model, {**node, **arguments}, **facts, condition_shape=None, bin_width=None)


def forecaster(**arguments: object) -> NeuralSDEForecast:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        node = {"name": "neural_sde_forecast", "controller": STEPS, "drift": TANH, "precision": "float64"}
        facts = {"shape": (1, 2), "target_shape": (3, 2), "num_classes": None, "condition_shape": None}
        return build(Model, {**node, **arguments}, **facts)


def points(n: int = 6) -> Batch:
    return Batch(BatchNoise(n, generator=generator("points")).normal(2), target=torch.arange(n) % 3)


def paths(n: int = 400, seed: int = 0) -> Batch:
    """Paths of dx = -x dt + 0.5 dW from (1, -1), in exact steps, at 0, 0.5 and 1."""
    noise, x, out = BatchNoise(n, generator=generator("paths", seed)), torch.tensor([1.0, -1.0]).repeat(n, 1), []
    for k in range(3):
        if k:
            x = x * math.exp(-0.5) + math.sqrt(0.125 * -math.expm1(-1.0)) * noise.normal(2)
        out.append(x)
    times = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).repeat(n, 1)
    start = {"x": torch.tensor([[1.0, -1.0]]).repeat(n, 1, 1), "times": times[:, :1]}
    return Batch(**start, target=torch.stack(out, 1), target_times=times)


def ornstein_uhlenbeck(model: NeuralSDEForecast, sigma: float = 0.5) -> NeuralSDEForecast:
    """The model with the true equation in it."""
    model.equation.f = lambda t, z: -z
    torch.nn.init.zeros_(model.equation.diffusion.weight)
    torch.nn.init.constant_(model.equation.diffusion.bias, sigma)
    return model


# ---- classification --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", [STEPS, {"name": "pi", "rtol": 0.05, "atol": 0.05, "norm": "batch"}])
def test_a_prediction_depends_on_its_seed_alone(controller):
    model, batch = classifier(controller=controller), points()
    whole = model.predict(batch, seeds=[3, 1, 4, 15, 9, 2], paths=4)
    alone = model.predict(batch[2:3], seeds=[4], paths=4)
    torch.testing.assert_close(alone[0], whole[2], rtol=1e-9, atol=1e-9)
    assert (model.predict(batch, seeds=[3, 1, 5, 15, 9, 2], paths=4)[2] - whole[2]).abs().max() > 1e-4
    torch.testing.assert_close(model.predict(batch), model.predict(batch, seeds=range(6), paths=10), rtol=0, atol=0)


def test_a_prediction_is_the_mean_over_paths():
    model, batch = classifier(), points()
    # logits are linear in z(1): many paths come near the mean of few for many seeds, by the law of large numbers
    many = model.predict(batch[:1], seeds=[0], paths=2000)
    others = model.predict(batch[torch.zeros(2000, dtype=torch.int64)], seeds=range(1, 2001), paths=1)
    assert ((many[0] - others.mean(0)).abs() < 4 * others.std(0) * math.sqrt(2 / 2000)).all()


@torch.no_grad()
def test_steps_and_solver_are_the_dial_of_a_prediction():
    model, batch = classifier(solver="sriw1"), points(3)
    exact = model.predict(batch, paths=4, controller=Fixed(128))
    errors = [float((model.predict(batch, paths=4, controller=Fixed(n)) - exact).abs().max()) for n in (32, 4)]
    assert errors[0] < errors[1] / 3, "all see the same paths"
    other = model.predict(batch, paths=4, solver=build(Solver, "euler_maruyama"), controller=Fixed(32))
    assert 1e-6 < float((other - exact).abs().max()) < 0.3


def test_the_loss_is_a_cross_entropy_on_one_path_and_learns():
    model, batch = classifier(precision="float32", controller="fixed", solver="milstein"), points(60)
    batch = batch.replace(target=(batch.x[:, 0] > 0).long())
    optimizer, g = torch.optim.Adam(model.parameters(), lr=0.05), generator("train")
    first = model.loss(batch, generator=generator("first"))
    assert set(first.logs) >= {"nfe", "cross_entropy", "accuracy"} and first.value.shape == (60,)
    again = model.loss(batch, generator=generator("first"))
    torch.testing.assert_close(first.value, again.value)
    assert not torch.equal(first.value, model.loss(batch, generator=generator("second")).value)
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(batch, generator=g).value.mean().backward()
        optimizer.step()
    with torch.no_grad():
        last = model.loss(batch, generator=generator("first")).value
    assert last.mean() < 0.6 * first.value.mean()


def test_both_calculi_and_time():
    model = classifier(calculus="stratonovich", solver="stochastic_heun", time_dependent=True, diffusion=TANH)
    assert model.loss(points(), generator=generator("loss")).value.isfinite().all()
    with pytest.raises(ConfigError, match=r"model.solver: 'sosri2' needs an SDE.*stratonovich calculus.*milstein"):
        classifier(calculus="stratonovich")
    with pytest.raises(ConfigError, match=r"model.solver: 'tsit5' needs a VectorField.*Use one of: euler_maruyama"):
        classifier(solver="tsit5")


def test_mistakes_of_classification_are_named():
    with pytest.raises(ConfigError, match=r"classes as target.*found target_shape \[3, 2\]"):
        build(
            Model,
            {"name": "neural_sde", "controller": STEPS},
            shape=(2,),
            target_shape=(3, 2),
            transform=Identity(),
        )
    model, batch = classifier(), points()
    with pytest.raises(ValueError, match="one class label"):
        model.loss(batch.replace(target=None))
    with pytest.raises(ValueError, match="one seed per item is needed, found 2 for 6 items"):
        model.predict(batch, seeds=[1, 2])
    with pytest.raises(ValueError, match="paths must be at least 1, found 0"):
        model.predict(batch, paths=0)


# ---- forecasts -------------------------------------------------------------------------------------------------------


def test_the_law_of_a_forecast_is_that_of_the_equation():
    model, batch = ornstein_uhlenbeck(forecaster()), paths(2)
    law = model.predict(batch, seeds=[5, 6], paths=2000, controller=PI(rtol=0.1, atol=0.1)).detach()
    mean, variance = law[..., 0], (2 * law[..., 1]).exp()
    for k, t in enumerate((0.0, 0.5, 1.0)):
        exact = 0.125 * -math.expm1(-2 * t)
        wanted = torch.tensor([1.0, -1.0]).double() * math.exp(-t)
        assert (mean[:, k] - wanted).abs().max() < 4 * math.sqrt(exact / 2000) + 2e-3
        assert (variance[:, k] - exact).abs().max() < 4 * exact * math.sqrt(2 / 2000) + 2e-3
    assert law.isfinite().all(), "also at the start, where all paths agree"
    assert model.predict(batch, paths=1).isfinite().all(), "one path is a law without spread"
    two = [model.predict(batch, seeds=[5, 6], paths=k).detach() for k in (1, 2)]
    spread = (two[1][..., 0] - two[0][..., 0]).square()  # of two paths, the mean is as far from one as the deviation
    torch.testing.assert_close((2 * two[1][..., 1]).exp(), spread, rtol=1e-6, atol=1e-12)
    alone = model.predict(batch[1:], seeds=[6], paths=7)
    torch.testing.assert_close(model.predict(batch, seeds=[5, 6], paths=7)[1:], alone, rtol=1e-9, atol=1e-9)


def test_the_loss_compares_moments_with_those_of_the_whole_training_split():
    data, model = paths(4000), ornstein_uhlenbeck(forecaster())
    model.prepare([data[:1500], data[1500:]], generator=generator("prepare"))
    torch.testing.assert_close(model.data_mean, data.target.double().mean(0))
    torch.testing.assert_close(model.data_variance, data.target.double().var(0))
    right = [float(model.loss(data[:500], generator=generator("loss", k)).value) for k in range(5)]
    # E (m̂ - m)² + (v̂ - v)²: v/n + 2v²/n of the model's paths, and an eighth of it of the data's
    variances = torch.tensor([0.125 * -math.expm1(-2 * t) for t in (0.0, 0.5, 1.0)])
    floor = float((variances + 2 * variances.square()).mean() * (1 / 500 + 1 / 4000))
    assert sum(right) / 5 == pytest.approx(floor, rel=0.6)
    wrong = ornstein_uhlenbeck(model, 0.9).loss(data[:500], generator=generator("loss"))
    gap = torch.tensor([(0.81 - 0.25) / 2 * -math.expm1(-2 * t) for t in (0.0, 0.5, 1.0)]).square().mean()
    assert float(wrong.logs["variances"]) == pytest.approx(float(gap), rel=0.3)
    torch.testing.assert_close(wrong.value.detach(), wrong.logs["means"] + wrong.logs["variances"])
    assert wrong.value.shape == ()


def test_rows_may_be_asked_for_at_times_of_their_own():
    grid = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.5, 1.0]], dtype=torch.float64)
    times, places = distinct(grid)
    assert times.tolist() == [0.0, 0.5, 1.0] and places.tolist() == [0, 0, 1, 2]
    grid[1, 2] = 0.7
    times, places = distinct(grid)
    assert torch.equal(times, grid.T) and places.tolist() == [0, 1, 2, 3]
    model, batch = ornstein_uhlenbeck(forecaster()), paths(2)
    batch = batch.replace(target_times=grid[:, 1:])
    whole = model.predict(batch, seeds=[5, 6], paths=3)
    alone = model.predict(batch[1:], seeds=[6], paths=3)
    torch.testing.assert_close(whole[1:], alone, rtol=1e-9, atol=1e-9)


def test_mistakes_of_forecasts_are_named():
    with pytest.raises(ConfigError, match=r"shape \[1, C\].*found \[4, 2\] and \[3, 2\]"):
        build(Model, {"name": "neural_sde_forecast", "controller": STEPS}, shape=(4, 2), target_shape=(3, 2))
    model, batch = forecaster(), paths(20)
    with pytest.raises(ValueError, match="Call prepare first"):
        model.loss(batch)
    with pytest.raises(ValueError, match="items must share their start"):
        model.prepare([batch, batch.replace(x=batch.x + 1)], generator=generator("prepare"))
    with pytest.raises(ValueError, match="at least two observations"):
        model.prepare([batch[:1]], generator=generator("prepare"))
    model.prepare([batch], generator=generator("prepare"))
    with pytest.raises(ValueError, match="at least two items"):
        model.loss(batch[:1])
    with pytest.raises(ValueError, match=r"needs target_times \[20, M\]"):
        model.loss(batch.replace(target_times=None))
