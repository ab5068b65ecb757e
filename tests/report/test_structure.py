"""What is in a report cannot change the report: its structure is the same whatever its texts are."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from speckd.report import charts
from speckd.report.build import read
from speckd.report.page import figures_of, render, template
from speckd.report.shown import Shown
from tests.report.folders import write_all
from tests.report.payloads import PAYLOADS
from tests.report.skeleton import skeleton

SHOWN = Shown()
TEMPLATE = template(SHOWN)


@pytest.fixture(scope="module")
def html(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def page_with(place: Path, payload: str) -> str:
    """The page with a text in every field; one of the three runs has a record of tokens, for the sake of time."""
    folders = write_all(place, lambda text: f"{text}{payload}")
    for run in folders[1:3]:
        (run / "tokens.jsonl").unlink()
    sources = read(folders)
    return render(TEMPLATE, sources, figures_of(sources, SHOWN))


def test_there_are_200_payloads() -> None:
    assert len(set(PAYLOADS)) >= 200


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("part", range(4))
def test_no_text_changes_the_structure(part: int, tmp_path: Path, counted) -> None:
    benign = skeleton(page_with(tmp_path / "benign", ""))
    assert len(benign) > 1000
    for number, payload in enumerate(PAYLOADS[part::4]):
        counted()
        found = skeleton(page_with(tmp_path / str(number), payload))
        assert found == benign, (
            f"payload {payload!r}: {next(pair for pair in zip(found, benign, strict=False) if pair[0] != pair[1])}"
        )


@pytest.mark.usefixtures("undrawn")
def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    """Escaped, not removed: who looks for what a model wrote finds it."""
    text = page_with(tmp_path, "<b onclick='x'>&amp;{{ 7 * 7 }}")
    assert "&lt;b onclick=&#39;x&#39;&gt;&amp;amp;{{ 7 * 7 }}" in text and "49" not in re.findall(r"Rome[^<]*", text)[0]


def test_pictures_are_drawn_whatever_the_names_are() -> None:
    """Dollar signs are no formula, letters without a shape no error, a name with an underscore is in the legend."""
    for name in ("$\\frac{1}{0}$", "_hidden", "\u202e你好\U0001f468", "x" * 400, "\x00\ud800"):
        lines = tuple(charts.Line(f"{name}{style}", (0.0, 1.0), (1.0, 2.0), style) for style in (0, 1))
        panel = charts.Panel(name, "step", "loss", lines, ticks=(name, name))
        assert charts._drawn(panel, charts._DARK, SHOWN).startswith(b"\x89PNG")


# ---- what the page promises ------------------------------------------------------------------------------------------------


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    reader = _Elements()
    reader.feed(html)
    return reader.found


def test_nothing_runs_and_nothing_is_loaded(html: str, elements) -> None:
    policy = next(values["content"] for tag, values in elements if values.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "a"} & {tag for tag, _ in elements}
    for tag, values in elements:
        assert not [name for name in values if name.startswith("on") or name in ("style", "href", "action")], (tag, values)
        for name in ("src", "srcset"):
            assert name not in values or values[name].startswith("data:image/png;base64,")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style and "<" not in style
    assert "http" not in re.sub(r"http-equiv", "", html)


def test_pictures_have_words_and_tables_have_heads(elements) -> None:
    pictures = [values for tag, values in elements if tag == "img"]
    assert len(pictures) >= 9 and all(len(values["alt"]) > 20 for values in pictures)
    assert any(re.search(r"from [\d.]+ at step", values["alt"]) for values in pictures), "a picture says its numbers"
    tags = [tag for tag, _ in elements]
    assert tags.count("table") == tags.count("caption") == tags.count("thead") > 5
    assert all(values.get("scope") in ("row", "col") for tag, values in elements if tag == "th")


def test_headings_are_in_order_and_ids_unique(elements) -> None:
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [values["id"] for _, values in elements if "id" in values]
    assert len(ids) == len(set(ids))
    named = [values[key] for _, values in elements for key in ("aria-labelledby", "aria-describedby") if key in values]
    assert set(named) <= set(ids)
    assert next(values for tag, values in elements if tag == "html")["lang"] == "en"


def test_a_verdict_is_no_colour_alone(html: str, elements) -> None:
    """Words for who hears the page, another line below the token for who sees no colours."""
    assert html.count('<span class="unseen"> (rejected)</span>') == 6  # one of seven tokens, two steps, three runs
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "2px solid var(--acc-line)" in style and "2px dashed var(--rej-line)" in style
    marks = [values for tag, values in elements if tag == "mark" and "aria-describedby" in values]
    assert len(marks) == 7 * 2 * 3 and all(values["tabindex"] == "0" for values in marks)
