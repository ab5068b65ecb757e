"""The report in a browser: nothing in the console, nothing asked for, no wider than a phone, and the same page once parsed."""

from pathlib import Path

import pytest

from speckd.report.build import read
from speckd.report.page import figures_of, render, template
from speckd.report.shown import Shown
from tests.report.chromium import BROWSER, Page
from tests.report.folders import write_all, write_run
from tests.report.payloads import PAYLOADS

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium here (SPECKD_CHROMIUM names one): the report in a browser is NOT tested"
)
#: Elements and attributes as the browser sees them, texts and pictures left out.
SKELETON = """[...document.querySelectorAll('*')].map(one => one.tagName + [...one.attributes].map(
    a => ' ' + a.name + (/^(alt|aria-label|src|srcset)$/.test(a.name) ? '' : '=' + a.value)).join('')).join('\\n')"""
CARD = "getComputedStyle(document.querySelectorAll('mark[aria-describedby] .card')[1]).display"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with Page(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def said(browser: Page) -> list[str]:
    """To the console, or as an error."""
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    return [str(event["params"]) for event in browser.events if event["method"] in kinds]


def asked(browser: Page) -> list[str]:
    """Addresses other than pictures in the page itself."""
    sent = [event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:image/png;base64,")]


def test_the_page_says_nothing_and_asks_for_nothing(page: Path, browser: Page) -> None:
    browser.events.clear()
    for width, height, dark in ((1280, 900, False), (390, 844, True), (360, 740, False)):
        browser.size(width, height, dark)
        browser.open(page)
        browser.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert browser.ask("document.documentElement.scrollWidth") <= width, f"wider than {width}"
        assert browser.ask("[...document.images].every(one => one.naturalWidth > 0)")
    browser.wait(0.3)
    assert said(browser) == []
    assert set(asked(browser)) == {page.resolve().as_uri()}


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (360, 740)])
def test_a_card_opens_where_one_points_and_by_the_keyboard(page: Path, browser: Page, width: int, height: int) -> None:
    browser.size(width, height)
    browser.open(page)
    assert browser.ask(CARD) == "none"
    find = "document.querySelectorAll('mark[aria-describedby]')[1]"
    browser.ask(f"{find}.scrollIntoView({{block: 'start'}})")
    x, y = browser.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({find}.querySelector('.word').getBoundingClientRect())")
    browser.point_at(x, y)
    assert browser.ask(CARD) == "block"
    left, right, bottom = browser.ask(
        f"(r => [r.left, r.right, r.bottom])({find}.querySelector('.card').getBoundingClientRect())"
    )
    assert left >= 0 and right <= width and bottom <= height, "the card is in view"
    browser.point_at(1, 1)
    assert browser.ask(CARD) == "none"
    browser.ask("document.querySelectorAll('mark[aria-describedby]')[0].focus()")
    browser.press_tab()
    assert browser.ask(CARD) == "block"
    assert browser.ask("document.activeElement.innerText").replace("\n", " ").strip() != ""


@pytest.mark.usefixtures("undrawn")
def test_payloads_change_nothing_for_the_browser(tmp_path: Path, browser: Page) -> None:
    """A browser's parser forgives and mends: it must find the same elements, too. A dozen payloads in one text."""
    shown = Shown()
    page = template(shown)

    def seen(name: str, payload: str) -> str:
        sources = read([write_run(tmp_path / name, lambda text: f"{text}{payload}"), *write_all(tmp_path / f"{name}-all")[3:]])
        path = tmp_path / f"{name}.html"
        path.write_text(render(page, sources, figures_of(sources, shown)), encoding="utf-8")
        browser.open(path)
        return browser.ask(SKELETON)

    benign = seen("benign", "")
    browser.events.clear()
    assert benign.count("\n") > 300
    for start in range(0, len(PAYLOADS), 12):
        assert seen(f"p{start}", " ".join(PAYLOADS[start : start + 12])) == benign, PAYLOADS[start : start + 12]
    assert said(browser) == []
    assert all(url.startswith("file://") and url.endswith(".html") for url in asked(browser))


def test_a_real_report_is_printed_without_cards(page: Path, browser: Page) -> None:
    browser.open(page)
    browser.media(printed=True)
    browser.ask("document.querySelectorAll('mark[aria-describedby]')[1].focus()")
    assert browser.ask(CARD) == "none"
    browser.media()
