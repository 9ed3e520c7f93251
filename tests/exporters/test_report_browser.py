"""The pages in a real browser: they render, log nothing, show their figures, and fit a phone."""

from __future__ import annotations

from typing import Any

import pytest

from fxprune.exporters.report_comparison import write_comparison
from fxprune.exporters.report_writer import write_report
from tests.browser import PHONE, WIDTHS, look_at
from tests.comparisons import COMPARISON
from tests.exporters.test_report import FULL, SECTIONS

LONG = "a-model-directory-with-a-name-that-does-not-end-and-has-no-place-to-break-it-" * 3
BROKEN = """<!DOCTYPE html><meta charset="utf-8"><title>broken</title>
<p style="width: 900px">wide</p><figure></figure><script>console.error("on purpose")</script>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """All pages in one start of the browser, one that is broken on purpose among them."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "broken.html").write_text(BROKEN, encoding="utf-8")
    hostile = {**COMPARISON, "forms": [{**form, "where": LONG} for form in COMPARISON["forms"]]}
    pages = {
        "run": write_report({**FULL, "model": LONG, "method": LONG}, folder / "run")[1],
        "comparison": write_comparison(hostile, folder / "comparison"),
        "broken": folder / "broken.html",
    }
    (folder / "browser").mkdir()
    return look_at(pages, folder / "browser")


@pytest.mark.parametrize("page", ["run", "comparison"])
def test_a_page_fits_phone_and_desk(seen: tuple[dict[str, dict[str, Any]], list[str]], page: str) -> None:
    for width in WIDTHS:
        found = seen[0][page][str(width)]
        assert found["client"] == width
        assert found["wide"] == []
        assert found["scroll"] == width
        assert found["height"] > 1000


def test_a_page_shows_its_sections_and_one_drawing_a_figure(
    seen: tuple[dict[str, dict[str, Any]], list[str]],
) -> None:
    for width in WIDTHS:
        run, comparison = (seen[0][page][str(width)] for page in ("run", "comparison"))
        assert run["sections"] == list(SECTIONS)
        assert run["figures"] == [1, 1, 1, 1]
        assert comparison["figures"] == [1]
        assert comparison["sections"][:3] == ["forms", "differences", "figures"]
        assert min(run["texts"] + comparison["texts"]) > 9  # CSS pixels: legible without zooming


def test_the_console_stays_empty(seen: tuple[dict[str, dict[str, Any]], list[str]]) -> None:
    assert [line for line in seen[1] if "broken.html" not in line] == []


def test_what_is_broken_would_be_seen(seen: tuple[dict[str, dict[str, Any]], list[str]]) -> None:
    found, console = seen
    assert found["broken"][str(PHONE)]["scroll"] > PHONE
    assert found["broken"][str(PHONE)]["wide"] == ["P."]
    assert found["broken"][str(PHONE)]["figures"] == [0]
    assert any("on purpose" in line and "broken.html" in line for line in console)
