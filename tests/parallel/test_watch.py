"""Watching threads: a hang is reported with stacks, another process's end ends this one."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsr_jax.core.errors import ConfigError, ProcessError
from dsr_jax.parallel.peers import Heartbeat, Peers
from dsr_jax.parallel.watch import Limits, Watch
from tests.parallel.test_peers import Dictionary

SHORT = Limits(step=0.2, pause=30.0, save=0.4)


class Ended(BaseException):
    """In place of the end of the process."""


class Recorder:
    """Records the error that would end the process."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.called = threading.Event()

    def __call__(self, error: BaseException) -> Any:
        self.errors.append(error)
        self.called.set()
        raise Ended

    def problem(self) -> str:
        assert self.called.wait(20)
        (error,) = self.errors
        assert isinstance(error, ProcessError)
        return error.problem


@pytest.fixture(autouse=True)
def quiet_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A watching thread ends with `Ended` here."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    yield


@pytest.mark.parametrize(
    ("phase", "compiling", "limit"),
    [
        ("waiting for data", False, 1.0),
        ("in step", False, 1.0),
        ("in step", True, 2.0),
        ("evaluating", False, 2.0),
        ("starting", True, 2.0),
        ("saving", False, float("inf")),
    ],
)
def test_limits_by_phase(phase: str, compiling: bool, limit: float) -> None:
    assert Limits(step=1.0, pause=2.0, save=0.0).of(phase, compiling) == limit


def test_a_hang_is_reported_with_the_main_threads_stack(tmp_path: Path) -> None:
    end = Recorder()

    def stand_still() -> None:
        assert end.called.wait(20)

    with Watch(tmp_path, SHORT, end=end) as watch:
        watch.enter("waiting for data", 12)
        stand_still()
    assert "the run does not move" in end.problem() and "at step 12, waiting" in end.problem()
    report = (tmp_path / "failures" / "process_0.txt").read_text()
    assert "step 12, waiting for data" in report and "in stand_still" in report


def test_progress_compilation_and_pauses_are_no_hang(tmp_path: Path) -> None:
    end = Recorder()
    with Watch(tmp_path, SHORT, end=end) as watch:
        for phase, compiling in (("starting", False), ("in step", True), ("evaluating", False)):
            watch.enter(phase, 0, compiling=compiling)
            time.sleep(0.4)
        for step in range(8):
            watch.enter("in step", step)
            time.sleep(0.05)
    assert not end.errors and not (tmp_path / "failures").exists()


def test_a_hang_may_be_reported_without_an_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end = Recorder()
    with Watch(tmp_path, SHORT, end_hung=False, end=end) as watch:
        watch.enter("saving", 3)
        time.sleep(1.0)
    assert not end.errors
    shown = capsys.readouterr().err
    assert shown.count("the run does not move") == 1 and "at step 3, saving" in shown


def others(store: Dictionary, process: int = 1, lost_seconds: float = 2.0) -> Peers:
    return Peers(store, process, 2, lost_seconds)


def test_the_error_of_another_process_ends_this_one() -> None:
    store, end = Dictionary(), Recorder()
    others(store, 0).exchange(Heartbeat(0, "a", ended="DataError: no file"))
    with Watch(peers=others(store), end=end):
        assert end.problem() == "process 0 (a) ended: DataError: no file"


def test_a_lost_heartbeat_of_another_process_ends_this_one() -> None:
    store, end = Dictionary(), Recorder()
    with Watch(peers=others(store), end=end):
        assert "process 0 (unknown host) is lost: no heartbeat for" in end.problem()
    assert "is lost" in store.values["dsr_jax/failure_reason/text"]


def test_a_service_that_is_gone_is_process_0() -> None:
    class Silent(Dictionary):
        def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
            raise RuntimeError("UNAVAILABLE: no connection")

    end = Recorder()
    with Watch(peers=others(Silent(), lost_seconds=8.0), service_gone=lambda: True, end=end):
        assert "process 0 (unknown host) is lost: its coordination service" in end.problem()


def test_an_own_error_reaches_the_others_and_is_shown() -> None:
    store, end = Dictionary(), Recorder()
    with pytest.raises(Ended), Watch(peers=others(store), end=end):
        raise ConfigError("config.x=1", "it must be 2")
    assert isinstance(end.errors[0], ConfigError)
    assert "ConfigError: config.x=1" in store.values["dsr_jax/heartbeats/1"]


def test_a_failed_collective_reports_the_missing_process() -> None:
    store, end = Dictionary(), Recorder()
    with pytest.raises(Ended), Watch(peers=others(store, lost_seconds=4.0), end=end):
        raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert isinstance(end.errors[0], ProcessError) and "process 0" in str(end.errors[0])


def test_alone_errors_pass_through() -> None:
    end = Recorder()
    with pytest.raises(ConfigError), Watch(end=end):
        raise ConfigError("config.x=1")
    assert not end.errors
