"""The notebooks run from top to bottom, with shorter trainings."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.html_pages import check_page
from tests.programs import quick_programs

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(autouse=True)
def compiled_quickly(tmp_path: Path) -> Iterator[None]:
    with quick_programs(tmp_path / "programs"):
        yield


def cells(name: str) -> list[str]:
    """The code of a notebook's cells."""
    found = json.loads((NOTEBOOKS / name).read_text())
    assert found["nbformat"] == 4
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code), "notebooks are committed without outputs"
    return ["".join(cell["source"]) for cell in code]


@pytest.mark.slow
def test_outliers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = cells("outliers.ipynb")
    # The repository, then the notebook's own folder.
    monkeypatch.chdir(NOTEBOOKS)
    names: dict[str, object] = {}
    shorter = first.replace('Path("outlier_runs"), 120', f"Path({str(tmp_path / 'runs')!r}), 4")
    assert shorter != first
    exec(shorter, names)
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(rest, start=2):
        exec(compile(code, f"cell {number}", "exec"), names)
    assert "outliers at patches [9]" in capsys.readouterr().out
    for page in ("outliers.html", "runs.html"):
        check_page((tmp_path / page).read_text())
