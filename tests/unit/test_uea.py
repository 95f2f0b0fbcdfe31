"""Problems of the UEA archive: what a .ts file says, splits, scales, lost steps, and every way it can be wrong."""

import math

import pytest
import torch

from genmodels.data.dataset import SPLITS
from genmodels.data.uea import UEA, parse
from genmodels.registry import ConfigError
from tests.data_files import TS_HEADER, write_uea

HEADER = TS_HEADER


@pytest.fixture
def folder(tmp_path):
    return write_uea(tmp_path / "archive")


def test_a_file_is_read_line_by_line(tmp_path):
    text = HEADER + "1,2.5,?:-1e3,0,4:down\n\n# a comment\n7:NaN:up\n"
    found = parse(tmp_path / "Toy_TRAIN.ts", text.encode())
    assert found.classes == ["up", "down", "flat"] and found.labels == [1, 0]
    first, second = found.series
    torch.testing.assert_close(
        first, torch.tensor([[1, 2.5, math.nan], [-1000, 0, 4]]).double(), equal_nan=True, rtol=0, atol=0
    )
    assert second.shape == (2, 1) and second[0].item() == 7 and second[1].isnan()
    windows = parse(tmp_path / "Toy_TRAIN.ts", text.replace("\n", "\r\n").encode())
    assert windows.labels == found.labels and windows.classes == found.classes
    assert parse(tmp_path / "a.ts", text.replace("@classLabel", "@CLASSLABEL").encode()).classes == found.classes


def test_items_are_padded_standardised_and_split(folder):
    data = UEA(str(folder), "Toy")
    assert data.shape == (7, 2) and data.target_shape == (3,)
    assert [data.size(split) for split in SPLITS] == [34, 6, 20]  # of 14, 13, 13 items 2 each
    assert data.all("val").target.bincount().tolist() == [2, 2, 2]
    train = data.all("train")
    lengths = train.mask.any(2).sum(1)
    for k in range(2):
        observed = train.x[..., k][train.mask[..., k]].double()
        assert abs(observed.mean()) < 1e-6 and abs(observed.std(correction=0) - 1) < 1e-6
    for row, times in enumerate(train.times):
        n = int(lengths[row])
        assert times.tolist() == pytest.approx([min(k, n - 1) / 6 for k in range(7)])
    assert not train.mask[:, 1, 0].all() and train.mask[:, 1, 1].all()  # some were marked ?
    assert (data.all("test").target == torch.arange(20) % 3).all()  # the archive's own order


def test_splits_and_what_is_missing_are_fixed_by_the_seed(folder):
    a, b, c = (UEA(str(folder), "Toy", missing=0.5, seed=s) for s in (0, 0, 1))
    for split in SPLITS:
        assert torch.equal(a.all(split).x, b.all(split).x)
    assert not torch.equal(a.all("test").mask, c.all("test").mask)
    whole = UEA(str(folder), "Toy").all("test")
    steps, left = whole.mask.any(2).sum(1), a.all("test").mask.any(2).sum(1)
    assert torch.equal(left, (steps / 2).round().clamp(min=1))
    assert torch.equal(a.all("test").x, torch.where(a.all("test").mask, whole.x, 0.0))
    assert torch.equal(a.all("test").times, whole.times)  # the steps stay, nothing is seen at them
    assert len({data.fingerprint() for data in (a, b, c, UEA(str(folder), "Toy"))}) == 3


def test_pooled_splits_take_their_share_of_every_class(folder):
    data = UEA(str(folder), "Toy", split="pooled")
    assert [data.size(split) for split in SPLITS] == [42, 9, 9]
    counts = [data.all(split).target.bincount().tolist() for split in SPLITS]
    assert counts == [[15, 14, 13], [3, 3, 3], [3, 3, 3]]  # of 21, 20 and 19


def test_a_problem_lies_in_its_folder_or_in_the_path(folder):
    assert UEA(str(folder / "Toy"), "Toy").fingerprint() == UEA(str(folder), "Toy").fingerprint()


def test_classes_are_numbered_by_the_training_file(folder):
    place = folder / "Toy" / "Toy_TEST.ts"
    expected = UEA(str(folder), "Toy").all("test").target
    place.write_text(place.read_text().replace("true up down flat", "true flat up down"))
    assert torch.equal(UEA(str(folder), "Toy").all("test").target, expected)


LINE = "1,2:3,4:up\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no line @data"),
        ("1,2:up\n", r"line 1: a line @name value is needed before @data, found '1,2:up'"),
        (HEADER.replace("@data\n", ""), "has no line @data: it is no .ts file, or cut short"),
        (HEADER, "holds no series behind @data"),
        (HEADER.replace("@classLabel true up down flat\n", "") + LINE, "no line @classLabel"),
        (HEADER.replace("true up down flat", "false") + LINE, r"line 8: '@classLabel true' with two classes"),
        (HEADER.replace("true up down flat", "true up") + LINE, r"line 8: '@classLabel true' with two classes"),
        (HEADER.replace("@classLabel", "@targetLabel") + LINE, r"line 8: '@classLabel true'"),
        (HEADER.replace("@timeStamps false", "@timeStamps true") + LINE, r"line 3: .*@timeStamps true.* are not read"),
        (HEADER + LINE + "1,2:3,4:left\n", r"line 11: the class 'left' is none of up, down, flat"),
        (HEADER + LINE + "1,2:up\n", r"line 11: 1 channels, where the series before have 2"),
        (HEADER + "1,2:3:up\n", r"line 10: the channels have different lengths \(2, 1\)"),
        (HEADER + "1,two:3,4:up\n", r"line 10: channel 0 holds what is no number \(.*'two'"),
        (HEADER + "1,:3,4:up\n", r"line 10: channel 0 holds what is no number"),
        (HEADER + "1,2:3,inf:up\n", r"line 10: channel 1 holds an infinite value"),
        (HEADER + "?,?:?,?:up\n", r"line 10: every value is unknown"),
        (HEADER + "up\n", r"line 10: values and a class are needed"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, text, message):
    folder = write_uea(tmp_path, TRAIN=text)
    with pytest.raises(ConfigError, match=r"Toy_TRAIN\.ts.*" + message.removeprefix("r")):
        UEA(str(folder), "Toy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace("up down flat", "up down level") + LINE, r"classes \['down', 'flat', 'up'\], but .*TEST.ts"),
        (HEADER + "1,2:up\n", r"has the channels 2, but .*Toy_TEST.ts 1: they are not of one problem"),
    ],
)
def test_files_of_two_problems_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        UEA(str(write_uea(tmp_path, TEST=text)), "Toy")


def test_missing_files_are_named_with_where_they_must_lie(folder):
    with pytest.raises(ConfigError, match=r"archive/Other lacks Other_TRAIN.ts or Other_TEST.ts.* It holds Toy. Get"):
        UEA(str(folder), "Other")
    with pytest.raises(ConfigError, match=r"nowhere/Toy lacks Toy_TRAIN.ts"):
        UEA(str(folder / "nowhere"), "Toy")


@pytest.mark.parametrize("name", ["missing", "val"])
def test_impossible_shares_are_refused(folder, name):
    with pytest.raises(ConfigError, match=rf"data.{name}: a share in \[0, 1\) is needed, found 1"):
        UEA(str(folder), "Toy", **{name: 1.0})
