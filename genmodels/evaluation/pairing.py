"""Which results of two runs are compared: those under one protocol, with the weights and options meant by default."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..registry import ConfigError, build
from ..training.ema import Average
from .results import Items, Result, ResultError, find, read
from .tables import failure


@dataclass(frozen=True)
class Side:
    """One result, with the per-item values of its estimates by name and the name it goes by."""

    path: Path
    result: Result
    items: Mapping[str, Items]
    label: str = ""

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        return {m["name"]: m for m in self.result["metrics"]}

    @property
    def flags(self) -> list[str]:
        """What is wrong with the model, in words."""
        found = {flag for m in self.result["metrics"] for flag in m["flags"] if flag != "failed"}
        failed = [failure(question, of) for question, of in self.result["failures"].items() if of["items"]]
        return [*sorted(flag.replace("_", " ") for flag in found), *failed]


def gather(places: Sequence[str | Path], **wanted: Any) -> list[list[Side]]:
    """The results of each run found at the places, in that order; files that are no results are named on stderr.

    Args:
        wanted: protocol, weights and step that a result must have, where not None.
    Raises:
        ConfigError: if a place has no (such) result, or there is only one run.
    """
    runs: dict[tuple, list[Side]] = {}
    for place in places:
        sides, refused = _read_all(place)
        if not sides:
            hint = f"Make some: python -m evals.evaluate {place} --protocol <name>"
            raise ConfigError("\n".join([*refused, f"{place}: there are no results to compare. {hint}"]))
        for line in refused:
            print(f"left out: {line}", file=sys.stderr)
        chosen = [side for side in sides if _fits(side.result, wanted)]
        if not chosen:
            asked = ", ".join(f"{key} {value}" for key, value in wanted.items() if value is not None)
            raise ConfigError(f"{place}: no result has {asked}. It has: {_contents(sides)}.")
        for side in chosen:
            model = side.result["model"]
            runs.setdefault((str(place), side.result["run"], model["config_hash"], model["seed"]), []).append(side)
    if len(runs) < 2:
        raise ConfigError(
            f"two runs are needed, found {len(runs)} in {', '.join(map(str, places))}. To compare results of one run, "
            "name their files (<run>/eval/<protocol>/<step>-<weights>.json)."
        )
    return list(runs.values())


def _read_all(place: str | Path) -> tuple[list[Side], list[str]]:
    """Every result of a place, and what is wrong with the files that are none."""
    sides, refused = [], []
    try:
        paths = find([place])
    except ResultError as error:
        raise ConfigError(str(error)) from None
    for path in paths:
        try:
            result, companions = read(path)
        except ResultError as error:
            refused.append(str(error))
        else:
            sides.append(Side(path, result, companions.items))
    return sides, refused


def _fits(result: Result, wanted: Mapping[str, Any]) -> bool:
    has = {"protocol": result["protocol"]["name"], **{key: result["model"][key] for key in ("weights", "step")}}
    return all(value is None or has[key] == value for key, value in wanted.items())


def _contents(sides: Sequence[Side]) -> str:
    """What there is: protocol with its hash, step and weights."""
    found = {(s.result["protocol"]["name"], s.result["protocol"]["hash"], *_state(s)) for s in sides}
    return "; ".join(
        f"{name} ({key}) at step {step:,}, weights {weights}" for name, key, step, weights in sorted(found)
    )


def _state(side: Side) -> tuple[int, str]:
    return side.result["model"]["step"], side.result["model"]["weights"]


def matched(a: Sequence[Side], b: Sequence[Side]) -> tuple[list[tuple[Side, Side]], list[str]]:
    """For each protocol that both runs have results under, the newest version in common and a result of each.

    Of several results under it, the one to compare has the run's own options, its default weights, and is the newest.

    Returns:
        The pairs, and notes on protocols whose versions differ.
    Raises:
        ConfigError: if no protocol is common, saying what each has.
    """
    by_hash = [_by_hash(sides) for sides in (a, b)]
    newest: dict[str, tuple[Side, Side]] = {}
    for key in sorted(by_hash[0].keys() & by_hash[1].keys()):
        pair = tuple(max(found[key], key=_preference) for found in by_hash)
        name = pair[0].result["protocol"]["name"]
        if name not in newest or _created(pair) > _created(newest[name]):
            newest[name] = pair
    names = [{side.result["protocol"]["name"] for side in sides} for sides in (a, b)]
    notes = [_other_version(name, a, b) for name in sorted((names[0] & names[1]) - newest.keys())]
    if not newest:
        heads = [f"{sides[0].result['run']} has {_contents(sides)}" for sides in (a, b)]
        raise ConfigError("\n".join([f"no protocol is common: {'; '.join(heads)}.", *notes]))
    pairs = [newest[name] for name in sorted(newest)]
    for one, other in pairs:
        if one.result["id"] == other.result["id"]:
            raise ConfigError(f"{one.path} and {other.path} are the same result; name two different runs or results.")
    return pairs, notes


def _by_hash(sides: Sequence[Side]) -> dict[str, list[Side]]:
    found: dict[str, list[Side]] = {}
    for side in sides:
        found.setdefault(side.result["protocol"]["hash"], []).append(side)
    return found


def _created(sides: Sequence[Side]) -> str:
    return max(side.result["created_utc"] for side in sides)


def _preference(side: Side) -> tuple:
    result = side.result
    model = result["model"]
    default = model["weights"] == default_weights(model["config"])
    return not result["overridden"], default, result["created_utc"], model["step"], result["id"]


def default_weights(config: Mapping[str, Any]) -> str:
    """The first average of a run's configuration, or `model` without one."""
    averages = (config.get("train") or {}).get("ema") or []
    return build(Average, averages[0]).label if averages else "model"


def _other_version(name: str, a: Sequence[Side], b: Sequence[Side]) -> str:
    runs = [sides[0].result["run"] for sides in (a, b)]
    hashes = [
        "/".join(sorted({s.result["protocol"]["hash"] for s in sides if s.result["protocol"]["name"] == name}))
        for sides in (a, b)
    ]
    return (
        f"{name} is not compared: its settings, metrics or data changed between the results of {runs[0]} ({hashes[0]}) "
        f"and {runs[1]} ({hashes[1]}). Evaluate both again: python -m evals.evaluate <runs> --protocol {name}"
    )


def labelled(sides: Sequence[Side]) -> list[Side]:
    """The sides under names that tell them apart: the run, with step and weights, or the path where runs share one."""
    names = [_plain(side.result["run"]) for side in sides]
    longer = [
        f"{name}@{step}-{_plain(weights)}" for name, (step, weights) in zip(names, map(_state, sides), strict=True)
    ]
    paths = [_plain(str(side.path.with_suffix(""))) for side in sides]
    for candidates in (names, longer, paths):
        if len({*candidates}) == len(sides):
            break
    return [replace(side, label=name) for side, name in zip(sides, candidates, strict=True)]


def _plain(text: str) -> str:
    """One line without control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)
