"""Every family to come travels from configuration to evaluation, and means what it says."""

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
    SupportsEncode,
    SupportsLogProb,
    SupportsPredict,
    SupportsSample,
    SupportsScore,
    SupportsVelocity,
)
from tests.contracts import families

FAMILIES = {
    "fake_closed_form": ("fake_plane", {SupportsSample, SupportsLogProb, SupportsScore}, "nll"),
    "fake_audio_flow": ("fake_speech", {SupportsSample, SupportsLogProb}, "nll"),
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

    for capability in (SupportsEncode, SupportsVelocity):
        assert isinstance(families.FluxEditor(transformer, RK4(), 1), capability)
    # its time embedding turns a thousand times per unit of time, so that no order shows at steps this long
    assert gap(32) < gap(8) < gap(2) < 1e-2
