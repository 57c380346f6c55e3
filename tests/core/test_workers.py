"""Workers end with their parent, however that ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import running

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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_when_their_parent_is_killed(number: int, tmp_path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    try:
        assert set(workers) <= set(running())
        parent.send_signal(number)
        parent.wait()
        deadline = time.monotonic() + 20
        while set(workers) & set(running()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not set(workers) & set(running())
    finally:
        for pid in set(workers) & set(running()):
            os.kill(pid, signal.SIGKILL)
