"""A job on two processes: one file, one message, and no process that waits for ever."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsr_jax.core.files import read_json

ROOT = Path(__file__).parents[2]


def run_processes(folder: Path, seed: int) -> list[tuple[int, str]]:
    """Returns (exit status, output) of both processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, str(Path(__file__).with_name("job_worker.py")), str(port), "2"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(folder), str(seed)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, out) for process, out in zip(started, outputs, strict=True)]


@pytest.mark.multiprocess
def test_two_processes_share_a_job_and_its_errors(tmp_path):
    (first, out), (second, quiet) = run_processes(tmp_path, seed=0)
    assert first == second == 0, out + quiet
    assert "sampled 23/23" in out and "sampled" not in quiet
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == list(range(23))
        assert (arrays["arr_0"][:, 1, 2, 0] == arrays["labels"]).all()
    record = read_json(tmp_path / "samples.json")
    assert [start["num_processes"] for start in record["starts"]] == [2]

    (first, out), (second, quiet) = run_processes(tmp_path, seed=1)
    assert first == second == 2, out + quiet
    assert "seed: 0 -> 1" in out
    assert "process 0 stopped this job: CheckpointError" in quiet and "seed: 0 -> 1" in quiet
