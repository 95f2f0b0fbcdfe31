"""Files, overrides and the resolved configuration: what is merged, what is refused, what stays the same."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels import registry
from genmodels.config import FREE, Config, components_of, diff, dotlist, load, overlay, read
from genmodels.editing.method import EditMethod
from genmodels.hashing import canonical, digest
from genmodels.registry import ConfigError

from .fakes import restored, tree, world


@pytest.fixture(scope="module")
def fake() -> Iterator[SimpleNamespace]:
    with restored():
        yield world()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


FILE = """
data: fake_points
model:
  name: fake_flow
  layers:
    - {name: coupling, network: {name: mlp, width: 16}}
    - squeeze
  guide: {name: mlp, width: 8, activation: tanh}
train: {steps: 100}
"""


@pytest.fixture
def file(fake, tmp_path) -> Path:
    return write(tmp_path / "toys" / "flow.yaml", FILE)


def test_overlay_replaces_a_node_that_changes_its_name(file):
    old = read(file)
    changed = overlay(old, {"model": {"guide": {"name": "tree", "depth": 2}}})
    assert changed["model"]["guide"] == {"name": "tree", "depth": 2}  # neither width nor activation leak
    assert changed["model"]["layers"] == old["model"]["layers"]
    kept = overlay(old, {"model": {"guide": {"name": "mlp", "width": 9}}})
    assert kept["model"]["guide"] == {"name": "mlp", "width": 9, "activation": "tanh"}
    assert old == read(file)


def test_bare_strings_merge_like_nodes():
    assert overlay({"m": {"s": "linear"}}, {"m": {"s": {"slope": 2}}}) == {"m": {"s": {"name": "linear", "slope": 2}}}
    assert overlay({"m": {"s": {"name": "linear", "slope": 2}}}, {"m": {"s": "linear"}})["m"]["s"]["slope"] == 2
    assert overlay({"m": {"s": {"name": "linear", "slope": 2}}}, {"m": {"s": "cosine"}}) == {
        "m": {"s": {"name": "cosine"}}
    }


def test_the_name_of_the_run_replaces_nothing(file):
    assert load([file], ["name=a"]).replace({"name": "b"}).tree["train"]["steps"] == 100
    assert load([file], ["name=a"]).hash == load([file], ["name=b"]).hash
    assert load([file]).name == "toys-flow"


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("model.layers[0].bins=16", ["layers", 0, "bins"], 16),
        ("model.layers[0].network.width=3", ["layers", 0, "network", "width"], 3),
        ("model.layers[0].network=mlp", ["layers", 0, "network", "width"], 16),
        ("model.layers[1]=squeeze", ["layers", 1, "name"], "squeeze"),
        ("model.layers[1].name=squeeze", ["layers", 1, "name"], "squeeze"),
        ("model.layers=[squeeze]", ["layers"], [{"name": "squeeze"}]),
        ("model.guide=null", ["guide"], None),
        ("model.schedule=cosine", ["schedule", "offset"], 0.008),
        ("model.schedule.slope=3", ["schedule"], {"name": "linear", "slope": 3.0}),
        ("model.scale=1e-5", ["scale"], 1e-5),
        ("model.count=400_000", ["count"], 400_000),
        ("model.weights={a: 2, b: 3}", ["weights"], {"a": 2.0, "b": 3.0}),
        ("model.pairs=[[1,2],[3,4e-1]]", ["pairs"], [[1, 2.0], [3, 0.4]]),
        ("model.title='1e3'", ["title"], "1e3"),
        ("model.title='a=b'", ["title"], "a=b"),
    ],
)
def test_overrides(file, override, where, value):
    found = load([file], [override]).tree["model"]
    for key in where:
        found = found[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layers[2].bins=16", r"model\.layers\[2\]: there are only 2 items"),
        ("model.layers[0].network.widht=1", r"model\.layers\[0\]\.network: Key 'widht' .* Did you mean: 'width'\?"),
        ("model.layers[0].name=squeez", r"model\.layers\[0\]\.name: .* Did you mean 'squeeze'\?"),
        ("model.guide=[mlp]", r"model\.guide: a FakeNet node"),
        ("trian.steps=1", r"configuration: Key 'trian' .* Did you mean: 'train'\?"),
        ("train.step=1", r"train: Key 'step' .* Did you mean: 'steps'\?"),
        ("train.optimizer.name=adm", r"train\.optimizer\.name: .* Did you mean 'adam'\?"),
        ("train.precision=fp16", r"train\.precision: one of 'float32' \| 'bf16' is needed, found 'fp16'"),
        ("train.keep=1", r"train\.keep: must be at least 2, found 1"),
        ("train.save_every=-1", r"train\.save_every: must be at least 0"),
        ("train.clip=0", r"train\.clip: must be above 0, or null"),
        ("train=null", r"train: a mapping .* is needed, found null"),
        ("model=null", r"model: a Model node .* is needed, found null"),
        ("data=null", r"data: a Dataset node .* is needed, found null"),
        ("seed=1.5", r"seed: int is needed, found 1\.5"),
        ("sample.num_step=3", r"sample: Key 'num_step' .* Did you mean: 'num_steps'\?"),
        ("likelihood.draws=3", r"likelihood: model 'fake_flow' has no such method"),
        ("model.title=${model.gone}", r"model\.title: Interpolation key 'model\.gone' not found"),
        ("model.title=${train.batch_size}", r"Interpolation key 'train\.batch_size' not found \(it must be in a file"),
        ("train.steps=[1,2", r"override 'train\.steps=\[1,2':"),
        ("model.title=!!python/object/apply:os.system [ls]", r"override .*could not determine a constructor"),
        ("train.steps", r"'train\.steps' is neither a configuration file nor an override key=value"),
        ("_target_=os.system", r"configuration: Key '_target_' not in"),
    ],
)
def test_bad_overrides_are_named(file, override, message):
    with pytest.raises(ConfigError, match=message):
        load([file], [override])


def test_later_overrides_win_and_combine():
    got = dotlist(["a.b=1", "a.c[0].d=2", "a.b=3", "a.c[1]=x"])
    assert got == {"a": {"b": 3, "c": {"0": {"d": 2}, "1": "x"}}}
    assert dotlist(["a=[1,2]", "a[1]=5"]) == {"a": [1, 5]}


def test_bases_chain_and_later_files_win(fake, tmp_path):
    write(tmp_path / "a.yaml", "data: fake_points\ntrain: {steps: 1, batch_size: 1, keep: 4}\n")
    write(tmp_path / "sub" / "b.yaml", "base: ../a.yaml\ntrain: {steps: 2, batch_size: 2}\n")
    write(tmp_path / "sub" / "c.yaml", "model: {name: fake_flow, scale: 5}\n")
    write(tmp_path / "d.yaml", "base: [sub/b.yaml, sub/c.yaml]\ntrain: {steps: 3}\n")
    later = write(tmp_path / "e.yaml", "model: {scale: 7}\n")
    got = load([tmp_path / "d.yaml", later], ["model.count=2"])
    assert (got.train.keep, got.train.batch_size, got.train.steps) == (4, 2, 3)
    assert (got.tree["model"]["scale"], got.tree["model"]["count"]) == (7.0, 2)
    assert "base" not in got.tree and load(tmp_path / "d.yaml").tree["model"]["scale"] == 5.0


def test_missing_and_circular_bases_are_named(tmp_path):
    first = write(tmp_path / "first.yaml", "base: [second.yaml]")
    second = write(tmp_path / "second.yaml", "base: [secnd.yaml]")
    with pytest.raises(ConfigError) as caught:
        read(first)
    missing = tmp_path / "secnd.yaml"
    assert str(caught.value) == f"{missing}: there is no such file (named by {second}). Did you mean 'second.yaml'?"
    second.write_text("base: [first.yaml]")
    with pytest.raises(ConfigError, match=rf"base: {first} -> {second} -> {first} is a circle"):
        read(first)
    first.write_text("base: [second.yaml]")
    second.write_text("base: [1, [2]]")
    with pytest.raises(ConfigError, match=r"second\.yaml: base\[1\]: str is needed"):
        read(first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not readable as YAML"),
        ("a: 1\na: 2", "duplicate key"),
        ("- a\n- b", "a mapping is needed at the top level, found list"),
        ("a: !!python/object/apply:os.system [ls]", "not readable as YAML"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"(?s)broken\.yaml: .*{message}") as caught:
        read(write(tmp_path / "broken.yaml", text))
    assert "line " in str(caught.value) or "top level" in str(caught.value)


def test_interpolations_are_resolved_before_saving(fake, tmp_path):
    model = "model: {name: fake_flow, count: '${train.steps}', title: 'n=${train.steps}'}"
    file = write(tmp_path / "i.yaml", f"data: fake_points\n{model}\ntrain: {{steps: 7}}")
    got = load([file], ["train.steps=9"])
    assert (got.tree["model"]["count"], got.tree["model"]["title"]) == (9, "n=9")
    got.save(tmp_path / "saved.yaml")
    assert "${" not in (tmp_path / "saved.yaml").read_text()


def test_sections_are_typed_objects(fake):
    got = Config(tree(train={"optimizer": {"lr": "1e-4"}, "ema": ["constant", {"name": "constant", "value": 0.5}]}))
    assert got.train.optimizer.lr == 1e-4 and [e.value for e in got.train.ema] == [0.999, 0.5]
    assert got.dataset().count == 10
    model = got.model(got.dataset().facts())
    assert model.given["shape"] == (4,) and type(model.given["transform"]).__name__ == "Identity"


def test_the_sample_section_is_the_keywords_of_the_method(fake):
    got = Config(tree(sample={"num_steps": 5}))
    assert got.tree["sample"] == {"solver": {"name": "euler"}, "num_steps": 5, "guidance": 1.0}
    options = got.options("sample", {"solver": "heun", "guidance": 2})
    assert options["num_steps"] == 5 and options["guidance"] == 2.0 and options["solver"].tolerance == 1e-3
    assert got.answer("sample", {"solver": {"name": "heun"}})["solver"] == {"name": "heun", "tolerance": 1e-3}
    assert got.options("predict") == {} and got.answer("predict") == {}
    with pytest.raises(ConfigError, match="predict: model 'fake_flow' has no such method"):
        got.answer("predict", {"steps": 1})


def test_outside_code_is_registered_by_imports(fake, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write(
        tmp_path / "my_lab_fakes" / "models.py",
        "from genmodels.registry import kinds, register\nbase = kinds()['fake_schedule']\n"
        "@register(base, 'mine')\nclass Mine(base):\n    'Ours.'\n    def __init__(self, knob: int = 3) -> None: ...\n",
    )
    write(tmp_path / "my_lab_fakes" / "broken.py", "import math\nmath.nothing")
    model = {"name": "fake_flow", "schedule": "my_lab_fakes.models.Mine"}
    with pytest.raises(ConfigError, match=r"after `imports: \[my_lab_fakes\.models\]` in the configuration"):
        Config(tree(model=model))
    with pytest.raises(ConfigError, match="no FakeSchedule is called 'mine'"):
        Config(tree(model={**model, "schedule": "mine"}))
    got = Config(tree(model={**model, "schedule": "mine"}, imports=["my_lab_fakes.models"]))
    assert got.tree["model"]["schedule"] == {"name": "mine", "knob": 3} and got.tree["imports"] == [
        "my_lab_fakes.models"
    ]
    for modules, message in [
        (["my_lab_fakes.gone"], r"cannot import 'my_lab_fakes\.gone': ModuleNotFoundError.*PYTHONPATH"),
        (["my_lab_fakes.broken"], r"cannot import 'my_lab_fakes\.broken': AttributeError: module 'math' has no"),
        ("my_lab_fakes", r"imports: a list \[str, \.\.\.\] is needed, found 'my_lab_fakes'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Config(tree(imports=modules))


def test_hash_does_not_depend_on_order_or_name(fake):
    nested = {"name": "fake_flow", "scale": 2, "weights": {"b": 1, "a": 2}}
    one = Config({"data": "fake_points", "model": nested, "seed": 3, "name": "one"})
    turned = {"weights": {"a": 2, "b": 1}, "scale": 2.0, "name": "fake_flow"}
    two = Config({"name": "two", "seed": 3, "model": turned, "data": {"name": "fake_points"}})
    assert one.hash == two.hash and len(one.hash) == 12
    assert len({one.hash, one.replace({"seed": 4}).hash, one.replace({"model": {"scale": 3}}).hash}) == 3


def test_how_a_run_edits_is_no_part_of_its_identity():
    root = Path(__file__).parents[2]
    config = load([root / "configs/digits/flow_matching.yaml"])
    stored = {key: value for key, value in config.tree.items() if key != "edit"}  # as runs were before they could edit
    core = {key: {k: v for k, v in part.items() if f"{key}.{k}" not in FREE} if isinstance(part, dict) else part
            for key, part in stored.items() if key != "name"}  # fmt: skip
    old, other = Config(stored), config.replace({"edit": {"guidance": 3.0, "method": {"num_steps": 7}}})
    assert old.hash == config.hash == other.hash == digest(core)
    assert old.tree["edit"] == config.tree["edit"] and diff(old.core, other.core) == []
    assert other.options("edit")["method"].num_steps == 7 and other.options("edit")["guidance"] == 3
    assert {cls for _, cls in components_of(other.tree)} == {cls for _, cls in components_of(config.tree)}
    assert not any(base is EditMethod for base, _ in components_of(other.tree))
    for wrong, message in (
        ({"guidanc": 1}, "edit: Key 'guidanc' .* Did you mean: 'guidance'"),
        ({"method": "vanila"}, r"edit\.method\.name: no EditMethod is called 'vanila'.*'vanilla'"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.replace({"edit": wrong})


def test_a_model_that_cannot_edit_has_no_such_options(fake):
    assert Config(tree()).tree["edit"] == {}
    with pytest.raises(ConfigError, match="edit: model 'fake_flow' has no such method to configure"):
        Config(tree(edit={"guidance": 2.0}))


def test_hash_is_the_same_in_every_process(fake):
    code = (
        "from tests.unit.fakes import tree, world; from genmodels.config import Config; world(); "
        "print(Config(tree(model={'name': 'fake_flow', 'weights': {'b': 1, 'a': 1e-5}}, seed=3)).hash)"
    )
    here = Config(tree(model={"name": "fake_flow", "weights": {"b": 1, "a": 1e-5}}, seed=3)).hash
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    root = Path(__file__).parents[2]
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
    )
    assert there.stdout.strip() == here, there.stderr


def test_digest_is_pinned():
    plain = {"b": [1, 2.5, None, True], "a": {"ü": 1e-5}}
    assert canonical(plain) == '{"a":{"ü":1e-05},"b":[1,2.5,null,true]}'
    assert digest(plain) == "f1c271803f45"
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})


def test_diff_lists_exactly_what_changed(fake):
    old = Config(tree(model={"name": "fake_flow", "layers": ["squeeze", {"name": "coupling", "network": "mlp"}]}))
    assert diff(old.tree, old.tree) == []
    new = old.replace({"seed": 4, "model": {"layers": {"1": {"network": {"width": 3}}}, "count": 2}})
    assert diff(old.tree, new.tree) == [
        "model.count: null -> 2",
        "model.layers[1].network.width: 64 -> 3",
        "seed: 0 -> 4",
    ]
    assert diff({"a": None, "b": 1, "c": True}, {"b": 1.0, "c": 1}) == [
        "a: null -> (absent)",
        "b: 1 -> 1.0",
        "c: true -> 1",
    ]
    assert diff({"a": [1, 2]}, {"a": [1, 2, 3]}) == ["a: [1,2] -> [1,2,3]"]


AWKWARD = [
    "1e3",
    "null",
    "on",
    "~",
    "",
    "???",
    "=",
    "0x1f",
    "1:30",
    "2024-01-01",
    "1_000",
    "é ü 漢",
    "a: b",
    "- x",
    " y ",
]
TEXT = (st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)).filter(
    lambda text: "${" not in text and text != "???"
)
FLOATS = st.sampled_from([1e-5, 0.1, 1e16, -0.0, 5e-324, 1.7976931348623157e308]) | st.floats(
    allow_nan=False, allow_infinity=False
)
COUNTS = st.integers(-(2**70), 2**70)
NETWORKS = st.sampled_from(["mlp"]) | st.fixed_dictionaries(
    {"name": st.just("mlp")},
    optional={"width": COUNTS, "activation": st.sampled_from(["relu", "tanh"]), "dropout": FLOATS},
)
LAYERS = st.just("squeeze") | st.builds(lambda n, b: {"name": "coupling", "network": n, "bins": b}, NETWORKS, COUNTS)
SCHEDULES = st.sampled_from(["linear", "cosine"]) | st.builds(
    lambda s: {"name": "linear", "slope": s}, FLOATS | COUNTS.map(float)
)
MODELS = st.fixed_dictionaries(
    {"name": st.just("fake_flow")},
    optional={
        "layers": st.lists(LAYERS, max_size=3),
        "schedule": SCHEDULES,
        "more": st.lists(SCHEDULES, max_size=2).map(tuple),
        "guide": st.none() | NETWORKS,
        "flag": st.booleans(),
        "count": st.none() | COUNTS,
        "scale": FLOATS,
        "title": TEXT,
        "level": st.sampled_from([1, 2, 3]),
        "pairs": st.lists(st.tuples(COUNTS, FLOATS), max_size=2),
        "weights": st.dictionaries(TEXT, FLOATS, max_size=3),
        "either": COUNTS | TEXT,
        "sizes": COUNTS | st.lists(COUNTS, max_size=3),
        "clip": st.none() | FLOATS,
    },
)


@settings(max_examples=60, deadline=None)
@given(MODELS, TEXT, COUNTS)
def test_a_saved_configuration_loads_to_the_same_hash(fake, model, path, seed):
    config = Config(tree(model=model, data={"name": "fake_points", "path": path}, seed=seed, name="x"))
    again = Config(config.tree)
    assert again.tree == config.tree and canonical(again.tree) == canonical(config.tree)
    with tempfile.TemporaryDirectory() as folder:
        config.save(Path(folder) / "config.yaml")
        loaded = load([Path(folder) / "config.yaml"])
    assert diff(config.tree, loaded.tree) == [] and loaded.hash == config.hash and loaded.name == "x"


@settings(max_examples=60, deadline=None)
@given(MODELS, MODELS)
def test_diff_is_empty_exactly_if_hashes_agree(fake, one, two):
    a, b = Config(tree(model=one)), Config(tree(model=two))
    assert (diff(a.tree, b.tree) == []) == (a.hash == b.hash)


@settings(max_examples=60, deadline=None)
@given(MODELS, MODELS)
def test_overlaying_a_whole_configuration_gives_that_configuration(fake, one, two):
    base = registry.kinds()["model"]
    old, new = (registry.resolve(base, model, "model") for model in (one, two))
    got = registry.resolve(base, overlay({"model": old}, {"model": new})["model"], "model")
    assert {**got, "weights": 0} == {**new, "weights": 0}  # all but dictionaries, which merge
    assert got["weights"].items() >= new["weights"].items()


def test_nothing_of_the_callers_tree_is_changed(fake):
    given_tree: dict[str, Any] = tree(model={"name": "fake_flow", "layers": ["squeeze"], "weights": {"b": 1}})
    before = canonical(given_tree)
    config = Config(given_tree)
    config.replace({"model": {"layers": {"0": "squeeze"}, "weights": {"c": 2}}})
    config.tree["model"]["weights"]["z"] = 1.0
    assert canonical(given_tree) == before


def test_what_is_left_to_the_user_may_be_blank_to_look_at():
    path = Path(__file__).parents[2] / "configs/cifar10/edm.yaml"
    with pytest.raises(ConfigError, match=r"data\.path: must be given"):
        load([path])
    assert load([path], blank=True).tree["data"]["path"] == ""
    assert load([path], ["data.path=x"], blank=True).tree["data"]["path"] == "x"


def test_snapshots_need_averages_that_can_be_combined():
    power = [{"name": "power", "std": 0.05}]
    for ema, fine in (([], False), ([{"name": "constant"}], False), (power, True)):
        changes = {"train": {"snapshot_every": 5, "ema": ema}}
        with contextlib.nullcontext() if fine else pytest.raises(ConfigError, match=r"train\.snapshot_every: .*power"):
            Config(tree(**changes))
