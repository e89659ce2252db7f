"""The report in a real browser: narrow and wide, light and dark, on paper, and with markup in everything it shows."""

import nbformat
import pytest
from test_report import FIGURE, NOTEBOOKS, RECORD, hostile_report, write

from llmlab import InputError
from llmlab.lab.report import report
from llmlab.lab.report.pages import render
from llmlab.lab.report.pdf import find_chromium

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
try:
    CHROMIUM = find_chromium()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

WIDE = """
import pandas as pd
print("a line without a space " + "x" * 500)
print("many words " * 200)
a_long_line = ["a string that goes on beyond the edge of any page", "a string that goes on beyond the edge of any page"]
pd.DataFrame([[1.234567] * 19] * 3, columns=[f"column number {k}" for k in range(19)])
"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report on two small notebooks, one of which fails at its end; PDFs too."""
    home = tmp_path_factory.mktemp("home")
    (home / "notebooks").mkdir()
    first = write(home / "notebooks", "00_wide", FIGURE, WIDE, RECORD)
    second = write(home / "notebooks", "01_fails", FIGURE.replace('"line"', '"other"'), "1 / 0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_HOME", str(home))
        report([first, second], output=home / "report", parameters={"x": 3}, pdf=True)
    return home / "report"


def opened(browser, page, width=1280, scheme="light", **context):
    """The page with what it complained about and what it asked for outside."""
    session = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **context)
    tab, complaints, requests = session.new_page(), [], []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))

    def route(asked):
        if asked.request.url.startswith(("file:", "data:")):
            asked.continue_()
        else:
            requests.append(asked.request.url)
            asked.abort()

    tab.route("**/*", route)
    tab.goto(page.as_uri())
    return tab, complaints, requests


LUMINANCE = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].map(
    text => text.match(/[0-9.]+/g).slice(0, 3).reduce((sum, value) => sum + Number(value), 0) / 765)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["index", "00_wide", "01_fails"])
def test_a_page_fits_is_whole_and_keeps_to_itself(browser, folder, name, width, scheme):
    tab, complaints, requests = opened(browser, folder / f"{name}.html", width, scheme)
    assert complaints == []
    assert requests == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    images = tab.evaluate("[...document.images].map(i => [i.alt, i.naturalWidth, i.getBoundingClientRect().right])")
    assert len(images) == (2 if name == "index" else 1)
    for alt, pixels, right in images:
        assert alt == "A line from <x> to 2."
        assert pixels > 0
        assert right <= width
    paper, ink = tab.evaluate(LUMINANCE)
    assert (paper > 0.95 and ink < 0.4) if scheme == "light" else (paper < 0.1 and ink > 0.8)
    tab.context.close()


# Elements that reach beyond the page, which nothing around them scrolls.
BEYOND = """width => [...document.querySelectorAll("body *")].filter(element => {
    if (element.getBoundingClientRect().right <= width + 1) return false;
    for (let box = element.parentElement; box; box = box.parentElement)
        if (["auto", "scroll"].includes(getComputedStyle(box).overflowX)) return false;
    return true;
}).map(element => element.outerHTML.slice(0, 80))"""
SIZES = """selector => [...document.querySelectorAll(selector)].map(element => element.getBoundingClientRect())
    .map(box => [box.width, box.height])"""
VISIBLE = "[...document.querySelectorAll('details.code pre')].map(element => element.checkVisibility())"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_of_the_lab_fits_and_its_equations_are_drawn(browser, tmp_path, path):
    page = tmp_path / f"{path.stem}.html"
    page.write_text(render(nbformat.read(path, as_version=4), path.stem, path.parent))
    for width in (1280, 400):
        tab, complaints, requests = opened(browser, page, width)
        assert complaints == requests == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(BEYOND, width) == []
        equations = tab.evaluate(SIZES, "math")
        assert equations and all(wide > 4 and high > 4 for wide, high in equations)
        assert not any(folded := tab.evaluate(VISIBLE)) and folded
        tab.locator("summary").first.click()
        assert tab.evaluate(VISIBLE) == [True] + folded[1:]
        tab.emulate_media(media="print")
        assert all(tab.evaluate(VISIBLE))
        tab.context.close()


def test_wide_tables_scroll_inside_their_cell_and_code_wraps(browser, folder):
    tab, _, _ = opened(browser, folder / "00_wide.html", 400)
    table = tab.locator(".jp-RenderedHTML").first
    assert table.evaluate("e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX") == "auto"
    assert (
        tab.evaluate("Math.max(...[...document.querySelectorAll('pre')].map(e => e.getBoundingClientRect().right))")
        <= 400
    )
    tab.context.close()


def test_the_index_leads_to_every_page(browser, folder):
    tab, _, _ = opened(browser, folder / "index.html")
    tab.get_by_role("link", name="About 00_wide").click()
    assert tab.title() == "About 00_wide"
    tab.get_by_role("link", name="llmlab report").click()
    assert tab.title() == "llmlab report"
    tab.context.close()


def test_pdf_of_every_page_without_paths_of_this_machine(folder):
    for name in ("index", "00_wide", "01_fails"):
        content = (folder / f"{name}.pdf").read_bytes()
        assert content.startswith(b"%PDF")
        assert content.rstrip().endswith(b"%%EOF")
        assert b"file:" not in content


def test_no_markup_runs(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    for page in hostile_report(tmp_path):
        tab, _, requests = opened(browser, page, bypass_csp=True)  # escaping alone must hold
        tab.wait_for_timeout(200)
        assert tab.evaluate("typeof window.hit") == "undefined"
        assert requests == []
        tab.context.close()


def test_not_even_html_that_a_notebook_displays_runs_or_asks_for_anything(browser, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    shown = (
        "<b>bold</b><script>window.hit = 1</script><img src='http://localhost/x.png' alt='' onerror='window.hit = 2'>"
    )
    path = write(tmp_path / "notebooks", "00_html", f"from IPython.display import HTML\nHTML({shown!r})")
    report([path], output=tmp_path / "report")
    tab, complaints, requests = opened(browser, tmp_path / "report" / "00_html.html")
    tab.wait_for_timeout(200)
    assert tab.locator("b", has_text="bold").count() == 1
    assert tab.evaluate("typeof window.hit") == "undefined"
    assert requests == []
    assert any("Content Security Policy" in complaint for complaint in complaints)
    tab.context.close()
