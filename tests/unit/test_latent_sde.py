"""Latent SDEs: the path's KL divergence, what the control knows, bounds, and what answers depend on."""

import math

import pytest
import torch

from genmodels.dynamics.latent_sde import Elementwise, LatentSDE, controlled
from genmodels.model import Model
from genmodels.registry import ConfigError, build
from genmodels.rng import BatchNoise, generator
from genmodels.solvers.base import Fixed, integrate
from genmodels.solvers.brownian import BrownianTree
from genmodels.solvers.stochastic import SOSRI2, EulerMaruyama, Milstein
from genmodels.types import Batch
from tests.oracles import OrnsteinUhlenbeck

TANH = {"name": "mlp", "hidden": [8], "activation": "tanh"}
KL = 0.6172084277  # of dx = -1.5 x dt + 0.7 dW from dx = -0.5 x dt + 0.7 dW, both from 1, up to T = 2


def test_the_kl_divergence_of_linear_drifts():
    """∫ ½ E|x|²/0.49 dt with E x² of an Ornstein-Uhlenbeck process, in closed form and along paths."""
    process = OrnsteinUhlenbeck(1.5, 0.0, 0.7)
    times = torch.linspace(0, 2, 4001, dtype=torch.float64)
    square = torch.tensor([float(m) ** 2 + v for m, v in (process.moments(t, torch.ones(1)) for t in times.tolist())])
    assert torch.trapezoid(0.5 * square / 0.49, times).item() == pytest.approx(KL, abs=1e-6)
    control = lambda t, z: -z / 0.7  # noqa: E731
    sde = controlled(lambda t, z: -0.5 * z, lambda t, z: torch.full_like(z, 0.7), control)
    paths = 4000
    y = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(paths, 1)
    noise = BrownianTree(paths, (2,), start=0.0, end=2.0, dtype=torch.float64)
    ends = {}
    for name, solver, steps in (("milstein", Milstein(), 100), ("sosri2", SOSRI2(), 20)):
        end = integrate(sde, y, torch.linspace(0, 2, steps + 1).double(), solver=solver, noise=noise).x
        ends[name] = end
        # the divergence has a standard deviation of 0.45 over paths; steps of 0.02 add 1 %
        assert end[:, 1].mean().item() == pytest.approx(KL, abs=3 * 0.45 / math.sqrt(paths) + 0.008)
        assert end[:, 0].var().item() == pytest.approx(0.1629284705, rel=0.1)
    torch.testing.assert_close(ends["milstein"], ends["sosri2"], rtol=0, atol=0.1)


def series(n: int = 5, length: int = 4, asked: int = 3, seed: int = 0) -> Batch:
    noise = BatchNoise(n, generator=generator("latent sde", seed))
    times = noise.uniform(length).double().sort(1).values
    times[:, 0] = 0.0
    mask = noise.uniform(length, 2) < 0.7
    mask[:, 0] = True
    later = (1.5 * noise.uniform(asked)).double().sort(1).values
    return Batch(
        torch.where(mask, noise.normal(length, 2), 0.0),
        times=times,
        mask=mask,
        target=noise.normal(asked, 2),
        target_times=later,
        target_mask=noise.uniform(asked, 2) < 0.8,
    )


def model(batch: Batch, **arguments: object) -> LatentSDE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        node = {"name": "latent_sde", "drift": TANH, "control": TANH, "latent": 3, "sigma": 0.3, "precision": "float64"}
        out = build(
            Model,
            {**node, **arguments},
            shape=tuple(batch.x.shape[1:]),
            target_shape=tuple(batch.target.shape[1:]),
            num_classes=None,
            condition_shape=None,
        )
    out.prepare([batch], generator=generator("prepare"))
    return out


def test_the_control_knows_the_observations_to_come_and_ends_with_the_last():
    batch = series()
    m, found = model(batch), []
    s = m.series(batch, "test")
    states = m.encoder.read(s.backwards()).states
    z = torch.randn(5, 3, generator=generator("z"), dtype=torch.float64)
    for t in (0.0, 0.3, 0.6, 2.0):
        u = m.u(torch.tensor(t).double(), z, states, s.times, s.length)
        found.append(u)
        for i in range(5):
            left = int((s.times[i, : s.length[i]] > t).sum())
            state = states[i, left][None]
            wanted = m.control(None, torch.cat((z[i : i + 1], state), 1))[0] if left else torch.zeros(3).double()
            torch.testing.assert_close(u[i], wanted)
    assert not found[-1].any() and found[0].any()
    rows = m.u(torch.tensor([0.0, 0.3, 0.6, 2.0, 0.3]).double(), z, states, s.times, s.length)
    torch.testing.assert_close(rows[1], found[1][1])


def test_what_stands_where_nothing_was_observed_and_padding_do_not_matter():
    batch = series()
    m = model(batch)
    pads = (batch.x, batch.times, batch.mask)
    padded = batch.replace(
        x=torch.cat((batch.x.masked_fill(~batch.mask, 7.0), torch.full((5, 2, 2), 9.0)), 1),
        times=torch.cat((batch.times, batch.times[:, -1:].expand(5, 2)), 1),
        mask=torch.cat((batch.mask, torch.zeros(5, 2, 2, dtype=torch.bool)), 1),
    )
    assert all(v is not None for v in pads)
    m.shape = (6, 2)
    one = m.bound(padded, seeds=range(5))
    m.shape = (4, 2)
    torch.testing.assert_close(one.value, m.bound(batch, seeds=range(5)).value, rtol=1e-10, atol=1e-10)


def test_item_i_depends_on_seed_i_alone():
    batch = series()
    m = model(batch, controller={"name": "fixed", "steps": 2})
    for answer in (m.predict, lambda *a, **k: m.bound(*a, **k).value):
        whole = answer(batch, seeds=[4, 7, 1, 9, 3], draws=3)
        alone = answer(batch[2:3], seeds=[1], draws=3)
        torch.testing.assert_close(alone[0], whole[2], rtol=1e-8, atol=1e-8)
    drawn = m.sample([4, 7, 1], times=torch.tensor([0.1, 0.1, 0.8]))
    torch.testing.assert_close(m.sample([7], times=torch.tensor([0.1, 0.1, 0.8])), drawn[1:2], rtol=1e-10, atol=1e-10)
    assert drawn.shape == (3, 3, 2) and m.sample(2).shape == (2, 4, 2) and m.sample(0).shape == (0, 4, 2)
    # both rows at one time share the path and differ by the noise of observation, of σ = 0.3
    clean = m.sample(400, times=torch.tensor([0.1, 0.1, 0.8]), mean=True)
    assert torch.equal(clean[:, 0], clean[:, 1])
    noisy = m.sample(400, times=torch.tensor([0.1, 0.1, 0.8]))
    assert (noisy[:, 0] - noisy[:, 1]).std().item() == pytest.approx(0.3 * math.sqrt(2), rel=0.15)


def test_the_loss_is_the_bound_and_the_kl_divergence_comes_in_slowly():
    batch = series(n=3)
    m = model(batch)
    many = batch[torch.arange(3).repeat_interleave(400)]
    loss = m.loss(many, generator=generator("loss")).value.detach().reshape(3, 400)
    bound = m.bound(batch, seeds=range(3), draws=400)
    gap = -loss.mean(1) * 6 - bound.value.detach()  # 3 times and 2 channels asked for
    assert (gap.abs() < 4 * (2 * bound.stderr.square()).sqrt()).all() and bound.kind == "bound"
    m.progress = 0.05
    assert m.beta == pytest.approx(0.25)
    m.progress = 0.0
    free = m.loss(batch, generator=generator("loss"))
    assert float(free.logs["beta"]) == 0 and float(free.logs["kl"]) > 0
    m.progress = 1.0
    whole = m.loss(batch, generator=generator("loss"))
    torch.testing.assert_close((whole.value - free.value).mean(), whole.logs["kl"] / 6)


def test_the_bound_is_one_of_a_linear_gaussian_model():
    """With prior dz = -z dt + 0.5 dW in one dimension and x = z + N(0, σ²): exact log p(x) by its covariance."""
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    x = torch.tensor([0.3, -0.2, 0.5, 0.4, 0.1], dtype=torch.float64)
    batch = Batch(x[None, :, None], times=times[None], mask=torch.ones(1, 5, 1, dtype=torch.bool))
    m = build(
        Model,
        {"name": "latent_sde", "drift": TANH, "control": TANH, "latent": 1, "sigma": 0.4, "precision": "float64"},
        shape=(5, 1),
        target_shape=None,
    )
    m.prepare([batch], generator=generator("prepare"))
    m.h = lambda t, z: -z
    m.g = lambda t, z: torch.full_like(z, 0.5)
    torch.nn.init.ones_(m.decoder.weight)
    torch.nn.init.zeros_(m.decoder.bias)
    # z₀ ~ N(0, 1): cov(z_s, z_t) = e^{-|t - s|} var(z_s), var(z_s) = e^{-2s} + (1 - e^{-2s}) 0.5²/2, for s <= t
    early = torch.minimum(times[:, None], times)
    variance = (-2 * early).exp() - torch.expm1(-2 * early) * 0.5**2 / 2
    covariance = (-(times[:, None] - times).abs()).exp() * variance + 0.16 * torch.eye(5)
    exact = torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance).log_prob(x)
    options = {"draws": 500, "solver": EulerMaruyama(), "controller": Fixed(4)}
    with torch.no_grad():
        first = m.bound(batch, seeds=[0], **options)
    assert float(first.value) < float(exact) + 3 * float(first.stderr)
    wide = batch[torch.zeros(64, dtype=torch.int64)]
    m.kl_warmup = 0.0
    g = generator("train")
    trained = [p for n, p in m.named_parameters() if not n.startswith(("prior", "decoder"))]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        m.loss(wide, generator=g).value.mean().backward()
        optimizer.step()
    with torch.no_grad():
        last = m.bound(batch, seeds=[0], **options)
    assert float(last.value) > float(first.value) and float(last.value) < float(exact) + 3 * float(last.stderr) + 0.02
    assert float(exact - last.value) < 0.3  # close to the exact posterior, from 1 nat and more


def test_the_diffusion_is_diagonal_and_bounded():
    g, z = Elementwise(3, 5, 0.1, 0.7).double(), 5 * torch.randn(7, 3, dtype=torch.float64, generator=generator("g"))
    jacobian = torch.autograd.functional.jacobian(lambda v: g(v).sum(0), z)  # [3, 7, 3]
    off = jacobian.transpose(0, 1)[:, ~torch.eye(3, dtype=torch.bool)]
    assert not off.any() and jacobian.abs().max() > 1e-3
    assert g(z).min() > 0.1 and g(z).max() < 0.7


def test_mistakes_are_named():
    batch = series()
    with pytest.raises(ConfigError, match=r"bounds 0 < low < high.*\[0.0, 1.0\]"):
        model(batch, bounds=[0.0, 1.0])
    with pytest.raises(ConfigError, match="found classes"):
        model(batch.replace(target=torch.zeros(5, 3)))
    with pytest.raises(ConfigError, match=r"'stochastic_heun' needs an SDE.*ito calculus.*Use one of: euler_maruyama"):
        model(batch, solver="stochastic_heun")
    m = model(batch)
    with pytest.raises(ValueError, match="one seed per item is needed, found 2 for 5"):
        m.predict(batch, seeds=[1, 2])
    with pytest.raises(ValueError, match="paths must be at least 1"):
        m.bound(batch, draws=0)
    with pytest.raises(ValueError, match="bound: the batch has no target"):
        m.bound(batch.replace(target=None))
    with pytest.raises(ValueError, match="takes no condition"):
        m.sample(2, condition=torch.zeros(2))
    with pytest.raises(ValueError, match="must not decrease and start at 0 or later"):
        m.sample(2, times=torch.tensor([0.5, 0.2]))
