"""Result files: one immutable JSON per checkpoint, protocol and options, with per-item values and a picture beside it.

The names of the companions hold their checksums, and the JSON is written last: whenever a write ends, there is the old
result with its companions or the new one with its own.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import new_file, write_text
from ..hashing import canonical
from ..types import Estimate

SCHEMA = "genmodels.result/2"
BOARD_FILE = "leaderboard.json"
COMPANIONS = {"items": ".npz", "grid": ".png"}
DIGITS = 8  # of a checksum, in the name of a companion
Result = dict[str, Any]


class ResultError(ValueError):
    """A result that does not follow the schema; the message names the key."""


@dataclass(frozen=True)
class Map:
    """A mapping from any text to values of one specification."""

    values: Any


NUMBER, COUNT, TEXT, FLAG, ANY = (int, float), (int,), (str,), (bool,), object()
OPTIONAL = type(None)

METRIC = {
    "entry": COUNT,  # position of the metric in the protocol
    "metric": TEXT,
    "question": frozenset(("sample", "likelihood", "predict", "edit")),
    "version": COUNT,
    "name": TEXT,
    "value": (*NUMBER, OPTIONAL),  # null: not finite, and flagged "failed"
    "stderr": (*NUMBER, OPTIONAL),
    "n": COUNT,
    "unit": TEXT,
    "better": frozenset(("lower", "higher", "none")),
    "kind": TEXT,
    "detail": TEXT,
    "references": Map(NUMBER),
    "flags": [TEXT],
    "per_item": FLAG,  # whether the .npz holds the values of the items
    "blocks": [NUMBER],  # values of independent blocks of seeds, where the value is their mean
}
FAILURES = {
    "items": COUNT,
    "of": COUNT,
    "first": [COUNT],  # seeds or item numbers
    "reason": TEXT,  # what a solver said that gave up; empty if none did
}
COST = {
    "items": COUNT,
    "nfe": NUMBER,  # evaluations of the network per item
    "seconds": NUMBER,  # of all batches, summed over processes
    "seconds_per_item": NUMBER,  # median over batches
    "batch_size": COUNT,
    "flops_per_item": (*COUNT, OPTIONAL),  # matrix products, convolutions and attention; two for a multiply-add
    "peak_memory": (*COUNT, OPTIONAL),  # bytes: allocated on a GPU, resident of the process on a CPU
}
SPECIFICATION = {
    "schema": frozenset((SCHEMA,)),
    "id": TEXT,  # SHA-256 of the canonical JSON of everything else
    "created_utc": TEXT,
    "run": TEXT,
    "model": {
        "name": TEXT,
        "dataset": TEXT,
        "config_hash": TEXT,
        "config": ANY,
        "seed": COUNT,
        "step": COUNT,
        "steps": COUNT,  # that the configuration asks for
        "samples_seen": COUNT,
        "weights": TEXT,
        "parameters": COUNT,
        "trainable": COUNT,
    },
    "protocol": {"name": TEXT, "version": COUNT, "hash": TEXT, "data_fingerprint": TEXT, "tree": ANY},
    "answers": Map(ANY),  # resolved options of every question that was asked
    "overridden": FLAG,  # whether they differ from those of the run's configuration
    "metrics": [METRIC],
    "not_applicable": Map(TEXT),
    "failures": Map(FAILURES),  # answers that were not finite, by question
    "cost": Map(COST),
    "training": {
        "commit": (*TEXT, OPTIONAL),
        "dirty": (*FLAG, OPTIONAL),
        "hardware": (*TEXT, OPTIONAL),
        "seconds": (*NUMBER, OPTIONAL),
        "world_size": (*COUNT, OPTIONAL),
    },
    "environment": {
        "commit": (*TEXT, OPTIONAL),
        "dirty": (*FLAG, OPTIONAL),
        "versions": Map((*TEXT, OPTIONAL)),
        "hardware": TEXT,
        "device": TEXT,
        "threads": COUNT,
        "world_size": COUNT,  # processes that shared the questions
    },
    "seconds": NUMBER,
    "artifacts": {"items": (*TEXT, OPTIONAL), "grid": (*TEXT, OPTIONAL)},  # SHA-256 of `.npz` and `.png` beside it
}


def check(result: Any) -> Result:
    """The result itself if it follows the schema; keys that begin with "x-" are free.

    Raises:
        ResultError: naming the first key that is missing, unknown, of a wrong type, or not finite; or another schema.
    """
    schema = result.get("schema") if isinstance(result, dict) else None
    if isinstance(schema, str) and schema.startswith("genmodels.result/") and schema != SCHEMA:
        raise ResultError(
            f"it follows the schema {schema}, and this version reads {SCHEMA}. Evaluate the run again, or read the "
            "result with the version that wrote it."
        )
    _check(result, SPECIFICATION, "result")
    if result["id"] != identify(result):
        raise ResultError(
            "result.id: it is not the checksum of the contents, so the file was edited after it was written."
        )
    return result


def _check(value: Any, spec: Any, where: str) -> None:
    if isinstance(spec, tuple):
        _check_type(value, spec, where)
    elif isinstance(spec, frozenset):
        if value not in spec:
            raise ResultError(f"{where}: one of {', '.join(sorted(spec))} is needed, found {value!r}.")
    elif isinstance(spec, list):
        _check_type(value, (list,), where)
        for k, item in enumerate(value):
            _check(item, spec[0], f"{where}[{k}]")
    elif isinstance(spec, Map):
        _check_type(value, (dict,), where)
        for key, item in value.items():
            _check(item, spec.values, f"{where}.{key}")
    elif isinstance(spec, dict):
        _check_keys(value, spec, where)
    else:
        _check_plain(value, where)


def _check_keys(value: Any, spec: dict, where: str) -> None:
    _check_type(value, (dict,), where)
    missing = [key for key in spec if key not in value]
    unknown = [key for key in value if key not in spec and not key.startswith("x-")]
    if missing or unknown:
        what = f"'{missing[0]}' is missing" if missing else f"'{unknown[0]}' is unknown (own keys begin with 'x-')"
        raise ResultError(f"{where}: the key {what}.")
    for key, item in value.items():
        _check(item, spec.get(key, ANY), f"{where}.{key}")


def _check_type(value: Any, types: tuple[type, ...], where: str) -> None:
    fits = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
    if not fits:
        raise ResultError(f"{where}: {' or '.join(t.__name__ for t in types)} is needed, found {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ResultError(f"{where}: {value} is not allowed; write null and the flag 'failed'.")


def _check_plain(value: Any, where: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultError(f"{where}: no plain finite JSON ({error}).") from None


def identify(result: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a result without its id."""
    return hashlib.sha256(canonical({k: v for k, v in result.items() if k != "id"}).encode()).hexdigest()


def describe_estimate(
    entry: int, metric: str, version: int, question: str, name: str, estimate: Estimate
) -> dict[str, Any]:
    """An estimate as plain data; a value that is not finite becomes null with the flag "failed"."""
    failed = not math.isfinite(estimate.value)
    return {
        "entry": entry,
        "metric": metric,
        "version": version,
        "question": question,
        "name": name,
        "value": None if failed else estimate.value,
        "stderr": _finite(None if failed else estimate.stderr),
        "n": estimate.n,
        "unit": estimate.unit,
        "better": estimate.better,
        "kind": estimate.kind,
        "detail": estimate.detail,
        "references": {k: v for k, v in (estimate.references or {}).items() if math.isfinite(v)},
        "flags": [*estimate.flags, *(["failed"] if failed else [])],
        "per_item": estimate.items is not None and not failed,
        "blocks": [] if failed else list(estimate.blocks),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def combine(values: Sequence[float], stderrs: Sequence[float | None]) -> tuple[float, float | None]:
    """Mean of k independent estimates and its standard error.

    The larger of sd/√k and the root mean square of the single errors over √k; None if neither can be had.
    """
    k, mean = len(values), sum(values) / len(values)
    between = math.hypot(*(v - mean for v in values)) / math.sqrt((k - 1) * k) if k > 1 else None
    within = None if any(e is None for e in stderrs) else math.hypot(*stderrs) / k
    found = [e for e in (between, within) if e is not None]
    return mean, max(found) if found else None


class Items(NamedTuple):
    """Values of the items of one estimate, with the items' numbers in their split, both [n]."""

    ids: np.ndarray
    values: np.ndarray


class Companions(NamedTuple):
    """What lies beside a result.

    Args:
        items: per-item values by the name of their estimate.
        grid: a PNG of the first drawn items.
    """

    items: Mapping[str, Items]
    grid: bytes | None


def write(path: Path, facts: Mapping[str, Any], beside: Companions) -> Result:
    """Write a result and its companions; the complete result.

    Args:
        facts: all of a result but its artifacts and its id.
    Raises:
        ResultError: if the result does not follow the schema.
        OSError: if the disk is full; an earlier result at that path is untouched.
    """
    contents = {"items": _arrays(beside.items), "grid": beside.grid}
    sums = {name: None if data is None else hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    result = {**facts, "artifacts": sums}
    result["id"] = identify(result)
    text = json.dumps(check(result), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    install(
        path, text, {companion(path, name, sums[name]): data for name, data in contents.items() if data is not None}
    )
    return result


def install(path: Path, text: str, companions: Mapping[Path, bytes]) -> None:
    """Put a result and its companions into a folder, the result last; then remove companions of an earlier result.

    Raises:
        OSError: if that fails; an earlier result at that path is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, data in companions.items():
        with new_file(file) as target:
            target.write(data)
    write_text(path, text)
    for name in COMPANIONS:
        for file in path.parent.glob(companion(path, name, "?" * DIGITS).name.replace("[", "[[]")):
            if file not in companions:
                file.unlink(missing_ok=True)


def companion(path: Path, name: str, checksum: str) -> Path:
    """Where what lies beside a result is: `<stem>-<first digits of its SHA-256>.npz` or `.png`."""
    return path.with_name(f"{path.stem}-{checksum[:DIGITS]}{COMPANIONS[name]}")


def companions(path: Path, result: Result) -> dict[Path, bytes]:
    """The contents of the companions of a result that are there.

    Raises:
        ResultError: if one was altered.
    """
    found = {}
    for name, expected in result["artifacts"].items():
        file = None if expected is None else companion(path, name, expected)
        if file is None or not file.is_file():
            continue
        found[file] = file.read_bytes()
        if hashlib.sha256(found[file]).hexdigest() != expected:
            raise ResultError(f"{file} was altered after it was written. Evaluate the run again.")
    return found


def _arrays(items: Mapping[str, Items]) -> bytes | None:
    """The .npz of per-item values; None if there are none."""
    if not items:
        return None
    buffer = io.BytesIO()
    arrays = {f"{name}.{part}": getattr(item, part) for name, item in items.items() for part in Items._fields}
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read(path: Path) -> tuple[Result, Companions]:
    """A result and what lies beside it; companions that are missing are left out.

    Raises:
        ResultError: naming the file, if it is no result, or if a companion was altered.
    """
    try:
        result = check(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path}: {error}") from None
    found = {file.suffix: data for file, data in companions(path, result).items()}
    grid = found.get(COMPANIONS["grid"])
    if COMPANIONS["items"] not in found:
        return result, Companions({}, grid)
    with np.load(io.BytesIO(found[COMPANIONS["items"]]), allow_pickle=False) as arrays:
        names = [m["name"] for m in result["metrics"] if m["per_item"] and f"{m['name']}.ids" in arrays]
        return result, Companions({n: Items(arrays[f"{n}.ids"], arrays[f"{n}.values"]) for n in names}, grid)


def find(places: Iterable[str | Path]) -> list[Path]:
    """Result files of runs (their eval folder), of folders of results, and named files, sorted and each once.

    Files that are no JSON, hidden files and written leaderboards are passed over, so that `runs/*` may hold them.

    Raises:
        ResultError: if a place does not exist.
    """
    found: set[Path] = set()
    for place in map(Path, places):
        if not place.exists():
            raise ResultError(f"{place}: there is no such run, folder or result.")
        root = place / "eval" if (place / "config.yaml").is_file() else place
        found |= {place} if place.is_file() else set(root.rglob("*.json"))
    return sorted(p for p in found if p.suffix == ".json" and p.name[0] != "." and p.name != BOARD_FILE)
