"""Registered components whose constructor signature is their configuration schema.

A *kind* is a base class (`Model`, `Network`, `Solver`, …), a *member* a subclass registered under a name. A node
`{name: …, arguments…}` is checked against the member's signature and completed with its defaults (`resolve`), then
turned into an object (`build`). An argument annotated with a kind is a nested node, `tuple[Kind, ...]` a list of nodes,
`Callable[..., Kind]` a node of which the parent receives a builder because it alone knows the child's sizes.
Keyword-only parameters without default are not configuration: the run supplies them (`shape`, `num_classes`, …).
"""

import inspect
import json
import re
import shutil
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import schema
from .schema import MEMBERS as _members
from .schema import ConfigError, arguments, kind_of, near, section, supplied, wrong

C = TypeVar("C", bound=type)


def kind(cls: C) -> C:
    """Class decorator: `cls` is a base class whose subclasses are registered by name."""
    same = kinds().get(_snake(cls), cls)
    if same.__module__ != cls.__module__:
        raise TypeError(f"the kind '{_snake(cls)}' exists already: {same.__module__}.{same.__qualname__}")
    _members.setdefault(cls, {})
    return cls


def register(base: type, name: str) -> Callable[[C], C]:
    """Class decorator: add a member to a kind.

    Raises:
        TypeError: if the name is taken, or if an argument is neither a configuration type nor supplied by the run.
    """

    def add(cls: C) -> C:
        if base not in _members or not issubclass(cls, base):
            raise TypeError(f"{cls.__qualname__} must be a subclass of {base.__qualname__}, and that must be a @kind")
        taken = _members[base].get(name, cls)
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{base.__name__} '{name}' is already taken by {taken.__module__}.{taken.__qualname__}")
        if vars(cls).get("registered_name", name) != name:
            raise TypeError(f"{cls.__qualname__} is already registered as '{cls.registered_name}'; register a subclass")
        schema.check(cls)
        cls.registered_name = name
        _members[base][name] = cls
        return cls

    return add


def kinds() -> dict[str, type]:
    """Every kind by its name in snake_case."""
    return {_snake(base): base for base in _members}


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
    hint = near(name, names(base))
    if isinstance(name, str) and "." in name:
        hint = (
            " Code outside genmodels is used by its registered name, after "
            f"`imports: [{name.rpartition('.')[0]}]` in the configuration."
        )
    known = ", ".join(names(base)) or "none"
    raise ConfigError(f"{where}.name: no {base.__name__} is called {name!r}.{hint} Known: {known}.")


def _snake(base: type) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", base.__name__).lower()


def _plain(node: Any, where: str) -> Any:
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None


def _rename(f: Callable, node: dict, where: str) -> dict:
    """Old argument names of `f.renamed` become the new ones, with a warning, so that old runs still load."""
    for old, new in getattr(f, "renamed", {}).items():
        if old in node and new in node:
            raise ConfigError(f"{where}: '{old}' is the old name of '{new}', and both are given; keep '{new}'.")
        if old in node:
            warnings.warn(f"{where}.{old} is now called {where}.{new}.", FutureWarning, stacklevel=2)
            node = {new if key == old else key: value for key, value in node.items()}
    return node


def _unknown(f: Callable, key: Any, where: str) -> NoReturn:
    known = [a.name for a in arguments(f)]
    hint = " The run supplies it." if key in supplied(f) else near(key, known, ":")
    listed = "" if hint else f": {', '.join(known) or 'none'}"
    title = f.__qualname__
    raise ConfigError(f"{where or 'configuration'}: Key '{key}' not in '{title}'.{hint} (arguments of {title}{listed})")


def validate(f: Callable, node: Any, where: str) -> dict:
    """The node checked against the signature of `f`, with types converted and every default filled in: plain data.

    Raises:
        ConfigError: naming the key: unknown or missing keys, wrong types, a list where a node is needed.
    """
    node = _plain(node, where)
    if not isinstance(node, dict):
        wrong(where, f"a mapping of the arguments of {f.__qualname__}", node)
    node = _rename(f, node, where)
    out = {"name": node["name"]} if hasattr(f, "registered_name") else {}
    for key in node:
        if key not in out and key not in [a.name for a in arguments(f)]:
            _unknown(f, key, where)
    for name, hint, default in arguments(f):
        path, value = f"{where}.{name}".lstrip("."), node.get(name, default)
        if isinstance(value, str) and value == MISSING:
            raise ConfigError(f"{path}: must be given; {f.__qualname__} has no default for '{name}'.")
        if kind_of(hint) and isinstance(value, dict) and isinstance(default, dict) and "name" not in value:
            value = {**default, **value}  # `optimizer: {lr: 1e-4}` speaks of the default optimiser
        if section(hint) and isinstance(value, dict) and isinstance(default, dict):
            value = {**default, **value}
        out[name] = _argument(hint, value, path)
    return out


def _argument(hint: Any, value: Any, where: str) -> Any:
    base = kind_of(hint)
    if not (base or section(hint)):
        return schema.convert(hint, value, where)
    if value is None and type(None) in schema.choices(hint):
        return None
    if section(hint):
        return validate(section(hint), value, where)
    if typing.get_origin(schema.required(hint)) is tuple:
        return [_argument(each, item, path) for each, item, path in schema.items(schema.required(hint), value, where)]
    return resolve(base, value, where)


def resolve(base: type, node: Any, where: str) -> dict:
    """The node of a component, checked and completed; a bare string stands for `{name: string}`."""
    node = _plain(node, where)
    node = {"name": node} if isinstance(node, str) else node
    if not isinstance(node, dict) or "name" not in node:
        wrong(where, f"a {base.__name__} node {{name: …}}", node)
    return validate(member(base, node["name"], where), node, where)


def values(f: Callable, node: dict, **context: Any) -> dict[str, Any]:
    """Keyword arguments for `f` from a resolved node: nested nodes are built, builders made, lists become tuples."""
    given = {name: context[name] for name in supplied(f) if name in context}
    return {**given, **{a.name: _value(a.hint, node[a.name], context) for a in arguments(f)}}


def _value(hint: Any, value: Any, context: dict[str, Any]) -> Any:
    hint, base = schema.required(hint), kind_of(hint)
    if value is None:
        return None
    if section(hint):
        return hint(**values(hint, value, **context))
    if isinstance(value, list):
        return tuple(_value(schema.inner(hint)[0] if base else Any, item, context) for item in value)
    if base:
        lazy = typing.get_origin(hint) is Callable
        return Builder(base, value, context) if lazy else build(base, value, **context)
    return {k: _value(Any, v, context) for k, v in value.items()} if isinstance(value, dict) else value


def build(base: type, node: dict | str, **context: Any) -> Any:
    """The object of a node; `context` supplies its keyword-only arguments and those of its children.

    Raises:
        ConfigError: if the node does not fit, or the context lacks something that the component must be given.
    """
    node = resolve(base, node, _snake(base))  # a node stored by an older version gains the arguments that came later
    cls = member(base, node["name"], _snake(base))
    given = values(cls, node, **context)
    missing = [name for name in supplied(cls) if name not in given]
    if missing:
        advice = "".join(f" {text}" for name, text in getattr(cls, "advice", {}).items() if name in missing)
        raise ConfigError(
            f"{base.__name__} '{node['name']}' must be told {', '.join(missing)}, which neither its parent nor the "
            f"dataset provides here (provided: {', '.join(sorted(context)) or 'nothing'}).{advice}"
        )
    return cls(**given)


class Builder:
    """What a parent receives for `Callable[..., Kind]`: builds the child of a resolved node with the sizes it is given.

    Attributes:
        node: the resolved node, plain data.
    """

    def __init__(self, base: type, node: dict, context: dict[str, Any] | None = None) -> None:
        self.base, self.node, self.context = base, node, context or {}

    def __call__(self, **sizes: Any) -> Any:
        return build(self.base, self.node, **{**self.context, **sizes})


def summary(cls: type) -> str:
    """The first line of the docstring."""
    return (inspect.getdoc(cls) or "").split("\n")[0]


def source(cls: type) -> str | None:
    """The `Source:` of the docstring: the paper and section."""
    found = re.search(r"Source:\s*(.+?)(?=\n\s*\n|\n\w+:|$)", inspect.getdoc(cls) or "", re.DOTALL)
    return " ".join(found[1].split()) if found else None


def listing(kind_name: str | None = None) -> str:
    """The members of a kind, or of all kinds, each with the first line of its docstring.

    Raises:
        ConfigError: if there is no such kind.
    """
    chosen = {kind_name: _base(kind_name)} if kind_name else dict(sorted(kinds().items()))
    column = max((len(name) for base in chosen.values() for name in names(base)), default=0) + 4
    blocks = []
    for title, base in chosen.items():
        rows = [_fill(f"  {name:<{column - 2}}", summary(_members[base][name]), column) for name in names(base)]
        blocks.append("\n".join([_fill("", f"{title}: {summary(base)}", 2), *(rows or ["  (none)"])]))
    return "\n\n".join(blocks)


def describe_name(text: str) -> str:
    """`describe` of `kind.name`, e.g. `solver.heun`.

    Raises:
        ConfigError: if there is no such kind, or no such member.
    """
    kind_name, _, name = text.partition(".")
    return describe(_base(kind_name), name)


def describe(base: type, name: str) -> str:
    """What a member is, its arguments with types and defaults, and what the run supplies."""
    cls = member(base, name, _snake(base))
    column = max((len(a.name) for a in arguments(cls)), default=0) + 4
    rows = []
    for argument, hint, default in arguments(cls):
        shown = "(required)" if default == MISSING else f"= {_shown(default)}"
        rows.append(_fill(f"  {argument:<{column - 2}}", f"{schema.show(hint)} {shown}", column))
    return "\n".join(
        [
            f"{_snake(base)}.{name}  ({cls.__module__}.{cls.__qualname__})",
            "",
            _reflow(inspect.getdoc(cls) or ""),
            "",
            "Configuration:" if rows else "Configuration: none",
            *rows,
            _fill("", f"Supplied by the run: {', '.join(supplied(cls)) or 'nothing'}", 2),
        ]
    )


def components(f: Callable, node: dict) -> Iterator[tuple[type, type]]:
    """(kind, class) of every component in a node resolved against `f`, parents before their children."""
    for name, hint, _ in arguments(f):
        pending = [node[name]]
        while pending:
            value = pending.pop(0)
            if isinstance(value, list):
                pending = [*value, *pending]
            elif value is not None and section(hint):
                yield from components(section(hint), value)
            elif value is not None and kind_of(hint):
                cls = member(kind_of(hint), value["name"], name)
                yield kind_of(hint), cls
                yield from components(cls, value)


def portable(f: Callable, node: dict) -> dict:
    """A node resolved against `f` without what only says where things lie on this machine.

    Components name such arguments in `local`: paths, whose contents matter and whose names do not.
    """
    kept = {"name": node["name"]} if "name" in node else {}
    for name, hint, _ in arguments(f):
        if name not in getattr(f, "local", ()):
            kept[name] = _portable(hint, node[name])
    return kept


def _portable(hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_portable(hint, item) for item in value]
    if value is not None and section(hint):
        return portable(section(hint), value)
    if value is not None and kind_of(hint):
        return portable(member(kind_of(hint), value["name"], "name"), value)
    return value


def _base(kind_name: str) -> type:
    if kind_name not in kinds():
        known = ", ".join(sorted(kinds()))
        raise ConfigError(f"there is no kind '{kind_name}'.{near(kind_name, kinds())} Known: {known}.")
    return kinds()[kind_name]


def _shown(default: Any) -> str:
    """A default as it would stand in a file; `{name: x}` as x."""
    if isinstance(default, (tuple, list)):
        return f"[{', '.join(map(_shown, default))}]"
    return default["name"] if isinstance(default, dict) and default.keys() == {"name"} else json.dumps(default)


def _fill(start: str, text: str, hang: int) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * hang, break_on_hyphens=False)


def _reflow(text: str) -> str:
    """The text for the terminal's width: lines that fill the page are joined with the one they run on into."""
    out: list[tuple[str, int]] = []
    full = False
    for line in text.split("\n"):
        indent, entry = len(line) - len(line.lstrip()), re.match(r"\s*[\w, ]+:(\s|$)", line)
        if full and line.strip() and not entry and indent >= len(out[-1][0]) - len(out[-1][0].lstrip()):
            out[-1] = (f"{out[-1][0]} {line.strip()}", indent)
        else:
            out.append((line, indent + 4 * bool(entry)))
        full = len(line) > 80
    return "\n".join(_fill(line[: len(line) - len(line.lstrip())], line.strip(), hang) for line, hang in out)
