"""Regularized continuous depth: every penalty on every kind of model at small scale, with three seeds each.

    python -m evals.studies.regularization annulus digits … [--jobs 2] [--root runs/regularization] [--publish]

Each run is a configuration with `model.regularizers` set; the names of runs are experiment-method-seed. Runs that are
finished are not trained again, so the same command continues a study, and `--methods` and `--seeds` choose among them.
`evals.studies.regularization_table` makes the table and the pictures of the results.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .plans import Plan, carry_out_all, parser

SEEDS = (3, 4, 5)  # coefficients come from a few trials on the seeds 0, 1 and 2
Coefficients = float | tuple[float, float]  # constant, or from the start to the end of training


@dataclass(frozen=True)
class Experiment:
    """A model on data, how it is scored, and the coefficients of the methods there.

    Args:
        config, protocol: of the runs.
        metric: of the protocol, that tells the quality.
        overrides: that make runs short.
        coefficients: by method; one that is not here is left out.
        aggregation: of error estimates over the steps.
    """

    config: str
    protocol: str
    metric: str
    coefficients: dict[str, Coefficients]
    overrides: tuple[str, ...] = ()
    aggregation: str = "mean"


def _ode(error: Coefficients, stiffness: float, count: Coefficients, **own: Coefficients) -> dict[str, Coefficients]:
    """Coefficients by method for an ODE; those of local forms are those of the global ones."""
    return {
        "kinetic_jacobian": 0.01,
        "taylor": 0.01,
        "error_estimate": error,
        "stiffness": stiffness,
        "both": error,
        "steps": count,
        "local-unbiased": error,
        "local-biased": error,
        "local-steps": count,
        "local-reference": (2.5, 1.0),
        **own,
    }


def _sde(error: Coefficients, stiffness: float, count: float, **own: Coefficients) -> dict[str, Coefficients]:
    whole = _ode(error, stiffness, count, **own)
    return {name: value for name, value in whole.items() if name in ONLY_SDE}


ONLY_SDE = ("error_estimate", "stiffness", "both", "steps", "local-unbiased", "local-biased", "local-steps")
PLAIN = ("vanilla", "steer")  # without a coefficient
# The coefficients of the papers hold for mean E h and max S, see the docstrings of `error_estimate` and `stiffness`.
EXPERIMENTS = {
    "annulus": Experiment("annulus/neural_ode", "annulus", "accuracy", _ode((100.0, 10.0), 0.1, (0.5, 2.0))),
    "digits": Experiment(
        "digits/neural_ode", "digits_classify", "accuracy", _ode((1000.0, 100.0), 0.1, (0.5, 2.0)), ("train.steps=400",)
    ),
    "spirals": Experiment(
        "series/latent_ode",
        "spiral_series",
        "squared_error",
        _ode((1e-3, 0.1), 1e-4, (1e-3, 0.1), kinetic_jacobian=1e-5, taylor=1e-5, **{"local-reference": 0.01}),
        ("train.steps=500", "model.solver=tsit5", "model.controller={name: pi, rtol: 1.0e-4, atol: 1.0e-4}"),
    ),
    "rows": Experiment(
        "series/latent_ode_digits",
        "digit_series_interpolate",
        "squared_error",
        _ode((0.01, 10.0), 0.01, (0.01, 1.0), taylor=1e-3, **{"local-reference": (0.01, 10.0)}),
        ("train.steps=500", "model.solver=tsit5", "model.controller={name: pi, rtol: 1.0e-5, atol: 1.0e-5}"),
    ),
    "sde_digits": Experiment(
        "digits/neural_sde",
        "digits_classify",
        "accuracy",
        _sde(4.0, 1.0, 0.3, **{"local-unbiased": 2.0, "local-biased": 2.0}),
        ("train.steps=400",),
    ),
    "spiral_sde": Experiment(  # the sum over a hundred steps or so; local forms estimate a mean
        "spiral/sde",
        "spiral_sde",
        "moments",
        _sde(0.01, 0.01, 0.01, **{"local-unbiased": 0.5, "local-biased": 0.5}),
        aggregation="sum",
    ),
    "cnf_moons": Experiment("toy2d/ffjord", "moons", "nll", _ode((1.0, 0.1), 0.1, 0.06), ("train.steps=1500",)),
    "cnf_digits": Experiment(
        "digits/ffjord",
        "digits",
        "bits_per_dim",
        _ode((1.0, 0.1), 0.01, 0.03),
        ("train.steps=200", "model.controller={name: pi, rtol: 1e-5, atol: 1e-5, exponents: [1.0, 0.0], norm: batch}"),
    ),
}


def methods(experiment: Experiment) -> list[str]:
    """Those that the experiment compares, in the order of the table."""
    steer = PLAIN if "taylor" in experiment.coefficients else PLAIN[:1]
    return [*steer, *experiment.coefficients]


def regularizers(experiment: Experiment, method: str) -> list[dict[str, Any]]:
    """The nodes of a method."""
    if method in PLAIN:
        return [] if method == "vanilla" else [{"name": "steer"}]
    given = experiment.coefficients[method]
    start, end = given if isinstance(given, tuple) else (given, None)
    rate = {"coefficient": start} | ({} if end is None else {"end": end})
    error = {"name": "error_estimate", "aggregation": experiment.aggregation}
    local = {"name": "local", **rate}
    stiffness = {"name": "stiffness", "coefficient": experiment.coefficients.get("stiffness", 0.1)}
    nodes = {
        "kinetic_jacobian": [{"name": "kinetic_jacobian", **rate}],
        "taylor": [{"name": "taylor", "order": 2, **rate}],
        "error_estimate": [error | rate],
        "stiffness": [stiffness],
        "both": [error | rate, stiffness],
        "steps": [{"name": "error_estimate", "per_step": "steps", **rate}],
        "local-unbiased": [local | {"pick": "time"}],
        "local-biased": [local | {"pick": "step"}],
        "local-steps": [local | {"pick": "step", "quantity": "steps"}],
        "local-reference": [local | {"pick": "time", "form": "reference"}],
    }
    return nodes[method]


def plans(name: str, chosen: Sequence[str] = (), seeds: Sequence[int] = SEEDS) -> Iterator[Plan]:
    """Every method (or those chosen) with every seed, the first seed of all of them first."""
    experiment = EXPERIMENTS[name]
    for seed in seeds:
        for method in methods(experiment):
            nodes = ", ".join(_written(node) for node in regularizers(experiment, method))
            own = (f"seed={seed}", f"model.regularizers=[{nodes}]", *experiment.overrides)
            if not chosen or method in chosen:
                yield Plan(f"{name}-{method}-{seed}", experiment.config, experiment.protocol, own)


def _written(node: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in node.items()) + "}"


STUDIES: dict[str, Callable[[], Iterator[Plan]]] = {name: lambda name=name: plans(name) for name in EXPERIMENTS}


def main() -> None:
    arguments = parser(__doc__, STUDIES, "runs/regularization")
    arguments.add_argument("--methods", nargs="+", default=(), help="of these alone")
    arguments.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of these alone")
    given = arguments.parse_args()
    chosen = [plan for name in given.studies for plan in plans(name, given.methods, given.seeds)]
    carry_out_all(chosen, given.root, given.jobs, given.publish)


if __name__ == "__main__":
    main()
