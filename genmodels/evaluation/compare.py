"""Two or more runs side by side, with intervals: `python -m evals.compare runs/a runs/b [--protocol digits]`."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from ..commands import guarded
from ..registry import ConfigError
from .intervals import Difference, Family, levels, paired_blocks, paired_items, unpaired
from .pairing import Side, gather, labelled, matched
from .provenance import overrides
from .results import Items, Result
from .tables import DIGITS, LARGE, MISSING, escaped, short, show, table

KINDS = {
    "pmf": "an exact value",
    "exact": "an exact value",
    "bound": "a bound",
    "numerical": "a value up to a solver's tolerance",
    "stochastic": "a stochastic estimate",
}


@dataclass(frozen=True)
class Comparison:
    """One metric of two sides.

    Attributes:
        a, b: its rows in the results.
        difference: a - b, None if no interval can be had.
        why_not: why there is no interval.
        neutral: whether neither is called better, since something is wrong with one of the models.
        level: of the interval.
    """

    name: str
    a: dict[str, Any]
    b: dict[str, Any]
    difference: Difference | None
    why_not: str = ""
    neutral: bool = False
    level: float = 0.95

    @property
    def interval(self) -> tuple[float, float]:
        return self.difference.interval(self.level)

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True)
class Pair:
    """Two results under one protocol, compared metric by metric."""

    a: Side
    b: Side
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()


# ---- statistics --------------------------------------------------------------------------------------------------


def compare(a: Side, b: Side, draws: int = 10_000, seed: int = 0) -> Pair:
    """Every metric that both have, in the order of the first, with notes on those that only one has and on flags."""
    ours, theirs = a.metrics, b.metrics
    common = [name for name in ours if name in theirs]
    alone = [(name, a, b) for name in ours if name not in theirs] + [(n, b, a) for n in theirs if n not in ours]
    notes = [f"{name}: only {has.label} has it{_reason(has, lacks, name)}." for name, has, lacks in alone]
    flagged = [side for side in (a, b) if side.flags]
    notes += [f"{side.label} is not called better or worse: {', '.join(side.flags)}." for side in flagged]
    compared = [
        Comparison(name, ours[name], theirs[name], *_difference(a, b, name, draws, seed), neutral=bool(flagged))
        for name in common
    ]
    return Pair(a, b, tuple(compared), tuple(notes))


def _reason(has: Side, lacks: Side, name: str) -> str:
    said = lacks.result["not_applicable"].get(has.metrics[name]["metric"])
    return f" ({lacks.label}: {said})" if said else ""


def _difference(a: Side, b: Side, name: str, draws: int, seed: int) -> tuple[Difference | None, str]:
    """From items in common if there are any, else from blocks of seeds, else from standard errors."""
    rows = a.metrics[name], b.metrics[name]
    failed = [s.label for s, row in zip((a, b), rows, strict=True) if row["value"] is None or "failed" in row["flags"]]
    if failed:
        return None, f"it failed for {' and '.join(failed)}"
    pairs = _paired(a.items.get(name), b.items.get(name))
    if pairs is not None:
        return paired_items(*pairs, draws, seed), ""
    blocks = [row.get("blocks") or () for row in rows]
    if len(blocks[0]) == len(blocks[1]) > 1:
        return paired_blocks(*blocks), ""
    without = [side.label for side, row in zip((a, b), rows, strict=True) if row["stderr"] is None]
    if without:
        return None, f"{' and '.join(without)} {'have' if len(without) > 1 else 'has'} no standard error"
    return unpaired(rows[0]["value"], rows[0]["stderr"], rows[1]["value"], rows[1]["stderr"]), ""


def _paired(a: Items | None, b: Items | None) -> tuple[np.ndarray, np.ndarray] | None:
    """The values of the same items in the same order; None if the two were not scored on the same ones."""
    if a is None or b is None or len(a.ids) != len(b.ids) or len(a.ids) < 2:
        return None
    first, second = np.argsort(a.ids, kind="stable"), np.argsort(b.ids, kind="stable")
    if not np.array_equal(a.ids[first], b.ids[second]) or len(np.unique(a.ids)) < len(a.ids):
        return None
    return a.values[first], b.values[second]


def settle(pairs: Sequence[Pair], level: float, family: Family) -> list[Pair]:
    """The pairs with the levels of their intervals set, all of them being one family."""
    known = [c for pair in pairs for c in pair.comparisons if c.difference is not None]
    found = iter(levels([c.difference for c in known], level, family))
    return [
        replace(
            pair,
            comparisons=tuple(c if c.difference is None else replace(c, level=next(found)) for c in pair.comparisons),
        )
        for pair in pairs
    ]


# ---- text --------------------------------------------------------------------------------------------------------


def sentence(c: Comparison, a: str, b: str) -> str:
    """What a comparison says, in words."""
    unit = "" if c.a["unit"] == "1" else f" {c.a['unit']}"
    if c.difference is None:
        values = f"{a} {_value(c.a)}, {b} {_value(c.b)}{unit}"
        counted = c.a["kind"] == c.b["kind"] == "count" and not c.a["stderr"]
        return f"{c.name}: {values}" + ("" if counted else f"; no interval: {c.why_not}") + _remark(c, a, b)
    low, high = c.interval
    method = c.difference.method
    if c.difference.stderr == 0 and c.difference.value == 0:
        return f"{c.name}: no difference ({method}){_remark(c, a, b)}"
    if not c.decided:
        words = f"not distinguishable: {a} - {b} = {_number(c, c.difference.value)}{unit}"
    else:
        winner, word = _verdict(c, a, b)
        words = f"{winner} is {word} by {_number(c, abs(c.difference.value))}{unit}"
        low, high = sorted((abs(low), abs(high)))
    bounds = f"{_percent(c.level)} % interval {_number(c, low)} to {_number(c, high)}; {method}"
    return f"{c.name}: {words} ({bounds}){_remark(c, a, b)}"


def _verdict(c: Comparison, a: str, b: str) -> tuple[str, str]:
    """Which of the two is better, or higher where neither direction is."""
    larger, smaller = (a, b) if c.interval[0] > 0 else (b, a)
    if c.a["better"] == "none" or c.neutral:
        return larger, "higher"
    return (smaller if c.a["better"] == "lower" else larger), "better"


def _remark(c: Comparison, a: str, b: str) -> str:
    """What a difference of kind means."""
    kinds = [KINDS.get(row["kind"], row["kind"]) for row in (c.a, c.b)]
    if kinds[0] == kinds[1]:
        return ""
    bounded = [label for label, row in ((a, c.a), (b, c.b)) if row["kind"] == "bound"]
    return f"; {kinds[0]} against {kinds[1]}" + (f": {bounded[0]} may be better than its bound" if bounded else "")


def _value(row: dict[str, Any]) -> str:
    return MISSING if row["value"] is None else short(row["value"])


def _number(c: Comparison, value: float) -> str:
    """With as many decimals as two digits of half the interval's width allow."""
    low, high = c.interval
    if not high > low:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10((high - low) / 2)))
    if abs(value) >= LARGE:
        return f"{value:.{DIGITS}g}"
    return f"{value:.{decimals}f}" if decimals <= 6 else f"{value:.3g}"


def _percent(level: float) -> str:
    return f"{100 * level:.4g}"


def text(pairs: Sequence[Pair], family: Family) -> str:
    """Each pair as a table and a list of sentences."""
    return "\n".join([*(line for pair in pairs for line in _section(pair)), *_footer(pairs, family)])


def _section(pair: Pair) -> list[str]:
    a, b = escaped(pair.a.label), escaped(pair.b.label)
    protocol = pair.a.result["protocol"]
    lines = [f"## {a} against {b}: {protocol['name']}, version {protocol['version']} ({protocol['hash']})", ""]
    lines += [f"- {label}: {_circumstances(side.result)}" for label, side in ((a, pair.a), (b, pair.b))]
    rows = [_row(c) for c in pair.comparisons]
    lines += ["", table(["metric", a, b, "difference", "interval"], rows, left=(0,)), ""] if rows else [""]
    lines += [f"- {sentence(c, a, b)}." for c in pair.comparisons] + [f"- {escaped(note)}" for note in pair.notes]
    return [*lines, ""]


def _row(c: Comparison) -> list[str]:
    cells = [c.name, *(show(row["value"], row["stderr"], row["kind"]) for row in (c.a, c.b))]
    if c.difference is None:
        return [*cells, MISSING, MISSING]
    return [*cells, _number(c, c.difference.value), " to ".join(_number(c, end) for end in c.interval)]


def _circumstances(result: Result) -> str:
    """Step, weights, and options that are not the run's own."""
    model = result["model"]
    words = f"{model['name']}, step {model['step']:,}, weights {model['weights']}, seed {model['seed']}"
    return escaped(", ".join([words, *overrides(result)]))


def _footer(pairs: Sequence[Pair], family: Family) -> list[str]:
    found = [c for pair in pairs for c in pair.comparisons if c.difference is not None]
    m = len(found)
    lines = ["A difference is the first less the second; it is spoken of where its interval excludes zero."]
    if family == "none" and m > 1:
        chance = m * (1 - found[0].level)
        lines += [
            f"Each interval is for its metric alone: of {m} differences that are truly zero about {chance:.2g} would "
            "be spoken of. `--family holm` takes their number into account."
        ]
    if family != "none" and m:
        name = {"holm": "Holm's step-down", "bonferroni": "Bonferroni's correction"}[family]
        lines += [f"The levels of the {m} intervals follow {name}."]
    return lines


# ---- command -----------------------------------------------------------------------------------------------------


@guarded
def main(argv: Sequence[str]) -> None:
    """Compare runs, the first with each other, on every metric of the protocols that both were evaluated under.

    Intervals are paired where possible: on items by a bootstrap, else on blocks of seeds.
    """
    parser = argparse.ArgumentParser("evals.compare", description=main.__doc__)
    parser.add_argument("places", nargs="+", help="runs, result files, or folders of results")
    parser.add_argument("--protocol", metavar="NAME", help="only this one (default: all that are common)")
    parser.add_argument("--weights", help="model, best or ema-<value> (default: the first average)")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: of the newest result)")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    parser.add_argument("--draws", type=int, default=10_000, help="of the bootstrap (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--family",
        choices=get_args(Family),
        default="none",
        help="how the levels allow for the number of metrics (default: none)",
    )
    given = parser.parse_args(list(argv))
    if not 0 < given.level < 1 or given.draws < 100 or given.seed < 0:
        raise ConfigError(
            "a level between 0 and 1, at least 100 draws and a seed >= 0 are needed, "
            f"found {given.level}, {given.draws} and {given.seed}."
        )
    first, *others = gather(given.places, protocol=given.protocol, weights=given.weights, step=given.step)
    pairs: list[Pair] = []
    for other in others:
        found, notes = matched(first, other)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        pairs += [compare(*labelled(sides), given.draws, given.seed) for sides in found]
    print(text(settle(pairs, given.level, given.family), given.family))


if __name__ == "__main__":
    sys.exit(main())
