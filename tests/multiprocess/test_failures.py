"""Processes that die, hang, fail or differ are named by the others, which end."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.checkpoints import list_steps
from tests.multiprocess.test_training import finish, start
from tests.processes import start as start_command
from tests.tiny_inception import convert_tiny

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

HOST = os.uname().nodename
OPTIONS = ("--slow", "--save-every=10", "--data-parallel")


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line == f"step {step}\n":
            return
    raise AssertionError(process.communicate()[1])


def screen(errors: str) -> str:
    """The error that a process showed last."""
    name = "ProcessError: "
    assert name in errors, errors
    text = errors[errors.index(name) :]
    # JAX's own report may lie between, but the error itself is short.
    assert len(text.splitlines()) < 25, errors
    return text


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_by_the_other(tmp_path: Path, victim: int) -> None:
    """Also the one that holds the coordination service."""
    processes = start(tmp_path, 2000, 2, *OPTIONS)
    # The save of step 20 waits for that of step 10.
    wait_for_step(processes[1 - victim], 21)
    processes[victim].send_signal(signal.SIGKILL)
    wanted = [75, 75]
    wanted[victim] = -9
    shown = screen(finish(processes, *wanted)[1 - victim])
    assert f"process {victim} ({HOST}) is lost" in shown
    assert "the same command continues from the last checkpoint" in shown
    assert 10 in list_steps(tmp_path / "checkpoints")
    steps = max(list_steps(tmp_path / "checkpoints")) + 5
    finish(start(tmp_path, steps, 2, "--data-parallel"))


def test_a_stopped_process_is_named_by_the_other(tmp_path: Path) -> None:
    processes = start(tmp_path, 2000, 2, *OPTIONS)
    wait_for_step(processes[0], 15)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        errors = processes[0].communicate(timeout=60)[1]
    finally:
        processes[1].kill()
        processes[0].kill()
        processes[1].communicate()
    assert processes[0].returncode == 75, errors
    assert f"process 1 ({HOST}) is lost: no heartbeat for" in screen(errors)


def test_a_process_without_data_is_named_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAULT", "data:1:12")
    errors = finish(start(tmp_path, 2000, 2, *OPTIONS, "--step-seconds=5"), 75, 75)
    for text in map(screen, errors):
        assert f"the run does not move: process 1 ({HOST}) behind the others" in text
        assert f"process 1 ({HOST}): at step 12, waiting for data" in text
        assert f"process 0 ({HOST}): at step 12, in step" in text
    reports = [(tmp_path / "failures" / f"process_{i}.txt").read_text() for i in (0, 1)]
    assert "step 12, waiting for data" in reports[1] and "in batches" in reports[1]
    assert "step 12, in step" in reports[0] and "in train_loop" in reports[0]
    assert list_steps(tmp_path / "checkpoints") == [10]


def test_the_other_process_reports_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAULT", "raise:1:12")
    errors = finish(start(tmp_path, 2000, 2, *OPTIONS), 75, 2)
    assert "DataError: no such file: shard-7" in errors[1] and "Traceback" not in errors[1]
    assert f"process 1 ({HOST}) ended: DataError: no such file: shard-7" in screen(errors[0])


def test_a_full_disk_under_process_0_alone_ends_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the project's own errors; and while a save may be in progress."""
    monkeypatch.setenv("TOY_FAULT", "disk:0:21")
    errors = finish(start(tmp_path, 2000, 2, *OPTIONS), 1, 75)
    assert "OSError: [Errno 28] No space left on device: 'picture.png'" in errors[0]
    assert f"process 0 ({HOST}) ended: OSError: [Errno 28] No space left" in screen(errors[1])


@pytest.mark.parametrize("command", ["evaluate", "sample job"])
def test_a_full_disk_under_process_0_ends_commands_without_training_too(
    tmp_path: Path, command: str
) -> None:
    """Far before JAX's own limit of minutes: `finish` waits for one."""
    images = np.random.RandomState(0).randint(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "samples.npz", images)
    convert_tiny(tmp_path)
    words = ["--inception", str(tmp_path / "inception"), "--batch", "8", "--metrics", "fid"]
    if command == "evaluate":
        words = [str(tmp_path / "samples.npz"), *words, "--save-every", "8"]
        module, full = "dsr_jax.evaluate", "progress.npz"
        words += ["--reference", str(tmp_path / "samples.npz")]
    else:
        module, full = "tests.sampling.job_worker", "samples.npz"
        words = [str(tmp_path / "out"), "0"]
    started = start_command("tests.disk_full", (full, module, *words), 2, 2)
    errors = finish(started, 2, 75 if command == "evaluate" else 2, timeout=100)
    assert f"{full} cannot be written: No space left on device" in errors[0]
    assert "process 0" in errors[1]
    assert "cannot be written: No space left" in errors[1]


def test_a_corrupted_copy_is_named_and_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the log record before the next save; two alone cannot tell which of them is right."""
    monkeypatch.setenv("TOY_FAULT", "corrupt:1:13")
    errors = finish(start(tmp_path, 2000, 2, *OPTIONS), 75, 75)
    for text in map(screen, errors):
        assert f"process 0 ({HOST}) and process 1 ({HOST}) differ from each other" in text
        assert "step 15" in text and "params/" in text
    assert list_steps(tmp_path / "checkpoints") == [10]
    monkeypatch.setenv("TOY_FAULT", "none:-1:-1")
    finish(start(tmp_path, 15, 2, "--data-parallel"))


def test_both_processes_skip_a_batch_that_is_not_finite_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their replicas stay equal, which is compared at every log record and save."""
    monkeypatch.setenv("TOY_FAULT", "nan:1:12")
    options = ("--data-parallel", "--skip-nonfinite", "--save-every=5")
    errors = finish(start(tmp_path, 15, 2, *options))
    assert "step 13 is not finite: loss nan" in errors[0] and "its batch is skipped" in errors[0]
    assert [r["step"] for r in read_metrics(tmp_path) if r.get("skipped_steps")] == [15]
    with np.load(tmp_path / "final.npz") as final:
        assert all(np.isfinite(array).all() for array in final.values())


def test_samples_of_another_step_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAULT", "skip:1:13")
    errors = finish(start(tmp_path, 2000, 2, *OPTIONS), 75, 75)
    for text in map(screen, errors):
        assert f"step 15: process 1 ({HOST}) trained on samples of another step" in text
