"""State of the processes of a run, exchanged through heartbeats.

Each process writes a heartbeat into the key-value store of JAX's coordination service every few
seconds and reads those of the others. A process whose heartbeat does not change for long is lost;
clocks of different machines are never compared.
"""

import dataclasses
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dsr_jax.core.errors import ConfigError, ProcessError

PHASES = ("starting", "waiting for data", "in step", "saving", "evaluating", "finishing")
"""Phases of a run, in the order in which one step goes through them."""

START_SECONDS = 300.0
"""Time that the last process may start after the first; JAX's own limit for joining."""

_HEARTBEATS, _FAILURE_REASON = "dsr_jax/heartbeats/", "dsr_jax/failure_reason"
_DIGESTS, _DETAILS = "dsr_jax/digests/", "dsr_jax/details/"


class Store(Protocol):
    """The methods of JAX's `DistributedRuntimeClient` that are used here."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Writes a value; a key that is there already raises a RuntimeError unless allowed."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Returns the keys that begin with `key`, and their values."""
        ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Waits for a key; raises a RuntimeError if it does not come in time."""
        ...


@dataclass(frozen=True)
class Heartbeat:
    """State of a process, as it reports it to the others.

    Attributes:
      process: Index of the process.
      host: Name of its machine.
      number: Number of the heartbeat, so that no two are equal.
      step: Steps done; during a step, those before it.
      phase: One of `PHASES`.
      seconds: Time since the phase began.
      hung: Whether that is longer than its limit.
      ended: None while it runs, "" once it ended well or because of another process, or the error
        of its own that ended it.
    """

    process: int
    host: str = "unknown host"
    number: int = 0
    step: int = 0
    phase: str = PHASES[0]
    seconds: float = 0.0
    hung: bool = False
    ended: str | None = None

    @property
    def name(self) -> str:
        """Index and machine of the process, for messages."""
        return f"process {self.process} ({self.host})"

    @property
    def where(self) -> str:
        """Step and phase, for messages."""
        return f"at step {self.step}, {self.phase}"

    @property
    def progress(self) -> tuple[int, int]:
        """Step and phase as numbers that compare."""
        return self.step, PHASES.index(self.phase)


@dataclass(frozen=True)
class PeerState:
    """Last known state of a process.

    Attributes:
      heartbeat: Last heartbeat that was received.
      silent: Seconds since then.
    """

    heartbeat: Heartbeat
    silent: float


class Peers:
    """Sends the heartbeats of this process and keeps those of the others.

    Args:
      store: Key-value store that all processes reach.
      process: Index of this process.
      count: Number of processes.
      lost_seconds: Silence after which a process is lost.
      now: Monotonic clock, in seconds.
    """

    def __init__(
        self,
        store: Store,
        process: int,
        count: int,
        lost_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.process, self.lost_seconds = process, lost_seconds
        # Every process reads all heartbeats: many processes send them less often.
        self.interval = max(min(2.0, lost_seconds / 8), count / 100)
        """Seconds between two heartbeats."""
        self._store, self._now = store, now
        self._lock = threading.Lock()
        self._number = 0
        self._seen = {other: (Heartbeat(other), now()) for other in range(count)}
        self._answered = now()

    def exchange(self, heartbeat: Heartbeat) -> str | None:
        """Sends a heartbeat and reads those of the others.

        Returns:
          Why the run fails, if a process has published a reason.
        """
        with self._lock:
            self._number += 1
            heartbeat = dataclasses.replace(heartbeat, number=self._number)
        own = json.dumps(dataclasses.asdict(heartbeat))
        self._store.key_value_set(f"{_HEARTBEATS}{self.process}", own, allow_overwrite=True)
        received = self._store.key_value_dir_get(_HEARTBEATS)
        heartbeats = [Heartbeat(**json.loads(text)) for _, text in received]
        reasons = dict(self._store.key_value_dir_get(_FAILURE_REASON))
        now = self._now()
        with self._lock:
            self._answered = now
            for other in heartbeats:
                if other != self._seen[other.process][0]:
                    self._seen[other.process] = other, now
        return next(iter(reasons.values()), None)

    def seen(self) -> list[PeerState]:
        """Returns the state of all processes, by index."""
        with self._lock:
            now = self._now()
            return [PeerState(last, now - when) for _, (last, when) in sorted(self._seen.items())]

    def unanswered(self) -> float:
        """Returns the seconds since the coordination service, in process 0, last answered."""
        with self._lock:
            return self._now() - self._answered

    def publish_failure_reason(self, reason: str) -> None:
        """Makes all processes end for the same reason; a later one overwrites it."""
        self._store.key_value_set(f"{_FAILURE_REASON}/text", reason, allow_overwrite=True)


def missing(seen: Sequence[PeerState], process: int, lost_seconds: float) -> str | None:
    """Describes the other processes that failed or are lost.

    Args:
      seen: State of all processes.
      process: Index of this process.
      lost_seconds: Silence after which a process is lost.

    Returns:
      A line for each that reported an error; if none did, for each that is silent; None if no
      process is missing.
    """
    others = [s for s in seen if s.heartbeat.process != process]
    failed = [f"{s.heartbeat.name} ended: {s.heartbeat.ended}" for s in others if s.heartbeat.ended]
    lost = [
        f"{s.heartbeat.name} is lost: no heartbeat for {s.silent:.0f} s, "
        f"last seen {s.heartbeat.where}"
        for s in others
        if s.heartbeat.ended is None and s.silent > lost_seconds
    ]
    return "\n".join(failed or lost) or None


def describe_hang(seen: Sequence[PeerState], silent_seconds: float) -> str:
    """Describes the step and phase of all processes, and which of them are behind.

    Args:
      seen: State of all processes.
      silent_seconds: Silence that is longer than the time between two heartbeats.
    """
    running = [s for s in seen if s.heartbeat.ended is None or s.heartbeat.hung]
    silent = [s for s in running if s.silent > silent_seconds]
    slowest = min((s.heartbeat.progress for s in running), default=(0, 0))
    behind = [s for s in running if s.heartbeat.progress == slowest]
    if len(seen) == 1:
        head = "the run does not move"
    elif silent:
        head = "the run does not move: no heartbeat from " + _names(silent)
    elif len(behind) < len(running):
        head = f"the run does not move: {_names(behind)} behind the others"
    else:
        head = "the run does not move: all processes are at the same step and phase"
    lines = [
        f"    {s.heartbeat.name}: {s.heartbeat.where} for {s.heartbeat.seconds + s.silent:.0f} s"
        for s in (behind if len(running) > 8 else running)
    ]
    return "\n".join([head, *lines])


def check_identical(
    store: Store,
    process: int,
    count: int,
    values: Mapping[str, Any],
    timeout: float = START_SECONDS,
) -> None:
    """Checks that all processes start with the same values; every process calls it.

    Args:
      store: Key-value store that all processes reach.
      process: Index of this process.
      count: Number of processes.
      values: Versions and settings by name, as JSON values. Digests are compared; the values of two
        processes that differ are read for the message.
      timeout: Seconds to wait for the others.

    Raises:
      ConfigError: If processes differ; names those that differ from the majority, and how.
      ProcessError: If a process does not start in time.
    """
    host = socket.gethostname()
    text = json.dumps(dict(values), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    store.key_value_set(f"{_DETAILS}{process}", text)
    store.key_value_set(f"{_DIGESTS}{process}", json.dumps([host, digest]))
    hosts, digests = [], []
    for other in range(count):
        try:
            text = store.blocking_key_value_get(f"{_DIGESTS}{other}", int(timeout * 1000))
        except Exception as error:
            raise ProcessError(
                f"process {other} has not started within {timeout:.0f} s",
                "check its output, or its machine if there is none",
            ) from error
        hosts.append(json.loads(text)[0])
        digests.append(json.loads(text)[1])
    common = max(digests, key=lambda value: (digests.count(value), value == digests[0]))
    odd = [other for other, value in enumerate(digests) if value != common]
    if not odd:
        return
    details = [
        json.loads(store.blocking_key_value_get(f"{_DETAILS}{other}", int(timeout * 1000)))
        for other in (odd[0], digests.index(common))
    ]
    names = ", ".join(f"{other} ({hosts[other]})" for other in odd[:8])
    raise ConfigError(
        f"of {count} processes these differ from the others: {names}\n    "
        + "\n    ".join(differences(*details)),
        "start the same command with the same code and packages on every machine",
    )


def differences(odd: Mapping[str, Any], common: Mapping[str, Any]) -> list[str]:
    """Lists up to eight of the entries that differ."""
    names = [n for n in sorted({*odd, *common}) if odd.get(n) != common.get(n)]
    return [f"{n}: {odd.get(n)} there, {common.get(n)} elsewhere" for n in names[:8]]


def _names(seen: Sequence[PeerState]) -> str:
    some = ", ".join(s.heartbeat.name for s in seen[:8])
    return some if len(seen) <= 8 else f"{some} and {len(seen) - 8} more"
