"""Score a run under a protocol: `python -m evals.evaluate runs/try [--protocol digits] [sample.num_steps=10]`.

Several processes share the batches of every question; metrics live on the first, which alone writes and speaks.
"""

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..commands import guarded
from ..config import ANSWERS, dotlist
from ..data.dataset import Dataset
from ..hashing import digest
from ..metrics.cost import inference_parameters, num_parameters
from ..metrics.likelihood import how_made
from ..metrics.metric import Metric
from ..model import Model
from ..registry import ConfigError, member
from ..sampling import write_picture
from ..training import processes
from ..training.provenance import provenance
from ..training.run import Run
from .answers import QUESTIONS, Bill, Interview, Progress
from .measure import Findings, measure
from .protocol import FOLDER, Protocol, tree_of
from .results import SCHEMA, Companions, Items, Result, ResultError, companions, describe_estimate, install, read, write
from .tables import describe_result

PUBLISHED = FOLDER.parent / "results"


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
        _check_data(run, protocol)
        answers = _answers(run, model, overrides or {})
        options = {question: run.config.options(question, (overrides or {}).get(question)) for question in answers}
        interview = Interview(model, protocol, options, progress)
        metrics = protocol.metrics()
        findings = measure(interview, metrics, device)

    def written() -> Result:
        bills, failures, asked = interview.bills, interview.failures, protocol.likelihood
        made = how_made(asked.draws, asked.combine, answers.get("likelihood", {}))
        facts = {
            "schema": SCHEMA,
            "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "run": run.name,
            "model": _facts(run, model, weights),
            "protocol": _identity(protocol),
            "answers": {question: answers[question] for question in bills},
            "overridden": any(answers[q] != run.config.answer(q) for q in answers),
            "metrics": _rows(metrics, findings, made),
            "not_applicable": findings.refused,
            "failures": {q: vars(failed) for q, failed in failures.items() if failed.items},
            "cost": {question: _cost(protocol, question, bill) for question, bill in bills.items()},
            **_circumstances(run, device),
            "seconds": round(time.perf_counter() - began, 3),
        }
        return write(result_path(run.path, facts), facts, Companions(_per_item(findings), _grid(protocol, findings)))

    return processes.by_main(written)


def _check_data(run: Run, protocol: Protocol) -> None:
    """Raises ConfigError if the run was trained on items of another shape, or with other levels."""
    trained, data = run.facts(), protocol.dataset
    if tuple(trained["shape"]) != tuple(data.shape):
        raise ConfigError(
            f"protocol '{protocol.name}': its items have shape {list(data.shape)}, but {run.path} was trained on "
            f"{list(trained['shape'])}. Choose a protocol for {run.config.tree['data']['name']}."
        )
    if trained.get("levels") is not None and trained["levels"] != data.levels:
        raise ConfigError(
            f"protocol '{protocol.name}': its data have {data.levels or 'no'} levels, but {run.path} was trained on "
            f"{trained['levels']} levels, so that neither samples nor densities compare. Choose a protocol for those."
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


def _identity(protocol: Protocol) -> dict[str, Any]:
    return {
        "name": protocol.name,
        "version": protocol.version,
        "hash": protocol.hash,
        "data_fingerprint": protocol.data_fingerprint,
        "tree": protocol.portable,
    }


def _rows(metrics: Sequence[Metric], findings: Findings, made: str) -> list[dict[str, Any]]:
    """The estimates as plain data.

    Args:
        made: how likelihoods were made, in a few words.
    """
    rows = []
    for (entry, name), estimate in findings.estimates.items():
        metric, question = metrics[entry], findings.questions[entry]
        row = describe_estimate(entry, metric.registered_name, metric.version, question, name, estimate)
        words = [made if question == "likelihood" else "", row["detail"]]
        rows.append(row | {"detail": ", ".join(word for word in words if word)})
    return rows


def _facts(run: Run, model: Model, weights: str | None) -> dict[str, Any]:
    tree, name = run.config.tree, run.weights_name(weights)
    trained, folded = num_parameters(model), inference_parameters(model)
    return {
        "name": tree["model"]["name"],
        "dataset": tree["data"]["name"],
        "config_hash": run.config.hash,
        "config": tree,
        "seed": tree["seed"],
        "step": run.step_of(name),
        "steps": tree["train"]["steps"],
        "samples_seen": run.samples_seen * run.step_of(name) // max(run.step, 1),
        "weights": name,
        "parameters": trained,
        "trainable": num_parameters(model, trainable=True),
        **({} if folded == trained else {"x-inference_parameters": folded}),
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
        "nfe": bill.nfe,
        "seconds": round(bill.seconds, 6),
        "seconds_per_item": bill.seconds_per_item,
        "batch_size": getattr(protocol, question).batch_size,
        "flops_per_item": bill.flops_per_item,
        "peak_memory": bill.peak_memory,
    }


def _per_item(findings: Findings) -> dict[str, Items]:
    return {
        name: Items(findings.ids[entry].numpy(), estimate.items.double().cpu().numpy())
        for (entry, name), estimate in findings.estimates.items()
        if estimate.items is not None and math.isfinite(estimate.value)
    }


def _grid(protocol: Protocol, findings: Findings) -> bytes | None:
    """A PNG of the first drawn items, for data that can be drawn."""
    if findings.shown is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        picture = write_picture(Path(folder) / "grid", findings.shown, protocol.dataset, {})
        return picture.read_bytes() if picture.suffix == ".png" else None


def result_path(run: Path, result: Result) -> Path:
    """`<run>/eval/<protocol>/<step>-<weights>[-<hash of the options, if overridden>].json`."""
    model = result["model"]
    stem = f"{model['step']:08d}-{model['weights']}"
    stem += f"-{digest(result['answers'])}" if result["overridden"] else ""
    return run / "eval" / result["protocol"]["name"] / f"{stem}.json"


def publish(path: Path, result: Result, folder: Path = PUBLISHED) -> Path:
    """Copy a result and its companions to `<folder>/<protocol>/<run>/`, where the leaderboard is made from.

    Raises:
        ConfigError: if there are results of another run of that name.
    """
    target = folder / result["protocol"]["name"] / result["run"] / path.name
    for other in sorted(target.parent.glob("*.json")):
        try:
            found = read(other)[0]["model"]["config_hash"]
        except ResultError:
            continue  # of another schema: it is replaced, or the leaderboard names it
        if found != result["model"]["config_hash"]:
            raise ConfigError(
                f"{other.parent} holds results of another configuration ({found}) that is called '{result['run']}' "
                f"too, and this one is {result['model']['config_hash']}. Train it under another name (name=…), or "
                "remove that folder."
            )
    beside = {target.with_name(file.name): data for file, data in companions(path, result).items()}
    install(target, path.read_text(encoding="utf-8"), beside)
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
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="KEY=PATH",
        help="where the protocol's data lie, e.g. path=~/pictures (default: where the run's lie, if it has the same)",
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
    for folder, run in [(folder, Run.open(folder)) for folder in folders]:
        names = given.protocol or run.config.protocols
        if not names:
            known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
            raise ConfigError(f"{folder}: its configuration names no protocol; add --protocol, one of {known}.")
        _warn_if_unfinished(run)
        for protocol in [Protocol.load(name, _places(run, name, given.data)) for name in names]:
            result = evaluate(run, protocol, weights=given.weights, overrides=overrides, device=device, progress=_tell)
            if processes.main():
                path = result_path(run.path, result)
                path = publish(path, result) if given.publish else path
                print(f"{describe_result(result)}\n  written to {path}\n")


def _places(run: Run, name: str, given: Sequence[str]) -> dict[str, Any]:
    """Where the data of a protocol lie: as given, or where those of the run lie if it is the same data set."""
    node, data = tree_of(name).get("dataset"), run.config.tree["data"]
    asked = node.get("name") if isinstance(node, dict) else node
    local = getattr(member(Dataset, data["name"], "data"), "local", ()) if asked == data["name"] else ()
    return {key: data[key] for key in local} | dotlist(given)


def _warn_if_unfinished(run: Run) -> None:
    step, steps = run.step, run.config.tree["train"]["steps"]
    if step < steps and processes.main():
        warnings.warn(
            f"{run.path}: its training is at step {step:,} of {steps:,}; the leaderboard will not rank it. Finish it: "
            f"python train.py {run.path}",
            stacklevel=2,
        )


if __name__ == "__main__":
    sys.exit(main())
