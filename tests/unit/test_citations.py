"""Sources and their papers: every component's source has an entry, every entry is sound, and `cite` prints them."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import genmodels
from genmodels import citations, registry
from genmodels.citations import Reference, UnknownSource, cite, entries, parse, references
from genmodels.config import Config, load
from genmodels.schema import MEMBERS
from tests.unit.fakes import restored, tree, world

ROOT = Path(__file__).parents[2]
PACKAGE = Path(genmodels.__file__).parent

SOURCES = {
    f"{kind}.{name}": registry.source(MEMBERS[base][name])
    for kind, base in sorted(registry.kinds().items())
    for name in registry.names(base)
    if MEMBERS[base][name].__module__.startswith("genmodels.") and registry.source(MEMBERS[base][name])
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_its_entries(name):
    try:
        references(SOURCES[name])
    except UnknownSource as error:
        pytest.fail(f"the Source: of {name}: {error}")


def test_every_entry_is_used():
    """By a component, or by a function or class that one is built of."""
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                source = registry.source(type("Said", (), {"__doc__": ast.get_docstring(node)}))
                used |= known(source or "")
    assert used >= {r.key for source in SOURCES.values() for r in references(source)}
    namesakes = {"song2021denoising"}  # what makes "Song et al. 2021" ambiguous
    assert set(entries()) == used | namesakes, "no Source: names the others; delete them"


def known(source):
    found = set()
    for clause in source.split(";"):
        try:
            found |= {reference.key for reference in references(clause)}
        except UnknownSource:
            continue
    return found


@pytest.mark.parametrize("key", sorted(entries()))
def test_an_entry_says_who_what_when_and_where(key):
    entry = entries()[key]
    for field in ("author", "title", "year"):
        assert entry.fields.get(field), f"{key} has no {field}"
    assert any(entry.fields.get(field) for field in citations.VENUES), f"{key} has no venue: one of {citations.VENUES}"
    assert re.fullmatch(r"(1[89]|20)\d\d", entry.fields["year"])
    assert key.startswith(entry.surnames[0].replace(" ", "").replace("-", "")) and entry.fields["year"] in key
    assert ("eprint" in entry.fields) == ("archiveprefix" in entry.fields)
    if "eprint" in entry.fields:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.fields["eprint"])
        year = 2000 + int(entry.fields["eprint"][:2])
        assert year <= int(entry.fields["year"]) <= year + 3  # an identifier begins with the year of its paper
    assert all(value.count("{") == value.count("}") for value in entry.fields.values())


def test_entries_are_in_order_and_no_two_are_the_same_paper():
    assert list(entries()) == sorted(entries())
    titles = [citations._plain(entry.fields["title"]) for entry in entries().values()]
    prints = [entry.fields["eprint"] for entry in entries().values() if "eprint" in entry.fields]
    assert len(set(titles)) == len(titles) and len(set(prints)) == len(prints)


# ---- sources ---


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Kingma & Ba 2015; Loshchilov & Hutter 2019.", [("kingma2015adam", ""), ("loshchilov2019decoupled", "")]),
        ("Durkan et al. 2019 (Neural Spline Flows), section 3.1.", [("durkan2019neural", "section 3.1")]),
        ("Bishop 2006, page 3; and more.", [("bishop2006pattern", "page 3")]),
        ("Karras et al. 2022 (EDM), table 1 (with σ).", [("karras2022elucidating", "table 1 (with σ)")]),
        ("Karras et al. 2024 (EDM2).", [("karras2024analyzing", "")]),
        ("Song et al. 2021 (DDIM)", [("song2021denoising", "")]),
        ("Song et al. 2021 (Score-based generative modeling), C", [("song2021score", "C")]),
        ("Albergo & Vanden-Eijnden 2023", [("albergo2023building", "")]),
        ("Hairer & Wanner, part II", [("hairer1996solving", "Hairer & Wanner, part II")]),
        ("Kutta 1901; Hairer, Nørsett & Wanner, p. 1", ["kutta1901beitrag", ("hairer1993solving", None)]),
        ("Hairer, Nørsett & Wanner 1993, p. 1", [("hairer1993solving", "p. 1")]),
        ("the scale of Dinh et al. 2017, as in Kingma & Dhariwal 2018", ["dinh2017density", "kingma2018glow"]),
    ],
)
def test_papers_of_a_source(source, expected):
    found = references(source)
    assert [r.key for r in found] == [e if isinstance(e, str) else e[0] for e in expected]
    for reference, e in zip(found, expected, strict=True):
        if not isinstance(e, str) and e[1] is not None:
            assert reference.clause == e[1]
    assert all(isinstance(r, Reference) for r in found)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "Nobody et al. 2031 (Nothing), section 1.",
            "'Nobody et al. 2031 (Nothing)' has no entry in genmodels/",
        ),
        ("Durkan & Murray 2019", "'Durkan & Murray 2019' has no entry"),  # other authors
        ("Durkan et al. 2018", "has no entry"),
        ("Kingma 2015", "has no entry"),
        ("Kingma et al. 2015", "has no entry"),  # of two authors both are named
        ("Durkan et al. 2019 (Cubic-Spline Flows)", "has no entry"),
        ("Karras et al. 2022 (ED)", "has no entry"),  # no word of the title
        ("Song et al. 2021", "song2021denoising and song2021maximum and song2021score. Name the title in brackets"),
        ("Bishop 2006 and section 4 of 1999", "1999 is no part of a paper"),
        ("the zuko library", "names no paper as Surname"),
    ],
)
def test_sources_that_are_not_understood(source, message):
    with pytest.raises(UnknownSource, match=re.escape(message)):
        references(source)


# ---- BibTeX ---


def test_entries_are_read_as_written():
    author, title = r"{{\O}ye, A. and B{\"o}hm, C.}", "{A {B}\n    C}"
    text = f"% a comment with @x{{\n@misc{{a2000b,\n  author = {author},\n  title = {title},\n}}\n@book{{c,x={{}}}}"
    found = parse(text)
    assert list(found) == ["a2000b", "c"] and found["c"].fields == {"x": ""} and found["a2000b"].kind == "misc"
    assert found["a2000b"].fields["title"] == "A {B} C" and found["a2000b"].text.endswith("C},\n}")
    assert found["a2000b"].surnames == ["oye", "bohm"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@misc{a, x = {1}}\n@misc{a, x = {1}}", "line 2: the key 'a' is taken"),
        ("@misc{a,\n x = {1},\n x = {2}}", "line 3: the field 'x' comes twice"),
        ("@misc{a, x = {1}", "a comma or } is needed"),
        ("@misc{a, x = {1", "line 1: a value is not closed"),
        ("@misc{a, x = 1}", "a field name = {value}, or } is needed, found 'x = 1}'"),
        ("@misc{a, x = {1} y = {2}}", "a comma or } is needed"),
        ("\n\nmisc{a}", "line 3: an entry @kind{key, is needed, found 'misc{a}'"),
    ],
)
def test_text_that_is_no_bibtex(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


# ---- cite ---


def test_the_project_itself_comes_first_as_its_citation_file_says():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    first = next(iter(parse(cite(load([ROOT / "configs/toy2d/nsf.yaml"]).tree)).values()))
    assert first.key == "genmodels" and first.fields["title"] == said["title"]
    assert first.fields["author"] == "{" + " and ".join(a["name"] for a in said["authors"]) + "}"
    assert first.fields["note"] == f"Version {said['version']}" and said["version"] == genmodels.__version__


def test_every_paper_once_with_what_is_used_of_it():
    text = cite(load([ROOT / "configs/digits/nsf.yaml"]).tree)
    found = parse(text)
    assert {"durkan2019neural", "dinh2017density", "theis2016note", "kingma2015adam"} < found.keys()
    used = "\n% bijection.coupling: section 3.2, appendix B\n% monotone.rational_quadratic: section 3.1\n"
    assert used + "@inproceedings{durkan2019neural,\n" in text
    assert "\n\n% optimizer.adam\n@inproceedings{kingma2015adam,\n" in text
    assert all(entries()[key].text in text for key in found if key != "genmodels")


def test_what_has_no_entry_is_named_in_comments():
    with restored():
        world()
        model = {"name": "fake_flow", "layers": [{"name": "coupling", "network": "mlp"}] * 2, "schedule": "cosine"}
        text = cite(Config(tree(model=model, sample={"solver": "heun"})).tree)
    assert set(parse(text)) == {"genmodels", "kingma2015adam", "loshchilov2019decoupled"}
    assert text.split("\n\n")[-1].splitlines() == [
        "% Sources without an entry:",
        "% fake_net.mlp: Rumelhart et al. 1986, page 318; and a second line.",
        "% fake_schedule.linear: Euclid, book 1.",
        "% fake_solver.heun: Heun 1900.",
    ]
    assert citations._comment("a@b: ") == "% a(at)b"
