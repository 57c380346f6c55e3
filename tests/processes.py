"""Runs the package's commands as several processes that communicate over loopback."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def start(module: str, words: Sequence[str], count: int, devices: int) -> list[subprocess.Popen]:
    """Starts `python -m module words` on `count` processes with `devices` between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices // count),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    if count > 1:
        environment |= {"DSR_COORDINATOR": address, "DSR_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=REPOSITORY,
            env=environment | ({"DSR_PROCESS_ID": str(rank)} if count > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(
    processes: Sequence[subprocess.Popen], *statuses: int, timeout: float = 240
) -> list[str]:
    """Waits for all to end as expected (all 0); returns what each wrote to standard error."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        end(processes)
    found = [process.returncode for process in processes]
    assert found == (list(statuses) or [0] * len(processes)), errors
    return errors


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Kills those that still run."""
    for process in processes:
        process.kill()
        process.wait()


def running() -> dict[int, int]:
    """Parent by process, without zombies."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found
