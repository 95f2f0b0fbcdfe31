"""Continuous flows against linear fields, Jacobians and grids; their probes, penalties and kinds of likelihood."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from genmodels.data.digits import Digits
from genmodels.dynamics.cnf import ContinuousFlow
from genmodels.dynamics.regularization import Evolved
from genmodels.flows import continuous
from genmodels.flows.bijection import Bijection
from genmodels.flows.continuous import Continuous, Solving
from genmodels.flows.flow import NormalizingFlow
from genmodels.model import Model
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import BatchNoise, generator
from genmodels.solvers.base import Fixed
from genmodels.solvers.divergence import draw_probes, exact_divergence, hutchinson, joint
from genmodels.solvers.step_size import PI
from genmodels.transforms import Identity, Transform
from genmodels.types import Batch, NotApplicable
from tests.oracles import MIXTURE, jacobian_log_det
from tests.oracles import grid as plane

A = torch.tensor([[0.3, -0.7, 0.1], [0.5, -0.2, 0.4], [-0.1, 0.2, 0.25]], dtype=torch.float64)
START = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
TIGHT = PI(1e-11, 1e-11)
FIELD = {"name": "concat_mlp", "hidden": [12, 12], "time": "squash"}
PLAIN = {"num_classes": None, "condition_shape": None}
T = torch.tensor(0.3, dtype=torch.float64)


def layer(shape: tuple[int, ...] = (3,), network: object = FIELD, **arguments: object) -> Continuous:
    node = resolve(Bijection, {"name": "continuous", "network": network, **arguments}, "test")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build(Bijection, node, shape=shape, **PLAIN).double()


def linear(end: float = 1.5) -> Continuous:
    """dz/dt = A z until T = end."""
    out = layer(network={"name": "concat_mlp", "hidden": [], "time": "none"}, end=end, controller={"name": "pi"})
    out.controller = TIGHT
    with torch.no_grad():
        out.network.head.weight.copy_(A)
        out.network.head.bias.zero_()
    return out


def flow(layers: list, shape: tuple[int, ...] = (2,), bin_width: float | None = None, transform=None, **arguments):
    node = resolve(Model, {"name": "cnf", "layers": layers, **arguments}, "test")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        facts = {"shape": shape, "transform": transform or Identity(), "bin_width": bin_width, **PLAIN}
        return build(Model, node, **facts).double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("cnf", seed))


# ---- the layer -------------------------------------------------------------------------------------------------------


def test_a_linear_field_to_the_numbers_of_its_exponential():
    z, log_det = linear()(START)
    expected = torch.tensor([[-0.773342709237, 1.023568019045, -0.890972259674]], dtype=torch.float64)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(z, START @ torch.linalg.matrix_exp(1.5 * A).T, rtol=0, atol=1e-10)
    assert log_det.item() == pytest.approx(0.525, abs=1e-10)  # T tr A
    back, back_log_det = linear().inverse(z)
    torch.testing.assert_close(back, START, rtol=0, atol=1e-9)
    assert back_log_det.item() == pytest.approx(-0.525, abs=1e-10)


def test_log_density_of_a_linear_flow_is_gaussian():
    model = flow([{"name": "continuous", "network": FIELD}], (3,))
    model.layers.bijections[0] = linear()
    x, map_ = randn(20, 3), torch.linalg.matrix_exp(1.5 * A)
    law = torch.distributions.MultivariateNormal(torch.zeros(3).double(), precision_matrix=map_.T @ map_)
    found = model.likelihood(x)
    assert found.kind == "numerical" and found.stderr is None
    torch.testing.assert_close(found.value.detach(), law.log_prob(x), rtol=0, atol=1e-9)


def test_log_det_is_that_of_the_jacobian_of_the_solve():
    f, x = layer(controller={"name": "fixed", "steps": 12}, end=0.7), randn(3, 3)
    torch.testing.assert_close(f(x)[1].detach(), jacobian_log_det(lambda y: f(y)[0], x), rtol=0, atol=1e-7)


def test_the_end_of_the_flow_is_learnt_by_its_gradient():
    f, x = layer(end=0.7, learn_end=True, controller={"name": "fixed", "steps": 8}), randn(5, 3)
    weights, end = randn(5, 3, seed=1), f.root.detach().square()
    torch.testing.assert_close(f.velocity()(T, x), end * f.network(end * T, x))

    def value(root: Tensor) -> Tensor:
        z, log_det = torch.func.functional_call(f, {"root": root}, (x,))
        return (z * weights).sum() + log_det.sum()

    root = f.root.detach().clone().requires_grad_()
    assert float(root.detach().square()) == pytest.approx(0.7, rel=1e-6)
    assert torch.autograd.gradcheck(value, (root,))


def test_variances_of_the_estimates_are_those_of_their_laws():
    """With S = (A + Aᵀ)/2: 2(|S|² - Σ S_ii²) = 0.4 for signs (over all of them), 2|S|² = 0.785 for Gaussian ones."""
    field = linear(1.0).velocity()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)[:, None]
    values = hutchinson(field, T, START, signs)[1]
    assert values.mean().item() == pytest.approx(0.35, abs=1e-12)
    assert values.var(correction=0).item() == pytest.approx(0.40, abs=1e-12)
    noise = BatchNoise(1, generator=generator("gauss"))
    gauss = hutchinson(field, T, START, draw_probes(noise, 100_000, (3,), law="gaussian", dtype=torch.float64))[1]
    # the standard error of a variance of 1e5 draws with kurtosis below 15 is under 1.2 %
    assert gauss.var().item() == pytest.approx(0.785, rel=0.04)
    assert gauss.mean().item() == pytest.approx(0.35, abs=5 * (0.785 / 1e5) ** 0.5)


class Opaque(nn.Module):
    """A network that hides its way of carrying tangents forward."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, x: Tensor, condition: None = None) -> Tensor:
        return self.network(t, x, condition)


@pytest.mark.parametrize("name", ["concat_mlp", "concat_conv"])
def test_divergences_carried_forward_are_those_of_autograd_in_values_and_gradients(name):
    shape = (3,) if name == "concat_mlp" else (2, 4, 2)
    f, x = layer(shape, {"name": name, "hidden": [6]}, end=0.6), randn(4, *shape).requires_grad_()
    probes = draw_probes(BatchNoise(4, generator=generator("probes")), 2, shape, dtype=torch.float64)
    forward, velocity = f.velocity(), f.velocity()
    velocity.f = Opaque(f.network)
    assert forward.pushes and not velocity.pushes
    for found in (lambda v: exact_divergence(v, T, x), lambda v: hutchinson(v, T, x, probes)):
        (v, rate), (w, other) = found(forward), found(velocity)
        torch.testing.assert_close((v, rate), (w, other))
        wanted = [x, *f.network.parameters()]
        own, given = (torch.autograd.grad(r.square().sum() + u.sum(), wanted) for u, r in ((v, rate), (w, other)))
        torch.testing.assert_close(own, given)


@pytest.mark.parametrize("opaque", [False, True])
def test_the_joint_field_tells_its_velocity_and_the_norm_of_its_jacobian(opaque):
    f, x = layer(), randn(4, 3)
    velocity = f.velocity()
    if opaque:
        velocity.f = Opaque(f.network)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: f.network(T, y[None])[0]))(x)
    both = joint(velocity, x, None, sketch=True)
    both(T, both.start(x))
    torch.testing.assert_close(both.velocity, f.network(T, x))
    torch.testing.assert_close(both.frobenius, jacobian.square().sum((1, 2)))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    both = joint(velocity, x, signs[:, None].expand(-1, 4, 3), sketch=True)
    both(T, both.start(x))
    torch.testing.assert_close(both.frobenius, jacobian.square().sum((1, 2)))  # their mean over all signs
    one = both.select(torch.tensor([2]))
    one(T, one.start(x[2:3]))
    torch.testing.assert_close(one.frobenius, both.frobenius[2:3])


def test_impossible_layers_and_flows_are_refused():
    with pytest.raises(ConfigError, match="`end` above 0"):
        layer(end=0.0)
    with pytest.raises(ConfigError, match="none of the layers is `continuous`"):
        flow(["act_norm"])
    f = layer()
    f.solving = Solving(divergence="hutchinson")
    with pytest.raises(ConfigError, match="need noise"):
        f(randn(2, 3))
    with pytest.raises(ValueError, match=r"probes must be \[P, 2, 3\]"):
        joint(f.velocity(), randn(2, 3), randn(1, 2, 2))


# ---- the model -------------------------------------------------------------------------------------------------------


def test_density_of_the_plane_integrates_to_one():
    model = flow([{"name": "continuous", "network": FIELD}])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
        points, area = plane(-9, 9, 61)
        total = model.log_prob(points, controller=PI(1e-4, 1e-4)).exp().sum() * area
    assert float(total) == pytest.approx(1, abs=3e-3)


def test_estimates_are_unbiased_have_a_standard_error_and_depend_on_their_seed_alone():
    model, x = (
        flow([{"name": "continuous", "network": FIELD}] * 2, (4,), controller={"name": "fixed", "steps": 4}),
        randn(5, 4),
    )
    exact = model.likelihood(x, seeds=range(5)).value
    found = model.likelihood(x, seeds=range(5), divergence="hutchinson", probes=2000)
    assert found.kind == "stochastic" and found.stderr.shape == (5,)
    assert ((found.value - exact).abs() < 4.5 * found.stderr).all()
    assert (found.stderr > 1e-4).all() and (found.stderr < 0.05).all()
    few = model.likelihood(x, seeds=range(5), divergence="hutchinson", probes=3)
    alone = model.likelihood(x[3:4], seeds=[3], divergence="hutchinson", probes=3)
    torch.testing.assert_close(few.value[3:4], alone.value)
    torch.testing.assert_close(few.stderr[3:4], alone.stderr)
    parts = model.likelihood(x, seeds=range(5), divergence="hutchinson", probes=3, batch_size=2)
    torch.testing.assert_close(few.value, parts.value)
    assert model.likelihood(x, divergence="hutchinson").stderr is None
    # two draws average two sets of probes
    two = model.likelihood(x, seeds=range(5), divergence="hutchinson", probes=2000, draws=2)
    torch.testing.assert_close(two.stderr, found.stderr / 2**0.5, rtol=0.1, atol=0)


def test_the_standard_error_is_that_of_the_sum_over_layers():
    model, x = (
        flow([{"name": "continuous", "network": FIELD}] * 2, (4,), controller={"name": "fixed", "steps": 2}),
        randn(1, 4),
    )
    drawn = model.likelihood(x.expand(400, 4), divergence="hutchinson", probes=1).value.detach()
    stated = model.likelihood(x, divergence="hutchinson", probes=400).stderr[0] * 400**0.5
    assert float(drawn.std()) == pytest.approx(float(stated.detach()), rel=0.2)  # each is known to 3.5 %


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_loss_is_the_negative_log_density_per_component(divergence):
    model, x = flow([{"name": "continuous", "network": FIELD}], divergence=divergence), randn(6, 2)
    model.eval()
    value = model.loss(Batch(x), generator=generator("loss"))
    expected = -model.log_prob(x) / 2
    gap = (value.value - expected).abs().max()
    assert gap < 1e-10 if divergence == "exact" else 1e-3 < gap < 1
    assert value.logs["nfe"] >= 8 and torch.isfinite(value.logs["nll"])
    torch.testing.assert_close(value.value, model.loss(Batch(x), generator=generator("loss")).value)


def test_penalties_of_every_layer_are_added_in_training_alone(monkeypatch):
    model, x, given = flow([{"name": "continuous", "network": FIELD}] * 3), randn(6, 2), []

    def charging(*args, regularizers=(), progress=1.0, noise=None, **options):
        given.append((regularizers, progress, noise is not None))
        found = evolve(*args, **options)
        return Evolved(found.solution, found.penalty + 0.5 * len(regularizers), found.logs)

    evolve = continuous.evolve
    monkeypatch.setattr(continuous, "evolve", charging)
    model.regularizers, model.progress = ("a regularizer",), 0.25
    free = model.eval().loss(Batch(x)).value
    assert given == [((), 1.0, False)] * 3
    given.clear()
    charged = model.train().loss(Batch(x)).value
    assert given == [(("a regularizer",), 0.25, True)] * 3
    torch.testing.assert_close(charged, free + 1.5, rtol=0, atol=1e-5)  # to the tolerance of one clock for the batch


def test_layers_obey_the_dials_of_answers_and_their_own():
    model, x = flow([{"name": "continuous", "network": FIELD}]), randn(6, 2)
    counts = []
    handle = model.blocks[0].network.register_forward_hook(lambda *_: counts.append(1))
    model.encode(x, controller=Fixed(3), solver=build_solver("euler"))
    assert len(counts) == 3
    model.blocks[0].solver, model.blocks[0].controller = build_solver("rk4"), Fixed(2)
    counts.clear()
    model.encode(x, controller=Fixed(3), solver=build_solver("euler"))
    assert len(counts) == 8
    handle.remove()
    assert all(block.solving is None for block in model.blocks)


def build_solver(name: str):
    from genmodels.solvers.base import Solver

    return build(Solver, name)


def test_items_of_an_answer_do_not_see_each_other():
    model, x = flow([{"name": "continuous", "network": FIELD}], controller={"name": "pi", "norm": "batch"}), randn(6, 2)
    x[0] *= 20  # an item of its own scale, which under one clock would change the others' steps
    whole, rest = model.log_prob(x), model.log_prob(x[1:])
    torch.testing.assert_close(whole[1:], rest, rtol=0, atol=1e-12)


def test_the_velocity_is_that_of_a_single_layer():
    model, x = flow([{"name": "continuous", "network": FIELD, "end": 0.5}]), randn(6, 2)
    torch.testing.assert_close(model.velocity(T, x), 0.5 * model.blocks[0].network(0.5 * T, x))
    z = x
    for k in range(2000):  # Euler along it from data to base
        z = z + model.velocity(torch.tensor(k / 2000, dtype=torch.float64), z).detach() / 2000
    torch.testing.assert_close(z, model.encode(x).detach(), rtol=0, atol=1e-3)
    with pytest.raises(NotApplicable, match="one continuous layer"):
        flow(["act_norm", {"name": "continuous", "network": FIELD}]).velocity(T, x)


def test_a_plain_flow_with_a_continuous_layer_says_that_it_is_numerical():
    node = resolve(Model, {"name": "flow", "layers": [{"name": "continuous", "network": FIELD}]}, "test")
    model = build(Model, node, shape=(2,), transform=Identity(), bin_width=None, **PLAIN)
    assert isinstance(model, NormalizingFlow) and model.likelihood(randn(2, 2)).kind == "numerical"


def test_precision_is_that_of_the_whole_model():
    node = {"name": "cnf", "layers": [{"name": "continuous", "network": FIELD}], "precision": "float64"}
    model = build(Model, node, shape=(2,), transform=Identity(), bin_width=None, **PLAIN)
    assert isinstance(model, ContinuousFlow) and model.dtype == torch.float64
    assert model.encode(randn(3, 2).float()).dtype == torch.float64 and model.sample(2).dtype == torch.float64


def test_steps_are_wide_in_answers_and_as_narrow_as_points_in_training(monkeypatch):
    model, seen = flow([{"name": "continuous", "network": FIELD}]).float(), []
    evolve = continuous.evolve
    monkeypatch.setattr(continuous, "evolve", lambda f, x, *a, **k: seen.append(x.dtype) or evolve(f, x, *a, **k))
    batch = Batch(randn(4, 2).float())
    for training in (True, False):
        model.train(training).loss(batch, generator=torch.Generator())
    assert seen == [torch.float32, torch.float64]


def test_wrong_counts_are_refused():
    model = flow([{"name": "continuous", "network": FIELD}])
    for wrong in ({"probes": 0}, {"draws": 0}, {"batch_size": 0}, {"seeds": [1]}):
        with pytest.raises(ValueError, match="at least 1 are needed"):
            model.likelihood(randn(2, 2), **wrong)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.sample(2, batch_size=0)


def test_a_few_steps_of_training_raise_the_likelihood():
    model = flow(
        [{"name": "continuous", "network": FIELD}], controller={"name": "pi", "rtol": 1e-3, "atol": 1e-3}
    ).float()
    x = MIXTURE.sample(BatchNoise(256, generator=generator("train")))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    for k in range(40):
        optimizer.zero_grad()
        value = model.loss(Batch(x), generator=generator("loss", k)).value.mean()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < values[0] - 0.1


MULTISCALE = [
    {
        "name": "multiscale",
        "levels": [
            ["squeeze", "act_norm", {"name": "continuous", "network": {"name": "concat_conv", "hidden": [8]}}],
            ["squeeze", {"name": "continuous", "network": {"name": "concat_conv", "hidden": [8]}}],
        ],
    }
]


def test_a_flow_of_several_scales_for_images():
    data = Digits()
    transform = build(Transform, resolve(Transform, data.transform, "test"))
    model = flow(
        MULTISCALE, data.shape, data.bin_width, transform, controller={"name": "pi", "rtol": 1e-4, "atol": 1e-4}
    )
    batch = data.take("train", torch.arange(12))
    model.prepare([batch], generator=generator("prepare"))
    assert model.blocks[0].shape == (4, 4, 4) and model.blocks[1].shape == (8, 2, 2)
    with torch.no_grad():
        z = model.encode(batch.x.double())
        assert z.shape == (12, 64)
        torch.testing.assert_close(model.decode(z), batch.x.double(), rtol=0, atol=0.01)
        bound = model.likelihood(batch.x.double())
        found = model.likelihood(batch.x.double(), divergence="hutchinson", probes=200)
    assert bound.kind == "bound" and found.kind == "stochastic"
    assert ((bound.value - found.value).abs() < 4.5 * found.stderr + 1e-2).all()
    loss = model.train().loss(batch, generator=generator("loss"))
    assert loss.value.shape == (12,) and math.isfinite(float(loss.logs["bits_per_dim"]))
    loss.value.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_penalties_see_the_points_alone_and_reuse_the_jacobian_of_the_divergence():
    """A linear field: |∂v/∂x|² = T²|A|² everywhere, v = T A x, and d²x/dt² = T² A² x."""
    x, how = (
        randn(4, 3),
        {"controller": {"name": "pi", "rtol": 1e-7, "atol": 1e-7, "norm": "batch"}, "divergence": "exact"},
    )

    def charged(divergence: str, **regularizer: object) -> Tensor:
        model = flow(
            [{"name": "continuous", "network": FIELD}],
            (3,),
            **{**how, "divergence": divergence},
            regularizers=[regularizer],
        )
        model.layers.bijections[0] = linear()
        penalty = model.train().loss(Batch(x), generator=generator("loss")).value
        model.regularizers = ()
        return penalty - model.loss(Batch(x), generator=generator("loss")).value

    times = torch.linspace(0, 1, 401, dtype=torch.float64)
    path = torch.stack([x @ torch.linalg.matrix_exp(1.5 * t * A).T for t in times])
    energy = torch.trapezoid((1.5 * path @ A.T).square().mean(2), times, dim=0)
    bent = torch.trapezoid((2.25 * path @ A.T @ A.T).square().mean(2), times, dim=0)
    rnode = {"name": "kinetic_jacobian", "coefficient": 1.0}
    norm = 2.25 * A.square().sum() / 3
    for divergence in ("exact", "hutchinson"):
        torch.testing.assert_close(charged(divergence, **rnode, jacobian=0.0).detach(), energy, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            charged(divergence, name="taylor", coefficient=1.0).detach(), bent, rtol=0, atol=1e-4
        )
    exact = charged("exact", **rnode, kinetic=0.0).detach()
    torch.testing.assert_close(exact, norm.expand(4), rtol=0, atol=1e-6)
    estimated = charged("hutchinson", **rnode, kinetic=0.0).detach()
    # |J ε|² over all signs: one of these for each row
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    possible = 2.25 * (signs @ A.T).square().sum(1) / 3
    assert ((estimated[:, None] - possible).abs().min(1).values < 1e-6).all() and (estimated - norm).abs().max() > 1e-2
