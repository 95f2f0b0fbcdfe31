"""What a configuration stands on, as BibTeX: the `Source:` lines of its components and the entries of citations.bib."""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NamedTuple

from . import registry

OWN = """@misc{{genmodels,
  author = {{{{The genmodels authors}}}},
  title = {{genmodels}},
  note = {{Version {version}}},
}}"""
VENUES = ("booktitle", "journal", "publisher", "institution", "eprint")
UNDATED = {  # books are named without their year
    "Hairer, Nørsett & Wanner": "hairer1993solving",
    "Hairer & Wanner": "hairer1996solving",
}

_NAME = r"(?:(?:van|von|de|den|der|di|la|le) )*[A-ZÀ-ÖØ-Þ][\w'’-]+"
_REFERENCE = re.compile(rf"({_NAME}(?:, {_NAME})*)( & {_NAME}| et al\.)? ((?:1[89]|20)\d\d)[a-z]?(?: \(([^()]+)\))?")
_YEAR = re.compile(r"\b(?:1[89]|20)\d\d\b")
_ENTRY = re.compile(r"@(\w+)\{([\w:-]+),\s*")
_FIELD = re.compile(r"(\w+)\s*=\s*\{")


class UnknownSource(LookupError):
    """A `Source:` names a paper that has no entry, or names none."""


@dataclass(frozen=True)
class Entry:
    """An entry of a BibTeX file.

    Args:
        text: the entry as it stands in the file.
        fields: its fields by name, without the outer braces.
    """

    kind: str
    key: str
    fields: dict[str, str]
    text: str

    @property
    def surnames(self) -> list[str]:
        """Of the authors, in plain letters; `others` for those not named."""
        return [_plain(author.partition(",")[0]) for author in re.split(r"\s+and\s+", self.fields["author"])]

    def called(self, title: str) -> bool:
        """Whether a source can mean it by this title: words of its own (or the reverse), or its short title."""
        own, given = f" {_plain(self.fields['title'])} ", f" {_plain(title)} "
        short = f" {_plain(self.fields['shorttitle'])} " if "shorttitle" in self.fields else own
        return given in own or own in given or given in short or short in given


class Reference(NamedTuple):
    """A paper as a source names it, the key of its entry, and the clause that says where in it."""

    key: str
    clause: str


def parse(text: str) -> dict[str, Entry]:
    """The entries of a BibTeX file by key; values stand in braces.

    Raises:
        ValueError: naming the line, if the text is not well-formed or a key or field comes twice.
    """
    found: dict[str, Entry] = {}
    place = _skip(text, 0)
    while place < len(text):
        head = _ENTRY.match(text, place)
        if head is None:
            _bad(text, place, "an entry @kind{key, is needed")
        kind, key = head[1], head[2]
        fields, end = _fields(text, head.end())
        if key in found:
            _bad(text, place, f"the key '{key}' is taken")
        found[key] = Entry(kind, key, fields, text[place:end])
        place = _skip(text, end)
    return found


def _skip(text: str, place: int) -> int:
    """Past white space and lines of comment."""
    return re.compile(r"(?:\s+|%[^\n]*)*").match(text, place).end()  # type: ignore[union-attr]  (matches nothing, too)


def _fields(text: str, place: int) -> tuple[dict[str, str], int]:
    """The fields from a place within an entry, and the place after its closing brace."""
    fields: dict[str, str] = {}
    while not text.startswith("}", place):
        head = _FIELD.match(text, place)
        if head is None:
            _bad(text, place, "a field name = {value}, or } is needed")
        if head[1] in fields:
            _bad(text, place, f"the field '{head[1]}' comes twice")
        end = _closing(text, head.end())
        fields[head[1]] = " ".join(text[head.end() : end].split())
        rest = re.compile(r"\s*,\s*|\s*(?=\})").match(text, end + 1)
        if rest is None:
            _bad(text, end, "a comma or } is needed after a value")
        place = rest.end()
    return fields, place + 1


def _closing(text: str, place: int) -> int:
    """The place of the brace that closes a value beginning here."""
    depth = 1
    for k in range(place, len(text)):
        depth += {"{": 1, "}": -1}.get(text[k], 0)
        if depth == 0:
            return k
    _bad(text, place, "a value is not closed")
    raise AssertionError("unreachable")


def _bad(text: str, place: int, needed: str) -> None:
    shown = text[place : place + 40].split("\n")[0]
    raise ValueError(f"line {text.count(chr(10), 0, place) + 1}: {needed}, found '{shown}'.")


@cache
def entries() -> dict[str, Entry]:
    """Those of citations.bib."""
    return parse(resources.files(__package__).joinpath("citations.bib").read_text(encoding="utf-8"))


def _plain(text: str) -> str:
    """Lower case letters and digits with single spaces: without accents, braces and TeX commands."""
    text = re.sub(r"\\(?:[^\w\s]|(?=[A-Za-z]))", "", text).replace("ø", "o").replace("æ", "ae").replace("ł", "l")
    text = text.replace("Ł", "L")
    text = unicodedata.normalize("NFKD", text.replace("{", "").replace("}", ""))
    text = "".join(c for c in text if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())


def references(source: str) -> list[Reference]:
    """The papers that a `Source:` line names, in its order.

    A paper is `Surname [& Surname | et al.] YEAR [(title)]`; the title, or its beginning, or the short title of the
    entry, tells papers of one year apart. A clause ends at a semicolon.

    Raises:
        UnknownSource: if a paper has no entry in citations.bib, or could be several; if there is none in the line.
    """
    found, rest = [], source
    for clause in source.split(";"):
        papers = list(_REFERENCE.finditer(clause))
        keys = [_key(paper) for paper in papers]
        for paper in papers:
            rest = rest.replace(paper[0], "", 1)
        for names, key in UNDATED.items():
            if names in _REFERENCE.sub("", clause):
                keys.append(key)
        alone = len(keys) == 1 and papers and clause.strip().startswith(papers[0][0])
        text = clause.replace(papers[0][0], "", 1) if alone else clause
        found += [Reference(key, text.strip(" ,.")) for key in keys]
    if not found:
        raise UnknownSource(f"'{source}' names no paper as Surname [& Surname | et al.] YEAR [(title)].")
    if year := _YEAR.search(rest):
        raise UnknownSource(
            f"'{source}': {year[0]} is no part of a paper as Surname [& Surname | et al.] YEAR [(title)]."
        )
    return found


def _key(paper: re.Match) -> str:
    first, more, year, title = [part and part.strip() for part in paper.groups()]
    names = [_plain(name) for name in (first + ("" if more in (None, "et al.") else more.replace("&", ","))).split(",")]
    fitting = [
        entry
        for entry in entries().values()
        if entry.fields["year"] == year
        and (entry.surnames == names or (more == "et al." and entry.surnames[:1] == names and len(entry.surnames) > 2))
        and (title is None or entry.called(title))
    ]
    if not fitting:
        raise UnknownSource(
            f"'{paper[0]}' has no entry in genmodels/citations.bib. Add one with these authors and this year, whose "
            "title has the words in brackets (or whose shorttitle is they)."
        )
    if len(fitting) > 1:
        keys = " and ".join(entry.key for entry in fitting)
        raise UnknownSource(f"'{paper[0]}' can be {keys}. Name the title in brackets after the year.")
    return fitting[0].key


def cite(tree: dict) -> str:
    """BibTeX of genmodels and of every paper that a component of a resolved configuration names.

    Before each entry, comments say which component uses what of it; papers without an entry (those of components from
    outside) are named in comments at the end.
    """
    from . import __version__
    from .config import components_of  # only there are the sections of a file known

    kinds = {base: name for name, base in registry.kinds().items()}
    uses: dict[str, dict[str, None]] = {}
    unknown: dict[str, None] = {}
    for base, cls in components_of(tree):
        name, source = f"{kinds[base]}.{cls.registered_name}", registry.source(cls)
        try:
            for key, clause in references(source) if source else ():
                uses.setdefault(key, {})[_comment(f"{name}: {clause}")] = None
        except UnknownSource:
            unknown[_comment(f"{name}: {source}")] = None
    blocks = [OWN.format(version=__version__)]
    blocks += ["\n".join([*comments, entries()[key].text]) for key, comments in uses.items()]
    if unknown:
        blocks.append("\n".join(["% Sources without an entry:", *unknown]))
    return "\n\n".join(blocks)


def _comment(text: str) -> str:
    return f"% {text.replace('@', '(at)')}".rstrip(": ")  # BibTeX reads an entry at every @
