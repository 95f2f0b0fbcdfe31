"""Registered components whose constructor signature is their configuration schema.

A *kind* is a base class (`Model`, `Network`, `Solver`, …), a *member* a subclass registered under a name. A configuration
node `{name: …, arguments…}` is checked against the member's signature (`resolve`), completed with its defaults, and turned
into an object (`build`). An argument annotated with a kind is a nested node, `tuple[Kind, ...]` a list of nodes,
`Callable[..., Kind]` a node of which the parent receives a builder because it alone knows the child's sizes.
Keyword-only parameters without default are not configuration: the run supplies them (`shape`, `num_classes`, …).
"""

import difflib
import functools
import inspect
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import field, is_dataclass, make_dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

C = TypeVar("C", bound=type)
PLAIN = {int, float, bool, str, type(None)}
_members: dict[type, dict[str, type]] = {}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the way out."""


def kind(cls: C) -> C:
    """Class decorator: `cls` is a base class whose subclasses are registered by name."""
    _members.setdefault(cls, {})
    return cls


def register(base: type, name: str) -> Callable[[C], C]:
    """Class decorator: add a member to a kind.

    Raises:
        TypeError: if the name is taken, or if a positional argument is no configuration type and no registered kind.
    """

    def add(cls: C) -> C:
        taken = _members[base].get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"{base.__name__} '{name}' is already registered by {taken.__module__}.{taken.__qualname__}"
            )
        for argument, hint in _positional(cls):
            if argument == "name" or not _leaves(hint) <= PLAIN | _members.keys():
                raise TypeError(
                    f"{cls.__qualname__}.{argument}: {hint!r} is no configuration type (int, float, bool, str, None, Literal, "
                    "tuple, dict) and no registered kind. Make it keyword-only without default if the run supplies it."
                )
            _kind_of(hint)
        cls.registered_name = name
        _members[base][name] = cls
        return cls

    return add


def kinds() -> dict[str, type]:
    """Every kind by its name in snake_case."""
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", k.__name__).lower(): k for k in _members}


def names(base: type) -> list[str]:
    """The registered members of a kind, sorted."""
    return sorted(_members[base])


def member(base: type, name: Any, where: str) -> type:
    """The class registered under a name.

    Raises:
        ConfigError: if there is none, with the nearest name, and with `imports:` if it looks like outside code.
    """
    found = _members[base].get(name) if isinstance(name, str) else None
    if found is not None:
        return found
    close = difflib.get_close_matches(str(name), names(base), n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    if isinstance(name, str) and "." in name:
        module = name.rpartition(".")[0]
        hint = (
            f" Code outside genmodels is used by its registered name, after `imports: [{module}]` in the configuration."
        )
    raise ConfigError(
        f"{where}.name: no {base.__name__} is called {name!r}.{hint} Known: {', '.join(names(base)) or 'none'}."
    )


# ---- reading signatures ------------------------------------------------------------------------------------------------


class Argument(NamedTuple):
    name: str
    hint: Any
    default: Any


def _leaves(hint: Any) -> set:
    if typing.get_origin(hint) is Literal:
        return {str}
    if hint is Any:
        return {str}
    inner = [a for a in typing.get_args(hint) if a is not ...]
    return set().union(*map(_leaves, inner)) if inner else {hint}


def _required(hint: Any) -> Any:
    """The hint without `| None`."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    inner = [a for a in typing.get_args(hint) if a is not type(None)] if union else []
    return inner[0] if len(inner) == 1 else hint


def _kind_of(hint: Any) -> type | None:
    found = [leaf for leaf in _leaves(hint) if leaf in _members]
    if len(found) > 1 or (found and typing.get_origin(_required(hint)) is dict):
        raise TypeError(f"{hint!r}: one kind per argument, and no dictionaries of components")
    return found[0] if found else None


def _section(hint: Any) -> type | None:
    hint = _required(hint)
    return hint if isinstance(hint, type) and is_dataclass(hint) and hint not in _members else None


def _many(hint: Any) -> bool:
    return typing.get_origin(_required(hint)) in (tuple, list)


def _lazy(hint: Any) -> bool:
    hint = _required(hint)
    return typing.get_origin(typing.get_args(hint)[0] if _many(hint) else hint) is Callable


def _parameters(f: Callable) -> Iterator[tuple[inspect.Parameter, Any]]:
    call = f.__init__ if isinstance(f, type) else f
    if call is object.__init__:
        return
    hints = typing.get_type_hints(call)
    for p in inspect.signature(call).parameters.values():
        if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            yield p, hints.get(p.name, Any)


def _positional(cls: type) -> Iterator[tuple[str, Any]]:
    return ((p.name, hint) for p, hint in _parameters(cls) if p.kind is p.POSITIONAL_OR_KEYWORD)


def arguments(f: Callable) -> Iterator[Argument]:
    """What a configuration may say of a constructor (its positional and defaulted arguments) or of a method (its
    keyword-only arguments of configuration type)."""
    for p, hint in _parameters(f):
        given = p.default is not p.empty
        keyword = p.kind is p.KEYWORD_ONLY
        plain = _leaves(hint) <= PLAIN | _members.keys() or _section(hint)
        if plain and (given if keyword else isinstance(f, type)):
            yield Argument(p.name, hint, p.default if given else MISSING)


def supplied(f: Callable) -> list[str]:
    """The keyword-only arguments without default: the run supplies them."""
    return [p.name for p, _ in _parameters(f) if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _default_node(base: type | None, default: Any) -> Any:
    """A default component as the node that would build it."""
    if base and isinstance(default, (tuple, list)):
        return [_default_node(base, d) for d in default]
    return {"name": default.registered_name} if base and isinstance(default, base) else default


@functools.cache
def schema(f: Callable) -> type:
    """A dataclass with one typed field per argument; OmegaConf checks and converts values against it."""
    rows: list[tuple] = (
        [("name", str, field(default=""))] if isinstance(f, type) and hasattr(f, "registered_name") else []
    )
    for name, hint, default in arguments(f):
        nested = _kind_of(hint) or _section(hint)
        value = {} if _section(hint) else _default_node(_kind_of(hint), default)
        if isinstance(value, (list, dict)):
            rows.append((name, Any if nested else hint, field(default_factory=lambda value=value: type(value)(value))))
        else:
            rows.append((name, Any if nested else hint, field(default=value)))
    return make_dataclass(f.__name__, rows)


# ---- nodes -------------------------------------------------------------------------------------------------------------


def _plain(node: Any, where: str) -> Any:
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None


def _rename(f: Callable, node: dict, where: str) -> dict:
    """Old argument names of `f.renamed` become the new ones, with a warning, so that old runs still load."""
    for old, new in getattr(f, "renamed", {}).items():
        if old in node:
            warnings.warn(f"{where}.{old} is now called {where}.{new}.", FutureWarning, stacklevel=2)
            node = {new if key == old else key: value for key, value in node.items()}
    return node


def validate(f: Callable, node: Any, where: str) -> dict:
    """The node checked against the signature of `f`, with types converted and every default filled in.

    Raises:
        ConfigError: naming the key: unknown or missing keys, wrong types, a list where a node is needed.
    """
    node = _plain(node, where)
    if not isinstance(node, dict):
        raise ConfigError(f"{where}: a mapping of the arguments of {f.__qualname__} is needed, found {node!r}.")
    node = _rename(f, node, where)
    try:
        out = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema(f)), node), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{_at(where, error)}: {str(error).splitlines()[0]} (arguments of {f.__qualname__})"
        ) from None
    for name, hint, _ in arguments(f):
        out[name] = _validate_value(f, name, hint, out[name], f"{where}.{name}".lstrip("."))
    return out


def _at(where: str, error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    return ".".join(p for p in (where, str(key) if key else "") if p) or "configuration"


def _validate_value(f: Callable, name: str, hint: Any, value: Any, where: str) -> Any:
    base, section = _kind_of(hint), _section(hint)
    if (isinstance(value, str) and value == MISSING) or (
        (base or section) and value is None and type(None) not in _leaves(hint)
    ):
        raise ConfigError(f"{where}: must be given; {f.__qualname__} has no default for '{name}'.")
    if value is None or not (base or section):
        return value
    if section:
        return validate(section, value, where)
    if _many(hint):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: a list of {base.__name__} nodes is needed, found {value!r}.")
        return [resolve(base, item, f"{where}[{i}]") for i, item in enumerate(value)]
    return resolve(base, value, where)


def resolve(base: type, node: Any, where: str) -> dict:
    """The node of a component, checked and completed; a bare string stands for `{name: string}`."""
    node = _plain(node, where)
    node = {"name": node} if isinstance(node, str) else node
    if not isinstance(node, dict) or "name" not in node:
        raise ConfigError(f"{where}: a {base.__name__} node {{name: …}} is needed, found {node!r}.")
    return validate(member(base, node["name"], where), node, where)


def values(f: Callable, node: dict, **context: Any) -> dict[str, Any]:
    """Keyword arguments for `f` from a resolved node: nested nodes are built, builders made, lists become tuples."""
    given = {name: context[name] for name in supplied(f) if name in context}
    for name, hint, _ in arguments(f):
        given[name] = _value(hint, node[name], context)
    return given


def _value(hint: Any, value: Any, context: dict[str, Any]) -> Any:
    base, section = _kind_of(hint), _section(hint)
    if value is None:
        return None
    if section:
        return section(**values(section, value, **context))
    if base:
        make = functools.partial(builder, base, context=context) if _lazy(hint) else lambda n: build(base, n, **context)
        return tuple(make(item) for item in value) if _many(hint) else make(value)
    return _tuples(value) if typing.get_origin(_required(hint)) is tuple else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def build(base: type, node: dict, **context: Any) -> Any:
    """The object of a resolved node; `context` supplies its keyword-only arguments and those of its children.

    Raises:
        ConfigError: if the context lacks something that the component must be given.
    """
    cls = member(base, node["name"], base.__name__)
    given = values(cls, node, **context)
    missing = [name for name in supplied(cls) if name not in given]
    if missing:
        raise ConfigError(
            f"{base.__name__} '{node['name']}' must be told {', '.join(missing)}, which neither its parent nor the dataset "
            f"provides here (provided: {', '.join(sorted(context)) or 'nothing'})."
        )
    return cls(**given)


def builder(base: type, node: dict, context: dict[str, Any]) -> Callable[..., Any]:
    """A function that builds the node with the parent's own keyword arguments added to the context."""
    return lambda **more: build(base, node, **{**context, **more})


# ---- for the reader ----------------------------------------------------------------------------------------------------


def summary(cls: type) -> str:
    """The first line of the docstring."""
    return (inspect.getdoc(cls) or "").split("\n")[0]


def source(cls: type) -> str | None:
    """The `Source:` of the docstring: the paper and section."""
    found = re.search(r"Source:\s*(.+?)(?:\n\s*\n|$)", inspect.getdoc(cls) or "", re.DOTALL)
    return " ".join(found[1].split()) if found else None


def describe(base: type, name: str) -> str:
    """What a member is, its arguments with types and defaults, what the run supplies, and its source."""
    cls = member(base, name, base.__name__.lower())
    lines = [
        f"{base.__name__} '{name}' ({cls.__module__}.{cls.__qualname__})",
        "",
        inspect.getdoc(cls) or "",
        "",
        "Configuration:",
    ]
    for argument, hint, default in arguments(cls):
        shown = "(required)" if default == MISSING else f"= {_default_node(_kind_of(hint), default)!r}"
        lines.append(f"  {argument}: {_show(hint)} {shown}")
    lines += [f"Supplied by the run: {', '.join(supplied(cls)) or 'nothing'}"]
    return "\n".join(lines)


def _show(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return "None" if hint is type(None) else hint.__name__
    text = str(hint).replace("typing.", "").replace("collections.abc.", "")
    return re.sub(r"\b[\w.]+\.(\w+)", r"\1", text).replace("NoneType", "None")
