"""What a scheduler's configuration says of the model that was trained with it: path, prediction, labels of time."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ..diffusion.parametrization import Target
from ..registry import ConfigError
from .timestep_shared import shared_edges

TABLES = (  # with a table of ᾱ
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler",
    "TCDScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler", "SASolverScheduler",
)  # fmt: skip
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "RFSolverScheduler")
LEVELS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
OWN = "GenScheduler"
WRAPPERS = ("TimestepShared", "Relabelled", "OnStraightPath")
PREDICTIONS: dict[str, Target] = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
FLOW = "flow_prediction"


class Training(NamedTuple):
    """How a model was trained.

    Args:
        schedule: node of the path.
        time_scale, time_offset: label = time_scale · t + time_offset; for "edm", time_scale · log(σ/α)/4.
        sigma_data: for "edm".
        negated: whether the network answers with the other sign.
        sample: the section on sampling that draws as the scheduler does.
        time_condition: node of what the network is told of times; None for the label itself.
    """

    schedule: dict[str, Any]
    prediction: Target
    time_scale: float
    time_offset: float
    sigma_data: float
    negated: bool
    sample: dict[str, Any]
    time_condition: dict[str, Any] | None = None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A file of JSON that holds a mapping.

    Raises:
        ConfigError: if it is missing or holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"import: {path} is missing; {what} as diffusers' save_pretrained writes it is needed.")
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"import: {path} is not readable as JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"import: {path} holds no mapping.")
    return found


def training_of(folder: str | Path, image_tokens: int | None = None) -> Training:
    """What the scheduler of a folder says of its model.

    Args:
        image_tokens: tokens of an image, for a shift that depends on them.
    Raises:
        ConfigError: if its class or its prediction type is not known, listing those that are.
    """
    config = read_json(Path(folder) / "scheduler_config.json", "a scheduler")
    name = str(config.get("_class_name"))
    name = name if name.endswith("Scheduler") else f"{name}Scheduler"
    if name == OWN:
        return _own(config)
    if name in LEVELS:
        return _levels(name, config)
    if name in FLOWS or config.get("use_flow_sigmas") or config.get("prediction_type") == FLOW:
        return _flow(config, image_tokens)
    if name in TABLES:
        return _table(name, config)
    raise ConfigError(
        f"import: the scheduler {config.get('_class_name')} of {folder} is not known here; known are "
        f"{', '.join((*TABLES, *FLOWS, *LEVELS, OWN))}."
    )


def _prediction(config: dict[str, Any], known: tuple[str, ...] = tuple(PREDICTIONS)) -> str:
    found = config.get("prediction_type", "epsilon")
    if config.get("predict_epsilon") is False:  # how configurations said it before there were three types
        found = "sample"
    if found not in known:
        raise ConfigError(f"import: the prediction type {found!r} is not known here; known are {', '.join(known)}.")
    return found


def _table(name: str, config: dict[str, Any]) -> Training:
    import diffusers

    prediction = PREDICTIONS[_prediction(config)]
    if config.get("timestep_type") == "continuous":
        raise ConfigError(
            "import: a scheduler with timestep_type 'continuous' tells its network log σ, not steps of a chain; known "
            "is 'discrete'. Export such models with an EDM scheduler."
        )
    # its own table, rounded as its models have seen it; the prediction type of old configurations would be refused
    given = {key: value for key, value in config.items() if not key.startswith("_") and key != "predict_epsilon"}
    scheduler = getattr(diffusers, name).from_config(given | {"prediction_type": "epsilon"})
    table = scheduler.alphas_cumprod.double().tolist()
    if config.get("rescale_betas_zero_snr"):
        table[-1] = 0.0  # some schedulers keep a remainder there
    count = len(table)
    spacing = scheduler.config.get("timestep_spacing", "leading")
    offset = scheduler.config.get("steps_offset", 0) if spacing == "leading" else 0
    sample = {
        "solver": _solver(name, scheduler.config),
        "grid": {"name": "discrete", "spacing": spacing, "count": count, "offset": offset},
        "denoise": bool(scheduler.config.get("set_alpha_to_one", True)),
        "num_steps": min(50, count),
    }
    schedule = {"name": "discrete", "alphas_cumprod": table, "start": "trained"}
    return Training(schedule, prediction, float(count), -1.0, 1.0, False, sample)


def _solver(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The solver of a scheduler, or DDIM for those that have no twin here."""
    if name.startswith("DDPM"):
        return {"name": "ddpm", "variance": "large" if "large" in str(config.get("variance_type")) else "small"}
    if name == "DPMSolverMultistepScheduler" and config.get("algorithm_type") == "dpmsolver++":
        return {"name": "dpmpp", "order": config.get("solver_order", 2)}
    return {"name": "ddim"}


def _flow(config: dict[str, Any], image_tokens: int | None) -> Training:
    _prediction(config | {"prediction_type": config.get("prediction_type", FLOW)}, (FLOW,))
    if config.get("invert_sigmas"):
        raise ConfigError("import: invert_sigmas says that the labels of time run backwards, which is not known here.")
    shift = config.get("flow_shift") or config.get("shift") or 1.0
    if config.get("use_dynamic_shifting"):
        mu = _mu(config, image_tokens)
        shift = mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
    grid = {"name": "even"} if shift == 1 else {"name": "shifted", "shift": shift}
    solvers = {  # of RFSolverScheduler
        "rf": {"name": "rf_solver", "probe": config.get("probe", 0.5)},
        "rf3": {"name": "rf_solver", "order": 3},
        "fireflow": {"name": "fireflow"},
    }
    sample = {"solver": solvers.get(config.get("solver"), {"name": "euler"}), "grid": grid, "num_steps": 50}
    count = float(config.get("num_train_timesteps", 1000))
    return Training({"name": "linear"}, "velocity", count, 0.0, 1.0, False, sample)


def _mu(config: dict[str, Any], tokens: int | None) -> float:
    """The line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
    if tokens is None:
        raise ConfigError(
            "import: this scheduler's shift depends on the number of tokens of an image. Say image_tokens "
            "(--image-tokens), (height/patch) · (width/patch)."
        )
    defaults = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    low, high, first, last = (value if config.get(key) is None else config[key] for key, value in defaults.items())
    return low + (high - low) * (tokens - first) / (last - first)


def _levels(name: str, config: dict[str, Any]) -> Training:
    prediction = _prediction(config, ("epsilon", "v_prediction"))
    schedule = {"name": "edm"}
    schedule |= {key: config[key] for key in ("sigma_min", "sigma_max", "rho") if key in config}
    grid = {"name": "log_snr"} if config.get("sigma_schedule") == "exponential" else {"name": "even"}
    many = name != LEVELS[0]
    solver = {"name": "dpmpp", "order": config.get("solver_order", 2)} if many else {"name": "edm_euler"}
    sample = {"solver": solver, "grid": grid, "num_steps": 50}
    sample["denoise"] = config.get("final_sigmas_type", "zero") == "zero"
    s = float(config.get("sigma_data", 0.5))
    return Training(schedule, "edm", 1.0, 0.0, s, prediction == "v_prediction", sample)


def _own(config: dict[str, Any]) -> Training:
    prediction, schedule = config["prediction"], config["schedule"]
    scale = config["time_scale"] or (1.0 if prediction == "edm" else float(config["num_train_timesteps"]))
    sample = {key: config[key] for key in ("solver", "grid", "denoise")}
    schedule = {"name": schedule} if isinstance(schedule, str) else schedule
    return Training(schedule, prediction, scale, config["time_offset"], config["sigma_data"], False, sample)


def through(training: Training, wrapper: dict[str, Any]) -> Training:
    """What is known of the model when its network stands in a wrapper of `genmodels.export`.

    Args:
        wrapper: the configuration of `TimestepShared`, `Relabelled` or `OnStraightPath`.
    Raises:
        ConfigError: if the wrapper is not known, or has edges of time that no path has.
    """
    name = wrapper["_class_name"]
    if name == "TimestepShared":
        return training._replace(time_condition=_shared(wrapper, training))
    own = {"time_scale": wrapper["own_scale"], "time_offset": wrapper["own_offset"]}
    if name == "Relabelled":
        # labels are those of times on this path, of which a chain is but a table
        sample = training.sample | {"grid": {"name": "even"}}
        kept = {"schedule": wrapper["schedule"], "time_condition": wrapper["time_condition"], "sample": sample}
        return training._replace(**kept, **own)
    if name == "OnStraightPath":
        # a step of Euler's on the straight path is one of DDIM's on the path itself
        sample = {"solver": {"name": "ddim"}, "grid": wrapper["grid"], "denoise": True, "num_steps": 50}
        kept = {key: wrapper[key] for key in ("schedule", "prediction", "sigma_data", "time_condition")}
        return Training(**kept, **own, negated=False, sample=sample)
    raise ConfigError(f"import: the wrapper {name} is not known; known are {', '.join(WRAPPERS)}.")


def _shared(wrapper: dict[str, Any], training: Training) -> dict[str, Any]:
    """The node of shared times whose edges are those of timesteps."""
    edges = wrapper.get("edges") or shared_edges(wrapper["n"], wrapper["t_tilde"])
    scale, offset = (Fraction(repr(float(value))) for value in (training.time_scale, training.time_offset))
    # of fractions, as those of floats may lie on the wrong side of a timestep; no time lies before 0
    first, *later = (float((Fraction(repr(float(edge))) - offset) / scale) for edge in edges)
    if first < 0 or later[-1] > 1:
        raise ConfigError(
            f"import: edges of TimestepShared from {edges[0]:g} to {edges[-1]:g} are no times of a path whose "
            f"timesteps run from {training.time_offset:g} to {training.time_scale + training.time_offset:g}."
        )
    return {"name": "shared", "edges": [0.0, *later], "first": first}
