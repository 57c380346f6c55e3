"""The template: what it holds, and that its script works in a browser."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsr_jax.reports.page import (
    bar,
    compare_pictures,
    figure,
    items,
    line_chart,
    make_page,
    picture,
    step_pictures,
    table,
    to_json,
)
from tests.browser import Browser, open_browser
from tests.html_pages import check_page

RED = np.full((8, 8, 3), (255, 0, 0), np.uint8)
BLUE = np.full((8, 8, 3), (0, 0, 255), np.uint8)


def example() -> str:
    curve = {"a <run>": [(float(x), math.sin(x)) for x in range(9)], "b": [(3.0, 0.5)]}
    sections = [
        ("Table", table(("name", "x"), [("one", "1"), ('a "quote", here', "2")], "numbers")),
        ("Curves", line_chart("Loss", curve)),
        ("Picture", picture(RED, "map", "a map", [["x", "y"], [1, 2.5]])),
        ("Steps", step_pictures([("step 1", RED), ("step 2", BLUE)], "samples", "Samples")),
        ("Compare", compare_pictures(("before", RED), ("after", BLUE), "gallery")),
        ("Rest", bar({"x": 1, "y <": 3}) + items(["<b>"]) + figure("<svg></svg>", "empty", "c")),
    ]
    return make_page("A <page>", sections, intro="<p>Intro</p>")


def test_pages_are_well_formed_and_self_contained() -> None:
    page = example()
    check_page(page)
    for escaped in ("A &lt;page&gt;", "a &lt;run&gt;", "y &lt;", "&lt;b&gt;"):
        assert escaped in page
    assert "prefers-color-scheme: dark" in page


def test_data_cannot_close_its_script() -> None:
    assert "</script>" not in to_json(["</script><b>"])
    assert "<!--" not in to_json(["<!--<script>"])
    assert json.loads(to_json(["</script><!--"])) == ["</script><!--"]


def test_curves_span_their_axes() -> None:
    chart = line_chart("Loss", {"a": [(0.0, 1.0), (10.0, 3.0)]}, size=(200, 100))
    assert 'points="56.0,66.0 188.0,24.0"' in chart
    assert line_chart("Loss", {}) == ""
    assert "<circle" in line_chart("Loss", {"a": [(1.0, 1.0)]})
    # Half a unit is nothing beside 2^63, and too much beside a learning rate.
    assert "<circle" in line_chart("Steps", {"a": [(2.0**63, 2.0**63)]})
    assert ">0.00015</text>" in line_chart("Rate", {"a": [(0.0, 1e-4), (9.0, 1e-4)]})


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.slow
def test_controls_work_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(example())
    browser.open(path)
    assert browser.run("tableRows(document.querySelector('table'))")[1] == ["one", "1"]
    csv = browser.run("toCsv(tableRows(document.querySelector('table')))")
    assert csv == 'name,x\none,1\n"a ""quote"", here",2\n'
    for name in ("loss", "map"):
        assert browser.run(f"savePng(document.getElementById('{name}'))") > 50
    # Saved files: the names of the links that are clicked.
    browser.run(
        "window.saved = []; HTMLAnchorElement.prototype.click = function () "
        "{ window.saved.push(this.download) }"
    )
    browser.run("document.querySelectorAll('#map button').forEach((b) => b.click())")
    assert browser.run("new Promise((r) => setTimeout(() => r(window.saved.sort()), 500))") == [
        "map.csv",
        "map.png",
    ]
    shown = "[...document.querySelectorAll('#samples img')].map((image) => image.hidden)"
    assert browser.run(shown) == [True, False]
    browser.run("document.querySelector('input[data-steps]').focus()")
    browser.press("ArrowLeft")
    assert browser.run(shown) == [False, True]
    assert browser.run("document.querySelector('#samples output').textContent") == "step 1"
    clip = "document.querySelectorAll('.compare img')[1].style.clipPath"
    assert browser.run(clip).endswith("50%)")
    browser.run("document.querySelector('input[data-compare]').focus()")
    browser.press("ArrowRight", "ArrowRight")
    assert browser.run(clip).endswith("52%)")
    assert browser.errors == [] and browser.requests == []


@pytest.mark.slow
def test_keys_themes_and_phones(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(example())
    browser.open(path, dark=True)
    ground = "getComputedStyle(document.body).backgroundColor"
    assert browser.run(ground) == "rgb(16, 20, 26)"
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    browser.press("Tab", "Enter")
    assert browser.run(ground) == "rgb(255, 255, 255)"
    browser.open(path, width=360)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.errors == []
