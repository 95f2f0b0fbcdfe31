"""Diffusion models as pipeline folders of diffusers: `python -m genmodels export runs/try --to folder`."""

import argparse
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..commands import guarded
from ..diffusion.discrete import Discrete
from ..diffusion.model import DiffusionModel
from ..diffusion.schedules import EDM, Linear, Schedule
from ..diffusion.tabulated import Table, Tabulated
from ..diffusion.time_condition import Identity, LogSNR, Shared
from ..model import Model
from ..networks.diffusers import DiffusersDiT, DiffusersUNet
from ..networks.network import Network
from ..processes.local_dsm import LocalDSM
from ..processes.multivariate import MultivariateDiffusion
from ..registry import ConfigError, build, resolve
from ..solvers.base import Solver, title
from ..training.run import Run

Choice = Literal["auto", "stock", "own"]
STRAIGHT = "OnStraightPath"
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x": "sample"}  # their names in schedulers of diffusers
IMAGENET = 1000  # classes, and so the label that DiTPipeline takes for "no class"


def export(
    run: Run | str | Path, folder: str | Path, *, weights: str | None = None, scheduler: Choice = "auto"
) -> tuple[str, str]:
    """A pipeline folder of a run's model; the names of its pipeline and of its scheduler.

    Networks that are of diffusers already are written as such, others as `GenModel`. The folder is a DDPMPipeline or
    DiTPipeline where these draw what the model means, else a `GenPipeline`, which needs genmodels to be installed.
    Models of 'local_dsm' and 'multivariate_diffusion' are a `GenPipeline` around the whole of them.

    Args:
        weights: as in `Run.load`.
        scheduler: "stock" for one of diffusers (FlowMatchEuler on the linear path with the prediction velocity,
            EDMEuler for EDM, DDIM on variance-preserving paths with eps, v or x; for all others FlowMatchEuler with
            the network `OnStraightPath`), "own" for `GenScheduler` with the run's solver and steps, "auto" for a stock
            one where there is one that needs no other path.
    Raises:
        ConfigError: if the model is of another kind or cannot be sampled, if a stock scheduler is asked for and there
            is none, or if the folder holds something else.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    model = run.load(weights)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"export: {folder} exists and is not empty. Choose another folder, or remove it.")
    pipeline = pipeline_of(model, run.config.tree["model"], run.facts(), run.config.answer("sample"), scheduler)
    pipeline.save_pretrained(folder)
    steps = "its own steps" if pipeline.scheduler is None else type(pipeline.scheduler).__name__
    return type(pipeline).__name__, steps


def pipeline_of(
    model: Model,
    node: dict[str, Any],
    facts: dict[str, Any],
    sample: dict[str, Any],
    scheduler: Choice = "auto",
) -> Any:
    """The pipeline of a model.

    Args:
        node: of the model, resolved.
        facts: of its data.
        sample: the resolved section on sampling.
    Raises:
        ConfigError: as `export`.
    """
    from diffusers import DDPMPipeline

    from .pipeline import GenPipeline, GenTransform

    if isinstance(model, LocalDSM | MultivariateDiffusion):
        return _whole(model, node, facts, sample, scheduler)
    if not isinstance(model, DiffusionModel):
        raise ConfigError(
            f"export: a {type(model).__name__} has no pipeline; models of 'diffusion', 'local_dsm' and "
            "'multivariate_diffusion' can be exported."
        )
    node = node | {"schedule": path_node(model.schedule, node["schedule"])}
    _check_labels(model)
    if sample["interval"] is not None or sample["guide"] is not None:
        raise ConfigError("export: guidance in an interval or by another model has no place in a pipeline.")
    stock, prior = None if scheduler == "own" else stock_scheduler(model), model.prior_scale()
    if stock is None and scheduler == "stock":
        inner, stock = _straight(model, node, sample)
        prior = inner.sigmas(1)[0]
    else:
        inner = _inner(model, node)
    chosen = own_scheduler(model, node, sample) if stock is None else stock
    dit = _dit_pipeline(model, facts, inner, stock)
    if dit is not None:
        return dit
    unscaled = node["prediction"] != "edm" or type(inner).__name__ == STRAIGHT  # a DDPMPipeline does not scale
    whole = prior > 1 - 1e-9 if type(inner).__name__ == STRAIGHT else abs(prior - 1) < 1e-3
    plain = not model.conditional and whole and unscaled
    if plain and len(model.model_shape) == 3 and _symmetric(model):
        return DDPMPipeline(unet=inner, scheduler=chosen)
    transform = GenTransform(facts["transform"], list(model.shape))
    transform.back.load_state_dict(model.transform.state_dict())
    levels, width = facts.get("levels"), facts.get("bin_width") or 1.0
    told = model.conditions
    null = None if told.null is None or told.dropout == 0 else told.null.tolist()
    return GenPipeline(
        inner, chosen, transform.eval(), prior_scale=None if stock is None else prior, null=null,
        num_inference_steps=sample["num_steps"], guidance_scale=sample["guidance"],
        low=0.0 if levels else -1.0, high=width * (levels - 1) if levels else 1.0,
    )  # fmt: skip


def _network(model: DiffusionModel) -> Network:
    return model.denoiser.network


def _is_theirs(network: Network) -> bool:
    """Whether the model of diffusers inside answers as the network does: not if a layer stands before it."""
    if isinstance(network, DiffusersUNet):
        return network.condition.condition_shape is None
    return isinstance(network, DiffusersDiT)


def network_labels(model: DiffusionModel) -> tuple[float, float]:
    """Scale and offset of the timesteps of the network as a model of diffusers, by its own labels of time."""
    network = _network(model)
    if _is_theirs(network):
        return network.time_scale, network.time_offset
    return (1.0 if model.denoiser.prediction == "edm" else 1000.0), 0.0


def _relabels(model: DiffusionModel) -> bool:
    """Whether the network is told of times by other labels than timesteps are: t itself, or log(σ/α)/4 for "edm"."""
    told = model.denoiser.time_condition
    if model.denoiser.prediction == "edm":
        return not (type(told) is LogSNR and told.factor == 0.25)
    return type(told) is not Identity


def _shares(model: DiffusionModel) -> bool:
    """Whether it is told the left edge of an interval of timesteps, which `TimestepShared` says as well."""
    return type(model.denoiser.time_condition) is Shared and model.denoiser.prediction != "edm"


def labels_of(model: DiffusionModel) -> tuple[float, float]:
    """Scale and offset of the timesteps that a scheduler counts out."""
    if not _relabels(model) or _shares(model):
        return network_labels(model)
    if model.denoiser.prediction == "edm":
        return 1.0, 0.0
    # step k of a chain is the time (k + 1)/T
    return (float(model.schedule.steps), -1.0) if isinstance(model.schedule, Discrete) else (1000.0, 0.0)


def _inner(model: DiffusionModel, node: dict[str, Any]) -> Any:
    """The network as a model of diffusers that takes the timesteps of a scheduler."""
    from .timestep_shared import TimestepShared
    from .wrappers import Relabelled

    bare, told, (scale, offset) = _bare(model, node), model.denoiser.time_condition, labels_of(model)
    if not _relabels(model):
        return bare
    if _shares(model):
        # by fractions, as products of floats may lie on the wrong side of a whole timestep
        at = [Fraction(repr(edge)) * Fraction(repr(scale)) + Fraction(repr(offset)) for edge in told.edges]
        first = Fraction(repr(told.first)) * Fraction(repr(scale)) + Fraction(repr(offset))
        return TimestepShared(bare, edges=[float(edge) for edge in (first, *at[1:])]).eval()
    own_scale, own_offset = network_labels(model)
    return Relabelled(
        bare, node["schedule"], node["time_condition"], scale, offset, model.denoiser.prediction == "edm", own_scale,
        own_offset,
    ).eval()  # fmt: skip


def _straight(model: DiffusionModel, node: dict[str, Any], sample: dict[str, Any]) -> tuple[Any, Any]:
    """The network as a velocity on the straight path, and the stock scheduler of that."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from .wrappers import OnStraightPath

    network = OnStraightPath(
        _bare(model, node), node["schedule"], node["prediction"], float(model.denoiser.sigma_data),
        node["time_condition"], *network_labels(model), sample["grid"],
    )  # fmt: skip
    return network.eval(), FlowMatchEulerDiscreteScheduler()


def _whole(model: Model, node: dict[str, Any], facts: dict[str, Any], sample: dict[str, Any], scheduler: Choice) -> Any:
    """The pipeline of a model that draws for itself."""
    from .pipeline import GenPipeline
    from .whole import GenWhole

    name = node["name"]
    if scheduler == "stock":
        raise ConfigError(
            f"export: no scheduler of diffusers runs a model of '{name}', whose paths are not α x + σ ε with N(0, I) "
            "at their end. Use --scheduler auto."
        )
    if isinstance(model, LocalDSM) and model.process.prior is None:
        raise ConfigError(
            f"export: {type(model.process).__name__} has no prior that could be sampled, so that a pipeline could draw "
            "nothing from it. Choose a process with a prior."
        )
    whole = GenWhole(node, facts, sample)
    whole.inner.load_state_dict(model.state_dict())
    levels, width = facts.get("levels"), facts.get("bin_width") or 1.0
    return GenPipeline(
        nn.Module.to(whole, model.dtype).eval(), num_inference_steps=sample["num_steps"],
        guidance_scale=sample.get("guidance", 1.0), low=0.0 if levels else -1.0,
        high=width * (levels - 1) if levels else 1.0,
    )  # fmt: skip


def _bare(model: DiffusionModel, node: dict[str, Any]) -> Any:
    """The network as a model of diffusers that takes its own labels, as timesteps."""
    from .pipeline import GenModel

    network = _network(model)
    if _is_theirs(network):
        return network.model.eval()
    scale, offset = network_labels(model)
    vectors = None if model.conditions.num_classes is not None else model.conditions.condition_shape
    vectors = None if vectors is None else list(vectors)
    first, *rest = model.model_shape
    wrapped = GenModel(node["network"], first, list(rest), model.conditions.num_classes, vectors, scale, offset)
    wrapped.inner.load_state_dict(network.state_dict())
    return nn.Module.to(wrapped, model.dtype).eval()  # theirs warns of parts that ours has not


def path_node(schedule: Schedule, node: dict[str, Any]) -> dict[str, Any]:
    """The node of a path as it is now: a table of numbers for one that was fitted to data or read from a file.

    Raises:
        ConfigError: if the path is neither what its configuration says nor a table.
    """
    if isinstance(schedule, Table):
        return resolve(Schedule, Tabulated.node(schedule), "schedule")
    t = torch.linspace(schedule.t_min, schedule.t_max, 101, dtype=torch.float64)
    made = build(Schedule, node)
    if not all(torch.equal(a, b) for a, b in zip(made.scales(t), schedule.scales(t), strict=True)):
        raise ConfigError(
            f"export: the path of the schedule '{node['name']}' was fitted to data, and is no table that a "
            "scheduler's configuration could hold. Export a model on a path of numbers, such as linear or vp."
        )
    return node


@torch.no_grad()
def _check_labels(model: DiffusionModel) -> None:
    """Raises ConfigError if the network is told of times by other labels than its `time_condition` says."""
    denoiser, told = model.denoiser, []
    t = torch.linspace(denoiser.t_min, denoiser.t_max, 5, dtype=torch.float64, device=model.device)[1:-1]
    hook = _network(model).register_forward_pre_hook(lambda _, given: told.append(given[0]))
    try:
        denoiser.answer(t, torch.zeros(3, *model.model_shape, dtype=model.dtype, device=model.device))
    finally:
        hook.remove()
    span = denoiser.t_max - denoiser.t_min
    # early times may have labels that later ones do not, down to the first of a thousand steps and below
    share = torch.cat((torch.linspace(0, 1, 1001), torch.logspace(-5, 0, 501))).to(t)
    every = denoiser.t_min + span * share
    for found, times in ((told[0], t), (denoiser.label(every), every)):
        expected = denoiser.time_condition(times, model.schedule)
        if torch.allclose(found.double(), expected, rtol=1e-9, atol=1e-9):
            continue
        raise ConfigError(
            "export: the network of this model is told of times by labels of its own, which its time_condition does "
            "not say. Export a model whose labels are those of a registered time condition."
        )


def stock_scheduler(model: DiffusionModel) -> Any | None:
    """The scheduler of diffusers for a path, a prediction and labels of time; None if there is none."""
    from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    schedule, prediction, (scale, offset) = model.schedule, model.denoiser.prediction, labels_of(model)
    whole = scale == int(scale) and scale >= 2
    if prediction == "velocity" and isinstance(schedule, Linear) and whole and offset == 0:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(scale))
    if prediction == "edm" and isinstance(schedule, EDM) and (scale, offset) == (1, 0):
        ends = schedule.scales(torch.tensor([0.0, 1.0], dtype=torch.float64))[1].tolist()
        s = float(model.denoiser.sigma_data)
        return EDMEulerScheduler(sigma_min=ends[0], sigma_max=ends[1], sigma_data=s, rho=schedule.rho)
    if prediction in PREDICTIONS and whole and _preserving(schedule):
        betas = chain(schedule, int(scale), offset)
        return DDIMScheduler(
            num_train_timesteps=len(betas), trained_betas=betas, prediction_type=PREDICTIONS[prediction],
            clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing",
        )  # fmt: skip
    return None


def own_scheduler(model: DiffusionModel, node: dict[str, Any], sample: dict[str, Any]) -> Any:
    """A scheduler that takes the steps of `DiffusionModel.sample`.

    Raises:
        ConfigError: if steps are chosen while sampling.
        NotApplicable: if they add noise, and items and noise were coupled in training.
    """
    from .diffusers import GenScheduler

    if sample["controller"] != {"name": "fixed", "steps": 1}:
        raise ConfigError(
            f"export: sample.controller '{sample['controller']['name']}' chooses steps while it samples, and pipelines "
            "lay them out before. Use --scheduler stock, or a run with controller fixed."
        )
    solver = build(Solver, sample["solver"])
    if solver.draws:
        model.check_independent(f"export: solver '{title(solver)}', which adds noise")
    scale, offset = labels_of(model)
    return GenScheduler(
        schedule=node["schedule"], prediction=node["prediction"], solver=sample["solver"],
        sigma_data=float(model.denoiser.sigma_data), grid=sample["grid"], denoise=sample["denoise"], time_scale=scale,
        time_offset=offset, time_condition=node["time_condition"],
    )  # fmt: skip


def _preserving(schedule: Schedule) -> bool:
    """Whether α² + σ² = 1."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 101, dtype=torch.float64)
    alpha, sigma = schedule.scales(t)
    return bool((alpha.square() + sigma.square() - 1).abs().max() < 1e-12)


def chain(schedule: Schedule, scale: int, offset: float) -> list[float]:
    """β_k of the discrete chain with ᾱ_k = α² at the time whose label is k = 0, 1, …, one for each unit of scale.

    Times before t_min count as t_min, so that the label 0 of a path without noise at t = 0 has some.
    """
    k = torch.arange(scale, dtype=torch.float64)
    t = ((k - offset) / scale).clamp(schedule.t_min, schedule.t_max)
    t = t[: int((t.diff() > 0).sum()) + 1]  # labels beyond the end of the path have no times of their own
    log_bar = torch.nn.functional.logsigmoid(schedule.log_snr(t))
    steps: Tensor = torch.cat((log_bar[:1], log_bar.diff()))
    return (-torch.expm1(steps)).tolist()


def _symmetric(model: DiffusionModel) -> bool:
    """Whether -1 … 1 of model space is the range of the data, as DDPMPipeline has it: black to white."""
    y = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, *model.model_shape)
    if not model.transform.volume or model.bin_width is None:
        return False
    low, middle, high = (float(v) for v in model.transform.inverse(y).flatten(1).mean(1))
    beyond = model.transform.inverse(2 * y).flatten(1).mean(1)
    return low == float(beyond[0]) == 0 and high == float(beyond[2]) and abs(middle / high - 0.5) < 0.1


def _dit_pipeline(model: DiffusionModel, facts: dict[str, Any], inner: Any, scheduler: Any | None) -> Any | None:
    """A DiTPipeline, if it draws what the model means: latents, its own null label, a scheduler of diffusers."""
    from diffusers import DiTPipeline

    transform = model.transform
    if not (isinstance(_network(model), DiffusersDiT) and hasattr(transform, "autoencoder") and scheduler is not None):
        return None
    stated = float(transform.scaling) == transform.autoencoder.config.scaling_factor and float(transform.shift) == 0
    if not stated or model.conditions.num_classes != IMAGENET or model.denoiser.prediction not in PREDICTIONS:
        return None
    return DiTPipeline(transformer=inner, vae=transform.autoencoder, scheduler=scheduler)


@guarded
def main(argv: Sequence[str]) -> None:
    """Write the model of a run as a folder that diffusers loads with DiffusionPipeline.from_pretrained."""
    parser = argparse.ArgumentParser("genmodels export", description=main.__doc__)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write; it must not hold anything")
    parser.add_argument("--weights", help="model, best or ema-<value> (default: the first average)")
    parser.add_argument(
        "--scheduler",
        choices=("auto", "stock", "own"),
        default="auto",
        help="one of diffusers, or our solvers as a scheduler, which need genmodels (default: stock where one fits)",
    )
    given = parser.parse_args(list(argv))
    pipeline, scheduler = export(given.run, given.to, weights=given.weights, scheduler=given.scheduler)
    index = json.loads((given.to / "model_index.json").read_text())
    needs = any(isinstance(part, list) and part[0].startswith("genmodels") for part in index.values())
    needs |= pipeline.startswith("Gen")
    how = "genmodels.export.pipeline" if pipeline.startswith("Gen") else "diffusers"
    print(f"{given.to}  ({pipeline} with {scheduler}{'; needs genmodels' if needs else ''})")
    first = "import genmodels.export.pipeline; " if needs and how == "diffusers" else ""  # which diffusers would not
    print(f'{first}from {how} import {pipeline}; pipeline = {pipeline}.from_pretrained("{given.to}")')
