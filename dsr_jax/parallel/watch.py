"""Detects a process of a run that dies, hangs or fails, names it in all others and ends them.

Two threads run beside the main one. The first exchanges heartbeats (`parallel.peers`). The second
compares times with limits: how long the main thread has been in its phase, how long the other
processes have been silent. It reports and ends the process, since the main thread may be blocked in
a collective for ever.

The user gets one error and, of a run that hangs, a file per process in WORKDIR/failures.
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
from typing import NoReturn, Self

import jax

from dsr_jax.core.cli import leave, show
from dsr_jax.core.errors import DsrError, ProcessError
from dsr_jax.parallel.peers import PHASES, Heartbeat, Peers, PeerState, describe_hang, missing
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

# Prefixes of the errors that XLA and its transports raise when another process has ended.
_SYMPTOM = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds; 0 for no limit.

    Attributes:
      step: For a batch to come and for a step to be done.
      pause: For all else: start, the first step, which compiles, pictures and scores.
      save: For the part of a save that training waits for.
    """

    step: float = 0.0
    pause: float = 0.0
    save: float = 0.0

    def of(self, phase: str, compiling: bool = False) -> float:
        """Returns the limit of a phase; infinite for none."""
        if phase == "saving":
            limit = self.save
        elif phase in ("waiting for data", "in step") and not compiling:
            limit = self.step
        else:
            limit = self.pause
        return limit or float("inf")


class Watch:
    """Monitors the main thread and, in a run of several processes, the other processes.

    A context manager around everything that a run does; outside its block it only records the
    phase. In a run of several processes an error that leaves the block is sent to the others and
    then ends this process at once.

    Args:
      workdir: The run's folder; None writes no reports.
      limits: Time limits of the phases.
      end_hung: Whether a run that hangs is ended; it is reported in any case.
      peers: The other processes; None if there are none.
      service_gone: Returns whether the coordination service of process 0 refuses connections.
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
        self._phase = (PHASES[0], 0, time.monotonic(), True)
        self._ended: str | None = None
        self._failure_reason: str | None = None
        self._hung = self._troubled = False
        self._closing = threading.Event()
        self._ending = threading.Lock()

    def enter(self, phase: str, step: int, *, compiling: bool = False) -> None:
        """Records the phase that the main thread begins.

        Args:
          phase: One of `peers.PHASES`.
          step: Steps done.
          compiling: Whether this is the first step of a start, which compiles.
        """
        self._phase = (phase, step, time.monotonic(), compiling)
        self._hung = False

    def name_process(self, process: int) -> str:
        """Returns index and, where it is known, machine of a process, for messages."""
        if self._peers is None or process == self._peers.process:
            return Heartbeat(process, self._host).name
        return self._peers.seen()[process].heartbeat.name

    def heartbeat(self) -> Heartbeat:
        """Returns the state of this process."""
        phase, step, since, _ = self._phase
        return Heartbeat(
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
        threading.Thread(target=self._monitor, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        if self._peers is not None and isinstance(error, Exception):
            self._fail(self._peers, error)
        self._ended = ""
        self._closing.set()
        if self._peers is not None:
            self._send_heartbeat(self._peers)

    def _fail(self, peers: Peers, error: Exception) -> None:
        """Ends this process by its own error, or by that of another process which caused it."""
        if not isinstance(error, DsrError) and _SYMPTOM.match(str(error)):
            # The monitoring thread finds the process that ended, and ends this one.
            self._troubled = True
            self._closing.wait(self._patience(peers) + 8 * peers.interval + 2)
        with self._ending:
            self._ended = _first_line(error)
            self._send_shutdown_notice(peers)
            self._end(error)

    def _patience(self, peers: Peers) -> float:
        """Returns the seconds without heartbeat until a process is lost; fewer after an error."""
        return min(peers.lost_seconds, 4 * peers.interval if self._troubled else float("inf"))

    def _exchange(self, peers: Peers) -> None:
        """Exchanges heartbeats until the block ends."""
        while not self._closing.wait(peers.interval):
            try:
                self._failure_reason = peers.exchange(self.heartbeat())
            except (RuntimeError, ValueError):
                # No answer: `_monitor` measures for how long.
                _logger.info("the coordination service does not answer")

    def _monitor(self) -> None:
        """Compares all times with their limits until the block ends."""
        ticks = [limit / 10 for limit in vars(self._limits).values() if limit]
        tick = min([1.0, *ticks, *([self._peers.interval] if self._peers else [])])
        while not self._closing.wait(tick):
            if self._peers is not None:
                self._check_peers(self._peers)
            phase, _, since, compiling = self._phase
            if time.monotonic() - since > self._limits.of(phase, compiling) and not self._hung:
                self._report_hang()

    def _check_peers(self, peers: Peers) -> None:
        seen, failure_reason = peers.seen(), self._failure_reason
        unanswered = peers.unanswered()
        # JAX's own threads end this process six seconds after the service is gone.
        if unanswered > peers.lost_seconds or (
            unanswered > peers.interval + 1 and self._service_gone()
        ):
            problem = (
                f"{seen[0].heartbeat.name} is lost: its coordination service, which all others "
                f"need, has not answered for {unanswered:.0f} s; last seen "
                f"{seen[0].heartbeat.where}"
            )
            self._stop(ProcessError(problem, AGAIN), notify=False)
        cause = failure_reason or missing(seen, peers.process, self._patience(peers))
        if cause:
            # Where all processes have the same error, each reports its own.
            self._closing.wait(2 * peers.interval)
            self._stop(ProcessError(cause, AGAIN), failure_reason=cause)
        if any(s.heartbeat.hung for s in seen) and not self._hung:
            self._report_hang()

    def _report_hang(self) -> None:
        """Reports the stacks of this process and the phases of all; ends the run if configured."""
        self._hung = True
        # At once: when the first process ends, collectives fail and the stacks of others change.
        where = self._write_stacks()
        seen, patience = [PeerState(self.heartbeat(), 0.0)], 0.0
        if self._peers is not None:
            # Time for the others to see the heartbeat and to report too.
            patience = 3 * self._peers.interval
            self._closing.wait(patience)
            seen = self._peers.seen()
        # A process that ended before has published the reason for all.
        text = self._failure_reason or describe_hang(seen, patience)
        error = ProcessError(text, f"{where}; {AGAIN}")
        if self._end_hung:
            self._stop(error, failure_reason=text)
        show(error)

    def _stop(self, error: ProcessError, *, notify: bool = True, failure_reason: str = "") -> None:
        """Ends this process because of another, or of a hang."""
        with self._ending:
            self._ended = ""
            peers = self._peers
            if peers is not None and notify:
                if failure_reason:
                    _briefly(lambda: peers.publish_failure_reason(failure_reason))
                self._send_shutdown_notice(peers)
            self._end(error)

    def _send_heartbeat(self, peers: Peers) -> None:
        _briefly(lambda: peers.exchange(self.heartbeat()))

    def _send_shutdown_notice(self, peers: Peers) -> None:
        """Sends the last state; process 0, which serves the messages, waits for the others."""
        self._send_heartbeat(peers)
        deadline = time.monotonic() + 8 * peers.interval + 2
        while peers.process == 0 and time.monotonic() < deadline:
            others = [s for s in peers.seen() if s.heartbeat.process]
            if all(s.heartbeat.ended is not None or s.silent > 4 * peers.interval for s in others):
                break
            time.sleep(peers.interval / 4)
            self._send_heartbeat(peers)

    def _write_stacks(self) -> str:
        """Writes the stacks of all threads; returns the sentence that refers to them."""
        if self._workdir is None:
            return "look at the processes with py-spy"
        heartbeat = self.heartbeat()
        path = self._workdir / FOLDER / f"process_{heartbeat.process}.txt"
        # The storage may be what hangs.
        if _briefly(lambda: _write_report(path, heartbeat)):
            return f"the stacks of each process are in {path.parent}"
        return f"{path} could not be written: look at the storage first"


def join_watch(workdir: Path | None, limits: Limits, end_hung: bool, lost_seconds: float) -> Watch:
    """Returns the watch of this run and of its other processes, if there are any.

    Args:
      workdir: The run's folder, on storage that all processes share.
      limits: Time limits of the phases.
      end_hung: Whether a run that hangs is ended.
      lost_seconds: Silence after which a process is lost; shorter than JAX's own limit, which ends
        all processes without naming one.
    """
    peers = None
    if jax.process_count() > 1:
        client, process = coordination_client(), jax.process_index()
        peers = Peers(client, process, jax.process_count(), lost_seconds)
    return Watch(workdir, limits, end_hung=end_hung, peers=peers, service_gone=coordinator_refuses)


@contextlib.contextmanager
def join_job(lost_seconds: float = LOST_SECONDS) -> Iterator[Watch]:
    """Joins the other processes of a command, and ends all of them when one fails.

    Also a decorator of the function that holds the collective part of a command. An error of one
    process (such as a full disk on process 0) reaches the others within seconds; otherwise they
    would wait for it in a collective until JAX's own limit.

    Args:
      lost_seconds: Silence after which a process is lost.

    Raises:
      ClusterError: As in `start_processes`.
    """
    start_processes(HEARTBEAT_SECONDS + round(lost_seconds))
    with join_watch(None, Limits(), end_hung=False, lost_seconds=lost_seconds) as watch:
        yield watch


def _write_report(path: Path, heartbeat: Heartbeat) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} {heartbeat.name}, pid {os.getpid()}", file=file)
        print(f"step {heartbeat.step}, {heartbeat.phase} for {heartbeat.seconds:.0f} s", file=file)
        print("\nThe main thread is the last one below.\n", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)


def _briefly(action: Callable[[], object], seconds: float = 5.0) -> bool:
    """Runs an action that may hang or fail; returns whether it succeeded in time."""
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
