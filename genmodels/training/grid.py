"""The runs of a sweep: every combination of some values, checked, and named by what sets each apart."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Config, load
from ..hashing import digest
from ..registry import ConfigError

LONGEST_VALUE, LONGEST_NAME = 24, 120  # characters; what is longer is cut and told apart by a digest
PLAIN = re.compile(r"[A-Za-z0-9.+_-]+")
REFUSED = {
    "name": "every run is named by its overrides. Give what the names begin with as name=… before --sweep.",
    "root": "the folder of runs is an option: --root FOLDER.",
}


@dataclass(frozen=True)
class Plan:
    """A run of a sweep: the overrides that set it apart, and its configuration, whose name is made from them."""

    overrides: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return self.config.name


def split_values(text: str) -> list[str]:
    """The text cut at commas that stand in no bracket, brace or quotes.

    >>> split_values("[64,64],{a: 1, b: 2},'x,y',3")
    ['[64,64]', '{a: 1, b: 2}', "'x,y'", '3']

    Raises:
        ConfigError: if a bracket or quote is left open, or if a value is empty.
    """
    values, open_, quote, closing = [""], [], "", {"[": "]", "{": "}", "(": ")"}
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and values[-1].rstrip()[-1:] in ("", *"[{(,:"):  # elsewhere it is an apostrophe
            quote = character
        elif character in closing:
            open_.append(closing[character])
        elif open_ and character == open_[-1]:
            open_.pop()
        elif character == "," and not open_:
            values.append("")
            continue
        values[-1] += character
    if quote or open_:
        raise ConfigError(f"--sweep: {quote or open_[-1]} is missing in '{text}'.")
    values = [value.strip() for value in values]
    if "" in values:
        raise ConfigError(f"--sweep: '{text}' has an empty value. Write null or '\"\"' if that is meant.")
    return values


def axes(words: Sequence[str]) -> dict[str, list[str]]:
    """`["a=1,2", "b=x"]` as the values of each key.

    Raises:
        ConfigError: if a word is no key=values, if a key or value comes twice, or if the key is not for sweeping.
    """
    out: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not (equals and key):
            raise ConfigError(f"--sweep: '{word}' is no key=value,value,…")
        if key in REFUSED:
            raise ConfigError(f"--sweep {key}=…: {REFUSED[key]}")
        if _parts(key) in map(_parts, out):
            raise ConfigError(f"--sweep: {key} is given twice; put all its values into one list, {key}=…,…")
        values = split_values(text)
        twice = [value for value, times in Counter(values).items() if times > 1]
        if twice:
            raise ConfigError(f"--sweep {key}=…: {twice[0]} is given twice.")
        out[key] = values
    return out


def grid(files: Sequence[str], overrides: Sequence[str], words: Sequence[str]) -> list[Plan]:
    """Every combination of the values, the last key changing fastest; all configurations are checked.

    A name depends on the run's own overrides, so that the names stay when values are added to the grid.

    Raises:
        ConfigError: the first mistake in any of them; if a key is given twice, or two configurations are the same.
    """
    values = axes(words)
    for word in overrides:
        key = word.partition("=")[0]
        if _parts(key) in map(_parts, values):
            raise ConfigError(f"{key} is given as an override and in --sweep; leave one of them out.")
    points = [tuple(f"{k}={v}" for k, v in zip(values, p, strict=True)) for p in itertools.product(*values.values())]
    label = _labels(list(values))
    configs, suffixes = [], []
    for point in points:
        try:
            configs.append(load(files, [*overrides, *point]))
        except ValueError as error:  # of a constructor as well: a value out of range
            raise ConfigError(f"{error} (in the run with {' '.join(point)})") from error
        suffixes.append("".join(_suffix(label[k], v) for k, _, v in (word.partition("=") for word in point)))
    seen: dict[str, tuple[str, ...]] = {}
    for point, config in zip(points, configs, strict=True):
        if config.hash in seen:
            same = f"'{' '.join(seen[config.hash])}' and '{' '.join(point)}'"
            raise ConfigError(f"--sweep: {same} are the same configuration; leave one of them out.")
        seen[config.hash] = point
    names = _names([config.name for config in configs], suffixes, points)
    return [Plan(p, c.replace({"name": n})) for p, c, n in zip(points, configs, names, strict=True)]


def _parts(key: str) -> list[str]:
    """The path of a key; `a[0].b` and `a.0.b` are the same."""
    return re.sub(r"\[(\w+)\]", r".\1", key.strip()).split(".")


def _labels(keys: list[str]) -> dict[str, str]:
    """Each key by its last parts, as many as tell it from the others; the name of a component by what it names."""
    parts = {key: _parts(key) for key in keys}
    short = {key: p[:-1] if p[-1] == "name" and len(p) > 1 else p for key, p in parts.items()}
    if len({tuple(p) for p in short.values()}) < len(keys):
        short = parts

    def alone(key: str, n: int) -> bool:
        tail = short[key][-n:]
        return not tail[0].isdigit() and all(other == key or p[-n:] != tail for other, p in short.items())

    counts = {k: next((n for n in range(1, len(p)) if alone(k, n)), len(p)) for k, p in short.items()}
    return {key: re.sub(r"[^A-Za-z0-9._]", "", ".".join(short[key][-n:])) for key, n in counts.items()}


def _suffix(label: str, value: str) -> str:
    """`-<label><value>`, safe in a file name; a value that cannot be shown whole ends in its digest."""
    flat = re.fullmatch(r"\[([^\[\]{}'\"]+)\]", value)
    text = "_".join(item.strip() for item in flat[1].split(",")) if flat else value
    if not PLAIN.fullmatch(text) or len(text) > LONGEST_VALUE:
        start = re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_.")[: LONGEST_VALUE - 8]
        text = f"{start}-{digest(value)[:6]}".lstrip("-")
    return f"-{label}{'_' if label[-1:].isdigit() and text[:1].isdigit() else ''}{text}"


def _names(starts: list[str], suffixes: list[str], points: list[tuple[str, ...]]) -> list[str]:
    """Names that differ, also where letters' case is not told apart."""
    names = [start + suffix for start, suffix in zip(starts, suffixes, strict=True)]
    often = Counter(name.lower() for name in names)
    for k, name in enumerate(names):
        if len(name) > LONGEST_NAME or often[name.lower()] > 1:
            names[k] = f"{name[: LONGEST_NAME - 9]}-{digest(list(points[k]))[:8]}"
    return names
