"""Log of a training loop's steps, whose metrics are fetched with a delay."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsr_jax.core.errors import NumericsError
from dsr_jax.core.files import write_json
from dsr_jax.core.typing import Array, Metrics
from dsr_jax.parallel.processes import is_process_zero
from dsr_jax.parallel.watch import Watch
from dsr_jax.telemetry.clock import StepClock
from dsr_jax.telemetry.profiler import ProfileWindow
from dsr_jax.telemetry.progress import Progress
from dsr_jax.telemetry.writers import MetricWriter
from dsr_jax.training.checkpoints import Checkpoints
from dsr_jax.training.metrics import MetricWindow
from dsr_jax.training.nonfinite import NonFiniteStep, describe_step
from dsr_jax.training.replicas import ReplicaCheck

RUN_AHEAD = 2
"""Steps that may be under way before the host waits for the oldest one's metrics."""

MAX_SKIPPED = 10
"""Batches in a row that may be skipped because they are not finite."""


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
      records: Returns the numbers of the records in the batch of a step, from 1.
      failures: Folder for descriptions of steps that are not finite; None writes none.
    """

    writer: MetricWriter
    progress: Progress
    clock: StepClock
    profile: ProfileWindow
    mfu: Callable[[float], float | None] = field(default=lambda step_seconds: None)
    watch: Watch = field(default_factory=Watch)
    records: Callable[[int], Sequence[int]] = field(default=lambda step: ())
    failures: Path | None = None


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
        self._skipped_in_a_row = 0

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
        host: dict[str, Any] = dict(jax.device_get(metrics))
        norms = host.pop("array_norms", {})
        skipped = bool(host.pop("skipped", False))
        if skipped:
            self._skip(step, host, norms)
        else:
            self._skipped_in_a_row = 0
            self.window.add(host)
            if not host["finite"]:
                self._out.writer.write(step, self.window.flush())
                raise self._not_finite(self._describe(step, host, norms))
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
        loss = float("nan") if record["loss"] is None else record["loss"]
        self._out.progress.update(step, loss=loss, timing=timing, mfu=mfu)

    def _skip(self, step: int, host: dict[str, Any], norms: dict[str, Any]) -> None:
        """Notes a step whose batch did not change the state.

        Raises:
          NumericsError: After too many in a row that are not finite.
        """
        self.window.add_skipped()
        if host["finite"]:
            self._skipped_in_a_row = 0
            self._out.progress.log(f"step {step}: its batch is skipped, as the config asks")
            return
        self._skipped_in_a_row += 1
        found = self._describe(step, host, norms)
        self._out.progress.log("\n    ".join([*found.lines(), "its batch is skipped"]))
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise NumericsError(
                f"{MAX_SKIPPED} steps in a row are not finite, the last is step {step}",
                "the cause is not a single batch: check the frozen networks and the data, or "
                "continue with a lower config.optim.lr from the newest checkpoint",
            )

    def _describe(self, step: int, host: dict[str, Any], norms: dict[str, Any]) -> NonFiniteStep:
        """Describes a step that is not finite, and writes all of it to a file."""
        records = [int(number) for number in self._out.records(step)]
        found = describe_step(step, host, norms, records)
        if self._out.failures is not None and is_process_zero():
            write_json(self._out.failures / f"step_{step:08d}.json", found.to_json())
        return found

    def _not_finite(self, found: NonFiniteStep) -> NumericsError:
        self._checkpoints.wait()
        good = self._checkpoints.latest_step()
        kept = (
            "there is no checkpoint yet" if good is None else f"the newest is step {good}, finite"
        )
        lines = [*found.lines(), f"its state was not saved ({kept})"]
        return NumericsError(
            "\n    ".join(lines),
            "lower config.optim.lr, set config.optim.clip_norm, warm up longer, or check the data; "
            "the same command continues from the newest checkpoint, and leaves out this batch with "
            f"'--config.train.skip_steps=({found.step},)', or all that are not finite with "
            "--config.failures.on_nonfinite=skip",
        )
