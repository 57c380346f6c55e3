"""Drops the duplicate log lines of Orbax and TensorStore around an error that is also raised.

When one of many concurrent reads or writes fails, each thread logs a traceback of the same failure,
and each pending operation finds its event loop closed and prints another, some of them while the
process ends: hundreds of lines around the one error that `training.checkpoints` raises, which has
the original as its cause.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


class DuplicateFilter:
    """Drops the duplicates from `install` on, until `remove`."""

    def __init__(self) -> None:
        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        self._report = sys.unraisablehook

    def install(self) -> None:
        """Starts to drop them."""
        for logger in self._loggers:
            logger.addFilter(self._passes)
        self._report = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable

    def remove(self) -> None:
        """Undoes `install`."""
        for logger in self._loggers:
            logger.removeFilter(self._passes)
        if sys.unraisablehook == self._on_unraisable:
            sys.unraisablehook = self._report

    def _passes(self, record: logging.LogRecord) -> bool:
        """Returns False for log records of errors that are also raised."""
        by_orbax = "orbax" in record.pathname and record.levelno >= logging.ERROR
        return not by_orbax and "Task exception was never retrieved" not in str(record.msg)

    def _on_unraisable(self, event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            self._report(event)


@contextlib.contextmanager
def without_duplicates() -> Iterator[None]:
    """Drops duplicates within the block; also after it if it fails, since some come later."""
    duplicates = DuplicateFilter()
    duplicates.install()
    yield
    duplicates.remove()
