"""Signals: save, exit with their status, continue exactly; and a disk that is full."""

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsr_jax.training import stopping
from dsr_jax.training.checkpoints import list_steps
from dsr_jax.training.stopping import StopRequest
from tests.training.toy_training import Run, flat

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("toy_training.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}


def start(workdir: Path, steps: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(workdir), str(steps), *options]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, np.ndarray]]:
    """An uninterrupted run as the script does it, and its last state."""
    run = Run(tmp_path_factory.mktemp("whole"), every_steps=1000, devices=2)
    return run, flat(run.train(12).state)


def equal(got: Any, want: dict[str, np.ndarray]) -> None:
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_under_way(
    whole: Any, tmp_path: Path, number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole[0].elsewhere(tmp_path)
    handlers: list[Any] = []
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def signalled(state: Any, batch: Any) -> Any:
        if int(state.step) == 4:
            os.kill(os.getpid(), number)
            handlers.append(signal.getsignal(signal.SIGINT))
        return run.step(state, batch)

    summary = run.train(12, step_fn=signalled)
    name = signal.Signals(number).name
    assert (summary.step, summary.stopped, summary.exit_status) == (5, name, status)
    assert list_steps(tmp_path / "checkpoints") == [5]
    shown = capsys.readouterr().err
    assert f"stopped by {name} after step 5 of 12; the same command continues" in shown
    # A second Ctrl-C shall kill at once, and afterwards all is as it was.
    assert (handlers[0] == signal.SIG_DFL) == (number == signal.SIGINT)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    equal(flat(run.train(12).state), whole[1])


def test_sigterm_to_a_process_saves_and_the_second_start_continues(
    whole: Any, tmp_path: Path
) -> None:
    first = start(tmp_path, 12, "--slow")
    assert first.stdout is not None
    for line in first.stdout:
        if line == "step 5\n":
            break
    first.send_signal(signal.SIGTERM)
    status, errors = finish(first)
    assert status == 143, errors
    assert "SIGTERM: saving step" in errors and "the same command continues" in errors
    steps = list_steps(tmp_path / "checkpoints")
    assert len(steps) == 1 and 5 <= steps[0] < 12
    status, errors = finish(start(tmp_path, 12))
    assert status == 0, errors
    equal(dict(np.load(tmp_path / "final.npz")), whole[1])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_first_step_compiles_ends_at_once(
    tmp_path: Path, number: int, status: int
) -> None:
    """The main thread is in C code, where Python cannot handle the signal."""
    first = start(tmp_path, 12, "--long-compilation")
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("compiling and running the first step"):
            break
    first.send_signal(number)
    status_seen, errors = finish(first)
    assert status_seen == status, errors
    assert f"stopped by {signal.Signals(number).name} in the first step" in errors
    assert not list_steps(tmp_path / "checkpoints")


def test_a_signal_before_the_first_step_ends_before_it_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes while the first batch is read."""

    def end(status: int) -> None:
        # The thread that sees the signal ends the process as well.
        if threading.current_thread() is threading.main_thread():
            sys.exit(status)

    monkeypatch.setattr(stopping, "end_at_once", end)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as ended, stop.nothing_to_save():
            pytest.fail("the first step began")
    assert ended.value.code == 143
    assert "stopped by SIGTERM in the first step" in capsys.readouterr().err


def test_the_wakeup_of_a_program_around_it_is_restored() -> None:
    """An event loop, as in a notebook, has one of its own."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    try:
        with StopRequest():
            pass
        assert signal.set_wakeup_fd(before) == writing
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


@pytest.mark.slow
def test_a_full_disk_is_one_screen_and_earlier_steps_survive(whole: Any, tmp_path: Path) -> None:
    run = whole[0].elsewhere(tmp_path)
    run.train(12, stop_after_steps=2)
    process = start(tmp_path, 4)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2048, 2048))
    status, errors = finish(process)
    assert status == 2
    assert f"CheckpointError: saving to {tmp_path / 'checkpoints'} failed" in errors
    assert "whole checkpoints there: [2]" in errors
    assert len(errors.splitlines()) < 20
    equal(flat(run.train(12).state), whole[1])
