"""The registry against DESIGN's rules: what a signature admits, what an error says, what a node becomes."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from genmodels import registry, schema
from genmodels.registry import Builder, ConfigError, build, kind, register, resolve, validate, values

from .fakes import restored, world


@pytest.fixture(scope="module")
def fake() -> Iterator[SimpleNamespace]:
    with restored():
        yield world()


def coupling(**network: Any) -> dict[str, Any]:
    return {"name": "coupling", "network": {"name": "mlp", **network}}


def test_defaults_are_filled_in_at_every_depth(fake):
    got = resolve(fake.FakeLayer, {"name": "coupling", "network": "mlp"}, "layer")
    network = {"name": "mlp", "width": 64, "activation": "relu", "dropout": 0.0}
    assert got == {"name": "coupling", "network": network, "bins": 8}


def test_a_bare_string_is_a_node_with_that_name(fake):
    assert resolve(fake.FakeSchedule, "linear", "s") == resolve(fake.FakeSchedule, {"name": "linear"}, "s")


def test_default_components_are_written_as_nodes(fake):
    got = resolve(registry.kinds()["model"], "fake_flow", "model")
    assert got["schedule"] == {"name": "linear", "slope": 1.0}
    assert got["more"] == [{"name": "linear", "slope": 1.0}, {"name": "cosine", "offset": 0.008}]
    assert got["maker"]["name"] == "mlp" and got["guide"] is None


def test_a_node_without_name_speaks_of_the_default_component(fake):
    got = resolve(registry.kinds()["model"], {"name": "fake_flow", "schedule": {"slope": 2}}, "model")
    assert got["schedule"] == {"name": "linear", "slope": 2.0}


def test_resolved_nodes_are_plain_data(fake):
    def plain(value: Any) -> bool:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return type(value) in (dict, list, int, float, str, bool, type(None)) and all(map(plain, inside))

    node = {"name": "fake_flow", "layers": (coupling(), "squeeze"), "pairs": ((1, 2), (3, 4)), "sizes": (1, 2)}
    got = resolve(registry.kinds()["model"], OmegaConf.create(node), "model")
    assert plain(got) and got["pairs"] == [[1, 2.0], [3, 4.0]] and got["sizes"] == [1, 2]
    assert resolve(registry.kinds()["model"], got, "model") == got


def test_resolving_shares_nothing_with_the_defaults(fake):
    model = registry.kinds()["model"]
    first = resolve(model, "fake_flow", "model")
    first["weights"]["a"] = 7.0
    first["more"].clear()
    second = resolve(model, "fake_flow", "model")
    assert second["weights"] == {"a": 1.0} and len(second["more"]) == 2


def test_a_given_dictionary_replaces_the_default_one(fake):
    got = resolve(registry.kinds()["model"], {"name": "fake_flow", "weights": {"b": 2}}, "model")
    assert got["weights"] == {"b": 2.0}


ARGUMENTS = "(arguments of *MLP: width, activation, dropout)"
NOT_GIVEN = ".depth: must be given; *Tree has no default for 'depth'."


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"name": "mlp", "widht": 1}, ": Key 'widht' not in '*MLP'. Did you mean: 'width'? (arguments of *MLP)"),
        ({"name": "mlp", "zzz": 1}, f": Key 'zzz' not in '*MLP'. {ARGUMENTS}"),
        ({"name": "mlp", 3: 1}, f": Key '3' not in '*MLP'. {ARGUMENTS}"),
        (
            {"name": "mlp", "in_features": 1},
            ": Key 'in_features' not in '*MLP'. The run supplies it. (arguments of *MLP)",
        ),
        ({"name": "mlp", "_target_": "os.system"}, f": Key '_target_' not in '*MLP'. {ARGUMENTS}"),
        ({"_target_": "os.system"}, ": a FakeNet node {name: …} is needed, found {'_target_': 'os.system'}."),
        ({"name": "mpl"}, ".name: no FakeNet is called 'mpl'. Did you mean 'mlp'? Known: mlp, tree."),
        ({"name": 3}, ".name: no FakeNet is called 3. Known: mlp, tree."),
        (
            "my_lab.models.Foo",
            ".name: no FakeNet is called 'my_lab.models.Foo'. Code outside genmodels is used by its registered name, "
            "after `imports: [my_lab.models]` in the configuration. Known: mlp, tree.",
        ),
        ({"name": "mlp", "width": "x"}, ".width: int is needed, found 'x'."),
        ({"name": "mlp", "width": None}, ".width: int is needed, found null."),
        (
            {"name": "mlp", "activation": "rleu"},
            ".activation: one of 'relu' | 'tanh' is needed, found 'rleu'. Did you mean 'relu'?",
        ),
        ({"name": "tree"}, NOT_GIVEN),
        ({"name": "tree", "depth": "???"}, NOT_GIVEN),
        ("???", ": must be given; *Coupling has no default for 'network'."),
        (None, ": a FakeNet node {name: …} is needed, found null."),
        (True, ": a FakeNet node {name: …} is needed, found true."),
        (["mlp"], ": a FakeNet node {name: …} is needed, found ['mlp']."),
    ],
)
def test_errors_name_the_whole_key_and_the_way_out(fake, network, message):
    layers = ["squeeze", {"name": "coupling", "network": network}]
    with pytest.raises(ConfigError) as caught:
        resolve(registry.kinds()["model"], {"name": "fake_flow", "layers": layers}, "model")
    assert re.sub(r"world\.<locals>\.", "*", str(caught.value)) == f"model.layers[1].network{message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "coupling"}, "layers: a list [FakeLayer, ...] is needed, found 'coupling'."),
        ({"layers": None}, "layers: a list [FakeLayer, ...] is needed, found null."),
        ({"flag": 1}, "flag: bool is needed, found 1."),
        ({"flag": "yes"}, "flag: bool is needed, found 'yes'."),
        ({"count": True}, "count: int is needed, found true."),
        ({"count": 1.5}, "count: int is needed, found 1.5."),
        ({"scale": "x"}, "scale: float is needed, found 'x'."),
        ({"scale": float("nan")}, "scale: float is needed, found nan. It must be finite."),
        ({"scale": "inf"}, "scale: float is needed, found 'inf'."),
        ({"scale": 10**400}, f"scale: float is needed, found {str(10**400)[:120]} …."),
        ({"title": True}, "title: str is needed, found true. Put it in quotes."),
        ({"title": 1.5}, "title: str is needed, found 1.5. Put it in quotes."),
        ({"title": "${seed}"}, "title: '${seed}' holds an interpolation that was not resolved, or a text with '${'."),
        ({"level": 4}, "level: one of 1 | 2 | 3 is needed, found 4."),
        ({"level": True}, "level: one of 1 | 2 | 3 is needed, found true."),
        ({"pairs": [[1, 2, 3]]}, "pairs[0]: a list of 2 items [int, float] is needed, found [1, 2, 3]."),
        ({"pairs": [[1, 2], 3]}, "pairs[1]: a list [int, float] is needed, found 3."),
        ({"pairs": [[1, 2], [3, "x"]]}, "pairs[1][1]: float is needed, found 'x'."),
        ({"weights": [1]}, "weights: a mapping {str: float} is needed, found [1]."),
        ({"weights": {"b": "x"}}, "weights.b: float is needed, found 'x'."),
        ({"either": [1]}, "either: int | str is needed, found [1]."),
        ({"either": None}, "either: int | str is needed, found null."),
        ({"sizes": ["a"]}, "sizes: int | [int, ...] is needed, found ['a']."),
        ({"more": ["linear", {"slope": 1}]}, "more[1]: a FakeSchedule node {name: …} is needed, found {'slope': 1}."),
        (
            {"more": ["linear", "cosnie"]},
            "more[1].name: no FakeSchedule is called 'cosnie'. Did you mean 'cosine'? Known: cosine, linear.",
        ),
    ],
)
def test_wrong_values_are_named_with_their_key(fake, change, message):
    with pytest.raises(ConfigError) as caught:
        resolve(registry.kinds()["model"], {"name": "fake_flow", **change}, "model")
    assert str(caught.value) == "model." + message


@pytest.mark.parametrize(
    ("name", "given", "got"),
    [
        ("scale", "1e-5", 1e-5),
        ("scale", "400_000", 400_000.0),
        ("scale", 3, 3.0),
        ("count", "400_000", 400_000),
        ("count", 1e5, 100_000),
        ("count", None, None),
        ("count", 10**30, 10**30),
        ("flag", "True", True),
        ("title", 2024, "2024"),
        ("title", "null", "null"),
        ("either", 4, 4),
        ("either", "4", "4"),
        ("sizes", 2, 2),
        ("sizes", [2, 3], [2, 3]),
        ("level", 2, 2),
        ("clip", 1, 1.0),
        ("guide", None, None),
    ],
)
def test_values_are_converted_to_their_annotation(fake, name, given, got):
    out = resolve(registry.kinds()["model"], {"name": "fake_flow", name: given}, "model")[name]
    assert out == got and type(out) is type(got)


def test_renamed_arguments_load_with_a_warning(fake):
    with pytest.warns(FutureWarning, match=r"net\.act is now called net\.activation"):
        got = resolve(fake.FakeNet, {"name": "mlp", "act": "tanh"}, "net")
    assert got["activation"] == "tanh" and "act" not in got
    with pytest.raises(ConfigError, match="'act' is the old name of 'activation'"):
        resolve(fake.FakeNet, {"name": "mlp", "act": "tanh", "activation": "relu"}, "net")


def test_builders_get_the_parents_sizes_and_shapes_travel_down_the_list(fake):
    node = {"name": "fake_flow", "layers": [coupling(), "squeeze", coupling(width=8)], "schedule": "cosine"}
    model = build(registry.kinds()["model"], node, shape=(4,), transform=None)
    first, second, third = model.layers
    assert (first.shape, second.shape, third.shape) == ((4,), (4,), (16,))
    assert first.network.sizes == (2, 23) and third.network.sizes == (8, 23) and third.network.width == 8
    assert isinstance(model.given["schedule"], fake.Cosine)
    assert [type(s) for s in model.given["more"]] == [fake.Linear, fake.Cosine]


def test_lists_become_tuples_and_dictionaries_copies(fake):
    node = resolve(registry.kinds()["model"], {"name": "fake_flow", "sizes": [1, 2]}, "model")
    given = build(registry.kinds()["model"], node, shape=(4,), transform=None).given
    assert given["pairs"] == ((1, 0.5),) and given["sizes"] == (1, 2) and given["layers"] == ()
    given["weights"]["a"] = 9.0
    assert node["weights"] == {"a": 1.0}


def test_a_default_builder_is_the_class(fake):
    given = build(registry.kinds()["model"], "fake_flow", shape=(4,), transform=None).given
    assert isinstance(given["maker"], Builder) and given["maker"].node["name"] == "mlp"
    assert given["maker"](in_features=1, out_features=2).sizes == (1, 2)


def test_sizes_of_the_parent_win_over_the_context(fake):
    builder = Builder(fake.FakeNet, resolve(fake.FakeNet, "mlp", "n"), {"in_features": 1, "out_features": 2})
    assert builder().sizes == (1, 2) and builder(out_features=5).sizes == (1, 5)


def test_a_missing_context_is_named(fake):
    with pytest.raises(ConfigError, match=r"FakeNet 'mlp' must be told in_features, out_features.*provided: shape"):
        build(fake.FakeNet, "mlp", shape=(3,))


def test_build_completes_nodes_of_older_runs(fake):
    assert build(fake.FakeSchedule, {"name": "linear"}).slope == 1.0


def test_methods_are_validated_like_constructors(fake):
    got = validate(fake.Flow.sample, {"solver": "heun", "num_steps": 5}, "sample")
    assert got == {"solver": {"name": "heun", "tolerance": 1e-3}, "num_steps": 5, "guidance": 1.0}
    assert isinstance(values(fake.Flow.sample, got)["solver"], fake.Heun)
    with pytest.raises(
        ConfigError, match=r"sample: Key 'num_step' not in '.*Flow\.sample'\. Did you mean: 'num_steps'"
    ):
        validate(fake.Flow.sample, {"num_step": 5}, "sample")
    with pytest.raises(ConfigError, match="sample: Key 'condition' not in"):  # tensors are no configuration
        validate(fake.Flow.sample, {"condition": 1}, "sample")


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    items: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    many: dict[str, Any] = field(default_factory=lambda: {"a": [1, {"b": None}]})


def test_sections_are_dataclasses():
    got = validate(Outer, {"inner": {"items": [1]}}, "")
    assert got == {"inner": {"rate": 0.1, "items": [1]}, "many": {"a": [1, {"b": None}]}}
    assert values(Outer, got) == {"inner": Inner(0.1, (1,)), "many": {"a": (1, {"b": None})}}
    with pytest.raises(ConfigError, match=r"^inner: Key 'rat' not in 'Inner'\. Did you mean: 'rate'"):
        validate(Outer, {"inner": {"rat": 1}}, "")
    with pytest.raises(
        ConfigError, match=r"^configuration: Key 'x' not in 'Outer'\. \(arguments of Outer: inner, many\)"
    ):
        validate(Outer, {"x": 1}, "")
    with pytest.raises(ConfigError, match=r"^many\.a\[0\]: plain data is needed, found \{1\}\."):
        validate(Outer, {"many": {"a": [{1}]}}, "")


PLAIN_DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN_DATA.filter(lambda data: "${" not in str(data)))
def test_anything_plain_passes_unchanged(data):
    assert schema.convert(dict[str, Any], {"key": data}, "x") == {"key": data}


def refused(base: type, cls: type, name: str = "refused") -> str:
    with pytest.raises(TypeError) as caught:
        register(base, name)(cls)
    return str(caught.value)


@pytest.mark.parametrize("hint", [bytes, list[int], list, tuple, dict, Any, Callable[..., float], Callable[[int], int]])
def test_arguments_that_no_file_can_hold_are_refused(fake, hint):
    class Bad(fake.FakeNet):
        def __init__(self, given) -> None: ...

    Bad.__init__.__annotations__["given"] = hint
    assert "Bad.given" in refused(fake.FakeNet, Bad) and "bad" not in registry.names(fake.FakeNet)


def test_unannotated_misnamed_and_mixed_arguments_are_refused(fake):
    class Bare(fake.FakeNet):
        def __init__(self, width=3) -> None: ...

    class Named(fake.FakeNet):
        def __init__(self, name: str = "x") -> None: ...

    class Only(fake.FakeNet):
        def __init__(self, width: int = 3, /) -> None: ...

    class Mixed(fake.FakeNet):
        def __init__(self, parts: tuple[fake.FakeNet, fake.FakeSchedule]) -> None: ...

    class Either(fake.FakeNet):
        def __init__(self, part: fake.FakeNet | int) -> None: ...

    class Keyed(fake.FakeNet):
        def __init__(self, parts: dict[str, fake.FakeNet]) -> None: ...

    class Astray(fake.FakeNet):
        def __init__(self, width: "NoSuchType") -> None: ...  # noqa: F821

    for cls in (Bare, Named, Only, Mixed, Either, Keyed, Astray):
        assert cls.__qualname__ in refused(fake.FakeNet, cls)


def test_what_the_run_supplies_may_be_of_any_type(fake):
    @register(fake.FakeNet, "free")
    class Free(fake.FakeNet):
        def __init__(self, *, tensors: list[bytes]) -> None: ...

    assert registry.supplied(Free) == ("tensors",) and registry.arguments(Free) == ()


def test_names_and_kinds_are_unique(fake):
    class Twin(fake.FakeNet): ...

    class Stranger: ...

    assert "already taken by" in refused(fake.FakeNet, Twin, "mlp")
    assert "already registered as 'mlp'" in refused(fake.FakeNet, fake.MLP, "other")
    assert "must be a subclass of FakeNet" in re.sub(r"\S*<locals>\.", "", refused(fake.FakeNet, Stranger))
    assert "must be a @kind" in refused(Stranger, Twin)
    with pytest.raises(TypeError, match=r"the kind 'model' exists already: genmodels\.model\.Model"):
        kind(type("Model", (), {}))
    assert register(fake.FakeNet, "mlp")(fake.MLP) is fake.MLP  # a module that is loaded again


def test_a_default_component_must_be_registered(fake):
    class Steep(fake.Linear): ...  # inherits the name of Linear, which would build another class

    class User(fake.FakeNet):
        def __init__(self, schedule: fake.FakeSchedule = Steep()) -> None: ...

    assert "must be a registered component" in refused(fake.FakeNet, User)


def test_a_default_component_must_be_what_its_name_builds(fake):
    """Its arguments would be lost: a configuration keeps the name alone."""

    @register(fake.FakeSchedule, "bent")
    class Bent(fake.FakeSchedule):
        def __init__(self, by: float = 1.0) -> None:
            self.by = by

    class Plain(fake.FakeNet):
        def __init__(self, schedule: fake.FakeSchedule = Bent()) -> None: ...

    class User(fake.FakeNet):
        def __init__(self, schedule: fake.FakeSchedule = Bent(2.0)) -> None: ...

    register(fake.FakeNet, "plain user")(Plain)
    assert "would lose them" in refused(fake.FakeNet, User)


def test_an_argument_of_a_kind_without_members_is_a_node(fake):
    @kind
    class FakeEmpty: ...

    @register(fake.FakeNet, "user")
    class User(fake.FakeNet):
        def __init__(self, part: FakeEmpty) -> None: ...

    with pytest.raises(ConfigError, match=r"net\.part\.name: no FakeEmpty is called 'x'\. Known: none"):
        resolve(fake.FakeNet, {"name": "user", "part": "x"}, "net")


def test_dataclasses_can_be_members(fake):
    @register(fake.FakeNet, "data")
    @dataclass
    class Data(fake.FakeNet):
        width: int = 3
        more: tuple[fake.FakeSchedule, ...] = ()
        table: dict[str, int] = field(default_factory=lambda: {"a": 1})

    got = resolve(fake.FakeNet, {"name": "data", "more": ["linear"]}, "net")
    assert got["table"] == {"a": 1} and build(fake.FakeNet, got).more[0].slope == 1.0


def test_literals_of_config_types_only():
    assert schema.is_config(Literal["a", 1, None]) and not schema.is_config(Literal[b"a"])
