"""Every registered component: annotations are configuration types, defaults resolve, the docstring serves `--list`."""

from dataclasses import is_dataclass
from typing import Any

import pytest
import torch

from genmodels import registry, schema
from genmodels.data.dataset import Dataset
from genmodels.registry import arguments, describe, listing, member, names, resolve, summary, supplied

MEMBERS = [(base, name) for base in registry.kinds().values() for name in names(base)]
MEMBERS = [(base, name) for base, name in MEMBERS if member(base, name, "test").__module__.startswith("genmodels.")]
RUN = {"shape", "num_classes", "condition_shape", "target_shape", "in_shape", "out_shape", "timed"}


def ids(value: Any) -> str:
    return value if isinstance(value, str) else value.__name__


every = pytest.mark.parametrize(("base", "name"), MEMBERS, ids=ids)


@every
def test_annotations_are_configuration_types(base, name):
    cls = member(base, name, "test")
    schema.check(cls)
    assert all(schema.is_config(a.hint) or schema.section(a.hint) for a in arguments(cls))
    unreachable = [
        p.name
        for p, hint in schema.parameters(cls)
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and not schema.is_config(hint)
    ]
    assert unreachable == [], "neither a file nor the run can set these"


@every
def test_what_the_run_supplies_has_no_default(base, name):
    if base is not Dataset:  # a data set may be told its shape by its file
        configured = {a.name for a in arguments(member(base, name, "test"))}
        assert not configured & RUN, "a default would hide what the run supplies"


@every
def test_the_docstring_starts_with_one_line(base, name):
    cls = member(base, name, "test")
    assert vars(cls).get("__doc__"), "inherited docstrings describe another class"
    line = summary(cls)
    assert len(line) > 3 and line.strip() == line
    rest = (cls.__doc__ or "").split("\n")[1:2]
    assert not rest or not rest[0].strip(), "a blank line follows the first line"
    assert is_dataclass(cls) is False or not line.startswith(f"{cls.__name__}("), "a dataclass's generated signature"


@every
def test_describe_and_list_show_it(base, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = describe(base, name)
    cls = member(base, name, "test")
    assert all(f"  {a.name} " in text for a in arguments(cls)) and all(word in text for word in supplied(cls))
    assert max(map(len, text.split("\n")[1:])) <= 80
    kind_name = next(key for key, found in registry.kinds().items() if found is base)
    assert f"\n  {name} " in listing(kind_name)


@every
def test_defaults_resolve_and_stay(base, name):
    cls = member(base, name, "test")
    given = {a.name: a.default for a in arguments(cls) if isinstance(a.default, str) and a.default == "???"}
    if given:
        pytest.skip(f"{', '.join(given)} must be given")
    node = resolve(base, name, "node")
    assert resolve(base, node, "node") == node and node["name"] == name


def same(one: Any, two: Any) -> bool:
    """Whether two default components hold the same state."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (registry.Builder, type)) or callable(one):
        return True
    return same(vars(one), vars(two)) if hasattr(one, "__dict__") else one == two


def component_defaults(cls: type) -> list[tuple[str, Any]]:
    """Default objects among the arguments of a constructor: they are recorded by name alone."""
    found = []
    for p, hint in schema.parameters(cls):
        if schema.kind_of(hint) and p.default is not p.empty and p.default is not None:
            found += [(p.name, d) for d in (p.default if isinstance(p.default, tuple) else (p.default,))]
    return [(argument, default) for argument, default in found if not isinstance(default, type)]


@every
def test_default_components_are_default_constructed(base, name):
    for argument, default in component_defaults(member(base, name, "test")):
        assert same(default, type(default)()), (
            f"{argument}: a default's own arguments would be lost in the configuration"
        )


def test_the_section_defaults_are_default_constructed():
    from genmodels.config import Train

    for _, default in component_defaults(Train):
        assert same(default, type(default)())


def test_the_comparison_sees_arguments():
    from genmodels.training.optim import Adam

    assert same(Adam(), Adam()) and not same(Adam(), Adam(lr=2e-3))
