"""Neural ODEs with linear fields, whose states are known at every time; their readouts, losses and dials."""

import pytest
import torch
from torch import Tensor, nn

from genmodels.dynamics import ode
from genmodels.dynamics.ode import NeuralODE
from genmodels.dynamics.regularization import Evolved
from genmodels.model import Model
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import generator
from genmodels.solvers.base import Fixed, Solver
from genmodels.solvers.step_size import PI
from genmodels.transforms import Identity, Transform
from genmodels.types import Batch

A = torch.tensor([[-0.3, 2.0], [-1.0, 0.1]], dtype=torch.float64)
LINEAR = {"name": "concat_mlp", "hidden": [], "time": "none"}
FIELD = {"name": "concat_mlp", "hidden": [8]}
TIGHT = {"name": "pi", "rtol": 1e-9, "atol": 1e-9}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("ode", seed))


def make(shape=(2,), target_shape=(3,), transform=None, precision="float64", network=LINEAR, **arguments) -> NeuralODE:
    tree = {"name": "neural_ode", "network": network, "controller": TIGHT, "precision": precision, **arguments}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        node = resolve(Model, tree, "test")
        return build(Model, node, shape=shape, target_shape=target_shape, transform=transform or Identity()).eval()


def linear(model: NeuralODE) -> NeuralODE:
    """With the field A z."""
    with torch.no_grad():
        model.network.head.weight.copy_(A)
        model.network.head.bias.zero_()
    return model


def flow(t: float) -> Tensor:
    return torch.linalg.matrix_exp(t * A).T


def test_predictions_are_the_head_of_the_end():
    model, x = linear(make(end=0.8)), randn(5, 2)
    torch.testing.assert_close(model.predict(Batch(x)), model.head(x @ flow(0.8)), rtol=0, atol=1e-7)
    torch.testing.assert_close(model.velocity(torch.tensor(0.3), x), x @ A.T)


def test_the_state_starts_in_model_space_after_the_encoder_with_zeros_behind_it():
    affine = build(Transform, {"name": "affine", "loc": 3.0, "scale": 2.0})
    encoder = {"name": "concat_mlp", "hidden": [4], "time": "none"}
    plain = make((2,), transform=affine, augment=2)
    encoded = make((2,), transform=affine, encoder=encoder, latent=[3], augment=2, network=FIELD)
    x = randn(5, 2)
    inside = (x - 3) / 2
    torch.testing.assert_close(plain._start(Batch(x), None), torch.cat((inside, torch.zeros(5, 2)), 1))
    start = encoded._start(Batch(x), None)
    torch.testing.assert_close(start[:, :3], encoded.encoder(None, inside))
    assert start.shape == (5, 5) and not start[:, 3:].any() and encoded.predict(Batch(x)).shape == (5, 3)
    images = make((3, 4, 4), network={"name": "concat_conv", "hidden": [6]}, augment=5)
    start = images._start(Batch(randn(2, 3, 4, 4)), None)
    assert start.shape == (2, 8, 4, 4) and images.state_shape == (8, 4, 4) and not start[:, 3:].any()


def test_added_components_let_lines_cross():
    """On a line the flow keeps the order of points, whatever its field; with one more component it need not."""
    x = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    for seed in range(5):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make((1,), (1,), network=FIELD, head="none")
        z = model.predict(Batch(x))[:, 0]
        assert (z.diff() > 0).all()
    wide = make((1,), (2,), network=LINEAR, head="none", augment=1, end=torch.pi)
    with torch.no_grad():  # a half turn
        wide.network.head.weight.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        wide.network.head.bias.zero_()
    torch.testing.assert_close(wide.predict(Batch(x))[:, 0], -x[:, 0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("shared", [True, False, "from the start"])
def test_a_path_is_read_at_the_times_that_are_asked_for(shared):
    model = linear(make((1, 2), (4, 2), readout="path", head="none"))
    x, start = randn(3, 1, 2), torch.tensor([[0.5]], dtype=torch.float64).expand(3, 1)
    asked = torch.tensor([[0.7, 0.9, 1.5, 2.0]], dtype=torch.float64).repeat(3, 1)
    if shared == "from the start":  # the first target is the state itself
        asked[:, 0] = 0.5
    if not shared:
        asked[1] += 0.25
        asked[2, 3] = asked[2, 2]  # padding
    batch = Batch(x, times=start, target_times=asked, target=randn(3, 4, 2, seed=1))
    expected = torch.stack([torch.cat([x[i] @ flow(t - 0.5) for t in asked[i].tolist()]) for i in range(3)])
    found = model.predict(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    loss = model.loss(batch)
    torch.testing.assert_close(loss.value, (expected - batch.target).square().mean((1, 2)), rtol=0, atol=1e-6)
    mask = torch.rand(3, 4, 2, generator=generator("mask")) < 0.5
    hidden = batch.replace(target=torch.where(mask, batch.target, torch.nan), target_mask=mask)
    masked = ((expected - batch.target).square() * mask).sum((1, 2)) / mask.sum((1, 2))
    torch.testing.assert_close(model.loss(hidden).value, masked, rtol=0, atol=1e-6)
    whole = batch.replace(target_mask=mask[..., 0])  # of all channels at once
    masked = (expected - batch.target).square().mean(2).mul(mask[..., 0]).sum(1) / mask[..., 0].sum(1)
    torch.testing.assert_close(model.loss(whole).value, masked, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="target_times"):
        model.predict(batch.replace(target_times=None))


def test_losses_are_cross_entropies_or_squared_errors_of_items():
    model, x = linear(make()), randn(5, 2)
    logits, labels = model.predict(Batch(x)), torch.tensor([0, 2, 1, 1, 0])
    loss = model.loss(Batch(x, target=labels))
    torch.testing.assert_close(loss.value, -logits.log_softmax(1)[torch.arange(5), labels])
    assert float(loss.logs["accuracy"]) == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert loss.logs["nfe"] >= 8 and not loss.logs["cross_entropy"].requires_grad
    values = randn(5, 3, seed=2)
    torch.testing.assert_close(model.loss(Batch(x, target=values)).value, (logits - values).square().mean(1))
    with pytest.raises(ValueError, match="targets of shape"):
        model.loss(Batch(x, target=values[:, :2]))
    with pytest.raises(ValueError, match="no target"):
        model.loss(Batch(x))


def test_rows_of_an_answer_do_not_see_each_other_though_training_has_one_clock():
    model = make(network=FIELD, controller={"name": "pi", "rtol": 1e-3, "atol": 1e-3, "norm": "batch"})
    x = randn(6, 2)
    x[0] *= 30
    whole = model.predict(Batch(x))
    torch.testing.assert_close(whole[1:], model.predict(Batch(x[1:])), rtol=0, atol=1e-13)
    batch = Batch(x, target=torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(model.loss(batch).value[1:], model.loss(batch[1:]).value, rtol=0, atol=1e-13)
    clocked = model.train().loss(batch).value
    assert (clocked[1:] - model.loss(batch[1:]).value).abs().max() > 1e-9
    assert model.controller.norm == "batch" and model.controller.by_row().norm == "row"
    assert model.controller.by_row().rtol == 1e-3 and Fixed(3).by_row().steps == 3


def test_the_dial_of_predictions():
    model, x = linear(make()), randn(5, 2)
    euler = model.predict(Batch(x), solver=build(Solver, "euler"), controller=Fixed(2))
    step = torch.eye(2, dtype=torch.float64) + 0.5 * A.T
    torch.testing.assert_close(euler, model.head(x @ step @ step))
    coarse = model.predict(Batch(x), controller=PI(1e-2, 1e-2))
    assert 1e-6 < (coarse - model.predict(Batch(x))).abs().max() < 0.1


def test_penalties_are_added_in_training_alone(monkeypatch):
    model, given = make(regularizers=()), []
    batch = Batch(randn(4, 2), target=torch.tensor([0, 1, 2, 0]))
    evolve = ode.evolve

    def charging(*args, regularizers=(), progress=1.0, noise=None, **options):
        given.append((regularizers, progress, noise is not None))
        found = evolve(*args, **options)
        return Evolved(found.solution, found.penalty + 0.5 * len(regularizers), found.logs | {"charge": found.penalty})

    monkeypatch.setattr(ode, "evolve", charging)
    model.regularizers, model.progress = ("a regularizer",), 0.25
    free = model.eval().loss(batch).value
    charged = model.train().loss(batch)
    assert given == [((), 1.0, False), (("a regularizer",), 0.25, True)] and "charge" in charged.logs
    torch.testing.assert_close(charged.value, free + 0.5)


def test_precision_is_that_of_the_whole_model():
    x = randn(3, 2).float()
    assert make(precision="float64").predict(Batch(x)).dtype == torch.float64
    narrow = make(precision="float32", controller={"name": "pi", "rtol": 1e-5, "atol": 1e-5})
    assert narrow.predict(Batch(x.double())).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"target_shape": None}, "Set data.task"),
        ({"readout": "path"}, "readout: path for series"),
        ({"augment": -1}, "augment >= 0"),
        ({"end": 0.0}, "end > 0"),
        ({"latent": [3]}, "`latent` only with an encoder"),
        ({"head": "none"}, "Use head: linear"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        make(**arguments)


def test_a_few_steps_of_training_tell_a_disc_from_a_ring():
    model = make((2,), (2,), precision="float32", network=FIELD, controller={"name": "pi", "norm": "batch"}).train()
    angle, label = randn(256).float() * 7, torch.arange(256) % 2
    radius = torch.where(label == 0, 0.4, 1.2)
    batch = Batch(torch.stack((radius * angle.cos(), radius * angle.sin()), 1), target=label)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(batch, generator=generator("loss"))
        loss.value.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    assert loss.logs["accuracy"] > 0.9
