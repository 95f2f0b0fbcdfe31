"""The contract of every registered model, on points of the plane and on images that are neither square nor grey."""

import copy
import inspect
from functools import cache
from typing import Literal

import pytest
import torch

from genmodels import registry
from genmodels.config import Config
from genmodels.data.dataset import Dataset
from genmodels.data.memory import InMemory
from genmodels.dynamics.regularization import Regularizer
from genmodels.model import Model
from genmodels.rng import BatchNoise, generator
from genmodels.schema import MEMBERS
from genmodels.solvers.base import Fixed
from genmodels.solvers.runge_kutta import RK4
from genmodels.solvers.step_size import PI
from genmodels.types import Batch, SupportsEncode, SupportsLogProb, SupportsSample
from tests.oracles import MIXTURE, grid

SPLINES = {
    "name": "coupling",
    "map": {"name": "rational_quadratic", "bins": 6},
    "network": {"name": "residual_mlp", "hidden": 24, "blocks": 1},
}
FLOW = [{"name": "repeat", "count": 2, "layers": ["act_norm", "lu_linear", SPLINES]}]
RESIDUAL = {"name": "residual_mlp", "hidden": 24}
DIT = {"name": "dit", "patch": 4, "width": 16, "depth": 1, "heads": 2}
VAE = {"encoder": RESIDUAL, "decoder": RESIDUAL, "latent": 2, "context": 8}
FIELD = {"name": "concat_mlp", "hidden": [16, 16], "time": "squash"}
CONV = {"name": "concat_conv", "hidden": [8]}
TANH = {"name": "mlp", "hidden": [16], "activation": "tanh"}
MADE, TWO = {"name": "made", "hidden": 24, "blocks": 1}, {"components": 2}
CLASSIFY = {"name": "contract_series", "task": "classify"}

EVEN = {"name": "potential", "even": True, "basis": {"name": "b_spline", "count": 6}}
BRIEF = {"starts": 8, "adapt": 10, "record": 20, "least": 4, "most": 4}


def langevin(prior: str, scale: float) -> dict:
    """A process that relaxes within 5 units of its time."""
    return {"name": "langevin", "prior": {"name": prior, "scale": scale}, "clock": {"name": "constant", "total": 5.0}}


# name -> (data set, arguments); a new model needs a line here
EXAMPLES = {
    "flow": [
        ("contract_plane", {"layers": FLOW}),
        ("contract_plane", {"layers": FLOW, "conditional": True}),
        ("contract_images", {"layers": ["lu_linear", "flatten", SPLINES]}),
    ],
    "diffusion": [
        ("contract_plane", {"network": {"name": "mlp", "hidden": [24, 24]}}),
        (
            "contract_plane",
            {
                "network": RESIDUAL,
                "schedule": "trigonometric",
                "prediction": "v",
                "coupling": "minibatch_ot",
                "weighting": "uncertainty",
            },
        ),
        ("contract_images", {"network": DIT, "prediction": "edm", "schedule": "edm", "times": "log_normal"}),
    ],
    "multivariate_diffusion": [
        ("contract_plane", {"network": {"name": "mlp", "hidden": [24, 24]}, "conditional": False}),
        ("contract_plane", {"network": RESIDUAL, "diffusion": {"name": "mdm", "diffusion": [[0.5, 0.1], [0.1, 1.0]]}}),
    ],
    "local_dsm": [
        (
            "contract_plane",
            {
                "network": {"name": "mlp", "hidden": [24, 24]},
                "process": langevin("logistic", 0.4),
                "residual": True,
                "t_min": 0.2,
            },
        ),
        (
            "contract_images",
            {"network": DIT, "process": langevin("gaussian", 0.5), "variance": "control", "t_min": 0.2},
        ),
    ],
    "vae": [
        ("contract_plane", {**VAE, "prior": FLOW, "posterior": FLOW}),
        ("contract_plane", {**VAE, "conditional": True}),
        ("contract_images", {**VAE, "prior": FLOW}),
        ("contract_bits", {**VAE, "posterior": FLOW}),
    ],
    "nade": [
        ("contract_bits", {"hidden": 16}),
        ("contract_bits", {"hidden": 16, "order": "any", "conditional": True}),
        ("contract_plane", {"hidden": 16, "activation": "relu", "rescale": True, "conditional": True}),
        ("contract_images", {"hidden": 16, "order": "random", "observation": {"name": "logistic_mixture", **TWO}}),
    ],
    "made": [
        ("contract_bits", {"network": MADE, "order": "any"}),
        ("contract_bits", {"network": MADE, "conditional": True}),
        ("contract_plane", {"network": MADE, "observation": {"name": "gaussian_mixture", **TWO}}),
        ("contract_images", {"network": {**MADE, "hidden": 288}, "observation": {"name": "gaussian_mixture", **TWO}}),
    ],
    "cnf": [
        ("contract_plane", {"layers": [{"name": "continuous", "network": FIELD, "end": 0.5, "learn_end": True}]}),
        ("contract_plane", {"layers": ["act_norm", {"name": "continuous", "network": FIELD}], "conditional": True}),
        ("contract_images", {"layers": ["squeeze", "act_norm", {"name": "continuous", "network": CONV}]}),
    ],
    "neural_ode": [
        ("contract_targets", {"network": FIELD, "augment": 1}),
        ("contract_targets", {"network": FIELD, "encoder": RESIDUAL, "latent": [3], "controller": "fixed"}),
    ],
    "deq": [
        ("contract_targets", {"cell": {"name": "mlp_cell", "hidden": 6, "activation": "tanh", "contraction": 0.5}}),
        (
            "contract_targets",
            {"cell": {"name": "subhomogeneous", "hidden": 6}, "start": "predictor", "skip": 1.0, "jacobian": 0.1},
        ),
    ],
    "gru": [
        ("contract_series", {"hidden": 8, "decay": True}),
        ({"name": "contract_series", "task": "classify"}, {"hidden": 8}),
    ],
    "ode_rnn": [
        ("contract_series", {"field": TANH, "hidden": 6}),
        ({"name": "contract_series", "task": "classify"}, {"field": TANH, "hidden": 6, "solver": "rk4"}),
    ],
    "latent_ode": [
        ("contract_series", {"field": TANH, "latent": 3, "sigma": 0.3, "learn_sigma": True}),
        ({"name": "contract_series", "task": "classify"}, {"field": TANH, "encoder": "gru", "sigma": 0.3}),
    ],
    "neural_cde": [
        (CLASSIFY, {"field": TANH, "hidden": 6}),
        ("contract_series", {"field": TANH, "hidden": 6, "start": TANH, "control": "linear", "controller": "fixed"}),
    ],
    "neural_sde": [
        ("contract_targets", {"controller": {"name": "fixed", "steps": 3}, "drift": TANH, "hidden": 4}),
        (
            "contract_targets",
            {"controller": {"name": "pi", "rtol": 0.1, "atol": 0.1}, "diffusion": TANH, "time_dependent": True},
        ),
    ],
    "neural_sde_forecast": [("contract_paths", {"controller": {"name": "fixed", "steps": 2}, "drift": TANH})],
    "latent_sde": [("contract_series", {"drift": TANH, "control": TANH, "sigma": 0.3, "learn_sigma": True})],
    "cslc": [
        ("contract_fields", {"energy": ["quadratic", EVEN], "octaves": 1, "tuning": BRIEF}),
        (
            "contract_fields",
            {"energy": [EVEN, {"name": "bands", "reach": 0}], "octaves": 1, "subdivisions": 2, "tuning": BRIEF},
        ),
    ],
    "stationary_gaussian": [("contract_fields", {})],
    "replay": [
        ("contract_plane", {"noise": 0.1}),
        ("contract_images", {"blur": 0.7, "share": 0.6}),
    ],
    "gaussian": [
        ("contract_plane", {}),
        ("contract_images", {"shrink": 0.5}),  # 40 items in 288 dimensions
    ],
}
WHOLE = {"neural_sde_forecast"}  # whose loss is no sum over items
# the time features turn up to 64 times per unit of time, so that errors of a random network add up to 100 tolerances
TIGHT, LOOSE = {"controller": PI(rtol=1e-6, atol=1e-6)}, {"controller": PI(rtol=1e-5, atol=1e-5)}
STEPS = {"solver": RK4(), "controller": Fixed(), "num_steps": 12}
CHAINS = {"cslc": {"nodes": 4, "burn": 5, "record": 10}}  # of a likelihood, compared step by step
SOLVED = ("diffusion", "cnf", "local_dsm", "multivariate_diffusion")  # whose answers take a controller
CASES = [(name, k) for name, cases in EXAMPLES.items() for k in range(len(cases))]


@pytest.fixture(autouse=True)
def data_sets():
    """Small data sets, registered for one test."""
    kept = dict(MEMBERS[Dataset])

    @registry.register(Dataset, "contract_plane")
    class Plane(InMemory):
        """A Gaussian mixture of the plane with arbitrary labels."""

        shape, num_classes, transform = (2,), 3, "standardize"

        def __init__(self) -> None:
            for split, n in {"train": 600, "val": 20, "test": 20}.items():
                noise = BatchNoise(n, generator=generator("contract", split))
                self.hold(split, Batch(MIXTURE.sample(noise), condition=torch.arange(n) % 3))

    @registry.register(Dataset, "contract_images")
    class Images(InMemory):
        """Random levels 0 … 3 on 3x8x12 pixels, with vectors as conditions."""

        shape, condition_shape, levels, bin_width = (3, 8, 12), (5,), 4, 1.0

        def __init__(self) -> None:
            parts = [{"name": "dequantize", "levels": 4}, {"name": "affine", "loc": 2.0, "scale": 2.0}]
            self.transform = {"name": "compose", "parts": parts}
            for split, n in {"train": 40, "val": 4, "test": 4}.items():
                noise = BatchNoise(n, generator=generator("contract", split))
                self.hold(split, Batch((noise.uniform(3, 8, 12) * 4).floor(), condition=noise.normal(5)))

    @registry.register(Dataset, "contract_fields")
    class Fields(InMemory):
        """White noise and its average over 2 x 2 pixels, on 4 x 8 pixels."""

        shape = (1, 4, 8)

        def __init__(self) -> None:
            for split, n in {"train": 300, "val": 4, "test": 4}.items():
                x = BatchNoise(n, generator=generator("contract", split)).normal(1, 4, 8)
                self.hold(split, Batch(x + (x + x.roll(1, 2) + x.roll(1, 3) + x.roll((1, 1), (2, 3))) / 4))

    @registry.register(Dataset, "contract_bits")
    class Bits(InMemory):
        """Random levels 0 and 1 on 1x2x3 pixels, in three classes."""

        shape, num_classes, levels, bin_width = (1, 2, 3), 3, 2, 1.0

        def __init__(self) -> None:
            for split, n in {"train": 200, "val": 4, "test": 4}.items():
                noise = BatchNoise(n, generator=generator("contract", split))
                self.hold(split, Batch((noise.uniform(1, 2, 3) < 0.4).float(), condition=torch.arange(n) % 3))

    @registry.register(Dataset, "contract_targets")
    class Targets(InMemory):
        """Points of the mixture with arbitrary classes to be told."""

        shape, target_shape, transform = (2,), (3,), "standardize"

        def __init__(self) -> None:
            for split, n in {"train": 600, "val": 20, "test": 20}.items():
                noise = BatchNoise(n, generator=generator("contract", split))
                self.hold(split, Batch(MIXTURE.sample(noise), target=torch.arange(n) % 3))

    @registry.register(Dataset, "contract_series")
    class Series(InMemory):
        """Two channels at irregular times with gaps; other values to be told, or one of two classes."""

        shape = (5, 2)

        def __init__(self, task: Literal["forecast", "classify"] = "forecast") -> None:
            self.target_shape = (3, 2) if task == "forecast" else (2,)
            for split, n in {"train": 40, "val": 4, "test": 4}.items():
                noise = BatchNoise(n, generator=generator("contract", split))
                times, later = (noise.uniform(k).double().sort(1).values for k in (5, 3))
                mask = noise.uniform(5, 2) < 0.7
                mask[:, 2] = True
                x, asked = noise.normal(5, 2) * mask, {}
                if task == "forecast":
                    asked = {"target_times": later, "target_mask": noise.uniform(3, 2) < 0.9}
                y = noise.normal(3, 2) if asked else torch.arange(n) % 2
                self.hold(split, Batch(x, times=times, mask=mask, target=y, **asked))

    @registry.register(Dataset, "contract_paths")
    class Paths(InMemory):
        """Random walks from one state."""

        shape, target_shape = (1, 2), (3, 2)

        def __init__(self) -> None:
            for split, n in {"train": 40, "val": 4, "test": 4}.items():
                walk = BatchNoise(n, generator=generator("contract", split)).normal(3, 2).cumsum(1)
                times = torch.tensor([0.3, 0.5, 1.0], dtype=torch.float64).repeat(n, 1)
                first = {"x": torch.ones(n, 1, 2), "times": torch.zeros(n, 1, dtype=torch.float64)}
                self.hold(split, Batch(**first, target=1 + walk, target_times=times))

    @registry.register(Dataset, "contract_mixture")
    class Mixture(InMemory):
        """Many points of the mixture, without labels."""

        shape, transform = (2,), "standardize"

        def __init__(self) -> None:
            for split, n in {"train": 20_000, "val": 20, "test": 1000}.items():
                self.hold(split, Batch(MIXTURE.sample(BatchNoise(n, generator=generator("mixture", split)))))

    yield
    MEMBERS[Dataset].clear()
    MEMBERS[Dataset].update(kept)


def built(name: str, k: int) -> tuple[Model, Dataset, Batch]:
    """A model of one's own, prepared, whose zero-initialised parameters have been moved, its data, and a batch."""
    model, dataset = _prepared(name, k)
    return copy.deepcopy(model), dataset, dataset.take("train", torch.arange(7))


@cache
def _prepared(name: str, k: int) -> tuple[Model, Dataset]:
    data, arguments = EXAMPLES[name][k]
    config = Config({"name": name, "data": data, "model": {"name": name, **arguments}})
    dataset = config.dataset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.model(dataset.facts())
        model.prepare(list(dataset.batches("train", 64)), generator=generator("prepare"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
    return model.eval(), dataset


def given(model: Model, batch: Batch) -> torch.Tensor | None:
    return batch.condition if model.conditional else None


def test_every_registered_model_has_an_example():
    ours = {n for n in registry.names(Model) if registry.member(Model, n, "model").__module__.startswith("genmodels.")}
    assert ours == set(EXAMPLES)


@pytest.mark.parametrize(("name", "k"), CASES)
@pytest.mark.slow_for("cslc-1")
def test_loss_has_one_finite_value_per_item_and_a_gradient_for_every_parameter(name, k):
    model, _, batch = built(name, k)
    model.train()
    value = model.loss(batch, generator=generator("loss")).value
    assert value.shape == (() if name in WHOLE else (7,))
    torch.testing.assert_close(value, model(batch, generator=generator("loss")).value)  # forward is the loss
    wide = batch[torch.arange(7).repeat(6)]
    if list(model.parameters()):
        model.loss(wide, generator=generator("loss", 1)).value.mean().backward()
    silent = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert value.isfinite().all()
    assert silent == []


@pytest.mark.parametrize("name", ["neural_ode", "neural_cde", "ode_rnn", "latent_ode", "diffusion", "cnf"])
def test_penalties_that_differentiate_networks_forbid_to_compile_them(name):
    data, arguments = EXAMPLES[name][0]
    for regularizer, differentiates in (("kinetic_jacobian", True), ("local", name == "cnf")):
        model = {"name": name, **arguments, "regularizers": [regularizer]}
        config = Config({"name": name, "data": data, "model": model})
        assert config.model(config.dataset().facts()).differentiates_twice == differentiates


class One(Regularizer):
    """A penalty of 1 on every solve."""

    def value(self, solve):
        return torch.ones(len(solve.solution.x), dtype=torch.float64)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_penalties_are_for_training_alone(name, k):
    model, _, batch = built(name, k)
    if not hasattr(model, "regularizers"):
        pytest.skip("has no regularizers")

    def losses():
        """In training and in evaluation."""
        with torch.no_grad():
            return [model.train(way).loss(batch, generator=generator("loss")).value for way in (True, False)]

    (training, evaluation), model.regularizers = losses(), (One(3.0),)
    charged, alone = losses()
    assert (charged - training > 2).all()
    torch.testing.assert_close(alone, evaluation)


@pytest.mark.parametrize(("name", "k"), CASES)
@pytest.mark.slow_for("made-3", "nade-3", "multivariate_diffusion-1")
def test_item_i_depends_on_seed_i_alone(name, k):
    model, _, batch = built(name, k)
    if not isinstance(model, SupportsSample):
        pytest.skip("does not sample")
    condition = None if given(model, batch) is None else batch.condition[:5]
    alone = None if condition is None else condition[3:4]
    how = {"num_steps": 8} if "num_steps" in inspect.signature(model.sample).parameters else {}
    together = model.sample([9, 4, 7, 12, 3], condition=condition, **how)
    one = model.sample([12], condition=alone, **how)
    torch.testing.assert_close(together[3:4], one, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2
    torch.testing.assert_close(
        model.sample([9, 4, 7, 12, 3], condition=condition, batch_size=2, **how), together, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("name", "k"), CASES)
@pytest.mark.slow_for("cslc-1", "diffusion-0", "local_dsm-0", "multivariate_diffusion-0")
def test_likelihood_of_a_batch_is_that_of_its_items_and_float32_is_enough(name, k):
    model, _, batch = built(name, k)
    if not isinstance(model, SupportsLogProb):
        pytest.skip("has no likelihood")
    options = {"divergence": "hutchinson" if batch.x.ndim > 2 else "exact"} if name in SOLVED else CHAINS.get(name, {})
    if name in SOLVED:  # one example of each is under step control
        options |= LOOSE if k == 0 or name == "cnf" else STEPS
    c = given(model, batch)
    double, x = copy.deepcopy(model).double(), batch.x.double()
    with torch.no_grad():
        full = double.likelihood(x, condition=c, seeds=range(7), **options).value
        row = double.likelihood(x[4:5], condition=None if c is None else c[4:5], seeds=[4], **options).value
        narrow = model.likelihood(batch.x, condition=c, seeds=range(7), **options).value
    # rows choose their steps by themselves: those of one alone are the same at any tolerance, whatever the error is
    torch.testing.assert_close(full[4:5], row, rtol=1e-5, atol=1e-5)
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, full, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("name", "k"), [(n, k) for n, k in CASES if EXAMPLES[n][k][0] == "contract_plane"])
@pytest.mark.slow_for("diffusion-1")
def test_density_of_the_plane_integrates_to_one(name, k):
    model, _, _ = built(name, k)
    if not isinstance(model, SupportsLogProb):
        pytest.skip("has no likelihood")
    points, area = grid(-6.6, 6.6, 44)
    options = {"controller": PI(rtol=1e-3, atol=1e-3)} if name in SOLVED else {}
    c = torch.zeros(len(points), dtype=torch.int64) if model.conditional else None
    with torch.no_grad():
        if model.likelihood(points[:1], condition=None if c is None else c[:1], **options).kind == "bound":
            pytest.skip("a bound has no mass of its own")
        total = model.double().log_prob(points, condition=c, **options).exp().sum() * area
    # a midpoint rule at 0.3 resolves the mixture's narrowest width, 0.3, to 1e-3; step control here is good to 1e-3
    assert abs(float(total) - 1) < 5e-3


@pytest.mark.parametrize(("name", "k"), CASES)
@pytest.mark.slow_for("diffusion-[12]", "local_dsm-1", "multivariate_diffusion-1")
def test_decode_undoes_encode(name, k):
    model, _, batch = built(name, k)
    if not isinstance(model, SupportsEncode):
        pytest.skip("has no latent")
    options = TIGHT if name in SOLVED else {}
    with torch.no_grad():
        z = model.double().encode(batch.x.double(), condition=given(model, batch), **options)
        back = model.decode(z, condition=given(model, batch), **options)
    torch.testing.assert_close(back, batch.x.double(), rtol=0, atol=1e-3)
    assert z.shape[0] == 7


@pytest.mark.parametrize("name", EXAMPLES)
def test_weights_round_trip(name):
    model, dataset, batch = built(name, 0)
    config = Config({"name": name, "data": EXAMPLES[name][0][0], "model": {"name": name, **EXAMPLES[name][0][1]}})
    other = config.model(dataset.facts()).eval()
    other.load_state_dict(model.state_dict())
    a, b = (m.loss(batch, generator=generator("loss")).value for m in (model, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_items_of_another_shape_are_refused(name, k):
    model, _, batch = built(name, k)
    with pytest.raises(ValueError, match="built for"):
        model.loss(batch.replace(x=batch.x[..., :-1]))


@pytest.mark.parametrize("name", ["flow", "diffusion"])
def test_a_class_out_of_range_is_named(name):
    model, _, batch = built(name, {"flow": 1, "diffusion": 0}[name])
    with pytest.raises(ValueError, match="class 7, but there are only 3"):
        model.sample(2, condition=torch.tensor([1, 7]))
    with pytest.raises(ValueError, match="class -1"):
        model.likelihood(batch.x[:1], condition=torch.tensor([-1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "diffusion"])  # those that can learn any law
def test_training_reaches_the_entropy_of_a_mixture(name, tmp_path):
    """Mean log-density of fresh points within 0.1 nats of the truth, and not above it by more than chance."""
    from genmodels.training.loop import train

    network = {"name": "residual_mlp", "hidden": 64, "blocks": 2}
    coupling = {"name": "coupling", "network": network}
    models = {
        "flow": {"layers": [{"name": "repeat", "count": 4, "layers": ["lu_linear", coupling]}]},
        "diffusion": {"network": network},
    }
    settings = {"steps": 1000, "batch_size": 512, "optimizer": {"name": "adam", "lr": 2e-3}, "learning_rate": "cosine"}
    tree = {"name": name, "data": "contract_mixture", "model": {"name": name, **models[name]}, "train": settings}
    run = train(Config(tree), root=tmp_path, quiet=True)
    x = Config(tree).dataset().all("test").x
    with torch.no_grad():
        gaps = MIXTURE.log_prob(x) - run.load().log_prob(x)
    stderr = float(gaps.std() / len(gaps) ** 0.5)
    assert -3 * stderr < float(gaps.mean()) < 0.1
