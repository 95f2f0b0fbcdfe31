"""What `--list` and `--describe` print."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from genmodels import registry
from genmodels.registry import ConfigError, register

from .fakes import restored, world


@pytest.fixture(scope="module")
def fake() -> Iterator[SimpleNamespace]:
    with restored():
        yield world()


def test_listing_shows_every_member_with_its_first_line(fake, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert registry.listing("fake_schedule") == (
        "fake_schedule: Schedules of the tests.\n  cosine  A cosine.\n  linear  A straight line."
    )
    everything = registry.listing()
    assert all(f"\n{name}:" in f"\n{everything}" for name in registry.kinds())
    for columns in ("80", "100", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert max(map(len, registry.listing().split("\n"))) <= min(int(columns), 100)
    with pytest.raises(ConfigError, match=r"there is no kind 'fake_schedul'\. Did you mean 'fake_schedule'\? Known: "):
        registry.listing("fake_schedul")


def test_describe_shows_arguments_defaults_and_source(fake):
    text = registry.describe_name("fake_net.mlp")
    assert "  width       int = 64\n  activation  'relu' | 'tanh' = \"relu\"\n  dropout     float = 0.0\n" in text
    assert "Supplied by the run: in_features, out_features" in text and "Source: Rumelhart" in text
    text = registry.describe_name("model.fake_flow")
    assert "schedule  FakeSchedule = linear\n" in text and "layers    [FakeLayer, ...] = []\n" in text
    assert "more      [FakeSchedule, ...] = [linear, cosine]\n" in text and "clip      float | null = null\n" in text
    assert "depth  int (required)" in registry.describe_name("fake_net.tree")
    for wrong, message in [
        ("fake_nett.mlp", r"there is no kind 'fake_nett'\. Did you mean 'fake_net'"),
        ("fake_net.mpl", r"fake_net\.name: no FakeNet is called 'mpl'\. Did you mean 'mlp'"),
        ("fake_net", r"no FakeNet is called ''\. Known: .*mlp"),
    ]:
        with pytest.raises(ConfigError, match=message):
            registry.describe_name(wrong)


def test_long_docstrings_are_wrapped_without_running_formulas_together(fake, monkeypatch):
    words = " ".join(["word"] * 18)

    @register(fake.FakeNet, "wordy")
    class Wordy(fake.FakeNet):
        __doc__ = (
            f"Short.\n\n{words}\nends here.\n\ny = x\nz = y\n\n"
            f"Args:\n    a: {words}\n        and more.\n    b: {words}\n    c, d: short.\nSource: {words}"
        )

    monkeypatch.setenv("COLUMNS", "60")
    text = registry.describe_name("fake_net.wordy")
    row, ten = "word " * 11, "word " * 10
    assert f"\n{row}word\n{'word ' * 6}ends here.\n\ny = x\nz = y\n\nArgs:\n" in text
    assert f"\n    a: {ten.strip()}\n        {'word ' * 8}and more.\n    b: {ten.strip()}\n" in text
    assert f"        {'word ' * 8}".rstrip() + "\n    c, d: short.\nSource: word" in text
    assert max(map(len, text.split("\n")[2:])) <= 60
    assert text.split("\n", 1)[1].count("word") == 4 * 18


def test_source_ends_where_the_next_part_begins(fake):
    assert registry.source(fake.MLP) == "Rumelhart et al. 1986, page 318; and a second line."
    followed = type("Followed", (), {"__doc__": "Short.\n\nSource: A 2000,\n    part 1.\nArgs:\n    a: b."})
    assert registry.source(followed) == "A 2000, part 1."
    assert registry.source(fake.Euler) is None and registry.summary(fake.Cosine) == "A cosine."
