"""Profiling of a window of training steps with JAX's profiler."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from dsr_jax.core.typing import PyTree
from dsr_jax.parallel.processes import is_process_zero


class ProfileWindow:
    """Context manager that traces steps start .. start + num_steps - 1 into `workdir/profile`.

        with ProfileWindow(workdir, start=10, num_steps=3) as profile:
            for step in range(first, last):
                with profile.step(step, wait_for=metrics):
                    state, metrics = train_step(state, batch)

    A run that resumes within the window traces the rest of it. Leaving the outer block, also by an
    error, ends a trace that is still running. View it with XProf or https://ui.perfetto.dev.

    Args:
      workdir: Folder of the run.
      start: First step to trace, counted from the beginning of training.
      num_steps: Number of steps; 0 traces nothing.
      process_zero: Whether this is process 0, which traces; None asks JAX.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        start: int,
        num_steps: int,
        *,
        process_zero: bool | None = None,
    ) -> None:
        self._folder = Path(workdir) / "profile"
        wanted = is_process_zero() if process_zero is None else process_zero
        self._window = range(start, start + num_steps) if wanted else range(0)
        self._active = False

    @contextlib.contextmanager
    def step(self, step: int, wait_for: PyTree = None) -> Iterator[None]:
        """Wraps the dispatch of one step; starts and ends the trace at the window's borders.

        Args:
          step: Number of the step.
          wait_for: Results of the previous step, waited for at the window's borders, so that the
            trace contains exactly the window's steps.
        """
        if (step in self._window) != self._active:
            jax.block_until_ready(wait_for)
            if self._active:
                self.close()
            else:
                jax.profiler.start_trace(str(self._folder))
                self._active = True
        if not self._active:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def close(self) -> None:
        """Ends a running trace and writes it."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
