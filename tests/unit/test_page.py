"""The page as text: it needs nothing from outside, says nothing that its data could break, and has the same bytes."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from genmodels.evaluation.assemble import leaderboard
from genmodels.evaluation.axis import Axis, fit, labels
from genmodels.evaluation.drawing import scatter
from genmodels.evaluation.exports import as_csv
from genmodels.evaluation.page import TEMPLATES, _headers, page
from tests.board_results import example, metric, picture
from tests.page_fakes import HOSTILE, boards, html, priced, results

VOID = {"meta", "link", "img", "input", "br", "hr"}
DRAWING = {"line", "path", "circle"}


class Page(HTMLParser):
    """Elements in order, each with its attributes, its parents and its text; badly nested ones are an error."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "attributes": dict(attributes), "text": "", "parents": [e["tag"] for e in self.open]}
        element["classes"] = [e["attributes"].get("class", "") for e in (*self.open, element)]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [e for e in self.elements if e["tag"] == tag and wanted.items() <= e["attributes"].items()]


@pytest.fixture(scope="module")
def text():
    return html()


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


# ---- it needs nothing from outside -------------------------------------------------------------------------------


def test_nothing_is_fetched(text, parsed):
    for element in parsed.elements:
        for name in ("src", "href", "action", "srcset", "poster", "xlink:href"):
            value = element["attributes"].get(name)
            assert value is None or value.startswith(("data:", "#")), (element["tag"], name, value)
    assert not re.search(r"https?:|url\(|@import|@font-face", text)


def test_the_policy_allows_nothing_else(parsed):
    (policy,) = parsed.all("meta", http_equiv="Content-Security-Policy")
    expected = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert policy["attributes"]["content"] == expected


def test_names_are_text(text, parsed):
    assert not [e for e in parsed.all("img") if e["attributes"].get("src") == "x"]
    assert len(parsed.all("script")) == 2 and "</script><img" not in text
    (cell,) = parsed.all("th", data_value=HOSTILE)
    assert HOSTILE in cell["text"]


# ---- what it says ------------------------------------------------------------------------------------------------


def rows(parsed):
    """Rows of all leaderboards as {column: text}, in order."""
    found = []
    for element in parsed.elements:
        attributes = element["attributes"]
        if element["tag"] == "tr" and "data-words" in attributes:
            found.append({})
        elif "data-key" in attributes and element["tag"] in ("td", "th") and "tbody" in element["parents"]:
            found[-1][attributes["data-key"]] = element["text"].strip()
    return found


def test_the_table_is_there_without_a_script_sorted_by_rank(parsed):
    found = rows(parsed)[:7]
    assert [row["rank"] for row in found] == ["1", "2", "3", "–", "–", "–", "–"]
    names = ["ten", "hundred", "nine", "unfinished", HOSTILE, "no sampler", "Paper"]
    assert [row["row"].startswith(name) for row, name in zip(found, names, strict=True)] == [True] * 7
    assert [row["nfe"] for row in found] == ["10", "100", "9", "11", "12", "–", "35"]


def test_each_likelihood_has_its_symbol(parsed):
    found = {row["row"].split("details")[0]: row["bits_per_dim"] for row in rows(parsed)[:6]}
    assert found["ten"] == "~ 2.000 ± 0.010" and found["hundred"] == "= 1.250 ± 0.010"
    assert found["nine"] == "≤ 1.800 ± 0.010" and found["no sampler"] == "≈ 1.700 ± 0.010"
    assert found[HOSTILE] == "–"


def test_an_exact_density_has_a_symbol_too():
    result = example("a", [metric("nll", 2.0, kind="exact", question="likelihood")])
    (row,) = rows(Page(page(leaderboard([result]), {result["id"]: result}, {})))
    assert row["nll"] == "= 2.00 ± 0.10"


def test_reasons_and_sources_are_told(parsed):
    found = [row["row"] for row in rows(parsed)]
    assert "not ranked: training unfinished (4 of 100 steps)" in found[3]
    assert "not ranked: FD-digits has no standard error" in found[4] and "not ranked: no FD-digits" in found[5]
    assert "quoted" in found[6] and "Somebody 2020, table 3; other data" in found[6]


def test_every_row_has_its_provenance(parsed):
    found = [e["text"] for e in parsed.all("details") if "provenance" in e["attributes"]["class"]]
    assert len(found) == 7
    for words in ("cafe00", "aaaa", "abcdef123", "a machine", "torch 2.13.0", "device seconds", "19 device seconds"):
        assert words in found[0], words
    assert "sample seeds 0 – 99" in found[0] and "bits_per_dim (needs likelihood)" in found[0]
    assert f"comment: {HOSTILE}" in found[0].replace("''", "'").replace(": '<", ": <")
    assert "Not ranked: training unfinished" in found[3]


def test_blocks_are_told():
    result = example("a", [metric(value=2.0, blocks=[1.0, 3.0], detail="k = 5")])
    words = page(leaderboard([result]), {result["id"]: result}, {})
    assert "k = 5; mean of 1, 3" in words


def test_uncommitted_changes_and_failures_are_told():
    failed = {"sample": {"items": 2, "of": 100, "first": [3, 14], "reason": ""}}
    result = example("a", training={"dirty": True}, failures=failed)
    words = page(leaderboard([result]), {result["id"]: result}, {})
    assert "commit abcdef123, with uncommitted changes" in words and "abcdef1+" in words
    assert "2 of 100 samples are not finite (seeds 3, 14)" in words


def test_pictures_have_words_and_large_ones_are_left_out(parsed):
    images = parsed.all("img")
    assert len(images) == 2 and all(e["attributes"]["src"].startswith("data:image/png;base64,") for e in images)
    words = "The first items drawn by ten under the protocol digits, in a grid"
    assert images[0]["attributes"]["alt"] == words
    (absent,) = [e for e in parsed.all("p") if e["attributes"].get("class") == "absent"]
    assert re.fullmatch(r"The picture has 2\d\d kB and is left out.", absent["text"])


def test_downloads_are_the_files(parsed):
    (data,) = parsed.all("script", type="application/json")
    assert not set("<>&") & set(data["text"])
    files = json.loads(data["text"])["files"]
    assert files["leaderboard.csv"] == as_csv(boards())
    buttons = [e["attributes"]["data-file"] for e in parsed.all("button") if "data-file" in e["attributes"]]
    assert set(buttons) == set(files) == {"leaderboard.csv", "digits-aaaa.csv", "toy-bbbb.csv"}


def test_it_can_be_read_aloud_and_by_keyboard(parsed):
    (root,) = parsed.all("html")
    assert root["attributes"]["lang"] == "en" and len(parsed.all("main")) == len(parsed.all("h1")) == 1
    ids = [e["attributes"]["id"] for e in parsed.elements if "id" in e["attributes"]]
    assert len(ids) == len(set(ids))
    for element in parsed.elements:
        for name in ("aria-labelledby", "for"):
            assert set(element["attributes"].get(name, "").split()) <= set(ids)
        if element["tag"] == "a":
            assert element["attributes"]["href"][1:] in ids
    tables = len(parsed.all("table"))
    assert tables == len([e for e in parsed.all("caption") if e["text"].strip()]) > 0
    assert all("alt" in e["attributes"] for e in parsed.all("img"))
    assert all(e["text"].strip() or "aria-label" in e["attributes"] for e in parsed.all("button"))
    assert all(e["attributes"].get("scope") in ("col", "row") for e in parsed.all("th"))
    regions = [e for e in parsed.all("div") if e["attributes"].get("class") == "scroll"]
    assert regions and all(e["attributes"].get("tabindex") == "0" and e["attributes"]["aria-label"] for e in regions)


def test_what_needs_a_script_waits_for_it(parsed):
    """Without one, buttons are hidden by a class, or where they hold what is read (heads, pictures) do nothing."""
    for element in parsed.all("button"):
        within = " ".join(element["classes"])
        waits = "scripted" in within or "disabled" in element["attributes"]
        assert waits or "dialog" in element["parents"], element
    assert ".scripted { display: none" in (TEMPLATES / "page.css").read_text()
    assert all("scripted" in " ".join(e["classes"]) for name in ("input", "fieldset") for e in parsed.all(name))


def test_letters_of_the_other_direction_reorder_nothing_else():
    name = "\u202ea\u05d0\u05d1"
    result = example(name, [metric()], protocol=name)
    found = Page(page(leaderboard([result]), {result["id"]: result}, {result["id"]: picture()}))
    holds = [e for e in found.elements if e["text"].startswith(name) and e["tag"] not in ("title", "pre", "text")]
    assert len([e for e in holds if e["tag"] == "bdi"]) == 5  # heading, caption of the table, row, picture, provenance
    for element in holds:
        if element["tag"] in ("h2", "caption", "th", "figcaption", "summary"):
            inner = found.elements[found.elements.index(element) + 1]
            assert inner["tag"] == "bdi" and inner["text"] == name


def test_no_results_make_a_page():
    assert "There are no results yet." in page([], {}, {})


def test_results_without_a_metric_make_a_page():
    result = example("a", [])
    assert "its first metric was not measured" in page(leaderboard([result]), {result["id"]: result}, {})


# ---- drawings ----------------------------------------------------------------------------------------------------


def test_drawings_tell_what_they_show(parsed):
    told = {e["text"]: None for e in parsed.all("title") if "svg" in e["parents"] and " against " in e["text"]}
    assert (
        list(told)[:2] == ["FD digits against NFE", "FD digits against parameters"] or "FD-digits against NFE" in told
    )
    words = next(e["text"] for e in parsed.all("desc"))
    assert words.startswith("On the front: ten, nine.") and "hundred: 2.00 ± 0.10 at 100" in words
    assert "Paper: 0.5 at 35" in words


def test_marks_stand_where_their_numbers_are(parsed):
    """In the first drawing, equal ratios of cost are equal distances: log(100/10) : log(10/9)."""
    first = next(k for k, e in enumerate(parsed.elements) if e["tag"] == "svg" and e["attributes"]["class"] == "plot")
    end = next(k for k, e in enumerate(parsed.elements[first + 1 :], first + 1) if e["tag"] == "svg")
    inside = parsed.elements[first:end]
    places, row = {}, None
    for element in inside:
        if element["tag"] == "g" and "data-row" in element["attributes"]:
            row, kind = element["attributes"]["data-row"], element["attributes"]["class"]
        elif element["tag"] == "circle":
            places[row] = (float(element["attributes"]["cx"]), float(element["attributes"]["cy"]), kind)
    ten, hundred, nine = (places[k] for k in "012")
    assert (hundred[0] - ten[0]) / (ten[0] - nine[0]) == pytest.approx(21.85, rel=0.03)  # rounded to 0.1 in 14
    assert ten[1] > hundred[1] > nine[1]  # lower values stand lower
    assert (ten[2], hundred[2], nine[2]) == ("point front", "point dominated", "point front")


def test_cost_on_different_machines_has_no_front(text):
    assert "Measured on different machines, so there is no front." in text and 'class="point alone"' in text


def test_axes_hold_their_values_and_have_round_ticks():
    axis = fit([3.0, 4.0], 0, 100)
    assert not axis.log and axis(3.0) < axis(4.0) and 0 < axis(3.0) and axis(4.0) < 100
    assert axis.ticks() == pytest.approx([3.0, 3.2, 3.4, 3.6, 3.8, 4.0])
    axis = fit([1.0, 1000.0], 0, 100, margin=0.0)
    assert axis.log and axis.ticks() == pytest.approx([1, 3, 10, 30, 100, 300, 1000])
    assert axis(10.0) - axis(1.0) == pytest.approx(axis(1000.0) - axis(100.0))
    assert fit([2.0, 2.0], 0, 100, log=True)(2.0) == pytest.approx(50)
    assert fit([0.0, 0.0], 0, 100)(0.0) == pytest.approx(50)
    assert len(fit([41.0, 42.0], 0, 100, log=True).ticks()) > 1
    assert fit([1.0, 2.0], 0, 100)(99.0) == 100


def test_what_is_free_stands_at_the_left_end_behind_a_gap():
    axis = fit([0.0, 1.0, 100.0], 50, 250, log=True)
    assert axis.ticks()[:2] == [0.0, 1.0] and labels(axis.ticks())[0] == "0"
    assert 50 < axis(0.0) < axis.start - 5 < axis.start < axis(1.0) < axis(100.0) < 250
    without = fit([1.0, 100.0], axis.start, 250, log=True)
    assert axis(7.0) == without(7.0)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((1234.51, 1234.58), ["1.23452k", "1.23454k", "1.23456k", "1.23458k"]),
        ((2.0000001, 2.0000009), ["2.0000002", "2.0000004", "2.0000006", "2.0000008"]),
        ((1e-15, 4e-15), ["1e-15", "2e-15", "3e-15", "4e-15"]),
        ((1000.0, 1012.0), ["1k", "1.0025k", "1.005k", "1.0075k", "1.01k"]),
        ((-1.0, 1.0), ["-1", "-0.5", "0", "0.5", "1"]),
        ((1.0, 4e13), None),
        ((1e6, 1e6 + 1), None),
    ],
)
def test_labels_of_ticks_tell_them_apart(ends, expected):
    found = labels(Axis(*ends, 0, 100, log=False).ticks(5))
    assert len(set(found)) == len(found) > 1 and (expected is None or found == expected)


def free_and_dear():
    """Two free models with values that are hardly apart, and a dear one."""
    free = [priced(f"free{k}", 0.0, [metric(value=9.0 + 0.001 * k)]) for k in range(2)]
    return [*free, priced("dear", 50.0, [metric(value=1.0)])]


def test_free_models_are_drawn():
    (board,) = leaderboard(free_and_dear())
    drawing = str(scatter(board, board.frontiers[0], "x"))
    assert drawing.count('<g class="point') == 3 and "free0: 9.00 ± 0.10 at 0" in drawing
    assert drawing.count('class="base"') == 2 and ">0</text>" in drawing
    nothing = leaderboard(free_and_dear()[:2])[0]
    assert scatter(nothing, nothing.frontiers[0], "x") is None


def test_names_of_points_that_coincide_do_not_lie_on_each_other():
    results = [priced(f"model number {k}", 50.0, [metric(value=1.0)]) for k in range(12)]
    (board,) = leaderboard(results)
    drawing = str(scatter(board, board.frontiers[0], "x"))
    places = [tuple(map(float, p)) for p in re.findall(r'<text class="label[^>]* x="([\d.]+)" y="([\d.]+)"', drawing)]
    assert 2 <= len(places) < 12 and drawing.count("<title>model number") == 12
    pairs = [(a, b) for k, a in enumerate(places) for b in places[:k]]
    assert all(abs(a[0] - b[0]) > 6 * 14 or abs(a[1] - b[1]) >= 11 for a, b in pairs)


def test_intervals_on_a_logarithmic_scale_say_so():
    def headers(values):
        boards = leaderboard([priced(f"m{k}", 1.0, [metric(value=v, stderr=0.01)]) for k, v in enumerate(values)])
        return [(h["text"], h["tip"]) for h in _headers(boards[0]) if h["key"] == "interval"]

    assert headers((1.0, 100.0)) == [("95 % interval (log scale)", "1.96 standard errors to both sides (log scale)")]
    assert headers((1.0, 2.0)) == [("95 % interval", "1.96 standard errors to both sides")]


# ---- colours -----------------------------------------------------------------------------------------------------


def luminance(colour):
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """Ratio of WCAG 2.2, section 1.4.3."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_in_both_themes(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.48, 0.01
    )
    css = (TEMPLATES / "page.css").read_text()
    named = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\);", css)
    colours = {name: pair[theme] for name, *pair in named}
    texts = set(re.findall(r"(?<![-\w])(?:color|fill): var\(--(\w+)\)", css)) - {"paper"}
    grounds = set(re.findall(r"background: var\(--(\w+)\)", css)) - {"accent", "soft"}  # those two fill marks
    assert texts == {"ink", "soft", "accent", "warn"} and grounds == {"paper", "raised"}
    for ink in texts:
        for ground in grounds:
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    assert contrast(colours["strong"], colours["paper"]) >= 1.5  # borders only; no meaning rests on them
    assert not re.search(r"(?<!light-dark\()#\w{6}(?!, #|\))", css)  # no colour besides


# ---- the same bytes ----------------------------------------------------------------------------------------------


def test_another_process_writes_the_same_bytes(text):
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    code = "import sys; from tests.page_fakes import html; sys.stdout.buffer.write(html().encode())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout.decode() == text


def test_order_of_results_does_not_matter(text):
    reverse = {result["id"]: result for result in reversed(results())}
    assert page(leaderboard(list(reverse.values())), reverse, {}) == page(
        leaderboard(results()), {r["id"]: r for r in results()}, {}
    )
