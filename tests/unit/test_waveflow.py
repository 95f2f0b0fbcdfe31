"""Folded signals and row-autoregressive flows: against the published order of steps, naive inverses and Jacobians."""

import math
from pathlib import Path

import pytest
import torch

from genmodels.config import read
from genmodels.flows.bijection import Bijection, chain
from genmodels.flows.waveflow import fold
from genmodels.metrics.cost import count_evaluations
from genmodels.model import Model
from genmodels.networks.network import set_autocast
from genmodels.networks.shared import Scope, fold_embeddings
from genmodels.networks.weight_norm import fold_weight_norm
from genmodels.registry import Builder, ConfigError, build, resolve
from genmodels.transforms import Identity

CONFIGS = Path(__file__).parents[2] / "configs" / "audio"
NETWORK = {"name": "wavenet2d", "channels": 5, "layers": 3}
SPLINE = {"name": "rational_quadratic", "bins": 5, "bound": 2.0}


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(module, scale=0.3):
    """In float64, every parameter moved off its start."""
    module = module.double()
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.add_(scale * randn(*p.shape, seed=k))
    return module


def layer(shape=(1, 6, 4), condition_shape=None, scale=0.3, network=NETWORK, **more):
    torch.manual_seed(0)
    node = resolve(Bijection, {"name": "row_autoregressive", "network": network, **more}, "test")
    sizes = {"shape": shape, "num_classes": None, "condition_shape": condition_shape, "scope": Scope()}
    return moved(build(Bijection, node, **sizes), scale)


def flow(length=24, mel=(3, 6), layers=None, encoder=True, conditional=True, condition=True):
    torch.manual_seed(0)
    steps = [{"name": "row_autoregressive", "network": NETWORK, "reverse": True}]
    steps.append({"name": "row_autoregressive", "network": NETWORK, "map": SPLINE})
    node = {"name": "flow", "layers": layers or [{"name": "fold", "height": 6}, *steps], "conditional": conditional}
    node |= {"encoder": {"name": "mel_upsampler", "strides": [2, 2]}} if encoder else {}
    sizes = {"shape": (length,), "num_classes": None, "condition_shape": mel if condition else None}
    return moved(build(Model, resolve(Model, node, "test"), **sizes, transform=Identity(), bin_width=None))


# ---- folding ---------------------------------------------------------------------------------------------------------


def test_folding_puts_neighbours_in_one_column():
    f = build(Bijection, {"name": "fold", "height": 3}, shape=(12,), num_classes=None, condition_shape=None)
    z, log_det = f(torch.arange(12.0)[None])
    assert z[0, 0].tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert f.out_shape == (1, 3, 4) and log_det.tolist() == [0]
    assert torch.equal(f.inverse(z)[0], torch.arange(12.0)[None])


@pytest.mark.parametrize("shape", [(13,), (2, 12), (1, 3, 4)])
def test_what_cannot_be_folded_is_refused(shape):
    with pytest.raises(ConfigError, match=r"multiple of height=3 are needed, found items of shape"):
        build(Bijection, {"name": "fold", "height": 3}, shape=shape, num_classes=None, condition_shape=None)
    with pytest.raises(ConfigError, match="height=0"):
        build(Bijection, {"name": "fold", "height": 0}, shape=(12,), num_classes=None, condition_shape=None)


# ---- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("map", [None, SPLINE])
def test_a_row_is_transformed_given_the_rows_before_it_and_its_own_number(reverse, map):
    f = layer(reverse=reverse, map=map)
    jacobian = torch.autograd.functional.jacobian(lambda x: f(x[None])[0][0, 0], randn(1, 6, 4))[:, :, 0]
    jacobian = jacobian.flip(0, 2) if reverse else jacobian
    for i in range(6):
        own = jacobian[i, :, i]
        assert torch.equal(own, own.diagonal().diag()) and (own.diagonal() > 0).all(), "one increasing map per number"
        assert (jacobian[i, :, i + 1 :] == 0).all()
        assert i == 0 or (jacobian[i, :, :i].abs().sum() > 1e-3)


def naive_inverse(f, z, condition=None):
    """As many passes as there are rows, each of which makes one more row right."""
    x = torch.zeros_like(z)
    c = f._condition(condition)
    for _ in range(z.shape[2]):
        shifted = torch.cat((torch.zeros_like(z[:, :, :1]), x[:, :, :-1]), 2)
        x, _ = f._map(f._turned(z), f.network(None, shifted, c), True)
    return f._turned(x)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("map", [None, SPLINE])
@pytest.mark.parametrize("network", [{}, {"height_cycle": 2}, {"kernel": 5}])
@pytest.mark.parametrize("shape", [(1, 20, 4), (2, 5, 3)])
def test_the_inverse_is_the_naive_one_at_any_height(shape, network, map, reverse):
    length = shape[1] * shape[2]
    f = layer(shape, (3, length), map=map, reverse=reverse, network={**NETWORK, **network})
    x, c = randn(4, *shape), randn(4, 3, length, seed=1)
    z, log_det = f(x, c)
    back, back_log_det = f.inverse(z, c)
    # the maps are steep in places: errors of 1e-16 grow over 20 rows
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(back, naive_inverse(f, z, c), rtol=0, atol=1e-8)
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=1e-8)


def test_reversal_turns_signal_and_condition_alike():
    x, c = randn(3, 1, 6, 4), randn(3, 2, 24, seed=1)
    f, backwards = layer(condition_shape=(2, 24)), layer(condition_shape=(2, 24), reverse=True)
    turned = fold(c, 6).flip(2).permute(0, 1, 3, 2).reshape(3, 2, 24)
    z, log_det = f(x, c)
    other, other_log_det = backwards(x.flip(2), turned)
    torch.testing.assert_close(other.flip(2), z, rtol=0, atol=1e-13)
    torch.testing.assert_close(other_log_det, log_det, rtol=0, atol=1e-13)
    assert not torch.allclose(backwards(x.flip(2), c)[0].flip(2), z, atol=1e-3)


def test_reversal_turns_maps_of_conditions_too():
    f, x, condition = layer((1, 6, 4), (3, 6, 4), reverse=True), randn(2, 1, 6, 4), randn(2, 3, 6, 4, seed=1)
    plain = layer((1, 6, 4), (3, 6, 4))
    plain.load_state_dict(f.state_dict())
    z, log_det = plain(x.flip(2), condition.flip(2))
    torch.testing.assert_close(f(x, condition), (z.flip(2), log_det), rtol=0, atol=1e-12)


def test_alternate_reversal_is_the_published_turning_at_every_step():
    """The papers turn x and c round before each of K steps; for even K the latent is then the right way round."""
    nodes = [{"name": "row_autoregressive", "network": NETWORK, "reverse": k % 2 == 0} for k in range(4)]
    builders = tuple(Builder(Bijection, resolve(Bijection, node, "test")) for node in nodes)
    ours = moved(chain(builders, (1, 6, 4), num_classes=None, condition_shape=(2, 24)))
    x, c = randn(3, 1, 6, 4), randn(3, 2, 24, seed=1)
    z, rows, total = x, fold(c, 6), 0.0
    for step in ours.bijections:
        z, rows = z.flip(2), rows.flip(2)
        shifted = torch.cat((torch.zeros_like(z[:, :, :1]), z[:, :, :-1]), 2)
        shift, log_scale = step.network(None, shifted, rows).chunk(2, 1)
        z, total = z * log_scale.exp() + shift, total + log_scale.flatten(1).sum(1)
    torch.testing.assert_close(ours(x, c), (z, total), rtol=0, atol=1e-12)


def test_the_start_is_the_identity_or_the_papers():
    x = randn(2, 1, 6, 4)
    z, log_det = layer(scale=0.0)(x)
    assert torch.equal(z, x) and log_det.abs().max() == 0
    z, log_det = layer(scale=0.0, map={"name": "affine", "form": "exp", "identity": False})(x)
    assert 0 < (z - x).abs().max() < 0.1 and log_det.abs().max() > 0


def test_splines_scale_their_logits_by_the_root_of_the_channels():
    f, unscaled = layer(map=SPLINE), layer(map=SPLINE, scale_logits=False)
    assert (f.scale, unscaled.scale) == (5**-0.5, 1.0)
    assert not torch.allclose(f(randn(2, 1, 6, 4))[0], unscaled(randn(2, 1, 6, 4))[0])


def test_the_inverse_has_the_autocast_of_the_network():
    f, x = layer().float(), randn(8, 1, 6, 4).float()
    seen = []
    f.network.head.conv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    set_autocast(f, torch.bfloat16)
    z, _ = f(x)
    back, _ = f.inverse(z)
    assert set(seen) == {torch.bfloat16} and len(seen) == 7 and z.dtype == back.dtype == torch.float32
    # row by row the same numbers are rounded in the same places, up to the order of sums
    torch.testing.assert_close(back, x, rtol=0, atol=0.05)


def test_an_inverse_counts_as_one_evaluation():
    f, x = layer(), randn(8, 1, 6, 4)
    with count_evaluations(f) as counted:
        z, _ = f(x)
        f.inverse(z[:3])
    f(x), f.inverse(z)
    assert counted.rows == [11]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_networks_and_items_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="Put `fold` before it"):
        layer((24,))
    with pytest.raises(ConfigError, match="ResNet cannot be evaluated row by row"):
        layer(network={"name": "resnet"})
    with pytest.raises(ConfigError, match=r"24 samples, found the shape \[3, 6\].*mel_upsampler"):
        layer(condition_shape=(3, 6))


def test_conditions_that_do_not_fit_are_refused():
    model, x, mel = flow(), randn(2, 24), randn(2, 3, 6, seed=1)
    assert model.log_prob(x, condition=mel).isfinite().all()
    with pytest.raises(ValueError, match="no condition was given"):
        model.log_prob(x)
    with pytest.raises(ValueError, match="no condition was given"):
        model.sample(2)
    for wrong in (randn(2, 4, 6), randn(2, 3, 5), randn(2, 18)):
        with pytest.raises(ValueError, match=r"spectrograms of shape \[B, 3, 6\] are needed"):
            model.log_prob(x, condition=wrong)
    with pytest.raises(ValueError, match="unconditional flow"):
        flow(encoder=False, conditional=False).log_prob(x, condition=mel)
    with pytest.raises(ValueError, match="no conditions"):
        flow(condition=False)
    with pytest.raises(ConfigError, match="mel_upsampler"):
        flow(encoder=False)
    with pytest.raises(ConfigError, match=r"found items of shape \[25\]"):
        flow(length=25, mel=(3, 7))


def test_the_condition_of_a_layer_must_have_its_shape():
    f, x = layer(condition_shape=(3, 24)), randn(2, 1, 6, 4)
    for wrong in (randn(2, 4, 24), randn(2, 3, 18)):
        with pytest.raises(ValueError, match=r"built for \[B, 3, 6, 4\]"):
            f(x, wrong)
    with pytest.raises(ValueError, match="without num_classes or condition_shape"):
        layer()(x, randn(2, 3, 24))


# ---- the whole flow --------------------------------------------------------------------------------------------------


def test_density_and_inverse_of_a_conditional_flow():
    model, x, mel = flow(), randn(3, 24), randn(3, 3, 6, seed=1)
    z = model.encode(x, condition=mel)
    torch.testing.assert_close(model.decode(z, condition=mel), x, rtol=0, atol=1e-9)
    for i in range(3):
        f = lambda v: model.encode(v[None], condition=mel[i : i + 1])[0].flatten()  # noqa: E731, B023
        log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(f, x[i]))[1]
        expected = log_det - 0.5 * z[i].square().sum() - 12 * math.log(2 * math.pi)
        alone = model.log_prob(x[i : i + 1], condition=mel[i : i + 1])[0]
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-9)
    other = model.log_prob(x, condition=mel + 0.5)
    assert ((other - model.log_prob(x, condition=mel)).abs() > 1e-3).all()


def test_samples_depend_on_their_seed_and_condition_alone():
    model, mel = flow(), randn(5, 3, 6, seed=1)
    whole = model.sample(5, condition=mel)
    part = model.sample([3, 1], condition=mel[[3, 1]], batch_size=1)
    torch.testing.assert_close(part, whole[[3, 1]], rtol=0, atol=1e-10)


def test_the_encoder_learns():
    model = flow()
    torch.manual_seed(0)
    (-model.log_prob(randn(4, 24), condition=randn(4, 3, 6)).mean()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters())


# ---- NanoFlow, and the published sizes -------------------------------------------------------------------------------


def nano(count=2, height=6, condition_shape=(2, 24), **more):
    of = {"name": "shared", "of": NETWORK, "embedding": 7, "inject": ["add", "gate"], **more}
    pair = [{"name": "row_autoregressive", "network": of, "reverse": reverse} for reverse in (True, False)]
    node = resolve(Bijection, {"name": "repeat", "layers": pair, "count": count}, "test")
    torch.manual_seed(0)
    shape = (1, height, 24 // height)
    return moved(build(Bijection, node, shape=shape, num_classes=None, condition_shape=condition_shape))


VARIANTS = {
    "nanoflow": {},
    "decomp": {"embedding": 0, "inject": []},
    "naive": {"embedding": 0, "inject": [], "projection": "shared"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("folded", [False, True])
def test_steps_that_share_a_network_invert_row_by_row(variant, folded):
    f, x, c = nano(**VARIANTS[variant]), randn(3, 1, 6, 4), randn(3, 2, 24, seed=1)
    assert len({id(step.network.estimator) for step in f.bijections}) == 1
    z, log_det = f(x, c)
    if folded:
        fold_embeddings(f)
        fold_weight_norm(f)
    back, back_log_det = f.inverse(z, c)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=1e-8)
    one = f.bijections[1]
    torch.testing.assert_close(one.inverse(x, c)[0], naive_inverse(one, x, c), rtol=0, atol=1e-10)


def test_an_embedding_among_the_rows_is_refused_where_it_is_built():
    with pytest.raises(ConfigError, match=r"row by row goes without concat"):
        nano(inject=["concat"])
    with pytest.raises(ConfigError, match="Shared cannot be evaluated row by row"):
        layer(network={"name": "shared", "of": {"name": "resnet"}})


def counts(name, weight_norm=True, **changes):
    """Parameters of a published configuration at inference and in training, without making any of its numbers."""
    repeat = read(CONFIGS / f"{name}.yaml")["model"]["layers"][1]
    repeat["count"] = changes.get("count", repeat["count"])
    for node in repeat["layers"]:
        network = node["network"] if "of" not in node["network"] else node["network"]["of"]
        network |= {"channels": changes.get("channels", network["channels"]), "weight_norm": weight_norm}
        node["network"] |= {
            key: value for key, value in changes.items() if key in ("embedding", "inject", "projection")
        }
    node = {**read(CONFIGS / f"{name}.yaml")["model"]}
    node["layers"] = [node["layers"][0], repeat]
    node["encoder"] = {**node["encoder"], "weight_norm": weight_norm}
    with torch.device("meta"):
        sizes = {"shape": (16000,), "num_classes": None, "condition_shape": (80, 63), "transform": Identity()}
        model = build(Model, node, **sizes, bin_width=None)
    dropped, kept = zip(*(m.foldable() for m in model.modules() if hasattr(m, "foldable")), strict=True)
    total = sum(p.numel() for p in model.parameters())
    return total - sum({p: p.numel() for each in dropped for p in each}.values()) + sum(kept), total


PUBLISHED = [  # parameters at inference, and in training without the gains of weight normalisation
    ("waveflow_ljspeech", {"channels": 64}, 5_925_090, 5_925_090),
    ("waveflow_ljspeech", {}, 22_335_714, 22_335_714),
    ("nanoflow_ljspeech", {"embedding": 0, "inject": [], "projection": "shared"}, 2_792_134, 2_792_134),
    ("nanoflow_ljspeech", {"embedding": 0, "inject": []}, 2_793_954, 2_793_954),
    ("nanoflow_ljspeech", {}, 2_818_530, 3_856_866),
    ("nanoflow_ljspeech", {"embedding": 1024, "count": 8}, 2_845_186, 4_928_002),
]


@pytest.mark.parametrize(("name", "changes", "inference", "training"), PUBLISHED)
@pytest.mark.slow_for("*-22335714", "*-4928002")
def test_published_sizes_to_the_digit(name, changes, inference, training):
    assert counts(name, weight_norm=False, **changes) == (inference, training)
    at_inference, with_gains = counts(name, **changes)
    assert at_inference == inference and with_gains > training
