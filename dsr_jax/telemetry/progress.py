"""Progress on a terminal or in a log: a bar or a bounded number of lines, and long compilations."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TextIO

from tqdm import tqdm

from dsr_jax.parallel.processes import is_process_zero
from dsr_jax.telemetry.clock import Timing

MAX_LINES = 200

LINE_SECONDS = 10.0
"""Longest silence of a program that works."""


@contextlib.contextmanager
def announce(
    activity: str,
    *,
    only_if_slow: bool = False,
    every: float = LINE_SECONDS,
    stream: TextIO | None = None,
) -> Iterator[None]:
    """Prints that a long activity begins, how long it has taken, and when it has ended.

        with announce("reading weights"):
            ...

    prints "reading weights ..." at once, "reading weights: 10 s" after every ten seconds, and
    "reading weights: done in 23.4 s". Only process 0 prints. The block's error is passed on.

    Args:
      activity: Present participle: "compiling the training step".
      only_if_slow: Prints nothing of a block that takes less than `every`.
      every: Seconds between lines.
      stream: Text stream to write to; None for standard error.
    """
    if not is_process_zero():
        yield
        return
    stream = sys.stderr if stream is None else stream
    start, ended = monotonic(), threading.Event()

    def repeat() -> None:
        while not ended.wait(every):
            print(f"{activity}: {monotonic() - start:.0f} s", file=stream, flush=True)

    if not only_if_slow:
        print(f"{activity} ...", file=stream, flush=True)
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if not only_if_slow or monotonic() - start >= every:
        print(f"{activity}: done in {monotonic() - start:.1f} s", file=stream, flush=True)


def announce_compile(what: str) -> contextlib.AbstractContextManager[None]:
    """Announces the compilation of a program: `with announce_compile("the training step"):`."""
    return announce(f"compiling {what}")


def announce_first_call(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Returns a jitted function whose first call, which compiles it, is announced.

    Args:
      function: Result of `jax.jit`.
      what: Name of the program: "the sampler".
    """
    called = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        if called:
            return function(*args, **kwargs)
        with announce_compile(what):
            out = function(*args, **kwargs)
        called = True
        return out

    return call


class Progress:
    """Context manager that shows a run's loss, step time, images/s, remaining time and MFU.

    Only process 0 shows anything.

    Args:
      total_steps: Step at which the run ends.
      start_step: Step at which it starts or resumes.
      stream: Text stream to write to; None for standard error.
      max_lines: Where the stream is no terminal, at most about so many progress lines, evenly over
        the run, however often `update` is called.
      process_zero: Whether this is process 0, which shows; None asks JAX.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        max_lines: int = MAX_LINES,
        process_zero: bool | None = None,
    ) -> None:
        self._total = total_steps
        self._max_lines = max_lines
        self._stream = sys.stderr if stream is None else stream
        self._shown = is_process_zero() if process_zero is None else process_zero
        self._bucket = -1
        self._bar: tqdm | None = None
        if self._shown and self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                # tqdm's own rate and remaining time would count compilation.
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        timing: Timing | None = None,
        mfu: float | None = None,
    ) -> None:
        """Shows that `step` steps are done.

        Args:
          step: Steps done.
          loss: Without it the bar moves and no line is written.
          timing: Timing of the last lap.
          mfu: Share of the devices' peak, 0 to 1.
        """
        if not self._shown:
            return
        text = _describe(loss, timing, mfu)
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        bucket = step * self._max_lines // max(self._total, 1)
        if text and (bucket > self._bucket or step >= self._total):
            self._bucket = bucket
            self._print(f"step {step}/{self._total}, {text}")

    def log(self, text: str) -> None:
        """Writes a line without tearing the bar."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print(text)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
    """Returns a duration as [hours:]minutes:seconds."""
    return tqdm.format_interval(seconds)


def _describe(loss: float | None, timing: Timing | None, mfu: float | None) -> str:
    parts = []
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if timing is not None:
        parts += [
            f"{timing.step_seconds:.3g} s/step",
            f"{timing.images_per_second:.4g} images/s",
            f"ETA {format_seconds(timing.eta_seconds)}",
        ]
    if mfu is not None:
        parts.append(f"MFU {100 * mfu:.1f} %")
    return ", ".join(parts)
