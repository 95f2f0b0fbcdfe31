"""Numbers and tables as text."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

SYMBOLS = {"pmf": "= ", "exact": "= ", "bound": "≤ ", "numerical": "≈ ", "stochastic": "~ "}
MISSING = "–"
FAILED = "failed"
DIGITS = 8  # significant ones that a value is shown with at most
LARGE = 10.0**DIGITS


def show(value: float | None, stderr: float | None = None, kind: str = "") -> str:
    """A value with the symbol of its kind, and as many decimals as two digits of its standard error allow.

    >>> show(4.2137, 0.1062), show(2.05, 0.0102, "bound"), show(None), show(0.25)
    ('4.21 ± 0.11', '≤ 2.050 ± 0.010', '–', '0.25')
    >>> show(0.150848245455895702, 6.3e-18), show(1.00486332192469107e36, 2.5e34)
    ('0.15084825 ± 6.3e-18', '1.005e+36 ± 2.5e+34')
    """
    if value is None:
        return MISSING
    symbol = SYMBOLS.get(kind, "")
    if not stderr:
        return symbol + short(value)
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    size = max(abs(value), stderr)
    if decimals + math.floor(math.log10(max(size, 1))) >= DIGITS:
        digits = 2 + math.floor(math.log10(size)) - math.floor(math.log10(stderr))
        return f"{symbol}{value:.{min(digits, DIGITS)}g} ± {stderr:.2g}"
    return f"{symbol}{value:.{decimals}f} ± {stderr:.{decimals}f}"


def short(value: float) -> str:
    """Four digits; whole numbers in full with thousands separated.

    >>> short(72842.0), short(0.0012345), short(88.7218)
    ('72,842', '0.001234', '88.72')
    >>> short(1e36)
    '1e+36'
    """
    whole = abs(value) < 1e12 and (value == round(value) or abs(value) >= 1e4)
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def arrow(better: str) -> str:
    """Where a metric improves."""
    return {"lower": " ↓", "higher": " ↑"}.get(better, "")


def escaped(words: str) -> str:
    r"""One line that Markdown shows as it is; a bar is left to `table`, underscores inside words are safe.

    >>> print(escaped("[a](b) *c* `d` <e> f_g _h_"), escaped("1. x"), escaped("# y"))
    \[a\](b) \*c\* \`d\` \<e> f_g \_h\_ 1\. x \# y
    """
    words = re.sub(r"([\\`*<&\[\]~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(words.split()))
    return re.sub(r"^(\d*)([#>+=.)-])", r"\1\\\2", words)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """A Markdown table, padded so that it also reads as plain text.

    Args:
        left: columns aligned to the left; all others to the right.
    """
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[k]) for row in [*cells, ["---"] * len(headers)]) for k in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) if k in left else c.rjust(w) for k, (c, w) in _columns(row, widths)) + " |"

    rule = "|" + "|".join(
        f"{':' if k in left else '-'}{'-' * w}{'-' if k in left else ':'}" for k, w in enumerate(widths)
    )
    return "\n".join([line(cells[0]), rule + "|", *map(line, cells[1:])])


def _columns(row: Sequence[str], widths: Sequence[int]) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(zip(row, widths, strict=True)))


def describe_result(result: Mapping[str, Any]) -> str:
    """A result for the terminal: one line per estimate with what to read it against."""
    model, protocol = result["model"], result["protocol"]
    head = f"{result['run']}, step {model['step']:,}, weights {model['weights']}: protocol {protocol['name']}"
    named = [m["name"] for m in result["metrics"]] + [*result["not_applicable"], *result["cost"]]
    width = max(map(len, named), default=0)
    lines = [f"{head} (version {protocol['version']}, {protocol['hash']})"]
    for m in result["metrics"]:
        against = ", ".join(f"{name} {short(value)}" for name, value in m["references"].items())
        parts = [show(m["value"], m["stderr"], m["kind"]), "" if m["unit"] == "1" else m["unit"]]
        parts += [f"[{against}]" if against else "", *(f"({flag.replace('_', ' ')})" for flag in m["flags"])]
        lines.append(f"  {m['name']:<{width}}  " + " ".join(part for part in parts if part))
    lines += [f"  {name:<{width}}  not applicable: {reason}" for name, reason in result["not_applicable"].items()]
    lines += [f"  {question:<{width}}  {_price(cost)}" for question, cost in result["cost"].items()]
    lines += [f"  {question:<{width}}  {failure(question, of)}" for question, of in result["failures"].items()]
    return "\n".join(lines)


def failure(question: str, failed: Mapping[str, Any]) -> str:
    """`3 of 5,000 samples are not finite (seeds 5, 17, 90)`."""
    what, by = {"sample": ("samples", "seeds")}.get(question, (f"answers to {question}", "items"))
    listed = ", ".join(map(str, failed["first"][:5])) + (", …" if failed["items"] > 5 else "")
    reason = f": {failed['reason']}" if failed["reason"] else ""
    return f"{failed['items']:,} of {failed['of']:,} {what} are not finite ({by} {listed}){reason}"


def _price(cost: Mapping[str, Any]) -> str:
    """What an answer costs, in words."""
    parts = [f"{short(cost['nfe'])} evaluation{'s' * (cost['nfe'] != 1)}", f"{cost['seconds_per_item']:.2g} s"]
    parts += [f"{scaled(cost['flops_per_item'])}FLOP"] if cost["flops_per_item"] else []
    peak = f"; peak memory {mebibytes(cost['peak_memory'])}" if cost["peak_memory"] else ""
    return f"{' and '.join([', '.join(parts[:-1]), parts[-1]])} an item, in batches of {cost['batch_size']:,}{peak}"


def scaled(value: float) -> str:
    """Three digits and a decimal prefix.

    >>> scaled(1_234_000_000), scaled(950), scaled(45_000)
    ('1.23 G', '950', '45.0 k')
    """
    for power, prefix in ((12, " T"), (9, " G"), (6, " M"), (3, " k")):
        if value >= 10**power:
            digits = value / 10**power
            return f"{digits:.{2 if digits < 10 else 1 if digits < 100 else 0}f}{prefix}"
    return f"{value:.0f}"


def mebibytes(value: float) -> str:
    """
    >>> mebibytes(300 * 2**20)
    '300 MiB'
    """
    return f"{value / 2**20:,.0f} MiB"
