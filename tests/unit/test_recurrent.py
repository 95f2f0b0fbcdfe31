"""Series models: what they may not depend on, and what they compute step by step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genmodels.dynamics.irregular import observed
from genmodels.dynamics.latent_ode import LatentODE
from genmodels.dynamics.ode_rnn import ODERNN, Gated, ODERNNModel
from genmodels.dynamics.recurrent import GRU, GRUModel, Ode
from genmodels.networks.mlp import MLP
from genmodels.registry import ConfigError
from genmodels.rng import generator
from genmodels.solvers.base import Backprop, Fixed
from genmodels.solvers.runge_kutta import RK4, Euler
from genmodels.solvers.step_size import PI
from genmodels.types import Batch
from tests.series import ASKED, CHANNELS, POINTS, irregular, linear


def small(**sizes):
    return MLP((12,), "tanh", **sizes)


MODELS = {
    "gru": lambda **k: GRUModel(8, 9, **k),
    "gru_without_gap": lambda **k: GRUModel(8, 9, gap=False, **k),
    "gru_decay": lambda **k: GRUModel(8, 9, decay=True, **k),
    "ode_rnn": lambda **k: ODERNNModel(small, 8, 9, **k),
    "ode_rnn_rk4": lambda **k: ODERNNModel(small, 8, 9, autonomous=False, solver=RK4(), controller=Fixed(steps=2), **k),
    "latent_ode": lambda **k: LatentODE(lambda **s: small(**s), hidden_ode_rnn, 3, 9, sigma=0.3, **k),
    "latent_ode_gated": lambda **k: LatentODE(
        small, lambda **c: Gated(6, 9, **c), 3, 9, sigma=0.3, autonomous=False, **k
    ),
    "latent_ode_gru": lambda **k: LatentODE(small, lambda **c: GRU(6, decay=True, **c), 3, 9, learn_sigma=True, **k),
}
CAUSAL = [name for name in MODELS if not name.startswith("latent")]


def hidden_ode_rnn(**context):
    return ODERNN(small, 6, 9, **context)


def built(name: str, classes: int | None = None):
    torch.manual_seed(0)
    target = (ASKED, CHANNELS) if classes is None else (classes,)
    model = MODELS[name](precision="float64", shape=(POINTS, CHANNELS), target_shape=target)
    batch = irregular(classes=classes)
    model.prepare([batch], generator=generator("prepare"))
    return model.eval(), batch


def same(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def padded(batch: Batch, extra: int = 3) -> Batch:
    """With points at the end whose time is the last one, not observed, holding rubbish."""
    n = len(batch)
    last = batch.times[:, -1:].expand(-1, extra)
    x = torch.cat((batch.x, torch.full((n, extra, CHANNELS), torch.nan, dtype=batch.x.dtype)), 1)
    mask = torch.cat((batch.mask, torch.zeros(n, extra, CHANNELS, dtype=torch.bool)), 1)
    return batch.replace(x=x, mask=mask, times=torch.cat((batch.times, last), 1))


def split(batch: Batch) -> Batch:
    """With a point where nothing was observed between the third and the fourth."""
    middle = batch.times[:, 2:4].mean(1, keepdim=True)
    parts = {
        "times": (batch.times[:, :3], middle, batch.times[:, 3:]),
        "x": (batch.x[:, :3], torch.full_like(batch.x[:, :1], 5.0), batch.x[:, 3:]),
        "mask": (batch.mask[:, :3], torch.zeros_like(batch.mask[:, :1]), batch.mask[:, 3:]),
    }
    return batch.replace(**{name: torch.cat(part, 1) for name, part in parts.items()})


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow_for("latent_ode_gated-None")
def test_what_was_not_observed_does_not_matter(name, classes):
    model, batch = built(name, classes)
    out = model.predict(batch)
    hidden = batch.replace(x=torch.where(batch.mask, batch.x, torch.nan))
    same(model.predict(hidden), out)
    for changed in (padded(batch), split(batch)):
        model.shape = (changed.x.shape[1], CHANNELS)
        same(model.predict(changed), out)
    model.shape = (POINTS, CHANNELS)
    moved = batch.replace(x=batch.x + 0.3 * batch.mask)
    assert (model.predict(moved) - out).abs().flatten(1).amax(1).min() > 1e-4


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(name, classes):
    model, batch = built(name, classes)
    out = model.predict(batch, seeds=range(10, 16))
    same(model.predict(batch[2:4], seeds=[12, 13]), out[2:4], 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_times_count_in_any_unit_and_from_any_origin(name):
    model, batch = built(name)
    other, _ = built(name)
    minutes = batch.replace(times=60 * batch.times - 7, target_times=60 * batch.target_times - 7)
    other.prepare([minutes], generator=generator("prepare"))
    # a difference of times near 300 is good to 1e-13, and fields amplify it mildly
    same(other.predict(minutes), model.predict(batch), 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_a_prediction_does_not_depend_on_what_else_is_asked(name):
    model, batch = built(name)
    chosen = torch.tensor([1, 1, 3])
    part = batch.replace(target_times=batch.target_times[:, chosen], target=None, target_mask=None)
    # a solve ends at the last time asked for: equal up to 100 of its tolerances, as its field turns fast in time
    dial = {} if name in CAUSAL else {"controller": PI(rtol=1e-6, atol=1e-6)}
    same(model.predict(part, **dial), model.predict(batch, **dial)[:, chosen], 1e-4 if dial else 1e-12)


@pytest.mark.parametrize("name", CAUSAL)
def test_what_comes_later_does_not_matter_for_a_forecast(name):
    model, batch = built(name)
    later = batch.times[..., None] > batch.target_times[:, 2:3, None]
    out, changed = model.predict(batch), model.predict(batch.replace(x=torch.where(later, 7.0, batch.x)))
    same(changed[:, :3], out[:, :3])
    assert (changed[:, 3:] - out[:, 3:]).abs().max() > 1e-3


def test_at_an_observation_the_forecast_is_read_off_the_state_after_it():
    model, batch = built("ode_rnn")
    series = model.series(batch, "test")
    times = series.times * model.scale + model.origin + 1e-9  # just after: times are scaled and back
    out = model.predict(batch.replace(target=None, target_mask=None, target_times=times))
    expected = model.readout(model.encoder.read(series).states[:, 1:])
    same(out, expected, 1e-7)


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_seen_at_a_time_counts_for_the_value_there(name):
    model, batch = built(name)
    asked = batch.replace(mask=None, target=None, target_mask=None, target_times=batch.times)
    moved = asked.x.clone()
    moved[:, 3] += 1
    change = (model.predict(asked.replace(x=moved)) - model.predict(asked)).abs().amax((0, 2))
    assert (change[:3] == 0).all() and (change[3:] > 1e-6).all()


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_trained(name, classes):
    model, batch = built(name, classes)
    loss = model.loss(batch, generator=generator("loss"))
    assert loss.value.shape == (6,)
    loss.value.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_is_the_mean_squared_error_of_what_counts(name):
    model, batch = built(name)
    hidden = batch.replace(target=torch.where(batch.target_mask, batch.target, torch.nan))
    error = (model.predict(batch) - batch.target).square() * batch.target_mask
    same(model.loss(hidden).value, error.sum((1, 2)) / batch.target_mask.sum((1, 2)))


# ---- oracles ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(0, 99))
def test_observations_are_those_of_a_plain_loop(seen, seed):
    seen = [[*row[:4], row[4] or not any(row)] for row in seen]
    g = generator("loop", seed)
    times = torch.rand(len(seen), 5, generator=g, dtype=torch.float64).sort(1).values
    x, mask = torch.randn(len(seen), 5, 1, generator=g), torch.tensor(seen)
    found = observed(Batch(x, times=times, mask=mask), torch.float32, "test")
    for i, row in enumerate(seen):
        places = [k for k in range(5) if row[k]]
        assert found.length[i] == len(places)
        assert torch.equal(found.times[i, : len(places)], times[i, places])
        assert torch.equal(found.x[i, : len(places)], x[i, places])
        assert (found.times[i, len(places) :] == times[i, places[-1]]).all()
        assert not found.mask[i, len(places) :].any() and found.mask[i, : len(places)].all()
        back = found.backwards()
        assert torch.equal(back.x[i, : len(places)], x[i, places[::-1]])
        assert torch.equal(back.times[i, : len(places)], times[i, places[::-1]])
    assert all(torch.equal(a, b) for a, b in zip(found, found.backwards().backwards(), strict=True))


def test_gru_with_decay_is_a_plain_loop():
    torch.manual_seed(0)
    encoder = GRU(4, True, True, channels=CHANNELS).double()
    encoder.fit(torch.tensor([0.5, -1.0]))
    series = observed(irregular(), torch.float64, "test")
    states = encoder.read(series).states
    cell = torch.nn.GRUCell(2 * CHANNELS + 1, 4, dtype=torch.float64)
    for theirs, ours in zip(cell.parameters(), encoder.rnn.parameters(), strict=True):
        theirs.data.copy_(ours)
    for i in range(len(series.x)):
        h, last, when = torch.zeros(4).double(), [None] * CHANNELS, [series.times[i, 0]] * CHANNELS
        for k in range(int(series.length[i])):
            t, gap = series.times[i, k], series.times[i, k] - series.times[i, max(k - 1, 0)]
            filled = series.x[i, k].clone()
            for c in range(CHANNELS):
                if series.mask[i, k, c]:
                    last[c], when[c] = series.x[i, k, c], t
                    continue
                mean, (w, b) = encoder.mean[c], encoder.rates[:, c]
                start = mean if last[c] is None else last[c]
                filled[c] = mean + (start - mean) * torch.exp(-torch.relu(w * (t - when[c]) + b))
            if gap > 0:
                rate = torch.relu(encoder.state_decay.weight[:, 0] * gap + encoder.state_decay.bias)
                h = h * torch.exp(-rate)
            h = cell(torch.cat((filled, series.mask[i, k].double(), gap[None]))[None], h[None])[0]
            same(states[i, k + 1], h)
        same(states[i, -1], h)


def test_gru_without_decay_is_the_cell_step_by_step():
    torch.manual_seed(0)
    encoder, series = GRU(4, channels=CHANNELS).double(), observed(irregular(), torch.float64, "test")
    slow = super(GRU, encoder).read(series).states
    same(encoder.read(series).states, slow)


A = [[-0.5, 2.0], [-1.0, -0.2]]


def test_state_moves_by_the_field_between_observations():
    """A linear field moves μ by e^{A gap}; Euler's method by 1 + A gap; the gates act in between."""
    torch.manual_seed(0)
    encoder = ODERNN(linear(A), 2, 5, channels=CHANNELS).double()
    series = observed(irregular(), torch.float64, "test")
    matrix = encoder.field.network.matrix
    fine = Ode(RK4(), Fixed(steps=40), Backprop())
    for ode, flow, tolerance in (
        (fine, lambda gap: torch.matrix_exp(matrix * gap), 1e-7),  # 40 steps of order 4 over at most 2
        (Ode(Euler(), Fixed(), Backprop()), lambda gap: torch.eye(2).double() + matrix * gap, 1e-12),
    ):
        states = encoder.read(series, ode).states
        inputs = encoder.inputs(series)
        for i in range(len(series.x)):
            h = torch.zeros(1, 4).double()
            for k in range(int(series.length[i])):
                gap = series.times[i, k] - series.times[i, max(k - 1, 0)]
                h = torch.cat((h[:, :2] @ flow(gap).T, h[:, 2:]), 1)
                h = encoder.update(h, inputs[i, k][None])
            same(states[i, -1], h[0], tolerance)


def test_gates_are_those_of_the_paper():
    torch.manual_seed(0)
    cell = Gated(3, 5, False, channels=1).double()
    mean, std, told = torch.randn(1, 3).double(), torch.rand(1, 3).double(), torch.randn(1, 2).double()
    u = torch.sigmoid(cell.keep(torch.cat((mean, std, told), 1)))
    r = torch.sigmoid(cell.reset(torch.cat((mean, std, told), 1)))
    new = cell.propose(torch.cat((r * mean, r * std, told), 1))
    expected = torch.cat(((1 - u) * new[:, :3] + u * mean, (1 - u) * new[:, 3:].abs() + u * std), 1)
    same(cell.update(torch.cat((mean, std), 1), told), expected)


def test_the_dial_of_an_ode_rnn_converges():
    model, batch = built("ode_rnn")
    exact = model.predict(batch, solver=RK4(), controller=Fixed(steps=64))
    errors = [float((model.predict(batch, controller=Fixed(steps=k)) - exact).abs().max().detach()) for k in (1, 4, 16)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # order 1: a factor of 4 each


def test_a_field_that_sees_the_time_sees_that_of_its_row():
    """dμ/dt = t takes μ from t to s by (s² - t²)/2."""
    encoder = ODERNN(small, 1, 9, autonomous=False, solver=RK4(), channels=CHANNELS).double()
    encoder.field.network.forward = lambda t, z, condition=None: t[:, None].expand_as(z)
    t, s = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 0.0]], dtype=torch.float64)
    moved = encoder.carry(torch.zeros(3, 2, dtype=torch.float64), t, s, None).h
    same(moved[:, 0], (s.square() - t.square()) / 2)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gru", "ode_rnn", "latent_ode"])
def test_bad_series_are_named(name):
    model, batch = built(name)
    nothing = batch.mask.clone()
    nothing[4] = False
    swapped = batch.times.clone()
    swapped[2, 3] = swapped[2, 5] + 1
    early = batch.target_times.flip(1)
    broken = batch.x.clone()
    broken[0, 0, 0] = torch.inf
    cases = (
        ("item 4 of the batch has no observation", batch.replace(mask=nothing)),
        ("item 2 of the batch has times that decrease", batch.replace(times=swapped)),
        ("item 0 of the batch has target_times that decrease", batch.replace(target_times=early)),
        ("item 0 of the batch has an observed value that is NaN", batch.replace(x=broken)),
        ("needs times", batch.replace(times=None)),
        ("needs target_times", batch.replace(target_times=None) if name != "latent_ode" else None),
        ("loss: the batch has no target", batch.replace(target=None)),
        ("mask has shape", batch.replace(mask=batch.mask[:, 1:])),
        ("target has shape", batch.replace(target=batch.target[:, 1:])),
        ("x has 7 points, but times has 6", batch.replace(times=batch.times[:, 1:])),
        ("built for", batch.replace(x=batch.x[..., :1])),
    )
    for message, bad in cases:
        if bad is not None:
            with pytest.raises(ValueError, match=message):
                model.loss(bad)


def test_labels_out_of_range_and_bad_sizes_are_named():
    model, batch = built("gru", 3)
    with pytest.raises(ValueError, match="item 1 of the batch has a label outside 0 … 2"):
        model.loss(batch.replace(target=torch.tensor([0, 5, 1, 1, 1, 1])))
    with pytest.raises(ValueError, match="class labels"):
        model.loss(batch.replace(target=batch.x))
    with pytest.raises(ConfigError, match="hidden must be above 0"):
        GRUModel(0, shape=(3, 1), target_shape=(2,))
    with pytest.raises(ConfigError, match="must be series"):
        GRUModel(shape=(3,), target_shape=(2,))
    with pytest.raises(ConfigError, match="time_scale must be above 0"):
        ODERNNModel(time_scale=0.0, shape=(3, 1), target_shape=(2,))
