"""The training loop: start or resume, step, log, save, stop.

Everything that the loop needs to know about a step is in the state and the batch's position, so N
steps equal k steps, a restart and N - k steps, bit for bit.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from dsr_jax.core.errors import DamagedCheckpointError
from dsr_jax.core.typing import Batch, Metrics
from dsr_jax.parallel.processes import log
from dsr_jax.telemetry.progress import announce
from dsr_jax.training.checkpoints import Checkpoints
from dsr_jax.training.metrics import MetricWindow
from dsr_jax.training.replicas import ReplicaCheck
from dsr_jax.training.state import TrainState
from dsr_jax.training.step_log import Instruments as Instruments
from dsr_jax.training.step_log import PendingStep, StepLog
from dsr_jax.training.stopping import StopRequest


@dataclass(frozen=True)
class LoopSettings:
    """Length and intervals of a training loop.

    Attributes:
      total_steps: Step at which the run is complete.
      log_every: Steps between two log records.
      stop_after_steps: Ends this start after so many steps, as if asked to stop; 0 for no limit.
      check_replicas: Whether to compare the replicas of the state at log records and before saves.
    """

    total_steps: int
    log_every: int = 100
    stop_after_steps: int = 0
    check_replicas: bool = True

    def end(self, start: int) -> int:
        """Returns the last step of a start that begins at `start`."""
        stop = start + self.stop_after_steps if self.stop_after_steps else self.total_steps
        return min(self.total_steps, stop)


@dataclass(frozen=True)
class Hook:
    """Periodic action on the state, such as sampling.

    Attributes:
      every_steps: Interval in steps; also called after the run's last step. 0 for never. What a
        stop or a crash prevented, the next start calls before its first step.
      call: `call(step, state)`; it must not donate the state. Numbers that it returns become a
        log record, and pictures, uint8 [H, W, C], are shown where the log can show them.
    """

    every_steps: int
    call: Callable[[int, TrainState], Mapping[str, float | np.ndarray] | None]

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to call after `step`."""
        return self.every_steps > 0 and (step % self.every_steps == 0 or step == total_steps)


@dataclass(frozen=True)
class Summary:
    """Outcome of a start.

    Attributes:
      state: The last state; saved.
      step: Steps done over all starts.
      steps_here: Steps done by this start.
      stopped: Why it ended before the run was complete, "" if it is complete.
      exit_status: 0, or 128 plus the number of the signal that ended it.
      seconds: Time spent training up to the last save, over all starts; what a crash lost is not
        in it.
    """

    state: TrainState
    step: int
    steps_here: int
    stopped: str
    exit_status: int
    seconds: float


class ResumeState(NamedTuple):
    """Data that a run keeps from start to start, besides its state.

    Attributes:
      window: The log window that is open.
      seconds: Time spent training so far.
    """

    window: MetricWindow
    seconds: float = 0.0


def start_or_resume(
    checkpoints: Checkpoints,
    init: Callable[[], TrainState],
    abstract: TrainState,
    restore_step: int = -1,
) -> tuple[TrainState, ResumeState]:
    """Returns the newest checkpoint's state, or a fresh one where there is none.

    Args:
      checkpoints: Checkpoints of this run.
      init: Makes the state before the first step.
      abstract: Shapes and shardings of the state.
      restore_step: Goes back to this step and sets later checkpoints aside, once: a start with the
        same value after that continues from the newest. -1 for the newest.

    Returns:
      The state, and what was saved with it.

    Raises:
      CheckpointError: If checkpoints are, or were, there and none can be used: nothing starts from
        scratch because of that.
    """
    record = checkpoints.record
    if restore_step >= 0 and restore_step == record.went_back_to:
        log(
            f"config.checkpoint.restore_step={restore_step} was done by an earlier start; "
            "continuing from the newest checkpoint (a start without it lets the next one go back)"
        )
        restore_step = -1
    elif restore_step < 0:
        record.forget_went_back()
    if restore_step < 0 and checkpoints.latest_step() is None:
        record.check_never_saved()
        record.note_begun()
        return init(), ResumeState(MetricWindow())
    if restore_step < 0:
        state, extra = _restore_newest(checkpoints, abstract)
    else:
        state, extra = _restore_step(checkpoints, abstract, restore_step)
        checkpoints.set_aside_after(restore_step)
        record.note_went_back(restore_step)
    return state, ResumeState(MetricWindow(extra.get("window")), extra.get("seconds", 0.0))


def _restore_step(
    checkpoints: Checkpoints, abstract: TrainState, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """Restores the step that config.checkpoint.restore_step names, and no other."""
    try:
        return checkpoints.restore(abstract, step)
    except DamagedCheckpointError as error:
        others = ", ".join(str(other) for other in checkpoints.steps() if other != step)
        raise DamagedCheckpointError(
            step,
            error.problem,
            f"set config.checkpoint.restore_step to another step ({others or 'there is none'}), or "
            "leave it out to continue from the newest",
        ) from error


def _restore_newest(
    checkpoints: Checkpoints, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Restores the newest step that is not damaged, then sets the damaged ones aside.

    Where none can be read, nothing is moved: the cause may be the storage, or a package.
    """
    damaged: list[DamagedCheckpointError] = []
    for step in reversed(checkpoints.steps()):
        try:
            found = checkpoints.restore(abstract, step)
        except DamagedCheckpointError as error:
            checkpoints.leave_to_next_start(error)
            damaged.append(error)
        else:
            checkpoints.set_aside_damaged(damaged, step)
            return found
    steps = ", ".join(str(error.step) for error in damaged)
    raise DamagedCheckpointError(
        damaged[0].step,
        f"none of the checkpoints {steps} can be read; {damaged[0].problem}",
        "nothing was moved: check the storage, and that the packages are those of the run "
        "(provenance.json); then restore the folder from a copy, or start in a new --workdir",
    )


def train_loop(
    state: TrainState,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    make_batches: Callable[[int], Iterator[Batch]],
    checkpoints: Checkpoints,
    settings: LoopSettings,
    instruments: Instruments,
    *,
    hooks: Sequence[Hook] = (),
    resume_state: ResumeState | None = None,
) -> Summary:
    """Trains from the state's step to the end, or until something stops it; saves at the end.

    Args:
      state: Result of `start_or_resume`; its buffers are donated to `step_fn`.
      step_fn: The compiled step.
      make_batches: `make_batches(first step)` yields global batches for ever.
      checkpoints: Checkpoints to save to.
      settings: Length and intervals of the loop.
      instruments: Progress, metrics and profiler.
      hooks: Further actions, called after the save of the same step.
      resume_state: Result of `start_or_resume`; None for a new run.

    Raises:
      NumericsError: After a step whose loss, gradients or parameters are not finite. That step's
        state is not saved.
      ProcessError: If replicas of the state differ. That state is not saved.
      CheckpointError: If a save fails, or does not end.
    """
    start = step = int(state.step)
    total, end = settings.total_steps, settings.end(start)
    watch = instruments.watch
    loop = _Loop(
        checkpoints, settings, instruments, hooks, resume_state or ResumeState(MetricWindow())
    )
    metrics: Metrics = {}
    if step >= total:
        instruments.progress.log(f"the run is complete: step {step} of {total}")
    with StopRequest() as stop, contextlib.closing(_batches(make_batches, start)) as batches:
        loop.call_missed_hooks(start, state)
        stopping = False
        while step < end and not stopping:
            watch.enter("waiting for data", step)
            batch = next(batches)
            watch.enter("in step", step, compiling=step == start)
            with _first_step(stop) if step == start else contextlib.nullcontext():
                with instruments.profile.step(step, wait_for=metrics):
                    state, metrics = step_fn(state, batch)
                if step == start:
                    jax.block_until_ready(metrics)
            step += 1
            stopping = stop.reached(step)
            saving = stopping or step == end or checkpoints.due(step)
            loop.note(step, state, batch, metrics, first=step == start + 1, saving=saving)
            if saving:
                loop.save(step, state, stop.name if stopping else "")
            if not stopping:
                loop.call_hooks(step, state)
        watch.enter("saving", step)
        checkpoints.wait()
        stopped = "" if step >= total else stop.name if stopping else "stop_after_steps"
        status = stop.exit_status if stopping and stopped else 0
    if stopped:
        text = f"stopped by {stopped} after step {step} of {total}; the same command continues"
        instruments.progress.log(text)
    return Summary(state, step, step - start, stopped, status, loop.seconds)


@contextlib.contextmanager
def _first_step(stop: StopRequest) -> Iterator[None]:
    """Wraps the step that compiles: lines while it lasts, and signals that end it at once."""
    with stop.nothing_to_save(), announce("compiling and running the first step"):
        yield


def _batches(
    make_batches: Callable[[int], Iterator[Batch]], start: int
) -> Generator[Batch, None, None]:
    """Makes any iterator a generator, which can be closed."""
    yield from make_batches(start)


class _Loop:
    """Work between two steps: saves, hooks, checks."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: LoopSettings,
        out: Instruments,
        hooks: Sequence[Hook],
        resume_state: ResumeState,
    ) -> None:
        self.seconds = resume_state.seconds
        self._began = time.monotonic() - resume_state.seconds
        self._checkpoints, self._settings, self._out = checkpoints, settings, out
        self._hooks = hooks
        self._log = StepLog(out, settings.log_every, resume_state.window, checkpoints)
        self._check: ReplicaCheck | None = None

    def note(
        self,
        step: int,
        state: TrainState,
        batch: Batch,
        metrics: Metrics,
        *,
        first: bool,
        saving: bool,
    ) -> None:
        """Notes a step that was just dispatched, and raises what earlier ones brought to light."""
        sums = None
        if self._settings.check_replicas and (
            first or saving or step % self._settings.log_every == 0
        ):
            if self._check is None:
                self._check = ReplicaCheck(state, batch, self._out.watch.name_process)
            sums = self._check.start(step, state, batch)
        # The first step compiles; waiting for it starts the clock after that.
        self._log.add(PendingStep(step, metrics, sums, self._check), wait=first)
        self._checkpoints.raise_errors()

    def save(self, step: int, state: TrainState, why: str) -> None:
        """Saves a state, after its own metrics were seen to be finite and its replicas to agree."""
        if why:
            self._out.progress.log(f"{why}: saving step {step} ...")
        self._log.drain()
        self._out.watch.enter("saving", step)
        # What follows the last save is not counted: a later start would not know of it.
        self.seconds = time.monotonic() - self._began
        with self._out.clock.pause(state):
            extra = {"window": self._log.window.to_json(), "seconds": self.seconds}
            self._checkpoints.save(step, state, extra=extra)

    def call_missed_hooks(self, step: int, state: TrainState) -> None:
        """Calls the hooks that the start which saved `step` did not call after it."""
        if step and self._hooks:
            called = self._checkpoints.record.hooks_called(step, len(self._hooks))
            self._checkpoints.record.note_hooks(step, called)
            self.call_hooks(step, state, first=called)

    def call_hooks(self, step: int, state: TrainState, first: int = 0) -> None:
        """Calls the hooks that are due, from the `first` one on."""
        due = [
            (index, hook)
            for index, hook in enumerate(self._hooks)
            if index >= first and hook.due(step, self._settings.total_steps)
        ]
        if not due:
            return
        self._log.drain()
        self._out.watch.enter("evaluating", step)
        with self._out.clock.pause(state):
            for index, hook in due:
                self._write(step, hook.call(step, state) or {})
                self._checkpoints.record.note_hooks(step, index + 1)

    def _write(self, step: int, found: Mapping[str, float | np.ndarray]) -> None:
        """Writes what a hook returned: numbers, and pictures."""
        pictures = {k: x for k, x in found.items() if isinstance(x, np.ndarray)}
        if scores := {k: float(x) for k, x in found.items() if k not in pictures}:
            self._out.writer.write(step, scores)
        for name, picture in pictures.items():
            self._out.writer.write_image(step, name, picture)
