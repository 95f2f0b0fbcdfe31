"""Equilibrium models: what they learn from, where searches start, what answers cost, and the network made of them."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.studies.plans import ROOT
from genmodels.config import load
from genmodels.diffusion.model import DiffusionModel
from genmodels.dynamics.deq import DEQ
from genmodels.metrics.cost import count_evaluations
from genmodels.model import Model
from genmodels.networks.cells import MLPCell
from genmodels.networks.equilibrium import EquilibriumNetwork, charges, jacobian_norm, warm
from genmodels.networks.network import Network, set_compile
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import BatchNoise, generator
from genmodels.solvers.equilibrium import Implicit
from genmodels.solvers.fixed_point import Picard, RowMap
from genmodels.solvers.step_size import PI
from genmodels.transforms import Identity
from genmodels.types import Batch

TIGHT = {"name": "anderson", "rtol": 1e-11, "atol": 1e-11, "max_iterations": 200}
EXACT = {"name": "implicit", "rtol": 1e-11}


def deq(shape=(3,), targets=(4,), **arguments) -> DEQ:
    node = {"name": "deq", "cell": {"name": "mlp_cell", "hidden": 5, "activation": "tanh", "contraction": 0.8}}
    node |= {"solver": TIGHT, "gradient": EXACT, "precision": "float64", **arguments}
    torch.manual_seed(0)
    return build(Model, resolve(Model, node, "test"), shape=shape, target_shape=targets, transform=Identity())


def batch(n: int = 6, shape=(3,), classes: int | None = 4) -> Batch:
    g = generator("deq")
    x = torch.randn(n, *shape, generator=g, dtype=torch.float64)
    label = torch.randint(classes, (n,), generator=g) if classes else torch.randn(n, 4, generator=g).double()
    return Batch(x, target=label)


def test_predictions_are_read_from_the_fixed_point():
    model, items = deq(), batch()
    cell = model.layer.cell
    z, u = torch.zeros(6, 5, dtype=torch.float64), F.linear(items.x, cell.entrance.weight, cell.entrance.bias)
    for _ in range(200):
        z = torch.tanh(z @ cell.matrix().T + u)
    torch.testing.assert_close(model.predict(items), model.head(z), rtol=1e-9, atol=1e-10)
    loss = model.eval().loss(items)
    residual = model.settle(items, limit=2).logs["residual"]
    assert residual == pytest.approx(model.settle(items, limit=2).found.residual.mean().item()) and residual > 1e-10
    torch.testing.assert_close(loss.value, F.cross_entropy(model.head(z), items.target, reduction="none"))
    assert loss.logs["converged"] == 1 and loss.logs["residual"] < 1e-10


@pytest.mark.parametrize("start", ["first", "predictor"])
def test_the_skip_term_is_the_distance_to_the_start_and_teaches_both_ends(start):
    plain, skipped = deq(start=start, skip=1e-300), deq(start=start, skip=3.0)
    items = batch()
    losses = [model.train().loss(items, generator=torch.Generator()) for model in (plain, skipped)]
    torch.testing.assert_close(skipped.eval().loss(items).value, plain.eval().loss(items).value)
    layer = skipped.layer
    u = layer.cell.inject(None, items.x)
    z0, z = layer.started(u), layer.eval()(u).found.z
    distance = (z - z0).abs().mean(1)
    torch.testing.assert_close(losses[1].value - losses[0].value, 3 * distance)
    assert losses[1].logs["skip"].item() == pytest.approx(distance.mean().item())
    if start == "first":
        torch.testing.assert_close(z0, torch.tanh(u["u"]))
    layer.train()
    (penalty,) = layer(u, noise=None)[1:2]
    names = dict(layer.named_parameters())
    grads = torch.autograd.grad(penalty.sum(), list(names.values()), allow_unused=True)
    touched = {name for name, grad in zip(names, grads, strict=True) if grad is not None and grad.abs().sum() > 0}
    assert "cell.weight" in touched and any(name.startswith("predictor") for name in touched) == (start == "predictor")


def test_gradients_of_the_whole_loss_are_those_of_a_long_unrolled_model():
    """With skip and Jacobian terms; the latter is a function of parameters at a state that counts as constant."""
    model, items = deq(start="first", skip=0.5, jacobian=0.3), batch()
    model.train().loss(items, generator=torch.Generator().manual_seed(3)).value.sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cell = model.layer.cell
    u = cell.inject(None, items.x)["u"]
    w = cell.matrix()
    first = torch.tanh(u)
    z = first
    for _ in range(150):
        z = torch.tanh(z @ w.T + u)
    noise = BatchNoise(6, generator=torch.Generator().manual_seed(3))
    model.transform(items.x, noise)
    eps = noise.normal(5, dtype=torch.float64)
    fixed = z.detach()
    pushed = (eps * (1 - torch.tanh(fixed @ w.T + u).square())) @ w
    value = F.cross_entropy(model.head(z), items.target, reduction="none") + 0.5 * (z - first).abs().mean(1)
    (value + 0.3 * pushed.square().mean(1)).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-7, atol=1e-9)


def test_the_jacobian_term_estimates_its_squared_norm():
    a = torch.randn(4, 4, generator=generator("a"), dtype=torch.float64)
    z = torch.zeros(20_000, 4, dtype=torch.float64)
    noise = BatchNoise(len(z), generator=torch.Generator().manual_seed(0))
    values = jacobian_norm(RowMap(lambda z: z @ a.T), z, noise)
    exact = a.square().sum() / 4
    assert abs(values.mean() - exact) < 4 * values.std() / len(z) ** 0.5


def test_pretraining_is_a_tied_network_of_the_given_depth():
    model, items = deq(pretraining=0.5, depth=3), batch()
    model.train()
    cell = model.layer.cell
    for progress, deep in ((0.2, True), (0.7, False)):
        model.progress = progress
        got = model.loss(items, generator=torch.Generator()).value
        u = cell.inject(None, items.x)["u"]
        z = torch.zeros_like(u)
        for _ in range(3 if deep else 200):
            z = torch.tanh(z @ cell.matrix().T + u)
        expected = F.cross_entropy(model.head(z), items.target, reduction="none")
        torch.testing.assert_close(got, expected)
        for mine, exact in zip(
            *(torch.autograd.grad(v.sum(), model.head.weight) for v in (got, expected)), strict=True
        ):
            torch.testing.assert_close(mine, exact)
    model.progress = 0.5  # the first step that is no longer of it
    assert model.loss(items).logs["nfe"] > 3
    model.progress = 0.2
    assert model.eval().loss(items).logs["converged"] == 1


@pytest.mark.parametrize("start", ["zero", "first", "predictor"])
def test_the_dial_of_an_answer(start):
    """0 iterations read the start, more come nearer to the full answer, and evaluations are counted as made."""
    skip = {"skip": 1.0} if start == "predictor" else {}
    model, items = deq(start=start, solver={"name": "picard", "rtol": 1e-12, "max_iterations": 300}, **skip), batch()
    model.eval()
    u = model.layer.cell.inject(None, items.x)
    torch.testing.assert_close(model.predict(items, iterations=0), model.head(model.layer.started(u)))
    full = model.predict(items)
    gaps = [(model.predict(items, iterations=k) - full).abs().max().item() for k in (0, 1, 3, 9, 27)]
    assert all(a > b for a, b in pairwise(gaps)) and gaps[-1] < 1e-2 * gaps[0]
    for k in (0, 4):
        with torch.no_grad(), count_evaluations(model) as counted:
            model.predict(items, iterations=k)
        found = model.settle(items, limit=k).found
        assert counted.rows[0] == (0 if k == 0 else 6 * 5) + 6 * (start == "first") == int(found.nfe.sum())
    stopped = model.predict(items, solver=Picard(1e-12, 1e-12, 5))
    for k in (4, 9):  # a dial does not reach beyond the solver's own end
        assert torch.equal(model.predict(items, solver=Picard(1e-12, 1e-12, 5), iterations=k), stopped)
    loose = model.predict(items, solver=Picard(1e-2, 1e-2))
    assert (loose - full).abs().max() > 1e-6
    with pytest.raises(ValueError, match="iterations must be at least 0, found -1"):
        model.predict(items, iterations=-1)


@pytest.mark.parametrize(("start", "own"), [("zero", 0), ("first", 1), ("predictor", 1)])
def test_every_evaluation_of_scales_is_counted_and_a_warm_search_makes_none_for_a_start(start, own):
    """A predictor reads f(0, u) where what drives a cell has another shape than its state."""
    cell = {"name": "multiscale_cell", "channels": [4, 4], "head": [3, 5], "expansion": 2, "dropout": 0.0}
    model, items = deq((2, 8, 8), cell=cell, start=start, skip=0.1 * own).eval(), batch(3, (2, 8, 8))
    with torch.no_grad(), warm(model):
        for limit, moved in ((0, own), (2, 3), (0, 0)):  # the first is cold
            with count_evaluations(model) as counted:
                found = model.settle(items, limit=limit).found
            assert counted.rows[0] == int(found.nfe.sum()) == 3 * moved
    assert model.train().loss(items).logs["nfe"] > own


def test_rows_of_a_prediction_are_alone():
    model, items = deq(), batch()
    whole = model.predict(items)
    for i in range(6):
        torch.testing.assert_close(model.predict(items[i : i + 1])[0], whole[i], rtol=1e-9, atol=1e-10)


def test_images_encoders_and_values_as_targets():
    cell = {"name": "multiscale_cell", "channels": [4, 4], "head": [3, 5], "expansion": 2, "dropout": 0.0}
    model = deq((2, 8, 8), cell=cell, solver={"name": "anderson", "rtol": 1e-4, "max_iterations": 100})
    items = batch(3, (2, 8, 8), None)
    state = model.eval().settle(items).found.z
    expected = model.head(model.layer.cell.read(state).mean((2, 3)))
    torch.testing.assert_close(model.predict(items), expected)
    torch.testing.assert_close(model.loss(items).value, (expected - items.target).square().mean(1))
    encoded = deq(encoder={"name": "mlp", "hidden": [7]}, latent=[6])
    assert encoded.layer.cell.item_shape == (6,) and encoded.predict(batch()).shape == (6, 4)


def network(**arguments) -> EquilibriumNetwork:
    torch.manual_seed(0)
    node = {"name": "equilibrium", "cell": {"name": "conv_cell", "channels": 8, "groups": 4}, "solver": TIGHT}
    facts = {"in_shape": (1, 4, 4), "out_shape": (1, 4, 4), "timed": True, "num_classes": 3, "condition_shape": None}
    return build(Network, resolve(Network, node | arguments, "test"), **facts).double().eval()


def test_the_network_reads_the_fixed_point_under_time_and_condition():
    made = network()
    x = torch.randn(5, 1, 4, 4, generator=generator("images"), dtype=torch.float64)
    t, label = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    with count_evaluations(made) as counted:
        out = made(t, x, label)
    found, cell = made.settled.found, made.layer.cell
    assert counted.rows == [int(found.nfe.sum())] and found.converged.all()
    z = found.z
    torch.testing.assert_close(cell(None, z, cell.inject(t, x, label)), z, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(out, made.exit(z))
    flat = network(cell={"name": "mlp_cell", "hidden": 9, "contraction": 0.9})
    assert flat(t, x, label).shape == x.shape


def test_states_keep_the_precision_of_parameters_under_autocast():
    """Which a search to 1e-4 needs: bfloat16 resolves 1/128."""
    solver = {"name": "picard", "rtol": 1e-4, "atol": 1e-4, "max_iterations": 30}
    made = network(solver=solver).float()
    x, t = torch.randn(5, 1, 4, 4, generator=generator("images")), torch.linspace(0.1, 0.9, 5)
    plain = made(t, x, None)
    made.autocast = torch.bfloat16
    out = made(t, x, None)
    assert made.settled.found.z.dtype == out.dtype == torch.float32
    torch.testing.assert_close(out, plain, rtol=0.05, atol=0.05)


def test_a_warm_search_starts_at_the_last_state_and_ends_at_the_same_point():
    made = network()
    x = torch.randn(5, 1, 4, 4, generator=generator("images"), dtype=torch.float64)
    cold = [made(torch.tensor(t).double(), x, None) for t in (0.5, 0.51)]
    costs = made.settled.found.nfe
    with warm(made):
        made(torch.tensor(0.5).double(), x, None)
        again = made(torch.tensor(0.51).double(), x, None)
        assert (made.settled.found.nfe < costs).all()
        torch.testing.assert_close(again, cold[1], rtol=1e-6, atol=1e-7)
        made(torch.tensor(0.51).double(), x[:3], None)  # of another size: from its own start
        assert torch.equal(made.settled.found.nfe, costs[:3])
        made(torch.tensor(0.51).double(), x, None)
    made(torch.tensor(0.51).double(), x, None)
    assert torch.equal(made.settled.found.nfe, costs)


def test_every_layer_of_a_model_is_warm():
    both = torch.nn.ModuleList([network(), network()])
    x, t = torch.randn(2, 1, 4, 4, generator=generator("images"), dtype=torch.float64), torch.tensor(0.5).double()
    with warm(both):
        costs = [[(made(t, x, None), made.settled.found.nfe)[1] for made in both] for _ in range(2)]
    assert all((after < before).all() for before, after in zip(*costs, strict=True))


def test_penalties_in_training_are_measured_from_the_start_and_not_from_a_warm_state():
    model, items = deq(start="first", skip=2.0, pretraining=0.5, depth=2), batch()
    layer, u = model.train().layer, model.layer.cell.inject(None, items.x)
    cold = [layer(u, progress=progress) for progress in (1.0, 0.2)]
    with layer.warm():
        again = [layer(u, progress=progress) for progress in (1.0, 1.0, 0.2)][1:]
        assert torch.equal(layer(u, limit=0).found.z, again[1].found.z)  # the start of a warm search is where it is
    for a, b in zip(again, cold, strict=True):
        torch.testing.assert_close(a.penalty, b.penalty, rtol=1e-8, atol=1e-10)
    assert again[0].found.nfe.sum() < cold[0].found.nfe.sum()


def test_layers_keep_their_own_books():
    facts = {"shape": (3,), "target_shape": (4,), "transform": Identity()}
    shared, cell = Implicit(), partial(MLPCell, 5)
    made = [DEQ(cell, gradient=shared, **facts).train() for _ in range(2)]
    made[0].loss(batch().replace(x=batch().x.float())).value.sum().backward()
    first, second = (model.layer.gradient for model in made)
    assert first.adjoint is not None and second.adjoint is shared.adjoint is None
    logs = made[0].loss(batch().replace(x=batch().x.float())).logs
    assert logs["backward_converged"] == 1 and logs["backward_nfe"] == first.adjoint.nfe
    assert "backward_nfe" not in made[0].eval().loss(batch().replace(x=batch().x.float())).logs


def test_a_network_holds_no_graph_but_that_of_its_penalty():
    x, t = torch.randn(2, 1, 4, 4, generator=generator("images"), dtype=torch.float64), torch.tensor(0.5).double()
    for made in (network(start="first", skip=1.0), network().train()):
        made(t, x, None)
        copy.deepcopy(made)  # which refuses tensors inside a graph


def test_penalties_that_a_model_would_not_collect_are_refused():
    facts = {"shape": [2], "target_shape": [2], "transform": {"name": "identity"}, "num_classes": None}
    facts |= {"condition_shape": None, "bin_width": None}
    folder = ROOT / "configs" / "digits"
    node = "{name: %s, network: {name: equilibrium, cell: mlp_cell, start: first, %s: 1}}"
    for key in ("skip", "jacobian"):
        load(folder / "flow_matching_equilibrium.yaml", [f"model={node % ('diffusion', key)}"]).model(facts)
        with pytest.raises(ConfigError, match="NeuralODE does not add the penalties"):
            load(folder / "deq.yaml", [f"model={node % ('neural_ode', key)}"]).model(facts)


def test_losses_that_differentiate_a_cell_are_not_compiled():
    for model in (deq(jacobian=0.1), network(jacobian=0.1)):
        with pytest.raises(ConfigError, match="differentiates its network"):
            set_compile(model)


def test_what_a_network_charges_is_added_to_the_loss_of_a_diffusion_model():
    node = {"name": "equilibrium", "cell": {"name": "mlp_cell", "hidden": 8, "contraction": 0.8}, "start": "first"}
    values, slopes = [], []
    for skip in (0.0, 2.0):
        torch.manual_seed(0)
        tree = {"name": "diffusion", "network": node | {"skip": skip}}
        facts = {"num_classes": None, "condition_shape": None, "bin_width": None, "transform": Identity()}
        model: DiffusionModel = build(Model, resolve(Model, tree, "test"), shape=(2,), **facts)
        items = Batch(torch.randn(4, 2, generator=generator("points")))
        found = model.train().loss(items, generator=torch.Generator().manual_seed(1))
        values.append(found)
        slopes.append(torch.autograd.grad(found.value.sum(), model.denoiser.network.layer.cell.weight)[0])
        assert charges(model) == (0.0, {})  # asked once, and gone
    extra: Tensor = values[1].value - values[0].value
    assert not torch.allclose(*slopes, rtol=0.01)
    assert (extra > 0).all() and extra.mean().item() == pytest.approx(2 * values[1].logs["skip"].item(), rel=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.slow_for("2.0")
def test_warm_samples_are_the_cold_ones_for_fewer_evaluations(guidance):
    """To the tolerance of the fixed points; item i still depends on its own seed alone."""
    cell = {"name": "conv_cell", "channels": 8, "groups": 4}
    solver = {"name": "anderson", "rtol": 1e-5, "atol": 1e-5, "max_iterations": 100}
    tree = {"name": "diffusion", "network": {"name": "equilibrium", "cell": cell, "solver": solver, "start": "first"}}
    facts = {"num_classes": 3, "condition_shape": None, "bin_width": None, "transform": Identity()}
    torch.manual_seed(0)
    model: DiffusionModel = build(Model, resolve(Model, tree, "test"), shape=(1, 4, 4), **facts).eval()
    label, how = torch.tensor([0, 1, 2, 0]), {"num_steps": 30, "guidance": guidance}
    found, costs = [], []
    for warm_start in (False, True):
        with count_evaluations(model) as counted:
            found.append(model.sample([3, 4, 5, 6], condition=label, warm_start=warm_start, **how))
        costs.append(counted.per_item(4))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    assert costs[1] < 0.9 * costs[0]
    alone = model.sample([5], condition=label[2:3], warm_start=True, **how)
    torch.testing.assert_close(alone[0], found[1][2], rtol=1e-4, atol=1e-4)
    how |= {"num_steps": 2, "warm_start": True}
    parts = model.sample([3, 4, 5, 6], condition=label, batch_size=2, **how)
    assert torch.equal(parts[2:], model.sample([5, 6], condition=label[2:], **how))  # nothing of the part before
    with pytest.raises(ValueError, match="warm_start needs steps that all rows share"):
        model.sample(2, warm_start=True, controller=PI())
    model.denoiser.network = torch.nn.Identity()
    with pytest.raises(ValueError, match="no equilibrium network whose searches"):
        model.sample(2, warm_start=True)


def test_impossible_models_are_refused():
    for message, arguments in (
        ("nothing to learn", {"skip": 1.0}),
        ("nothing to learn", {"predictor": {"name": "mlp"}}),
        ("skip >= 0", {"skip": -1.0, "start": "first"}),
        ("depth >= 1", {"depth": 0}),
        ("leaves the predictor as it began", {"start": "predictor"}),
        ("no encoder and latent: \\[4\\]. Set both", {"latent": [4]}),
        ("an encoder and latent: None. Set both", {"encoder": {"name": "mlp"}}),
    ):
        with pytest.raises(ConfigError, match=message):
            deq(**arguments)
    with pytest.raises(ConfigError, match="no target"):
        deq(targets=None)
    with pytest.raises(ValueError, match="has no target"):
        deq().loss(Batch(torch.zeros(2, 3)))
