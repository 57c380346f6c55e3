"""Names the process of a run that dies, hangs or fails, in all the others, and ends them.

Two threads look after a run. One exchanges signs of life (`parallel.peers`). The other looks at the
clock: how long the main thread has been where it is, how long the other processes are silent. It is
this second thread that speaks, since the main one may stand in a collective for ever.

What a user sees is one error and, of a run that hangs, a file per process in WORKDIR/failures.
"""

import contextlib
import datetime
import faulthandler
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import jax

from dsr_jax.core.cli import leave, show
from dsr_jax.core.errors import DsrError, ProcessError
from dsr_jax.parallel.peers import PHASES, Peers, Seen, Sign, describe_hang, missing
from dsr_jax.parallel.processes import (
    HEARTBEAT_SECONDS,
    coordination_client,
    coordinator_refuses,
    start_processes,
)

FOLDER = "failures"
LOST_SECONDS = 90.0
"""Silence after which a process is lost, in commands without a config."""

AGAIN = (
    "look at that machine and at the output of that process; the same command continues from the "
    "last checkpoint"
)

# How XLA and its transports begin the errors by which they tell of another process's end.
_SYMPTOM = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How long is too long, in seconds; 0 for no limit.

    Attributes:
      step: For a batch to come and for a step to be done.
      pause: For all else: start, the first step, which compiles, pictures and scores.
      save: For the part of a save that training waits for.
    """

    step: float = 0.0
    pause: float = 0.0
    save: float = 0.0

    def of(self, phase: str, compiling: bool = False) -> float:
        """The limit of a phase; infinite for none."""
        if phase == "saving":
            limit = self.save
        elif phase in ("waiting for data", "in step") and not compiling:
            limit = self.step
        else:
            limit = self.pause
        return limit or float("inf")


class Watch:
    """Looks after the main thread and, in a run of several processes, after the others.

    A context manager around all that a run does; outside its block it only takes notes. In a run
    of several processes an error that leaves the block ends the process at once, after the others
    have been told.

    Args:
      workdir: The run's folder; None writes no reports.
      limits: How long is too long.
      end_hung: Whether a run that hangs is ended; it is reported in any case.
      peers: The other processes; None if there are none.
      service_gone: Whether nobody listens where process 0 keeps the coordination service.
      end: Prints an error and ends the process; does not return.
    """

    def __init__(
        self,
        workdir: Path | None = None,
        limits: Limits = Limits(),  # noqa: B008
        *,
        end_hung: bool = True,
        peers: Peers | None = None,
        service_gone: Callable[[], bool] = lambda: False,
        end: Callable[[BaseException], NoReturn] = leave,
    ) -> None:
        self._workdir, self._limits, self._end_hung = workdir, limits, end_hung
        self._peers, self._service_gone, self._end = peers, service_gone, end
        self._host = socket.gethostname()
        self._place = (PHASES[0], 0, time.monotonic(), True)
        self._ended: str | None = None
        self._verdict: str | None = None
        self._hung = self._troubled = False
        self._closing = threading.Event()
        self._ending = threading.Lock()

    def enter(self, phase: str, step: int, *, compiling: bool = False) -> None:
        """Notes where the main thread is.

        Args:
          phase: One of `peers.PHASES`.
          step: Steps done.
          compiling: In the first step of a start.
        """
        self._place = (phase, step, time.monotonic(), compiling)
        self._hung = False

    def name_process(self, process: int) -> str:
        """How messages call a process, with its machine where that is known."""
        if self._peers is None or process == self._peers.process:
            return Sign(process, self._host).name
        return self._peers.seen()[process].sign.name

    def sign(self) -> Sign:
        """What this process tells the others."""
        phase, step, since, _ = self._place
        return Sign(
            process=self._peers.process if self._peers else 0,
            host=self._host,
            step=step,
            phase=phase,
            seconds=time.monotonic() - since,
            hung=self._hung,
            ended=self._ended,
        )

    def __enter__(self) -> Self:
        if self._peers is not None:
            threading.Thread(target=self._exchange, args=(self._peers,), daemon=True).start()
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._peers is not None and isinstance(error, Exception):
            self._fail(self._peers, error)
        self._ended = ""
        self._closing.set()
        if self._peers is not None:
            self._tell(self._peers)

    def _fail(self, peers: Peers, error: Exception) -> None:
        """Ends this process by an error, its own or that of another which caused it."""
        if not isinstance(error, DsrError) and _SYMPTOM.match(str(error)):
            # Whose end it is, the watching thread will find, and end this process.
            self._troubled = True
            self._closing.wait(self._patience(peers) + 8 * peers.interval + 2)
        with self._ending:
            self._ended = _first_line(error)
            self._farewell(peers)
            self._end(error)

    def _patience(self, peers: Peers) -> float:
        """Silence after which a process is lost; shorter once a collective has failed."""
        return min(peers.lost_seconds, 4 * peers.interval if self._troubled else float("inf"))

    def _exchange(self, peers: Peers) -> None:
        """Gives and takes signs until the end."""
        while not self._closing.wait(peers.interval):
            try:
                self._verdict = peers.exchange(self.sign())
            except (RuntimeError, ValueError):
                # No answer: `_look` measures for how long.
                _logger.info("the coordination service does not answer")

    def _look(self) -> None:
        """Judges what is known, until the end."""
        ticks = [limit / 10 for limit in vars(self._limits).values() if limit]
        tick = min([1.0, *ticks, *([self._peers.interval] if self._peers else [])])
        while not self._closing.wait(tick):
            if self._peers is not None:
                self._look_at_others(self._peers)
            phase, _, since, compiling = self._place
            if time.monotonic() - since > self._limits.of(phase, compiling) and not self._hung:
                self._report_hang()

    def _look_at_others(self, peers: Peers) -> None:
        seen, verdict = peers.seen(), self._verdict
        unanswered = peers.unanswered()
        # JAX's own threads end this process six seconds after the service is gone.
        if unanswered > peers.lost_seconds or (
            unanswered > peers.interval + 1 and self._service_gone()
        ):
            problem = (
                f"{seen[0].sign.name} is lost: its coordination service, which all others need, "
                f"has not answered for {unanswered:.0f} s; last seen {seen[0].sign.where}"
            )
            self._stop(ProcessError(problem, AGAIN), farewell=False)
        cause = verdict or missing(seen, peers.process, self._patience(peers))
        if cause:
            # An error that all processes have is told by each of them.
            self._closing.wait(2 * peers.interval)
            self._stop(ProcessError(cause, AGAIN), verdict=cause)
        if any(s.sign.hung for s in seen) and not self._hung:
            self._report_hang()

    def _report_hang(self) -> None:
        """Writes down where this process stands, says where all do, and ends if it is to."""
        self._hung = True
        # At once: when the first process ends, the collectives of the others fail and they move.
        where = self._write_stacks()
        seen, patience = [Seen(self.sign(), 0.0)], 0.0
        if self._peers is not None:
            # Time for the others to see the sign and to report too.
            patience = 3 * self._peers.interval
            self._closing.wait(patience)
            seen = self._peers.seen()
        # Who ended before has said it for all.
        text = self._verdict or describe_hang(seen, patience)
        error = ProcessError(text, f"{where}; {AGAIN}")
        if self._end_hung:
            self._stop(error, verdict=text)
        show(error)

    def _stop(self, error: ProcessError, *, farewell: bool = True, verdict: str = "") -> None:
        """Ends this process because of another, or of a hang."""
        with self._ending:
            self._ended = ""
            peers = self._peers
            if peers is not None and farewell:
                if verdict:
                    _briefly(lambda: peers.publish_verdict(verdict))
                self._farewell(peers)
            self._end(error)

    def _tell(self, peers: Peers) -> None:
        _briefly(lambda: peers.exchange(self.sign()))

    def _farewell(self, peers: Peers) -> None:
        """Tells the others; process 0, whom they all need to hear it, goes last."""
        self._tell(peers)
        deadline = time.monotonic() + 8 * peers.interval + 2
        while peers.process == 0 and time.monotonic() < deadline:
            others = [s for s in peers.seen() if s.sign.process]
            if all(s.sign.ended is not None or s.silent > 4 * peers.interval for s in others):
                break
            time.sleep(peers.interval / 4)
            self._tell(peers)

    def _write_stacks(self) -> str:
        """Writes where all threads stand; returns what to tell the user of it."""
        if self._workdir is None:
            return "look at the processes with py-spy"
        sign = self.sign()
        path = self._workdir / FOLDER / f"process_{sign.process}.txt"
        # The storage may be what hangs.
        if _briefly(lambda: _write_report(path, sign)):
            return f"where the threads of each process stand is in {path.parent}"
        return f"{path} could not be written: look at the storage first"


def join_watch(workdir: Path | None, limits: Limits, end_hung: bool, lost_seconds: float) -> Watch:
    """Returns a watch that knows the other processes of this run, if there are any.

    Args:
      workdir: The run's folder, on storage that all processes see.
      limits: How long is too long.
      end_hung: Whether a run that hangs is ended.
      lost_seconds: Silence after which a process is lost; less than JAX's own, since that ends all
        processes without naming one.
    """
    peers = None
    if jax.process_count() > 1:
        client, process = coordination_client(), jax.process_index()
        peers = Peers(client, process, jax.process_count(), lost_seconds)
    return Watch(workdir, limits, end_hung=end_hung, peers=peers, service_gone=coordinator_refuses)


@contextlib.contextmanager
def join_job(lost_seconds: float = LOST_SECONDS) -> Iterator[Watch]:
    """Joins the other processes of a command, and ends all of them when one fails.

    Also a decorator, of a function that does all that the processes do together. An error that only
    one of them has (a full disk under process 0, say) reaches the others within seconds, where they
    would wait for it in a collective.

    Args:
      lost_seconds: Silence after which a process is lost.

    Raises:
      ClusterError: As `start_processes`.
    """
    start_processes(HEARTBEAT_SECONDS + round(lost_seconds))
    with join_watch(None, Limits(), end_hung=False, lost_seconds=lost_seconds) as watch:
        yield watch


def _write_report(path: Path, sign: Sign) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} {sign.name}, pid {os.getpid()}", file=file)
        print(f"step {sign.step}, {sign.phase} for {sign.seconds:.0f} s", file=file)
        print("\nThe main thread is the last one below.\n", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)


def _briefly(action: Callable[[], object], seconds: float = 5.0) -> bool:
    """Tries something that may hang or fail; returns whether it was done in time."""
    done = threading.Event()

    def run() -> None:
        try:
            action()
            done.set()
        except (OSError, RuntimeError, ValueError):
            _logger.exception("while the run ends")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
