"""What the processes of a run know of one another: signs of life, places, and who is missing.

Each process writes a sign of life into the key-value store of JAX's coordination service every few
seconds and reads those of the others. A sign that stays the same for long is that of a process
which is lost; clocks of different machines are never compared.
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
"""Where a process can be, in the order of the phases of one step."""

START_SECONDS = 300.0
"""Time that processes may take longer than others to start; JAX's own for their first meeting."""

_SIGNS, _VERDICT = "dsr_jax/signs/", "dsr_jax/verdict"
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
class Sign:
    """What a process tells the others.

    Attributes:
      process: Its index.
      host: The name of its machine.
      beat: Counts signs, so that no two are equal.
      step: Steps that it has begun and, unless it is within one, ended.
      phase: One of `PHASES`.
      seconds: Time that it has spent there.
      hung: Whether it found that too long.
      ended: None while it runs, "" once it ended well or because of another process, or the error
        of its own that ended it.
    """

    process: int
    host: str = "unknown host"
    beat: int = 0
    step: int = 0
    phase: str = PHASES[0]
    seconds: float = 0.0
    hung: bool = False
    ended: str | None = None

    @property
    def name(self) -> str:
        """How messages call the process."""
        return f"process {self.process} ({self.host})"

    @property
    def where(self) -> str:
        """Where messages say it is."""
        return f"at step {self.step}, {self.phase}"

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come."""
        return self.step, PHASES.index(self.phase)


@dataclass(frozen=True)
class Seen:
    """A process as seen by another.

    Attributes:
      sign: Its last sign.
      silent: Seconds since that came.
    """

    sign: Sign
    silent: float


class Peers:
    """The signs of all processes, as one of them sees them.

    Args:
      store: What all of them write to.
      process: Index of this one.
      count: Number of processes.
      lost_seconds: Silence after which one is lost.
      now: Seconds on a clock that never goes back.
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
        # All read all; beyond some hundred processes the service would have too much to do.
        self.interval = max(min(2.0, lost_seconds / 8), count / 100)
        """Seconds between two signs."""
        self._store, self._now = store, now
        self._lock = threading.Lock()
        self._beat = 0
        self._seen = {other: (Sign(other), now()) for other in range(count)}
        self._answered = now()

    def exchange(self, sign: Sign) -> str | None:
        """Gives a sign and takes those of the others; returns the run's verdict if there is one."""
        with self._lock:
            self._beat += 1
            sign = dataclasses.replace(sign, beat=self._beat)
        own = json.dumps(dataclasses.asdict(sign))
        self._store.key_value_set(f"{_SIGNS}{self.process}", own, allow_overwrite=True)
        signs = [Sign(**json.loads(text)) for _, text in self._store.key_value_dir_get(_SIGNS)]
        verdict = dict(self._store.key_value_dir_get(_VERDICT))
        now = self._now()
        with self._lock:
            self._answered = now
            for other in signs:
                if other != self._seen[other.process][0]:
                    self._seen[other.process] = other, now
        return next(iter(verdict.values()), None)

    def seen(self) -> list[Seen]:
        """All processes, in order."""
        with self._lock:
            now = self._now()
            return [Seen(sign, now - when) for _, (sign, when) in sorted(self._seen.items())]

    def unanswered(self) -> float:
        """Seconds since the coordination service, in process 0, last answered."""
        with self._lock:
            return self._now() - self._answered

    def publish_verdict(self, verdict: str) -> None:
        """Lets all processes end for the same reason; a later one overwrites it."""
        self._store.key_value_set(f"{_VERDICT}/text", verdict, allow_overwrite=True)


def missing(seen: Sequence[Seen], process: int, lost_seconds: float) -> str | None:
    """Says which other processes failed or are lost.

    Args:
      seen: All processes.
      process: The one that asks.
      lost_seconds: Silence after which one is lost.

    Returns:
      A line per process, those that told why they ended before those that are silent; None if none
      is missing.
    """
    others = [s for s in seen if s.sign.process != process]
    failed = [f"{s.sign.name} ended: {s.sign.ended}" for s in others if s.sign.ended]
    lost = [
        f"{s.sign.name} is lost: no sign of life for {s.silent:.0f} s, last seen {s.sign.where}"
        for s in others
        if s.sign.ended is None and s.silent > lost_seconds
    ]
    return "\n".join(failed or lost) or None


def describe_hang(seen: Sequence[Seen], silent_seconds: float) -> str:
    """Says where all processes stand, and which are behind.

    Args:
      seen: All processes.
      silent_seconds: Silence that is longer than between two signs.
    """
    running = [s for s in seen if s.sign.ended is None or s.sign.hung]
    silent = [s for s in running if s.silent > silent_seconds]
    least = min((s.sign.place for s in running), default=(0, 0))
    behind = [s for s in running if s.sign.place == least]
    if len(seen) == 1:
        head = "the run does not move"
    elif silent:
        head = "the run does not move: no sign of life from " + _names(silent)
    elif len(behind) < len(running):
        head = f"the run does not move: {_names(behind)} behind the others"
    else:
        head = "the run does not move: all processes stand at the same place"
    lines = [
        f"    {s.sign.name}: {s.sign.where} for {s.sign.seconds + s.silent:.0f} s"
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
      store: What all of them write to.
      process: Index of this one.
      count: Number of processes.
      values: Versions and settings, by name, which JSON can hold. Their digests are compared; they
        themselves are read of two that differ.
      timeout: Seconds to wait for the others.

    Raises:
      ConfigError: Naming the processes that differ from most, and how.
      ProcessError: Naming the one that is late.
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
                "look at its output, or at its machine if there is none",
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


def _names(seen: Sequence[Seen]) -> str:
    some = ", ".join(s.sign.name for s in seen[:8])
    return some if len(seen) <= 8 else f"{some} and {len(seen) - 8} more"
