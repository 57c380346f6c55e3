"""A lock on a folder that one command at a time may write, also where hosts share the storage.

The lock is a file that names its owner: host, process, command. It is created with O_EXCL, which is
atomic also over NFS, and its owner touches it every few seconds. A second command finds out whether
the owner lives: on the same machine by asking for its process; else by the age of the last touch by
the file system's own clock, for which it may have to wait. A dead owner's lock is taken over.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dsr_jax.core.errors import LockError

FILE = ".lock.json"
TOUCH_SECONDS = 10.0
STALE_SECONDS = 90.0
"""Age of the last touch after which an owner on another machine counts as dead."""

_held: set["FolderLock"] = set()


class FolderLock:
    """Holds the lock on a folder; a context manager.

        with FolderLock(workdir):
            ...

    The folder is made if it is absent, and removed again if the block leaves it empty.

    Args:
      folder: The folder.
      lost: Called from a thread where another command has taken the lock, for example after this
        machine had been asleep; it must end the process.
      log: Takes the line that says what is waited for.
      touch_seconds: Time between two touches.
      stale_seconds: Age of the last touch after which the owner counts as dead.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        lost: Callable[[LockError], Any] | None = None,
        log: Callable[[str], Any] = lambda text: print(text, file=sys.stderr, flush=True),
        touch_seconds: float = TOUCH_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._folder, self._path = Path(folder), Path(folder) / FILE
        self._lost, self._log = lost, log
        self._touch_seconds, self._stale_seconds = touch_seconds, stale_seconds
        self._made_folder = False
        self._owner = this_process()
        self._closing = threading.Event()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          LockError: If a living process holds it, naming host and process; or if the folder cannot
            be written.
        """
        try:
            self._made_folder = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._wait_for_owner()
        except OSError as error:
            raise LockError(
                f"{self._folder} cannot be written: {error}", "mend that, or name another folder"
            ) from error
        _held.add(self)
        threading.Thread(target=self._keep, daemon=True).start()

    def release(self) -> None:
        """Gives the lock back."""
        self._closing.set()
        _held.discard(self)
        with contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()
            if self._made_folder:
                self._folder.rmdir()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _create(self) -> bool:
        """Creates the file with the owner in it; False if there is one."""
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(self._owner, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        return True

    def _wait_for_owner(self) -> None:
        """Returns once the present lock is gone; raises where its owner lives."""
        owner, touched = _read(self._path)
        if touched is None:
            return
        alive = _is_alive(owner)
        said = False
        while alive is None:
            age = self._age(touched)
            if age > self._stale_seconds:
                alive = False
                break
            if not said:
                said = True
                self._log(
                    f"{self._folder} is locked by {describe(owner)}: waiting up to "
                    f"{self._stale_seconds - age:.0f} s for a sign that it lives"
                )
            time.sleep(min(1.0, self._touch_seconds / 4))
            now = _read(self._path)
            if now[1] is None:
                return
            alive = True if now != (owner, touched) else None
        if alive:
            raise LockError(
                f"{self._folder} is in use by {describe(owner)}",
                "wait for that process or end it; the same command continues then",
            )
        self._remove(owner)

    def _remove(self, owner: dict[str, Any]) -> None:
        """Removes a dead owner's file, of which another command may be faster."""
        mine = self._path.with_name(f"{FILE}.{uuid.uuid4().hex}")
        try:
            os.rename(self._path, mine)
        except FileNotFoundError:
            return
        if _read(mine)[0] != owner:
            # That was the new lock of a command that removed the dead one first: put it back.
            with contextlib.suppress(OSError):
                os.link(mine, self._path)
        mine.unlink(missing_ok=True)

    def _age(self, touched: float) -> float:
        """Returns the seconds since a touch by the file system's clock, not this machine's."""
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=f"{FILE}.") as probe:
            return os.fstat(probe.fileno()).st_mtime - touched

    def _keep(self) -> None:
        """Touches the file until the end, and reports its loss."""
        while not self._closing.wait(self._touch_seconds):
            # A storage that does not answer or is full is for the command itself to notice.
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self._path)
                elif self._lost is not None and not self._closing.is_set():
                    owner, _ = _read(self._path)
                    self._lost(
                        LockError(
                            f"the lock of {self._folder} was lost to {describe(owner)}",
                            "this process ends, so that two never write one folder",
                        )
                    )
                    return

    def _is_ours(self) -> bool:
        return _read(self._path)[0] == self._owner


def release_all() -> None:
    """Gives back all locks of this process, which is about to end at once."""
    for lock in list(_held):
        lock.release()


def this_process() -> dict[str, Any]:
    """Returns who this process is: enough to ask later whether it still lives."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "machine": _machine(),
        "started": _start_of(pid),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "token": uuid.uuid4().hex,
    }


def describe(owner: dict[str, Any]) -> str:
    """Returns how messages call the owner of a lock."""
    if not owner:
        return "an unknown process"
    command = " ".join(map(str, owner.get("command", [])))
    process = f"process {owner.get('pid')} on {owner.get('host')}"
    return f"{process}, started {owner.get('time')} ({command})"


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the owner's process lives; None where this machine cannot know."""
    if not owner or owner.get("machine") != _machine():
        return None
    pid = owner.get("pid")
    return isinstance(pid, int) and pid > 0 and _start_of(pid) == owner.get("started")


def _read(path: Path) -> tuple[dict[str, Any], float | None]:
    """Returns a lock's owner, {} if it is not readable yet, and its last touch, None for no lock.

    Opening the file makes NFS ask the server for both.
    """
    try:
        with path.open("rb") as file:
            text, touched = file.read(1 << 16), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return {}, None
    try:
        owner = json.loads(text)
    except ValueError:
        owner = {}
    return owner if isinstance(owner, dict) else {}, touched


def _machine() -> str:
    """Returns what processes share that see each other's numbers: one boot, one PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _start_of(pid: int) -> str | None:
    """Returns when a living process began, in ticks since boot; None if there is none.

    A number is given out again; the pair of number and start is not.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "alive"
    return "alive"
