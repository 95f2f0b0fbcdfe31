"""Pipelines of diffusers written and read: the same images from both sides, whatever path, prediction and network."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genmodels import registry
from genmodels.commands import main
from genmodels.config import Config
from genmodels.data.external import External
from genmodels.diffusion.model import DiffusionModel
from genmodels.diffusion.reverse import DenoiserRows
from genmodels.diffusion.samplers import Guidance, Sampler
from genmodels.registry import ConfigError
from genmodels.solvers.base import Fixed, Solver, integrate
from genmodels.solvers.exponential import DDIM
from genmodels.solvers.runge_kutta import RK4, Euler
from genmodels.training.run import Run
from genmodels.types import NotApplicable
from tests.parity.test_diffusers_networks import DIT, theirs

UNET = {
    "name": "diffusers_unet", "block_out_channels": [8, 16], "layers_per_block": 1, "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 2,
}  # fmt: skip
IMAGES = {"levels": 17, "bin_width": 1.0, "shape": [1, 8, 8]}
LEVELS17 = {
    "name": "compose", "parts": [{"name": "dequantize", "levels": 17}, {"name": "affine", "loc": 8.5, "scale": 8.5}],
}  # fmt: skip


def made(node: dict, sample: dict | None = None, **facts: object) -> tuple[DiffusionModel, Config, dict]:
    """A model off its initial values, its configuration and the facts of its data."""
    given = {"num_classes": None, "condition_shape": None, "target_shape": None, "sample_rate": None}
    given |= {**IMAGES, "transform": LEVELS17} | facts
    config = Config({"name": "x", "data": "external", "model": {"name": "diffusion", **node}, "sample": sample or {}})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = config.model(given).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return model, config, given


def written(folder: Path, made: tuple[DiffusionModel, Config, dict], scheduler: str = "auto") -> object:
    """The pipeline of a model, saved and loaded."""
    import diffusers

    from genmodels.export.pipeline import GenPipeline
    from genmodels.export.write import pipeline_of

    model, config, facts = made
    found = pipeline_of(model, config.tree["model"], facts, config.answer("sample"), scheduler)
    found.save_pretrained(folder)
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = (GenPipeline if name == "GenPipeline" else getattr(diffusers, name)).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def from_noise(model: DiffusionModel, z: Tensor, times: Tensor, solver: Solver) -> Tensor:
    with torch.no_grad():
        return integrate(model.denoiser, z, times, solver=solver).x


# ---- written ---------------------------------------------------------------------------------------------------------


def noise(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(pipeline: object, steps: int, **options: object) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return pipeline(batch_size=3, generator=g, num_inference_steps=steps, output_type="pt", **options).images


def test_stock_pipelines_draw_our_images(tmp_path):
    """Stock classes alone in the folder, by their own steps, equal to ours on the same times."""
    from diffusers import DDIMScheduler, DDPMPipeline, FlowMatchEulerDiscreteScheduler

    flow = made({"network": UNET})
    pipeline = written(tmp_path / "flow", flow)
    assert type(pipeline) is DDPMPipeline and type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    x = drawn(pipeline, 10)
    expected = from_noise(flow[0], noise(), pipeline.scheduler.sigmas.double(), Euler())
    torch.testing.assert_close(x, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert 0.05 < x.std() and (x > 0).any() and (x < 1).any()
    for prediction, path in (("eps", "vp"), ("x", "cosine"), ("v", {"name": "discrete"})):
        offset = -1.0 if isinstance(path, dict) else 0.0
        model = made({"network": UNET | {"time_offset": offset}, "prediction": prediction, "schedule": path})
        pipeline = written(tmp_path / f"{prediction}-{offset}-{path if offset == 0 else 'chain'}", model)
        assert type(pipeline) is DDPMPipeline and type(pipeline.scheduler) is DDIMScheduler
        x = drawn(pipeline, 10)
        labels = pipeline.scheduler.timesteps.double()
        assert labels[0] == 999 and len(labels) == 10
        times = torch.cat(((labels - offset) / 1000, labels.new_zeros(1)))
        y = from_noise(model[0], noise(), times, DDIM())
        torch.testing.assert_close(x, (y / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-5 * float(1 + y.abs().max()))


def test_edm_is_drawn_by_stock_steps_in_our_pipeline(tmp_path):
    """Which scales noise and input as the scheduler says; stock classes for network and scheduler."""
    from diffusers import EDMEulerScheduler, UNet2DModel

    sample = {"solver": "edm_euler", "denoise": True, "num_steps": 12}
    network = UNET | {"time_scale": 1.0}
    model = made({"network": network, "schedule": "edm", "prediction": "edm", "sigma_data": 0.6}, sample)
    pipeline = written(tmp_path, model)
    assert (type(pipeline.model), type(pipeline.scheduler)) == (UNet2DModel, EDMEulerScheduler)
    pipeline.transform = None
    sampler = Sampler(
        model[0], 12, *(model[1].options("sample")[k] for k in ("solver", "controller", "grid")), Guidance(), True
    )
    with torch.no_grad():
        expected = sampler.solve(80 * noise(), None, True)
    torch.testing.assert_close(drawn(pipeline, 12), expected, rtol=1e-5, atol=1e-5)


def test_latents_of_imagenet_classes_are_a_dit_pipeline(tmp_path):
    """With guidance and the autoencoder: the pixels of the model, before they are rounded."""
    from diffusers import DiTPipeline

    from tests.autoencoders import save

    path = save(tmp_path / "coder", shift_factor=None)
    network = {"name": "diffusers_dit", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    facts = {"num_classes": 1000, "shape": [3, 16, 16], "transform": {"name": "latent", "path": str(path)}}
    model = made({"network": network, "schedule": "vp", "prediction": "eps"}, **facts)
    pipeline = written(tmp_path / "dit", model)
    assert type(pipeline) is DiTPipeline
    g = torch.Generator().manual_seed(0)
    x = pipeline([7, 3], guidance_scale=1.5, generator=g, num_inference_steps=10, output_type="pt").images
    z = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.cat(((pipeline.scheduler.timesteps / 1000).double(), torch.zeros(1, dtype=torch.float64)))
    field = DenoiserRows(Guidance(1.5).of(model[0]), torch.tensor([7, 3]))
    with torch.no_grad():
        y = integrate(field, z, times, solver=DDIM()).x
        expected = model[0].transform.inverse(y) / 255
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    assert x.std() > 0.05


CONDITIONAL = {"num_classes": 3}
OWN = {
    "network of ours, guidance": (
        {"network": {"name": "dit", "patch": 4, "width": 16, "depth": 1, "heads": 2}}, {"guidance": 1.7}, CONDITIONAL,
    ),
    "labels, DPM-Solver++": (
        {"network": UNET, "schedule": "vp", "prediction": "eps"},
        {"solver": "dpmpp", "grid": "log_snr", "guidance": 0.6}, CONDITIONAL,
    ),
    "transformer, noise on the way": (
        {"network": {"name": "diffusers_dit", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1},
         "schedule": "cosine", "prediction": "v"},
        {"solver": {"name": "ddim", "eta": 0.7}, "denoise": True}, CONDITIONAL,
    ),
    "points, fitted transform": (
        {"network": {"name": "mlp", "hidden": [16, 16]}, "schedule": "edm", "prediction": "edm"}, {"grid": "karras"},
        {"shape": [2], "levels": None, "bin_width": None, "transform": "standardize", "condition_shape": [2]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_our_scheduler_draws_what_the_model_samples(case, tmp_path):
    """With its solver, grid, guidance, noise and transform: the samples of `DiffusionModel.sample`, seed by seed."""
    from genmodels.export.diffusers import GenScheduler

    node, sample, facts = OWN[case]
    model, config, facts = made(node, {"num_steps": 5, **sample}, **facts)
    if "points" in case:
        model.transform.mean.copy_(torch.tensor([3.0, -1.0]))
        model.transform.std.copy_(torch.tensor([0.5, 2.0]))
        condition = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    else:
        condition = torch.tensor([2, 0, 1])
    pipeline = written(tmp_path, (model, config, facts), "own")
    assert isinstance(pipeline.scheduler, GenScheduler)
    for given in (condition, None):
        expected = model.sample(
            [5, 9, 2], condition=given, **config.options("sample") | ({} if given is not None else {"guidance": 1.0})
        )
        found = pipeline(class_labels=given, seeds=[5, 9, 2]).images
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1
    two = pipeline(class_labels=condition[1:], seeds=[9, 2], output_type="np").images
    torch.testing.assert_close(
        torch.from_numpy(two), pipeline(class_labels=condition, seeds=[5, 9, 2]).images[1:], rtol=1e-4, atol=1e-4
    )
    if "points" not in case:
        pictures = pipeline(class_labels=condition, seeds=[5, 9, 2], output_type="pil").images
        assert [p.size for p in pictures] == [(8, 8)] * 3
    with pytest.raises(ValueError, match="give one seed an item"):
        pipeline(class_labels=condition, seeds=[1, 2])


def test_what_cannot_be_written_is_said(tmp_path):
    for node, sample, scheduler, message in (
        ({"network": UNET}, {"guidance": 2.0, "guide": "runs/weak"}, "auto", "by another model has no place"),
        ({"network": UNET}, {"controller": "pi", "solver": "dopri5"}, "own", "chooses steps while it samples"),
        ({"network": UNET}, {"solver": "euler_maruyama"}, "own", "solver 'euler_maruyama' needs"),
    ):
        with pytest.raises(ConfigError, match=message):
            written(tmp_path / "x", made(node, sample), scheduler)
    relabelled = made({"network": UNET})
    answer = relabelled[0].denoiser.answer
    relabelled[0].denoiser.answer = lambda t, x, condition=None: answer(t.square(), x, condition)
    with pytest.raises(ConfigError, match="told of times by labels of its own"):
        written(tmp_path / "x", relabelled)


def test_noise_under_a_coupling_cannot_be_written(tmp_path):
    """A pipeline must not draw what `sample` refuses."""
    coupled = made({"network": UNET, "coupling": "minibatch_ot"}, {"solver": "ddpm"})
    with pytest.raises(NotApplicable, match="adds noise: under the coupling"):
        written(tmp_path / "x", coupled, "own")


def test_chain_has_the_levels_of_the_path():
    from genmodels.diffusion.schedules import VariancePreserving
    from genmodels.export.write import chain

    betas = torch.tensor(chain(VariancePreserving(), 1000, 0.0), dtype=torch.float64)
    t = (torch.arange(1000, dtype=torch.float64) / 1000).clamp(min=1e-5)
    bar = VariancePreserving().scales(t)[0].square()
    torch.testing.assert_close((1 - betas).cumprod(0), bar, rtol=1e-11, atol=0)


# ---- read ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A small U-Net without labels in float64, and its folder."""
    model = theirs("diffusers_unet", num_class_embeds=None)
    folder = tmp_path_factory.mktemp("unet")
    model.save_pretrained(folder / "unet")
    return model.double(), folder


def folder_with(network: tuple, tmp_path: Path, config: dict, part: str = "unet") -> Path:
    """A pipeline folder with a configuration of a scheduler, as old as it may be."""
    (tmp_path / "scheduler").mkdir(parents=True)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = {"_class_name": "DDPMPipeline", part: ["diffusers", "X"], "scheduler": ["diffusers", config["_class_name"]]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / part).symlink_to(network[1] / part)
    return tmp_path


BETAS = torch.linspace(0.001, 0.05, 100).tolist()
SCHEDULERS = {
    "leading": ({"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 1}, 1e-11),
    "to one": (
        {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing",
         "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}, 1e-11),
    "v without signal": (
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "timestep_spacing": "trailing", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        1e-11,
    ),
    "old, sample": (
        {"_class_name": "DDIM", "predict_epsilon": False, "trained_betas": BETAS, "num_train_timesteps": 100}, 1e-11,
    ),
    "flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 1e-5),
    "flow, shifted": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 1e-5),
    "edm": ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.7}, 1e-5),
    "edm, v": ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_max": 40.0}, 1e-5),
    "edm, DPM-Solver++": ({"_class_name": "EDMDPMSolverMultistepScheduler", "lower_order_final": False}, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULERS)
def test_an_imported_model_samples_like_its_scheduler(case, network, tmp_path):
    """From the same noise, in float64: to 1e-11 on tables of ᾱ, and to float32 where their noise levels are float32."""
    import diffusers

    from genmodels.export.read import from_diffusers, times_of
    from genmodels.export.schedulers import training_of

    config, tolerance = SCHEDULERS[case]
    folder = folder_with(network, tmp_path, config)
    found, training = from_diffusers(folder, dtype=torch.float64), training_of(folder / "scheduler")
    name = config["_class_name"] if config["_class_name"].endswith("Scheduler") else config["_class_name"] + "Scheduler"
    known = {k: v for k, v in config.items() if not k.startswith("_") and k != "predict_epsilon"}
    known |= {"prediction_type": "sample"} if "predict_epsilon" in config else {}
    known |= {"clip_sample": False} if name.startswith("DDIM") else {}
    scheduler = getattr(diffusers, name)(**known)
    for key in ("alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, key):
            setattr(scheduler, key, getattr(scheduler, key).double())
    steps = 10
    scheduler.set_timesteps(steps)
    z = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    z = z * float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = z
    with torch.no_grad():
        for t in scheduler.timesteps:
            fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(network[0](fed.double(), t).sample, t, x).prev_sample.double()
        if training.prediction == "velocity":
            y = from_noise(found.model, z, times_of(scheduler, training), Euler())
        else:
            options = registry.values(DiffusionModel.sample, found.sample | {"num_steps": steps})
            sampler = Sampler(
                found.model,
                steps,
                *(options[k] for k in ("solver", "controller", "grid")),
                Guidance(),
                options["denoise"],
            )
            y = sampler.solve(z, None, True)
            nodes = sampler.times.flip(0)
            torch.testing.assert_close(times_of(scheduler, training)[: len(nodes)], nodes, rtol=1e-6, atol=1e-7)
    assert (x - z).abs().max() > 0.1
    torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance * float(x.abs().max()))


def test_shifts_that_depend_on_the_size(network, tmp_path):
    """exp(μ) with μ on the line through the two ends; the number of tokens must be said for a U-Net."""
    from genmodels.export.schedulers import training_of

    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    folder = folder_with(network, tmp_path, config)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)):
        grid = training_of(folder / "scheduler", tokens).sample["grid"]
        assert grid["name"] == "shifted" and abs(grid["shift"] - math.exp(mu)) < 1e-12
    with pytest.raises(ConfigError, match="Say image_tokens"):
        training_of(folder / "scheduler")


def test_our_scheduler_of_flows_says_how_to_sample(tmp_path):
    from genmodels.export.rf_solver import RFSolverScheduler
    from genmodels.export.schedulers import training_of

    cases = {"rf": {"name": "rf_solver", "probe": 0.5}, "rf3": {"name": "rf_solver", "order": 3}}
    for solver, node in (cases | {"fireflow": {"name": "fireflow"}, "euler": {"name": "euler"}}).items():
        RFSolverScheduler(shift=3.0, solver=solver).save_pretrained(tmp_path)
        found = training_of(tmp_path)
        assert (found.prediction, found.schedule) == ("velocity", {"name": "linear"})
        assert found.sample == {"solver": node, "grid": {"name": "shifted", "shift": 3.0}, "num_steps": 50}


def test_no_signal_is_left_where_a_scheduler_keeps_a_remainder(network, tmp_path):
    """The table of EulerDiscreteScheduler ends at 2^-24 for its own sake; the model was trained at 0."""
    from diffusers import EulerDiscreteScheduler

    from genmodels.export.schedulers import training_of

    given = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert EulerDiscreteScheduler(**given).alphas_cumprod[-1] == 2**-24
    folder = folder_with(network, tmp_path, {"_class_name": "EulerDiscreteScheduler", **given})
    assert training_of(folder / "scheduler").schedule["alphas_cumprod"][-1] == 0


def test_likelihood_of_an_imported_model(network, tmp_path):
    """A network that answers 0 to "which noise?": x_t shrinks with α, and log p is that of a Gaussian."""
    from genmodels.export.read import from_diffusers

    folder = folder_with(network, tmp_path, {"_class_name": "DDPMScheduler"})
    given = {"name": "affine", "loc": 127.5, "scale": 127.5}
    model = from_diffusers(folder, dtype=torch.float64, transform=given).model
    with torch.no_grad():
        for p in model.denoiser.network.model.conv_out.parameters():
            p.zero_()
    x = 255 * torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = model.log_prob(x, divergence="hutchinson", solver=RK4(), controller=Fixed(), num_steps=8)
    alpha, sigma = (c.tolist() for c in model.schedule.scales(torch.tensor([1e-3, 1.0], dtype=torch.float64)))
    assert abs(alpha[0] ** 2 - 0.9999) < 1e-7 and model.denoiser.t_min == 1e-3
    z = (x - 127.5) / 127.5 * alpha[1] / alpha[0]
    log_det = 192 * (math.log(alpha[1] / alpha[0]) - math.log(127.5))
    log_prior = -0.5 * (z / sigma[1]).square().flatten(1).sum(1) - 192 * (
        math.log(sigma[1]) + 0.5 * math.log(2 * math.pi)
    )
    torch.testing.assert_close(found, log_prior + log_det, rtol=0, atol=2e-2)


def test_labels_transformers_and_autoencoders(tmp_path):
    """A transformer has a row for no label; of a U-Net's it must be said; latents bring their autoencoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    from genmodels.export.read import from_diffusers
    from tests.autoencoders import tiny

    vae = AutoencoderKL.from_pretrained(tiny())
    transformer = theirs(
        "diffusers_dit", in_channels=vae.config.latent_channels, out_channels=2 * vae.config.latent_channels
    )
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(tmp_path / "dit")
    found = from_diffusers(tmp_path / "dit")
    unit = 2 ** (len(vae.config.block_out_channels) - 1)
    told = found.model.conditions
    assert told.num_classes == DIT["num_embeds_ada_norm"] and told.dropout == 0.1
    assert found.model.shape == (vae.config.in_channels, 8 * unit, 8 * unit)
    x, t = torch.randn(2, *found.model.model_shape), torch.tensor([0.3, 0.7], dtype=torch.float64)
    labels = torch.tensor([1, 2])
    eps = found.model.denoiser.predict(t, x, labels).eps
    theirs_eps = transformer(x, 1000 * t - 1, class_labels=labels).sample[:, : x.shape[1]]
    torch.testing.assert_close(eps, theirs_eps)

    network = theirs("diffusers_unet")
    network.save_pretrained(tmp_path / "labelled" / "unet")
    folder = folder_with((None, tmp_path / "labelled"), tmp_path / "pipe", {"_class_name": "DDPMScheduler"})
    with pytest.raises(ConfigError, match="a table of 4 labels"):
        from_diffusers(folder)
    last, every = (from_diffusers(folder, null_label=null).model for null in (True, False))
    assert [(m.conditions.num_classes, m.conditions.dropout) for m in (last, every)] == [(3, 0.1), (4, 0)]
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    answers = [m.denoiser.answer(t, x, labels) for m in (last, every)]
    assert torch.equal(*answers) and torch.equal(answers[0], network(x, 1000 * t - 1, class_labels=labels).sample)
    with pytest.raises(ValueError, match="condition_dropout=0 needs one"):
        every.sample(1)


def test_what_is_not_known_is_said(network, tmp_path):
    from genmodels.export.read import from_diffusers

    for k, (config, message) in enumerate(
        (
            (
                {"_class_name": "DDPMScheduler", "prediction_type": "noise"},
                "'noise' is not known here; known are epsilon",
            ),
            ({"_class_name": "RePaintScheduler"}, "RePaintScheduler of .* is not known here; known are DDPMScheduler"),
            ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "known are epsilon, v_prediction"),
            ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "known is 'discrete'"),
            ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        )
    ):
        with pytest.raises(ConfigError, match=message):
            from_diffusers(folder_with(network, tmp_path / str(k), config))
    with pytest.raises(ConfigError, match="is missing; a pipeline folder"):
        from_diffusers(tmp_path / "nowhere")
    (tmp_path / "0" / "unet").unlink()
    (tmp_path / "0" / "unet").mkdir()
    (tmp_path / "0" / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ConfigError, match="holds the class UNet2DConditionModel; known are UNet2DModel"):
        from_diffusers(tmp_path / "0")


# ---- from the command line -------------------------------------------------------------------------------------------


def test_a_run_goes_out_and_comes_back(tmp_path, monkeypatch, capsys):
    """Exported, imported as a run, sampled: 8-bit pixels of the stock pipeline's pictures."""
    from diffusers import DDPMPipeline

    monkeypatch.chdir(tmp_path)
    model, config, facts = made({"network": UNET})
    state = {"step": 0, "samples": 0, "seconds": 0.0, "steps": 1, "world_size": 1, "data": None, "best": None}
    Run.create(Config(config.tree | {"name": "try"})).save({"model": model.state_dict()}, state, facts)
    assert main(["export", "runs/try", "--to", "out"]) == 0
    assert "DDPMPipeline with FlowMatchEulerDiscreteScheduler)" in capsys.readouterr().out
    assert main(["export", "runs/try", "--to", "out"]) == 2 and "is not empty" in capsys.readouterr().err
    assert main(["import", "out", "--name", "back"]) == 0
    assert main(["import", "out", "--name", "back"]) == 2 and "Choose another name" in capsys.readouterr().err
    run = Run.open("runs/back")
    model = run.load()
    assert isinstance(run.dataset(), External) and model.schedule.registered_name == "linear"
    own = Run.open("runs/try").load()
    for name, value in own.denoiser.network.state_dict().items():
        assert torch.equal(value, model.denoiser.network.state_dict()[name])
    pipeline = DDPMPipeline.from_pretrained("out")
    pipeline.set_progress_bar_config(disable=True)
    image = drawn(pipeline, 4)
    y = from_noise(model, noise(), pipeline.scheduler.sigmas.double(), Euler())
    close = (model.transform.inverse(y) - (255 * image).round()).abs()
    assert (close <= 1).all() and (close == 0).double().mean() > 0.99  # but for ties of float32
    assert main(["sample", "runs/back", "--seeds", "0-1", "sample.num_steps=2"]) == 0
