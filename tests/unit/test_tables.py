"""Tables: what is written is read back, rows are split as stated, and every fault is named with its place."""

import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from genmodels.config import load
from genmodels.data.dataset import Dataset
from genmodels.data.tabular import Table
from genmodels.data.text_table import TextTable
from genmodels.registry import ConfigError, build, resolve

ROOT = Path(__file__).resolve().parents[2]
ROWS = np.arange(60.0).reshape(20, 3) / 4
WHOLE = {"val": 0, "test": 0}
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def table(path, **arguments) -> Table:
    return build(Dataset, resolve(Dataset, {"name": "table", "path": str(path), **arguments}, "data"))


def write(folder, content, name="t.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save(folder, name="t.npy", **named):
    """Arrays in the format of a suffix; a .npy file has one."""
    path = folder / name
    if path.suffix == ".npy":
        np.save(path, *named.values(), allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, **named)
    else:
        with h5py.File(path, "w") as file:
            for key, value in named.items():
                file[key] = value
    return path


def text(rows, header="", separator=",") -> str:
    lines = [separator.join(map(repr, row)) for row in np.asarray(rows).tolist()]
    return "\n".join([header] * bool(header) + lines) + "\n"


def values(dataset: Table, split="train") -> np.ndarray:
    return dataset.all(split).x.numpy()


# ---- what is written is read back ----

finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
tables = arrays.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 5)), elements=finite32)


@FEW
@given(x=tables, name=st.sampled_from(["t.npy", "t.npz", "t.h5", "t.csv", "t.tsv", "t.txt"]), header=st.booleans())
def test_any_finite_table_is_read_back_in_its_order(tmp_path, x, name, header):
    if name[-3:] in ("csv", "tsv", "txt"):
        separator = {"csv": ",", "tsv": "\t", "txt": " "}[name[-3:]]
        names = separator.join(f"c{k}" for k in range(x.shape[1])) if header else ""
        path = write(tmp_path, text(x, names, separator), name)
    else:
        path = save(tmp_path, name, x=x)
    found = values(table(path, order="file", **WHOLE))
    assert found.dtype == np.float32 and np.array_equal(found, x)


@FEW
@given(x=arrays.arrays(np.float64, (3, 2), elements=st.floats(-1e30, 1e30)))
def test_numbers_are_parsed_as_float64(tmp_path, x):
    assert np.array_equal(TextTable(write(tmp_path, text(x))).read([0, 1]), x)


SPELLINGS = {
    "quoted": '"1.5","-2"\r\n"3","4e2"\r\n',
    "quoted after a space": ' "1.5", "-2" \n3 , "4e2"\n',
    "byte order mark": "\ufeff1.5,-2\n3,4e2\n",
    "byte order mark and header": '\ufeff"a",b\r\n1.5,-2\r\n3,4e2',
    "blank lines": "\n\na,b\n\n1.5,-2\n   \n3,400\n\n\n",
    "exponents and signs": "+1.5e0,-.2E+1\n30e-1,400.\n",
    "old line ends": "a,b\r1.5,-2\r3,400\r",
    "numpy.savetxt": "# a,b\n1.5e+00,-2.0e+00\n3.0e+00,4.0e+02\n",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_numbers_may_be_spelled_in_many_ways(tmp_path, spelling):
    found = table(write(tmp_path, SPELLINGS[spelling]), order="file", **WHOLE)
    assert values(found).tolist() == [[1.5, -2], [3, 400]]


def test_spaces_and_tabs_separate_the_columns_of_a_txt_file(tmp_path):
    path = write(tmp_path, "# a b\n  1  2 \n3\t4\n\n5 6", "t.txt")
    assert values(table(path, columns=["b"], order="file", **WHOLE)).tolist() == [[2], [4], [6]]


def test_the_delimiter_and_the_header_can_be_stated(tmp_path):
    path = write(tmp_path, "1;2\n3;4\n")
    assert values(table(path, delimiter=";", order="file", **WHOLE)).tolist() == [[1, 2], [3, 4]]
    named = table(path, delimiter=";", header=True, columns=["2"], **WHOLE)  # years, say
    assert values(named).tolist() == [[4]]
    assert len(values(table(write(tmp_path, "a\n1\n2\n"), order="file", **WHOLE))) == 2


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2", "<i2", "u1", "?"])
def test_arrays_of_any_number_type_and_order_are_read(tmp_path, dtype, order):
    x = np.array(ROWS.round() % 2, dtype=dtype, order=order)
    assert np.array_equal(values(table(save(tmp_path, x=x), order="file", **WHOLE)), x.astype(np.float32))


# ---- columns ----


def test_columns_are_chosen_by_name_or_place_in_that_order(tmp_path):
    path = write(tmp_path, text(ROWS, "a,b,c"))
    assert np.array_equal(values(table(path, columns=["c", 0], order="file", **WHOLE)), ROWS[:, [2, 0]])
    path = save(tmp_path, x=ROWS)
    assert np.array_equal(values(table(path, columns=[1], order="file", **WHOLE)), ROWS[:, [1]])


LABELLED = "id,a,b,kind\n" + "".join(f'"x, {i}",{i},{i / 2},{i % 3}\n' for i in range(12))


def test_columns_that_are_left_out_may_hold_text_with_delimiters(tmp_path):
    for spelled in (LABELLED, LABELLED.replace(',"', ', "').replace('\n"', '\n "')):
        found = values(table(write(tmp_path, spelled), columns=["b", "a"], order="file", **WHOLE))
        assert np.array_equal(found, np.c_[np.arange(12) / 2, np.arange(12)])


@pytest.mark.parametrize(("role", "fact"), [("condition", "condition_shape"), ("target", "target_shape")])
def test_real_columns_aside_are_vectors(tmp_path, role, fact):
    path = write(tmp_path, text(ROWS, "a,b,c"))
    one, two = table(path, order="file", **{role: "b"}), table(path, order="file", **{role: ["c", "a"]})
    assert one.shape == (2,) and getattr(one, fact) == (1,) and one.num_classes is None
    assert np.array_equal(values(one), ROWS[:17][:, [0, 2]])
    assert two.shape == (1,) and getattr(two, fact) == (2,)
    assert np.array_equal(getattr(two.all("train"), role), ROWS[:17][:, [2, 0]])
    assert two.facts()[fact] == [2]


def test_labels_stay_with_their_rows(tmp_path):
    path = write(tmp_path, LABELLED)
    asked = {"columns": ["a", "b"], "classes": 3}
    generate, classify = table(path, condition="kind", **asked), table(path, target=3, **asked)
    assert (generate.num_classes, generate.condition_shape, generate.target_shape) == (3, None, None)
    assert (classify.num_classes, classify.condition_shape, classify.target_shape) == (None, None, (3,))
    for split in ("train", "val", "test"):
        labels = generate.all(split).condition
        assert labels.dtype == torch.int64 and torch.equal(labels, generate.all(split).x[:, 0].long() % 3)
        assert torch.equal(classify.all(split).target, labels) and classify.all(split).condition is None


# ---- splits ----


def test_the_default_cuts_a_tenth_from_the_end_of_the_file(tmp_path):
    dataset = table(save(tmp_path, x=np.arange(1000.0)[:, None]), order="file")
    for split, rows in (("train", range(810)), ("val", range(810, 900)), ("test", range(900, 1000))):
        assert values(dataset, split).ravel().tolist() == list(rows)


def test_the_shuffle_is_random_fixed_and_of_the_seed(tmp_path):
    path = save(tmp_path, x=np.arange(1000.0)[:, None])
    test = values(table(path), "test")
    assert np.array_equal(values(table(path), "test"), test) and not np.array_equal(
        values(table(path, seed=1), "test"), test
    )
    # 100 of 0 … 999 without replacement: mean 499.5, standard deviation of the mean 27.4; four of them
    assert abs(test.mean() - 499.5) < 110 and not np.array_equal(np.sort(test.ravel()), test.ravel())


def test_counts_of_rows_are_taken_as_such(tmp_path):
    dataset = table(save(tmp_path, x=ROWS), val=3, test=5)
    assert [dataset.size(split) for split in ("train", "val", "test")] == [12, 3, 5]


@pytest.mark.parametrize("name", ["t.npz", "t.h5", "t.hdf5"])
def test_a_file_may_hold_its_splits(tmp_path, name):
    """As BSDS300 is distributed: three data sets of one HDF5 file."""
    parts = {"train": ROWS, "validation": ROWS[:3] + 100, "test": ROWS[:5] - 100}
    dataset = table(save(tmp_path, name, **parts))
    for split, key in (("train", "train"), ("val", "validation"), ("test", "test")):
        assert np.array_equal(values(dataset, split), parts[key])
    dataset = table(save(tmp_path, name, train=ROWS, test=ROWS[:5] - 100), order="file")  # the missing one is cut
    assert np.array_equal(values(dataset, "train"), ROWS[:18]) and np.array_equal(values(dataset, "val"), ROWS[18:])
    assert np.array_equal(
        values(table(save(tmp_path, name, x=ROWS, train=ROWS * 2), array="x", **WHOLE, order="file")), ROWS
    )
    if name != "t.npz":
        path = save(tmp_path, name, **{"group/x": ROWS, "y": ROWS})
        assert np.array_equal(values(table(path, array="group/x", **WHOLE, order="file")), ROWS)


def test_splits_may_be_files_of_their_own(tmp_path):
    train, test = write(tmp_path, text(ROWS, "a,b,c")), write(tmp_path, text(ROWS[:4, [2, 0]] + 1, "c,a"), "test.csv")
    dataset = table(train, test_path=str(test), columns=["a", "c"], order="file", val=2)
    assert np.array_equal(values(dataset, "train"), ROWS[:18, [0, 2]])
    assert np.array_equal(values(dataset, "val"), ROWS[18:, [0, 2]])
    assert np.array_equal(values(dataset, "test"), ROWS[:4, [0, 2]] + 1)


def test_the_fingerprint_is_of_the_numbers_and_their_splits(tmp_path):
    first = table(write(tmp_path, text(ROWS, "a,b,c")))
    assert table(save(tmp_path, "t.h5", x=ROWS)).fingerprint() == first.fingerprint()
    nudged = np.nextafter(ROWS.astype(np.float32), 1000)
    nudged[:-1] = ROWS[:-1]
    others = [
        table(save(tmp_path, x=nudged)),
        table(write(tmp_path, text(ROWS)), seed=1),
        table(write(tmp_path, text(ROWS)), test=3),
        table(write(tmp_path, text(ROWS)), columns=[0, 2, 1]),
        table(write(tmp_path, text(ROWS)), condition=2),
        table(write(tmp_path, text(ROWS)), target=2),
    ]
    assert len({first.fingerprint(), *(other.fingerprint() for other in others)}) == 7


# ---- errors ----

LONG = text(ROWS, "age,b,c")  # the row of 5.25, 5.5 and 5.75 is line 9
FAULTS = {
    "text": (LONG.replace("5.25,", "n/a,"), {}, r"t\.csv, line 9, column 'age': 'n/a' is no number\. Correct it"),
    "underscore": (LONG.replace("5.25,", "5_25,"), {}, r"line 9, column 'age': '5_25' is no number"),
    "text, no header": (LONG[8:].replace("5.5,", "x,"), {}, r"line 8, column 1 \(counted from 0\): 'x' is no number"),
    "after a line break in quotes": ('id,a\n"x\ny",1\nz,?\n', {"columns": ["a"]}, r"line 4, column 'a': '\?' is no"),
    "NaN, spaced": ('a,b\n1, "NaN"\n', {}, r"line 2, column 'b': found nan \(1 of 1 rows holds"),
    "header too long": ("a,b,c\n1,2\n3,4\n", {}, r"line 2 has 2 fields, but the header has 3"),
    "after a blank line": ("\n" + LONG.replace("5.25,", "n/a,"), {}, r"line 10, column 'age'"),
    "chosen column": (LONG.replace("5.75", "?"), {"columns": ["c"]}, r"line 9, column 'c': '\?' is no number"),
    "decimal comma": ("a;b\n1,5;2\n", {"delimiter": ";"}, r"line 2, column 'a': '1,5' is no number\. Write decimals"),
    "thousands": ('a,b\n"1,000",2\n', {}, r"'1,000' is no number\..*thousands without a comma"),
    "European": ("a;b\n0,12;1,5\n2,5;3\n", {}, r"line 2 has 3 fields, but .* Set data\.delimiter if ';' separates"),
    "a remark first": ("# made by lab\na,b\n1,2\n", {}, r"line 2 has 2 .* \('made by lab'\) is a remark and no header"),
    "missing": (LONG.replace("5.5,", ","), {}, r"line 9, column 'b': the value is missing\. Fill it in"),
    "short": (LONG.replace("5.5,", ""), {}, r"line 9 has 2 fields, but the header has 3\. Correct the line"),
    "long": (LONG.replace("5.5,", "5.5,5.5,"), {}, r"line 9 has 4 fields, but the header has 3"),
    "long, left out": (LONG.replace("5.5,", "5.5,5.5,"), {"columns": [0]}, r"line 9 has 4 fields"),
    "short txt": ("1 2\n3\n", {"name": "t.txt"}, r"t\.txt, line 2 has 1 field, but the first line has 2"),
    "nan": (LONG.replace("5.5,", "nan,").replace("9.0,", "-inf,"), {}, r"line 9, column 'b': found nan \(2 of 20 rows"),
    "infinity": (LONG.replace("9.0,", "-inf,"), {}, r"line 14, column 'age': found -inf \(1 of 20 rows holds"),
    "too large": (LONG.replace("9.0,", "1e39,"), {}, r"line 14, .* found 1e\+39, beyond the range of float32"),
    "empty": ("", {}, r"t\.csv is empty: it has 0 bytes"),
    "blank": (" \n\n", {}, r"t\.csv is empty: it has 3 bytes and no line with a number"),
    "only a header": ("\na,b\n", {}, r"is empty: line 2 is its header, and no row follows"),
    "header or row": ("1,b\n2,3\n", {}, r"line 1 holds the number 1 and the text 'b'.*Say data\.header=true or"),
    "semicolons": (LONG.replace(",", ";"), {}, r"line 2, column 'age;b;c'.*Set data\.delimiter if ';' separates"),
    "not UTF-8": ("°C,b\n1,2\n".encode("latin-1"), {}, r"not UTF-8 text \(.* at byte 0\)\. Save it as UTF-8"),
    "open quotation": ('a,b\n1,2\n3,"4\n' + "5,6\n" * 50_000, {}, r"line 3: .*a quotation mark that is not closed"),
    "delimiter": (LONG, {"delimiter": "::"}, r"data\.delimiter: one character that stands in no number.*'::'"),
    "column": (LONG, {"columns": ["aged"]}, r"data\.columns: .*no column 'aged'\. Did you mean 'age'\? It has: age, b"),
    "place": (LONG, {"columns": [3]}, r"data\.columns: .*no column 3; it has 3, 0 … 2"),
    "nameless": (LONG[8:], {"target": "age"}, r"data\.target: .*gives its columns no names, so 'age' must be a place"),
    "name twice": ("a,a\n1,2\n", {"columns": ["a"]}, r"has 2 columns 'a'; give the place, one of \[0, 1\]"),
    "asked twice": (LONG, {"columns": ["b", 1]}, r"column 'b' .* asked for twice"),
    "both parts": (LONG, {"columns": ["b"], "target": "b"}, r"column 'b' .* asked for twice"),
    "none left": ("a\n1\n2\n", {"condition": "a"}, r"no column of .* is left to model"),
    "two roles": (LONG, {"condition": "a", "target": "b"}, r"`condition` and `target` are both given"),
    "label": ("a,y\n1,0\n2,3\n4,2\n", {"condition": "y", "classes": 3}, r"line 3, column 'y': 3 is no label.*0 … 2"),
    "real label": ("a,y\n1,0.5\n", {"condition": "y", "classes": 3}, r"line 2, column 'y': 0\.5 is no label"),
    "negative label": ("a,y\n1,-1\n", {"target": "y", "classes": 3}, r"line 2, column 'y': -1 is no label"),
    "classes of nothing": (LONG, {"classes": 3}, r"data\.classes: .*with one column.*3 classes and 0 columns"),
    "nothing left": (LONG, {"val": 15, "test": 5}, r"of 20 items, val=15 takes 15 and test=5 takes 5: none is left"),
    "half a row": (LONG, {"val": 1.5}, r"val must be a share below 1 .* found 1\.5"),
    "negative": (LONG, {"test": -0.1}, r"test must be a share below 1 .* found -0\.1"),
    "kind": (LONG, {"name": "t.parquet"}, r"a file of kind '\.parquet'; a table is read from \.npy, \.npz"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_text_is_named_with_its_place(tmp_path, fault):
    content, arguments, message = FAULTS[fault]
    path = write(tmp_path, content, arguments.get("name", "t.csv"))
    with pytest.raises(ConfigError, match=message):
        table(path, **{k: v for k, v in arguments.items() if k != "name"})


def bad_rows():
    x = ROWS.copy()
    x[4, 1], x[5] = np.nan, np.inf
    return x


ARRAY_FAULTS = {
    "objects": ({"x": np.array([[1, None]], dtype=object)}, r"holds Python objects \(reading them could run code\)"),
    "complex": ({"x": ROWS + 0j}, r"holds values of type complex128, not numbers"),
    "one axis": ({"x": ROWS[:, 0]}, r"has shape \[20\]; a table needs \[N, D\].* save x\.reshape\(-1, 1\)"),
    "three axes": ({"x": ROWS.reshape(5, 4, 3)}, r"has shape \[5, 4, 3\]; a table needs \[N, D\].*`data: array`"),
    "no rows": ({"x": ROWS[:0]}, r"is empty: its .*shape .*\[0, 3\]"),
    "no axis": ({"x": np.float64(3)}, r"has shape \[\]; a table needs"),
    "nan": ({"x": bad_rows()}, r"row 4, column 1 \(counted from 0\): found nan \(2 of 20 rows hold"),
}


@pytest.mark.parametrize("name", ["t.npy", "t.npz", "t.h5"])
@pytest.mark.parametrize("fault", ARRAY_FAULTS)
def test_a_fault_in_an_array_is_named_with_its_place(tmp_path, fault, name):
    named, message = ARRAY_FAULTS[fault]
    if fault == "objects" and name == "t.h5":
        named = {"x": np.array([["a", "b"]], dtype=object)}
    with pytest.raises(ConfigError, match=rf"{name}.*{message}"):
        table(save(tmp_path, name, **named))


TRUNCATED = {"t.npy": "takes 608 bytes, but it has 548", "t.npz": "may be truncated", "t.h5": "may be truncated"}


@pytest.mark.parametrize(("name", "expected"), TRUNCATED.items())
def test_a_truncated_file_is_said_to_be(tmp_path, name, expected):
    path = save(tmp_path, name, x=ROWS)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ConfigError, match=rf"{name} is .*{expected}"):
        table(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"{name} is "):
        table(path)


def test_a_damaged_archive_is_said_to_be(tmp_path):
    path = save(tmp_path, "t.npz", x=ROWS)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("x.npy").header_offset + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.npz is not readable as an \.npz archive: Bad CRC-32"):
        table(path)


@pytest.mark.filterwarnings("error")
def test_numbers_that_float32_holds_coarsely_are_warned_of(tmp_path):
    """Seconds since 1970 lie 128 apart; the same numbers from their first on, and a constant one, are fine."""
    seconds = 1.7e9 + np.arange(300.0)
    rows = np.c_[seconds, seconds - 1.7e9, np.full(300, 1.7e9)]
    with pytest.warns(UserWarning, match=r"column 0 .*lie 128 apart, and their spread is 86\.6\. Subtract an offset"):
        table(save(tmp_path, t=rows))
    table(save(tmp_path, t=rows[:, 1:]))


@pytest.mark.parametrize("name", ["t.npz", "t.h5"])
def test_an_array_must_be_chosen_among_several(tmp_path, name):
    path = save(tmp_path, name, rows=ROWS, more=ROWS[:2])
    with pytest.raises(ConfigError, match=r"holds 2 arrays: .*'rows' \[20, 3\].*Choose one with data\.array"):
        table(path)
    with pytest.raises(ConfigError, match=r"no array is called 'row'\. Did you mean 'rows'\?"):
        table(path, array="row")
    with pytest.raises(ConfigError, match=r"is empty: it holds no array"):
        table(save(tmp_path, name))


def test_the_extra_that_reads_hdf5_is_named(tmp_path, monkeypatch):
    path = save(tmp_path, "t.h5", x=ROWS)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"h5py is needed .*pip install 'genmodels\[data\]'"):
        table(path)


def test_a_missing_file_is_named_with_its_neighbour(tmp_path):
    path = write(tmp_path, LONG)
    with pytest.raises(
        ConfigError, match=r"data\.path: there is no file .*u\.csv' \(looked in .*\)\. Did you mean 't\.csv'"
    ):
        table(tmp_path / "u.csv")
    with pytest.raises(ConfigError, match=r"data\.val_path: there is no file"):
        table(path, val_path=str(tmp_path / "nowhere" / "x.csv"))
    with pytest.raises(ConfigError, match=r"is a folder; a table is read from"):
        table(tmp_path)


def test_splits_must_have_the_columns_of_the_training_rows(tmp_path):
    path = write(tmp_path, LONG)
    other = write(tmp_path, text(ROWS, "age,c,b"), "v.csv")
    with pytest.raises(ConfigError, match=r"v\.csv calls column 1 .* 'c', but .*t\.csv calls it 'b'\. Give all files"):
        table(path, val_path=str(other))
    other = write(tmp_path, text(ROWS[:, :2]), "v.csv")
    with pytest.raises(ConfigError, match=r"v\.csv has 2 columns, but .*t\.csv has 3"):
        table(path, test_path=str(other))
    other = save(tmp_path, "v.npz", train=ROWS, test=ROWS)
    with pytest.raises(ConfigError, match=r"v\.npz holds arrays for train, test, but is given for one split"):
        table(path, val_path=str(other))


# ---- the configuration for tables ----


@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_the_shipped_configuration_takes_tables_of_any_width(tmp_path, width):
    x = np.random.default_rng(0).normal(5, 3, (400, width))
    config = load([ROOT / "configs" / "tables" / "nsf.yaml"], [f"data.path={save(tmp_path, x=x)}"])
    dataset = config.dataset()
    model = config.model(dataset.facts())
    model.prepare([dataset.all("train")], generator=torch.Generator().manual_seed(0))
    found = model.log_prob(dataset.all("test").x)
    normal = torch.distributions.Normal(dataset.all("train").x.mean(0), dataset.all("train").x.std(0, correction=0))
    # an untrained flow starts as a standard normal law of standardised rows, but for its random linear maps
    assert found.shape == (40,) and abs(found.mean() - normal.log_prob(dataset.all("test").x).sum(1).mean()) < width


def test_the_shipped_configuration_asks_for_the_file():
    with pytest.raises(ConfigError, match=r"data\.path: must be given"):
        load([ROOT / "configs" / "tables" / "nsf.yaml"])
