"""The processes of a run take the same policy, by the device with the least memory."""

from pathlib import Path

import pytest

from tests.processes import finish, start

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def test_two_processes_with_different_memory_choose_alike(tmp_path: Path) -> None:
    finish(start("tests.multiprocess.remat_worker", (str(tmp_path),), 2, 2))
    assert [(tmp_path / f"{process}.txt").read_text() for process in range(2)] == ["dots", "dots"]
