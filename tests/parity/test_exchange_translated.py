"""Models that no stock scheduler knows as they are: other labels, fitted paths, priors of their own; out and back."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import Tensor

from genmodels.commands import main
from genmodels.config import Config
from genmodels.diffusion.denoiser import OnSchedule
from genmodels.diffusion.schedules import Linear, Schedule
from genmodels.diffusion.tabulated import Tabulated
from genmodels.diffusion.time_condition import TimeCondition
from genmodels.export.pipeline import GenPipeline
from genmodels.export.read import from_diffusers
from genmodels.export.schedulers import through, training_of
from genmodels.export.timestep_shared import TimestepShared, share, shared_edges
from genmodels.export.wrappers import OnStraightPath, Relabelled
from genmodels.export.write import pipeline_of
from genmodels.registry import ConfigError, build, resolve
from genmodels.solvers.base import integrate
from genmodels.solvers.exponential import DDIM, DPMpp
from genmodels.solvers.runge_kutta import Euler
from genmodels.training.run import Run
from genmodels.transforms import Identity
from tests.parity.test_exchange import IMAGES, LEVELS17, UNET, drawn, from_noise, made, noise, written

POINTS = {"shape": [2], "levels": None, "bin_width": None, "transform": "identity"}
MLP = {"name": "mlp", "hidden": [16, 16]}
SMALL = UNET | {"block_out_channels": [4, 8], "attention_head_dim": 4}
KINETIC = {"name": "kinetic_optimal", "estimator": "gaussian"}  # the quickest to find
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
@pytest.mark.slow_for("log_snr", "shared")
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
    ddim = diffusers.DDIMPipeline(pipeline.unet, pipeline.scheduler)
    ddim.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    pictures = ddim(batch_size=3, generator=g, num_inference_steps=8, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(pictures).permute(0, 3, 1, 2), x, rtol=0, atol=1e-5)
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


@pytest.mark.parametrize(("n", "t_tilde"), [(5, 400), (3, 100), (7, 500), (2, 999)])
def test_every_timestep_is_told_the_same_edge_on_both_sides(n, t_tilde, tmp_path):
    """All 1000 of them, where products of floats lie on the wrong side of some; written and read."""
    k = torch.arange(1000)
    model, config, facts = made(
        {"network": MLP, "schedule": "vp", "prediction": "eps",
         "time_condition": {"name": "shared", "intervals": n, "until": t_tilde / 1000}}, **POINTS,
    )  # fmt: skip
    wrapped = pipeline_of(model, config.tree["model"], facts, config.answer("sample"), "own").model
    told = 1000 * model.denoiser.label(k.double() / 1000)
    torch.testing.assert_close(share(k, wrapped.edges).double(), told, rtol=1e-12, atol=1e-12)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    training = through(training_of(tmp_path), {"_class_name": "TimestepShared", "n": n, "t_tilde": t_tilde})
    condition = build(TimeCondition, resolve(TimeCondition, training.time_condition, "shared"))
    back = 1000 * condition((k.double() + 1) / 1000, model.schedule) - 1
    torch.testing.assert_close(share(k, shared_edges(n, t_tilde)).double(), back, rtol=1e-12, atol=1e-9)


RELABELLED = {
    "labels without an end": {"network": MLP, "time_condition": CONDITIONS["log_snr"]},
    "shared, own network": {"network": MLP, "schedule": "vp", "prediction": "eps", "time_condition": "shared"},
    "edm": {"network": MLP, "schedule": "edm", "prediction": "edm", "time_condition": CONDITIONS["remap"]},
    "edm, shared": {"network": MLP, "schedule": "vp", "prediction": "edm", "time_condition": "shared"},
}  # fmt: skip


@pytest.mark.parametrize("case", RELABELLED)
def test_our_scheduler_draws_models_with_labels_of_their_own(case, tmp_path):
    """With its times, which end where labels do: the samples of `DiffusionModel.sample`, seed by seed."""
    sample = {"num_steps": 5, "solver": "heun", "grid": "log_snr"}
    model, config, facts = made(RELABELLED[case], sample, **POINTS)
    pipeline = written(tmp_path, (model, config, facts), "own")
    assert type(pipeline.model) is (TimestepShared if case == "shared, own network" else Relabelled)
    expected = model.sample([5, 9, 2], **config.options("sample"))
    torch.testing.assert_close(pipeline(seeds=[5, 9, 2]).images, expected, rtol=1e-5, atol=1e-5)
    if case == "labels without an end":
        assert pipeline.scheduler.init_noise_sigma == pytest.approx(1000 / 1001)
        stock = written(tmp_path / "stock", (model, config, facts))  # which asks at t = 1 first, where α is 0
        assert type(stock.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
        x, last = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), model.denoiser.t_max
        with torch.no_grad():
            wanted = model.denoiser.answer(torch.tensor(last, dtype=torch.float64), x)
            torch.testing.assert_close(stock.model(x, torch.tensor(1000.0)).sample, wanted)
        with pytest.raises(ConfigError, match="holds the class GenModel; known are UNet2DModel"):
            from_diffusers(tmp_path)
    if case == "edm":
        stock = written(tmp_path / "stock", (model, config, facts))
        assert type(stock.scheduler) is diffusers.EDMEulerScheduler and type(stock.model) is Relabelled
        t, x = torch.tensor([0.3, 0.9], dtype=torch.float64), torch.randn(2, 2)
        with torch.no_grad():
            wanted = model.denoiser.network(t.sqrt(), x, None)
            torch.testing.assert_close(stock.model(x, -model.schedule.log_snr(t) / 8).sample, wanted)


# ---- paths found from data -------------------------------------------------------------------------------------------


def test_a_table_makes_a_fitted_path_again():
    """Scales and derivatives to rounding, ends exact, and through JSON."""
    model = made({"network": MLP, "schedule": KINETIC}, **POINTS)[0]
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
    model, config, facts = made({"network": MLP, "schedule": KINETIC}, sample, **POINTS)
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
        "fitted": {"schedule": KINETIC}, "vp, velocity": {"schedule": "vp", "prediction": "velocity"},
        "edm": {"schedule": "linear", "prediction": "edm", "sigma_data": 0.6, "time_condition": CONDITIONS["remap"]},
        "x with labels": {"schedule": "linear", "prediction": "x", "time_condition": CONDITIONS["log_snr"]},
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


# ---- priors of their own ---------------------------------------------------------------------------------------------

LOGISTIC = {"name": "langevin", "prior": "logistic"}


def whole(node: dict, sample: dict, **facts: object) -> tuple:
    """A model with a prior of its own off its initial values, its configuration and facts."""
    given = {"num_classes": None, "condition_shape": None, "target_shape": None, "sample_rate": None}
    given |= {**IMAGES, **POINTS} | facts
    config = Config({"name": "x", "data": "external", "model": node, "sample": sample})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = config.model(given).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return model, config, given


@pytest.mark.parametrize("case", ["logistic", "multivariate", "images with classes"])
def test_models_with_priors_of_their_own_go_out_whole(case, tmp_path):
    """Saved and loaded, the samples of the model for the same seeds; with fitted numbers and conditions."""
    node, sample, facts = {
        "logistic": ({"name": "local_dsm", "network": MLP, "process": LOGISTIC}, {"num_steps": 6}, {}),
        "multivariate": ({"name": "multivariate_diffusion", "network": MLP}, {"num_steps": 4, "solver": "euler"},
                         {"transform": "standardize"}),
        "images with classes": ({"name": "local_dsm", "network": SMALL}, {"num_steps": 3, "guidance": 1.6},
                                {**IMAGES, "transform": LEVELS17, "num_classes": 3}),
    }[case]  # fmt: skip
    model, config, facts = whole(node, sample, **facts)
    if case == "multivariate":
        model.transform.mean.copy_(torch.tensor([3.0, -1.0]))
        model.joint.sigma_data.fill_(0.7)
    pipeline = written(tmp_path, (model, config, facts))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert type(pipeline) is GenPipeline and index["model"][1] == "GenWhole" and index["scheduler"] == [None, None]
    labels = torch.tensor([2, 0, 1]) if facts.get("num_classes") else None
    expected = model.sample([5, 9, 2], condition=labels, **config.options("sample"))
    torch.testing.assert_close(pipeline(class_labels=labels, seeds=[5, 9, 2]).images, expected, rtol=1e-6, atol=1e-6)
    fewer = model.sample([5, 9, 2], condition=labels, **config.options("sample") | {"num_steps": 2})
    again = pipeline(class_labels=labels, seeds=[5, 9, 2], num_inference_steps=2).images
    torch.testing.assert_close(again, fewer, rtol=1e-6, atol=1e-6)
    assert (fewer - expected).abs().max() > 1e-3
    one, two = (pipeline(2, generator=torch.Generator().manual_seed(k), num_inference_steps=2).images for k in (0, 1))
    assert one.shape == two.shape == (2, *model.shape) and (one - two).abs().amax() > 1e-3
    if labels is None:
        with pytest.raises(ValueError, match="condition was given to an unconditional model"):
            pipeline(class_labels=[1], seeds=[1])
    else:
        plain = pipeline(class_labels=labels, seeds=[5, 9, 2], guidance_scale=1.0).images
        unguided = model.sample([5, 9, 2], condition=labels, **config.options("sample") | {"guidance": 1.0})
        torch.testing.assert_close(plain, unguided)
        assert pipeline(class_labels=labels, output_type="pil").images[0].size == (8, 8)
    for options, message in (
        ({"sigmas": [1.0]}, "lays its own steps out"),
        ({"seeds": [1], "class_labels": [0, 1]}, "one seed an item"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(**options)
    if case == "multivariate":
        with pytest.raises(ValueError, match=r"guidance 2\.0 needs a conditional model"):
            pipeline(2, guidance_scale=2.0)


def test_why_a_model_cannot_be_written():
    model, config, facts = whole({"name": "local_dsm", "network": MLP}, {})
    for changed, choice, message in (
        (model, "stock", r"no scheduler of diffusers runs a model of 'local_dsm', whose paths are not"),
        (prior_free(model), "auto", "has no prior that could be sampled"),
        (torch.nn.Linear(1, 1), "auto", "a Linear has no pipeline; models of 'diffusion', 'local_dsm' and"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline_of(changed, config.tree["model"], facts, config.answer("sample"), choice)


def prior_free(model: object) -> object:
    model.process.prior = None
    return model


def test_edges_that_are_no_times_are_refused(tmp_path):
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    for edges in ((-5.0, 20.0), (0.0, 1200.0)):
        folder = tmp_path / str(edges[0])
        diffusers.DDPMPipeline(TimestepShared(network, edges=edges), diffusers.DDPMScheduler()).save_pretrained(folder)
        with pytest.raises(ConfigError, match="are no times of a path whose timesteps run from -1 to 999"):
            from_diffusers(folder)
    with pytest.raises(ValueError, match="two edges or more that increase are needed"):
        TimestepShared(network, edges=[0.0, 0.0])
    x = torch.zeros(1, 1, 8, 8)
    with torch.no_grad():  # a whole timestep is told an edge that is not whole
        told = TimestepShared(network.eval(), edges=[0.0, 33.4, 90.0])(x + 1, torch.tensor(50)).sample
        assert torch.equal(told, network(x + 1, torch.tensor(33.4, dtype=torch.float64)).sample)
        assert not torch.equal(told, network(x + 1, torch.tensor(33)).sample)


def test_the_command_writes_all_of_them(tmp_path, monkeypatch, capsys):
    """A run on a fitted path in stock steps, and one with a prior of its own; what to type is said and works."""
    monkeypatch.chdir(tmp_path)
    path, prior = (
        made({"network": SMALL, "schedule": KINETIC}),
        whole({"name": "local_dsm", "network": MLP}, {"num_steps": 3}),
    )
    fitted(path[0])
    state = {"step": 0, "samples": 0, "seconds": 0.0, "steps": 1, "world_size": 1, "data": None, "best": None}
    for name, (model, config, facts) in (("path", path), ("prior", prior)):
        Run.create(Config(config.tree | {"name": name})).save({"model": model.state_dict()}, state, facts)
    assert main(["export", "runs/path", "--to", "stock", "--scheduler", "stock"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].endswith("(DDPMPipeline with FlowMatchEulerDiscreteScheduler; needs genmodels)")
    assert said[-1].startswith("import genmodels.export.pipeline; from diffusers import DDPMPipeline; ")
    assert main(["export", "runs/prior", "--to", "own"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].endswith("(GenPipeline with its own steps; needs genmodels)")
    found: dict = {}
    exec(said[-1], found)
    model = Run.open("runs/prior").load()
    torch.testing.assert_close(found["pipeline"](seeds=[4, 5]).images, model.sample([4, 5], num_steps=3))
    assert main(["import", "stock", "--name", "back"]) == 0
    back, model = (Run.open(f"runs/{name}").load() for name in ("back", "path"))
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(back.schedule.scales(t), model.schedule.scales(t), rtol=0, atol=1e-12)
