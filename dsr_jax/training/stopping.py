"""Stopping a run: Ctrl-C, SIGTERM, and the agreement of several hosts on one step."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn, Self

import jax
from jax.experimental import multihost_utils

from dsr_jax.core.cli import end_at_once

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that records signals, for the loop to check after every step.

    The first signal asks the loop to save and end; within `nothing_to_save` it ends the process at
    once, even while the main thread compiles and cannot handle it. After a first Ctrl-C the second
    one kills the process at once, also within a save; what is on disk is the checkpoint before.

    On several hosts a signal reaches one, some or all, at different steps. There JAX's preemption
    service, which owns SIGTERM, agrees with all hosts on a step that none has passed yet; Ctrl-C is
    handed to it as a SIGTERM.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, signal._HANDLER] = {}
        self._several = jax.process_count() > 1
        self._nothing_to_save = False
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1
        self._reader: threading.Thread | None = None

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; every process asks after every step."""
        if self._several:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._signal is not None

    @property
    def name(self) -> str:
        """Who asked."""
        return "a stop signal" if self._signal is None else signal.Signals(self._signal).name

    @property
    def exit_status(self) -> int:
        """128 plus the signal's number, as shells report it; schedulers requeue on it."""
        return 128 + (self._signal or signal.SIGTERM)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS[1:] if self._several else SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
            if not self._several:
                self._watch_signals()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._pipe[1])
            self._pipe = None
        if self._reader is not None:
            self._reader.join(timeout=5)
            self._reader = None

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Wraps the first step of a start, which compiles: all that was done before is on disk.

        In a run of several processes a signal waits for its end all the same.
        """
        self._nothing_to_save = True
        try:
            if self._signal is not None and not self._several:
                # It came while the first batch was read.
                _end_in_first_step(self._signal)
            yield
        finally:
            self._nothing_to_save = False

    def _watch_signals(self) -> None:
        """Starts a thread that sees signals also while the main thread is in C code."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._reader = threading.Thread(
            target=self._read_signals, args=(self._pipe[0],), daemon=True
        )
        self._reader.start()

    def _read_signals(self, reading: int) -> None:
        """Ends the process where nothing is lost; returns once the pipe is closed."""
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while data := pipe.read(1):
                if data[0] in SIGNALS and self._nothing_to_save:
                    _end_in_first_step(data[0])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)


def _end_in_first_step(number: int) -> NoReturn:
    print(
        f"stopped by {signal.Signals(number).name} in the first step of this start: there is "
        "nothing to save; the same command continues",
        file=sys.stderr,
    )
    end_at_once(128 + number)
