"""A signature as a schema: which arguments are configuration, and what a value must be to fit an annotation.

Configuration types are int, float, bool, str, None, Literal, unions, tuples and dictionaries of these, and kinds (see
`registry`). Values stay plain data: a tuple is a list, a component its node.
"""

import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple, NoReturn

from omegaconf import MISSING

PLAIN = (bool, int, float, str, type(None))
MEMBERS: dict[type, dict[str, type]] = {}  # every kind with its members by name; `registry` fills it


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the way out."""


def near(word: Any, known: Iterable[str], colon: str = "") -> str:
    """` Did you mean 'x'?`, or nothing if no known word is near."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean{colon} '{close[0]}'?" if close else ""


def wrong(where: str, needed: str, value: Any, advice: str = "") -> NoReturn:
    shown = "null" if value is None else repr(value).lower() if isinstance(value, bool) else repr(value)
    shown = shown if len(shown) <= 120 else f"{shown[:120]} …"
    raise ConfigError(f"{where or 'configuration'}: {needed} is needed, found {shown}.{advice}")


def inner(hint: Any) -> tuple:
    """The arguments of a generic annotation, without `...`."""
    return tuple(a for a in typing.get_args(hint) if a is not ...)


def choices(hint: Any) -> tuple:
    """The alternatives of a union, or the annotation alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def required(hint: Any) -> Any:
    """The annotation without `| None`."""
    some = [a for a in choices(hint) if a is not type(None)]
    return some[0] if len(some) == 1 else hint


def kind_of(hint: Any) -> type | None:
    """The kind of the components that an argument holds, at whatever depth of tuples."""
    hint = required(hint)
    if typing.get_origin(hint) in (tuple, Callable):
        return next((base for a in inner(hint) if (base := kind_of(a))), None)
    return hint if isinstance(hint, type) and hint in MEMBERS else None


def section(hint: Any) -> type | None:
    """The dataclass of a fixed section of the file."""
    hint = required(hint)
    return hint if isinstance(hint, type) and is_dataclass(hint) and hint not in MEMBERS else None


def is_config(hint: Any) -> bool:
    """Whether values of this annotation can be written in a file; one kind per argument, and none in a dictionary."""
    origin, parts = typing.get_origin(hint), inner(hint)
    if origin is Literal:
        return all(type(a) in PLAIN for a in parts)
    if origin is Callable:
        return typing.get_args(hint)[0] is ... and parts[0] in MEMBERS
    if origin is dict:
        return parts[0] in (str, int) and (parts[1] is Any or (is_config(parts[1]) and not kind_of(parts[1])))
    if origin is tuple:
        return all(map(is_config, parts)) and len(set(map(kind_of, parts))) <= 1
    if len(choices(hint)) > 1:
        mixed = required(hint) is hint and any(map(kind_of, choices(hint)))
        return not mixed and all(map(is_config, choices(hint)))
    return isinstance(hint, type) and (hint in PLAIN or hint in MEMBERS)


def show(hint: Any) -> str:
    """The annotation as a reader of configuration files would write it: `[int, ...]`, `Network`, `float | null`."""
    origin, parts = typing.get_origin(hint), inner(hint)
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin is tuple:
        return f"[{', '.join('...' if a is ... else show(a) for a in typing.get_args(hint))}]"
    if origin is dict:
        return f"{{{show(parts[0])}: {show(parts[1])}}}"
    if origin is Callable:
        return show(parts[0])
    if len(choices(hint)) > 1:
        return " | ".join(map(show, choices(hint)))
    return {type(None): "null", Any: "anything"}.get(hint) or hint.__name__


class Argument(NamedTuple):
    """A configuration argument; `default` is plain data (a component is its node), or MISSING."""

    name: str
    hint: Any
    default: Any


def parameters(f: Callable) -> Iterator[tuple[inspect.Parameter, Any]]:
    """The named parameters of a constructor or method with their annotations.

    Raises:
        TypeError: if an annotation cannot be resolved at module level.
    """
    call = f.__init__ if isinstance(f, type) else f
    if call is object.__init__:
        return
    try:
        hints = typing.get_type_hints(call)
    except NameError as error:
        raise TypeError(f"{call.__qualname__}: annotations must resolve at module level: {error}") from None
    for p in inspect.signature(call).parameters.values():
        if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            yield p, hints.get(p.name, p.empty)


def check(cls: type) -> None:
    """Raises TypeError if an argument of a constructor is neither configuration nor supplied by the run."""
    for p, hint in parameters(cls):
        usable = (is_config(hint) or section(hint)) and p.name != "name" and p.kind is not p.POSITIONAL_ONLY
        if not usable and (p.kind is not p.KEYWORD_ONLY or p.name == "name"):
            raise TypeError(
                f"{cls.__qualname__}.{p.name}: {hint!r} is no configuration type (int, float, bool, str, None, "
                "Literal, tuple, dict) and no registered kind (one per argument, not in a dict), or the argument is "
                "positional-only or called 'name'. Make it keyword-only without default if the run supplies it."
            )
    arguments(cls)


@functools.cache
def arguments(f: Callable) -> tuple[Argument, ...]:
    """What a configuration may say of a constructor (its positional and defaulted arguments) or of a method (its
    defaulted keyword-only arguments of configuration type)."""
    made = {x.name: x.default_factory for x in fields(f) if callable(x.default_factory)} if is_dataclass(f) else {}
    found = []
    for p, hint in parameters(f):
        given = p.default is not p.empty
        if (is_config(hint) or section(hint)) and (given if p.kind is p.KEYWORD_ONLY else isinstance(f, type)):
            default = made[p.name]() if p.name in made else p.default
            found.append(Argument(p.name, hint, _as_node(hint, default) if given else MISSING))
    return tuple(found)


@functools.cache
def supplied(f: Callable) -> tuple[str, ...]:
    """The keyword-only arguments without default: the run supplies them."""
    return tuple(p.name for p, _ in parameters(f) if p.kind is p.KEYWORD_ONLY and p.default is p.empty)


def _as_node(hint: Any, default: Any) -> Any:
    """A default as plain data: a component, or the class of one that the parent builds, becomes `{name: …}`."""
    base = kind_of(hint)
    if section(hint):
        # what a section leaves out has its own defaults
        return (
            None
            if default is None
            else {f.name: v for f in fields(default) if (v := getattr(default, f.name)) != f.default}
        )
    if base is None or default is None:
        return default
    if isinstance(default, (tuple, list)):
        return [_as_node(base, item) for item in default]
    cls = default if isinstance(default, type) else type(default)
    if MEMBERS[base].get(vars(cls).get("registered_name")) is not cls:
        raise TypeError(f"a default of a {base.__name__} argument must be a registered component, found {default!r}")
    if default is not cls and _told(default) != _told(cls()):
        raise TypeError(
            f"a default {cls.__name__} with arguments of its own would lose them in a configuration, which names it "
            "alone. Make the default None, or one that is built without arguments."
        )
    return {"name": cls.registered_name}


def _told(value: Any) -> Any:
    """What an object is made of, objects within it likewise, where `repr` would only say where they lie in memory."""
    if isinstance(value, (tuple, list)):
        return [_told(item) for item in value]
    if type(value).__repr__ is not object.__repr__:
        return repr(value)
    return type(value).__qualname__, {name: _told(part) for name, part in vars(value).items()}


def convert(hint: Any, value: Any, where: str) -> Any:
    """The value as an annotation without kinds demands: numbers converted, containers copied, plain data.

    Raises:
        ConfigError: naming the key (`where`), the type and the value.
    """
    origin = typing.get_origin(hint)
    if len(choices(hint)) > 1:
        return _choice(hint, value, where)
    if origin is Literal:
        if not any(type(a) is type(value) and a == value for a in inner(hint)):
            wrong(where, f"one of {show(hint)}", value, near(value, (a for a in inner(hint) if isinstance(a, str))))
        return value
    if origin is tuple or (hint is Any and isinstance(value, (list, tuple))):
        return [convert(each, item, path) for each, item, path in items(hint, value, where)]
    if origin is dict or (hint is Any and isinstance(value, dict)):
        if not isinstance(value, dict):
            wrong(where, f"a mapping {show(hint)}", value)
        key, each = inner(hint) or (str, Any)
        return {convert(key, k, where): convert(each, v, f"{where}.{k}") for k, v in value.items()}
    return _scalar(type(value) if hint is Any else hint, value, where)


def items(hint: Any, value: Any, where: str) -> list[tuple[Any, Any, str]]:
    """(annotation, item, key) of each item of a list.

    Raises:
        ConfigError: if the value is no list, or has another length than the annotation.
    """
    if not isinstance(value, (list, tuple)):
        wrong(where, f"a list {show(hint)}", value)
    each = inner(hint) or (Any,)
    if hint is Any or ... in typing.get_args(hint):
        each = each * len(value)
    if len(each) != len(value):
        wrong(where, f"a list of {len(each)} items {show(hint)}", list(value))
    return [(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(zip(each, value, strict=True))]


def _choice(hint: Any, value: Any, where: str) -> Any:
    """The value as the alternative of a union that takes it unchanged, or else as the first that takes it at all."""
    if value is None and type(None) in choices(hint):
        return None
    if required(hint) is not hint:
        return convert(required(hint), value, where)
    found = []
    for alternative in choices(hint):
        try:
            found.append(convert(alternative, value, where))
        except ConfigError:
            continue
    if not found:
        wrong(where, show(hint), value)
    return next((out for out in found if type(out) is type(value) and out == value), found[0])


def _scalar(hint: Any, value: Any, where: str) -> Any:
    out, advice = None, ""
    if hint in (int, float):
        out = _number(hint, value)
        advice = " It must be finite." if isinstance(value, float) and not math.isfinite(value) else ""
    elif hint is bool:
        out = value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())
    elif hint is str:
        out = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
        advice = " Put it in quotes." if isinstance(value, (bool, float)) else ""
    if out is None and not (value is None and hint is type(None)):
        wrong(where, show(hint) if hint in PLAIN else "plain data", value, advice)
    if isinstance(out, str) and "${" in out:
        raise ConfigError(f"{where}: {out!r} holds an interpolation that was not resolved, or a text with '${{'.")
    return out


def _number(hint: type, value: Any) -> int | float | None:
    """The number that a value stands for exactly (1e5 is an integer, 1.5 is none), None if it stands for none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        out = hint(value)
    except (ValueError, OverflowError):
        return None
    exact = math.isfinite(out) if hint is float else not isinstance(value, float) or out == value
    return out if exact else None
