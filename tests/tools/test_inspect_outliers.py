"""The report's tool on runs, converted weights and encoders."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax import export, train
from dsr_jax.core.errors import ConfigError
from tests.browser import open_browser
from tests.html_pages import check_page
from tests.programs import quick_programs
from tools import inspect_outliers, plant_registers

CONFIG = Path(__file__).parents[2] / "configs" / "digits.py"
TINY = (
    *("--config.model.hidden_size=16", "--config.model.depth=2", "--config.model.num_heads=2"),
    *("--config.registers.start=1", "--config.eval.classifier=", "--config.sample.every_steps=0"),
    *(
        "--config.registers.num=4",
        "--config.train.steps=2",
        "--config.ema.decays=(0.5,)",
        "--config.sample.ema=0.5",
    ),
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def data_of(path: Path) -> dict:
    page = path.read_text()
    check_page(page)
    found = re.search(r'id="outlier-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.slow
def test_runs_side_by_side(tmp_path: Path) -> None:
    run, again, out = (tmp_path / name for name in ("registers", "again", "report.html"))
    train.main([f"--config={CONFIG}:runlocal", f"--workdir={run}", *TINY])
    shutil.copytree(run, again)
    inspect_outliers.main(
        [f"--workdir={run}", "--compare", str(again), f"--out={out}", "--times=0.2,0.8"]
        + ["--num-images=3", "--samples=4"]
    )
    data = data_of(out)
    assert [each["name"] for each in data["variants"]] == ["registers", "again"]
    assert data["times"] == [0.2, 0.8]
    registers, other = data["variants"]
    for key in ("statistics", "samples", "maps"):
        assert registers[key] == other[key], f"{key} of the same weights"
    assert (registers["blocks"], registers["images"], registers["grid"]) == (2, 3, [4, 4])
    assert registers["samples"].startswith("data:image/png")
    assert "registers" in registers["maps"]
    attention = [level["register_attention"] for level in registers["statistics"]]
    assert all(before == 0 and after > 0 for before, after in attention)
    folder = tmp_path / "exported"
    export.main([f"--workdir={run}", f"--out={folder}"])
    inspect_outliers.main(
        [f"--converted={folder}", f"--config={CONFIG}:runlocal", f"--out={out}", "--samples=0"]
        + ["--times=0.2,0.8", "--num-images=3", *TINY[:4], TINY[6]]
    )
    (converted,) = data_of(out)["variants"]
    for ours, theirs in zip(converted["statistics"], registers["statistics"], strict=True):
        for statistic in ("norm_p50", "norm_max", "register_attention", "effective_rank"):
            np.testing.assert_allclose(ours[statistic], theirs[statistic], rtol=1e-5)
    with open_browser(tmp_path / "browser") as browser:
        browser.open(out)
        assert browser.run("document.querySelectorAll('canvas').length") == 3
        assert browser.errors == [] and browser.requests == []


@pytest.mark.slow
def test_an_encoder_with_and_without_registers(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for index in range(8):
        pixels = random.integers(110, 140, (64, 64, 3), np.uint8)
        y, x = 8 * random.integers(1, 8, 2)
        pixels[y : y + 8, x : x + 8] = random.integers(0, 2, (8, 8, 1), np.uint8) * 255
        Image.fromarray(pixels).save(images / f"{index}.png")
    encoder, out = tmp_path / "encoder", tmp_path / "report.html"
    plant_registers.main([f"--root={images}", f"--out={encoder}"])
    inspect_outliers.main(
        [f"--encoder={encoder}", f"--neurons={encoder / 'planted.json'}", f"--images={images}"]
        + [f"--out={out}", "--image-size=64", "--num-images=8"]
    )
    plain, cured = data_of(out)["variants"]
    assert max(plain["statistics"][0]["outlier_share"]) > 0
    assert cured["statistics"][0]["outlier_share"][-1] == 0
    assert "registers" not in plain["maps"] and "registers" in cured["maps"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--encoder=x"], "needs images"),
        (["--workdir=x", "--neurons=y"], "--neurons goes with --encoder"),
        (["--workdir=x", "--config.seed=1"], "goes with --converted"),
        (["--workdir=x", "--compare", *"abcdef"], "at most 6"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        inspect_outliers.main([*arguments, f"--out={tmp_path / 'report.html'}"])
