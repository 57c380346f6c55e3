"""Workers end with their parent, however that ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

POOL = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from dsr_jax.core.workers import end_with_parent

def report(_):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=end_with_parent) as pool:
        list(pool.map(report, range(2)))
"""


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that nobody waits for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_when_their_parent_is_killed(number: int, tmp_path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    try:
        assert all(is_running(pid) for pid in workers)
        parent.send_signal(number)
        parent.wait()
        deadline = time.monotonic() + 20
        while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(is_running(pid) for pid in workers)
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)
