"""The page in a real browser: sorting, filters, keyboard, themes, downloads, widths; nothing is requested."""

import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from genmodels.evaluation.exports import as_csv
from tests.page_fakes import HOSTILE, boards, html

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RANKED = ["ten", "hundred", "nine", "unfinished", HOSTILE, "no sampler"]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium was found")
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("board") / "leaderboard.html"
    path.write_text(html(), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser, address):
    """Opens the page; whatever it requests or complains about is an error in the end."""
    contexts, complaints = [], []

    def open_page(fragment="", width=1400, context=None, **options):
        context = context or browser.new_context(offline=True, viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or complaints.append(r.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.goto(address + fragment)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def names(page):
    """Labels of the visible measured rows of the first board, from top to bottom."""
    return page.locator("#digits-aaaa tbody:not(.quoted) tr:visible .label").all_text_contents()


def head(page, key):
    return page.locator(f'#digits-aaaa th[data-key="{key}"][scope="col"]')


def sort(page, key):
    head(page, key).get_by_role("button").click()
    return names(page)


# ---- sorting -----------------------------------------------------------------------------------------------------


def test_numbers_are_sorted_as_numbers_and_missing_ones_come_last_both_ways(opened):
    page = opened()
    assert names(page) == RANKED and head(page, "rank").get_attribute("aria-sort") == "ascending"
    up = ["nine", "ten", "unfinished", HOSTILE, "hundred", "no sampler"]
    assert sort(page, "nfe") == up
    assert sort(page, "nfe") == [*reversed(up[:-1]), "no sampler"]
    assert head(page, "nfe").get_attribute("aria-sort") == "descending"
    assert head(page, "rank").get_attribute("aria-sort") is None
    assert page.locator("#digits-aaaa tbody.quoted .label").all_text_contents() == ["Paper"]
    assert sort(page, "bits_per_dim") == ["hundred", "no sampler", "nine", "ten", "unfinished", HOSTILE]  # 1.25 < 1.7
    assert sort(page, "rank") == RANKED
    assert sort(page, "rank") == ["nine", "hundred", "ten", *RANKED[3:]]


def test_text_is_sorted_as_text(opened):
    page = opened()
    assert sort(page, "row")[1:] == ["hundred", "nine", "no sampler", "ten", "unfinished"]


def test_keyboard_sorts(opened):
    page = opened()
    head(page, "nfe").get_by_role("button").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('th').dataset.key") == "nfe"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert head(page, "nfe").get_attribute("aria-sort") == "ascending" and names(page)[0] == "nine"
    page.keyboard.press("Space")
    assert head(page, "nfe").get_attribute("aria-sort") == "descending" and names(page)[0] == "hundred"


# ---- filters, columns, address -----------------------------------------------------------------------------------


def test_filters_count_what_they_leave(opened):
    page = opened()
    count = page.locator("#digits-aaaa output")
    assert count.text_content() == "7 rows" and page.locator("#toy-bbbb output").text_content() == "1 row"
    page.locator("#digits-aaaa input[type=search]").fill("NINE flow")
    assert count.text_content() == "1 of 7 rows" and names(page) == ["nine"]
    assert page.locator("#digits-aaaa svg.plot g.gone").count() > 0
    page.locator("#digits-aaaa input[type=search]").fill("")
    assert count.text_content() == "7 rows" and page.locator(".gone").count() == 0


def test_kinds_of_likelihood_are_filtered(opened):
    page = opened()
    boxes = page.locator("#digits-aaaa input[name=kind]")
    assert [box.get_attribute("value") for box in boxes.all()] == ["exact", "bound", "numerical", "stochastic", "none"]
    page.locator("#digits-aaaa input[name=kind][value=bound]").uncheck()
    assert names(page) == [name for name in RANKED if name != "nine"]
    page.locator("#digits-aaaa input[name=kind][value=none]").uncheck()
    assert names(page) == ["ten", "hundred", "no sampler"]


def test_the_address_keeps_the_view(opened):
    page = opened()
    page.locator("#digits-aaaa .chooser summary").click()
    page.locator('#digits-aaaa input[value="commit"]').uncheck()
    page.locator("#digits-aaaa input[name=kind][value=bound]").uncheck()
    page.locator("#digits-aaaa input[type=search]").fill("flow")
    sort(page, "nfe")
    fragment = page.evaluate("location.hash")
    for again in (opened(fragment), page):
        again.reload()
        assert names(again) == ["ten", "unfinished", HOSTILE, "hundred", "no sampler"]
        assert head(again, "commit").is_hidden() and head(again, "weights").is_visible()
        assert not again.locator('#digits-aaaa td[data-key="commit"]').first.is_visible()
        assert head(again, "nfe").get_attribute("aria-sort") == "ascending"
    page.evaluate("location.hash = ''")
    page.wait_for_function("document.querySelector('#digits-aaaa output').textContent === '7 rows'")


def test_a_wrong_address_does_no_harm(opened):
    page = opened("#digits-aaaa.sort=nothing:up&digits-aaaa.hide=rank,nothing&x=%3Cb%3E&toy-bbbb.sort=nfe")
    assert names(page) == RANKED and head(page, "rank").is_visible()
    assert names(opened("#digits-aaaa")) == RANKED


# ---- rows and pictures -------------------------------------------------------------------------------------------


def test_a_row_opens_and_escape_closes_it(opened):
    page = opened()
    opener = page.get_by_role("button", name="Provenance of unfinished")
    opener.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.is_visible()
    text = dialog.inner_text()
    assert all(
        words in text for words in ("Provenance of unfinished", "Not ranked", "4 of 100 steps", "cafe00", "num_steps")
    )
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert page.evaluate("document.activeElement.dataset.open") == "3"


def test_a_picture_is_enlarged_by_keyboard(opened):
    page = opened()
    small = page.locator(".picture img").first
    before = small.bounding_box()["width"]
    page.locator(".picture").first.focus()
    page.keyboard.press("Enter")
    large = page.locator("#lens img")
    large.wait_for(state="visible")
    page.wait_for_function("document.querySelector('#lens img').complete")
    assert large.bounding_box()["width"] > 2 * before
    assert large.get_attribute("alt") == small.get_attribute("alt") and "ten" in page.locator("#lens").inner_text()
    page.keyboard.press("Escape")
    page.locator("#lens").wait_for(state="hidden")
    large.wait_for(state="detached")  # its contents go with the event of closing, a moment later


def test_hostile_names_stay_text(opened):
    page = opened()
    assert page.title() == "Leaderboard" and page.locator("img[src=x]").count() == 0
    page.get_by_role("button", name=f"Provenance of {HOSTILE}").click()
    page.locator("#lens h2").wait_for(state="visible")
    assert HOSTILE in page.locator("#lens h2").inner_text() and page.locator("img[src=x]").count() == 0
    assert page.title() == "Leaderboard"


# ---- themes, files, widths, paper --------------------------------------------------------------------------------


def ground(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_theme_follows_the_system_until_it_is_chosen(opened):
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    assert ground(light) == "rgb(255, 255, 255)" and ground(dark) == "rgb(16, 20, 24)"
    button = light.get_by_role("button", name="Dark theme")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    assert ground(light) == ground(dark) and button.get_attribute("aria-pressed") == "true"
    light.reload()
    assert ground(light) == ground(dark) and button.get_attribute("aria-pressed") == "true"
    light.emulate_media(media="print")
    assert ground(light) == "rgb(255, 255, 255)"


def test_downloads_are_the_files(opened):
    page = opened()
    with page.expect_download() as caught:
        page.get_by_role("button", name="Download CSV").click()
    assert caught.value.suggested_filename == "leaderboard.csv"
    with open(caught.value.path(), encoding="utf-8", newline="") as file:
        assert file.read() == as_csv(boards())


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_its_window(opened, width):
    page = opened(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#digits-aaaa .scroll").first
    assert box.evaluate("e => e.scrollWidth > e.clientWidth") or width > 400
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"), dtype=float)
    dark = (pixels < 128).mean()
    assert 0.005 < dark < 0.3  # text on white; a blank or a black picture has none or all
    page.get_by_role("button", name="Provenance of ten").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_paper_there_are_no_controls(opened):
    page = opened()
    page.emulate_media(media="print")
    assert page.get_by_role("button", name="Download CSV").is_hidden() and page.locator(".controls").first.is_hidden()
    assert names(page) == RANKED
    assert not page.get_by_role("heading", name="Provenance").first.is_visible()
    assert page.get_by_role("heading", name="Samples").first.is_visible()
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf(prefer_css_page_size=True))) < 8


def test_without_a_script_everything_can_be_read(opened):
    page = opened(java_script_enabled=False)
    assert names(page) == RANKED and page.locator("#digits-aaaa .controls").is_hidden()
    assert page.locator("svg.plot").first.is_visible() and page.locator("noscript p").is_visible()
    shown = [button for button in page.locator("button").all() if button.is_visible()]
    assert shown and all(button.is_disabled() for button in shown)
    details = page.locator("#digits-aaaa details.provenance").first
    assert not details.locator("pre").first.is_visible()
    details.locator("summary").click()
    assert details.locator("pre").first.is_visible()
