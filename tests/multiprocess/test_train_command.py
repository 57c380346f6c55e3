"""The train command on two processes that communicate over loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsr_jax.core.files import read_json
from dsr_jax.data.base import SourceOptions
from dsr_jax.data.toy import Digits
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.checkpoints import list_steps
from tests.finished_run import final_state

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
DEVICES = 2
STEPS = 8


class OwnFiles(Digits):
    """Digits of which each process finds other classes, as on disks of their own."""

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        self.class_names[3] += os.environ.get("DSR_PROCESS_ID", "")


COMMAND = (
    *(sys.executable, "-m", "dsr_jax.train"),
    f"--config={REPOSITORY / 'configs' / 'digits.py'}:runlocal",
    # Adam with a small eps turns the rounding of tiny gradients into whole steps.
    "--config.optim.eps=1e-3",
    "--config.optim.warmup_steps=2",
    "--config.mesh.data=1",
    f"--config.mesh.fsdp={DEVICES}",
    "--config.precision.matmul=highest",
)


def run(
    workdir: Path,
    count: int,
    *overrides: str,
    status: int = 0,
    own: tuple[str, ...] = ("", ""),
) -> list[str]:
    """Runs the command on `count` processes; returns what each wrote to standard error.

    Overrides in `own` are of one process each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for rank in range(count):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        if count > 1:
            environment["DSR_COORDINATOR"] = address
            environment["DSR_NUM_PROCESSES"] = str(count)
            environment["DSR_PROCESS_ID"] = str(rank)
        processes.append(
            subprocess.Popen(
                [*COMMAND, f"--workdir={workdir}", *overrides, *filter(None, [own[rank]])],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status] * count, errors
    return errors


def close(workdir: Path, other: Path) -> None:
    """Runs agree up to the rounding of sums over devices: logs, states, samples and scores."""
    got, want = (final_state(folder) for folder in (workdir, other))
    assert got.keys() == want.keys() and int(want["step"]) == STEPS
    for name, value in want.items():
        scale = np.abs(value).max() + 1e-12
        np.testing.assert_allclose(
            got[name] / scale, value / scale, rtol=0, atol=1e-5, err_msg=name
        )
    losses = [[record["loss"] for record in read_metrics(folder)] for folder in (workdir, other)]
    assert len(losses[1]) == STEPS // 2
    np.testing.assert_allclose(*losses, rtol=1e-5)
    drawn = [np.load(folder / "samples" / f"final_{STEPS:08d}.npz") for folder in (workdir, other)]
    images = [samples["arr_0"].astype(int) for samples in drawn]
    assert np.abs(images[0] - images[1]).max() <= 1
    np.testing.assert_array_equal(*(samples["labels"] for samples in drawn))
    summaries = [read_json(folder / "summary.json") for folder in (workdir, other)]
    assert summaries[0].keys() == summaries[1].keys()
    for key in ("classifier_accuracy_real", "frechet_distance_real", "steps"):
        assert summaries[0][key] == summaries[1][key]
    np.testing.assert_allclose(*(summary["frechet_distance"] for summary in summaries), rtol=1e-3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, 1)
    return folder


def test_two_processes_do_what_one_does(whole: Path, tmp_path: Path) -> None:
    errors = run(tmp_path / "run", 2)
    close(tmp_path / "run", whole)
    assert f"step {STEPS}/{STEPS}" in errors[0]
    assert "loss" not in errors[1], "only process 0 logs"
    assert len(read_json(tmp_path / "run" / "provenance.json")) == 1


def test_two_processes_continue_what_one_began(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, 1, "--config.train.stop_after_steps=3")
    assert list_steps(tmp_path / "checkpoints") == [3]
    errors = run(tmp_path, 2)
    assert "continuing from step 3" in errors[0]
    close(tmp_path, whole)


def test_both_processes_refuse_what_cannot_work(tmp_path: Path) -> None:
    """No process waits for the other."""
    errors = run(tmp_path / "run", 2, "--config.registers.num=5", status=2)
    assert all("ConfigError: config.registers.num=5" in error for error in errors)
    assert not (tmp_path / "run").exists()


def test_different_configs_are_refused(tmp_path: Path) -> None:
    own = ("--config.optim.lr=0.001", "--config.optim.lr=0.002")
    errors = run(tmp_path / "run", 2, status=2, own=own)
    for error in errors:
        assert "of 2 processes these differ from the others: 1 (" in error
        assert "config.optim.lr: 0.002 there, 0.001 elsewhere" in error
    assert not (tmp_path / "run").exists()


def test_processes_that_find_different_data_end_before_they_write(tmp_path: Path) -> None:
    source = f"--config.data.source={__name__}:OwnFiles"
    errors = run(tmp_path / "run", 2, source, status=2)
    for error in errors:
        assert "DataError: processes 1 find other data than process 0 does" in error
    assert not (tmp_path / "run" / "config.json").exists()
