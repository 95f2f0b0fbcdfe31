"""Where a row of a leaderboard comes from, as words for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from .board import Row
from .results import Result
from .tables import FAILED, MISSING, failure, mebibytes, scaled, short


def provenance(row: Row, results: Sequence[Result]) -> dict[str, Any]:
    """What the template shows of a row: facts, estimates, costs and failures of each result; one configuration.

    Args:
        results: those of the row, one for each training seed.
    """
    return {
        "label": row.label,
        "unranked": row.unranked,
        "config": _yaml(results[0]["model"]["config"]),
        "answers": _yaml(results[0]["answers"]),
        "overridden": results[0]["overridden"],
        "results": [_described(result) for result in results],
    }


def overrides(result: Result) -> list[str]:
    """Options of the answers that are not the configuration's own: `sample.num_steps=10`."""
    if not result["overridden"]:
        return []
    own = _flat({question: result["model"]["config"].get(question) or {} for question in result["answers"]})
    return [f"{k}={v}" for k, v in _flat(result["answers"]).items() if k not in own or own[k] != v]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{path}.{key}".lstrip(".")).items()}


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def _described(result: Result) -> dict[str, Any]:
    return {
        "heading": f"{result['run']}, seed {result['model']['seed']}",
        "facts": [*_trained(result), *_scored(result)],
        "estimates": [_estimate(m) for m in result["metrics"]],
        "costs": [_cost(question, bill) for question, bill in result["cost"].items()],
        "failures": [failure(question, failed) for question, failed in result["failures"].items() if failed["items"]],
        "not_applicable": list(result["not_applicable"].items()),
    }


def _trained(result: Result) -> list[tuple[str, str]]:
    model, training = result["model"], result["training"]
    seconds, devices = training["seconds"], training["world_size"] or 1
    spent = MISSING if seconds is None else f"{seconds:,.0f} s on {_count(devices, 'device')}"
    if seconds is not None and devices > 1:
        spent += f" ({seconds * devices:,.0f} device seconds)"
    return [
        ("configuration hash", model["config_hash"]),
        ("model", f"{model['name']}, {short(model['parameters'])} parameters"),
        ("training seed", str(model["seed"])),
        ("weights", f"{model['weights']} after step {model['step']:,} of {model['steps']:,}"),
        ("items seen", short(model["samples_seen"])),
        ("trained on", training["hardware"] or "unknown hardware"),
        ("training cost", spent),
        ("training code", _code(training)),
    ]


def _scored(result: Result) -> list[tuple[str, str]]:
    protocol, environment = result["protocol"], result["environment"]
    place = f"{environment['hardware']}, device {environment['device']}, {_count(environment['threads'], 'thread')}"
    if environment["world_size"] > 1:
        place += f", {environment['world_size']} processes"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return [
        ("protocol", f"{protocol['name']}, version {protocol['version']}, hash {protocol['hash']}"),
        ("data fingerprint", protocol["data_fingerprint"]),
        ("seeds and items", _asked(protocol["tree"], result["cost"])),
        ("evaluated on", place),
        ("evaluation code", _code(environment)),
        ("versions", versions),
        ("evaluated at", f"{result['created_utc']}, in {result['seconds']:,.0f} s"),
        ("result", result["id"]),
    ]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _code(source: Mapping[str, Any]) -> str:
    if not source["commit"]:
        return "unknown commit"
    return f"commit {source['commit']}{', with uncommitted changes' if source['dirty'] else ''}"


def _asked(tree: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
    """`sample seeds 0 – 4,999; likelihood of 500 items`."""
    parts = []
    for question, bill in cost.items():
        if question == "sample":
            parts.append(f"sample seeds 0 – {bill['items'] - 1:,}")
        else:
            split = tree.get(question, {}).get("split")
            parts.append(f"{question}: {bill['items']:,} answers{f' on the {split} split' if split else ''}")
    return "; ".join(parts)


def _estimate(m: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": m["name"],
        "value": FAILED if "failed" in m["flags"] else MISSING if m["value"] is None else repr(m["value"]),
        "stderr": MISSING if m["stderr"] is None else f"{m['stderr']:.3g}",
        "n": f"{m['n']:,}",
        "kind": m["kind"],
        "detail": "; ".join(part for part in (m["detail"], _blocks(m["blocks"])) if part),
        "flags": ", ".join(flag.replace("_", " ") for flag in m["flags"]),
        "references": ", ".join(f"{name} {short(value)}" for name, value in m["references"].items()),
    }


def _blocks(values: Sequence[float]) -> str:
    """The independent estimates that a value is the mean of."""
    return f"mean of {', '.join(map(short, values))}" if values else ""


def _cost(question: str, bill: Mapping[str, Any]) -> list[str]:
    flops, memory = bill["flops_per_item"], bill["peak_memory"]
    return [
        question,
        f"{bill['items']:,}",
        short(bill["nfe"]),
        f"{bill['seconds_per_item']:.3g}",
        f"{bill['batch_size']:,}",
        MISSING if flops is None else scaled(flops),
        MISSING if memory is None else mebibytes(memory),
        f"{bill['seconds']:,.1f}",
    ]
