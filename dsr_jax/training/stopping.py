"""How a run is told to stop: Ctrl-C, SIGTERM, and the agreement of several hosts on one step."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Turns signals into a question that the loop asks after every step; a context manager.

    The first signal asks the loop to save and end. After a first Ctrl-C the second one kills the
    process at once, also within a save; what is on disk then is the checkpoint before.

    On several hosts a signal reaches one, some or all, at different steps. There JAX's preemption
    service, which owns SIGTERM, agrees with all hosts on a step that none has passed yet; Ctrl-C is
    handed to it as a SIGTERM.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, signal._HANDLER] = {}
        self._several = jax.process_count() > 1

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
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)
