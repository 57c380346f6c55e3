"""The soak: growth is found, and training has none; reading ahead is bounded."""

from pathlib import Path

import pytest

from tools import soak
from tools.soak import Reading, find_growth

MIB = 2**20


def readings(memory: float = 0.0, files: float = 0.0, threads: float = 0.0) -> list[Reading]:
    """A training of 1,000 steps in which these grow by so much per step."""
    return [
        Reading(
            step, int(400 * MIB + memory * step), 30 + int(files * step), 20 + int(threads * step)
        )
        for step in range(5, 1005, 5)
    ]


def test_growth_is_found() -> None:
    assert find_growth(readings()) == []
    assert find_growth(readings(memory=0.01 * MIB)) == []
    assert find_growth(readings(memory=0.1 * MIB))[0].startswith("memory grows from 4")
    assert find_growth(readings(files=0.05))[0].startswith("files grow from 4")
    assert find_growth(readings(threads=0.05))[0].startswith("threads grow from 3")
    assert "too few readings" in find_growth(readings()[:1])[0]


@pytest.mark.slow
def test_training_does_not_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--steps=400", f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("growing: 0")
    assert (tmp_path / "soak.png").stat().st_size > 1000
