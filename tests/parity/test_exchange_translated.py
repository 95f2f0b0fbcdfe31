"""Models that no stock scheduler knows as they are: other labels, fitted paths, priors of their own; out and back."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import Tensor

from genmodels.diffusion.denoiser import OnSchedule
from genmodels.diffusion.schedules import Linear, Schedule
from genmodels.diffusion.tabulated import Tabulated
from genmodels.export.pipeline import GenPipeline
from genmodels.export.read import from_diffusers
from genmodels.export.timestep_shared import TimestepShared
from genmodels.export.wrappers import OnStraightPath, Relabelled
from genmodels.registry import ConfigError, build, resolve
from genmodels.solvers.base import integrate
from genmodels.solvers.exponential import DDIM, DPMpp
from genmodels.solvers.runge_kutta import Euler
from genmodels.transforms import Identity
from tests.parity.test_exchange import LEVELS17, UNET, drawn, from_noise, made, noise, written

POINTS = {"shape": [2], "levels": None, "bin_width": None, "transform": "identity"}
MLP = {"name": "mlp", "hidden": [16, 16]}
SMALL = UNET | {"block_out_channels": [4, 8], "attention_head_dim": 4}
CONDITIONS = {
    "shared": {"name": "shared", "intervals": 3, "until": 0.5},  # edges 0, 166.7, 333.3 among the timesteps
    "remap": {"name": "remap", "power": 0.5},
    "log_snr": {"name": "log_snr"},
    "discrete": {"name": "discrete", "steps": 10},
}


def shown(y: Tensor) -> Tensor:
    return (y / 2 + 0.5).clamp(0, 1)


def straight(model: object) -> SimpleNamespace:
    return SimpleNamespace(denoiser=OnSchedule(model.denoiser, Linear()))


def fitted(model: object) -> None:
    """A path found from items, as training begins with."""
    x = torch.randn(200, *model.model_shape, generator=torch.Generator().manual_seed(7)) * 0.4 + 0.5
    x[:100] -= 1.5
    model.denoiser.fit_path([x], generator=torch.Generator().manual_seed(0))


# ---- other labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONS)
def test_stock_pipelines_draw_models_with_labels_of_their_own(name, tmp_path):
    """DDIM's pipeline and DPM-Solver++'s steps, in stock code, as ours from the same noise; and the model comes back.

    The network sees other labels than a model without the condition, so that the images differ from its own.
    """
    model = made({"network": SMALL, "schedule": "vp", "prediction": "v", "time_condition": CONDITIONS[name]})
    pipeline = written(tmp_path, model)
    assert type(pipeline) is diffusers.DDPMPipeline and type(pipeline.scheduler) is diffusers.DDIMScheduler
    assert type(pipeline.unet) is (TimestepShared if name == "shared" else Relabelled)
    x = drawn(pipeline, 8)  # which divides the chain, as DDIM steps by whole strides
    times = torch.cat((pipeline.scheduler.timesteps.double() / 1000, torch.zeros(1, dtype=torch.float64)))
    assert (times[:-1] < 0.34).sum() >= 2  # steps that share their edges with others
    y = from_noise(model[0], noise(), times, DDIM())
    torch.testing.assert_close(x, shown(y), rtol=0, atol=2e-5 * float(1 + y.abs().max()))
    plain = made({"network": SMALL, "schedule": "vp", "prediction": "v"})[0]
    plain.load_state_dict(model[0].state_dict())
    assert (shown(from_noise(plain, noise(), times, DDIM())) - x).abs().max() > 1e-3

    theirs = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, final_sigmas_type="sigma_min", lower_order_final=False
    )
    theirs.set_timesteps(8)
    z = noise()
    with torch.no_grad():
        for t in theirs.timesteps[:-1]:  # the last goes to a noise level that their float32 has no digits for
            z = theirs.step(pipeline.unet(z, t).sample, t, z).prev_sample
        ours = integrate(model[0].denoiser, noise(), theirs.timesteps.double() / 1000, solver=DPMpp(2)).x
    torch.testing.assert_close(z, ours, rtol=0, atol=2e-5 * float(1 + ours.abs().max()))

    back, x = from_diffusers(tmp_path).model, torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    assert back.denoiser.time_condition.registered_name == name
    t = torch.tensor([0.004, 0.166, 0.167, 0.334, 0.7], dtype=torch.float64)
    # a chain's timestep k is the time (k + 1)/1000 here, and k/1000 on the path of the model
    later = t + 0.001 if name == "shared" else t
    with torch.no_grad():
        torch.testing.assert_close(back.denoiser.answer(later, x), model[0].denoiser.answer(t, x), rtol=0, atol=1e-5)
        scales = back.schedule.scales(later)
    torch.testing.assert_close(scales, model[0].schedule.scales(t), rtol=0, atol=1e-6)


# ---- paths found from data -------------------------------------------------------------------------------------------


def test_a_table_makes_a_fitted_path_again():
    """Scales and derivatives to rounding, ends exact, and through JSON."""
    model = made({"network": MLP, "schedule": "kinetic_optimal"}, **POINTS)[0]
    fitted(model)
    node = resolve(Schedule, json.loads(json.dumps(Tabulated.node(model.schedule))), "schedule")
    again, t = build(Schedule, node), torch.linspace(0, 1, 1001, dtype=torch.float64)
    for found, expected in zip(again(t), model.schedule(t), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert again.scales(t[[0, -1]])[0].tolist()[1] == 0 and again.scales(t[[0, -1]])[1].tolist()[0] == 0
    assert (again.scales(t)[0] - (1 - t)).abs().max() > 0.02  # not the straight path that it is before
    for wrong, message in ((node | {"dsigma": []}, "both of dalpha and dsigma"),
                           (node | {"dalpha": node["dalpha"][1:]}, "one number for each of 257 times")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            build(Schedule, wrong)


def test_fitted_paths_are_drawn_by_our_pipeline_and_by_stock_steps(tmp_path):
    """`DiffusionModel.sample` from the same seeds: by GenScheduler on the table, and by FlowMatchEuler.

    In x_t/(α + σ) and s = σ/(α + σ) a step of Euler's is DDIM's on the path, so that explicit sigmas at the model's
    times give its samples to float32 rounding, in stock code but for the network's wrapper.
    """
    sample = {"num_steps": 6, "solver": "ddim"}
    model, config, facts = made({"network": MLP, "schedule": "kinetic_optimal"}, sample, **POINTS)
    fitted(model)
    expected = model.sample([5, 9, 2], **config.options("sample"))
    for choice, kind in (("own", "GenScheduler"), ("stock", "FlowMatchEulerDiscreteScheduler")):
        pipeline = written(tmp_path / choice, (model, config, facts), choice)
        assert type(pipeline.scheduler).__name__ == kind
        torch.testing.assert_close(pipeline(seeds=[5, 9, 2]).images, expected, rtol=1e-5, atol=1e-5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "stock" / "scheduler")
    times = torch.linspace(1, 0, 7, dtype=torch.float64)
    alpha, sigma = model.schedule.scales(times[:-1])
    scheduler.set_timesteps(sigmas=(sigma / (alpha + sigma)).tolist())
    assert scheduler.config.shift == 1 and scheduler.sigmas[0] == 1
    z = x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.model(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(x, from_noise(model, z, times, DDIM()), rtol=1e-5, atol=1e-5)
    other = made({"network": MLP}, sample, **POINTS)[0]
    other.load_state_dict(model.state_dict(), strict=False)
    assert (other.sample([5, 9, 2], **config.options("sample")) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["fitted", "vp, velocity", "edm", "x with labels"])
def test_any_model_has_a_stock_scheduler_on_the_straight_path(case, tmp_path):
    """Images with classes: stock steps at the model's own times, x̂ at the end; and the folder comes back."""
    node = {
        "fitted": {"schedule": "kinetic_optimal"}, "vp, velocity": {"schedule": "vp", "prediction": "velocity"},
        "edm": {"schedule": "edm", "prediction": "edm", "sigma_data": 0.6, "time_condition": CONDITIONS["remap"]},
        "x with labels": {"schedule": "trigonometric", "prediction": "x", "time_condition": CONDITIONS["log_snr"]},
    }[case]  # fmt: skip
    classes = {} if case == "fitted" else {"num_classes": 3}
    sample = {"num_steps": 4, "solver": "ddim", "denoise": True, "guidance": 1.0 if case == "fitted" else 1.7}
    model, config, facts = made({"network": SMALL, **node}, sample, **classes)
    if case == "fitted":
        fitted(model)
    pipeline = written(tmp_path, (model, config, facts), "stock")
    network = pipeline.unet if case == "fitted" else pipeline.model
    assert type(pipeline) is (diffusers.DDPMPipeline if case == "fitted" else GenPipeline)
    assert type(network) is OnStraightPath and type(network.network) is diffusers.UNet2DModel
    if case == "fitted":  # a pipeline of stock code lays even s
        x, s = drawn(pipeline, 6), pipeline.scheduler.sigmas.double()
        y = from_noise(straight(model), noise(), s, Euler())
        torch.testing.assert_close(x, shown(y), rtol=0, atol=1e-5 * float(1 + y.abs().max()))
        times = model.schedule.time(2 * ((1 - s) / s).log())
        torch.testing.assert_close(from_noise(model, noise(), times, DDIM()), y, rtol=0, atol=1e-4)
        found = from_diffusers(tmp_path, transform=LEVELS17)
    else:
        labels = torch.tensor([2, 0, 1])
        pipeline.transform = None
        y = pipeline(class_labels=labels, seeds=[5, 9, 2]).images
        model.transform = Identity()
        expected = model.sample([5, 9, 2], condition=labels, **config.options("sample"))
        torch.testing.assert_close(y, expected, rtol=0, atol=3e-5 * float(1 + expected.abs().max()))
        index = json.loads((tmp_path / "model_index.json").read_text())
        found = from_diffusers(tmp_path, null_label=True, transform=LEVELS17)
        assert index["model"] == ["genmodels.export.wrappers", "OnStraightPath"]
    t, x = torch.tensor([0.2, 0.6], dtype=torch.float64), noise(2)
    labels = None if case == "fitted" else torch.tensor([1, 2])
    with torch.no_grad():
        ours, theirs = (m.denoiser.predict(t, x, labels) for m in (model, found.model))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
