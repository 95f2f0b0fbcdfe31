"""Latent ODEs against closed forms: trajectories, evidence, predictive laws, schedules."""

import math
import types

import pytest
import torch
from torch import Tensor

from genmodels.dynamics.latent_ode import LatentODE, Posterior
from genmodels.dynamics.ode_rnn import ODERNN
from genmodels.dynamics.recurrent import GRU, Ode
from genmodels.networks.mlp import MLP
from genmodels.registry import ConfigError
from genmodels.rng import generator
from genmodels.solvers.adjoint import Adjoint, Interpolated
from genmodels.solvers.base import Backprop, Fixed
from genmodels.solvers.checkpoint import Checkpoint
from genmodels.solvers.runge_kutta import RK4, Tsit5
from genmodels.solvers.step_size import PI
from genmodels.types import Batch
from tests.series import ASKED, CHANNELS, POINTS, irregular, linear

A = [[-0.4, 3.0], [-2.0, 0.1]]
C = [[1.0, 0.5], [-0.3, 2.0]]
TIGHT = Ode(Tsit5(), PI(rtol=1e-10, atol=1e-10), Backprop())
SIGMA = 0.4


def built(a: list = A, c: list = C, *, prepared: bool = True, **arguments) -> tuple[LatentODE, Batch]:
    """A latent ODE with the field A z and the readout C z, in float64, and a batch of irregular series."""
    torch.manual_seed(0)
    arguments = {"sigma": SIGMA, "controller": PI(rtol=1e-9, atol=1e-9), **arguments}
    model = LatentODE(
        linear(a),
        lambda **context: GRU(5, **context),
        len(a),
        7,
        linear(c),
        precision="float64",
        shape=(POINTS, len(c)),
        target_shape=(ASKED, len(c)),
        **arguments,
    )
    batch = irregular(channels=len(c))
    if prepared:
        model.prepare([batch], generator=generator("prepare"))
    return model.eval(), batch


def same(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def flows(model: LatentODE, times: Tensor) -> Tensor:
    """[B, M, C, latent] C e^{A t} at times [B, M] of the model's clock."""
    return model.decoder.matrix @ torch.matrix_exp(model.field.network.matrix * times[..., None, None])


# ---- trajectories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolate", [True, False])
def test_decoded_trajectories_are_the_analytic_ones_at_times_of_each_item(interpolate):
    model, batch = built(interpolate=interpolate)
    times = model.clock(batch.target_times)
    start = torch.tensor([0.0, -0.3, 0.0, -1.0, 0.0, -0.1], dtype=torch.float64)
    z = torch.randn(6, 2, dtype=torch.float64, generator=generator("z"))
    found, evolved = model.decode(z, start, times, TIGHT)
    expected = torch.einsum("bmcl,bl->bmc", flows(model, times - start[:, None]), z)
    same(found, expected, 1e-6 if interpolate else 1e-8)  # the interpolant has order 4, the solution 5
    assert evolved.solution.nfe.ne(evolved.solution.nfe[0]).any()  # no union of times: every row has its own steps


@pytest.mark.parametrize("interpolate", [True, False])
def test_shared_times_and_repeated_times_give_the_same_trajectories(interpolate):
    model, _ = built(interpolate=interpolate)
    z = torch.randn(6, 2, dtype=torch.float64, generator=generator("z"))
    shared = torch.tensor([0.0, 0.2, 0.2, 0.5, 0.9, 0.9], dtype=torch.float64).expand(6, -1)
    zero, own = torch.zeros(6, dtype=torch.float64), shared.clone()
    batch_clock = TIGHT._replace(controller=PI(rtol=1e-10, atol=1e-10, norm="batch"))
    one, _ = model.decode(z, zero, shared, batch_clock)
    own[0] = own[0] * 0.5  # one item has another clock: rows are then solved one by one
    many, _ = model.decode(z, zero, own, TIGHT)
    tolerance = 1e-6 if interpolate else 1e-8
    same(one[1:], many[1:], tolerance)
    assert torch.equal(one[:, 1], one[:, 2]) and torch.equal(one[:, 4], one[:, 5])
    here = (z @ model.decoder.matrix.T)[:, None].expand_as(one)
    same(model.decode(z, zero, torch.zeros_like(shared), TIGHT)[0], here, 1e-12)
    own[2] = 0.0  # an item that is asked at its start alone, among others
    same(model.decode(z, zero, own, TIGHT)[0][2], here[2], 1e-12)
    if interpolate:
        same(model.decode(z, zero, own, batch_clock)[0][3:], many[3:], tolerance)


def test_evaluations_do_not_grow_with_the_times_asked_for_unless_steps_end_there():
    costs = []
    for interpolate in (True, False):
        model, _ = built(interpolate=interpolate)
        for points in (5, 50):
            times = torch.linspace(0.1, 1, points, dtype=torch.float64).expand(3, -1)
            z, zero = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
            ode = Ode(Tsit5(), PI(rtol=1e-4, atol=1e-4), Backprop())
            costs.append(int(model.decode(z, zero, times, ode)[1].solution.nfe[0]))
    assert costs[0] == costs[1] < costs[2] < costs[3]
    assert costs[3] >= 6 * 50


def test_decoding_with_fixed_steps_has_the_order_of_the_method():
    model, batch = built()
    times, zero = model.clock(batch.target_times), torch.zeros(6, dtype=torch.float64)
    z = torch.randn(6, 2, dtype=torch.float64, generator=generator("z"))
    exact = torch.einsum("bmcl,bl->bmc", flows(model, times), z)
    errors = []
    for steps in (2, 4):
        found, _ = model.decode(z, zero, times, Ode(RK4(), Fixed(steps=steps), Backprop()))
        errors.append(float((found - exact).abs().max().detach()))
    assert 3.5 < math.log2(errors[0] / errors[1]) < 5


# ---- evidence --------------------------------------------------------------------------------------------------------


def evidence(model: LatentODE, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """[B] log p(y), [B, latent] posterior means and [B, latent, latent] covariances of z₀, from the linear model."""
    maps, wanted = flows(model, model.clock(batch.target_times)).detach(), model.wanted(batch, "test")
    log_p, means, covariances = [], [], []
    for h, y, seen in zip(maps, wanted.values, wanted.mask, strict=True):
        h, y = h[seen], y[seen]
        law = torch.distributions.MultivariateNormal(
            torch.zeros(len(y)).double(), h @ h.T + SIGMA**2 * torch.eye(len(y)).double()
        )
        log_p.append(law.log_prob(y))
        covariance = torch.linalg.inv(torch.eye(h.shape[1]).double() + h.T @ h / SIGMA**2)
        means.append(covariance @ h.T @ y / SIGMA**2)
        covariances.append(covariance)
    return torch.stack(log_p), torch.stack(means), torch.stack(covariances)


def with_posterior(model: LatentODE, mean: Tensor, std: Tensor) -> LatentODE:
    """The model with a q that is given."""

    def posterior(self: LatentODE, series: object, times: Tensor, *, evaluation: bool) -> Posterior:
        return Posterior(mean, std, times.new_zeros(len(times)))

    model.posterior = types.MethodType(posterior, model)
    return model


ONE = {"a": [[-0.7]], "c": [[1.5], [-0.4]]}  # one latent dimension: the exact posterior is in the family


def test_the_bound_is_tight_for_the_exact_posterior_draw_by_draw():
    model, batch = built(**ONE)
    log_p, mean, covariance = evidence(model, batch)
    model = with_posterior(model, mean, covariance.sqrt()[..., 0])
    for draws in (1, 3):
        found = model.bound(batch, draws=draws)
        assert found.kind == "bound"
        same(found.value, log_p, 1e-6)  # the weights do not vary at all; 1e-9 is the solver's, sums have 10 terms
    model.kl_rate, model.progress = 1e9, 1.0
    loss = model.loss(batch, generator=generator("loss"))
    same(loss.value, -log_p / (ASKED * CHANNELS), 1e-6)


def test_the_bound_lies_below_the_evidence_and_rises_with_the_number_of_draws():
    model, batch = built(solver=RK4(), controller=Fixed(steps=3))  # good to 1e-4
    log_p, mean, covariance = evidence(model, batch)
    std = 1.5 * covariance.diagonal(dim1=1, dim2=2).sqrt()
    model = with_posterior(model, mean + 0.3 * std, std)
    means, errors = [], []
    with torch.no_grad():
        for draws in (1, 4, 16):
            parts = [model.bound(batch, seeds=range(6 * k, 6 * k + 6), draws=draws).value for k in range(30)]
            means.append(torch.stack(parts).mean(0))
            errors.append(torch.stack(parts).std(0) / math.sqrt(30))
    for value, error in zip(means, errors, strict=True):
        assert (value < log_p + 4 * error).all()
    assert (means[0].mean() < means[1].mean() - 0.1) and (means[1].mean() < means[2].mean())
    assert (log_p - means[0]).sum() > 4 * errors[0].norm()  # one draw from a wrong q is visibly below
    assert ((log_p - means[2]).abs() < 0.5).all()


def test_the_predictive_law_is_that_of_the_linear_model():
    model, batch = built(**ONE)
    _, mean, covariance = evidence(model, batch)
    model = with_posterior(model, mean, covariance.sqrt()[..., 0])
    with torch.no_grad():
        law = model.predict(batch, draws=4000)
    h = flows(model, model.clock(batch.target_times))[..., 0].detach()
    same(law[..., 0], h * mean[:, None], 4 / math.sqrt(4000))
    expected = (h.square() * covariance[:, :1, :1].reshape(-1, 1, 1) + SIGMA**2).sqrt().log()
    same(law[..., 1], expected, 4 / math.sqrt(2 * 4000))


def test_samples_have_the_covariance_of_the_prior():
    model, batch = built()
    times = torch.tensor([3.2, 3.2, 4.5], dtype=torch.float64)
    x = model.sample(3000, times=times).flatten(1)
    h = flows(model, model.clock(times)[None])[0].reshape(6, 2).detach()
    expected = h @ h.T + SIGMA**2 * torch.eye(6).double()
    scale = expected.diagonal().sqrt()
    # a correlation of 3000 pairs has a standard error of at most 1/54, a variance 1.4 times that
    same(x.T.cov() / scale / scale[:, None], expected / scale / scale[:, None], 4 * 1.5 / math.sqrt(3000))
    clean = model.sample(5, times=times, mean=True)
    assert torch.equal(clean[:, 0], clean[:, 1])
    known = torch.cat((batch.times[batch.mask.any(2)], batch.target_times.flatten()))
    first, last = known.min(), known.max()  # to the last bit: the earliest time is where samples may begin
    spread = torch.linspace(0, 1, POINTS, dtype=torch.float64) * (last - first) + first
    assert torch.equal(model.sample(2), model.sample(2, times=spread))


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_weight_of_the_kl_term_follows_its_schedule():
    epochs = 300
    model, _ = built(kl_wait=10 / epochs, kl_rate=epochs * math.log(1 / 0.99))
    for epoch in (0, 5, 10, 11, 50, 300):
        model.progress = epoch / epochs
        assert model.beta == pytest.approx(0.0 if epoch <= 10 else 1 - 0.99 ** (epoch - 10), abs=1e-12)


def test_the_loss_is_linear_in_its_parts():
    """Without KL term and with one draw: squared errors and a constant. With it: that and the weighted log-ratio."""
    model, batch = built(draws=1)
    model.progress = 0.0
    bare = model.loss(batch, generator=generator("loss"))
    count = batch.target_mask.flatten(1).sum(1).double()
    model.log_sigma += math.log(2.0)
    wider = model.loss(batch, generator=generator("loss"))
    # the squared error enters by 1 / 2σ², the logarithm of σ once for each value that counts
    quadratic = 10 * bare.value - count * (math.log(SIGMA) + 0.5 * math.log(2 * math.pi))
    same(10 * wider.value, quadratic / 4 + count * (math.log(2 * SIGMA) + 0.5 * math.log(2 * math.pi)), 1e-9)
    model.log_sigma -= math.log(2.0)
    model.progress = 1.0
    full = model.loss(batch, generator=generator("loss"))
    same(10 * (full.value - bare.value).mean(), model.beta * full.logs["kl"], 1e-9)


def test_labels_are_predicted_from_the_initial_state():
    torch.manual_seed(0)
    small = lambda **sizes: MLP((8,), "tanh", **sizes)  # noqa: E731
    build = lambda weight: LatentODE(  # noqa: E731
        small,
        lambda **context: ODERNN(small, 4, 6, **context),
        3,
        7,
        sigma=0.5,
        class_weight=weight,
        solver=RK4(),
        controller=Fixed(),
        precision="float64",
        shape=(POINTS, CHANNELS),
        target_shape=(3,),
    )
    model, batch = build(2.0), irregular(classes=3)
    other = build(0.0)
    other.load_state_dict(model.state_dict())
    with_labels, without = (m.loss(batch, generator=generator("loss")) for m in (model, other))
    logits = model.predict(batch, draws=5)
    same(logits.exp().sum(1), torch.ones(6, dtype=torch.float64), 1e-12)
    model.draws = other.draws = 1000
    gap = model.loss(batch, generator=generator("loss")).value - other.loss(batch, generator=generator("loss")).value
    assert (gap > 0).all()
    # the cross-entropy of the mean probability is below the mean cross-entropy (Jensen)
    fine = -model.predict(batch, draws=1000)[torch.arange(6), batch.target]
    assert (gap / 2 > fine - 0.05).all()
    assert (with_labels.value > without.value).all() and 0 <= with_labels.logs["accuracy"] <= 1


def test_series_without_target_are_their_own():
    model, batch = built()
    own = batch.replace(target=None, target_times=None, target_mask=None)
    told = batch.replace(target=batch.x, target_times=batch.times, target_mask=batch.mask)
    for a, b in ((model.bound(own), model.bound(told)),):
        assert torch.equal(a.value, b.value)


def test_draws_of_an_item_depend_on_its_seed_alone():
    model, batch = built()
    out = model.predict(batch, seeds=range(10, 16))
    same(model.predict(batch[[4, 1]], seeds=[14, 11]), out[[4, 1]], 1e-8)
    assert (model.predict(batch, seeds=range(6)) - out)[..., 0].abs().flatten(1).amax(1).min() > 1e-3
    x = model.sample([7, 3, 9], batch_size=2)
    same(model.sample([9]), x[2:], 1e-8)
    same(
        model.bound(batch[2:3], seeds=[5], draws=3).value,
        model.bound(batch, seeds=[9, 9, 5, 1, 2, 3], draws=3).value[2:3],
        1e-7,
    )


def test_float32_is_enough():
    model, batch = built()
    torch.manual_seed(0)
    narrow = LatentODE(
        linear(A), lambda **c: GRU(5, **c), 2, 7, linear(C), sigma=SIGMA, shape=(POINTS, 2), target_shape=(ASKED, 2)
    )
    narrow.load_state_dict(model.state_dict())
    batch32 = batch.replace(x=batch.x.float(), target=batch.target.float())
    wide = model.predict(batch)
    out = narrow.predict(batch32)
    assert out.dtype == torch.float32
    same(out.double(), wide, 1e-3)  # float32, and a tolerance of 1e-5
    same(narrow.bound(batch32).value, model.bound(batch).value, 1e-3)


@pytest.mark.parametrize("gradient", [Checkpoint(), Adjoint(), Interpolated()])
def test_gradients_that_do_not_know_the_interpolant_say_what_to_do_without_it(gradient):
    with pytest.raises(ConfigError, match="Use interpolate: false"):
        built(gradient=gradient, prepared=False)
    model, batch = built(gradient=gradient, interpolate=False)
    model.loss(batch, generator=generator("loss")).value.sum().backward()
    plain, _ = built(interpolate=False)
    plain.loss(batch, generator=generator("loss")).value.sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        same(mine.grad, theirs.grad, 1e-5)


def test_refusals_say_what_is_wrong():
    model, batch = built()
    for message, call in (
        ("times must not decrease and start at 3", lambda: model.sample(2, times=torch.tensor([1.0, 4.0]))),
        ("times must not decrease", lambda: model.sample(2, times=torch.tensor([4.5, 4.0]))),
        ("takes no condition", lambda: model.sample(2, condition=torch.tensor([1, 2]))),
        ("6 items need as many seeds, found 2", lambda: model.predict(batch, seeds=[1, 2])),
        ("draws must be above 0", lambda: model.predict(batch, draws=0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for bad in ({"sigma": 0.0}, {"draws": 0}, {"kl_wait": 1.0}, {"class_weight": -1.0}, {"kl_rate": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            built(**bad)


@pytest.mark.slow
def test_training_learns_oscillations_from_few_points():
    """Sines of two frequencies, seen at 60 % of irregular times: a tenth of the variance is left after a short run."""
    torch.manual_seed(0)
    small = lambda **sizes: MLP((32,), "tanh", **sizes)  # noqa: E731
    g = generator("sines")
    times = torch.rand(300, 12, generator=g, dtype=torch.float64).sort(1).values
    rate = torch.where(torch.rand(300, 1, generator=g) < 0.5, 6.0, 3.0)
    y = torch.sin(rate * times + 6.28 * torch.rand(300, 1, generator=g))[..., None].float()
    mask = torch.rand(300, 12, 1, generator=g) < 0.6
    mask[:, 0] = True
    data = Batch(y * mask, times=times, mask=mask, target=y, target_times=times)
    model = LatentODE(
        small,
        lambda **context: ODERNN(small, 12, 24, **context),
        4,
        sigma=0.1,
        solver=RK4(),
        controller=Fixed(),
        shape=(12, 1),
        target_shape=(12, 1),
    )
    model.prepare([data], generator=g)
    optimizer = torch.optim.Adamax(model.parameters(), 0.01)
    for step in range(300):
        model.progress = step / 300
        optimizer.zero_grad()
        model.loss(data[torch.arange(240)[torch.randperm(240, generator=g)[:60]]], generator=g).value.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        error = (model.predict(data[240:])[..., 0] - y[240:]).square().mean()
    assert error < 0.1 * y.var()
