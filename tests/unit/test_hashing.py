"""Digests see what they say they see: of plain data, of files, and of files too large to read whole."""

import hashlib
import itertools

import pytest

from genmodels import hashing
from genmodels.hashing import BLOCK, canonical, digest, fingerprint_files, sha256


def write(folder, **contents):
    folder.mkdir(exist_ok=True, parents=True)
    paths = [folder / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    return paths


def test_equal_trees_have_equal_text():
    assert canonical({"b": 1, "a": [1.0, None]}) == '{"a":[1.0,null],"b":1}'
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 2, "b": 2})


def test_a_file_is_known_by_its_bytes(tmp_path):
    (path,) = write(tmp_path, a=b"abc" * 1000)
    assert sha256(path) == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_names_sizes_and_contents_of_files_count_and_nothing_else(tmp_path):
    same = write(tmp_path / "one", a=b"12", b=b"3")
    first = fingerprint_files(same, tmp_path / "one")
    assert len(first) == 12 and int(first, 16) >= 0
    assert fingerprint_files(reversed(same), tmp_path / "one") == first
    assert fingerprint_files(write(tmp_path / "copy", a=b"12", b=b"3"), tmp_path / "copy") == first
    others = [{"a": b"13", "b": b"3"}, {"a": b"1", "b": b"23"}, {"a": b"12", "c": b"3"}, {"a": b"12"}]
    found = [fingerprint_files(write(tmp_path / str(i), **c), tmp_path / str(i)) for i, c in enumerate(others)]
    assert len({first, *found}) == 5
    assert fingerprint_files(same, tmp_path) != first  # names are relative to the root
    with pytest.raises(ValueError, match="not in the subpath"):
        fingerprint_files(same, tmp_path / "copy")


def test_without_a_root_the_order_counts_instead_of_names(tmp_path):
    one, two = write(tmp_path / "one", a=b"12", b=b"3"), write(tmp_path / "two", x=b"3", y=b"12")
    assert fingerprint_files(one, None) == fingerprint_files(reversed(two), None)
    assert fingerprint_files(one, None) != fingerprint_files(two, None)
    assert fingerprint_files(one, None) != fingerprint_files(one, tmp_path / "one")


@pytest.fixture
def budget(monkeypatch):
    monkeypatch.setattr(hashing, "BUDGET", 4 * BLOCK)
    return 4 * BLOCK


def fingerprint_of(tmp_path, *contents):
    paths = write(tmp_path / "f", **{f"{i:03d}": content for i, content in enumerate(contents)})
    return fingerprint_files(paths, tmp_path / "f")


def changed(content, place):
    return content[:place] + b"x" + content[place + 1 :]


def test_every_byte_counts_within_the_budget(tmp_path, budget):
    whole = bytes(budget)
    places = [0, 1, BLOCK - 1, BLOCK, budget // 2, budget - 1]
    found = [fingerprint_of(tmp_path, changed(whole, place)) for place in places]
    assert len({fingerprint_of(tmp_path, whole), *found}) == len(places) + 1


def test_beyond_the_budget_evenly_spaced_blocks_count(tmp_path, budget):
    """Of 10 blocks 4 are read: from the bytes 0, 3, 6 and 9 blocks on."""
    large = bytes(10 * BLOCK)
    plain = fingerprint_of(tmp_path, large)
    seen = [fingerprint_of(tmp_path, changed(large, k * BLOCK + BLOCK // 2)) != plain for k in range(10)]
    assert seen == [True, False, False] * 3 + [True]
    assert (
        fingerprint_of(tmp_path, changed(large, 0))
        != plain
        != fingerprint_of(tmp_path, changed(large, -1 % len(large)))
    )
    assert fingerprint_of(tmp_path, large + b"\0") != plain  # the size counts


def test_beyond_the_budget_files_share_it(tmp_path, budget):
    """Two files have two blocks each, a small one none to spare; of nine files four are opened."""
    large = bytes(5 * BLOCK)
    plain = fingerprint_of(tmp_path, large, b"small")
    assert fingerprint_of(tmp_path, large, b"Small") != plain != fingerprint_of(tmp_path, changed(large, 0), b"small")
    two = [bytes(5 * BLOCK)] * 2
    plain = fingerprint_of(tmp_path, *two)
    seen = [fingerprint_of(tmp_path, two[0], changed(two[1], k * BLOCK + 7)) != plain for k in range(5)]
    assert seen == [True, False, False, False, True]
    nine = [bytes(BLOCK)] * 9
    plain = fingerprint_of(tmp_path, *nine)
    one = [[changed(f, 7) if i == j else f for j, f in enumerate(nine)] for i in range(9)]
    seen = [fingerprint_of(tmp_path, *files) != plain for files in one]
    assert list(itertools.compress(range(9), seen)) == [0, 2, 5, 8]
