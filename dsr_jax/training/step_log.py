"""Log of a training loop's steps, whose metrics are fetched with a delay."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from dsr_jax.core.errors import NumericsError
from dsr_jax.core.typing import Array, Metrics
from dsr_jax.parallel.watch import Watch
from dsr_jax.telemetry.clock import StepClock
from dsr_jax.telemetry.profiler import ProfileWindow
from dsr_jax.telemetry.progress import Progress
from dsr_jax.telemetry.writers import MetricWriter
from dsr_jax.training.checkpoints import Checkpoints
from dsr_jax.training.metrics import MetricWindow
from dsr_jax.training.replicas import ReplicaCheck

RUN_AHEAD = 2
"""Steps that may be under way before the host waits for the oldest one's metrics."""


@dataclass(frozen=True)
class Instruments:
    """Outputs of a loop: metrics, progress, clock, profiler, watch.

    Attributes:
      writer: Takes the records.
      progress: Shows the user.
      clock: Measures the steps.
      profile: Traces some steps.
      mfu: Fraction of the devices' peak from the seconds per step; None if unknown.
      watch: Receives the phase that the loop is in.
    """

    writer: MetricWriter
    progress: Progress
    clock: StepClock
    profile: ProfileWindow
    mfu: Callable[[float], float | None] = field(default=lambda step_seconds: None)
    watch: Watch = field(default_factory=Watch)


class PendingStep(NamedTuple):
    """Step whose results the host has not fetched yet: metrics, and sometimes checksums."""

    step: int
    metrics: Metrics
    sums: Array | None
    check: ReplicaCheck | None


class StepLog:
    """Fetches each step's metrics with a delay, so that the device never waits for the host."""

    def __init__(
        self, out: Instruments, every: int, window: MetricWindow, checkpoints: Checkpoints
    ) -> None:
        self.window = window
        self._out, self._every, self._checkpoints = out, every, checkpoints
        self._pending: deque[PendingStep] = deque()

    def add(self, pending: PendingStep, *, wait: bool) -> None:
        """Notes a step that was just dispatched; `wait` starts the clock after it."""
        self._pending.append(pending)
        while self._pending and (wait or len(self._pending) > RUN_AHEAD):
            self._take()
        if wait:
            self._out.clock.lap(pending.step)

    def drain(self) -> None:
        """Waits for all steps noted so far.

        Raises:
          NumericsError: If one was not finite.
          ProcessError: If replicas of one's state differ.
        """
        while self._pending:
            self._take()

    def _take(self) -> None:
        step, metrics, sums, check = self._pending.popleft()
        host: dict[str, Any] = {name: np.asarray(v) for name, v in jax.device_get(metrics).items()}
        self.window.add(host)
        if not host["finite"]:
            self._out.writer.write(step, self.window.flush())
            raise self._not_finite(step, host)
        if check is not None and sums is not None:
            check.verify(step, np.asarray(sums))
        if step % self._every == 0:
            self._write(step)

    def _write(self, step: int) -> None:
        record = self.window.flush()
        timing = self._out.clock.lap(step)
        mfu = None
        if timing is not None:
            mfu = self._out.mfu(timing.step_seconds)
            record["step_seconds"] = timing.step_seconds
            record["images_per_second"] = timing.images_per_second
            record["mfu"] = mfu
        self._out.writer.write(step, record)
        self._out.progress.update(step, loss=record["loss"], timing=timing, mfu=mfu)

    def _not_finite(self, step: int, host: Mapping[str, Any]) -> NumericsError:
        values = ", ".join(
            f"{name} {float(host[name]):g}"
            for name in ("loss", "grad_norm", "param_norm", "learning_rate")
        )
        self._checkpoints.wait()
        good = self._checkpoints.latest_step()
        kept = (
            "there is no checkpoint yet" if good is None else f"the newest is step {good}, finite"
        )
        return NumericsError(
            f"step {step} is not finite: {values}; its state was not saved ({kept})",
            "lower config.optim.lr, set config.optim.clip_norm, warm up longer, or check the data; "
            "the same command continues from the newest checkpoint",
        )
