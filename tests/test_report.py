"""The report command on runs that are complete, in progress, and damaged."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsr_jax import report
from dsr_jax.core.errors import ConfigError, DamagedFileError
from dsr_jax.reports.outlier_records import to_record
from dsr_jax.sampling.images import save_png_grid
from tests.browser import open_browser
from tests.html_pages import check_page


def make_run(folder: Path, *, registers: int, complete: bool) -> Path:
    """Writes the files of a run, the last record cut short if it is still going."""
    folder.mkdir(parents=True)
    config = {"train": {"steps": 40}, "registers": {"num": registers}, "model": {"name": "sit"}}
    (folder / "config.json").write_text(json.dumps(config))
    starts = [{"time": f"2026-01-0{day}", "packages": {"jax": "1.2"}} for day in (2, 3)]
    (folder / "provenance.json").write_text(json.dumps(starts))
    lines = []
    for step in (10, 20, 30, 40):
        record = {"loss": 1 / step, "grad_norm": 2.0, "mfu": 0.25 if step > 10 else None}
        record |= {"loss_t/0.00-0.50": 0.1 * step, "loss_t/0.50-1.00": None}
        lines.append(json.dumps({"step": step, **record}))
        found = {"norm_max": np.array([9.0, step]), "norm_p50": np.ones(2)}
        found["outlier_share"] = np.array([0.0, 0.125])
        lines.append(json.dumps({"step": step, **to_record((0.5,), [found])}))
    text = "\n".join(lines) + "\n"
    (folder / "metrics.jsonl").write_text(text if complete else text[: len(text) - 300])
    for step in (20, 40):
        images = np.full((4, 8, 8, 3), step, np.uint8)
        save_png_grid(folder / "samples" / f"step_{step:08d}.png", images)
    if complete:
        (folder / "summary.json").write_text('{"steps": 40, "loss": 0.025}')
        (folder / "scores").mkdir()
        scores = {"scores": {"fid": 12.25}, "recipe": {}}
        (folder / "scores" / "step_00000040.scores.json").write_text(json.dumps(scores))
    return folder


def test_a_complete_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "base", registers=0, complete=True)
    report.main([f"--workdir={run}"])
    assert "written" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    check_page(page)
    for content in (
        "complete",
        "12.25",
        "Gradient norm",
        "25.0%",
        "t 0.00-0.50",
        "2026-01-02",
        "jax 1.2",
    ):
        assert content in page, content
    assert page.count("data:image/png") == 4, "two samples and two pictures of outliers"
    assert "t 0.50-1.00" not in page, "a curve without numbers"
    assert "[40,0.5,1," in page, "the numbers of the maps"


def test_runs_beside_each_other_one_of_them_in_progress(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "base", registers=0, complete=True),
        make_run(tmp_path / "registers", registers=4, complete=False),
    ]
    (runs[1] / "summary.json").write_text('{"steps": 4')
    out = tmp_path / "both.html"
    report.main([f"--workdir={runs[0]}", str(runs[1]), f"--out={out}"])
    page = out.read_text()
    check_page(page)
    assert "step 40 of 40" in page or "step 30 of 40" in page
    assert "registers.num" in page and "<td>0</td><td>4</td>" in page


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = tmp_path / "new"
    run.mkdir()
    (run / "config.json").write_text('{"train": {"steps": 5}}')
    report.main([f"--workdir={run}"])
    page = (run / "report.html").read_text()
    check_page(page)
    assert "step 0 of 5" in page and "Nothing is recorded" in page


def test_names_are_no_markup(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, registers=4, complete=True)
        for name in ("<img src=x>", "<script>alert(1)")
    ]
    config = {"train": {"steps": 40}, "model": {"name": "<b>bold</b>"}}
    (runs[0] / "config.json").write_text(json.dumps(config))
    report.main([f"--workdir={runs[0]}", str(runs[1]), f"--out={tmp_path / 'page.html'}"])
    page = (tmp_path / "page.html").read_text()
    check_page(page)
    for markup in ("<img src=x>", "<script>alert", "<b>bold"):
        assert markup not in page


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "base", registers=0, complete=True)
    (run / "provenance.json").write_text("[" * 100_000)
    (run / "scores" / "step_00000040.scores.json").write_bytes(b"\xff{")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "loss": "x", "mfu": true}\n')
    (run / "scores" / "other.scores.json").write_text('{"scores": [1]}')
    report.main([f"--workdir={run}"])
    check_page((run / "report.html").read_text())
    (run / "plan").mkdir()
    (run / "plan" / "report.json").write_text('{"fits": true}')
    with pytest.raises(DamagedFileError, match=r"plan/report\.json is damaged: KeyError"):
        report.main([f"--workdir={run}"])


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        report.main([f"--workdir={tmp_path}"])


@pytest.mark.slow
def test_the_page_opens_in_a_browser(tmp_path: Path) -> None:
    run = make_run(tmp_path / "base", registers=0, complete=True)
    report.main([f"--workdir={run}"])
    with open_browser(tmp_path / "browser") as browser:
        for width in (1200, 360):
            browser.open(run / "report.html", width=width)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("[...document.images].every((image) => image.naturalWidth > 0)")
        assert len(browser.screenshot()) > 10_000
        assert browser.errors == [] and browser.requests == []
