"""Lock on a folder or a name in it: one command at a time writes there, also on shared storage.

The lock is a file with the host, process and command of its owner. It is created with O_EXCL, which
is atomic over NFS as well, and its owner touches it every few seconds. A second command determines
whether the owner is alive: on the same machine from its process ID, else from the age of the last
touch by the file system's own clock, for which it may have to wait. It takes over a dead owner's
lock.
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
from typing import Any, Self

from dsr_jax.core.errors import LockError, StorageError
from dsr_jax.core.files import FULL, name_storage_errors
from dsr_jax.core.secrets import hide_secrets

FILE = ".lock.json"
TOUCH_SECONDS = 10.0
STALE_SECONDS = 90.0
"""Age of the last touch after which an owner on another machine counts as dead."""

_held: set["FolderLock"] = set()


class FolderLock:
    """Context manager that holds the lock on a folder.

        with FolderLock(workdir):
            ...

    A missing folder is created, and removed again if the block leaves it empty.

    Args:
      folder: Folder to lock.
      name: Locks only the files of this name in it; "" for the whole folder.
      lost: Called from a thread if another command has taken the lock, for example while this
        machine was suspended; it must end the process.
      log: Prints a line about waiting for the owner.
      touch_seconds: Time between two touches.
      stale_seconds: Age of the last touch after which the owner counts as dead.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str = "",
        *,
        lost: Callable[[LockError], Any] | None = None,
        log: Callable[[str], Any] = lambda text: print(text, file=sys.stderr, flush=True),
        touch_seconds: float = TOUCH_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._folder, self._what = Path(folder), Path(folder) / name
        self._path = Path(folder) / (f".{name}{FILE}" if name else FILE)
        self._lost, self._log = lost, log
        self._touch_seconds, self._stale_seconds = touch_seconds, stale_seconds
        self._made_folder = False
        self._owner = this_process()
        self._closing = threading.Event()
        # Between the thread that keeps the file and the one that removes it.
        self._guard = threading.Lock()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          LockError: If a living process holds the lock, or the folder cannot be one.
          StorageError: If the folder is not writable, or the disk is full.
        """
        try:
            with name_storage_errors(self._what):
                self._made_folder = not self._folder.exists()
                self._folder.mkdir(parents=True, exist_ok=True)
                while not self._create():
                    self._wait_for_owner()
        except StorageError:
            raise
        except OSError as error:
            raise LockError(
                f"{self._what} cannot be written: {error}",
                "check its permissions and the disk, or name another folder",
            ) from error
        _held.add(self)
        threading.Thread(target=self._keep, daemon=True).start()

    def release(self) -> None:
        """Releases the lock."""
        self._closing.set()
        _held.discard(self)
        with self._guard, contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()
            if self._made_folder:
                self._folder.rmdir()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _create(self) -> bool:
        """Creates the lock file; returns False if it exists."""
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w") as file:
                self._owner["inode"] = os.fstat(handle).st_ino
                json.dump(self._owner, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # The next command would wait for the owner of an empty file. After any other error the
            # file may be another's, as on a mounted bucket where two hosts created it at once.
            if error.errno in FULL:
                with contextlib.suppress(OSError):
                    self._path.unlink()
            raise
        return True

    def _wait_for_owner(self) -> None:
        """Returns once the existing lock is gone.

        Raises:
          LockError: If its owner is alive.
        """
        owner, touched = _read(self._path)
        if touched is None:
            return
        alive = None if _is_copy(self._path, owner) else _is_alive(owner)
        logged = False
        while alive is None:
            age = self._age(touched)
            if age > self._stale_seconds:
                alive = False
                break
            if not logged:
                logged = True
                self._log(
                    f"{self._what} is locked by {describe(owner)}: waiting up to "
                    f"{self._stale_seconds - age:.0f} s for its heartbeat"
                )
            time.sleep(min(1.0, self._touch_seconds / 4))
            now = _read(self._path)
            if now[1] is None:
                return
            if now != (owner, touched):
                owner, alive = now[0] or owner, True
        if alive:
            raise LockError(
                f"{self._what} is in use by {describe(owner)}",
                "wait for that process or stop it, then run the same command again to continue",
            )
        self._remove(owner, touched)

    def _remove(self, owner: dict[str, Any], touched: float) -> None:
        """Removes a dead owner's file, unless another command has already done so.

        One command at a time removes, so that none removes the fresh lock of another. Returns
        without having removed anything while another command does it.
        """
        guard = self._path.with_name(f"{self._path.name}.removing")
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if self._age(guard.stat().st_mtime) > self._stale_seconds:
                    guard.unlink()
            time.sleep(0.02)
            return
        try:
            if _read(self._path) == (owner, touched):
                self._path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _age(self, touched: float) -> float:
        """Returns the seconds since a touch, by the file system's clock instead of this host's."""
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=f"{self._path.name}.") as probe:
            return os.fstat(probe.fileno()).st_mtime - touched

    def _keep(self) -> None:
        """Touches the file until the lock is released; calls `lost` if the lock is lost."""
        while not self._closing.wait(self._touch_seconds):
            # The command itself notices storage that is full or does not respond.
            with contextlib.suppress(OSError):
                owner = self._touch()
                if owner is not None and self._lost is not None:
                    self._lost(
                        LockError(
                            f"the lock of {self._what} was lost to {describe(owner)}",
                            "this process exits, so that only one writes to the folder; run the "
                            "command again when the other has ended",
                        )
                    )
                    return

    def _touch(self) -> dict[str, Any] | None:
        """Touches the file, or creates it again if somebody has deleted it.

        Returns:
          The owner of the lock if it is another process; otherwise None.
        """
        with self._guard:
            if self._closing.is_set():
                return None
            owner, touched = _read(self._path)
            if touched is None and not self._create():
                owner, touched = _read(self._path)
            if owner == self._owner:
                os.utime(self._path)
            return owner if touched is not None and owner != self._owner else None

    def _is_ours(self) -> bool:
        return _read(self._path)[0] == self._owner


def is_lock(name: str) -> bool:
    """Whether a file name is that of a lock, or of a lock's own temporary file."""
    return name.startswith(".") and FILE in name


def release_all() -> None:
    """Releases all locks of this process before it exits abruptly."""
    for lock in list(_held):
        lock.release()


def this_process() -> dict[str, Any]:
    """Returns the identity of this process, by which others can check whether it is alive."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "machine": _machine(),
        "started": _start_of(pid),
        "command": [Path(sys.argv[0]).name, *map(hide_secrets, sys.argv[1:])],
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "token": uuid.uuid4().hex,
    }


def describe(owner: dict[str, Any]) -> str:
    """Returns the description of a lock's owner for messages."""
    if not owner:
        return "an unknown process"
    words = owner.get("command")
    command = " ".join(map(str, words)) if isinstance(words, list) else "unknown command"
    process = f"process {owner.get('pid')} on {owner.get('host')}"
    return f"{process}, started {owner.get('time')} ({command})"


def _is_copy(path: Path, owner: dict[str, Any]) -> bool:
    """Whether the lock may have come with a copied folder, whose owner does not touch it."""
    with contextlib.suppress(OSError):
        inode = path.stat().st_ino
        return bool(owner.get("inode", inode) != inode)
    return False


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the owner's process is alive; None if this machine cannot tell."""
    pid, started = owner.get("pid"), owner.get("started")
    if started is None or owner.get("machine") != _machine():
        return None
    return isinstance(pid, int) and pid > 0 and _start_of(pid) == started


def _read(path: Path) -> tuple[dict[str, Any], float | None]:
    """Returns a lock's owner ({} if not readable yet) and its last touch (None without a lock).

    Opening the file makes NFS fetch both from the server.
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
    """Returns an identifier of this boot and PID namespace, within which process IDs are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _start_of(pid: int) -> str | None:
    """Returns the start time of a living process in ticks since boot; None if there is none.

    Process IDs are reused; pairs of process ID and start time are not.
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
