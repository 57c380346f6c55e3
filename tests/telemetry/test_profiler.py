"""Exactly the steps of the window are traced, and a trace never stays open."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsr_jax.telemetry.profiler import ProfileWindow


class Recorder:
    """Stands in for JAX's profiler: notes after how many steps a trace starts and stops."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        self.done = 0
        monkeypatch.setattr(
            "jax.profiler.start_trace", lambda folder: self.events.append(("start", self.done))
        )
        monkeypatch.setattr(
            "jax.profiler.stop_trace", lambda: self.events.append(("stop", self.done))
        )

    def run(self, window: ProfileWindow, first: int, last: int) -> list[tuple[str, int]]:
        self.events, self.done = [], first
        with window:
            for step in range(first, last):
                with window.step(step):
                    self.done += 1
        return self.events


def test_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)

    def run(first: int, last: int, num_steps: int = 4, process_zero: bool = True) -> list:
        window = ProfileWindow(tmp_path, 3, num_steps, process_zero=process_zero)
        return recorder.run(window, first, last)

    assert run(0, 20) == [("start", 3), ("stop", 7)]
    assert run(5, 20) == [("start", 5), ("stop", 7)]
    assert run(0, 5) == [("start", 3), ("stop", 5)]
    assert run(7, 20) == run(0, 3) == run(0, 20, num_steps=0) == []
    assert run(0, 20, process_zero=False) == []


def test_an_error_ends_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    window = ProfileWindow(tmp_path, 0, 9)
    with pytest.raises(RuntimeError), window, window.step(0):
        raise RuntimeError
    assert [name for name, _ in recorder.events] == ["start", "stop"]


def test_a_real_trace_is_written(tmp_path: Path) -> None:
    result = jnp.zeros(4)
    with ProfileWindow(tmp_path, 1, 1) as window:
        for step in range(3):
            with window.step(step, wait_for=result):
                result = jax.jit(lambda x: x + 1)(result)
    assert [path.stat().st_size > 0 for path in tmp_path.glob("profile/**/*.xplane.pb")] == [True]
