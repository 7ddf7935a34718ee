"""The HTML page of `nestpatch report` in Chromium: what is seen, heard, printed and reached by the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nestpatch.evaluation.answers import write_answers
from nestpatch.formats import nest
from nestpatch.report.page import write_report
from tests.browser import CHROMIUM, WHY_NOT, Browser, started
from tests.helpers import tiny_checkpoint
from tests.report_pages import HIDDEN, HOSTILE, evaluation, hostile_pack, write_measured
from tests.test_shipped_packs import SMOLLM2


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    return write_measured(tmp_path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(WHY_NOT)
    pytest.importorskip("playwright")
    with started() as process:
        yield process


def test_hostile_text_does_nothing_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    words = " ".join(HOSTILE)
    nest.write(hostile_pack(tiny_checkpoint(tmp_path / "model")), tmp_path / "hostile.nest")
    write_answers(evaluation(words), tmp_path / "answers.jsonl")
    file = write_report(
        str(tmp_path / "hostile.nest"), tmp_path / "x.html", answers=tmp_path / "answers.jsonl", show_harmful=True
    )
    with browser.open(file, width=390) as opened:
        opened.unfold()
        assert opened.messages == []
        assert opened.requests == [file.as_uri()]
        assert opened.page.locator("script, img, iframe, [onload], [onerror]").count() == 0
        assert opened.page.locator("style").count() == 1
        assert opened.page.locator(".lead").first.inner_text() == words_shown(words)
        assert opened.page.locator("blockquote").count() > 10
        assert opened.overflow() <= 0


def words_shown(words: str) -> str:
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), words)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_is_readable_and_asks_for_nothing(
    browser: Browser, measured: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    evaluated = write_report(str(measured), tmp_path / "e.html", answers=tmp_path / "answers.jsonl")
    for file in (write_report(str(SMOLLM2), tmp_path / "p.html"), evaluated):
        with browser.open(file, width=width, scheme=scheme) as opened:
            opened.unfold()
            assert opened.messages == []
            assert opened.requests == [file.as_uri()]
            assert opened.overflow() <= 0
            texts = opened.contrasts()
            assert len(texts) > 100
            assert [one for one in texts if one[0] < one[1]] == []


def test_the_keyboard_reaches_everything_in_order(browser: Browser, measured: Path, tmp_path: Path) -> None:
    file = write_report(str(measured), tmp_path / "e.html", answers=tmp_path / "answers.jsonl")
    with browser.open(file) as opened:
        order = "a[href], summary, [tabindex='0']"
        shown = "(all) => all.filter((one) => one.checkVisibility()).map((one) => one.textContent.trim().slice(0, 40))"
        expected = opened.page.locator(order).evaluate_all(shown)
        reached = [opened.tab() for _ in expected]
        assert [text for _, text, _ in reached] == expected
        assert all(seen for _, _, seen in reached)
        assert reached[0][1] == "Skip to the report"


def test_charts_speak(browser: Browser, measured: Path, tmp_path: Path) -> None:
    """Each has a name and a description of its own, and a table beside it has its numbers."""
    words = "(all) => all.map((id) => document.getElementById(id).textContent)"
    with browser.open(write_report(str(measured), tmp_path / "e.html")) as opened:
        charts = [one.get_attribute("aria-labelledby").split() for one in opened.page.locator("svg[role=img]").all()]
        assert len(charts) == 4 + 3 + 2
        assert len({name for ids in charts for name in ids}) == 2 * len(charts)
        said = [opened.page.evaluate(words, ids) for ids in charts]
        assert ["attack_success: attack success", "before 84.0%, 75.6% to 89.9%; after 8.0%, 4.1% to 15.0%"] in said
        assert opened.page.locator("table").count() == 5, "suites, categories, the curve, its categories, and an ablation"


def test_bars_and_whiskers_are_as_long_as_their_numbers(browser: Browser, measured: Path, tmp_path: Path) -> None:
    """Of attack success: 84 % before, 8 % after with 4.1 to 15 %."""
    with browser.open(write_report(str(measured), tmp_path / "e.html")) as opened:
        chart = opened.page.locator("svg.bars").first
        before, after = (chart.locator(f".serie-{n} rect.rect").bounding_box() for n in (0, 1))
        assert before["y"] < after["y"]
        assert before["width"] / after["width"] == pytest.approx(84 / 8, rel=0.05)
        whisker = chart.locator(".plot.overlay .serie-1 .ci path").evaluate("(p) => { const b = p.getBBox(); return b.width; }")
        bar = chart.locator(".serie-1 rect.rect").evaluate("(p) => p.getBBox().width")
        assert whisker / bar == pytest.approx((15.0 - 4.11) / 8, rel=0.02)


def test_paper_shows_what_is_folded_but_not_what_is_harmful(browser: Browser, measured: Path, tmp_path: Path) -> None:
    file = write_report(str(measured), tmp_path / "e.html", answers=tmp_path / "answers.jsonl", show_harmful=True)
    with browser.open(file, media="print", scheme="dark") as opened:
        assert not opened.page.locator("nav").is_visible()
        assert all(one.is_visible() for one in opened.page.locator("#measured details table").all())
        assert not opened.page.locator("details.harmful blockquote").first.is_visible()
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 247)"
        assert len(opened.page.pdf()) > 10_000
