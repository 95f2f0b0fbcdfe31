"""NanoFlow's image models: published numbers of parameters, derived by hand, and the start of what steps share."""

from pathlib import Path

import pytest
import torch

from genmodels.config import load
from genmodels.flows.bijection import Bijection
from genmodels.metrics.cost import inference_parameters, num_parameters
from genmodels.networks.shared import Shared
from genmodels.registry import build, resolve

FILE = Path(__file__).resolve().parents[2] / "configs" / "cifar10" / "nanoflow_glow.yaml"
FACTS = {"shape": [3, 32, 32], "num_classes": 10, "condition_shape": None, "target_shape": None, "bin_width": 1.0}
WIDTH = 256


def overrides(count, embedding, inject, projection):
    for k in range(3):
        step = f"model.layers[0].levels[{k}][1]"
        shared = f"{step}.layers[2].network"
        yield f"{step}.count={count}"
        yield f"{shared}.embedding={embedding * 2**k}"
        yield f"{shared}.inject=[{','.join(inject)}]"
        yield f"{shared}.projection={projection}"


def by_hand(count, e, inject, projection):
    """Priors; per level of C channels one estimator of six 3x3 convolutions with scale and shift; per step ActNorm, 1x1
    convolution, and what is its own: last layer, map of embeddings with scale and shift, gates."""
    total = sum(9 * a * b + 2 * b for a, b in ((6, 12), (12, 24), (96, 96)))
    for k, (c, side) in enumerate(((12, 16), (24, 8), (48, 4))):
        joined = e * 2**k if "concat" in inject else 0
        total += 9 * (c // 2 + joined) * WIDTH + 5 * 9 * WIDTH**2 + 6 * 2 * WIDTH
        head = WIDTH * c + 2 * c
        gates = 6 * WIDTH if "gate" in inject else 0
        total += count * (2 * c + 2 * c**2 + c + joined * (side**2 + 2) + gates)
        total += head * (count if projection == "own" else 1)
    return total


@pytest.mark.parametrize(
    ("variant", "published"),
    [
        ((32, 0, (), "shared"), 9_263_064),
        ((32, 0, (), "own"), 9_934_896),
        ((32, 1, ("concat", "gate"), "own"), 10_113_264),
        ((48, 3, ("concat", "gate"), "own"), 10_718_544),
    ],
    ids=["naive", "decomp", "nanoflow", "nanoflow48"],
)
@pytest.mark.slow_for("nanoflow48", "decomp")
def test_the_published_image_counts(variant, published):
    config = load([FILE], [*overrides(*variant)], blank=True)
    with torch.device("meta"):
        model = config.model({**FACTS, "transform": config.tree["data"]["transform"]})
    assert num_parameters_on_meta(model) == published == by_hand(*variant)
    assert f"{published:,}" in FILE.read_text()


def num_parameters_on_meta(model):
    """Tensors on the meta device all lie at the address 0: they are told apart as objects."""
    return sum(p.numel() for p in model.parameters())


def test_the_file_is_the_published_model():
    text = load([FILE], blank=True).tree
    assert load([FILE], [*overrides(32, 1, ("concat", "gate"), "own")], blank=True).tree == text


def flow(count=3, **how):
    network = {"name": "shared", "of": {"name": "glow", "width": 8, "form": "large"}, **how}
    layers = [{"name": "act_norm"}, {"name": "coupling", "map": {"name": "affine", "form": "glow"}, "network": network}]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        node = resolve(Bijection, {"name": "repeat", "count": count, "layers": layers}, "test")
        return build(Bijection, node, shape=(4, 4, 4), num_classes=None, condition_shape=None).double()


def test_the_first_step_starts_the_normalisations_that_all_share():
    how = {"embedding": 2, "inject": ["concat", "gate"]}
    x = 3 * torch.randn(32, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    alone, f = flow(1, **how), flow(3, **how)
    alone.initialize(x)
    f.initialize(x)
    first = {k: v.clone() for k, v in f.bijections[1].network.estimator.state_dict().items()}
    for key, value in alone.bijections[1].network.estimator.state_dict().items():
        assert torch.equal(first[key], value), key
    layer = f.bijections[1].network.estimator.layers[0]
    assert layer.initialized and layer.log_scale.abs().min() > 0.01
    y = f.bijections[0](x)[0][:, :2]
    normalised = torch.nn.functional.conv2d(f.bijections[1].network._joined(y), layer.weight, padding="same")
    normalised = normalised * layer.log_scale.exp()[:, None, None] + layer.shift[:, None, None]
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(8).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(8).double(), rtol=0, atol=1e-10)
    f.initialize(2 * x + 1)
    assert all(torch.equal(first[k], v) for k, v in f.bijections[1].network.estimator.state_dict().items())


@pytest.mark.parametrize("inject", [["concat", "gate"], ["add", "gate"]])
def test_a_shared_glow_is_invertible_and_gates_multiply_by_their_exponential(inject):
    f = flow(2, embedding=2, inject=inject)
    x = torch.randn(6, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f.initialize(x)
    with torch.no_grad():
        for k, p in enumerate(f.parameters()):
            noise = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
            p.add_(0.02 * noise)  # weights start at 0.05: more would pile up over six layers
    z, log_det = f(x)
    torch.testing.assert_close(f.inverse(z)[0], x, rtol=0, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v[None])[0][0].flatten(), x[0]).reshape(64, 64)
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-9)
    step = next(m for m in f.modules() if isinstance(m, Shared))
    kept = x[:, :2]
    before = step(None, kept)
    with torch.no_grad():  # the first layer's gate alone: relu(exp(γ) u) = exp(γ) relu(u)
        step.gates[:8] += 0.7
        moved = step(None, kept)
        step.gates[:8] -= 0.7
        step.estimator.layers[1].weight.mul_(torch.tensor(0.7, dtype=torch.float64).exp())
    torch.testing.assert_close(moved, step(None, kept), rtol=0, atol=1e-9)
    assert (moved - before).abs().max() > 1e-6
    assert inference_parameters(f) == num_parameters(f) - (2 * 2 + (2 + 1) * 48 - 2 * 48 if "add" in inject else 0)
