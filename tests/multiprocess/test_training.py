"""Training over several processes on one machine, which communicate over loopback."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.checkpoints import list_steps

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "tests" / "training" / "toy_training.py"
STEPS = 80
"""JAX's preemption service looks for a signal once a second, at 0.05 s per step."""


def start(workdir: Path, steps: int, count: int, *options: str) -> list[subprocess.Popen[str]]:
    """Starts the toy run on `count` processes that have two devices together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "TOY_DEVICES": str(2 // count),
        }
        if count > 1:
            environment["DSR_COORDINATOR"] = f"127.0.0.1:{port}"
            environment["DSR_NUM_PROCESSES"] = str(count)
            environment["DSR_PROCESS_ID"] = str(rank)
        command = [sys.executable, str(SCRIPT), str(workdir), str(steps), *options]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(
    processes: list[subprocess.Popen[str]], *expected: int, timeout: float = 180
) -> list[str]:
    """Waits for all to end as expected (0); returns what each wrote to standard error."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    wanted = list(expected) or [0] * len(processes)
    assert [process.returncode for process in processes] == wanted, errors
    return errors


def close(workdir: Path, other: Path) -> None:
    """Final states agree up to the rounding of sums over devices."""
    want, got = (np.load(folder / "final.npz") for folder in (other, workdir))
    assert set(want.files) == set(got.files)
    for name in want.files:
        scale = np.abs(want[name]).max() + 1e-12
        np.testing.assert_allclose(got[name] / scale, want[name] / scale, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All steps in one process, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, STEPS, 1))
    return folder


def test_a_run_moves_from_one_process_to_two_and_back(whole: Path, tmp_path: Path) -> None:
    for steps, count in ((20, 1), (40, 2), (STEPS, 1)):
        finish(start(tmp_path, steps, count))
    assert list_steps(tmp_path / "checkpoints") == [40, STEPS]
    close(tmp_path, whole)
    losses = [[record["loss"] for record in read_metrics(folder)] for folder in (tmp_path, whole)]
    assert len(losses[0]) == STEPS // 3
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_both_at_the_same_step(
    whole: Path, tmp_path: Path, number: int
) -> None:
    processes = start(tmp_path, STEPS, 2, "--slow")
    output = processes[1].stdout
    assert output is not None
    for line in output:
        if line == "step 3\n":
            break
    processes[1].send_signal(number)
    errors = finish(processes, 143, 128 + number)
    steps = list_steps(tmp_path / "checkpoints")
    assert len(steps) == 1 and 3 <= steps[0] < STEPS
    assert f"after step {steps[0]} of {STEPS}; the same command continues" in errors[0]
    finish(start(tmp_path, STEPS, 2))
    close(tmp_path, whole)
