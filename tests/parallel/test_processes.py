"""Process variables are all set or none."""

import pytest

from dsr_jax.core.errors import MeshError
from dsr_jax.parallel.processes import is_process_zero, start_processes


def test_half_a_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSR_COORDINATOR", "127.0.0.1:1")
    with pytest.raises(MeshError, match="DSR_NUM_PROCESSES"):
        start_processes()
    monkeypatch.setenv("DSR_NUM_PROCESSES", "two")
    monkeypatch.setenv("DSR_PROCESS_ID", "0")
    with pytest.raises(MeshError, match="two"):
        start_processes()


def test_alone_is_primary() -> None:
    start_processes()
    assert is_process_zero()
