"""Process variables are all set or none."""

import pytest

from dsr_jax.core.errors import ClusterError
from dsr_jax.parallel.processes import is_process_zero, start_processes


def test_half_a_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSR_COORDINATOR", "127.0.0.1:1")
    with pytest.raises(ClusterError, match="DSR_NUM_PROCESSES"):
        start_processes()
    monkeypatch.setenv("DSR_NUM_PROCESSES", "two")
    monkeypatch.setenv("DSR_PROCESS_ID", "0")
    with pytest.raises(ClusterError, match="two"):
        start_processes()
    monkeypatch.setenv("DSR_NUM_PROCESSES", "2")
    monkeypatch.setenv("DSR_PROCESS_ID", "2")
    with pytest.raises(ClusterError, match="DSR_PROCESS_ID=2.*\n.*from 0"):
        start_processes()


def test_a_single_process_is_process_zero() -> None:
    start_processes()
    assert is_process_zero()
