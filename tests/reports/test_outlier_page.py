"""The report on outlier tokens, from made-up maps, in text and in a browser."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import ConfigError
from dsr_jax.reports import outlier_page
from dsr_jax.reports.outlier_page import Variant, make_outlier_page
from dsr_jax.reports.page import to_json
from tests.browser import Browser, open_browser
from tests.html_pages import check_page

TIMES = (0.1, 0.9)
LOUD = {(0, 3), (2, 5)}
"""Image and token of the outliers, from the second block on."""


def variant(name: str, *, outliers: bool, registers: bool, gray: int = 90) -> Variant:
    random = np.random.default_rng(0)
    shape = (2, 3, 4, 16)  # Noise levels, blocks, images, tokens.
    norms = random.uniform(9, 11, shape).astype(np.float32)
    if outliers:
        for image, token in LOUD:
            norms[:, 1:, image, token] = 80
    maps = {
        "norms": norms,
        "pca": random.integers(0, 256, (*shape, 3), np.uint8),
        "received": random.uniform(size=shape),
        "strongest": random.uniform(size=shape),
        "cosine": random.uniform(-1, 1, shape),
    }
    if registers:
        maps["registers"] = random.uniform(size=shape)
    threshold = np.array([np.nan, 30.0, 30.0]) if outliers else np.full(3, np.nan)
    share = (norms > np.where(np.isnan(threshold), np.inf, threshold)[:, None, None]).mean((2, 3))
    statistics = [{"threshold": threshold, "outlier_share": each} for each in share]
    samples = np.full((20, 20, 3), gray, np.uint8)
    return Variant(name, (4, 4), maps, statistics, samples, ["a note"])


def example() -> str:
    variants = [
        variant("base <line>", outliers=True, registers=False),
        variant("registers", outliers=False, registers=True, gray=200),
    ]
    images = np.zeros((8, 32, 3), np.uint8)
    titles = {"outlier_share": "fraction of outliers"}
    return make_outlier_page("Outliers", variants, TIMES, titles, images)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="outlier-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_report_is_self_contained_and_holds_the_numbers() -> None:
    page = example()
    check_page(page)
    data = data_of(page)
    first = data["variants"][0]
    assert first["statistics"][0]["threshold"] == [None, 30, 30]
    norms = np.frombuffer(base64.b64decode(first["maps"]["norms"]["data"]), "<f4")
    want = variant("", outliers=True, registers=False).maps["norms"]
    np.testing.assert_array_equal(norms.reshape(want.shape), want)
    loud = {tuple(place) for place in np.argwhere(norms.reshape(want.shape)[1, 2] > 30).tolist()}
    assert loud == LOUD
    assert "base &lt;line&gt;" in page and "<line>" not in page.replace(to_json(data), "")


def test_an_encoder_has_no_noise_levels() -> None:
    one = variant("encoder", outliers=True, registers=False)
    maps = {name: values[:1] for name, values in one.maps.items()}
    alone = Variant("encoder", (4, 4), maps, one.statistics[:1])
    page = make_outlier_page("Encoder", [alone], [None], {"outlier_share": "share"})
    check_page(page)
    assert data_of(page)["times"] == [None]
    assert "gallery" not in re.findall(r'id="([\w-]+)"', page)


def test_more_than_six_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 6"):
        make_outlier_page("x", [variant("a", outliers=True, registers=True)] * 7, TIMES, {})


def test_reports_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = variant("a", outliers=True, registers=False)
    # Four maps of float32 and one of three bytes, of 2 x 3 x 4 x 16 tokens.
    monkeypatch.setattr(outlier_page, "MAX_BYTES", 384 * 19 - 1)
    with pytest.raises(ConfigError, match=r"(?s)maps take .* fewer images"):
        make_outlier_page("x", [one], TIMES, {})
    monkeypatch.setattr(outlier_page, "MAX_BYTES", 384 * 19)
    make_outlier_page("x", [one], TIMES, {})


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def choose(browser: Browser, name: str, value: object) -> None:
    browser.run(
        f"(() => {{ const control = document.getElementById('{name}');"
        f"control.value = '{value}'; control.dispatchEvent(new Event('input')) }})()"
    )


@pytest.mark.slow
def test_the_viewer_works_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(example())
    browser.open(path)
    caption = "document.querySelector('#map-0 figcaption').textContent"
    pixels = "document.querySelector('#map-0 canvas').toDataURL()"
    # The last block, the first noise level, the first image.
    assert browser.run(caption).startswith("base <line>: 1 outliers")
    marked = browser.run("viewer.outliers(viewer.data.variants[0], 0, 2, 2)")
    assert marked == [5]
    shown = {browser.run(pixels)}
    for name, value in (("map-kind", "received"), ("map-image", 2), ("map-block", 0)):
        choose(browser, name, value)
        shown.add(browser.run(pixels))
    assert len(shown) == 4, "every control changes the map"
    assert browser.run(caption).startswith("base <line>: 0 outliers"), "none after the first block"
    choose(browser, "map-kind", "registers")
    assert browser.run(caption) == "base <line>: no such map"
    browser.run("document.getElementById('map-block').focus()")
    browser.press("ArrowRight")
    assert browser.run("document.getElementById('map-block-output').textContent") == "1"
    text = browser.run("document.querySelector('#histogram-0 figcaption').textContent")
    assert "3.13 % outliers" in text
    rows = browser.run("viewer.numbers()")
    assert len(rows) == 1 + 2 * 2 * 3 and rows[0][:3] == ["variant", "t", "block"]
    assert rows[2] == ["base <line>", 0.1, 1, 30, 0.03125]
    assert browser.run("histogram([1, 10, 99], 1, 100, 2)") == [1, 2]
    assert browser.run("savePng(document.getElementById('map-1'))") > 100
    choose(browser, "gallery-left", 1)
    images = "[...document.querySelectorAll('#gallery img')].map((image) => image.alt)"
    assert browser.run(images) == ["registers", "registers"]
    named = browser.run("document.querySelector('#gallery label').textContent")
    assert named == "registers (left) and registers (right)"
    assert browser.errors == [] and browser.requests == []


@pytest.mark.slow
def test_many_tokens_and_numbers_that_are_not_finite(browser: Browser, tmp_path: Path) -> None:
    shape = (1, 2, 64, 4096)
    norms = np.ones(shape, np.float32)
    norms[0, 0, 0, :2], norms[0, 1] = np.nan, np.inf
    statistics = {"threshold": np.full(2, np.nan), "outlier_share": np.zeros(2)}
    small = variant("small", outliers=True, registers=False)
    short = Variant("short", (4, 4), {"norms": small.maps["norms"][:1, :1]}, small.statistics[:1])
    many = Variant("many", (64, 64), {"norms": norms, "cosine": norms}, [statistics])
    path = tmp_path / "page.html"
    path.write_text(make_outlier_page("Many", [many, short], TIMES[:1], {"outlier_share": "share"}))
    browser.open(path)
    for block in (0, 1):
        choose(browser, "map-block", block)
    caption = "document.querySelector('#histogram-{} figcaption').textContent"
    assert browser.run(caption.format(0)).startswith("many: norms after block 1")
    assert browser.run(caption.format(1)) == "short: no block 1"
    assert browser.run("color(NaN)") == [128, 128, 128]
    assert browser.errors == []


@pytest.mark.slow
def test_the_maps_are_on_a_screenshot(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(example())
    for dark in (False, True):
        browser.open(path, dark=dark)
        colors = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
        assert (colors == (253, 231, 37)).all(-1).sum() > 500, "the outlier's color"
        assert (colors == (255, 64, 64)).all(-1).sum() > 50, "the marks and the threshold"
    browser.open(path, width=360)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert browser.errors == []
