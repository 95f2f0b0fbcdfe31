"""Score a run under a protocol: `python -m evals.evaluate runs/try [--protocol digits] [sample.num_steps=10]`.

Several processes share the batches of every question; metrics live on the first, which alone writes and speaks.
"""

import argparse
import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..commands import guarded
from ..config import ANSWERS, dotlist
from ..hashing import digest
from ..metrics.cost import num_parameters
from ..metrics.metric import Metric, Subject
from ..model import Model
from ..registry import ConfigError
from ..training import processes
from ..training.provenance import provenance
from ..training.run import Run
from ..types import Estimate, NotApplicable
from .answers import QUESTIONS, Bill, Interview, Progress
from .protocol import FOLDER, Protocol
from .results import SCHEMA, Items, Result, combine, describe_estimate, identify, write
from .tables import describe_result

PUBLISHED = FOLDER.parent / "results"
Estimates = dict[tuple[int, str], Estimate]


def evaluate(
    run: Run,
    protocol: Protocol,
    *,
    weights: str | None = None,
    overrides: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Ask the run's model the questions of a protocol, and write the result into the run.

    A metric that the model cannot be asked for is listed with the reason. The result goes to
    `<run>/eval/<protocol>/<step>-<weights>[-<hash of the options, if overridden>].json`, per-item values beside it.

    Args:
        weights: as in `Run.load`.
        overrides: `{"sample": {"num_steps": 10}}`, laid over the run's own sections; part of the result's identity.
        device: None for a GPU if there is one.
        progress: told (question, items done, items in all).
    Raises:
        ConfigError: if the model was made for items of another shape, or an option does not exist.
    """
    began = time.perf_counter()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with processes.together():
        model = run.load(weights, device)
        _check_shapes(run, model, protocol)
        answers = _answers(run, model, overrides or {})
        options = {question: run.config.options(question, (overrides or {}).get(question)) for question in answers}
        interview = Interview(model, protocol, options, progress)
        metrics = protocol.metrics()
        estimates, ids, refused = measure(interview, metrics, device)

    def written() -> Result:
        result = {
            "schema": SCHEMA,
            "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "run": run.name,
            "model": _facts(run, model, weights),
            "protocol": _identity(protocol),
            "answers": {question: answers[question] for question in interview.bills},
            "overridden": any(answers[q] != run.config.answer(q) for q in answers),
            "metrics": [_row(entry, metrics[entry], name, found) for (entry, name), found in estimates.items()],
            "not_applicable": refused,
            "cost": {question: _cost(protocol, question, bill) for question, bill in interview.bills.items()},
            **_circumstances(run, device),
            "seconds": round(time.perf_counter() - began, 3),
            "provenance": "measured",
        }
        result["id"] = identify(result)
        write(result_path(run.path, result), result, _per_item(estimates, ids))
        return result

    return processes.by_main(written)


def _check_shapes(run: Run, model: Model, protocol: Protocol) -> None:
    if tuple(model.shape) != tuple(protocol.dataset.shape):
        raise ConfigError(
            f"protocol '{protocol.name}': its items have shape {list(protocol.dataset.shape)}, but {run.path} "
            f"was trained on {list(model.shape)}. Choose a protocol for {run.config.tree['data']['name']}."
        )


def _answers(run: Run, model: Model, overrides: dict[str, Any]) -> dict[str, dict]:
    """The resolved options of every question that the model can be asked."""
    unknown = [key for key in overrides if key not in ANSWERS]
    if unknown:
        raise ConfigError(
            f"override '{unknown[0]}': only {', '.join(f'{key}.*' for key in ANSWERS)} apply to an evaluation; "
            "anything else belongs to training."
        )
    able = [question for question, capability in QUESTIONS.items() if isinstance(model, capability)]
    missing = [question for question in overrides if question not in able]
    if missing:
        raise ConfigError(f"override '{missing[0]}': {type(model).__name__} has no method `{missing[0]}`.")
    return {question: run.config.answer(question, overrides.get(question)) for question in able}


def measure(
    interview: Interview, metrics: Sequence[Metric], device: torch.device
) -> tuple[Estimates, dict[int, Tensor], dict[str, str]]:
    """Every estimate by (position of its metric, name), the item numbers behind them, and why metrics were left out.

    Each question is asked once, for all metrics that want it; a metric that takes any of several capabilities gets the
    first that the model can answer. Estimates and numbers are found on process 0 alone.

    Raises:
        ConfigError: if two metrics give estimates of one name.
    """
    waiting, refused = processes.by_main(lambda: _begin(interview, metrics, device))
    estimates: Estimates = {}
    ids: dict[int, Tensor] = {}
    while waiting:
        question = next(iter(waiting.values()))[0]
        asked = {entry: metrics[entry] for entry, wanted in waiting.items() if wanted[0] == question}
        try:
            with processes.together():
                found, numbers = _ask(interview, question, asked)
        except NotApplicable as reason:
            interview.bills.pop(question, None)
            for entry, metric in asked.items():
                waiting[entry].remove(question)
                if processes.main():
                    metric.restart()
                if not waiting[entry]:
                    refused[metric.registered_name] = str(reason)
                    waiting.pop(entry)
            continue
        estimates |= found
        ids |= dict.fromkeys(asked, numbers)
        waiting = {entry: wanted for entry, wanted in waiting.items() if entry not in asked}
    return _ordered(estimates), ids, refused


def _begin(
    interview: Interview, metrics: Sequence[Metric], device: torch.device
) -> tuple[dict[int, list[str]], dict[str, str]]:
    """Start every metric that applies; the questions that may feed it, in its order of preference; why others don't."""
    protocol, waiting, refused = interview.protocol, {}, {}
    size = max(asked.batch_size for asked in (protocol.sample, protocol.likelihood, protocol.predict))
    subject = Subject(interview.model, interview.dataset, device, size)
    name_of = {capability: question for question, capability in QUESTIONS.items()}
    for entry, metric in enumerate(metrics):
        able = [name_of[c] for c in metric.requires if isinstance(interview.model, c)]
        try:
            if not able:
                raise NotApplicable(f"needs {' or '.join(name_of[c] for c in metric.requires)}")
            metric.start(subject)
        except NotApplicable as reason:
            refused[metric.registered_name] = str(reason)
        else:
            waiting[entry] = able
    return waiting, refused


def _ask(interview: Interview, question: str, metrics: dict[int, Metric]) -> tuple[Estimates, Tensor]:
    """Hand the answers to a question to all metrics, block by block; nothing on processes that see no answers."""
    blocks: list[Estimates] = []
    numbers: list[Tensor] = []
    for block in range(interview.protocol.sample.blocks if question == "sample" else 1):
        for metric in metrics.values() if block and processes.main() else ():
            metric.restart()
        for samples, batch in interview.ask(question, block):
            numbers.append(samples.seeds)
            for metric in metrics.values():
                metric.update(samples, batch)
        if processes.main():
            blocks.append({(e, name): got for e, m in metrics.items() for name, got in m.compute().items()})
    if not blocks:
        return {}, torch.empty(0, dtype=torch.int64)
    return {key: mean_over_blocks([block[key] for block in blocks]) for key in blocks[0]}, torch.cat(numbers)


def mean_over_blocks(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates of one thing.

    Its standard error is the larger of sd/√k and, if all have one, their root mean square over √k.
    """
    if len(estimates) == 1:
        return estimates[0]
    value, stderr = combine([e.value for e in estimates], [e.stderr for e in estimates])
    first, flags = estimates[0], dict.fromkeys(flag for e in estimates for flag in e.flags)
    n = sum(e.n for e in estimates)
    return dataclasses.replace(first, value=value, stderr=stderr, n=n, items=None, flags=tuple(flags))


def _ordered(estimates: Estimates) -> Estimates:
    names = [name for _, name in estimates]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"metrics: two of the protocol's metrics both report '{twice}'; keep one of them.")
    return dict(sorted(estimates.items(), key=lambda pair: pair[0][0]))


def _identity(protocol: Protocol) -> dict[str, Any]:
    return {
        "name": protocol.name,
        "version": protocol.version,
        "hash": protocol.hash,
        "data_fingerprint": protocol.data_fingerprint,
        "tree": protocol.tree,
    }


def _row(entry: int, metric: Metric, name: str, estimate: Estimate) -> dict[str, Any]:
    return describe_estimate(entry, metric.registered_name, metric.version, name, estimate)


def _facts(run: Run, model: Model, weights: str | None) -> dict[str, Any]:
    tree, name = run.config.tree, run.weights_name(weights)
    return {
        "name": tree["model"]["name"],
        "dataset": tree["data"]["name"],
        "config_hash": run.config.hash,
        "config": tree,
        "seed": tree["seed"],
        "step": run.step_of(name),
        "samples_seen": run.samples_seen * run.step_of(name) // max(run.step, 1),
        "weights": name,
        "parameters": num_parameters(model),
        "trainable": num_parameters(model, trainable=True),
    }


def _circumstances(run: Run, device: torch.device) -> dict[str, Any]:
    """Where and from what the model was trained and evaluated."""
    trained, here = run.meta, provenance()
    kept = ("commit", "dirty", "versions", "hardware", "threads")
    environment = {key: here[key] for key in kept} | {"device": str(device), "world_size": processes.world()}
    return {
        "training": {key: trained.get(key) for key in ("commit", "dirty", "hardware", "seconds", "world_size")},
        "environment": environment,
    }


def _cost(protocol: Protocol, question: str, bill: Bill) -> dict[str, Any]:
    return {
        "items": bill.items,
        "nfe": bill.evaluations / max(bill.items, 1),
        "seconds": round(bill.seconds, 6),
        "batch_size": getattr(protocol, question).batch_size,
    }


def _per_item(estimates: Estimates, ids: dict[int, Tensor]) -> dict[str, Items]:
    return {
        name: Items(ids[entry].numpy(), estimate.items.double().numpy())
        for (entry, name), estimate in estimates.items()
        if estimate.items is not None and math.isfinite(estimate.value)
    }


def result_path(run: Path, result: Result) -> Path:
    """`<run>/eval/<protocol>/<step>-<weights>[-<hash of the options, if overridden>].json`."""
    model = result["model"]
    stem = f"{model['step']:08d}-{model['weights']}"
    stem += f"-{digest(result['answers'])}" if result["overridden"] else ""
    return run / "eval" / result["protocol"]["name"] / f"{stem}.json"


def publish(path: Path, result: Result, folder: Path = PUBLISHED) -> Path:
    """Copy a result and its per-item values to `<folder>/<protocol>/<run>/`, where the leaderboard is made from."""
    target = folder / result["protocol"]["name"] / result["run"] / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    for source in (path.with_suffix(".npz"), path):
        if source.is_file():
            shutil.copyfile(source, target.with_suffix(source.suffix))
    return target


# ---- command -----------------------------------------------------------------------------------------------


def _tell(question: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{question} {done:,}/{total:,}", end="\n" if done >= total else "", file=sys.stderr, flush=True)


@guarded
def main(argv: Sequence[str]) -> None:
    """Score runs under protocols; what a model cannot be asked is listed as not applicable."""
    parser = argparse.ArgumentParser("evals.evaluate", description=main.__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs, and overrides such as sample.num_steps=10")
    parser.add_argument(
        "--protocol", action="append", help="name or file of a protocol (default: those of the run's `eval:` section)"
    )
    parser.add_argument("--weights", help="model, best or ema-<value> (default: the first average)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--publish", action="store_true", help=f"also copy the results to {PUBLISHED.parent.name}/results"
    )
    given = parser.parse_intermixed_args(list(argv))
    device = processes.place(given.device)
    with processes.together():
        _evaluate_all(given, device)


def _evaluate_all(given: argparse.Namespace, device: torch.device) -> None:
    words = [w for w in given.runs if "=" in w and not Path(w).exists()]
    folders, overrides = [w for w in given.runs if w not in words], dotlist(words)
    if not folders:
        raise ConfigError("no run was given. Try: python -m evals.evaluate runs/try")
    for folder in folders:
        run = Run.open(folder)
        names = given.protocol or run.config.protocols
        if not names:
            known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
            raise ConfigError(f"{folder}: its configuration names no protocol; add --protocol, one of {known}.")
        for protocol in [Protocol.load(name) for name in names]:
            result = evaluate(run, protocol, weights=given.weights, overrides=overrides, device=device, progress=_tell)
            if processes.main():
                path = result_path(run.path, result)
                path = publish(path, result) if given.publish else path
                print(f"{describe_result(result)}\n  written to {path}\n")


if __name__ == "__main__":
    sys.exit(main())
