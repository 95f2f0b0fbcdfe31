"""The intensive-care records: what becomes of lines, splits and scales, and every way files can be wrong."""

import pytest
import torch

from genmodels.data.dataset import SPLITS
from genmodels.data.physionet import COLUMNS, STATICS, VARIABLES, PhysioNet, parse, series
from genmodels.registry import ConfigError
from tests.data_files import write_physionet

RECORD = """Time,Parameter,Value
00:00,RecordID,7
00:00,Age,54
00:00,Gender,0
00:00,Height,-1
00:00,ICUType,4
00:00,Weight,-1
00:07,GCS,15
00:07,HR,73
01:30,HR,80
01:30,HR,90
47:59,pH,7.4
48:00,Urine,-1
"""


@pytest.fixture
def record(tmp_path):
    return parse(tmp_path / "7.txt", RECORD.encode())


@pytest.fixture
def folder(tmp_path):
    return write_physionet(tmp_path / "files")


def test_there_are_37_variables_and_41_columns():
    assert len(VARIABLES) == 37 and len(COLUMNS) == 41 == len(set(COLUMNS))


def test_a_record_is_its_known_values_at_its_times(record):
    x, times, mask = series(record, 37, None)
    place = {name: k for k, name in enumerate(VARIABLES)}
    assert (48 * 60 * times).tolist() == pytest.approx([7, 90, 47 * 60 + 59])
    seen = {(row, VARIABLES[k]): x[row, k].item() for row, k in mask.nonzero().tolist()}
    expected = {(0, "GCS"): 15, (0, "HR"): 73, (1, "HR"): 85, (2, "pH"): 7.4}  # two at one time: their mean
    assert seen == pytest.approx(expected) and place["HR"] == VARIABLES.index("HR")
    assert (x[~mask] == 0).all()


def test_times_are_rounded_and_values_that_meet_are_averaged(record):
    _, times, mask = series(record, 37, 2.0)  # 0:07 -> 0, 1:30 -> 2 (0.75 of a step), 47:59 -> 48
    assert times.tolist() == pytest.approx([0, 2 / 48, 1])
    exact = series(record, 37, 0.016)[1] * 48
    assert exact.tolist() == pytest.approx([0.112, 1.504, 47.984])
    assert mask.sum() == 4
    wide = series(record, 37, 4.0)
    assert wide[0][0, VARIABLES.index("HR")].item() == pytest.approx((73 + 80 + 90) / 3)


def test_statics_are_seen_once_at_the_start(record, folder):
    x, times, mask = series(record, 41, None)
    assert times[0] == 0 and mask[0].nonzero().flatten().tolist() == [
        COLUMNS.index(n) for n in ("Age", "Gender", "ICUType")
    ]
    assert not mask[1:, 37:].any() and x[0, 37].item() == 54
    plain, more = PhysioNet(str(folder)), PhysioNet(str(folder), statics=True)
    assert plain.shape[1] == 37 and more.shape[1] == 41 and more.fingerprint() != plain.fingerprint()
    for split in SPLITS:
        a, b = plain.all(split), more.all(split)
        assert torch.equal(a.x, b.x[..., :37]) and b.mask[:, 0, 37].all() and not b.mask[:, 1:, 37:].any()
    assert set(STATICS) == {"Age", "Gender", "Height", "ICUType"}


def test_splits_follow_a_hash_and_scales_the_training_items(folder):
    data = PhysioNet(str(folder))
    assert [data.size(split) for split in SPLITS] == [44, 4, 12] and data.shape == (7, 37)
    train = data.all("train")
    values = train.x[train.mask]
    for name in ("HR", "Temp"):
        k = VARIABLES.index(name)
        observed = train.x[..., k][train.mask[..., k]]
        assert (observed.min(), observed.max()) == (0, 1)
    assert values.min() == 0 and values.max() == 1 and torch.equal(train.x, train.target)
    standard = PhysioNet(str(folder), scale="standard").all("train")
    observed = standard.x[..., k][standard.mask[..., k]].double()
    assert abs(observed.mean()) < 1e-6 and abs(observed.std(correction=0) - 1) < 1e-6
    weight = standard.x[..., VARIABLES.index("Weight")]
    assert (weight == 0).all()  # all of 80.5: nothing to divide by


def test_mortality_is_the_target(folder):
    data = PhysioNet(str(folder), task="mortality")
    assert data.target_shape == (2,)
    labels = torch.cat([data.all(split).target for split in SPLITS])
    assert labels.sum() == 9  # of 60 every seventh
    plain = PhysioNet(str(folder))
    assert all(torch.equal(plain.all(s).x, data.all(s).x) for s in SPLITS)
    # the record with label 1 is the one whose file says so: record 132500 has 2 times after the weight at 0
    text = (folder / "Outcomes-a.txt").read_text()
    flipped = text.replace("132500,6,1,5,-1,1", "132500,6,1,5,-1,0")
    (folder / "Outcomes-a.txt").write_text(flipped)
    other = PhysioNet(str(folder), task="mortality")
    assert other.fingerprint() != data.fingerprint()
    changed = torch.cat([other.all(split).target for split in SPLITS]) != labels
    items = torch.cat([data.all(split).mask.any(2).sum(1) for split in SPLITS])
    assert changed.sum() == 1 and items[changed].tolist() == [3]


def test_dropped_times_are_asked_for_all_the_same(folder):
    whole, part = PhysioNet(str(folder)), PhysioNet(str(folder), dropped=0.5)
    for split in SPLITS:
        a, b = whole.all(split), part.all(split)
        assert torch.equal(a.target, b.target) and torch.equal(a.target_mask, b.target_mask)
        n, left = a.mask.any(2).sum(1), b.mask.any(2).sum(1)
        assert torch.equal(left, (n / 2).round().clamp(min=1)) and (b.mask <= a.mask).all()
        assert torch.equal(b.x, torch.where(b.mask, a.x, 0.0))


def test_records_without_a_measurement_are_left_out_and_counted(folder):
    empty = "Time,Parameter,Value\n00:00,RecordID,132503\n00:00,Age,70\n00:00,Weight,81\n"
    write_physionet(folder, r132503=empty)
    data = PhysioNet(str(folder), task="mortality")
    assert data.checks() == ["59 records; 1 more hold no measurement and are left out."]
    assert sum(data.size(split) for split in SPLITS) == 59


def test_both_sets_are_read(folder):
    write_physionet(folder, 20, "b")
    data = PhysioNet(str(folder), sets="ab")
    assert sum(data.size(split) for split in SPLITS) == 80
    one, both = PhysioNet(str(folder)), PhysioNet(str(folder), sets="ab", task="mortality")
    assert one.fingerprint() != data.fingerprint() and both.target_shape == (2,)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", r"7.txt, line 1: 'Time,Parameter,Value' is needed, found ''"),
        ("RecordID,Age\n", r"7.txt, line 1: .* found 'RecordID,Age'"),
        ("Time,Parameter,Value\n00:00,HR\n", r"7.txt, line 2: '00:00,HR' is not of the form"),
        ("Time,Parameter,Value\n\n00:00,HR,fast\n", r"7.txt, line 3: '00:00,HR,fast' is not of the form"),
        ("Time,Parameter,Value\n00:00,HR,nan\n", r"line 2: '00:00,HR,nan' is not of the form"),
        ("Time,Parameter,Value\n1.5,HR,80\n", r"line 2: '1.5,HR,80' is not of the form .* a time 00:00 … 48:00"),
        ("Time,Parameter,Value\n48:01,HR,80\n", r"line 2: '48:01,HR,80'"),
        ("Time,Parameter,Value\n00:60,HR,80\n", r"line 2: '00:60,HR,80'"),
        ("Time,Parameter,Value\n00:00,Pulse,80\n", r"line 2: unknown variable 'Pulse'. Known: Albumin, .*, ICUType"),
        ("Time,Parameter,Value\n00:00,RecordID,8\n", r"line 2: RecordID is 8, but the file is called 7.txt"),
    ],
)
def test_malformed_records_are_named_with_their_line(tmp_path, lines, message):
    with pytest.raises(ConfigError, match=message):
        parse(tmp_path / "7.txt", lines.encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            r"has no Outcomes-a.txt, in which mortality stands. .* put it beside set-a, or set data.task=interpolate",
        ),
        ("RecordID,Survival\n", r"Outcomes-a.txt, line 1: columns RecordID and In-hospital_death are needed"),
        ("", r"Outcomes-a.txt, line 1: columns"),
        ("RecordID,In-hospital_death\n132500,2\n", r"line 2: 2 fields with In-hospital_death 0 or 1 are needed"),
        ("RecordID,In-hospital_death\n132500\n", r"line 2: 2 fields"),
        ("RecordID,In-hospital_death\n132500,1\n", r"the outcomes of 59 records are missing, of \d+ for one"),
    ],
)
def test_outcomes_that_are_missing_or_malformed_are_named(folder, text, message):
    place = folder / "Outcomes-a.txt"
    place.unlink() if text is None else place.write_text(text)
    with pytest.raises(ConfigError, match=message):
        PhysioNet(str(folder), task="mortality")
    assert PhysioNet(str(folder)).size("train") == 44  # needs no outcomes


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no folder set-a. The records lie in <path>/set-a/132539.txt"):
        PhysioNet(str(tmp_path))
    (tmp_path / "set-a").mkdir()
    with pytest.raises(ConfigError, match=r"set-a holds no .txt files"):
        PhysioNet(str(tmp_path))
    write_physionet(tmp_path)
    with pytest.raises(ConfigError, match=r"has no folder set-b"):
        PhysioNet(str(tmp_path), sets="ab")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dropped": 1.0}, r"data.dropped: a share in \[0, 1\)"), ({"quantise": 0.0}, "data.quantise: hours above 0")],
)
def test_impossible_options_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        PhysioNet(str(folder), **options)
