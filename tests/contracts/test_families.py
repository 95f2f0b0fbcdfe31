"""Every family to come travels from configuration to evaluation, and means what it says."""

import itertools
import math

import pytest
import torch

from genmodels import registry
from genmodels.config import Config, overlay
from genmodels.model import Model
from genmodels.solvers.runge_kutta import RK4
from genmodels.training.loop import train
from genmodels.training.run import Run
from genmodels.types import (
    Batch,
    Editor,
    SupportsEncode,
    SupportsLogProb,
    SupportsPredict,
    SupportsSample,
    SupportsScore,
    SupportsVelocity,
)
from tests.contracts import families

FAMILIES = {
    "fake_latent_ode": ("fake_series", {SupportsPredict}, "squared_error"),
    "fake_cde": ({"name": "fake_series", "task": "classify"}, {SupportsPredict}, "accuracy"),
    "fake_sde": ("fake_series", {SupportsPredict}, "squared_error"),
    "fake_deq": ({"name": "fake_series", "task": "classify"}, {SupportsPredict}, "accuracy"),
    "fake_cnf": ("fake_plane", {SupportsSample, SupportsLogProb, SupportsVelocity}, "nll"),
    "fake_closed_form": ("fake_plane", {SupportsSample, SupportsLogProb, SupportsScore}, "nll"),
    "fake_audio_flow": ("fake_speech", {SupportsSample, SupportsLogProb}, "nll"),
    "fake_nade": ("fake_binary", {SupportsSample, SupportsLogProb}, "bits_per_dim"),
    "fake_vae": ("fake_plane", {SupportsSample, SupportsLogProb}, "nll"),
    "fake_local_dsm": ("fake_plane", {SupportsSample, SupportsScore}, "sliced_wasserstein"),
}
CAPABILITIES = (SupportsSample, SupportsLogProb, SupportsEncode, SupportsPredict, SupportsVelocity, SupportsScore)
ARGUMENTS = {"fake_local_dsm": {"process": "fake_logistic"}}


def config(name: str, **changes) -> Config:
    tree = {
        "name": name,
        "imports": ["tests.contracts.families"],
        "data": FAMILIES[name][0],
        "model": {"name": name, **ARGUMENTS.get(name, {})},
        "train": {
            "steps": 0 if name == "fake_closed_form" else 2,
            "batch_size": 8,
            "eval_every": 2,
            "sample_every": 2,
            "ema": [{"name": "constant", "value": 0.5}],
        },
    }
    return Config(overlay(tree, changes))


def fresh(name: str, **arguments) -> tuple[Model, Batch]:
    """An untrained model in float64 and the test items of its data."""
    c = config(name, model=arguments)
    dataset = c.dataset()
    torch.manual_seed(0)
    batch = dataset.all("test")
    wide = {k: getattr(batch, k).double() for k in ("x", "target") if getattr(batch, k) is not None}
    if batch.target is not None and not batch.target.is_floating_point():
        wide.pop("target")
    return c.model(dataset.facts()).double().eval(), batch.replace(**wide)


@pytest.mark.parametrize("name", FAMILIES)
def test_travels_the_whole_way(name, tmp_path):
    data, capabilities, metric = FAMILIES[name]
    trained = train(config(name), root=tmp_path, quiet=True)
    before = {k: v.clone() for k, v in trained.load("model").state_dict().items()}
    assert train(config(name), root=tmp_path, quiet=True).step == trained.step  # the same command finds it finished
    model = Run.open(tmp_path / name).load("model")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {c for c in CAPABILITIES if isinstance(model, c)} == capabilities

    from genmodels.evaluation.evaluate import evaluate
    from genmodels.evaluation.protocol import Protocol

    tree = {"name": "fake", "version": 1, "dataset": data, "metrics": [metric], "sample": {"num_items": 6}}
    result = evaluate(Run.open(tmp_path / name), Protocol(tree))
    assert {row["metric"] for row in result["metrics"]} == {metric}
    assert all(row["value"] is not None and math.isfinite(row["value"]) for row in result["metrics"])
    assert result["model"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_latent_ode_reads_masks_and_target_times():
    model, batch = fresh("fake_latent_ode")
    out = model.predict(batch)
    hidden = batch.replace(x=torch.where(batch.mask, batch.x, torch.full_like(batch.x, 9.0)))
    assert torch.equal(model.predict(hidden), out)  # unobserved values are not seen
    later = batch.replace(target_times=batch.target_times + 0.5)
    assert (model.predict(later) - out).abs().max() > 1e-3
    torch.testing.assert_close(model.predict(batch[2:3]), out[2:3])
    finer = model.predict(batch, num_steps=40)
    assert (model.predict(batch, num_steps=8) - finer).abs().max() < 0.1 * (
        model.predict(batch, num_steps=4) - finer
    ).abs().max()
    ignored = batch.replace(target=torch.where(batch.target_mask, batch.target, torch.full_like(batch.target, 9.0)))
    torch.testing.assert_close(model.loss(ignored).value, model.loss(batch).value)


def test_cde_moves_with_its_control_alone():
    model, batch = fresh("fake_cde")
    frozen = batch.replace(
        times=torch.ones_like(batch.times), x=torch.ones_like(batch.x), mask=torch.ones_like(batch.mask)
    )
    start = torch.ones(len(batch), 2, dtype=torch.float64)
    torch.testing.assert_close(model.predict(frozen), model.head(model.start(start)))
    assert (model.predict(batch) - model.predict(frozen)).abs().max() > 1e-3


def test_sde_row_depends_on_its_seed_alone():
    model, batch = fresh("fake_sde")
    out = model.predict(batch, seeds=range(10, 10 + len(batch)))
    torch.testing.assert_close(model.predict(batch[3:5], seeds=[13, 14]), out[3:5])
    assert (model.predict(batch, seeds=range(len(batch))) - out).abs().min() > 0
    still, _ = fresh("fake_sde", sigma=0.0)
    torch.testing.assert_close(still.predict(batch, seeds=[1] * 8), still.predict(batch, seeds=[2] * 8))


def test_deq_gradient_is_implicit_and_the_dial_trades_accuracy():
    model, batch = fresh("fake_deq")
    model.loss(batch).value.sum().backward()
    implicit = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    z = torch.zeros(len(batch), 8, dtype=torch.float64)
    for _ in range(100):  # contraction by 1/2 a step: 2^-100 from the fixed point
        z = model.cell(z, batch.x)
    torch.nn.functional.cross_entropy(model.head(z), batch.target, reduction="sum").backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(implicit[name], p.grad, rtol=1e-5, atol=1e-6)
    exact = model.head(z)
    errors = [(model.predict(batch, max_iterations=k) - exact).abs().max() for k in (1, 4, 12)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_cnf_is_normalised_and_validates_without_gradients():
    model, _ = fresh("fake_cnf", solver="rk4")
    axis = torch.linspace(-8, 8, 121, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = model.log_prob(points, num_steps=8).exp().sum() * (axis[1] - axis[0]) ** 2
        value = model.loss(Batch(points[:4])).value
    assert abs(total.item() - 1) < 1e-4
    torch.testing.assert_close(value, -model.log_prob(points[:4]))


def test_closed_form_fit_is_the_sample_gaussian(tmp_path):
    run = train(config("fake_closed_form"), root=tmp_path, quiet=True)
    x, model = config("fake_closed_form").dataset().all("train").x.double(), run.load("model")
    reference = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    torch.testing.assert_close(model.log_prob(x), reference.log_prob(x))
    assert run.step == 0
    assert not list((run.checkpoints / "00000000").glob("optimizer.*"))
    expected = -torch.linalg.solve(x.T.cov(), (x - x.mean(0)).T).T
    torch.testing.assert_close(model.score(torch.tensor(0.0), x), expected)


def test_audio_flow_is_conditioned_on_an_embedding():
    model, batch = fresh("fake_audio_flow")
    mel = batch.condition.double()
    mean, log_scale = model.parts(mel)
    expected = torch.distributions.Normal(mean, log_scale.exp()).log_prob(batch.x).sum(1)
    torch.testing.assert_close(model.log_prob(batch.x, condition=mel), expected)
    model.float()
    torch.testing.assert_close(
        model.sample([5], condition=batch.condition[:1]), model.sample([4, 5], condition=batch.condition[[1, 0]])[1:]
    )


def test_nade_is_a_probability_mass():
    model, _ = fresh("fake_nade")
    torch.nn.init.normal_(model.weight)
    strings = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)
    assert abs(model.log_prob(strings).exp().sum().item() - 1) < 1e-12
    assert model.likelihood(strings).kind == "pmf"


def test_vae_reports_a_bound():
    model, batch = fresh("fake_vae")
    with torch.no_grad():
        model.decoder.weight.copy_(
            torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        )  # a diagonal W makes the true posterior diagonal
        exact = torch.distributions.MultivariateNormal(
            model.decoder.bias, torch.diag(torch.tensor([2.0, 5.0]).double())
        ).log_prob(batch.x)
        many = torch.stack([model.log_prob(batch.x, seeds=range(8 * k, 8 * k + 8)) for k in range(400)])
        assert (many.mean(0) + 4 * many.std(0) / 20 < exact).all()
        model.encoder.weight.copy_(torch.tensor([[1 / 2, 0.0], [0.0, 2 / 5]]))
        model.encoder.bias.copy_(-model.encoder.weight @ model.decoder.bias)
        model.log_std.copy_(0.5 * torch.tensor([1 / 2, 1 / 5]).log())
        many = torch.stack([model.log_prob(batch.x, seeds=range(8 * k, 8 * k + 8)) for k in range(400)])
    assert ((many.mean(0) - exact).abs() < 4 * many.std(0) / 20).all()  # tight at the true posterior
    assert model.likelihood(batch.x).kind == "bound"


def test_local_dsm_brings_its_own_process_and_prior():
    from scipy.stats import kstest, logistic

    model, _ = fresh("fake_local_dsm")
    model.score = lambda t, x, condition=None: 2 * model.process.drift(x)  # data that follow the prior: stationary
    x = model.float().sample(1500, num_steps=200)
    assert kstest(x.flatten().numpy(), logistic(scale=0.5).cdf).pvalue > 0.01
    with pytest.raises(registry.ConfigError, match="process"):
        Config(overlay(config("fake_local_dsm").tree, {"model": {"name": "fake_local_dsm", "process": None}}))


def test_editor_over_a_stock_transformer_goes_there_and_back():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).double().eval()  # fmt: skip
    condition = {
        "encoder_hidden_states": torch.randn(1, 3, 8).double(), "pooled_projections": torch.randn(1, 8).double(),
        "txt_ids": torch.zeros(3, 3), "img_ids": torch.zeros(4, 3),
    }  # fmt: skip
    x = torch.randn(1, 4, 4).double()

    def gap(steps: int) -> float:
        editor = families.FluxEditor(transformer, RK4(), steps)
        with torch.no_grad():
            z = editor.encode(x, condition=condition)
            return ((editor.decode(z, condition=condition) - x).norm() / (z - x).norm()).item()

    assert isinstance(families.FluxEditor(transformer, RK4(), 1), Editor)
    # its time embedding turns a thousand times per unit of time, so that no order shows at steps this long
    assert gap(32) < gap(8) < gap(2) < 1e-2
