"""Time of training steps, without compilation and pauses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from dsr_jax.core.typing import PyTree


@dataclass(frozen=True)
class Timing:
    """Speed over the steps since the last lap.

    Attributes:
      step_seconds: Mean time of a step, without pauses.
      images_per_second: Throughput over all devices.
      eta_seconds: Time to the end of the run, at its mean speed so far including pauses.
    """

    step_seconds: float
    images_per_second: float
    eta_seconds: float


class StepClock:
    """Clock that measures the time of steps between laps.

    Dispatch is asynchronous, so that a lap is valid only after the step's results were waited for
    or fetched. Call `lap` once after the first step, which compiles, and then at log points.

    Args:
      images_per_step: Global batch size.
      total_steps: Step at which the run ends.
      now: Monotonic clock, in seconds.
    """

    def __init__(
        self,
        images_per_step: int,
        total_steps: int,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._images_per_step = images_per_step
        self._total_steps = total_steps
        self._now = now
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self._paused = 0.0

    def lap(self, step: int) -> Timing | None:
        """Ends a lap after `step` steps.

        Returns:
          Timing of the lap; None on the first call, which starts the clock, and if no step was done
          since the last call.
        """
        now = self._now()
        if self._first is None:
            self._first = self._last = (step, now)
            self._paused = 0.0
            return None
        steps = step - self._last[0]
        if steps == 0:
            return None
        seconds = (now - self._last[1] - self._paused) / steps
        mean = (now - self._first[1]) / (step - self._first[0])
        self._last, self._paused = (step, now), 0.0
        return Timing(
            step_seconds=seconds,
            images_per_second=self._images_per_step / max(seconds, 1e-9),
            eta_seconds=mean * (self._total_steps - step),
        )

    @contextlib.contextmanager
    def pause(self, wait_for: PyTree = None) -> Iterator[None]:
        """Excludes the time of the block, such as a checkpoint, from the lap.

        Args:
          wait_for: Results of the last step, waited for before the pause starts, since steps that
            are still running on the device belong to the lap.
        """
        jax.block_until_ready(wait_for)
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start
