"""One network for all steps of a flow: what steps share, what they own, what that costs, and what inference drops."""

import copy
import pickle

import pytest
import torch
from torch import nn

from genmodels.flows.bijection import Bijection
from genmodels.metrics.cost import count_evaluations, inference_parameters, num_parameters
from genmodels.networks.network import Modulation, Network, Shareable, Site, set_autocast
from genmodels.networks.shared import Scope, Shared, _another, fold_embeddings
from genmodels.registry import ConfigError, build, resolve

RESIDUAL = {"name": "residual_mlp", "hidden": 12, "blocks": 2}
TRUNKS = {
    "mlp": ({"name": "mlp", "hidden": [12, 10]}, (3,)),
    "residual_mlp": (RESIDUAL, (3,)),
    "resnet": ({"name": "resnet", "width": 8, "blocks": 2}, (2, 4, 6)),
}
every = pytest.mark.parametrize("name", TRUNKS)
NAIVE = {"projection": "shared"}
DECOMP = {}
NANO = {"embedding": 5, "inject": ["add", "gate"]}


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def move(module, size=0.3):
    """Off the start, where zeros would hide what depends on what."""
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.add_(size * randn(*p.shape, seed=k))
    return module


def network(node, shape, seed=0, **context):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"in_shape": shape, "out_shape": shape, "timed": False, "num_classes": None, "condition_shape": None}
        return build(Network, node, **sizes, **context).double()


def steps(count, of=RESIDUAL, shape=(3,), moved=True, **how):
    """Networks that share, as a `repeat` would build them."""
    scope = Scope()
    node = {"name": "shared", "of": of, **how}
    made = nn.ModuleList(network(node, shape, seed, scope=scope) for seed in range(count))
    return (move(made) if moved else made).eval()


def flow(count, how, of=RESIDUAL, shape=(4,), layers=None):
    coupling = {"name": "coupling", "network": of if how is None else {"name": "shared", "of": of, **how}}
    node = {"name": "repeat", "count": count, "layers": layers or ["permutation", coupling]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        node = resolve(Bijection, node, "test")
        return build(Bijection, node, shape=shape, num_classes=None, condition_shape=None).double().eval()


# ---- what steps share and own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [NAIVE, DECOMP, NANO], ids=["naive", "decomp", "nanoflow"])
def test_steps_share_the_network_and_own_the_rest(how):
    first, second = steps(2, **how)
    assert first.estimator is second.estimator and first.maps is second.maps
    assert (first.head is second.head) == (how is NAIVE)
    x = randn(4, 3)
    assert torch.equal(first(None, x), second(None, x)) == (how is NAIVE)
    if how is NANO:  # with one projection the embeddings and gates alone tell the steps apart
        second.head = first.head
        assert (first(None, x) - second(None, x)).abs().amax() > 1e-3


def test_each_repeat_and_each_shape_has_a_network_of_its_own():
    couplings = [
        {"name": "coupling", "swap": swap, "network": {"name": "shared", "of": RESIDUAL}} for swap in (False, True)
    ]

    def trunks(module):
        return {id(m.estimator) for m in module.modules() if isinstance(m, Shared)}

    assert len(trunks(flow(3, None, shape=(4,), layers=couplings))) == 1
    assert len(trunks(flow(3, None, shape=(5,), layers=couplings))) == 2  # 2 -> 3 components, and 3 -> 2
    inner = {"name": "repeat", "count": 2, "layers": couplings}
    assert len(trunks(flow(3, None, shape=(4,), layers=[inner]))) == 3
    inverted = [{"name": "inverse", "of": couplings[0]}, couplings[1]]
    assert len(trunks(flow(3, None, shape=(4,), layers=inverted))) == 1
    gated = {**couplings[1], "network": {**couplings[1]["network"], "inject": ["gate"]}}
    assert len(trunks(flow(3, None, shape=(4,), layers=[couplings[0], gated]))) == 2


def test_embeddings_start_orthonormal():
    table = torch.stack([step.embedding for step in steps(8, moved=False, embedding=8, inject=["add"])]).detach()
    torch.testing.assert_close(table @ table.T, torch.eye(8).double(), rtol=0, atol=1e-6)  # made in float32
    table = torch.stack([step.embedding for step in steps(5, moved=False, embedding=2, inject=["add"])]).detach()
    for block in (table[:2], table[2:4], table[4:]):  # more steps than dimensions: as many at a time as there is room
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)).double(), rtol=0, atol=1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.randn(3, 2, dtype=torch.float64)
        torch.manual_seed(0)
        drawn = []
        third = [_another(drawn, 2) for _ in range(3)][2]
    torch.testing.assert_close(third.double(), noise[2] / noise[2].norm(), rtol=0, atol=1e-6)  # not what rounding left


def test_gates_start_open_and_added_biases_do_not_start_at_zero():
    (step,) = steps(1, moved=False, **NANO)
    assert torch.equal(step.gates, torch.zeros_like(step.gates))
    assert step.added().abs().min() > 0


@every
def test_a_step_is_its_head_on_the_modulated_network(name):
    node, shape = TRUNKS[name]
    step, x = steps(2, node, shape, **NANO)[1], randn(5, *shape)
    told, used, opened = [], 0, 0
    added = step.maps.weight @ step.embedding + step.maps.bias
    for site in step.estimator.sites:
        told.append(Modulation(added[used : used + site.bias], step.gates[opened : opened + site.gate]))
        used, opened = used + site.bias, opened + site.gate
    assert (used, opened) == (len(added), len(step.gates))
    expected = step.estimator.finish(step.head, step.estimator.features(None, x, None, told))
    torch.testing.assert_close(step(None, x), expected, rtol=0, atol=1e-12)


def test_concat_joins_the_embedding_to_vectors():
    step, x = steps(2, embedding=4, inject=["concat"])[1], randn(5, 3)
    g = step.estimator
    expected = step.head(g.features(None, torch.cat((x, step.embedding.expand(5, 4)), 1)))
    torch.testing.assert_close(step(None, x), expected, rtol=0, atol=1e-12)


def test_concat_joins_normalised_maps_to_images():
    node, shape = TRUNKS["resnet"]
    fresh = steps(2, node, shape, moved=False, embedding=2, inject=["concat", "gate"])
    assert fresh[0].embedding is None and fresh[0].map.shape == (2, 4, 6)
    assert not torch.equal(fresh[0].map, fresh[1].map)
    x = randn(5, *shape)
    joined = fresh[1]._joined(x)
    assert torch.equal(joined[:, :2], x) and (joined[1:, 2:] == joined[:1, 2:]).all()
    flat = joined[0, 2:].flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(flat.std(1), torch.ones(2).double(), rtol=0, atol=1e-6)
    step = move(fresh)[1]
    e = step.log_scale.exp() * step.map + step.shift
    gates = [Modulation(None, gate) for gate in step.gates.split([8, 8])]
    features = step.estimator.features(None, torch.cat((x, e.expand(5, 2, 4, 6)), 1), None, gates)
    torch.testing.assert_close(step(None, x), step.head(features), rtol=0, atol=1e-12)


def test_a_flow_of_shared_steps_is_invertible_with_the_volume_of_its_jacobian():
    f, x = move(flow(3, NANO), 0.2), randn(6, 4)
    z, log_det = f(x)
    torch.testing.assert_close(f.inverse(z)[0], x, rtol=0, atol=1e-9)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: f(v[None])[0][0], row) for row in x])
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-10)
    with count_evaluations(f) as counted:
        f(x)
    assert counted.rows == [6, 6, 6] and counted.per_item(6) == 1


@pytest.mark.parametrize("how", [NAIVE, DECOMP, NANO], ids=["naive", "decomp", "nanoflow"])
def test_shared_masked_networks_keep_their_order_and_their_sweep(how):
    network = {"name": "shared", "of": {"name": "made", "hidden": 12, "order": [2, 0, 3, 1]}, **how}
    f, x = move(flow(3, None, layers=[{"name": "autoregressive", "network": network}]), 0.2), randn(6, 4)
    z, log_det = f(x)
    torch.testing.assert_close(f.inverse(z)[0], x, rtol=0, atol=1e-9)
    torch.testing.assert_close(f.inverse(z)[1], -log_det, rtol=0, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v[None])[0][0], x[0])
    order = f.bijections[0].network.order
    assert torch.equal(order, torch.tensor([2, 0, 3, 1]))
    assert torch.equal(jacobian[order][:, order].triu(1), torch.zeros(4, 4).double())
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-10)
    fold_embeddings(f)
    torch.testing.assert_close(f.inverse(z)[0], x, rtol=0, atol=1e-9)


def test_only_networks_that_can_be_swept_offer_it():
    assert not hasattr(steps(1)[0], "sweep") and not hasattr(steps(1)[0], "rows") and not hasattr(steps(1)[0], "order")


def test_couplings_start_as_the_identity_with_heads_of_either_kind():
    for how in (NAIVE, DECOMP, NANO):
        f, x = (
            flow(2, how, layers=[{"name": "coupling", "network": {"name": "shared", "of": RESIDUAL, **how}}]),
            randn(4, 4),
        )
        torch.testing.assert_close(f(x)[0], x, rtol=0, atol=1e-12)
        assert f.bijections[0].scale == 12**-0.5


def test_copies_share_as_their_original_does():
    made = steps(2, **NANO)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other[0].estimator is other[1].estimator and other[0].maps is other[1].maps
        assert other[0].estimator is not made[0].estimator


def test_autocast_is_not_widened_by_what_steps_are_told():
    (step,) = steps(1, of=TRUNKS["mlp"][0], **NANO)
    seen, step = [], step.float()
    step.estimator.dropout.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    set_autocast(step, torch.bfloat16)
    assert step(None, torch.zeros(2, 3)).dtype == torch.float32
    assert seen == [torch.bfloat16] * 2


# ---- inference ------------------------------------------------------------------------------------------------------


def test_biases_are_kept_while_nothing_changes_and_no_longer():
    step = steps(2, **NANO)[1]

    def now():
        with torch.no_grad():
            kept = step.added()
            expected = step.maps.weight @ step.embedding + step.maps.bias
        torch.testing.assert_close(kept, expected, rtol=0, atol=1e-12 if kept.dtype == torch.float64 else 1e-5)
        return kept

    assert now() is now()
    with torch.enable_grad():
        assert step.added().requires_grad  # a gradient is wanted: computed again
    optimizer = torch.optim.SGD(step.parameters(), 0.1)
    step(None, randn(2, 3)).sum().backward()
    changes = [
        lambda: step.maps.weight.mul_(1.5),
        lambda: step.maps.bias.add_(1.0),
        lambda: setattr(step.embedding, "data", step.embedding.data * 2),  # another memory
        lambda: step.load_state_dict({k: v + 0.5 for k, v in step.state_dict().items()}),
        lambda: setattr(step, "embedding", nn.Parameter(step.embedding.detach() + 1)),
        lambda: step.float() and step.double(),
        lambda: optimizer.step(),
        lambda: step.float(),
    ]
    for change in changes:
        before = now()
        with torch.no_grad():
            change()
        assert now() is not before
    other = copy.deepcopy(step)
    with torch.no_grad():
        other.maps.weight.zero_()
        assert torch.equal(other.added(), other.maps.bias) and not torch.equal(step.added(), step.maps.bias)
    with torch.no_grad():
        step.maps.bias.add_(1.0)
    with torch.inference_mode():
        assert step.added().is_inference() and step._cached is None  # or autograd would meet it later
    x = randn(2, 3).float().requires_grad_()
    step.requires_grad_(False)(None, x).sum().backward()
    assert x.grad.abs().min() > 0


def test_a_training_pass_forgets_what_was_kept():
    step = steps(1, **NANO)[0]
    with torch.no_grad():
        step.added()
    step.train()(None, randn(2, 3)).sum().backward()
    assert step._cached is None and step.embedding.grad is not None


@pytest.mark.parametrize("inject", [["add"], ["add", "gate"], ["concat", "add", "gate"], ["gate", "concat"], []])
def test_folding_keeps_the_function_and_gives_the_number_that_was_announced(inject):
    how = {"embedding": 5 if {"add", "concat"} & {*inject} else 0, "inject": inject}
    f, x = move(flow(3, how)), randn(6, 4)
    before, announced = f(x), inference_parameters(f)
    held = num_parameters(f)
    fold_embeddings(f)
    assert num_parameters(f) == inference_parameters(f) == announced
    torch.testing.assert_close(f(x), before, rtol=0, atol=1e-13)
    torch.testing.assert_close(f.inverse(before[0])[0], x, rtol=0, atol=1e-9)
    dropped = 24 * (5 + 1) + (0 if "concat" in inject else 3 * 5) - 3 * 24  # two sites of 12 biases, three steps
    assert held - announced == (dropped if "add" in inject else 0)
    fold_embeddings(f)  # again: nothing is left to fold
    assert num_parameters(f) == announced


class Sites(Shareable):
    """A network with the sites and the number of parameters of the published audio estimator, and nothing else."""

    def __init__(self, *, in_shape, out_shape, **context):
        super().__init__()
        self.in_shape, self.out_shape = in_shape, out_shape
        self.sites, r = (Site(256, 128),) * 8, 128
        self.weight = nn.Parameter(torch.empty(2 * r + 8 * (20 * r * r + 166 * r)))
        self.head = self.new_head()

    def new_head(self):
        return nn.ParameterList([nn.Parameter(torch.empty(128, 2)), nn.Parameter(torch.empty(4))])

    def features(self, t, x, condition=None, modulation=None):
        raise NotImplementedError

    finish = features


@pytest.mark.parametrize(
    ("count", "how", "training", "inference"),
    [
        (8, NAIVE, 2_792_134, 2_792_134),
        (8, DECOMP, 2_793_954, 2_793_954),
        (8, {"embedding": 512, "inject": ("add", "gate")}, 3_856_866, 2_818_530),
        (16, {"embedding": 1024, "inject": ("add", "gate")}, 4_928_002, 2_845_186),
    ],
)
def test_the_published_audio_counts(count, how, training, inference):
    """Weight norms folded, with the 194 parameters of the upsampler, which no step shares."""
    scope, sizes = Scope(), {"in_shape": (1, 16, 4), "out_shape": (2, 16, 4), "timed": False}
    context = {**sizes, "num_classes": None, "condition_shape": None, "scope": scope}
    made = nn.ModuleList(Shared(Sites, **how, **context) for _ in range(count))
    assert num_parameters(made) + 194 == training
    assert inference_parameters(made) + 194 == inference
    fold_embeddings(made)
    assert num_parameters(made) + 194 == inference


# ---- what steps cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [8, 32])
def test_steps_cost_what_they_own(hidden):
    """Per step of a coupling on 4 components: (H + 1) · 46 for its head, E and 2 H for embedding and gates, no H²."""
    of, blocks, out, e = {**RESIDUAL, "hidden": hidden}, 2, 2 * 23, 5
    trunk = (2 + 1) * hidden + blocks * 2 * (hidden + 1) * hidden
    head, told = (hidden + 1) * out, e + blocks * hidden
    maps = (e + 1) * blocks * hidden
    for count in (4, 8):
        assert num_parameters(flow(count, None, of)) == count * (trunk + head)
        assert num_parameters(flow(count, NAIVE, of)) == trunk + head
        assert num_parameters(flow(count, DECOMP, of)) == trunk + count * head
        f = flow(count, NANO, of)
        assert num_parameters(f) == trunk + maps + count * (head + told)
        assert inference_parameters(f) == trunk + count * (head + 2 * blocks * hidden)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"embedding": 0, "inject": ["add"]}, "needs an embedding of at least 1"),
        ({"embedding": -1}, "needs an embedding of at least 1"),
        ({"embedding": 4}, "has no use with inject=\\[\\]. Name concat or add"),
        ({"embedding": 4, "inject": ["gate"]}, "has no use"),
        ({"embedding": 4, "inject": ["add", "add"]}, "each way counts once"),
        ({"embedding": 4, "inject": ["multiply"]}, "'concat' | 'add' | 'gate'"),
        ({"of": {"name": "residual_mlp", "blocks": 0}, "inject": ["gate"]}, "no layer for 'gate'"),
        ({"of": {"name": "shared", "of": RESIDUAL}}, "shared cannot be shared: .*mlp, residual_mlp, resnet"),
    ],
)
def test_contradictions_are_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        steps(1, **{"of": RESIDUAL, **how})


def test_networks_that_cannot_be_shared_are_refused():
    with pytest.raises(ConfigError, match=r"shared\.of: unet cannot be shared.*Those that can: .*residual_mlp, resnet"):
        steps(1, {"name": "unet", "channels": 8, "multipliers": [1], "blocks": 1, "heads": 2}, (2, 4, 4))
    with pytest.raises(ConfigError, match=r"batch normalisation cannot be shared.*batch_norm: false"):
        steps(1, {"name": "resnet", "width": 8, "batch_norm": True}, (2, 4, 4))


def test_an_embedding_among_the_inputs_of_a_masked_network_is_refused():
    with pytest.raises(ConfigError, match=r"made is masked.*Use inject: \[add, gate\]"):
        steps(1, {"name": "made", "hidden": 12}, embedding=2, inject=["concat"])


def test_outside_of_a_repeat_there_is_nothing_to_share_with():
    node = {"name": "coupling", "network": {"name": "shared", "of": RESIDUAL}}
    with pytest.raises(ConfigError, match="Put `shared` into the layers of a `repeat`"):
        build(Bijection, node, shape=(4,), num_classes=None, condition_shape=None)
