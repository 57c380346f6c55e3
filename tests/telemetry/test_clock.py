"""Step times hold neither compilation nor pauses; the remaining time does hold pauses."""

import pytest

from dsr_jax.telemetry.clock import StepClock, Timing


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_first_step_is_left_out() -> None:
    time = Time()
    clock = StepClock(images_per_step=8, total_steps=100, now=time)
    time.seconds += 60  # compilation
    assert clock.lap(1) is None
    time.seconds += 5
    assert clock.lap(11) == Timing(step_seconds=0.5, images_per_second=16.0, eta_seconds=44.5)
    time.seconds += 10
    timing = clock.lap(21)
    assert timing is not None
    assert (timing.step_seconds, timing.eta_seconds) == (1.0, pytest.approx(0.75 * 79))


def test_pauses_are_left_out_of_their_lap_only() -> None:
    time = Time()
    clock = StepClock(images_per_step=8, total_steps=21, now=time)
    with clock.pause():
        time.seconds += 7  # before the clock runs: of no matter
    clock.lap(1)
    time.seconds += 5
    with pytest.raises(RuntimeError), clock.pause():
        time.seconds += 30
        raise RuntimeError
    time.seconds += 5
    first = clock.lap(11)
    assert first == Timing(step_seconds=1.0, images_per_second=8.0, eta_seconds=40.0)
    time.seconds += 20
    second = clock.lap(21)
    assert second == Timing(step_seconds=2.0, images_per_second=4.0, eta_seconds=0.0)


def test_no_step_no_timing() -> None:
    clock = StepClock(images_per_step=8, total_steps=5, now=Time())
    clock.lap(4)
    assert clock.lap(4) is None


def test_pause_waits_for_the_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work still running when the pause begins belongs to the lap."""
    time = Time()
    clock = StepClock(images_per_step=8, total_steps=5, now=time)
    clock.lap(0)

    def wait(results: object) -> None:
        assert results == "metrics"
        time.seconds += 3

    monkeypatch.setattr("jax.block_until_ready", wait)
    with clock.pause(wait_for="metrics"):
        time.seconds += 50
    timing = clock.lap(1)
    assert timing is not None and timing.step_seconds == 3.0
